"""The house itself: which way imports run, what a command may load, that every recipe composes, that the README is true."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING
from test_cli import BESIDE, MANDATORY, finished_run, invoke, make_work, write_rows
from tiny import tiny_tokenizer

from alignkit.cli import entry
from alignkit.config import stages as config
from alignkit.data import rows
from alignkit.report import summary
from alignkit.rewards.base import Context

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "alignkit"
COMMANDS = ["sft", "sample", "reward", "ppo", "evaluate", "pipeline"]

# --------------------------------------------------------------------------------------------------------- imports


def lint_imports(folder: Path) -> str:
    """What lint-imports says of a checkout."""
    script = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run(
        [sys.executable, str(script), "--no-cache"], cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_imports_run_one_way():
    assert "0 broken" in lint_imports(ROOT)


def test_a_planted_violation_of_each_contract_is_found(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "alignkit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, line in {
        "runs/lock.py": "from alignkit.data import rows",
        "data/rows.py": "from alignkit.tracking import run_log",
        "check/model.py": "import vllm",
        "launch/local.py": "from deepspeed import launcher",
        "algorithms/grpo.py": "import transformers",
        "jobs/queue.py": "from alignkit.stages import ppo",
    }.items():
        path = tmp_path / "alignkit" / file
        path.write_text(f"{path.read_text()}\n\ndef planted():\n    {line}\n")
    (tmp_path / "alignkit" / "attic").mkdir()
    (tmp_path / "alignkit" / "attic" / "__init__.py").touch()
    said = lint_imports(tmp_path)
    assert "attic" in said, said  # a room without a place
    shutil.rmtree(tmp_path / "alignkit" / "attic")
    said = lint_imports(tmp_path)
    assert "5 broken" in said, said
    for found in (
        "runs.lock -> alignkit.data.rows", "data.rows -> alignkit.tracking.run_log", "check.model -> vllm",
        "launch.local -> deepspeed", "algorithms.grpo -> transformers", "jobs.queue -> alignkit.stages",
    ):  # fmt: skip
        assert found in said, found


def test_rooms_stay_small():
    rooms = {path.name: len([*path.glob("[!_]*.py")]) for path in PACKAGE.iterdir() if path.is_dir()}
    assert {room: count for room, count in rooms.items() if count > 10} == {}
    assert sorted(path.name for path in PACKAGE.glob("*.py")) == ["__init__.py", "__main__.py", "worker.py"]


def test_modules_stay_short():
    lengths = {p.relative_to(PACKAGE).as_posix(): len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert {file: n for file, n in lengths.items() if n > 420} == {}


# --------------------------------------------------------------------------------------------- what a command loads

HEAVY = ("torch", "vllm", "deepspeed", "transformers", "trl", "peft", "datasets", "wandb", "pandas", "matplotlib")


def test_the_command_line_loads_nothing_heavy():
    code = (
        "import sys, alignkit.cli, alignkit.config\nalignkit.config.register()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def seconds(*arguments: str) -> float:
    """Processor seconds of `alignkit arguments…`, the best of up to three tries, stopping at the first good one.

    Nothing here waits, so on a quiet machine this is the time on the clock, and a busy machine does not change it.
    """
    best = float("inf")
    for _ in range(3):
        script = Path(sys.executable).parent / "alignkit"
        with open(os.devnull, "w") as nowhere:
            process = subprocess.Popen([script, *arguments], stdout=nowhere, stderr=subprocess.PIPE, text=True)
            error = process.stderr.read()
            process.stderr.close()
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, error
        best = min(best, usage.ru_utime + usage.ru_stime)
        if best < 1:
            break
    return best


def test_help_answers_within_a_second():
    assert seconds("--help") < 1


@pytest.mark.parametrize("question", [["--help"], ["--cfg", "job"]], ids=" ".join)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_answers_within_two_seconds(name, question):
    assert seconds(name, *question) < 2


def test_help_lists_every_command_and_each_command_its_groups_and_keys(tmp_path):
    out = invoke("--help", cwd=tmp_path).out
    assert all(re.search(rf"^  {name} ", out, re.M) for name in (*COMMANDS, *entry.TOOLS))
    out = invoke("ppo", "--help", cwd=tmp_path).out
    for group in config.GROUPS:
        assert f"{group}: {', '.join(config.components(group))}" in out
    assert "clip_range: 0.2" in out and "rollout_batch_size: 64" in out
    assert "alignkit ppo" in out


# ----------------------------------------------------------------------------------------------------------- recipes

# What an experiment leaves to the person, if anything.
EXPERIMENTS = {path.stem: [] for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml"))}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The files that MANDATORY and the README speak of."""
    folder = make_work(tmp_path_factory.mktemp("house") / "work")
    for stage in ("sft", "reward", "ppo"):
        finished_run(folder / "runs/mine" / stage, stage, folder / "model")
    tiny_tokenizer(folder / "runs/mine/sft/model")
    finished_run(folder / "runs/mine/sample", "sample", folder / "model", adapter=None)
    write_rows(folder / "runs/mine/sample/pairs.jsonl", {"prompt": "p", "chosen": "yes", "rejected": "no"})
    write_rows(folder / "held_out.jsonl", {"prompt": "p"})
    write_rows(folder / "trivia.jsonl", {"question": "q", "answer": "a"})
    (folder / "my_reward.py").write_text(blocks("python")[0])
    return folder


