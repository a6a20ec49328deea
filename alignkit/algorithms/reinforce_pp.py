"""REINFORCE++ (arXiv 2501.03262): token rewards to go, whitened over the global batch; no critic, no groups needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.algorithms.base import Surrogate, in_range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class ReinforcePP(Surrogate):
    """The advantage of a token is the discounted sum of the rewards from it on."""

    name: str = "reinforce_pp"
    whiten_advantages: bool = True  # over the global batch: mean 0, biased variance 1
    gamma: float = 1.0  # discount

    def check(self, group_size: int, updates_per_round: int) -> None:
        super().check(group_size, updates_per_round)
        in_range(0 <= self.gamma <= 1, "gamma", self.gamma, "a number from 0 to 1")

    def advantages(self, rewards: Tensor, values: Tensor | None, mask: Tensor, group_size: int) -> tuple:
        from alignkit.algorithms import functional as F

        return F.gae(rewards, rewards.new_zeros(rewards.shape), mask, self.gamma, 1.0)[0], None
