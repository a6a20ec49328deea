"""A checked config becomes finished run folders: check the inputs, make the folder, launch, wait for `done`. No torch."""

from __future__ import annotations

import re
import shlex
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from alignkit.pipeline.inputs import check_inputs as check_inputs
from alignkit.pipeline.inputs import check_later as check_later


def folder(cfg: Any) -> Path:
    """Where a command writes: a stage's folder, or the one that holds a pipeline's stages."""
    return Path(cfg.runs_dir) / cfg.run_name / ("" if cfg.stage == "pipeline" else cfg.stage)


def run_stage(cfg: Any, label: str | None = None, prefix: str = "") -> float | None:
    """Check inputs, make the run folder, launch, wait for `done`.

    `label`: of its progress; `prefix`: of its keys in messages: "ppo." in a pipeline.

    Raises:
        InputError: before anything is written.
        RunError: the stage did not reach `done`; its log is named.
        Saved: it was asked to stop, and did so with a checkpoint.
    """
    from alignkit.launch import scheduler
    from alignkit.pipeline import sharing
    from alignkit.report import doctor
    from alignkit.runs import manifests

    run_dir = cfg.run_dir
    if cfg.dry_run:
        print_plan(cfg, full_config=True)
        return None
    sources = check_inputs(cfg, {})
    origin = origin_of(cfg, sources)
    manifest = previous(cfg, origin, prefix)
    if manifest is not None and manifest["status"] == "done":
        print(f"{cfg.stage:<9} kept: {run_dir} is done with this config")
        return main_metric(manifest)
    with ExitStack() as held:
        if cfg.reuse and not run_dir.exists():
            held.enter_context(sharing.turn(Path(cfg.runs_dir), origin["address"], cfg.stage, run_dir))
            if made := sharing.find(Path(cfg.runs_dir), origin["address"], cfg.stage):
                return reuse(run_dir, made)
        held.enter_context(manifests.lock(run_dir))
        (run_dir / scheduler.RECORD).unlink(missing_ok=True)  # of a job that has ended: it is this process now
        if manifest is not None and has_checkpoint(run_dir) and (other := sharing.differences(manifest)):
            print(f"{cfg.stage:<9} goes on with a checkpoint of other versions{other}")
        open_run(cfg, "running", origin)
        try:
            error = cfg.launcher.run(cfg.stage, run_dir, label or cfg.stage)
        except KeyboardInterrupt:
            if (status := (manifests.read_manifest(run_dir) or {}).get("status")) == "running":
                manifests.write_manifest(run_dir, status="failed", error="interrupted")
            if status != "saved":
                raise
            error = None
    if cfg.stage == "ppo" and (found := doctor.hint(run_dir)):
        print(found)
    return main_metric(conclude(run_dir, error, run_dir / "logs" / f"{cfg.stage}.log"))


