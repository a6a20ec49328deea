"""Sampling with vLLM in the training process, one engine a rank, on a GPU or with vLLM's CPU build."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.core.errors import InputError, RunError
from alignkit.core.fields import num
from alignkit.core.types import Payload, PromptBatch, Rollouts
from alignkit.models import architectures
from alignkit.rollout.base import LORA_RANKS, Context, Sampling, pack_rollouts, stream_seeds

if TYPE_CHECKING:
    from torch import nn

# Engines of this process. When one is collected, vLLM destroys the process group that the trainer still needs.
_ENGINES: list[Any] = []


@dataclass
class VLLM(Sampling):
    """vLLM with the policy's weights pushed after every update."""

    name: str = "vllm"
    payload: str = "auto"  # adapter | merged | auto: what a sync sends; auto: the adapter on a GPU, merged on a CPU
    prefix_caching: bool = True  # prompts with the same beginning share its keys and values; emptied at every sync
    kv_cache_gib: float = num(1.0, gt=0)  # key-value cache of the CPU build
    gpu_memory_utilization: float = num(0.3, gt=0, le=1)  # share of the device that vLLM may take, weights and cache
    enforce_eager: bool = True  # no CUDA graphs: starts faster, decodes slower on a GPU
    sleep: bool = False  # leave the GPU's memory to the trainer between rollouts; without effect on a CPU

    @property
    def adapters_only(self) -> bool:
        return self.payload == "adapter"

    def check(self) -> None:
        super().check()
        if self.payload not in ("auto", "adapter", "merged"):
            raise InputError(f"rollout.payload={self.payload}: expected auto, adapter or merged")

    def start(self, context: Context) -> VLLMSampler:
        """Start the engine and load the base model."""
        return VLLMSampler(self, context)


