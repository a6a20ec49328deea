"""Runs that are asked to stop save, exit with 75 and go on; a loss of NaN ends one. The real command line and launcher."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import alignkit
from jobs import manifest, metrics

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from kill_resume import Run, prepare, processes, raw_rows


def stopped(run: Run, signum: int, after: int, ranks: bool = False, again: bool = False) -> tuple[int, str, float]:
    """Start, send a signal (to the ranks themselves, or twice) after some logged steps: (exit code, output, seconds)."""
    command = subprocess.Popen(
        run.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    while command.poll() is None and len(raw_rows(run.path)) < after:
        time.sleep(0.02)
    sent = time.monotonic()
    targets = [command.pid]
    if ranks:
        lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in processes(str(run.path))}
        targets = [pid for pid, words in lines.items() if b"alignkit.worker" in words and b"--module" not in words]
    for _ in range(1 + again):
        for pid in targets:
            os.kill(pid, signum)
        time.sleep(0.5 * again)
    return command.wait(), command.communicate()[0], time.monotonic() - sent


def check_saved_and_resumed(folder: Path, stage: str, signum: int, ranks: bool) -> None:
    """Stopped by a signal with 75, resumed by the command it printed: the same end as a run that was not."""
    steps = 12 if stage == "ppo" else 80  # TRL's take some 20 ms each: enough of them that the signal meets one
    common = [word for word in prepare(folder, stage, 1) if not word.startswith(("save_steps", "max_steps"))]
    common += [f"max_steps={steps}"] * (stage != "ppo")
    whole, run = Run(folder, stage, "whole", common), Run(folder, stage, "stopped", common)
    whole.finish()
    code, said, seconds = stopped(run, signum, after=3, ranks=ranks)
    state = manifest(run.path)
    assert (code, state["status"]) == (75, "saved"), said
    step = state["saved"]["step"]
    assert 3 <= step < steps and len(metrics(run.path)) == step and seconds < 60
    found = [p.name for p in (run.path / "checkpoints").iterdir()]
    assert found == [f"step_{step:06d}"] and not (run.path / "model").exists()
    line = next(line for line in said.splitlines() if line.startswith(f"saved at step {step} of {steps} (SIG"))
    words = shlex.split(line.split("go on with: ")[1])
    assert words[:2] == ["alignkit", stage] and words[-1] == "resume=true"
    result = alignkit(*words[1:])
    assert result.returncode == 0, result.stderr + result.stdout
    assert run.differs_from(whole) is None
    assert manifest(run.path)["metrics"].get("train_loss") == manifest(whole.path)["metrics"].get("train_loss")


def test_ctrl_c_saves_and_the_printed_command_goes_on(tmp_path):
    check_saved_and_resumed(tmp_path, "sft", signal.SIGINT, ranks=False)


@pytest.mark.slow
@pytest.mark.parametrize("stage, signum, ranks", [("ppo", signal.SIGTERM, False), ("reward", signal.SIGUSR1, True)])
def test_signals_save(stage, signum, ranks, tmp_path):
    check_saved_and_resumed(tmp_path, stage, signum, ranks)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_and_leaves_no_process(tmp_path):
    run = Run(tmp_path, "ppo", "twice", prepare(tmp_path, "ppo", 2))
    code, said, seconds = stopped(run, signal.SIGINT, after=1, again=True)
    assert code in (75, 130) and seconds < 15, said
    assert not processes(str(run.path))


@pytest.mark.slow
def test_a_time_limit_saves(tmp_path):
    run = Run(tmp_path, "ppo", "limited", [*prepare(tmp_path, "ppo", 1), "max_seconds=1"])
    done = subprocess.run(run.command, capture_output=True, text=True)
    assert done.returncode == 75 and "saved at step 0 of 12 (max_seconds=1)" in done.stderr


def test_a_loss_of_nan_ends_a_stage_before_the_step_with_its_batch_kept(tmp_path):
    """A weight decay of 1e30 makes the weights of step 1 useless: the loss of step 2 is NaN."""
    run = Run(tmp_path, "sft", "nan", [*prepare(tmp_path, "sft", 1), "save_steps=1"])
    done = subprocess.run([*run.command, "optimizer.weight_decay=1e30"], capture_output=True, text=True)
    said = json.dumps(done.stderr)
    assert done.returncode == 1 and "step 2: " in said and "is nan" in said and "rank_0.safetensors" in said, said
    assert [p.name for p in (run.path / "debug").iterdir()] == ["step_000002_rank_0.safetensors"]
    assert not (run.path / "model").exists() and len(metrics(run.path)) == 1
    assert [p.name for p in (run.path / "checkpoints").glob("step_*")] == ["step_000001"]
