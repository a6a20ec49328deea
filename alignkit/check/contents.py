"""What lies behind the paths of a config, as hashes: the address of a stage, and whether something changed since it was read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from alignkit.config.stages import config_hash
from alignkit.core.errors import InputError
from alignkit.data.dataset import Data, fingerprint
from alignkit.models.source import resolve_model
from alignkit.runs.hashes import manifest_hash, model_hash

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


def _model(path: str, key: str) -> str:
    """Of a finished run its manifest; of other models their files, or the hub id."""
    source = resolve_model(path, key)
    parts = [str(part) for part in (source.base, source.adapter) if part is not None]
    found = [model_hash(Path(part)) or part for part in parts]
    return manifest_hash(source.run) or (found[0] if len(found) == 1 else _digest("\n".join(found).encode()))


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
