"""Proof, after every sync, that the engine answers with the trainer's weights: a canary, sampled and scored again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from alignkit.core.errors import RunError
from alignkit.core.types import PromptBatch, Rollouts
from alignkit.data import tokens
from alignkit.rollout.base import Sampling
from alignkit.training import batches

TOKENS = 4  # sampled for the canary
# How far the engine's log-probs may be from the trainer's, in nats: (largest, mean); None: not bounded.
BOUNDS: dict[str, tuple[float | None, float]] = {"float32": (1e-3, 1e-3), "bfloat16": (None, 0.15)}
# The trainer moved if its log-probs of the last canary did so by more than this.
MOVED = {"float32": 1e-5, "bfloat16": 3e-2}


@dataclass
class Canary:
    """A fixed prompt and what the engine and the trainer last said about it."""

    prompts: PromptBatch
    dtype: str
    temperature: float
    seed: int
    last: Rollouts | None = None
    last_logprobs: torch.Tensor | None = None

    @classmethod
    def of(cls, cfg: Any, prompts: list[dict], tokenizer: Any) -> Canary:
        """The stage's first prompts in a row, up to 132 tokens: a block of a CPU engine's prefix cache has 128."""
        ids = [token for prompt in prompts[:64] for token in prompt["ids"]][: min(cfg.max_prompt_length, 132)]
        batch = tokens.collate_prompts([prompts[0] | {"ids": ids, "index": -1}], tokenizer.pad_token_id)
        return cls(batch, cfg.model.dtype, cfg.rollout.temperature, cfg.seed)

    @torch.no_grad()
    def check(self, sampler: Any, roles: torch.nn.Module, version: int) -> dict[str, float]:
        """Metrics of the gap; called right after `sampler.sync_weights(…, version)`.

        Raises:
            RunError: the engine is not at `version`, its log-probs are further from the trainer's than the dtype allows,
                or the trainer's weights moved and the engine's answers did not. The message says what is likely wrong.
        """
        rollouts = self.sample(sampler)
        if rollouts.policy_version != version:
            raise RunError(
                f"sync: the engine answers with weights of version {rollouts.policy_version}, the trainer is at {version}: "
                "a sync was skipped"
            )
        logprobs = self.score(roles, rollouts)
        largest, mean = gap(rollouts, logprobs)
        if self.last is not None and same_answers(self.last, rollouts):
            assert self.last_logprobs is not None
            moved = float((logprobs - self.last_logprobs)[rollouts.response_mask].abs().max())
            if moved > MOVED[self.dtype]:
                raise RunError(
                    f"sync: the engine is stale: the trainer's log-probs of the canary moved by {moved:.2g} nats since version "
                    f"{version - 1}, the engine's not at all; version {version} never reached it, or old weights did under its "
                    "name"
                )
        if self.too_far(largest, mean):
            raise RunError(self.explain(sampler, roles, rollouts, largest, mean, version))
        self.last, self.last_logprobs = rollouts, logprobs
        return {"rollout/canary_gap_max": largest, "rollout/canary_gap": mean}

    def sample(self, sampler: Any) -> Rollouts:
        """A few tokens a prompt by the policy's own law, whatever bias the run's sampling has, on every engine."""
        law = sampler.sampling
        plain = Sampling(law.temperature, min(TOKENS, law.max_new_tokens), law.stop_token_ids)
        return sampler.generate(self.prompts, sampler.copies, self.seed, -1, plain)

    def score(self, roles: torch.nn.Module, rollouts: Rollouts, temperature: float | None = None) -> torch.Tensor:
        """The trainer's log-probs [N, TOKENS] of what the engine sampled."""
        device = next(roles.parameters()).device
        ids, mask, starts = (part.to(device) for part in rollouts.flush_left())

        def policy(*rows: Any) -> torch.Tensor:
            return roles("policy", *rows, temperature or self.temperature)[0]

        slots = rollouts.response_mask.shape[1]
        return batches.map_rows(policy, ids, mask, starts, slots, len(ids)).float().cpu()

    def too_far(self, largest: float, mean: float) -> bool:
        bound, mean_bound = BOUNDS[self.dtype]
        return not (mean <= mean_bound and (bound is None or largest <= bound))  # true for nan as well

    def explain(
        self, sampler: Any, roles: torch.nn.Module, rollouts: Rollouts, largest: float, mean: float, version: int
    ) -> str:
        """What is likely wrong, found by trying."""
        head = f"sync: at version {version} engine and trainer differ by up to {largest:.2g} nats (mean {mean:.2g}): "
        for temperature in (sampler.sampling.temperature, 1.0, self.temperature**2, 1 / self.temperature):
            if not self.too_far(*gap(rollouts, self.score(roles, rollouts, temperature))):
                return head + (
                    f"they use different temperatures (the engine's answers fit {temperature:g}, the trainer's is "
                    f"{self.temperature:g}); rollout.temperature must reach both"
                )
        for name, scale in (("was applied twice", 2.0), ("never arrived", 0.0)):
            with scaled_adapter(roles, scale) as there:
                if there and not self.too_far(*gap(rollouts, self.score(roles, rollouts))):
                    return head + f"the policy's adapter {name}"
        for cause, mend in sampler.remedies():
            mend()
            again = self.sample(sampler)
            if not self.too_far(*gap(again, self.score(roles, again))):
                return head + cause
        return head + (
            "another base model, dtype or chat template than the trainer's, most likely"
            if self.last is None
            else "weights were damaged on the way (they agreed at the last sync)"
        )


def gap(rollouts: Rollouts, logprobs: torch.Tensor) -> tuple[float, float]:
    """(largest, mean) distance of the engine's log-probs from the trainer's, in nats."""
    far = (rollouts.rollout_logprobs - logprobs)[rollouts.response_mask].abs()
    return float(far.max()), float(far.mean())


def same_answers(one: Rollouts, other: Rollouts) -> bool:
    """Whether two canaries have the same tokens and the very same log-probs."""
    return torch.equal(one.response_ids, other.response_ids) and torch.equal(
        one.rollout_logprobs, other.rollout_logprobs
    )


@contextmanager
def scaled_adapter(roles: torch.nn.Module, factor: float) -> Iterator[bool]:
    """Inside, the policy's adapter counts `factor` times; yields whether there is one."""
    from peft.tuners.lora import LoraLayer

    layers = [m for m in roles.modules() if isinstance(m, LoraLayer) and "policy" in m.scaling]
    before = [layer.scaling["policy"] for layer in layers]
    for layer, scale in zip(layers, before, strict=True):
        layer.scaling["policy"] = factor * scale
    try:
        yield bool(layers)
    finally:
        for layer, scale in zip(layers, before, strict=True):
            layer.scaling["policy"] = scale
