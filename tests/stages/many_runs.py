"""One rank that runs many stages after one another: `python many_runs.py jobs.json`, with {name: [stage, override, …]} in it.

A job whose name begins with that of a function in faults.py runs with that fault planted.

Composes, checks, saves and loads each config as the command line does, then calls the stage as `alignkit.worker` does: only
the start of Python and of DeepSpeed is shared. Prints one JSON line a job: {"name", "error" or null}.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

import faults
import torch

from alignkit.cli.entry import conf_dir
from alignkit.config import stages
from alignkit.runs import hashes, manifests
from alignkit.tracking.run_log import RunLog
from alignkit.training import engine


def run(stage: str, overrides: list[str], world: engine.World) -> None:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = stages.to_config(compose(stage, overrides), stage)
    if world.rank == 0:
        cfg.run_dir.mkdir(parents=True)
        stages.save(cfg, cfg.run_dir / "config.yaml")
    world.barrier()
    cfg = stages.load(cfg.run_dir / "config.yaml", stage)
    with RunLog(cfg.run_dir, stage, world.rank, cfg.logger, {}) as log:
        measured, facts = importlib.import_module(f"alignkit.stages.{stage}").main(cfg, world, log)
    if world.rank == 0:
        facts = hashes.record(facts, cfg.run_dir, cfg.verify)
        manifests.write_manifest(cfg.run_dir, stage=stage, **facts, metrics=measured, status="done")
    world.barrier()


def forget() -> None:
    """What transformers and accelerate keep of a trainer for the whole process, which serves one run in earnest."""
    from accelerate.state import AcceleratorState, GradientState

    gc.collect()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


if __name__ == "__main__":
    torch.set_num_threads(1)
    stages.register()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    world = engine.start()
    for name, (stage, *overrides) in json.loads(Path(sys.argv[1]).read_text()).items():
        error = None
        try:
            with getattr(faults, name.split()[0], nullcontext)():
                run(stage, overrides, world)
        except Exception:
            error = traceback.format_exc()
        print("JOB " + json.dumps({"name": name, "error": error}), flush=True)
        forget()
        if error and world.size > 1:  # the other ranks may hang in a collective
            break
    sys.stdout.flush()
    os._exit(0)
