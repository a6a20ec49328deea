"""Whole stages on a base that transformers reads and would not write again: every weight is trained, then saved."""

from __future__ import annotations

import json
import shutil

import pytest
from command import alignkit

pytestmark = pytest.mark.slow

PPO = (
    "steps=1", "rollout_batch_size=8", "mini_batch_size=8", "micro_batch_size=8", "rollout.max_new_tokens=8", "rollout=hf",
    "~reward@rewards.reward_model", "+reward@rewards.gold=vader",
)  # fmt: skip
STAGES = {
    "sft": ("max_steps=2", "save_steps=1", "eval_fraction=0"),
    "reward": ("max_steps=2", "save_steps=1", "eval_fraction=0.2"),
    "ppo": PPO,
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_base_whose_generation_settings_cannot_be_saved(stage, tiny, rows, tmp_path):
    """do_sample=false beside a temperature, as released models have it; the Trainer's checkpoints would end there too."""
    base = shutil.copytree(tiny, tmp_path / "base")
    odd = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 3}
    (base / "generation_config.json").write_text(json.dumps(odd))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"top_k": 7}))
    path = rows
    if stage == "reward":
        path = tmp_path / "pairs.jsonl"
        pairs = [{"prompt": f"Hello {i}", "chosen": "good day", "rejected": f"bad {i}"} for i in range(20)]
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    result = alignkit(
        stage, "run_name=x", f"runs_dir={tmp_path}", f"model.path={base}", f"data.path={path}", "logger=none", "finetune=full",
        "optimizer.learning_rate=1e-5", *STAGES[stage],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    run = tmp_path / "x" / stage
    assert (run / "model" / "model.safetensors").is_file()
    notes = (run / "logs" / "progress.jsonl").read_text()
    assert ("temperature=0.9" in notes) == (stage != "reward")
    assert (run / "checkpoints" / "step_000001").is_dir() == (stage != "ppo")
