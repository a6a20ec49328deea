"""Where DeepSpeed's kernels are built, once an environment, and what a person is told while they are."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SHARED_MEMORY = "deepspeed_shm_comm"  # sums of the ranks of one machine without a GPU
PATIENCE = 10.0  # seconds before a wait is said


def folder() -> Path:
    """TORCH_EXTENSIONS_DIR where it is set, else a folder of this environment.

    torch's own default is one a user: two environments have other include paths, and so would build their kernels anew,
    a minute and a half, whenever the one runs after the other.
    """
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    own = Path(sys.prefix)
    if os.access(own, os.W_OK):
        return own / "var" / "torch_extensions"
    name = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions" / name


def remove_stale_locks(root: Path, older_than_s: float = 900.0) -> list[Path]:
    """Remove the locks of builds that were killed: DeepSpeed's kernels are built on first use, and whoever finds the lock
    of a build waits for its end, for ever if its process is gone. A build takes a minute or two."""
    stale = [p for p in root.glob("**/lock") if time.time() - p.stat().st_mtime > older_than_s]
    for path in stale:
        path.unlink(missing_ok=True)
        print(f"removed {path}: a build that was killed had left it", flush=True)
    return stale


@contextlib.contextmanager
def telling(root: Path, note: Callable[[str], None]) -> Iterator[None]:
    """While the ranks meet: after ten seconds, say what they wait for, once each."""
    met = threading.Event()

    def watch() -> None:
        if met.wait(PATIENCE):
            return
        building = [path.parent.name for path in root.glob("**/lock")]
        if building:
            note(f"builds {', '.join(sorted(building))} in {root}, once: a minute or two")
        else:
            note(
                f"waits for all {os.environ['WORLD_SIZE']} ranks at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            )

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        met.set()
