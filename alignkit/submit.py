"""A checked config is run: here (`pipeline.py`), or as a chain of Slurm jobs that is queued. No torch."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from alignkit import artifacts, pipeline, sharing
from alignkit.launch import scheduler
from alignkit.types import InputError


def run_command(cfg: Any) -> float | None:
    """One stage or all of them, here or on a cluster. Returns the number a sweeper may optimise; None of what is queued."""
    from alignkit.config import Pipeline

    whole = isinstance(cfg, Pipeline)
    stages = cfg.stages() if whole else [cfg]
    launchers = {stage.launcher.name for stage in stages}
    if launchers == {"slurm"}:
        submit(cfg, stages)
        return None
    if "slurm" in launchers:
        raise InputError(
            f"launcher: {' and '.join(sorted(launchers))} in one pipeline; use one of them for every stage"
        )
    return pipeline.run_pipeline(cfg) if whole else pipeline.run_stage(cfg)


def submit(cfg: Any, stages: list[Any]) -> None:
    """Queue stages as a chain of jobs and return at once: each starts when the one before it is done.

    Args:
        cfg: of one stage, or of the pipeline.
        stages: all of its stages.

    Raises:
        InputError: before anything is written: an input is refused, or Slurm refuses a job.
    """
    from alignkit.config import save

    root = Path(cfg.runs_dir) / cfg.run_name
    with ExitStack() as held:
        chain, plans, waits = _chain(cfg, stages, held)
        last = stages[-1] if len(stages) > 1 else None
        scripts = [job_script([stage], report=stage is last) for stage in chain]
        if cfg.dry_run:
            for stage, script in zip(chain, scripts, strict=True):
                print(pipeline.describe(stage, script))
        if cfg.dry_run or not chain:
            return
        held.enter_context(artifacts.lock(root))
        first = [*chain[0].launcher.after, *waits]
        ids = scheduler.submit_chain(scripts, after=first)
        try:
            if len(stages) > 1:
                save(cfg, root / "pipeline.yaml")  # for `alignkit resume`
            for stage, script, job, after in zip(chain, scripts, ids, [first, *([i] for i in ids)], strict=False):
                open_job(stage, script, job, after, plans[str(stage.run_dir)])
            scheduler.release(ids[0])
        except BaseException:
            scheduler.cancel(ids)  # the first one is still held
            raise
    print(f"\n  alignkit status {root}\n  alignkit logs {root}\n  alignkit cancel {root}")


def _chain(cfg: Any, stages: list[Any], held: ExitStack) -> tuple[list[Any], dict[str, str], list[str]]:
    """The stages that need a job of their own, {run folder: address} of what is to be made, and the jobs of other runs
    that make the stages before them.

    A stage that another run has made, or has a job for, is linked to; `held` keeps others from queuing the same until
    the jobs are in.
    """
    chain: list[Any] = []
    waits: list[str] = []
    made: dict[str, str] = {}
    plans: dict[str, str] = {}
    for stage in stages:
        stage.launcher, stage.resume = stage.launcher.at_site(), cfg.resume
        made |= in_the_making(stage)
        if cfg.resume and stage.run_dir.is_symlink() and not sharing.is_done(stage.run_dir):
            stage.run_dir.unlink()  # to a stage of another run that did not end well, or has yet to be made
        sources = pipeline.check_inputs(stage, made)
        plan = sharing.address(stage, sharing.contents(stage, {path: plans.get(path, path) for path in made}))
        if not cfg.dry_run:
            if stage.reuse and not stage.run_dir.exists():
                held.enter_context(sharing.turn(Path(cfg.runs_dir), plan, stage.stage, stage.run_dir))
            if is_kept(stage, sources, made):
                continue
        made[str(stage.run_dir)], plans[str(stage.run_dir)] = stage.stage, plan
        if not cfg.dry_run and (job := _shared_job(stage, plan)):
            waits.append(job)
        else:
            chain.append(stage)
    return chain, plans, waits


def _shared_job(stage: Any, plan: str) -> str | None:
    """The job of another run that makes the same stage: its folder is linked to, and said."""
    twin = None
    if stage.reuse and not stage.run_dir.exists():
        twin = sharing.under_way(Path(stage.runs_dir), plan, stage.stage)
    job = scheduler.working_on(twin) if twin else None
    if twin is None or job is None:
        return None
    sharing.link(stage.run_dir, twin)
    print(f"{stage.stage:<9} kept: job {job.id} makes it in {twin}")
    return job.id


def is_kept(stage: Any, sources: dict[str, Any], made: dict[str, str]) -> bool:
    """Whether there is nothing to run: the stage's folder holds it already, or another run that it may be shared with.

    Args:
        made: {run folder: stage} that a job before this one makes: what is made of those is not known yet.
    """
    paths = [*stage.inputs().values(), str(Path(stage.data.path).parent)]
    known = not any(path in made for path in paths)
    origin = pipeline.origin_of(stage, sources) if known else NOTHING_KNOWN
    manifest = pipeline.previous(stage, origin)
    if manifest is not None and manifest["status"] == "done" and known:
        print(f"{stage.stage:<9} kept: {stage.run_dir} is done with this config")
        return True
    if not stage.reuse or not known or stage.run_dir.exists():
        return False
    found = sharing.find(Path(stage.runs_dir), origin["address"], stage.stage)
    if found is not None:
        pipeline.reuse(stage.run_dir, found)
    return found is not None


NOTHING_KNOWN: dict[str, Any] = {"inputs": {}, "contents": {}, "address": ""}  # of a stage that waits for its inputs


def submit_array(stages: list[Any], after: list[str], how: str = "afterok", at_once: int | None = None) -> str:
    """Queue one stage of several runs as an array of jobs; its id. Their inputs are checked, their launchers alike.

    Args:
        after, how: as of `scheduler.submit`.
        at_once: how many may run at a time; None: all.
    """
    script = job_script(stages, at_once=at_once)
    array = scheduler.submit(script, after=after, how=how, hold=True)
    try:
        for number, stage in enumerate(stages):
            open_job(stage, script, f"{array}_{number}", after)
        scheduler.release(array)
    except BaseException:
        scheduler.cancel([array])
        raise
    return array


def open_job(stage: Any, script: str, job: str, after: list[str], plan: str = "") -> None:
    """Write what a queued job finds in its folder when it starts."""
    (stage.run_dir / "logs").mkdir(parents=True, exist_ok=True)  # or the job ends without a word
    pipeline.open_run(stage, "queued", NOTHING_KNOWN | {"plan": plan}, keep=("logs",))
    (stage.run_dir / "submit.sbatch").write_text(script)
    scheduler.write_record(stage.run_dir, job, after)
    print(f"{stage.stage:<9} queued: job {job}")


def job_script(stages: list[Any], report: bool = False, at_once: int | None = None) -> str:
    """The batch script of a stage, or of the same stage of several runs as an array."""
    first = stages[0]
    rollout = getattr(first, "rollout", None)
    servers = rollout is not None and rollout.name == "server" and not rollout.urls
    run_dirs = [stage.run_dir for stage in stages]
    return first.launcher.script(first.stage, run_dirs, servers=servers, report=report, at_once=at_once)


def in_the_making(stage: Any) -> dict[str, str]:
    """{run folder: stage} of the inputs that the jobs in launcher.after are making."""
    found = {}
    for path in (*stage.inputs().values(), str(Path(stage.data.path).parent)):
        if path and scheduler.read_record(Path(path)) in stage.launcher.after:
            found[path] = (artifacts.read_manifest(Path(path)) or {})["stage"]
    return found
