"""What ends a command: an input that is refused, a run that failed, one that was asked to stop and saved."""

from __future__ import annotations


class InputError(ValueError):
    """An input is refused: a config, a file, a model or a run folder. The command ends with exit code 2.

    The message names the thing, the value given, the value expected and the fix, on one line, whatever it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class RunError(RuntimeError):
    """A run stops while working: the command ends with exit code 1."""


class Saved(Exception):
    """A run was asked to stop early, and saved: ranks and command end with exit code 75, "try again" in sysexits.h."""

    CODE = 75

    def __init__(self, step: int, total: int, reason: str) -> None:
        super().__init__(f"saved at step {step} of {total} ({reason})")
        self.step, self.total, self.reason = step, total, reason
