"""QLoRA (arXiv 2305.14314): adapters on a frozen base whose linear layers are held in 4 bits (NF4, scales quantised too)."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from alignkit.core.errors import InputError
from alignkit.core.types import Payload
from alignkit.finetune.lora import LoRA

if TYPE_CHECKING:
    from torch import nn


@dataclass
class QLoRA(LoRA):
    """LoRA on a base in 4 bits: its linear layers take an eighth of float32's memory and are computed in model.dtype."""

    name: str = "qlora"

    nf4: ClassVar[bool] = True

    @property
    def adapter_rank(self) -> int | None:
        """None: an engine that holds the unquantised base would answer by another law with the adapter on it."""
        return None

    def check(self, stage: Any) -> None:
        """Refuse what cannot hold: 4-bit weights cut by ZeRO-3, and adapters sent onto another base."""
        if importlib.util.find_spec("bitsandbytes") is None:
            raise InputError("finetune=qlora needs bitsandbytes, which is not installed: pip install 'alignkit[qlora]'")
        if stage.deepspeed.stage == 3:
            raise InputError(
                f"finetune=qlora with deepspeed={stage.deepspeed.name}: stage 3 cuts up weights, and those in 4 bits come with "
                "scales that it does not; use deepspeed=zero2"
            )
        rollout = getattr(stage, "rollout", None)
        if rollout is not None and (rollout.name == "server" or getattr(rollout, "payload", None) == "adapter"):
            told = "rollout=server" if rollout.name == "server" else "rollout.payload=adapter"
            raise InputError(
                f"finetune=qlora with {told}: an adapter of a 4-bit base on the engine's unquantised one is another policy; "
                "use rollout=vllm with rollout.payload=merged, or rollout=hf"
            )

    def payload(self, roles: nn.Module) -> Payload:
        """The weights the trainer computes with, written out and the adapter folded in; never the adapter alone."""
        return Payload(lambda: self.sync_payload(roles))
