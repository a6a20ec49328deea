#!/usr/bin/env python
"""A whole PPO step against TRL 0.25.1's PPOTrainer, the last one there was, in turn in one run.

    scripts/bench_vs_trl.py [--pairs 2] [--updates 4] [--env .venv-trl]

The same SmolLM2-135M, prompts, batch, response length, epochs, minibatches, threads, dtype (float32) and settings of the
allocator (those of our launcher); the policy has the same LoRA adapter in both: rank 8 on the linear layers of the last six
blocks, as in the quickstart (`--last-layers 0`: of all). Every response has the full length in both. TRL's value and reward
models are whole models of their own, and its value model trains in full: it has no adapters for them. The peer's environment
is made on the first call. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEER = ["trl==0.25.1", "transformers>=4.56,<5", "peft>=0.17,<0.19", "torch==2.13.0", "accelerate<2", "datasets<5"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2, help="how often each of the two runs")
    parser.add_argument("--updates", type=int, default=4, help="of a run; the first warms up")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24, help="of every response")
    parser.add_argument("--last-layers", type=int, default=6, help="adapted blocks; 0: all")
    parser.add_argument("--env", type=Path, default=HERE.parent / ".venv-trl", help="the peer's environment")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print("RESULT " + json.dumps(ours(json.loads(args.worker.read_text()))), flush=True)
        os._exit(0)
    peer = make_env(args.env)
    with tempfile.TemporaryDirectory() as folder:
        settings = write_settings(Path(folder), args)
        found: dict[str, list[dict]] = {"alignkit": [], "trl": []}
        for pair in range(args.pairs):
            for name, command in (
                ("trl", [peer, str(HERE / "_trl_ppo.py"), str(settings)]),
                ("alignkit", [sys.executable, __file__, "--worker", str(settings)]),
            ):
                found[name].append(run(command))
                rate = args.batch / statistics.median(found[name][-1]["seconds"])
                print(f"pair {pair + 1}, {name}: {rate:.2f} episodes/s, {found[name][-1]}", flush=True)
    rates = {name: [args.batch / statistics.median(r["seconds"]) for r in results] for name, results in found.items()}
    peaks = {name: max(r["peak_mib"] for r in results) for name, results in found.items()}
    print(
        json.dumps(
            {
                "episodes_per_s": round(statistics.median(rates["alignkit"]), 3),
                "trl_episodes_per_s": round(statistics.median(rates["trl"]), 3),
                "ratio": round(
                    statistics.median(a / b for a, b in zip(rates["alignkit"], rates["trl"], strict=True)), 2
                ),
                "peak_mib": peaks["alignkit"],
                "trl_peak_mib": peaks["trl"],
            }
        )
    )


def make_env(folder: Path) -> str:
    """The interpreter of the peer's environment."""
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        print(f"making {folder}, once", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(Path(sys.executable).parent / "uv"), "pip", "install", "-q", "-p", str(python), *PEER]
        told = ["bash", "-c", 'source scripts/_env.sh; tell_uv; exec "$@"', "scripts/quickstart.sh"]
        subprocess.run([*told, *install], check=True, cwd=HERE.parent)
        (folder / "done").touch()
    return str(python)


def write_settings(folder: Path, args: argparse.Namespace) -> Path:
    """What both sides run, as JSON."""
    from alignkit.data import tokens
    from alignkit.data.dataset import Data
    from alignkit.models.source import resolve_model

    source = resolve_model("demo:smollm2-135m-instruct")
    tokenizer = tokens.load_tokenizer(source.tokenizer)
    prompts, _ = tokens.prompt_dataset(Data(path="demo:chitchat/train").rows("prompt"), tokenizer, 64)
    path = folder / "settings.json"
    settings = {
        "base": source.base, "prompts": [p["ids"] for p in prompts[: args.batch * args.updates]], "batch": args.batch,
        "updates": args.updates, "tokens": args.tokens, "epochs": 2, "minibatches": 2, "rank": 8, "temperature": 0.8,
        "last_layers": args.last_layers,
        "out": str(folder / "out"),
    }  # fmt: skip
    path.write_text(json.dumps(settings))
    return path


