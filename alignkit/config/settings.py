"""What differs between the start of a stage that left a folder and the start that meets it: settings and contents.

The folder's config.yaml is read as data, so one of another version is compared no less.
"""

from __future__ import annotations

import shlex
from typing import Any

from alignkit.runs import manifests

# What a stage may be started with anew and still go on: names of folders, and how it is shown, launched and saved.
FREE = (
    *("run_name", "runs_dir", "dry_run", "resume", "reuse", "verify", "launcher", "logger"),
    *("save_steps", "keep_last", "keep_best", "max_seconds"),
)


def computed_from(plain: dict[str, Any]) -> dict[str, Any]:
    """What of a stage's config it computes from: all but FREE, and how rows are checked."""
    kept = {key: value for key, value in plain.items() if key not in FREE}
    for name in ("data", "eval_data", "ptx"):
        kept[name] = _without_lint(kept[name]) if name in kept else None
    if (
        isinstance(kept.get("model"), dict) and kept["model"].get("template_date") is None
    ):  # as before there was such a key
        kept["model"] = {key: value for key, value in kept["model"].items() if key != "template_date"}
    return {key: value for key, value in kept.items() if key in plain}


def _without_lint(rows: Any) -> Any:
    plain = {key: value for key, value in rows.items() if key != "lint"} if isinstance(rows, dict) else rows
    return plain | {"data": _without_lint(plain["data"])} if isinstance(plain, dict) and "data" in plain else plain


Change = tuple[str, str, str]  # key, what it was, what it is


def differing(old: dict[str, Any], new: dict[str, Any], same: tuple[str, ...] = ()) -> list[Change]:
    """(key, old value, new value) of every setting that a stage computes from and that differs, in the order of `new`.

    Args:
        old, new: configs as plain dicts.
        same: keys of paths at which the same lies, wherever they point.

    Of a component that is another one, only its name.
    """
    was, now = _flat(computed_from(old)), _flat(computed_from(new))
    keys = [key for key in {**now, **was} if was.get(key, ABSENT) != now.get(key, ABSENT) and key not in same]
    others = [key.removesuffix("name") for key in keys if key.endswith(".name") and key in was and key in now]
    told = [key for key in keys if key.endswith(".name") or not key.startswith(tuple(others) or "\n")]
    return [(key.removesuffix(".name"), _text(was.get(key, ABSENT)), _text(now.get(key, ABSENT))) for key in told]


def difference(cfg: Any, manifest: dict[str, Any], origin: dict[str, Any], prefix: str = "") -> tuple[str, list[str]]:
    """What the start of `cfg` has else than the one that left its folder.

    Args:
        manifest: the folder's.
        origin: `pipeline.origin_of` this start.
        prefix: of the keys: "ppo." in a pipeline.

    Returns:
        ("config", or the key of the first contents that changed; a line for each difference).
    """
    from omegaconf import OmegaConf

    run_dir, before, contents = cfg.run_dir, manifest.get("contents", {}), origin["contents"]
    new: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(cfg), throw_on_missing=False)
    same = tuple(key for key in contents if before.get(key) == contents[key])
    try:
        settings = differing(manifests.plain_config(run_dir), new, same)
    except (OSError, ValueError):
        return "config", [f"{run_dir / 'config.yaml'} cannot be read, so what differs is not known"]
    lines = [f"{prefix}{key} was {old}, is {now}" for key, old, now in settings]
    said = {key for key, *_ in settings}
    stale = [key for key in contents if key in before and key not in same and key not in said]
    for key in stale:
        lines.append(
            f"{kind_of_contents(key)} {prefix}{key}={_flat(new).get(key)} changed ({before[key]}, is {contents[key]})"
        )
    if not lines and not contents:
        lines = ["its inputs are made anew"]
    return ("config" if settings or not stale else prefix + stale[0]), lines or ["another version of alignkit wrote it"]


def refusal(cfg: Any, manifest: dict[str, Any], origin: dict[str, Any], prefix: str = "") -> str:
    """Why a start may not go on in its folder: each difference, what may differ, and the command that goes on."""
    run_dir = cfg.run_dir
    other, lines = difference(cfg, manifest, origin, prefix)
    fix = "choose another run_name=, or delete that folder"
    if manifest["status"] == "done":
        return f"{run_dir} is done, but with another {other} ({'; '.join(lines)}): {fix}"
    on = shlex.quote(str(run_dir.parent if prefix else run_dir))
    go_on = f"alignkit resume {on} goes on with the old ones" if other == "config" else "put back what it was"
    return (
        f"{run_dir} has checkpoints of another {other} ({'; '.join(lines)}), which this one cannot go on from: {go_on} "
        f"(free to change: {', '.join(FREE)}, lint), or {fix}"
    )


def kind_of_contents(key: str) -> str:
    """What lies at a path of the config, in words."""
    if key.endswith("data.path"):
        return "the rows of"
    return {"target": "the code of", "chat_template": "the file"}.get(key.rpartition(".")[2], "the model")


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict):
        return {key: value for name, below in node.items() for key, value in _flat(below, f"{prefix}{name}.").items()}
    return {prefix[:-1]: node}


ABSENT = object()


def _text(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is ABSENT:
        return "not there"
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or isinstance(value, bool)
        else str(value)
        if value != ""
        else "''"
    )
