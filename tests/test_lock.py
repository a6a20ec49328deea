"""Who holds a run's folder: asked of the kernel, never of a number that another process may have by now."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest

from alignkit.core.errors import InputError
from alignkit.jobs import steps
from alignkit.runs import lock
from alignkit.runs.manifests import write_manifest

HOLD = "import sys, pathlib, time; from alignkit.runs import lock; kept = lock.hold(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def rank(tmp_path):
    """A process that holds the folder as a rank does."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_ranks_hold_the_folder_whose_command_is_gone(tmp_path, rank):
    assert lock.is_held(tmp_path) and lock.workers(tmp_path) == [rank.pid]
    with pytest.raises(InputError, match=rf"in use by its ranks \(process {rank.pid}\)"), lock.lock(tmp_path):
        pass
    with lock.hold(tmp_path):  # a peer
        assert lock.is_held(tmp_path)
    rank.send_signal(signal.SIGKILL)
    rank.wait()
    assert not lock.is_held(tmp_path)
    with lock.lock(tmp_path):
        assert lock.is_held(tmp_path)
    assert not lock.is_held(tmp_path)


def test_cancel_tells_the_ranks_and_twice_is_harmless(tmp_path, rank, capsys):
    write_manifest(tmp_path, stage="sft", status="running")
    assert steps.status(tmp_path)[0].status == "running"
    (tmp_path / ".lock").write_text("process 1 of here or what it started, since 00:00:00")  # long gone; 1 is another's
    steps.cancel(tmp_path)
    assert capsys.readouterr().out == f"told to end: process {rank.pid} ({tmp_path})\n"
    assert rank.wait(10) == -signal.SIGTERM
    steps.cancel(tmp_path)
    assert "nothing of it is queued or running" in capsys.readouterr().out
    assert steps.status(tmp_path)[0].status == "failed"


def test_a_file_system_without_locks_is_said_and_worked_around(tmp_path, rank, monkeypatch, capsys):
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert lock.is_held(tmp_path)  # the rank has the file open
    with pytest.raises(InputError, match="in use by its ranks"), lock.lock(tmp_path):
        pass
    rank.kill()
    rank.wait()
    assert not lock.is_held(tmp_path)
    with lock.lock(tmp_path):
        assert "has no locks" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"cannot be written.*choose another runs_dir="),
        lock.lock(tmp_path / "file" / "x"),
    ):
        pass


def test_a_moved_folder_is_still_held(tmp_path):
    inside = tmp_path / "one"
    with lock.lock(inside):
        os.rename(inside, tmp_path / "two")
        assert lock.is_held(tmp_path / "two")


def test_what_servers_of_a_dead_run_left_is_ended_and_nothing_else(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "other").mkdir()
    started = {
        name: subprocess.Popen(["sleep", "300"], env=os.environ | {lock.SERVERS: lock.sockets(tmp_path / name).name})
        for name in ("mine", "other")
    }
    threading.Thread(target=started["mine"].wait).start()  # or it stays a zombie
    assert lock.end_servers(tmp_path / "mine") == [started["mine"].pid]
    assert lock.end_servers(tmp_path / "mine") == []
    assert started["other"].poll() is None
    started["other"].kill()
    started["other"].wait()
