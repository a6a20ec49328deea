"""REINFORCE leave-one-out (arXiv 2402.14740): a response is compared with the other responses to its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from alignkit.algorithms.base import Surrogate

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class RLOO(Surrogate):
    """The advantage of a response is its reward minus the mean reward of its siblings, on each of its tokens."""

    name: str = "rloo"

    needs_groups: ClassVar[bool] = True

    def advantages(self, rewards: Tensor, values: Tensor | None, mask: Tensor, group_size: int) -> tuple:
        total = rewards.sum(1).view(-1, group_size)  # [P, G]: score minus KL, of the whole response
        others = (total.sum(1, keepdim=True) - total) / (group_size - 1)
        return (total - others).view(-1, 1) * mask, None
