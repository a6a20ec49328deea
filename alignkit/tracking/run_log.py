"""What a run says: numbers and samples in files always, a tracker if one is wanted, one live line in the terminal.

    <run_dir>/metrics.jsonl        {"step": 3, "wall_time": 1763.2, "objective/score": 0.41, ...}
    <run_dir>/samples.jsonl        {"step": 3, "prompt": ..., "response": ..., "score": ...}
    <run_dir>/logs/progress.jsonl  events of the running process: progress, notes, errors

Only rank 0 writes, but for errors. The parent process calls `follow` on the third file and draws it. JSON has no NaN, so a float
that is not finite is written as the string "nan", "inf" or "-inf": `float(row["loss"])` reads either form.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError
from alignkit.core.io import append_jsonl, plain, read_jsonl, write_atomic
from alignkit.core.types import Rows

PROGRESS = "logs/progress.jsonl"  # below the run dir


# ---------------------------------------------------------------------------------------------- JSON lines


# ---------------------------------------------------------------------------------------------- trackers


REACHED_WITHIN = 30  # seconds that wandb's server has to answer


class Tracker:
    """Where numbers go besides the files. This one keeps nothing."""

    said = ""  # what a person should know of how it started

    def log(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def samples(self, step: int, rows: Rows) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class NoLogger:
    """metrics.jsonl only."""

    name: str = "none"

    def start(self, run_dir: Path, run_name: str, stage: str, config: dict) -> Tracker:
        return Tracker()


@dataclass
class Wandb:
    """Weights & Biases. Offline needs no account; `wandb sync <run_dir>/wandb/offline-run-*` uploads it later."""

    name: str = "wandb"
    project: str = "alignkit"
    mode: str = "auto"  # auto (WANDB_MODE where it is set, else online if the user has logged in) | offline | online
    entity: str | None = None  # the user's own by default
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in ("offline", "online", "auto"):
            raise InputError(f"logger.mode={self.mode!r} is not known: use offline, online or auto")

    def start(self, run_dir: Path, run_name: str, stage: str, config: dict) -> Tracker:
        import wandb

        mode: Any = self.mode
        if mode == "auto":
            logged_in = "WANDB_MODE" not in os.environ and wandb.login(prompt=False, verify=False)
            mode = os.environ.get("WANDB_MODE") or ("online" if logged_in else "offline")
        id_file = Path(run_dir) / "wandb" / "run_id"  # a resumed run goes on in the same wandb run
        id_file.parent.mkdir(parents=True, exist_ok=True)
        if not id_file.exists():
            write_atomic(id_file, secrets.token_hex(4))

        def begin(mode: Any) -> Any:
            return wandb.init(
                project=self.project,
                entity=self.entity,
                mode=mode,
                dir=str(run_dir),
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow" if mode == "online" else None,
                name=f"{run_name}/{stage}",
                group=run_name,
                job_type=stage,
                tags=list(self.tags),
                config=plain(config),
                reinit="create_new",
                settings=wandb.Settings(console="off", silent=True, init_timeout=REACHED_WITHIN),
            )

        try:
            return _WandbTracker(begin(mode))
        except (
            wandb.Error
        ) as error:  # no route to the server, no account: what was computed is worth more than its curve
            write_atomic(id_file, secrets.token_hex(4))  # wandb keeps the other id for the attempt that failed
            tracker = _WandbTracker(begin("offline"))
            why = " ".join(str(error).split())[:200]
            tracker.said = (
                f"wandb did not start in mode {mode} ({why}): it logs offline, `wandb sync {run_dir}/wandb/offline-run-*` uploads "
                "it later; `wandb login`, or logger.mode=offline, says it beforehand"
            )
            return tracker


class _WandbTracker(Tracker):
    def __init__(self, run: Any) -> None:
        self.run = run
        # Our own step axis: wandb's may only grow, while a resumed run goes back to its checkpoint.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log({"step": step, **metrics})

    def samples(self, step: int, rows: Rows) -> None:
        import wandb

        columns: list[Any] = list(dict.fromkeys(key for row in rows for key in row))
        data = [[_cell(row.get(key)) for key in columns] for row in rows]
        self.run.log({"step": step, "samples": wandb.Table(columns=columns, data=data, allow_mixed_types=True)})

    def close(self) -> None:
        self.run.finish()


@dataclass
class Tensorboard:
    """Event files in <run_dir>/tensorboard: look with `tensorboard --logdir <runs_dir>`."""

    name: str = "tensorboard"

    def start(self, run_dir: Path, run_name: str, stage: str, config: dict) -> Tracker:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(Path(run_dir) / "tensorboard"))
        writer.add_text("config", "    " + json.dumps(plain(config), indent=2).replace("\n", "\n    "))
        return _TensorboardTracker(writer)


class _TensorboardTracker(Tracker):
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def samples(self, step: int, rows: Rows) -> None:
        for number, row in enumerate(rows):
            text = "\n\n".join(f"**{key}**: {_cell(value)}" for key, value in row.items())
            self.writer.add_text(f"samples/{number}", text, step)

    def close(self) -> None:
        self.writer.close()


def _cell(value: Any) -> Any:
    value = plain(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value


# ---------------------------------------------------------------------------------------------- a stage's side


class RunLog:
    """The log of one stage. Every rank makes one and calls it alike; only rank 0's writes, but for errors."""

    def __init__(self, run_dir: Path, stage: str, rank: int, logger: Any, config: dict) -> None:
        self.run_dir = Path(run_dir)
        self.rank, self.active = rank, rank == 0
        self.tracker = Tracker()
        if self.active:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            run_name = str(config.get("run_name") or self.run_dir.absolute().parent.name)
            self.tracker = (logger or NoLogger()).start(self.run_dir, run_name, stage, config)
            if self.tracker.said:
                self.note(self.tracker.said)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """The numbers of one step, in metrics.jsonl and the tracker."""
        if not self.active:
            return
        metrics = {name: float(value) for name, value in metrics.items()}
        row = {"step": int(step), "wall_time": round(time.time(), 3), **metrics}
        append_jsonl(self.run_dir / "metrics.jsonl", row)
        self.tracker.log(int(step), metrics)

    def samples(self, step: int, rows: Rows) -> None:
        """Rows to read with one's own eyes, in samples.jsonl and the tracker."""
        if not self.active or not rows:
            return
        for row in rows:
            append_jsonl(self.run_dir / "samples.jsonl", {"step": int(step), **row})
        self.tracker.samples(int(step), rows)

    def rewind(self, step: int) -> None:
        """Forgets what was logged after `step`: a run that resumes at a checkpoint logs those steps again.

        Leaves a metrics.jsonl there in any case, for who follows it from the start.
        """
        if not self.active:
            return
        (self.run_dir / "metrics.jsonl").touch()
        for path in (self.run_dir / "metrics.jsonl", self.run_dir / "samples.jsonl"):
            if path.exists():
                kept = [row for row in read_jsonl(path) if row.get("step", 0) <= step]
                text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in kept)
                write_atomic(path, text)

    def progress(self, what: str, total: int, unit: str = "step") -> Progress:
        """`with log.progress("training", 48) as bar: ... bar.advance(loss=0.3)`. A total of 0: length unknown."""
        return Progress(self._event, what, total, unit)

    def note(self, text: str) -> None:
        """A line for the person at the terminal, such as how many rows were dropped and why."""
        self._event({"note": text})

    def error(self, kind: str, message: str) -> None:
        """Why the stage stops, from whichever rank it is. `kind` is the caller's own word: the parent reads it back."""
        self._append({"error": message, "kind": kind, "rank": self.rank})

    def close(self) -> None:
        self.tracker.close()
        self.tracker = Tracker()

    def _event(self, event: dict) -> None:
        if self.active:
            self._append(event)

    def _append(self, event: dict) -> None:
        append_jsonl(self.run_dir / PROGRESS, {**event, "time": round(time.time(), 3)})


