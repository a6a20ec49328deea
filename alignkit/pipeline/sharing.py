"""Stages that several runs share: their address, who makes them, and the link to the folder that holds them.

The address of a stage is the hash of its config in which each path is replaced by the hash of what lies there: of a
finished stage its manifest, of a model folder its files, of a data set its rows, of a reward function its source. Names
of folders, the launcher and the logger do not enter it. Code and package versions do not enter it either: a difference is
said when a stage is reused, and `reuse=false` makes the stage anew.

A run that reuses a stage has a relative symbolic link in place of the stage's folder, so whatever reads
`runs/b/sft/` reads the folder of the run that made it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError
from alignkit.runs import hashes, manifests
from alignkit.runs.environment import git_commit, versions
from alignkit.runs.lock import NO_LOCKS, open_in

UNDER_WAY = ("queued", "running", "saved")


def find(runs_dir: Path, wanted: str, stage: str) -> Path | None:
    """The folder of a finished stage of that address under `runs_dir`, whose files are what its manifest says; else None."""
    for run in _stages(runs_dir):
        with contextlib.suppress(InputError):  # a damaged manifest is another run's trouble
            manifest = manifests.read_manifest(run) or {}
            if (manifest.get("stage"), manifest.get("address"), manifest.get("status")) == (stage, wanted, "done"):
                if hashes.now(run / "model", hashes.own(manifest)) == manifest.get("model_hash"):
                    return run
                print(f"{stage:<9} {run} is not reused: its model/ changed since it was made")
    return None


def under_way(runs_dir: Path, plan: str, stage: str) -> Path | None:
    """The folder of a stage of that address that a job was queued for and that is not done, under `runs_dir`."""
    for run in _stages(runs_dir):
        with contextlib.suppress(InputError):
            manifest = manifests.read_manifest(run) or {}
            if (manifest.get("stage"), manifest.get("plan")) == (stage, plan) and manifest.get("status") in UNDER_WAY:
                return run
    return None


def is_done(run_dir: Path) -> bool:
    """Whether the folder, or the one it links to, holds a finished stage."""
    return (manifests.read_manifest(run_dir) or {}).get("status") == "done"


def link(run_dir: Path, made: Path) -> None:
    """Let `run_dir` stand for the folder `made`, by a relative link: both may be moved together."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    run_dir.symlink_to(os.path.relpath(made.resolve(), run_dir.parent.resolve()), target_is_directory=True)


def differences(manifest: dict[str, Any]) -> str:
    """What made a stage and is another here: " (made with trl 0.25.0, here 0.25.1)", or ""."""
    theirs = manifest.get("versions", {}) | {"commit": str(manifest.get("git_commit"))[:9]}
    ours = versions() | {"commit": str(git_commit())[:9]}
    other = [
        f"{n} {theirs.get(n, 'absent')}, here {ours.get(n, 'absent')}"
        for n in theirs | ours
        if theirs.get(n) != ours.get(n)
    ]
    return f" (made with {'; '.join(other)})" if other else ""


@contextlib.contextmanager
def turn(
    runs_dir: Path, wanted: str, stage: str, run_dir: Path, doing: str = "which makes the same stage"
) -> Iterator[None]:
    """Hold the address while the stage is looked for and made; another process that holds it is waited for, and named.

    `doing`: what the other one does, as it is said to the user.
    """
    folder = runs_dir / ".addresses"
    with open_in(folder, wanted) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            print(f"{stage:<9} waits for {file.read().strip() or 'another process'}, {doing}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)  # the kernel lets go of it when that process ends, however it ends
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise InputError(f"{folder} cannot be locked ({error}): choose another runs_dir=") from None
            print(
                f"{stage:<9} {folder}: its file system has no locks: who makes the same stage meanwhile makes it twice"
            )
        file.truncate(0)
        file.write(f"{run_dir} (process {os.getpid()})")
        file.flush()
        yield


def _stages(runs_dir: Path) -> Iterator[Path]:
    """The folders of stages under `runs_dir`; those that links stand for come once."""
    for folder, folders, files in os.walk(runs_dir):
        folders[:] = [] if "manifest.json" in files else sorted(folders)  # a stage's own folders hold no stages
        if "manifest.json" in files:
            yield Path(folder)
