"""Proximal policy optimisation (arXiv 1707.06347) as it is used for language models (arXiv 1909.08593, 2403.17031)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from alignkit.types import Experience, InputError, Loss, Metrics, ScoredRollouts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class PPO:
    """Clipped surrogate, clipped value loss, entropy bonus; KL to the reference as a token-level penalty in the reward."""

    name: str = "ppo"
    ppo_epochs: int = 1  # passes over the experience of one round
    clip_range: float = 0.2  # ratio kept within 1 +- this
    value_clip_range: float | None = 0.2  # values kept within +- this of the old ones; None: not clipped
    vf_coef: float = 0.1  # weight of the value loss; matters where the critic's gradient is clipped
    ent_coef: float = 0.0  # weight of the exact entropy bonus
    gamma: float = 1.0  # discount
    gae_lambda: float = 0.95  # of generalised advantage estimation (arXiv 1506.02438)
    whiten_advantages: bool = True  # over the global batch: mean 0, biased variance 1
    kl_coef: float = 0.05  # per-token k1 penalty in the reward
    adaptive_kl_target: float | None = None  # nats a response; adapt kl_coef towards it (arXiv 1909.08593); None: fixed
    adaptive_kl_horizon: float = 10000.0  # sequences over which kl_coef adapts
    missing_eos: str = "replace"  # replace | subtract | none: what happens to the score of a response cut by its length
    missing_eos_value: float = -1.0  # the score it gets (replace), or what is taken off it (subtract)

    needs_critic: ClassVar[bool] = True

    def check(self) -> None:
        """Raise InputError for values outside their range."""
        if not 0 < self.clip_range < 1:
            raise InputError(f"algorithm.clip_range={self.clip_range}: expected 0 < clip_range < 1")
        if self.value_clip_range is not None and self.value_clip_range <= 0:
            raise InputError(
                f"algorithm.value_clip_range={self.value_clip_range}: expected more than 0, or null for none"
            )
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"algorithm.{name}={getattr(self, name)}: expected a number from 0 to 1")
        for name in ("vf_coef", "ent_coef", "kl_coef"):
            if getattr(self, name) < 0:
                raise InputError(f"algorithm.{name}={getattr(self, name)}: expected 0 or more")
        if self.ppo_epochs < 1:
            raise InputError(f"algorithm.ppo_epochs={self.ppo_epochs}: expected 1 or more")
        if self.missing_eos not in ("replace", "subtract", "none"):
            raise InputError(f"algorithm.missing_eos={self.missing_eos!r}: expected replace, subtract or none")
        if self.adaptive_kl_target is not None and self.adaptive_kl_target <= 0:
            raise InputError(
                f"algorithm.adaptive_kl_target={self.adaptive_kl_target}: expected more than 0, or null for a fixed kl_coef"
            )

    def kl_controller(self) -> Any:
        """The controller of the KL coefficient: `.value` now, `.update(kl_per_sequence, n_sequences)` after a round."""
        from alignkit.algorithms import functional as F

        if self.adaptive_kl_target is None:
            return F.FixedKL(self.kl_coef)
        return F.AdaptiveKL(self.kl_coef, self.adaptive_kl_target, self.adaptive_kl_horizon)

    def experience(
        self, scored: ScoredRollouts, old_logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, kl_coef: float
    ) -> tuple[Experience, Metrics]:
        """Scores and log-probs of the global batch -> rewards, advantages and returns.

        Args:
            scored: B rollouts with scores [B].
            old_logprobs, ref_logprobs, values: [B, Lr] f32.
            kl_coef: the controller's present value.

        Order: missing-EOS penalty, score on the last valid token, minus kl_coef * k1, GAE, returns, whitening.
        """
        from alignkit.algorithms import functional as F

        rollouts = scored.rollouts
        mask = rollouts.response_mask
        scores = F.missing_eos(scored.scores, rollouts.finished, self.missing_eos, self.missing_eos_value)
        rewards = F.token_rewards(scores, old_logprobs, ref_logprobs, mask, kl_coef)
        advantages, returns = F.gae(rewards, values, mask, self.gamma, self.gae_lambda)
        if self.whiten_advantages:
            advantages = F.whiten(advantages, mask)
        experience = Experience(
            ids=rollouts.ids,
            mask=rollouts.mask,
            response_mask=mask,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            rollout_logprobs=rollouts.rollout_logprobs,
            rewards=rewards,
            advantages=advantages,
            values=values,
            returns=returns,
        )
        return experience, experience_metrics(scored, scores, experience) | {
            "critic/explained_variance": (float(F.explained_variance(values, returns, mask)), 1),
            "critic/value": (float(F.masked_mean(values, mask)), 1),
        }

    def policy_loss(self, batch: Experience, logprobs: Tensor, entropy: Tensor | None) -> Loss:
        """Clipped surrogate minus the entropy bonus, summed over the tokens of a micro-batch.

        Args:
            logprobs: [b, Lr] of the present policy, with gradient.
            entropy: [b, Lr], needed where ent_coef > 0.
        """
        from alignkit.algorithms import functional as F

        total, count, metrics = F.policy_loss(
            logprobs, batch.old_logprobs, batch.advantages, batch.response_mask, self.clip_range
        )
        if self.ent_coef:
            total = total - self.ent_coef * F.sum_tokens(entropy, batch.response_mask)[0]
        return Loss(total, count, metrics)

    def critic_loss(self, batch: Experience, values: Tensor) -> Loss:
        """Clipped value loss, summed over the tokens of a micro-batch. values: [b, Lr] with gradient."""
        from alignkit.algorithms import functional as F

        total, count, metrics = F.value_loss(
            values, batch.values, batch.returns, batch.response_mask, self.value_clip_range
        )
        return Loss(self.vf_coef * total, count, metrics)


def experience_metrics(scored: ScoredRollouts, scores: Tensor, experience: Experience) -> Metrics:
    """What a round's rollouts look like, as (sum, count) over the global batch."""
    rollouts, mask = scored.rollouts, experience.response_mask
    rows, tokens = len(mask), int(mask.sum())
    kl = (experience.old_logprobs - experience.ref_logprobs).masked_fill(~mask, 0)
    gap = (experience.old_logprobs - experience.rollout_logprobs).masked_fill(~mask, 0).abs()
    metrics: Metrics = {
        "objective/score": (float(scores.sum()), rows),  # after the missing-EOS penalty; the raw parts follow
        "objective/score_std": (float(scores.std(correction=0)), 1),
        "objective/kl": (float(kl.sum()), rows),
        "objective/kl_per_token": (float(kl.sum()), tokens),
        "objective/non_score_reward": (float(experience.rewards.sum() - scores.sum()), rows),
        "rollout/length": (tokens, rows),
        "rollout/finished": (float(rollouts.finished.sum()), rows),
        "rollout/logprob_gap": (float(gap.sum()), tokens),
        "rollout/logprob_gap_max": (float(gap.max()), 1),
    }
    for name, part in scored.score_parts.items():
        metrics[f"objective/score/{name}"] = (float(part.sum()), rows)
    return metrics
