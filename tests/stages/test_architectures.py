"""Every architecture of the README's list, made tiny, goes through SFT, reward model and PPO with vLLM in the training process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobs import metrics, run_many
from tiny import ARCHITECTURES, tiny_architecture

TOGETHER = (
    "gpt_neox",
    "granite",
)  # in one process, in every run of the tests: one by transformers' class, one by vLLM's
OTHERS = [pytest.param((kind,), marks=pytest.mark.slow, id=kind) for kind in ARCHITECTURES if kind not in TOGETHER]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"Hello {i}", "chosen": "I am happy.", "rejected": "I am sad."} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kinds", [pytest.param(TOGETHER, id="-".join(TOGETHER)), *OTHERS])
def test_an_architecture_goes_through_all_stages(kinds, rows, pairs, tmp_path):
    jobs = {}
    for kind in kinds:
        base, run = tiny_architecture(tmp_path / f"base-{kind}", kind, **ARCHITECTURES[kind]), tmp_path / kind
        common = [f"runs_dir={tmp_path}", f"run_name={kind}", "logger=none", "micro_batch_size=4", "mini_batch_size=8"]
        jobs |= {
            f"sft {kind}": ["sft", *common, f"model.path={base}", f"data.path={rows}", "max_steps=2"],
            f"reward {kind}": ["reward", *common, f"model.path={run}/sft", f"data.path={pairs}", "max_steps=2"],
            f"classes_left_alone {kind}": [
                "ppo", *common, f"model.path={run}/sft", f"data.path={rows}", "optimizer.learning_rate=1e-2", "steps=3",
                "rollout_batch_size=8", "rollout.max_new_tokens=8", "max_prompt_length=160",
                f"rewards.reward_model.path={run}/reward", "rewards.reward_model.min_accuracy=0",
            ],
        }  # fmt: skip
    assert run_many(jobs, tmp_path) == dict.fromkeys(jobs)
    for kind in kinds:
        steps = metrics(tmp_path / kind / "ppo")
        assert len(steps) == 3  # the third answers with weights of version 3
        near = 1e-3 if kind == "bloom" else 1e-4  # its GELU: exact in vLLM, by a tanh in transformers
        assert all(step["rollout/canary_gap_max"] < near and step["rollout/logprob_gap_max"] < near for step in steps)
        assert any(step["rollout/canary_gap_max"] > 0 for step in steps)  # two engines: their roundings differ
