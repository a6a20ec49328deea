"""What a pipeline run came to: summary.json, a table in the terminal, and report.html.

Pure functions over a run folder `runs/<name>/`. They read only files that the stages wrote, and never guess: what
is not there is None in the summary, "–" in the tables and "not run" in the report.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from alignkit.core.io import plain, read_jsonl, write_atomic
from alignkit.core.terminal import shown
from alignkit.tracking.console import clock, short

STAGES = ("sft", "sample", "reward", "ppo", "evaluate")
POLICIES = ("base", "sft", "ppo")
NAMES = {"base": "base", "sft": "SFT", "ppo": "PPO", "reward": "reward model"}
COLORS = {"base": "#7b8794", "sft": "#2f6fb5", "ppo": "#d1641b", "reward": "#2c8a5b"}
SFT_LOSS, REWARD_LOSS = ("policy/loss", "loss"), ("reward_model/loss", "loss")  # ours, and TRL's own name
QUICKSTART = "alignkit pipeline +experiment=quickstart"


@dataclass
class RunFolder:
    """A run folder, read once, tolerant of stages that are absent or unfinished."""

    path: Path

    def _json(self, name: str) -> dict:
        try:
            data = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}

    @cached_property
    def manifests(self) -> dict[str, dict]:
        return {stage: self._json(f"{stage}/manifest.json") for stage in STAGES}

    @cached_property
    def rows(self) -> dict[str, list[dict]]:
        """{stage: rows of metrics.jsonl}."""
        return {stage: read_jsonl(self.path / stage / "metrics.jsonl") for stage in STAGES}

    @cached_property
    def results(self) -> dict:
        return self._json("evaluate/results.json")

    def policy(self, name: str) -> dict:
        return (self.results.get("policies") or {}).get(name) or {}

    def difference(self, name: str = "ppo_minus_sft") -> dict:
        return (self.results.get("differences") or {}).get(name) or {}

    def metric(self, stage: str, *names: str) -> float | None:
        """The first of `names` that the manifest's final metrics hold."""
        metrics = self.manifests[stage].get("metrics") or {}
        return next((number(metrics[name]) for name in names if name in metrics), None)

    def series(self, stage: str, *names: str) -> list[tuple[int, float]]:
        """[(step, value)] of the first metric that a row has, by step; of a step logged twice (a resumed run) the last."""
        points = {}
        for row in self.rows[stage]:
            name = next((name for name in names if name in row), None)
            if name and "step" in row:
                points[row["step"]] = number(row[name])
        return [(step, value) for step, value in sorted(points.items()) if value is not None and math.isfinite(value)]

    def dialogues(self, count: int) -> list[dict]:
        """The first `count` held-out prompts: {"prompt": text, policy: its first answer's row, ...}. Not picked."""
        found: dict[Any, dict] = {}
        for row in read_jsonl(self.path / "evaluate" / "samples.jsonl"):
            answers = found.setdefault(row.get("prompt_index"), {"prompt": prompt_text(row.get("prompt"))})
            answers.setdefault(str(row.get("policy")), row)
        return [found[index] for index in sorted(found, key=lambda i: (i is None, i))[:count]]


def number(value: Any) -> float | None:
    """A float, read back from JSON where NaN is a string; None where there is no number."""
    if value is None or isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def prompt_text(prompt: Any) -> str:
    """A prompt as a person reads it: one message without its role, a conversation with them."""
    if not isinstance(prompt, list):
        return str(prompt or "")
    turns = [turn if isinstance(turn, dict) else {"content": turn} for turn in prompt]
    if len(turns) == 1:
        return str(turns[0].get("content", ""))
    return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in turns)


def visible(text: Any, limit: int = 600) -> str:
    """Model text that is safe to print: control characters as escapes, one line break at a time, cut at `limit`."""
    text = shown(re.sub(r"\s*\n\s*", "\n", str(text).strip()))
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


# ---------------------------------------------------------------------------------------------- summary.json


