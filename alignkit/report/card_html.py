"""The report card of a reward model as a page, in the look of a run's report.html."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignkit.core.io import plain, write_atomic
from alignkit.report.html import Chart, draw, escape, figures, page, section
from alignkit.report.summary import COLORS

CHOSEN, REJECTED = COLORS["reward"], COLORS["ppo"]


def write(run_dir: Path, card: dict[str, Any]) -> None:
    """report_card.json and report.html in the folder of a reward run."""
    write_atomic(run_dir / "report_card.json", json.dumps(plain(card), indent=2, allow_nan=False) + "\n")
    write_atomic(run_dir / "report.html", render(f"{run_dir.parent.name}/{run_dir.name}", card))


def verdict(card: dict[str, Any]) -> str:
    """The card in one line."""
    accuracy = f"held-out accuracy {percent(card['accuracy'])} of {card['accuracy']['pairs']} pairs"
    return f"{accuracy}; " + ("; ".join(f"{flag}: {why}" for flag, why in card["flags"].items()) or "no flags")


def percent(entry: dict[str, Any]) -> str:
    """A rate with its interval; – where nothing was counted."""
    return "–" if entry["rate"] is None else f"{entry['rate']:.1%} [{entry['low']:.1%}, {entry['high']:.1%}]"


def render(name: str, card: dict[str, Any]) -> str:
    """The page."""
    flags = "".join(f"<li><b>{escape(flag)}</b>: {escape(why)}</li>" for flag, why in card["flags"].items())
    correlation, fit = card["length_correlation"], card["calibration"]
    r = "not defined" if correlation["r"] is None else f"{correlation['r']:.2f}"
    return page(
        escape(name),
        "".join(
            [
                f"<h1>Reward model {escape(name)}</h1>",
                f"<p class='lead'>Held-out accuracy {escape(percent(card['accuracy']))} of {card['accuracy']['pairs']} pairs; "
                "in brackets 95% intervals.</p>",
                section("Flags", f"<ul>{flags}</ul>" if flags else "<p>None.</p>"),
                section("Scores, as trained", figures([_scores(card), _lengths(card)], "reward")),
                section("Is it as sure as it is right?", figures([_reliability(card)], "reward")),
                f"<p>Calibration error {fit['ece']:.3f}; a calibrated model shows {fit['by_chance']['mean']:.3f} on so many pairs, "
                f"97.5% of the time under {fit['by_chance']['q975']:.3f}. Mean confidence minus accuracy {fit['excess']:+.3f}.</p>",
                section("Accuracy by how far the scores are apart", _rates(_margin_rows(card), "|margin|")),
                section("Accuracy by length", _rates(_length_rows(card), "pairs where")),
                f"<p>Score and length correlate by {r}, 95% [{correlation['low']:.2f}, {correlation['high']:.2f}], "
                "among answers with the same label.</p>",
                section("The same pairs, texts changed harmlessly", _variants(card)),
            ]
        ),
    )


def _margin_rows(card: dict[str, Any]) -> list[tuple[str, dict]]:
    return [(f"{row['from']:.2f} to {row['to']:.2f}", row) for row in card["by_margin"]]


def _length_rows(card: dict[str, Any]) -> list[tuple[str, dict]]:
    names = {"chosen_longer": "the chosen answer is longer", "same_length": "both are as long"}
    names |= {"rejected_longer": "the rejected answer is longer"}
    return [(names[key], entry) for key, entry in card["by_length"].items()]


def _rates(rows: list[tuple[str, dict]], what: str, extra: tuple[str, ...] = ()) -> str:
    head = "".join(f"<th class='n'>{title}</th>" for title in ("pairs", "accuracy, 95% interval", *extra))
    body = "".join(
        f"<tr><td>{escape(name)}</td><td class='n'>{entry['pairs']}</td><td class='n'>{percent(entry)}</td></tr>"
        for name, entry in rows
    )
    return f"<div class='wide'><table><thead><tr><th>{escape(what)}</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _variants(card: dict[str, Any]) -> str:
    titles = ("pairs", "same order, 95% interval", "accuracy then", "margin moves by")
    head = "".join(f"<th class='n'>{title}</th>" for title in titles)
    body = "".join(
        f"<tr><td>{escape(name)}</td><td class='n'>{entry['pairs']}</td><td class='n'>{percent(entry)}</td>"
        f"<td class='n'>{entry['accuracy']:.1%}</td><td class='n'>{entry['mean_shift']:+.3f}</td></tr>"
        for name, entry in card["variants"].items()
    )
    return f"<div class='wide'><table><thead><tr><th>change</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"


# ---------------------------------------------------------------------------------------------- charts


def _scores(card: dict[str, Any]) -> Chart:
    points = card["points"]

    def paint(axes: Any) -> None:
        both = [points["chosen"], points["rejected"]]
        axes.hist(both, bins=20, color=[CHOSEN, REJECTED], label=["chosen", "rejected"])
        axes.legend(frameon=False, fontsize=9.5)

    return draw("Scores", paint, x="score", y="answers"), "How often each score was given."


def _lengths(card: dict[str, Any]) -> Chart:
    points = card["points"]

    def paint(axes: Any) -> None:
        for side, color in (("rejected", REJECTED), ("chosen", CHOSEN)):
            axes.scatter(points[f"{side}_lengths"], points[side], s=11, alpha=0.6, color=color, label=side)
        axes.legend(frameon=False, fontsize=9.5)

    return draw("Score against length", paint, x="tokens of the answer", y="score"), "One point an answer."


def _reliability(card: dict[str, Any]) -> Chart:
    bins = card["calibration"]["bins"]

    def paint(axes: Any) -> None:
        axes.plot([0.5, 1], [0.5, 1], color="#9aa5b1", linewidth=1, linestyle="--")
        for entry in bins:
            axes.plot([entry["confidence"]] * 2, [entry["low"], entry["high"]], color=CHOSEN, linewidth=1.6, alpha=0.6)
            axes.plot([entry["confidence"]], [entry["rate"]], marker="o", markersize=5, color=CHOSEN)
        axes.set_xlim(0.48, 1.02)
        axes.set_ylim(0, 1.05)

    caption = "Dots are bins of equally many pairs, bars 95% intervals. Below the dashed line it is too sure."
    return draw("Confidence against accuracy", paint, x="confidence, sigmoid(|margin|)", y="accuracy"), caption
