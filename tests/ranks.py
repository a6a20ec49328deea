"""One rank of the runs that `test_ranks.py` compares: python ranks.py <folder of a model> <folder of the results>.

DeepSpeed at ZeRO 0, 1 and 2 by turns; the first rank writes <world size>.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from nets import SGD, full_roles, make_config, make_experience, make_rollouts, play, weights

from alignkit.algorithms.ppo import PPO
from alignkit.finetune.critic import Critic
from alignkit.finetune.full import Full
from alignkit.stages import ppo as stage
from alignkit.training import engine
from alignkit.training.zero import Zero0, Zero1, Zero2

ROWS, ROUNDS, RATE = 8, 3, 0.3
CLIPS = {"policy": 0.0, "critic": 0.05}  # so the critic's gradient is clipped, and the policy's is not
DTYPES = {0: torch.float64, 1: torch.float32, 2: torch.float32}  # of a ZeRO stage; 1 and 2 reduce and step in float32
CONFIG = make_config(
    PPO(ent_coef=0.1, adaptive_kl_target=0.5, adaptive_kl_horizon=100.0, normalize_scores=True), micro=2
)


def new_roles(folder: Path, dtype: torch.dtype):
    return full_roles(folder, Critic(head="random"), dtype=dtype)


def new_engines(roles, zero, world) -> dict[str, engine.Engine]:
    engines = {
        role: engine.Engine(
            roles, Full().parameters(roles, role), SGD(RATE, max_grad_norm=clip), zero, world,
            dtype="float32", micro_batch_size=2, updates=ROUNDS,
        )
        for role, clip in CLIPS.items()
    }  # fmt: skip
    if zero.stage == 0:  # it would send float64 gradients as float32
        for each in engines.values():
            each.engine.communication_data_type = DTYPES[0]
    return engines


def stopped(folder: Path, zero, world, discarded: bool) -> dict[str, torch.Tensor]:
    """Weights after a step, one that `target_kl` discards (or none), and a step on other rows."""
    roles = new_roles(folder, DTYPES[zero.stage])
    whole = make_experience(make_config(PPO(), 4), roles, make_rollouts(2 * ROWS), noise=0)
    engines = new_engines(roles, zero, world)
    stop = make_config(PPO(target_kl=1e-12, ppo_epochs=2), micro=2)
    taken = [stage.optimize(CONFIG, roles, engines, whole.select(slice(0, ROWS)), world)[1]]
    if discarded:
        taken += [not stage.optimize(stop, roles, engines, whole.select(slice(4, 4 + ROWS)), world)[1]]
    taken += [stage.optimize(CONFIG, roles, engines, whole.select(slice(ROWS, 2 * ROWS)), world)[1]]
    assert all(taken)
    return weights(roles)


def main(folder: Path, out: Path) -> None:
    from deepspeed.accelerator import get_accelerator

    torch.set_num_threads(1)
    world = engine.start()
    get_accelerator().supported_dtypes = lambda: list(set(DTYPES.values()))  # on the CPU it lists no float64
    found: dict = {}
    for zero in (Zero0(), Zero1(), Zero2()):
        roles = new_roles(folder, DTYPES[zero.stage])
        found[zero.stage] = play(CONFIG, roles, new_engines(roles, zero, world), world, ROWS, 2, ROUNDS)
        found[zero.stage]["stopped"] = [stopped(folder, zero, world, discarded) for discarded in (True, False)]
    if world.rank == 0:
        torch.save(found, out / f"{world.size}.pt")
    world.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)
