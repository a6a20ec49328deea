"""The batch script on a real Slurm: signals, requeues, exit codes, and what is left behind.

A small program stands in for Python and alignkit, so that these take seconds; the stages themselves run in test_stages.py.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from alignkit.launch import scheduler
from alignkit.launch.slurm import Slurm, render, template

# A rank works until it is told to save; `plan` says how each run of the job ends: done, failed, refused, orphan or saved.
STAND_IN = f"""#!{sys.executable}
import os, pathlib, signal, subprocess, sys, time
folder = pathlib.Path(sys.argv[-1])
if sys.argv[3] == "report":
    sys.exit((folder / "reported").touch())
run = int(os.environ.get("SLURM_RESTART_COUNT", 0))
plan = (folder / "plan").read_text().split()[run]
if sys.argv[2] == "alignkit":
    print(*sys.argv[2:5])
    saved = len(list(folder.glob(f"saved.{{run}}.*"))) == 2
    codes = {{"done": 0, "orphan": 0, "failed": 1, "refused": 2, "saved": 75 if saved else 1}}
    sys.exit(codes[plan] if sys.argv[4] == "end" else 0)
rank = os.environ["RANK"]
def save(signum, frame):
    (folder / f"saved.{{run}}.{{rank}}").write_text(signal.Signals(signum).name)
    os._exit(75)
for signum in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(signum, save)
if plan == "orphan":
    subprocess.Popen(["sleep", "4242"], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
(folder / f"ready.{{run}}.{{rank}}").touch()
time.sleep(60 if plan == "saved" else 0.5)
sys.exit(0 if plan in ("done", "orphan") else 1)
"""


class Chain:
    """A job that goes by its plan, and one that waits for it."""

    def __init__(self, cluster, folder: Path, *plan: str, **fields) -> None:
        self.cluster, self.folder, self.run_dir = cluster, folder, folder / "run" / "sft"
        (self.run_dir / "logs").mkdir(parents=True)
        (self.run_dir / "plan").write_text(" ".join(plan))
        stand_in = folder / "python"
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)
        launcher = Slurm(**{"num_ranks": 2, "nodes": 2, "time": "00:10:00", **fields})
        script = render(
            launcher, "sft", [self.run_dir], template=template(), cwd=folder, python=str(stand_in), report=True
        )
        self.job = scheduler.submit(script, hold=True)
        self.next = scheduler.submit("#!/bin/sh\n#SBATCH --output=/dev/null\ntrue\n", after=[self.job])
        scheduler.release(self.job)

    def ready(self, run: int) -> None:
        """Wait until both ranks of the job's run number `run` work."""
        deadline = time.monotonic() + 60
        while len(list(self.run_dir.glob(f"ready.{run}.*"))) < 2:
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)

    def saved(self, run: int) -> list[str]:
        """The signals that made the ranks save."""
        return sorted(path.read_text() for path in self.run_dir.glob(f"saved.{run}.*"))

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in (self.run_dir / "logs").glob("*.log"))

    def ends(self) -> tuple[str, str, str]:
        """State and exit code of the job, state of the one after it."""
        state = self.cluster.ended(self.job)
        after = self.cluster.ended(self.next)
        return state, self.cluster.show(self.job)["ExitCode"], after


def test_a_stage_that_is_done_lets_the_next_one_start_and_the_report_is_written(cluster, tmp_path):
    chain = Chain(cluster, tmp_path, "done")
    assert chain.ends() == ("COMPLETED", "0:0", "COMPLETED"), chain.log
    assert (chain.folder / "run" / "reported").exists()


@pytest.mark.parametrize(("plan", "code"), [("failed", "1:0"), ("refused", "2:0")])
def test_a_stage_that_is_not_done_fails_with_its_code_and_cancels_the_next_one(cluster, tmp_path, plan, code):
    chain = Chain(cluster, tmp_path, plan)
    assert chain.ends() == ("FAILED", code, "CANCELLED"), chain.log
    assert not (chain.folder / "run" / "reported").exists()
    assert scheduler.jobs([chain.next])[chain.next].reason.startswith("Dependency")


def test_told_to_save_every_rank_saves_and_the_job_queues_itself_again(cluster, tmp_path):
    """The signal goes to the batch shell alone, as it does before the time limit."""
    chain = Chain(cluster, tmp_path, "saved", "saved", "done")
    for run in (0, 1):
        chain.ready(run)
        cluster.ask("scancel", "--batch", "--signal=USR2", chain.job)
        while chain.cluster.show(chain.job).get("Restarts") != str(run + 1):
            assert chain.cluster.state(chain.next) == "PENDING"
            time.sleep(0.2)
        assert chain.saved(run) == ["SIGUSR2", "SIGUSR2"]
    assert chain.ends() == ("COMPLETED", "0:0", "COMPLETED"), chain.log
    for run in (1, 2, 3):  # one log, each run of the job with its number
        assert f"job {chain.job}, run {run}: sft on n[1-2]" in chain.log


