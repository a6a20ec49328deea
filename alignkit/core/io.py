"""Files that are written whole: JSON lines that a kill cuts no deeper than their last, and texts that are there or not."""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError


def plain(value: Any) -> Any:
    """`value` as something that valid JSON can hold: scalars of torch and numpy unwrapped, NaN as a string."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # a tensor or an array
        return plain(value.tolist())
    return str(value)


def append_jsonl(path: Path, row: dict) -> None:
    """One object, one line, written at once. A line cut short by a kill is closed first, so it spoils no other."""
    line = json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
            line = "\n" + line
        file.write(line.encode())


def read_jsonl(path: Path, offset: int = 0) -> list[dict]:
    """The objects of a file from a byte on; [] where it does not exist. A line cut short by a kill is passed over."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes()[offset:].decode(errors="replace").split("\n"):
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
    return rows


def write_atomic(path: Path, text: str) -> None:
    """The whole file or the old one, whatever happens in between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
