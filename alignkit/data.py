"""Rows and tokens: load a data set, validate every row, template, tokenise, sample and collate.

Three kinds of row, plain dicts whatever file they came from:

    sft         {"prompt": str | messages, "completion": str}
    preference  {"prompt": str | messages, "chosen": str, "rejected": str}
    prompt      {"prompt": str | messages, "reference": str (optional), and the file's other columns}

`encode_prompt` and `encode_response` are the only tokenisation in the project: the same text has the same ids in SFT,
in the reward model, in PPO and in evaluation. Nothing heavy is imported until a function needs it.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import MISSING

from alignkit.ranges import num
from alignkit.types import InputError, Rows

if TYPE_CHECKING:
    pass

Kind = Literal["sft", "preference", "prompt"]
Row = dict[str, Any]

FIELDS = ("prompt", "completion", "messages", "chosen", "rejected", "reference")
ROLES = ("system", "developer", "user", "assistant", "tool")
FILES = (".jsonl", ".json", ".csv", ".parquet")
# Columns of well-known data sets, to suggest the right mapping when a field is absent.
ALIASES = {
    "prompt": ("question", "instruction", "query", "input", "text", "context"),
    "completion": ("answer", "response", "output", "target", "reply", "summary"),
    "chosen": ("accepted", "preferred", "better", "win", "positive"),
    "rejected": ("dispreferred", "worse", "lose", "negative"),
}


@dataclass
class Data:
    """A data set and where its fields are: the config node `data`."""

    path: str = (
        MISSING  # .jsonl, .json, .csv or .parquet file; save_to_disk folder; hub id[:config]; demo:chitchat/<split>
    )
    split: str = "train"  # which split, where a hub id or a folder has several
    columns: dict[str, str] = field(default_factory=dict)  # our field -> its column, e.g. {prompt: question}
    limit: int | None = num(None, ge=1)  # only the first N rows

    def check(self) -> None:
        """Raise InputError for what can be seen without reading the data: cheap enough for every rank and the CLI."""
        if self.path == MISSING or not self.path:
            raise InputError("data.path is not set: give a file, a folder, a datasets id or demo:chitchat/train")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"data.limit={self.limit}: expected at least 1, or null for every row")
        for name in self.columns:
            if name not in FIELDS:
                near = difflib.get_close_matches(name, FIELDS, 1)
                hint = f"did you mean data.columns.{near[0]}?" if near else f"the fields are {', '.join(FIELDS)}"
                raise InputError(f"data.columns.{name}: no such field: {hint}")
        if self.path.startswith("demo:"):
            from alignkit import demo

            demo.check(self.path)
        elif not Path(self.path).expanduser().exists() and _looks_like_a_file(self.path):
            raise InputError(f"data.path={self.path}: no such file{_near(Path(self.path).expanduser())}")

    def rows(self, kind: Kind) -> list[Row]:
        """All rows of one kind, validated: see the head of this module for their fields.

        Conversations are brought to one form. An sft row may have `messages` ending with the assistant's: the ones
        before are its prompt (a prompt row takes the answer as its reference). `completion`, `chosen` and `rejected`
        may be a list with a single assistant message; `chosen` and `rejected` may also be whole conversations with
        the same beginning, which then is the prompt.

        Raises InputError, on one line, with the file, the row, the field, what was found, what is expected and the fix.
        """
        self.check()
        if kind == "preference" and self.path.startswith("demo:"):
            raise InputError(
                f"data.path={self.path}: holds prompts and answers, no pairs: "
                "draw pairs with `alignkit sample` and give the file it writes"
            )
        convert = {"sft": _sft_row, "preference": _preference_row, "prompt": _prompt_row}[kind]
        rows = [convert(where, row, self.columns) for where, row in islice(self._read(), self.limit)]
        if not rows:
            raise InputError(f"data.path={self.path}: no rows: expected at least one {kind} row")
        return rows

    def _read(self) -> Iterator[tuple[str, Row]]:
        """(where it stands, row as it is in the file), in the order of the file."""
        path = Path(self.path).expanduser()
        if self.path.startswith("demo:"):
            from alignkit import demo

            return _numbered(self.path, demo.rows(self.path))
        if path.is_dir():
            return _numbered(self.path, self._read_folder(path))
        if path.suffix == ".jsonl":
            return _read_jsonl(path)
        if path.suffix in FILES:
            return _numbered(
                self.path, {".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}[path.suffix](path)
            )
        if path.is_file():
            raise InputError(f"data.path={self.path}: files '{path.suffix}' are not read: expected {', '.join(FILES)}")
        return _numbered(self.path, self._read_hub())

    def _read_folder(self, path: Path) -> Iterator[Row]:
        if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
            raise InputError(
                f"data.path={self.path}: the folder holds no saved data set (it holds: {found}): "
                "expected one written by datasets' save_to_disk, or name a file in it"
            )
        from datasets import DatasetDict, load_from_disk

        try:
            loaded = load_from_disk(str(path))
        except Exception as error:  # pyarrow, OSError, KeyError, JSON: whatever a broken folder brings up
            raise InputError(f"data.path={self.path}: unreadable data set: {_line(error)}: save it again") from error
        if isinstance(loaded, DatasetDict):
            if self.split not in loaded:
                raise InputError(f"data.split={self.split}: {self.path} has {', '.join(loaded)}: choose one")
            loaded = loaded[self.split]
        return iter(loaded)

    def _read_hub(self) -> Iterator[Row]:
        from datasets import load_dataset

        name, _, config = self.path.partition(":")
        try:
            return iter(load_dataset(name, config or None, split=self.split))
        except Exception as error:  # no network, no such id, no such split, a config to choose: all the user's to mend
            raise InputError(
                f"data.path={self.path} (data.split={self.split}): neither a file nor a folder, and not loaded as a "
                f"datasets id: {_line(error)}: correct the path, or write id:config for a data set with several"
            ) from error


@dataclass
class Ptx:
    """A language-model loss beside PPO's, on data of its own, against forgetting (PPO-ptx, arXiv 2203.02155)."""

    coef: float = num(0.0, ge=0)  # weight of the mean loss of its tokens; 0: off
    data: Data = field(default_factory=lambda: Data(path=""))  # prompts and completions, as the sft stage takes them
    mini_batch_size: int = num(16, ge=1)  # rows of one optimizer step, over all ranks
    max_length: int = num(512, ge=2)  # tokens of prompt + completion; longer rows are left out and counted

    def check(self) -> None:
        """Raise InputError where data and coefficient do not go together."""
        if bool(self.coef) != bool(self.data.path):
            raise InputError(
                f"ptx.coef={self.coef} with ptx.data.path={self.data.path!r}: give both, or neither for PPO without ptx"
            )


