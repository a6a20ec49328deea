"""Sample N answers a prompt, score them, and write the best and the worst as a preference pair."""

from __future__ import annotations

import json
import math

from alignkit.config.stages import Sample
from alignkit.core.errors import InputError
from alignkit.core.io import write_atomic
from alignkit.data import dataset, tokens
from alignkit.models import loading
from alignkit.models.source import check_tokenizer, describe, resolve_model
from alignkit.rewards import base as rewards
from alignkit.rollout import base as rollout
from alignkit.rollout import canary
from alignkit.tracking.run_log import RunLog
from alignkit.training.engine import World


def main(cfg: Sample, world: World, log: RunLog) -> tuple[dict, dict]:
    # 1. Policy, prompts and the engine that answers them.
    source = resolve_model(cfg.model.path)
    tokenizer = tokens.of_model(source, cfg.model, log.note)
    check_tokenizer({"model": source}, tokens.tokenizer_hash(tokenizer))
    rows = cfg.data.rows("prompt")
    prompts, dropped = tokens.prompt_dataset(rows, tokenizer, cfg.max_prompt_length)
    log.note(f"prompts: {dropped.describe()}")
    if len(prompts) < world.size:
        raise InputError(
            f"{len(prompts)} prompts for {world.size} ranks: lower launcher.num_ranks, or give more prompts"
        )
    mine = prompts[world.rank :: world.size]
    with log.progress("starting the engine", 0):
        hf = loading.load_policy(source, cfg.model, len(tokenizer)).to(world.device)
        roles = loading.single_role(hf)
        sampler = cfg.rollout.start(
            rollout.Context.of(
                cfg, source, tokenizer, max_sequences=len(mine) * cfg.group_size, roles=roles,
                adapter_rank=rollout.stored_rank(cfg.rollout, [source]), note=log.note,
            )
        )  # fmt: skip
        sampler.sync_weights(rollout.stored_policy(source, lambda: loading.named_weights(hf)), version=1)
        canary.Canary.of(cfg, prompts, tokenizer).check(sampler, roles, version=1)
    score = rewards.start_all(cfg.rewards, rewards.Context(tokenizer, cfg.model, resolve_model, world.device))

    # 2. Sample and score, a chunk at a time.
    pairs, answered, kept = [], [], 0
    chunk = 32
    with log.progress("sampling", len(prompts), unit="prompt") as bar:
        for start in range(0, len(mine), chunk):
            batch = tokens.collate_prompts(mine[start : start + chunk], tokenizer.pad_token_id)
            scored = score(sampler.generate(batch, cfg.group_size, cfg.seed, step=0))
            texts = rewards.response_texts(tokenizer, scored.rollouts)
            for first in range(0, len(texts), cfg.group_size):
                group = slice(first, first + cfg.group_size)
                done = scored.rollouts.finished[group].tolist() if cfg.finished_only else [True] * cfg.group_size
                scores = scored.scores[group].tolist()
                meta = scored.rollouts.meta[first]
                pairs += make_pairs(meta, texts[group], scores, done, cfg.pairs_per_prompt, cfg.min_margin)
                answered += scores
            kept = len(pairs)
            bar.update(
                min((start + chunk) * world.size, len(prompts)),
                pairs=kept * world.size,
                score=sum(answered) / len(answered),
            )
    world.barrier()  # servers answer until the last rank has its answers
    sampler.close()

    # 3. Write the pairs of all ranks in the order of the prompts.
    shares = world.gather((pairs, answered))
    pairs = sorted((pair for share, _ in shares for pair in share), key=lambda pair: pair["prompt_index"])
    scores = [s for _, share in shares for s in share]
    skipped = len(prompts) - len({pair["prompt_index"] for pair in pairs})
    which = "finished answers" if cfg.finished_only else "answers"
    log.note(
        f"{len(pairs)} pairs of {len(prompts)} prompts; {skipped} had no two {which} with scores more than {cfg.min_margin} apart"
    )
    if not pairs:
        raise InputError(
            "no pair came out: every prompt's answers scored alike or were cut; raise group_size, rollout.temperature or rollout.max_new_tokens"
        )
    log.samples(0, pairs[:16])
    if world.rank == 0:
        write_atomic(
            cfg.run_dir / "pairs.jsonl", "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        )
    metrics = {
        "prompts": len(prompts),
        "pairs": len(pairs),
        "skipped": skipped,
        "score_mean": math.fsum(scores) / len(scores),  # the same bits whichever rank has which
    }
    facts = describe(
        source, tokenizer_hash=tokens.tokenizer_hash(tokenizer), data_hash=dataset.fingerprint(rows), adapter=None
    )
    return metrics, facts


def make_pairs(
    meta: dict, texts: list[str], scores: list[float], finished: list[bool], count: int, min_margin: float
) -> list[dict]:
    """Up to `count` pairs of the finished, non-empty, distinct answers to one prompt: best with worst, second best with
    second worst, and so on while the scores are more than `min_margin` apart."""
    answers = {t.strip(): s for s, t, f in zip(scores, texts, finished, strict=True) if f and t.strip()}
    ranked = sorted(answers.items(), key=lambda answer: (-answer[1], answer[0]))
    pairs = []
    for (best, high), (worst, low) in zip(ranked[: min(count, len(ranked) // 2)], ranked[::-1], strict=False):
        if high - low > min_margin:
            pairs.append(
                {
                    "prompt": meta["prompt"], "chosen": best, "rejected": worst,
                    "chosen_score": high, "rejected_score": low, "prompt_index": meta["prompt_index"],
                }
            )  # fmt: skip
    return pairs
