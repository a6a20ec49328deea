"""The report card at the end of the reward stage: the held-out pairs, and the same pairs with their texts changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from alignkit.config.stages import Reward
from alignkit.core.types import Rows
from alignkit.data import tokens
from alignkit.report import card as report_card
from alignkit.report import card_html
from alignkit.tracking.run_log import RunLog
from alignkit.training.engine import World

PAIRS = 128  # that are scored again with changed texts: agreement to within some 5 %, for a few seconds

Scores = tuple[torch.Tensor, torch.Tensor]


def write(
    cfg: Reward,
    scored: Scores,
    rows: Rows,
    tokenizer: Any,
    score: Callable[[list], Scores],
    world: World,
    log: RunLog,
) -> None:
    """Score the changed texts on every rank; rank 0 writes report_card.json and report.html.

    Args:
        scored: raw scores of the chosen and the rejected responses, ([N], [N]).
        rows: the held-out rows, of which N are no longer than `max_length`.
        score: pairs {"chosen_ids", "rejected_ids"} -> their raw scores; every rank calls it alike.
    """
    kept = [row for row in rows if max(len(ids) for ids in encode(tokenizer, row).values()) <= cfg.max_length]
    long, other = (
        [len(tokens.encode_response(tokenizer, row[side])) for row in kept] for side in ("chosen", "rejected")
    )
    variants = {
        name: score([encode(tokenizer, change(row)) for row in kept[:PAIRS]]) for name, change in CHANGES.items()
    }
    if world.rank == 0:
        card = report_card.report_card(*scored, long, other, variants)
        card_html.write(cfg.run_dir, card)
        log.note(f"report card: {card_html.verdict(card)}")


def encode(tokenizer: Any, row: dict) -> dict[str, list[int]]:
    """A pair as `tokens.preference_dataset` has it."""
    prompt = tokens.encode_prompt(tokenizer, row["prompt"])
    return {f"{side}_ids": prompt + tokens.encode_response(tokenizer, row[side]) for side in ("chosen", "rejected")}


def _answers(end: str) -> Callable[[dict], dict]:
    return lambda row: row | {side: row[side] + end for side in ("chosen", "rejected")}


def _prompt(form: str) -> Callable[[dict], dict]:
    """The last message of the prompt in another form, whoever spoke it."""

    def change(row: dict) -> dict:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return row | {"prompt": form.format(prompt)}
        return row | {"prompt": [*prompt[:-1], prompt[-1] | {"content": form.format(prompt[-1]["content"])}]}

    return change


# What changes neither what was asked nor what was answered.
CHANGES = {
    "a space after the answers": _answers(" "),
    "a newline after the answers": _answers("\n"),
    "newlines around the prompt": _prompt("\n{}\n"),
    "the prompt as a question": _prompt("Question: {}"),
    "the prompt introduced": _prompt("Please reply to this message.\n\n{}"),
}
