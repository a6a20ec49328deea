"""Run the PPO stage many times in one process: `python many_ppo.py jobs.json PORT`, with {name: [override, …]} in the file.

A job whose name is that of a function in faults.py runs with that fault planted.

Composes, checks, saves and loads each config as the command line does, then calls the stage as `alignkit.run` does: only
the start of Python and of DeepSpeed is shared. Prints one JSON line a job: {"name", "error" or null}.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

import faults
import torch

from alignkit import config, engine
from alignkit.cli import conf_dir
from alignkit.log import RunLog
from alignkit.stages import ppo


def run(overrides: list[str], world: engine.World) -> None:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = config.to_config(compose("ppo", overrides), "ppo")
    cfg.run_dir.mkdir(parents=True)
    config.save(cfg, cfg.run_dir / "config.yaml")
    cfg = config.load(cfg.run_dir / "config.yaml", "ppo")
    with RunLog(cfg.run_dir, "ppo", 0, cfg.logger, {}) as log:
        ppo.main(cfg, world, log)


if __name__ == "__main__":
    torch.set_num_threads(1)
    config.register()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    world = engine.start()
    for name, overrides in json.loads(Path(sys.argv[1]).read_text()).items():
        error = None
        try:
            with getattr(faults, name, nullcontext)():
                run(overrides, world)
        except Exception:
            error = traceback.format_exc()
        print("JOB " + json.dumps({"name": name, "error": error}), flush=True)
    sys.stdout.flush()
    os._exit(0)
