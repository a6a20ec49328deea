#!/usr/bin/env python
"""Time and memory of a PPO step, phase by phase, and of its update against a bare forward and backward.

    scripts/bench_ppo.py                                    SmolLM2-135M as the quickstart trains it
    scripts/bench_ppo.py --rounds 5 rollout=hf              any `alignkit ppo` override
    scripts/bench_ppo.py --llama-1b model.dtype=bfloat16 rollout=hf finetune.last_layers=null
                                                            a randomly initialised Llama of 1.2B parameters (for a GPU)

The bare run sends the same micro-batches through the same module (a second one, which DeepSpeed does not know): forward,
backward of the sum, nothing else. Rounds of
the two alternate, so that both meet the same machine. The last line is one JSON object; `update_vs_bare` is the speed of
the update as a fraction of the bare one, `mfu` the share of --peak-tflops that the update's matrix products reach.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import tempfile
import time
from pathlib import Path

import torch

from alignkit.cli.entry import conf_dir
from alignkit.config import stages
from alignkit.data import tokens
from alignkit.models.source import resolve_model
from alignkit.rewards import base as rewards
from alignkit.rollout import base as rollout
from alignkit.stages import ppo
from alignkit.tracking.run_log import Clock
from alignkit.training import batches
from alignkit.training.engine import Engine, World, start

QUICKSTART = [
    "run_name=bench", "data.path=demo:chitchat/train", "max_prompt_length=72", "finetune.last_layers=6",
    "rollout.temperature=0.8", "rollout.max_new_tokens=28", "rollout_batch_size=48", "mini_batch_size=16",
    "micro_batch_size=16", "algorithm.ppo_epochs=2", "~reward@rewards.reward_model", "+reward@rewards.gold=vader",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the update, and of the bare run")
    parser.add_argument("--llama-1b", action="store_true", help="a randomly initialised Llama of 1.2B parameters")
    parser.add_argument("--peak-tflops", type=float, default=None, help="of the device in this dtype, for `mfu`")
    parser.add_argument("overrides", nargs="*", help="overrides of `alignkit ppo`")
    args = parser.parse_args()

    cfg = compose(args.overrides, args.llama_1b)
    world = one_process()
    parts = build(cfg, world)
    roles, bare_roles, engines, sampler, score, batch = parts
    state, shuffle = cfg.algorithm.start(), torch.Generator().manual_seed(0)
    clock, updates, bare, padding = Clock(), [], [], []
    for number in range(args.rounds + 1):  # the first one warms up
        with clock("generate"):
            rollouts = batches.move(sampler.generate(batch, cfg.group_size, cfg.seed, number), world.device)
        with clock("forward"):
            seen = ppo.forward(cfg, roles, rollouts)
        with clock("score"):
            scored = score(rollouts)
        experience, _ = cfg.algorithm.experience(
            scored, seen["policy"], seen["ref_policy"], seen.get("critic"), state, cfg.group_size
        )
        experience.shared_states = seen.get("shared_states")
        bare_seconds = timed(lambda e=experience: run_bare(cfg, bare_roles, e, world))
        with clock("update"):
            started = time.perf_counter()
            metrics = ppo.update(cfg, roles, engines, experience, world, shuffle, list(engines))
            synchronize()
            update_seconds = time.perf_counter() - started
        with clock("sync"):
            sampler.sync_weights(cfg.finetune.payload(roles), number + 2)
        laps = clock.lap()
        print(f"round {number}: update {update_seconds:.2f} s, bare {bare_seconds:.2f} s, phases {laps}", flush=True)
        if number:
            updates.append(update_seconds)
            bare.append(bare_seconds)
            padding.append(metrics["update/padding_fraction"])
            passes = cfg.algorithm.ppo_epochs
            trained, answered = (int(m.sum()) * passes for m in (experience.mask, experience.response_mask))
        else:
            clock = Clock()
    seconds = statistics.median(updates)
    result = {
        "update_vs_bare": round(statistics.median(b / u for b, u in zip(bare, updates, strict=True)), 3),
        "padding_fraction": round(statistics.mean(padding), 4),
        "phase_seconds": {
            name: round(total / clock.steps, 3) for name, total in clock.totals.items() if name != "step"
        },
        "update_tokens_per_s": round(trained / seconds, 1),
        "peak_mib": peak_mib(),
        "model": cfg.model.path if not args.llama_1b else "random Llama, 1.2B",
        "dtype": cfg.model.dtype,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu, {torch.get_num_threads()} threads",
    }
    if args.peak_tflops:
        result["mfu"] = round(update_flops(cfg, roles, trained, answered) / seconds / (args.peak_tflops * 1e12), 3)
    print(json.dumps(result), flush=True)
    os._exit(0)  # engines leave threads behind


def compose(overrides: list[str], llama: bool) -> stages.PPO:
    """The quickstart's PPO with these overrides, as `alignkit ppo` composes it."""
    from hydra import compose, initialize_config_dir

    base = [item for item in QUICKSTART if item.split("=")[0].lstrip("+") not in {o.split("=")[0] for o in overrides}]
    model = [] if any(o.startswith("model.path=") for o in overrides) else [
        f"model.path={random_llama() if llama else 'demo:smollm2-135m-instruct'}"
    ]  # fmt: skip
    stages.register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return stages.to_config(compose("ppo", [*base, *model, *overrides]), "ppo")


