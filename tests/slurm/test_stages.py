"""Stages for real as Slurm jobs: the tiny model, DeepSpeed, vLLM and TRL, two nodes that are both this machine."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest
from command import alignkit
from jobs import STAGES, manifest, metrics
from safetensors.torch import load_file

from alignkit.jobs import steps
from alignkit.launch import scheduler

LAUNCHER = ["launcher=slurm", "launcher.time=00:30:00", "launcher.threads=1", "logger=none"]


@pytest.fixture(scope="module")
def work(tiny, rows, tmp_path_factory) -> Path:
    """A folder with a reward function beside the model and the rows."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "model").symlink_to(tiny)
    (folder / "rows.jsonl").symlink_to(rows)
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {i}", "chosen": "a good day", "rejected": "bad"}) + "\n" for i in range(24))
    )
    (folder / "mine.py").write_text(
        "def score(prompts, responses, meta):\n    return [float(len(r) % 7) for r in responses]\n"
    )
    return folder


def ppo(work: Path, name: str, *more: str) -> list[str]:
    """A short PPO run against a reward function, with a checkpoint after every step."""
    return [
        "ppo", f"runs_dir={work / 'runs'}", f"run_name={name}", f"model.path={work / 'model'}", f"data.path={work / 'rows.jsonl'}",
        "finetune.last_layers=2", "rollout.max_new_tokens=8", "steps=5", "save_steps=1", "rollout_batch_size=16", "mini_batch_size=8",
        "micro_batch_size=4", "optimizer.learning_rate=1e-3", "~reward@rewards.reward_model", "+reward@rewards.mine=function",
        f"rewards.mine.target={work / 'mine.py'}:score", "logger=none", *more,
    ]  # fmt: skip


def submitted(*arguments: str, run_dir: Path) -> str:
    """Submit a stage; the id of its job."""
    done = alignkit(*arguments, *LAUNCHER)
    assert done.returncode == 0, done.stderr
    job = scheduler.read_record(run_dir)
    assert job is not None and f"queued: job {job}" in done.stdout
    return job


def logs(run_dir: Path) -> str:
    return "".join(path.read_text()[-3000:] for path in (run_dir / "logs").glob("*.log"))


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "wall_time"))} for row in rows]


