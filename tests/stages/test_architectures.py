"""Every architecture of the README's list, made tiny, goes through SFT, reward model and PPO with vLLM in the training process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobs import metrics, run_many
from tiny import tiny_architecture

# {model_type: what its tiny config has beside the sizes of all}
ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "mistral": {},
    "phi3": {},
    "gpt2": {},
    "opt": {},
    "stablelm": {},
    "falcon": {},
    "bloom": {},
    "glm4": {},
    "gpt_neox": {},
    "smollm3": {},
    "olmo2": {},
    "phi": {},
    "starcoder2": {},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 6.0, "attention_multiplier": 0.1, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}
ALWAYS = ("gpt_neox", "granite")  # the others are slow


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"Hello {i}", "chosen": "I am happy.", "rejected": "I am sad."} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in ALWAYS else [pytest.mark.slow]) for k in ARCHITECTURES]
)
def test_an_architecture_goes_through_all_stages(kind, rows, pairs, tmp_path):
    base = tiny_architecture(tmp_path / "base", kind, **ARCHITECTURES[kind])
    common = [f"runs_dir={tmp_path}", "run_name=tiny", "logger=none", "micro_batch_size=4", "mini_batch_size=8"]
    small = ["steps=3", "rollout_batch_size=8", "rollout.max_new_tokens=8", "max_prompt_length=160"]
    jobs = {
        "sft": ["sft", *common, f"model.path={base}", f"data.path={rows}", "max_steps=2"],
        "reward": ["reward", *common, f"model.path={tmp_path}/tiny/sft", f"data.path={pairs}", "max_steps=2"],
        "ppo": [
            "ppo", *common, *small, f"model.path={tmp_path}/tiny/sft", f"data.path={rows}", "optimizer.learning_rate=1e-2",
            f"rewards.reward_model.path={tmp_path}/tiny/reward", "rewards.reward_model.min_accuracy=0",
        ],
    }  # fmt: skip
    assert run_many(jobs, tmp_path) == dict.fromkeys(jobs)
    steps = metrics(tmp_path / "tiny" / "ppo")
    assert len(steps) == 3  # the third answers with weights of version 3
    assert all(step["rollout/canary_gap_max"] < 1e-4 and step["rollout/logprob_gap_max"] < 1e-4 for step in steps)
    assert any(step["rollout/canary_gap_max"] > 0 for step in steps)  # two engines: their roundings differ
