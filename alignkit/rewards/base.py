"""What rewards are started with, and how several become one score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignkit.core.types import ModelSource, Rollouts, ScoredRollouts
from alignkit.models.config import Model
from alignkit.rewards.signature import Batch, as_numbers

if TYPE_CHECKING:
    from torch import Tensor

Scorer = Callable[[Rollouts], "Tensor"]


@dataclass
class Context:
    """What a reward may use."""

    tokenizer: Any
    model: Model | None = None  # how a learned reward is held, where it is loaded by itself
    resolve: Callable[[str], ModelSource] | None = None  # a run's folder -> its weights
    device: Any = "cpu"


def text_scorer(context: Context, function: Callable[[list, list[str], list[dict]], list[float]], name: str) -> Scorer:
    """A function of texts as a function of rollouts. Responses are decoded without special tokens.

    Raises (when called):
        RunError: the function returns another number of scores than responses, or one that is no finite number.
    """
    return batch_scorer(
        context, lambda batch: as_numbers(function(batch.prompts, batch.responses, batch.meta), batch, name)
    )


def batch_scorer(context: Context, function: Callable[[Batch], list[float]]) -> Scorer:
    """A function of a batch of texts, which gives one finite number a response, as a function of rollouts."""

    def score(rollouts: Rollouts) -> Tensor:
        import torch

        batch = Batch(
            [row.get("prompt") for row in rollouts.meta],
            response_texts(context.tokenizer, rollouts),
            rollouts.meta,
            _response_ids(rollouts),
        )
        return torch.tensor(function(batch), dtype=torch.float32)

    return score


def response_texts(tokenizer: Any, rollouts: Rollouts) -> list[str]:
    """The valid response tokens of every row as text, without special tokens and without what ended it."""
    from alignkit.data import tokens

    ends = tokens.stops(tokenizer)
    kept = [ids[:-1] if ids and ids[-1] in ends else ids for ids in _response_ids(rollouts)]
    return tokenizer.batch_decode(kept, skip_special_tokens=True)


def _response_ids(rollouts: Rollouts) -> list[list[int]]:
    """The valid response tokens of every row."""
    rows = zip(rollouts.response_ids.tolist(), rollouts.response_mask.tolist(), strict=True)
    return [[token for token, valid in zip(ids, mask, strict=True) if valid] for ids, mask in rows]


def start_all(rewards: dict[str, Any], context: Context) -> Callable[..., ScoredRollouts]:
    """The weighted sum of all rewards as one function of rollouts; every part is kept under its name.

    The function's second argument {name: scores [B]} holds parts that are known already (a reward model's, which PPO
    computes together with the other roles).
    """
    scorers = {name: item.start(context) for name, item in rewards.items()}

    def score(rollouts: Rollouts, known: dict[str, Tensor] | None = None) -> ScoredRollouts:
        known = known or {}
        device = rollouts.response_ids.device
        parts = {
            name: (known[name] if name in known else scorer(rollouts)).to(device) for name, scorer in scorers.items()
        }
        total = sum(rewards[name].weight * part for name, part in parts.items())
        return ScoredRollouts(rollouts, total, parts)

    return score
