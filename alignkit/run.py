"""What each rank executes: `python -m alignkit.run <stage> <run_dir>`, started by a launcher.

Reads `<run_dir>/config.yaml` and nothing else, joins its peers, runs the stage, and has rank 0 write the manifest.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import traceback
from pathlib import Path


def main() -> int:
    """The exit code: 0 done, 1 failed, 2 an input was refused, 75 asked to stop early and saved."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # a rank ends with the process that started it (Linux)
    stage, run_dir = sys.argv[1], Path(sys.argv[2])
    rank = int(os.environ["RANK"])

    from alignkit import artifacts, config, engine, hashes, interrupt
    from alignkit.log import RunLog
    from alignkit.types import InputError, Saved

    cfg = config.load(run_dir / "config.yaml", stage)
    if hasattr(cfg, "max_seconds"):  # a stage with checkpoints
        interrupt.process.listen(cfg.max_seconds)

    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed searches, and warns in every process
    started = time.time()
    with RunLog(run_dir, stage, rank, cfg.logger, artifacts.plain_config(run_dir)) as log:
        try:
            world = engine.start()
            metrics, facts = importlib.import_module(f"alignkit.stages.{stage}").main(cfg, world, log)
            peaks = world.gather(peak_mib())
        except Saved as saved:
            if rank == 0:
                artifacts.write_manifest(run_dir, status="saved", saved=vars(saved))
                log.note(str(saved))
                log.close()
            world.barrier()  # the launcher ends the others when the first rank is gone
            sys.stdout.flush()
            os._exit(Saved.CODE)
        except Exception as error:
            kind = "input" if isinstance(error, InputError) else "run"
            log.error(kind, f"{error}" if kind == "input" else f"{type(error).__name__}: {error}")
            if rank == 0:
                artifacts.write_manifest(run_dir, status="failed", error=f"{type(error).__name__}: {error}")
            traceback.print_exc()
            log.close()
            sys.stderr.flush()
            os._exit(2 if kind == "input" else 1)  # peers may hang in a collective: the launcher ends them
        if rank == 0:
            facts = hashes.record(facts, run_dir, cfg.verify) | {"metrics": metrics, "peak_mib": peaks}
            artifacts.write_manifest(run_dir, **facts, seconds=round(time.time() - started, 1), status="done")
    engine.stop()
    return 0


def peak_mib() -> float:
    """The most memory this rank held: torch's on its GPU, or without one what was resident in the machine's."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    status = Path("/proc/self/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) / 2**10, 1)


if __name__ == "__main__":
    sys.stdout.flush()
    code = main()
    sys.stdout.flush()
    os._exit(code)  # engines leave threads behind that would hold the process
