"""Killed runs, resumed, end as undisturbed ones do, and never have two writers: `scripts/kill_resume.py` and `kill_drill.py`,
a few kills here, many in the slow tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def kill(*arguments: str, script: str = "kill_resume.py") -> dict:
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_killed_ppo_run_ends_as_if_it_had_not_been():
    assert kill("--stage", "ppo", "--kills", "2")["identical"]


@pytest.mark.slow
@pytest.mark.parametrize("stage, kills, ranks", [("ppo", 20, 1), ("ppo", 8, 2), ("sft", 5, 1), ("reward", 5, 1)])
def test_killed_runs_end_as_if_they_had_not_been(stage, kills, ranks):
    assert kill("--stage", stage, "--kills", str(kills), "--ranks", str(ranks))["identical"]


def test_whichever_process_is_killed_there_is_never_a_second_writer():
    assert kill("--rollout", "hf", "--kills", "3", script="kill_drill.py")["faults"] == []


@pytest.mark.slow
@pytest.mark.parametrize("rollout, kills", [("vllm", 15), ("server", 15)])
def test_whichever_processes_are_killed_there_is_never_a_second_writer(rollout, kills):
    assert kill("--rollout", rollout, "--kills", str(kills), script="kill_drill.py")["faults"] == []
