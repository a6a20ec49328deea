"""What can be wrong with rows that are well-formed: found in one pass, in bounded memory, without a model.

`Findings` counts and keeps the first few; `RowLints` looks at rows one by one and remembers about 40 bytes of each;
`HeldOut` is a set whose prompts training data must not contain.
"""

from __future__ import annotations

import re
import shlex
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alignkit.check.minhash import NearIndex, normal
from alignkit.core.errors import InputError
from alignkit.data.dataset import Data, RowList
from alignkit.data.files import Unreadable, short_repr
from alignkit.data.rows import EmptyText, HalfCharacter, Kind, SamePair

Row = dict[str, Any]

SHOWN, LISTED = 10, 1000  # findings of a lint shown with their text, and listed by number

# Lint -> what it says of a row. A stage refuses the first four; the others it would train on, or leave out.
LINTS = {
    "unreadable": "no JSON object, no UTF-8 or too few columns",
    "schema": "a field is missing or of the wrong kind",
    "empty": "a text is empty",
    "same_pair": "chosen and rejected are the same text",
    "alike_pair": "chosen and rejected differ in white space or case only",
    "duplicate": "the same as an earlier row",
    "reversed": "the pair of an earlier row, the other way round",
    "leak": "the prompt is also in the held-out rows",
    "near_leak": "the prompt is nearly one of the held-out rows'",
    "encoding": "text that was decoded wrongly (U+FFFD, UTF-8 read as Latin-1, or half a character, which is refused)",
    "control": "control characters (NUL, escapes, a byte-order mark, a change of direction)",
    "too_long": "longer than the stage takes: left out",
    "special_token": "the text contains a special token of this tokenizer",
    "unknown_token": "the tokenizer has no token for part of the text",
    "template": "the chat template refuses, drops or changes a message",
}
REFUSED = ("unreadable", "schema", "empty", "same_pair")

# What UTF-8 of accented letters, quotes and emoji looks like when read as Latin-1 or Windows-1252. Pairs that end words
# before a quote or a dash in some language ("Ã" and "”") are left out.
MOJIBAKE = (
    r"Ã[\x80-\x9f\xa1-\xba\xbc-\xbfƒ‚„†‡ˆ‰Š‹Œ˜™š›œžŸ]|Â[\x80-\x9f\xa1-\xba\xbc-\xbf]|â€[\x80-\x9f™œ“”¢¦˜]|ðŸ|ï»¿|ï¿½"
)
BAD_TEXT = re.compile(
    "(\ufffd|[\ud800-\udfff]|" + MOJIBAKE + ")|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202d\u202e\ufeff\ufffe\uffff]"
)


@dataclass
class Finding:
    """The rows of one lint."""

    count: int = 0
    shown: list[str] = field(default_factory=list)  # the first ten: where each stands and what it is
    listed: list[int] = field(default_factory=list)  # the first thousand, by number


class Findings(dict[str, Finding]):
    """{lint: its rows}, of the lints that found something."""

    refused = 0  # rows that a stage would refuse

    def add(self, lint: str, where: str, what: str) -> None:
        """Count a row; `where` ends with its number, as "pairs.jsonl line 7" does."""
        found = self.setdefault(lint, Finding())
        found.count += 1
        if len(found.shown) < SHOWN:
            found.shown.append(f"{where}: {what}")
        if len(found.listed) < LISTED:
            found.listed.append(int(where.rpartition(" ")[2]))

    def refuse(self, where: str, error: InputError) -> None:
        """Count a row that a stage would refuse, under the lint of its kind."""
        kinds = {Unreadable: "unreadable", EmptyText: "empty", HalfCharacter: "encoding", SamePair: "same_pair"}
        self.add(kinds.get(type(error), "schema"), where, str(error).removeprefix(f"{where}: "))
        self.refused += 1


def prompt_texts(prompt: str | list[dict[str, str]]) -> list[str]:
    """The text or texts of a prompt."""
    return [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]


def compared(prompt: str | list[dict[str, str]]) -> str:
    """The prompt as it is compared between sets: without system messages, which many prompts share, nor case."""
    if isinstance(prompt, str):
        return normal(prompt)
    return normal("\n".join(m["content"] for m in prompt if m["role"] not in ("system", "developer")))


# The answers of a row of each kind; a prompt row has other columns too, of any name and type.
ANSWERS = {"sft": ("completion",), "preference": ("chosen", "rejected"), "prompt": ("reference",)}


def answers(row: Row, kind: Kind | None = None) -> Iterator[tuple[str, str]]:
    """(field, text) of the answers of a row; `kind` is told by its fields where it is not given."""
    names = ANSWERS[kind] if kind else ("completion", "chosen", "rejected", "reference")
    return ((name, row[name]) for name in names if isinstance(row.get(name), str) and row[name])


class HeldOut:
    """Prompts that training data must not contain, equal or nearly equal. `add` them all first."""

    def __init__(self, near: bool = True) -> None:
        """`near`: look for nearly equal prompts too, which takes some ten times as long."""
        self.near = near
        self.where: dict[str, str] = {}  # {prompt as it is compared: where it first stands}
        self.index = NearIndex()
        self._order: list[str] = []

    def add(self, rows: list[tuple[str, Row]]) -> None:
        new = {text: where for where, row in reversed(rows) if (text := compared(row["prompt"])) not in self.where}
        fresh = list(new)
        self.where |= new
        self._order += fresh
        if self.near:
            self.index.add(fresh)

    def check(self, rows: list[tuple[str, Row]], findings: Findings) -> None:
        """Findings of "leak" and "near_leak" among training rows."""
        if not self.where:
            return
        texts = [compared(row["prompt"]) for _, row in rows]
        left = []
        for (where, row), text in zip(rows, texts, strict=True):
            if text in self.where:
                findings.add("leak", where, f"{short_repr(_first(row))} is held out at {self.where[text]}")
            else:
                left.append((where, row, text))
        if not self.near:
            return
        for number, owner, similarity in self.index.near([text for *_, text in left]):
            where, row, _ = left[number]
            held = self.where[self._order[owner]]
            findings.add("near_leak", where, f"{short_repr(_first(row))} is {similarity:.0%} the same as {held}")


