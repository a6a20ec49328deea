"""The tensor maths of the pipeline: tensors in, tensors out; no config, ranks, models or logging.

Conventions, everywhere below:
- time is the last axis; [..., T] is usually [B, T]. A mask is bool or {0, 1}, and True where the token counts.
- what lies outside a mask is never read: it may be NaN or inf, in values and in gradients.
- any float dtype is taken; the maths is done and returned in float32, or in float64 where an input is float64.
- nothing broadcasts: tensors whose shapes differ raise ValueError with both shapes.
- a loss returns (total, count, metrics): the sum over what counts, how many, and {name: (sum, count)}. Nothing is
  divided here, so micro-batches and ranks add up; a metric whose name ends in `_max` is reduced by max instead.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from alignkit.algorithms.shaping import (  # noqa: F401  these are names of this module too
    AdaptiveKL,
    FixedKL,
    RunningMoments,
    clip_scores,
    missing_eos,
    score_gain_bias,
    truncate_at_stop,
    with_one_end,
)
from alignkit.core.types import Metrics

LOG_RATIO_LIMIT = 20.0  # log-ratios are held within +-20 before exp: e^20 is finite in every dtype used here
CHUNK_ELEMENTS = 2**24  # logits upcast at a time by `entropy` and `response_logprobs` (64 MiB of float32)

AGGREGATIONS = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
KL_LOSS_ESTIMATORS = ("k2", "k1+", "k3+")
SCORE_SLOTS = ("on_last_token", "after_eos")
IMPORTANCE_MODES = ("token", "sequence", "icepop")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}, expected one of {', '.join(choices)}")


def _same_shape(**tensors: Tensor | None) -> None:
    given = {name: tuple(x.shape) for name, x in tensors.items() if x is not None}
    first, shape = next(iter(given.items()))
    for name, other in given.items():
        if other != shape:
            raise ValueError(f"{first} has shape {shape} and {name} {other}: they must be equal, nothing is broadcast")


def _valid(mask: Tensor, **tensors: Tensor | None):
    """(bool mask, *tensors): wide, with zeros outside the mask, in values and in gradients. One shape, or ValueError."""
    _same_shape(mask=mask, **tensors)
    mask = mask.bool()
    return mask, *(None if x is None else _wide(x).masked_fill(~mask, 0) for x in tensors.values())


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` [...] where `mask` [...] -> []; 0 where the mask is empty."""
    mask, x = _valid(mask, x=x)
    return x.sum() / mask.sum().clamp(min=1)


