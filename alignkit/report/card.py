"""The report card of a reward model: what its scores of held-out pairs are worth. Pure maths on arrays, without torch.

    card = report_card(chosen, rejected, chosen_lengths, rejected_lengths, variants)

Letters: N pairs; chosen, rejected [N] are raw scores, margins = chosen - rejected in nats of log-odds, since the model
was trained to say P(chosen is better) = sigmoid(margin). A tie counts half a hit everywhere.
A flag is raised only where an interval says so, never by a point estimate of a few pairs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Z = 1.959963984540054  # of a 95 % interval
# Correlation of score and length within one side of the pairs, surely beyond which length explains a tenth of the
# scores' variance (0.3 squared): PPO finds that before it finds anything finer.
LENGTH_CORRELATION = 0.3
# Mean gap of confidence and hit rate from which a model is off in a way that matters: it says 80 % and is right in 70 %.
MISCALIBRATION = 0.1
# A harmless change of the text may turn the order of one pair in ten, those that are nearly ties.
AGREEMENT = 0.9
SIMULATIONS = 2000  # of a calibrated model, to see how large an error chance alone makes


def wilson(hits: float, count: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a rate, 95 % by default; (0, 1) where nothing was counted. `hits` may be a half."""
    if count == 0:
        return 0.0, 1.0
    rate, square = hits / count, z * z
    centre = (rate + square / (2 * count)) / (1 + square / count)
    half = z / (1 + square / count) * math.sqrt(rate * (1 - rate) / count + square / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def hits(margins: np.ndarray) -> np.ndarray:
    """[N]: 1 where the chosen response scores higher, 0.5 at a tie, 0 otherwise."""
    return (np.sign(margins) + 1) / 2


def rate(values: np.ndarray) -> dict[str, Any]:
    """{pairs, rate, low, high} of hits [n]; rate None where there are none."""
    low, high = wilson(float(values.sum()), len(values))
    return {"pairs": len(values), "rate": float(values.mean()) if len(values) else None, "low": low, "high": high}


def by_margin(margins: np.ndarray, buckets: int = 4) -> list[dict[str, Any]]:
    """Hit rate in `buckets` of equally many pairs by how sure the model is, |margin|; fewer where pairs are few."""
    order = np.argsort(np.abs(margins), kind="stable")
    parts = np.array_split(order, max(1, min(buckets, len(margins) // 5)))
    return [
        {"from": float(np.abs(margins[part]).min()), "to": float(np.abs(margins[part]).max())}
        | rate(hits(margins[part]))
        for part in parts
        if len(part)
    ]


def by_length(margins: np.ndarray, chosen_lengths: np.ndarray, rejected_lengths: np.ndarray) -> dict[str, Any]:
    """Hit rate where the chosen response is longer, as long, and where the rejected one is longer."""
    difference = chosen_lengths - rejected_lengths
    correct = hits(margins)
    return {
        "chosen_longer": rate(correct[difference > 0]),
        "same_length": rate(correct[difference == 0]),
        "rejected_longer": rate(correct[difference < 0]),
    }


def calibration(margins: np.ndarray, bins: int = 10) -> dict[str, Any]:
    """Confidence sigmoid(|margin|) against how often the more confident order is right.

    Pairs are put into bins of equal size by confidence, of at least five. `ece` is the expected calibration error, the
    mean over pairs of |hit rate - mean confidence| of the bin (Guo et al. 2017, arXiv 1706.04599). With few pairs it is
    far from 0 for the best of models, so `by_chance` holds its mean and 97.5 % quantile over simulated labels drawn with the
    model's own confidences. `excess` is the mean confidence minus the hit rate: above 0 the model is too sure.
    """
    confidence = 1 / (1 + np.exp(-np.minimum(np.abs(margins), 700.0)))
    correct = hits(margins)
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, max(1, min(bins, len(margins) // 5))) if len(part)]

    def gap(part: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """[..., n] hits of a bin -> [...], its share of the error."""
        return np.abs(labels.mean(-1) - confidence[part].mean()) * len(part) / len(margins)

    generator = np.random.default_rng(0)
    chance = np.zeros(SIMULATIONS)
    for part in parts:
        chance += gap(part, generator.random((SIMULATIONS, len(part))) < confidence[part])
    return {
        "ece": float(sum(gap(part, correct[part]) for part in parts)),
        "by_chance": {"mean": float(chance.mean()), "q975": float(np.quantile(chance, 0.975))},
        "excess": float(confidence.mean() - correct.mean()),
        "bins": [{"confidence": float(confidence[part].mean())} | rate(correct[part]) for part in parts],
    }


def length_correlation(
    chosen: np.ndarray, rejected: np.ndarray, chosen_lengths: np.ndarray, rejected_lengths: np.ndarray
) -> dict[str, Any]:
    """Pearson's correlation of score and length with the label held fixed, and its 95 % interval by Fisher's z.

    Scores and lengths are centred among the chosen and among the rejected responses, so that a model which is right on
    labels that prefer long answers is not blamed for them. The two responses to a prompt are not independent, so the
    interval counts pairs. None where all scores or all lengths are the same.
    """
    x = np.concatenate([chosen_lengths - chosen_lengths.mean(), rejected_lengths - rejected_lengths.mean()])
    y = np.concatenate([chosen - chosen.mean(), rejected - rejected.mean()])
    scale = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    if len(chosen) < 5 or scale == 0:
        return {"pairs": len(chosen), "r": None, "low": -1.0, "high": 1.0}
    r = float(np.clip((x * y).sum() / scale, -1, 1))
    z, half = math.atanh(min(max(r, -0.9999999), 0.9999999)), Z / math.sqrt(len(chosen) - 3)
    return {"pairs": len(chosen), "r": r, "low": math.tanh(z - half), "high": math.tanh(z + half)}


def spread(scores: np.ndarray) -> dict[str, Any]:
    """Mean, deviation and quantiles of scores [N]."""
    quantiles = np.quantile(scores, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1))
    return {
        "mean": float(scores.mean()),
        "std": float(scores.std()),
        "quantiles": dict(zip(("min", "5%", "25%", "50%", "75%", "95%", "max"), quantiles.tolist(), strict=True)),
    }


def agreement(margins: np.ndarray, changed: np.ndarray) -> dict[str, Any]:
    """How many pairs keep their order when the texts are changed harmlessly, and the hit rate then."""
    same = (np.sign(margins) == np.sign(changed)).astype(float)
    return rate(same) | {"accuracy": float(hits(changed).mean()), "mean_shift": float((changed - margins).mean())}


def flags(card: dict[str, Any]) -> dict[str, str]:
    """{flag: why}. `card` as `report_card` makes it; see the constants above for the bounds."""
    raised = {}
    length, split = card["length_correlation"], card["by_length"]
    if length["low"] > LENGTH_CORRELATION or length["high"] < -LENGTH_CORRELATION:
        taste = "long" if length["r"] > 0 else "short"
        raised["length_biased"] = (
            f"it likes {taste} answers: score and length correlate by {length['r']:.2f} with the label held fixed, 95 % "
            f"[{length['low']:.2f}, {length['high']:.2f}] is beyond {LENGTH_CORRELATION:g}"
        )
    for longer, shorter in (("rejected", "chosen"), ("chosen", "rejected")):
        against, along = split[f"{longer}_longer"], split[f"{shorter}_longer"]
        if "length_biased" not in raised and against["high"] < 0.5 and (along["rate"] or 0) > 0.5:
            raised["length_biased"] = (
                f"it goes by length: where the {longer} answer is longer it is right in {against['rate']:.0%} of "
                f"{against['pairs']} pairs (at most {against['high']:.0%}), worse than a coin, and in {along['rate']:.0%} elsewhere"
            )
    fit = card["calibration"]
    if fit["ece"] > MISCALIBRATION and fit["ece"] > fit["by_chance"]["q975"]:
        taste = "too sure" if fit["excess"] > 0 else "not sure enough"
        raised["miscalibrated"] = (
            f"it is {taste}: calibration error {fit['ece']:.2f} is above {MISCALIBRATION:g} and above what chance makes of "
            f"{card['accuracy']['pairs']} pairs ({fit['by_chance']['q975']:.2f}); its margins are no log-odds"
        )
    worst = min(card["variants"].items(), key=lambda item: item[1]["high"], default=None)
    if worst is not None and worst[1]["high"] < AGREEMENT:
        raised["brittle"] = (
            f"{worst[0]} turns the order of {1 - worst[1]['rate']:.0%} of {worst[1]['pairs']} pairs (at least {1 - worst[1]['high']:.0%})"
        )
    return raised


def report_card(
    chosen: Any,
    rejected: Any,
    chosen_lengths: Any,
    rejected_lengths: Any,
    variants: dict[str, tuple[Any, Any]] | None = None,
) -> dict[str, Any]:
    """The whole card as plain data.

    Args:
        chosen, rejected: [N] scores as trained, N ≥ 1, before any normalising.
        chosen_lengths, rejected_lengths: [N] tokens of the responses.
        variants: {what was changed: scores ([n], [n])} of the first n pairs, their texts changed harmlessly.

    Raises:
        ValueError: no pairs, or a score that is not finite.
    """
    good, bad, long, other = (
        np.asarray(values, dtype=np.float64) for values in (chosen, rejected, chosen_lengths, rejected_lengths)
    )
    if len(good) == 0 or not (np.isfinite(good).all() and np.isfinite(bad).all()):
        raise ValueError(f"a report card needs finite scores of at least one pair, got {len(good)} pairs")
    margins = good - bad
    card: dict[str, Any] = {
        "accuracy": rate(hits(margins)),
        "by_margin": by_margin(margins),
        "by_length": by_length(margins, long, other),
        "length_correlation": length_correlation(good, bad, long, other),
        "calibration": calibration(margins),
        "scores": {"chosen": spread(good), "rejected": spread(bad), "margin": spread(margins)},
        "variants": {
            name: agreement(margins[: len(first)], np.asarray(first, float) - np.asarray(second, float))
            for name, (first, second) in (variants or {}).items()
        },
        "points": {  # what the page draws
            "chosen": good.tolist(), "rejected": bad.tolist(), "chosen_lengths": long.tolist(), "rejected_lengths": other.tolist(),
        },
    }  # fmt: skip
    return card | {"flags": flags(card)}
