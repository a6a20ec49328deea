"""What to change in a config that does not fit its device: the cheapest change first, by name and number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from alignkit.core.errors import InputError
from alignkit.plan.memory import Phase

Predict = Callable[[Any], list[Phase]]


def peak(phases: list[Phase]) -> Phase:
    """The phase that needs most."""
    return max(phases, key=lambda phase: phase.total)


def candidates(cfg: Any) -> Iterator[tuple[list[str], str]]:
    """(overrides, what they cost), the cheapest first. Every one is a setting of its own, the others as they are."""
    micro = getattr(cfg, "micro_batch_size", 1)
    while micro > 1:
        micro //= 2
        yield [f"micro_batch_size={micro}"], "the same result, more and smaller forwards"
    if getattr(cfg, "keep_shared_states", False) and getattr(cfg.finetune, "last_layers", None):
        yield ["keep_shared_states=false"], "the same result, the lower blocks computed anew"
    if getattr(getattr(cfg, "rollout", None), "sleep", True) is False:
        yield ["rollout.sleep=true"], "the same result, the sampler's weights move twice a step"
    if cfg.launcher.num_ranks > 1:
        for stage in range(cfg.deepspeed.stage + 1, 3 if cfg.stage == "ppo" else 4):
            yield [f"deepspeed=zero{stage}"], "the same result, more traffic between the ranks"
    if getattr(cfg, "gradient_checkpointing", True) is False:
        yield ["gradient_checkpointing=true"], "the same result, a third more compute"
        yield ["gradient_checkpointing=true", "micro_batch_size=1"], "the same result, a third more compute"
    if getattr(getattr(cfg, "rollout", None), "kv_cache_gib", 1.0) > 1:
        yield ["rollout.kv_cache_gib=1"], "fewer answers at once"
    if cfg.model.dtype == "float32":
        yield ["model.dtype=bfloat16"], "numbers of 8 bits of precision instead of 24"
    if getattr(getattr(cfg, "finetune", None), "name", "") == "full":
        yield ["finetune=lora"], "adapters are trained instead of all weights"
        yield ["finetune=lora", "micro_batch_size=1"], "adapters are trained instead of all weights"
    if getattr(getattr(cfg, "finetune", None), "name", "") in ("full", "lora"):
        yield ["finetune=qlora"], "adapters on a base whose matrices are held in 4 bits"
        yield ["finetune=qlora", "micro_batch_size=1"], "adapters on a base whose matrices are held in 4 bits"
    if cfg.model.dtype == "float32":
        both = ["finetune=lora"] if getattr(getattr(cfg, "finetune", None), "name", "") == "full" else []
        yield [*both, "model.dtype=bfloat16", "micro_batch_size=1"], "less precision, smaller forwards"


def changed(cfg: Any, overrides: list[str], components: Callable[[str], dict[str, Any]]) -> Any | None:
    """A copy of a checked config with overrides of scalars and of component groups; None where it is refused."""
    made = copy.deepcopy(cfg)
    for override in overrides:
        key, _, text = override.partition("=")
        if key in made.groups:
            setattr(made, key, components(key)[text]())
            continue
        *path, last = key.split(".")
        at = made
        for part in path:
            at = getattr(at, part)
        if not hasattr(at, last):
            return None
        old = getattr(at, last)
        setattr(at, last, text == "true" if isinstance(old, bool) else type(old)(text))
    try:
        made.check()
    except InputError:
        return None
    return made


def cheapest(
    cfg: Any, room: float, predict: Predict, components: Callable[[str], dict[str, Any]]
) -> tuple[list[str], str, float] | None:
    """(overrides, what they cost, the new peak in bytes) of the first candidate that fits in `room` bytes, or None."""
    for overrides, cost in candidates(cfg):
        made = changed(cfg, overrides, components)
        if made is not None and (needed := peak(predict(made)).total) <= room:
            return overrides, cost, needed
    return None
