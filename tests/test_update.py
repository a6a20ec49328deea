"""What an optimizer step divides by, and what it leaves alone: on the tables of `enumerated.py` and on small models."""

from __future__ import annotations

import pytest
import torch
from enumerated import WORLD, Env, PlainEngine, T, Tables
from nets import VOCAB, make_config, make_experience, make_rollouts, save_model, torch_engines

from alignkit.algorithms.ppo import PPO
from alignkit.core.types import ModelSource, ScoredRollouts
from alignkit.finetune.critic import Critic
from alignkit.finetune.full import Full
from alignkit.finetune.lora import LoRA
from alignkit.models.config import Model
from alignkit.stages import ppo as stage
from alignkit.training.engine import Optimizer

ROWS = 12


class Counting(PlainEngine):
    """Keeps what each micro-batch was divided by."""

    def backward(self, losses, last):
        self.counts = [*getattr(self, "counts", []), *(count for _, count in losses)]
        super().backward(losses, last)


@pytest.mark.parametrize("micro", [1, 5, ROWS])
@pytest.mark.parametrize("slot", ["on_last_token", "after_eos"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"])
def test_every_micro_batch_is_divided_by_the_count_of_the_whole_step(aggregation, slot, micro):
    """The policy's by tokens or sequences, the critic's by the slots with a value: one more behind a short response."""
    g = torch.Generator().manual_seed(0)
    env = Env(torch.randn(73, 8, generator=g), torch.randn(8, generator=g), torch.zeros(8, 8, 8))
    roles = Tables(env.ref_logits)
    rollouts = env.sample(roles.policy, ROWS, 1.0, g)
    lengths = rollouts.response_mask.sum(1)
    assert {1, T} <= set(lengths.tolist())
    algorithm = PPO(aggregation=aggregation, score_slot=slot)
    cfg = make_config(algorithm, micro)
    seen = stage.forward(cfg, roles, rollouts)
    scored = ScoredRollouts(rollouts, env.score(rollouts.response_ids, rollouts.response_mask).float())
    experience, _ = algorithm.experience(
        scored, seen["policy"], seen["ref_policy"], seen["critic"], algorithm.start(), 1
    )
    engines = {role: Counting(roles, getattr(roles, role), Optimizer(), 1) for role in ("policy", "critic")}
    stage.optimize(cfg, roles, engines, experience, WORLD)
    tokens = int(lengths.sum())
    assert set(engines["policy"].counts) == {tokens if aggregation == "token_mean" else ROWS}
    assert set(engines["critic"].counts) == {tokens + (int((lengths < T).sum()) if slot == "after_eos" else 0)}
    assert len(engines["policy"].counts) == len(engines["critic"].counts) >= ROWS / micro


@pytest.mark.parametrize("kind", ["full", "lora", "lora beside a critic's adapter"])
def test_the_reference_stays_while_the_policy_learns(tmp_path, kind):
    folder = save_model(tmp_path, "llama")
    finetune = Full() if kind == "full" else LoRA(rank=4)
    critic = Critic("adapter" if kind.endswith("adapter") else "separate")
    roles = finetune.roles(Model(), ModelSource(str(folder)), None, VOCAB, critic, seed=0)
    rollouts, cfg = make_rollouts(8), make_config(PPO())
    before = stage.forward(cfg, roles, rollouts)
    experience = make_experience(cfg, roles, rollouts)
    engines = torch_engines(roles, finetune, rate=0.5)
    for _ in range(3):
        stage.optimize(cfg, roles, engines, experience, WORLD)
    after = stage.forward(cfg, roles, rollouts)
    assert torch.equal(before["ref_policy"], after["ref_policy"])
    mask = rollouts.response_mask
    assert (before["policy"] - after["policy"])[mask].abs().max() > 1e-3
    assert (before["critic"] - after["critic"])[mask].abs().max() > 1e-3
