"""Checkpoints of the PPO stage: written aside, digested, synced to disk, renamed; the newest whole one is gone on from.

<run_dir>/checkpoints/step_000010/
    state.json             the step that comes next, prompts' cursor, KL controller, moments, versions, schedules
    rank_0.safetensors     the random generators of each rank
    policy/  critic/       what DeepSpeed saves of each engine: weights and optimizer
    digests.json           SHA-256 of every other file; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from alignkit.types import InputError, RunError

DIGESTS = "digests.json"


def save(
    run_dir: Path, state: dict[str, Any], generators: dict[str, torch.Generator], engines: dict[str, Any], world: Any,
    keep_last: int,
) -> Path:  # fmt: skip
    """Write `checkpoints/step_<state["step"]>/` and then remove all but the last `keep_last`. Called by every rank.

    Raises:
        RunError: it could not be written, the disk being full for instance; those before it are as they were.
    """
    final = run_dir / "checkpoints" / f"step_{state['step']:06d}"
    partial = final.with_name(final.name + ".partial")
    try:
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        world.barrier()
        for role, engine in engines.items():
            engine.save(partial / role)
        streams = {name: generator.get_state() for name, generator in generators.items()}
        save_file(streams | {"torch": torch.get_rng_state()}, partial / f"rank_{world.rank}.safetensors")
        world.barrier()
        if world.rank == 0:
            state = state | {"world_size": world.size, "schedules": {r: e.update for r, e in engines.items()}}
            (partial / "state.json").write_text(json.dumps(state))
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            digests = {path.relative_to(partial).as_posix(): digest(path) for path in files}
            (partial / DIGESTS).write_text(json.dumps(digests, indent=1))
            for path in [*files, partial / DIGESTS, *(p for p in partial.rglob("*") if p.is_dir()), partial]:
                sync(path)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
            partial.rename(final)
            sync(final.parent)
            for old in steps(run_dir)[keep_last:]:
                shutil.rmtree(old)
    except OSError as error:
        raise RunError(f"the checkpoint {final} cannot be written: {error}; those before it are intact") from error
    world.barrier()
    return final


def load(path: Path, generators: dict[str, torch.Generator], engines: dict[str, Any], world: Any) -> dict[str, Any]:
    """Put the checkpoint into engines and generators; the `state` it was saved with.

    Raises:
        InputError: it is of another number of ranks.
    """
    state = json.loads((path / "state.json").read_text())
    if state["world_size"] != world.size:
        raise InputError(
            f"{path} is of {state['world_size']} ranks, this run has launcher.num_ranks={world.size}: resume with "
            f"launcher.num_ranks={state['world_size']}"
        )
    for role, engine in engines.items():
        engine.load(path / role, state["schedules"][role])
    streams = load_file(path / f"rank_{world.rank}.safetensors")
    for name, generator in generators.items():
        generator.set_state(streams[name])
    torch.set_rng_state(streams["torch"])
    return state


def newest(run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are all there and whole; damaged ones are named to `say` and passed over.

    Raises:
        InputError: there are checkpoints, and all are damaged.
    """
    found = steps(run_dir)
    faults = []
    for path in found:
        fault = damage(path)
        if fault is None:
            return path
        faults.append(f"{path.name}: {fault}")
        say(f"checkpoint {path} is damaged ({fault}): passed over")
    if faults:
        raise InputError(
            f"no checkpoint in {run_dir / 'checkpoints'} is whole ({'; '.join(faults)}): delete that folder to start over"
        )
    return None


def steps(run_dir: Path) -> list[Path]:
    """The finished checkpoints, newest first."""
    folder = run_dir / "checkpoints"
    found = [p for p in folder.iterdir() if re.fullmatch(r"step_\d+", p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")), reverse=True)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        digests = json.loads((path / DIGESTS).read_text())
        for name, expected in digests.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if digest(path / name) != expected:
                return f"{name} differs from its digest"
    except (OSError, ValueError, AttributeError) as error:
        return f"{DIGESTS} cannot be read: {error}"
    return None


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
