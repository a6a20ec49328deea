"""Low-rank adapters (arXiv 2106.09685): one frozen base, one adapter a role."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from alignkit.core.errors import InputError
from alignkit.core.fields import num
from alignkit.core.types import Payload
from alignkit.finetune.critic import Critic
from alignkit.models import adapters, architectures, loaded, loading, score_heads
from alignkit.models.config import Model
from alignkit.models.loaded import copy_adapter
from alignkit.models.score_heads import load_head

if TYPE_CHECKING:
    from torch import Tensor, nn

    from alignkit.core.types import ModelSource


@dataclass
class LoRA:
    """Adapters of rank `rank` on the frozen base."""

    name: str = "lora"
    rank: int = num(16, ge=1)
    alpha: float = num(32.0, gt=0)  # the update is scaled by alpha / rank
    dropout: float = num(0.0, ge=0, lt=1)  # in SFT and reward training; PPO runs without
    target_modules: Any = "all-linear"  # or a list of module names, as in PEFT
    last_layers: int | None = num(None, ge=1)  # adapt only the last so many blocks, where backward stops; None: all

    critic_kinds: ClassVar[tuple[str, ...]] = ("adapter", "trunk", "separate")
    nf4: ClassVar[bool] = False  # the base is held in 4 bits

    @property
    def adapter_rank(self) -> int | None:
        """Of the adapter that a sync may send; None: it sends whole weights."""
        return self.rank

    def check(self, stage: Any) -> None:
        """Goes with everything."""

    def check_start(self, start: ModelSource | None, scores: bool = False) -> None:
        """Refuse to continue an adapter that is more than LoRA, of another shape than this config describes, or of a base
        held otherwise. Reads JSON only. `scores`: it is the reward model of PPO, with a head."""
        if start is None or start.adapter is None:
            return
        adapter = start.adapter
        if start.run is not None and start.nf4 != self.nf4:
            held, fix = ("in 4 bits", "qlora") if start.nf4 else ("unquantised", "lora")
            raise InputError(f"finetune={self.name}, but {adapter} was trained on the base {held}: use finetune={fix}")
        saved = adapters.read_config(adapter)
        own = ("target_parameters", "rank_pattern", "alpha_pattern")  # how PEFT adapts experts, in a run of ours
        experts = own if start.run is not None else ()
        told = {key: value for key, value in saved.items() if key not in experts}
        adapters.check_continued(start, told, self.name, scores)
        layers = saved.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        theirs = {"rank": saved.get("r"), "alpha": saved.get("lora_alpha"), "last_layers": layers and len(layers)}
        if theirs != {"rank": self.rank, "alpha": self.alpha, "last_layers": self.last_layers}:
            ours = f"rank={self.rank} alpha={self.alpha:g} last_layers={self.last_layers}"
            fix = " ".join(
                f"finetune.{key}={'null' if value is None else f'{value:g}'}" for key, value in theirs.items()
            )
            raise InputError(f"finetune has {ours}, but {adapter} was trained with another shape: give {fix}")

    def check_reward(self, reward: ModelSource | None, policy: ModelSource | None) -> None:
        """As `check_start`, of a reward run whose adapter lies on the policy's base: the critic starts as it.

        Any other reward model is held as it is, beside the base.
        """
        if reward is None or policy is None or reward.run is None:
            return
        if reward.adapter is not None and score_heads.place(reward.base) == score_heads.place(policy.base):
            self.check_start(reward, scores=True)

    def critic_starts_as(self, reward: ModelSource, policy: ModelSource) -> bool:
        """Whether a critic can start as that reward model: it is an adapter on the policy's base."""
        return score_heads.shares_base(reward, policy.base, self.nf4)

    def peft_config(self, task_type: str, hf: nn.Module) -> Any:
        """PEFT's LoraConfig for `hf`."""
        from peft import LoraConfig
        from torch import nn
        from transformers.pytorch_utils import Conv1D  # GPT-2's linear layers

        layers = None
        if self.last_layers is not None:
            count = hf.config.num_hidden_layers
            if not 0 < self.last_layers <= count:
                raise InputError(f"finetune.last_layers={self.last_layers}: the model has {count} layers")
            layers = list(range(count - self.last_layers, count))
        targets = self.target_modules
        if layers is not None and targets == "all-linear":  # PEFT takes layers only beside module names
            targets = sorted(
                {n.rsplit(".", 1)[-1] for n, m in hf.base_model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
            )
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            layers_to_transform=layers,
            task_type=task_type,
        )

    def roles(
        self,
        model: Model,
        source: ModelSource,
        reward: ModelSource | None,
        vocab: int,
        critic: Critic | None,
        seed: int,
    ) -> nn.Module:
        """One base with adapters `policy` (trained), `ref_policy` (frozen), `critic` and `reward_model`.

        `policy` and `ref_policy` start as the SFT adapter of `source`; without one the policy is a fresh adapter and
        the reference is the bare base. `critic` says what the critic starts as; None: an algorithm without one.
        """
        import torch
        from peft import PeftModel, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.check_start(source)
        self.check_reward(reward, source)
        torch.manual_seed(seed)
        hf = loading.load_base(source.base, model, vocab, nf4=self.nf4)
        heads: dict[str, nn.Linear] = {}
        adapters: set[str] = set()
        if source.adapter is not None:
            peft = PeftModel.from_pretrained(
                hf, source.adapter, adapter_name="policy", is_trainable=True, autocast_adapter_dtype=False
            )
            peft.load_adapter(source.adapter, adapter_name="ref_policy", autocast_adapter_dtype=False)
            for role in ("policy", "ref_policy"):
                loaded.check_adapter(peft, source.adapter, role)
            adapters |= {"policy", "ref_policy"}
        else:
            peft = get_peft_model(
                hf, self.peft_config("CAUSAL_LM", hf), adapter_name="policy", autocast_adapter_dtype=False
            )
            adapters |= {"policy"}
        shared = reward is not None and score_heads.shares_base(reward, source.base, self.nf4)
        parts = dict.fromkeys(("policy", "ref_policy"), hf)
        if reward is not None and shared:
            assert reward.adapter is not None  # what is shared is an adapter
            _load_trunk_adapter(peft, reward.adapter, "reward_model")
            parts["reward_model"], heads["reward_model"] = hf, load_head(reward)
            adapters |= {"reward_model"}
        elif reward is not None:
            parts["reward_model"], heads["reward_model"] = loading.load_scorer(reward, model, vocab)
        pefts = [peft]
        if critic is not None:
            critic.check_reward(self, reward, source)
            critic = critic.resolved(self, shared)
            heads["critic"] = critic.new_head(hf.config.hidden_size, heads.get("reward_model"))
            start = reward if critic.weights == "reward_model" and reward is not None else source
            if critic.kind == "adapter":
                self._add_critic(peft, hf, start.adapter)
                parts["critic"], adapters = hf, adapters | {"critic"}
            elif critic.kind == "separate":
                parts["critic"] = loading.load_base(source.base, model, vocab, nf4=self.nf4)
                config = self.peft_config("CAUSAL_LM", parts["critic"])
                pefts += [get_peft_model(parts["critic"], config, adapter_name="critic", autocast_adapter_dtype=False)]
                if start.adapter is not None:
                    copy_adapter(pefts[1], start.adapter, "critic")
        for each in pefts:
            loading.disable_dropout(each)
        layers = [m for m in peft.modules() if isinstance(m, BaseTunerLayer)]  # not of a reward model of its own

        def switch(role: str) -> None:
            # Not set_adapter(): it costs tens of milliseconds and resets requires_grad (peft 0.21.2).
            for layer in layers:
                layer._active_adapter = [role if role in adapters else "policy"]
                layer._disable_adapters = role not in adapters

        trunk = critic is not None and critic.kind == "trunk"
        roles = loading.make_roles(parts, heads, switch, trunk_critic=trunk)
        roles.peft, roles.adapters = pefts, adapters  # in a list: not a submodule a second time
        loading.train_only(roles, [p for role in ("policy", "critic") for p in self.parameters(roles, role)])
        return roles

    def _add_critic(self, peft: Any, hf: nn.Module, start: Path | None) -> None:
        """The adapter `critic` on the shared base: a copy of the one in `start`, or a new one."""
        if start is not None:
            _load_trunk_adapter(peft, start, "critic")
        else:
            peft.add_adapter("critic", self.peft_config("CAUSAL_LM", hf), autocast_adapter_dtype=False)

    def parameters(self, roles: nn.Module, role: str) -> list[nn.Parameter]:
        """The adapter of `role` and its head."""
        own = [p for name, p in roles.models.named_parameters() if f".{role}." in name]
        with_head = (role == "critic" and not roles.trunk_critic) or (role == "policy" and roles.trunk_critic)
        return own + (list(roles.heads["critic"].parameters()) if with_head and "critic" in roles.heads else [])

    def payload(self, roles: nn.Module) -> Payload:
        """The folded weights, or the adapter's files."""
        return Payload(lambda: self.sync_payload(roles), lambda folder: self.save(roles, folder))

    def sync_payload(self, roles: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every weight of the base with the policy adapter folded in; the base itself is not touched."""
        return architectures.checkpoint_names(roles.model("policy"), self._folded(roles))

    def _folded(self, roles: nn.Module) -> Iterator[tuple[str, Tensor]]:
        import torch
        from peft.tuners.lora import LoraLayer

        hf = roles.model("policy")
        adapted = {  # a mixture's experts are tensors of one module, which PEFT wraps once for each
            _without_wrappers(f"{name}.{getattr(module, 'parameter_name', 'weight')}"): module
            for name, module in hf.named_modules()
            if isinstance(module, LoraLayer) and "policy" in module.lora_A
        }
        for name, tensor in loading.held_weights(hf):
            if ".lora_" in name:
                continue
            name = _without_wrappers(name)
            if name in adapted:
                with torch.no_grad():
                    tensor = tensor + adapted[name].get_delta_weight("policy")
            yield name, tensor

    def saved(self, roles: nn.Module) -> Any:
        """The model that `save` writes the policy's adapter of."""
        return roles.peft[0]

    def save(self, roles: nn.Module, folder: Path) -> None:
        """The policy adapter, in PEFT's layout, as `<folder>/adapter_model.safetensors`."""
        peft = roles.peft[0]
        peft.save_pretrained(folder, selected_adapters=["policy"], save_embedding_layers=False)
        nested = folder / "policy"  # PEFT nests every adapter that is not called "default"
        for file in nested.iterdir():
            file.rename(folder / file.name)
        nested.rmdir()


def _load_trunk_adapter(peft: Any, folder: Path, name: str) -> None:
    """Load a sequence classifier's adapter onto a causal LM: the same trunk; its head is kept apart, see `load_head`."""
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(folder)
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, False
    peft.add_adapter(name, config, autocast_adapter_dtype=False)
    copy_adapter(peft, folder, name)


def _without_wrappers(name: str) -> str:
    """The name of a weight before PEFT wrapped its module."""
    return re.sub(r"(\.base_layer)+(?=\.)", "", name)
