"""What a pipeline run came to: summary.json, a table in the terminal, and report.html.

Pure functions over a run folder `runs/<name>/`. They read only files that the stages wrote, and never guess: what
is not there is None in the summary, "–" in the tables and "not run" in the report.
"""

from __future__ import annotations

import html
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from alignkit.log import clock, plain, read_jsonl, short, write_atomic

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
    """Model text that is safe to print: no control characters, one blank line at most, cut at `limit`."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "", str(text))
    text = re.sub(r"\s*\n\s*", "\n", text.strip())
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
    if (Path(__file__).parent / "launch" / "slurm.py").exists():
        commands.append(f"{QUICKSTART} run_name=cluster launcher=slurm  # the same on a Slurm cluster")
    return commands


PLACES = {
    "report.html": "curves, samples, times",
    "summary.json": "these numbers",
    "sft/model": "the SFT policy",
    "reward/model": "the reward model",
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
        total += seconds or 0.0
        style = {"done": "green", "failed": "red"}.get(status, "dim")
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
                cell.append(f"\n{_score_line(row)}", style="dim")
            cells.append(cell)
        table.add_row(*cells)
    return table


def _score_line(row: dict) -> str:
    score = f"score {signed(row.get('score'))}"
    return score if row.get("finished", True) else f"{score}, cut at the length limit"


# ---------------------------------------------------------------------------------------------- report.html


def write_html(run: Path) -> Path:
    """report.html: one file, no script, nothing loaded from elsewhere."""
    folder = RunFolder(Path(run))
    path = folder.path / "report.html"
    write_atomic(path, render_html(folder))
    return path


def render_html(folder: RunFolder) -> str:
    name = _escape(folder.path.name)
    body = "\n".join(
        [
            f"<h1>{name}</h1>",
            f"<p class='lead'>{_escape(verdict(folder))}</p>",
            _cards(folder),
            _section("Gold score on held-out prompts", _gold_html(folder)),
            _section("What PPO did", _figures(_ppo_charts(folder), "ppo")),
            _section("Losses", _figures(_loss_charts(folder), "sft, reward or ppo")),
            _section("Twelve held-out prompts, not picked", _answers_html(folder)),
            _section("Stages", _stages_html(folder)),
            _section("Made with", _made_with(folder)),
        ]
    )
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{name} · alignkit</title>\n<style>{CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


CSS = """
:root{color-scheme:light;--ink:#1c2430;--soft:#5b6675;--line:#e1e5ea;--base:#7b8794;--sft:#2f6fb5;--ppo:#d1641b}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;color:var(--ink);
background:#fff;max-width:68rem;margin:0 auto;padding:1.2rem}
h1{font-size:1.7rem;margin:.2rem 0}h2{font-size:1.15rem;margin:2.4rem 0 .6rem}
.lead{font-size:1.1rem;margin:.2rem 0 1.2rem;max-width:46rem}.soft,.none{color:var(--soft)}.none{font-style:italic}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.7rem}
.card{border:1px solid var(--line);border-radius:.5rem;padding:.6rem .8rem}
.card b{display:block;font-size:1.45rem;line-height:1.3;font-variant-numeric:tabular-nums}
.card span{display:block;font-size:.82rem;color:var(--soft)}
.figures{margin-top:1rem;display:grid;grid-template-columns:repeat(auto-fit,minmax(min(25rem,100%),1fr));gap:1.2rem}
figure{margin:0}figcaption{font-size:.85rem;color:var(--soft);margin-top:.1rem}
figure svg{width:100%;height:auto;display:block;max-width:34rem}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.45rem .7rem .45rem 0;border-bottom:1px solid var(--line)}
th{font-size:.82rem;font-weight:600;color:var(--soft)}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.answers td{width:37%;white-space:pre-line;overflow-wrap:anywhere}.answers td:first-child{width:26%;font-weight:600}
.answers small{display:block;color:var(--soft)}
.dot{display:inline-block;width:.6rem;height:.6rem;border-radius:50%;margin-right:.35rem}
.dot.base{background:var(--base)}.dot.sft{background:var(--sft)}.dot.ppo{background:var(--ppo)}
@media(max-width:640px){body{padding:.9rem}.answers thead{display:none}
.answers tr{display:block;border-bottom:1px solid var(--line);padding:.5rem 0}
.answers td,.answers td:first-child{display:block;width:auto;border:0;padding:.2rem 0}
.answers td[data-policy]::before{content:attr(data-policy);display:block;font-size:.8rem;font-weight:600}
.answers td[data-policy=SFT]::before{color:var(--sft)}.answers td[data-policy=PPO]::before{color:var(--ppo)}}
@media print{body{max-width:none}figure,tr{break-inside:avoid}}
"""


def _escape(text: Any) -> str:
    return html.escape(visible(text, 4000))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_escape(title)}</h2>\n{content}\n</section>"


def _none(what: str = "not run") -> str:
    return f"<p class='none'>{_escape(what)}</p>"


def _cards(folder: RunFolder) -> str:
    difference, summary = folder.difference(), summarize(folder.path)
    cards = [("PPO − SFT, gold", signed(difference.get("mean")), between(difference, signed))]
    for name in POLICIES:
        entry = folder.policy(name)
        cards.append((f"{NAMES[name]}, gold", fixed(entry.get("mean")), between(entry)))
    kl, model = number(summary["kl"]["per_response"]), summary["reward_model"]
    cards.append(("KL it cost", "–" if kl is None else f"{kl:.2f}", "nats a response"))
    p_value = "" if model["p_value"] is None else f", p {short(number(model['p_value']))}"
    cards.append(("Reward model", fixed(model["accuracy"]), f"held-out pair accuracy{p_value}"))
    cells = (
        f"<div class='card'><span>{_escape(title)}</span><b>{_escape(value)}</b><span>{_escape(note)}</span></div>"
        for title, value, note in cards
    )
    return f"<div class='cards'>{''.join(cells)}</div>"


def _gold_html(folder: RunFolder) -> str:
    policies = folder.results.get("policies") or {}
    if not policies:
        return _none()
    head = "<tr><th>policy</th>" + "".join(
        f"<th class='n'>{title}</th>" for title in ("mean", "95% interval", "KL, nats", "tokens", "finished")
    )
    rows = []
    for name, entry in policies.items():
        kl, length, finished = (number(entry.get(key)) for key in ("kl", "length", "finished"))
        values = [
            fixed(entry.get("mean")),
            between(entry),
            "–" if kl is None else f"{kl:.2f}",
            "–" if length is None else f"{length:.1f}",
            "–" if finished is None else f"{finished:.0%}",
        ]
        cells = "".join(f"<td class='n'>{value}</td>" for value in values)
        rows.append(f"<tr><td>{_dot(name)}{_escape(NAMES.get(name, name))}</td>{cells}</tr>")
    table = f"<div class='wide'><table><thead>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    return table + _figures([_gold_chart(folder)], "evaluate")


def _dot(name: str) -> str:
    return f"<span class='dot {name}'></span>" if name in POLICIES else ""


def _answers_html(folder: RunFolder) -> str:
    dialogues = folder.dialogues(12)
    if not dialogues:
        return _none()
    rows = []
    for dialogue in dialogues:
        cells = [f"<td>{_escape(dialogue['prompt'])}</td>"]
        for policy in ("sft", "ppo"):
            row = dialogue.get(policy)
            text = f"{_escape(row.get('response', ''))}<small>{_escape(_score_line(row))}</small>" if row else "–"
            cells.append(f"<td data-policy='{NAMES[policy]}'>{text}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = f"<tr><th>prompt</th><th>{_dot('sft')}SFT</th><th>{_dot('ppo')}PPO</th></tr>"
    return f"<table class='answers'><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _stages_html(folder: RunFolder) -> str:
    rows = []
    for stage in STAGES:
        manifest = folder.manifests[stage]
        seconds = number(manifest.get("seconds"))
        time = "–" if seconds is None else clock(seconds)
        links = " · ".join(
            f"<a href='{stage}/{name}'>{name}</a>"
            for name in ("config.yaml", "manifest.json", "metrics.jsonl", "samples.jsonl")
            if (folder.path / stage / name).exists()
        )
        result = key_result(folder, stage) or "–"
        rows.append(
            f"<tr><td>{stage}</td><td>{_escape(manifest.get('status') or 'not run')}</td><td class='n'>{time}</td>"
            f"<td>{_escape(result)}</td><td>{links or '–'}</td></tr>"
        )
    head = "<tr><th>stage</th><th>status</th><th class='n'>time</th><th>result</th><th>files</th></tr>"
    return f"<div class='wide'><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"


def _made_with(folder: RunFolder) -> str:
    summary = summarize(folder.path)
    versions = " · ".join(f"{name} {version}" for name, version in (summary["versions"] or {}).items())
    facts = [("model", summary["model"]), ("seed", summary["seed"]), ("versions", versions or None)]
    rows = (f"<tr><th>{key}</th><td>{'–' if value is None else _escape(value)}</td></tr>" for key, value in facts)
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


# ---------------------------------------------------------------------------------------------- charts

Chart = tuple[str, str]  # (svg, caption)


def _figures(charts: list[Chart | None], stage: str) -> str:
    drawn = [chart for chart in charts if chart]
    if not drawn:
        return _none(f"not run: no numbers from {stage}")
    figures = (f"<figure>{svg}<figcaption>{_escape(caption)}</figcaption></figure>" for svg, caption in drawn)
    return f"<div class='figures'>{''.join(figures)}</div>"


def _draw(title: str, paint: Any, x: str = "", y: str = "", height: float = 3.1) -> str:
    """One SVG: `paint(axes)` draws into it. Text stays text, so it is sharp, small and can be searched."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": title}
    style |= {"font.family": "sans-serif", "font.size": 10.5, "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#9aa5b1")
        axes.tick_params(colors="#5b6675", labelsize=9.5)
        axes.grid(color="#e9ecf0", linewidth=0.8)
        axes.set_axisbelow(True)
        paint(axes)
        axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color="#1c2430")
        axes.set_xlabel(x, color="#5b6675")
        axes.set_ylabel(y, color="#5b6675")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return svg.replace("<svg ", f"<svg role='img' aria-label='{html.escape(title, quote=True)}' ", 1)


