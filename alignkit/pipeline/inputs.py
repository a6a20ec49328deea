"""What a stage reads, before anything starts and without torch: models and runs, adapters, templates, rewards and rows."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any


def check_inputs(cfg: Any, later: dict[str, str], tell: bool = True, weights: bool = True) -> dict[str, Any]:
    """Resolve the models and runs a stage reads and validate its rows.

    Args:
        later: {run folder: stage} of runs that an earlier stage of the same pipeline will make.
        tell: print what there is to say of models and rows.
        weights: False: a model folder may lack them.

    Returns:
        {role: ModelSource} of those that exist now.

    Raises:
        InputError: the first thing that the stage could not work with.
    """
    from alignkit.models.source import check_hand_off

    sources = _models(cfg, later, weights)
    check_hand_off(sources)
    _check_adapters(cfg, sources)
    # The model whose tokenizer the stage will use.
    speaks = sources.get(f"policies.{getattr(cfg, 'reference', '')}") or next(iter(sources.values()), None)
    said = _template(cfg, speaks, sources) if weights else []
    said += _rewards(cfg, sources, weights)
    said += _rows(cfg, later, speaks if weights else None)
    said += cfg.rollout.notes() if hasattr(cfg, "rollout") else []
    for line in said if tell else ():
        print(f"{cfg.stage:<9} {line}")
    return sources


def _models(cfg: Any, later: dict[str, str], weights: bool) -> dict[str, Any]:
    """{role: ModelSource} of the models and runs that exist, each as its manifest, its JSON and its headers say."""
    from alignkit.check.model import check_source
    from alignkit.config.rules import model_contradictions
    from alignkit.core.errors import InputError
    from alignkit.core.io import read_json
    from alignkit.models.source import resolve_model
    from alignkit.runs import hashes, manifests

    sources: dict[str, Any] = {}
    for role, path in cfg.inputs().items():
        if path in later:
            continue
        key = f"{role}.path" if role.startswith("rewards.") or "." not in role else role
        given, scores = f"{key}={path}", role.startswith("rewards.")
        source = sources[role] = resolve_model(path, key, weights)
        made = (manifests.read_manifest(source.run) or {}) if source.run is not None else {}
        if scores and made.get("stage") not in (None, "reward"):
            raise InputError(
                f"{given}: a run of {made['stage']}, which has no score; expected one of reward, as runs/<name>/reward"
            )
        if not weights:  # a plan needs no more than config.json
            continue
        if source.run is not None:
            base = source.base if source.adapter is not None else None
            hashes.check_unchanged(source.run, base, made, given, cfg.verify)
        config = Path(source.base) / "config.json"
        facts = read_json(config, f"{given}: give a folder written by save_pretrained") if config.is_file() else {}
        for line in model_contradictions(cfg, facts, given, scores):  # the kind of model first, then its weights
            raise InputError(line)
        check_source(source, given, cfg.model.chat_template, scores=scores)
        if scores and cfg.stage == "ppo" and source.run is not None:
            cfg.rewards[role.partition(".")[2]].check_accuracy(made["metrics"], role)
    return sources


def _rewards(cfg: Any, sources: dict[str, Any], weights: bool) -> list[str]:
    """Reward models against the policy: its tokens, its base, the critic that may start as one. What there is to say."""
    from alignkit.check import reward as check_reward

    said: list[str] = []
    policy = next((source for role, source in sources.items() if not role.startswith("rewards.")), None)
    for role, source in sources.items():
        scores = role.startswith("rewards.")
        if scores and policy is not None and weights:
            said += check_reward.check_tokens(policy, source, f"{role}.path={cfg.inputs()[role]}", cfg.model)
        if not hasattr(cfg, "finetune"):
            continue
        if not scores:
            cfg.finetune.check_start(source)
            continue
        cfg.finetune.check_reward(source, policy)
        if cfg.algorithm.needs_critic:
            said += cfg.critic.check_reward(cfg.finetune, source, policy)
    return said


def _rows(cfg: Any, later: dict[str, str], speaks: Any) -> list[str]:
    """Every set that exists: its rows, as the model's template and the reward functions take them. What there is to say."""
    from alignkit.check import lints
    from alignkit.data.chat import check_fits, template_of

    functions = [(name, r, r.adapted()[1]) for name, r in getattr(cfg, "rewards", {}).items() if hasattr(r, "adapted")]
    said: list[str] = []
    read = {}
    for data, kind, name, limit in cfg.row_sets():
        if not (data.path or data is cfg.data) or any(data.path.startswith(f"{folder}/") for folder in later):
            continue
        rows = data.rows(kind)
        for reward, function, form in functions if data is cfg.data else ():
            function.check_rows(rows, form, f"rewards.{reward}")
        if speaks is not None and Path(speaks.tokenizer).is_dir():
            folder = Path(speaks.tokenizer)
            template = template_of(folder, cfg.model.chat_template, cfg.model.template_date)
            check_fits(rows, limit, name, folder, template)
            said += _changes(cfg.stage, data, rows, template)
        if key := {id(cfg.data): "data", id(getattr(cfg, "eval_data", None)): "eval_data"}.get(id(data)):
            read[key] = (data, rows)
    return said + lints.at_start(cfg.stage, read)


