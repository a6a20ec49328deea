"""What has become of a run: `alignkit status|logs|cancel|report RUN`, from manifests and Slurm together; local runs too.

`alignkit job begin|end RUN_DIR` are called by the batch script of a Slurm job, before and after its ranks.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from alignkit.core import terminal
from alignkit.core.errors import InputError, RunError
from alignkit.core.io import read_jsonl
from alignkit.launch import scheduler, slurm
from alignkit.runs import lock, manifests
from alignkit.tracking.run_log import PROGRESS

SAVED = 75  # exit code: saved, to be started again
WAS_DONE = 3  # exit code of `job begin`: the stage is done, there is nothing to run
KEPT = ("logs", "submit.sbatch", scheduler.RECORD)  # of a job that starts over: its log is being written


@dataclass(frozen=True)
class Standing:
    """Where a stage stands."""

    stage: str
    status: str  # queued, running, saved, done, failed, cancelled; not known: Slurm does not answer
    job: str = ""  # of Slurm
    detail: str = ""  # how far it is, what it waits for, or why it failed

    @property
    def line(self) -> str:
        job = f"job {self.job}" if self.job else ""
        return f"{self.stage:<9} {self.status:<10} {job:<10} {self.detail}".rstrip()


def standing(manifest: dict[str, Any], job: scheduler.Job | None, held: bool, progress: str) -> Standing:
    """What manifest and Slurm say together.

    Args:
        job: the last one submitted for the stage, None: it was started without Slurm.
        held: a process of this machine works on it.
        progress: the last line of progress in words.
    """
    stage, status = manifest.get("stage", "?"), manifest.get("status", "")  # it may be half written
    number = job.id if job else ""
    error = manifest.get("error") or ""
    if status in ("done", "failed"):
        return Standing(stage, status, number, progress if status == "done" else error)
    if job is None:
        if held or status == "saved":
            return Standing(stage, status, number, progress)
        return Standing(stage, "failed", number, f"its processes are gone; {progress}".rstrip("; "))
    if job.state == "PENDING":
        again = f"; {progress}" if status != "queued" else ""
        return Standing(stage, "saved" if status == "saved" else "queued", number, f"waits: {job.reason}{again}")
    if job.active:
        return Standing(stage, "running", number, f"on {job.nodes or '?'}: {progress or 'starting'}")
    if job.state == scheduler.UNANSWERED:
        return Standing(stage, "not known", number, f"{job.reason}; {progress}".rstrip("; "))
    if job.state == "CANCELLED":
        why = "the job before it did not end well" if job.reason.startswith("Dependency") else "by scancel"
        return Standing(stage, "cancelled", number, why + (f"; {progress}" if progress else ""))
    what = "Slurm does not know that job any more" if job.state == "UNKNOWN" else f"{job.state} {job.reason}".strip()
    return Standing(stage, "saved" if status == "saved" else "failed", number, f"{what}; {progress}".rstrip("; "))


def status(run: Path) -> list[Standing]:
    """Where each stage of a run stands, in the order they were started."""
    folders = stage_folders(run)
    records = {folder: scheduler.read_record(folder) for folder in folders}
    known = scheduler.jobs(job for job in records.values() if job)
    found = []
    for folder in folders:
        manifest = manifests.read_manifest(folder) or {}
        found.append(standing(manifest, known.get(records[folder] or ""), lock.is_held(folder), last_progress(folder)))
    return found


def stage_folders(run: Path) -> list[Path]:
    """The folders of a run's stages, oldest first; of a stage's folder itself, that one.

    Raises:
        InputError: there is no such run.
    """
    manifests.refuse_checkpoint(run, "status")
    for folder in (run, Path("runs") / run):
        found = [folder] if (folder / "manifest.json").is_file() else [p.parent for p in folder.glob("*/manifest.json")]
        if found:
            return sorted(found, key=lambda folder: _order((manifests.read_manifest(folder) or {}).get("stage", "")))
    raise InputError(
        f"{run}: no run there; expected a run's folder as runs/<name>, or a stage's as runs/<name>/<stage>"
    )


def _order(stage: str) -> int:
    from alignkit.config.stages import STAGES

    return list(STAGES).index(stage) if stage in STAGES else len(STAGES)


def last_progress(folder: Path) -> str:
    """The last line of a stage's progress: what it does, how far it is, and its numbers."""
    from alignkit.tracking.console import short

    events = [event for event in read_jsonl(folder / PROGRESS) if "what" in event]
    if not events:
        return ""
    event = events[-1]
    count = f"{event['done']}/{event['total']}" if event.get("total") else ""
    numbers = "  ".join(f"{name} {short(value)}" for name, value in (event.get("numbers") or {}).items())
    return "  ".join(part for part in (event["what"], count, numbers) if part)


# ------------------------------------------------------------------------------------------------------- commands


def show_status(run: Path) -> None:
    """alignkit status RUN"""
    for item in status(run):
        print(item.line)


