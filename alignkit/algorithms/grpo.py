"""Group-relative policy optimisation (arXiv 2402.03300): responses scored against the mean of their group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from alignkit.algorithms.base import Surrogate

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class GRPO(Surrogate):
    """The advantage of a response is its reward, standardised within its group; the KL is a term of the loss."""

    name: str = "grpo"
    kl_in: str = "loss"  # reward: a penalty on every token | loss: a term beside the surrogate
    aggregation: str = "sequence_mean_token_mean"  # token_mean | sequence_mean_token_mean | sequence_mean_token_sum
    scale_by_std: bool = True  # divide by the group's standard deviation; false: arXiv 2503.20783

    needs_groups: ClassVar[bool] = True

    def advantages(self, rewards: Tensor, values: Tensor | None, mask: Tensor, group_size: int) -> tuple:
        total = rewards.sum(1).view(-1, group_size)  # [P, G]
        relative = total - total.mean(1, keepdim=True)
        if self.scale_by_std:
            relative = relative / (total.std(1, keepdim=True) + 1e-6)  # unbiased, as verl's core_algos.py and trl
        return relative.view(-1, 1) * mask, None
