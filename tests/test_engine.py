"""What the engine does before DeepSpeed starts."""

from __future__ import annotations

import os
import time

from alignkit import engine


def test_only_locks_of_dead_builds_are_removed(tmp_path):
    """A kernel that is being built now keeps its lock; what a killed build left an hour ago would be waited for for ever."""
    old, new = tmp_path / "py311_cpu" / "one" / "lock", tmp_path / "py311_cpu" / "two" / "lock"
    for lock in (old, new):
        lock.parent.mkdir(parents=True)
        lock.touch()
    os.utime(old, (time.time() - 3600,) * 2)
    assert engine.remove_stale_locks(tmp_path) == [old]
    assert not old.exists() and new.exists()
    assert engine.remove_stale_locks(tmp_path / "none") == []
