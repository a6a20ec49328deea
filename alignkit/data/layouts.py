"""Rows of well-known public layouts as rows of ours: pure functions of one row, and how a layout is recognised.

    hh_rlhf        chosen, rejected: transcripts of "\\n\\nHuman: ..." and "\\n\\nAssistant: ..."
    ultrafeedback  prompt, chosen, rejected as messages; or instruction, completions with their ratings
    tldr           info (subreddit, title, post), summaries (two texts), choice (0 or 1)
    alpaca         instruction, input, output; optionally system, and history of [question, answer]
    dolly          instruction, context, response
    openorca       system_prompt, question, response
    sharegpt       conversations (or conversation) of {"from": human | gpt | system, "value": ...}, or of role and
                   content; optionally system, and chosen, rejected

What comes out has the fields of `alignkit/data/rows.py`, which checks them as it checks any row. Answers that carry a rating
come out as `answers`, best first; `pairs` makes the preference pairs of them. White space around the turns of a
transcript and around summaries belongs to the layout, and is left out.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from alignkit.core.errors import InputError
from alignkit.data.files import says_nothing

Row = dict[str, Any]

TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")
OTHERS = re.compile(r"\n\n(System|User|Tool|Observation|AI|Bot|Human \d+|Assistant \d+):")  # no speakers of these
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
SENDERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation"), "tool"),
    "system": "system",
}
# What a row of each kind has under our own names: any of these sets is enough.
OWN = {
    "sft": ({"prompt", "completion"}, {"messages"}),
    "preference": ({"prompt", "chosen", "rejected"}, {"prompt", "answers"}),
    "prompt": ({"prompt"}, {"messages"}),
}
ADVICE = "set data.preset to the one it is, or data.preset=none for rows in our own fields"


# ------------------------------------------------------------------------------------------------------- recognition


def recognise(rows: Iterable[tuple[str, Row]], kind: str) -> str:
    """The name of the layout that most of these rows have, or "none" where that is our own fields or no known ones.

    Raises:
        InputError: most have the marks of two layouts, or would train on whole transcripts as they stand.
    """
    votes: Counter[str] = Counter()
    fault: InputError | None = None
    for where, row in rows:
        try:
            name = _layout(where, row, kind)
        except InputError as error:
            name, fault = "refused", fault or error
        if name:
            votes[name] += 1
    most = max(votes, key=votes.__getitem__, default="none")  # of equals the first
    if most == "refused" and fault is not None:
        raise fault
    return most


def _layout(where: str, row: Row, kind: str) -> str | None:
    """The layout that one row has, "none" where it has our own fields, None where it has no known ones."""
    transcripts = _is_transcript(row.get("chosen")) and _is_transcript(row.get("rejected"))
    senders = _has_senders(row.get("messages"))
    if any(all(row.get(name) is not None for name in fields) for fields in OWN[kind]) and not senders:
        if transcripts and kind == "preference":
            raise InputError(
                f"{where}: 'chosen' and 'rejected' are whole transcripts (Human: ... Assistant: ...) beside a 'prompt': "
                "set data.preset=hh_rlhf to split them, or data.preset=none to take them as answers"
            )
        return "none"
    found = [name for name, marks in MARKS.items() if marks(row)]
    if len(found) > 1:
        raise InputError(f"{where}: the fields {', '.join(row)} fit {' and '.join(found)}: {ADVICE}")
    return found[0] if found else None


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def _has(row: Row, **types: Any) -> bool:
    return all(isinstance(row.get(name), of) for name, of in types.items())


def _has_senders(turns: Any) -> bool:
    """True for turns of {"from": ..., "value": ...}."""
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and turns[0].get("from") is not None


def _turns_column(row: Row) -> str:
    """The column of a ShareGPT row's turns."""
    names = (name for name in ("conversations", "conversation") if isinstance(row.get(name), list))
    return next(names, "messages" if _has_senders(row.get("messages")) else "conversations")


def _is_ultrafeedback(row: Row) -> bool:
    rated = _has(row, instruction=str, completions=list)
    return rated or _has(row, prompt=str, chosen=list, rejected=list)


