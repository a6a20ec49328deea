"""The learned reward: a reward stage's adapter (or model) and its scalar head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import MISSING

from alignkit import models
from alignkit.rewards.base import Context, Scorer
from alignkit.types import Rollouts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class RewardModel:
    """Score of a finished reward run, read at the last token of prompt and response."""

    name: str = "reward_model"
    path: str = MISSING  # a finished reward run: runs/<name>/reward
    weight: float = 1.0  # in the sum of rewards

    def start(self, context: Context) -> Scorer:
        """Scores with `context.roles`, whose role reward_model holds the weights."""

        def score(rollouts: Rollouts) -> Tensor:
            return models.map_rows(
                lambda ids, mask, slots: context.roles("reward_model", ids, mask, slots),
                rollouts.ids,
                rollouts.mask,
                rollouts.response_ids.shape[1],
                context.micro_batch_size,
            )

        return score
