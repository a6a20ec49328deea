"""What a language model makes of given completions, as sums that do not depend on how the rows are cut into batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.core.types import Rows
from alignkit.models import loading
from alignkit.training import batches
from alignkit.training.engine import World

IGNORED = -100  # the label of a token that is not counted


@dataclass
class Measured:
    """Sums over the counted tokens of all rows, on all ranks."""

    nll: float  # nats
    tokens: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a token."""
        return self.nll / self.tokens


def completions(
    logprobs_of: Callable[[Tensor, Tensor, Tensor], Tensor],
    rows: Rows,
    pad_id: int,
    world: World,
    micro_batch_size: int,
    together: bool,
) -> Measured:
    """The sums over the completions of `rows`; every rank measures its share. Called by all ranks.

    Args:
        logprobs_of: (ids [b, l] i64, mask [b, l] i64, labels [b, l] i64, -100 where not counted) -> log-probs, of any
            shape, 0 where not counted. Labels are not shifted.
        rows: as `tokens.sft_dataset` has them, {"input_ids", "completion_mask"}; the same on every rank.
        together: every rank runs as many forwards as the others (ZeRO-3 gathers weights in each of them).
    """
    mine = [rows[i] for i in range(world.rank, len(rows), world.size)]
    spare = -(-len(rows) // world.size) - len(mine)  # 1 on a rank that has a row less
    mine += [rows[0] | {"completion_mask": [0] * len(rows[0]["input_ids"])}] * spare
    lengths = torch.tensor([len(row["input_ids"]) for row in mine])
    groups = batches.by_length(lengths, micro_batch_size)
    if together:
        groups = batches.by_length(lengths, micro_batch_size, batches.largest(len(groups), world.device))
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    with torch.no_grad():
        for index in groups:
            ids, mask, labels = collate([mine[i] for i in index.tolist()], pad_id, world.device)
            found = logprobs_of(ids, mask, labels)
            sums += torch.stack([-found.double().sum(), (labels[:, 1:] != IGNORED).sum().double()])
    nll, tokens = world.sum(sums).tolist()
    return Measured(nll, int(tokens))


def collate(rows: list[dict[str, Any]], pad_id: int, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, mask, labels), each [b, l] i64, padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(values: list[list[int]], by: int) -> Tensor:
        return torch.tensor([row + [by] * (longest - len(row)) for row in values], device=device)

    ids = [row["input_ids"] for row in rows]
    counted = [row["completion_mask"] for row in rows]
    labels = [[t if c else IGNORED for t, c in zip(*pair, strict=True)] for pair in zip(ids, counted, strict=True)]
    return filled(ids, pad_id), filled([[1] * len(row) for row in ids], 0), filled(labels, IGNORED)


def fused(model: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`logprobs_of` of a model that TRL's SFTTrainer holds: its own forward, which never makes all logits at once."""

    def logprobs(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, fused_lm_head=True).log_probs

    return logprobs


def held_out(trainer: Any, rows: Rows, pad_id: int, world: World, micro_batch_size: int) -> dict[str, float]:
    """`eval_loss`, the mean over all completion tokens of the held-out rows, and `eval_tokens`, how many they are."""
    model = trainer.model.eval()
    found = completions(fused(model), rows, pad_id, world, micro_batch_size, loading.is_cut(model))
    return {"eval_loss": found.loss, "eval_tokens": found.tokens}
