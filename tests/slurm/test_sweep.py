"""A sweep on Slurm: stages that are only queued are shared too. Nothing is run: the jobs would begin in an hour."""

from __future__ import annotations

import json
import re
from pathlib import Path

from command import alignkit

SHARED = ("sft", "sample", "reward")


def job(folder: Path) -> str:
    return json.loads((folder / "slurm.json").read_text())["job"]


def test_a_sweep_queues_what_its_jobs_share_once(cluster, tiny, rows, tmp_path):
    runs = tmp_path / "runs"
    result = alignkit(
        "pipeline", "-m", f"runs_dir={runs}", "run_name=sweep", "launcher=slurm", "launcher.flags=['--begin=now+3600']",
        f"model.path={tiny}", "+reward@sample.rewards.gold=vader", "+reward@evaluate.rewards.gold=vader", "logger=none",
        *(f"{stage}.data.path={rows}" for stage in ("sft", "sample", "ppo", "evaluate")),
        "ppo.algorithm.kl_coef=0.05,0.1", "ppo.steps=1,2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    jobs = sorted(path for path in (runs / "sweep").iterdir())
    try:
        assert len(jobs) == 4 and len(re.findall(r"queued: job \d+", result.stdout)) == 3 + 4 * 2
        shared = [job(jobs[0] / stage) for stage in SHARED]
        for folder in jobs:
            assert [job(folder / stage) for stage in SHARED] == shared
            needed = re.findall(r"afterok:(\d+)", cluster.show(job(folder / "ppo"))["Dependency"])
            assert needed == (shared[-1:] if folder == jobs[0] else shared)
            assert job(folder / "ppo") in cluster.show(job(folder / "evaluate"))["Dependency"]
        ended = alignkit("cancel", jobs[1])  # its own jobs, not those that other runs wait for
        assert ended.returncode == 0 and cluster.state(job(jobs[1] / "ppo")) == "CANCELLED"
        assert [cluster.state(number) for number in shared] == ["PENDING"] * 3
    finally:
        for folder in jobs:
            alignkit("cancel", folder)
