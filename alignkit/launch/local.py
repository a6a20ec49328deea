"""Start a stage on this machine with DeepSpeed's launcher, its output in `logs/`, its progress on one line."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from alignkit.core.errors import InputError, RunError
from alignkit.core.fields import num
from alignkit.launch import ALLOCATOR
from alignkit.runs import lock
from alignkit.tracking.console import follow
from alignkit.tracking.run_log import PROGRESS

GPUS = Path("/proc/driver/nvidia/gpus")  # where the driver lists this machine's


@dataclass
class Local:
    """DeepSpeed's launcher on this machine."""

    name: str = "local"
    num_ranks: int = num(1, ge=1)  # processes: devices on a GPU machine, any number on a CPU
    threads: int | None = num(None, ge=1)  # CPU threads a rank; None: the cores divided by the ranks
    port: int | None = num(None, ge=1, le=65535)  # of the ranks' rendezvous; None: a free one

    def check(self) -> None:
        """Raise InputError where a field makes no sense."""
        if self.num_ranks < 1:
            raise InputError(f"launcher.num_ranks={self.num_ranks}: expected 1 or more")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        count = len([name for name in visible.split(",") if name.strip()])
        if GPUS.is_dir() and visible and count < self.num_ranks:
            raise InputError(
                f"launcher.num_ranks={self.num_ranks} with CUDA_VISIBLE_DEVICES={visible}, which names {count}: expected one "
                "device a rank; lower launcher.num_ranks, or name more devices"
            )

    def command(self, stage: str, run_dir: Path, port: int) -> list[str]:
        """The launch command: a pure function of its arguments and this config."""
        return [
            *(sys.executable, "-m", "alignkit.launch.node"),
            *("--num_gpus", str(self.num_ranks), "--master_port", str(port)),
            *("--module", "alignkit.worker", stage, str(run_dir)),
        ]

    def environment(self, cores: int) -> dict[str, str]:
        """What the ranks find in their environment beside the caller's own."""
        # DeepSpeed builds its shared-memory collectives with the ninja beside this Python.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        threads = str(self.threads or max(1, cores // self.num_ranks))
        tunables = ":".join(filter(None, (ALLOCATOR, os.environ.get("GLIBC_TUNABLES"))))
        return {
            "PATH": path, "OMP_NUM_THREADS": threads, "GLIBC_TUNABLES": tunables, "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }  # fmt: skip

    def run(self, stage: str, run_dir: Path, label: str) -> dict | None:
        """Start the ranks, show their progress, wait. Returns the last error event, or None.

        Whether the stage succeeded is its manifest's status: a launcher whose child dies of a signal exits with 0.
        Ctrl-C is passed on to the ranks, which save what they can at their next boundary; a second one kills them.

        Raises:
            KeyboardInterrupt: there was one; no rank is left.
        """
        log = run_dir / "logs" / f"{stage}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        port = self.port or free_port()
        command = self.command(stage, run_dir, port)
        environment = os.environ | self.environment(len(os.sched_getaffinity(0)))
        environment.pop("HYDRA_FULL_ERROR", None)
        progress = run_dir / PROGRESS
        progress.touch()
        seen = progress.stat().st_size
        with log.open("a", encoding="utf-8") as output:
            output.write(f"$ {shlex.join(command)}\n")
            output.flush()
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
                close_fds=False,  # it inherits the lock of the run folder, and so holds it where this process is killed
            )
            try:
                return explained(follow(progress, process, label, offset=seen), process.returncode)
            except KeyboardInterrupt:
                print("stopping: the ranks save what they can; Ctrl-C again ends them at once", flush=True)
                interrupt_ranks(process.pid)
                follow(progress, process, label, offset=progress.stat().st_size)
                raise
            finally:
                end_group(process)
                lock.end_servers(run_dir)
                for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):  # of ranks killed early
                    buffer.unlink(missing_ok=True)


def explained(error: dict | None, code: int) -> dict | None:
    """The first error event, or what the exit code of DeepSpeed's launcher tells where a signal ended a rank, or it.

    Its own end by a signal is -n, a rank's is handed on as 256 - n. What the rank's peers then say is of lost connections.
    """
    number = -code if code < 0 else 256 - code if 192 < code < 256 else 0
    if number not in {item.value for item in signal.Signals} or (error and error["kind"] == "input"):
        return error
    who = "the launcher of its ranks" if code < 0 else "a rank"
    why = " (kill -9, or the kernel for lack of memory: dmesg says)" if number == signal.SIGKILL else ""
    peer = f"; another said {error['error']}" if error else ""
    return {"error": f"{who} was ended by {signal.Signals(number).name}{why}{peer}", "kind": "run"}


def end_group(leader: subprocess.Popen, patience: float = 30.0) -> None:
    """Kill what is left of the group that a process leads, however it ended itself, and wait until nothing is.

    Raises:
        RunError: the kernel did not end them (processes stuck on a dead file system or device).
    """
    end = time.monotonic() + patience
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
    while left := [pid for pid in group_members(leader.pid) if pid != leader.pid or leader.poll() is None]:
        if time.monotonic() > end:
            raise RunError(f"processes {left} hang in the kernel and do not end; `ps -o pid,stat,wchan` says where")
        time.sleep(0.05)


def group_members(group: int) -> list[int]:
    """The processes of a group that have not ended; one that nobody waits for (a zombie) has."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, of = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:3]
            if int(of) == group and state not in "ZX":
                found.append(int(path.parts[2]))
    return found


def interrupt_ranks(launcher: int) -> None:
    """SIGTERM to the ranks alone. DeepSpeed's launcher, sent a signal, kills them after 30 seconds and reports nothing."""
    import psutil  # type: ignore[import-untyped]

    for child in psutil.Process(launcher).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            words = child.cmdline()
            if "alignkit.worker" in words and "--module" not in words:  # the launchers' own lines have that option
                child.send_signal(signal.SIGTERM)


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
