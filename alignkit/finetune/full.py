"""All weights train: policy, reference, critic and reward model are four models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from alignkit.core.errors import InputError
from alignkit.core.types import Payload
from alignkit.finetune.critic import Critic
from alignkit.models import adapters, loading
from alignkit.models.config import Model

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from alignkit.core.types import ModelSource


@dataclass
class Full:
    """Every weight of the base is trained."""

    name: str = "full"

    critic_kinds: ClassVar[tuple[str, ...]] = ("separate", "trunk")
    nf4: ClassVar[bool] = False
    adapter_rank: ClassVar[int | None] = None

    def check(self, stage: Any) -> None:
        """Goes with everything."""

    def check_start(self, start: ModelSource | None, scores: bool = False) -> None:
        """Refuse to start from an adapter. `scores`: it is the reward model of PPO, with a head."""
        if start is not None and start.adapter is not None:
            raise InputError(
                f"finetune=full starts from whole models, but {start.adapter} is an adapter; use finetune=lora, or merge it first and give "
                f"{adapters.merged_folder(start)}: {adapters.merge_command(start)}"
            )

    def check_reward(self, reward: ModelSource | None, policy: ModelSource | None) -> None:
        """Goes with every reward model: each is held by itself."""

    def critic_starts_as(self, reward: ModelSource, policy: ModelSource) -> bool:
        """A critic is a model of its own, whatever its base."""
        return True

    def peft_config(self, task_type: str, hf: nn.Module) -> Any:
        """None: TRL then trains the model itself."""
        return None

    def roles(
        self,
        model: Model,
        source: ModelSource,
        reward: ModelSource | None,
        vocab: int,
        critic: Critic | None,
        seed: int,
    ) -> nn.Module:
        """Separate models; `ref_policy` is a frozen copy of the policy; `critic` None: an algorithm without one."""
        import torch

        torch.manual_seed(seed)
        self.check_start(source)
        parts = {
            "policy": loading.load_base(source.base, model, vocab),
            "ref_policy": loading.load_base(source.base, model, vocab),
        }
        heads: dict[str, nn.Linear] = {}
        if reward is not None:
            parts["reward_model"], heads["reward_model"] = loading.load_scorer(reward, model, vocab)
        if critic is not None:
            critic = critic.resolved(self, reward is not None)
            if critic.kind == "separate":
                if critic.weights == "reward_model" and reward is not None:
                    parts["critic"], _ = loading.load_scorer(reward, model, vocab, merged=True)
                else:
                    parts["critic"] = loading.load_base(source.base, model, vocab)
            width = parts["critic" if critic.kind == "separate" else "policy"].config.hidden_size
            heads["critic"] = critic.new_head(width, heads.get("reward_model"))
        trunk = critic is not None and critic.kind == "trunk"
        roles = loading.make_roles(parts, heads, switch=lambda role: None, trunk_critic=trunk)
        loading.train_only(roles, [p for role in ("policy", "critic") for p in self.parameters(roles, role)])
        return roles

    def parameters(self, roles: nn.Module, role: str) -> list[nn.Parameter]:
        """All of the role's model (a critic has no use for the output embedding, unless it is tied) and its head."""
        head = list(roles.heads["critic"].parameters()) if "critic" in roles.heads else []
        if role == "policy":
            return list(roles.model(role).parameters()) + (head if roles.trunk_critic else [])
        return list(roles.model(role).base_model.parameters()) + head if role in roles.role_of else []

    def payload(self, roles: nn.Module) -> Payload:
        """Whole weights."""
        return Payload(lambda: self.sync_payload(roles))

    def sync_payload(self, roles: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every weight of the policy."""
        return loading.named_weights(roles.model("policy"))

    def saved(self, roles: nn.Module) -> Any:
        """The model that `save` writes."""
        return roles.model("policy")

    def save(self, roles: nn.Module, folder: Path) -> None:
        """The policy as a whole model."""
        roles.model("policy").save_pretrained(folder)
