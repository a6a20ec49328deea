"""The plan of a stage before it runs: settings, data, batches, tokens, FLOPs, memory, hours, the launch command.

`alignkit plan <stage|pipeline> …` and `dry_run=true` print it. Everything is read from JSON files and rows; neither torch
nor a GPU is touched. What cannot be known here is said, with what is missing.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from alignkit.core.errors import InputError
from alignkit.core.types import ModelSource
from alignkit.models import score_heads
from alignkit.models.source import resolve_model
from alignkit.plan import compute, counts, fit, memory
from alignkit.plan.shape import Shape, find_config, read_shape

GIB = memory.GIB


@dataclass(frozen=True)
class Options:
    """What a plan is told beside the config."""

    device_memory: float | None = None  # bytes of one GPU; None: what this machine has
    throughput: str | None = None  # tokens a second over all ranks, or a run folder to take the pace from


FLAGS = {"--device-memory": "device_memory", "--throughput": "throughput"}


def options(arguments: list[str]) -> tuple[Options, list[str]]:
    """The flags of `alignkit plan`, and the arguments that are left.

    Raises:
        InputError: a flag without a value, or a value that is no size.
    """
    found: dict[str, Any] = {}
    left, at = [], iter(arguments)
    for argument in at:
        flag, given, value = argument.partition("=")
        if flag not in FLAGS:
            left.append(argument)
            continue
        value = value if given else next(at, "")
        if not value:
            raise InputError(f"{flag} needs a value, as in {flag}={'80GiB' if 'memory' in flag else '2500'}")
        found[FLAGS[flag]] = size(value, flag) if flag == "--device-memory" else value
    return Options(**found), left


def size(text: str, name: str) -> float:
    """Bytes of "80GiB", "80GB" or "500MiB".

    Raises:
        InputError: it is no size.
    """
    match = re.fullmatch(r"([\d.]+) *([KMGT])(i?)B?", text, re.IGNORECASE)
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if not match or number <= 0:
        raise InputError(f"{name}={text}: expected a size as 80GiB or 500MiB")
    return number * (1024 if match[3] else 1000) ** ("KMGT".index(match[2].upper()) + 1)


def detect() -> memory.Device:
    """The smallest GPU that `nvidia-smi` names, else the memory of this machine or of its container."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        done = subprocess.run(query, capture_output=True, encoding="utf-8", errors="replace", timeout=10)
        sizes = [float(line) for line in done.stdout.split() if line.replace(".", "").isdigit()]
        if done.returncode == 0 and sizes:
            return memory.Device(min(sizes) * memory.MIB, True)
    total = next(
        int(line.split()[1])
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        if "MemTotal" in line
    )
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    return memory.Device(min(total * 1024, float(text) if text.isdigit() else float("inf")), False)


# ------------------------------------------------------------------------------------------------------ what there is


@dataclass(frozen=True)
class Model:
    """The model a stage starts from, as far as a plan needs it."""

    base: str
    tokenizer: str
    adapter: bool  # it starts as an adapter on `base`
    reward: str | None = None  # base of a reward model that is held by itself beside this one

    @classmethod
    def of(cls, cfg: Any, sources: dict[str, ModelSource], pipeline: Any | None) -> Model:
        """From the sources that exist; of a stage that another one precedes, what that one will have made."""
        source = sources.get("model") or next((s for role, s in sources.items() if role.startswith("policies.")), None)
        if source is None or (pipeline is not None and cfg.stage != "sft"):
            assert pipeline is not None  # a stage alone has all its sources
            first = resolve_model(pipeline.model.path, weights=False)
            return cls(first.base, first.tokenizer, first.adapter is not None or pipeline.finetune.name != "full")
        rewards = [found for role, found in sources.items() if role.startswith("rewards.")]
        alone = [reward.base for reward in rewards if _held_alone(cfg, reward, source)]
        return cls(source.base, source.tokenizer, source.adapter is not None, next(iter(alone), None))


def _held_alone(cfg: Any, reward: ModelSource, policy: ModelSource) -> bool:
    """Whether a reward model may be of another shape than the policy, or is no adapter on its base where others are."""
    if cfg.stage == "ppo" and cfg.finetune.name != "full":
        return not score_heads.shares_base(reward, policy.base, cfg.finetune.nf4)
    return score_heads.place(reward.base) != score_heads.place(policy.base)


@dataclass
class Plan:
    """What was found out; None where it cannot be known here, with the reason in `notes`."""

    work: counts.Work
    shape: Shape | None
    phases: list[memory.Phase]
    device: memory.Device
    model: Model
    notes: list[str]


