"""What every rollout engine is asked for, and the parts they share."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from alignkit.core.errors import InputError
from alignkit.core.fields import num
from alignkit.core.types import ModelSource, Payload, PromptBatch, Rollouts

if TYPE_CHECKING:
    from torch import Tensor, nn


LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank may be


@dataclass
class Sampling:
    """The sampler's law, the same in every engine."""

    temperature: float = num(1.0, gt=0)  # of the sampler, policy, old, reference and entropy alike
    max_new_tokens: int = num(64, ge=1)  # slots of a response, the stop token included
    stop_token_ids: list[int] | None = None  # stop there as well as at what ends an answer of the model
    top_p: float = num(1.0, gt=0, le=1)  # sample from the likeliest tokens that hold this much probability; 1: from all
    top_k: int = num(0, ge=0)  # sample from the so many likeliest tokens; 0: from all
    min_tokens: int = num(0, ge=0)  # no stop token before so many tokens
    allow_biased_sampling: bool = False  # let PPO learn from another law than the policy's (top_p, top_k, min_tokens)

    @property
    def adapters_only(self) -> bool:
        """Whether a sync sends adapters and never whole weights."""
        return False

    def check(self) -> None:
        """Raise InputError where two fields contradict each other."""
        if self.min_tokens > self.max_new_tokens:
            raise InputError(
                f"rollout.min_tokens={self.min_tokens} with rollout.max_new_tokens={self.max_new_tokens}: "
                "expected min_tokens <= max_new_tokens"
            )

    @property
    def biased(self) -> str:
        """The settings by which the sampler's law is not the policy's, as rollout.top_p=0.9; "" where it is.

        Log-ratios of what such a sampler says estimate no KL: they may well be negative on average.
        """
        return " and ".join(
            f"rollout.{name}={getattr(self, name)}"
            for name, plain in (("top_p", 1.0), ("top_k", 0), ("min_tokens", 0))
            if getattr(self, name) != plain
        )

    def notes(self) -> list[str]:
        """What a person should know before it starts."""
        return []

    def check_unbiased(self, kl_target: float | None = None) -> None:
        """Raise InputError where the sampler's law is not the policy's: the KL to the reference would be wrong.

        `kl_target`: the KL that the coefficient adapts to, if it does.
        """
        if self.biased and not self.allow_biased_sampling:
            raise InputError(
                f"{self.biased}: PPO would learn from another law than the policy's, and its KL could come out "
                "negative; leave it out, or set rollout.allow_biased_sampling=true"
            )
        if self.biased and kl_target is not None:
            raise InputError(
                f"algorithm.adaptive_kl_target={kl_target} with {self.biased}: answers of another law than the policy's tell no "
                "KL to adapt to; use a fixed algorithm.kl_coef, or sample from the policy's law"
            )

    def adjust(self, logits: Tensor, generated: int, stop_ids: Tensor) -> Tensor:
        """Log-probs [b, V] of the sampler's law from logits [b, V], after `generated` tokens of the response.

        min_tokens, temperature, top_k, top_p, in vLLM's order; what is ruled out has -inf.
        """
        logits = logits.float() / self.temperature
        if generated < self.min_tokens:
            logits = logits.index_fill(1, stop_ids, float("-inf"))
        if self.top_k and self.top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k, dim=1).values[:, -1:], float("-inf"))
        if self.top_p < 1:
            ordered, place = logits.sort(1, descending=True)
            before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)  # probability of what is likelier
            logits = logits.masked_fill((before >= self.top_p).gather(1, place.argsort(1)), float("-inf"))
        return logits.log_softmax(1)


class Sampler(Protocol):
    """A started engine."""

    def generate(
        self, prompts: PromptBatch, group_size: int, seed: int, step: int, law: Sampling | None = None
    ) -> Rollouts:
        """`group_size` responses a prompt, siblings adjacent, by another law than the config's where one is given."""

    def sync_weights(self, payload: Payload, version: int) -> None:
        """Make the engine answer with the policy's present weights, called `version` from now on."""

    def describe(self) -> str:
        """What a sync sends and why, in words."""

    copies: int  # how many engines answer

    def remedies(self) -> list[tuple[str, Callable[[], None]]]:
        """(what may be wrong with its copy of the weights, what would mend it), for the diagnosis of a failed sync."""

    def use(self, roles: nn.Module) -> None:
        """Sample for another module from the next `sync_weights` on."""

    def sleep(self) -> None:
        """Give the device memory of weights and cache to the trainer until `wake`, where the engine can."""

    def wake(self) -> None:
        """Take it back, before the next `sync_weights`."""

    def close(self) -> None:
        """Free what the engine holds."""