def masked_moments(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """[3] float64: count, sum and sum of squares of `x` where `mask`. Ranks add theirs up to get the global ones."""
    mask, x = _valid(torch.ones_like(x) if mask is None else mask, x=x.double())
    return torch.stack([mask.sum().double(), x.sum(), x.square().sum()])


def _mean_and_variance(x: Tensor, mask: Tensor, moments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [] float64: of `x` where the bool `mask`, or as read from summed `masked_moments`."""
    if moments is not None:
        count, total, squares = moments.double().unbind()
        mean, mean_square = total / count.clamp(min=1), squares / count.clamp(min=1)
        variance = mean_square - mean.square()
        return mean, variance.masked_fill(variance <= 1e-13 * mean_square, 0)  # what rounding leaves of a constant
    count = mask.sum().clamp(min=1)
    mean = x.double().sum() / count
    mean = mean + (x - mean).masked_fill(~mask, 0).sum() / count  # the second pass makes a constant's mean exact
    return mean, (x - mean).masked_fill(~mask, 0).square().sum() / count


def whiten(
    x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8, moments: Tensor | None = None
) -> Tensor:
    """`x` [...] to mean 0 and biased variance 1 over `mask`, and exactly 0 outside it.

    (x - mean) / sqrt(variance + eps), as `masked_whiten` of summarize_from_feedback_details/ppo.py; the mean is added
    back where `shift_mean` is False. A constant or a single valid token gives 0. `moments` [3]: `masked_moments`
    summed over ranks, to whiten over the global batch.
    """
    mask, x = _valid(mask, x=x)
    mean, variance = _mean_and_variance(x, mask, moments)
    white = (x.double() - mean) * torch.rsqrt(variance + eps)
    return (white if shift_mean else white + mean).masked_fill(~mask, 0).to(x.dtype)


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, moments: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over `mask` [...] -> [], as cleanrl/ppo.py; 0 where Var(returns) is 0.

    `moments`: `masked_moments` of (returns - values) and of returns, each summed over ranks.
    """
    mask, values, returns = _valid(mask, values=values, returns=returns)
    of_errors, of_returns = moments or (None, None)
    _, unexplained = _mean_and_variance(returns - values, mask, of_errors)
    _, variance = _mean_and_variance(returns, mask, of_returns)
    explained = 1 - unexplained / variance.masked_fill(variance == 0, 1)
    return explained.masked_fill(variance == 0, 0).to(returns.dtype)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimates of KL(policy || ref) from sampled tokens, of the inputs' shape (Schulman 2020).

    With r = logprobs - ref_logprobs: k1 = r; k2 = r^2 / 2; k3 = e^-r - 1 + r (>= 0; r held within +-20); abs = |r|.
    Unbiased: k1 and k3. In a reward only k1 is right, in a loss only k2 (see `kl_loss`).
    """
    _one_of("KL estimator", estimator, KL_ESTIMATORS)
    _same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    r = _wide(logprobs) - _wide(ref_logprobs)
    if estimator == "k3":
        r = r.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        return torch.expm1(-r) + r
    return {"k1": r, "k2": 0.5 * r.square(), "abs": r.abs()}[estimator]


def score_position(mask: Tensor, score_slot: str = "on_last_token") -> Tensor:
    """[..., T] bool, True at the one slot of a row that gets its score; an empty row has none.

    `on_last_token`: the last valid token (lm-human-preferences, OpenRLHF, verl); `after_eos`: the slot behind it, where
    there is one (summarize_from_feedback_details, trl). There, values and advantages use `mask | score_position(...)`.
    """
    _one_of("score_slot", score_slot, SCORE_SLOTS)
    steps = torch.arange(mask.shape[-1], device=mask.device)
    last = (mask.bool() * (steps + 1)).amax(-1, keepdim=True) - 1
    slot = last if score_slot == "on_last_token" else (last + 1).clamp(max=mask.shape[-1] - 1)
    return (steps == slot) & (last >= 0)


@torch.no_grad()
def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    kl_coef: float,
    estimator: str = "k1",
    score_slot: str = "on_last_token",
) -> Tensor:
    """[..., T] rewards: -kl_coef * KL estimate on every valid token, plus the score [...] on one slot; no gradient.

    Ziegler et al. 2019, eq. 2, token by token. `score_slot`: see `score_position`.
    """
    mask, logprobs, ref_logprobs = _valid(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    _same_shape(scores=scores, **{"the rows of logprobs": logprobs[..., 0]})
    penalty = kl_coef * kl_estimate(logprobs, ref_logprobs, estimator)
    return torch.where(score_position(mask, score_slot), _wide(scores).unsqueeze(-1), 0.0) - penalty


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, eq. 16): (advantages, returns) [..., T], 0 outside the mask.

    Over valid tokens only: delta_t = r_t + gamma V_next - V_t and A_t = delta_t + gamma lambda A_next, where next is
    the next VALID token, across masked spans inside a response too (verl's rule), and 0 behind the last one.
    returns = A + V. Neither carries a gradient.
    """
    mask, rewards, values = _valid(mask, rewards=rewards, values=values)
    advantages = torch.zeros_like(rewards + values)
    next_value = next_advantage = advantages.new_zeros(advantages.shape[:-1])
    for t in reversed(range(mask.shape[-1])):
        valid = mask[..., t]
        delta = rewards[..., t] + gamma * next_value - values[..., t]
        next_advantage = torch.where(valid, delta + gamma * gae_lambda * next_advantage, next_advantage)
        next_value = torch.where(valid, values[..., t], next_value)
        advantages[..., t] = next_advantage.masked_fill(~valid, 0)
    return advantages, advantages + values


def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    mode: str = "token",
    cap: float | None = 2.0,
    floor: float | None = None,
) -> Tensor:
    """[..., T] detached weights pi_old / pi_rollout that correct for a sampler that is not the trainer; 0 outside the mask.

    `token`: the ratio of each token, held within [floor, cap]; `sequence`: the product over the response, likewise, on
    each of its tokens; `icepop`: the token's ratio, and 0 where it leaves [floor, cap]. A bound of None is not there.
    Log-ratios are held within +-20. `compute_rollout_correction_weights` of verl's rollout_corr_helper.py.
    """
    _one_of("importance mode", mode, IMPORTANCE_MODES)
    low, high = 0.0 if floor is None else floor, math.inf if cap is None else cap
    if not 0 <= low < high:
        raise ValueError(f"importance weights need 0 <= floor < cap, got floor={floor} and cap={cap}")
    mask, old_logprobs, rollout_logprobs = _valid(mask, old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs)
    log_ratio = (old_logprobs - rollout_logprobs).detach()
    if mode == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)
    weights = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    held = weights.clamp(low, high)
    return (torch.where(weights == held, weights, 0) if mode == "icepop" else held).masked_fill(~mask, 0)