class Progress:
    """Events of one phase of a stage: the first and the last always, the others so rarely that no file grows big."""

    def __init__(self, emit: Any, what: str, total: int, unit: str) -> None:
        self.emit, self.what, self.total, self.unit = emit, what, int(total or 0), unit
        self.done = 0
        self.numbers: dict[str, Any] = {}
        self.started = self.last = time.monotonic()
        self.pending = False

    def __enter__(self) -> Progress:
        self.started = time.monotonic()
        self._write()
        return self

    def __exit__(self, *_: object) -> None:
        if self.pending:
            self._write()

    def update(self, done: int, **numbers: float) -> None:
        """`done` of `total`, and the numbers to show beside it; those not named stay as they were."""
        self.done = int(done)
        self.numbers.update(numbers)
        self.pending = True
        elapsed = time.monotonic() - self.started
        if time.monotonic() - self.last >= max(0.2, elapsed / 1000):
            self._write()

    def advance(self, n: int = 1, **numbers: float) -> None:
        self.update(self.done + n, **numbers)

    def _write(self) -> None:
        self.last = time.monotonic()
        self.pending = False
        elapsed = round(self.last - self.started, 3)
        event = {"what": self.what, "done": self.done, "total": self.total, "unit": self.unit, "elapsed": elapsed}
        self.emit({**event, "numbers": dict(self.numbers)})


class Clock:
    """Seconds of each phase of a step, step after step."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.totals: dict[str, float] = {}
        self.steps, self.started = 0, time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - started

    def lap(self) -> dict[str, float]:
        """End a step: {"time/<phase>": seconds}, and "time/step" for the whole."""
        now = time.perf_counter()
        seconds = self.phases | {"step": now - self.started}
        for phase, spent in seconds.items():
            self.totals[phase] = self.totals.get(phase, 0.0) + spent
        self.phases, self.started, self.steps = {}, now, self.steps + 1
        return {f"time/{phase}": spent for phase, spent in seconds.items()}

    def describe(self) -> str:
        """The mean step and its phases in words, longest first."""
        means = {phase: total / max(1, self.steps) for phase, total in self.totals.items()}
        whole = means.pop("step", 0.0)
        parts = ", ".join(f"{phase} {s:.1f}" for phase, s in sorted(means.items(), key=lambda item: -item[1]))
        return f"a step took {whole:.1f} s: {parts}"
