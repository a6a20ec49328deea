"""Data sets: the config node `data`, which reads a set and validates every row.

Three kinds of row, plain dicts whatever file they came from:

    sft         {"prompt": str | messages, "completion": str}
    preference  {"prompt": str | messages, "chosen": str, "rejected": str}, also made of K ranked "answers"
    prompt      {"prompt": str | messages, "reference": str (optional), and the file's other columns}

`sources` finds the files and reads them, `layouts` brings public layouts to our fields, `rows` validates. Nothing heavy
is imported until a function needs it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from omegaconf import MISSING

from alignkit.core.errors import InputError
from alignkit.core.fields import num
from alignkit.core.types import Rows
from alignkit.data import layouts, sources
from alignkit.data.columns import FIELDS
from alignkit.data.files import numbered
from alignkit.data.rows import Kind, Reading

Row = dict[str, Any]

LOOK = 1000  # rows that tell the layout of a set
LEFT_OUT = "{} faulty rows left out (data.faulty=leave_out)"


class RowList(list[Row]):
    """Validated rows, their kind, and what a person should know of how they were read."""

    notes: tuple[str, ...] = ()
    kind: Kind | None = None


@dataclass
class Data:
    """A data set and where its fields are: the config node `data`."""

    path: str = MISSING  # file, folder or pattern of files; save_to_disk folder; hub id[:config]; demo:chitchat/<split>
    split: str = "train"  # which split, where a hub id or the files of a folder have several
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
        self._check_columns()
        if self.path.startswith("demo:"):
            from alignkit.data import demo

            demo.check(self.path)
        else:
            sources.check(self.path)

    def _check_columns(self) -> None:
        """Raise InputError for a mapping that cannot be: of no field of ours, or of one column to two."""
        if self.columns and self.preset in layouts.PRESETS:
            raise InputError(
                f"data.preset={self.preset} with data.columns.{next(iter(self.columns))}: a preset knows its columns: drop one of both"
            )
        for name in self.columns:
            if name not in FIELDS:
                near = difflib.get_close_matches(name, FIELDS, 1)
                hint = f"did you mean data.columns.{near[0]}?" if near else f"the fields are {', '.join(FIELDS)}"
                raise InputError(f"data.columns.{name}: no such field: {hint}")
            for other in self.columns:
                if other != name and self.columns[other] == self.columns[name]:
                    raise InputError(
                        f"data.columns.{other} and data.columns.{name} are both {self.columns[name]}: "
                        "map one of the two"
                    )
                if (other, name) in (("messages", "prompt"), ("messages", "completion")):
                    raise InputError(
                        f"data.columns.{other} with data.columns.{name}: messages hold their prompt: map one of the two"
                    )

    def rows(self, kind: Kind) -> RowList:
        """All rows of one kind, validated: see the head of this module for their fields.

        Conversations are brought to one form. An sft row may have `messages` ending with the assistant's: the ones
        before are its prompt (a prompt row takes the answer as its reference). `completion`, `chosen` and `rejected`
        may be a list with a single assistant message; `chosen` and `rejected` may also be whole conversations with
        the same beginning, which then is the prompt. Public layouts are brought to the same fields first.

        Raises InputError, on one line, with the file, the row, the field, what was found, what is expected and the fix.
        """
        kept: RowList | None = self.__dict__.pop("_next", None)
        if kept is not None and kept.kind == kind:
            return kept
        rows, said = RowList(), Counter[str]()
        rows.kind = kind
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

    def hand_out(self, rows: RowList) -> None:
        """Let the next call of `rows` return these: what was checked is what is used, and is read once."""
        self.__dict__["_next"] = rows

    def stream(self, kind: Kind, said: Counter[str]) -> Iterator[tuple[str, Row | InputError]]:
        """(where it stands, the validated row or why it is refused), one at a time; a refusal does not end it.

        The layout is the one that most of the first thousand rows have. `said` counts, under a sentence with {} for the
        number, what a person should know of how rows were read; it is complete when the last one is.
        """
        self.check()
        if kind == "preference" and self.path.startswith("demo:"):
            raise InputError(
                f"data.path={self.path}: holds prompts and answers, no pairs: "
                "draw pairs with `alignkit sample` and give the file it writes"
            )
        found = islice(self._read(said), self.limit)
        first, failure = _first(found)
        dicts = [(where, row) for where, row in first if isinstance(row, dict)]
        preset = "none" if self.columns or self.path.startswith("demo:") else self.preset
        if preset == "auto":
            preset = layouts.recognise(dicts, kind)
        reading = Reading(kind, self.columns, preset, self.pairs, [row for _, row in dicts])
        for where, row in chain(first, found if failure is None else ()):
            try:
                if isinstance(row, InputError):
                    raise row
                rows = reading.rows(where, row)
            except InputError as error:
                yield where, error
                continue
            yield from ((where, row) for row in rows)
        if failure is not None:
            raise failure
        if not self.path.startswith("demo:"):  # its rows serve several kinds
            said.update(reading.notes())

    def _read(self, said: Counter[str]) -> Iterator[tuple[str, Row | InputError]]:
        """(where it stands, row as it is in the file or why it cannot be read), in order."""
        if self.path.startswith("demo:"):
            from alignkit.data import demo

            return numbered(self.path, demo.rows(self.path))
        return sources.rows(self.path, self.split, said)


def _first(
    rows: Iterator[tuple[str, Row | InputError]],
) -> tuple[list[tuple[str, Row | InputError]], InputError | None]:
    """(the rows to tell a layout by, why there are no more of them where reading failed)."""
    first = []
    try:
        for place in islice(rows, LOOK):
            first.append(place)
    except InputError as error:
        return first, error
    return first, None


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


def fingerprint(rows: Rows) -> str:
    """First 16 hex digits of the SHA-256 of the rows as canonical JSON: the data hash of the manifest."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, separators=(",", ":"), default=str).encode() + b"\n")
    return digest.hexdigest()[:16]
