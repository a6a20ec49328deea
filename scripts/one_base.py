#!/usr/bin/env python
"""One base with four adapters against four models: the same losses, and what each of the two holds in memory.

    scripts/one_base.py [overrides of `alignkit ppo`]

Two processes train the same adapters on the same rollouts for three optimizer steps, once on one shared base and once
with a base of its own for policy, reference, critic and reward model. The last line is one JSON object: the largest
difference of a loss, the bytes of parameters and the peak memory of the process, and their ratios.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import bench_ppo
import torch

from alignkit.algorithms import functional as F
from alignkit.core.types import Rollouts, ScoredRollouts
from alignkit.data import tokens
from alignkit.models import loading
from alignkit.models.loaded import copy_adapter
from alignkit.models.score_heads import load_head, save_head, score_head
from alignkit.models.source import resolve_model
from alignkit.stages import ppo
from alignkit.training.engine import Engine

SETTINGS = [
    "finetune.last_layers=null", "rollout=hf", "rollout_batch_size=8", "mini_batch_size=8", "micro_batch_size=1",
    "algorithm.ppo_epochs=3", "keep_shared_states=false",
]  # fmt: skip


def main() -> None:
    if "--worker" in sys.argv:
        at = sys.argv.index("--worker")
        print("RESULT " + json.dumps(worker(sys.argv[at + 1], Path(sys.argv[at + 2]), sys.argv[at + 3 :])), flush=True)
        os._exit(0)
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for kind in (
            "adapters",
            "one_base",
            "four_models",
        ):  # the adapters first, so that neither of the two makes them
            command = [sys.executable, __file__, "--worker", kind, folder, *SETTINGS, *sys.argv[1:]]
            done = subprocess.run(command, capture_output=True, text=True)
            line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
            if line is None:
                sys.exit(f"{kind} failed:\n{done.stderr[-3000:]}")
            if kind != "adapters":
                found[kind] = json.loads(line.removeprefix("RESULT "))
                print(f"{kind}: {found[kind]}", flush=True)
    one, four = found["one_base"], found["four_models"]
    pairs = zip(one["losses"], four["losses"], strict=True)
    result = {
        "loss_difference": max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True)),
        "parameters_ratio": round(four["parameter_mib"] / one["parameter_mib"], 2),
        "peak_ratio": round(four["peak_mib"] / one["peak_mib"], 2),
    }
    for kind, numbers in found.items():
        result |= {f"{kind}_{name}": numbers[name] for name in ("parameter_mib", "peak_mib")}
    print(json.dumps(result))


def worker(kind: str, folder: Path, overrides: list[str]) -> dict:
    """Losses of three optimizer steps, bytes of parameters and peak memory of this process."""
    cfg = bench_ppo.compose(overrides, llama=False)
    world = bench_ppo.one_process()
    source = resolve_model(cfg.model.path)
    tokenizer = tokens.load_tokenizer(source.tokenizer)
    sft, reward = adapters(cfg, source, len(tokenizer), folder)
    if kind == "adapters":
        return {}
    if kind == "one_base":
        roles = cfg.finetune.roles(cfg.model, sft, reward, len(tokenizer), cfg.critic, cfg.seed)
    else:
        roles = four_models(cfg, source, sft, reward, len(tokenizer))
    roles = roles.to(world.device).eval()
    engines = {
        role: Engine(
            roles, cfg.finetune.parameters(roles, role), optimizer, cfg.deepspeed, world,
            dtype=cfg.model.dtype, micro_batch_size=cfg.micro_batch_size, updates=10,
        )
        for role, optimizer in (("policy", cfg.optimizer), ("critic", cfg.critic_optimizer))
    }  # fmt: skip
    rollouts = made_up_rollouts(cfg, tokenizer)
    seen = ppo.forward(cfg, roles, rollouts)
    experience, _ = cfg.algorithm.experience(
        ScoredRollouts(rollouts, seen["reward_model"]), seen["policy"], seen["ref_policy"], seen["critic"],
        cfg.algorithm.start(), 1,
    )  # fmt: skip
    losses = []
    for _ in range(3):
        metrics, _ = ppo.optimize(cfg, roles, engines, experience, world)
        losses.append([metrics["policy/loss"], metrics["critic/loss"], metrics["policy/approx_kl"]])
    held = {p.data_ptr(): p.numel() * p.element_size() for p in roles.parameters()}
    return {
        "losses": losses,
        "parameter_mib": round(sum(held.values()) / 2**20, 1),
        "peak_mib": bench_ppo.peak_mib()
        if torch.cuda.is_available()
        else round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1),
    }


def adapters(cfg, source, vocab: int, folder: Path) -> tuple:
    """An SFT and a reward adapter with seeded random weights and a head, in `folder`."""
    from peft import get_peft_model

    made = []
    for seed, name in enumerate(("sft", "reward")):
        path = folder / name
        if not path.exists():
            torch.manual_seed(seed)
            hf = loading.load_base(source.base, cfg.model, vocab)
            peft = get_peft_model(hf, cfg.finetune.peft_config("CAUSAL_LM", hf), autocast_adapter_dtype=False)
            for parameter_name, parameter in peft.named_parameters():
                if ".lora_B." in parameter_name:
                    torch.nn.init.normal_(parameter, std=0.01)
            peft.save_pretrained(path, save_embedding_layers=False)
            save_head(score_head(hf.config.hidden_size), path)
            del hf, peft
        made.append(type(source)(base=source.base, adapter=path, tokenizer=source.tokenizer))
    return tuple(made)


def four_models(cfg, source, sft, reward, vocab: int) -> torch.nn.Module:
    """The same four roles, each an adapter on a base of its own."""
    from peft import get_peft_model

    parts, pefts = {}, []
    for role, start in (("policy", sft), ("ref_policy", sft), ("critic", reward), ("reward_model", reward)):
        parts[role] = loading.load_base(source.base, cfg.model, vocab)
        config = cfg.finetune.peft_config("CAUSAL_LM", parts[role])
        pefts.append(get_peft_model(parts[role], config, adapter_name=role, autocast_adapter_dtype=False))
        copy_adapter(pefts[-1], start.adapter, role)
    heads = {role: load_head(reward.adapter) for role in ("critic", "reward_model")}
    roles = loading.make_roles(parts, heads, switch=lambda role: None)
    loading.train_only(roles, [p for role in ("policy", "critic") for p in cfg.finetune.parameters(roles, role)])
    return roles


def made_up_rollouts(cfg, tokenizer) -> Rollouts:
    """Real prompts with random responses of random lengths; the same in both processes."""
    prompts, _ = tokens.prompt_dataset(cfg.data.rows("prompt"), tokenizer, cfg.max_prompt_length)
    batch = tokens.collate_prompts(prompts[: cfg.rollout_batch_size], tokenizer.pad_token_id)
    generator = torch.Generator().manual_seed(0)
    rows, slots = cfg.rollout_batch_size, cfg.rollout.max_new_tokens
    ids = torch.randint(100, 10000, (rows, slots), generator=generator)
    stop = torch.randint(4, slots, (rows,), generator=generator)
    ids[torch.arange(rows), stop] = tokenizer.eos_token_id
    ids, mask, finished = F.truncate_at_stop(ids, [tokenizer.eos_token_id], tokenizer.pad_token_id)
    logprobs = torch.zeros(rows, slots)
    return Rollouts(batch.prompt_ids, batch.prompt_mask, ids, mask, logprobs, finished, batch.meta, 1)


if __name__ == "__main__":
    main()