def summarize(run: Path) -> dict:
    """The run in one object. What no stage wrote is None."""
    folder = RunFolder(Path(run))
    manifests = [manifest for manifest in folder.manifests.values() if manifest]

    def first(key: str) -> Any:
        return next((manifest[key] for manifest in manifests if manifest.get(key) is not None), None)

    def interval(entry: dict) -> dict:
        return {key: number(entry.get(key)) for key in ("mean", "ci_low", "ci_high")}

    base_model = first("base_model")
    versions: dict[str, str] = {}
    for manifest in manifests:
        versions.update(manifest.get("versions") or {})
    others = [name for name in folder.results.get("policies") or {} if name not in POLICIES]
    differences = {"ppo_minus_sft": {}, **(folder.results.get("differences") or {})}
    summary = {
        "stages": {
            stage: {"seconds": number(manifest.get("seconds")), "status": manifest.get("status")}
            for stage, manifest in folder.manifests.items()
        },
        "gold": {
            "reward": folder.results.get("reward"),
            "prompts": folder.results.get("prompts"),
            **{name: interval(folder.policy(name)) for name in (*POLICIES, *others)},
            **{name: interval(entry or {}) for name, entry in differences.items()},
        },
        "kl": {"per_response": number(folder.policy("ppo").get("kl"))},
        "reward_model": {
            "accuracy": folder.metric("reward", "eval_accuracy"),
            "p_value": folder.metric("reward", "eval_accuracy_p"),
            "pairs": folder.metric("reward", "eval_pairs", "eval_accuracy_pairs", "pairs"),
        },
        "seed": first("seed"),
        "model": base_model.get("path") if isinstance(base_model, dict) else base_model,
        "versions": versions or None,
    }
    return plain(summary)


