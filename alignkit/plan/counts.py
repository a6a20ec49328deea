"""What a stage will work through, before it runs: rows, tokens, sequences, micro-batches, optimizer steps.

Rows are tokenised as the stage does it, by `tokens.encode_prompt` and `encode_response`, on the `tokenizers` library
alone: no torch. Above SAMPLE rows, so many of them are tokenised, evenly spread, and what follows from them is marked
as an estimate (`Rows.exact`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError
from alignkit.data import chat, tokens

SAMPLE = 5000  # rows that are tokenised at most: under a second


class PlainTokenizer:
    """What `tokens.encode_prompt` and `encode_response` ask of a tokenizer, from `tokenizer.json`, without transformers.

    Raises:
        InputError: the folder has no tokenizer.json, or no end token.
    """

    def __init__(self, folder: str, chat_template: str | None = None, template_date: str | None = None) -> None:
        from tokenizers import Tokenizer

        root = Path(folder)
        if not (root / "tokenizer.json").is_file():
            raise InputError(
                f"{folder} has no tokenizer.json on this machine, so rows are counted but not their tokens"
            )
        self.name_or_path = folder
        self.backend = Tokenizer.from_file(str(root / "tokenizer.json"))
        self.backend.no_truncation()
        self.backend.no_padding()
        self.special_tokens_map = dict(chat.special_tokens(root))
        self.bos_token_id, self.eos_token_id = (
            self.backend.token_to_id(self.special_tokens_map.get(key, "")) for key in ("bos_token", "eos_token")
        )
        if self.eos_token_id is None:
            raise InputError(f"{folder}: the tokenizer has no eos_token: set it in tokenizer_config.json")
        template = chat.template_of(root, chat_template, template_date)
        self.chat_template = None if template is None else template.text
        day = None if template is None else template.date or date.today().isoformat()  # only lengths are taken
        self.init_kwargs = {chat.DATE: day}

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        @dataclass
        class Encoded:
            input_ids: list[int]

        return Encoded(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)


@dataclass
class Rows:
    """Rows of one data set after filtering, and their lengths in tokens."""

    read: int
    kept: int  # estimated where not `exact`
    lengths: list[int] = field(default_factory=list)  # of the kept rows that were tokenised; pairs: chosen and rejected
    answers: int = 0  # tokens of the answers in `lengths`
    exact: bool = True  # every row was tokenised
    tokenised: bool = True  # there was a tokenizer

    @property
    def mean(self) -> float:
        return sum(self.lengths) / max(1, len(self.lengths))

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)


def measure(rows: Any, tokenizer: Any, limit: int, length: Callable[[Any, dict], list[tuple[int, int]]]) -> Rows:
    """Rows no longer than `limit` tokens, by `length(tokenizer, row)`: (tokens of prompt, of answer) a sequence of the row."""
    if tokenizer is None:
        return Rows(len(rows), len(rows), exact=False, tokenised=False)
    step = max(1, math.ceil(len(rows) / SAMPLE))
    found = [length(tokenizer, row) for row in rows[::step]]
    kept = [each for each in found if max(map(sum, each)) <= limit]
    share = len(kept) / max(1, len(found))
    lengths = [sum(n) for each in kept for n in each]
    answers = sum(answer for each in kept for _, answer in each)
    return Rows(len(rows), len(kept) if step == 1 else round(share * len(rows)), lengths, answers, exact=step == 1)


def sft_length(tokenizer: Any, row: dict) -> list[tuple[int, int]]:
    """Of prompt, of completion and end."""
    return [(_prompt(tokenizer, row), len(tokens.encode_response(tokenizer, row["completion"])))]


def pair_length(tokenizer: Any, row: dict) -> list[tuple[int, int]]:
    """With the chosen and with the rejected answer."""
    prompt = _prompt(tokenizer, row)
    return [(prompt, len(tokens.encode_response(tokenizer, row[side]))) for side in ("chosen", "rejected")]


def prompt_length(tokenizer: Any, row: dict) -> list[tuple[int, int]]:
    """Of the prompt alone."""
    return [(_prompt(tokenizer, row), 0)]


def _prompt(tokenizer: Any, row: dict) -> int:
    return len(tokens.encode_prompt(tokenizer, row["prompt"]))


@dataclass
class Work:
    """The arithmetic of a stage."""

    rows: Rows
    held_out: Rows | None
    steps: int  # as the stage's progress counts them
    sequences: int  # forwarded for training, or answered, over all ranks; a pair is two
    optimizer_steps: int
    micro_batches: int  # of an optimizer step, on a rank; where rows are grouped by length: at least
    tokens: float  # of prompts and responses over the whole stage, all ranks; what is sampled at its longest
    response_tokens: float  # of them
    exact: bool  # the tokens are those the run will log
    length: float  # mean row
    longest: int  # longest row; where no tokenizer is at hand, the limit
    slots: int  # response slots of what is sampled
    lines: list[str] = field(default_factory=list)  # the arithmetic in words


def trained(cfg: Any, tokenizer: Any, planned: int | None) -> Work:
    """SFT and reward, as transformers' Trainer counts them (5.x): the last batch of an epoch may be smaller."""
    length = sft_length if cfg.stage == "sft" else pair_length
    if planned is None:
        rows, held_out = tokens.split_by_prompt(
            cfg.data.rows(cfg.row_kind), 0.0 if cfg.eval_data.path else cfg.eval_fraction, cfg.seed
        )
        held_out = cfg.eval_data.rows(cfg.row_kind) if cfg.eval_data.path else held_out
        kept = measure(rows, tokenizer, cfg.max_length, length)
    else:  # an earlier stage of the pipeline will write them
        training = planned - round(cfg.eval_fraction * planned)
        kept, held_out = Rows(training, training, exact=False, tokenised=False), []
    ranks, micro = cfg.launcher.num_ranks, cfg.micro_batch_size
    accumulation = cfg.mini_batch_size // (micro * ranks)
    batches = math.ceil(kept.kept / (micro * ranks))  # of an epoch, a rank
    per_epoch = max(1, math.ceil(batches / accumulation))
    steps = cfg.max_steps if cfg.max_steps > 0 else math.ceil(cfg.epochs * per_epoch)
    epochs = steps / per_epoch
    sides, unit = (2, "pairs") if cfg.stage == "reward" else (1, "rows")
    sequences = round(kept.kept * epochs) * sides
    whole = epochs == int(epochs)
    full = kept.kept % (micro * ranks) == 0 or ranks == 1  # else accelerate repeats rows, so that ranks have as many
    answer = kept.answers / max(1, len(kept.lengths))
    lines = [
        f"an optimizer step: {cfg.mini_batch_size} {unit} = {ranks} rank{'s' * (ranks > 1)} x {accumulation} "
        f"micro-batch{'es' * (accumulation > 1)} x {micro} {unit}",
        f"an epoch: {kept.kept} {unit} / {cfg.mini_batch_size} -> {per_epoch} optimizer steps"
        + (
            f", the last one smaller ({kept.kept % cfg.mini_batch_size} {unit})"
            if kept.kept % cfg.mini_batch_size
            else ""
        ),
        f"{steps} optimizer steps"
        + (f" (max_steps={cfg.max_steps})" if cfg.max_steps > 0 else f" = {cfg.epochs:g} x {per_epoch}"),
    ]
    return Work(
        kept, measure(held_out, tokenizer, cfg.max_length, length) if held_out else None, steps, sequences, steps,
        accumulation, sum(kept.lengths) * epochs if kept.exact else kept.mean * sequences, answer * sequences, kept.exact and whole and full,
        kept.mean, kept.longest or cfg.max_length, 0, lines,
    )  # fmt: skip


