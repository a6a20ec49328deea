"""Sampling with the trainer's own forward: slow, obvious, and the twin the fast engine is checked against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.core.types import Payload, PromptBatch, Rollouts
from alignkit.rollout.base import Context, Sampling, pack_rollouts, stream_seeds

if TYPE_CHECKING:
    from torch import nn


@dataclass
class HF(Sampling):
    """transformers' forward with its key-value cache, one token at a time."""

    name: str = "hf"

    def start(self, context: Context) -> HFSampler:
        """Samples with `context.roles`."""
        return HFSampler(self, context)


class HFSampler:
    """Samples with the very weights that train, so there is nothing to sync and the gap is rounding."""

    copies = 1

    def __init__(self, sampling: HF, context: Context) -> None:
        self.sampling, self.context, self.version, self.role = sampling, context, 0, "policy"

    def sync_weights(self, payload: Payload, version: int) -> None:
        self.version = version

    def remedies(self) -> list:
        return []

    def describe(self) -> str:
        return "hf: samples with the weights that train, nothing is sent"

    def use(self, roles: nn.Module) -> None:
        self.context.roles = roles

    def generate(
        self, prompts: PromptBatch, group_size: int, seed: int, step: int, law: Sampling | None = None
    ) -> Rollouts:
        import torch

        from alignkit.models.loading import is_cut, position_ids

        roles, context, law = self.context.roles, self.context, law or self.sampling
        assert roles is not None  # every stage gives one
        roles.switch(self.role)
        hf = roles.model(self.role)
        ids = prompts.prompt_ids.repeat_interleave(group_size, 0).to(hf.device)
        mask = prompts.prompt_mask.repeat_interleave(group_size, 0).to(hf.device)
        streams = [torch.Generator(hf.device).manual_seed(s) for s in stream_seeds(prompts, group_size, seed, step)]
        stops = torch.tensor(context.stop_ids(law), device=hf.device)
        slots = law.max_new_tokens
        rows, done, cache = len(ids), torch.zeros(len(ids), dtype=torch.bool, device=hf.device), None
        cut = is_cut(hf)
        tokens: list[list[int]] = [[] for _ in range(rows)]
        logprobs: list[list[float]] = [[] for _ in range(rows)]
        step_ids, positions = ids.masked_fill(~mask, 0), position_ids(mask)
        with torch.no_grad():
            for generated in range(slots):
                # An index of the last states copies them. Of a slice torch makes a batch, and in bfloat16 on a CPU copies
                # a frozen head once a row.
                out = hf(
                    input_ids=step_ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache,
                    use_cache=True, logits_to_keep=torch.tensor([step_ids.shape[1] - 1], device=hf.device),
                )  # fmt: skip
                cache = out.past_key_values
                law_logprobs = law.adjust(out.logits[:, -1, : hf.trained_rows], generated, stops)
                # Exponential races: argmin E/p with E ~ Exp(1) is a draw from p, one stream a row.
                race = torch.stack(
                    [torch.empty(law_logprobs.shape[1], device=hf.device).exponential_(generator=g) for g in streams]
                )
                drawn = (law_logprobs - race.log()).argmax(-1)
                picked = law_logprobs.gather(1, drawn[:, None]).squeeze(1)
                for row in (~done).nonzero().flatten().tolist():
                    tokens[row].append(int(drawn[row]))
                    logprobs[row].append(float(picked[row]))
                step_ids, positions = drawn[:, None], mask.sum(1, keepdim=True)
                mask = torch.cat([mask, ~done[:, None]], dim=1)
                done = done | torch.isin(drawn, stops)
                if context.everywhere(bool(done.all())) if cut else done.all():
                    break
        return pack_rollouts(prompts, group_size, tokens, logprobs, done.tolist(), context, self.version, slots)

    def sleep(self) -> None:
        """Nothing: its weights are the trainer's."""

    def wake(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing of its own to free."""
