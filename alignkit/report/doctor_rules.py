"""The doctor's rules: which known failure a PPO run shows, from what it logged, as plain functions.

RULES is the table. A rule is a pure function of a `Run` to a finding or None. Causes stand before their effects, so the
first finding is the one to mend first. Every threshold has its reason beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Series = list[tuple[int, float]]  # (step, value), by step
COLLAPSED = 0.1  # of the entropy a policy began with: nine in ten choices that it had are made


@dataclass
class Finding:
    """One failure: what it is called, what in the logs shows it, what to change."""

    name: str
    evidence: str
    knob: str


@dataclass
class Run:
    """What a PPO run left behind, as plain data."""

    metrics: dict[str, Series] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)  # why it stopped
    gold: dict[str, Any] = field(default_factory=dict)  # evaluate's difference to its reference: mean, ci_low, ci_high

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the config by its dotted key."""
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return default if node is None else node

    def finite(self, name: str) -> Series:
        """A metric without the steps where it is nan or infinite: those are a finding of their own."""
        return [(step, value) for step, value in self.metrics.get(name, []) if math.isfinite(value)]


@dataclass
class Rule:
    """A row of the table: the failure's name, the metrics it reads, the steps it needs of each, and the check."""

    name: str
    reads: tuple[str, ...]
    steps: int
    check: Callable[[Run], Finding | None]


# ---------------------------------------------------------------------------------------------- small maths


def mean(points: Series) -> float:
    return sum(value for _, value in points) / len(points)


