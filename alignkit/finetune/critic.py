"""Where a critic's values come from: which weights, which head, whose model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignkit.core.errors import InputError
from alignkit.models.score_heads import score_head

if TYPE_CHECKING:
    from torch import nn

    from alignkit.core.types import ModelSource


@dataclass
class Critic:
    """Where values come from."""

    kind: str = "auto"  # adapter (on the shared base) | trunk (a head on the policy) | separate; auto: by finetune
    weights: str = "auto"  # what it starts as: reward_model | policy; auto: the reward model, where there is one
    head: str = "auto"  # reward_model | zero | random; auto: reward_model where its weights are, else zero on a trunk

    def check(self, finetune: Any, learned_reward: bool) -> None:
        """Raise InputError for combinations without a meaning."""
        for name, choices in (
            ("kind", ("auto", "adapter", "trunk", "separate")),
            ("weights", ("auto", "reward_model", "policy")),
            ("head", ("auto", "reward_model", "zero", "random")),
        ):
            if getattr(self, name) not in choices:
                raise InputError(f"critic.{name}={getattr(self, name)}: expected one of {', '.join(choices)}")
        if self.kind != "auto" and self.kind not in finetune.critic_kinds:
            raise InputError(
                f"critic.kind={self.kind} with finetune={finetune.name}: it has {' and '.join(finetune.critic_kinds)} only"
            )
        if self.kind == "trunk" and (self.weights != "auto" or self.head == "reward_model"):
            odd = f"critic.weights={self.weights}" if self.weights != "auto" else "critic.head=reward_model"
            raise InputError(f"{odd} with critic.kind=trunk: its states are the policy's own; leave it at auto")
        for name in ("weights", "head"):
            if getattr(self, name) == "reward_model" and not learned_reward:
                raise InputError(
                    f"critic.{name}=reward_model, but rewards has no reward_model: use policy, zero or random"
                )
        if self.head == "reward_model" and self.weights == "policy":
            raise InputError(
                "critic.head=reward_model with critic.weights=policy: the head reads other states; use zero"
            )

    def check_reward(self, finetune: Any, reward: ModelSource | None, policy: ModelSource | None) -> list[str]:
        """Refuse to start as a reward model whose weights do not fit the critic's base.

        Returns:
            What is to be said: that it starts as the policy then.

        Raises:
            InputError: naming both bases.
        """
        if reward is None or policy is None or finetune.critic_starts_as(reward, policy):
            return []
        for name in ("weights", "head"):
            if getattr(self, name) == "reward_model":
                raise InputError(
                    f"critic.{name}=reward_model with finetune={finetune.name}: the critic is an adapter on {policy.base}, and the "
                    f"reward model {reward.adapter or reward.base} is none on it: use critic.weights=policy critic.head=random"
                )
        if self.kind == "trunk" or self.weights == "policy":
            return []
        return [
            f"the reward model {reward.adapter or reward.base} is held by itself: the critic starts as the policy, not as it"
        ]

    def resolved(self, finetune: Any, learned_reward: bool) -> Critic:
        """The same without auto; `learned_reward`: there is a reward model that it can start as."""
        kind = finetune.critic_kinds[0] if self.kind == "auto" else self.kind
        weights = ("reward_model" if learned_reward else "policy") if self.weights == "auto" else self.weights
        if kind == "trunk":
            return Critic(kind, "policy", "zero" if self.head == "auto" else self.head)
        head = ("reward_model" if weights == "reward_model" else "random") if self.head == "auto" else self.head
        return Critic(kind, weights, head)

    def new_head(self, hidden_size: int, reward_head: nn.Linear | None) -> nn.Linear:
        """The head it starts with, of a resolved critic."""
        import torch

        if self.head == "reward_model":
            return copy.deepcopy(reward_head)
        head = score_head(hidden_size)
        if self.head == "zero":
            torch.nn.init.zeros_(head.weight)
        return head
