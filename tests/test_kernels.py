"""Where kernels are built, and that nobody waits for a build that is dead."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from alignkit import kernels


def test_only_locks_of_dead_builds_are_removed(tmp_path):
    """A kernel that is being built now keeps its lock; what a killed build left an hour ago would be waited for for ever."""
    old, new = tmp_path / "py311_cpu" / "one" / "lock", tmp_path / "py311_cpu" / "two" / "lock"
    for lock in (old, new):
        lock.parent.mkdir(parents=True)
        lock.touch()
    os.utime(old, (time.time() - 3600,) * 2)
    assert kernels.remove_stale_locks(tmp_path) == [old]
    assert not old.exists() and new.exists()
    assert kernels.remove_stale_locks(tmp_path / "none") == []


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