class RowLints:
    """The lints that need nothing but the rows."""

    def __init__(self, kind: Kind | None = None) -> None:
        self.kind = kind
        self.whole, self.unordered, self.number, self.file = array("q"), array("q"), array("q"), array("i")
        self.places: dict[str, int] = {}  # {"pairs.jsonl line", which the numbers follow: its index}
        self.lengths: dict[str, array] = defaultdict(lambda: array("i"))  # {field: characters of each row}

    def check(self, rows: list[tuple[str, Row]], findings: Findings) -> None:
        """Findings of "alike_pair", "encoding" and "control"; duplicates are told by `finish`."""
        for where, row in rows:
            prompt, given = row["prompt"], list(answers(row, self.kind))
            texts = [*prompt_texts(prompt), *(text for _, text in given)]
            if not _plain("".join(texts)):
                self._bad_text(where, texts, findings)
            if [name for name, _ in given] == ["chosen", "rejected"] and _alike(given[0][1], given[1][1]):
                findings.add("alike_pair", where, f"{short_repr(row['chosen'])} and {short_repr(row['rejected'])}")
            start = hash(prompt if isinstance(prompt, str) else tuple((m["role"], m["content"]) for m in prompt))
            ends = [hash(text) for _, text in given]
            self.lengths["prompt"].append(sum(map(len, texts[: len(texts) - len(given)])))
            for name, text in given:
                self.lengths[name].append(len(text))
            place, _, number = where.rpartition(" ")
            self.number.append(int(number))
            self.file.append(self.places.setdefault(place, len(self.places)))
            self.whole.append(hash((start, *ends)))
            self.unordered.append(hash((start, *sorted(ends))))

    @staticmethod
    def _bad_text(where: str, texts: list[str], findings: Findings) -> None:
        said = set()
        for text in texts:
            for found in BAD_TEXT.finditer(text):
                lint = "encoding" if found.group(1) else "control"
                if lint not in said:
                    around = text[max(0, found.start() - 12) : found.end() + 12]
                    findings.add(lint, where, f"{found.group()!a} in {around!a}")
                    said.add(lint)

    def finish(self, findings: Findings) -> None:
        """Findings of "duplicate" and "reversed", in the order of the rows.

        Rows are the same where 64 bits of their hash are: among a million rows one false alarm in 30 million runs.
        """
        unordered, whole = np.array(self.unordered), np.array(self.whole)
        order = np.argsort(unordered, kind="stable")
        new = np.ones(len(order), bool)
        new[1:] = unordered[order[1:]] != unordered[order[:-1]]
        first = np.empty_like(order)  # of each row, the earliest one like it
        first[order] = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
        places = list(self.places)
        for row in np.flatnonzero(first != np.arange(len(order))):
            same = whole[row] == whole[first[row]]
            where, earlier = (f"{places[self.file[at]]} {self.number[at]}" for at in (row, first[row]))
            what = f"the same as {earlier}" if same else f"the reverse of {earlier}"
            findings.add("duplicate" if same else "reversed", where, what)


def _plain(text: str) -> bool:
    """True for ASCII without control characters but tab and line ends: most text, and told apart fast."""
    return text.isascii() and text.replace("\n", "").replace("\t", "").replace("\r", "").isprintable()


def _alike(one: str, other: str) -> bool:
    """True where two texts differ in white space and case only; their first letters settle most."""
    return one.lstrip()[:1].lower() == other.lstrip()[:1].lower() and normal(one) == normal(other)


def _first(row: Row) -> str:
    return prompt_texts(row["prompt"])[-1]


def at_start(stage: str, sets: dict[str, tuple[Data, RowList]]) -> list[str]:
    """The lints that cost little, on rows that a stage has read: one line a set that has something to say.

    Args:
        sets: "data" and, where it is given, "eval_data": the config node and its rows.

    Raises:
        InputError: a fault, in a set with `lint: strict`.
    """
    held_out = HeldOut(near=False)
    said: list[str] = []
    for key in ("eval_data", "data"):  # what is held out is known before the others are compared with it
        node, rows = sets.get(key, (None, RowList()))
        if node is None:
            continue
        said += rows.notes
        placed = [(f"{node.path} row {number}", row) for number, row in enumerate(rows, 1)]
        if node.lint != "off":
            findings, row_lints = Findings(), RowLints(rows.kind)
            row_lints.check(placed, findings)
            row_lints.finish(findings)
            held_out.check(placed, findings)
            if findings:
                counts = ", ".join(f"{lint} {findings[lint].count:,}" for lint in LINTS if lint in findings)
                see = f"alignkit check data {stage} {shlex.quote(f'data.path={node.path}')}"
                line = f"{key}.path={node.path}: {counts}: see them with `{see}`"
                if node.lint == "strict":
                    raise InputError(f"{line}; {key}.lint=strict takes none")
                said.append(line)
        if key == "eval_data":
            held_out.add(placed)
    return said