def pipeline(work: Path, name: str, *more: str) -> list[str]:
    """All stages, two steps of PPO."""
    rows = work / "rows.jsonl"
    return [
        "pipeline", f"runs_dir={work / 'runs'}", f"run_name={name}", f"model.path={work / 'model'}", "finetune.last_layers=2",
        "rollout.max_new_tokens=10", "+reward@sample.rewards.gold=vader", "+reward@evaluate.rewards.gold=vader",
        "sample.finished_only=false", *(f"{stage}.data.path={rows}" for stage in ("sft", "sample", "ppo", "evaluate")),
        "sft.mini_batch_size=8", "sft.micro_batch_size=4", "sft.optimizer.learning_rate=1e-2", "sample.group_size=6",
        "reward.mini_batch_size=4", "reward.micro_batch_size=2", "reward.eval_fraction=0.3", "ppo.steps=2",
        "ppo.rollout_batch_size=16", "ppo.mini_batch_size=8", "ppo.micro_batch_size=4", "ppo.group_size=2", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_pipeline_is_a_chain_of_jobs_that_ends_with_its_report(cluster, work):
    root = work / "runs" / "whole"
    submitted(*pipeline(work, "whole"), run_dir=root / "evaluate")
    ids = [scheduler.read_record(root / stage) for stage in STAGES]
    assert [item.status for item in steps.status(root)][1:] == ["queued"] * 4
    assert cluster.ended(ids[-1], timeout=600) == "COMPLETED", "".join(logs(root / stage) for stage in STAGES)
    assert [item.status for item in steps.status(root)] == ["done"] * 5
    for before, stage in zip(ids, STAGES[1:], strict=False):
        assert json.loads((root / stage / "slurm.json").read_text())["after"] == [before]
    # what a later job read is in its manifest, by the hash of what the earlier one left
    from alignkit.runs.hashes import manifest_hash

    assert manifest(root / "ppo")["inputs"]["model"] == {
        "path": str(root / "sft"),
        "manifest_hash": manifest_hash(root / "sft"),
    }
    assert json.loads((root / "summary.json").read_text())["stages"]["evaluate"]["status"] == "done"
    assert (root / "report.html").exists()
    again = alignkit("report", str(root))
    assert again.returncode == 0 and "done" in again.stdout


@pytest.mark.slow
def test_a_sweep_as_arrays_trains_what_its_runs_share_once_and_its_table_has_four_rows(cluster, work):
    result = alignkit(
        *pipeline(work, "sweep", "seed=1", "-m", "ppo.algorithm.kl_coef=0.05,0.5", "ppo.optimizer.learning_rate=1e-4,1e-3"),
        *LAUNCHER, "launcher.at_once=2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    runs = sorted(path for path in (work / "runs" / "sweep").iterdir() if path.is_dir())
    ids = [[scheduler.read_record(run / stage) for stage in STAGES] for run in runs]
    assert len(runs) == 4 and all(own[:3] == ids[0][:3] for own in ids)
    arrays = {number.partition("_")[0] for own in ids for number in own[3:]}
    assert len(arrays) == 2 and sorted(own[3].partition("_")[2] for own in ids) == ["0", "1", "2", "3"]
    for own in ids:
        assert cluster.ended(own[-1], timeout=900) == "COMPLETED", "".join(logs(runs[0] / stage) for stage in STAGES)
    for stage in ("sft", "sample", "reward"):
        assert sum(not (run / stage).is_symlink() for run in runs) == 1
    for run in runs:
        assert [item.status for item in steps.status(run)] == ["done"] * 5 and (run / "report.html").exists()
        assert len(metrics(run / "ppo")) == 2
    scores = {json.dumps(metrics(run / "ppo")[-1]["policy/loss"]) for run in runs}
    assert len(scores) == 4  # every task ran with its own settings
    table = alignkit("compare", work / "runs" / "sweep")
    assert (
        table.returncode == 0 and len(re.findall(r"^ +[1-4] +0\.0?5 +(?:0\.0001|0\.001) ", table.stdout, re.M)) == 4
    ), table.stdout


def test_a_stage_that_fails_cancels_the_later_ones_and_says_why(cluster, work):
    """The rows are gone when the job starts: refused there, exit code 2; the two after it never run."""
    rows = work / "gone.jsonl"
    rows.write_text((work / "rows.jsonl").read_text())
    runs = work / "runs"
    first = submitted(
        "sft", f"runs_dir={runs}", "run_name=fails", f"model.path={work / 'model'}", f"data.path={rows}", 'launcher.flags=["--begin=now+1hour"]',
        run_dir=runs / "fails" / "sft",
    )  # fmt: skip
    second = submitted(
        "reward", f"runs_dir={runs}", "run_name=fails", f"model.path={runs}/fails/sft", f"data.path={work / 'pairs.jsonl'}",
        f"launcher.after=[{first}]", run_dir=runs / "fails" / "reward",
    )  # fmt: skip
    rows.unlink()
    cluster.ask("scontrol", "update", f"JobId={first}", "StartTime=now")
    assert cluster.ended(first) == "FAILED" and cluster.show(first)["ExitCode"] == "2:0", logs(runs / "fails" / "sft")
    assert cluster.ended(second) == "CANCELLED"
    sft, reward = steps.status(runs / "fails")
    assert (sft.status, reward.status) == ("failed", "cancelled")
    assert "gone.jsonl" in sft.detail and "did not end well" in reward.detail


def test_a_run_folder_with_a_job_is_in_use_until_it_is_cancelled(cluster, work):
    name, run_dir = "held", work / "runs" / "held" / "ppo"
    job = submitted(*ppo(work, name), 'launcher.flags=["--begin=now+1hour"]', run_dir=run_dir)
    for more in (["resume=true"], [*LAUNCHER, "resume=true"]):
        refused = alignkit(*ppo(work, name, *more))
        assert refused.returncode == 2 and f"in use by Slurm job {job} (PENDING)" in refused.stderr
    (waiting,) = steps.status(run_dir)
    assert waiting.status == "queued" and waiting.job == job and "BeginTime" in waiting.detail
    assert f"job {job} (PENDING)" in alignkit("cancel", str(run_dir)).stdout
    (cancelled,) = steps.status(run_dir)
    assert cancelled.status == "cancelled"
    assert "nothing of it is queued or running" in alignkit("cancel", str(run_dir)).stdout


def test_ppo_on_two_nodes_is_ppo_on_one(cluster, work):
    """One rank a node, gloo between them, against two ranks of DeepSpeed's launcher: metrics to 1e-5, weights to 1e-5."""
    two, one = (work / "runs" / name / "ppo" for name in ("two", "one"))
    job = submitted(*ppo(work, "two", "launcher.nodes=2", "launcher.num_ranks=2"), run_dir=two)
    assert cluster.ended(job, timeout=400) == "COMPLETED", logs(two)
    assert cluster.show(job)["NodeList"] == "n[1-2]"
    local = alignkit(*ppo(work, "one", "launcher.num_ranks=2", "launcher.threads=1"))
    assert local.returncode == 0, local.stderr
    for ours, theirs in zip(without_times(metrics(two)), without_times(metrics(one)), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5, nan_ok=True)
    ours, theirs = (load_file(run / "model" / "adapter_model.safetensors") for run in (two, one))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5


def test_requeued_in_the_middle_ppo_ends_as_if_it_had_not_been(cluster, work):
    """`scontrol requeue` kills it, Slurm starts it again, and it goes on from its checkpoint: bit by bit the same end."""
    moved, whole = (work / "runs" / name / "ppo" for name in ("moved", "whole-ppo"))
    job = submitted(*ppo(work, "moved"), run_dir=moved)
    deadline = time.monotonic() + 240
    while len(list(moved.glob("checkpoints/step_*"))) < 1 or len(metrics(moved)) < 2:
        assert time.monotonic() < deadline and cluster.state(job) != "FAILED", logs(moved)
        time.sleep(0.1)
    cluster.ask("scontrol", "requeue", job)
    assert cluster.ended(job, timeout=400) == "COMPLETED", logs(moved)
    assert cluster.show(job)["Restarts"] == "1"
    local = alignkit(*ppo(work, "whole-ppo", "launcher.threads=1"))
    assert local.returncode == 0, local.stderr
    assert without_times(metrics(moved)) == without_times(metrics(whole))
    weights = "model/adapter_model.safetensors"
    assert (moved / weights).read_bytes() == (whole / weights).read_bytes()


def test_nothing_of_the_jobs_is_left(cluster, work):
    """Runs last: no process of a rank, and of no vLLM engine, outlived its job."""
    name = cluster.ask("scontrol", "show", "config").split("ClusterName")[1].split()[1]
    environments = [str(path) for path in Path("/proc").glob("[0-9]*/environ")]
    left = subprocess.run(["grep", "-lsz", f"^ALIGNKIT_JOB={name}-", *environments], capture_output=True, text=True)
    assert left.stdout == ""
