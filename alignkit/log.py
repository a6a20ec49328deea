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
import math
import os
import secrets
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from alignkit.types import InputError, Rows, RunError

PROGRESS = "logs/progress.jsonl"  # below the run dir


# ---------------------------------------------------------------------------------------------- JSON lines


def plain(value: Any) -> Any:
    """`value` as something that valid JSON can hold: scalars of torch and numpy unwrapped, NaN as a string."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # a tensor or an array
        return plain(value.tolist())
    return str(value)


def append_jsonl(path: Path, row: dict) -> None:
    """One object, one line, written at once. A line cut short by a kill is closed first, so it spoils no other."""
    line = json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
            line = "\n" + line
        file.write(line.encode())


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a file; [] where it does not exist. A line cut short by a kill is passed over."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------- trackers


class Tracker:
    """Where numbers go besides the files. This one keeps nothing."""

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
    mode: str = "offline"  # offline | online | auto (online if the user has logged in)
    entity: str | None = None  # the user's own by default
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in ("offline", "online", "auto"):
            raise InputError(f"logger.mode={self.mode!r} is not known: use offline, online or auto")

    def start(self, run_dir: Path, run_name: str, stage: str, config: dict) -> Tracker:
        import wandb

        mode: Any = self.mode
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        id_file = Path(run_dir) / "wandb" / "run_id"  # a resumed run goes on in the same wandb run
        id_file.parent.mkdir(parents=True, exist_ok=True)
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        try:
            run = wandb.init(
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
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            fix = "set logger.mode=offline or logger=none, or run `wandb login`"
            raise RunError(f"wandb did not start in mode {mode}: {str(error).strip()}; {fix}") from error
        return _WandbTracker(run)


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
        """Forgets what was logged after `step`: a run that resumes at a checkpoint logs those steps again."""
        if not self.active:
            return
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


def write_atomic(path: Path, text: str) -> None:
    """The whole file or the old one, whatever happens in between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


# ---------------------------------------------------------------------------------------------- the parent's side


def follow(path: Path, process: Any, label: str, console: Any = None, offset: int = 0) -> dict | None:
    """Draws the progress of `process` (a Popen) until it ends, from the events it appends to `path`.

    `offset` is the size `path` had before the process was started: what an earlier attempt wrote is not shown.
    Returns the first error event, {"error": message, "kind": kind, "rank": rank, "time": ...}, or None: when one rank
    stops, the errors of its peers that follow are only lost connections. A terminal gets one live line; a file or a
    CI log gets a plain line every ten seconds at most, and one at the end of each phase.
    """
    from rich.console import Console

    console = console or Console()
    view = _View(label)
    screen: Any = _LiveLine(console, view) if console.is_terminal else _PlainLines(console, view)
    events = _tail(Path(path), offset)
    first_error = None
    with screen:
        while True:
            running = process.poll() is None  # asked before reading: nothing written before the end is missed
            for event in next(events):
                if "error" in event:
                    first_error = first_error or event
                elif "note" in event:
                    screen.note(str(event["note"]))
                elif "what" in event:
                    view.add(event)
                    screen.moved()
            if not running:
                break
            screen.tick()
            time.sleep(0.2)
    console.print(view.final(process.returncode), highlight=False, soft_wrap=True)
    return first_error


