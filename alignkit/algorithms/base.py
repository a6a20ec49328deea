"""What every estimator shares: the score before it becomes a reward, the KL, the clipped surrogate, the corrections.

An estimator is a subclass in a file of its own: a `name`, `needs_critic`, and `advantages(...)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from alignkit.core.errors import InputError
from alignkit.core.fields import num
from alignkit.core.types import Experience, Loss, Metrics, ScoredRollouts

if TYPE_CHECKING:
    from torch import Tensor

AGGREGATIONS = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum")
KL_IN_REWARD = ("k1", "k2", "k3", "abs")
KL_IN_LOSS = ("k2", "k1+", "k3+")
IMPORTANCE = ("token", "sequence", "icepop", "none")


@dataclass
class Surrogate:
    """The clipped surrogate (arXiv 1707.06347) with KL to the reference; advantages are the subclass's."""

    ppo_epochs: int = num(1, ge=1)  # passes over the experience of one round
    clip_range: float = num(0.2, gt=0, lt=1)  # ratio kept within 1 +- this
    clip_range_high: float | None = num(None, gt=0)  # upper bound 1 + this instead (arXiv 2503.14476); None: clip_range
    dual_clip: float | None = num(None, gt=1)  # c > 1 bounds the loss by -c A where A < 0 (arXiv 1912.09729); None: off
    target_kl: float | None = num(None, gt=0)  # end a round's updates before the step whose approx_kl exceeds this
    ent_coef: float = num(0.0, ge=0)  # weight of the exact entropy bonus
    aggregation: str = "token_mean"  # token_mean | sequence_mean_token_mean | sequence_mean_token_sum
    whiten_advantages: bool = False  # over the global batch: mean 0, biased variance 1
    kl_coef: float = num(0.05, ge=0)  # weight of the KL to the reference policy
    kl_in: str = "reward"  # reward: a penalty on every token | loss: a term beside the surrogate
    kl_estimator: str | None = None  # in the reward k1; in the loss k2, k1+ or k3+; None: k1 or k2
    adaptive_kl_target: float | None = num(None, gt=0)  # nats a response that kl_coef adapts to (arXiv 1909.08593)
    adaptive_kl_horizon: float = num(10000.0, gt=0)  # sequences over which kl_coef adapts
    normalize_scores: bool = False  # (score - mean) / std of all scores seen so far
    score_clip: float | None = num(None, gt=0)  # scores kept within +- this, after normalising; None: not clipped
    missing_eos: str = "at_most"  # at_most | replace | subtract | none: the score of a response cut by its length
    missing_eos_value: float = -1.0  # the most it is worth (at_most), its worth (replace), what it loses (subtract)
    importance: str = "token"  # token | sequence | icepop | none: correct for a sampler that is not quite the trainer
    importance_cap: float | None = num(2.0, gt=0)  # weights above it are held there (icepop: dropped); None: no bound
    importance_floor: float | None = num(None, ge=0)  # the same from below
    peer_parity: bool = False  # allow choices that peers ship although they are wrong, with a warning

    needs_critic: ClassVar[bool] = False
    needs_groups: ClassVar[bool] = False  # whether several responses a prompt are compared

    def check(self, group_size: int, updates_per_round: int) -> None:
        """Raise InputError for unknown choices and for combinations without a meaning."""
        one_of("aggregation", self.aggregation, AGGREGATIONS)
        one_of("missing_eos", self.missing_eos, ("at_most", "replace", "subtract", "none"))
        one_of("kl_in", self.kl_in, ("reward", "loss"))
        one_of("importance", self.importance, IMPORTANCE)
        self._check_combinations(group_size, updates_per_round)

    def _check_combinations(self, group_size: int, updates_per_round: int) -> None:
        if self.kl_in == "loss" and self.estimator not in KL_IN_LOSS:
            raise InputError(
                f"algorithm.kl_estimator={self.kl_estimator} with algorithm.kl_in=loss: its gradient is not that of the KL; "
                f"use {' or '.join(KL_IN_LOSS)}, or kl_in=reward"
            )
        if self.kl_in == "reward":
            one_of("kl_estimator", self.estimator, KL_IN_REWARD)
            if self.estimator != "k1" and not self.peer_parity:
                raise InputError(
                    f"algorithm.kl_estimator={self.estimator} with algorithm.kl_in=reward: only k1 anchors the policy there; "
                    "use k1, or algorithm.peer_parity=true to reproduce a peer that does this"
                )
        if self.adaptive_kl_target is not None and self.kl_coef == 0:
            raise InputError(
                f"algorithm.adaptive_kl_target={self.adaptive_kl_target} with algorithm.kl_coef=0: the coefficient is "
                "multiplied, so 0 never adapts; give kl_coef a start above 0"
            )
        low, high = self.importance_floor, self.importance_cap
        if not 0 <= (low or 0.0) < (float("inf") if high is None else high):
            raise InputError(
                f"algorithm.importance_floor={low} with algorithm.importance_cap={high}: expected 0 <= floor < cap"
            )
        if self.importance == "none" and low is not None:
            raise InputError(
                f"algorithm.importance_floor={low} with algorithm.importance=none: there is nothing to bound"
            )
        if self.target_kl is not None and self.ppo_epochs * updates_per_round == 1:
            raise InputError(
                f"algorithm.target_kl={self.target_kl} with algorithm.ppo_epochs={self.ppo_epochs} and mini_batch_size equal to "
                "rollout_batch_size: a round has one optimizer step, taken at KL 0; raise ppo_epochs or lower mini_batch_size"
            )
        if self.needs_groups and group_size < 2:
            raise InputError(
                f"algorithm={getattr(self, 'name', '')} with group_size={group_size}: it compares the responses to a prompt; "
                "give group_size=2 or more"
            )

    @property
    def estimator(self) -> str:
        """The KL estimator in use."""
        return self.kl_estimator or ("k1" if self.kl_in == "reward" else "k2")

    @property
    def reward_estimator(self) -> str:
        """Of the KL in the reward; with the KL in the loss its weight there is 0."""
        return self.estimator if self.kl_in == "reward" else "k1"

    @property
    def policy_starts_at(self) -> int:
        """The first round in which the policy learns."""
        return 0

    def warnings(self) -> Iterator[str]:
        """What a person should know before the run starts."""
        if self.kl_in == "reward" and self.estimator != "k1":
            yield (
                f"peer parity: KL estimator {self.estimator} in the reward does not anchor the policy to the reference "
                "(its policy gradient is not that of the KL)"
            )

    def start(self) -> State:
        """The state at the start of a run."""
        from alignkit.algorithms import functional as F

        target, horizon = self.adaptive_kl_target, self.adaptive_kl_horizon
        kl = F.FixedKL(self.kl_coef) if target is None else F.AdaptiveKL(self.kl_coef, target, horizon)
        return State(kl, F.RunningMoments())

    def own_scores(self, scored: ScoredRollouts, state: State) -> Tensor:
        """Scores [B] normalised, then clipped, whether the response ended or not."""
        from alignkit.algorithms import functional as F

        scores = scored.scores
        if self.normalize_scores:
            state.scores.update(F.masked_moments(scores))
            scores = state.scores.normalise(scores)
        return F.clip_scores(scores, self.score_clip)

    def shape_scores(self, scored: ScoredRollouts, state: State) -> Tensor:
        """Scores [B] as they enter the reward: normalised, clipped, then the missing-EOS penalty, which keeps its size."""
        return self._penalised(self.own_scores(scored, state), scored.rollouts.finished)

    def _penalised(self, scores: Tensor, finished: Tensor) -> Tensor:
        from alignkit.algorithms import functional as F

        return F.missing_eos(scores, finished, self.missing_eos, self.missing_eos_value)

    def value_mask(self, response_mask: Tensor) -> Tensor:
        """[B, Lr] bool: the slots that have a reward and a value. Those of the response, unless a subclass says else."""
        return response_mask

    def token_rewards(self, scores: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, coef: float):
        """Rewards [B, Lr]: the score on the last token, minus coef * KL on every token."""
        from alignkit.algorithms import functional as F

        return F.token_rewards(scores, old_logprobs, ref_logprobs, mask, coef, self.reward_estimator)

    def advantages(self, rewards: Tensor, values: Tensor | None, mask: Tensor, group_size: int) -> tuple:
        """(advantages [B, Lr], returns [B, Lr] or None) of token rewards [B, Lr]; the subclass's own."""
        raise NotImplementedError

    def experience(
        self,
        scored: ScoredRollouts,
        old_logprobs: Tensor,
        ref_logprobs: Tensor,
        values: Tensor | None,
        state: State,
        group_size: int,
    ) -> tuple[Experience, Metrics]:
        """Scores and log-probs of the global batch -> rewards, advantages and returns.

        Args:
            scored: B rollouts with scores [B], the group_size answers to a prompt adjacent.
            old_logprobs, ref_logprobs, values: [B, Lr] f32; values None without a critic.
            state: of this run; running moments of the scores are brought up to date.

        Order: scores normalised, clipped, missing-EOS penalty, placed on the last token, minus kl_coef * k1 (unless the
        KL is in the loss), advantages, whitening.
        """
        from alignkit.algorithms import functional as F

        rollouts = scored.rollouts
        mask = rollouts.response_mask
        own = self.own_scores(scored, state)
        scores = self._penalised(own, rollouts.finished)
        in_reward = state.kl.value if self.kl_in == "reward" else 0.0
        rewards = self.token_rewards(scores, old_logprobs, ref_logprobs, mask, in_reward)
        value_mask = self.value_mask(mask)
        advantages, returns = self.advantages(rewards, values, value_mask, group_size)
        kl_coef = state.kl.value if self.kl_in == "loss" else 0.0
        if self.whiten_advantages:
            variance = F.masked_mean((advantages - F.masked_mean(advantages, mask)).square(), mask)
            kl_coef /= (float(variance) + 1e-8) ** 0.5  # as the advantages are: the KL keeps its weight beside them
            advantages = F.whiten(advantages, mask)
        weights = None
        if self.importance != "none":
            weights = F.importance_weights(
                old_logprobs,
                rollouts.rollout_logprobs,
                mask,
                self.importance,
                self.importance_cap,
                self.importance_floor,
            )
        ids, whole_mask, starts = rollouts.flush_left()
        experience = Experience(
            ids=ids,
            mask=whole_mask,
            starts=starts,
            response_mask=mask,
            value_mask=value_mask,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            rollout_logprobs=rollouts.rollout_logprobs,
            rewards=rewards,
            advantages=advantages,
            values=values,
            returns=returns,
            weights=weights,
            kl_coef=kl_coef,
        )
        penalty = in_reward * F.kl_estimate(old_logprobs, ref_logprobs, self.reward_estimator).masked_fill(~mask, 0)
        metrics = experience_metrics(scored, scores, experience) | cut_metrics(own, scores, rollouts.finished)
        return experience, metrics | {"objective/non_score_reward": (-float(penalty.sum()), len(mask))}

    def policy_loss(self, batch: Experience, logprobs: Tensor, entropy: Tensor | None) -> Loss:
        """Clipped surrogate, minus the entropy bonus, plus the KL where it is in the loss; summed, not divided.

        Args:
            batch: a micro-batch of b rows.
            logprobs: [b, Lr] of the present policy, with gradient.
            entropy: [b, Lr], needed where ent_coef > 0.
        """
        from alignkit.algorithms import functional as F

        mask = batch.response_mask
        total, count, metrics = F.policy_loss(
            logprobs, batch.old_logprobs, batch.advantages, mask, self.clip_range, self.clip_range_high, self.dual_clip,
            batch.weights, self.aggregation,
        )  # fmt: skip
        if self.ent_coef:
            assert entropy is not None  # computed where ent_coef > 0
            total = total - self.ent_coef * F.sum_tokens(entropy, mask, self.aggregation)[0]
        if self.kl_in == "loss" and batch.kl_coef:
            kl, _, kl_metrics = F.kl_loss(
                logprobs, batch.old_logprobs, batch.ref_logprobs, mask, self.estimator, batch.weights, self.aggregation
            )
            total, metrics = total + batch.kl_coef * kl, metrics | kl_metrics
        return Loss(total, count, metrics)

    def policy_count(self, mask: Tensor) -> float:
        """What the policy's loss over a whole optimizer step is divided by: its tokens, or its sequences."""
        from alignkit.algorithms import functional as F

        return float(F.sum_tokens(mask.float(), mask, self.aggregation)[1])


