"""A row as it was read becomes validated rows of ours, whatever it was read from.

What a row holds is used, refused by name, or counted and named: a `Given` knows which of its columns were taken, and
`Reading` says what was left at the end.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from alignkit.core.errors import InputError
from alignkit.data import layouts
from alignkit.data.columns import proposal
from alignkit.data.files import kind_of, says_nothing, short_repr

Kind = Literal["sft", "preference", "prompt"]
Row = dict[str, Any]
Messages = list[dict[str, str]]

ROLES = ("system", "developer", "user", "assistant", "tool")
SYSTEM = ("system", "developer")
HALF = re.compile("[\ud800-\udfff]")
# Parts of a message that say something which no text of ours holds: refused where they say anything.
SPOKEN = (
    *("tool_calls", "tool_call_id", "function_call", "name", "reasoning_content", "reasoning", "thinking"),
    *("images", "image", "videos", "video", "audio", "audios"),
)
WEIGHTS = ("weight", "train")  # of a message in the loss; here the last one has all
# Columns of the same kind, beside the texts of a row.
SHOWN = ("tools", "functions", "images", "image", "videos", "video", "audio", "audios")
# Columns beside a prompt that belong in front of it: column -> what it is.
BESIDE = {"system": "system", "system_prompt": "system", "history": "history"}
EMPTY_SYSTEM = "{} empty system messages left out"
SYSTEM_READ = "{} rows with a column '%s', read as the system message in front"
HISTORY_READ = "{} rows with a column 'history', read as the turns before the prompt"
NAMED = 20  # columns named at most
ANSWER = "a string or a list with one assistant message"
EQUAL = "{} pairs of ranked answers left out, equal in rating or in text"


class HalfCharacter(InputError):
    """Text that no tokenizer takes."""


class EmptyText(InputError):
    """A text of a row is empty."""


class SamePair(InputError):
    """Chosen and rejected are the same text."""


@dataclass
class Given:
    """One row as it was read: it hands out fields, and keeps which columns were taken and what is to be said."""

    where: str
    row: Row
    kind: Kind
    columns: dict[str, str] = field(default_factory=dict)  # our field -> its column
    looked: Sequence[Row] = ()  # rows of the set, to propose columns from
    taken: set[str] = field(default_factory=set)
    spare: list[str] = field(default_factory=list)  # parts of fields that nobody uses, as "messages.id"
    told: list[str] = field(default_factory=list)  # sentences with {} for the number of rows they are true of

    def column(self, name: str) -> str:
        return self.columns.get(name, name)

    def has(self, name: str) -> bool:
        """True where the field is there; a null is an absent one, as Parquet writes it."""
        return self.row.get(self.column(name)) is not None

    def take(self, name: str) -> tuple[str, Any]:
        """(column, its value); an absent column is refused with the mapping that would mend it."""
        column = self.column(name)
        if column in self.row:
            self.taken.add(column)
            return column, self.row[column]
        fix = proposal(name, self.kind, self.row, self.columns, self.looked or [self.row])
        raise InputError(
            f"{self.where}: no field '{column}', the row has {', '.join(map(str, self.row)) or 'none'}: {fix}"
        )


class Reading:
    """How the rows of one set are read, and what is left over of them."""

    def __init__(self, kind: Kind, columns: dict[str, str], preset: str, pairs: str, looked: Sequence[Row]) -> None:
        """
        Args:
            preset: a name of `layouts.PRESETS`, or "none" for our own fields.
            pairs: of ranked answers, "all" or "best_worst".
            looked: rows of the set, to propose columns from.
        """
        self.kind, self.columns, self.preset, self.pairs, self.looked = kind, columns, preset, pairs, looked
        self.said: Counter[str] = Counter()  # sentences with {} for a number
        self.unused: Counter[str] = Counter()  # {column or part of a field: rows that hold it}
        self.holding = 0  # rows that hold any of those

    def rows(self, where: str, found: Row) -> list[Row]:
        """The validated rows that one row makes: several of ranked answers, else one.

        Raises:
            InputError: what is wrong with it, in one line.
        """
        if self.preset == "none":
            given = Given(where, found, self.kind, self.columns, self.looked)
            made = self._made(given)
            left = [name for name in found if name not in given.taken]
            if self.kind == "prompt":  # the others are kept, for reward functions
                left = [name for name in left if name in made[0] and found[name] is not made[0][name]]
        else:
            ours = layouts.as_kind(where, layouts.PRESETS[self.preset](where, found), self.kind)
            given = Given(where, ours, self.kind)
            made = self._made(given)
            used = layouts.used(self.preset, found)
            left = [name for name in found if name not in used]
            given.told.insert(0, f"{{}} rows read as {self.preset} (data.preset=none reads their fields as they are)")
        self._settle(given, found, left)
        return made

    def _made(self, given: Given) -> list[Row]:
        if self.kind == "preference" and given.has("answers") and not given.has("chosen"):
            return _ranked_rows(given, self.pairs)
        return [{"sft": _sft_row, "preference": _preference_row, "prompt": _prompt_row}[self.kind](given)]

    def _settle(self, given: Given, found: Row, left: list[str]) -> None:
        """Refuse, or count, what is left over of a row that was read."""
        names = given.spare
        if left:
            left = [name for name in left if not says_nothing(found[name])]
            for name in left:
                if name in SHOWN:
                    raise InputError(
                        f"{given.where}: '{name}' is {kind_of(found[name])}, which the model would have to see, "
                        "and only text is read: write it into the text, or remove the column"
                    )
            names = [*left, *names]
        if names:
            self.unused.update(dict.fromkeys(names, 1))
            self.holding += 1
        if given.told:
            self.said.update(given.told)

    def notes(self) -> Counter[str]:
        """All that is to be said: sentences with {} for their number."""
        if not self.holding:
            return self.said
        parts = [name if n == self.holding else f"{name} ({n:,})" for name, n in self.unused.items()]
        more = f" and {len(parts) - NAMED:,} more" if len(parts) > NAMED else ""
        named = f"{', '.join(parts[:NAMED])}{more}".replace("{", "{{").replace("}", "}}")
        return self.said + Counter({f"{{}} rows hold what is not used: {named}": self.holding})


# ----------------------------------------------------------------------------------------------------- kinds of row


def _sft_row(given: Given) -> Row:
    whole = "messages" in given.columns or given.has("messages")
    if whole and not ("messages" not in given.columns and given.has("prompt") and given.has("completion")):
        prompt, completion = _conversation(given)
        _prompt_beside(given, prompt)
        return {"prompt": _in_context(given, prompt), "completion": completion}
    asked = _prompt(given, *given.take("prompt"))
    return {"prompt": _in_context(given, asked), "completion": _answer(given, *given.take("completion"))}


def _preference_row(given: Given) -> Row:
    pair = [given.take(name) for name in ("chosen", "rejected")]
    talks = [_messages(given, *side, ANSWER) if _is_talk(side[1]) else [] for side in pair]
    start = talks[0][:-1]
    if start and start == talks[1][:-1]:  # two whole conversations: what they share is the prompt
        prompt: str | Messages = _not_answered(given, pair[0][0], start)
        pair = [(column, talk[-1:]) for (column, _), talk in zip(pair, talks, strict=True)]
        _prompt_beside(given, prompt)
    else:
        prompt = _prompt(given, *given.take("prompt"))
    chosen, rejected = (_answer(given, *side) for side in pair)
    if chosen == rejected:
        raise SamePair(
            f"{given.where}: chosen and rejected are the same text {short_repr(chosen)}: remove the row, it is no pair"
        )
    return {"prompt": _in_context(given, prompt), "chosen": chosen, "rejected": rejected}


def _ranked_rows(given: Given, how: str) -> list[Row]:
    """The pairs of `prompt` and ranked `answers`."""
    prompt = _in_context(given, _prompt(given, *given.take("prompt")))
    column, answers = given.take("answers")
    made, equal = layouts.pairs(given.where, {"prompt": prompt, "answers": answers}, how)
    parts = {
        name for answer in answers if isinstance(answer, dict) for name in answer if not says_nothing(answer[name])
    }
    given.spare += sorted(f"{column}.{name}" for name in parts - {"text", "rating"})
    given.told += [EQUAL] * equal
    return [_preference_row(Given(given.where, pair, given.kind, spare=given.spare, told=given.told)) for pair in made]


def _prompt_row(given: Given) -> Row:
    if "messages" in given.columns or (given.has("messages") and not given.has("prompt")):
        start, reference = _conversation(given)
        made: Row = {"prompt": start, "reference": reference}
    else:
        made = {"prompt": _prompt(given, *given.take("prompt"))}
        if "reference" in given.columns or given.row.get("reference") is not None:
            made["reference"] = _answer(given, *given.take("reference"))
    kept = {name: value for name, value in given.row.items() if name not in given.taken and name != "reference"}
    made["prompt"] = _in_context(given, made["prompt"])
    return kept | made


# ----------------------------------------------------------------------------------------------- fields of the rows


def _prompt(given: Given, column: str, value: Any) -> str | Messages:
    """A non-empty string, or messages that do not end with the assistant's."""
    if isinstance(value, str):
        return _string(given.where, column, value)
    return _not_answered(given, column, _messages(given, column, value, "a string or a list of messages"))


