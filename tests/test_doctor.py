"""The doctor's rules at their edges, on series made here, and on runs of the PPO stage that were recorded while they went wrong.

tests/stages/pathologies.py made tests/recorded/ and makes it again.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
from test_cli import invoke

from alignkit.report import doctor
from alignkit.report.doctor import read
from alignkit.report.doctor_rules import RULES, Run, change, examine, thirds

RECORDED = Path(__file__).parent / "recorded"
CONFIG = {
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
    "critic_optimizer": {"learning_rate": 1e-3},
    "model": {"dtype": "float32"},
    "rollout": {"max_new_tokens": 64, "async_steps": 0, "allow_biased_sampling": False},
    "algorithm": {"kl_coef": 0.05, "missing_eos": "replace"},
    "rewards": {"model": {"weight": 1.0}, "gold": {"weight": 0.0}},
}
SHORT = {
    "rate": "policy/learning_rate", "ratio": "policy/first_ratio_gap_max", "gap": "rollout/logprob_gap",
    "canary": "rollout/canary_gap", "finished": "rollout/finished", "length": "rollout/length",
    "explained": "critic/explained_variance", "clipped": "critic/clip_fraction", "score": "objective/score",
    "gold": "objective/score/gold", "model": "objective/score/model", "entropy": "objective/entropy",
    "kl": "objective/kl", "kl_token": "objective/kl_per_token",
}  # fmt: skip


def made(changes: dict | None = None, **values: list[float]) -> Run:
    """A run that logged `values` from step 0 on, with CONFIG and `changes` to it ({dotted key: value})."""
    config = json.loads(json.dumps(CONFIG))
    for key, value in (changes or {}).items():
        *parts, last = key.split(".")
        node = config
        for part in parts:
            node = node[part]
        node[last] = value
    return Run({SHORT[name]: list(enumerate(series)) for name, series in values.items()}, config)


def found(run: Run) -> list[str]:
    return [finding.name for finding in examine(run)[0]]


# ------------------------------------------------------------------------------------------------ the maths


def test_thirds_cover_a_series_and_its_ends_are_as_long():
    for count in range(3, 20):
        begin, middle, end = thirds([(i, float(i)) for i in range(count)])
        assert len(begin) == len(end) == count // 3
        assert [step for step, _ in (*begin, *middle, *end)] == list(range(count))


def test_change_is_welchs():
    before, after = [1.0, 2.0, 4.0], [3.0, 3.5, 6.0, 5.0]
    difference, error = change([(0, v) for v in before], [(0, v) for v in after])
    assert difference == pytest.approx(statistics.mean(after) - statistics.mean(before))
    assert error == pytest.approx(math.sqrt(statistics.variance(before) / 3 + statistics.variance(after) / 4))
    assert change([(0, 1.0)], [(1, 2.0), (2, 3.0)])[1] == math.inf


# ------------------------------------------------------------------------------------------------ a rule, its edge

NOISE = [0.1, -0.1, 0.05, -0.05, 0.0]
RISING = [0.1 * i + NOISE[i % 5] for i in range(15)]
# (finding, a run just inside, one just outside); config changes first.
EDGES = {
    "nan": ({}, {"score": [0.1, math.inf]}, {}, {"score": [0.1, 1e30]}),
    "learning_rate": ({}, {"rate": [1e-3, 0.0]}, {}, {"rate": [1e-3, 1e-9]}),
    "learning_rate, warm-up": ({}, {"rate": [1e-6, 0.9e-5]}, {}, {"rate": [1e-6, 1.1e-5]}),
    "ratio": ({}, {"ratio": [1e-6, 1.1e-3]}, {}, {"ratio": [1e-6, 0.9e-3]}),
    "ratio, 16 bit": (
        {"model.dtype": "bfloat16"}, {"ratio": [0.31]}, {"model.dtype": "bfloat16"}, {"ratio": [0.29]},
    ),
    "rollout_gap, growing": ({}, {"gap": [4e-5, 9e-5, 1.3e-4]}, {}, {"gap": [5e-5, 9e-5, 1.3e-4]}),
    "rollout_gap, rounding": ({}, {"gap": [1e-6, 5e-5, 1.1e-4]}, {}, {"gap": [1e-6, 5e-5, 0.9e-4]}),
    "rollout_gap, large": (
        {}, {"gap": [1.1e-3] * 3}, {"rollout.allow_biased_sampling": True}, {"gap": [1.1e-3] * 3},
    ),
    "rollout_gap, 16 bit": (
        {"model.dtype": "bfloat16"}, {"gap": [0.01, 0.02, 0.06]}, {"model.dtype": "bfloat16"}, {"gap": [0.01, 0.02, 0.04]},
    ),
    "rollout_gap, canary": ({}, {"gap": [1e-6] * 3, "canary": [1e-6, 1e-5, 2e-4]}, {}, {"gap": [1e-6] * 3, "canary": [1e-6] * 3}),
    "truncated": ({}, {"finished": [0.5, 0.3, 0.09]}, {}, {"finished": [0.5, 0.3, 0.11]}),
    "truncated, by design": (
        {"algorithm.missing_eos": "none"}, {"finished": [0.6, 0.3, 0.0]},
        {"algorithm.missing_eos": "none"}, {"finished": [0.2, 0.1, 0.0]},
    ),
    "value_lag": ({}, {"explained": [0.0] * 4 + [0.009] * 4}, {}, {"explained": [0.0] * 4 + [0.011] * 4}),
    "value_lag, scattered": (
        {}, {"explained": [0.0] * 5 + [-0.3, -0.2, 0.02, -0.4, -0.1]}, {}, {"explained": [0.0] * 5 + [-0.3, 0.2, 0.02, -0.4, 0.1]},
    ),
    "value_lag, while the policy has choices": (
        {}, {"explained": [0.5] * 8 + [0.0] * 8, "entropy": [2.0] * 8 + [0.21] * 3 + [2.0] * 5},
        {}, {"explained": [0.5] * 8 + [0.0] * 8, "entropy": [2.0] * 8 + [0.19] * 3 + [2.0] * 5},
    ),
    "over_optimisation": (
        {}, {"score": RISING, "gold": [min(0.2 * i, 2 - 0.2 * i) + NOISE[i % 5] for i in range(15)]},
        {}, {"score": RISING, "gold": [0.1 * min(i, 9) + NOISE[i % 5] for i in range(15)]},
    ),
    "over_optimisation, watched only": (
        {}, {"score": RISING, "gold": [-v for v in RISING]},
        {"rewards.gold.weight": 0.1}, {"score": RISING, "gold": [-v for v in RISING]},
    ),
    "over_optimisation, both fall": (
        {}, {"score": RISING, "gold": [-v for v in RISING]}, {}, {"score": [-v for v in RISING], "gold": [-v for v in RISING]},
    ),
    "entropy_collapse": ({}, {"entropy": [2.0, 1.0, 0.19]}, {}, {"entropy": [2.0, 1.0, 0.21]}),
    "kl_runaway": ({}, {"kl_token": [0.0, 0.5, 1.01]}, {}, {"kl_token": [0.0, 1.5, 0.99]}),
}  # fmt: skip


@pytest.mark.parametrize("name", EDGES)
def test_a_rule_at_its_edge(name):
    inside, values, outside, other = EDGES[name]
    assert found(made(inside, **values)) == [name.split(",")[0]]
    assert found(made(outside, **other)) == []


@pytest.mark.parametrize("name", EDGES)
def test_a_finding_has_numbers_a_step_and_a_key_that_exists(name):
    from alignkit.config.stages import components

    changes, values, *_ = EDGES[name]
    (finding,) = examine(made(changes, **values))[0]
    assert any(c.isdigit() for c in finding.evidence) and "step" in finding.evidence
    key = next(word for word in finding.knob.replace(",", " ").split() if "=" in word or "." in word).split("=")[0]
    group, _, field = key.partition(".")
    known = {
        "optimizer": ("learning_rate", "warmup_steps", "max_grad_norm", "weight_decay"),
        "critic_optimizer": ("learning_rate",),
        "critic": ("head",),
        "rollout": {f for cls in components("rollout").values() for f in cls.__dataclass_fields__},
        "algorithm": {f for cls in components("algorithm").values() for f in cls.__dataclass_fields__},
        "config": ("json",),
    }
    assert field.rstrip(".") in known[group], finding.knob


def test_the_knob_of_what_is_not_finite_goes_by_its_cause():
    def knob(changes):
        return examine(made(changes, score=[math.nan]))[0][0].knob

    assert knob({}).startswith("lower optimizer.learning_rate=0.001 (try 0.0001)")
    assert knob({"optimizer.weight_decay": 1e4}).startswith("optimizer.weight_decay=0.1")


def test_the_knob_of_a_lagging_critic_goes_by_its_cause():
    flat = {"explained": [-0.5] * 10}

    def knob(changes, **more):
        return examine(made(changes, **flat, **more))[0][0].knob

    assert knob({"critic_optimizer.learning_rate": 1e-6}) == "critic_optimizer.learning_rate=0.001"
    assert knob({}, clipped=[0.9] * 10) == "algorithm.value_clip_range=null"
    assert "critic_warmup" in knob({}, clipped=[0.1] * 10)
    assert examine(made({}, explained=[-5.0] * 10))[0][0].knob == "critic.head=zero"


def test_evaluations_gold_score_counts_where_its_interval_is_below_zero():
    run = made({}, score=RISING)
    run.gold = {"mean": -0.1, "ci_low": -0.2, "ci_high": -0.01}
    assert found(run) == ["over_optimisation"]
    run.gold = {"mean": -0.1, "ci_low": -0.2, "ci_high": 0.01}
    assert found(run) == []


def test_causes_stand_before_effects():
    run = made({}, entropy=[2.0, 1.0, 0.1], kl_token=[0.0, 1.0, 3.0], ratio=[0.5] * 3, rate=[math.nan, 0.0, 0.0])
    assert found(run) == ["nan", "learning_rate", "ratio", "entropy_collapse", "kl_runaway"]


def test_what_is_too_short_is_named_and_not_called_healthy():
    findings, unchecked = examine(made({}, explained=[-9.0] * 7, entropy=[2.0, 0.1]))
    assert findings == []
    assert unchecked["value_lag"] == "needs critic/explained_variance in 8 steps, found 7"
    assert unchecked["entropy_collapse"] == "needs objective/entropy in 3 steps, found 2"
    assert "nan" not in unchecked


def test_rules_and_names_are_one_to_one():
    assert [rule.name for rule in RULES] == list(dict.fromkeys(name.split(",")[0] for name in EDGES))


# ------------------------------------------------------------------------------------------------ the recorded runs

PLANTED = [rule.name for rule in RULES]
HEALTHY = ["healthy_ppo", "healthy_adaptive", "healthy_grpo"]


@pytest.mark.parametrize("name", PLANTED)
def test_the_planted_cause_is_named_first(name):
    findings, _ = examine(read(RECORDED / name)[1])
    assert findings and findings[0].name == name, findings


@pytest.mark.parametrize("name", HEALTHY)
def test_a_good_run_is_healthy(name):
    findings, unchecked = examine(read(RECORDED / name)[1])
    assert findings == []
    assert set(unchecked) <= {"value_lag"} and ("value_lag" in unchecked) == (name == "healthy_grpo")  # no critic


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_says_what_it_found_and_its_exit_code_counts(tmp_path):
    result = invoke("doctor", str(RECORDED / "truncated"), cwd=tmp_path)
    assert result.code == 1 and "finding" in result.out.splitlines()[0]
    assert "  seen: rollout/finished is" in result.out and "  turn: rollout.max_new_tokens=8" in result.out
    assert invoke("doctor", str(RECORDED / "healthy_grpo"), cwd=tmp_path).code == 0
    said = json.loads(invoke("doctor", str(RECORDED / "truncated"), "--json", cwd=tmp_path).out)
    assert (said["healthy"], said["findings"][0]["name"]) == (False, "truncated")


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "manifest.json").write_text(json.dumps({"schema": 1, "stage": "sft"}))
    (tmp_path / "new" / "ppo").mkdir(parents=True)
    (tmp_path / "new" / "ppo" / "manifest.json").write_text(json.dumps({"schema": 1, "stage": "ppo"}))
    for arguments, words in (
        (["new", "sft"], "2 runs given"),
        (["none"], "no PPO run there"),
        (["sft"], "a run of sft"),
        (["new"], "no step was logged"),
        (["new", "--verbose"], "--verbose"),
    ):
        result = invoke("doctor", *arguments, cwd=tmp_path)
        assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1
    for arguments in ([], ["--help"]):
        assert "Exit codes" in invoke("doctor", *arguments, cwd=tmp_path).out


def test_a_run_is_read_with_its_evaluation_and_its_error(tmp_path):
    ppo, evaluate = tmp_path / "runs/mine/ppo", tmp_path / "runs/mine/evaluate"
    (ppo / "logs").mkdir(parents=True)
    evaluate.mkdir()
    rows = [
        {"step": 0, "objective/score": 1.0},
        {"step": 1, "objective/score": "nan"},
        {"step": 1, "objective/score": 2.0},
    ]
    (ppo / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2, "obj')
    (ppo / "logs" / "progress.jsonl").write_text(json.dumps({"error": "RunError: score nan for response 'x'"}) + "\n")
    (evaluate / "config.yaml").write_text("policies: {sft: runs/mine/sft, mine: runs/mine/ppo}")
    (evaluate / "results.json").write_text(
        json.dumps({"differences": {"mine_minus_sft": {"mean": -1, "ci_high": -0.5}}})
    )
    folder, run = read(tmp_path / "runs/mine")
    assert folder == ppo and run.metrics == {"objective/score": [(0, 1.0), (1, 2.0)]}
    assert run.gold == {"mean": -1, "ci_high": -0.5}
    assert found(run) == ["nan"]  # by what it said when it stopped
    assert doctor.hint(ppo) == f"alignkit doctor {ppo}: 1 finding: nan"
    assert doctor.hint(tmp_path / "runs/none") is None