def thirds(points: Series) -> tuple[Series, Series, Series]:
    """The beginning, the middle and the end of a series; the outer two have the same length, at least one step."""
    size = max(1, len(points) // 3)
    return points[:size], points[size:-size], points[-size:]


def change(before: Series, after: Series) -> tuple[float, float]:
    """(difference of the means, its standard error by Welch's formula); a window of one step has an infinite error."""

    def error(points: Series) -> float:
        if len(points) < 2:
            return math.inf
        centre = mean(points)
        return sum((value - centre) ** 2 for _, value in points) / (len(points) - 1) / len(points)

    return mean(after) - mean(before), math.sqrt(error(before) + error(after))


def span(points: Series) -> str:
    """The steps of a window in words."""
    first, last = points[0][0], points[-1][0]
    return f"step {first}" if first == last else f"steps {first}–{last}"


def _half(dtype: str) -> bool:
    return dtype in ("bfloat16", "float16")


# ---------------------------------------------------------------------------------------------- the rules


def not_finite(run: Run) -> Finding | None:
    """A number that is no number; where it comes from, what is computed first stands first."""
    rate, decay = run.get("optimizer.learning_rate"), run.get("optimizer.weight_decay", 0.0)
    lower = f"lower optimizer.learning_rate={rate}" + (f" (try {rate / 10:g})" if rate else "")
    if rate and rate * decay > 1:  # AdamW multiplies the weights by 1 - rate * decay
        lower = f"optimizer.weight_decay=0.1: {decay:g} times the learning rate {rate:g} turns the weights' signs"
    knob = f"{lower}, keep optimizer.max_grad_norm above 0, and look at the rewards of that step in samples.jsonl"
    bad = [(step, name) for name, points in run.metrics.items() for step, v in points if not math.isfinite(v)]
    if bad:
        first = min(step for step, _ in bad)
        names = [name for step, name in bad if step == first]
        return Finding("nan", f"step {first}: {', '.join(names[:4])} not finite, the first of {len(bad)} numbers", knob)
    said = next((e for e in run.errors if re.search(r"\b(nan|inf|not finite|non-finite)\b", e, re.IGNORECASE)), None)
    return Finding("nan", f"the run stopped: {said}", knob) if said else None


def learning_rate(run: Run) -> Finding | None:
    """The policy's learning rate is 0, or so far below the configured one that the run is over before it is reached."""
    rates = run.finite("policy/learning_rate")
    wanted = run.get("optimizer.learning_rate", 0.0)
    zero = [point for point in rates if point[1] == 0]
    if zero:
        fix = "1e-4" if not wanted else f"{wanted:g}"
        return Finding(
            "learning_rate",
            f"policy/learning_rate is 0 in {len(zero)} of {len(rates)} steps, first at step {zero[0][0]}",
            f"optimizer.learning_rate={fix}" + ("" if not wanted else ", and look at optimizer.schedule"),
        )
    top = max(value for _, value in rates)
    # A warm-up of 100 times the run: nothing that was asked for has begun.
    if top < 0.01 * wanted:
        warm = run.get("optimizer.warmup_steps", 0)
        return Finding(
            "learning_rate",
            f"policy/learning_rate reached {top:.2g} of {wanted:g} in {len(rates)} steps: optimizer.warmup_steps={warm}",
            f"optimizer.warmup_steps={max(1, len(rates) // 10)}",
        )
    return None


def first_ratio(run: Run) -> Finding | None:
    """The update's first minibatch must see the very policy that made the experience: every ratio is 1."""
    # float32: the bound of the sync's canary, a hundred times the rounding of sums. 16 bit: logits of 16 to 32 are
    # 0.125 apart, two roundings are 0.25 nats, and e^0.25 - 1 = 0.28.
    bound = 0.3 if _half(run.get("model.dtype", "float32")) else 1e-3
    points = run.finite("policy/first_ratio_gap_max")
    bad = [point for point in points if point[1] > bound]
    if not bad:
        return None
    step, worst = max(bad, key=lambda point: point[1])
    return Finding(
        "ratio",
        f"policy/first_ratio_gap_max is above {bound:g} in {len(bad)} of {len(points)} steps, {worst:.2g} at step {step}: "
        "before any update the policy's log-probs are not those of the experience",
        "set the dropouts in the model's config.json to 0 (attention_dropout, …); if they are, compare "
        "keep_shared_states=false and micro_batch_size=1 with this run",
    )


def rollout_gap(run: Run) -> Finding | None:
    """The sampler's log-probs drift away from the trainer's, or were never the same."""
    low = _half(run.get("model.dtype", "float32"))
    # The canary stops a run whose mean gap exceeds `bound`; a third (a tenth in float32) of it, three times what it was
    # in the beginning, is on its way there. A policy that sharpens raises pure rounding by less than that.
    bound, floor = (0.15, 0.05) if low else (1e-3, 1e-4)
    for name in ("rollout/logprob_gap", "rollout/canary_gap"):
        points = run.finite(name)
        if len(points) < 3:
            continue
        begin, _, end = thirds(points)
        before, after = mean(begin), mean(end)
        wanted = run.get("rollout.allow_biased_sampling") or run.get("rollout.async_steps")  # another law on purpose
        if after > max(floor, 3 * before) or (after > bound and not wanted):
            grows = f", {after / before:.0f} times that of {span(begin)}" if after > before > 0 else ""
            lag = run.get("rollout.async_steps")
            return Finding(
                "rollout_gap",
                f"{name} is {after:.2g} nats in {span(end)}{grows}: the sampler does not hold the policy that is trained",
                "rollout.async_steps=0"
                if lag
                else "rollout.payload=merged, and run a few steps with rollout=hf: if the gap is gone, the engine's "
                "sync, temperature or sampling law is at fault",
            )
    return None


def truncated(run: Run) -> Finding | None:
    """Hardly any answer ends by itself: its score is replaced or was never about a whole answer."""
    points = run.finite("rollout/finished")
    begin, _, end = thirds(points)
    # Under one in ten: with missing_eos=replace, or at_most below the scores, nine answers in ten score the same constant.
    if mean(end) >= 0.1:
        return None
    # Text that is cut by design says so with missing_eos=none and never ended from the start.
    if run.get("algorithm.missing_eos") == "none" and mean(begin) < 0.5:
        return None
    slots = run.get("rollout.max_new_tokens", 64)
    lengths = run.finite("rollout/length")
    length = f", mean length {mean(thirds(lengths)[2]):.1f} of {slots} tokens" if lengths else ""
    fell = mean(begin) >= 0.5
    return Finding(
        "truncated",
        f"rollout/finished is {mean(end):.0%} in {span(end)} ({mean(begin):.0%} in {span(begin)}){length}",
        (
            "algorithm.missing_eos=at_most, so that endless answers do not pay"
            if fell and run.get("algorithm.missing_eos") not in ("at_most", "replace")
            else f"rollout.max_new_tokens={2 * slots}, or rollout.stop_token_ids=[…] if answers end with a token "
            "that neither tokenizer, template nor generation_config.json names as an end"
        ),
    )


def _while_open(run: Run, points: Series) -> Series:
    """The steps before the policy says the same thing every time: returns without spread leave nothing to explain."""
    entropy = run.finite("objective/entropy")
    closed = [step for step, value in entropy if value < COLLAPSED * entropy[0][1]]
    return [point for point in points if not closed or point[0] < closed[0]]


def value_lag(run: Run) -> Finding | None:
    """The critic explains nothing of the returns for the whole second half of the run."""
    points = _while_open(run, run.finite("critic/explained_variance"))
    late = points[len(points) // 2 :]
    # A baseline that explains a share v of the returns' variance lowers that of the advantages by v: under 1 % the
    # critic is of no use, below 0 it adds noise. Single steps scatter, so nearly all of them must say so.
    useless = [point for point in late if point[1] < 0.01]
    if len(points) < 8 or mean(late) >= 0.01 or len(useless) < 0.8 * len(late):
        return None
    evidence = f"critic/explained_variance is {mean(late):.2g} on average in {span(late)}"
    rate, policy_rate = (run.get(f"{key}.learning_rate", 0.0) for key in ("critic_optimizer", "optimizer"))
    clipped = run.finite("critic/clip_fraction")
    if rate < policy_rate:
        knob = f"critic_optimizer.learning_rate={policy_rate:g}"
        evidence += f", with critic_optimizer.learning_rate={rate:g} below the policy's {policy_rate:g}"
    elif clipped and mean(thirds(clipped)[2]) > 0.5:  # most values are not allowed to move where they should
        knob = "algorithm.value_clip_range=null"
        evidence += f", with {mean(thirds(clipped)[2]):.0%} of the values clipped"
    elif mean(late) < -1:  # errors larger than the returns' own spread: it started somewhere else
        knob = "critic.head=zero"
    else:
        knob = f"critic_optimizer.learning_rate={3 * rate:g}, or algorithm.critic_warmup={max(2, len(points) // 5)}"
    return Finding("value_lag", evidence, knob)


def over_optimisation(run: Run) -> Finding | None:
    """The score that is trained on rises while one that is not falls: evaluate's gold score, or a reward of weight 0."""
    scores = run.finite("objective/score")
    begin, _, end = thirds(scores)
    gained, error = change(begin, end)
    if gained <= 2 * error:  # about 95 %
        return None
    rise = f"objective/score rose by {gained:.2g} (± {error:.2g}) from {span(begin)} to {span(end)}"
    coef = run.get("algorithm.kl_coef", 0.0)
    knob = f"algorithm.kl_coef={2 * coef if coef else 0.05:g}, or fewer steps; a larger reward model moves the turning point"
    high = run.gold.get("ci_high")
    if high is not None and high < 0:
        evidence = (
            f"evaluate's gold score fell by {-run.gold['mean']:.3g}, 95 % [{-high:.3g}, {-run.gold['ci_low']:.3g}]"
        )
        return Finding("over_optimisation", f"{rise}, {evidence}", knob)
    for name in run.config.get("rewards") or {}:
        points = run.finite(f"objective/score/{name}")
        if run.get(f"rewards.{name}.weight", 1.0) != 0 or len(points) < 9:
            continue
        first, middle, last = thirds(points)
        best = max(first, middle, key=mean)  # gold rises before it falls
        lost, doubt = change(best, last)
        if -lost > 3 * doubt:  # the better of two windows was picked: ask for more than 95 %
            evidence = f"objective/score/{name}, which is only watched, fell by {-lost:.2g} (± {doubt:.2g}) from {span(best)} to {span(last)}"
            return Finding("over_optimisation", f"{rise}, {evidence}", knob)
    return None


def entropy_collapse(run: Run) -> Finding | None:
    """The policy says the same thing every time."""
    points = run.finite("objective/entropy")
    start, end = points[0][1], thirds(points)[2]
    if mean(end) >= COLLAPSED * start:
        return None
    fell = next(step for step, value in points if value < COLLAPSED * start)
    rate = run.get("optimizer.learning_rate", 0.0)
    return Finding(
        "entropy_collapse",
        f"objective/entropy fell from {start:.3g} nats a token to {mean(end):.2g} in {span(end)}, below a tenth at step {fell}",
        f"optimizer.learning_rate={rate / 5:g}, a larger algorithm.kl_coef or algorithm.ent_coef=0.01",
    )


def kl_runaway(run: Run) -> Finding | None:
    """The policy has left the reference behind."""
    points = run.finite("objective/kl_per_token")
    end = thirds(points)[2]
    # Over 1 nat a token the reference gives what the policy says less than 1/e of the policy's probability at every
    # token: nothing of what SFT taught binds it, and the reward model never saw such text.
    if mean(end) <= 1.0:
        return None
    crossed = next(step for step, value in points if value > 1.0)
    whole = run.finite("objective/kl")
    response = f", {mean(thirds(whole)[2]):.3g} a response" if whole else ""
    coef, rate = run.get("algorithm.kl_coef", 0.0), run.get("optimizer.learning_rate", 0.0)
    return Finding(
        "kl_runaway",
        f"objective/kl_per_token is {mean(end):.2g} nats in {span(end)}{response}; above 1 since step {crossed}",
        f"algorithm.kl_coef={4 * coef if coef else 0.05:g}"
        + (f", or optimizer.learning_rate={rate / 3:g}" if coef else " (it is 0: nothing holds the policy)"),
    )


RULES = [
    Rule("nan", (), 0, not_finite),
    Rule("learning_rate", ("policy/learning_rate",), 1, learning_rate),
    Rule("ratio", ("policy/first_ratio_gap_max",), 1, first_ratio),
    Rule("rollout_gap", ("rollout/logprob_gap",), 3, rollout_gap),
    Rule("truncated", ("rollout/finished",), 3, truncated),
    Rule("value_lag", ("critic/explained_variance",), 8, value_lag),
    Rule("over_optimisation", ("objective/score",), 9, over_optimisation),
    Rule("entropy_collapse", ("objective/entropy",), 3, entropy_collapse),
    Rule("kl_runaway", ("objective/kl_per_token",), 3, kl_runaway),
]


def examine(run: Run) -> tuple[list[Finding], dict[str, str]]:
    """(findings, the one to mend first at the head; {rule: why it could not be checked})."""
    findings, unchecked = [], {}
    for rule in RULES:
        short = [name for name in rule.reads if len(run.finite(name)) < rule.steps]
        if short:
            have = len(run.finite(short[0]))
            unchecked[rule.name] = f"needs {short[0]} in {rule.steps} steps, found {have}"
        elif (found := rule.check(run)) is not None:
            findings.append(found)
    return findings, unchecked
