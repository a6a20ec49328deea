"""What DeepSpeed is told: the options of `deepspeed=`, each a ZeRO stage (arXiv 1910.02054) and where its state lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignkit.core.errors import InputError
from alignkit.core.fields import num


@dataclass
class ZeRO:
    """How optimizer state (1), gradients (2) and parameters (3) are shared out over the ranks. Sizes are in elements."""

    name: str = ""
    stage: int = 0
    offload_optimizer: bool = False  # optimizer state in host memory, stepped there by torch's AdamW (stages 1 to 3)
    offload_param: bool = False  # parameters in host memory between their uses (stage 3)
    pin_memory: bool = False  # of what is offloaded: faster copies to a GPU, memory that cannot be swapped out
    overlap_comm: bool = False  # reduce gradients while backward goes on; a second stream and more memory on a GPU
    reduce_bucket_size: int = num(50_000_000, ge=1)  # gradients reduced together (stages 1 to 3)
    allgather_bucket_size: int = num(50_000_000, ge=1)  # updated parameters gathered together (stages 1 and 2)
    prefetch_bucket_size: int = num(
        0, ge=0
    )  # parameters gathered ahead (stage 3); in PPO, where roles take turns, none
    max_live_parameters: int = num(1_000_000_000, ge=1)  # gathered at once (stage 3)
    persistence_threshold: int = num(0, ge=0)  # elements; a smaller parameter stays whole on every rank (stage 3)

    def check(self, dtype: str) -> None:
        """Raise InputError for combinations without a meaning, or with a trap."""
        for key, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
            if getattr(self, key) and self.stage not in stages:
                raise InputError(
                    f"deepspeed.{key}=true with deepspeed={self.name} (stage {self.stage}): it needs stage "
                    f"{' or '.join(map(str, stages))}"
                )
        if self.stage == 0 and dtype == "bfloat16":
            raise InputError(
                "deepspeed=zero0 with model.dtype=bfloat16: stage 0 rounds the optimizer's steps to bfloat16 and learns less; "
                "use deepspeed=zero1, whose master weights are float32"
            )

    def config(self, *, dtype: str, micro_batch_size: int, world: int, accumulation: int, max_grad_norm: float) -> dict:
        """The dict given to `deepspeed.initialize` or to TRL. Gradient clipping is always written: its silent default is 1.0."""
        zero: dict[str, Any] = {"stage": self.stage, "contiguous_gradients": False, "overlap_comm": self.overlap_comm}
        if self.stage:
            zero["reduce_bucket_size"] = self.reduce_bucket_size
        if self.stage in (1, 2):
            zero["allgather_bucket_size"] = self.allgather_bucket_size
        if self.stage == 3:
            zero |= {
                "stage3_prefetch_bucket_size": self.prefetch_bucket_size,
                "stage3_max_live_parameters": self.max_live_parameters,
                "stage3_max_reuse_distance": self.max_live_parameters,
                "stage3_param_persistence_threshold": self.persistence_threshold,
                "memory_efficient_linear": False,  # its default replaces torch's linear in the whole process, vLLM's too
                "stage3_gather_16bit_weights_on_model_save": True,  # or TRL's trainers cannot save
            }
        if self.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.pin_memory}
        if self.offload_param:
            zero["offload_param"] = {"device": "cpu", "pin_memory": self.pin_memory}
        return {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": micro_batch_size * accumulation * world,
            "gradient_clipping": max_grad_norm,
            "bf16": {"enabled": dtype == "bfloat16"},
            "fp16": {"enabled": False},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # ours is torch's AdamW, on the host too
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
        }


@dataclass
class Zero0(ZeRO):
    """No sharding: plain data parallelism."""

    name: str = "zero0"
    stage: int = 0


@dataclass
class Zero1(ZeRO):
    """Optimizer state is sharded over the ranks."""

    name: str = "zero1"
    stage: int = 1


@dataclass
class Zero2(ZeRO):
    """Optimizer state and gradients are sharded."""

    name: str = "zero2"
    stage: int = 2


@dataclass
class Zero2Offload(ZeRO):
    """As zero2, with the optimizer state in host memory."""

    name: str = "zero2_offload"
    stage: int = 2
    offload_optimizer: bool = True


@dataclass
class Zero3(ZeRO):
    """Optimizer state, gradients and all parameters, the frozen base's too, are sharded."""

    name: str = "zero3"
    stage: int = 3


@dataclass
class Zero3Offload(ZeRO):
    """As zero3, with optimizer state and parameters in host memory."""

    name: str = "zero3_offload"
    stage: int = 3
    offload_optimizer: bool = True
    offload_param: bool = True
