"""Floating-point operations of a stage, and the hours they take at a pace that was stated or measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError
from alignkit.core.io import read_jsonl
from alignkit.plan import counts, memory
from alignkit.plan.shape import Shape


def flops(cfg: Any, shape: Shape, work: counts.Work, starts_as_adapter: bool) -> dict[str, float]:
    """{phase: floating-point operations over the whole stage, all ranks}.

    A forward takes 2 a weight and token, and causal attention 2 x heads x head_dim x length a block and token. A backward
    takes the same twice where the weights train; through frozen weights (LoRA) once, and 6 an adapter's weight and token
    for both ways. Blocks below the first adapter have no backward.
    """
    lora = getattr(cfg, "finetune", None) is not None and cfg.finetune.name != "full"
    upper = (cfg.finetune.last_layers or shape.layers) if lora else shape.layers
    tokens, answers, context = work.tokens, work.response_tokens, work.length
    adapter = shape.adapter(cfg.finetune.rank, cfg.finetune.target_modules, cfg.finetune.last_layers) if lora else 0
    lower = shape.forward_flops(tokens, 0, context, shape.layers - upper)

    def train(head: float) -> float:
        forward = shape.forward_flops(tokens, head, context, upper)
        return forward * (2 if lora else 3) + 6 * adapter * tokens

    if cfg.stage in ("sft", "reward"):
        again = shape.forward_flops(tokens, 0, context, upper) if cfg.gradient_checkpointing else 0
        return {"train": lower + train(answers if cfg.stage == "sft" else 0) + again}
    found = {"generate": shape.forward_flops(tokens, answers, context)}
    if cfg.stage != "ppo":
        return found
    held = memory.roles(cfg, shape, starts_as_adapter)
    learned = any(item.name == "reward_model" for item in cfg.rewards.values())
    values = "critic" in held.trained
    other = shape.forward_flops(tokens, 0, context, upper)  # the critic's and the reward model's
    found["forward"] = lower + 2 * shape.forward_flops(tokens, answers, context, upper) + (learned + values) * other
    again = 0 if cfg.keep_shared_states or upper == shape.layers else lower
    found["update"] = cfg.algorithm.ppo_epochs * (again + train(answers) + (train(0) if values else 0))
    return found


def seconds(cfg: Any, work: counts.Work, throughput: str | None) -> tuple[float, str] | None:
    """(seconds of the whole stage, where the pace is from): stated, or that of a run; None where neither is known.

    Raises:
        InputError: neither a number nor a run with metrics.
    """
    if throughput is not None and re.fullmatch(r"[\d.]+(e\d+)?", throughput):
        if not work.rows.tokenised:
            return None
        return work.tokens / float(throughput), f"at {float(throughput):,g} tokens a second"
    run = Path(throughput) if throughput else cfg.run_dir
    rows, pace = read_jsonl(run / "metrics.jsonl"), None
    if cfg.stage == "ppo":
        counted = [(row["rollout/tokens"], row["time/step"]) for row in rows if "rollout/tokens" in row]
        done, spent = (sum(column) for column in zip(*counted, strict=True)) if counted else (0, 0)
    else:  # the first step warms up
        counted = [(row["train/num_tokens"], row["wall_time"]) for row in rows if "train/num_tokens" in row]
        done, spent = (counted[-1][i] - counted[0][i] for i in (0, 1)) if counted else (0, 0)
    if done and spent > 0:
        pace = work.tokens * spent / done, f"at {done / spent:,.0f} tokens a second, measured in {run}"
    if throughput and pace is None:
        raise InputError(
            f"--throughput={throughput}: expected tokens a second, as 2500, or the folder of a run of {cfg.stage} that has "
            "tokens in its metrics.jsonl"
        )
    return pace
