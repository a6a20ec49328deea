"""One rank of the runs that `test_trainers.py` compares: python trainers.py <model> <rows> <pairs> <results> <zero> …

SFT and reward model, whole stages in turn, cut in several ways; the first rank writes <ranks>.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from alignkit.config import stages
from alignkit.core.errors import RunError
from alignkit.data.dataset import Data
from alignkit.finetune.full import Full
from alignkit.launch.local import Local
from alignkit.models.config import Model
from alignkit.stages import card, measure, reward, sft
from alignkit.tracking.run_log import RunLog
from alignkit.training import engine
from alignkit.training.engine import Optimizer
from alignkit.training.zero import Zero0, Zero2, Zero3

EPOCHS, RATE, CENTER = 2, 3e-3, 0.1
ZEROS = {"zero0": Zero0, "zero2": Zero2, "zero3": Zero3}
# (mini-batch, micro-batch) by the number of ranks; of 21 rows 8 make steps of 8, 8 and 5, and 24 a step of all.
CUTS = {1: ((8, 8), (8, 1), (24, 3)), 2: ((8, 2), (24, 4))}


class Kept(RunLog):
    """Keeps the metrics of every step."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        super().__init__(run_dir, "test", rank, None, {"run_name": "x"})
        self.steps: list[dict[str, float]] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(dict(metrics))


def run(stage: Any, kind: type, world: Any, folder: Path, cut: tuple, zero: Any, given: dict) -> dict:
    """{"steps": metrics of every step, "metrics": the stage's, "weights": of the model it wrote}."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # one trainer after the other in this process
    out = folder / f"{kind.stage}_{zero.name}_{cut[0]}_{cut[1]}_{world.size}"
    cfg = kind(
        run_name="x", runs_dir=str(out), model=Model(path=given["model"]), finetune=Full(), deepspeed=zero,
        launcher=Local(num_ranks=world.size), logger=None, epochs=EPOCHS, mini_batch_size=cut[0], micro_batch_size=cut[1],
        optimizer=Optimizer(learning_rate=RATE), data=Data(path=given[kind.stage]), eval_data=Data(path=given[kind.stage]),
        **({"center_coef": CENTER} if kind is stages.Reward else {}),
    )  # fmt: skip
    log = Kept(cfg.run_dir, world.rank)
    metrics, _ = stage.main(cfg, world, log)
    world.barrier()
    weights = load_file(cfg.run_dir / "model" / "model.safetensors")
    return {"steps": log.steps, "metrics": metrics, "weights": weights}


def fault(stage: Any, kind: type, place: tuple, world: Any, folder: Path, given: dict) -> tuple[str, list[str]]:
    """(what a stage raises where `place` (an object and the name of its function) fails after the training, its files)."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("planted")

    there, (thing, name) = folder / "fault", place
    right = getattr(thing, name)
    setattr(thing, name, fail)
    try:
        run(stage, kind, world, there, (8, 8), Zero2(), given)
    except RunError as error:
        return str(error), sorted(path.name for path in there.glob(f"{kind.stage}_*/x/{kind.stage}/model/*"))
    finally:
        setattr(thing, name, right)
    raise AssertionError("it went through")


def main(model: str, rows: str, pairs: str, out: str, *zeros: str) -> None:
    torch.set_num_threads(1)
    world = engine.start()
    given = {"model": model, "sft": rows, "reward": pairs}
    found = {
        (kind.stage, zero, cut): run(stage, kind, world, Path(out), cut, ZEROS[zero](), given)
        for stage, kind in ((sft, stages.SFT), (reward, stages.Reward))
        for zero in zeros
        for cut in CUTS[world.size]
    }
    if world.size == 1:
        for name, stage, kind, place in (
            ("measure", sft, stages.SFT, (measure, "completions")),
            ("score", reward, stages.Reward, (reward, "score_pairs")),
            ("card", reward, stages.Reward, (card, "write")),
        ):
            found[name] = fault(stage, kind, place, world, Path(out) / name, given)
    if world.rank == 0:
        torch.save(found, Path(out) / f"{world.size}.pt")
    world.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
