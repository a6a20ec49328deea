"""A reward written by the user: any Python function of prompts, responses and the rows they came from."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from alignkit.rewards.base import Context, Scorer, text_scorer
from alignkit.types import InputError


@dataclass
class Function:
    """`score(prompts, responses, meta) -> list[float]` from a file or an installed module."""

    name: str = "function"
    target: str = MISSING  # my_reward.py:score or package.module:score
    weight: float = 1.0  # in the sum of rewards

    def start(self, context: Context) -> Scorer:
        return text_scorer(context, self.load(), self.target)

    def load(self) -> Callable:
        """Import the function.

        Raises:
            InputError: no such file, module or name.
        """
        where, _, attribute = self.target.partition(":")
        if not attribute:
            raise InputError(f"reward target {self.target!r}: expected file.py:function or package.module:function")
        if where.endswith(".py"):
            path = Path(where)
            if not path.is_file():
                raise InputError(f"reward target {self.target!r}: no such file as {path.absolute()}")
            spec = importlib.util.spec_from_file_location(f"alignkit_user_{path.stem}", path)
            assert spec is not None and spec.loader is not None  # a .py file that exists has both
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            try:
                spec.loader.exec_module(module)
            except Exception as error:
                raise InputError(
                    f"reward target {self.target!r}: {path} does not load: {type(error).__name__}: {' '.join(str(error).split())}"
                ) from error
        else:
            try:
                module = importlib.import_module(where)
            except ImportError as error:
                raise InputError(f"reward target {self.target!r}: {error}") from None
        if not callable(getattr(module, attribute, None)):
            raise InputError(f"reward target {self.target!r}: {where} has no function {attribute!r}")
        return getattr(module, attribute)
