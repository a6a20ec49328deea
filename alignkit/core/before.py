"""Imports by the names that modules had before there were rooms, for code that was written then.

`alignkit.types` is `alignkit.core.types`, and so on; where a module was taken apart, its names are looked for in the parts.
Those that a room is called like (data, models, config, …) hand out their names themselves (`core.lazy`).
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "artifacts": (
        "runs.manifests", "models.source", "runs.environment", "runs.hashes", "runs.lock", "core.io", "core.errors",
    ),
    "types": ("core.types", "core.errors"),
    "log": ("tracking.run_log", "core.io"),
    "hashes": ("runs.hashes", "models.source"),
    "sharing": ("pipeline.sharing", "check.contents"),
    "stages._trl": ("stages.trl",),
    "stages._identity": ("stages.token_ids",),
    "stages._card": ("stages.card",),
    "stages._ptx": ("stages.ptx",),
    "stages._measure": ("stages.measure",),
    "rollout.attest": ("rollout.canary",),
    "ranges": ("core.fields",),
    "progress": ("tracking.console",),
    "quantised": ("models.quantization",),
    "report_html": ("report.html",),
    "report_card": ("report.card",),
    "report_card_html": ("report.card_html",),
    "explain": ("config.messages",),
    "check_config": ("check.config",),
    "check_data": ("check.data",),
    "check_model": ("check.model",),
    "check_reward": ("check.reward",),
    "submit": ("jobs.queue",),
} | {
    name: (f"{room}.{name}",)
    for room, names in {
        "core": "foreign terminal",
        "runs": "lock",
        "data": "rows columns sources files layouts chat ends tokens demo",
        "training": "engine zero batches checkpoint interrupt finite kernels rendezvous saving",
        "models": "architectures families weights loaded adapters score_heads",
        "report": "compare doctor doctor_rules",
        "config": "rules overrides names settings credentials",
        "check": "lints token_lints minhash",
        "pipeline": "inputs lineage sweep",
        "jobs": "resume",
    }.items()
    for name in names.split()
}  # fmt: skip


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what stands in `MOVED`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        known = name.startswith("alignkit.") and name.removeprefix("alignkit.") in MOVED
        return importlib.machinery.ModuleSpec(name, self) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        parts = MOVED[module.__name__.removeprefix("alignkit.")]
        if len(parts) == 1:
            sys.modules[module.__name__] = importlib.import_module(f"alignkit.{parts[0]}")
            return
        module.__dict__["__getattr__"] = lambda name: _in(parts, name, module.__name__)


def _in(parts: Sequence[str], name: str, module: str) -> Any:
    if not name.startswith("__"):
        for part in parts:
            found = importlib.import_module(f"alignkit.{part}")
            if hasattr(found, name):
                return getattr(found, name)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def install() -> None:
    """Let those imports be found, after all that is there under its own name."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
