"""Go on from wherever a run stands, with the settings it was started with.

    alignkit resume RUN [--dry-run]

RUN is the folder of a pipeline or of one stage. What is done is kept, a stage with a checkpoint goes on from the newest
whole one, any other starts over. --dry-run only says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.config import stages as config
from alignkit.core.errors import InputError
from alignkit.jobs import queue as submit
from alignkit.pipeline import sharing
from alignkit.pipeline import stage as pipeline
from alignkit.runs import manifests

CHECKPOINT = re.compile(r"(?:step_|checkpoint-)(\d+)")  # of PPO, and TRL's


def main(arguments: Sequence[str]) -> None:
    """alignkit resume RUN [--dry-run]"""
    words = [word for word in arguments if not word.startswith("-")]
    if len(words) != 1 or set(arguments) - {"--dry-run", *words}:
        raise InputError(
            f"resume {' '.join(arguments)}: expected alignkit resume RUN [--dry-run]; a run goes on with its own settings"
        )
    cfg = saved_config(Path(words[0]))
    stages = cfg.stages() if isinstance(cfg, config.Pipeline) else [cfg]
    for stage in stages:
        print(f"{stage.stage:<9} {standing(stage.run_dir)}")
    if "--dry-run" not in arguments:
        with submit.Queue() as queue:
            submit.run_command(cfg, queue)
            queue.submit()


def saved_config(run: Path) -> Any:
    """The config that a run was started with, `resume` set; the working directory becomes the one it was started in.

    Raises:
        InputError: no run there, or it was moved.
    """
    manifests.refuse_checkpoint(run, "resume")
    manifest = manifests.read_manifest(run)
    file, command = (
        (run / "config.yaml", manifest["stage"]) if manifest is not None else (run / "pipeline.yaml", "pipeline")
    )
    if not file.is_file():
        stages = sorted(path.parent.name for path in run.glob("*/manifest.json"))
        hint = (
            f"it holds the stages {', '.join(stages)}: resume one of them, {run}/<stage>" if stages else "no run there"
        )
        raise InputError(f"{run}: no {file.name}; {hint}")
    cfg = config.load(file, command)
    place = manifests.started_in(run, pipeline.folder(cfg))
    if place is None:
        raise InputError(
            f"{run}: its {file.name} has runs_dir={cfg.runs_dir} run_name={cfg.run_name}, which is {pipeline.folder(cfg)}: "
            "move it back there to go on with it"
        )
    os.chdir(place)
    cfg.resume, cfg.dry_run = True, False
    return cfg


def standing(run_dir: Path) -> str:
    """What becomes of a stage when its run is resumed, in a few words."""
    manifest = manifests.read_manifest(run_dir)
    if manifest is None or manifest["status"] == "queued":
        return "not started: begins"
    if manifest["status"] == "done":
        return "done: skipped"
    steps = [int(found[1]) for path in run_dir.glob("checkpoints/*") if (found := CHECKPOINT.fullmatch(path.name))]
    why = f"{manifest['status']}{': ' + manifest['error'] if manifest.get('error') else ''}"
    other = sharing.differences(manifest)
    return (
        f"goes on from checkpoint {max(steps)} ({why}){other}"
        if steps
        else f"starts over, it left no checkpoint ({why})"
    )