def _template(cfg: Any, speaks: Any, sources: dict[str, Any]) -> list[str]:
    """Set `model.template_date` where a template asks for one; what there is to say of the model's template and ends."""
    from alignkit.data import ends
    from alignkit.data.chat import date_to_tell
    from alignkit.runs import manifests

    if speaks is None or not Path(speaks.tokenizer).is_dir():
        return []
    folders = [Path(source.tokenizer) for source in (speaks, *sources.values()) if Path(source.tokenizer).is_dir()]
    kept = manifests.plain_config(cfg.run_dir) if (cfg.run_dir / "config.yaml").is_file() else {}
    model = cfg.model
    before = kept.get("model", {}).get("template_date")
    model.template_date = date_to_tell(folders, model.chat_template, model.template_date, before)
    lines = ends.of_folders(Path(speaks.tokenizer), Path(speaks.base), model.chat_template, model.template_date)
    told = f"the chat template is told the date {model.template_date}"
    return [*([told] if model.template_date else []), *lines]


def _changes(stage: str, data: Any, rows: Any, template: Any) -> list[str]:
    """What the chat template drops or changes in the prompts of a set, in one line.

    Raises:
        InputError: something, and the set is strict; or the template refuses a row.
    """
    from alignkit.core.errors import InputError
    from alignkit.data.chat import changes

    found = changes(template, rows) if template is not None and data.lint != "off" else []
    if not found:
        return []
    line = f"{data.path}: the chat template {'; '.join(found)}: see them with `alignkit check data {stage} …`"
    if data.lint == "strict":
        raise InputError(f"{line}; lint=strict takes none")
    return [line]


def check_later(stages: list[Any], making: Container[str] = ()) -> None:
    """Each stage of a pipeline against the config.json of the model that those before it start from.

    Args:
        making: run folders that jobs of others will make: what is in those is not known yet.

    Raises:
        InputError: a later stage cannot use that model; said before the first one takes its minutes.
    """
    from alignkit.config.rules import model_contradictions
    from alignkit.core.errors import InputError
    from alignkit.core.io import read_json
    from alignkit.models.source import resolve_model

    origins: dict[str, tuple[dict[str, Any], str]] = {}  # model or run folder -> (config.json, how it was given)
    for stage in stages:
        found = []
        for role, path in stage.inputs().items():
            if role.startswith("rewards.") or (path in making and path not in origins):
                continue
            if path not in origins:
                key = f"{role}.path" if "." not in role else role
                base = Path(resolve_model(path, key, weights=False).base)
                file = base / "config.json"
                origins[path] = (read_json(file, key) if file.is_file() else {}, f"{key}={path}")
            found.append(origins[path])
        for facts, given in found:
            for line in model_contradictions(stage, facts, given):
                raise InputError(line)
        if found:
            origins[str(stage.run_dir)] = found[0]


def _check_adapters(cfg: Any, sources: dict[str, Any]) -> None:
    """Refuse adapters that no policy can be made of; where an engine is only sent adapters, a policy without one, and policies
    with several bases."""
    from alignkit.core.errors import InputError
    from alignkit.models import adapters

    policies = {role: source for role, source in sources.items() if not role.startswith("rewards.")}
    if cfg.stage not in ("sample", "evaluate"):  # PPO's is made by its finetune
        return
    for role, source in policies.items():
        if source.adapter is not None:
            saved = adapters.read_config(source.adapter)
            adapters.check_merged(source, saved, f"{role}={cfg.inputs()[role]}", cfg.rollout.adapters_only)
    if len(policies) < sum(not role.startswith("rewards.") for role in cfg.inputs()):  # others are still to come
        return
    if getattr(cfg.rollout, "payload", "") == "adapter" and not any(source.adapter for source in policies.values()):
        given = " ".join(f"{role}={source.base}" for role, source in policies.items())
        raise InputError(f"rollout.payload=adapter with {given}: no adapter there; use rollout.payload=merged or auto")
    if cfg.rollout.adapters_only:
        bases = {role: str(Path(source.base).resolve()) for role, source in policies.items()}
        first = next(iter(bases), "")
        for role, base in bases.items():
            if base != bases[first]:
                raise InputError(
                    f"rollout={cfg.rollout.name} with {first} on {bases[first]} and {role} on {base}: an engine that is "
                    "sent adapters holds one base; use rollout=vllm with rollout.payload=merged"
                )
