"""report.html: one self-contained page of a run, its curves drawn by matplotlib as inline SVG."""

from __future__ import annotations

import html
import io
import math
import re
from pathlib import Path
from typing import Any

from alignkit.core.io import write_atomic
from alignkit.report.summary import (
    COLORS,
    NAMES,
    POLICIES,
    REWARD_LOSS,
    SFT_LOSS,
    STAGES,
    RunFolder,
    between,
    fixed,
    key_result,
    number,
    score_line,
    signed,
    summarize,
    verdict,
    visible,
)
from alignkit.tracking.console import clock, short


def write_html(run: Path) -> Path:
    """report.html: one file, no script, nothing loaded from elsewhere."""
    folder = RunFolder(Path(run))
    path = folder.path / "report.html"
    write_atomic(path, render_html(folder))
    return path


def render_html(folder: RunFolder) -> str:
    name = escape(folder.path.name)
    body = "\n".join(
        [
            f"<h1>{name}</h1>",
            f"<p class='lead'>{escape(verdict(folder))}</p>",
            _cards(folder),
            section("Gold score on held-out prompts", _gold_html(folder)),
            section("What PPO did", figures(_ppo_charts(folder), "ppo")),
            section("Losses", figures(_loss_charts(folder), "sft, reward or ppo")),
            section("Twelve held-out prompts, not picked", _answers_html(folder)),
            section("Stages", _stages_html(folder)),
            section("Made with", _made_with(folder)),
        ]
    )
    return page(name, body)


def page(title: str, body: str) -> str:
    """A whole HTML page with its style; `title` is escaped."""
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{title} · alignkit</title>\n<style>{CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
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


def escape(text: Any) -> str:
    return html.escape(visible(text, 4000))


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>"


def _none(what: str = "not run") -> str:
    return f"<p class='none'>{escape(what)}</p>"


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
        f"<div class='card'><span>{escape(title)}</span><b>{escape(value)}</b><span>{escape(note)}</span></div>"
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
        rows.append(f"<tr><td>{_dot(name)}{escape(NAMES.get(name, name))}</td>{cells}</tr>")
    table = f"<div class='wide'><table><thead>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    return table + figures([_gold_chart(folder)], "evaluate")


def _dot(name: str) -> str:
    return f"<span class='dot {name}'></span>" if name in POLICIES else ""


def _answers_html(folder: RunFolder) -> str:
    dialogues = folder.dialogues(12)
    if not dialogues:
        return _none()
    rows = []
    for dialogue in dialogues:
        cells = [f"<td>{escape(dialogue['prompt'])}</td>"]
        for policy in ("sft", "ppo"):
            row = dialogue.get(policy)
            text = f"{escape(row.get('response', ''))}<small>{escape(score_line(row))}</small>" if row else "–"
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
            f"<tr><td>{stage}</td><td>{escape(manifest.get('status') or 'not run')}</td><td class='n'>{time}</td>"
            f"<td>{escape(result)}</td><td>{links or '–'}</td></tr>"
        )
    head = "<tr><th>stage</th><th>status</th><th class='n'>time</th><th>result</th><th>files</th></tr>"
    return f"<div class='wide'><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"


def _made_with(folder: RunFolder) -> str:
    summary = summarize(folder.path)
    versions = " · ".join(f"{name} {version}" for name, version in (summary["versions"] or {}).items())
    facts = [("model", summary["model"]), ("seed", summary["seed"]), ("versions", versions or None)]
    rows = (f"<tr><th>{key}</th><td>{'–' if value is None else escape(value)}</td></tr>" for key, value in facts)
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


# ---------------------------------------------------------------------------------------------- charts

Chart = tuple[str, str]  # (svg, caption)


def figures(charts: list[Chart | None], stage: str) -> str:
    drawn = [chart for chart in charts if chart]
    if not drawn:
        return _none(f"not run: no numbers from {stage}")
    figures = (f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" for svg, caption in drawn)
    return f"<div class='figures'>{''.join(figures)}</div>"


def draw(title: str, paint: Any, x: str = "", y: str = "", height: float = 3.1) -> str:
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

    return draw(title, paint, x="step", y=y), caption


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

    svg = draw("Reward against KL", paint, x="KL to the reference, nats a response", y="reward-model score")
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
    return draw(title, paint, height=0.9 + 0.5 * len(drawn)), "Dots are means, bars 95% bootstrap intervals."
