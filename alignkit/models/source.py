"""Where the model behind a path is: a finished run, a checkpoint, a folder, an adapter, a hub id; and whether several go together."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignkit.core import foreign
from alignkit.core.errors import InputError
from alignkit.core.io import read_json
from alignkit.core.types import ModelSource
from alignkit.runs.hashes import model_hash, now, started_in
from alignkit.runs.manifests import DIGESTS, is_checkpoint, read_manifest


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
        from alignkit.data import demo

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


def find_base(held: dict[str, Any], folder: Path, key: str) -> str:
    """Where the base model is now: the folder that was used, wherever the command is called from and the run was moved to.

    Args:
        held: `base_model` of a manifest; of an adapter from elsewhere {"path": what its JSON names}.
        folder: the run's folder, or the adapter's.

    Returns:
        The path as it is written where that is the one, else the folder that was found; a hub id as it is.

    Raises:
        InputError: a folder that is gone, or one that stands where a hub id was meant.
    """
    path = held["path"]
    kind = held.get("kind") or ("folder" if held.get("hash") else None)
    if kind == "hub":
        if Path(path).is_dir():
            raise InputError(
                f"{key}: its base model {path} came from the hub, and here is a folder of that name, which would be taken: go to "
                "another directory, or rename the folder"
            )
        return path
    found = [place for place in _places(held, folder) if (place / "config.json").is_file()]
    if not found:
        if kind is None or Path(path).is_absolute():  # perhaps a hub id, or said by check_model
            return path
        raise InputError(
            f"{key}: its base model {path} was a folder and is not there: put it back (beside the run as before), or train it "
            "anew from another"
        )
    best = found[0]
    if held.get("hash") and len({place.resolve() for place in found}) > 1:
        best = next((place for place in found if now(place, held) == held["hash"]), best)
    return path if Path(path).resolve() == best.resolve() else str(best)


def _places(held: dict[str, Any], folder: Path) -> Iterator[Path]:
    """Where a base may be: from the directory the run was started in, from the run's folder, where it was, from here."""
    from alignkit.data import demo

    path = Path(held["path"])
    if "hash" not in held:  # an adapter's own words, which PEFT reads from here
        yield from (path, folder.resolve() / path)
        return
    config = folder / "config.yaml"
    if not path.is_absolute() and config.is_file() and (place := _start_of(config)) is not None:
        yield place / path
    if held.get("beside"):
        yield folder.resolve() / held["beside"]
    if held.get("absolute"):
        yield Path(held["absolute"])
    yield path
    name = next((name for name in demo.MODELS if path.name.startswith(f"{name}-")), None)
    if name is not None and not path.is_dir():  # another machine's cache, or one that was emptied
        yield demo.model(name)


def _start_of(config: Path) -> Path | None:
    """The directory in which the command ran that wrote a run's config.yaml."""
    from omegaconf import OmegaConf

    raw = OmegaConf.to_container(foreign.load(config))
    assert isinstance(raw, dict)
    folder = config.parent
    return started_in(folder, Path(raw["runs_dir"], raw["run_name"], folder.resolve().name))