def origin_of(cfg: Any, sources: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of the inputs: `inputs` (path and hash of the manifest of the run that made it), and the
    `contents` and `address` of `check.contents`. The inputs were checked, and exist."""
    from alignkit.check.contents import address, contents
    from alignkit.runs.hashes import manifest_hash

    inputs = {
        role: {"path": cfg.inputs()[role], "manifest_hash": manifest_hash(source.run)}
        for role, source in sources.items()
    }
    if maker := manifest_hash(Path(cfg.data.path).parent if cfg.data.path else None):  # rows that a run wrote
        inputs["data"] = {"path": cfg.data.path, "manifest_hash": maker}
    found = contents(cfg)
    return {"inputs": inputs, "contents": found, "address": address(cfg, found)}


def open_run(cfg: Any, status: str, origin: dict[str, Any], keep: tuple[str, ...] = ()) -> None:
    """Write config and manifest of a stage that is about to run; the caller holds its folder's lock.

    An attempt that left a checkpoint is gone on with; what one without a checkpoint wrote is put aside, but for `keep`.
    """
    from alignkit.config.stages import config_hash, save
    from alignkit.runs import manifests
    from alignkit.runs.environment import git_commit, versions
    from alignkit.tracking.run_log import PROGRESS

    run_dir = cfg.run_dir
    before = manifests.read_manifest(run_dir) or {}
    if before.get("status", "queued") != "queued" and not has_checkpoint(run_dir):
        _set_aside(run_dir, keep)
        before = {}
    save(cfg, run_dir / "config.yaml")
    progress = run_dir / PROGRESS
    made_with = {"git_commit": git_commit(), "versions": versions()}
    made_with["started"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    manifests.write_manifest(
        run_dir,
        stage=cfg.stage,
        status=status,
        error=None,
        seed=cfg.seed,
        config_hash=config_hash(cfg),
        **origin,
        **made_with,
        progress_from=progress.stat().st_size if progress.is_file() else 0,  # what is said before is of another attempt
        attempts=[*before.get("attempts", []), *([made_with] if status == "running" else [])],  # all parts of a run
    )


def has_checkpoint(run_dir: Path) -> bool:
    """Whether an attempt left something to go on with."""
    return any(run_dir.glob("checkpoints/step_*[0-9]"))


def conclude(run_dir: Path, error: dict | None, log: Path) -> dict[str, Any]:
    """The manifest of a stage whose processes have ended.

    Args:
        error: the first error event of its ranks, or None.

    Raises:
        InputError: a rank refused an input.
        RunError: it is not done; with the reason and its log.
        Saved: it was asked to stop, and did so with a checkpoint.
    """
    from alignkit.core.errors import InputError, RunError, Saved
    from alignkit.runs import manifests

    manifest = manifests.read_manifest(run_dir) or {}
    if manifest.get("status") == "saved":
        raise Saved(**manifest["saved"])
    if manifest.get("status") == "done":
        return manifest
    full = ""
    silent = "its processes ended without a word"
    if shutil.disk_usage(run_dir).free < 2**18:
        silent = f"no space is left on the disk of {run_dir}"
    if manifest.get("status") == "running":
        said = error["error"] if error else silent
        try:
            manifests.write_manifest(run_dir, status="failed", error=said)
        except OSError as why:
            full = f"; its manifest still says running, since it cannot be written: {why.strerror}"
    reason = error["error"] if error else f"{silent}; last line: {_last_line(log)}"
    if error and error["kind"] == "input":
        raise InputError(f"{run_dir.name}: {reason} (log: {log})")
    raise RunError(f"{run_dir.name} failed: {reason}{full} (log: {log})")


def previous(cfg: Any, origin: dict[str, Any], prefix: str = "") -> dict[str, Any] | None:
    """The manifest of what an earlier command left in the run folder, where this one may keep it or go on with it.

    `prefix`: of the keys in a message: "ppo." in a pipeline.

    Raises:
        InputError: it is another's, a job of Slurm works on it, or `resume` is not set.
    """
    from alignkit.config import settings
    from alignkit.core.errors import InputError
    from alignkit.launch import scheduler
    from alignkit.runs import hashes, manifests

    run_dir = cfg.run_dir
    fix = "choose another run_name=, or delete that folder"
    if run_dir.is_symlink() and not run_dir.exists():
        raise InputError(
            f"{run_dir} is a link to {run_dir.readlink()}, which is gone: delete the link and add resume=true"
        )
    manifest = manifests.read_manifest(run_dir)
    if (job := scheduler.working_on(run_dir)) is not None:
        raise InputError(
            f"{run_dir} is in use by Slurm job {job.id} ({job.state}): wait for it, or end it: alignkit cancel {shlex.quote(str(run_dir))}"
        )
    if manifest is None or (cfg.resume and manifest.get("address") == origin["address"]):
        if manifest is not None and manifest["status"] == "done":
            hashes.check_unchanged(run_dir, None, manifest, f"resume=true with {run_dir}", cfg.verify)
        return manifest
    if not cfg.resume:
        more = ", or add resume=true" if manifest["status"] != "done" else ""
        raise InputError(f"{run_dir} exists (status {manifest['status']}): {fix}{more}")
    if manifest["status"] == "done" or has_checkpoint(run_dir):
        raise InputError(settings.refusal(cfg, manifest, origin, prefix))
    return manifest


def reuse(run_dir: Path, made: Path) -> float | None:
    """Link the run folder to a finished stage of the same address, and say so."""
    from alignkit.pipeline import sharing
    from alignkit.runs import manifests

    sharing.link(run_dir, made)
    manifest = manifests.read_manifest(run_dir) or {}
    print(f"{manifest['stage']:<9} kept: same config and inputs as {made}{sharing.differences(manifest)}")
    return main_metric(manifest)


# What a stage returns to Hydra's sweepers.
MAIN_METRIC = {"sft": "eval_loss", "reward": "eval_accuracy", "ppo": "objective/score", "sample": "pairs"}


def main_metric(manifest: dict[str, Any]) -> float | None:
    """The number of a finished stage that a sweeper may optimise."""
    return manifest["metrics"].get(MAIN_METRIC.get(manifest["stage"], ""))


def run_pipeline(cfg: Any) -> float | None:
    """Every stage in order in one run folder, then the report."""
    from alignkit.config.stages import save
    from alignkit.report import html, summary
    from alignkit.runs import manifests

    root = folder(cfg)
    if cfg.dry_run:
        print_plan(cfg, full_config=True)
        return None
    stages = cfg.stages()
    made = {str(stage.run_dir): stage.stage for stage in stages}
    check_later(stages)
    for stage in stages:  # all inputs of all stages, before the first one takes its minutes
        check_inputs(stage, made, tell=False)  # told when each starts
    if not cfg.resume:
        _refuse_existing(root, [stage.run_dir for stage in stages])
    with manifests.lock(root):
        save(cfg, root / "pipeline.yaml")  # for `alignkit resume`
        for number, stage in enumerate(stages, start=1):
            stage.resume = cfg.resume
            run_stage(stage, f"[{number}/{len(stages)}] {stage.stage}", f"{stage.stage}.")
        summary.write_summary(root)
        html.write_html(root)
        summary.print_summary(root, next_commands=list(cfg.next_commands) or None)
    return (summary.summarize(root)["gold"].get("ppo") or {}).get("mean")


def print_plan(cfg: Any, options: Any = None, full_config: bool = False) -> None:
    """Check the inputs of a stage, or of all stages of a pipeline, and print the plan of each (`alignkit.plan`).

    Args:
        options: `plan.Options`; then a model folder may hold config.json without weights.
        full_config: print the whole resolved config and the launch command first.
    """
    from alignkit.config import stages as config
    from alignkit.plan import compute, memory
    from alignkit.plan import text as plan

    stages, pipeline = (cfg.stages(), cfg) if isinstance(cfg, config.Pipeline) else ([cfg], None)
    made = {str(stage.run_dir): stage.stage for stage in stages} if pipeline else {}
    if pipeline:
        check_later(stages)
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


def describe(cfg: Any, script: str | None = None) -> str:
    """The resolved config of a stage and the command, or the batch script, that would start it."""
    from omegaconf import OmegaConf

    from alignkit.plan import text as plan

    script = plan.launch_line(cfg) if script is None else script
    return f"# {cfg.stage}\n{OmegaConf.to_yaml(OmegaConf.structured(cfg))}\n{script}\n"


def _refuse_existing(root: Path, run_dirs: list[Path]) -> None:
    from alignkit.core.errors import InputError
    from alignkit.runs import manifests

    for run_dir in run_dirs:
        manifest = manifests.read_manifest(run_dir)
        if manifest is not None:
            with manifests.lock(root):  # says so where another process works in it right now
                pass
            raise InputError(
                f"run_name={root.name}: {run_dir} exists (status {manifest['status']}): choose another run_name=, delete {root}, "
                "or add resume=true to go on with it"
            )


def _set_aside(run_dir: Path, keep: tuple[str, ...]) -> None:
    """Move what an unfinished attempt wrote to `attempt_<n>/`; the lock file and `keep` stay."""
    number = 1 + len(list(run_dir.glob("attempt_*")))
    target = run_dir / f"attempt_{number}"
    target.mkdir()
    for item in run_dir.iterdir():
        if item.name not in (".lock", ".ranks", *keep) and not item.name.startswith("attempt_"):
            shutil.move(str(item), target / item.name)


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.is_file() else []
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (errors or lines or ["(the log is empty)"])[-1]