def run(command: list[str]) -> dict:
    from alignkit.launch import ALLOCATOR

    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "GLIBC_TUNABLES": ALLOCATOR}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    print("".join(f"  {said}\n" for said in done.stdout.splitlines() if said.startswith("a step took")), end="")
    if line is None:
        sys.exit(f"{command[:2]} failed:\n{done.stderr[-3000:]}")
    return json.loads(line.removeprefix("RESULT "))


def ours(settings: dict) -> dict:
    """Seconds of each update after the first, all its phases, and this process's peak memory."""
    import bench_ppo
    import one_base
    import torch

    from alignkit.data import tokens
    from alignkit.models.source import resolve_model
    from alignkit.rewards import base as rewards
    from alignkit.rollout import base as rollout
    from alignkit.rollout import canary as attest
    from alignkit.stages import ppo
    from alignkit.tracking.run_log import Clock
    from alignkit.training import batches
    from alignkit.training.engine import Engine

    batch = settings["batch"]
    cfg = bench_ppo.compose(
        [
            f"finetune.last_layers={settings['last_layers'] or 'null'}", f"finetune.rank={settings['rank']}", f"finetune.alpha={2 * settings['rank']}",
            f"rollout_batch_size={batch}", f"mini_batch_size={batch // settings['minibatches']}",
            f"micro_batch_size={batch // settings['minibatches']}", f"algorithm.ppo_epochs={settings['epochs']}",
            f"rollout.max_new_tokens={settings['tokens']}", f"rollout.min_tokens={settings['tokens']}",
            "rollout.allow_biased_sampling=true", f"rollout.temperature={settings['temperature']}",
        ],
        llama=False,
    )  # fmt: skip
    world = bench_ppo.one_process()
    source = resolve_model(cfg.model.path)
    tokenizer = tokens.load_tokenizer(source.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        sft, reward = one_base.adapters(cfg, source, len(tokenizer), Path(folder))
        roles = cfg.finetune.roles(cfg.model, sft, reward, len(tokenizer), cfg.critic, cfg.seed).eval()
    engines = {
        role: Engine(
            roles, cfg.finetune.parameters(roles, role), optimizer, cfg.deepspeed, world,
            dtype=cfg.model.dtype, micro_batch_size=cfg.micro_batch_size, updates=100,
        )
        for role, optimizer in (("policy", cfg.optimizer), ("critic", cfg.critic_optimizer))
    }  # fmt: skip
    sampler = cfg.rollout.start(rollout.Context.of(cfg, source, tokenizer, max_sequences=batch, roles=roles))
    prompts = [{"ids": ids, "index": i, "meta": {}} for i, ids in enumerate(settings["prompts"])]
    canary, payload = attest.Canary.of(cfg, prompts, tokenizer), cfg.finetune.payload(roles)
    sampler.sync_weights(payload, 1)
    canary.check(sampler, roles, 1)
    score = rewards.start_all({}, rewards.Context(tokenizer))
    state, shuffle, ends, clock = cfg.algorithm.start(), torch.Generator().manual_seed(0), [], Clock()
    for step in range(settings["updates"]):
        rows = prompts[step * batch : (step + 1) * batch]
        with clock("generate"):
            rollouts = sampler.generate(tokens.collate_prompts(rows, tokenizer.pad_token_id), 1, 0, step)
        with clock("forward"):
            seen = ppo.forward(cfg, roles, rollouts)
            scored = score(rollouts)
            scored.scores = seen["reward_model"]
            experience, _ = cfg.algorithm.experience(
                scored, seen["policy"], seen["ref_policy"], seen["critic"], state, 1
            )
            experience.shared_states = seen.get("shared_states")
        with clock("update"):
            ppo.update(cfg, roles, engines, batches.move(experience, world.device), world, shuffle, list(engines))
        with clock("sync"):
            sampler.sync_weights(payload, step + 2)
        with clock("attest"):
            canary.check(sampler, roles, step + 2)
        clock.lap()
        ends.append(time.perf_counter())
    print(clock.describe(), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"seconds": [b - a for a, b in itertools.pairwise(ends)], "peak_mib": round(peak)}


if __name__ == "__main__":
    main()
