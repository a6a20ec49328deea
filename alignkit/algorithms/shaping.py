"""Around the token-level maths: where a response ends, what its score becomes, and what scales both from step to step.

All names here are names of `functional` too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def truncate_at_stop(response_ids: Tensor, stop_ids: Sequence[int], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut each response after its first stop token: ([B, T] i64 ids, [B, T] bool mask, [B] bool has_stop).

    The stop token is kept and counts, wherever it stands; what follows becomes `pad_id`. Without one all T tokens
    count. ValueError where the pad is a stop token: the end of a response could not be told from its padding.
    """
    if pad_id in stop_ids:
        raise ValueError(f"pad_id {pad_id} is also in stop_ids {list(stop_ids)}: give padding a token of its own")
    stops = torch.isin(response_ids, torch.tensor(list(stop_ids), dtype=response_ids.dtype, device=response_ids.device))
    mask = stops.cumsum(-1) - stops.long() == 0  # no stop strictly before
    return response_ids.masked_fill(~mask, pad_id), mask, stops.any(-1)


def clip_scores(scores: Tensor, limit: float | None) -> Tensor:
    """`scores` within +-`limit`; None leaves them. Of the raw score, before the KL penalty."""
    if limit is not None and limit <= 0:
        raise ValueError(f"score limit is {limit}, expected a positive number or None")
    return scores if limit is None else scores.clamp(-limit, limit)


def with_one_end(ids: Tensor, mask: Tensor, ends: Sequence[int]) -> Tensor:
    """ids [B, L] in which a row that ends with one of `ends` ends with the first of them."""
    slots = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, slots, -1).amax(dim=1, keepdim=True).clamp(min=0)
    end = ids.gather(1, last)
    ended = torch.isin(end, torch.tensor(ends, device=ids.device)) & mask.gather(1, last)
    return ids.scatter(1, last, end.masked_fill(ended, ends[0]))


def missing_eos(scores: Tensor, finished: Tensor, mode: str = "replace", value: float = -1.0) -> Tensor:
    """`scores` [B] with a penalty where not `finished` [B]; after normalising and clipping, so it keeps its meaning.

    `at_most`: the score becomes `value` where it was above it, so a cut answer is never worth more than it scored;
    `replace`: the score becomes `value` (lm-human-preferences, summarize_from_feedback_details);
    `subtract`: it loses |`value`| (trl's `missing_eos_penalty`); `none`: nothing.
    """
    if scores.shape != finished.shape:
        raise ValueError(f"scores have shape {tuple(scores.shape)} and finished {tuple(finished.shape)}: must be equal")
    penalised = {
        "at_most": scores.clamp(max=value),
        "replace": torch.full_like(scores, value),
        "subtract": scores - abs(value),
        "none": scores,
    }
    if mode not in penalised:
        raise ValueError(f"missing_eos mode={mode!r}, expected one of {', '.join(penalised)}")
    return torch.where(finished.bool(), scores, penalised[mode])


def score_gain_bias(scores: Tensor, mean: float = 0.0, std: float | None = None) -> tuple[float, float]:
    """(gain, bias) such that gain * scores + bias has this mean, and this population std unless `std` is None.

    With a std: `set_reward_norm` of lm-human-preferences. Without: gain 1, the bias of summarize_from_feedback_details,
    computed there on the scores of the reference answers.
    """
    scores = scores.double()
    gain = 1.0 if std is None else float(std / scores.std(correction=0))
    if not math.isfinite(gain):
        raise ValueError(f"{scores.numel()} scores, all equal, cannot be scaled to std {std}")
    return gain, float(mean - gain * scores.mean())


class RunningMoments:
    """Mean and unbiased std of all scores seen so far, merged batch by batch (Chan et al. 1983; float64)."""

    def __init__(self) -> None:
        self.count, self.mean, self.deviations = 0.0, 0.0, 0.0

    @property
    def std(self) -> float:
        """1 until two scores differ by more than rounding."""
        variance = self.deviations / max(self.count - 1, 1)
        return math.sqrt(variance) if variance > (1e-6 * self.mean) ** 2 else 1.0

    def update(self, moments: Tensor) -> None:
        """Take a batch in; `moments` [3]: its `masked_moments`, summed over ranks so that every rank holds the same."""
        count, total, squares = (float(x) for x in moments)
        if not math.isfinite(total + squares):
            raise ValueError(f"scores must be finite, got sum {total} and sum of squares {squares}")
        if count == 0:
            return
        mean, merged = total / count, self.count + count
        gap = mean - self.mean
        self.deviations += max(squares - total * mean, 0.0) + gap * gap * self.count * count / merged
        self.mean += gap * count / merged
        self.count = merged

    def normalise(self, scores: Tensor) -> Tensor:
        """(scores - mean) / std, of the shape of `scores`."""
        return (scores - self.mean) / self.std

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "deviations": self.deviations}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.deviations = state["count"], state["mean"], state["deviations"]


class FixedKL:
    """A KL coefficient that stays: the twin of `AdaptiveKL`."""

    def __init__(self, value: float) -> None:
        self.value = value

    def update(self, kl_per_sequence: float, n_sequences: int) -> None:
        pass

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


class AdaptiveKL(FixedKL):
    """A KL coefficient steered towards a KL of `target` nats per sequence (Ziegler et al. 2019, section 2.2).

    value *= 1 + clip(KL / target - 1, +-0.2) * n / horizon, as `AdaptiveKLController` of lm-human-preferences.
    """

    def __init__(self, init: float, target: float, horizon: float) -> None:
        if target <= 0 or horizon <= 0:
            raise ValueError(f"adaptive KL needs target > 0 and horizon > 0, got target={target} and horizon={horizon}")
        super().__init__(init)
        self.target, self.horizon = target, horizon

    def update(self, kl_per_sequence: float, n_sequences: int) -> None:
        """After the PPO step: `kl_per_sequence` is the mean over the GLOBAL batch of the sum over tokens of k1, in nats,
        and `n_sequences` the size of that batch."""
        if not math.isfinite(kl_per_sequence):
            raise ValueError(f"KL per sequence is {kl_per_sequence}, expected a finite number")
        error = min(max(float(kl_per_sequence) / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * float(n_sequences) / self.horizon