class State:
    """What a run carries from round to round, and a checkpoint keeps: the KL coefficient and the scores' moments."""

    def __init__(self, kl: Any, scores: Any) -> None:
        self.kl, self.scores = kl, scores

    def state_dict(self) -> dict[str, Any]:
        return {"kl": self.kl.state_dict(), "scores": self.scores.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kl.load_state_dict(state["kl"])
        self.scores.load_state_dict(state["scores"])


def experience_metrics(scored: ScoredRollouts, scores: Tensor, experience: Experience) -> Metrics:
    """What a round's rollouts look like, as (sum, count) over the global batch."""
    rollouts, mask = scored.rollouts, experience.response_mask
    rows, tokens = len(mask), int(mask.sum())
    kl = (experience.old_logprobs - experience.ref_logprobs).masked_fill(~mask, 0)
    gap = (experience.old_logprobs - experience.rollout_logprobs).masked_fill(~mask, 0).abs()
    metrics: Metrics = {
        "objective/score": (float(scores.sum()), rows),  # as it enters the reward; the raw parts follow
        "objective/score_std": (float(scores.std(correction=0)), 1),
        "objective/kl": (float(kl.sum()), rows),
        "objective/kl_per_token": (float(kl.sum()), tokens),
        "rollout/length": (tokens, rows),
        "rollout/finished": (float(rollouts.finished.sum()), rows),
        "rollout/logprob_gap": (float(gap.sum()), tokens),
        "rollout/logprob_gap_max": (float(gap.max()), 1),
    }
    if experience.weights is not None:
        metrics["rollout/importance_weight"] = (float(experience.weights.sum()), tokens)
    for name, part in scored.score_parts.items():
        metrics[f"objective/score/{name}"] = (float(part.sum()), rows)
    return metrics


def cut_metrics(own: Tensor, scores: Tensor, finished: Tensor) -> Metrics:
    """Where some responses [B] were cut by their length: how many of them are worth more than they scored (`own`), and what
    they and the finished ones are worth on average."""
    cut = ~finished.bool()
    if not cut.any():
        return {}
    found: Metrics = {
        "objective/cut_raised": (float((scores[cut] > own[cut]).sum()), len(scores)),
        "objective/score_cut": (float(scores[cut].sum()), int(cut.sum())),
    }
    if not cut.all():
        found["objective/score_finished"] = (float(scores[~cut].sum()), int((~cut).sum()))
    return found


def cut_pays(metrics: Metrics) -> str | None:
    """What is to be said of a round in which it pays to be cut, by its `cut_metrics`; None where it does not."""
    if "objective/score_cut" not in metrics:
        return None
    (total, cut), raised = metrics["objective/score_cut"], metrics["objective/cut_raised"][0]
    finished = metrics.get("objective/score_finished")
    better = finished is not None and total / cut > finished[0] / finished[1]
    if not raised and not better:
        return None
    worth = f"the {cut} answers cut by their length are worth {total / cut:.3g} on average"
    worth += f", the {finished[1]} finished ones {finished[0] / finished[1]:.3g}" if finished is not None else ""
    worth += f"; {raised:.0f} are worth more than they scored" if raised else ""
    return f"{worth}: the policy may learn not to end; lower algorithm.missing_eos_value, or use missing_eos=at_most or subtract"


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise InputError unless `value` is one of `choices`."""
    if value not in choices:
        raise InputError(f"algorithm.{name}={value}: expected {', '.join(choices[:-1])} or {choices[-1]}")
