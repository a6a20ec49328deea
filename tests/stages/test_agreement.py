"""vLLM against the trainer: the same tokens, the same law, the same log-probs, after many syncs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest


def measure(*arguments: str) -> dict:
    script = Path(__file__).with_name("agreement.py")
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=1500)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert line is not None, done.stderr[-3000:]
    return json.loads(line.removeprefix("RESULT "))


@pytest.fixture(scope="module")
def laws(tiny) -> dict:
    return measure("laws", str(tiny), "float32")


def test_greedy_tokens_are_those_of_transformers(laws):
    assert laws["greedy_equal"] == 64
    assert laws["greedy_gap"] < 1e-5


def test_first_tokens_follow_the_softmax_at_the_temperature(laws):
    """Chi-square, p > .001 by the Wilson-Hilferty approximation of its quantile."""
    free = laws["bins"] - 1
    assert free > 50
    critical = free * (1 - 2 / (9 * free) + 3.09 * math.sqrt(2 / (9 * free))) ** 3
    assert laws["chi_square"] < critical


def test_each_response_has_a_stream_of_its_own(laws):
    """Neither the split of the batch nor its neighbours matter; siblings, twins and steps differ."""
    assert laws["split_equal"] and laws["split_logprob_gap"] < 1e-5
    assert laws["twins_differ"] and laws["siblings_differ"] and laws["steps_differ"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_probs_agree_after_twenty_syncs_of_moving_weights(dtype, tiny):
    check_syncs(measure("syncs", str(tiny), dtype), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_probs_of_the_real_model_agree(dtype):
    from alignkit.models.source import resolve_model

    check_syncs(measure("syncs", resolve_model("demo:smollm2-135m-instruct").base, dtype), dtype)


def check_syncs(found: dict, dtype: str) -> None:
    print(found)
    for payload in ("adapter", "merged", "full"):
        if dtype == "float32":
            assert found[payload]["base"] <= 1e-3 and found[payload]["max"] <= 1e-3, payload
        else:
            assert found[payload]["mean"] <= 0.15, payload
