"""Several runs side by side: what differs in their configs, what they came to, their learning curves.

    alignkit compare RUN… [-o PAGE.html]

RUN is the folder of a pipeline (runs/a), of one stage (runs/a/ppo), or one that holds runs (runs/sweep). The table is
printed, and PAGE with the curves is written: by default compare.html in the folder that holds the runs, or compare-2.html
where that exists.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from alignkit.core import foreign
from alignkit.core.errors import InputError, RunError
from alignkit.core.io import write_atomic
from alignkit.report.html import draw, escape, figures, page, section
from alignkit.report.summary import STAGES, RunFolder, between, fixed, number, signed
from alignkit.runs.manifests import refuse_checkpoint
from alignkit.tracking.console import clock, short

SAID_ELSEWHERE = ("run_name", "runs_dir", "dry_run", "resume", "reuse", "name")
MANY = 11  # columns of a table that a terminal still holds
COLORS = ("#d1641b", "#2f6fb5", "#2c8a5b", "#8a4fa3", "#b8860b", "#c0392b", "#16808c", "#7b8794", "#5d4037", "#9c27b0")


@dataclass
class Run:
    """One row: a pipeline's folder, or one stage of it."""

    path: Path
    stages: tuple[str, ...]  # those that exist and are compared

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.path if self.path.name not in self.stages else self.path.parent)


Column = tuple[str, Callable[[Run], str]]  # heading, cell; "–" where the run has nothing to say


def main(arguments: Sequence[str]) -> None:
    """alignkit compare RUN… [-o PAGE.html]"""
    words = list(arguments)
    target = None
    if "-o" in words:
        at = words.index("-o")
        if at + 1 == len(words):
            raise InputError("-o: expected the page to write, as in -o compare.html")
        target = Path(words[at + 1])
        del words[at : at + 2]
        if target.exists():
            raise InputError(f"-o {target}: the file exists: choose another name, or delete it")
    if unknown := [word for word in words if word.startswith("-")]:
        raise InputError(f"compare: no flag {unknown[0]}; usage: alignkit compare RUN… [-o PAGE.html]")
    runs = find_runs([Path(word) for word in words])
    show(runs, target or free_page(common_folder([run.path for run in runs])))


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs that folders are or hold, each once, in the order given.

    Raises:
        InputError: a folder that neither is a run nor holds one.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        runs = _runs_in(path)
        if not runs:
            raise InputError(f"{path}: no run there; expected runs/<name>, runs/<name>/<stage> or a folder of runs")
        for run in runs:
            found.setdefault(run.path.absolute(), run)
    return list(found.values())


def _runs_in(path: Path) -> list[Run]:
    refuse_checkpoint(path, "compare")
    if (path / "manifest.json").is_file():
        return [Run(path, (path.name,))]
    found = []
    for folder, folders, _ in os.walk(path):
        stages = tuple(stage for stage in STAGES if (Path(folder) / stage / "manifest.json").is_file())
        folders[:] = [] if stages else sorted(folders)
        if stages:
            found.append(Run(Path(folder), stages))
    return found


def show(runs: Sequence[Run], target: Path) -> None:
    """Print the table of the runs, write the page."""
    from rich.console import Console
    from rich.text import Text

    lines, marked = table(runs), marks(runs)
    console = Console(highlight=False)
    console.print()
    console.print(_on_screen([lines[0], *([mark, *line[1:]] for mark, line in zip(marked, lines[1:], strict=True))]))
    for mark, run in zip(marked, runs, strict=True):
        console.print(Text(f"  {mark}  {run.path}"), soft_wrap=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, _html(runs, marked))
    except OSError as error:
        raise RunError(f"{target} cannot be written ({error.strerror}): give another page with -o") from None
    console.print(Text(f"  curves: {target}"), soft_wrap=True)


def free_page(folder: Path) -> Path:
    """compare.html in a folder, or compare-2.html, … where a page of that name exists: none is overwritten."""
    names = (folder / ("compare.html" if n == 1 else f"compare-{n}.html") for n in count(1))
    return next(path for path in names if not path.exists())


def common_folder(paths: Sequence[Path]) -> Path:
    """The folder that holds all of the runs."""
    parents = [path.parent for path in paths]
    if any(parent.is_absolute() for parent in parents):
        parents = [parent.absolute() for parent in parents]
    return Path(os.path.commonpath(parents))


# ------------------------------------------------------------------------------------------------------- settings