def random_llama() -> Path:
    """A Llama of 1.2B parameters with random weights and the demo model's tokenizer, in a temporary folder."""
    import shutil

    from transformers import LlamaConfig, LlamaForCausalLM

    demo = Path(resolve_model("demo:smollm2-135m-instruct").base)
    folder = Path(tempfile.mkdtemp(prefix="alignkit-llama-"))
    for file in demo.glob("*token*"):
        shutil.copy(file, folder)
    for file in demo.glob("*.jinja"):
        shutil.copy(file, folder)
    shape = LlamaConfig(
        vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=4096, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    return folder


def one_process() -> World:
    """A process group of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return start()


def build(cfg: stages.PPO, world: World) -> tuple:
    """Roles, engines, sampler, reward and a batch of prompts, made as the stage makes them."""
    source = resolve_model(cfg.model.path)
    tokenizer = tokens.load_tokenizer(source.tokenizer)
    prompts, _ = tokens.prompt_dataset(cfg.data.rows("prompt"), tokenizer, cfg.max_prompt_length)
    order = tokens.PromptSampler(len(prompts), cfg.seed)
    drawn = [prompts[i] for i in order.next(cfg.rollout_batch_size // cfg.group_size)]
    batch = tokens.collate_prompts(drawn, tokenizer.pad_token_id)
    critic = cfg.critic if cfg.algorithm.needs_critic else None
    roles = cfg.finetune.roles(cfg.model, source, None, len(tokenizer), critic, cfg.seed).to(world.device).eval()
    bare_roles = cfg.finetune.roles(cfg.model, source, None, len(tokenizer), critic, cfg.seed).to(world.device).eval()
    engines = {
        role: Engine(
            roles, parameters, optimizer, cfg.deepspeed, world,
            dtype=cfg.model.dtype, micro_batch_size=cfg.micro_batch_size, updates=1000,
        )
        for role, optimizer in (("policy", cfg.optimizer), ("critic", cfg.critic_optimizer))
        if (parameters := cfg.finetune.parameters(roles, role))
    }  # fmt: skip
    sampler = cfg.rollout.start(
        rollout.Context.of(cfg, source, tokenizer, max_sequences=cfg.rollout_batch_size, roles=roles)
    )
    sampler.sync_weights(cfg.finetune.payload(roles), 1)
    score = rewards.start_all(cfg.rewards, rewards.Context(tokenizer))
    return roles, bare_roles, engines, sampler, score, batch


def run_bare(cfg: stages.PPO, roles: torch.nn.Module, experience, world: World) -> None:
    """Forward and backward of every role that trains, over the micro-batches of one round of updates."""
    mask = experience.response_mask
    for _ in range(cfg.algorithm.ppo_epochs):
        for rows in torch.randperm(len(mask)).split(cfg.mini_batch_size):
            part = experience.select(rows.to(mask.device))
            lengths = batches.row_lengths(part.mask)
            for index in batches.share_rows(lengths, cfg.micro_batch_size, 0, 1):
                row = part.select(index)
                length, slots = batches.window(lengths[index], row.starts, mask.shape[1])
                row = batches.cut(row, length, slots)
                inputs, lower = (row.ids, row.mask, row.starts, slots), row.shared_states
                lower = roles.shared(row.ids, row.mask) if lower is None else lower
                roles("policy", *inputs, cfg.rollout.temperature, lower=lower)[0].sum().backward()
                if "critic" in roles.role_of:
                    roles("critic", *inputs, lower=lower).sum().backward()
    roles.zero_grad()


def timed(function) -> float:
    synchronize()
    started = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_mib() -> int:
    """Peak memory: of the device where there is one, else of the process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def update_flops(cfg: stages.PPO, roles: torch.nn.Module, trained: int, answered: int) -> float:
    """Matrix-product FLOPs of a round of updates over `trained` tokens, `answered` of them in responses.

    2 a weight and token forward, 2 backward through a frozen weight, 4 through a trained one. Attention scores, adapters
    and the blocks below the lowest adapter are left out; the output embedding sees response tokens of the policy only.
    """
    hf = roles.model("policy")
    layers = hf.base_model.layers
    blocks = sum(p.numel() for block in layers[roles.blocks :] for n, p in block.named_parameters() if "lora_" not in n)
    head = hf.get_output_embeddings().weight.numel()
    each = 2 + (4 if cfg.finetune.name == "full" else 2)
    return each * (trained * blocks * (1 + ("critic" in roles.role_of)) + answered * head)


if __name__ == "__main__":
    main()