MARKS: dict[str, Callable[[Row], bool]] = {
    "hh_rlhf": lambda row: _is_transcript(row.get("chosen")) and _is_transcript(row.get("rejected")),
    "ultrafeedback": _is_ultrafeedback,
    "tldr": lambda row: _has(row, info=dict, summaries=list, choice=int),
    "alpaca": lambda row: _has(row, instruction=str, input=(str, type(None)), output=str),
    "dolly": lambda row: _has(row, instruction=str, context=(str, type(None)), response=str),
    "openorca": lambda row: (
        _has(row, system_prompt=(str, type(None)), question=str, response=str) and "system_prompt" in row
    ),
    "sharegpt": lambda row: _has(row, **{_turns_column(row): list}),
}


# ------------------------------------------------------------------------------------------------------- the layouts


def hh_rlhf(where: str, row: Row) -> Row:
    """Anthropic's helpful-harmless comparisons (arXiv 2204.05862): both transcripts share all but their last answer."""
    chosen, rejected = (_turns(where, name, _get(where, row, name, str)) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise InputError(
            f"{where}: 'chosen' and 'rejected' differ before their last answer, so they are no pair: remove the row"
        )
    return _pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _turns(where: str, name: str, text: str) -> list[dict[str, str]]:
    """A transcript as messages; the last one is the assistant's."""
    before, *parts = TURN.split("\n\n" + text.lstrip())
    speakers, texts = parts[::2], parts[1::2]
    if before.strip() or len(speakers) < 2 or speakers[0] != "Human" or speakers[-1] != "Assistant":
        raise InputError(
            f"{where}: '{name}' is no transcript: expected '\\n\\nHuman: ...' first and '\\n\\nAssistant: ...' last"
        )
    if other := OTHERS.search(text):
        raise InputError(
            f"{where}: '{name}' has a turn of {other[1]}, expected only Human and Assistant: write the row as messages"
        )
    return [{"role": SPEAKERS[s], "content": t.strip()} for s, t in zip(speakers, texts, strict=True)]


def ultrafeedback(where: str, row: Row) -> Row:
    """UltraFeedback (arXiv 2310.01377), binarised (chosen and rejected as messages) or with its rated completions."""
    if "completions" in row:
        prompt = _get(where, row, "instruction", str)
        rated = [
            {"text": item.get("response"), "rating": _overall(where, place, item)}
            for place, item in enumerate(_get(where, row, "completions", list))
        ]
        return {"prompt": prompt, "answers": rated}
    chosen, rejected = (_get(where, row, name, list) for name in ("chosen", "rejected"))
    if not chosen or not rejected or chosen[:-1] != rejected[:-1]:
        raise InputError(
            f"{where}: 'chosen' and 'rejected' have no common beginning, so they are no pair: remove the row"
        )
    if len(chosen) == 1:
        return _pair(_get(where, row, "prompt", str), chosen, rejected)
    return _pair(chosen[:-1], chosen[-1:], rejected[-1:])


def _overall(where: str, place: int, item: Any) -> float:
    """The rating of a completion: `fine-grained_score`, the mean over its aspects, else the judge's `overall_score`."""
    for name in ("fine-grained_score", "overall_score"):
        value = item.get(name) if isinstance(item, dict) else None
        try:
            if value is not None:
                return float(value)
        except (TypeError, ValueError):
            raise InputError(f"{where}: 'completions[{place}].{name}' is {value!r}, expected a number") from None
    raise InputError(
        f"{where}: 'completions[{place}]' has neither fine-grained_score nor overall_score: rate it or remove it"
    )


def tldr(where: str, row: Row) -> Row:
    """Comparisons of summaries (arXiv 2009.01325), the post laid out as there; news articles as `Article:`."""
    info, summaries = _get(where, row, "info", dict), _get(where, row, "summaries", list)
    choice = _get(where, row, "choice", int)
    if len(summaries) != 2 or choice not in (0, 1) or not all(isinstance(s, dict) for s in summaries):
        raise InputError(
            f"{where}: {len(summaries)} summaries and choice {choice}: expected two, and the choice 0 or 1"
        )
    if info.get("post"):
        subreddit, title, post = (_get(where, info, name, str) for name in ("subreddit", "title", "post"))
        prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post.strip()}\n\nTL;DR:"
    elif info.get("article"):
        prompt = f"Article:\n{_get(where, info, 'article', str).strip()}\n\nTL;DR:"
    else:
        raise InputError(f"{where}: 'info' has no text under post or article: fill it in or remove the row")
    texts = [s["text"].strip() if isinstance(s.get("text"), str) else s.get("text") for s in summaries]
    return _pair(prompt, texts[choice], texts[1 - choice])


