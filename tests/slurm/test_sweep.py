"""A sweep on Slurm: what its runs share is one job, what differs one array. Nothing is run: the jobs would begin in an hour."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from command import alignkit

from alignkit.jobs import steps

SHARED = ("sft", "sample", "reward")
STAGES = (*SHARED, "ppo", "evaluate")


def job(folder: Path) -> str:
    return json.loads((folder / "slurm.json").read_text())["job"]


def pipeline(tiny: Path, rows: Path, runs: Path, *more: str) -> list[str]:
    return [
        "pipeline", f"runs_dir={runs}", "launcher=slurm", "launcher.flags=['--begin=now+3600']", "logger=none",
        f"model.path={tiny}", "+reward@sample.rewards.gold=vader", "+reward@evaluate.rewards.gold=vader",
        *(f"{stage}.data.path={rows}" for stage in ("sft", "sample", "ppo", "evaluate")), *more,
    ]  # fmt: skip


@pytest.fixture
def command(cluster, tiny, rows, tmp_path):
    """The command line of a pipeline, by what it has more; its jobs are gone in the end."""
    yield lambda *more: pipeline(tiny, rows, tmp_path / "runs", *more)
    cluster.ask("scancel", "--user=root", "--state=PENDING")


def queued(cluster) -> list[str]:
    """The stage of each job that waits; of an array, and how many tasks it has."""
    tasks = [line.split() for line in cluster.ask("squeue", "--noheader", "--array", "--format=%F %j").splitlines()]
    counts = Counter((job, name.rpartition("-")[2]) for job, name in tasks)
    return sorted(stage if count == 1 else f"{stage} x{count}" for (_, stage), count in counts.items())


def waits_for(cluster, task: str) -> list[str]:
    """`how:job` as Slurm has it."""
    return re.findall(r"(after\w+:\d+(?:_\d+|_\*)?)", cluster.show(task)["Dependency"])


def test_a_sweep_of_ppo_is_two_arrays_after_one_chain(cluster, command, tmp_path):
    sweep = ["-m", "run_name=sweep", "launcher.at_once=2", "ppo.algorithm.kl_coef=0.05,0.1", "ppo.steps=1,2"]
    result = alignkit(*command(*sweep))
    assert result.returncode == 0, result.stderr + result.stdout
    runs = sorted((tmp_path / "runs" / "sweep").iterdir())
    assert len(runs) == 4
    assert queued(cluster) == ["evaluate x4", "ppo x4", "reward", "sample", "sft"]
    sft, sample, reward = (job(runs[0] / stage) for stage in SHARED)
    ppo, evaluate = (job(runs[0] / stage).partition("_")[0] for stage in ("ppo", "evaluate"))
    for number, run in enumerate(runs):
        own = [f"{ppo}_{number}", f"{evaluate}_{number}"]
        assert [job(run / stage) for stage in STAGES] == [sft, sample, reward, *own]
        assert all((run / stage).is_symlink() == (number > 0) for stage in SHARED)
        assert [item.status for item in steps.status(run)] == ["queued"] * 5
    assert "Dependency" not in cluster.show(sft) or cluster.show(sft)["Dependency"] == "(null)"
    assert waits_for(cluster, sample) == [f"afterok:{sft}"] and waits_for(cluster, reward) == [f"afterok:{sample}"]
    assert waits_for(cluster, ppo) == [f"afterok:{reward}"]
    assert waits_for(cluster, evaluate) == [f"aftercorr:{ppo}_*"]
    assert cluster.show(ppo)["ArrayTaskThrottle"] == "2" and cluster.show(sft)["Priority"] != "0"  # 0: held
    assert f"4 of 4 jobs of the sweep are queued; later: alignkit compare {tmp_path}/runs/sweep" in result.stdout

    ended = alignkit("cancel", runs[1])  # its own tasks, not those of the others or what they wait for
    assert ended.returncode == 0 and f"job {ppo}_1 (PENDING)" in ended.stdout
    for number, run in enumerate(runs):
        expected = ["queued"] * 3 + ["cancelled" if number == 1 else "queued"] * 2
        assert [item.status for item in steps.status(run)] == expected


def test_where_more_stages_differ_each_waits_for_its_own(cluster, command, tmp_path):
    """Two SFT settings, each with two of PPO: Slurm cannot pair two tasks with four, so PPO is an array for each."""
    result = alignkit(*command("-m", "run_name=two", "sft.seed=1,2", "ppo.steps=1,2"))
    assert result.returncode == 0, result.stderr + result.stdout
    assert queued(cluster) == sorted(f"{stage} x2" for stage in (*STAGES, "ppo", "evaluate"))
    for run in (tmp_path / "runs" / "two").iterdir():
        before = [job(run / stage) for stage in STAGES]
        for stage, earlier in zip(STAGES[1:], before, strict=False):
            assert json.loads((run / stage / "slurm.json").read_text())["after"] == [earlier]
            array, _, number = job(run / stage).partition("_")
            how = [f"afterok:{earlier}"] if stage == "ppo" else [f"aftercorr:{earlier.partition('_')[0]}_*"]
            assert waits_for(cluster, f"{array}_{number}") == how


def test_a_refused_run_is_left_out_and_a_second_sweep_links_to_the_first(cluster, command, tmp_path):
    result = alignkit(*command("-m", "run_name=a", "ppo.mini_batch_size=64,7,32"))
    assert result.returncode == 2 and "mini_batch_size=7" in result.stderr
    assert queued(cluster) == ["evaluate x2", "ppo x2", "reward", "sample", "sft"]
    assert "2 of 3 jobs of the sweep are queued" in result.stdout
    again = alignkit(*command("-m", "run_name=b", "ppo.steps=3,4"))
    assert again.returncode == 0 and len(queued(cluster)) == 7
    runs = [tmp_path / "runs" / "a" / "ppo.mini_batch_size=64", tmp_path / "runs" / "b" / "ppo.steps=4"]
    assert [job(runs[0] / stage) for stage in SHARED] == [job(runs[1] / stage) for stage in SHARED]


def test_a_dry_run_of_a_sweep_prints_the_arrays_and_writes_nothing(cluster, command, tmp_path):
    result = alignkit(*command("-m", "run_name=dry", "ppo.steps=1,2", "launcher.at_once=1", "dry_run=true"))
    assert result.returncode == 0 and result.stdout.count("#SBATCH --array=0-1%1\n") == 2
    assert result.stdout.count("#!/usr/bin/env bash") == 5
    assert queued(cluster) == [] and not (tmp_path / "runs" / "dry").exists()


def test_where_one_job_is_refused_none_is_left(cluster, command):
    result = alignkit(*command("run_name=none", "+launcher@ppo.launcher=slurm", "ppo.launcher.partition=none"))
    assert result.returncode == 2 and "nvalid partition" in result.stderr
    assert queued(cluster) == []


def test_after_a_job_that_slurm_does_not_know_nothing_is_queued(cluster, command, tmp_path):
    result = alignkit(*command("run_name=late", "launcher.after=[987654]"))
    assert result.returncode == 2 and "knows no such job" in result.stderr
    assert queued(cluster) == [] and not (tmp_path / "runs" / "late" / "sft").exists()
