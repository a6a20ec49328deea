"""What lies in a model's folder, as hashes and as sizes and times, and whether it is still what a manifest says; and where
the base of a run is now.

A manifest keeps two records of a folder. Sizes and times of its files cost nothing to compare; where they are the same the
files are taken as unchanged. Where they differ (it was copied, or edited) the digest decides. The digest reads small files
whole and samples large ones; `verify=full` reads every byte, of what was made with `verify=full` too.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError

MODEL_FILES = (".json", ".safetensors", ".py", ".jinja", ".txt", ".model")  # of a model folder: not its README
SAMPLED = 256  # places of a file above 16 MiB that are hashed, 64 KiB each: a 14 GB model takes a second, not a minute


def model_hash(folder: Path) -> str | None:
    """16 hex digits of a model's files: their names, sizes and contents; None where the folder holds no weights.

    Files up to 16 MiB are read whole, larger ones at their beginning, end and evenly between: training changes a weight
    file all over, a few edited bytes may go unseen.
    """
    files = sorted(path for path in folder.glob("*") if path.suffix in MODEL_FILES)
    if not any(path.suffix == ".safetensors" for path in files):
        return None
    digest = hashlib.sha256()
    for path in files:
        size, block = path.stat().st_size, 2**16
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as stream:
            if size <= SAMPLED * block:
                digest.update(stream.read())
                continue
            for place in range(SAMPLED):
                stream.seek(place * (size - block) // (SAMPLED - 1))
                digest.update(stream.read(block))
    return digest.hexdigest()[:16]


def whole_hash(folder: Path) -> str:
    """64 hex digits of every byte of a model's files: a minute for 14 GB."""
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as stream:
            while block := stream.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def stamp(folder: Path) -> dict[str, list[int]]:
    """{name: [size, time of the last change in ns]} of a model's files."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in _files(folder)}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix in MODEL_FILES and path.is_file())


def record(facts: dict[str, Any], run_dir: Path, verify: str = "auto") -> dict[str, Any]:
    """What a manifest says of the stage's own `model/` and, in `base_model`, of the place and the files of its base."""
    model, base = run_dir / "model", facts["base_model"]
    place = Path(base["path"])
    facts |= {"model_hash": model_hash(model), "model_files": stamp(model)}
    base |= {"kind": "folder" if place.is_dir() else "hub"}
    if place.is_dir():
        beside = os.path.relpath(place.resolve(), run_dir.resolve())
        base |= {"beside": beside, "absolute": str(place.resolve()), "files": stamp(place)}
    if verify == "full":
        facts["model_sha256"] = whole_hash(model)
        base |= {"sha256": whole_hash(place)} if place.is_dir() else {}
    return facts


def now(folder: Path, held: dict[str, Any], verify: str = "auto") -> str | None:
    """The digest of a folder: the one in `held` where it is unchanged, else another one, or None: no weights there.

    Args:
        held: {"hash": the digest, "files": sizes and times or None, "sha256": of every byte or None}.
        verify: auto: a folder whose sizes and times are the recorded ones is not read; full: it is, whole where it was then.
    """
    if verify == "full" and held.get("sha256"):
        found = whole_hash(folder) if model_hash(folder) else None
        return held["hash"] if found == held["sha256"] else found and found[:16]
    if verify == "auto" and held.get("files") and stamp(folder) == held["files"]:
        return held["hash"]
    return model_hash(folder)


def own(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of the stage's `model/`, as `now` takes it."""
    return {
        "hash": manifest.get("model_hash"),
        "files": manifest.get("model_files"),
        "sha256": manifest.get("model_sha256"),
    }


def check_unchanged(run: Path, base: str | None, manifest: dict[str, Any], key: str, verify: str = "auto") -> None:
    """Refuse a finished run whose `model/`, or whose base, is not what it was when the run was made.

    Args:
        base: where the base of its adapter is now; None: its model is whole, or the base is not asked for.
        key: the config key and value the run was given as, for messages.

    Raises:
        InputError: with both digests.
    """
    held, model = own(manifest), run / "model"
    if held["hash"] and (found := now(model, held, verify)) != held["hash"]:
        raise InputError(
            f"{key}: {model} changed since it was made: {held['hash']} there, {found or 'no weights'} now: put its files back or "
            f"make it anew; to use it as it is, give {model} itself"
        )
    held = manifest.get("base_model") or {}
    if base is not None and held.get("hash") and (found := now(Path(base), held, verify)) != held["hash"]:
        raise InputError(
            f"{key}: its base model {base} changed since it was made: {held['hash']} there, {found or 'no weights'} now: put that "
            "model back, or train anew from this one"
        )


def started_in(folder: Path, below: Path) -> Path | None:
    """The working directory of the command that made a run folder: where the relative paths of its config begin.

    Args:
        below: what its config calls that folder, `<runs_dir>/<run_name>` or a stage's folder in it.

    Returns:
        None where the folder is no longer where its config says.
    """
    places = [Path.cwd()]
    if not below.is_absolute():
        spelled = (Path(os.path.abspath(folder)), folder.resolve())
        places += [path.parents[len(below.parts) - 1] for path in spelled if len(path.parts) > len(below.parts)]
    return next((place for place in places if (place / below).resolve() == folder.resolve()), None)


def manifest_hash(run_dir: Path | None) -> str | None:
    """16 hex digits of a finished stage's manifest, the link of the lineage."""
    if run_dir is None or not (run_dir / "manifest.json").is_file():
        return None
    return hashlib.sha256((run_dir / "manifest.json").read_bytes()).hexdigest()[:16]
