"""`alignkit doctor RUN [--json]`: which known failure a PPO run shows, with the evidence and the knob to turn.

RUN is the folder of a PPO run or the one above it, runs/mine/ppo or runs/mine; a run that is going on can be read too.
Exit codes: 0 healthy, 1 something was found, 2 there is nothing to read. The rules are those of doctor_rules.py.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError
from alignkit.core.io import read_jsonl
from alignkit.report.doctor_rules import Finding, Run, Series, examine
from alignkit.runs import manifests
from alignkit.tracking.run_log import PROGRESS

# ---------------------------------------------------------------------------------------------- reading a run


def read(path: Path) -> tuple[Path, Run]:
    """The PPO run in `path`, which is its folder or the one above it.

    Raises:
        InputError: no PPO run there, or none that logged or said anything.
    """
    manifests.refuse_checkpoint(path, "doctor")
    folder = path / "ppo" if (path / "ppo").is_dir() else path
    if not (folder / "manifest.json").is_file() and not (folder / "metrics.jsonl").is_file():
        stages = sorted(found.parent.name for found in path.glob("*/manifest.json"))
        there = f"it holds {', '.join(stages)}" if stages else "no run there"
        raise InputError(f"{path}: no PPO run there ({there}); give its folder, as in alignkit doctor runs/<name>/ppo")
    manifest = manifests.read_manifest(folder) or {}
    if manifest.get("stage", "ppo") != "ppo":
        raise InputError(f"{path}: a run of {manifest['stage']}; the doctor reads runs of ppo")
    said = [str(row["error"]) for row in read_jsonl(folder / PROGRESS) if row.get("error")]
    errors = said or ([str(manifest["error"])] if manifest.get("error") else [])
    run = Run(series(read_jsonl(folder / "metrics.jsonl")), _config(folder), errors, _gold(folder))
    if not run.metrics and not run.errors:
        raise InputError(f"{folder}/metrics.jsonl: no step was logged and no error said; run it first")
    return folder, run


def series(rows: list[dict]) -> dict[str, Series]:
    """{metric: [(step, value)]} of the rows of metrics.jsonl; of a step logged twice the last counts."""
    table: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if "/" in name and "step" in row:
                table.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: sorted(points.items()) for name, points in table.items()}


def _config(folder: Path) -> dict[str, Any]:
    return manifests.plain_config(folder) if (folder / "config.yaml").is_file() else {}


def _gold(folder: Path) -> dict[str, Any]:
    """Evaluate's difference between this run's policy and its reference, where the evaluation beside it has one."""
    evaluation = folder.parent / "evaluate"
    if not (evaluation / "results.json").is_file():
        return {}
    differences = json.loads((evaluation / "results.json").read_text(encoding="utf-8"))["differences"]
    policies = _config(evaluation).get("policies") or {}
    ours = [name for name, path in policies.items() if Path(path).parts[-2:] == folder.absolute().parts[-2:]]
    return next((found for name in ours for key, found in differences.items() if key.startswith(f"{name}_minus_")), {})


# ---------------------------------------------------------------------------------------------- saying it


def summary(folder: Path, findings: list[Finding]) -> str:
    """One line: healthy, or the names of what was found."""
    names = ", ".join(finding.name for finding in findings)
    count = f"{len(findings)} finding{'s' if len(findings) > 1 else ''}: {names}" if findings else "healthy"
    return f"alignkit doctor {folder}: {count}"


def hint(folder: Path) -> str | None:
    """The summary at the end of a run, where there is something to say."""
    try:
        folder, run = read(folder)
    except InputError:  # it ended before it logged anything
        return None
    findings, _ = examine(run)
    return summary(folder, findings) if findings else None


def report(folder: Path, run: Run, findings: list[Finding], unchecked: dict[str, str]) -> str:
    """The findings for a person."""
    lines = [summary(folder, findings)]
    lines += [f"it stopped: {error}" for error in run.errors[:1]]
    for finding in findings:
        lines += ["", finding.name, f"  seen: {finding.evidence}", f"  turn: {finding.knob}"]
    if unchecked:
        lines += ["", "not checked"] + [f"  {name}: {why}" for name, why in unchecked.items()]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """`alignkit doctor …`; ends with exit code 1 where something was found.

    Raises:
        InputError: another option than --json, or not one run.
    """
    paths = [argument for argument in arguments if not argument.startswith("-")]
    if odd := sorted(set(arguments) - set(paths) - {"--json"}):
        raise InputError(f"doctor: no option {odd[0]!r}; there is --json")
    if len(paths) != 1:
        raise InputError(f"doctor: {len(paths)} runs given; give one, as in alignkit doctor runs/<name>")
    folder, run = read(Path(paths[0]))
    findings, unchecked = examine(run)
    if "--json" in arguments:
        found = [asdict(finding) for finding in findings]
        said = {
            "run": str(folder),
            "healthy": not found,
            "findings": found,
            "not_checked": unchecked,
            "errors": run.errors,
        }
        print(json.dumps(said, indent=2, ensure_ascii=False))
    else:
        print(report(folder, run, findings, unchecked))
    if findings:
        raise SystemExit(1)
