"""The learned reward: a reward stage's adapter (or model) and its scalar head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import MISSING

from alignkit import models
from alignkit.ranges import num
from alignkit.rewards.base import Context, Scorer
from alignkit.types import Rollouts

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class RewardModel:
    """Score of a finished reward run, read at the last token of prompt and response."""

    name: str = "reward_model"
    path: str = MISSING  # a finished reward run: runs/<name>/reward
    weight: float = 1.0  # in the sum of rewards
    micro_batch_size: int = num(16, ge=1)  # sequences of one forward, outside PPO

    def start(self, context: Context) -> Scorer:
        """Loads the model at the first call: PPO never makes one, since it scores with its own `reward_model` role."""
        roles: list[nn.Module] = []

        def score(rollouts: Rollouts) -> Tensor:
            from alignkit import batches  # imports torch

            if not roles:
                assert context.resolve is not None and context.model is not None  # given by every stage that scores
                roles.append(
                    models.load_reward(context.resolve(self.path), context.model, len(context.tokenizer)).to(
                        context.device
                    )
                )
            ids, mask, starts = (part.to(context.device) for part in rollouts.flush_left())
            slots = rollouts.response_ids.shape[1]
            return batches.map_rows(
                lambda *rows: roles[0]("reward_model", *rows), ids, mask, starts, slots, self.micro_batch_size
            ).cpu()

        return score