def alpaca(where: str, row: Row) -> Row:
    """Alpaca's instructions: the input, where there is one, follows the instruction after an empty line."""
    return _instruction(where, row, "instruction", "input", "output") | _beside(row, system="system", history="history")


def dolly(where: str, row: Row) -> Row:
    """Dolly's instructions: the context, where there is one, follows the instruction after an empty line."""
    return _instruction(where, row, "instruction", "context", "response")


def openorca(where: str, row: Row) -> Row:
    """OpenOrca's questions, with the system message that each was answered under."""
    return _instruction(where, row, "question", "", "response") | _beside(row, system="system_prompt")


def _instruction(where: str, row: Row, asks: str, context: str, answers: str) -> Row:
    """A question, what it is about, and its answer, by the names of their columns."""
    prompt, about = _get(where, row, asks, str), row.get(context)
    if about is not None and not isinstance(about, str):
        raise InputError(f"{where}: '{context}' is {type(about).__name__}, expected a string: write it as text")
    if about and about.strip():
        prompt = f"{prompt}\n\n{about}"
    return {"prompt": prompt, "completion": _get(where, row, answers, str)}


def _beside(row: Row, **fields: str) -> Row:
    """{our field: what its column says}, of the columns that say something."""
    return {name: row[column] for name, column in fields.items() if not says_nothing(row.get(column))}


def sharegpt(where: str, row: Row) -> Row:
    """ShareGPT's conversations; with `chosen` and `rejected` beside, those answer the conversation."""
    column = _turns_column(row)
    messages = [
        _message(where, f"{column}[{place}]", turn) for place, turn in enumerate(_get(where, row, column, list))
    ]
    beside = _beside(row, system="system")
    if not says_nothing(row.get("chosen")) and not says_nothing(row.get("rejected")):
        chosen, rejected = ([_message(where, name, row[name])] for name in ("chosen", "rejected"))
        return _pair(messages, chosen, rejected) | beside
    return {"messages": messages} | beside


def _message(where: str, place: str, turn: Any) -> dict[str, Any]:
    """A turn as a message; what else it holds stays in it, to be judged with any message's."""
    if not isinstance(turn, dict):
        turn = {"": turn}
    if turn.get("from") is None and "role" in turn and "content" in turn:
        return {name: value for name, value in turn.items() if name not in ("from", "value") or value is not None}
    sender = turn.get("from")
    if not isinstance(sender, str) or sender not in SENDERS or "value" not in turn:
        raise InputError(
            f'{where}: \'{place}\' is {turn.get("", turn)!r:.60}, expected {{"from": ..., "value": ...}} '
            f"with from one of {', '.join(SENDERS)}"
        )
    others = {name: value for name, value in turn.items() if name not in ("from", "value")}
    if not says_nothing(others.get("role")) or not says_nothing(others.get("content")):
        raise InputError(f"{where}: '{place}' has both 'from' and 'role' or 'content': keep one of the two forms")
    return {**others, "role": SENDERS[sender], "content": turn["value"]}


def _get(where: str, row: Row, name: str, of: type) -> Any:
    if isinstance(row.get(name), of):
        return row[name]
    found = f"is {type(row[name]).__name__}" if name in row else f"is not among {', '.join(row) or 'none'}"
    raise InputError(f"{where}: '{name}' {found}, expected {of.__name__}: correct the row, or data.preset")


def _pair(prompt: Any, chosen: Any, rejected: Any) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


