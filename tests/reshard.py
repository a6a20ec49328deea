"""One rank of the runs that `test_reshard.py` compares: python reshard.py <folder of a model> <folder of the results> <jobs>.

A job is "save" (a round of PPO, a checkpoint, a second round) or "load<n>" (the checkpoint of n ranks, the second round).
Every job is done at ZeRO 0, 1 and 2; the first rank writes <job>_<world size>_zero<stage>.safetensors.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from nets import full_roles, make_config, play, weights
from safetensors.torch import save_file

from alignkit.algorithms.ppo import PPO
from alignkit.finetune.critic import Critic
from alignkit.finetune.full import Full
from alignkit.training import checkpoint, engine
from alignkit.training.zero import Zero0, Zero1, Zero2

ROWS, RATE = 8, 1e-3
CONFIG = make_config(PPO(), micro=2)


def main(folder: Path, out: Path, jobs: list[str]) -> None:
    torch.set_num_threads(1)
    world = engine.start()
    for zero in (Zero0(), Zero1(), Zero2()):
        for job in jobs:
            roles = full_roles(folder, Critic(head="random"), dtype=torch.float32)
            engines = {
                role: engine.Engine(
                    roles, Full().parameters(roles, role), engine.Optimizer(RATE), zero, world,
                    dtype="float32", micro_batch_size=2, updates=4,
                )
                for role in ("policy", "critic")
            }  # fmt: skip
            run_dir = out / f"{job.removeprefix('load')}_zero{zero.stage}"
            if job == "save":
                play(CONFIG, roles, engines, world, ROWS, 2, 1)
                run_dir = out / f"{world.size}_zero{zero.stage}"
                checkpoint.save(run_dir, {"step": 1}, {}, engines, world, 1)
                start = weights(roles)
            else:
                found = checkpoint.newest(run_dir, print)
                assert found is not None
                checkpoint.load(found, {}, engines, world)
                start = weights(roles)
            play(CONFIG, roles, engines, world, ROWS, 2, 1)
            if world.rank == 0:
                found = {f"end.{k}": v for k, v in weights(roles).items()} | {f"start.{k}": v for k, v in start.items()}
                save_file(found, out / f"{job}_{world.size}_zero{zero.stage}.safetensors")
            world.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    sys.stdout.flush()
    os._exit(0)
