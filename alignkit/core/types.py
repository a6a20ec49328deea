"""What flows between the steps of the pipeline: one dataclass a step, a shape on every field.

Letters used in shapes: P prompts and B = P * group_size sequences on this rank (the answers to one prompt are
neighbours), Lp prompt slots (padded on the left), Lr response slots (padded on the right), V vocabulary.
A mask is True where the token counts, everywhere.

Nothing here imports torch when it is imported: composing a config stays fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# {name: (sum, count)}: ranks add sums and counts, and divide once. See `training.engine.World.reduce_metrics`.
Metrics = dict[str, tuple[Any, Any]]
# One chat message, {"role": ..., "content": ...}; a conversation is a list of them.
Message = dict[str, str]


@dataclass
class _Select:
    """Row selection, shared by every dataclass whose tensors have the sequence as first axis."""

    def select(self, index: Tensor | slice):
        """The same fields with only the rows of `index` ([N] i64 or a slice)."""

        def pick(value):
            if value is None or isinstance(value, (int, float, str, bool)):
                return value
            if isinstance(value, _Select):
                return value.select(index)
            if isinstance(value, dict):
                return {key: pick(item) for key, item in value.items()}
            if isinstance(value, list):
                return value[index] if isinstance(index, slice) else [value[int(i)] for i in index]
            return value[index]

        return type(self)(**{f.name: pick(getattr(self, f.name)) for f in fields(self)})


@dataclass
class PromptBatch(_Select):
    """Prompts of one rank, ready to be answered."""

    prompt_ids: Tensor  # [P, Lp] i64, left-padded
    prompt_mask: Tensor  # [P, Lp] bool
    prompt_index: Tensor  # [P] i64, the row of the data set: names the prompt's random streams
    draw: Tensor  # [P] i64, how often the prompt came before in this batch: its answers differ from those
    meta: list[dict[str, Any]]  # P rows as the user wrote them ("prompt", "reference", own columns)


@dataclass
class Rollouts(_Select):
    """Prompts with one sampled response each."""

    prompt_ids: Tensor  # [B, Lp] i64, left-padded
    prompt_mask: Tensor  # [B, Lp] bool
    response_ids: Tensor  # [B, Lr] i64, right-padded
    response_mask: Tensor  # [B, Lr] bool, True including the stop token
    rollout_logprobs: Tensor  # [B, Lr] f32, log-probs under the sampler's own law; 0 outside the mask
    finished: Tensor  # [B] bool, True where a stop token ended the response
    meta: list[dict[str, Any]]  # B rows
    policy_version: int  # of the weights that sampled them

    @property
    def ids(self) -> Tensor:
        """[B, Lp + Lr] i64: prompt and response."""
        import torch

        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @property
    def mask(self) -> Tensor:
        """[B, Lp + Lr] bool."""
        import torch

        return torch.cat([self.prompt_mask, self.response_mask], dim=1)

    def flush_left(self) -> tuple[Tensor, Tensor, Tensor]:
        """(ids [B, L] i64, mask [B, L] bool, starts [B] i64): each row from slot 0 on, its response from `starts` on.

        All padding is then at the end of the rows, so that rows of like length fit together.
        """
        import torch

        mask = self.mask
        slots = torch.arange(mask.shape[1], device=mask.device)
        first = torch.where(mask, slots, mask.shape[1]).amin(1)
        at = slots + first[:, None]
        inside = at < mask.shape[1]
        at = at.clamp(max=mask.shape[1] - 1)
        return self.ids.gather(1, at), mask.gather(1, at) & inside, self.prompt_ids.shape[1] - first


@dataclass
class ScoredRollouts(_Select):
    """Rollouts with one raw score a sequence."""

    rollouts: Rollouts
    scores: Tensor  # [B] f32, the weighted sum of the parts
    score_parts: dict[str, Tensor] = field(default_factory=dict)  # {reward name: [B] f32}


@dataclass
class Experience(_Select):
    """All that an update of policy and critic reads."""

    ids: Tensor  # [B, L] i64, prompt and response from slot 0 on, padded at the end
    mask: Tensor  # [B, L] bool
    starts: Tensor  # [B] i64, the slot of the first response token
    response_mask: Tensor  # [B, Lr] bool
    value_mask: Tensor  # [B, Lr] bool, the slots with a reward and a value
    old_logprobs: Tensor  # [B, Lr] f32, trainer's, before the first update of this batch
    ref_logprobs: Tensor  # [B, Lr] f32
    rollout_logprobs: Tensor  # [B, Lr] f32, the sampler's
    rewards: Tensor  # [B, Lr] f32, token level, after the KL penalty
    advantages: Tensor  # [B, Lr] f32, 0 outside the mask
    values: Tensor | None  # [B, Lr] f32, before the update; None without a critic
    returns: Tensor | None  # [B, Lr] f32, from unwhitened advantages; None without a critic
    weights: Tensor | None = (
        None  # [B, Lr] f32, importance of the trainer's law over the sampler's; None: not corrected
    )
    kl_coef: float = 0.0  # of the KL as a term of the loss
    shared_states: Tensor | None = None  # [B, L, d], after the blocks that no role adapts; None: not kept


@dataclass
class Loss:
    """A loss before normalisation: `engine` divides once, by the count of the whole optimizer step."""

    total: Tensor  # [] sum over tokens (or sequences)
    count: Tensor  # [] how many were summed
    metrics: Metrics = field(default_factory=dict)


@dataclass
class Payload:
    """What a sync may send: whole weights, or the files of an adapter."""

    weights: Callable[[], Iterable[tuple[str, Tensor]]]  # (name, tensor) of the policy, adapters folded in
    save_adapter: Callable[[Path], None] | None = None  # write the policy's adapter to a folder; None: it has none


Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class ModelSource:
    """Where the weights of a model are, resolved from a hub id, a folder, a run or a packaged demo model."""

    base: str  # hub id or folder of the whole model
    adapter: Path | None = None  # folder with adapter_model.safetensors on top of it
    tokenizer: str = ""  # hub id or folder
    run: Path | None = None  # the finished run it came from
    nf4: bool = False  # the adapter was trained on the base in 4 bits