def show_logs(run: Path, *flags: str) -> None:
    """alignkit logs RUN [-f] [-n LINES]: the newest log, as `tail` shows it."""
    logs = [path for folder in stage_folders(run) for path in (folder / "logs").glob("*.log")]
    if not logs:
        raise InputError(f"{run}: no log yet; alignkit status {shlex.quote(str(run))} says what it waits for")
    # A task of an array opens a log of Slurm's that stays empty.
    newest = max(logs, key=lambda path: (path.stat().st_size > 0, path.stat().st_mtime))
    print(f"==> {newest}", flush=True)
    tail = ["tail", *(["-F"] if "-f" in flags else []), *(f for f in flags if f != "-f"), "--", str(newest)]
    if code := terminal.follow(tail):
        sys.exit(code)


def cancel(run: Path) -> None:
    """alignkit cancel RUN: end its jobs, last ones first, and its processes on this machine: the ranks, which save what
    they can, or where there are none yet the command that will start them."""
    ended = 0
    own = [folder for folder in stage_folders(run) if not folder.is_symlink()]  # the others are of other runs too
    known = scheduler.jobs(job for folder in own if (job := scheduler.read_record(folder)))
    if active := [job for job in known.values() if job.active]:
        scheduler.cancel([job.id for job in reversed(active)])
        print(f"cancelled: {', '.join(f'job {job.id} ({job.state})' for job in active)}")
        ended += len(active)
    for folder in own:
        for pid in lock.workers(folder, lock.RANKS) or lock.workers(folder, lock.LOCK):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
                print(f"told to end: process {pid} ({folder})")
                ended += 1
        if not ended and lock.is_held(folder):
            print(f"{folder} is held by {lock.holder(folder)}, which is not on this machine: cancel it there")
            ended += 1
    if any(job.state == scheduler.UNANSWERED for job in known.values()):
        raise RunError(f"{run}: what Slurm has of it is not cancelled: try again when it answers")
    if not ended:
        print(f"{run}: nothing of it is queued or running")


def write_report(run: Path) -> None:
    """alignkit report RUN: summary.json, report.html and the table of what there is.

    Raises:
        RunError: they cannot be written there; the table was printed.
    """
    from alignkit.report import html, summary

    first = stage_folders(run)[0]
    if first == run:  # a stage's folder, whose report.html is its own: the card of a reward model
        print(f"{first} is a stage: the report is of the run that it belongs to")
    run = Path(os.path.normpath(first)).parent
    summary.print_summary(run)
    try:
        summary.write_summary(run)
        html.write_html(run)
    except OSError as error:
        raise RunError(
            f"{run}: summary.json and report.html cannot be written ({error.strerror}): mend its rights"
        ) from None


def job_step(step: str, run_dir: Path) -> int:
    """alignkit job begin|end RUN_DIR, called by the batch script; its exit code."""
    from alignkit.check.contents import check_contents
    from alignkit.config import stages
    from alignkit.pipeline import stage as pipeline

    manifest = manifests.read_manifest(run_dir)
    if step not in ("begin", "end") or manifest is None:
        raise InputError(
            f"alignkit job {step} {run_dir}: expected begin or end, and the folder of a stage that was queued"
        )
    if step == "end":
        if manifest["status"] == "saved":
            return SAVED
        log = slurm.log_path(run_dir, manifest["stage"], os.environ.get("SLURM_JOB_ID", ""))
        pipeline.conclude(run_dir, first_error(run_dir, manifest["started"], manifest.get("progress_from")), log)
        return 0
    if manifest["status"] == "done":
        print(f"{run_dir} is done")
        return WAS_DONE
    cfg = stages.load(run_dir / "config.yaml", manifest["stage"])
    try:
        origin = pipeline.origin_of(cfg, pipeline.check_inputs(cfg, {}))
        check_contents(cfg, manifest.get("checked", {}), origin["contents"], "the command that queued it")
    except InputError as error:
        manifests.write_manifest(run_dir, status="failed", error=str(error))
        raise
    with manifests.lock(run_dir):
        queued = {key: manifest[key] for key in ("plan", "checked") if key in manifest}  # an attempt set aside had them
        pipeline.open_run(cfg, "running", origin | queued, keep=KEPT)
    return 0


def first_error(run_dir: Path, started: str, offset: int | None = None) -> dict | None:
    """The first error event of the attempt that started then.

    Args:
        offset: bytes of its progress file that were there before; None: not known, then times tell, and where the clock
            of the rank's node was behind, the last error counts.
    """
    errors = [event for event in read_jsonl(run_dir / PROGRESS, offset or 0) if "error" in event]
    since = datetime.fromisoformat(started).timestamp() if offset is None else 0.0
    return next((event for event in errors if event.get("time", 0) >= since), errors[-1] if errors else None)


def main(arguments: Sequence[str], command: str) -> None:
    """A command of `cli.TOOLS`, or `job`, which ends the process with its own exit code."""
    run, flags = Path(arguments[0]), arguments[1:]
    if command == "job":
        sys.exit(job_step(arguments[0], Path(arguments[-1])))
    if command == "logs":
        return show_logs(run, *flags)
    if flags or arguments[0].startswith("-"):
        raise InputError(f"alignkit {command} {' '.join(arguments)}: expected alignkit {command} RUN")
    {"status": show_status, "cancel": cancel, "report": write_report}[command](run)
