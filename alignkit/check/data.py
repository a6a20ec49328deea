"""`alignkit check data`: every row of a stage's data set read as the stage reads it, its faults counted and shown.

Rows go through in chunks, so a million take the memory of a few. What is kept of each is its hash and its lengths; of
held-out sets, which training rows are compared with, also the shingles of every prompt (about four bytes a letter).
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from alignkit.check.lints import LINTS, REFUSED, Findings, HeldOut, RowLints
from alignkit.check.token_lints import TokenLints, template_notes
from alignkit.config.messages import stray_keys
from alignkit.config.stages import STAGES
from alignkit.core import terminal
from alignkit.core.errors import InputError
from alignkit.data import sources
from alignkit.data.chat import date_to_tell
from alignkit.data.dataset import Data, Kind
from alignkit.data.files import first_line
from alignkit.data.tokens import of_model
from alignkit.models.source import resolve_model
from alignkit.tracking.console import counting

Row = dict[str, Any]
Tick = Callable[[str, int, int, str], None]

STAGE_OF = {"sft": "sft", "preference": "reward", "prompt": "ppo"}  # kind of row -> the stage that stands for it
CHUNK = 2000  # rows looked at together
LENGTH_BIAS, FEW = 0.15, 50  # how far off one half, and of how many pairs, a share of longer chosen answers is told


@dataclass
class Checked:
    """What one data set came to."""

    name: str  # the key it was given as: data, eval_data, against
    path: str
    rows: int = 0  # that a stage would read
    findings: Findings = field(default_factory=Findings)
    notes: list[str] = field(default_factory=list)
    unit: str = "characters"  # of the lengths
    lengths: dict[str, Any] = field(default_factory=dict)  # {field: array of lengths}

    @property
    def chosen_longer(self) -> float | None:
        """Of the pairs that differ in length, the share whose chosen answer is the longer one."""
        if "chosen" not in self.lengths:
            return None
        chosen, rejected = (np.asarray(self.lengths[name]) for name in ("chosen", "rejected"))
        differ = chosen != rejected
        return float((chosen > rejected)[differ].mean()) if differ.any() else None

    def summary(self) -> dict[str, Any]:
        """The numbers of this set, plain enough for JSON."""
        shares = np.array([0, 0.5, 0.95, 1])
        tables = {}
        for name, values in self.lengths.items():
            low, middle, high, most = (int(v) for v in np.quantile(values, shares, method="lower"))
            mean = round(float(np.mean(values)), 2)
            tables[name] = {"mean": mean, "min": low, "median": middle, "p95": high, "max": most}
        return {
            "path": self.path,
            "rows": self.rows,
            "refused": self.findings.refused,
            "findings": {
                lint: {"count": found.count, "first": found.shown, "rows": found.listed}
                for lint, found in self.findings.items()
            },
            "lengths": {"unit": self.unit, **tables},
            "chosen_longer": self.chosen_longer,
            "notes": self.notes,
        }


def check_set(
    name: str,
    data: Data,
    kind: Kind,
    *,
    against: HeldOut | None = None,
    into: HeldOut | None = None,
    token_lints: TokenLints | None = None,
    tick: Tick = lambda *_: None,
) -> Checked:
    """One data set through every lint.

    Args:
        against: what its prompts are compared with.
        into: takes its prompts, for other sets to be compared with.
        token_lints: fresh ones, where there is a tokenizer.
        tick: told (phase, rows done, rows in all or 0, unit) after every chunk.

    Raises:
        InputError: the file cannot be read at all, or has no rows.
    """
    made, row_lints, said = Checked(name, data.path), RowLints(kind), Counter[str]()
    for chunk in _chunks(made, data, kind, said, tick):
        row_lints.check(chunk, made.findings)
        if token_lints is not None:
            token_lints.check(chunk, made.findings)
        if against is not None:
            against.check(chunk, made.findings)
        if into is not None:
            into.add(chunk)
    row_lints.finish(made.findings)
    made.lengths = row_lints.lengths
    if token_lints is not None:
        made.lengths, made.unit = token_lints.lengths, "tokens"
    if not made.rows and not made.findings:
        raise InputError(f"data.path={data.path}: no rows: expected at least one {kind} row")
    made.notes = [text.format(f"{count:,}") for text, count in said.items()]
    longer = made.chosen_longer
    if longer is not None and made.rows >= FEW and abs(longer - 0.5) >= LENGTH_BIAS:
        word = "longer" if longer > 0.5 else "shorter"
        made.notes.append(
            f"the chosen answer is the {word} one in {max(longer, 1 - longer):.0%} of the pairs: a reward model may learn length"
        )
    return made


def _chunks(made: Checked, data: Data, kind: Kind, said: Counter, tick: Tick) -> Iterator[list[tuple[str, Row]]]:
    """Validated rows with where each stands; the others go to the findings."""
    total, chunk, done = _size(data), [], 0
    if total and data.limit:
        total = min(total, data.limit)
    tick(made.name, 0, total, "row")
    for where, row in data.stream(kind, said):
        done += 1
        if isinstance(row, InputError):
            made.findings.refuse(where, row)
        else:
            made.rows += 1
            chunk.append((where, row))
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
            tick(made.name, done, max(total, done) if total else 0, "row")
    if chunk:
        yield chunk
    tick(made.name, done, done, "row")


def _size(data: Data) -> int:
    """About how many rows a data set has, for the time left; 0 where that takes reading it."""
    given = Path(data.path).expanduser()
    if data.path.startswith("demo:") or (given.is_dir() and sources.is_saved(given)):
        return 0
    return sum(map(_file_size, sources.shards(data.path, data.split, Counter())))


def _file_size(path: Path) -> int:
    if path.suffix.lower() in (".jsonl", ".ndjson", ".csv", ".tsv"):
        with contextlib.suppress(OSError), path.open("rb") as file:  # told when it is read
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    if path.suffix.lower() == ".parquet":
        import pyarrow
        import pyarrow.parquet

        with contextlib.suppress(pyarrow.ArrowException, OSError):  # told when it is read
            return pyarrow.parquet.read_metadata(path).num_rows
    return 0


# --------------------------------------------------------------------------------------------------------- a stage


@dataclass
class Report:
    """What `alignkit check data` says."""

    stage: str
    kind: str
    sets: list[Checked]
    tokenizer: str | None
    max_length: int  # tokens
    notes: list[str] = field(default_factory=list)  # of the tokenizer and its template

    @property
    def refused(self) -> int:
        return sum(made.findings.refused for made in self.sets)

    @property
    def faults(self) -> int:
        return sum(found.count for made in self.sets for found in made.findings.values())

    def summary(self) -> dict[str, Any]:
        """The whole report, plain enough for JSON."""
        return {
            "alignkit_check": "data",
            "stage": self.stage,
            "kind": self.kind,
            "verdict": "refused" if self.refused else "faults" if self.faults else "clean",
            "tokenizer": self.tokenizer,
            "max_length": self.max_length,
            "notes": self.notes,
            "sets": {made.name: made.summary() for made in self.sets},
        }


def check_stage(composed: Any, stage: str, kind: Kind, against: list[str], tick: Tick) -> Report:
    """The data of one stage: first what is held out, then the rows it trains on, compared with those.

    Args:
        composed: the stage's config as Hydra composed it; only data, model and lengths need to be set.
        against: further held-out files, of prompts.
    """
    if OmegaConf.is_missing(composed.data, "path"):
        raise InputError("data.path is not set: add data.path=... to the command")
    data = OmegaConf.to_object(composed.data)
    key = "max_length" if "max_length" in composed else "max_prompt_length"
    tokenizer, notes = _tokenizer(composed), []
    if tokenizer is not None:
        notes = template_notes(tokenizer)

    def fresh() -> TokenLints | None:
        return None if tokenizer is None else TokenLints(tokenizer, composed[key], key)

    data.check()
    held_out, sets = HeldOut(), []
    for path in against:
        sets.append(check_set(f"against {path}", Data(path=path), "prompt", into=held_out, tick=tick))
    if composed.get("eval_data", {}).get("path"):
        held = OmegaConf.to_object(composed.eval_data)
        sets.append(check_set("eval_data", held, kind, into=held_out, token_lints=fresh(), tick=tick))
    sets.insert(0, check_set("data", data, kind, against=held_out, token_lints=fresh(), tick=tick))
    name = None if tokenizer is None else composed.model.path
    return Report(stage, kind, sets, name, composed[key], notes)


def _tokenizer(composed: Any) -> Any:
    """The tokenizer the stage would load; None where no model is given."""
    if OmegaConf.is_missing(composed.model, "path") or not composed.model.path:
        return None
    source, model = resolve_model(composed.model.path), OmegaConf.to_object(composed.model)
    if Path(source.tokenizer).is_dir():
        model.template_date = date_to_tell([Path(source.tokenizer)], model.chat_template, model.template_date, None)
    return of_model(source, model, light=True)


def write_json(report: Report, path: Path) -> None:
    """The report as JSON; in place of an earlier report, never of another file.

    Raises:
        InputError: the file exists and is no report.
    """
    if path.exists() and not is_report(path):
        raise InputError(f"--json {path}: exists and is no report of `alignkit check`: name another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report.summary(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--json {path}: cannot be written: {first_line(error)}: name another file") from error


def is_report(path: Path) -> bool:
    """True where a file is a report that `write_json` wrote."""
    try:
        return path.is_file() and path.open("rb").read(20).startswith(b'{\n "alignkit_check"')
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------- the command

USAGE = """usage: alignkit check data STAGE|kind=KIND [key=value ...] [--against FILE] [--json FILE]