class VLLMSampler:
    """A started vLLM engine; see `Sampler`."""

    copies = 1

    def __init__(self, config: VLLM, context: Context) -> None:
        import torch

        self.sampling, self.context, self.version = config, context, 0
        self.cpu = not torch.cuda.is_available()
        self.payload, self.why = choose_payload(config.payload, context.adapter_rank, self.cpu, _is_mixture(context))
        self.lora: Any = None  # the request that names the present adapter
        self.folder = Path(tempfile.mkdtemp(prefix="sync-", dir=context.scratch))
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: weights are pushed without a copy
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(config.kv_cache_gib)))
        if "RANK" not in os.environ:  # outside a launcher: a world of one
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        from vllm.platforms import current_platform

        if self.cpu:  # before vLLM's modules read it: compiling the sampler's small kernels takes longer than they save
            current_platform.simple_compile_backend = "eager"
        from vllm import LLM

        device: dict[str, Any] = {}
        if not self.cpu:
            device = {"gpu_memory_utilization": config.gpu_memory_utilization, "enable_sleep_mode": config.sleep}
        if self.payload == "adapter":
            rank = next(r for r in LORA_RANKS if r >= (context.adapter_rank or 0))
            device |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 1}
        with classes_left_alone():
            self.llm = LLM(
                context.base,
                skip_tokenizer_init=True,  # token ids in, token ids out: one tokenization in the project
                dtype=context.dtype,
                max_model_len=context.max_model_len,
                max_num_seqs=min(context.max_sequences, 256),
                enforce_eager=config.enforce_eager,
                enable_chunked_prefill=False,  # a prompt cut in two draws twice from its stream, and breaks on a CPU
                max_num_batched_tokens=max(context.max_model_len, 4096),
                enable_prefix_caching=config.prefix_caching,
                generation_config="vllm",  # never the checkpoint's own temperature or top-p
                logprobs_mode="processed_logprobs",  # of the law that was sampled from, temperature included
                distributed_executor_backend="external_launcher",
                trust_remote_code=context.trust_remote_code,
                seed=context.seed,
                **device,
            )
        _ENGINES.append(self.llm)

    def describe(self) -> str:
        """What a sync sends, and why."""
        awake = "; rollout.sleep=true has no effect on a CPU" if self.cpu and self.sampling.sleep else ""
        return (
            f"vLLM: a sync sends {'the adapter' if self.payload == 'adapter' else 'whole weights'} ({self.why}){awake}"
        )

    def sync_weights(self, payload: Payload, version: int) -> None:
        """Send the adapter or the whole weights, then forget the keys and values of the old ones."""
        if version <= self.version:
            raise RunError(f"weights of version {version} pushed over version {self.version}: versions only grow")
        if self.payload == "adapter":
            self._send_adapter(payload, version)
        else:
            self._send_weights(payload)
        self.llm.reset_prefix_cache()
        self.version = version

    def _send_adapter(self, payload: Payload, version: int) -> None:
        from vllm.lora.request import LoRARequest

        if payload.save_adapter is None:  # the base as it is
            self.lora = None
            return
        folder, old = self.folder / f"version_{version}", self.lora
        try:
            payload.save_adapter(folder)
        except OSError as error:
            raise RunError(f"sync: the adapter of version {version} cannot be written to {folder}: {error}") from error
        self.lora = LoRARequest(f"policy-{version}", version, str(folder))
        if not self.llm.llm_engine.add_lora(self.lora):
            raise RunError(f"vLLM did not take the adapter of version {version} in {folder}")
        if old is not None:
            self.llm.llm_engine.remove_lora(old.lora_int_id)
            shutil.rmtree(old.lora_path)

    def _send_weights(self, payload: Payload) -> None:
        if self.cpu:
            self.llm.apply_model(_pack_experts_anew)
        self.llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": iter(payload.weights()), "is_checkpoint_format": True}
        )
        if self.cpu:
            self.repack_tied_head()

    def repack_tied_head(self) -> None:
        """The CPU build keeps a packed copy of lm_head; a reload leaves it stale when it is tied to the embedding."""
        self.llm.apply_model(_repack_tied_head)

    def remedies(self) -> list[tuple[str, Callable[[], None]]]:
        found: list[tuple[str, Callable[[], None]]] = [
            (
                "its prefix cache kept keys and values of older weights: reset it after every sync",
                lambda: self.llm.reset_prefix_cache(),
            )
        ]
        if self.cpu and self.payload == "merged":
            stale = "its packed copy of the output embedding is older than the embedding it is tied to: repack it"
            found.append((stale, self.repack_tied_head))
        return found

    def use(self, roles: nn.Module) -> None:
        """Nothing to do: weights arrive by `sync_weights`."""

    def generate(
        self, prompts: PromptBatch, group_size: int, seed: int, step: int, law: Sampling | None = None
    ) -> Rollouts:
        from vllm import SamplingParams

        law = law or self.sampling
        slots = law.max_new_tokens
        rows = zip(prompts.prompt_ids, prompts.prompt_mask, strict=True)
        requests = [{"prompt_token_ids": row[mask].tolist()} for row, mask in rows for _ in range(group_size)]
        params = [
            SamplingParams(
                temperature=law.temperature,
                top_p=law.top_p,
                top_k=law.top_k,
                min_tokens=law.min_tokens,
                max_tokens=slots,
                logprobs=0,
                seed=stream,
                stop_token_ids=self.context.stop_ids(law),
                detokenize=False,
            )
            for stream in stream_seeds(prompts, group_size, seed, step)
        ]
        answers = self.llm.generate(requests, params, use_tqdm=False, lora_request=self.lora)
        outputs = [answer.outputs[0] for answer in answers]
        tokens = [list(out.token_ids) for out in outputs]
        logprobs = [[at[t].logprob for t, at in zip(out.token_ids, out.logprobs, strict=True)] for out in outputs]
        finished = [out.finish_reason == "stop" for out in outputs]
        return pack_rollouts(prompts, group_size, tokens, logprobs, finished, self.context, self.version, slots)

    def sleep(self) -> None:
        """Weights to host memory, the cache is dropped: vLLM's level 1."""
        if self.sampling.sleep and not self.cpu:
            self.llm.sleep(level=1)

    def wake(self) -> None:
        if self.sampling.sleep and not self.cpu:
            self.llm.wake_up()

    def close(self) -> None:
        """Remove the adapters' folder. The engine ends with the process, see `_ENGINES`."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def classes_left_alone() -> Iterator[None]:
    """Inside, vLLM changes subclasses of its own where it would change transformers' classes.

    An architecture that vLLM has no code for runs there as transformers' own class, which vLLM makes one of its compiled
    modules in place: with another base, `__init__` and `__call__`. The trainer's model is of that class too, and would
    ask for what only vLLM's instance has. Here a subclass is decorated instead, and what is built meanwhile becomes its
    instance; at the end the class is what it was, and each engine keeps a subclass of its own.
    """
    from vllm.compilation import decorators

    decorate = decorators._support_torch_compile
    changed: list[tuple[type, dict[str, Any]]] = []

    def decorate_subclass(cls: type, *args: Any, **kwargs: Any) -> type:
        if cls.__module__.startswith("vllm."):
            return decorate(cls, *args, **kwargs)
        names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        own = decorate(type(cls)(cls.__name__, (cls,), names), *args, **kwargs)

        def build(self: Any, *args: Any, **kwargs: Any) -> None:
            self.__class__ = own
            own.__init__(self, *args, **kwargs)  # type: ignore[misc]

        changed.append((cls, {"__init__": vars(cls)["__init__"]} if "__init__" in vars(cls) else {}))
        cls.__init__ = build  # type: ignore[misc]
        return cls

    decorators._support_torch_compile = decorate_subclass
    try:
        yield
    finally:
        decorators._support_torch_compile = decorate
        for cls, before in reversed(changed):
            del cls.__init__  # type: ignore[misc]
            for name, value in before.items():
                setattr(cls, name, value)


def _is_mixture(context: Context) -> bool:
    return context.roles is not None and architectures.is_mixture(context.roles.models[0].config.to_dict())  # type: ignore[index, union-attr]


def choose_payload(wanted: str, adapter_rank: int | None, cpu: bool, experts: bool = False) -> tuple[str, str]:
    """(adapter | merged, why) for a policy whose adapter has this rank (None: all its weights train)."""
    if adapter_rank is None:
        if wanted == "adapter":
            raise InputError("rollout.payload=adapter, but the policy has no adapter: use merged or auto")
        return "merged", "all of them train"
    if adapter_rank > LORA_RANKS[-1]:
        if wanted == "adapter":
            raise InputError(
                f"rollout.payload=adapter with finetune.rank={adapter_rank}: vLLM takes {LORA_RANKS[-1]} at most"
            )
        return "merged", f"vLLM takes no adapter of rank {adapter_rank}"
    if wanted != "auto":
        return wanted, f"rollout.payload={wanted}"
    if experts:
        return "merged", "the adapter folded in: it is on the experts of a mixture"
    if cpu:
        return "merged", "the adapter folded in: the CPU build computes adapters slowly"
    return "adapter", "megabytes instead of gigabytes"


def _repack_tied_head(model: Any) -> None:
    head = getattr(model, "lm_head", None)
    if head is not None and getattr(head, "quant_method", None) is not None:
        head.quant_method.process_weights_after_loading(head)


def _pack_experts_anew(model: Any) -> None:
    """The CPU build packs a mixture's experts once, beside making their kernel: without one a reload makes both again."""
    for layer in model.modules():
        if getattr(getattr(layer, "quant_method", None), "moe_kernel", None) is not None:
            layer.quant_method.moe_kernel = None
