"""Where kernels are built, once, and that nobody waits for a build that is dead or for one that is done."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest

from alignkit.core.errors import InputError
from alignkit.training import kernels

BUILD = """
import pathlib, sys, time
from alignkit.training import kernels
root = pathlib.Path(sys.argv[1])
def build():
    with (root / "builds").open("a") as file:
        print("built", file=file)
    time.sleep(1)
    (root / "one" / "one.so").write_bytes(pathlib.Path(sys.argv[2]).read_bytes())
    return "built here"
started = time.monotonic()
print(kernels.load(root, "one", sys.argv[3], build), round(time.monotonic() - started, 1))
"""


@pytest.fixture(scope="module")
def shared_object(tmp_path_factory) -> Path:
    """A module of C that does nothing, called one."""
    folder = tmp_path_factory.mktemp("c")
    (folder / "one.c").write_text(
        '#include <Python.h>\nstatic struct PyModuleDef def = {PyModuleDef_HEAD_INIT, "one", 0, -1, 0};\n'
        "PyMODINIT_FUNC PyInit_one(void) { return PyModule_Create(&def); }\n"
    )
    include = sysconfig.get_paths()["include"]
    subprocess.run(["cc", "-shared", "-fPIC", f"-I{include}", "one.c", "-o", "one.so"], cwd=folder, check=True)
    return folder / "one.so"


def starts(number: int, *arguments: object) -> list[str]:
    """What processes print that start side by side."""
    command = [sys.executable, "-c", BUILD, *map(str, arguments)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(number)]
    return [process.communicate(timeout=60)[0].strip() for process in running]


def test_a_kernel_is_built_once_and_then_opened_without_waiting(tmp_path, shared_object):
    assert sum("built here" in said for said in starts(3, tmp_path, shared_object, "torch 1")) == 1
    assert (tmp_path / "builds").read_text() == "built\n"
    held = (tmp_path / ".one.building").open("a")
    fcntl.flock(held, fcntl.LOCK_EX)  # somebody builds another version of it: nobody who has his waits
    (tmp_path / "one" / "lock").touch()  # nor for what DeepSpeed's own loader may have left
    for said in starts(2, tmp_path, shared_object, "torch 1"):
        assert said.startswith("<module 'one'") and float(said.split()[-1]) < 0.5, said
    held.close()
    assert starts(1, tmp_path, shared_object, "torch 2")[0].startswith("removed")  # another torch: built anew
    assert (tmp_path / "builds").read_text() == "built\nbuilt\n" and not (tmp_path / "one" / "lock").exists()


def test_a_build_that_is_killed_is_not_waited_for(tmp_path, shared_object):
    first = subprocess.Popen([sys.executable, "-c", BUILD, str(tmp_path), str(shared_object), "torch 1"])
    while not (tmp_path / "builds").exists():
        time.sleep(0.02)
    (tmp_path / "one" / "lock").touch()  # as DeepSpeed's loader does
    first.kill()
    first.wait()
    started = time.monotonic()
    assert "removed" in starts(1, tmp_path, shared_object, "torch 1")[0]
    assert time.monotonic() - started < 20


def test_the_lock_of_a_build_at_work_stays(tmp_path):
    """A compiler whose parent was killed, or another program's build: it is let finish."""
    (tmp_path / "lock").touch()
    compiler = subprocess.Popen(["sleep", "1"], cwd=tmp_path)
    threading.Thread(target=compiler.wait).start()
    started = time.monotonic()
    kernels._end_dead_build(tmp_path, settle=0.3)
    assert time.monotonic() - started > 1.2 and not (tmp_path / "lock").exists()


def test_a_folder_that_cannot_be_made_names_the_variable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be built in .*: set TORCH_EXTENSIONS_DIR"):
        kernels.load(tmp_path / "file", "one", "torch 1", lambda: None)


def test_each_environment_builds_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    found = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(sys, "prefix", str(tmp_path / name))
        found.add(kernels.folder())
        assert kernels.folder().is_relative_to(tmp_path / name)
        monkeypatch.setattr(os, "access", lambda *_: False)  # an environment of the system's
        found.add(kernels.folder())
        assert kernels.folder().is_relative_to(Path.home()) or "XDG_CACHE_HOME" in os.environ
        monkeypatch.undo()
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert len(found) == 4
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "mine"))
    assert kernels.folder() == tmp_path / "mine"


def test_a_long_wait_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "PATIENCE", 0.05)
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29")):
        monkeypatch.setenv(name, value)
    said: list[str] = []
    with kernels.telling(tmp_path, said.append):
        time.sleep(0.3)
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "lock").touch()
    with kernels.telling(tmp_path, said.append):
        time.sleep(0.3)
    with kernels.telling(tmp_path, said.append):
        pass
    assert said[0] == "waits for all 2 ranks at 127.0.0.1:29" and "deepspeed_shm_comm" in said[1] and len(said) == 2
