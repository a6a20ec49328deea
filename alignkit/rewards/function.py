"""A reward written by the user: a Python function of prompts, responses and the rows they came from.

Functions written for TRL or verl are taken as they are: see `signature`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from alignkit.core.errors import InputError
from alignkit.core.types import Rows
from alignkit.rewards import signature, user_code
from alignkit.rewards.base import Context, Scorer, batch_scorer


@dataclass
class Function:
    """`score(prompts, responses, meta) -> list[float]` from a file or an installed module; TRL's and verl's forms too."""

    name: str = "function"
    target: str = MISSING  # my_reward.py:score or package.module:score; a function, a coroutine or a class
    weight: float = 1.0  # in the sum of rewards

    def start(self, context: Context) -> Scorer:
        found, form, place = self.adapted()
        if inspect.isclass(found):
            try:
                with place.importable():
                    found = found()
            except (Exception, SystemExit) as error:
                reason = " ".join(str(error).split())
                raise InputError(f"reward target {self.target!r}: {type(error).__name__}: {reason}") from error
        return batch_scorer(context, signature.caller(found, form, self.target, place.importable))

    def adapted(self) -> tuple[Any, signature.Form, user_code.Place]:
        """What `target` names, how it is called, and where its imports are found. A class is not made.

        Raises:
            InputError: no such file, module or name, or its parameters are those of no reward function.
        """
        found, place = user_code.load(self.target)
        if not callable(found):
            where, name = user_code.split_target(self.target)
            raise InputError(f"reward target {self.target!r}: {where} has no function {name!r}")
        return found, signature.recognise(found, self.target), place

    def load(self) -> Callable:
        """The function itself, where it can be called as score(prompts, responses, meta) and gives its scores at once.

        Raises:
            InputError: `adapted` does, or it is of another kind, which `start` adapts.
        """
        found, form, _ = self.adapted()
        if form.origin != "ours" or not signature.is_plain(found):
            raise InputError(
                f"reward target {self.target!r}: not a plain score(prompts, responses, meta), which a call by hand needs: "
                "a stage takes it as it is"
            )
        return found

    def check_rows(self, rows: Rows, form: signature.Form, key: str) -> None:
        """Refuse rows that lack a column which the function asks for.

        Args:
            form: of `adapted`.
            key: the config key of this reward.

        Raises:
            InputError: the column, the first row without it and what it has.
        """
        for number, row in enumerate(rows):
            if (column := form.lacking(row)) is not None:
                raise InputError(
                    f"{key}.target={self.target} asks for the column {column!r}, which row {number + 1} of data.path lacks (it has "
                    f"{', '.join(sorted(row))}): add it, or give the parameter a default"
                )

    def source_files(self) -> list[Path]:
        """The function's file and those beside it that it imports, found without running any; [] of what has none."""
        return user_code.source_files(self.target)
