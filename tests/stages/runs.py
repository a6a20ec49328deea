"""What is read back from a run folder."""

from __future__ import annotations

import json
from pathlib import Path

STAGES = ("sft", "sample", "reward", "ppo", "evaluate")


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def manifest(run_dir: Path) -> dict:
    return json.loads((run_dir / "manifest.json").read_text())