def settings(run: Run) -> dict[str, str]:
    """{stage.key: value} of the configs of a run; paths inside the run itself are written from its folder on."""
    from omegaconf import OmegaConf

    found: dict[str, str] = {}
    for stage in run.stages:
        path = run.folder.path / stage / "config.yaml"
        if not path.is_file():
            continue
        config = OmegaConf.to_container(foreign.load(path))
        own = f"{config['runs_dir']}/{config['run_name']}/"
        for key, value in _flat(config):
            if key not in SAID_ELSEWHERE:
                found[f"{stage}.{key}"] = value.removeprefix(own) if isinstance(value, str) else json.dumps(value)
    return found


def _flat(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        return [pair for key, value in node.items() for pair in _flat(value, f"{prefix}{key}.")]
    return [(prefix.rstrip("."), node)]


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """{key: its value in each run} of the keys that differ; a key that differs alike in all stages is named once."""
    configs = [settings(run) for run in runs]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    table = {key: [config.get(key, "–") for config in configs] for key in keys}
    differ = {key: values for key, values in table.items() if len(set(values)) > 1}
    several = len({stage for run in runs for stage in run.stages}) > 1
    found: dict[str, list[str]] = {}
    for key, values in differ.items():
        bare = key.partition(".")[2]
        alike = [other for other in keys if other.partition(".")[2] == bare]
        once = not several or (len(alike) > 1 and all(differ.get(other) == values for other in alike))
        found[bare if once else key] = values
    return found


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its path below the folder that holds them all."""
    top = common_folder([run.path for run in runs])
    return [os.path.relpath(run.path, top) for run in runs]


def marks(runs: Sequence[Run]) -> list[str]:
    """What stands for a run where there is little room: its label, or a number where labels are long."""
    names = labels(runs)
    return names if max(map(len, names)) <= 16 else [str(number) for number in range(1, len(runs) + 1)]


# ------------------------------------------------------------------------------------------------------- results


def columns(runs: Sequence[Run]) -> list[Column]:
    """The columns in which at least one run has something to say."""
    every: list[Column] = [
        ("status", status),  # where not all is done
        ("gold, PPO", lambda run: _interval(run, "policy", "ppo", fixed)),
        ("gold, PPO − SFT", lambda run: _interval(run, "difference", "ppo_minus_sft", signed)),
        ("score", lambda run: _moved(run, "objective/score")),
        ("KL, nats", lambda run: _moved(run, "objective/kl", ends=False)),
        ("pair accuracy", _accuracy),
        ("held-out loss", lambda run: _final(run, "sft", "eval_loss")),
        ("seconds", _seconds),
    ]
    return [(name, cell) for name, cell in every if any(cell(run) not in ("–", "done") for run in runs)]


def status(run: Run) -> str:
    """What is not done; "done" where all is."""
    manifests = run.folder.manifests
    open_ones = [f"{stage} {manifests[stage].get('status')}" for stage in run.stages if not _done(run, stage)]
    return ", ".join(open_ones) or "done"


def _done(run: Run, stage: str) -> bool:
    return run.folder.manifests[stage].get("status") == "done"


def _interval(run: Run, kind: str, name: str, form: Callable[[Any], str]) -> str:
    if "evaluate" not in run.stages:
        return "–"
    entry = getattr(run.folder, kind)(name)
    return f"{form(entry['mean'])} {between(entry, form)}" if number(entry.get("mean")) is not None else "–"


def _moved(run: Run, metric: str, ends: bool = True) -> str:
    """first → last of a metric of PPO, or the last alone."""
    series = run.folder.series("ppo", metric) if "ppo" in run.stages else []
    if not series:
        return "–"
    return f"{short(series[0][1])} → {short(series[-1][1])}" if ends else short(series[-1][1])


def _final(run: Run, stage: str, metric: str) -> str:
    value = run.folder.metric(stage, metric) if stage in run.stages else None
    return "–" if value is None else short(value)


def _accuracy(run: Run) -> str:
    """Held-out pair accuracy of the reward model with its 95% interval."""
    accuracy, pairs = (
        (run.folder.metric("reward", "eval_accuracy"), run.folder.metric("reward", "eval_pairs", "eval_accuracy_pairs"))
        if "reward" in run.stages
        else (None, None)
    )
    if accuracy is None:
        return "–"
    low, high = wilson(accuracy, pairs) if pairs else (None, None)
    return f"{fixed(accuracy)} {between({'ci_low': low, 'ci_high': high})}"


def wilson(share: float, trials: float) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson 1927): it stays within 0 and 1 and holds for few trials."""
    z = 1.959964
    middle, spread = share + z * z / (2 * trials), z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    scale = 1 + z * z / trials
    return (middle - spread) / scale, (middle + spread) / scale


def _seconds(run: Run) -> str:
    """Time spent on the run's own stages; how many it has from another run."""
    shared = [stage for stage in run.stages if (run.folder.path / stage).is_symlink()]
    own = [number(run.folder.manifests[stage].get("seconds")) for stage in run.stages if stage not in shared]
    known = [value for value in own if value is not None]
    if not known and not shared:
        return "–"
    return clock(sum(known)) + (f" (+{len(shared)} shared)" if shared else "")


# ------------------------------------------------------------------------------------------------------- on screen


def table(runs: Sequence[Run]) -> list[list[str]]:
    """A line of headings and one a run: its name, the settings that differ, the results."""
    settings, results = differing(runs), columns(runs)
    lines = [["run", *settings, *(heading for heading, _ in results)]]
    for i, (run, name) in enumerate(zip(runs, labels(runs), strict=True)):
        lines.append([name, *(values[i] for values in settings.values()), *(cell(run) for _, cell in results)])
    return lines


def _on_screen(lines: list[list[str]]) -> Any:
    """A rich table; runs stand beside each other where so much differs that a line a run would not be read."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    ends = [key.rpartition(".")[2] for key in lines[0]]
    short_head = [end if ends.count(end) == 1 else key for key, end in zip(lines[0], ends, strict=True)]
    flat = len(lines[0]) <= MANY
    head, *rows = [short_head, *lines[1:]] if flat else [list(column) for column in zip(*lines, strict=True)]
    for heading, *cells in zip(head, *rows, strict=True):
        longest = max(len(word) for cell in (heading, *map(_brief, cells)) for word in cell.split() or [""])
        drawn.add_column(Text(heading), overflow="fold", min_width=min(longest, 24))  # numbers are not broken
    for row in rows:
        drawn.add_row(*(Text(_brief(cell)) for cell in row))
    return drawn


def _brief(cell: str) -> str:
    """A setting that a sampler drew, as 0.01442579748790888, in four digits; anything else as it is."""
    value = number(cell) if len(cell) > 8 else None
    return cell if value is None else f"{value:.4g}"


def _html(runs: Sequence[Run], names: list[str]) -> str:
    head, *rows = [[escape(cell) for cell in line] for line in table(runs)]
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        dot = f"<span class='dot' style='background:{COLORS[i % len(COLORS)]}'></span>"
        row[0] = dot + (row[0] if row[0] == escape(name) else f"{escape(name)}: {row[0]}")
    lines = [head, *rows] if len(head) <= MANY else [list(column) for column in zip(head, *rows, strict=True)]
    first, *rest = [f"<tr><td>{'</td><td>'.join(line)}</td></tr>" for line in lines]
    tabled = f"<div class='wide'><table><thead>{first.replace('td>', 'th>')}</thead><tbody>{''.join(rest)}</tbody></table></div>"
    charts = [
        _curves(runs, names, "Score over steps", "objective/score", "Mean score of each step's rollouts."),
        _curves(runs, names, "KL over steps", "objective/kl", "To the reference, in nats a response."),
        _against(runs, names),
    ]
    title = f"{len(runs)} runs"
    return page(title, f"<h1>{title}</h1>\n{tabled}\n{section('Learning curves of PPO', figures(charts, 'ppo'))}")


def _curves(runs: Sequence[Run], names: list[str], title: str, metric: str, caption: str) -> tuple[str, str] | None:
    """A metric of PPO over steps, one line a run."""
    return _lines([_series(run, metric) for run in runs], names, title, "step", "", caption)


def _against(runs: Sequence[Run], names: list[str]) -> tuple[str, str] | None:
    """Score against KL, one line a run: what was gained for what it cost."""
    lines = []
    for run in runs:
        kl, score = dict(_series(run, "objective/kl")), dict(_series(run, "objective/score"))
        lines.append([(kl[step], score[step]) for step in sorted(kl.keys() & score.keys())])
    caption = "One point a step: up is what the reward likes, right is what it cost."
    return _lines(lines, names, "Score against KL", "KL to the reference, nats a response", "score", caption)


def _series(run: Run, metric: str) -> list[tuple[int, float]]:
    return run.folder.series("ppo", metric) if "ppo" in run.stages else []


def _lines(
    lines: Sequence[Sequence[tuple[float, float]]], names: list[str], title: str, x: str, y: str, caption: str
) -> tuple[str, str] | None:
    if not any(lines):
        return None

    def paint(axes: Any) -> None:
        for i, (points, name) in enumerate(zip(lines, names, strict=True)):
            if points:
                style = {"marker": "o", "markersize": 3} if len(points) < 30 else {}
                axes.plot(*zip(*points, strict=True), color=COLORS[i % len(COLORS)], linewidth=1.6, label=name, **style)
        axes.margins(x=0.03, y=0.1)
        if len(names) <= len(COLORS):
            axes.legend(frameon=False, fontsize=8.5)

    return draw(title, paint, x=x, y=y), caption
