"""Hydra's multirun: a run name for each job, and how the sweep is told while it runs and at its end."""

from __future__ import annotations

import os
import re
import shlex
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError

LONGEST = 120  # bytes of a job's folder; a longer one is called by the job's number


_taken: dict[Path, list[str]] = {}  # {folder: overrides} of the jobs of this process


def job_name(run_name: str, arguments: Sequence[str], job: Sequence[str], params: Sequence[str], number: int) -> str:
    """The run name of one job: `run_name/<what is swept>`, or `run_name` itself where the user made it differ by job.

    Args:
        run_name: as composed for this job.
        arguments: the overrides of the whole sweep, as typed.
        job: the overrides of this job.
        params: keys that `hydra.sweeper.params` sweeps.
        number: of the job, from 0.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    typed = OverridesParser.create().parse_overrides([a for a in arguments if "=" in a and not a.startswith("-")])
    swept = {override.get_key_element() for override in typed if override.is_sweep_override()} | set(params)
    own = [override for override in typed if override.key_or_group == "run_name"]
    if "run_name" in swept or any("${" in override.input_line for override in own):
        return run_name
    parts = [_plain(override) for override in job if override.partition("=")[0] in swept]
    if not parts:
        return run_name
    name = re.sub(r"[^\w\-.=,]", "-", unicodedata.normalize("NFC", ",".join(part.lstrip("+~") for part in parts)))
    return f"{run_name}/{name if len(os.fsencode(name)) <= LONGEST else number}"


def _plain(word: str) -> str:
    """An override without the quotes around its value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString
    from hydra.errors import HydraException

    try:
        value = OverridesParser.create().parse_override(word)._value
    except HydraException:  # of a sweeper that writes what Hydra's grammar does not
        return word
    return f"{word.partition('=')[0]}={value.text}" if isinstance(value, QuotedString) else word


def begin_job(composed: Any, arguments: Sequence[str]) -> None:
    """In a multirun: give the job its own run name, and say which job begins. Elsewhere: nothing.

    Raises:
        InputError: `run_name` is not set.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return
    if OmegaConf.is_missing(composed, "run_name"):
        raise InputError("run_name is not set: add run_name=...; the jobs of a sweep go to run_name/<what is swept>")
    job, number = list(hydra.overrides.task), hydra.job.num
    params = list(OmegaConf.select(hydra, "sweeper.params") or {})
    name = job_name(composed.run_name, arguments, job, params, number)
    if _taken.setdefault(Path(composed.runs_dir, name).absolute(), job) != job:
        name = f"{name},{number}"  # the values of both differ in what a folder's name cannot hold
    composed.run_name = name
    print(f"\njob {number}: {Path(composed.runs_dir) / composed.run_name}", flush=True)


def finish(runs: Sequence[Path], failed: int) -> None:
    """The table and the page of a sweep whose jobs have ended; of one that waits in a queue, how to get them later.

    Args:
        runs: folders of the jobs that did not fail.
        failed: how many did.
    """
    from alignkit.report import compare

    found, folder = compare.find_runs(runs), compare.common_folder(runs)
    if any(compare.status(run) != "done" for run in found):
        return print(
            f"\n{len(runs)} of {len(runs) + failed} jobs of the sweep are queued; later: alignkit compare {shlex.quote(str(folder))}"
        )
    print(f"\n{len(runs)} of {len(runs) + failed} jobs of the sweep are done")
    compare.show(found, compare.free_page(folder))