def drawn_prompts(rows: Rows, count: int, seed: int) -> float:
    """Tokens of the prompts that a run draws: `count` of them in the order of `tokens.PromptSampler`."""
    if not rows.lengths:
        return 0
    if not rows.exact:
        return rows.mean * count
    return sum(rows.lengths[i] for i in tokens.PromptSampler(rows.kept, seed).next(count))


def ppo(cfg: Any, tokenizer: Any) -> Work:
    """PPO: rounds of rollouts, each used in epochs of optimizer steps."""
    rows = measure(cfg.data.rows("prompt"), tokenizer, cfg.max_prompt_length, prompt_length)
    ranks, rollouts, mini, epochs = (
        cfg.launcher.num_ranks, cfg.rollout_batch_size, cfg.mini_batch_size, cfg.algorithm.ppo_epochs,
    )  # fmt: skip
    prompts, per_round = rollouts // cfg.group_size, rollouts // mini * epochs
    micro_batches = math.ceil(mini / ranks / cfg.micro_batch_size)
    drawn = drawn_prompts(rows, prompts * cfg.steps, cfg.seed) * cfg.group_size
    lines = [
        f"a round: {prompts} prompts x {cfg.group_size} response{'s' * (cfg.group_size > 1)} = {rollouts} sequences, "
        f"{rollouts // ranks} a rank on {ranks} rank{'s' * (ranks > 1)}",
        f"an update: {rollouts} / {mini} x {epochs} epoch{'s' * (epochs > 1)} = {per_round} optimizer steps"
        + (", or fewer: algorithm.target_kl may end it" if cfg.algorithm.target_kl is not None else ""),
        f"an optimizer step: {mini} sequences = {ranks} rank{'s' * (ranks > 1)} x at least {micro_batches} "
        f"micro-batch{'es' * (micro_batches > 1)} of at most {cfg.micro_batch_size} (rows of like length go together)",
        f"the run: {cfg.steps} rounds = {cfg.steps * prompts} prompts = {cfg.steps * rollouts} sequences = "
        f"{cfg.steps * per_round} optimizer steps",
    ]
    sequences = cfg.steps * rollouts
    slots = cfg.rollout.max_new_tokens
    return Work(
        rows, None, cfg.steps, sequences, cfg.steps * per_round, micro_batches, drawn + sequences * slots,
        sequences * slots, rows.exact and cfg.rollout.min_tokens == slots, drawn / sequences + slots,
        (rows.longest or cfg.max_prompt_length) + slots, slots, lines,
    )  # fmt: skip