@dataclass
class Context:
    """What an engine is started with."""

    base: str  # hub id or folder of the base model
    dtype: str
    seed: int
    max_model_len: int  # prompt + response slots
    eos_id: int
    pad_id: int
    max_sequences: int  # at once
    trust_remote_code: bool = False
    roles: nn.Module | None = None  # the trainer's module, for engines that sample with it
    adapter_rank: int | None = None  # of the policy's adapter; None: whole weights are synced
    scratch: Path | None = None  # where adapters lie on their way to the engine; None: the temporary folder
    tokenizer: str = ""  # hub id or folder, for engines in other processes
    note: Callable[[str], None] = lambda text: None  # tell the person who watches the run
    stops: Sequence[int] = ()  # what ends a response of this model, beside eos_id

    def stop_ids(self, law: Sampling) -> list[int]:
        """What ends a response under `law`: what does in this model, and rollout.stop_token_ids."""
        return list(dict.fromkeys([self.eos_id, *self.stops, *(law.stop_token_ids or [])]))

    @property
    def rank(self) -> int:
        """Of this process among the trainer's."""
        import torch.distributed as dist

        return dist.get_rank() if dist.is_initialized() else 0

    def shared(self, item: Any) -> Any:
        """Rank 0's `item`, on every rank."""
        import torch.distributed as dist

        if not dist.is_initialized() or dist.get_world_size() == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def everywhere(self, here: bool) -> bool:
        """Whether it is so on every rank; called by all ranks."""
        import torch.distributed as dist

        if not dist.is_initialized() or dist.get_world_size() == 1:
            return here
        found: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(found, here)
        return all(found)

    @classmethod
    def of(
        cls,
        cfg: Any,
        source: ModelSource,
        tokenizer: Any,
        *,
        max_sequences: int,
        roles: nn.Module,
        adapter_rank: int | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> Context:
        """The context of a stage's config. `adapter_rank`: of what will be synced, where it is; else finetune.rank."""
        from alignkit.data import tokens

        return cls(
            base=source.base,
            dtype=cfg.model.dtype,
            seed=cfg.seed,
            max_model_len=cfg.max_prompt_length + cfg.rollout.max_new_tokens,
            eos_id=tokenizer.eos_token_id,
            stops=tokens.stops(tokenizer),
            pad_id=tokenizer.pad_token_id,
            max_sequences=max_sequences,
            trust_remote_code=cfg.model.trust_remote_code,
            roles=roles,
            adapter_rank=adapter_rank or getattr(getattr(cfg, "finetune", None), "adapter_rank", None),
            tokenizer=source.tokenizer,
            note=note,
            scratch=cfg.run_dir if cfg.run_dir.is_dir() else None,
        )


def stored_rank(law: Sampling, sources: Iterable[ModelSource]) -> int | None:
    """The largest rank of the adapters of policies that do not train, for an engine that takes nothing else."""
    files = [source.adapter / "adapter_config.json" for source in sources if source.adapter is not None]
    return (
        max((json.loads(file.read_text(encoding="utf-8"))["r"] for file in files), default=None)
        if law.adapters_only
        else None
    )


def stored_policy(source: ModelSource, weights: Callable[[], Iterable[tuple[str, Tensor]]]) -> Payload:
    """What a sync may send of a policy that does not train: whole weights, or its adapter's files as they lie."""

    def copy(folder: Path) -> None:
        assert source.adapter is not None
        folder.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(source.adapter / name, folder / name)

    return Payload(weights, copy if source.adapter is not None else None)


def stream_seed(seed: int, step: int, prompt: int, sample: int) -> int:
    """The random stream of one response (31 bits): keyed by run, step, prompt and sample, so neither batching nor ranks matter."""
    key = f"{seed}/{step}/{prompt}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") >> 1


def stream_seeds(prompts: PromptBatch, group_size: int, seed: int, step: int) -> list[int]:
    """The stream of each of the P * group_size responses, siblings adjacent."""
    draws = zip(prompts.prompt_index.tolist(), prompts.draw.tolist(), strict=True)
    return [stream_seed(seed, step, prompt, draw * group_size + k) for prompt, draw in draws for k in range(group_size)]


def pack_rollouts(
    prompts: PromptBatch,
    group_size: int,
    tokens: list[list[int]],
    logprobs: list[list[float]],
    finished: list[bool],
    context: Context,
    version: int,
    max_new_tokens: int,
) -> Rollouts:
    """Lists of B = P * group_size responses -> padded tensors of `max_new_tokens` slots."""
    import torch

    rows = len(tokens)
    ids = torch.full((rows, max_new_tokens), context.pad_id, dtype=torch.long)
    mask = torch.zeros((rows, max_new_tokens), dtype=torch.bool)
    taken = torch.zeros((rows, max_new_tokens), dtype=torch.float32)
    for row, (response, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        n = len(response)
        ids[row, :n] = torch.tensor(response, dtype=torch.long)
        mask[row, :n] = True
        taken[row, :n] = torch.tensor(logprob, dtype=torch.float32)

    def repeat(x: Any) -> Any:
        return x.repeat_interleave(group_size, dim=0)

    meta = [row | {"prompt_index": int(i)} for row, i in zip(prompts.meta, prompts.prompt_index, strict=True)]
    return Rollouts(
        prompt_ids=repeat(prompts.prompt_ids),
        prompt_mask=repeat(prompts.prompt_mask),
        response_ids=ids,
        response_mask=mask,
        rollout_logprobs=taken,
        finished=torch.tensor(finished, dtype=torch.bool),
        meta=[row for row in meta for _ in range(group_size)],
        policy_version=version,
    )
