"""What reward functions of different origins take and give, recognised by the names of their parameters.

    ours   score(prompts, responses, meta) -> N numbers
    TRL    score(completions, **kwargs), score(prompts, completions, answer, ...): keyword lists, one of every column named
    verl   compute_score(data_source, solution_str, ground_truth, extra_info=None): one row a call

Each may be a function, a coroutine, an object with __call__, or a class that is made without arguments.
"""

from __future__ import annotations

import copy
import functools
import inspect
import numbers
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from alignkit.core.errors import InputError, RunError

OURS = ("prompts", "responses", "meta")
GIVEN = ("prompts", "completions", "completion_ids")  # what a function in TRL's form gets besides the columns
TRAINER = ("trainer_state", "log_extra", "log_metric", "environments")  # what only TRL's own trainer has
EXPECTED = (
    "expected score(prompts, responses, meta), or TRL's score(completions, **kwargs), or verl's "
    "compute_score(data_source, solution_str, ground_truth, extra_info)"
)
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Batch:
    """Answers to score."""

    prompts: list[Any]  # as in the rows: a text, or a list of messages
    responses: list[str]
    meta: list[dict[str, Any]]  # the rows
    ids: list[list[int]]  # of the responses, end token included


@dataclass(frozen=True)
class Form:
    """How a function is called."""

    origin: str  # ours | trl | verl
    by_name: bool = True  # ours: with keywords
    columns: tuple[str, ...] = ()  # that it names and has no default for
    optional: tuple[str, ...] = ()  # that it names with a default
    rest: bool = False  # it takes every other column too

    def call(self, function: Callable, batch: Batch) -> Any:
        """What it returns; of verl's form, a list of what it returns a row. Coroutines are not awaited here."""
        if self.origin == "verl":
            return [function(**arguments) for arguments in map(self._verl, batch.meta, batch.responses)]
        if self.origin == "trl":
            return function(**self._trl(batch))
        values = (batch.prompts, batch.responses, batch.meta)
        return function(**dict(zip(OURS, values, strict=True))) if self.by_name else function(*values)

    def _trl(self, batch: Batch) -> dict[str, Any]:
        """Keyword lists. An answer to a list of messages is a list of one message, as TRL has it."""
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(batch.prompts, batch.responses, strict=True)
        ]
        found: dict[str, Any] = {"prompts": batch.prompts, "completions": completions, "completion_ids": batch.ids}
        named = {*self.columns, *self.optional}
        there = {name for row in batch.meta for name in row} - {"prompt", *GIVEN}
        wanted = there if self.rest else there & named
        columns = {
            name: [row.get(name) for row in batch.meta] for name in sorted(wanted)
        }  # as `datasets`: absent is None
        return {name: value for name, value in found.items() if self.rest or name in named} | columns

    def _verl(self, row: dict[str, Any], response: str) -> dict[str, Any]:
        named = {*self.columns, *self.optional}
        found = {"solution_str": response} | {name: row[name] for name in named if name in row}
        if "ground_truth" in named and isinstance(row.get("reward_model"), Mapping):  # where verl's own rows have it
            found |= {"ground_truth": row["reward_model"].get("ground_truth")}
        return found

    def lacking(self, row: dict[str, Any]) -> str | None:
        """The column that the function needs and a row lacks, or None."""
        if self.origin == "ours":
            return None
        given = {*row, *GIVEN, "solution_str"}
        if isinstance(row.get("reward_model"), Mapping) and "ground_truth" in row["reward_model"]:
            given |= {"ground_truth"} if self.origin == "verl" else set()
        return next((name for name in self.columns if name not in given), None)


def recognise(function: Any, target: str) -> Form:
    """The form of a function, an object, or a class (which is not made).

    Raises:
        InputError: it has none of those known, or a class that needs arguments.
    """
    said = f"reward target {target!r}"
    try:
        if inspect.isclass(function):
            if not any("__call__" in vars(each) for each in function.__mro__):
                raise InputError(f"{said}: the class has no __call__; {EXPECTED}, as its __call__")
            _check_made_without_arguments(function, said)
            parameters = [*inspect.signature(function.__call__).parameters.values()]
            parameters = parameters if _is_static(function) else parameters[1:]
        else:
            parameters = [*inspect.signature(function).parameters.values()]
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{said}: its parameters cannot be read ({error}); {EXPECTED}: wrap it in a def") from None
    form = _form(parameters)
    if form is None:
        written = f"({', '.join(map(str, parameters))})"
        blind = parameters and all(each.kind in VARIABLE for each in parameters)
        hint = "; a decorator keeps the names with functools.wraps" if blind else ""
        raise InputError(f"{said}: takes {written}; {EXPECTED}{hint}")
    if asked := [name for name in form.columns if form.origin == "trl" and name in TRAINER]:
        raise InputError(
            f"{said}: asks for {asked[0]}, which only TRL's trainer has: give it a default, as {asked[0]}=None"
        )
    return form


