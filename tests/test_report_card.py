"""The report card of a reward model: closed forms, published numbers, brute force; and PPO's refusal of a poor one."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise

import numpy as np
import pytest
from test_cli import command, invoke, make_work, refused

from alignkit.report import card_html
from alignkit.report.card import (
    MISCALIBRATION,
    agreement,
    by_length,
    by_margin,
    calibration,
    hits,
    length_correlation,
    rate,
    report_card,
    wilson,
)
from alignkit.runs import manifests

# Newcombe 1998 (Statistics in Medicine 17), table I, method 3: hits, count, interval.
NEWCOMBE = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]


@pytest.mark.parametrize(("count", "of", "low", "high"), NEWCOMBE)
def test_wilson_is_newcombes(count, of, low, high):
    assert wilson(count, of) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("count", "of"), [(3.5, 9), (60, 86), (1, 2), (99, 100)])
def test_wilsons_ends_are_where_the_rate_is_z_errors_away(count, of):
    for p in wilson(count, of):
        assert abs(count / of - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / of), abs=1e-6)


def test_wilson_of_nothing_and_of_everything():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(7, 7)[1] == pytest.approx(1, abs=1e-12) and wilson(0, 7)[0] == pytest.approx(0, abs=1e-12)
    assert wilson(7, 7)[0] == pytest.approx(7 / (7 + 1.959964**2), abs=1e-6)  # the closed form at a rate of 1


def test_a_tie_is_half_a_hit():
    assert hits(np.array([2.0, 0.0, -0.1])).tolist() == [1.0, 0.5, 0.0]
    assert rate(hits(np.array([2.0, 0.0, -0.1, 3.0])))["rate"] == 2.5 / 4
    assert rate(np.array([]))["rate"] is None


def test_margin_buckets_hold_every_pair_once_in_order():
    margins = np.random.default_rng(0).normal(size=43)
    rows = by_margin(margins)
    assert [row["pairs"] for row in rows] == [11, 11, 11, 10]
    for row in rows:
        inside = [m for m in margins if row["from"] <= abs(m) <= row["to"]]
        assert (len(inside), sum(m > 0 for m in inside) / len(inside)) == (row["pairs"], row["rate"])
    assert all(a["to"] < b["from"] for a, b in pairwise(rows))
    assert len(by_margin(margins[:9])) == 1  # too few to part


def test_accuracy_by_length_is_what_a_loop_counts():
    draw = np.random.default_rng(1)
    margins, long, other = draw.normal(size=200), draw.integers(1, 9, 200), draw.integers(1, 9, 200)
    found = by_length(margins, long, other)
    for name, holds in {
        "chosen_longer": lambda a, b: a > b,
        "same_length": lambda a, b: a == b,
        "rejected_longer": lambda a, b: a < b,
    }.items():
        part = [m > 0 for m, a, b in zip(margins, long, other, strict=True) if holds(a, b)]
        assert (found[name]["pairs"], found[name]["rate"]) == (len(part), pytest.approx(sum(part) / len(part)))
    assert sum(entry["pairs"] for entry in found.values()) == 200


# ------------------------------------------------------------------------------------------------ calibration


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_calibration_error_by_hand():
    """Two bins of five: surely 0.6 and right 2 of 5; surely 0.9 and right 5 of 5."""
    low, high = logit(0.6), logit(0.9)
    margins = np.array([low, low, -low, -low, -low, high, high, high, high, high])
    found = calibration(margins)
    assert [entry["confidence"] for entry in found["bins"]] == pytest.approx([0.6, 0.9])
    assert [entry["rate"] for entry in found["bins"]] == [0.4, 1.0]
    assert found["ece"] == pytest.approx((0.2 + 0.1) / 2)
    assert found["excess"] == pytest.approx(0.75 - 0.7)


def test_calibration_error_that_chance_makes_is_the_binomials():
    """One bin of nine at confidence 0.7: E|k/9 - 0.7| summed over the binomial."""
    expected = sum(math.comb(9, k) * 0.7**k * 0.3 ** (9 - k) * abs(k / 9 - 0.7) for k in range(10))
    found = calibration(np.full(9, logit(0.7)))["by_chance"]
    assert found["mean"] == pytest.approx(expected, abs=0.005)  # 2000 draws of deviation 0.1: error 0.002
    assert found["mean"] < found["q975"] < 0.7


def simulated(seed: int, count: int, gain: float, scale: float = 1.5) -> dict:
    """A card of a model that is calibrated where gain is 1: labels are drawn by its own confidence, then it is scaled."""
    draw = np.random.default_rng(seed)
    confident = np.abs(draw.normal(scale=scale, size=count))
    right = draw.random(count) < 1 / (1 + np.exp(-confident))
    margins = gain * np.where(right, confident, -confident)
    lengths = draw.integers(5, 30, (2, count))
    return report_card(margins / 2, -margins / 2, *lengths)


def test_a_calibrated_model_is_seldom_flagged_and_a_scaled_one_nearly_always():
    for count in (30, 90, 500):
        assert (
            sum("miscalibrated" in simulated(seed, count, 1.0)["flags"] for seed in range(60)) <= 5
        )  # 2.5 % of 60: 1.5
        assert (
            sum("miscalibrated" in simulated(seed, count, 20.0)["flags"] for seed in range(60))
            >= (45, 58, 60)[(30, 90, 500).index(count)]
        )
    card = simulated(0, 500, 20.0)
    assert card["calibration"]["excess"] > MISCALIBRATION and "too sure" in card["flags"]["miscalibrated"]
    shy = simulated(0, 500, 0.05)
    assert "not sure enough" in shy["flags"]["miscalibrated"]


def test_few_pairs_raise_no_flag():
    """Two pairs, both wrong, at 73 % confidence, the longer answer preferred: a calibrated model does so in 7 of 100 cases."""
    card = report_card([0.0, 0.0], [1.0, 1.0], [3, 3], [9, 9])
    assert card["flags"] == {} and card["accuracy"]["high"] > 0.6


# ------------------------------------------------------------------------------------------------ length


def test_length_correlation_is_numpys_of_the_centred_sides():
    draw = np.random.default_rng(2)
    long, other = draw.integers(1, 40, 50), draw.integers(1, 40, 50)
    good, bad = 0.1 * long + draw.normal(size=50) + 3, 0.1 * other + draw.normal(size=50)
    x = np.concatenate([long - long.mean(), other - other.mean()])
    y = np.concatenate([good - good.mean(), bad - bad.mean()])
    found = length_correlation(good, bad, long, other)
    assert found["r"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    for end, sign in (("low", -1), ("high", 1)):  # Fisher's z: the ends are 1.96 / sqrt(N - 3) away
        assert math.atanh(found[end]) - math.atanh(found["r"]) == pytest.approx(
            sign * 1.959964 / math.sqrt(47), abs=1e-6
        )


def test_no_correlation_where_nothing_varies():
    assert length_correlation(np.ones(9), np.ones(9), np.arange(9), np.arange(9))["r"] is None
    assert report_card(np.ones(9), np.zeros(9), np.full(9, 4), np.full(9, 4))["flags"].keys() <= {"miscalibrated"}


def pairs(seed: int, content: float, length: float, count: int = 120, longer_wins: float = 0.5) -> dict:
    """A card of a model whose score is content * label + length * tokens / 10 + noise; labels prefer length at a rate."""
    draw = np.random.default_rng(seed)
    long, short = draw.integers(20, 40, count), draw.integers(5, 20, count)
    wins = draw.random(count) < longer_wins
    chosen, rejected = np.where(wins, long, short), np.where(wins, short, long)
    noise = draw.normal(size=(2, count))
    return report_card(content + length * chosen / 10 + noise[0], length * rejected / 10 + noise[1], chosen, rejected)


def test_a_model_that_goes_by_length_is_flagged_either_way():
    assert "long answers" in pairs(0, 0.0, 1.0)["flags"]["length_biased"]
    assert "short answers" in pairs(0, 0.0, -1.0)["flags"]["length_biased"]


def test_a_model_that_goes_by_content_is_not_blamed_for_its_labels():
    """Where nine of ten chosen answers are longer, scores and lengths correlate by the labels alone."""
    for seed in range(20):
        card = pairs(seed, 1.5, 0.0, longer_wins=0.9)
        assert "length_biased" not in card["flags"]
    points = card["points"]
    everything = np.corrcoef(
        points["chosen"] + points["rejected"], points["chosen_lengths"] + points["rejected_lengths"]
    )
    assert everything[0, 1] > 0.4  # what a plain correlation would have said


def test_worse_than_a_coin_where_length_misleads_is_a_flag_of_its_own():
    """The longer answer always wins by one, however much longer it is: no correlation needed."""
    long = np.array([30] * 20 + [10] * 20)
    short = np.array([10] * 20 + [30] * 20)
    margins = np.where(long > short, 1.0, -1.0)
    draw = np.random.default_rng(0).normal(scale=6, size=40)  # what prompts add to both sides hides the correlation
    card = report_card(draw + margins / 2, draw - margins / 2, long, short)
    assert card["length_correlation"]["low"] < 0.3
    assert "worse than a coin" in card["flags"]["length_biased"]


# ------------------------------------------------------------------------------------------------ the rest


def test_agreement_counts_pairs_that_keep_their_order():
    found = agreement(np.array([1.0, 2.0, -1.0, -2.0]), np.array([0.5, -1.0, -3.0, 1.0]))
    assert (found["pairs"], found["rate"], found["accuracy"]) == (4, 0.5, 0.5)
    assert found["mean_shift"] == pytest.approx((-0.5 - 3 - 2 + 3) / 4)


def test_a_brittle_model_is_flagged_by_its_worst_change():
    draw = np.random.default_rng(3)
    good, bad = draw.normal(size=100) + 0.5, draw.normal(size=100)
    lengths = draw.integers(5, 30, (2, 100))
    variants = {"a space": (good + 0.01, bad), "a newline": (draw.normal(size=60), draw.normal(size=60))}
    card = report_card(good, bad, *lengths, variants)
    assert card["variants"]["a newline"]["pairs"] == 60
    assert "a newline turns the order" in card["flags"]["brittle"]
    del variants["a newline"]
    assert "brittle" not in report_card(good, bad, *lengths, variants)["flags"]


@pytest.mark.parametrize("scores", [[], [math.nan, 1.0]])
def test_no_card_without_finite_scores(scores):
    with pytest.raises(ValueError, match="finite scores of at least one pair"):
        report_card(scores, [0.0] * len(scores), [1] * len(scores), [1] * len(scores))


def test_the_page_holds_all_it_needs(tmp_path):
    card = pairs(0, 0.0, 1.0)
    card["variants"] = {"<b>bold": agreement(np.ones(3), np.ones(3))}
    run_dir = tmp_path / "mine" / "reward"
    run_dir.mkdir(parents=True)
    card_html.write(run_dir, card)
    page = (run_dir / "report.html").read_text()
    assert json.loads((run_dir / "report_card.json").read_text()) == card
    assert page.count("<svg ") == 3 and "<script" not in page and "&lt;b&gt;bold" in page
    assert "length_biased" in page and f"{card['accuracy']['rate']:.1%}" in page
    assert not re.findall(r"(?:src|href)=['\"](?!#)", page)  # nothing is loaded from elsewhere


@pytest.mark.parametrize("count", [1, 2, 6])
def test_a_card_of_few_pairs_is_drawn(tmp_path, count):
    card = report_card(np.arange(count) / 7, np.zeros(count), np.arange(count), np.ones(count))
    card_html.write(tmp_path, card)
    assert "Reward model" in (tmp_path / "report.html").read_text()


# ------------------------------------------------------------------------------------------------ PPO's refusal


@pytest.fixture
def work(tmp_path):
    return make_work(tmp_path / "work")


def reward_run(work, **metrics) -> None:
    manifests.write_manifest(work / "runs/base/reward", metrics=metrics)


def test_ppo_refuses_a_reward_model_that_is_surely_worse_than_a_coin(work):
    reward_run(work, eval_accuracy=0.3, eval_pairs=86)
    top = wilson(0.3 * 86, 86)[1]
    words = (
        "runs/base/reward",
        "0.300 of 86 pairs",
        f"{top:.3f}",
        "min_accuracy=0.5",
        "rewards.reward_model.min_accuracy=0",
    )
    refused(work, command("ppo", "dry_run=true"), *words)
    assert invoke(*command("ppo", "dry_run=true", "rewards.reward_model.min_accuracy=0"), cwd=work).code == 0


@pytest.mark.parametrize(("accuracy", "pairs"), [(0.42, 12), (0.45, 86), (0.5, 1000), (0.698, 86)])
def test_ppo_takes_what_may_be_as_good_as_a_coin(work, accuracy, pairs):
    reward_run(work, eval_accuracy=accuracy, eval_pairs=pairs)
    assert invoke(*command("ppo", "dry_run=true"), cwd=work).code == 0


def test_ppo_asks_for_more_where_it_is_told_to(work):
    reward_run(work, eval_accuracy=0.698, eval_pairs=86)
    more = "rewards.reward_model.min_accuracy={}"
    assert invoke(*command("ppo", "dry_run=true", more.format(0.75)), cwd=work).code == 0  # it may be that good
    refused(work, command("ppo", "dry_run=true", more.format(0.9)), "0.698 of 86 pairs", "min_accuracy=0.9")
    refused(work, command("ppo", "dry_run=true", more.format(1.5)), "min_accuracy=1.5", "from 0")


def test_an_unknown_accuracy_is_refused_only_where_one_is_asked_for(work):
    reward_run(work)
    assert invoke(*command("ppo", "dry_run=true"), cwd=work).code == 0
    refused(work, command("ppo", "dry_run=true", "rewards.reward_model.min_accuracy=0.6"), "not known", "eval_fraction")
