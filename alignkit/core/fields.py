"""What a number in the configuration may be: said beside its default, checked by one walk over the whole config."""

from __future__ import annotations

import contextlib
import math
from dataclasses import field, fields, is_dataclass
from datetime import date
from typing import Any

from alignkit.core.errors import InputError

OWN = ("name", "stage")  # what makes an option of a group this option
Bound = float | None
SEEDS = 2**32 - 1  # the largest that numpy takes


def num(default: Any, *, gt: Bound = None, ge: Bound = None, lt: Bound = None, le: Bound = None) -> Any:
    """A dataclass field with this default whose value is > gt, >= ge, < lt and <= le, or null where the type allows it.

    The bounds hold for every element of a list or a tuple.
    """
    return field(default=default, metadata={"bounds": {"gt": gt, "ge": ge, "lt": lt, "le": le}})


def check_numbers(node: Any, prefix: str = "") -> None:
    """Walk a config of dataclasses and refuse the first number that is not finite or outside its bounds.

    Refuses as well a `name` (or ZeRO `stage`) that is not the option's own: an option is chosen by its group.

    Raises:
        InputError: the dotted key, its value and what was expected.
    """
    for f in fields(node):
        value, key = getattr(node, f.name), f"{prefix}{f.name}"
        if f.name in OWN and isinstance(f.default, (str, int)) and value != f.default:
            raise InputError(
                f"{key}={value}: this option has {f.default}; choose another one with {prefix[:-1]}=<option>"
            )
        for item, place in _parts(value, key):
            if is_dataclass(item):
                check_numbers(item, f"{place}.")
            elif isinstance(item, (int, float)) and not isinstance(item, bool):
                bounds = f.metadata.get("bounds", {})
                if not _holds(item, **bounds):
                    null = ", or null" if f.default is None else ""
                    raise InputError(f"{place}={item}: expected {_words(f.name, **bounds)}{null}")


def _parts(value: Any, key: str) -> list[tuple[Any, str]]:
    if isinstance(value, dict):
        return [(item, f"{key}.{name}") for name, item in value.items()]
    return [(item, key) for item in value] if isinstance(value, (list, tuple)) else [(value, key)]


def _holds(x: float, gt=None, ge=None, lt=None, le=None) -> bool:
    above = (gt is None or x > gt) and (ge is None or x >= ge)
    return math.isfinite(x) and above and (lt is None or x < lt) and (le is None or x <= le)


def _words(name: str, gt=None, ge=None, lt=None, le=None) -> str:
    if gt is ge is lt is le is None:
        return "a finite number"
    if ge is not None and ge == le:
        return f"{ge}"
    if lt is None and le is None:
        return f"more than {gt}" if gt is not None else f"{ge} or more"
    if ge is not None and le is not None:
        return f"a number from {ge} to {le}"
    low = f"{gt} < " if gt is not None else f"{ge} <= " if ge is not None else ""
    return f"{low}{name} {'<' if lt is not None else '<='} {lt if lt is not None else le}"


def check_date(key: str, value: str | None) -> None:
    """Raise InputError where `value` is given and is no date as 2026-05-31."""
    with contextlib.suppress(ValueError):
        if value is None or date.fromisoformat(value).isoformat() == value:
            return
    raise InputError(f"{key}={value!r}: expected a date as 2026-05-31")