@pytest.fixture
def no_conversion(work, monkeypatch):
    """The packaged model counts as converted: a dry run needs its folder, not its weights."""
    from alignkit.data import demo

    monkeypatch.setattr(demo, "model", lambda name="smollm2-135m-instruct", cache=None: work / "model")


def composed(command: str, *overrides: str):
    config.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(entry.conf_dir()), version_base="1.3"):
        return compose(command, list(overrides))


def complete(command: str, *more: str) -> list[str]:
    return [*(f"{key}={value}" for key, value in MANDATORY[command].items()), *BESIDE.get(command, []), *more]


def typed(command: str, *more: str):
    return config.to_config(composed(command, *complete(command, *more)), command)


def test_every_yaml_is_a_command_or_an_experiment():
    files = {path.relative_to(ROOT / "conf").as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    assert files == {f"{name}.yaml" for name in COMMANDS} | {f"experiment/{name}.yaml" for name in EXPERIMENTS}
    assert set(config.STAGES) == set(COMMANDS) == set(entry.COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_composes_to_its_type(name):
    made = typed(name)
    assert type(made) is config.STAGES[name]
    for group in made.groups:
        part = getattr(made, group)
        assert config.components(group)[part.name] is type(part)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_to_a_pipeline(name):
    made = config.to_config(composed("pipeline", f"+experiment={name}", *EXPERIMENTS[name]), "pipeline")
    assert [stage.stage for stage in made.stages()] == ["sft", "sample", "reward", "ppo", "evaluate"]
    for stage in made.stages():
        assert (stage.run_name, stage.runs_dir, stage.seed) == (made.run_name, made.runs_dir, made.seed)
        for group in set(stage.groups) & set(made.groups):
            assert getattr(stage, group) == getattr(made, group)


def test_what_is_set_at_the_top_of_a_pipeline_reaches_every_stage():
    made = typed("pipeline", "seed=7", "launcher.num_ranks=2", "model.dtype=bfloat16", "rollout=hf", "finetune=full")
    for stage in made.stages():
        assert (stage.seed, stage.launcher.num_ranks, stage.model.dtype) == (7, 2, "bfloat16")
    assert made.sample.rollout.name == made.ppo.rollout.name == made.evaluate.rollout.name == "hf"
    assert made.sft.finetune.name == made.reward.finetune.name == made.ppo.finetune.name == "full"


OPTIONS = [(group, name) for group in config.GROUPS for name in config.components(group)]


@pytest.mark.parametrize(("group", "name"), OPTIONS, ids=[f"{group}={name}" for group, name in OPTIONS])
def test_every_option_of_every_group_composes_to_its_dataclass(group, name):
    assert re.fullmatch(r"[a-z][a-z0-9_]*", name), f"{name!r} is no name of an option"
    cls = config.components(group)[name]
    where = "rewards.extra" if group == "reward" else group
    choice = f"+reward@rewards.extra={name}" if group == "reward" else f"{group}={name}"
    needed = [f"{where}.{f.name}=x" for f in fields(cls) if f.default is MISSING]
    command = "evaluate" if group == "reward" else "ppo"  # PPO takes one reward model
    groups = ["group_size=2"] if name in ("rloo", "grpo") else []
    made = typed(command, choice, *needed, *groups)
    part = made.rewards["extra"] if group == "reward" else getattr(made, group)
    assert type(part) is cls and part.name == name


def test_every_group_has_its_options():
    expected = {
        "algorithm": {"grpo", "ppo", "reinforce_pp", "rloo"},
        "rollout": {"hf", "server", "vllm"},
        "reward": {"function", "reward_model", "vader"},
        "finetune": {"full", "lora", "qlora"},
        "launcher": {"local", "slurm"},
        "deepspeed": {"zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"},
        "logger": {"none", "tensorboard", "wandb"},
    }
    assert {group: set(config.components(group)) >= names for group, names in expected.items()} == dict.fromkeys(
        expected, True
    )


def test_every_default_is_said_with_its_meaning():
    """A key of a stage has a comment beside it, or its dataclass says what it is."""
    source = (PACKAGE / "config" / "stages.py").read_text()
    for cls in (config.Stage, config.TrainStage, config.Reward, config.Sample, config.PPO, config.Evaluate):
        assert cls.__doc__
        body = source[
            source.index(f"class {cls.__name__}(") if cls is not config.Stage else source.index("class Stage:") :
        ]
        for f in fields(cls):
            if f.name in cls.__annotations__ and f.name not in config.GROUPS and not is_dataclass(f.type):
                line = re.search(rf"^    {f.name}: .*$", body, re.M)[0]
                assert "#" in line or "field(default_factory=" in line, f"{cls.__name__}.{f.name} has no comment"


# --------------------------------------------------------------------------------------------------------- save, load

UNLIKE_THE_DEFAULTS = {
    "sft": ["finetune.target_modules=[q_proj,v_proj]", "optimizer.betas=[0.8,0.9]", "+data.columns.prompt=question"],
    "sample": ["rollout.stop_token_ids=[5,6]", "data.limit=3", "finished_only=false", "logger=tensorboard"],
    "reward": ["finetune=full", "normalize=none", "center_coef=0.01", "launcher.threads=2", "deepspeed=zero3"],
    "ppo": [
        *("algorithm.value_clip_range=null", "algorithm.adaptive_kl_target=3", "rollout=hf", "finetune.last_layers=1"),
        *("+reward@rewards.mine=function", "rewards.mine.target=my_reward.py:score", "rewards.mine.weight=0.5"),
        *("logger.tags=[a,b]", "critic_optimizer.schedule=cosine", "model.chat_template=t.jinja"),
    ],
    "evaluate": ["+policies.other=runs/base/ppo", "reference=other", "logger=none", "rollout.temperature=0.7"],
}


@pytest.mark.parametrize("more", [False, True], ids=["defaults", "changed"])
@pytest.mark.parametrize("stage", UNLIKE_THE_DEFAULTS)
def test_a_saved_config_is_read_back_equal(tmp_path, stage, more):
    made = typed(stage, *(UNLIKE_THE_DEFAULTS[stage] if more else []))
    config.save(made, tmp_path / "config.yaml")
    back = config.load(tmp_path / "config.yaml", stage)
    assert back == made and type(back) is type(made)
    for f in fields(made):
        assert type(getattr(back, f.name)) is type(getattr(made, f.name))
    assert config.config_hash(back) == config.config_hash(made)
    config.save(back, tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "config.yaml").read_text()
    assert "${" not in (tmp_path / "config.yaml").read_text()
    if more:
        assert config.config_hash(made) != config.config_hash(typed(stage))


@pytest.mark.parametrize("number", range(5))
def test_a_stage_of_a_pipeline_is_saved_and_read_back_equal(tmp_path, number):
    made = typed("pipeline", "launcher.num_ranks=2", "seed=3").stages()[number]
    config.save(made, tmp_path / "config.yaml")
    assert config.load(tmp_path / "config.yaml", made.stage) == made


def test_the_config_hash_leaves_out_names_places_and_launch_but_nothing_that_is_computed_with():
    plain = config.config_hash(typed("ppo"))
    names = ("run_name=other", "runs_dir=elsewhere", "launcher.num_ranks=2", "logger=none", "resume=true")
    saving = ("verify=full", "save_steps=5", "keep_last=3", "keep_best=objective/score", "max_seconds=9")
    checks = ("data.lint=off", "ptx.data.lint=strict")
    for same in names + saving + checks:
        assert config.config_hash(typed("ppo", same)) == plain
    for other in ("seed=1", "data.limit=3", "algorithm.gamma=0.9", "rollout=hf", "model.dtype=bfloat16", "steps=3"):
        assert config.config_hash(typed("ppo", other)) != plain


# ----------------------------------------------------------------------------------------------------------- the README


@lru_cache
def readme() -> str:
    return (ROOT / "README.md").read_text()


def blocks(language: str, text: str | None = None) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", readme() if text is None else text, re.M | re.S)


def commands(text: str | None = None) -> list[str]:
    """Every `alignkit …` line of the bash blocks."""
    lines = [line.strip() for block in blocks("bash", text) for line in block.splitlines()]
    return [line for line in lines if line.startswith("alignkit ")]


README_COMMANDS = commands()


def test_the_readme_shows_every_command_and_no_block_is_passed_over():
    shown = {shlex.split(line)[1] for line in README_COMMANDS}
    assert shown >= set(COMMANDS)
    fenced = re.findall(r"^```.*?^```$", readme(), re.M | re.S)
    assert sum(len(re.findall(r"^\s*alignkit ", block, re.M)) for block in fenced) == len(README_COMMANDS)
    assert (readme().count("<!-- quickstart output -->"), readme().count("<!-- /quickstart output -->")) == (1, 1)


@pytest.mark.parametrize("line", README_COMMANDS)
def test_every_command_of_the_readme_works(work, no_conversion, line):
    words = shlex.split(line)[1:]
    if "--help" in words or "--cfg" in words or words[0] == "check":
        tries = [words]
    elif words[0] in entry.TOOLS:
        tries = [[words[0], "--help"]]  # of runs that are not here; their own tests run them
    elif "-m" in words:
        tries = [[*words, "dry_run=true"]]
    else:
        tries = [[*words, "--cfg", "job"], [*words, "dry_run=true"]]
    for arguments in tries:
        result = invoke(*arguments, cwd=work)
        assert (result.code, result.err) == (0, ""), f"alignkit {shlex.join(arguments)}: {result.err}"
        assert result.out
    if "-m" in words:  # each job of the sweep, under a name of its own
        names = re.findall(r"^run_name: (.*)$", result.out, re.M)
        stages = 5 if words[0] == "pipeline" else 1
        assert len(names) == stages * len(set(names)) > stages


def test_the_readmes_reward_scores_as_it_says(work):
    from alignkit.rewards.function import Function

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        reward = Function(target="my_reward.py:score")
        assert reward.load()(["p"] * 3, ["one two", "", " ".join("abcdefghijklm")], [{}] * 3) == [0.2, 0.0, 1.0]
        assert callable(reward.start(Context(tokenizer=None)))


def test_the_commands_a_run_ends_with_work(work, no_conversion):
    for line in summary.default_next_commands(work / "runs" / "none"):
        line = re.sub(r"<hub id or folder>", "model", line.split("  #")[0])
        line = re.sub(r"<([a-z-]+)\.jsonl>", lambda m: m[1].replace("-", "_") + ".jsonl", line)
        result = invoke(*shlex.split(line)[1:], "dry_run=true", cwd=work)
        assert (result.code, result.err) == (0, ""), f"{line}: {result.err}"


def test_the_first_command_of_the_usage_works(work, no_conversion):
    first = re.search(r"^first run: alignkit (.*)$", entry.USAGE, re.M)[1]
    assert invoke(*first.split(), "dry_run=true", cwd=work).code == 0


def test_the_map_of_files_is_complete_and_true():
    rows = re.findall(r"^\| (`[^|]*) \| ([^|]+) \|$", readme()[readme().index("## The files") :], re.M)
    named = [path for paths, _ in rows for path in re.findall(r"`([^`]+)`", paths)]
    named += re.findall(r"`(scripts/[\w.]+)`", readme())
    for path in named:
        assert list(ROOT.glob(path.rstrip("/"))), f"the README names {path}, which does not exist"
    files = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert files - set(named) == set(), "these files have no line in the README's map"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_files_and_names_that_a_page_mentions_exist(page):
    text = (ROOT / page).read_text()
    for path in re.findall(r"`((?:alignkit|tests|conf|scripts|stubs)/[\w./]+)`", text):
        if not re.search(r"/x\.(py|yaml)$", path):
            assert (ROOT / path).exists(), f"{page} names {path}, which does not exist"
    for name in ("_sft_row", "_preference_row", "_prompt_row"):
        assert name not in text or hasattr(rows, name)


def test_the_scripts_are_executable_and_shell_parses_them():
    for name in ("scripts/quickstart.sh", "scripts/test.sh", ".ci/run"):
        path = ROOT / name
        assert os.access(path, os.X_OK), f"{name} is not executable"
        assert "set -euo pipefail" in path.read_text() or name == ".ci/run"
    for path in (*ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"):
        subprocess.run(["bash", "-n", str(path)], check=True)
    assert "scripts/test.sh" in (ROOT / ".ci/run").read_text()


def test_a_complete_environment_is_not_installed_again(tmp_path):
    """`make_env` goes by its stamp: same files and extras among those installed, or it installs."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "_env.sh").write_text((ROOT / "scripts" / "_env.sh").read_text())
    (tmp_path / "pyproject.toml").write_text("one")
    (tmp_path / "stubs" / "a").mkdir(parents=True)
    (tmp_path / "stubs" / "a" / "pyproject.toml").write_text("stub")
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(sys.executable)
    (binaries / "alignkit").write_text("")
    (binaries / "alignkit").chmod(0o755)

    def shell(line: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"source scripts/_env.sh; {line}"],
            cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    complete = "if env_is_complete {}; then echo yes; else echo no; fi"
    assert shell(complete.format("cpu,demo")) == "no"
    (tmp_path / ".venv" / "installed").write_text(shell("env_hash .venv/bin/python") + " cpu,demo,dev\n")
    assert shell(complete.format("cpu,demo")) == shell(complete.format("cpu,demo,dev")) == "yes"
    assert shell("make_env cpu,demo; echo done") == "done"
    assert shell(complete.format("cpu,gpu")) == "no"
    (tmp_path / "pyproject.toml").write_text("two")
    assert shell(complete.format("cpu,demo")) == "no"


def test_what_pip_is_told_is_handed_to_uv(tmp_path):
    """Index, wheel folder and certificate reach uv under its own names; what is set for uv already stays."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "_env.sh").write_text((ROOT / "scripts" / "_env.sh").read_text())
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')  # a link would lose its packages
    python.chmod(0o755)
    (tmp_path / "pip.conf").write_text(
        "[global]\nextra-index-url =\n    file:///a\n    file:///b\nfind-links = /one /two\n"
    )
    names = ("UV_FIND_LINKS", "UV_INDEX", "UV_DEFAULT_INDEX", "UV_TORCH_BACKEND", "UV_INDEX_STRATEGY", "SSL_CERT_FILE")

    def told(**given: str) -> dict[str, str | None]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_", "SSL_"))} | given
        code = f"import json, os; print(json.dumps({{n: os.environ.get(n) for n in {names!r}}}))"
        line = f"source scripts/_env.sh; tell_uv; {shlex.quote(sys.executable)} -c {shlex.quote(code)}"
        done = subprocess.run(["bash", "-ec", line], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    configured = told(PIP_CONFIG_FILE=str(tmp_path / "pip.conf"), PIP_CERT="/c.pem")
    assert configured == {
        "UV_FIND_LINKS": "/one,/two",
        "UV_INDEX": "file:///a file:///b",
        "UV_DEFAULT_INDEX": None,
        "UV_TORCH_BACKEND": None,
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "SSL_CERT_FILE": "/c.pem",
    }
    bare = told(PIP_CONFIG_FILE=os.devnull)
    assert bare["UV_TORCH_BACKEND"] == "cpu" and bare["UV_FIND_LINKS"] is bare["UV_INDEX"] is None
    own = told(
        PIP_CONFIG_FILE=os.devnull, PIP_INDEX_URL="https://pip.example/simple", UV_DEFAULT_INDEX="https://uv.example"
    )
    assert own["UV_DEFAULT_INDEX"] == "https://uv.example"


def test_python_that_is_too_old_is_refused_in_one_line(tmp_path):
    (tmp_path / "python3").write_text(
        "#!/bin/sh\ncase \"$2\" in *version_info*) exit 1;; *) echo 'python3 is 3.9.2';; esac\n"
    )
    (tmp_path / "python3").chmod(0o755)
    for tool in ("bash", "dirname"):
        path = subprocess.run(["which", tool], capture_output=True, text=True, check=True).stdout.strip()
        (tmp_path / tool).symlink_to(path)
    line = f"source {shlex.quote(str(ROOT / 'scripts' / '_env.sh'))}; find_python"
    done = subprocess.run(["bash", "-c", line], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "needs Python 3.11 or newer, and python3 is 3.9.2" in done.stderr


def test_what_was_written_before_there_were_rooms_still_imports():
    from alignkit.core import before

    code = (
        "import importlib, sys\nfrom alignkit.core import before\n"
        "for name in before.MOVED:\n    importlib.import_module(f'alignkit.{name}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    code = (
        "import sys\nfrom alignkit import artifacts, config, jobs, models, pipeline, tokens, types\n"
        "from alignkit.check_model import check_source\nfrom alignkit.cli import conf_dir, main\nfrom alignkit.data import Data\n"
        "from alignkit.core import errors\nassert types.InputError is errors.InputError\n"
        "print(artifacts.resolve_model.__module__, config.load.__module__, jobs.first_error.__module__, 'torch' in sys.modules)\n"
        "try:\n    from alignkit.types import Nothing\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    said, refused = done.stdout.splitlines()
    assert said == "alignkit.models.source alignkit.config.stages alignkit.jobs.steps False", done.stderr
    assert "Nothing" in refused
    for new in (part for parts in before.MOVED.values() for part in parts):
        assert (PACKAGE / f"{new.replace('.', '/')}.py").is_file(), new
