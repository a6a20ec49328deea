"""Names that a room hands out: each is imported from its module when it is first asked for, so that a room stays light."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def names(room: str, where: Mapping[str, str], before: Sequence[str] = ()) -> tuple[list[str], Callable[[str], Any]]:
    """`__all__` and `__getattr__` (PEP 562) of a room.

    Args:
        room: its `__name__`.
        where: {name: module of the room that has it}.
        before: modules of the package that had the room's name together, before there were rooms: their names are found too.
    """

    def find(name: str) -> Any:
        if name in where:
            return getattr(importlib.import_module(f"{room}.{where[name]}"), name)
        if not name.startswith("_") and importlib.util.find_spec(f"{room}.{name}") is not None:
            return importlib.import_module(f"{room}.{name}")
        for module in before if not name.startswith("__") else ():
            found = importlib.import_module(f"alignkit.{module}")
            if hasattr(found, name):
                return getattr(found, name)
        raise AttributeError(f"module {room!r} has no attribute {name!r}")

    return sorted(where), find
