"""Files of rows: read one at a time, so that a data set of any length takes the memory of a row."""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError

Row = dict[str, Any]

FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


class Unreadable(InputError):
    """A place of a file holds no row."""


def looks_like_a_file(path: str) -> bool:
    """True where a path cannot be a hub id ("name" or "org/name", optionally ":config")."""
    return Path(path).suffix.lower() in FILES or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?", path)


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


class _Twice(ValueError):
    """A name stands twice in one JSON object, so that one of its values would be lost."""


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    """The object of these names and values."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Twice(f"{short_repr(twice)} stands twice in one object: rename or remove one of the two")
    return made


_decode = json.JSONDecoder(object_pairs_hook=_unique).decode


def json_object(where: str, line: bytes) -> Row:
    """The JSON object of a line."""
    try:
        row = _decode(line.decode())
    except UnicodeDecodeError as error:
        raise Unreadable(f"{where}: unreadable: {first_line(error)}: expected UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise Unreadable(
            f"{where}: not JSON ({error.msg} at column {error.colno}): expected one object a line, as "
            f'{{"prompt": "...", ...}}, found {short_repr(line.decode())}'
        ) from error
    except _Twice as error:
        raise Unreadable(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise Unreadable(f"{where}: not JSON that can be read: {first_line(error)}: remove the row") from None
    if not isinstance(row, dict):
        raise Unreadable(f'{where}: found {kind_of(row)}, expected an object as {{"prompt": "...", ...}}')
    return row


def read_json(path: Path) -> Iterator[Row | InputError]:
    """The objects of one JSON list, which is read whole."""
    try:
        rows = _decode(read_text(path))
    except json.JSONDecodeError as error:
        fix = "rename it to .jsonl if it has one object a line" if error.msg == "Extra data" else "mend that place"
        raise InputError(
            f"{path} line {error.lineno}: not JSON ({error.msg} at column {error.colno}): {fix}"
        ) from error
    except _Twice as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON that can be read: {first_line(error)}: write the file again") from None
    if not isinstance(rows, list):
        lists = [name for name, value in rows.items() if isinstance(value, list)] if isinstance(rows, dict) else []
        fix = f": write the list under {' or '.join(map(short_repr, lists[:3]))} to a file of its own" if lists else ""
        raise InputError(f"{path}: found {kind_of(rows)}, expected a list of objects: [{{...}}, {{...}}]{fix}")
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            yield row
        else:
            yield Unreadable(f"{path} row {number}: found {kind_of(row)}, expected an object")


DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars (|)"}


def read_csv(path: Path, delimiter: str = ",") -> Iterator[Row | InputError]:
    """Rows by the header's names, or why a row is none."""
    number = 0
    csv.field_size_limit(2**31 - 1)  # of the whole process; the module's own limit is 131,072 letters
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = filter(None, csv.reader(file, strict=True, delimiter=delimiter))  # without blank lines
            header = next(rows, [])
            if header:
                _check_header(path, header, delimiter)
            for number, values in enumerate(rows, 1):
                if len(values) == len(header):
                    yield dict(zip(header, values, strict=True))
                else:
                    yield Unreadable(
                        f"{path} row {number}: found {len(values)} columns, expected {len(header)}: "
                        f"quote the {DELIMITERS[delimiter]} in it"
                    )
    except csv.Error as error:
        raise InputError(f"{path} row {number + 1}: not CSV: {first_line(error)}: check the quotes") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: unreadable: {first_line(error)}: expected UTF-8 text") from error


def _check_header(path: Path, header: list[str], delimiter: str) -> None:
    """Refuse names that stand twice or are empty, and a header that another delimiter divides better."""
    line = delimiter.join(header)
    other = max(DELIMITERS, key=lambda mark: len(line.split(mark)))
    if len(line.split(other)) > len(header):
        raise InputError(
            f"{path}: its columns are divided by {DELIMITERS[other]}, expected {DELIMITERS[delimiter]} as delimiter "
            f"(header {short_repr(line)}): save it again with {DELIMITERS[delimiter]}, or as .jsonl"
        )
    _check_names(path, header)


def _check_names(path: Path, names: list[str]) -> None:
    """Refuse columns of one name, of which one would hide the other, and columns without a name."""
    for place, name in enumerate(names, 1):
        if names.count(name) > 1:
            raise InputError(f"{path}: {names.count(name)} columns are called {short_repr(name)}: rename or remove one")
        if not name.strip():
            raise InputError(f"{path}: column {place} of {len(names)} has no name: name it, or save without the index")


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows, a thousand at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_names(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # also text that is not UTF-8
        raise InputError(f"{path}: unreadable Parquet: {first_line(error)}: write the file again") from error


def read_file(path: Path) -> Iterator[tuple[str, Row | InputError]]:
    """(where it stands, row as it is in the file or why it cannot be read), in the order of the file.

    Raises:
        InputError: the file cannot be read at all.
    """
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return read_jsonl(path)
    readers: dict[str, Callable[[Path], Iterator[Row | InputError]]] = {
        ".json": read_json,
        ".csv": read_csv,
        ".tsv": lambda path: read_csv(path, "\t"),
        ".parquet": read_parquet,
    }
    if suffix not in readers:
        fix = f": unpack it first: gunzip -k {path}" if suffix == ".gz" else ""
        raise InputError(f"data.path={path}: files '{suffix}' are not read: expected {', '.join(FILES)}{fix}")
    return numbered(str(path), readers[suffix](path))


def says_nothing(value: Any) -> bool:
    """True for what stands for an absent value: null, NaN (a null of pandas), and texts and lists of nothing."""
    return value is None or value in ("", "[]") or value != value or (isinstance(value, (list, dict)) and not value)


def kind_of(value: Any) -> str:
    """A value for a message: its type and how it begins."""
    return "null" if value is None else f"{type(value).__name__} {short_repr(value)}"


def short_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def first_line(error: BaseException) -> str:
    """The first line of an error of a library, so that ours stays one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")[:200]
