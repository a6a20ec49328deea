"""Stopping early: signals are noted and nothing else, deadlines are near one stretch before they are reached."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from alignkit.training import interrupt
from alignkit.training.engine import World

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def stop(monkeypatch):
    """A fresh one; the handlers of this process are put back."""
    monkeypatch.delenv("ALIGNKIT_DEADLINE", raising=False)
    before = {signum: signal.getsignal(signum) for signum in interrupt.SIGNALS}
    yield interrupt.Interrupt()
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_a_signal_is_noted(stop, name):
    stop.listen(0)
    assert stop.due(ALONE) is None
    os.kill(os.getpid(), signal.Signals[name])
    assert stop.due(ALONE) == name
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.due(ALONE) == name  # the first one is the reason


class Clock:
    """Time that passes when told to. The wall clock may be set apart."""

    def __init__(self, monkeypatch, wall: float = 1e9) -> None:
        self.now, self.wall = 100.0, wall
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "time", lambda: self.wall)


def test_max_seconds_ends_before_the_stretch_that_would_pass_it(stop, monkeypatch):
    clock = Clock(monkeypatch)
    stop.listen(60)
    due = []
    for seconds in (0, 20, 10, 9, 2):  # 20, 30, 39 and 41 s after the start; the longest stretch took 20
        clock.now += seconds
        due.append(stop.due(ALONE))
    assert due == [None, None, None, None, "max_seconds=60"]


def test_a_deadline_leaves_time_to_save_and_a_clock_set_back_moves_it_not(stop, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setenv("ALIGNKIT_DEADLINE", str(clock.wall + 100))
    stop.listen(0)
    clock.wall -= 3600
    clock.now += 100 - interrupt.MARGIN - 1
    assert stop.due(ALONE) is None
    clock.now += 1
    assert stop.due(ALONE) == "ALIGNKIT_DEADLINE=1000000100.0"
