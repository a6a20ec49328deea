"""NaN and infinity: the optimizer step is not taken, the batch is kept, and the message says what, where and what to try."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from nets import ONE, full_roles, make_config, make_experience, make_rollouts, save_model, torch_engines, weights
from safetensors.torch import load_file

from alignkit.algorithms.ppo import PPO
from alignkit.core.errors import RunError
from alignkit.finetune.critic import Critic
from alignkit.stages import ppo as stage
from alignkit.training import finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_not_stepped_with(value, tmp_path):
    cfg = SimpleNamespace(run_dir=tmp_path, optimizer=SimpleNamespace(learning_rate=0.1))
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.tensor([0.0, value, 1.0])
    batches = [{"ids": torch.arange(4)}, {"ids": torch.arange(2), "use_cache": False}]
    said = r"step 7: the norm of the gradient is (nan|inf); .*step_000007_rank_1.safetensors"
    with pytest.raises(RunError, match=said), finite.guarded(cfg, 1, 7, batches):
        optimizer.step()
    assert torch.equal(weight, torch.ones(3)) and not optimizer.state
    kept = load_file(tmp_path / "debug" / "step_000007_rank_1.safetensors")
    assert {name: tensor.tolist() for name, tensor in kept.items()} == {"0/ids": [0, 1, 2, 3], "1/ids": [0, 1]}
    weight.grad = torch.ones(3)
    optimizer.step()  # outside, and with finite gradients, steps are taken
    assert not torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize("field, said", [("advantages", "policy/loss is nan"), ("returns", "critic/loss is nan")])
def test_a_ppo_step_whose_loss_is_nan_moves_nothing(field, said, tmp_path):
    cfg = make_config(PPO(), run_dir=tmp_path, optimizer=SimpleNamespace(learning_rate=0.1))
    roles = full_roles(save_model(tmp_path / "model", "llama"), Critic(head="random"))
    batch = make_experience(cfg, roles, make_rollouts(6))
    getattr(batch, field)[2, 0] = math.nan
    engines, before = torch_engines(roles), weights(roles)
    with pytest.raises(RunError, match=rf"step 0: {said}.*no optimizer step was taken"):
        stage.optimize(cfg, roles, engines, batch, ONE)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(roles).items())
    kept = load_file(tmp_path / "debug" / "step_000000_rank_0.safetensors")
    assert torch.equal(kept["ids"], batch.ids) and kept[field][2, 0].isnan()
