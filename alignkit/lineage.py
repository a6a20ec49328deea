"""What a model came from: data, configs, parents, base model, commit, versions and seed; and what has changed since.

    alignkit lineage RUN [--json]

RUN is a stage's folder, or a run's: then its last stage. Every hash that a manifest holds is computed anew from what
lies there now. Exit code 1 where something changed or is gone.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit import artifacts, config, sharing
from alignkit.types import InputError

Node = dict[str, Any]  # one stage: see `trace`


def main(arguments: Sequence[str]) -> None:
    """alignkit lineage RUN [--json]"""
    words = [word for word in arguments if not word.startswith("-")]
    if len(words) != 1 or set(arguments) - {"--json", *words}:
        raise InputError(f"lineage {' '.join(arguments)}: expected alignkit lineage RUN [--json]")
    run = last_stage(Path(words[0]))
    raw = artifacts.plain_config(run)
    below = Path(raw["runs_dir"], raw["run_name"], run.resolve().name)
    place = artifacts.started_in(run, below)
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
    stages = [run, *(run / stage for stage in reversed(config.STAGES))]
    found = next((folder for folder in stages if (folder / "manifest.json").is_file()), None)
    if found is None:
        raise InputError(f"{run}: no run there; expected runs/<name> or runs/<name>/<stage>")
    return found


def trace(run: Path) -> Node:
    """What a stage's manifest says it was made of, with what is there now, and the same of every run it read.

    {"run", "stage", "status", "started", "seed", "commit", "versions", "manifest",
     "held": [{"what", "path", "hash", "now", "why", "run": node of the run that made it, or None}]}
    `now` is None where the thing is gone, and `why` says so.
    """
    manifest = artifacts.read_manifest(run) or {}
    facts = {
        key: manifest.get(name)
        for key, name in (("stage",) * 2, ("status",) * 2, ("started",) * 2, ("seed",) * 2, ("commit", "git_commit"))
    }
    own = [_held("config", run / "config.yaml", manifest.get("config_hash"), lambda: _config_hash(run, manifest))]
    if manifest.get("model_hash"):
        own.append(_held("model", run / "model", manifest["model_hash"], lambda: _files(run / "model")))
    base = manifest.get("base_model") or {}
    if base.get("hash"):
        own.append(_held("base model", base["path"], base["hash"], lambda: _files(Path(base["path"]))))
    return {
        "run": str(run),
        **facts,
        "versions": manifest.get("versions", {}),
        "manifest": artifacts.manifest_hash(run),
        "held": [*own, *_inputs(run, manifest)],
    }


def _inputs(run: Path, manifest: dict[str, Any]) -> list[Node]:
    """Models, rows, reward functions and templates that a stage read."""
    try:
        cfg = config.load(run / "config.yaml", manifest["stage"])
        readers = sharing.readers(cfg)
    except (InputError, OSError):
        return []  # said of the config itself
    found = []
    for key, before in manifest.get("contents", {}).items():
        path = _select(artifacts.plain_config(run), key)
        entry = _held(key, path, before, readers.get(key, _absent))
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


def _config_hash(run: Path, manifest: dict[str, Any]) -> str:
    return config.config_hash(config.load(run / "config.yaml", manifest["stage"]))


def _files(folder: Path) -> str:
    found = artifacts.model_hash(folder)
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
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    console.print(_branch(node, set()))
    for line in changes:
        console.print(Text(line, style="bold red"))
    console.print(Text(f"{len(changes)} changed since" if changes else "nothing has changed since", style="bold"))


def _branch(node: Node, seen: set[str]) -> Any:
    """The tree of a stage; of one that stands above already only its name."""
    from rich.text import Text
    from rich.tree import Tree

    made = f"{node['stage']}, {node['status']}, {node['started']}, seed {node['seed']}, manifest {node['manifest']}"
    tree = Tree(Text(node["run"], style="bold").append(f"  {made}", style="not bold"))
    if node["run"] in seen:
        tree.label.append("  (see above)", style="dim")  # type: ignore[union-attr]
        return tree
    seen.add(node["run"])
    versions = " ".join(f"{name} {version}" for name, version in node["versions"].items())
    tree.add(Text(f"commit {node['commit'] or 'unknown'}  {versions}", style="dim"))
    for entry in node["held"]:
        state = "" if entry["now"] == entry["hash"] else "  gone" if entry["now"] is None else f"  now {entry['now']}"
        line = Text(f"{entry['what']}  {entry['path']}  {entry['hash']}").append(state, style="bold red")
        branch = tree.add(line)
        if entry["run"]:
            branch.add(_branch(entry["run"], seen))
    return tree