Reads the rows of a stage as the stage would, from the same overrides, and says what is wrong with them.
kind=sft, kind=preference and kind=prompt stand for the stages sft, reward and ppo.

  model.path=...     also look at lengths, special tokens and the chat template
  eval_data.path=... held-out rows: their prompts must not be among the others (sft, reward)
  --against FILE     further held-out prompts; may be given several times
  --json FILE        the report for a script
  data.lint=strict   exit with 2 for any fault, not only for rows that the stage refuses

alignkit check data reward data.path=pairs.jsonl model.path=runs/mine/sft eval_data.path=held_out.jsonl
"""


def main(arguments: list[str], compose: Callable[[str, list[str]], Any]) -> int:
    """The exit code: 0, or 2 where the stage would refuse the rows.

    Args:
        compose: (stage, overrides) to its config.
    """
    from rich.console import Console

    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    stage, options = _parse(arguments)
    composed = compose(stage, options["overrides"])
    if stray := stray_keys(composed):
        raise InputError(f"no config key {stray[0]!r} (alignkit {stage} --cfg job lists them all)")
    target = Path(options["json"]) if options["json"] else None
    with counting("check data") as tick:
        report = check_stage(composed, stage, STAGES[stage].row_kind, options["against"], tick)
    if target:
        write_json(report, target)
    screen: Any = terminal.Screen(sys.stdout)
    print_report(report, Console(width=None if sys.stdout.isatty() else 140, file=screen))
    if report.refused and composed.data.faulty == "refuse":
        fix = "mend or remove those above, or set data.faulty=leave_out"
        raise InputError(f"{report.refused:,} rows would be refused: {fix}")
    if report.faults and composed.data.lint == "strict":
        raise InputError(f"{report.faults:,} findings, and data.lint=strict takes none")
    return 0


def _parse(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """(stage, {"overrides", "against", "json"})."""
    options: dict[str, Any] = {"overrides": [], "against": [], "json": None}
    stages, words = [], iter(arguments)
    for word in words:
        key, _, value = word.partition("=")
        if key in ("--json", "--against"):
            value = value or next(words, "")
            if not value:
                raise InputError(f"{key}: no file given: write {key} FILE")
            options["json"] = value if key == "--json" else options["json"]
            options["against"] += [value] if key == "--against" else []
        elif key == "kind":
            if value not in STAGE_OF:
                raise InputError(f"kind={value}: expected one of {', '.join(STAGE_OF)}")
            stages.append(STAGE_OF[value])
        elif word.startswith("-"):
            raise InputError(f"no option {word}: expected --json FILE or --against FILE")
        elif "=" in word or word.startswith("~"):
            options["overrides"].append(word)
        else:
            stages.append(word)
    known = [name for name in STAGES if name != "pipeline"]
    if len(stages) != 1 or stages[0] not in known:
        raise InputError(
            f"check data: {', '.join(stages) or 'no stage'} given, expected one of {', '.join(known)}, "
            "or kind=sft, kind=preference, kind=prompt"
        )
    return stages[0], options


# -------------------------------------------------------------------------------------------------- for a person


def print_report(report: Report, console: Any) -> None:
    """Tables of rows, faults and lengths, with the first ten of each fault."""
    from rich.markup import escape

    for made in report.sets:
        refused = f", {made.findings.refused:,} refused" if made.findings.refused else ""
        name = made.name if made.path in made.name else f"{made.name} {made.path}"
        console.print(f"[bold]{escape(name)}[/]: {made.rows:,} rows{refused}", highlight=False)
        if made.findings:
            console.print(_findings_table(made))
        if made.lengths:
            console.print(_lengths_table(made))
        for lint in [lint for lint in LINTS if lint in made.findings]:
            console.print(f"[bold]{lint}[/]")
            for line in made.findings[lint].shown:
                console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
            if (more := made.findings[lint].count - len(made.findings[lint].shown)) > 0:
                console.print(f"  and {more:,} more")
        for note in made.notes:
            console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
        console.print()
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{report.faults:,} findings" if report.faults else "no faults found")


def _findings_table(made: Checked) -> Any:
    from rich import box
    from rich.table import Table

    table = Table("lint", "rows", "share", "a stage would", "what it is", box=box.SIMPLE, header_style="bold")
    rows = made.rows + made.findings.refused
    for lint in [lint for lint in LINTS if lint in made.findings]:
        count = made.findings[lint].count
        does = (
            "refuse it"
            if lint in REFUSED or lint == "template"
            else "leave it out"
            if lint == "too_long"
            else "train on it"
        )
        table.add_row(lint, f"{count:,}", f"{count / rows:.2%}", does, LINTS[lint])
    return table


def _lengths_table(made: Checked) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(made.unit, "mean", "min", "median", "95 %", "longest", box=box.SIMPLE, header_style="bold")
    for name, values in made.summary()["lengths"].items():
        if name != "unit":
            table.add_row(name, f"{values['mean']:.1f}", *(f"{values[k]:,}" for k in ("min", "median", "p95", "max")))
    return table
