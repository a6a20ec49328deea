"""Checkpoints: written aside, digested, synced to disk, renamed, read back; the newest whole one is gone on from.

<run_dir>/checkpoints/step_000010/
    state.json             the step that comes next and what the stage keeps beside its tensors
    digests.json           SHA-256 of every other file; written last
    PPO:                   rank_0.safetensors (random generators of each rank), policy/ and critic/ (`Engine.save`)
    SFT and reward:        what transformers' Trainer writes
    model/  manifest.json  config.yaml
                           the model of that step as the stage's own `model/` would be, so that a checkpoint is taken as
                           a model like a finished stage (`runs.manifests.describe_checkpoint`); those of older runs have none

The name of a folder appears with a rename once all of it is on disk, so a kill while it is written leaves a `.partial` one.
PPO's holds whole tensors, whatever the number of ranks and the ZeRO stage were, so another number of ranks goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from alignkit.core.errors import InputError, RunError

DIGESTS = "digests.json"


def save(
    run_dir: Path, state: dict[str, Any], generators: dict[str, torch.Generator], engines: dict[str, Any], world: Any,
    keep_last: int, keep_best: str | None = None, write_model: Callable[[Path], None] = lambda folder: None,
) -> Path:  # fmt: skip
    """Write `checkpoints/step_<state["step"]>/` and remove those that are not kept. Called by every rank.

    Args:
        state: what goes into state.json; `merit` is the value of the metric of `keep_best`.
        write_model: called by every rank with the folder, to put the model of this step there.

    Raises:
        RunError: it could not be written, the disk being full for instance; those before it are as they were.
    """
    final = run_dir / "checkpoints" / f"step_{state['step']:06d}"
    partial = final.with_name(final.name + ".partial")
    with intact(final, partial):
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        world.barrier()
        for role, engine in engines.items():
            engine.save(partial / role)
        streams = {name: generator.get_state() for name, generator in generators.items()}
        save_file(streams | global_streams(), partial / f"rank_{world.rank}.safetensors")
        write_model(partial)
        world.barrier()
        if world.rank == 0:
            state = state | {"world_size": world.size, "schedules": {r: e.update for r, e in engines.items()}}
            publish(partial, final, state, keep_last, keep_best)
    world.barrier()
    return final


@contextmanager
def intact(final: Path, partial: Path) -> Iterator[None]:
    """What cannot be written is removed and said; nothing else is touched."""
    try:
        yield
    except RunError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError) as error:
        # torch.save's is a RuntimeError; ValueError and TypeError are of what stands beside the weights.
        free = shutil.disk_usage(run_dir := final.parent.parent).free / 2**20
        shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
        raise RunError(
            f"the checkpoint {final} cannot be written: {error}; {free:,.0f} MiB are free in {run_dir}; those before it are intact"
        ) from error


def publish(partial: Path, final: Path, state: dict[str, Any], keep_last: int, keep_best: str | None) -> None:
    """Give a folder that is written its state, digests and name; then remove older ones. Called by rank 0.

    Raises:
        RunError: it does not read back as it was written. Nothing was removed.
    """
    (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    digests = {path.relative_to(partial).as_posix(): digest(path) for path in files}
    (partial / DIGESTS).write_text(json.dumps(digests, indent=1), encoding="utf-8")
    for path in [*files, partial / DIGESTS, *(p for p in partial.rglob("*") if p.is_dir()), partial]:
        sync(path)
    shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
    partial.rename(final)
    sync(final.parent)
    if (fault := damage(final)) is not None:
        raise RunError(f"the checkpoint {final} does not read back as it was written ({fault}): is the disk sound?")
    for old in superseded(final.parent.parent, keep_last, keep_best):
        shutil.rmtree(old)


def superseded(run_dir: Path, keep_last: int, keep_best: str | None) -> list[Path]:
    """Those that are neither among the last `keep_last` nor the best by the metric of `keep_best`."""
    found = steps(run_dir)
    old = found[keep_last:]
    if keep_best is None:
        return old
    sign = -1.0 if keep_best.startswith("-") else 1.0
    known = {path: float(merit) for path in found if (merit := state_of(path).get("merit")) is not None}
    merits = {path: sign * merit for path, merit in known.items() if math.isfinite(merit)}
    best = max(merits, key=lambda path: merits[path], default=None)
    return [path for path in old if path != best]


def merit(metrics: dict[str, float], keep_best: str | None) -> float | None:
    """The value of the metric that `keep_best` names.

    Raises:
        InputError: nothing of that name is logged.
    """
    if keep_best is None:
        return None
    name = keep_best.removeprefix("-")
    if name not in metrics:
        raise InputError(f"keep_best={keep_best}: no such metric; this stage logs {', '.join(sorted(metrics))}")
    return metrics[name]


def load(path: Path, generators: dict[str, torch.Generator], engines: dict[str, Any], world: Any) -> dict[str, Any]:
    """Put the checkpoint into engines and generators; the `state` it was saved with.

    Ranks beyond those that saved it take the global generators of one that did. Only dropout and reward functions draw
    from them: PPO's own streams are keyed by seed, step, prompt and sample, or are the same on every rank.
    """
    state = state_of(path)
    for role, engine in engines.items():
        engine.load(path / role, state["schedules"][role])
    streams = load_file(path / f"rank_{world.rank % state['world_size']}.safetensors")
    for name, generator in generators.items():
        generator.set_state(streams[name])
    set_global_streams(streams)
    return state


def state_of(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint; {} where it has none that can be read."""
    try:
        return json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def global_streams() -> dict[str, torch.Tensor]:
    """The generators of torch, numpy and Python that belong to this process, as tensors."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor(np.append(np.asarray(keys, np.int64), [position, has_gauss])),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    return found | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_global_streams(streams: dict[str, torch.Tensor]) -> None:
    """Put back what `global_streams` found."""
    torch.set_rng_state(streams["torch"])
    gauss = streams["python_gauss"].tolist()
    random.setstate((3, tuple(streams["python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = streams["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, float(streams["numpy_gauss"])))
    if "cuda" in streams and torch.cuda.is_available():
        torch.cuda.set_rng_state(streams["cuda"])


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
        digests = json.loads((path / DIGESTS).read_text(encoding="utf-8"))
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
    """fsync of a file or folder; what is read of it next comes from the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
