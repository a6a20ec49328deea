"""Words for what Hydra and OmegaConf refuse: one line that names the key and the nearest real one."""

from __future__ import annotations

import difflib
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf


def nearest_key(key: str, config: DictConfig) -> str | None:
    """The real key most like `key`, for an error message."""
    known = [name for name in _dotted(config) if name]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return close[0]
    last = key.rsplit(".", 1)[-1]
    same_end = difflib.get_close_matches(last, {name.rsplit(".", 1)[-1] for name in known}, n=1, cutoff=0.7)
    return next((name for name in known if same_end and name.rsplit(".", 1)[-1] == same_end[0]), None)


def one_line(error: BaseException) -> str:
    """An OmegaConf or Hydra error without its trailing block of internals."""
    text = " ".join(line.strip() for line in str(error).splitlines() if not line.strip().startswith("object_type="))
    full_key = getattr(error, "full_key", None)
    return text.replace(f"full_key: {full_key}", "").strip() + (f" (key: {full_key})" if full_key else "")


def stray_keys(node: Any, prefix: str = "") -> list[str]:
    """The keys below `node` that its dataclass has no field for."""
    if not isinstance(node, DictConfig):
        return []
    cls = OmegaConf.get_type(node)
    known = {f.name for f in fields(cls)} if is_dataclass(cls) else set(node)
    inner = [stray_keys(node[key], f"{prefix}{key!s}.") for key in node if not OmegaConf.is_missing(node, key)]
    return [f"{prefix}{key!s}" for key in node if key not in known] + [name for part in inner for name in part]


def _dotted(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, DictConfig):
        return [prefix[:-1]]
    keys = [prefix[:-1]]
    for key in node:
        child = None if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key) else node[key]
        keys += _dotted(child, f"{prefix}{key}.")
    return keys
