"""One rank of the runs that `test_ranks.py` compares: python ranks.py <folder of a model> <folder of the results>.

DeepSpeed at ZeRO 0, 1 and 2 by turns; the first rank writes <world size>.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from nets import SGD, full_roles, make_config, make_experience, make_rollouts, play, weights

from alignkit import engine
from alignkit.algorithms.ppo import PPO
from alignkit.finetune.critic import Critic
from alignkit.finetune.full import Full
from alignkit.stages import ppo as stage

ROWS, ROUNDS, RATE = 8, 3, 0.3
CRITIC_CLIP = 0.05  # the critic's gradient is clipped, the policy's is not
CONFIG = make_config(
    PPO(ent_coef=0.1, adaptive_kl_target=1.0, adaptive_kl_horizon=100.0, normalize_scores=True), micro=2
)


def new_roles(folder: Path, dtype: torch.dtype):
    return full_roles(folder, Critic(head="random"), dtype=dtype)


def new_engines(roles, zero, world) -> dict[str, engine.Engine]:
    return {
        role: engine.Engine(
            roles, Full().parameters(roles, role), SGD(RATE, max_grad_norm=clip), zero, world,
            dtype="float32", micro_batch_size=2, updates=ROUNDS,
        )
        for role, clip in (("policy", 0.0), ("critic", CRITIC_CLIP))
    }  # fmt: skip


def stopped(folder: Path, zero, world, discarded: bool) -> dict[str, torch.Tensor]:
    """Weights after a step, one that `target_kl` discards (or none), and a step on other rows."""
    roles = new_roles(folder, torch.float32)
    whole = make_experience(make_config(PPO(), 4), roles, make_rollouts(2 * ROWS), noise=0)
    engines = new_engines(roles, zero, world)
    taken = [stage.optimize(CONFIG, roles, engines, whole.select(slice(0, ROWS)), world)[1]]
    if discarded:
        stop = make_config(PPO(target_kl=1e-12, ppo_epochs=2), micro=2)
        taken += [not stage.optimize(stop, roles, engines, whole.select(slice(4, 4 + ROWS)), world)[1]]
    taken += [stage.optimize(CONFIG, roles, engines, whole.select(slice(ROWS, 2 * ROWS)), world)[1]]
    assert all(taken)
    return weights(roles)


def main(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    world = engine.start()
    found: dict = {}
    for zero in (engine.Zero0(), engine.Zero1(), engine.Zero2()):
        for dtype in (torch.float64, torch.float32):
            roles = new_roles(folder, dtype)
            found[zero.name, dtype] = play(CONFIG, roles, new_engines(roles, zero, world), world, ROWS, 2, ROUNDS)
        found[zero.name, "stopped"] = [stopped(folder, zero, world, discarded) for discarded in (True, False)]
    if world.rank == 0:
        torch.save(found, out / f"{world.size}.pt")
    world.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)
