"""Answer held-out prompts with several policies, score the answers, and compare the policies prompt by prompt."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import torch

from alignkit.config.stages import Evaluate
from alignkit.core.errors import InputError
from alignkit.core.io import write_atomic
from alignkit.data import dataset, tokens
from alignkit.models import loading
from alignkit.models.source import check_tokenizer, describe, resolve_model
from alignkit.rewards import base as rewards
from alignkit.rollout import base as rollout
from alignkit.rollout import canary as attest
from alignkit.tracking.run_log import RunLog
from alignkit.training import batches
from alignkit.training.engine import World


def main(cfg: Evaluate, world: World, log: RunLog) -> tuple[dict, dict]:
    # 1. Prompts; every policy must speak with the same tokenizer.
    sources = {name: resolve_model(path, f"policies.{name}") for name, path in cfg.policies.items()}
    reference = cfg.reference or next(iter(sources))
    main_source = sources[reference]
    tokenizer = tokens.of_model(main_source, cfg.model, log.note)
    check_tokenizer(sources, tokens.tokenizer_hash(tokenizer))
    rows = cfg.data.rows("prompt")
    prompts, dropped = tokens.prompt_dataset(rows, tokenizer, cfg.max_prompt_length)
    log.note(f"prompts: {dropped.describe()}")
    if len(prompts) < world.size:
        raise InputError(
            f"{len(prompts)} prompts for {world.size} ranks: lower launcher.num_ranks, or give more prompts"
        )
    batch = tokens.collate_prompts(prompts[world.rank :: world.size], tokenizer.pad_token_id)
    score = rewards.start_all(cfg.rewards, rewards.Context(tokenizer, cfg.model, resolve_model, world.device))
    ref = loading.load_policy(main_source, cfg.model, len(tokenizer)).to(world.device)
    ref_roles = loading.single_role(ref)
    canary = attest.Canary.of(cfg, prompts, tokenizer)
    if cfg.rollout.biased and len(sources) > 1:
        log.note(f"{cfg.rollout.biased}: the policies' KL is not given, what they say is not of their own law")

    # 2. Sample with each policy, on the same random streams, and take the KL to the reference on what it said.
    sampler, samples = None, []
    with log.progress("evaluating", len(sources), unit="policy") as bar:
        for version, (name, source) in enumerate(sources.items(), start=1):
            hf = ref if name == reference else loading.load_policy(source, cfg.model, len(tokenizer)).to(world.device)
            roles = ref_roles if name == reference else loading.single_role(hf)
            if sampler is None:
                sampler = cfg.rollout.start(
                    rollout.Context.of(
                        cfg, source, tokenizer, max_sequences=len(batch.prompt_ids) * cfg.group_size, roles=roles,
                        adapter_rank=rollout.stored_rank(cfg.rollout, sources.values()), note=log.note,
                    )
                )  # fmt: skip
            sampler.use(roles)
            sampler.sync_weights(rollout.stored_policy(source, partial(loading.named_weights, hf)), version=version)
            canary.check(sampler, roles, version)
            scored = score(sampler.generate(batch, cfg.group_size, cfg.seed, step=0))
            kl: list[float | None] = [0.0] * len(scored.scores)
            if name != reference:
                biased, temperature = cfg.rollout.biased, cfg.rollout.temperature
                kl = [None] * len(kl) if biased else kl_to(ref_roles, roles, scored.rollouts, temperature).tolist()
            texts = rewards.response_texts(tokenizer, scored.rollouts)
            for i, text in enumerate(texts):
                meta = scored.rollouts.meta[i]
                samples.append(
                    {
                        "prompt_index": meta["prompt_index"], "prompt": meta["prompt"], "policy": name, "response": text,
                        "score": float(scored.scores[i]), "finished": bool(scored.rollouts.finished[i]),
                        "length": int(scored.rollouts.response_mask[i].sum()), "kl": kl[i],
                    }
                )  # fmt: skip
            bar.update(version, **{name: float(scored.scores.mean())})
            del hf, roles
    if sampler is not None:
        world.barrier()  # servers answer until the last rank has its answers
        sampler.close()

    # 3. Means with intervals, differences to the reference prompt by prompt.
    order = {name: i for i, name in enumerate(sources)}
    samples = sorted(
        (s for share in world.gather(samples) for s in share), key=lambda s: (s["prompt_index"], order[s["policy"]])
    )
    results = summarize(samples, list(sources), reference, cfg.bootstrap, cfg.seed) | {"reward": "+".join(cfg.rewards)}
    if world.rank == 0:
        write_atomic(cfg.run_dir / "samples.jsonl", "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
        write_atomic(cfg.run_dir / "results.json", json.dumps(results, indent=2) + "\n")
    metrics = {
        f"{name}/{key}": value
        for name, entry in results["policies"].items()
        for key, value in entry.items()
        if value is not None
    }
    log.log(0, metrics)
    facts = describe(
        main_source, tokenizer_hash=tokens.tokenizer_hash(tokenizer), data_hash=dataset.fingerprint(rows), adapter=None
    )
    return metrics, facts


def kl_to(ref_roles, roles, rollouts, temperature: float) -> torch.Tensor:
    """Per-response KL estimate to the reference in nats [B]: Σ_t (logprob - ref_logprob) over the valid tokens."""

    def logprobs(module):
        device = next(module.parameters()).device
        return batches.map_rows(
            lambda ids, mask, starts, slots: module("policy", ids, mask, starts, slots, temperature)[0],
            *(part.to(device) for part in rollouts.flush_left()), rollouts.response_ids.shape[1], 16,
        ).cpu()  # fmt: skip

    return ((logprobs(roles) - logprobs(ref_roles)) * rollouts.response_mask).sum(1)


def summarize(samples: list[dict], names: list[str], reference: str, resamples: int, seed: int) -> dict:
    """Means per policy and paired differences to the reference, each with a 95 % bootstrap interval over prompts."""
    prompts = sorted({s["prompt_index"] for s in samples})
    place = {p: i for i, p in enumerate(prompts)}
    totals = {name: np.zeros((len(prompts), 2)) for name in names}
    for s in samples:
        totals[s["policy"]][place[s["prompt_index"]]] += (s["score"], 1)
    means = {name: t[:, 0] / t[:, 1] for name, t in totals.items()}  # [prompts] of each policy
    of = {name: [s for s in samples if s["policy"] == name] for name in names}
    policies: dict[str, dict[str, float | None]] = {
        name: bootstrap(means[name], resamples, seed)
        | {key: mean([s[key] for s in of[name]]) for key in ("kl", "length", "finished")}
        for name in names
    }
    differences = {
        f"{name}_minus_{reference}": bootstrap(means[name] - means[reference], resamples, seed)
        for name in names
        if name != reference
    }
    return {"prompts": len(prompts), "reference": reference, "policies": policies, "differences": differences}


def mean(values: list[float | None]) -> float | None:
    """The mean, or None where one of them is not known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def bootstrap(values: np.ndarray, resamples: int, seed: int) -> dict[str, float | None]:
    """Mean of one value a prompt, with the 2.5 % and 97.5 % quantiles of the means of resampled prompts (Efron 1979)."""
    picks = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), (0.025, 0.975))
    return {"mean": float(values.mean()), "ci_low": float(low), "ci_high": float(high)}