def make(cfg: Any, model: Model, device: memory.Device, planned: int | None = None) -> Plan:
    """Count and predict a stage."""
    notes: list[str] = []
    tokenizer = shape = None
    try:
        config = find_config(model.base)
        near = model.tokenizer if Path(model.tokenizer).is_dir() or config is None else str(config.parent)
        tokenizer = counts.PlainTokenizer(near, cfg.model.chat_template, cfg.model.template_date)
    except InputError as error:
        notes.append(f"tokens are not counted: {error}")
    try:
        shape = read_shape(model.base)
    except InputError as error:
        notes.append(f"memory and FLOPs are not predicted: {error}")
    work = counts.count(cfg, tokenizer, planned)
    phases = []
    try:
        phases = [] if shape is None else predict(cfg, shape, device, work, model)
    except InputError as error:
        notes.append(f"memory is not predicted: of the reward model {error}")
    return Plan(work, shape, phases, device, model, notes)


def written_rows(cfg: Any, pipeline: Any) -> int | None:
    """How many rows the `sample` stage of a pipeline writes at most for this stage; None: its rows exist already."""
    made = pipeline.sample
    if not cfg.data.path.startswith(f"{made.run_dir}/"):
        return None
    return len(made.data.rows(made.row_kind)) * made.pairs_per_prompt


def predict(cfg: Any, shape: Shape, device: memory.Device, work: counts.Work, model: Model) -> list[memory.Phase]:
    """`memory.predict` for the rows that were found."""
    reward = None if model.reward is None else read_shape(model.reward)
    return memory.predict(cfg, shape, device, work.longest - work.slots, work.longest, model.adapter, reward)


def differences(cfg: Any, components: Any) -> tuple[list[str], list[str]]:
    """(the options in use, as finetune=lora; the keys whose values are not their defaults, as seed=1)."""
    defaults = type(cfg)()
    for group in cfg.groups:
        setattr(defaults, group, components(group)[getattr(cfg, group).name]())
    if hasattr(cfg, "rewards"):
        defaults.rewards = {name: type(item)() for name, item in cfg.rewards.items()}
    ours, theirs = (
        flat(OmegaConf.to_container(OmegaConf.structured(config), throw_on_missing=False)) for config in (cfg, defaults)
    )
    chosen = [f"{group}={getattr(cfg, group).name}" for group in cfg.groups]
    keys = [f"{key}={value}" for key, value in ours.items() if theirs.get(key) != value and not key.endswith(".name")]
    return chosen, [key for key in keys if not key.startswith("dry_run=")]


def flat(tree: Any, at: str = "") -> dict[str, Any]:
    """{"a.b": value} of nested dicts."""
    if not isinstance(tree, dict) or not tree:
        return {at: tree}
    return {key: value for name, item in tree.items() for key, value in flat(item, f"{at}.{name}".lstrip(".")).items()}


# -------------------------------------------------------------------------------------------------------------- text


def render(cfg: Any, plan: Plan, components: Any, pace: tuple[float, str] | None) -> str:
    """The plan in words and numbers, without the launch command."""
    work, lines = plan.work, []
    chosen, keys = differences(cfg, components)
    lines += block("settings", [" ".join(chosen), "not at their defaults: " + (" ".join(keys) or "none")])
    lines += block("model", [plan.model.base + (" with an adapter" if plan.model.adapter else ""), *sizes(cfg, plan)])
    lines += block("data", data_lines(cfg, work))
    lines += block("batches", work.lines)
    if work.rows.tokenised:
        lines += block("tokens", token_lines(cfg, plan))
    lines += block("memory", memory_lines(cfg, plan, components))
    if pace is not None:
        lines += block("time", [f"{hours(pace[0])} {pace[1]}, loading and sampling pauses aside"])
    else:
        lines += block(
            "time", ["not known: give --throughput=TOKENS_A_SECOND or --throughput=RUN_FOLDER to `alignkit plan`"]
        )
    lines += block("not known", plan.notes)
    return "\n".join(lines)


def block(title: str, lines: list[str]) -> list[str]:
    """The lines with the title before the first."""
    return [f"{title if number == 0 else '':<10} {line}" for number, line in enumerate(lines)]


def sizes(cfg: Any, plan: Plan) -> list[str]:
    shape = plan.shape
    if shape is None:
        return []
    held = memory.roles(cfg, shape, plan.model.adapter)
    trained = ", ".join(f"{role} {n:,}" for role, n in held.trained.items())
    text = f"{shape.model_type}, {shape.layers} blocks x {shape.hidden}, {shape.parameters:,} parameters"
    return [text + (f"; trained: {trained}" if trained else "")]