def _tail(path: Path, offset: int) -> Iterator[list[dict]]:
    """Each `next`: the events completed since the last one. No file yet is no events; half a line waits."""
    rest = b""
    while True:
        lines = []
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < offset:  # the file was begun anew
                offset, rest = 0, b""
            file.seek(offset)
            chunk = file.read()
            offset += len(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
        events = []
        for line in lines:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    events.append(event)
        yield events


class _View:
    """What is known of a running stage, and the words for it."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.started = time.monotonic()
        self.event: dict = {}  # the latest
        self.phases: dict[str, dict] = {}  # the latest of each phase
        self.seen = self.started  # when the latest arrived
        self.marks: deque[tuple[float, int]] = deque()  # (elapsed, done) of this phase in the last minute or so

    def add(self, event: dict) -> None:
        done, elapsed = int(event.get("done") or 0), float(event.get("elapsed") or 0)
        fresh = event["what"] != self.event.get("what") or not self.marks or done < self.marks[-1][1]
        if fresh:
            self.marks.clear()
        if fresh or done > self.marks[-1][1]:
            self.marks.append((elapsed, done))
        while len(self.marks) > 2 and elapsed - self.marks[1][0] > 60:
            self.marks.popleft()
        self.event, self.seen = event, time.monotonic()
        self.phases[event["what"]] = event

    @property
    def done(self) -> int:
        return int(self.event.get("done") or 0)

    @property
    def total(self) -> int:
        return int(self.event.get("total") or 0)

    def rate(self) -> float | None:
        """Units a second over the last minute, or over the last unit where one takes longer."""
        if len(self.marks) < 2:
            return None
        (elapsed0, done0), (elapsed1, done1) = self.marks[0], self.marks[-1]
        return (done1 - done0) / (elapsed1 - elapsed0) if elapsed1 > elapsed0 else None

    def speed(self, now: float) -> str:
        """Rate and time left; the time so far while there is no rate yet."""
        rate, waited = self.rate(), now - self.seen
        if not self.event:
            return clock(now - self.started)
        if not rate or not self.total or self.done >= self.total:
            return clock(float(self.event.get("elapsed") or 0) + (0 if 0 < self.total <= self.done else waited))
        # The part of the current unit that has passed since the last mark counts, but never below zero.
        since_mark = float(self.event.get("elapsed") or 0) - self.marks[-1][0] + waited
        left = max(0.0, (self.total - self.done) / rate - since_mark)
        return f"{rate_text(rate, str(self.event.get('unit') or 'step'))}  {clock(left)} left"

    def numbers(self, event: dict | None = None) -> str:
        numbers = (event or self.event).get("numbers") or {}
        return "  ".join(f"{name} {short(value)}" for name, value in numbers.items())

    def line(self) -> str:
        """One plain line: label, phase, done of total, speed, numbers."""
        count = f"{self.done}/{self.total}" if self.total else ""
        parts = [self.label, self.event.get("what") or "starting", count, self.speed(time.monotonic()), self.numbers()]
        return "  ".join(part for part in parts if part)

    def final(self, returncode: int | None) -> Any:
        """The line that stays: the count and numbers of the phase that took longest, the time of the whole."""
        from rich.text import Text

        counted = [event for event in self.phases.values() if event.get("total")]
        main = max(counted, key=lambda event: float(event.get("elapsed") or 0), default={})
        text = Text("✓ ", style="green") if returncode == 0 else Text("✗ ", style="red")
        text.append(f"{self.label:<14} ", style="bold")
        count = f"{main['done']}/{main['total']}" if main else ""
        state = "" if returncode == 0 else f"stopped with exit code {returncode}"
        parts = [count, clock(time.monotonic() - self.started), self.numbers(main) if main else "", state]
        return text.append("  ".join(part for part in parts if part))


class _LiveLine:
    """The one live line of a terminal. It redraws itself only when `tick` is called: no thread, little work."""

    def __init__(self, console: Any, view: _View) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        self.view = view
        self.spinner = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏" if console.encoding.startswith("utf") else "-\\|/"

        def column(field: str, style: str = "none") -> TextColumn:
            return TextColumn(field, style=style, markup=False, table_column=Column(no_wrap=True))

        self.bar = RichProgress(
            column("{task.fields[spin]}"),
            column("{task.description}", style="bold"),
            column("{task.fields[what]}"),
            BarColumn(bar_width=16 if console.width >= 72 else 6),
            column("{task.fields[count]}", style="cyan"),
            column("{task.fields[speed]}"),
            TextColumn(  # gives way in a narrow terminal
                "{task.fields[numbers]}",
                style="magenta",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=console,
            auto_refresh=False,
            transient=True,
            expand=True,
        )
        self.task = self.bar.add_task(
            f"{view.label:<14}", total=None, spin=" ", what="starting", count="", speed="0:00", numbers=""
        )

    def __enter__(self) -> _LiveLine:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def note(self, text: str) -> None:
        self.bar.console.print(f"  {self.view.label}: {text}", style="dim", highlight=False, markup=False)

    def moved(self) -> None:
        pass

    def tick(self) -> None:
        view = self.view
        if view.event:
            self.bar.update(
                self.task,
                completed=view.done,
                total=view.total or None,
                what=view.event["what"],
                count=f"{view.done}/{view.total}" if view.total else "",
                numbers=view.numbers(),
            )
        now = time.monotonic()
        spin = self.spinner[int(now * 5) % len(self.spinner)]  # rich's own stands still once a phase is complete
        self.bar.update(self.task, spin=spin, speed=view.speed(now), refresh=True)


class _PlainLines:
    """For a log file: a line every ten seconds at most while there is news, and the first end of each phase."""

    def __init__(self, console: Any, view: _View, every: float = 10.0) -> None:
        self.console, self.view, self.every = console, view, every
        self.last = time.monotonic()
        self.ended: set[str] = set()

    def __enter__(self) -> _PlainLines:
        self._print(f"{self.view.label}  starting")
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def note(self, text: str) -> None:
        self._print(f"  {self.view.label}: {text}")

    def moved(self) -> None:
        what = self.view.event["what"]
        end = self.view.total and self.view.done >= self.view.total and what not in self.ended
        if end:
            self.ended.add(what)
        if end or time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            self._print(self.view.line())

    def tick(self) -> None:
        pass

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


# ---------------------------------------------------------------------------------------------- words for numbers


def clock(seconds: float) -> str:
    """0:07, 2:31, 1:02:05."""
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def rate_text(rate: float, unit: str) -> str:
    """12 step/s, 1.3 step/s, 4.2 s/step, 2.5 min/step: the way round that gives a number above one."""
    if rate >= 1:
        return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"
    each = 1 / rate
    if each >= 100:
        return f"{each / 60:.1f} min/{unit}"
    return f"{each:.0f} s/{unit}" if each >= 10 else f"{each:.1f} s/{unit}"


def short(value: Any) -> str:
    """About three digits, for a person: 0.412, 1.23, 3e-05, 1,240."""
    if value is None:
        return "–"
    if isinstance(value, (str, bool)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if not math.isfinite(value) or value == 0:
        return "0" if value == 0 else str(value)
    if size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return (
        f"{value:.3f}"
        if size < 1
        else f"{value:.2f}"
        if size < 10
        else f"{value:,.1f}"
        if size < 1000
        else f"{value:,.0f}"
    )
