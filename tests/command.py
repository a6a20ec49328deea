"""The real command line."""

from __future__ import annotations

import os
import subprocess
import sys


def alignkit(*arguments: str, timeout: float = 1500, **environment: str) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own; its output is kept."""
    return subprocess.run(
        [sys.executable, "-m", "alignkit", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | environment,
    )