def _not_answered(given: Given, column: str, messages: Messages) -> Messages:
    if messages[-1]["role"] == "assistant":
        raise InputError(
            f"{given.where}: '{column}' ends with an assistant message, expected the user's: remove the last one"
        )
    return messages


def _answer(given: Given, column: str, value: Any) -> str:
    """A non-empty string, or the text of a list with a single assistant message."""
    if not isinstance(value, list):
        return _string(given.where, column, value)
    messages = _messages(given, column, value, ANSWER)
    if [message["role"] for message in messages] != ["assistant"]:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"{given.where}: '{column}' has messages of {roles}, expected a single one of assistant: keep only that"
        )
    return messages[0]["content"]


def _conversation(given: Given) -> tuple[Messages, str]:
    """(the messages before the last, the text of the last), which must be the assistant's."""
    column, value = given.take("messages")
    messages = _messages(given, column, value, "a list of messages")
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise InputError(
            f"{given.where}: '{column}' has messages of {', '.join(m['role'] for m in messages)}, expected at least two "
            "with the assistant's last: cut it after an assistant message"
        )
    return _not_answered(given, column, messages[:-1]), messages[-1]["content"]


def _prompt_beside(given: Given, prompt: str | Messages) -> None:
    """A prompt beside a conversation is used where the conversation says it, and left over where it says another."""
    column = given.column("prompt")
    if isinstance(prompt, list) and layouts.stands_in(given.row.get(column), prompt):
        given.taken.add(column)


