"""What is asked of Slurm itself: submit, release, cancel, and what has become of a job. Jobs are named by their ids."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkit.core.errors import InputError, RunError
from alignkit.core.io import write_atomic

RECORD = "slurm.json"  # in the stage's folder: which job works on it
ENDED_WELL = "COMPLETED"
UNANSWERED = "UNANSWERED"
FORGOTTEN = "Invalid job id"  # what squeue says of a job that the controller does not know
SITE = ("ACCOUNT", "CLUSTERS", "CONSTRAINT", "PARTITION", "QOS", "RESERVATION", "WCKEY")  # SBATCH_…: set in profiles
FAILED = (
    *("BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
    "UNKNOWN",
)


@dataclass(frozen=True)
class Job:
    """A job as Slurm sees it now."""

    id: str
    state: str  # PENDING, RUNNING, …; UNKNOWN: Slurm has forgotten it, or never knew; UNANSWERED: it does not answer
    reason: str = ""  # why it waits or ended
    nodes: str = ""

    @property
    def active(self) -> bool:
        """Queued or at work, as far as is known."""
        return self.state not in (ENDED_WELL, UNANSWERED, *FAILED)


def submit(script: str, *, after: Sequence[str] = (), how: str = "afterok", hold: bool = False) -> str:
    """Submit the text of a batch script; its job's id.

    Args:
        after: jobs that must end well first; where one does not, this job is cancelled. Slurm takes the id of a job
            it does not know for one that ended well, so check them with `check_after`, or submit them held.
        how: afterok; between two arrays aftercorr, where each task waits for its own.
        hold: it waits for `release`.

    Raises:
        InputError: Slurm refuses it, with its words.
    """
    dependency = [f"--dependency={how}:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    held = ["--hold"] if hold else []
    if overruling := overruled(os.environ, script):  # sbatch puts them above the script's own lines
        print(f"not handed to sbatch: {', '.join(overruling)} of this shell; the launcher's keys say what the job gets")
    return _slurm("sbatch", "--parsable", *dependency, *held, stdin=script, without=overruling).split(";")[0].strip()


def overruled(environment: Iterable[str], script: str) -> list[str]:
    """The variables that sbatch would put above what a script says, or that change what its ranks find.

    Args:
        environment: names. An account, a partition and the like count where the script has none of its own.
    """
    said = set(re.findall(r"^#SBATCH --([\w-]+)", script, re.MULTILINE))
    own = {f"SBATCH_{name}" for name in SITE if name.lower() not in said}
    return sorted(name for name in environment if name.startswith("SBATCH_") and name not in own)


def check_after(ids: Iterable[str]) -> None:
    """Refuse jobs that will never end well.

    Raises:
        InputError: Slurm does not know one, or it failed.
        RunError: Slurm does not answer.
    """
    for job in jobs(ids).values():
        answered(job, "launcher.after")
        if job.state in FAILED:
            known = "Slurm knows no such job" if job.state == "UNKNOWN" else f"that job is {job.state}"
            raise InputError(
                f"launcher.after: {job.id}: {known}, so nothing can start after it; give the id of a job that waits, "
                "runs or ended well"
            )


def answered(job: Job, what: str) -> Job:
    """The job, of which something is known.

    Raises:
        RunError: Slurm did not answer: the job may be at work, so nothing is done on the ground that it is not.
    """
    if job.state == UNANSWERED:
        raise RunError(
            f"{what}: whether job {job.id} still waits or runs is not known ({job.reason}): try again when it answers"
        )
    return job


def release(job: str) -> None:
    """Let a held job start."""
    _slurm("scontrol", "release", job)


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs; those that have ended stay as they are."""
    for task in (job for job in ids if "_" in job):
        # A task that waits is part of its array until something is said of it alone. Cancelled before that, Slurm forgets
        # it, and what comes after it waits for ever.
        _lines("scontrol", "update", f"JobId={task}", "Comment=cancelled")
    if ids:
        _slurm("scancel", "--quiet", *ids)


def jobs(ids: Iterable[str]) -> dict[str, Job]:
    """{id: what has become of it}, from the controller, and of those it has forgotten from the accounting.

    That the controller does not answer is no word about a job: its state is then UNANSWERED.
    """
    return {job: _job(job) for job in dict.fromkeys(ids)}  # one a call: squeue refuses a whole list for its last id


def _job(job: str) -> Job:
    try:
        lines = _slurm("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%r|%N").splitlines()
    except (InputError, RunError) as error:
        if FORGOTTEN not in str(error):
            return Job(job, UNANSWERED, str(error))
        lines = []
    lines = lines or _lines("sacct", "-XnP", f"--jobs={job}", "--format=State,Reason,NodeList")
    lines = lines or [f"{line}||" for line in _lines("sacct", "-cnP", f"--jobs={job}", "--format=State")]
    state, reason, nodes = (lines[0] if lines else "UNKNOWN||").split("|")[:3]
    reason = "" if reason in ("None", "NonZeroExitCode") else reason
    return Job(job, state.split()[0].rstrip("+"), reason, nodes)  # "CANCELLED by 1000"


def write_record(run_dir: Path, job: str, after: Sequence[str]) -> None:
    """Note in a stage's folder which job works on it."""
    record = {"job": job, "after": list(after), "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_atomic(run_dir / RECORD, json.dumps(record, indent=2) + "\n")


def read_record(run_dir: Path) -> str | None:
    """The id of the job that was last submitted for a stage's folder."""
    path = run_dir / RECORD
    return str(json.loads(path.read_text(encoding="utf-8"))["job"]) if path.is_file() else None


def working_on(run_dir: Path) -> Job | None:
    """The job that waits or runs for a stage's folder, or None.

    Raises:
        RunError: Slurm does not answer.
    """
    job = read_record(run_dir)
    if job is None:
        return None
    fix = f"{run_dir} (if that job is surely gone, delete {run_dir / RECORD})"
    found = answered(jobs([job])[job], fix)
    return found if found.active else None


def _lines(*command: str) -> list[str]:
    """What a query prints; nothing where it is refused or not there: of the accounting, which many clusters have not."""
    try:
        return _slurm(*command).splitlines()
    except (InputError, RunError):
        return []


def _slurm(*command: str, stdin: str | None = None, without: Sequence[str] = ()) -> str:
    """Run a command of Slurm, its environment without some variables; what it prints.

    Raises:
        InputError: it refuses.
        RunError: Slurm is not installed here, or does not answer.
    """
    # Of a job we may be inside of, nothing is handed on but where the cluster is.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "HYDRA_")) or k == "SLURM_CONF"}
    environment = {name: value for name, value in environment.items() if name not in without}
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, encoding="utf-8", errors="replace", timeout=120, env=environment
        )
    except FileNotFoundError:
        raise RunError(
            f"launcher=slurm: there is no {command[0]} on this machine; submit from one of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise RunError(f"{command[0]} did not answer in 120 s: is slurmctld up? (sinfo)") from None
    if done.returncode:
        said = " ".join(line.removeprefix(f"{command[0]}: ") for line in done.stderr.splitlines() if line.strip())
        raise InputError(f"{command[0]}: {said or f'exit code {done.returncode}'}")
    return done.stdout