def write_summary(run: Path) -> Path:
    """summary.json: the whole of it or the old one."""
    path = Path(run) / "summary.json"
    write_atomic(path, json.dumps(summarize(run), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


# ---------------------------------------------------------------------------------------------- words for results


def signed(value: Any) -> str:
    value = number(value)
    return "–" if value is None else f"{value:+.3f}"


def fixed(value: Any) -> str:
    value = number(value)
    return "–" if value is None else f"{value:.3f}"


def between(entry: dict, form: Any = fixed) -> str:
    """[low, high], or – where there is none."""
    low, high = entry.get("ci_low"), entry.get("ci_high")
    return "–" if low is None or high is None else f"[{form(low)}, {form(high)}]"


def key_result(folder: RunFolder, stage: str) -> str:
    """The one thing to know about a stage, in a few words."""
    if stage == "reward":
        return _pair_accuracy(folder)
    if stage == "sample":
        pairs, prompts = folder.metric(stage, "pairs"), folder.metric(stage, "prompts")
        made = "" if pairs is None else f"{pairs:,.0f} preference pairs"
        return made + (f" from {prompts:,.0f} prompts" if made and prompts else "")
    if stage == "ppo":
        scores, kls = folder.series("ppo", "objective/score"), folder.series("ppo", "objective/kl")
        if not scores:
            return ""
        moved = f"score {short(scores[0][1])} → {short(scores[-1][1])} in {len(scores)} steps"
        return moved + (f", KL {short(kls[-1][1])}" if kls else "")
    if stage == "evaluate":
        difference = folder.difference()
        judge = f"{folder.results.get('reward')}: " if folder.results.get("reward") else ""
        return f"{judge}PPO − SFT {signed(difference.get('mean'))} {between(difference, signed)}" if difference else ""
    held_out = folder.metric(stage, "eval_loss")
    if held_out is not None:
        return f"held-out loss {short(held_out)}"
    losses = folder.series(stage, *SFT_LOSS)
    return f"loss {short(losses[0][1])} → {short(losses[-1][1])}" if losses else ""


def _pair_accuracy(folder: RunFolder) -> str:
    model = summarize(folder.path)["reward_model"]
    if model["accuracy"] is None:
        return ""
    notes = []
    if model["pairs"] is not None:
        notes.append(f"{model['pairs']:,.0f} pairs")
    if model["p_value"] is not None:
        notes.append(f"p {short(number(model['p_value']))}" if model["p_value"] else "p < 1e-300")
    return f"held-out pair accuracy {model['accuracy']:.3f}" + (f" ({', '.join(notes)})" if notes else "")


def verdict(folder: RunFolder) -> str:
    """The finding in one sentence; it says so when the interval holds zero."""
    difference = folder.difference()
    low, high = number(difference.get("ci_low")), number(difference.get("ci_high"))
    mean = signed(difference.get("mean"))
    if low is None or high is None:
        return "No comparison of PPO with SFT: the evaluate stage has not finished."
    count = folder.results.get("prompts")
    where = f"on {count} held-out prompts" if count else "on held-out prompts"
    score = f"the gold score ({folder.results['reward']})" if folder.results.get("reward") else "the gold score"
    interval = f"95% interval {between(difference, signed)}"
    if low > 0:
        return f"PPO raised {score} by {mean} over SFT {where}, {interval}."
    if high < 0:
        return f"PPO lowered {score} by {mean} against SFT {where}, {interval}."
    return f"PPO did not change {score} measurably {where}: {mean} over SFT, {interval} includes 0."


def default_next_commands(run: Path) -> list[str]:
    """`command  # what it is for`, ready to paste."""
    steps = len(RunFolder(Path(run)).series("ppo", "objective/score"))
    data = "sft.data.path=<answers.jsonl> sample.data.path=<prompts.jsonl> ppo.data.path=<prompts.jsonl>"
    commands = [
        f"{QUICKSTART} run_name=mine model.path=<hub id or folder>  # your own model",
        f"{QUICKSTART} run_name=own-data {data} evaluate.data.path=<held-out.jsonl>  # your own data",
        f"{QUICKSTART} run_name=longer ppo.steps={4 * steps or 100}  # more steps",
    ]
    if (Path(__file__).parents[1] / "launch" / "slurm.py").exists():
        commands.append(f"{QUICKSTART} run_name=cluster launcher=slurm  # the same on a Slurm cluster")
    return commands


PLACES = {
    "report.html": "curves, samples, times",
    "summary.json": "these numbers",
    "sft/model": "the SFT policy",
    "reward/model": "the reward model",
    "reward/report.html": "its report card",
    "ppo/model": "the PPO policy",
    "ppo/metrics.jsonl": "one object a step",
    "evaluate/samples.jsonl": "every held-out answer",
}


# ---------------------------------------------------------------------------------------------- the terminal


def print_summary(run: Path, console: Any = None, next_commands: Sequence[str] | None = None) -> None:
    """Stages, gold scores, four prompts with both answers, where everything lies, how to go on."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    folder = RunFolder(Path(run))

    def heading(text: str) -> None:
        console.print()
        console.print(Text(text, style="bold"))

    console.print()
    console.rule(Text(folder.path.name, style="bold"))
    console.print(_stage_table(folder))
    if folder.results:
        heading("Gold score")
        console.print(_gold_table(folder))
    console.print(Text(verdict(folder)), soft_wrap=False)
    dialogues = folder.dialogues(4)
    if dialogues:
        heading("The first four held-out prompts (not picked)")
        console.print(_answers_table(dialogues))
    heading("Where everything lies")
    console.print(Text(f"  {folder.path}/"), soft_wrap=True)
    for name, what in PLACES.items():
        if (folder.path / name).exists():
            console.print(Text(f"    {name:<24}").append(what, style="dim"))
    heading("Go on from here")
    for line in default_next_commands(run) if next_commands is None else next_commands:
        command, _, what = line.partition("  # ")
        if what:
            console.print(Text(f"  # {what}", style="dim"), soft_wrap=True)
        console.print(Text(f"  {command}", style="cyan"), soft_wrap=True)  # never broken: it is there to be copied
    console.print()


def _stage_table(folder: RunFolder) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("result")
    total = 0.0
    for stage in STAGES:
        manifest = folder.manifests[stage]
        status, seconds = manifest.get("status") or "not run", number(manifest.get("seconds"))
        style = {"done": "green", "failed": "red"}.get(status, "dim")
        if (folder.path / stage).is_symlink():  # made in another run, and its time spent there
            status, seconds = "shared", None
        total += seconds or 0.0
        time = "–" if seconds is None else clock(seconds)
        table.add_row(stage, Text(status, style=style), time, Text(key_result(folder, stage) or "–"))
    table.add_section()
    table.add_row("all", "", clock(total), "")
    return table


def _gold_table(folder: RunFolder) -> Any:
    from rich import box
    from rich.table import Table

    reference = folder.results.get("reference")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy")
    table.add_column(f"mean {folder.results.get('reward') or 'score'}", justify="right")
    table.add_column("95% interval", justify="right")
    table.add_column(f"KL to {reference}, nats" if reference else "KL, nats", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("finished", justify="right")
    for name, entry in (folder.results.get("policies") or {}).items():
        kl, length, finished = (number(entry.get(key)) for key in ("kl", "length", "finished"))
        table.add_row(
            NAMES.get(name, name),
            fixed(entry.get("mean")),
            between(entry),
            "–" if kl is None else f"{kl:.2f}",
            "–" if length is None else f"{length:.1f}",
            "–" if finished is None else f"{finished:.0%}",
        )
    return table


def _answers_table(dialogues: list[dict]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.ROUNDED, show_lines=True, expand=True, border_style="dim")
    table.add_column("prompt", ratio=3)
    table.add_column("SFT", ratio=4)
    table.add_column("PPO", ratio=4)
    for dialogue in dialogues:
        cells = [Text(visible(dialogue["prompt"], 300))]
        for policy in ("sft", "ppo"):
            row = dialogue.get(policy)
            cell = Text(visible(row.get("response", ""), 300) if row else "–")
            if row:
                cell.append(f"\n{score_line(row)}", style="dim")
            cells.append(cell)
        table.add_row(*cells)
    return table


def score_line(row: dict) -> str:
    score = f"score {signed(row.get('score'))}"
    return score if row.get("finished", True) else f"{score}, cut at the length limit"