@pytest.mark.parametrize("fields", [{"max_restarts": 0}, {"requeue": False}])
def test_no_more_restarts_than_allowed(cluster, tmp_path, fields):
    chain = Chain(cluster, tmp_path, "saved", **fields)
    chain.ready(0)
    cluster.ask("scancel", "--batch", "--signal=USR2", chain.job)
    assert chain.ends() == ("FAILED", "75:0", "CANCELLED"), chain.log
    assert "not queued again" in chain.log


def test_a_cancelled_job_saves_and_does_not_come_back(cluster, tmp_path):
    chain = Chain(cluster, tmp_path, "saved", "done")
    chain.ready(0)
    scheduler.cancel([chain.job])
    assert chain.ends()[::2] == ("CANCELLED", "CANCELLED")
    assert chain.saved(0) == ["SIGTERM", "SIGTERM"]
    time.sleep(3)
    assert cluster.state(chain.job) == "CANCELLED" and "run 2" not in chain.log


def test_a_job_that_slurm_queues_again_goes_on(cluster, tmp_path):
    """`scontrol requeue`, as after the failure of a node."""
    chain = Chain(cluster, tmp_path, "saved", "done")
    chain.ready(0)
    cluster.ask("scontrol", "requeue", chain.job)
    assert chain.ends() == ("COMPLETED", "0:0", "COMPLETED"), chain.log
    assert chain.saved(0) == ["SIGTERM", "SIGTERM"]


def test_a_preempted_job_saves_and_comes_back(cluster, tmp_path):
    """Slurm sends TERM at the beginning of the grace time; a job that then ends by itself would be FAILED."""
    chain = Chain(cluster, tmp_path, "saved", "done", partition="low", flags=["--exclusive"])
    chain.ready(0)
    cluster.ask(
        "sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", stdin="#!/bin/sh\nsleep 1\n"
    )
    assert chain.ends() == ("COMPLETED", "0:0", "COMPLETED"), chain.log
    assert chain.saved(0) == ["SIGTERM", "SIGTERM"] and "queued again" in chain.log


def test_what_ranks_leave_behind_is_ended(cluster, tmp_path):
    chain = Chain(cluster, tmp_path, "orphan")
    assert chain.ends() == ("COMPLETED", "0:0", "COMPLETED"), chain.log
    assert sleepers() == []


def sleepers() -> list[str]:
    """The processes of the stand-in's orphans."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == b"sleep\0004242\0":
                found.append(path.parent.name)
        except OSError:  # it ended meanwhile
            continue
    return found


# ----------------------------------------------------------------------------------------------------- submitting


def test_the_state_of_a_job_that_nobody_knows(cluster):
    assert scheduler.jobs(["987654"])["987654"].state == "UNKNOWN"


def test_nothing_waits_for_a_job_that_is_unknown_or_failed(cluster):
    script = "#!/bin/sh\n#SBATCH --output=/dev/null\nexit 3\n"
    failed = scheduler.submit(script)
    assert cluster.ended(failed) == "FAILED"
    for job, words in (("987654", "knows no such job"), (failed, "is FAILED")):
        with pytest.raises(scheduler.InputError, match=words):
            scheduler.check_after([job])


def test_an_array_does_one_stage_of_several_runs_so_many_at_once(cluster, tmp_path):
    """Each task works in the folder of its own run, logs there, and ends by its own manifest."""
    runs = [tmp_path / name / "ppo" for name in "abcd"]
    for run_dir, plan in zip(runs, ("done", "done", "failed", "done"), strict=True):
        (run_dir / "logs").mkdir(parents=True)
        (run_dir / "plan").write_text(plan)
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    script = render(Slurm(), "ppo", runs, template=template(), cwd=tmp_path, python=str(stand_in), at_once=2)
    array = scheduler.submit(script, hold=True)
    after = scheduler.submit(
        "#!/bin/sh\n#SBATCH --output=/dev/null\n#SBATCH --array=0-3\ntrue\n", after=[array], how="aftercorr"
    )
    assert cluster.show(f"{array}_0")["ArrayTaskThrottle"] == "2"
    scheduler.release(array)
    tasks = [f"{array}_{number}" for number in range(4)]
    assert [cluster.ended(task) for task in tasks] == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"]
    assert [cluster.ended(f"{after}_{n}") for n in range(4)] == ["COMPLETED", "COMPLETED", "CANCELLED", "COMPLETED"]
    assert [job.state for job in scheduler.jobs(tasks).values()] == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"]
    for run_dir in runs:
        assert (run_dir / "ready.0.0").exists()
        assert "ppo on n" in "".join(path.read_text() for path in (run_dir / "logs").glob("ppo-*.log"))
