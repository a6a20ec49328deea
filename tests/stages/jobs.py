"""PPO runs by the dozen, and what is read back from a run folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

STAGES = ("sft", "sample", "reward", "ppo", "evaluate")


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def manifest(run_dir: Path) -> dict:
    return json.loads((run_dir / "manifest.json").read_text())


def run_many(jobs: dict[str, list[str]], folder: Path, stage: str = "ppo", ranks: int = 1) -> dict[str, str | None]:
    """{name: overrides of `alignkit <stage>`} all in one process (a rank) -> {name: traceback, or None where it was done}.

    Overrides may begin with the name of another stage.
    """
    told = {name: job if job[0] in STAGES else [stage, *job] for name, job in jobs.items()}
    (folder / "jobs.json").write_text(json.dumps(told))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name("many_runs.py")), str(folder / "jobs.json")]
    world = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    processes = []
    for rank in range(ranks):
        own = {key: str(value) for key, value in (world | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        with (folder / f"jobs-{rank}.log").open("w") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | own))
    try:
        for process in processes:
            process.wait(1500)
    finally:
        for process in processes:
            process.kill()
    logs = [(folder / f"jobs-{rank}.log").read_text() for rank in range(ranks)]
    said = [json.loads(line[4:]) for line in logs[0].splitlines() if line.startswith("JOB ")]
    assert len(said) == len(jobs), "\n".join(log[-3000:] for log in logs)
    return {job["name"]: job["error"] for job in said}
