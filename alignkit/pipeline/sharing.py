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
import hashlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from alignkit.config.stages import config_hash
from alignkit.core.types import InputError
from alignkit.data.dataset import Data, fingerprint
from alignkit.runs import hashes
from alignkit.runs import manifest as artifacts
from alignkit.runs.lock import NO_LOCKS

UNDER_WAY = ("queued", "running", "saved")
PLANNED = "planned"  # what the hash begins with of what is not made yet


def contents(cfg: Any, planned: dict[str, str] | None = None, keep_rows: bool = False) -> dict[str, str]:
    """{config key of a path: hash of what lies there} of a stage; of a hub id, the id itself.

    Args:
        planned: {folder of a stage that is not made yet: its address}, which stands for what will lie there.
        keep_rows: the rows that are hashed are those that `cfg` hands out next: a file that changes later changes nothing.
    """
    from omegaconf import OmegaConf

    node = OmegaConf.structured(cfg)
    found = {}
    for key, read in readers(cfg, keep_rows).items():
        path = Path(OmegaConf.select(node, key))
        ahead = next((plan for folder, plan in (planned or {}).items() if Path(folder) in (path, path.parent)), None)
        found[key] = read() if ahead is None else f"{PLANNED} {ahead} {path.name if path.suffix else ''}"
    return found


def check_contents(cfg: Any, held: dict[str, str], now: dict[str, str], who: str) -> None:
    """Refuse what is not as `who` found it, seconds or hours ago.

    Args:
        held: `contents` as it was then; keys of what was still to be made may lack.
        now: as it is.

    Raises:
        InputError: naming the key, its path and both hashes.
    """
    from omegaconf import OmegaConf

    for key, then in held.items():
        if now.get(key, then) != then:
            given = f"{key}={OmegaConf.select(OmegaConf.structured(cfg), key)}"
            raise InputError(
                f"{given} changed since {who} read it ({then} then, {now[key]} now): start again with it as it is, or put "
                "it back as it was"
            )


def readers(cfg: Any, keep_rows: bool = False) -> dict[str, Callable[[], str]]:
    """{config key of a path: what hashes what lies there now}; it raises InputError where nothing usable does.

    `keep_rows`: the rows that are read are those that their node hands out next.
    """
    found: dict[str, Callable[[], str]] = {}
    for role, path in cfg.inputs().items():
        if path:
            key = role if role.startswith("policies.") else f"{role}.path"
            found[key] = partial(_model, path, key)
    ptx = getattr(cfg, "ptx", None)
    data = {"data": cfg.data, "eval_data": getattr(cfg, "eval_data", None), "ptx.data": ptx and ptx.data}
    for name, node in data.items():
        if node is not None and node.path:
            found[f"{name}.path"] = partial(_rows, node, "sft" if name == "ptx.data" else cfg.row_kind, keep_rows)
    for name, reward in getattr(cfg, "rewards", {}).items():
        if hasattr(reward, "load"):
            found[f"rewards.{name}.target"] = partial(_source, reward)
    if cfg.model.chat_template and Path(cfg.model.chat_template).is_file():  # a text or a name stands for itself
        found["model.chat_template"] = partial(_file, cfg.model.chat_template)
    return found


def address(cfg: Any, held: dict[str, str]) -> str:
    """16 hex digits: equal where two stages compute the same from the same, whatever their folders are called."""
    from omegaconf import OmegaConf

    node = OmegaConf.structured(cfg)
    for key, value in held.items():
        OmegaConf.update(node, key, value)
    return config_hash(node)


def find(runs_dir: Path, wanted: str, stage: str) -> Path | None:
    """The folder of a finished stage of that address under `runs_dir`, whose files are what its manifest says; else None."""
    for run in _stages(runs_dir):
        with contextlib.suppress(InputError):  # a damaged manifest is another run's trouble
            manifest = artifacts.read_manifest(run) or {}
            if (manifest.get("stage"), manifest.get("address"), manifest.get("status")) == (stage, wanted, "done"):
                if hashes.now(run / "model", hashes.own(manifest)) == manifest.get("model_hash"):
                    return run
                print(f"{stage:<9} {run} is not reused: its model/ changed since it was made")
    return None


def under_way(runs_dir: Path, plan: str, stage: str) -> Path | None:
    """The folder of a stage of that address that a job was queued for and that is not done, under `runs_dir`."""
    for run in _stages(runs_dir):
        with contextlib.suppress(InputError):
            manifest = artifacts.read_manifest(run) or {}
            if (manifest.get("stage"), manifest.get("plan")) == (stage, plan) and manifest.get("status") in UNDER_WAY:
                return run
    return None


def is_done(run_dir: Path) -> bool:
    """Whether the folder, or the one it links to, holds a finished stage."""
    return (artifacts.read_manifest(run_dir) or {}).get("status") == "done"


def link(run_dir: Path, made: Path) -> None:
    """Let `run_dir` stand for the folder `made`, by a relative link: both may be moved together."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    run_dir.symlink_to(os.path.relpath(made.resolve(), run_dir.parent.resolve()), target_is_directory=True)


def differences(manifest: dict[str, Any]) -> str:
    """What made a stage and is another here: " (made with trl 0.25.0, here 0.25.1)", or ""."""
    theirs = manifest.get("versions", {}) | {"commit": str(manifest.get("git_commit"))[:9]}
    ours = artifacts.versions() | {"commit": str(artifacts.git_commit())[:9]}
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / wanted).open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error}): choose another runs_dir=, or mend its rights"
        ) from None
    with opened as file:
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


def _model(path: str, key: str) -> str:
    """Of a finished run its manifest; of other models their files, or the hub id."""
    source = artifacts.resolve_model(path, key)
    parts = [str(part) for part in (source.base, source.adapter) if part is not None]
    hashes = [artifacts.model_hash(Path(part)) or part for part in parts]
    return artifacts.manifest_hash(source.run) or (
        hashes[0] if len(hashes) == 1 else _digest("\n".join(hashes).encode())
    )


def _rows(node: Data, kind: Any, keep: bool) -> str:
    rows = node.rows(kind)
    if keep:
        node.hand_out(rows)
    return fingerprint(rows)


def _file(path: str) -> str:
    try:
        return _digest(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _source(reward: Any) -> str:
    """The hash of the file that a reward function stands in and of those beside it that it imports. None is run.

    What is installed is followed no further than the function's own package, and a file that the function reads is not
    seen.
    """
    name = reward.target.rpartition(":")[2]
    files = [file.read_bytes() for file in reward.source_files()]
    return _digest(name.encode() + (b"".join(files) or reward.target.encode()))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
