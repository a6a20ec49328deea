"""Reward models and functions from elsewhere through the stages that score."""

from __future__ import annotations

import pytest
import torch
from command import alignkit
from jobs import manifest, metrics, run_many
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def rewards(tiny, tmp_path_factory):
    """{name: folder}: a whole sequence classifier of another base, and an adapter on the policy's."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    root, found = tmp_path_factory.mktemp("rewards"), {}
    for name, base in (("whole", tiny_model(root / "other", seed=7)), ("adapter", tiny)):
        torch.manual_seed(1)
        hf = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        torch.nn.init.normal_(hf.score.weight, std=0.3)
        if name == "adapter":
            hf = get_peft_model(hf, LoraConfig(r=4, lora_alpha=8, task_type="SEQ_CLS", target_modules="all-linear"))
        hf.save_pretrained(root / name)
        tiny_tokenizer(root / name)
        found[name] = root / name
    return found


@pytest.mark.slow
def test_they_score_in_evaluate_and_train_a_policy(tiny, rows, rewards, tmp_path):
    """A dry run takes each, two steps of PPO end with its scores; its weights are as they were."""
    (tmp_path / "own.py").write_text("async def score(completions, **rest): return [1.0 for _ in completions]\n")
    own = ["+reward@rewards.own=function", f"rewards.own.target={tmp_path}/own.py:score", "rewards.own.weight=0.5"]
    common = [f"runs_dir={tmp_path}", "logger=none", "rollout=hf", "rollout.max_new_tokens=6", f"data.path={rows}"]
    small = ["steps=2", "rollout_batch_size=8", "mini_batch_size=4", "micro_batch_size=4", f"model.path={tiny}"]
    jobs = {
        f"{tune}_{kind}": [
            "ppo",
            *common,
            *small,
            f"run_name={tune}_{kind}",
            f"finetune={tune}",
            f"rewards.reward_model.path={folder}",
        ]
        for tune in ("lora", "full")
        for kind, folder in rewards.items()
    }
    judge = ["+reward@rewards.judge=reward_model", f"rewards.judge.path={rewards['whole']}", f"+policies.base={tiny}"]
    jobs["judged"] = ["evaluate", *common, "run_name=judged", *judge]
    for stage, *job in (jobs["lora_whole"], jobs["judged"]):
        planned = alignkit(stage, *job, "dry_run=true")
        assert planned.returncode == 0, planned.stderr
        assert "read at an answer's last token" in planned.stdout
    jobs["lora_adapter"] += own
    assert run_many(jobs, tmp_path) == dict.fromkeys(jobs)
    for name in list(jobs)[:-1]:
        logged = metrics(tmp_path / name / "ppo")
        assert len({row["step"] for row in logged if "objective/score" in row}) == 2
    assert manifest(tmp_path / "judged/evaluate")["metrics"]["base/mean"] != 0
