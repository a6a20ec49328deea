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


def run_many(jobs: dict[str, list[str]], folder: Path) -> dict[str, str | None]:
    """{name: overrides of `alignkit ppo`} all in one process -> {name: traceback, or None where the run was done}."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("many_ppo.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "jobs.json"), str(port)],
        capture_output=True, text=True, timeout=1500, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("JOB ")]
    assert len(said) == len(jobs), done.stdout[-3000:] + done.stderr[-3000:]
    return {job["name"]: job["error"] for job in said}