def _form(parameters: list[inspect.Parameter]) -> Form | None:
    """The form that the parameters tell, or None."""
    named = {each.name: each for each in parameters if each.kind not in VARIABLE}
    rest = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    required = tuple(name for name, each in named.items() if each.default is inspect.Parameter.empty)
    optional = tuple(name for name in named if name not in required)
    only_positional = [name for name, each in named.items() if each.kind is inspect.Parameter.POSITIONAL_ONLY]
    for origin, mark in (("trl", "completions"), ("verl", "solution_str")):
        if mark in named:
            return None if only_positional else Form(origin, True, required, optional, rest and origin == "trl")
    if (set(OURS) <= set(named) or ("responses" in named and rest)) and not only_positional:
        return Form("ours") if set(required) <= set(OURS) else None
    places = [each.name for each in parameters if each.kind in POSITIONAL]
    spread = any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters)
    odd = any(name in OURS and OURS.index(name) != place for place, name in enumerate(places))
    fits = len(required) <= 3 and set(required) <= set(places) and places and (len(places) >= 3 or spread)
    return Form("ours", by_name=False) if fits and not odd else None


def _is_static(made: type) -> bool:
    found = next(vars(each)["__call__"] for each in made.__mro__ if "__call__" in vars(each))
    return isinstance(found, staticmethod)


def _check_made_without_arguments(made: type, said: str) -> None:
    try:
        inspect.signature(made).bind()
    except TypeError as error:
        raise InputError(
            f"{said}: the class needs arguments ({error}): give them defaults, or name an object made of it, as "
            "scorer = Scorer(...) in that file"
        ) from None


def is_plain(function: Any) -> bool:
    """Whether it is neither a class nor a coroutine, so that calling it gives its scores."""
    called = function.func if isinstance(function, functools.partial) else function
    return not inspect.isclass(function) and not any(
        inspect.iscoroutinefunction(each) for each in (called, type(called).__call__)
    )


def caller(function: Callable, form: Form, target: str, inside: Callable[[], Any]) -> Callable[[Batch], list[float]]:
    """A function of a batch that gives one finite number a response, whatever form and kind `function` has.

    `inside`: the context it is called in. Coroutines of all steps run in one event loop, one after another the steps, all
    rows of a step at once. It gets copies of the rows, so it may change them.

    Raises (when called):
        RunError: it raised, or returned no number for a row; with the reward, the row and what it returned.
    """
    import asyncio  # a tenth of a second, and most functions are none

    runner = asyncio.Runner()

    def score(batch: Batch) -> list[float]:
        meta = [copy.deepcopy(row) for row in batch.meta]
        own = Batch([row.get("prompt") for row in meta], list(batch.responses), meta, batch.ids)
        for place, row in enumerate(batch.meta):
            if (column := form.lacking(row)) is not None:
                raise RunError(
                    f"reward {target}: row {place} of this batch has no column {column!r}, which it asks for"
                )
        try:
            with inside():
                values = _awaited(form.call(function, own), runner)
        except (Exception, SystemExit) as error:
            raise RunError(f"reward {target}: {type(error).__name__}: {_reason(error)}") from error
        return as_numbers(values, batch, target, unfold=form.origin == "verl")

    return score


def _awaited(values: Any, runner: Any) -> Any:
    """The result of a coroutine, or of a list in which some are."""
    many = isinstance(values, list) and any(map(inspect.isawaitable, values))
    if not many and not inspect.isawaitable(values):
        return values

    import asyncio

    async def settle() -> Any:
        if not many:
            return await values
        waiting = [index for index, value in enumerate(values) if inspect.isawaitable(value)]
        for index, value in zip(waiting, await asyncio.gather(*(values[i] for i in waiting)), strict=True):
            values[index] = value
        return values

    return runner.run(settle())


def _reason(error: BaseException) -> str:
    """What was raised, and in which line."""
    said = " ".join(str(error).split()) or "no message"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{said} ({last.filename.rsplit('/', 1)[-1]}, line {last.lineno})"


def as_numbers(values: Any, batch: Batch, target: str, unfold: bool = False) -> list[float]:
    """One float a response.

    Args:
        unfold: take {"score": x} for x, as verl does.

    Raises:
        RunError: another number of values than responses, or one that is no finite number; with the row.
    """
    wanted = len(batch.responses)
    given = type(values).__name__
    if (
        not isinstance(values, Iterable)
        or isinstance(values, str | bytes | Mapping | set | frozenset)
        or _is_single(values)
    ):
        raise RunError(f"reward {target}: it returned {values!r:.80} ({given}); expected a list of {wanted} numbers")
    listed = list(values)
    if len(listed) != wanted:
        raise RunError(f"reward {target}: {len(listed)} scores for {wanted} responses; expected one a response")
    found = []
    for place, value in zip(count(), listed, strict=False):
        value = value.get("score", value) if unfold and isinstance(value, Mapping) else value
        number = _number(value)
        if number is None:
            row, response = batch.meta[place], batch.responses[place]
            raise RunError(
                f"reward {target}: score {value!r:.80} for response {response!r:.200} (row {place} of this batch, prompt "
                f"{row.get('prompt')!r:.120}); expected a finite number"
            )
        found.append(number)
    return found


def _is_single(values: Any) -> bool:
    return getattr(values, "ndim", 1) == 0


def _number(value: Any) -> float | None:
    """A finite float that float32 holds, of a Python, numpy or torch number; None of anything else."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= 3.4028234663852886e38 else None  # false of NaN too
