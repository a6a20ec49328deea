"""What vLLM and the trainer say of the same tokens, as JSON: `python agreement.py laws|syncs MODEL DTYPE`."""

from __future__ import annotations

import json
import os
import sys

import torch

from alignkit.core.types import ModelSource, PromptBatch
from alignkit.data import tokens
from alignkit.finetune.full import Full
from alignkit.finetune.lora import LoRA
from alignkit.models.config import Model
from alignkit.rollout.base import Context, Sampling
from alignkit.rollout.canary import gap
from alignkit.rollout.hf import HF
from alignkit.rollout.vllm import VLLM

PAD, EOS = 1, 3  # of the tiny tokenizer; others are looked up


def batch_of(rows: list[list[int]], index: list[int] | None = None, draws: list[int] | None = None) -> PromptBatch:
    prompts = [
        {"ids": ids, "index": i if index is None else index[i], "draw": draws[i] if draws else 0, "meta": {}}
        for i, ids in enumerate(rows)
    ]
    return tokens.collate_prompts(prompts, PAD)


def laws(path: str, dtype: str) -> dict:
    """The two engines as samplers, on one model."""
    source = ModelSource(base=path, tokenizer=path)
    roles = LoRA().roles(Model(path=path, dtype=dtype), source, None, 320, None, 0).eval()
    context = Context(path, dtype, 0, 64, EOS, PAD, 256, roles=roles, adapter_rank=16)
    vllm = VLLM(max_new_tokens=12, temperature=0.7).start(context)
    hf = HF(max_new_tokens=12, temperature=0.7).start(context)
    for sampler in (vllm, hf):
        sampler.sync_weights(LoRA().payload(roles), 1)
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 320, (int(n),), generator=g).tolist() for n in torch.randint(3, 20, (64,), generator=g)]
    greedy = Sampling(1.0, 12, top_k=1)
    answers = [sampler.generate(batch_of(rows), 1, 0, 0, greedy) for sampler in (vllm, hf)]
    # The law of one token: many draws from one prompt against the trainer's own softmax.
    draws = 6000
    first = Sampling(0.7, 1)
    drawn = vllm.generate(batch_of([rows[0]]), draws, 7, 0, first).response_ids[:, 0]
    ids = torch.tensor([rows[0] + [0]])
    with torch.no_grad():
        roles.switch("policy")
        logits = roles.model("policy")(input_ids=ids).logits[0, len(rows[0]) - 1]
    expected = (logits / 0.7).softmax(-1).double() * draws
    counts = torch.bincount(drawn, minlength=len(expected)).double()
    big = expected >= 5
    if not big.all():  # the rare ones together
        counts = torch.cat([counts[big], counts[~big].sum()[None]])
        expected = torch.cat([expected[big], expected[~big].sum()[None]])
    statistic = float(((counts - expected).square() / expected).sum())
    # Streams: a row's answer depends on its own key alone.
    whole = vllm.generate(batch_of(rows[:16]), 2, 3, 5)
    halves = [vllm.generate(batch_of(rows[a : a + 8], list(range(a, a + 8))), 2, 3, 5) for a in (0, 8)]
    same = vllm.generate(batch_of([rows[0]] * 2, index=[0, 0], draws=[0, 1]), 1, 3, 5)
    other = vllm.generate(batch_of(rows[:16]), 2, 3, 6)
    return {
        "greedy_equal": int((answers[0].response_ids == answers[1].response_ids).all(1).sum()),
        "greedy_gap": float((answers[0].rollout_logprobs - answers[1].rollout_logprobs).abs().max()),
        "chi_square": statistic,
        "bins": len(expected),
        "split_equal": torch.equal(whole.response_ids, torch.cat([h.response_ids for h in halves])),
        "split_logprob_gap": float(
            (whole.rollout_logprobs - torch.cat([h.rollout_logprobs for h in halves])).abs().max()
        ),
        "twins_differ": not torch.equal(same.response_ids[0], same.response_ids[1]),
        "siblings_differ": not torch.equal(whole.response_ids[0], whole.response_ids[1]),
        "steps_differ": not torch.equal(whole.response_ids, other.response_ids),
    }


def syncs(path: str, dtype: str) -> dict:
    """The gap to the trainer after each of 20 syncs of moving weights: {payload: {"max": …, "mean": …}}."""
    global PAD
    tokenizer = tokens.load_tokenizer(path)
    PAD = tokenizer.pad_token_id
    source = ModelSource(base=path, tokenizer=path)
    model = Model(path=path, dtype=dtype)
    texts = [f"Tell me something good about {what}." for what in ("rain", "a dog", "mountains", "old books")]
    rows = [tokens.encode_prompt(tokenizer, text) for text in texts]
    found = {}
    for name, finetune, payload in (
        ("adapter", LoRA(), "adapter"),
        ("merged", LoRA(), "merged"),
        ("full", Full(), "auto"),
    ):
        roles = finetune.roles(model, source, None, len(tokenizer), None, 0).eval()
        trained = finetune.parameters(roles, "policy")
        context = Context(
            path,
            dtype,
            0,
            128,
            tokenizer.eos_token_id,
            PAD,
            16,
            roles=roles,
            adapter_rank=getattr(finetune, "rank", None),
        )
        sampler = VLLM(max_new_tokens=12, payload=payload).start(context)
        gaps = []
        for version in range(1, 22):  # the first is the unmoved base
            sampler.sync_weights(finetune.payload(roles), version)
            rollouts = sampler.generate(batch_of(rows), 1, 0, version)
            ids, mask, starts = rollouts.flush_left()
            with torch.no_grad():
                logprobs = roles("policy", ids, mask, starts, rollouts.response_mask.shape[1])[0].float()
                gaps.append(gap(rollouts, logprobs))
                for parameter in trained:
                    scale = 0.01 if name != "full" else 2e-4
                    parameter.add_(torch.randn(parameter.shape, dtype=torch.float32).to(parameter.dtype) * scale)
        found[name] = {"base": gaps[0][0], "max": max(g[0] for g in gaps), "mean": max(g[1] for g in gaps)}
        sampler.close()
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    print("RESULT " + json.dumps({"laws": laws, "syncs": syncs}[sys.argv[1]](sys.argv[2], sys.argv[3])), flush=True)
    os._exit(0)
