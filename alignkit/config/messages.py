"""What is refused, in one line: a key that does not exist with the nearest real one, a number with one that works."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from alignkit.core.errors import InputError


def nearest_key(key: str, config: DictConfig) -> str | None:
    """The real key most like `key`, for an error message."""
    known = [name for name in _dotted(config) if name]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return close[0]
    last = key.rsplit(".", 1)[-1]
    same_end = difflib.get_close_matches(last, {name.rsplit(".", 1)[-1] for name in known}, n=1, cutoff=0.7)
    return next((name for name in known if same_end and name.rsplit(".", 1)[-1] == same_end[0]), None)


def unknown_key(*messages: str) -> str | None:
    """The key that Hydra or OmegaConf say is not there, as dotted as they tell it; None: they complain of something else."""
    text = "\n".join(messages)
    for pattern in (r"not in .*?full_key: (\S+)", r"Could not override '([^']+)'", r"[Kk]ey '([^']+)' (?:is )?not in"):
        if "not in" in text and (found := re.search(pattern, text, re.DOTALL)):
            return found.group(1)
    return None


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


def texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in plain dictionaries and lists."""
    below = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in below:
        yield from texts(value, f"{key}.{name}".lstrip("."))
    if isinstance(node, str):
        yield key, node


def _dotted(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, DictConfig):
        return [prefix[:-1]]
    keys = [prefix[:-1]]
    for key in node:
        child = None if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key) else node[key]
        keys += _dotted(child, f"{prefix}{key}.")
    return keys


def divides(name: str, value: int, **factors: int) -> None:
    """`value` must be a multiple of the product of `factors`; the message states every number and a fix."""
    product = 1
    for factor in factors.values():
        product *= factor
    if value % product:
        parts = " x ".join(f"{key}={factor}" for key, factor in factors.items())
        parts += f" = {product}" if len(factors) > 1 else ""
        raise InputError(f"{name}={value} is not a multiple of {parts}; try {name}={(value // product + 1) * product}")
