"""What each rank executes: `python -m alignkit.worker <stage> <run_dir>`, started by a launcher.

Reads `<run_dir>/config.yaml` and nothing else, joins its peers, runs the stage, and has rank 0 write the manifest.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from alignkit.runs import lock


def main() -> int:
    """The exit code: 0 done, 1 failed, 2 an input was refused, 75 asked to stop early and saved."""
    end_with_parent()
    stage, run_dir, rank = sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"])
    from alignkit.core.errors import Saved

    held = lock.hold(run_dir)  # open until this process ends
    try:
        work(stage, run_dir, rank)
    except Saved:
        return Saved.CODE
    except Exception as error:  # from the first line on: what a rank does before its stage fails in words too
        return report(error, run_dir, rank)
    finally:
        if rank == 0:
            sweep(run_dir)
        assert not held.closed
    return 0


def sweep(run_dir: Path) -> None:
    """Remove what adapters lay in on their way to an engine, sockets, and checkpoints that were not written to their end.

    A stage that stops early or fails leaves by no other door.
    """
    lock.end_servers(run_dir)
    shutil.rmtree(lock.sockets(run_dir), ignore_errors=True)
    for pattern in ("sync-*", "checkpoints/*.partial", "checkpoints/partial"):
        for left in run_dir.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def end_with_parent() -> None:
    """Have the kernel end this rank with the process that started it (Linux); it may have ended already."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    launcher = os.environ.get("ALIGNKIT_LAUNCHER")  # set by launch/node.py
    if launcher and os.getppid() != int(launcher):
        os._exit(1)


def work(stage: str, run_dir: Path, rank: int) -> None:
    """Run the stage as one of its ranks; rank 0 writes the manifest.

    Raises:
        Saved: it was asked to stop and saved; the manifest says so.
    """
    from alignkit.check.contents import check_contents, contents
    from alignkit.config import stages
    from alignkit.core.errors import Saved
    from alignkit.runs import hashes, manifests
    from alignkit.tracking.run_log import RunLog
    from alignkit.training import engine, interrupt

    cfg = stages.load(run_dir / "config.yaml", stage)
    if hasattr(cfg, "max_seconds"):  # a stage with checkpoints
        interrupt.process.listen(cfg.max_seconds)
    if rank == 0:
        sweep(run_dir)  # of an attempt that was killed; the ranks of this one make theirs after they have met

    held = (manifests.read_manifest(run_dir) or {}).get("contents", {})
    check_contents(cfg, held, contents(cfg, keep_rows=True), "the command")

    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed searches, and warns in every process
    started = time.time()
    told = {key: value for key, value in manifests.plain_config(run_dir).items() if key != "launcher"}  # not its setup
    with RunLog(run_dir, stage, rank, cfg.logger, told) as log:
        world = engine.start(log.note)
        try:
            metrics, facts = importlib.import_module(f"alignkit.stages.{stage}").main(cfg, world, log)
            peaks = world.gather(peak_mib())
        except Saved as saved:
            if rank == 0:
                manifests.write_manifest(run_dir, status="saved", saved=vars(saved))
                log.note(str(saved))
                log.close()
            world.barrier()  # the launcher ends the others when the first rank is gone
            raise
        if rank == 0:
            facts = hashes.record(facts, run_dir, cfg.verify) | {"metrics": metrics, "peak_mib": peaks}
            manifests.write_manifest(run_dir, **facts, seconds=round(time.time() - started, 1), status="done")
    engine.stop()


def report(error: Exception, run_dir: Path, rank: int) -> int:
    """Say why a rank stops, where the command reads it, and in the manifest; the exit code.

    Where that cannot be written either, the disk being full, it stands in the log's last lines.
    """
    from alignkit.core.errors import InputError
    from alignkit.core.io import append_jsonl
    from alignkit.runs import manifests
    from alignkit.tracking.run_log import PROGRESS

    kind = "input" if isinstance(error, InputError) else "run"
    said = f"{error}" if kind == "input" else f"{type(error).__name__}: {error}"
    traceback.print_exc()
    try:
        event = {"error": said, "kind": kind, "rank": rank, "time": round(time.time(), 3)}
        if rank == 0 and shutil.disk_usage(run_dir).free < 2**18:
            (run_dir / manifests.SPARE).unlink(missing_ok=True)  # a full disk takes these words in its place
        append_jsonl(run_dir / PROGRESS, event)
        if rank == 0:
            manifests.write_manifest(run_dir, status="failed", error=f"{type(error).__name__}: {error}")
    except (OSError, InputError) as other:
        print(f"and this could not be written down: {other}", file=sys.stderr)
    return 2 if kind == "input" else 1


def peak_mib() -> float:
    """The most memory this rank held: torch's on its GPU, or without one what was resident in the machine's."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return round(int(status.split("VmHWM:")[1].split()[0]) / 2**10, 1)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # engines leave threads behind that would hold the process, and peers may hang in a collective
