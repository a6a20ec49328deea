"""Who works in a folder: the command that took it, and the ranks themselves.

A command holds `.lock` alone, and the launcher that it starts inherits it. Every rank holds `.ranks` together with its
peers for as long as it lives. A folder is free where nobody holds either, and the kernel lets go of both when a process
ends, however it ends: no process number is believed, which another process may have by then.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from alignkit.core.errors import InputError

LOCK, RANKS = ".lock", ".ranks"
SERVERS = "ALIGNKIT_SERVERS"  # in the environment of a run's servers: `sockets` of its folder
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what a file system without them answers
PATIENCE = 1.0  # seconds: a command that only asks whether a folder is held holds it for a moment


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process and the launcher it starts.

    Raises:
        InputError: another process holds it, its ranks among them, or it cannot be written.
    """
    with open_in(folder, LOCK) as file:
        os.set_inheritable(file.fileno(), True)
        if not _take(file, folder) or _is_taken(folder / RANKS):
            raise InputError(f"{folder} is in use by {holder(folder)}: wait for it, or choose another run_name=")
        file.truncate(0)
        file.write(
            f"process {os.getpid()} of {socket.gethostname()} or what it started, since {time.strftime('%H:%M:%S')}"
        )
        file.flush()
        yield


def open_in(folder: Path, name: str) -> IO[str]:
    """A file to be locked, in a folder that is made for it.

    Raises:
        InputError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / name).open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error}): choose another runs_dir=, or mend its rights"
        ) from None


def _take(file: IO[str], folder: Path) -> bool:
    """Take the lock; False where another has it. Where the file system has no locks, this machine's processes are asked."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise InputError(f"{folder} cannot be locked ({error}): choose another runs_dir=") from None
            print(f"{folder}: its file system has no locks; only processes of this machine are known to work in it")
            return not workers(folder)


def hold(folder: Path) -> IO[str]:
    """What every rank calls first: hold the folder together with its peers. Keep what comes back as long as it works."""
    file = (folder / RANKS).open("a+", encoding="utf-8")
    with contextlib.suppress(OSError):  # no locks there: `workers` finds the open file
        fcntl.flock(file, fcntl.LOCK_SH)
    return file


def sockets(folder: Path) -> Path:
    """Where the sockets of a run's servers lie: a name of a socket has 107 bytes at most, and a run's folder may be deep."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"alignkit-{os.getuid()}-{name}"


def end_servers(folder: Path, patience: float = 10.0) -> list[int]:
    """Kill what a run's servers, and those that they started, left behind on this machine, and wait for it; who it was.

    A server that is killed leaves its engine without a parent. All that it starts has `SERVERS` in its environment.
    """
    end, found = time.monotonic() + patience, set[int]()
    while (left := _with(f"{SERVERS}={sockets(folder).name}")) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        found |= set(left)
        time.sleep(0.05)
    return sorted(found)


def _with(variable: str) -> list[int]:
    """The processes, not yet ended, that were started with a variable in their environment; as far as this user may see."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if variable.encode() in path.read_bytes().split(b"\0"):
                state = (
                    (path.parent / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
                )
                found += [int(path.parts[2])] if state not in "ZX" else []
    return found


def is_held(folder: Path) -> bool:
    """Whether a command or a rank works in the folder; of other machines where its file system tells."""
    return _is_taken(folder / LOCK) or _is_taken(folder / RANKS)


def _is_taken(path: Path) -> bool:
    kind = fcntl.LOCK_EX if path.name == RANKS else fcntl.LOCK_SH
    try:
        with path.open("r+" if kind == fcntl.LOCK_EX else "r", encoding="utf-8") as file:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:  # of another user, on a read-only or lock-free file system: the kernel and /proc still tell
        return _listed(path) or bool(_open_in(path))
    return False


def _listed(path: Path) -> bool:
    """Whether the kernel of this machine lists a lock of that file."""
    try:
        number = f":{path.stat().st_ino} "
        return any(number in line for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines())
    except OSError:
        return False


def workers(folder: Path, name: str | None = None) -> list[int]:
    """The processes of this machine that have the folder's lock file open, the ranks' or both (None); not this one."""
    found = {pid for file in ([name] if name else [LOCK, RANKS]) for pid in _open_in(folder / file)}
    return sorted(found - {os.getpid()})


def _open_in(path: Path) -> list[int]:
    """The processes that have a file open, as far as this user may see."""
    try:
        wanted = path.stat()
    except OSError:
        return []
    found = []
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it ended, or is another user's
            there = handle.stat()
            if (there.st_dev, there.st_ino) == (wanted.st_dev, wanted.st_ino):
                found.append(int(handle.parts[2]))
    return found


def holder(folder: Path) -> str:
    """Who holds the folder, in words."""
    if ranks := workers(folder, RANKS):
        return f"its ranks (process {', '.join(map(str, ranks))})"
    try:
        return (folder / LOCK).read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"
