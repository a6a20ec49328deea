"""What the command line refuses, in one line and before anything is written, and what `dry_run` shows.

`invoke` runs the real `main` in this process; starting a stage from it fails the test.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from tiny import BOS, EOS, PAD, TEMPLATE

from alignkit.cli import entry
from alignkit.launch.local import Local
from alignkit.runs import manifests

STAGES = ("sft", "sample", "reward", "ppo", "evaluate")
# What each command cannot do without, on the files of the `work` fixture.
MANDATORY = {
    "sft": {"run_name": "new", "model.path": "runs/base/sft", "data.path": "answers.jsonl"},
    "sample": {"run_name": "new", "model.path": "runs/base/sft", "data.path": "prompts.jsonl"},
    "reward": {"run_name": "new", "model.path": "runs/base/sft", "data.path": "pairs.jsonl"},
    "ppo": {
        "run_name": "new",
        "model.path": "runs/base/sft",
        "data.path": "prompts.jsonl",
        "rewards.reward_model.path": "runs/base/reward",
    },
    "evaluate": {"run_name": "new", "data.path": "prompts.jsonl"},
    "pipeline": {
        "run_name": "new",
        "model.path": "model",
        "sft.data.path": "answers.jsonl",
        "sample.data.path": "prompts.jsonl",
        "ppo.data.path": "prompts.jsonl",
        "evaluate.data.path": "prompts.jsonl",
    },
}
# What each command needs beside: a score and something to compare.
BESIDE = {
    "sample": ["+reward@rewards.gold=vader"],
    "evaluate": ["+reward@rewards.gold=vader", "+policies.sft=runs/base/sft"],
    "pipeline": ["+reward@sample.rewards.gold=vader", "+reward@evaluate.rewards.gold=vader"],
}


@dataclass
class Result:
    code: int
    out: str
    err: str


def invoke(*arguments: str, cwd: Path) -> Result:
    """`alignkit arguments…` in the folder `cwd`, in this process."""

    def started(self, stage, run_dir, label):
        raise AssertionError(f"the launcher was asked to start {stage} in {run_dir}")

    handler = signal.getsignal(signal.SIGTERM)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["alignkit", *arguments])
        patch.setattr(Local, "run", started)
        patch.setenv("HYDRA_FULL_ERROR", "1")  # so that what main sets is undone
        patch.delenv("HYDRA_FULL_ERROR")
        code = 0
        try:
            entry.main()
        except SystemExit as error:
            code = error.code
        finally:
            GlobalHydra.instance().clear()
            signal.signal(signal.SIGTERM, handler)
    return Result(code, out.getvalue(), err.getvalue())


def command(name: str, *more: str, without: str = "") -> list[str]:
    """A complete command line, but for the key `without`."""
    given = [f"{key}={value}" for key, value in MANDATORY[name].items() if key != without]
    return [name, *given, *BESIDE.get(name, []), *more]


def write_rows(path: Path, *rows: dict) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def finished_run(run_dir: Path, stage: str, base: Path, tokenizer_hash: str = "t0", **changes) -> None:
    """A run folder as a stage leaves it, with an adapter of no weights."""
    (run_dir / "model").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, run_dir / "model" / name)
    write_weights(run_dir / "model" / "adapter_model.safetensors")
    if stage == "reward":
        write_weights(run_dir / "model" / "score_head.safetensors")
    (run_dir / "model" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(base), "r": 16, "lora_alpha": 32})
    )
    facts = {"base_model": {"path": str(base), "hash": None}, "adapter": True, "tokenizer_hash": tokenizer_hash}
    manifests.write_manifest(
        run_dir, **{"stage": stage, "status": "done", "config_hash": "c0", "metrics": {}, **facts, **changes}
    )


def write_weights(path: Path) -> None:
    """A safetensors file without tensors."""
    path.write_bytes((2).to_bytes(8, "little") + b"{}")


def write_model(folder: Path) -> None:
    """A model folder as far as the command line reads it: facts, a token a byte, ChatML; no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True)
    facts = {"max_position_embeddings": 2048, "num_hidden_layers": 30, "vocab_size": 259}
    (folder / "config.json").write_text(json.dumps(facts))
    write_weights(folder / "model.safetensors")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, PAD, BOS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def make_work(folder: Path) -> Path:
    """A folder with a model, rows of each kind, a reward function and finished runs in runs/base."""
    model = folder / "model"
    write_model(model)
    write_rows(folder / "answers.jsonl", *({"prompt": f"p{i}", "completion": f"c{i}"} for i in range(4)))
    write_rows(folder / "prompts.jsonl", *({"prompt": f"p{i}"} for i in range(4)))
    write_rows(folder / "pairs.jsonl", *({"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(4)))
    (folder / "my_reward.py").write_text("def score(prompts, responses, meta):\n    return [0.0 for _ in responses]\n")
    for stage in ("sft", "reward", "ppo"):
        finished_run(folder / "runs" / "base" / stage, stage, model)
    return folder


def snapshot(folder: Path) -> dict[str, str]:
    """{path: hash of what it holds} of all that lies below; of a lock only that it is there."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file() and path.name != ".lock"
        else ""
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


@pytest.fixture
def work(tmp_path):
    return make_work(tmp_path / "work")


def refused(work: Path, arguments: list[str], *words: str) -> str:
    """The message of a refusal, which must be one line with all `words` in it and leave no trace in the folder."""
    before = snapshot(work)
    result = invoke(*arguments, cwd=work)
    assert result.code == 2, f"exit code {result.code}: {result.err or result.out}"
    lines = result.err.splitlines()
    assert len(lines) == 1, f"{len(lines)} lines on stderr:\n{result.err}"
    assert lines[0].startswith("alignkit: ")
    assert result.out == ""
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"
    assert snapshot(work) == before
    return lines[0]


# ------------------------------------------------------------------------------------------------------- dry run


@pytest.mark.parametrize("name", [*STAGES, "pipeline"])
def test_a_dry_run_prints_config_and_command_and_leaves_nothing(work, name):
    before = snapshot(work)
    result = invoke(*command(name, "dry_run=true"), cwd=work)
    assert (result.code, result.err) == (0, "")
    stages = STAGES if name == "pipeline" else (name,)
    commands = [line for line in result.out.splitlines() if line.startswith("$ ")]
    assert len(commands) == len(stages)
    for stage, line in zip(stages, commands, strict=True):
        assert line.endswith(f"--module alignkit.worker {stage} runs/new/{stage}")
        assert "alignkit.launch.node" in line and "--num_gpus 1" in line
        shown = result.out.split(f"# {stage}\n", 1)[1].split("\n$ ", 1)[0]
        config = OmegaConf.create(shown)
        assert config.run_name == "new" and config.logger.name == "wandb" and "${" not in shown
    assert snapshot(work) == before


def test_a_dry_run_of_a_pipeline_takes_what_earlier_stages_will_make_for_granted(work):
    out = invoke(*command("pipeline", "dry_run=true"), cwd=work).out
    ppo = OmegaConf.create(out.split("# ppo\n", 1)[1].split("\n$ ", 1)[0])
    assert ppo.model.path == "runs/new/sft" and ppo.rewards.reward_model.path == "runs/new/reward"


def test_the_number_of_ranks_reaches_the_launch_command(work):
    out = invoke(*command("sft", "dry_run=true", "launcher.num_ranks=2", "launcher.port=1234"), cwd=work).out
    assert "--num_gpus 2 --master_port 1234" in out


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in MANDATORY.items() for key in keys])
def test_a_missing_mandatory_key_is_named(work, name, key):
    refused(work, command(name, without=key), f"{key} is not set", f"add {key}=")


@pytest.mark.parametrize("name", ["sft", "reward", "sample", "ppo", "evaluate"])
def test_a_missing_data_file(work, name):
    refused(work, command(name, "data.path=nope.jsonl"), "nope.jsonl", "no such file", "did you mean")


def test_a_missing_data_file_of_a_late_stage_stops_a_pipeline_before_its_first(work):
    refused(work, command("pipeline", "evaluate.data.path=nope.jsonl"), "nope.jsonl", "no such file")


def test_a_row_without_the_field_names_line_field_and_mapping(work):
    write_rows(work / "bad.jsonl", {"prompt": "a", "completion": "b"}, {"question": "a", "completion": "b"})
    refused(work, command("sft", "data.path=bad.jsonl"), "bad.jsonl line 2", "'prompt'", "columns.prompt=question")


def test_the_mapping_a_refused_row_suggests_can_be_pasted(work):
    write_rows(work / "bad.jsonl", {"question": "a", "completion": "b"})
    message = refused(work, command("sft", "data.path=bad.jsonl"), "+data.columns.prompt=question")
    fix = message[message.index("+data.columns") :].split()[0].rstrip(".,:;")
    assert invoke(*command("sft", "data.path=bad.jsonl", fix, "dry_run=true"), cwd=work).code == 0


def test_a_mapping_without_its_plus_is_told_so(work):
    refused(work, command("sft", "data.columns.prompt=question"), "data.columns.prompt", "+data.columns.prompt=")


def test_a_line_that_is_no_json(work):
    (work / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    refused(work, command("sft", "data.path=bad.jsonl"), "bad.jsonl line 2", "not JSON")


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_data_set(work, text):
    (work / "empty.jsonl").write_text(text)
    refused(work, command("sft", "data.path=empty.jsonl"), "empty.jsonl", "no rows", "expected at least one")


@pytest.mark.parametrize(
    ("name", "override", "near"),
    [
        ("sft", "mini_batch_sise=8", "mini_batch_size"),
        ("sft", "finetune.rnk=8", "finetune.rank"),
        ("sft", "max_lenght=8", "max_length"),
        ("sample", "rollout.temprature=1", "rollout.temperature"),
        ("reward", "center_coeff=1", "center_coef"),
        ("ppo", "algorithm.clip_rang=0.1", "algorithm.clip_range"),
        ("ppo", "rewards.reward_model.pth=x", "rewards.reward_model.path"),
        ("evaluate", "bootstraps=10", "bootstrap"),
        ("pipeline", "ppo.step=3", "ppo.steps"),
        ("pipeline", "ppo.algorithm.kl_coeff=0.1", "ppo.algorithm.kl_coef"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(work, name, override, near):
    key = override.split("=")[0]
    refused(
        work, command(name, override), f"no config key '{key}'", f"did you mean {near}?", f"alignkit {name} --cfg job"
    )


def test_an_unknown_key_of_the_group_option_that_was_chosen(work):
    message = refused(work, command("sft", "logger=tensorboard", "logger.tags=[a]"), "logger.tags")
    assert "did you mean logger.tags" not in message


@pytest.mark.parametrize(
    ("name", "override"), [("sft", "+mini_batch_sise=8"), ("ppo", "+algorithm.foo=1"), ("pipeline", "+sft.foo=1")]
)
def test_a_plus_does_not_smuggle_in_an_unknown_key(work, name, override):
    refused(work, command(name, override), override.split("=")[0].removeprefix("+"))


def test_an_unknown_key_in_an_experiment_file(work):
    (work / "mine" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nsft:\n  max_lenght: 8\n"
    (work / "mine" / "experiment" / "typo.yaml").write_text(text)
    refused(work, command("pipeline", "+experiment=typo", "--config-dir", "mine"), "max_lenght", "sft.max_length")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("mini_batch_size=abc", ["mini_batch_size", "abc", "Integer"]),
        ("seed=1.5", ["seed", "1.5", "Integer"]),
        ("dry_run=perhaps", ["dry_run", "perhaps", "bool"]),
        ("optimizer.learning_rate=fast", ["optimizer.learning_rate", "fast", "Float"]),
        ("model.dtype=float64", ["model.dtype='float64'", "float32 or bfloat16"]),
        ("optimizer.schedule=step", ["schedule='step'", "linear, cosine or constant"]),
        ("eval_fraction=1", ["eval_fraction=1", "0 <= eval_fraction < 1"]),
        ("data.limit=0", ["data.limit=0", "1 or more, or null"]),
        ("run_name=../up", ["run_name='../up'", "use letters"]),
        ("launcher.num_ranks=0", ["launcher.num_ranks=0", "1 or more"]),
        ("finetune=lorra", ["finetune", "lorra", "full", "lora"]),
    ],
)
def test_a_value_of_the_wrong_type_or_outside_its_range(work, override, words):
    refused(work, command("sft", override), *words)


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("sft", ["mini_batch_size=12"], ["mini_batch_size=12", "micro_batch_size=8", "try mini_batch_size=16"]),
        ("reward", ["launcher.num_ranks=3"], ["mini_batch_size=16", "ranks=3", "= 24", "try mini_batch_size=24"]),
        ("ppo", ["mini_batch_size=128"], ["mini_batch_size=128", "rollout_batch_size=64", "lower mini_batch_size"]),
        (
            "ppo",
            ["rollout_batch_size=48"],
            ["rollout_batch_size=48", "mini_batch_size=32", "try rollout_batch_size=64"],
        ),
        ("ppo", ["group_size=3"], ["rollout_batch_size=64", "group_size=3", "try rollout_batch_size=66"]),
        ("ppo", ["rollout.temperature=0"], ["rollout.temperature=0", "more than 0"]),
        ("ppo", ["algorithm.gamma=2"], ["algorithm.gamma=2", "from 0 to 1"]),
        ("sample", ["group_size=1"], ["group_size=1", "2 or more"]),
        ("pipeline", ["ppo.mini_batch_size=128"], ["mini_batch_size=128", "rollout_batch_size=64"]),
        ("evaluate", ["reference=ppo"], ["reference='ppo'", "sft"]),
    ],
)
def test_fields_that_contradict_each_other_state_both_numbers_and_a_fix(work, name, overrides, words):
    refused(work, command(name, *overrides), *words)


def test_a_model_folder_that_is_none(work):
    (work / "empty").mkdir()
    refused(work, command("sft", "model.path=empty"), "model.path=empty", "holds no model", "config.json")


def test_a_model_folder_with_pickled_weights_only(work):
    (work / "model" / "model.safetensors").rename(work / "model" / "pytorch_model.bin")
    refused(work, command("sft", "model.path=model"), "model.path=model", "no *.safetensors", "save_pretrained")


def test_a_model_path_that_does_not_exist(work):
    refused(work, command("sft", "model.path=./nope"), "model.path='./nope'", "no such folder")


def test_the_folder_of_all_stages_is_not_a_stage(work):
    refused(work, command("sft", "model.path=runs/base"), "runs/base", "give runs/base/<stage>", "sft")


@pytest.mark.parametrize("status", ["running", "failed"])
def test_a_run_that_is_not_done_is_refused_with_the_command_that_finishes_it(work, status):
    manifests.write_manifest(work / "runs/base/sft", status=status)
    refused(work, command("ppo"), "runs/base/sft", status, "not done", "alignkit sft run_name=base")


def test_a_reward_run_of_another_tokenizer(work):
    finished_run(work / "runs/other/reward", "reward", work / "model", tokenizer_hash="t1")
    refused(
        work,
        command("ppo", "rewards.reward_model.path=runs/other/reward"),
        "rewards.reward_model=runs/other/reward",
        "another tokenizer",
        "(t1)",
        "model=runs/base/sft (t0)",
        "alignkit reward model.path=runs/base/sft",
    )


def test_a_run_that_is_no_reward_model_as_the_reward(work):
    refused(
        work,
        command("ppo", "rewards.reward_model.path=runs/base/sft"),
        *("rewards.reward_model.path=runs/base/sft", "sft", "runs/<name>/reward"),
    )


def test_a_damaged_manifest(work):
    (work / "runs/base/sft/manifest.json").write_text('{"schema": 1, "sta')
    refused(work, command("sample"), "runs/base/sft/manifest.json is damaged", "run the stage again")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("score", ["'score'", "expected file.py:function"]),
        ("nope.py:score", ["nope.py:score", "no such file"]),
        ("my_reward.py:scores", ["my_reward.py", "no function 'scores'"]),
        ("no_such_package.x:score", ["no_such_package"]),
        ("broken.py:score", ["broken.py", "SyntaxError"]),
    ],
)
def test_an_unknown_reward_target(work, target, words):
    (work / "broken.py").write_text("def score(prompts) return\n")
    more = ["+reward@rewards.mine=function", f"rewards.mine.target={target}"]
    refused(work, command("ppo", *more), "reward target", *words)


def test_no_reward_at_all_lists_the_rewards(work):
    refused(
        work, ["sample", *(f"{k}={v}" for k, v in MANDATORY["sample"].items())], "rewards is empty", "vader", "function"
    )


def test_no_such_command_names_the_nearest(work):
    refused(work, ["pipelin"], "'pipelin'", "did you mean pipeline?")


# ------------------------------------------------------------------------------------------------------- run names


def test_a_pipeline_twice_on_one_run_name(work):
    finished_run(work / "runs/new/sft", "sft", work / "model")
    (work / "runs/new/.lock").touch()
    refused(work, command("pipeline"), "run_name=new", "runs/new/sft exists (status done)", "resume=true")


def test_a_stage_twice_on_one_run_name(work):
    refused(work, command("sft", "run_name=base"), "runs/base/sft exists (status done)", "another run_name=")


def test_resume_with_another_config_is_refused(work):
    refused(work, command("sft", "run_name=base", "resume=true"), "runs/base/sft is done", "another config")


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_name_that_another_process_works_on(work, begun):
    """The second start is refused by the lock, whether or not the first has written a manifest by now."""
    root = work / "runs" / "new"
    if begun:
        finished_run(root / "sft", "sft", work / "model", status="running")
    code = (
        "import sys, pathlib\nfrom alignkit.runs import lock\n"
        "with lock.lock(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        refused(work, command("pipeline"), "runs/new is in use by process", str(holder.pid), "another run_name=")
    finally:
        holder.communicate()
    if not begun:  # the holder is gone: the name is free again
        with pytest.raises(AssertionError, match="asked to start sft"):
            invoke(*command("pipeline"), cwd=work)


# ------------------------------------------------------------------------------------------------------- as installed


def test_the_installed_command_refuses_in_one_line_with_exit_code_2(work):
    before = snapshot(work)
    script = Path(sys.executable).parent / "alignkit"
    done = subprocess.run([script, *command("sft", "data.path=nope.jsonl")], cwd=work, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("alignkit: data.path=nope.jsonl: no such file") and done.stderr.count("\n") == 1
    assert snapshot(work) == before
