"""A checked config becomes finished run folders: check the inputs, make the folder, launch, wait for `done`. No torch."""

from __future__ import annotations

import re
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any


def run_command(cfg: Any) -> float | None:
    """A checked config: one stage or all of them. Returns the number a sweeper may optimise."""
    from alignkit.config import Pipeline

    return run_pipeline(cfg) if isinstance(cfg, Pipeline) else run_stage(cfg)


def run_stage(cfg: Any, label: str | None = None, later: dict[str, str] | None = None) -> float | None:
    """Check inputs, make the run folder, launch, wait for `done`.

    Raises:
        InputError: before anything is written.
        RunError: the stage did not reach `done`; its log is named.
    """
    from alignkit import artifacts
    from alignkit.config import config_hash, save
    from alignkit.types import InputError, RunError

    run_dir = cfg.run_dir
    sources = check_inputs(cfg, later or {})
    if cfg.dry_run:
        print_plan(cfg, full_config=True)
        return None
    inputs = {
        role: {"path": cfg.inputs()[role], "manifest_hash": artifacts.manifest_hash(source.run)}
        for role, source in sources.items()
    }
    if maker := artifacts.manifest_hash(Path(cfg.data.path).parent if cfg.data.path else None):  # rows that a run wrote
        inputs["data"] = {"path": cfg.data.path, "manifest_hash": maker}
    manifest = artifacts.read_manifest(run_dir)
    if manifest is not None:
        same = manifest["config_hash"] == config_hash(cfg)
        if cfg.resume and manifest["status"] == "done" and same and manifest["inputs"] != inputs:
            stale = next(
                role for role in inputs | manifest["inputs"] if inputs.get(role) != manifest["inputs"].get(role)
            )
            raise InputError(
                f"{run_dir} was made from another {stale} than {inputs.get(stale)}: delete that folder to make it anew"
            )
        if cfg.resume and manifest["status"] == "done" and same:
            print(f"{cfg.stage:<9} kept: {run_dir} is done with this config")
            return manifest["metrics"].get(MAIN_METRIC.get(cfg.stage, ""))
        fix = "choose another run_name=, or delete that folder"
        if cfg.resume and manifest["status"] == "done":
            raise InputError(f"{run_dir} is done, but with another config: {fix}")
        if cfg.resume and not same and (run_dir / "checkpoints").is_dir():
            raise InputError(
                f"{run_dir} has checkpoints of another config, which this one cannot go on from: use the same settings, or {fix}"
            )
        if not cfg.resume:
            raise InputError(
                f"{run_dir} exists (status {manifest['status']}): {fix}"
                + (", or add resume=true" if manifest["status"] != "done" else "")
            )
    with ExitStack() as held:
        held.enter_context(artifacts.lock(run_dir))
        if manifest is not None and not (run_dir / "checkpoints").is_dir():
            _set_aside(run_dir)  # resume: an unfinished stage starts over, what it wrote is kept aside
        save(cfg, run_dir / "config.yaml")
        artifacts.write_manifest(
            run_dir,
            stage=cfg.stage,
            status="running",
            seed=cfg.seed,
            config_hash=config_hash(cfg),
            inputs=inputs,
            git_commit=artifacts.git_commit(),
            versions=artifacts.versions(),
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
        try:
            error = cfg.launcher.run(cfg.stage, run_dir, label or cfg.stage)
        except KeyboardInterrupt:
            artifacts.write_manifest(run_dir, status="failed", error="interrupted")
            raise
    manifest = artifacts.read_manifest(run_dir) or {}
    if manifest.get("status") == "done":
        return manifest["metrics"].get(MAIN_METRIC.get(cfg.stage, ""))
    log = run_dir / "logs" / f"{cfg.stage}.log"
    if manifest.get("status") == "running":
        artifacts.write_manifest(run_dir, status="failed", error="its processes ended without a word")
    reason = error["error"] if error else f"its processes ended without a word; last line: {_last_line(log)}"
    if error and error["kind"] == "input":
        raise InputError(f"{cfg.stage}: {reason} (log: {log})")
    raise RunError(f"{cfg.stage} failed: {reason} (log: {log})")


# What a stage returns to Hydra's sweepers.
MAIN_METRIC = {"sft": "eval_loss", "reward": "eval_accuracy", "ppo": "objective/score", "sample": "pairs"}


def run_pipeline(cfg: Any) -> float | None:
    """Every stage in order in one run folder, then the report."""
    from alignkit import artifacts, report, report_html

    root = Path(cfg.runs_dir) / cfg.run_name
    if cfg.dry_run:
        print_plan(cfg, full_config=True)
        return None
    stages = cfg.stages()
    made = {str(stage.run_dir): stage.stage for stage in stages}
    for stage in stages:  # all inputs of all stages, before the first one takes its minutes
        check_inputs(stage, made)
    if not cfg.resume:
        _refuse_existing(root, [stage.run_dir for stage in stages])
    with artifacts.lock(root):
        for number, stage in enumerate(stages, start=1):
            stage.resume = cfg.resume
            run_stage(stage, f"[{number}/{len(stages)}] {stage.stage}")
        report.write_summary(root)
        report_html.write_html(root)
        report.print_summary(root, next_commands=list(cfg.next_commands) or None)
    return (report.summarize(root)["gold"].get("ppo") or {}).get("mean")


def print_plan(cfg: Any, options: Any = None, full_config: bool = False) -> None:
    """Check the inputs of a stage, or of all stages of a pipeline, and print the plan of each (`alignkit.plan`).

    Args:
        options: `plan.Options`; then a model folder may hold config.json without weights.
        full_config: print the whole resolved config and the launch command first.
    """
    from alignkit import config
    from alignkit.plan import compute, memory
    from alignkit.plan import text as plan

    stages, pipeline = (cfg.stages(), cfg) if isinstance(cfg, config.Pipeline) else ([cfg], None)
    made = {str(stage.run_dir): stage.stage for stage in stages} if pipeline else {}
    sources = [check_inputs(stage, made, weights=options is None) for stage in stages]
    options, device = options or plan.Options(), plan.detect()
    if options.device_memory:
        device = memory.Device(options.device_memory, gpu=True)
    for stage, found in zip(stages, sources, strict=True):
        model = plan.Model.of(stage, found, pipeline)
        planned = plan.written_rows(stage, pipeline) if pipeline else None
        made_plan = plan.make(stage, model, device, planned)
        pace = compute.seconds(stage, made_plan.work, options.throughput)
        print(describe(stage) if full_config else f"# {stage.stage}: {stage.run_dir}")
        print(plan.render(stage, made_plan, config.components, pace))
        print("" if full_config else plan.launch_line(stage) + "\n")


def check_inputs(cfg: Any, later: dict[str, str], weights: bool = True) -> dict[str, Any]:
    """Resolve the models and runs a stage reads and validate its rows, without torch.

    Args:
        later: {run folder: stage} of runs that an earlier stage of the same pipeline will make.
        weights: False: a model folder may lack them.

    Returns:
        {role: ModelSource} of those that exist now.
    """
    from alignkit import artifacts
    from alignkit.types import InputError

    sources = {}
    for role, path in cfg.inputs().items():
        if path and path not in later:
            key = f"{role}.path" if role.startswith("rewards.") or "." not in role else role
            source = sources[role] = artifacts.resolve_model(path, key, weights)
            stage = (artifacts.read_manifest(source.run) or {}).get("stage") if source.run else None
            if role.startswith("rewards.") and stage not in (None, "reward"):
                raise InputError(
                    f"{key}={path}: a run of {stage}, which has no score; expected one of reward, as runs/<name>/reward"
                )
    artifacts.check_hand_off(sources)
    if hasattr(cfg, "finetune"):
        for source in sources.values():
            cfg.finetune.check_start(source.adapter)
    for reward in getattr(cfg, "rewards", {}).values():
        if hasattr(reward, "load"):
            reward.load()
    for rows in (cfg.data, getattr(cfg, "eval_data", None)):
        if rows is not None and rows.path and not any(rows.path.startswith(f"{folder}/") for folder in later):
            rows.rows(cfg.row_kind)
    return sources


def describe(cfg: Any) -> str:
    """The resolved config of a stage and the command that would start it."""
    from omegaconf import OmegaConf

    from alignkit.plan import text as plan

    return f"# {cfg.stage}\n{OmegaConf.to_yaml(OmegaConf.structured(cfg))}\n{plan.launch_line(cfg)}\n"


def _refuse_existing(root: Path, run_dirs: list[Path]) -> None:
    from alignkit import artifacts
    from alignkit.types import InputError

    for run_dir in run_dirs:
        manifest = artifacts.read_manifest(run_dir)
        if manifest is not None:
            with artifacts.lock(root):  # says so where another process works in it right now
                pass
            raise InputError(
                f"run_name={root.name}: {run_dir} exists (status {manifest['status']}): choose another run_name=, delete {root}, "
                "or add resume=true to go on with it"
            )


def _set_aside(run_dir: Path) -> None:
    """Move what an unfinished attempt wrote to `attempt_<n>/`; the lock file stays."""
    number = 1 + len(list(run_dir.glob("attempt_*")))
    target = run_dir / f"attempt_{number}"
    target.mkdir()
    for item in run_dir.iterdir():
        if item.name != ".lock" and not item.name.startswith("attempt_"):
            shutil.move(str(item), target / item.name)


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.is_file() else []
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (errors or lines or ["(the log is empty)"])[-1]
