"""Sampling with vLLM in the training process, one engine a rank, on a GPU or with vLLM's CPU build."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignkit.rollout.base import Context, Sampling, pack_rollouts, stream_seeds
from alignkit.types import PromptBatch, Rollouts, RunError

if TYPE_CHECKING:
    from torch import Tensor, nn

# Engines of this process. When one is collected, vLLM destroys the process group that the trainer still needs.
_ENGINES: list[Any] = []


@dataclass
class VLLM(Sampling):
    """vLLM with the policy's weights pushed after every update."""

    name: str = "vllm"
    kv_cache_gib: float = 1.0  # key-value cache of the CPU build
    gpu_memory_utilization: float = 0.3  # share of the device that vLLM may take, weights and cache
    enforce_eager: bool = True  # no CUDA graphs: starts faster, decodes slower on a GPU

    def start(self, context: Context) -> VLLMSampler:
        """Start the engine and load the base model."""
        return VLLMSampler(self, context)


class VLLMSampler:
    """A started vLLM engine; see `Sampler`."""

    def __init__(self, config: VLLM, context: Context) -> None:
        import torch

        self.sampling, self.context, self.version = config, context, 0
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: weights are pushed without a copy
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(config.kv_cache_gib)))
        self.cpu = not torch.cuda.is_available()
        from vllm import LLM

        device = {} if self.cpu else {"gpu_memory_utilization": config.gpu_memory_utilization}
        self.llm = LLM(
            context.base,
            skip_tokenizer_init=True,  # token ids in, token ids out: one tokenization in the project
            dtype=context.dtype,
            max_model_len=context.max_model_len,
            max_num_seqs=min(context.max_sequences, 256),
            enforce_eager=config.enforce_eager,
            enable_chunked_prefill=False,  # a prompt cut in two draws twice from its stream, and breaks on a CPU
            max_num_batched_tokens=max(context.max_model_len, 4096),
            enable_prefix_caching=False,  # its blocks would outlive the weights that filled them
            generation_config="vllm",  # never the checkpoint's own temperature or top-p
            logprobs_mode="processed_logprobs",  # of the law that was sampled from, temperature included
            distributed_executor_backend="external_launcher",
            trust_remote_code=context.trust_remote_code,
            seed=context.seed,
            **device,
        )
        _ENGINES.append(self.llm)

    def sync_weights(self, payload: Callable[[], Iterable[tuple[str, Tensor]]], version: int) -> None:
        """Load the policy's whole weights, adapters folded in."""
        if version <= self.version:
            raise RunError(f"weights of version {version} pushed over version {self.version}: versions only grow")
        self.llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": iter(payload()), "is_checkpoint_format": True}
        )
        if self.cpu:
            self.llm.apply_model(_repack_tied_head)
        self.llm.reset_prefix_cache()
        self.version = version

    def use(self, roles: nn.Module) -> None:
        """Nothing to do: weights arrive by `sync_weights`."""

    def generate(self, prompts: PromptBatch, group_size: int, seed: int, step: int) -> Rollouts:
        from vllm import SamplingParams

        law = self.sampling
        rows = zip(prompts.prompt_ids, prompts.prompt_mask, strict=True)
        requests = [{"prompt_token_ids": row[mask].tolist()} for row, mask in rows for _ in range(group_size)]
        params = [
            SamplingParams(
                temperature=law.temperature,
                top_p=law.top_p,
                top_k=law.top_k,
                min_tokens=law.min_tokens,
                max_tokens=law.max_new_tokens,
                logprobs=0,
                seed=stream,
                stop_token_ids=[self.context.eos_id, *(law.stop_token_ids or [])],
                detokenize=False,
            )
            for stream in stream_seeds(prompts, group_size, seed, step)
        ]
        outputs = [out.outputs[0] for out in self.llm.generate(requests, params, use_tqdm=False)]
        tokens = [list(out.token_ids) for out in outputs]
        logprobs = [[at[t].logprob for t, at in zip(out.token_ids, out.logprobs, strict=True)] for out in outputs]
        finished = [out.finish_reason == "stop" for out in outputs]
        return pack_rollouts(
            prompts, group_size, tokens, logprobs, finished, self.context, self.version, law.max_new_tokens
        )

    def close(self) -> None:
        """Nothing: the engine ends with the process, see `_ENGINES`."""


def _repack_tied_head(model: Any) -> None:
    """The CPU build keeps a packed copy of lm_head; a reload leaves it stale when it is tied to the embedding."""
    head = getattr(model, "lm_head", None)
    if head is not None and getattr(head, "quant_method", None) is not None:
        head.quant_method.process_weights_after_loading(head)
