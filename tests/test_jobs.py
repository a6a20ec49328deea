"""What `alignkit status|logs|cancel|report` say of a run, from its manifests and from what Slurm knows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import finished_run, invoke, write_model

from alignkit.core.errors import InputError, RunError
from alignkit.jobs import steps
from alignkit.launch import scheduler
from alignkit.launch.scheduler import Job, write_record
from alignkit.runs import manifests


def told(status: str, job: Job | None = None, held: bool = False, progress: str = "", **more) -> tuple[str, str]:
    found = steps.standing({"stage": "ppo", "status": status, **more}, job, held, progress)
    return found.status, found.detail


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("done", None, False, "PPO  3/3"), "done", "PPO  3/3"),
        (("running", None, True, "PPO  1/3"), "running", "PPO  1/3"),
        (("running", None, False, "PPO  1/3"), "failed", "its processes are gone; PPO  1/3"),
        (("saved", None, False, "PPO  1/3"), "saved", "PPO  1/3"),
        (("queued", Job("7", "PENDING", "Dependency")), "queued", "waits: Dependency"),
        (("saved", Job("7", "PENDING", "BeginTime"), False, "PPO  1/3"), "saved", "waits: BeginTime; PPO  1/3"),
        (("running", Job("7", "PENDING", "BeginTime"), False, "PPO  1/3"), "queued", "waits: BeginTime; PPO  1/3"),
        (("queued", Job("7", "RUNNING", "", "n1")), "running", "on n1: starting"),
        (("running", Job("7", "RUNNING", "", "n1"), False, "PPO  1/3"), "running", "on n1: PPO  1/3"),
        (("running", Job("7", "COMPLETING", "", "n1"), False, "PPO  1/3"), "running", "on n1: PPO  1/3"),
        (("queued", Job("7", "CANCELLED", "DependencyNeverSatisfied")), "cancelled", "before it did not end well"),
        (("running", Job("7", "CANCELLED"), False, "PPO  1/3"), "cancelled", "by scancel; PPO  1/3"),
        (("running", Job("7", "TIMEOUT", "TimeLimit"), False, "PPO  1/3"), "failed", "TIMEOUT TimeLimit; PPO  1/3"),
        (("running", Job("7", "OUT_OF_MEMORY")), "failed", "OUT_OF_MEMORY"),
        (("saved", Job("7", "FAILED")), "saved", "FAILED"),
        (("running", Job("7", "UNKNOWN")), "failed", "Slurm does not know that job any more"),
        (
            ("running", Job("7", "UNANSWERED", "squeue: no route"), False, "PPO  1/3"),
            "not known",
            "squeue: no route; PPO  1/3",
        ),
        (("done", Job("7", "COMPLETED")), "done", ""),
    ],
)
def test_manifest_and_slurm_together(arguments, status, words):
    found, detail = told(*arguments)
    assert (found, words in detail) == (status, True), detail


def test_a_failed_stage_says_its_error():
    assert told("failed", Job("7", "FAILED"), error="RunError: the loss is nan") == (
        "failed",
        "RunError: the loss is nan",
    )


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with three stages, in the order of their names another than that of their work."""
    root = tmp_path / "runs" / "mine"
    write_model(tmp_path / "model")
    for stage in ("sft", "reward", "ppo"):
        finished_run(root / stage, stage, tmp_path / "model")
    manifests.write_manifest(root / "ppo", status="running")
    (root / "ppo" / "logs").mkdir()
    events = [{"note": "x"}, {"what": "PPO", "done": 2, "total": 8, "unit": "step", "numbers": {"score": 0.5}}]
    (root / "ppo" / "logs" / "progress.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (root / "ppo" / "logs" / "ppo.log").write_text("one\ntwo\n")
    return root


def test_status_of_a_local_run_by_folder_or_by_name(run):
    for name in ("runs/mine", "mine"):
        result = invoke("status", name, cwd=run.parents[1])
        assert (result.code, result.err) == (0, "")
        lines = [line.split() for line in result.out.splitlines()]
        assert [line[:2] for line in lines] == [["sft", "done"], ["reward", "done"], ["ppo", "failed"]]
        assert "its processes are gone; PPO  2/8  score 0.500" in result.out
    with manifests.lock(run / "ppo"):
        assert steps.status(run / "ppo") == [steps.Standing("ppo", "running", "", "PPO  2/8  score 0.500")]
    assert steps.status(run / "ppo")[0].status == "failed"  # asking did not hold it


def test_a_job_is_not_asked_for_where_there_is_no_slurm(run, monkeypatch):
    """On a machine without Slurm the manifests still speak."""
    write_record(run / "ppo", "7", [])
    monkeypatch.setenv("PATH", "")
    found = steps.status(run / "ppo")[0]
    assert found.status == "not known" and "no squeue on this machine" in found.detail and "PPO  2/8" in found.detail


@pytest.mark.parametrize("command", ["status", "logs", "cancel", "report"])
def test_what_is_no_run_is_refused_in_one_line(tmp_path, command):
    result = invoke(command, "nothing", cwd=tmp_path)
    assert (result.code, result.out) == (2, "") and "no run there" in result.err and result.err.count("\n") == 1
    assert invoke(command, cwd=tmp_path).out.startswith(f"usage: alignkit {command} RUN")


def test_logs_are_those_of_the_newest(run):
    command = [sys.executable, "-m", "alignkit", "logs", str(run)]
    done = subprocess.run([*command, "-n", "1"], capture_output=True, text=True)
    assert done.stdout == f"==> {run}/ppo/logs/ppo.log\ntwo\n" and done.returncode == 0
    with pytest.raises(InputError, match="no log yet"):
        steps.show_logs(run / "sft")


def test_cancel_ends_the_process_that_works_there(run):
    hold = f"from alignkit.runs import lock; from pathlib import Path; import time\nwith lock.lock(Path({str(run / 'ppo')!r})):\n    print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    out = invoke("cancel", str(run), cwd=run).out
    assert out == f"told to end: process {process.pid} ({run}/ppo)\n"
    assert process.wait(10) == -signal.SIGTERM
    assert "nothing of it is queued or running" in invoke("cancel", str(run), cwd=run).out


def test_the_error_of_this_attempt_and_not_of_the_one_before(tmp_path):
    (tmp_path / "logs").mkdir()
    now = time.time()
    events = [
        {"error": "old", "kind": "run", "rank": 0, "time": now - 900},
        {"error": "first", "kind": "run", "rank": 1, "time": now},
        {"error": "lost connection", "kind": "run", "rank": 0, "time": now + 1},
    ]
    (tmp_path / "logs" / "progress.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(now - 60))
    error = steps.first_error(tmp_path, started)
    assert error is not None and error["error"] == "first"
    # The clock of the rank's node may be behind: how long the file was when the attempt began tells more.
    behind = {"error": "behind", "kind": "run", "rank": 1, "time": now - 9999}
    size = (tmp_path / "logs" / "progress.jsonl").stat().st_size
    with (tmp_path / "logs" / "progress.jsonl").open("a") as file:
        file.write(json.dumps(behind) + "\n")
    assert steps.first_error(tmp_path, started, size) == behind
    assert steps.first_error(tmp_path, time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(now + 60))) == behind


@pytest.fixture
def silent(tmp_path, monkeypatch):
    """Commands of a Slurm whose controller does not answer."""
    folder = tmp_path / "bin"
    folder.mkdir()
    words = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
    for name in ("squeue", "sacct", "scancel", "sbatch", "scontrol"):
        (folder / name).write_text(f"#!/bin/bash\n{words}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_controller_that_does_not_answer_says_nothing_of_a_job(run, silent):
    write_record(run / "ppo", "7", [])
    found = steps.status(run / "ppo")[0]
    assert found.status == "not known" and "Unable to contact slurm controller" in found.detail
    with pytest.raises(RunError, match="whether job 7 still waits or runs is not known"):
        scheduler.working_on(run / "ppo")  # what a new start asks: it moves nothing aside
    with pytest.raises(RunError, match="whether job 7 still waits or runs"):
        scheduler.check_after(["7"])
    with pytest.raises(RunError, match="is not cancelled"):
        steps.cancel(run / "ppo")


def test_the_report_of_a_stage_is_that_of_its_run(run, capsys):
    (run / "reward" / "report.html").write_text("the card")
    steps.write_report(run / "reward")
    assert (run / "reward" / "report.html").read_text() == "the card" and not (run / "reward" / "summary.json").exists()
    assert (run / "report.html").is_file() and (run / "summary.json").is_file()
    assert "is a stage" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_is_printed(run, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alignkit.report.summary.write_atomic", full)
    with pytest.raises(RunError, match=r"cannot be written \(No space left"):
        steps.write_report(run)
    assert "reward" in capsys.readouterr().out
