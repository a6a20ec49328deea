"""All stages for real: the tiny model, DeepSpeed's launcher, vLLM, TRL, through the command line a user types."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from command import alignkit
from jobs import STAGES, manifest, metrics
from safetensors.torch import load_file


def test_every_stage_is_done_and_its_manifest_says_from_what(pipeline, tiny):
    for stage in STAGES:
        made = manifest(pipeline / stage)
        assert made["status"] == "done" and made["stage"] == stage
        assert made["base_model"]["path"] == str(tiny) and len(made["base_model"]["hash"]) == 16
        assert made["versions"]["torch"].startswith("2.")
    assert manifest(pipeline / "reward")["inputs"]["model"]["path"] == str(pipeline / "sft")
    assert len({manifest(pipeline / stage)["tokenizer_hash"] for stage in STAGES}) == 1


def test_summary_has_the_promised_keys(pipeline):
    summary = json.loads((pipeline / "summary.json").read_text())
    for stage in STAGES[:4]:
        assert summary["stages"][stage]["seconds"] > 0 and summary["stages"][stage]["status"] == "done"
    for policy in ("base", "sft", "ppo", "ppo_minus_sft"):
        entry = summary["gold"][policy]
        assert entry["ci_low"] <= entry["mean"] <= entry["ci_high"]
    assert math.isfinite(summary["kl"]["per_response"])
    assert 0 <= summary["reward_model"]["accuracy"] <= 1
    assert summary["seed"] == 0 and summary["model"] and summary["versions"]
    assert "<svg" in (pipeline / "report.html").read_text()


def test_terminal_shows_a_line_a_stage_and_no_library_noise(pipeline):
    text = (pipeline / "terminal.txt").read_text()
    for number, stage in enumerate(STAGES, start=1):
        assert f"✓ [{number}/5] {stage}" in text
    assert "Warning" not in text and "WARNING" not in text
    assert "alignkit pipeline" in text  # the command to go on with


def test_first_minibatch_has_ratio_one_and_step_zero_no_kl(pipeline):
    steps = metrics(pipeline / "ppo")
    assert [row["step"] for row in steps] == [0, 1, 2]
    assert steps[0]["objective/kl"] == 0.0
    for row in steps:
        assert row["policy/first_ratio_gap_max"] <= 1e-4
        assert row["rollout/logprob_gap_max"] <= 1e-4
        assert row["rollout/policy_version"] == row["step"] + 1
    assert any(row["objective/kl"] != 0 for row in steps[1:])


def test_ppo_logs_the_names_of_the_design(pipeline):
    wanted = {
        "objective/kl", "objective/score", "objective/entropy", "objective/non_score_reward", "policy/loss", "policy/clip_fraction",
        "policy/approx_kl", "critic/loss", "critic/explained_variance", "rollout/length", "rollout/finished",
        "rollout/logprob_gap", "time/generate", "time/forward", "time/update", "time/sync",
    }  # fmt: skip
    for row in metrics(pipeline / "ppo"):
        assert wanted <= row.keys()


def test_adapters_moved_and_only_where_they_should(pipeline):
    sft, ppo = (load_file(pipeline / stage / "model" / "adapter_model.safetensors") for stage in ("sft", "ppo"))
    assert sft.keys() == ppo.keys()
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in sft} == {2, 3}  # last_layers=2 of 4
    assert all(not torch.equal(sft[name], ppo[name]) for name in sft)


def test_models_load_in_plain_peft_and_transformers(pipeline, tiny):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    ids = torch.tensor([[5, 6, 7, 8]])
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), pipeline / "ppo" / "model")
    base = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        assert not torch.allclose(policy(ids).logits, base(ids).logits, atol=1e-4)
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    reward = PeftModel.from_pretrained(classifier, pipeline / "reward" / "model")
    assert torch.isfinite(reward(ids).logits).all()
    tokenizer = AutoTokenizer.from_pretrained(pipeline / "ppo" / "model")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.chat_template


def test_reward_head_is_normalised_and_critic_starts_as_the_reward_model(pipeline, tiny):
    """Spec tests 36 and 37: the scores' zero point is kept with the head; V at the last token is the raw score."""
    from alignkit.finetune.critic import Critic
    from alignkit.finetune.lora import LoRA
    from alignkit.models.config import Model
    from alignkit.models.source import resolve_model

    source, reward = (resolve_model(str(pipeline / stage)) for stage in ("sft", "reward"))
    roles = LoRA(last_layers=2).roles(Model(path=""), source, reward, 320, Critic(), 0).eval()
    ids = torch.randint(4, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    mask, starts = torch.ones_like(ids, dtype=torch.bool), torch.full((3,), 7)
    with torch.no_grad():
        score = roles("reward_model", ids, mask, starts, 5)
        values = roles("critic", ids, mask, starts, 6)  # values[t] stands before token t: the last one behind the end
    assert torch.allclose(values[:, -1], score, atol=1e-6)
    assert manifest(pipeline / "reward")["metrics"]["score_std"] > 0
    assert roles.heads["reward_model"].bias.item() == pytest.approx(
        -manifest(pipeline / "reward")["metrics"]["score_mean"], abs=1e-6
    )


def test_stages_run_alone_on_the_artifacts_of_others(pipeline, rows, common):
    """Each command by itself, here with the slow twin for the rollouts; the reward is a user's function."""
    reward = pipeline / "mine.py"
    reward.write_text("def score(prompts, responses, meta):\n    return [float(len(r)) for r in responses]\n")
    result = alignkit(
        "ppo", *common, "run_name=alone", f"model.path={pipeline / 'sft'}", f"data.path={rows}", "rollout=hf", "rollout.max_new_tokens=6",
        "finetune.last_layers=2", "algorithm.missing_eos=none", f"rewards.reward_model.path={pipeline / 'reward'}", "+reward@rewards.mine=function", f"rewards.mine.target={reward}:score",
        "steps=1", "rollout_batch_size=8", "mini_batch_size=8", "micro_batch_size=4", "deepspeed=zero1", "logger=tensorboard",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    run_dir = pipeline.parent / "alone" / "ppo"
    row = metrics(run_dir)[0]
    assert row["objective/score"] == pytest.approx(
        row["objective/score/reward_model"] + row["objective/score/mine"], abs=1e-4
    )
    assert row["rollout/logprob_gap_max"] < 1e-5
    assert list(run_dir.rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_two_ranks_compute_what_one_computes(stage, pipeline, tiny, rows, common):
    """Same seed and global batch, fp32: the losses of the first three steps agree to 1e-5.

    The second and third depend on the updates before them, so gradients and their divisor are compared as well.
    """
    inputs = {
        "sft": [f"model.path={tiny}", f"data.path={rows}", "optimizer.learning_rate=1e-3"],
        "reward": [f"model.path={pipeline / 'sft'}", f"data.path={pipeline / 'sample' / 'pairs.jsonl'}"],
        "ppo": [
            f"model.path={pipeline / 'sft'}", f"data.path={rows}", f"rewards.reward_model.path={pipeline / 'reward'}",
            "rollout.max_new_tokens=10", "rollout_batch_size=16", "steps=3",
        ],
    }[stage]  # fmt: skip
    sizes = ["mini_batch_size=8"] + ([] if stage == "ppo" else ["max_steps=3"])
    variants = {"one": (1, 4), "two": (2, 4)} | ({"small": (1, 2)} if stage == "ppo" else {})  # (ranks, micro-batch)
    found = {}
    for name, (ranks, micro) in variants.items():
        split = [f"launcher.num_ranks={ranks}", f"micro_batch_size={micro}"]
        result = alignkit(stage, *common, f"run_name={name}", "finetune.last_layers=2", *split, *inputs, *sizes)
        assert result.returncode == 0, result.stderr + result.stdout
        found[name] = metrics(pipeline.parent / name / stage)[:3]
    names = {
        "sft": ["policy/loss"],
        "reward": ["reward_model/loss"],
        "ppo": ["policy/loss", "critic/loss", "objective/score", "objective/kl", "objective/entropy"],
    }[stage]
    for name in variants:
        assert [row["step"] for row in found[name]] == ([0, 1, 2] if stage == "ppo" else [1, 2, 3])
        for one, other in zip(found["one"], found[name], strict=True):
            for metric in names:
                assert one[metric] == pytest.approx(other[metric], abs=1e-5), (name, one["step"], metric)
    assert len({row[names[0]] for row in found["one"]}) == 3  # the model moved: the steps differ


def test_prompts_that_are_all_too_long_are_refused_before_a_run_folder_is_made(pipeline, rows, common):
    result = alignkit(
        "ppo", *common, "run_name=refused", "finetune.last_layers=2", f"model.path={pipeline / 'sft'}", f"data.path={rows}", "max_prompt_length=2",
        f"rewards.reward_model.path={pipeline / 'reward'}", "rollout_batch_size=8", "mini_batch_size=8",
    )  # fmt: skip
    assert result.returncode == 2
    assert "max_prompt_length=2" in result.stderr
    assert not (pipeline.parent / "refused").exists()


def test_ppo_learns_what_it_is_rewarded_for(tiny, rows, common, tmp_path):
    """Full fine-tuning against a count of four words in the answer: from one answer in four to two words an answer."""
    (tmp_path / "words.py").write_text(
        "def score(prompts, responses, meta):\n"
        "    return [sum(word in r for word in ('good', 'happy', 'great', 'love')) for r in responses]\n"
    )
    result = alignkit(
        "ppo", *common, "run_name=learns", f"model.path={tiny}", f"data.path={rows}", "finetune=full", "rollout=hf",
        "rollout.max_new_tokens=12", "~reward@rewards.reward_model", "+reward@rewards.words=function",
        f"rewards.words.target={tmp_path / 'words.py'}:score", "steps=20", "rollout_batch_size=64", "mini_batch_size=16",
        "micro_batch_size=16", "algorithm.missing_eos=none", "algorithm.ppo_epochs=2", "algorithm.kl_coef=0.01",
        "optimizer.learning_rate=3e-3", "critic_optimizer.learning_rate=3e-3", "launcher.threads=1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    scores = [row["objective/score"] for row in metrics(Path(common[0].removeprefix("runs_dir=")) / "learns" / "ppo")]
    assert scores[0] < 0.6
    assert sum(scores[-3:]) / 3 > 2


def test_an_adapter_of_another_shape_is_refused_with_the_shape_to_give(pipeline, rows, common):
    result = alignkit(
        "ppo", *common, "run_name=shape", f"model.path={pipeline / 'sft'}", f"data.path={rows}",
        f"rewards.reward_model.path={pipeline / 'reward'}",
    )  # fmt: skip
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "finetune.rank=16 finetune.alpha=32 finetune.last_layers=2" in result.stderr
    assert not (pipeline.parent / "shape").exists()
