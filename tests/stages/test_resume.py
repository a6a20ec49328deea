"""Killed runs, resumed, end as undisturbed ones do: `scripts/kill_resume.py`, a few kills here, many in the slow tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_resume.py"


def kill(*arguments: str) -> dict:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_48_a_killed_ppo_run_ends_as_if_it_had_not_been():
    assert kill("--stage", "ppo", "--kills", "2")["identical"]


@pytest.mark.slow
@pytest.mark.parametrize("stage, kills, ranks", [("ppo", 20, 1), ("ppo", 8, 2), ("sft", 5, 1), ("reward", 5, 1)])
def test_48_killed_runs_end_as_if_they_had_not_been(stage, kills, ranks):
    assert kill("--stage", stage, "--kills", str(kills), "--ranks", str(ranks))["identical"]