# ---------------------------------------------------------------------------------------------------------- files


def _looks_like_a_file(path: str) -> bool:
    """True where a path cannot be a hub id ("name" or "org/name", optionally ":config")."""
    return Path(path).suffix in FILES or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?", path)


def _near(path: Path) -> str:
    """ "; did you mean x.jsonl, y.jsonl?" from the names in the same folder, or what is wrong with the folder."""
    if not path.parent.is_dir():
        return f": there is no folder {path.parent}"
    names = [p.name for p in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, 3, 0.5) or sorted(n for n in names if n.endswith(FILES))[:3]
    return f": did you mean {', '.join(near)}?" if near else f": {path.parent} holds no {', '.join(FILES)} file"


def _numbered(name: str, rows) -> Iterator[tuple[str, Row]]:
    return ((f"{name} row {number}", row) for number, row in enumerate(rows, 1))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: unreadable: {_line(error)}: expected UTF-8 text") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(_text(path).split("\n"), 1):  # not splitlines: U+2028 may stand inside a string
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except RecursionError:
            raise InputError(f"{where}: not JSON that can be read: brackets without end: remove the row") from None
        except json.JSONDecodeError as error:
            raise InputError(
                f"{where}: not JSON ({error.msg} at column {error.colno}): expected one object a line, as "
                f'{{"prompt": "...", ...}}, found {_short(line)}'
            ) from error
        if not isinstance(row, dict):
            raise InputError(f'{where}: found {_found(row)}, expected an object as {{"prompt": "...", ...}}')
        yield where, row


def _read_json(path: Path) -> list[Row]:
    try:
        rows = json.loads(_text(path))
    except json.JSONDecodeError as error:
        fix = "rename it to .jsonl if it has one object a line" if error.msg == "Extra data" else "mend that place"
        raise InputError(
            f"{path} line {error.lineno}: not JSON ({error.msg} at column {error.colno}): {fix}"
        ) from error
    if not isinstance(rows, list):
        raise InputError(f"{path}: found {_found(rows)}, expected a list of objects: [{{...}}, {{...}}]")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path} row {number}: found {_found(row)}, expected an object")
    return rows


def _read_csv(path: Path) -> Iterator[Row]:
    reader = csv.DictReader(_text(path).splitlines(keepends=True), strict=True)
    number = 0
    try:
        for number, row in enumerate(reader, 1):
            width = len(reader.fieldnames or ())
            if None in row or None in row.values():
                found = width + len(row[None]) if None in row else sum(value is not None for value in row.values())
                raise InputError(
                    f"{path} row {number}: found {found} columns, expected {width}: quote the commas in it"
                )
            yield row
    except csv.Error as error:
        raise InputError(f"{path} row {number + 1}: not CSV: {_line(error)}: check the quotes") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: unreadable Parquet: {_line(error)}: write the file again") from error
    return (row for batch in table.to_batches() for row in batch.to_pylist())


# ----------------------------------------------------------------------------------------------------------- rows


def _sft_row(where: str, row: Row, columns: dict[str, str]) -> Row:
    if _has_messages(row, columns):
        prompt, completion = _conversation(where, row, columns)
        return {"prompt": prompt, "completion": completion}
    return {
        "prompt": _prompt(where, *_pick(where, row, columns, "prompt")),
        "completion": _answer(where, *_pick(where, row, columns, "completion")),
    }