PRESETS: dict[str, Callable[[str, Row], Row]] = {
    "hh_rlhf": hh_rlhf,
    "ultrafeedback": ultrafeedback,
    "tldr": tldr,
    "alpaca": alpaca,
    "dolly": dolly,
    "openorca": openorca,
    "sharegpt": sharegpt,
}
# The columns that each of them always reads; see `used`.
COLUMNS: dict[str, tuple[str, ...]] = {
    "hh_rlhf": ("chosen", "rejected"),
    "ultrafeedback": ("instruction", "completions"),
    "tldr": ("info", "summaries", "choice"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "dolly": ("instruction", "context", "response"),
    "openorca": ("system_prompt", "question", "response"),
    "sharegpt": ("system", "chosen", "rejected"),
}


def used(preset: str, row: Row) -> set[str]:
    """The columns of a row that a preset reads, or that say again what those say."""
    found = set(COLUMNS[preset])
    if preset == "sharegpt":
        found.add(_turns_column(row))
    if preset == "ultrafeedback" and "completions" not in row:
        found = {"chosen", "rejected"}
        if len(row["chosen"]) == 1 or stands_in(row.get("prompt"), row["chosen"]):
            found.add("prompt")
    return found


def stands_in(prompt: Any, messages: list[Any]) -> bool:
    """True where a conversation says what a prompt beside it says."""
    if isinstance(prompt, list):
        return prompt == messages[: len(prompt)]
    return any(isinstance(message, dict) and message.get("content") == prompt for message in messages)


# -------------------------------------------------------------------------------------------------- for another kind


def as_kind(where: str, row: Row, kind: str) -> Row:
    """A row of a preset for a stage that reads `kind`: the best answer as a completion, or the prompt alone.

    Raises:
        InputError: pairs are wanted of a layout that has single answers.
    """
    if kind == "preference":
        if "completion" in row or "messages" in row:
            raise InputError(
                f"{where}: this layout has one answer a prompt, and a pair needs two: give preference data"
            )
        return row
    others = {name: value for name, value in row.items() if name not in ("chosen", "rejected", "answers", "completion")}
    if "answers" in row:
        row = {"chosen": _ranked(where, row["answers"])[0][1]}
    if "chosen" in row:
        return others | ({"completion": row["chosen"]} if kind == "sft" else {})
    if kind == "prompt" and "completion" in row:
        return others | {"reference": row["completion"]}
    return row


# ---------------------------------------------------------------------------------------------------- ranked answers


def pairs(where: str, row: Row, how: str) -> tuple[list[Row], int]:
    """(preference rows of `prompt` and `answers`, how many pairs were equal in rating or in text and make none).

    Args:
        row: `answers` is a list of texts, best first, or of {"text", "rating"} in any order.
        how: "all" pairs, or "best_worst": the best with the worst.

    Raises:
        InputError: fewer than two answers, or an answer without text or rating.
    """
    ranked = _ranked(where, row["answers"])
    if len(ranked) < 2:
        raise InputError(f"{where}: 'answers' has {len(ranked)}, a pair needs two: add one or remove the row")
    chosen = [(ranked[0], ranked[-1])] if how == "best_worst" else list(itertools.combinations(ranked, 2))
    made = [
        _pair(row["prompt"], better, worse) for (high, better), (low, worse) in chosen if high > low and better != worse
    ]
    return made, len(chosen) - len(made)


def _ranked(where: str, answers: Any) -> list[tuple[float, Any]]:
    """[(rating, text)], the best first; texts without ratings are rated by their place."""
    if not isinstance(answers, list) or not answers:
        raise InputError(
            f"{where}: 'answers' is {answers!r:.60}, expected a list of texts, best first, or of text and rating"
        )
    if all(isinstance(answer, str) for answer in answers):
        return [(-float(place), text) for place, text in enumerate(answers)]
    for place, answer in enumerate(answers):
        rating = answer.get("rating") if isinstance(answer, dict) else None
        if isinstance(rating, bool) or not isinstance(rating, (int, float)) or not math.isfinite(rating):
            raise InputError(
                f"{where}: 'answers[{place}]' is {answer!r:.60}, expected a text as all the others, "
                'or {"text": ..., "rating": a number}'
            )
    return sorted(((float(a["rating"]), a.get("text")) for a in answers), key=lambda item: -item[0])
