"""What others wrote, shown: control characters as their escapes, so that no text moves the cursor, wipes a line or hides."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

# C0 but for tab and newline, DEL, C1, and what turns the direction of writing.
_CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
CONTROL = re.compile(_CONTROL)
CONTROL_OR_COLOUR = re.compile(rf"\x1b\[[0-9;]*m|{_CONTROL}")


def shown(text: str) -> str:
    """`text` with its control characters written out: an escape becomes \\x1b."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Screen:
    """A stream that shows control characters as `shown` does, but lets colours through."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(CONTROL_OR_COLOUR.sub(lambda m: m[0] if m[0][1:] else shown(m[0]), text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def follow(command: Sequence[str]) -> int:
    """Run a command that writes text, shown; its exit code."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", errors="replace") as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(shown(line), end="", flush=True)
        except KeyboardInterrupt:  # the usual end of -f
            process.send_signal(signal.SIGINT)
    sys.stdout.flush()
    return process.returncode
