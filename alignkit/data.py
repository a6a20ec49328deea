"""Rows and tokens: load a data set, validate every row, template, tokenise, sample and collate.

Three kinds of row, plain dicts whatever file they came from:

    sft         {"prompt": str | messages, "completion": str}
    preference  {"prompt": str | messages, "chosen": str, "rejected": str}, also made of K ranked "answers"
    prompt      {"prompt": str | messages, "reference": str (optional), and the file's other columns}

`encode_prompt` and `encode_response` are the only tokenisation in the project: the same text has the same ids in SFT,
in the reward model, in PPO and in evaluation. Nothing heavy is imported until a function needs it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING

from alignkit import layouts
from alignkit.files import (
    FILES,
    first_line,
    kind_of,
    looks_like_a_file,
    near_files,
    numbered,
    read_csv,
    read_json,
    read_jsonl,
    read_parquet,
    short_repr,
)
from alignkit.ranges import num
from alignkit.types import InputError, Rows

Kind = Literal["sft", "preference", "prompt"]
Row = dict[str, Any]

FIELDS = ("prompt", "completion", "messages", "chosen", "rejected", "reference", "answers")
ROLES = ("system", "developer", "user", "assistant", "tool")
# Columns of well-known data sets, to suggest the right mapping when a field is absent.
ALIASES = {
    "prompt": ("question", "instruction", "query", "input", "text", "context"),
    "completion": ("answer", "response", "output", "target", "reply", "summary"),
    "chosen": ("accepted", "preferred", "better", "win", "positive"),
    "rejected": ("dispreferred", "worse", "lose", "negative"),
}


LEFT_OUT = "{} faulty rows left out (data.faulty=leave_out)"


class HalfCharacter(InputError):
    """Text that no tokenizer takes."""


class EmptyText(InputError):
    """A text of a row is empty."""


class SamePair(InputError):
    """Chosen and rejected are the same text."""


class RowList(list[Row]):
    """Validated rows, and what a person should know of how they were read."""

    notes: tuple[str, ...] = ()


@dataclass
class Data:
    """A data set and where its fields are: the config node `data`."""

    path: str = (
        MISSING  # .jsonl, .json, .csv or .parquet file; save_to_disk folder; hub id[:config]; demo:chitchat/<split>
    )
    split: str = "train"  # which split, where a hub id or a folder has several
    columns: dict[str, str] = field(default_factory=dict)  # our field -> its column, e.g. {prompt: question}
    limit: int | None = num(None, ge=1)  # only the first N rows
    preset: str = "auto"  # public layout, a name of layouts.py; none: our own fields; auto: recognise it
    pairs: str = "all"  # of K ranked answers: all | best_worst
    faulty: str = "refuse"  # rows that are not of the stage's kind: refuse (the first stops) | leave_out (counted)
    lint: str = "warn"  # other faults, when a stage starts: strict (any stops) | warn (say how many) | off

    def check(self) -> None:
        """Raise InputError for what can be seen without reading the data: cheap enough for every rank and the CLI."""
        if self.path == MISSING or not self.path:
            raise InputError("data.path is not set: give a file, a folder, a datasets id or demo:chitchat/train")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"data.limit={self.limit}: expected at least 1, or null for every row")
        for key, value, known in (
            ("preset", self.preset, ("auto", "none", *layouts.PRESETS)),
            ("pairs", self.pairs, ("all", "best_worst")),
            ("faulty", self.faulty, ("refuse", "leave_out")),
            ("lint", self.lint, ("strict", "warn", "off")),
        ):
            if value not in known:
                near = difflib.get_close_matches(value, known, 1)
                raise InputError(
                    f"data.{key}={value}: expected {', '.join(known)}{f': did you mean {near[0]}?' if near else ''}"
                )
        if self.columns and self.preset in layouts.PRESETS:
            raise InputError(
                f"data.preset={self.preset} with data.columns.{next(iter(self.columns))}: a preset knows its columns: drop one of both"
            )
        for name in self.columns:
            if name not in FIELDS:
                near = difflib.get_close_matches(name, FIELDS, 1)
                hint = f"did you mean data.columns.{near[0]}?" if near else f"the fields are {', '.join(FIELDS)}"
                raise InputError(f"data.columns.{name}: no such field: {hint}")
        if self.path.startswith("demo:"):
            from alignkit import demo

            demo.check(self.path)
        elif not Path(self.path).expanduser().exists() and looks_like_a_file(self.path):
            raise InputError(f"data.path={self.path}: no such file{near_files(Path(self.path).expanduser())}")

    def rows(self, kind: Kind) -> RowList:
        """All rows of one kind, validated: see the head of this module for their fields.

        Conversations are brought to one form. An sft row may have `messages` ending with the assistant's: the ones
        before are its prompt (a prompt row takes the answer as its reference). `completion`, `chosen` and `rejected`
        may be a list with a single assistant message; `chosen` and `rejected` may also be whole conversations with
        the same beginning, which then is the prompt. Public layouts are brought to the same fields first.

        Raises InputError, on one line, with the file, the row, the field, what was found, what is expected and the fix.
        """
        rows, said = RowList(), Counter[str]()
        for _, row in self.stream(kind, said):
            if not isinstance(row, InputError):
                rows.append(row)
            elif self.faulty == "refuse":
                raise row
            else:
                said[LEFT_OUT] += 1
        if not rows:
            faulty = f" but {said[LEFT_OUT]} faulty ones" if said[LEFT_OUT] else ""
            raise InputError(f"data.path={self.path}: no rows{faulty}: expected at least one {kind} row")
        rows.notes = tuple(f"data.path={self.path}: {text.format(f'{count:,}')}" for text, count in said.items())
        return rows

    def stream(self, kind: Kind, said: Counter[str]) -> Iterator[tuple[str, Row | InputError]]:
        """(where it stands, the validated row or why it is refused), one at a time; a refusal does not end it.

        `said` counts, under a sentence with {} for the number, what a person should know of how rows were read.
        """
        self.check()
        if kind == "preference" and self.path.startswith("demo:"):
            raise InputError(
                f"data.path={self.path}: holds prompts and answers, no pairs: "
                "draw pairs with `alignkit sample` and give the file it writes"
            )
        preset = "none" if self.columns or self.path.startswith("demo:") else self.preset
        for where, found in islice(self._read(), self.limit):
            try:
                if isinstance(found, InputError):
                    raise found
                if preset == "auto":
                    preset = layouts.recognise(where, found, kind)
                if preset == "none":
                    rows = _converted(where, found, kind, self.columns, self.pairs, said)
                else:
                    ours = layouts.as_kind(where, layouts.PRESETS[preset](where, found), kind)
                    rows = _converted(where, ours, kind, {}, self.pairs, said)
                    said[f"{{}} rows read as {preset} (data.preset=none reads their fields as they are)"] += 1
            except InputError as error:
                yield where, error
                continue
            yield from ((where, row) for row in rows)

    def _read(self) -> Iterator[tuple[str, Row | InputError]]:
        """(where it stands, row as it is in the file or why it cannot be read), in the order of the file."""
        path = Path(self.path).expanduser()
        if self.path.startswith("demo:"):
            from alignkit import demo

            return numbered(self.path, demo.rows(self.path))
        if path.is_dir():
            return numbered(self.path, self._read_folder(path))
        if path.suffix == ".jsonl":
            return read_jsonl(path)
        if path.suffix in FILES:
            return numbered(
                self.path, {".json": read_json, ".csv": read_csv, ".parquet": read_parquet}[path.suffix](path)
            )
        if path.is_file():
            raise InputError(f"data.path={self.path}: files '{path.suffix}' are not read: expected {', '.join(FILES)}")
        return numbered(self.path, self._read_hub())

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
            raise InputError(
                f"data.path={self.path}: unreadable data set: {first_line(error)}: save it again"
            ) from error
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
                f"datasets id: {first_line(error)}: correct the path, or write id:config for a data set with several"
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


# ----------------------------------------------------------------------------------------------------------- rows


def _converted(where: str, row: Row, kind: Kind, columns: dict[str, str], how: str, said: Counter[str]) -> list[Row]:
    """The validated rows that one row makes: several of ranked answers, else one."""
    if kind == "preference" and columns.get("answers", "answers") in row and columns.get("chosen", "chosen") not in row:
        ranked = {name: _pick(where, row, columns, name)[1] for name in ("prompt", "answers")}
        made, equal = layouts.pairs(where, ranked, how)
        if equal:
            said["{} pairs of ranked answers left out, equal in rating or in text"] += equal
        return [_preference_row(where, pair, {}) for pair in made]
    convert = {"sft": _sft_row, "preference": _preference_row, "prompt": _prompt_row}[kind]
    return [convert(where, row, columns)]


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
        raise SamePair(
            f"{where}: chosen and rejected are the same text {short_repr(chosen)}: remove the row, it is no pair"
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
        raise InputError(f"{where}: '{column}' is {kind_of(value)}, expected {expected}")
    if not value:
        raise EmptyText(f"{where}: '{column}' is an empty list, expected {expected}: remove the row")
    messages = []
    for index, message in enumerate(value):
        place = f"{column}[{index}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise InputError(f'{where}: \'{place}\' is {kind_of(message)}, expected {{"role": ..., "content": ...}}')
        if message["role"] not in ROLES:
            raise InputError(
                f"{where}: '{place}.role' is {kind_of(message['role'])}, expected one of {', '.join(ROLES)}"
            )
        content = _string(where, f"{place}.content", message["content"])
        messages.append({"role": message["role"], "content": content})
    return messages


def _string(where: str, column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: '{column}' is {kind_of(value)}, expected a string: write it as text")
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # no tokenizer takes it
        raise HalfCharacter(
            f"{where}: '{column}' has half a character, {short_repr(value)}: write the file again as UTF-8"
        )
    if not value.strip():
        raise EmptyText(f"{where}: '{column}' is an empty string, expected text: fill it in or remove the row")
    return value


def fingerprint(rows: Rows) -> str:
    """First 16 hex digits of the SHA-256 of the rows as canonical JSON: the data hash of the manifest."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, separators=(",", ":"), default=str).encode() + b"\n")
    return digest.hexdigest()[:16]