def _preference_row(where: str, row: Row, columns: dict[str, str]) -> Row:
    pair = [_pick(where, row, columns, name) for name in ("chosen", "rejected")]
    starts = [value[:-1] if isinstance(value, list) else [] for _, value in pair]
    if starts[0] and starts[0] == starts[1]:  # two whole conversations: what they share is the prompt
        prompt = _prompt(where, pair[0][0], starts[0])
        pair = [(column, value[-1:]) for column, value in pair]
    else:
        prompt = _prompt(where, *_pick(where, row, columns, "prompt"))
    chosen, rejected = (_answer(where, *value) for value in pair)
    if chosen == rejected:
        raise InputError(
            f"{where}: chosen and rejected are the same text {_short(chosen)}: remove the row, it is no pair"
        )
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _prompt_row(where: str, row: Row, columns: dict[str, str]) -> Row:
    ours = {columns.get(name, name) for name in ("prompt", "reference", "messages")}
    kept = {name: value for name, value in row.items() if name not in ours}
    if _has_messages(row, columns):
        start, reference = _conversation(where, row, columns)
        return {**kept, "prompt": start, "reference": reference}
    prompt = _prompt(where, *_pick(where, row, columns, "prompt"))
    if "reference" not in columns and row.get("reference") is None:
        return {**kept, "prompt": prompt}
    return {**kept, "prompt": prompt, "reference": _answer(where, *_pick(where, row, columns, "reference"))}


def _has_messages(row: Row, columns: dict[str, str]) -> bool:
    return "messages" in columns or ("messages" in row and columns.get("prompt", "prompt") not in row)


def _pick(where: str, row: Row, columns: dict[str, str], name: str) -> tuple[str, Any]:
    """(column, its value); an absent column is refused with the mapping that would mend it."""
    column = columns.get(name, name)
    if column in row:
        return column, row[column]
    taken = {columns.get(other, other) for other in FIELDS}
    free = [key for key in row if key not in taken]
    near = (
        [alias for alias in ALIASES.get(name, ()) if alias in free] or difflib.get_close_matches(name, free, 1) or free
    )
    fix = f"+data.columns.{name}={near[0]}" if near else f"add it, or map its column with +data.columns.{name}=..."
    raise InputError(f"{where}: no field '{column}', the row has {', '.join(map(str, row)) or 'none'}: {fix}")


def _prompt(where: str, column: str, value: Any) -> str | list[dict[str, str]]:
    """A non-empty string, or messages that do not end with the assistant's."""
    if isinstance(value, str):
        return _string(where, column, value)
    messages = _messages(where, column, value, "a string or a list of messages")
    if messages[-1]["role"] == "assistant":
        raise InputError(
            f"{where}: '{column}' ends with an assistant message, expected the user's: remove the last one"
        )
    return messages


def _answer(where: str, column: str, value: Any) -> str:
    """A non-empty string, or the text of a list with a single assistant message."""
    if not isinstance(value, list):
        return _string(where, column, value)
    messages = _messages(where, column, value, "a string or a list with one assistant message")
    if [message["role"] for message in messages] != ["assistant"]:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"{where}: '{column}' has messages of {roles}, expected a single one of assistant: keep only that"
        )
    return messages[0]["content"]


def _conversation(where: str, row: Row, columns: dict[str, str]) -> tuple[list[dict[str, str]], str]:
    """(the messages before the last, the text of the last), which must be the assistant's."""
    column, value = _pick(where, row, columns, "messages")
    messages = _messages(where, column, value, "a list of messages")
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise InputError(
            f"{where}: '{column}' has messages of {', '.join(m['role'] for m in messages)}, expected at least two "
            "with the assistant's last: cut it after an assistant message"
        )
    return _prompt(where, column, messages[:-1]), messages[-1]["content"]  # type: ignore[return-value]


def _messages(where: str, column: str, value: Any, expected: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise InputError(f"{where}: '{column}' is {_found(value)}, expected {expected}")
    if not value:
        raise InputError(f"{where}: '{column}' is an empty list, expected {expected}: remove the row")
    messages = []
    for index, message in enumerate(value):
        place = f"{column}[{index}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise InputError(f'{where}: \'{place}\' is {_found(message)}, expected {{"role": ..., "content": ...}}')
        if message["role"] not in ROLES:
            raise InputError(
                f"{where}: '{place}.role' is {_found(message['role'])}, expected one of {', '.join(ROLES)}"
            )
        content = _string(where, f"{place}.content", message["content"])
        messages.append({"role": message["role"], "content": content})
    return messages


def _string(where: str, column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: '{column}' is {_found(value)}, expected a string: write it as text")
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # no tokenizer takes it
        raise InputError(f"{where}: '{column}' has half a character, {_short(value)}: write the file again as UTF-8")
    if not value.strip():
        raise InputError(f"{where}: '{column}' is an empty string, expected text: fill it in or remove the row")
    return value


def _found(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {_short(value)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _line(error: BaseException) -> str:
    """The first line of an error of a library, so that ours stays one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")[:200]


def fingerprint(rows: Rows) -> str:
    """First 16 hex digits of the SHA-256 of the rows as canonical JSON: the data hash of the manifest."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, separators=(",", ":"), default=str).encode() + b"\n")
    return digest.hexdigest()[:16]
