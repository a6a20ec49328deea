"""All weights train: policy, reference, critic and reward model are four models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit import models
from alignkit.types import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from alignkit.types import ModelSource


@dataclass
class Full:
    """Every weight of the base is trained."""

    name: str = "full"

    def check_start(self, adapter: Path | None) -> None:
        """Refuse to start from an adapter."""
        if adapter is not None:
            raise InputError(
                f"finetune=full starts from whole models, but {adapter} is an adapter; use finetune=lora, or merge it first"
            )

    def peft_config(self, task_type: str, hf: nn.Module) -> Any:
        """None: TRL then trains the model itself."""
        return None

    def roles(
        self,
        model: models.Model,
        source: ModelSource,
        reward: ModelSource | None,
        vocab: int,
        needs_critic: bool,
        seed: int,
    ) -> nn.Module:
        """Separate models; `ref_policy` is a frozen copy of the policy, `critic` starts as the reward model."""
        import torch

        torch.manual_seed(seed)
        self.check_start(source.adapter)
        parts = {
            "policy": models.load_base(source.base, model, vocab),
            "ref_policy": models.load_base(source.base, model, vocab),
        }
        heads: dict[str, nn.Linear] = {}
        if reward is not None:
            self.check_start(reward.adapter)
            parts["reward_model"] = models.load_base(reward.base, model, vocab)
            heads["reward_model"] = models.load_head(Path(reward.base))
        if needs_critic:
            start = source if reward is None else reward
            parts["critic"] = models.load_base(start.base, model, vocab)
            heads["critic"] = (
                models.score_head(parts["critic"].config.hidden_size)
                if reward is None
                else models.load_head(Path(reward.base))
            )
        roles = models.make_roles(parts, heads, switch=lambda role: None)
        for parameter in roles.parameters():
            parameter.requires_grad_(False)
        for role in ("policy", "critic") if needs_critic else ("policy",):
            for parameter in self.parameters(roles, role):
                parameter.requires_grad_(True)
        return roles

    def parameters(self, roles: nn.Module, role: str) -> list[nn.Parameter]:
        """All of the role's model (a critic has no use for the output embedding, unless it is tied) and its head."""
        hf = roles.model(role)
        if role == "policy":
            return list(hf.parameters())
        return list(hf.base_model.parameters()) + list(roles.heads[role].parameters())

    def sync_payload(self, roles: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every weight of the policy."""
        return models.named_weights(roles.model("policy"))

    def save(self, roles: nn.Module, folder: Path) -> None:
        """The policy as a whole model."""
        roles.model("policy").save_pretrained(folder)