def _terms(total: Tensor, count: Tensor, aggregation: str) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of a mean, from sums and counts per sequence [B]; an empty sequence is in neither."""
    _one_of("aggregation", aggregation, AGGREGATIONS)
    _same_shape(total=total, count=count)
    if total.ndim > 1 or (total.ndim == 0 and aggregation != "token_mean"):
        raise ValueError(f"{aggregation} needs sums and counts per sequence [B], got shape {tuple(total.shape)}")
    if aggregation == "token_mean":
        return total.sum(), count.sum().to(total.dtype)
    per_sequence = total / count.clamp(min=1) if aggregation == "sequence_mean_token_mean" else total
    return per_sequence.masked_fill(count == 0, 0).sum(), (count > 0).sum().to(total.dtype)


def sum_tokens(x: Tensor, mask: Tensor, aggregation: str = "token_mean") -> tuple[Tensor, Tensor]:
    """(total [], count []) of per-token terms `x` [..., T]: what a step adds up over micro-batches and ranks, then divides.

    `token_mean`: the sum over tokens, and the tokens; `sequence_mean_token_mean`: the sum over sequences of their token
    means, and the sequences; `sequence_mean_token_sum`: the sum over tokens, and the sequences. Empty rows do not count.
    """
    mask, x = _valid(mask, x=x)
    return _terms(x.sum(-1).flatten(), mask.sum(-1).flatten(), aggregation)


def aggregate(
    total: Tensor, count: Tensor, mode: str = "token_mean", denominator: Tensor | float | None = None
) -> Tensor:
    """The loss [] from sums and counts per sequence [B] (token_mean also takes two scalars).

    `denominator`: tokens or sequences of the whole optimizer step, where this batch is a part of it; the results of
    the parts then add up to the loss of the step. 0 where nothing counts. The modes are those of `sum_tokens`.
    """
    total, own = _terms(_wide(total), count, mode)
    return total / torch.as_tensor(own if denominator is None else denominator).clamp(min=1)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
    aggregation: str = "token_mean",
) -> tuple[Tensor, Tensor, Metrics]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7, sign flipped): (total [], count [], metrics).

    Per token max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range_high)), rho = exp(logprobs - old_logprobs), the
    log-ratio held within +-20; all inputs [..., T]. `dual_clip` c > 1 bounds it by -c A where A < 0 (Ye et al. 2019,
    eq. 5). `weights`: detached factors per token (`importance_weights`). Only `logprobs` receives a gradient.
    Metrics: policy/loss, clip_fraction (the clipped branch won), approx_kl (half the mean squared log-ratio, as trl),
    ratio, ratio_max, ratio_guarded (tokens beyond +-20), and dual_clip_fraction where it is on.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip is {dual_clip}, expected more than 1 (3 is usual) or None")
    mask, logprobs, old_logprobs, advantages, weights = _valid(
        mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, weights=weights
    )
    raw_log_ratio, advantages = logprobs - old_logprobs.detach(), advantages.detach()
    log_ratio = raw_log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    high = clip_range if clip_range_high is None else clip_range_high
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + high)
    loss = torch.maximum(unclipped, clipped)
    counted = {
        "policy/clip_fraction": clipped > unclipped,
        "policy/approx_kl": 0.5 * log_ratio.square(),
        "policy/ratio": ratio,
        "policy/ratio_guarded": raw_log_ratio.abs() > LOG_RATIO_LIMIT,
    }
    if dual_clip is not None:
        bound = -dual_clip * advantages
        counted["policy/dual_clip_fraction"] = (advantages < 0) & (loss > bound)
        loss = torch.where(advantages < 0, torch.minimum(loss, bound), loss)
    if weights is not None:
        loss = loss * weights.detach()
    total, count = sum_tokens(loss, mask, aggregation)
    metrics = {name: sum_tokens(x.detach(), mask) for name, x in counted.items()}
    valid_ratios = ratio.detach().masked_fill(~mask, 0).flatten()
    metrics["policy/ratio_max"] = (torch.cat([valid_ratios, ratio.new_zeros(1)]).max(), mask.any().to(ratio.dtype))
    return total, count, {"policy/loss": (total.detach(), count), **metrics}


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    value_clip_range: float | None,
    aggregation: str = "token_mean",
) -> tuple[Tensor, Tensor, Metrics]:
    """Clipped value loss, 1/2 max((V - R)^2, (V_old + clip(V - V_old, +-range) - R)^2): (total [], count [], metrics).

    lm-human-preferences/train_policy.py. None does not clip. All inputs [..., T]; only `values` receives a gradient.
    Metrics: critic/loss, critic/clip_fraction (the clipped branch won).
    """
    mask, values, old_values, returns = _valid(mask, values=values, old_values=old_values, returns=returns)
    old_values, returns = old_values.detach(), returns.detach()
    squares = clipped = (values - returns).square()
    moved = torch.zeros_like(mask)  # beyond the range: within it the two branches differ by rounding alone
    if value_clip_range is not None:
        moved = ((values - old_values).abs() > value_clip_range).detach()
        near_old = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
        clipped = (near_old - returns).square()
    total, count = sum_tokens(0.5 * torch.maximum(squares, clipped), mask, aggregation)
    won = sum_tokens((clipped > squares).detach() & moved, mask)
    return total, count, {"critic/loss": (total.detach(), count), "critic/clip_fraction": won}


def kl_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    estimator: str = "k2",
    weights: Tensor | None = None,
    aggregation: str = "token_mean",
) -> tuple[Tensor, Tensor, Metrics]:
    """KL(policy || ref) as a term of the loss, with the right gradient: (total [], count [], metrics); inputs [..., T].

    E[grad k2] is the gradient of the KL, that of k1 is 0 and that of k3 belongs to KL(ref || policy), so only k2 is
    taken, or k1+ and k3+: the value of k1 or k3 with the gradient of k2 (verl's core_algos.py). Each term carries the
    detached ratio pi / pi_old, as the tokens were sampled from pi_old, and `weights` (`importance_weights`).
    """
    if estimator not in KL_LOSS_ESTIMATORS:
        raise ValueError(
            f"KL estimator {estimator!r} has a wrong gradient in a loss, use {' or '.join(KL_LOSS_ESTIMATORS)}"
        )
    mask, logprobs, old_logprobs, ref_logprobs, weights = _valid(
        mask, logprobs=logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs.detach(), weights=weights
    )
    kl = kl_estimate(logprobs, ref_logprobs, "k2")
    kl = kl + (kl_estimate(logprobs, ref_logprobs, estimator.rstrip("+")) - kl).detach()
    kl = kl * (logprobs - old_logprobs).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if weights is not None:
        kl = kl * weights.detach()
    total, count = sum_tokens(kl, mask, aggregation)
    return total, count, {"policy/kl_loss": (total.detach(), count)}


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, center_coef: float = 0.0) -> Tensor:
    """Bradley-Terry loss of scores [N], -log sigmoid(chosen - rejected - margin), mean over pairs -> [].

    InstructGPT eq. 1 with K = 2; the margin of Llama 2, eq. 2; `center_coef` * mean((chosen + rejected)^2) keeps the
    scores around 0 (trl's RewardTrainer).
    """
    _same_shape(chosen=chosen, rejected=rejected, margin=margin)
    chosen, rejected = _wide(chosen), _wide(rejected)
    gap = chosen - rejected if margin is None else chosen - rejected - margin
    return -logsigmoid(gap).mean() + center_coef * (chosen + rejected).square().mean()


def kwise_loss(scores: Tensor) -> Tensor:
    """Loss of ranked answers, `scores` [prompts, K] from best to worst: mean over the C(K, 2) pairs of a prompt, then
    over prompts -> []. InstructGPT eq. 1. ValueError unless there are two axes and K >= 2."""
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores have shape {tuple(scores.shape)}, expected [prompts, K] with K >= 2")
    better, worse = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1, device=scores.device)
    scores = _wide(scores)
    return -logsigmoid(scores[:, better] - scores[:, worse]).mean(1).mean()


def _by_chunk(function, logits: Tensor, temperature: float, *others: Tensor) -> Tensor:
    """function(logits / temperature, wide, *others), a chunk of tokens at a time; backward computes each chunk again."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0")

    def run(part: Tensor, *rest: Tensor) -> Tensor:
        return function(_wide(part) if temperature == 1 else _wide(part) / temperature, *rest)

    if logits.ndim == 1:
        return run(logits, *others)
    if torch.is_grad_enabled() and logits.requires_grad:
        run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    size = max(1, CHUNK_ELEMENTS * logits.shape[-2] // max(1, logits.numel()))
    parts = zip(logits.split(size, dim=-2), *(x.split(size, dim=-1) for x in others), strict=True)
    return torch.cat([run(*part) for part in parts], dim=-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Exact entropy over the whole vocabulary of softmax(logits / temperature), [..., V] -> [...], never negative.

    -sum p log p; a logit of -inf (a token ruled out) adds 0. `logits` are not modified.
    """

    def negative_p_log_p(z: Tensor) -> Tensor:
        logprobs = z.log_softmax(-1)
        return -(logprobs.exp() * logprobs.masked_fill(logprobs == -math.inf, 0)).sum(-1)

    return _by_chunk(negative_p_log_p, logits, temperature)


def response_logprobs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) of `labels`: [..., V] and [...] i64 -> [...]. `logits` are not modified.

    Nothing is shifted here: logits[..., t, :] must predict labels[..., t]. The temperature divides logits, not log-probs.
    """
    _same_shape(**{"logits without the vocabulary": logits[..., 0], "labels": labels})

    def of_label(z: Tensor, label: Tensor) -> Tensor:
        return z.log_softmax(-1).gather(-1, label.unsqueeze(-1)).squeeze(-1)

    return _by_chunk(of_label, logits, temperature, labels)
