"""Stopping early without losing work: a signal or a nearing deadline is noted here, and the stage saves at its next boundary.

A signal handler does nothing but note the signal: nobody knows what was running when it came. At its boundaries (between
two optimizer steps of TRL, between two rounds of PPO and after each of its generations) a stage asks `due`; where any rank
was asked to stop, all of them save, rank 0 writes `saved` into the manifest, and every rank ends with exit code 75.

A deadline is a moment: ALIGNKIT_DEADLINE (unix seconds, when the job will be killed) or `max_seconds` after the start. It is
turned into the monotonic clock at once, so a clock that is set in the meantime moves nothing.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from alignkit.core.errors import InputError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
MARGIN = 30.0  # seconds before ALIGNKIT_DEADLINE that are left for the save itself


class Interrupt:
    """What asks this rank to stop early."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.ends: list[tuple[float, str]] = []  # (monotonic seconds, its name)
        self.last: float | None = None  # the boundary before this one
        self.longest = 0.0  # seconds between two boundaries

    def listen(self, max_seconds: float) -> None:
        """Note signals and deadlines from now on. `max_seconds` of 0: no limit."""
        now = time.monotonic()
        if max_seconds:
            self.ends.append((now + max_seconds, f"max_seconds={max_seconds:g}"))
        if deadline := os.environ.get("ALIGNKIT_DEADLINE"):
            self.ends.append((now + seconds(deadline) - time.time() - MARGIN, f"ALIGNKIT_DEADLINE={deadline}"))
        for signum in SIGNALS:
            signal.signal(signum, self.note)

    def note(self, signum: int, frame: Any) -> None:
        """The handler: remember the first signal."""
        self.reason = self.reason or signal.Signals(signum).name

    def due(self, world: Any) -> str | None:
        """Why to save and stop now, or None; the same answer on every rank. Every rank calls it at the same boundaries.

        A deadline is near when a stretch as long as the longest so far would not end before it.
        """
        import torch

        now = time.monotonic()
        if self.last is not None:
            self.longest = max(self.longest, now - self.last)
        self.last = now
        near = [name for end, name in self.ends if now + self.longest >= end]
        self.reason = self.reason or next(iter(near), None)
        asked = world.sum(torch.tensor([float(self.reason is not None)], device=world.device))
        return self.reason or ("another rank was asked to stop" if float(asked) else None)


def seconds(deadline: str) -> float:
    """ALIGNKIT_DEADLINE as unix seconds.

    Raises:
        InputError: it is no number.
    """
    try:
        return float(deadline)
    except ValueError:
        raise InputError(
            f"ALIGNKIT_DEADLINE={deadline}: expected a moment in unix seconds, as `date -d 12:00 +%s` prints it"
        ) from None


process = Interrupt()  # signals belong to the process
