"""Every option of the PPO stage flipped from its default, by itself, for two steps on the tiny model; and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from jobs import metrics, run_many

from alignkit.cli.entry import conf_dir
from alignkit.config import stages
from alignkit.core.errors import InputError

# {name: overrides}, over the `base` below. "{rows}" and "{mine}" stand for the data file and a reward function of two words.
FLIPS = {
    "default": [],
    "ppo_epochs": ["algorithm.ppo_epochs=2"],
    "clip_range": ["algorithm.clip_range=0.1"],
    "clip_range_high": ["algorithm.clip_range_high=0.28"],
    "dual_clip": ["algorithm.dual_clip=3"],
    "target_kl": ["algorithm.target_kl=1e-7"],
    "ent_coef": ["algorithm.ent_coef=0.01"],
    "sequence_mean_token_mean": ["algorithm.aggregation=sequence_mean_token_mean"],
    "sequence_mean_token_sum": ["algorithm.aggregation=sequence_mean_token_sum"],
    "whiten_advantages": ["algorithm.whiten_advantages=false"],
    "kl_coef": ["algorithm.kl_coef=0"],
    "kl_in_loss": ["algorithm.kl_in=loss"],
    "kl_in_loss_k3_plus": ["algorithm.kl_in=loss", "algorithm.kl_estimator=k3+"],
    "kl_k3_parity": ["algorithm.kl_estimator=k3", "algorithm.peer_parity=true"],
    "kl_abs_parity": ["algorithm.kl_estimator=abs", "algorithm.peer_parity=true"],
    "adaptive_kl": ["algorithm.adaptive_kl_target=6", "algorithm.adaptive_kl_horizon=64"],
    "normalize_scores": ["algorithm.normalize_scores=true"],
    "score_clip": ["algorithm.score_clip=0.01"],
    "missing_eos_replace": ["algorithm.missing_eos=replace"],
    "missing_eos_at_most": ["algorithm.missing_eos=at_most"],
    "missing_eos_subtract": ["algorithm.missing_eos=subtract"],
    "missing_eos_value": ["algorithm.missing_eos=replace", "algorithm.missing_eos_value=-3"],
    "importance_none": ["algorithm.importance=none"],
    "importance_sequence": ["algorithm.importance=sequence"],
    "importance_icepop": ["algorithm.importance=icepop", "algorithm.importance_floor=0.5"],
    "importance_cap": ["algorithm.importance_cap=5"],
    "value_clip_range": ["algorithm.value_clip_range=null"],
    "vf_coef": ["algorithm.vf_coef=0.5"],
    "gamma": ["algorithm.gamma=0.9"],
    "gae_lambda": ["algorithm.gae_lambda=1"],
    "after_eos": ["algorithm.score_slot=after_eos"],
    "whiten_rewards": ["algorithm.whiten_rewards=true"],
    "critic_warmup": ["algorithm.critic_warmup=1"],
    "critic_trunk": ["critic.kind=trunk"],
    "critic_separate": ["critic.kind=separate"],
    "critic_from_policy": ["critic.weights=policy"],
    "critic_zero": ["critic.head=zero"],
    "critic_random": ["critic.head=random"],
    "no_reward_model": ["~reward@rewards.reward_model", "+reward@rewards.mine=function", "rewards.mine.target={mine}"],
    "two_rewards": ["+reward@rewards.mine=function", "rewards.mine.target={mine}", "rewards.mine.weight=0.5"],
    "rloo": ["algorithm=rloo"],
    "grpo": ["algorithm=grpo"],
    "grpo_no_std": ["algorithm=grpo", "algorithm.scale_by_std=false"],
    "reinforce_pp": ["algorithm=reinforce_pp"],
    "reinforce_pp_gamma": ["algorithm=reinforce_pp", "algorithm.gamma=0.9"],
    "ptx": ["ptx.coef=1", "ptx.data.path={rows}", "ptx.mini_batch_size=8"],
    "top_p": ["rollout.top_p=0.9", "rollout.allow_biased_sampling=true"],
    "top_k": ["rollout.top_k=5", "rollout.allow_biased_sampling=true"],
    "min_tokens": ["rollout.min_tokens=3", "rollout.allow_biased_sampling=true"],
    "vllm_biased": ["rollout=vllm", "rollout.top_p=0.9", "rollout.min_tokens=3", "rollout.allow_biased_sampling=true"],
    "temperature": ["rollout.temperature=0.7"],
    "stop_token_ids": ["rollout.stop_token_ids=null"],
    "keep_shared_states": ["keep_shared_states=false"],
    "cosine": ["optimizer.schedule=cosine"],
    "constant": ["optimizer.schedule=constant", "optimizer.warmup_steps=1"],
    "max_grad_norm": ["optimizer.max_grad_norm=0"],
    "weight_decay": ["optimizer.weight_decay=0.1"],
    "zero0": ["deepspeed=zero0"],
    "zero1": ["deepspeed=zero1"],
    "zero3": ["deepspeed=zero3"],
    "zero2_offload": ["deepspeed=zero2_offload"],
    "zero3_offload": ["deepspeed=zero3_offload"],
    "gradient_checkpointing": ["gradient_checkpointing=true"],
    "zero3_checkpointing": ["deepspeed=zero3", "gradient_checkpointing=true"],
    "micro_batch_size": ["micro_batch_size=1"],
    "sample_every": ["sample_every=2"],
    "bfloat16": ["model.dtype=bfloat16"],
}


@pytest.fixture(scope="session")
def flips(pipeline, rows, tmp_path_factory) -> Path:
    """All of FLIPS in one process; the folder of the runs, with errors.json in it.

    Every fifth token or so ends a response, and the penalty for those that are cut is off, so that lengths and scores
    differ and an option has something to change.
    """
    folder = tmp_path_factory.mktemp("flips")
    mine = folder / "mine.py"
    mine.write_text("def score(prompts, responses, meta):\n    return [float(len(r) % 7) for r in responses]\n")
    base = [
        f"runs_dir={folder}", f"model.path={pipeline / 'sft'}", f"data.path={rows}", "logger=none", "rollout=hf",
        "rollout.max_new_tokens=8", "finetune.last_layers=2", "steps=2", "rollout_batch_size=8", "mini_batch_size=4",
        "micro_batch_size=2", "group_size=2", "optimizer.learning_rate=1e-3", "algorithm.missing_eos=none",
        f"rollout.stop_token_ids={list(range(20, 80))}".replace(" ", ""),
    ]  # fmt: skip
    jobs = {}
    for name, flip in FLIPS.items():
        reward = [] if name == "no_reward_model" else [f"rewards.reward_model.path={pipeline / 'reward'}"]
        own = [part.format(rows=rows, mine=f"{mine}:score") for part in flip]
        replaced = {part.split("=")[0] for part in own}
        jobs[name] = [part for part in base if part.split("=")[0] not in replaced] + reward + own
        jobs[name].append(f"run_name={name}")
    (folder / "errors.json").write_text(json.dumps(run_many(jobs, folder)))
    return folder


def steps_of(flips: Path, name: str) -> list[dict]:
    error = json.loads((flips / "errors.json").read_text())[name]
    assert error is None, error
    return metrics(flips / name / "ppo")


@pytest.mark.parametrize("name", FLIPS)
def test_every_option_runs_two_steps(name, flips):
    rows = steps_of(flips, name)
    assert [row["step"] for row in rows] == [0, 1]
    numbers = [value for row in rows for value in row.values()]
    assert all(math.isfinite(float(value)) for value in numbers)
    if "policy/first_ratio_gap_max" in rows[0]:
        assert rows[0]["policy/first_ratio_gap_max"] <= (0.1 if name == "bfloat16" else 1e-5)
    assert rows[0]["objective/log_ratio" if name in BIASED else "objective/kl"] == 0


BIASED = ("top_p", "top_k", "min_tokens", "vllm_biased")  # no KL is given under these

# Options that change what is computed from the very same rollouts of step 0: {name: metrics that must differ}.
CHANGES = {
    "ent_coef": ["policy/grad_norm"],
    "sequence_mean_token_mean": ["policy/grad_norm"],
    "sequence_mean_token_sum": ["policy/grad_norm"],
    "whiten_advantages": ["policy/grad_norm"],
    "normalize_scores": ["objective/score"],
    "score_clip": ["objective/score"],
    "missing_eos_replace": ["objective/score"],
    "missing_eos_value": ["objective/score"],
    "missing_eos_at_most": ["objective/score"],
    "missing_eos_subtract": ["objective/score"],
    "vf_coef": ["critic/grad_norm"],
    "gamma": ["critic/explained_variance"],
    "gae_lambda": ["critic/explained_variance"],
    "after_eos": ["critic/explained_variance"],
    "whiten_rewards": ["critic/explained_variance"],
    "critic_trunk": ["critic/value"],
    "critic_from_policy": ["critic/value"],
    "critic_zero": ["critic/value"],
    "critic_random": ["critic/value"],
    "two_rewards": ["objective/score"],
    "ptx": ["policy/grad_norm"],
    "temperature": ["objective/entropy"],
    "rloo": ["policy/grad_norm"],
    "grpo": ["policy/grad_norm"],
    "reinforce_pp": ["policy/grad_norm"],
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_option_changes_what_it_is_for(name, flips):
    before, after = steps_of(flips, "default")[0], steps_of(flips, name)[0]
    for metric in CHANGES[name]:
        assert float(before[metric]) != pytest.approx(float(after[metric]), rel=1e-6), metric


def test_what_an_option_is_for(flips):
    def first(name):
        return steps_of(flips, name)[0]

    assert first("critic_zero")["critic/value"] == 0 and first("critic_trunk")["critic/value"] == 0
    assert "policy/loss" not in first("critic_warmup") and "policy/loss" in steps_of(flips, "critic_warmup")[1]
    still, learns = steps_of(flips, "critic_warmup")
    assert "policy/learning_rate" not in still and learns["policy/learning_rate"] == 1e-3  # its own first round
    assert "critic/loss" not in first("rloo") and "critic/loss" in first("critic_trunk")
    assert "critic/grad_norm" not in first("critic_trunk")  # one optimizer: the policy's
    assert "rollout/importance_weight" not in first("importance_none")
    assert first("default")["rollout/importance_weight"] == pytest.approx(1, abs=1e-6)
    assert first("vllm_biased")["rollout/logprob_gap"] > 0.01  # another law than the policy's
    assert first("adaptive_kl")["objective/kl_coef"] == 0.05
    assert steps_of(flips, "adaptive_kl")[1]["objective/kl_coef"] == pytest.approx(0.05 * (1 - 0.2 * 8 / 64))
    assert first("ppo_epochs")["update/steps"] == 4 and first("default")["update/steps"] == 2
    assert first("ptx")["policy/ptx_loss"] > 1
    assert first("min_tokens")["rollout/length"] >= 3
    notes = (flips / "kl_k3_parity" / "ppo" / "logs" / "progress.jsonl").read_text()
    assert "does not anchor" in notes


def test_early_stop_takes_no_further_step(flips):
    row = steps_of(flips, "target_kl")[0]
    assert row["update/early_stop"] == 1 and row["update/steps"] == 1
    other = steps_of(flips, "default")[0]
    assert other["update/early_stop"] == 0 and other["update/steps"] == 2


def test_zero_stages_train_alike(flips):
    for name in (
        "zero0",
        "zero1",
        "zero3",
        "zero2_offload",
        "zero3_offload",
        "gradient_checkpointing",
        "zero3_checkpointing",
    ):
        for one, other in zip(steps_of(flips, "default"), steps_of(flips, name), strict=True):
            for metric in ("policy/loss", "critic/loss", "policy/grad_norm", "objective/kl"):
                assert one[metric] == pytest.approx(other[metric], abs=1e-6), (name, metric)


def test_micro_batches_do_not_change_a_run(flips):
    for one, other in zip(steps_of(flips, "default"), steps_of(flips, "micro_batch_size"), strict=True):
        for metric in ("policy/loss", "critic/loss", "policy/grad_norm", "critic/grad_norm", "objective/kl"):
            assert one[metric] == pytest.approx(other[metric], abs=1e-5), metric


REFUSED = [
    (["algorithm.kl_in=loss", "algorithm.kl_estimator=k1"], ("kl_estimator=k1", "kl_in=loss")),
    (["algorithm.kl_in=loss", "algorithm.kl_estimator=k3"], ("kl_estimator=k3", "kl_in=loss")),
    (["algorithm.kl_estimator=k3"], ("kl_estimator=k3", "kl_in=reward")),
    (["algorithm.kl_estimator=abs"], ("kl_estimator=abs", "kl_in=reward")),
    (["algorithm.adaptive_kl_target=6", "algorithm.kl_coef=0"], ("adaptive_kl_target=6", "kl_coef=0")),
    (["algorithm.importance_floor=3"], ("importance_floor=3", "importance_cap=2")),
    (["algorithm.importance=none", "algorithm.importance_floor=0.5"], ("importance_floor=0.5", "importance=none")),
    (["algorithm.target_kl=0.1", "mini_batch_size=64"], ("target_kl=0.1", "ppo_epochs=1")),
    (["algorithm=rloo"], ("algorithm=rloo", "group_size=1")),
    (["algorithm=grpo"], ("algorithm=grpo", "group_size=1")),
    (["algorithm=rloo", "group_size=2", "algorithm.value_clip_range=0.2"], ("value_clip_range",)),
    (["critic.kind=adapter", "finetune=full"], ("critic.kind=adapter", "finetune=full")),
    (["critic.kind=trunk", "critic.weights=reward_model"], ("critic.weights=reward_model", "critic.kind=trunk")),
    (["critic.kind=trunk", "critic.head=reward_model"], ("critic.head=reward_model", "critic.kind=trunk")),
    (["critic.kind=trunk", "algorithm.critic_warmup=2"], ("critic_warmup=2", "critic.kind=trunk")),
    (["critic.weights=policy", "critic.head=reward_model"], ("critic.head=reward_model", "critic.weights=policy")),
    (["ptx.coef=1"], ("ptx.coef=1", "ptx.data.path=''")),
    (["ptx.data.path=x.jsonl"], ("ptx.coef=0", "ptx.data.path='x.jsonl'")),
    (["rollout.top_p=0.9"], ("rollout.top_p=0.9", "allow_biased_sampling")),
    (["rollout.top_k=5", "rollout.min_tokens=2"], ("rollout.top_k=5 and rollout.min_tokens=2", "allow_biased")),
    (["rollout.min_tokens=99"], ("min_tokens=99", "max_new_tokens=64")),
    (["deepspeed=zero2", "deepspeed.offload_param=true"], ("offload_param=true", "deepspeed=zero2", "stage 3")),
    (["deepspeed=zero0", "deepspeed.offload_optimizer=true"], ("offload_optimizer=true", "deepspeed=zero0", "1 or 2 or 3")),
    (["deepspeed=zero0", "model.dtype=bfloat16"], ("deepspeed=zero0", "model.dtype=bfloat16", "deepspeed=zero1")),
    (["finetune=qlora", "deepspeed=zero3"], ("finetune=qlora", "deepspeed=zero3", "deepspeed=zero2")),
    (["finetune=qlora", "rollout=server"], ("finetune=qlora", "rollout=server", "rollout=vllm")),
    (["finetune=qlora", "rollout.payload=adapter"], ("finetune=qlora", "payload=adapter", "payload=merged")),
    (["mini_batch_size=128"], ("mini_batch_size=128", "rollout_batch_size=64")),
    (["algorithm.dual_clip=1"], ("dual_clip=1", "more than 1")),
    (["algorithm.aggregation=mean"], ("aggregation=mean", "token_mean")),
]  # fmt: skip


@pytest.mark.parametrize("overrides, parts", REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_meaningless_combinations_are_refused_with_their_values(overrides, parts):
    stages.register()
    given = ["run_name=x", "model.path=m", "data.path=d.jsonl", "rewards.reward_model.path=r", *overrides]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"), pytest.raises(Exception) as refused:
        stages.to_config(compose("ppo", given), "ppo")
    if len(parts) > 1:
        assert isinstance(refused.value, InputError)
    for part in parts:
        assert part in str(refused.value)
