"""Stages that several runs share, the names of a sweep's jobs, tables of runs, lineage and resume: without training."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from test_cli import command, invoke, make_work, refused, write_rows

from alignkit.check.contents import address, check_contents, contents
from alignkit.cli import entry as cli
from alignkit.config import stages
from alignkit.core.errors import InputError, RunError
from alignkit.jobs import resume, steps
from alignkit.models.source import resolve_model
from alignkit.pipeline import lineage, sharing, sweep
from alignkit.pipeline import stage as pipeline
from alignkit.report import compare
from alignkit.runs import environment, hashes, manifests
from alignkit.runs.hashes import manifest_hash


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """The working directory: a model, rows, a reward function and the finished runs runs/base/{sft,reward,ppo}."""
    folder = make_work(tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


def typed(stage: str, *overrides: str):
    stages.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(cli.conf_dir()), version_base="1.3"):
        return stages.to_config(compose(stage, [*command(stage)[1:], *overrides]), stage)


def address_of(stage: str, *overrides: str) -> str:
    cfg = typed(stage, *overrides)
    return address(cfg, contents(cfg))


# --------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "name", ["run_name=x", "runs_dir=elsewhere", "launcher.num_ranks=2", "logger=none", "reuse=true"]
)
def test_names_places_and_the_launch_are_not_in_the_address(work, name):
    assert address_of("ppo", name) == address_of("ppo")


@pytest.mark.parametrize(
    "key", ["seed=1", "steps=7", "algorithm.kl_coef=0.3", "algorithm=rloo group_size=2", "model.dtype=bfloat16",
            "data.limit=2", "finetune.rank=4", "rollout=hf", "optimizer.learning_rate=1e-3", "rewards.reward_model.weight=2"],
)  # fmt: skip
def test_every_setting_is_in_the_address(work, key):
    assert address_of("ppo", *key.split()) != address_of("ppo")


def test_inputs_count_by_what_they_hold_not_by_where_they_lie(work):
    before = address_of("ppo")
    shutil.copytree("runs/base", "runs/copy")
    shutil.copy("prompts.jsonl", "same.jsonl")
    moved = ["model.path=runs/copy/sft", "rewards.reward_model.path=runs/copy/reward", "data.path=same.jsonl"]
    assert address_of("ppo", *moved) == before
    write_rows(Path("same.jsonl"), {"prompt": "another"})
    assert address_of("ppo", *moved) != before


@pytest.mark.parametrize("parent", ["sft", "reward"])
def test_a_parent_made_anew_makes_a_new_address(work, parent):
    before = address_of("ppo")
    manifests.write_manifest(Path("runs/base") / parent, started="later")
    assert address_of("ppo") != before


def test_weights_of_a_model_folder_are_in_the_address(work):
    path = Path("model/model.safetensors")
    before = address_of("sft", "model.path=model")
    path.write_bytes(path.read_bytes() + b"1")
    assert address_of("sft", "model.path=model") != before


def test_a_large_weight_file_is_known_by_its_places(tmp_path):
    """Above 16 MiB only places are read: a retrained file (all over, or one thirtieth of it) gets another hash."""
    weights = bytearray(os.urandom(2**20) * 40)
    file = tmp_path / "model.safetensors"
    file.write_bytes(weights)
    before = hashes.model_hash(tmp_path)
    for at in (0, 20 * 2**20, len(weights) - 2**20):  # the first, a middle and the last fortieth
        changed = bytearray(weights)
        changed[at : at + 2**20] = bytes(2**20)
        file.write_bytes(changed)
        assert hashes.model_hash(tmp_path) != before
    file.write_bytes(weights)
    assert hashes.model_hash(tmp_path) == before


def test_the_source_of_a_reward_function_is_in_the_address(work):
    given = ["+reward@rewards.mine=function", "rewards.mine.target=my_reward.py:score"]
    before = address_of("ppo", *given)
    Path("my_reward.py").write_text("def score(prompts, responses, meta):\n    return [1.0 for _ in responses]\n")
    assert address_of("ppo", *given) != before


# ------------------------------------------------------------------------------------------------------------ sharing


def finish(run_dir: Path, wanted: str, **changes) -> None:
    facts = {"stage": "sft", "status": "done", "address": wanted, "metrics": {"eval_loss": 1.5}, "model_hash": None}
    manifests.write_manifest(run_dir, **facts | changes)


def test_only_a_done_whole_stage_of_that_address_is_found(tmp_path):
    for name, changes in {
        "other": {"address": "b"}, "running": {"status": "running"}, "reward": {"stage": "reward"},
        "emptied": {"model_hash": "0123456789abcdef"},
    }.items():  # fmt: skip
        (tmp_path / name / "sft").mkdir(parents=True)
        finish(tmp_path / name / "sft", "a", **changes)
    (tmp_path / "broken" / "sft").mkdir(parents=True)
    (tmp_path / "broken" / "sft" / "manifest.json").write_text("{")
    assert sharing.find(tmp_path, "a", "sft") is None
    deep = tmp_path / "sweep" / "kl=0.1" / "sft"
    deep.mkdir(parents=True)
    finish(deep, "a")
    assert sharing.find(tmp_path, "a", "sft") == deep


def test_a_link_stands_for_the_stage_and_outlives_a_move_of_the_runs(work):
    sharing.link(Path("runs/new/part/sft"), Path("runs/base/sft"))
    Path("runs").rename("moved")
    linked = resolve_model("moved/new/part/sft", "model.path")
    assert linked.run == Path("moved/new/part/sft")
    assert manifest_hash(linked.run) == manifest_hash(Path("moved/base/sft"))


def test_a_pipeline_keeps_what_another_run_has_made(work, capsys):
    """run_stage with a finished twin links to it and starts nothing: the launcher is never asked."""
    cfg = typed("sft", "run_name=twin", "reuse=true")
    finish_like(cfg, Path("runs/first/sft"))
    assert pipeline.run_stage(cfg) == 1.5
    assert Path("runs/twin/sft").is_symlink()
    said = capsys.readouterr().out
    assert "kept: same config and inputs as runs/first/sft" in said and "made with" in said and "commit" in said
    again = typed("sft", "run_name=twin", "reuse=true", "resume=true")
    assert pipeline.run_stage(again) == 1.5  # a linked stage is done like any other


def finish_like(cfg, run_dir: Path) -> None:
    """What a finished stage of that config leaves, made with another commit."""
    run_dir.mkdir(parents=True)
    found = contents(cfg)
    finish(run_dir, address(cfg, found), stage=cfg.stage, contents=found, git_commit="0" * 40)


def test_a_link_whose_stage_was_deleted_is_refused_with_the_fix(work):
    cfg = typed("sft", "run_name=twin", "reuse=true")
    finish_like(cfg, Path("runs/first/sft"))
    pipeline.run_stage(cfg)
    shutil.rmtree("runs/first")
    refused(
        work,
        command("sft", "run_name=twin"),
        "runs/twin/sft is a link",
        "which is gone",
        "delete the link",
    )


def test_a_second_maker_waits_for_the_first_and_names_it(tmp_path):
    """Two processes, one address: the second gets its turn when the first lets go, killed or not."""
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom alignkit.pipeline import sharing\n"
        "with sharing.turn(Path(sys.argv[1]), 'abc', 'sft', Path('runs') / sys.argv[2]):\n"
        "    print('turn', flush=True)\n    time.sleep(float(sys.argv[3]))\n"
    )

    def start(name: str, seconds: float) -> subprocess.Popen:
        arguments = [sys.executable, "-c", script, str(tmp_path), name, str(seconds)]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)

    first = start("one", 600)
    assert first.stdout.readline() == "turn\n"
    second = start("two", 0)
    said = second.stdout.readline()
    assert said.startswith(f"sft       waits for runs/one (process {first.pid}), which makes the same stage")
    time.sleep(0.3)
    assert second.poll() is None
    first.kill()
    first.wait()
    assert second.stdout.readline() == "turn\n"
    assert second.wait() == 0
    first.stdout.close()
    second.stdout.close()


# --------------------------------------------------------------------------------------------------- names of the jobs


@pytest.mark.parametrize(
    ("arguments", "job", "name"),
    [
        (["run_name=a", "ppo.steps=1,2"], ["run_name=a", "ppo.steps=2"], "a/ppo.steps=2"),
        (["x=1,2", "y=range(0,2)", "z=3"], ["x=1", "y=0", "z=3"], "a/x=1,y=0"),
        (["+experiment=p,q"], ["+experiment=q"], "a/experiment=q"),
        (["model.path=org/m,n"], ["model.path=org/m"], "a/model.path=org-m"),
        (["lr=interval(0,1)"], ["lr=0.25"], "a/lr=0.25"),
        (["run_name=a,b", "x=1,2"], ["run_name=a", "x=1"], "a"),
        (["run_name=r-${x}", "x=1,2"], ["run_name=r-${x}", "x=1"], "a"),
        (["x=1"], ["x=1"], "a"),
        ([f"x={'v' * 200},w"], [f"x={'v' * 200}"], "a/7"),
    ],
)
def test_each_job_is_called_by_what_is_swept(arguments, job, name):
    assert sweep.job_name("a", arguments, job, [], 7) == name


def test_what_a_sweeper_is_configured_to_sweep_counts():
    assert sweep.job_name("a", [], ["x=0.5", "y=1"], ["x"], 0) == "a/x=0.5"


def test_jobs_of_a_sweep_get_folders_of_their_own(work):
    result = invoke(*command("sft", "optimizer.learning_rate=1e-3,1e-4", "seed=0,1", "dry_run=true", "-m"), cwd=work)
    assert result.code == 0, result.err
    named = [line for line in result.out.splitlines() if line.startswith("run_name:")]
    assert len(named) == len(set(named)) == 4
    assert "run_name: new/optimizer.learning_rate=0.001,seed=0" in named


def test_values_that_a_name_cannot_tell_apart_get_folders_of_their_own(work):
    rows = [shutil.copy("answers.jsonl", work / name).name for name in ("a b.jsonl", "a+b.jsonl")]
    swept = "data.path=" + ",".join(f"'{name}'" for name in rows)
    result = invoke(*command("sft", swept, "dry_run=true", "-m", without="data.path"), cwd=work)
    assert result.code == 0, result.err
    named = [line for line in result.out.splitlines() if line.startswith("run_name:")]
    assert named == ["run_name: new/data.path=a-b.jsonl", "run_name: new/data.path=a-b.jsonl,1"]


def test_a_refused_job_of_a_sweep_is_said_and_the_others_go_on(work):
    result = invoke(*command("sft", "mini_batch_size=16,9,32", "dry_run=true", "-m"), cwd=work)
    assert result.code == 2
    assert result.err.count("mini_batch_size=9 is not a multiple") == 1
    assert "mini_batch_size: 32" in result.out and "0 of 1 jobs" not in result.out


# ------------------------------------------------------------------------------------------------------------- compare


def test_wilson_against_newcombe_1998():
    """R. G. Newcombe, Statistics in Medicine 17, 857 (1998), table I, method 3."""
    for (hits, trials), expected in {
        (81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718),
    }.items():  # fmt: skip
        assert compare.wilson(hits / trials, trials) == pytest.approx(expected, abs=6e-5)


def pipeline_run(root: Path, kl_coef: float, seed: int = 0) -> None:
    """A run folder with a reward and a PPO stage, as far as a table reads it."""
    for stage, more in {"reward": [], "ppo": [f"algorithm.kl_coef={kl_coef}"]}.items():
        made = root / stage
        made.mkdir(parents=True)
        names = [f"run_name={root.name}", f"runs_dir={root.parent}", f"seed={seed}"]
        stages.save(typed(stage, *names, *more), made / "config.yaml")
        metrics = {"eval_accuracy": 0.75, "eval_pairs": 40} if stage == "reward" else {}
        manifests.write_manifest(made, stage=stage, status="done", metrics=metrics, seconds=10.0)
    rows = [{"step": step, "objective/score": step * kl_coef, "objective/kl": step / 2} for step in range(3)]
    (root / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_table_has_what_differs_and_what_came_of_it(work):
    pipeline_run(work / "runs/one", 0.5)
    pipeline_run(work / "runs/two", 0.25, seed=1)
    runs = compare.find_runs([Path("runs/one"), Path("runs/two")])
    head, one, two = compare.table(runs)
    assert head == ["run", "seed", "ppo.algorithm.kl_coef", "score", "KL, nats", "pair accuracy", "seconds"]
    assert one == ["one", "0", "0.5", "0 → 1.00", "1.00", "0.750 [0.598, 0.858]", "0:20"]
    assert two[:4] == ["two", "1", "0.25", "0 → 0.500"]


def test_a_page_is_written_once_and_never_over_another(work):
    pipeline_run(work / "runs/sw/a", 0.5)
    pipeline_run(work / "runs/sw/b", 0.25)
    for page in ("compare.html", "compare-2.html"):
        result = invoke("compare", "runs/sw", cwd=work)
        assert result.code == 0 and f"runs/sw/{page}" in result.out.replace("\n", "")
        text = (work / "runs/sw" / page).read_text()
        assert text.count("<svg") == 3 and "http-equiv" not in text and "<script" not in text
    result = invoke("compare", "runs/sw", "-o", "runs/sw/compare.html", cwd=work)
    assert result.code == 2 and "exists" in result.err


def test_stages_alone_are_compared_too_and_a_shared_one_costs_nothing(work):
    pipeline_run(work / "runs/one", 0.5)
    (work / "runs/two").mkdir()
    sharing.link(work / "runs/two/reward", work / "runs/one/reward")
    shutil.copytree(work / "runs/one/ppo", work / "runs/two/ppo")
    runs = compare.find_runs([Path("runs/one"), Path("runs/two")])
    assert [row[-1] for row in compare.table(runs)[1:]] == ["0:20", "0:10 (+1 shared)"]
    runs = compare.find_runs([Path("runs/one/ppo"), Path("runs/two/ppo")])
    assert compare.table(runs)[1][0] == "one/ppo" and "pair accuracy" not in compare.table(runs)[0]


# ------------------------------------------------------------------------------------------------- lineage and resume


@pytest.fixture
def aligned(work) -> Path:
    """runs/mine: a PPO stage on sft and reward stages, each with the hashes of what it read."""
    for stage, more in {
        "sft": ["model.path=model"], "reward": ["model.path=runs/mine/sft"],
        "ppo": ["model.path=runs/mine/sft", "rewards.reward_model.path=runs/mine/reward"],
    }.items():  # fmt: skip
        cfg = typed(stage, "run_name=mine", *more)
        shutil.copytree(f"runs/base/{stage}", f"runs/mine/{stage}")
        stages.save(cfg, cfg.run_dir / "config.yaml")
        manifests.write_manifest(
            cfg.run_dir, contents=contents(cfg), config_hash=stages.config_hash(cfg), seed=3,
            git_commit="c" * 40, versions={"torch": "9.9"}, started="2026-01-01",
        )  # fmt: skip
    return work


def test_lineage_names_everything_a_model_came_from(aligned):
    result = invoke("lineage", "runs/mine", cwd=aligned)
    assert result.code == 0, result.err
    for word in ("runs/mine/ppo", "runs/mine/reward", "runs/mine/sft", "seed 3", "c" * 40, "torch 9.9", "prompts.jsonl",
                 "pairs.jsonl", "answers.jsonl", "nothing has changed since"):  # fmt: skip
        assert word in result.out
    node = json.loads(invoke("lineage", "runs/mine/ppo", "--json", cwd=aligned).out)
    parents = {entry["what"]: entry["run"]["run"] for entry in node["held"] if entry["run"]}
    assert parents == {"model.path": "runs/mine/sft", "rewards.reward_model.path": "runs/mine/reward"}
    assert all(entry["now"] == entry["hash"] for entry in node["held"]) and node["changes"] == []


def test_lineage_is_the_same_from_anywhere(aligned, tmp_path):
    here = invoke("lineage", "runs/mine", cwd=aligned).out
    assert invoke("lineage", str(aligned / "runs/mine"), cwd=tmp_path).out == here


def test_a_changed_parent_is_noticed(aligned):
    before = manifest_hash(Path("runs/mine/reward"))
    manifests.write_manifest(Path("runs/mine/reward"), started="2027-01-01")
    after = manifest_hash(Path("runs/mine/reward"))
    result = invoke("lineage", "runs/mine/ppo", cwd=aligned)
    assert result.code == 1
    assert f"rewards.reward_model.path runs/mine/reward changed since: manifest {before} -> {after}" in result.out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: shutil.rmtree("runs/mine/reward"), "rewards.reward_model.path runs/mine/reward is gone"),
        (lambda: write_rows(Path("answers.jsonl"), {"prompt": "p", "completion": "c"}), "data.path answers.jsonl changed"),
        (lambda: Path("prompts.jsonl").unlink(), "data.path prompts.jsonl is gone"),
        (lambda: Path("model/model.safetensors").write_bytes(b"other"), "model.path model changed since"),
        (lambda: edit("runs/mine/sft/config.yaml", "seed: 0", "seed: 5"), "runs/mine/sft: config runs/mine/sft/config.yaml changed"),
    ],
    ids=["parent gone", "rows", "rows gone", "base", "config"],
)  # fmt: skip
def test_whatever_changed_anywhere_above_is_noticed(aligned, change, words):
    change()
    result = invoke("lineage", "runs/mine/ppo", cwd=aligned)
    assert result.code == 1 and words in result.out


def edit(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new, 1))


def test_resume_says_what_becomes_of_each_stage(work, tmp_path):
    cfg = typed("pipeline", "run_name=mine")
    for stage, status in {"sft": "done", "sample": "failed", "reward": "running"}.items():
        (work / "runs/mine" / stage).mkdir(parents=True)
        manifests.write_manifest(work / "runs/mine" / stage, stage=stage, status=status, error="out of memory")
    for name in ("step_000010", "step_000020", "step_000030.partial"):
        (work / "runs/mine/reward/checkpoints" / name).mkdir(parents=True)
    stages.save(cfg, work / "runs/mine/pipeline.yaml")
    result = invoke("resume", str(work / "runs/mine"), "--dry-run", cwd=tmp_path)  # from anywhere
    assert result.code == 0, result.err
    lines = [line.split(None, 1)[1] for line in result.out.splitlines()]
    assert lines[0] == "done: skipped"
    assert lines[1] == "starts over, it left no checkpoint (failed: out of memory)"
    assert lines[2].startswith("goes on from checkpoint 20")
    assert lines[3] == lines[4] == "not started: begins"


def test_a_saved_pipeline_is_read_back_as_it_was(work):
    made = typed(
        "pipeline", "run_name=mine", "algorithm@ppo.algorithm=rloo", "ppo.group_size=2", "sample.rewards.gold.weight=2"
    )
    stages.save(made, work / "pipeline.yaml")
    assert stages.load(work / "pipeline.yaml", "pipeline") == made


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs/none"], ["runs/none: no pipeline.yaml", "no run there"]),
        (["runs/base"], ["runs/base: no pipeline.yaml", "ppo, reward, sft", "runs/base/<stage>"]),
        (["runs/base", "seed=1"], ["its own settings"]),
    ],
)
def test_resume_refuses_what_it_cannot_go_on_with(work, arguments, words):
    result = invoke("resume", *arguments, cwd=work)
    assert result.code == 2 and len(result.err.splitlines()) == 1
    assert all(word in result.err for word in words)


def test_a_run_that_was_moved_is_not_resumed_elsewhere(work):
    cfg = typed("sft", "run_name=mine")
    (work / "runs/mine/sft").mkdir(parents=True)
    manifests.write_manifest(cfg.run_dir, stage="sft", status="failed")
    stages.save(cfg, cfg.run_dir / "config.yaml")
    (work / "runs/mine").rename(work / "runs/renamed")
    result = invoke("resume", "runs/renamed/sft", cwd=work)
    assert result.code == 2 and "move it back" in result.err
    assert resume.standing(work / "runs/renamed/sft").startswith("starts over")
    assert lineage.last_stage(work / "runs/renamed").name == "sft"


# --------------------------------------------------------------------------------------- what was checked is what is used


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("data.path", lambda: write_rows(Path("prompts.jsonl"), {"prompt": "another"})),
        ("rewards.mine.target", lambda: edit("mine.py", "1.0", "2.0")),
        ("model.chat_template", lambda: Path("template.jinja").write_text("{{ messages[0].content }}")),
        ("model.path", lambda: Path("model/model.safetensors").write_bytes(b"x" * 99)),
    ],
    ids=["rows", "reward", "template", "base"],
)
def test_a_rank_refuses_what_changed_after_the_command_read_it(work, key, change):
    Path("mine.py").write_text("def score(prompts, responses, meta):\n    return [1.0] * len(responses)\n")
    shutil.copy("model/chat_template.jinja", "template.jinja")
    cfg = typed(
        "evaluate", "+policies.a=model", "+reward@rewards.mine=function", "rewards.mine.target=mine.py:score",
        "model.chat_template=template.jinja",
    )  # fmt: skip
    before = contents(cfg)
    check_contents(cfg, before, contents(cfg), "the command")
    change()
    key = key if key != "model.path" else "policies.a"
    with pytest.raises(
        InputError, match=rf"{key}=.* changed since the command read it \([0-9a-f]{{16}} then"
    ) as refusal:
        check_contents(cfg, before, contents(cfg), "the command")
    assert before[key] in str(refusal.value)


def test_the_rows_that_were_compared_are_those_that_are_used(work):
    cfg = typed("sft")
    before = cfg.data.rows("sft")
    contents(cfg, keep_rows=True)
    write_rows(Path("answers.jsonl"), {"prompt": "later", "completion": "later"})
    assert cfg.data.rows("sft") == before
    assert [row["prompt"] for row in cfg.data.rows("sft")] == ["later"]  # once


def test_a_run_that_goes_on_with_other_versions_says_so_and_keeps_both(work):
    cfg = typed("sft", "run_name=mine")
    cfg.run_dir.mkdir(parents=True)
    for number, versions in enumerate(({"torch": "1.0.0"}, {"torch": "2.0.0"})):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(environment, "versions", lambda found=versions: found)
            pipeline.open_run(cfg, "running", {"address": "a", "inputs": {}, "contents": {}})
        if not number:
            (cfg.run_dir / "checkpoints/step_000002").mkdir(parents=True)
            manifests.write_manifest(cfg.run_dir, status="saved")
            assert "torch 1.0.0, here" in resume.standing(cfg.run_dir)
    held = manifests.read_manifest(cfg.run_dir)
    assert held is not None and [attempt["versions"]["torch"] for attempt in held["attempts"]] == ["1.0.0", "2.0.0"]


def test_a_full_disk_still_takes_the_word_that_a_run_failed(tmp_path, monkeypatch):
    manifests.write_manifest(tmp_path, stage="sft", status="running")
    room = tmp_path / manifests.SPARE
    assert room.stat().st_size >= 2**14
    write = manifests.write_atomic

    def full(path, text):
        if room.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(manifests, "write_atomic", full)
    with pytest.raises(RunError, match="the reason"):
        pipeline.conclude(tmp_path, {"error": "the reason", "kind": "run"}, tmp_path / "log")
    held = manifests.read_manifest(tmp_path)
    assert held is not None and held["status"] == "failed" and not room.exists()
    manifests.write_manifest(tmp_path, status="running")
    room.unlink()
    monkeypatch.setattr(manifests, "write_atomic", lambda *_: full(room.touch() or room, ""))
    with pytest.raises(RunError, match=r"still says running.*No space left"):
        pipeline.conclude(tmp_path, None, tmp_path / "log")


def test_a_folder_that_cannot_be_written_is_refused_by_who_waits_for_a_turn(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with (
        pytest.raises(InputError, match=r"cannot be written.*choose another runs_dir="),
        sharing.turn(tmp_path / "runs", "a", "sft", tmp_path),
    ):
        pass


def test_the_ranks_themselves_and_a_job_that_begins_compare_what_lies_there(work):
    cfg = typed("sft", "run_name=mine", "logger=none")
    found = contents(cfg)
    cfg.run_dir.mkdir(parents=True)
    pipeline.open_run(cfg, "queued", {"inputs": {}, "contents": found, "address": "a", "checked": found})
    write_rows(Path("answers.jsonl"), {"prompt": "later", "completion": "later"})
    rank = subprocess.run(
        [sys.executable, "-m", "alignkit.worker", "sft", str(cfg.run_dir)],
        env=os.environ | {"RANK": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert rank.returncode == 2 and "data.path=answers.jsonl changed since the command read it" in rank.stderr
    with pytest.raises(InputError, match="changed since the command that queued it read it"):
        steps.job_step("begin", cfg.run_dir)
    assert (manifests.read_manifest(cfg.run_dir) or {})["status"] == "failed"
