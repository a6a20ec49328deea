"""Files of rows: read one at a time, so that a data set of any length takes the memory of a row."""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignkit.types import InputError

Row = dict[str, Any]

FILES = (".jsonl", ".json", ".csv", ".parquet")


class Unreadable(InputError):
    """A place of a file holds no row."""


def looks_like_a_file(path: str) -> bool:
    """True where a path cannot be a hub id ("name" or "org/name", optionally ":config")."""
    return Path(path).suffix in FILES or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?", path)


def near_files(path: Path) -> str:
    """ "; did you mean x.jsonl, y.jsonl?" from the names in the same folder, or what is wrong with the folder."""
    if not path.parent.is_dir():
        return f": there is no folder {path.parent}"
    names = [p.name for p in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, 3, 0.5) or sorted(n for n in names if n.endswith(FILES))[:3]
    return f": did you mean {', '.join(near)}?" if near else f": {path.parent} holds no {', '.join(FILES)} file"


def numbered(name: str, rows) -> Iterator[tuple[str, Row | InputError]]:
    """Rows with where each stands, from row 1 on."""
    return ((f"{name} row {number}", row) for number, row in enumerate(rows, 1))


def read_text(path: Path) -> str:
    """The text of a file; InputError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: unreadable: {first_line(error)}: expected UTF-8 text") from error


def read_jsonl(path: Path) -> Iterator[tuple[str, Row | InputError]]:
    """(where, object or why it is none) of every line that is not blank."""
    try:
        with path.open("rb") as file:  # bytes: lines end at "\n" alone, U+2028 may stand inside a string
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path} line {number}"
                    try:
                        bom = b"\xef\xbb\xbf" if number == 1 else b""
                        yield where, json_object(where, line.removeprefix(bom).rstrip(b"\r\n"))
                    except InputError as error:
                        yield where, error
    except OSError as error:
        raise InputError(f"{path}: unreadable: {first_line(error)}: expected UTF-8 text") from error


def json_object(where: str, line: bytes) -> Row:
    """The JSON object of a line."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise Unreadable(f"{where}: unreadable: {first_line(error)}: expected UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise Unreadable(
            f"{where}: not JSON ({error.msg} at column {error.colno}): expected one object a line, as "
            f'{{"prompt": "...", ...}}, found {short_repr(line.decode())}'
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise Unreadable(f"{where}: not JSON that can be read: {first_line(error)}: remove the row") from None
    if not isinstance(row, dict):
        raise Unreadable(f'{where}: found {kind_of(row)}, expected an object as {{"prompt": "...", ...}}')
    return row


def read_json(path: Path) -> list[Row]:
    """The objects of one JSON list, which is read whole."""
    try:
        rows = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        fix = "rename it to .jsonl if it has one object a line" if error.msg == "Extra data" else "mend that place"
        raise InputError(
            f"{path} line {error.lineno}: not JSON ({error.msg} at column {error.colno}): {fix}"
        ) from error
    if not isinstance(rows, list):
        raise InputError(f"{path}: found {kind_of(rows)}, expected a list of objects: [{{...}}, {{...}}]")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path} row {number}: found {kind_of(row)}, expected an object")
    return rows


def read_csv(path: Path) -> Iterator[Row | InputError]:
    """Rows by the header's names, or why a row is none."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for number, row in enumerate(reader, 1):
                width = len(reader.fieldnames or ())
                if None in row or None in row.values():
                    found = width + len(row[None]) if None in row else sum(value is not None for value in row.values())
                    yield Unreadable(
                        f"{path} row {number}: found {found} columns, expected {width}: quote the commas in it"
                    )
                else:
                    yield row
    except csv.Error as error:
        raise InputError(f"{path} row {number + 1}: not CSV: {first_line(error)}: check the quotes") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: unreadable: {first_line(error)}: expected UTF-8 text") from error


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows, a thousand at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: unreadable Parquet: {first_line(error)}: write the file again") from error


def kind_of(value: Any) -> str:
    """A value for a message: its type and how it begins."""
    return "null" if value is None else f"{type(value).__name__} {short_repr(value)}"


def short_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def first_line(error: BaseException) -> str:
    """The first line of an error of a library, so that ours stays one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")[:200]