def data_lines(cfg: Any, work: counts.Work) -> list[str]:
    rows, found = work.rows, []
    unit = {"sft": "rows", "reward": "pairs"}.get(cfg.stage, "prompts")
    limit = (
        f"max_length={cfg.max_length}" if hasattr(cfg, "max_length") else f"max_prompt_length={cfg.max_prompt_length}"
    )
    about = "" if rows.exact else "about "
    held_out = work.held_out
    read = rows.read + (held_out.read if held_out else 0)
    if not rows.tokenised:
        found.append(f"{read} {unit}, not yet checked against {limit}")
    else:
        kept = rows.kept + (held_out.kept if held_out else 0)
        found.append(f"{read} {unit}, {about}{kept} kept, {about}{read - kept} left out, longer than {limit} tokens")
    if held_out is not None:
        found.append(f"{about}{rows.kept} to train with, {about}{held_out.kept} held out")
    if rows.tokenised:
        found.append(f"tokens a sequence: {rows.mean:.1f} on average, {rows.longest} at most")
    if rows.tokenised and not rows.exact:
        found.append(f"of {counts.SAMPLE} rows at most, evenly spread")
    return found


def token_lines(cfg: Any, plan: Plan) -> list[str]:
    work, shape = plan.work, plan.shape
    most = "" if work.exact else "at most " if work.slots else "about "
    found = [f"{most}{work.tokens:,.0f}, {work.response_tokens:,.0f} of them in answers"]
    if shape is not None:
        phases = compute.flops(cfg, shape, work, plan.model.adapter)
        parts = " + ".join(f"{name} {value:.2e}" for name, value in phases.items())
        found.append(f"FLOPs: {parts} = {sum(phases.values()):.2e}")
        full = 6 * shape.parameters * work.tokens
        found.append(
            f"(6 x parameters x tokens = {full:.2e}; forward 2 a weight and token, backward 4, through frozen weights 2)"
        )
    return found


def memory_lines(cfg: Any, plan: Plan, components: Any) -> list[str]:
    """A table of phases and parts, whether the peak fits, and what to change where it does not."""
    if not plan.phases or plan.shape is None:
        return []
    shape, top, ranks = plan.shape, fit.peak(plan.phases), cfg.launcher.num_ranks
    unit, scale, digits = ("GiB", GIB, 2) if top.total > 16 * GIB else ("MiB", memory.MIB, 0)
    names = list(dict.fromkeys(name for phase in plan.phases for name, value in phase.parts.items() if value))

    def line(first: str, cells: list[str]) -> str:
        widths = [max(len(name), 7) for name in (*names, "sum")]
        return f"{first:<10}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    table = [line(f"{unit} a rank", [*names, "sum"])]
    for phase in plan.phases:
        values = [*(phase.parts.get(name, 0) for name in names), phase.total]
        table.append(line(phase.name, [f"{value / scale:,.{digits}f}" for value in values]))
    room = plan.device.share(ranks)
    what = "a GPU" if plan.device.gpu else f"this machine's memory{f' / {ranks} ranks' if ranks > 1 else ''}"
    peak = f"peak {top.total / GIB:.2f} GiB in {top.name}"
    if top.total <= room:
        return [*table, f"{peak}: fits {room / GIB:.1f} GiB, {what}"]
    table.append(f"{peak}: DOES NOT FIT {room / GIB:.1f} GiB, {what}")
    change = fit.cheapest(
        cfg, room, lambda other: predict(other, shape, plan.device, plan.work, plan.model), components
    )
    if change is None:
        return [*table, "no change known here makes it fit: a larger device, more ranks, shorter rows, a smaller model"]
    overrides, cost, needed = change
    saved = f"{needed / GIB:.2f} GiB, saves {(top.total - needed) / GIB:.2f} GiB"
    return [*table, f"cheapest change that fits: {' '.join(overrides)} -> {saved} ({cost})"]


def hours(s: float) -> str:
    """3.2 h, 12 min or 40 s."""
    return f"{s / 3600:.1f} h" if s >= 3600 else f"{s / 60:.0f} min" if s >= 120 else f"{s:.0f} s"


def launch_line(cfg: Any) -> str:
    """The command, or the batch script, that would start the stage."""
    if hasattr(cfg.launcher, "script"):
        rollout = getattr(cfg, "rollout", None)
        servers = rollout is not None and rollout.name == "server" and not rollout.urls
        return cfg.launcher.at_site().script(cfg.stage, [cfg.run_dir], servers=servers)
    return "$ " + shlex.join(cfg.launcher.command(cfg.stage, cfg.run_dir, cfg.launcher.port or 29500))
