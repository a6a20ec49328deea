"""Rows of well-known public layouts as rows of ours: pure functions of one row, and how a layout is recognised.

    hh_rlhf        chosen, rejected: transcripts of "\\n\\nHuman: ..." and "\\n\\nAssistant: ..."
    ultrafeedback  prompt, chosen, rejected as messages; or instruction, completions with their ratings
    tldr           info (subreddit, title, post), summaries (two texts), choice (0 or 1)
    alpaca         instruction, input, output
    sharegpt       conversations of {"from": human | gpt | system, "value": ...}; optionally chosen, rejected

What comes out has the fields of `alignkit/data.py`, which checks them as it checks any row. Answers that carry a rating
come out as `answers`, best first; `pairs` makes the preference pairs of them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

from alignkit.types import InputError

Row = dict[str, Any]

TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")
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


def recognise(where: str, row: Row, kind: str) -> str:
    """The name of the layout that a row has, or "none" where it has our own fields or no known ones.

    Raises:
        InputError: it has the marks of two layouts, or reading it as it stands would train on whole transcripts.
    """
    transcripts = _is_transcript(row.get("chosen")) and _is_transcript(row.get("rejected"))
    if any(fields <= row.keys() for fields in OWN[kind]):
        if transcripts and kind == "preference":
            raise InputError(
                f"{where}: 'chosen' and 'rejected' are whole transcripts (Human: ... Assistant: ...) beside a 'prompt': "
                "set data.preset=hh_rlhf to split them, or data.preset=none to take them as answers"
            )
        return "none"
    found = [name for name, marks in MARKS.items() if marks(row)]
    if len(found) > 1:
        raise InputError(f"{where}: the fields {', '.join(row)} fit {' and '.join(found)}: {ADVICE}")
    return found[0] if found else "none"


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def _has(row: Row, **types: Any) -> bool:
    return all(isinstance(row.get(name), of) for name, of in types.items())


def _is_ultrafeedback(row: Row) -> bool:
    rated = _has(row, instruction=str, completions=list)
    return rated or _has(row, prompt=str, chosen=list, rejected=list)


MARKS: dict[str, Callable[[Row], bool]] = {
    "hh_rlhf": lambda row: _is_transcript(row.get("chosen")) and _is_transcript(row.get("rejected")),
    "ultrafeedback": _is_ultrafeedback,
    "tldr": lambda row: _has(row, info=dict, summaries=list, choice=int),
    "alpaca": lambda row: _has(row, instruction=str, input=(str, type(None)), output=str),
    "sharegpt": lambda row: _has(row, conversations=list),
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
        title = f"SUBREDDIT: r/{info.get('subreddit')}\n\nTITLE: {info.get('title')}\n\n"
        prompt = f"{title}POST: {info['post'].strip()}\n\nTL;DR:"
    elif info.get("article"):
        prompt = f"Article:\n{info['article'].strip()}\n\nTL;DR:"
    else:
        raise InputError(f"{where}: 'info' has no text under post or article: fill it in or remove the row")
    texts = [s["text"].strip() if isinstance(s.get("text"), str) else s.get("text") for s in summaries]
    return _pair(prompt, texts[choice], texts[1 - choice])


def alpaca(where: str, row: Row) -> Row:
    """Alpaca's instructions: the input, where there is one, follows the instruction after an empty line."""
    instruction, context = _get(where, row, "instruction", str), row.get("input") or ""
    if not isinstance(context, str):
        raise InputError(f"{where}: 'input' is {type(context).__name__}, expected a string: write it as text")
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    return {"prompt": prompt, "completion": _get(where, row, "output", str)}


def sharegpt(where: str, row: Row) -> Row:
    """ShareGPT's conversations; with `chosen` and `rejected` beside, those answer the conversation."""
    messages = [
        _message(where, f"conversations[{place}]", turn)
        for place, turn in enumerate(_get(where, row, "conversations", list))
    ]
    if "chosen" in row and "rejected" in row:
        return _pair(messages, *([_message(where, name, row[name])] for name in ("chosen", "rejected")))
    return {"messages": messages}


def _message(where: str, place: str, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict) or turn.get("from") not in SENDERS or "value" not in turn:
        raise InputError(
            f'{where}: \'{place}\' is {turn!r:.60}, expected {{"from": ..., "value": ...}} with from one of {", ".join(SENDERS)}'
        )
    return {"role": SENDERS[turn["from"]], "content": turn["value"]}


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
    "sharegpt": sharegpt,
}


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
    if "answers" in row:
        best = _ranked(where, row["answers"])[0][1]
        row = {"prompt": row["prompt"], "chosen": best}
    if "chosen" in row:
        answer = {"completion": row["chosen"]} if kind == "sft" else {}
        return {"prompt": row["prompt"], **answer}
    if kind == "prompt" and "completion" in row:
        return {"prompt": row["prompt"], "reference": row["completion"]}
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
