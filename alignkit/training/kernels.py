"""Where DeepSpeed's kernels are built, once an environment, and what a person is told while they are."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError
from alignkit.core.io import write_atomic

SHARED_MEMORY = "deepspeed_shm_comm"  # sums of the ranks of one machine without a GPU
BUILT = "built_with"  # in its folder, once it is whole: what it was built with
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


def versions() -> str:
    """What a kernel depends on."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed")]
    return " ".join([*found, "Python", sys.version, platform.machine()])


def load(root: Path, name: str, made_with: str, build: Callable[[], Any]) -> Any:
    """The module of a kernel: built by the first that needs it, opened by all others without waiting for one another.

    DeepSpeed's own loader takes a lock at every start, leaves it behind where it is killed, and builds anew where another
    ninja is found first. Here who builds holds a lock of the kernel's, which ends with the process.

    Args:
        made_with: what it must have been built with: versions of Python, torch and DeepSpeed.
        build: builds and opens it.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = root / name
    if (found := _open(folder, made_with)) is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (root / f".{name}.building").open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"a kernel of DeepSpeed's cannot be built in {folder} ({error}): set TORCH_EXTENSIONS_DIR to a folder that can be "
            "written"
        ) from None
    with opened as file:
        with contextlib.suppress(OSError):  # no locks there: DeepSpeed's own file is all there is
            fcntl.flock(file, fcntl.LOCK_EX)
        if (found := _open(folder, made_with)) is not None:
            return found
        _end_dead_build(folder)
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # its ninja
        module = build()
        write_atomic(folder / BUILT, made_with)
    return module


def _open(folder: Path, made_with: str) -> Any:
    """The module that was built there with the same, or None."""
    file, held = folder / f"{folder.name}.so", folder / BUILT
    if not file.is_file() or not held.is_file() or held.read_text(encoding="utf-8") != made_with:
        return None
    spec = importlib.util.spec_from_file_location(folder.name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _end_dead_build(folder: Path, settle: float = 2.0, limit: float = 900.0) -> None:
    """Remove the lock of a build that was killed: whoever finds it would wait for its end for ever.

    A compiler that still works in the folder is let finish; so is a build of another program's.
    """
    lock, quiet, end = folder / "lock", time.monotonic() + settle, time.monotonic() + limit
    while lock.exists() and time.monotonic() < min(quiet, end):
        if _works_in(folder):
            quiet = time.monotonic() + settle
        time.sleep(0.1)
    if lock.exists():
        lock.unlink(missing_ok=True)
        print(f"removed {lock}: a build that was killed had left it", flush=True)


def _works_in(folder: Path) -> bool:
    """Whether a process of this machine, as far as this user sees, has the folder as its working directory."""
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if link.readlink() == folder.resolve():
                return True
    return False


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
