"""What the person at the terminal sees of a running stage: one live line, drawn from the events its rank 0 writes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alignkit.core.terminal import shown


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
                    screen.note(shown(str(event["note"])))
                elif "what" in event:
                    view.add(event)
                    screen.moved()
            if not running:
                break
            screen.tick()
            time.sleep(0.2)
    console.print(view.final(process.returncode), highlight=False, soft_wrap=True)
    return first_error


@contextlib.contextmanager
def counting(label: str, console: Any = None) -> Iterator[Callable[[str, int, int, str], None]]:
    """The same live line for work of this process: tell what is yielded (phase, done, total, unit) as it goes on.

    It is drawn on stderr, and not at all for work of less than a second. A total of 0 is one that is not known.
    """
    from rich.console import Console

    console = console or Console(stderr=True)
    view = _View(label)
    screen: Any = None

    def tell(what: str, done: int, total: int, unit: str) -> None:
        nonlocal screen
        elapsed = time.monotonic() - view.started
        view.add({"what": what, "done": done, "total": total, "unit": unit, "elapsed": elapsed})
        if screen is None and elapsed > 1:
            screen = held.enter_context(_LiveLine(console, view) if console.is_terminal else _PlainLines(console, view))
        if screen is not None:
            screen.moved()
            screen.tick()

    with contextlib.ExitStack() as held:
        yield tell


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
