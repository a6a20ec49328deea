"""Run folders: their layout, the manifest that says what is in them, and what another stage may read.

    runs/<name>/<stage>/
        config.yaml  manifest.json  model/  checkpoints/  metrics.jsonl  samples.jsonl  logs/

A stage is finished when its manifest says `done`, whatever exit code its processes had. The next stage reads `model/`.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
from pathlib import Path
from typing import Any

from alignkit.core import foreign
from alignkit.core.errors import InputError
from alignkit.core.io import read_json, write_atomic
from alignkit.runs.hashes import record
from alignkit.runs.hashes import started_in as started_in
from alignkit.runs.lock import lock as lock

SCHEMA = 1
SPARE = ".spare"


def read_manifest(run_dir: Path) -> dict[str, Any] | None:
    """The manifest of a stage's folder, or None where there is none.

    Raises:
        InputError: it is damaged or of another version.
    """
    path = run_dir / "manifest.json"
    if not path.is_file():
        return None
    manifest = read_json(path, f"delete {run_dir} and run the stage again")
    if manifest.get("schema") != SCHEMA:
        raise InputError(
            f"{path} has schema {manifest.get('schema')!r}, this alignkit reads {SCHEMA}: run the stage again"
        )
    return manifest


def write_manifest(run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Merge `changes` into the manifest and write it; returns the whole.

    While a stage runs, a file of some bytes lies beside it: on a disk that is full by then, its end is written in their place.
    """
    manifest = {"schema": SCHEMA} | (read_manifest(run_dir) or {}) | changes
    spare, text = run_dir / SPARE, json.dumps(manifest, indent=2) + "\n"
    try:
        write_atomic(run_dir / "manifest.json", text)
    except OSError as error:
        if error.errno != errno.ENOSPC or not spare.is_file():
            raise
        spare.unlink()
        write_atomic(run_dir / "manifest.json", text)
    if manifest.get("status") != "running":
        spare.unlink(missing_ok=True)
    elif not spare.is_file():
        spare.write_bytes(bytes(2**14 + len(text)))
    return manifest


DIGESTS = "digests.json"  # of a checkpoint: what `checkpoint.publish` writes last


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint that was written to its end."""
    return (folder / DIGESTS).is_file()


def describe_checkpoint(folder: Path, run_dir: Path, stage: str, step: int, facts: dict[str, Any]) -> None:
    """Give a checkpoint that holds the `model/` of a step the manifest of a finished stage.

    Args:
        facts: what `describe` says of the stage.
    """
    own = {
        key: value for key, value in (read_manifest(run_dir) or {}).items() if key not in ("address", "plan", "saved")
    }
    made = {"stage": stage, "status": "done", "step": step, "metrics": {}}
    places = record(facts | {"base_model": dict(facts["base_model"])}, folder)
    if place := places["base_model"].get(
        "absolute"
    ):  # as seen from where the checkpoint will be: it is written elsewhere
        places["base_model"]["beside"] = os.path.relpath(place, (run_dir / "checkpoints" / "step").resolve())
    write_manifest(folder, **own | places | made)


def refuse_checkpoint(path: Path, command: str) -> None:
    """Refuse a checkpoint's folder where a run's is expected.

    Raises:
        InputError: naming the run it belongs to.
    """
    if is_checkpoint(path):
        run = path.absolute().parent.parent
        raise InputError(f"{path} is a checkpoint of {run}: give the run: alignkit {command} {shlex.quote(str(run))}")


def plain_config(run_dir: Path) -> dict[str, Any]:
    """`config.yaml` as plain dicts, for trackers."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(foreign.load(run_dir / "config.yaml"))
