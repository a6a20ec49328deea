"""YAML that others wrote: what is refused before it is read.

A run's config.yaml and an experiment may come from anybody. Aliases let a page of YAML unfold to more than the memory
holds, and settings of Hydra itself name code that Hydra calls, before a command has begun.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError

LIMIT = 2**20  # bytes of a file: a hundred times the longest config
FREE = ("params", "n_jobs", "n_trials", "direction", "max_batch_size", "study_name", "storage")  # of hydra.sweeper


def load(path: Path) -> Any:
    """The OmegaConf node of a file; see `check`."""
    from omegaconf import OmegaConf

    check(path)
    return OmegaConf.load(path)


def check(path: Path) -> None:
    """Refuse a file that is large, no text, or has aliases. What YAML itself says of it is left to who reads it.

    Raises:
        InputError: naming the file, and the line of the first alias.
    """
    import yaml  # type: ignore[import-untyped]

    if path.stat().st_size > LIMIT:
        raise InputError(f"{path} has {path.stat().st_size:,} bytes: expected a config of at most {LIMIT:,}")
    try:
        text = path.read_text(encoding="utf-8")
        alias = next((e for e in yaml.parse(text) if isinstance(e, yaml.AliasEvent)), None) if "*" in text else None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from None
    except (yaml.YAMLError, RecursionError):
        return
    if alias is not None:
        line = alias.start_mark.line + 1
        raise InputError(f"{path} line {line}: *{alias.anchor} is an alias, which is not read: write the value out")


def folders(words: Sequence[str]) -> list[Path]:
    """Where a command line says that further config files lie: --config-dir and hydra.searchpath."""
    found: list[str] = []
    for word, after in zip(words, [*words, ""][1:], strict=True):
        flag, _, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            found.append(value or after)
        elif flag.lstrip("+") == "hydra.searchpath":
            found += [part.strip(" '\"").removeprefix("file://") for part in value.strip(" []'\"").split(",")]
    return [Path(name) for name in found if name]


def check_folders(places: Iterable[Path]) -> None:
    """Refuse folders of config files of which one is no plain config, or sets up Hydra itself.

    Raises:
        InputError: naming the file.
    """
    for place in places:
        for path in sorted(place.rglob("*.yaml")):
            check_file(path, place)


def check_file(path: Path, place: Path) -> None:
    """The same of one file of a folder."""
    check(path)
    if found := of_hydra(path, path.relative_to(place)):
        raise InputError(
            f"{path} sets {found}, which can call code before a command begins: a file may set hydra.sweeper."
            f"{{{','.join(FREE)}}} and choose /hydra/sweeper; give the rest on the command line, if you mean it"
        )


def of_hydra(path: Path, name: Path) -> str | None:
    """The first setting of Hydra itself in a file that is more than what to sweep; None: there is none.

    `name`: the file's, within its folder: what lies in `hydra/` is an option of Hydra.
    """
    import yaml

    text = path.read_text(encoding="utf-8")
    if name.parts[0] == "hydra":
        return f"{name.parent.as_posix()}={name.stem}"
    if package := re.search(r"^\s*#\s*@package\s+((?:_global_\.)?hydra\S*)", text, re.MULTILINE):
        return package[1]
    if "hydra" not in text:
        return None
    try:
        loaded = yaml.load(text, yaml.BaseLoader)  # all strings
    except (yaml.YAMLError, RecursionError):
        return None  # composing the config says so
    if not isinstance(loaded, dict):
        return None
    for entry in loaded.get("defaults") or ():
        for key in entry if isinstance(entry, dict) else [str(entry)]:
            group, _, place = str(key).removeprefix("override ").partition("@")
            sets_up = group.lstrip("/").startswith("hydra") and not group.startswith("/hydra/sweeper")
            if sets_up or place.removeprefix("_global_.").startswith("hydra"):
                return f"{key} in its defaults"
    for key, value in _leaves(loaded, ""):
        if key.startswith("hydra.") and not _is_free(key):
            return f"{key}={value}"
    return None


def _is_free(key: str) -> bool:
    parts = key.split(".")
    return parts[1] == "sweeper" and len(parts) > 2 and parts[2] in FREE and not key.endswith(("_target_", "_args_"))


def _leaves(node: Any, key: str) -> list[tuple[str, Any]]:
    """(dotted key, value) of what no mapping is."""
    if not isinstance(node, dict):
        return [(key, node)]
    return [leaf for name, value in node.items() for leaf in _leaves(value, f"{key}.{name}".lstrip("."))]
