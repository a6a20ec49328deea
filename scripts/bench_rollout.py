#!/usr/bin/env python
"""Rollouts: vLLM against transformers' `generate`, what a weight sync costs, and how long the engine takes to start.

    scripts/bench_rollout.py [--tokens 32] [--dtype float32] [--sequences 32,64,128]

SmolLM2-135M, the same prompts, every response of the same length, the two engines in turn in one process. The start is
that of the tests' tiny model in a process of its own, from `python` to the first token. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32, help="of every response")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--sequences", default="32,64,128")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)  # the worker that measures a start
    args = parser.parse_args()
    if args.start:
        first_token(args.start)
        os._exit(0)
    sizes = [int(n) for n in args.sequences.split(",")]
    result: dict[str, float | str] = {"start_s": measure_start()}
    print(f"start: {result['start_s']} s to the first token of the tiny model", flush=True)
    result |= compare(sizes, args.tokens, args.dtype)
    print(json.dumps(result), flush=True)
    os._exit(0)  # engines leave threads behind


def compare(sizes: list[int], length: int, dtype: str) -> dict[str, float | str]:
    """{"speedup_<n>": …} and the seconds and bytes of a sync of either payload."""
    import torch

    from alignkit.data import tokens
    from alignkit.data.dataset import Data
    from alignkit.finetune.lora import LoRA
    from alignkit.models import loading
    from alignkit.models.config import Model
    from alignkit.models.source import resolve_model
    from alignkit.rollout.base import Context
    from alignkit.rollout.vllm import VLLM

    source = resolve_model("demo:smollm2-135m-instruct")
    tokenizer = tokens.load_tokenizer(source.tokenizer)
    prompts, _ = tokens.prompt_dataset(Data(path="demo:chitchat/train").rows("prompt"), tokenizer, 64)
    model = Model(path="", dtype=dtype)
    finetune = LoRA()
    roles = finetune.roles(model, source, None, len(tokenizer), None, 0).eval()
    moved(roles)
    hf = loading.load_base(source.base, model, len(tokenizer))
    payload, made = finetune.payload(roles), {}
    for kind in ("merged", "adapter"):
        context = Context(
            source.base, dtype, 0, 64 + length, tokenizer.eos_token_id, tokenizer.pad_token_id, max(sizes),
            roles=roles, adapter_rank=finetune.rank,
        )  # fmt: skip
        law = VLLM(max_new_tokens=length, min_tokens=length, payload=kind)
        made[kind] = law.start(context)
    found: dict[str, float | str] = {"dtype": dtype, "tokens": length, "threads": torch.get_num_threads()}
    for kind, sampler in made.items():
        seconds = []
        for version in range(1, 5):
            started = time.perf_counter()
            sampler.sync_weights(payload, version)
            seconds.append(time.perf_counter() - started)
        found[f"sync_{kind}_s"] = round(sorted(seconds)[len(seconds) // 2], 3)
    found["sync_merged_bytes"] = sum(t.numel() * t.element_size() for _, t in payload.weights())
    with tempfile.TemporaryDirectory() as folder:
        finetune.save(roles, Path(folder))
        found["sync_adapter_bytes"] = (Path(folder) / "adapter_model.safetensors").stat().st_size

    def vllm(batch, kind="merged"):
        return int(made[kind].generate(batch, 1, 0, 0).response_mask.sum())

    def transformers(batch):
        with torch.no_grad():
            out = hf.generate(
                input_ids=batch.prompt_ids, attention_mask=batch.prompt_mask.long(), do_sample=True, temperature=1.0,
                top_k=0, top_p=1.0, max_new_tokens=length, min_new_tokens=length, pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
            )  # fmt: skip
        return (out.shape[1] - batch.prompt_ids.shape[1]) * len(out)

    warm = tokens.collate_prompts(prompts[:8], tokenizer.pad_token_id)
    for run in (vllm, transformers):
        run(warm)
    for n in sizes:
        batch = tokens.collate_prompts([prompts[i % len(prompts)] for i in range(n)], tokenizer.pad_token_id)
        rates = SimpleNamespace(vllm=[], hf=[])
        for _ in range(3):
            rates.vllm.append(rate(vllm, batch))
            rates.hf.append(rate(transformers, batch))
        ratios = sorted(v / h for v, h in zip(rates.vllm, rates.hf, strict=True))
        found[f"speedup_{n}"] = round(ratios[1], 2)
        print(
            f"{n} sequences: vLLM {[round(r) for r in rates.vllm]} tok/s, transformers {[round(r) for r in rates.hf]}"
        )
    found["adapter_tok_s"] = round(rate(lambda b: vllm(b, "adapter"), batch))
    return found


def moved(roles) -> None:
    """Give the fresh adapter weights that do something."""
    import torch

    for name, parameter in roles.named_parameters():
        if ".lora_B.policy." in name:
            torch.nn.init.normal_(parameter, std=0.01)


def rate(function, batch) -> float:
    """Tokens a second of one call."""
    started = time.perf_counter()
    return function(batch) / (time.perf_counter() - started)


def measure_start() -> float:
    """Seconds from starting Python to the first token, with the tests' tiny model."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import tiny_model

    with tempfile.TemporaryDirectory() as folder:
        tiny_model(folder, hidden=64, layers=4)
        started = time.perf_counter()
        subprocess.run([sys.executable, __file__, "--start", folder], check=True, stdout=subprocess.DEVNULL)
        return round(time.perf_counter() - started, 1)


def first_token(folder: Path) -> None:
    """Start the engine on a model folder and sample one token."""
    from alignkit.data import tokens
    from alignkit.rollout.base import Context
    from alignkit.rollout.vllm import VLLM

    tokenizer = tokens.load_tokenizer(str(folder))
    batch = tokens.collate_prompts([{"ids": [5, 6, 7], "index": 0, "meta": {}}], tokenizer.pad_token_id)
    context = Context(str(folder), "float32", 0, 64, tokenizer.eos_token_id, tokenizer.pad_token_id, 8)
    VLLM(max_new_tokens=1).start(context).generate(batch, 1, 0, 0)


if __name__ == "__main__":
    main()