def _in_context(given: Given, prompt: str | Messages) -> str | Messages:
    """The prompt behind the system message and the earlier turns that stand in columns of their own."""
    if not given.columns and given.row.keys().isdisjoint(BESIDE):
        return prompt
    system, history = _context(given, "system", str), _context(given, "history", list)
    if system is None and history is None:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if history is not None:
        messages = [*_turns(given, *history), *messages]
        given.told.append(HISTORY_READ)
    if system is not None:
        column, text = system
        message = {"role": "system", "content": _string(given.where, column, text)}
        said = [other["content"] for other in messages if other["role"] in SYSTEM]
        if said and said != [text]:
            raise InputError(f"{given.where}: '{column}' beside a system message in the conversation: keep one of them")
        messages = messages if said else [message, *messages]
        given.told.append(SYSTEM_READ % column.replace("{", "{{").replace("}", "}}"))
    return messages


def _context(given: Given, name: str, of: type) -> tuple[str, Any] | None:
    """(column, value) of a field that may stand beside a prompt; None where it says nothing."""
    if name in given.columns:
        column, value = given.take(name)
    else:
        columns = [
            column for column, ours in BESIDE.items() if ours == name and not says_nothing(given.row.get(column))
        ]
        if len(columns) > 1:
            raise InputError(f"{given.where}: both '{columns[0]}' and '{columns[1]}': keep one of them")
        column = next(iter(columns), name)
        value = given.row.get(column)
    if says_nothing(value) or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, of):
        if given.kind == "prompt" and name not in given.columns:
            return None  # another column, kept for reward functions
        raise InputError(f"{given.where}: '{column}' is {kind_of(value)}, expected {'text' if of is str else 'a list'}")
    given.taken.add(column)
    return column, value


