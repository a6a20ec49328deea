"""Our fields, and which column of a data set could be one: what an error proposes where a field is absent."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable
from typing import Any

from alignkit.data.files import says_nothing

Row = dict[str, Any]

FIELDS = ("prompt", "completion", "messages", "chosen", "rejected", "reference", "answers", "system", "history")
# Columns of well-known data sets, to suggest the right mapping when a field is absent.
ALIASES = {
    "prompt": ("question", "instruction", "query", "input", "text", "context"),
    "completion": ("answer", "response", "output", "target", "reply", "summary"),
    "chosen": ("accepted", "preferred", "better", "win", "positive"),
    "rejected": ("dispreferred", "worse", "lose", "negative"),
}
TEXTS = {name for names in ALIASES.values() for name in names} | {"content", "body", "message", "title"}
# Columns that describe a row, and are no text of it.
ABOUT = re.compile(
    r"(.*[\W_])?(id|uuid|guid|hash|sha\d*|md5|url|uri|link|path|file|filename|label|class|category|tag|topic|type|kind|"
    r"score|rating|rank|source|lang|language|split|subset|model|winner|date|time|timestamp|index|idx|count|tokens|"
    r"length|license)s?|.*(?-i:[a-z]I[dD])",
    re.IGNORECASE,
)
MACHINE = re.compile(r"[0-9a-fA-F-]{16,}|\w+://\S+")  # a hash, an address
LOOKED, FEW = 200, 10  # values looked at; how many times each of a category's is found at least


def proposal(field: str, kind: str, row: Row, columns: dict[str, str], looked: Iterable[Row]) -> str:
    """The fix for a row without `field`: the override that maps a column which can be it, or that one must be given.

    Args:
        columns: our field -> its column, as configured.
        looked: rows of the set, to judge its columns by.
    """
    taken = {columns.get(other, other) for other in FIELDS}
    free = {key: _values(key, looked) for key in row if key not in taken}
    talks = [key for key, values in free.items() if values and all(map(_is_conversation, values))]
    if talks and kind != "preference" and field in ("prompt", "completion", "messages") and "prompt" not in columns:
        return override("messages", talks[0])
    texts = [key for key, values in free.items() if could_be_text(key, values)]
    near = [alias for alias in ALIASES.get(field, ()) if alias in texts] or difflib.get_close_matches(field, texts, 1)
    if not near and field in ("prompt", "completion") and len(texts) == 1:
        near = texts
    if not near and field == "prompt" and len(talks) == 1:
        near = talks
    return override(field, near[0]) if near else f"add it, or map its column with +data.columns.{field}=..."


def _values(column: str, looked: Iterable[Row]) -> list[Any]:
    found = (row.get(column) for row in looked)
    return [value for value in found if not says_nothing(value)][:LOOKED]


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value
    )


def could_be_text(column: str, values: list[Any]) -> bool:
    """True where a column's name and values are those of a text: no id, address, number, label or score."""
    if not values or not all(isinstance(value, str) for value in values) or ABOUT.fullmatch(column):
        return False
    if all(MACHINE.fullmatch(value.strip()) for value in values):
        return False
    if len(values) >= 2 * FEW and FEW * len(set(values)) <= len(values):  # a category
        return False
    sentences = sum(not value.isascii() or len(value.split()) > 1 for value in values)
    return column.lower() in TEXTS or 2 * sentences >= len(values)


def override(field: str, column: str) -> str:
    """The argument that maps a column, as it is typed in a shell: quoted for Hydra and the shell where it must be."""
    if re.fullmatch(r"[A-Za-z_][\w./-]*", column, re.ASCII) and column.lower() not in (
        "null",
        "true",
        "false",
        "nan",
        "inf",
    ):
        return f"+data.columns.{field}={column}"
    quoted = re.sub(r'(\\*)"', r'\1\1\\"', column)  # backslashes count where a quote follows them
    quoted = re.sub(r"(\\+)$", r"\1\1", quoted).replace("${", "\\${")
    return shlex.quote(f'+data.columns.{field}="{quoted}"')
