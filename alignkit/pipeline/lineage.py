"""What a model came from: data, configs, parents, base model, commit, versions and seed; and what has changed since.

    alignkit lineage RUN [--json]

RUN is a stage's folder, or a run's: then its last stage. Every hash that a manifest holds is computed anew from what
lies there now. Exit code 1 where something changed or is gone.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.check.contents import readers
from alignkit.config import stages as config
from alignkit.core import foreign
from alignkit.core.errors import InputError
from alignkit.models.source import find_base
from alignkit.runs import manifests
from alignkit.runs.hashes import manifest_hash, model_hash

Node = dict[str, Any]  # one stage: see `trace`


def main(arguments: Sequence[str]) -> None:
    """alignkit lineage RUN [--json]"""
    words = [word for word in arguments if not word.startswith("-")]
    if len(words) != 1 or set(arguments) - {"--json", *words}:
        raise InputError(f"lineage {' '.join(arguments)}: expected alignkit lineage RUN [--json]")
    run = last_stage(Path(words[0]))
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: no config.yaml beside its manifest: it was not made by alignkit, or only half copied")
    raw = manifests.plain_config(run)
    below = Path(raw["runs_dir"], raw["run_name"], run.resolve().name)
    place = manifests.started_in(run, below)
    with contextlib.chdir(place or Path.cwd()):
        node = trace(below if place else run)
    changes = changed(node)
    if "--json" in arguments:
        print(json.dumps(node | {"changes": changes}, indent=2))
    else:
        _show(node, changes)
    if changes:
        raise SystemExit(1)


def last_stage(run: Path) -> Path:
    """The folder of a stage: `run` itself, or the last stage that was run in it.

    Raises:
        InputError: there is none.
    """
    manifests.refuse_checkpoint(run, "lineage")
    stages = [run, *(run / stage for stage in reversed(config.STAGES))]
    found = next((folder for folder in stages if (folder / "manifest.json").is_file()), None)
    if found is None:
        raise InputError(f"{run}: no run there; expected runs/<name> or runs/<name>/<stage>")
    return found


def trace(run: Path) -> Node:
    """What a stage's manifest says it was made of, with what is there now, and the same of every run it read.

    {"run", "stage", "status", "started", "seed", "commit", "versions", "manifest", "recorded",
     "held": [{"what", "path", "hash", "now", "why", "run": node of the run that made it, or None}]}
    `now` is None where the thing is gone, and `why` says so.
    """
    manifest = manifests.read_manifest(run) or {}
    facts = {
        key: manifest.get(name)
        for key, name in (("stage",) * 2, ("status",) * 2, ("started",) * 2, ("seed",) * 2, ("commit", "git_commit"))
    }
    own = [
        _held(
            "config",
            run / "config.yaml",
            manifest.get("config_hash"),
            lambda: config.config_hash(foreign.load(run / "config.yaml")),
        )
    ]
    if manifest.get("model_hash"):
        own.append(_held("model", run / "model", manifest["model_hash"], lambda: _files(run / "model")))
    base = manifest.get("base_model") or {}
    if base.get("hash"):
        own.append(
            _held("base model", base["path"], base["hash"], lambda: _files(Path(find_base(base, run, str(run)))))
        )
    return {
        "run": str(run),
        **facts,
        "versions": manifest.get("versions", {}),
        "manifest": manifest_hash(run),
        "recorded": "contents" in manifest,  # false of runs older than this record
        "held": [*own, *_inputs(run, manifest)],
    }


def _inputs(run: Path, manifest: dict[str, Any]) -> list[Node]:
    """Models, rows, reward functions and templates that a stage read."""
    try:
        cfg = config.load(run / "config.yaml", manifest["stage"])
        read = readers(cfg)
    except (InputError, OSError):
        return []  # said of the config itself
    found = []
    for key, before in manifest.get("contents", {}).items():
        path = _select(manifests.plain_config(run), key)
        entry = _held(key, path, before, read.get(key, _absent))
        maker = Path(path).parent if key.endswith("data.path") else Path(path)
        if (maker / "manifest.json").is_file():
            entry["run"] = trace(maker)
        found.append(entry)
    return found


def _held(what: str, path: Any, before: str | None, read: Any) -> Node:
    """One thing a stage was made of: its hash then and now."""
    now, why = None, ""
    try:
        now = read()
    except (InputError, OSError) as error:
        why = str(error)
    return {"what": what, "path": str(path), "hash": before, "now": now, "why": why, "run": None}


def _files(folder: Path) -> str:
    found = model_hash(folder)
    if found is None:
        raise InputError(f"{folder}: no weights there")
    return found


def _absent() -> str:
    raise InputError("the config has no such key any more")


def _select(node: Any, key: str) -> str:
    for part in key.split("."):
        node = node[part]
    return node


def changed(node: Node) -> list[str]:
    """A line for each thing of a stage or of those before it that changed or is gone, the nearest first."""
    lines = []
    for entry in node["held"]:
        if entry["now"] is None:
            lines.append(f"{node['run']}: {entry['what']} {entry['path']} is gone: {entry['why']}")
        elif entry["now"] != entry["hash"]:
            kind = "manifest " if entry["run"] and not entry["what"].endswith("data.path") else ""
            lines.append(
                f"{node['run']}: {entry['what']} {entry['path']} changed since: {kind}{entry['hash']} -> {entry['now']}"
            )
    for entry in node["held"]:
        lines += changed(entry["run"]) if entry["run"] else []
    return list(dict.fromkeys(lines))


def _show(node: Node, changes: list[str]) -> None:
    for line in tree(node, set()):
        print(line)
    for line in changes:
        print(line)
    print(f"{len(changes)} changed since" if changes else "nothing has changed since")


def tree(node: Node, seen: set[str], prefix: str = "") -> list[str]:
    """The lines of a stage's tree; of a stage that stands above already only its name."""
    made = f"{node['stage']}, {node['status']}, {node['started']}, seed {node['seed']}, manifest {node['manifest']}"
    if node["manifest"] in seen:
        return [f"{prefix}{node['run']}  (see above)"]
    seen.add(node["manifest"])
    inner = re.sub("[├└]─ $", lambda found: "│  " if found[0][0] == "├" else "   ", prefix)
    versions = " ".join(f"{name} {version}" for name, version in node["versions"].items())
    lines = [f"{prefix}{node['run']}  {made}", f"{inner}├─ commit {node['commit'] or 'unknown'}, {versions}"]
    if not node["recorded"]:
        lines.append(f"{inner}├─ what it read was not recorded when it ran")
    for entry in node["held"]:
        mark = "└" if entry is node["held"][-1] else "├"
        state = "" if entry["now"] == entry["hash"] else "  GONE" if entry["now"] is None else f"  NOW {entry['now']}"
        lines.append(f"{inner}{mark}─ {entry['what']}  {entry['path']}  {entry['hash']}{state}")
        if entry["run"]:
            lines += tree(entry["run"], seen, f"{inner}{'│' if mark == '├' else ' '}  └─ ")
    return lines