def _turns(given: Given, column: str, history: list[Any]) -> Messages:
    """Earlier turns: messages, or pairs of a question and its answer."""
    if all(isinstance(turn, dict) for turn in history):
        return _messages(given, column, history, "a list of messages")
    messages = []
    for place, turn in enumerate(history):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise InputError(f"{given.where}: '{column}[{place}]' is {kind_of(turn)}, expected [question, answer]")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": _string(given.where, f"{column}[{place}]", text)})
    return messages


# --------------------------------------------------------------------------------------------------------- messages


def _is_talk(value: Any) -> bool:
    """True for several messages: a conversation, not an answer alone."""
    return isinstance(value, list) and len(value) > 1


def _messages(given: Given, column: str, value: Any, expected: str) -> Messages:
    """Messages of role and text; empty system messages are none, and are counted."""
    where = given.where
    if not isinstance(value, list):
        raise InputError(f"{where}: '{column}' is {kind_of(value)}, expected {expected}")
    if not value:
        raise EmptyText(f"{where}: '{column}' is an empty list, expected {expected}: remove the row")
    messages = []
    for index, message in enumerate(value):
        place = f"{column}[{index}]"
        if isinstance(message, dict) and len(message) > 2:
            _others(given, column, place, message, index == len(value) - 1)
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise InputError(f'{where}: \'{place}\' is {kind_of(message)}, expected {{"role": ..., "content": ...}}')
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise InputError(f"{where}: '{place}.role' is {kind_of(role)}, expected one of {', '.join(ROLES)}")
        if isinstance(content, list):
            content = _joined(given, column, f"{place}.content", content)
        if role in SYSTEM and (content is None or (isinstance(content, str) and not content.strip())):
            given.told.append(EMPTY_SYSTEM)
            continue
        messages.append({"role": role, "content": _string(where, f"{place}.content", content)})
    if not messages:
        raise EmptyText(f"{where}: '{column}' has only empty system messages, expected {expected}: remove the row")
    return messages


def _others(given: Given, column: str, place: str, message: Row, last: bool) -> None:
    """What a message holds beside role and content: refused where the model would have to see it, else left over."""
    for name, value in message.items():
        if name in ("role", "content") or says_nothing(value):
            continue
        if name in SPOKEN and value is not False:
            raise InputError(
                f"{given.where}: '{place}.{name}' is {kind_of(value)}, which is not trained on: "
                "write it into the content, or remove it"
            )
        if name in WEIGHTS and last and value in (0, False):
            raise InputError(
                f"{given.where}: '{place}.{name}' is {value}, and the last answer is the one trained on: remove the row"
            )
        given.spare.append(f"{column}.{name}")


def _joined(given: Given, column: str, place: str, parts: list[Any]) -> str:
    """The text of content that is a list of parts, {"type": "text", "text": ...} each."""
    texts = []
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            found = f"a part of type {part.get('type')!r:.40}" if isinstance(part, dict) else kind_of(part)
            raise InputError(
                f"{given.where}: '{place}[{index}]' is {found}, "
                'expected {"type": "text", "text": ...}: only text is read'
            )
        texts.append(part["text"])
        others = [name for name, value in part.items() if name not in ("type", "text") and not says_nothing(value)]
        given.spare += [f"{column}.content.{name}" for name in others]
    return "".join(texts)


def _string(where: str, column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: '{column}' is {kind_of(value)}, expected a string: write it as text")
    if not value.isascii() and HALF.search(value):  # no tokenizer takes it
        raise HalfCharacter(
            f"{where}: '{column}' has half a character, {short_repr(value)}: write the file again as UTF-8"
        )
    if not value.strip():
        raise EmptyText(f"{where}: '{column}' is an empty string, expected text: fill it in or remove the row")
    return value