def answered(cfg: Any, tokenizer: Any) -> Work:
    """Sample and evaluate: every prompt is answered `group_size` times, by every policy."""
    rows = measure(cfg.data.rows("prompt"), tokenizer, cfg.max_prompt_length, prompt_length)
    policies = len(getattr(cfg, "policies", {})) or 1
    each, slots = rows.kept * cfg.group_size, cfg.rollout.max_new_tokens
    line = f"{rows.kept} prompts x {cfg.group_size} answer{'s' * (cfg.group_size > 1)}"
    line += f" x {policies} policies" if policies > 1 else ""
    return Work(
        rows, None, policies if cfg.stage == "evaluate" else rows.kept, each * policies, 0, 0,
        (rows.mean + slots) * each * policies, slots * each * policies, rows.exact and cfg.rollout.min_tokens == slots,
        rows.mean + slots, (rows.longest or cfg.max_prompt_length) + slots, slots,
        [f"{line} = {each * policies} sequences"],
    )  # fmt: skip


def count(cfg: Any, tokenizer: Any, planned: int | None = None) -> Work:
    """The work of a stage.

    Args:
        tokenizer: None: rows are counted, their tokens are not.
        planned: how many rows there will be at most, where another stage writes them first.
    """
    if cfg.stage in ("sft", "reward"):
        return trained(cfg, tokenizer, planned)
    return ppo(cfg, tokenizer) if cfg.stage == "ppo" else answered(cfg, tokenizer)
