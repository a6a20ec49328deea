"""A checked config is run: here (`pipeline.py`), or as Slurm jobs that are queued: a chain of a run's stages, and of a
sweep's runs one array for each stage in which they differ. No torch."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Hashable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.check.contents import PLANNED, address, contents
from alignkit.core.errors import InputError
from alignkit.launch import scheduler
from alignkit.pipeline import sharing
from alignkit.pipeline import stage as pipeline
from alignkit.runs import manifests


def run_command(cfg: Any, queue: Queue) -> float | None:
    """One stage or all of them, here, or into the queue. Returns the number a sweeper may optimise; None of what is queued."""
    from alignkit.config.stages import Pipeline

    whole = isinstance(cfg, Pipeline)
    stages = cfg.stages() if whole else [cfg]
    launchers = {stage.launcher.name for stage in stages}
    if launchers == {"slurm"}:
        queue.add(cfg, stages)
        return None
    if "slurm" in launchers:
        raise InputError(
            f"launcher: {' and '.join(sorted(launchers))} in one pipeline; use one of them for every stage"
        )
    return pipeline.run_pipeline(cfg) if whole else pipeline.run_stage(cfg)


@dataclass(eq=False)
class Task:
    """A stage of a run that needs a job of its own, or a task of an array."""

    stage: Any
    plan: str  # its address
    contents: dict[str, str]  # what the address was made of
    after: list[Task | str]  # what must end well first: of the same queue, or the id of another job
    report: bool  # the last of a pipeline
    batch: list[Task] = field(default_factory=list)  # the tasks of its array in order; of a single job that one
    job: str = ""  # its id, once it is submitted

    @property
    def known(self) -> dict[str, str]:
        """What lay there when it was queued; without what a job before it makes."""
        return {key: found for key, found in self.contents.items() if not found.startswith(PLANNED)}


class Queue:
    """Runs that are submitted together. What several need is queued once, and linked to by the others."""

    def __init__(self) -> None:
        self.runs: dict[Path, Any] = {}  # {folder: config}
        self.tasks: list[Task] = []
        self.links: list[tuple[Path, Path]] = []  # (folder of a stage, the one that will hold it)
        self.turns: set[str] = set()  # addresses that are held
        self.held = ExitStack()

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *error: Any) -> None:
        self.held.close()

    def add(self, cfg: Any, stages: list[Any]) -> None:
        """Check a run, and plan its jobs. Until the queue is closed nobody else queues the same.

        Args:
            cfg: of one stage, or of the pipeline.
            stages: all of its stages.

        Raises:
            InputError: an input is refused; the runs before it stay in the queue.
        """
        root = Path(cfg.runs_dir) / cfg.run_name
        if root in self.runs:
            raise InputError(f"run_name={cfg.run_name}: another job of this sweep writes to {root}; give each its own")
        with ExitStack() as held:
            if not (cfg.dry_run or self.runs):  # two sweeps that hold what the other needs would wait for ever
                turn = sharing.turn(Path(cfg.runs_dir), "queue", stages[0].stage, root, "which queues its jobs")
                held.enter_context(turn)
            tasks, links = self._planned(cfg, stages, held)
            if not (tasks or links):
                return
            if not cfg.dry_run:
                held.enter_context(manifests.lock(root))
            self.held.enter_context(held.pop_all())
        self.runs[root] = cfg
        self.tasks += tasks
        self.links += links

    def _planned(self, cfg: Any, stages: list[Any], held: ExitStack) -> tuple[list[Task], list[tuple[Path, Path]]]:
        """The stages of a run that need a job, and the links to those that another run of the queue makes.

        A stage that a run outside of the queue has made, or has a job for, is linked to at once.
        """
        others = {(task.stage.stage, task.plan): task for task in self.tasks if task.stage.reuse}
        tasks: list[Task] = []
        links: list[tuple[Path, Path]] = []
        made: dict[str, str] = {}
        plans: dict[str, str] = {}
        before: list[Task | str] = []
        for stage in stages:
            stage.launcher, stage.resume = stage.launcher.at_site(), cfg.resume
            made |= in_the_making(stage)
            if cfg.resume and stage.run_dir.is_symlink() and not sharing.is_done(stage.run_dir):
                stage.run_dir.unlink()  # to a stage of another run that did not end well, or has yet to be made
            sources = pipeline.check_inputs(stage, made)
            held_now = contents(stage, {path: plans.get(path, path) for path in made})
            plan = address(stage, held_now)
            free = stage.reuse and not os.path.lexists(stage.run_dir)
            twin = others.get((stage.stage, plan)) if free else None
            if twin is None and not cfg.dry_run:
                if free and plan not in self.turns:  # a run before this one may have it: it would wait for itself
                    held.enter_context(sharing.turn(Path(cfg.runs_dir), plan, stage.stage, stage.run_dir))
                    self.turns.add(plan)
                    held.callback(self.turns.discard, plan)
                if is_kept(stage, sources, made, f"{stage.stage}." if len(stages) > 1 else ""):
                    continue
            made[str(stage.run_dir)], plans[str(stage.run_dir)] = stage.stage, plan
            if twin is not None:
                print(f"{stage.stage:<9} kept: the same as {twin.stage.run_dir} will be")
                links.append((stage.run_dir, twin.stage.run_dir))
                before = joined(before, twin)
            elif not cfg.dry_run and (job := _shared_job(stage, plan)):
                before = joined(before, job)
            else:
                for job in stage.launcher.after:
                    before = joined(before, job)
                tasks.append(Task(stage, plan, held_now, before, report=len(stages) > 1 and stage is stages[-1]))
                before = [tasks[-1]]
        pipeline.check_later(stages, made)
        return tasks, links

    def submit(self) -> None:
        """Queue the jobs and return at once: each starts when those before it are done. All of them, or none.

        Raises:
            InputError: Slurm refuses a job.
        """
        batches = batched(self.tasks)
        scripts = [job_script([task.stage for task in batch], batch[0].report) for batch in batches]
        if any(cfg.dry_run for cfg in self.runs.values()):
            for batch, script in zip(batches, scripts, strict=True):
                for task in batch:
                    print(pipeline.describe(task.stage, script if task is batch[-1] else ""))
            return
        scheduler.check_after(job for task in self.tasks for job in task.after if isinstance(job, str))
        jobs: list[str] = []
        first: list[str] = []
        try:
            for batch, script in zip(batches, scripts, strict=True):
                after, how = dependency(batch)
                heads = not any(isinstance(job, Task) for task in batch for job in task.after)
                jobs.append(scheduler.submit(script, after=after, how=how, hold=heads))
                first += jobs[-1:] if heads else []
                for number, task in enumerate(batch):
                    task.job = f"{jobs[-1]}_{number}" if len(batch) > 1 else jobs[-1]
            self._write(dict(zip(jobs, scripts, strict=True)))
            for job in first:
                scheduler.release(job)
        except BaseException:
            scheduler.cancel(jobs)  # the first ones are still held
            raise
        for root in self.runs:
            print("".join(f"\n  alignkit {what} {shlex.quote(str(root))}" for what in ("status", "logs", "cancel")))

    def _write(self, scripts: dict[str, str]) -> None:
        """What the queued jobs find in their folders, and the links. `scripts`: {job: its script}."""
        from alignkit.config.stages import Pipeline, save

        for root, cfg in self.runs.items():
            if isinstance(cfg, Pipeline):
                save(cfg, root / "pipeline.yaml")  # for `alignkit resume`
        for task in self.tasks:
            open_job(task, scripts[task.job.partition("_")[0]])
        for run_dir, twin in self.links:
            sharing.link(run_dir, twin)


def joined(before: list[Task | str], job: Task | str) -> list[Task | str]:
    """`before` and `job`, without those that another of them waits for."""
    if job in before or any(job in ahead(old) for old in before):
        return before
    return [old for old in before if old not in ahead(job)] + [job]


def ahead(job: Task | str) -> set[Task | str]:
    """All that a job waits for, as far as the queue knows."""
    after = job.after if isinstance(job, Task) else []
    return set(after).union(*(ahead(old) for old in after))


def batched(tasks: list[Task]) -> list[list[Task]]:
    """Tasks as the jobs and arrays that are submitted, each after those it waits for.

    An array holds one stage of several runs, whose launchers are alike. It waits either for the same jobs as a whole, or
    for another array task by task: Slurm knows no more of the kind.
    """
    from alignkit.config.stages import STAGES

    found = []
    for stage in STAGES:
        for alike in grouped((task for task in tasks if task.stage.stage == stage), _launch):
            for group in grouped(alike, lambda t: [id(j.batch) if isinstance(j, Task) else j for j in t.after]):
                parents = [job for task in group for job in task.after]
                pairs = isinstance(parents[0], Task) and parents == parents[0].batch if parents else False
                for batch in [group] if pairs else grouped(group, lambda t: list(map(id_of, t.after))):
                    for task in batch:
                        task.batch = batch
                    found.append(batch)
    return found


def id_of(job: Task | str) -> Hashable:
    """What tells jobs apart before they are submitted."""
    return job if isinstance(job, str) else id(job)


def grouped(tasks: Iterable[Task], key: Callable[[Task], Any]) -> list[list[Task]]:
    """Tasks of equal key together, both in the order they come."""
    found: dict[str, list[Task]] = {}
    for task in tasks:
        found.setdefault(repr(key(task)), []).append(task)
    return list(found.values())


def _launch(task: Task) -> Any:
    """Equal where one script serves; Slurm has no arrays of heterogeneous jobs, so those stay alone."""
    servers, launcher = starts_servers(task.stage), task.stage.launcher
    return launcher, servers, task.report, id(task) if servers and launcher.server_nodes else None


def dependency(batch: list[Task]) -> tuple[list[str], str]:
    """`after` and `how` of `scheduler.submit`; what the batch waits for is submitted."""
    after = batch[0].after
    if all(task.after == after for task in batch):
        return ids(after), "afterok"
    return [ids(after)[0].partition("_")[0]], "aftercorr"


def ids(jobs: list[Task | str]) -> list[str]:
    """What Slurm calls them."""
    return [job.job if isinstance(job, Task) else job for job in jobs]


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


def is_kept(stage: Any, sources: dict[str, Any], made: dict[str, str], prefix: str) -> bool:
    """Whether there is nothing to run: the stage's folder holds it already, or another run that it may be shared with.

    Args:
        made: {run folder: stage} that a job before this one makes: what is made of those is not known yet.
        prefix: of the stage's keys in messages.
    """
    paths = [*stage.inputs().values(), str(Path(stage.data.path).parent)]
    known = not any(path in made for path in paths)
    origin = pipeline.origin_of(stage, sources) if known else NOTHING_KNOWN
    manifest = pipeline.previous(stage, origin, prefix)
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


def open_job(task: Task, script: str) -> None:
    """Write what a queued job finds in its folder when it starts."""
    stage = task.stage
    (stage.run_dir / "logs").mkdir(parents=True, exist_ok=True)  # or the job ends without a word
    pipeline.open_run(stage, "queued", NOTHING_KNOWN | {"plan": task.plan, "checked": task.known}, keep=("logs",))
    batch = stage.run_dir / "submit.sbatch"
    batch.touch(0o600)  # launcher.setup may be nobody else's business
    batch.write_text(script, encoding="utf-8")
    scheduler.write_record(stage.run_dir, task.job, ids(task.after))
    print(f"{stage.stage:<9} queued: job {task.job}")


def job_script(stages: list[Any], report: bool = False) -> str:
    """The batch script of a stage, or of the same stage of several runs as an array."""
    first = stages[0]
    run_dirs = [stage.run_dir for stage in stages]
    at_once = first.launcher.at_once
    return first.launcher.script(first.stage, run_dirs, servers=starts_servers(first), report=report, at_once=at_once)


def starts_servers(stage: Any) -> bool:
    """Whether a stage starts rollout servers of its own."""
    rollout = getattr(stage, "rollout", None)
    return rollout is not None and rollout.name == "server" and not rollout.urls


def in_the_making(stage: Any) -> dict[str, str]:
    """{run folder: stage} of the inputs that the jobs in launcher.after are making."""
    found = {}
    for path in (*stage.inputs().values(), str(Path(stage.data.path).parent)):
        if path and scheduler.read_record(Path(path)) in stage.launcher.after:
            found[path] = (manifests.read_manifest(Path(path)) or {})["stage"]
    return found