def _over_steps(title: str, points: list[tuple[int, float]], color: str, caption: str, y: str = "") -> Chart | None:
    """A metric over steps, its value at the end written beside it; with many steps a running mean on top."""
    if not points:
        return None
    steps, values = zip(*points, strict=True)

    def paint(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if len(values) < 30:
            axes.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=3.5)
        else:
            width = max(5, len(values) // 20)
            means = [
                sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - width + 1) : i + 1])
            ]
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
            axes.plot(steps, means, color=color, linewidth=2)
        axes.margins(x=0.03, y=0.12)
        axes.annotate(
            short(values[-1]),
            (steps[-1], values[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontweight="bold",
            annotation_clip=False,
        )

    return _draw(title, paint, x="step", y=y), caption


def _reward_against_kl(folder: RunFolder) -> Chart | None:
    kls, scores = dict(folder.series("ppo", "objective/kl")), dict(folder.series("ppo", "objective/score"))
    steps = sorted(kls.keys() & scores.keys())
    if not steps:
        return None
    x, y = [kls[step] for step in steps], [scores[step] for step in steps]

    def paint(axes: Any) -> None:
        axes.plot(x, y, color="#c3cad2", linewidth=1, zorder=2)
        axes.scatter(x, y, c=range(len(steps)), cmap="plasma_r", vmin=-len(steps) * 0.25, s=24, zorder=3)
        for i in _apart(x, y):
            ends = {0: f"step {steps[0]}", len(steps) - 1: f"step {steps[-1]}"}
            bold = {"fontweight": "bold"} if i == len(steps) - 1 else {}
            text = ends.get(i, str(steps[i]))
            axes.annotate(text, (x[i], y[i]), xytext=(5, 6), textcoords="offset points", fontsize=9.5, zorder=4, **bold)
        axes.margins(x=0.1, y=0.14)

    svg = _draw("Reward against KL", paint, x="KL to the reference, nats a response", y="reward-model score")
    return svg, "One point a PPO step, pale to dark. Up is what the reward model likes, right is what it cost."


def _apart(x: list[float], y: list[float], gap: float = 0.17) -> list[int]:
    """The points to label: the last, the first and those between that lie clear of every label before them."""
    width, height = max(x) - min(x) or 1.0, max(y) - min(y) or 1.0
    chosen: list[int] = []
    for i in (len(x) - 1, *range(len(x) - 1)):
        if all(abs(x[i] - x[j]) / width > gap or abs(y[i] - y[j]) / height > gap for j in chosen):
            chosen.append(i)
    return chosen


def _ppo_charts(folder: RunFolder) -> list[Chart | None]:
    def chart(title: str, name: str, caption: str) -> Chart | None:
        return _over_steps(title, folder.series("ppo", name), COLORS["ppo"], caption)

    return [
        _reward_against_kl(folder),
        chart("Score over steps", "objective/score", "Mean reward-model score of each step's rollouts."),
        chart("Gap of sampler and trainer", "rollout/logprob_gap", "Log-probabilities of the same tokens, in nats."),
        chart("Length of responses", "rollout/length", "Tokens, the stop token included."),
    ]


def _loss_charts(folder: RunFolder) -> list[Chart | None]:
    wanted = [
        ("SFT loss", "sft", SFT_LOSS, "sft", "Cross-entropy of the answers' tokens, in nats."),
        ("Reward-model loss", "reward", REWARD_LOSS, "reward", "−log σ(chosen − rejected); guessing gives 0.693."),
        ("Policy loss", "ppo", ("policy/loss",), "ppo", "Clipped surrogate: near 0 by construction, watch for jumps."),
        ("Value loss", "ppo", ("critic/loss",), "ppo", "The critic's error on the returns."),
    ]
    return [
        _over_steps(title, folder.series(stage, *names), COLORS[color], caption)
        for title, stage, names, color, caption in wanted
    ]


def _gold_chart(folder: RunFolder) -> Chart | None:
    entries = [
        (name, number(entry.get("mean")), number(entry.get("ci_low")), number(entry.get("ci_high")))
        for name, entry in (folder.results.get("policies") or {}).items()
    ]
    drawn = [entry for entry in entries if all(value is not None and math.isfinite(value) for value in entry[1:])]
    if not drawn:
        return None

    def paint(axes: Any) -> None:
        for row, (name, mean, low, high) in enumerate(reversed(drawn)):
            color = COLORS.get(name, "#1c2430")
            axes.plot([low, high], [row, row], color=color, linewidth=3, solid_capstyle="round")
            axes.plot([mean], [row], marker="o", markersize=8, color=color)
            axes.annotate(
                f"{mean:.3f}", (mean, row), xytext=(0, 9), textcoords="offset points", ha="center", color=color
            )
        axes.set_yticks(range(len(drawn)), [NAMES.get(name, name) for name, *_ in reversed(drawn)], fontsize=10.5)
        axes.set_ylim(-0.6, len(drawn) - 0.3)
        axes.margins(x=0.08)
        axes.grid(axis="y", visible=False)

    title = f"Mean {folder.results.get('reward') or 'gold'} score"
    return _draw(title, paint, height=0.9 + 0.5 * len(drawn)), "Dots are means, bars 95% bootstrap intervals."
