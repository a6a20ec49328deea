"""Proximal policy optimisation (arXiv 1707.06347) as it is used for language models (arXiv 1909.08593, 2403.17031)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from alignkit.algorithms.base import State, Surrogate, one_of
from alignkit.core.fields import num
from alignkit.core.types import Experience, Loss, Metrics, ScoredRollouts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class PPO(Surrogate):
    """Advantages by generalised advantage estimation from a critic, which learns by a clipped value loss."""

    name: str = "ppo"
    whiten_advantages: bool = True  # over the global batch: mean 0, biased variance 1
    value_clip_range: float | None = num(0.2, gt=0)  # values kept within +- this of the old ones; None: not clipped
    vf_coef: float = num(0.1, gt=0)  # of the value loss; matters where a gradient is clipped or shared
    gamma: float = num(1.0, ge=0, le=1)  # discount
    gae_lambda: float = num(0.95, ge=0, le=1)  # of generalised advantage estimation (arXiv 1506.02438)
    score_slot: str = "on_last_token"  # on_last_token | after_eos: the slot behind it, as arXiv 2403.17031
    whiten_rewards: bool = False  # token rewards to variance 1, their mean kept (arXiv 1909.08593)
    critic_warmup: int = num(0, ge=0)  # rounds at the start in which only the critic learns

    needs_critic: ClassVar[bool] = True

    def check(self, group_size: int, updates_per_round: int) -> None:
        super().check(group_size, updates_per_round)
        one_of("score_slot", self.score_slot, ("on_last_token", "after_eos"))

    @property
    def policy_starts_at(self) -> int:
        return self.critic_warmup

    def value_mask(self, response_mask: Tensor) -> Tensor:
        """[B, Lr] bool: the response, and the slot behind it where the score stands there."""
        from alignkit.algorithms import functional as F

        return response_mask | F.score_position(response_mask, self.score_slot)

    def token_rewards(self, scores: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, coef: float):
        from alignkit.algorithms import functional as F

        rewards = F.token_rewards(
            scores, old_logprobs, ref_logprobs, mask, coef, self.reward_estimator, self.score_slot
        )
        return F.whiten(rewards, self.value_mask(mask), shift_mean=False) if self.whiten_rewards else rewards

    def advantages(self, rewards: Tensor, values: Tensor | None, mask: Tensor, group_size: int) -> tuple:
        from alignkit.algorithms import functional as F

        assert values is not None  # needs_critic
        return F.gae(rewards, values, mask, self.gamma, self.gae_lambda)

    def experience(
        self,
        scored: ScoredRollouts,
        old_logprobs: Tensor,
        ref_logprobs: Tensor,
        values: Tensor | None,
        state: State,
        group_size: int,
    ) -> tuple[Experience, Metrics]:
        from alignkit.algorithms import functional as F

        experience, metrics = super().experience(scored, old_logprobs, ref_logprobs, values, state, group_size)
        mask = experience.value_mask
        return experience, metrics | {
            "critic/explained_variance": (float(F.explained_variance(values, experience.returns, mask)), 1),
            "critic/value": (float(F.masked_mean(values, mask)), 1),
        }

    def critic_loss(self, batch: Experience, values: Tensor) -> Loss:
        """Clipped value loss, summed over the tokens of a micro-batch. values: [b, Lr] with gradient."""
        from alignkit.algorithms import functional as F

        total, count, metrics = F.value_loss(
            values, batch.values, batch.returns, batch.value_mask, self.value_clip_range
        )
        return Loss(self.vf_coef * total, count, metrics)
