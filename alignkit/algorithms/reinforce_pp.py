"""REINFORCE++ (arXiv 2501.03262): token rewards to go, whitened over the global batch; no critic, no groups needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.algorithms.base import Surrogate
from alignkit.core.fields import num

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class ReinforcePP(Surrogate):
    """The advantage of a token is the discounted sum of the rewards from it on."""

    name: str = "reinforce_pp"
    whiten_advantages: bool = True  # over the global batch: mean 0, biased variance 1
    gamma: float = num(1.0, ge=0, le=1)  # discount

    def advantages(self, rewards: Tensor, values: Tensor | None, mask: Tensor, group_size: int) -> tuple:
        from alignkit.algorithms import functional as F

        return F.gae(rewards, rewards.new_zeros(rewards.shape), mask, self.gamma, 1.0)[0], None
