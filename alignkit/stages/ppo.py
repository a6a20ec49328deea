"""PPO: prompts → generate → score → log-probs and values → experience → update → sync weights → log, step by step."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from alignkit import artifacts, data, models, tokens
from alignkit.config import PPO
from alignkit.engine import Engine, World
from alignkit.log import RunLog
from alignkit.rewards import base as rewards
from alignkit.rollout import base as rollout
from alignkit.types import Experience, Metrics, Rollouts, ScoredRollouts


def main(cfg: PPO, world: World, log: RunLog) -> tuple[dict, dict]:
    algorithm = cfg.algorithm

    # 1. Prompts.
    source = artifacts.resolve_model(cfg.model.path)
    tokenizer = tokens.load_tokenizer(
        source.tokenizer, trust_remote_code=cfg.model.trust_remote_code, chat_template=cfg.model.chat_template
    )
    rows = cfg.data.rows("prompt")
    prompts, dropped = tokens.prompt_dataset(rows, tokenizer, cfg.max_prompt_length)
    log.note(f"prompts: {dropped.describe()}")
    order = tokens.PromptSampler(len(prompts), cfg.seed)

    # 2. Policy, reference, critic and reward model; an optimizer for each of the two that train.
    learned = {name: "reward_model" for name, item in cfg.rewards.items() if item.name == "reward_model"}
    reward_source = next(
        (artifacts.resolve_model(cfg.rewards[name].path, f"rewards.{name}.path") for name in learned), None
    )
    if reward_source is not None:
        artifacts.check_tokenizer({"model": source, "reward_model": reward_source}, tokens.tokenizer_hash(tokenizer))
    with log.progress("loading the models", 0):
        roles = cfg.finetune.roles(
            cfg.model, source, reward_source, len(tokenizer), algorithm.needs_critic, cfg.seed
        ).to(world.device)
        exact = {role: copy.deepcopy(head.state_dict()) for role, head in roles.heads.items()}
        if cfg.critic_head == "zero" and "critic" in roles.heads:
            for parameter in roles.heads["critic"].parameters():
                torch.nn.init.zeros_(parameter)
        engines = {
            role: Engine(
                roles, cfg.finetune.parameters(roles, role), optimizer, cfg.deepspeed, world,
                dtype=cfg.model.dtype, micro_batch_size=cfg.micro_batch_size, updates=cfg.steps,
            )
            for role, optimizer in (("policy", cfg.optimizer), ("critic", cfg.critic_optimizer))
            if role == "policy" or algorithm.needs_critic
        }  # fmt: skip

        if "reward_model" in roles.heads:  # frozen: float32 again, where DeepSpeed rounded it to the engine's dtype
            roles.heads["reward_model"].float().load_state_dict(exact["reward_model"])

    # 3. The engine that samples, holding the policy's weights.
    with log.progress("starting the engine", 0):
        sampler = cfg.rollout.start(
            rollout.Context.of(cfg, source, tokenizer, max_sequences=cfg.rollout_batch_size // world.size, roles=roles)
        )
        version = 1
        sampler.sync_weights(lambda: cfg.finetune.sync_payload(roles), version)
    score = rewards.start_all(cfg.rewards, rewards.Context(tokenizer))
    kl = algorithm.kl_controller()
    shuffle = torch.Generator().manual_seed(cfg.seed)
    roles.eval()  # dropout is 0 already; ratios compare the same function twice

    with log.progress("PPO", cfg.steps) as bar:
        for step in range(cfg.steps):
            clock = Clock()

            # 4. Generate: this rank answers its share of the step's prompts.
            with clock("generate"):
                drawn = order.next(cfg.rollout_batch_size // cfg.group_size)  # by all ranks
                again = [
                    drawn[:i].count(prompt) for i, prompt in enumerate(drawn)
                ]  # a prompt drawn twice: other answers
                mine = slice(world.rank, None, world.size)
                chosen = [prompts[i] | {"draw": n} for i, n in zip(drawn[mine], again[mine], strict=True)]
                batch = tokens.collate_prompts(chosen, tokenizer.pad_token_id)
                rollouts = sampler.generate(batch, cfg.group_size, cfg.seed, step)
                rollouts = move(rollouts, world.device)

            # 5. Log-probs of policy and reference, values, the reward model's scores: one pass, by the code that trains.
            with clock("forward"):
                seen = forward(cfg, roles, rollouts)

            # 6. Score: the learned reward, the programmatic ones, their weighted sum.
            with clock("score"):
                scored = score(rollouts, {name: seen.pop(role) for name, role in learned.items()})

            # 7. Experience of the global batch, the same on every rank.
            scored, seen = gather(world, cfg.group_size, tokenizer.pad_token_id, scored, seen)
            old_logprobs, ref_logprobs, values, entropy = (
                seen.get(k) for k in ("policy", "ref_policy", "critic", "entropy")
            )
            experience, metrics = algorithm.experience(scored, old_logprobs, ref_logprobs, values, kl.value)
            experience.shared_states = seen.get("shared_states")
            mask = experience.response_mask
            metrics |= {
                "objective/entropy": (float((entropy * mask).sum()), int(mask.sum())),
                "objective/kl_coef": (kl.value, 1),
            }

            # 8. Update: every epoch in a new order, every optimizer step normalised by its own global token count.
            with clock("update"):
                updates: list[Metrics] = []
                for epoch in range(algorithm.ppo_epochs):
                    rank_rows = torch.randperm(len(mask), generator=shuffle).split(cfg.mini_batch_size)
                    for number, rows_of_step in enumerate(rank_rows):
                        update = optimize(cfg, roles, engines, experience.select(rows_of_step.to(mask.device)), world)
                        if epoch == number == 0:
                            metrics["policy/first_ratio_gap_max"] = (update["policy/ratio_gap_max"][0], 1)
                        updates.append(update)
                rates = {f"{role}/learning_rate": engine.learning_rate for role, engine in engines.items()}
                for engine in engines.values():
                    engine.next_update()
            kl.update(metrics["objective/kl"][0] / metrics["objective/kl"][1], len(mask))

            # 9. Sync: the sampler gets the new weights under a new version.
            with clock("sync"):
                version += 1
                sampler.sync_weights(lambda: cfg.finetune.sync_payload(roles), version)

            # 10. Log.
            numbers = {name: total / max(count, 1) for name, (total, count) in metrics.items()}
            numbers |= mean_metrics(updates) | rates
            numbers |= clock.metrics() | {"rollout/policy_version": scored.rollouts.policy_version}
            log.log(step, numbers)
            if step % cfg.sample_every == 0:
                log.samples(step, sample_rows(tokenizer, scored, old_logprobs - ref_logprobs))
            bar.update(
                step + 1,
                score=numbers["objective/score"],
                kl=numbers["objective/kl"],
                entropy=numbers["objective/entropy"],
            )
    sampler.close()

    # 11. The model for the next stage.
    if world.rank == 0:
        cfg.finetune.save(roles, cfg.run_dir / "model")
        tokenizer.save_pretrained(cfg.run_dir / "model")
    facts = artifacts.describe(
        source,
        tokenizer_hash=tokens.tokenizer_hash(tokenizer),
        data_hash=data.fingerprint(rows),
        adapter=(cfg.run_dir / "model" / "adapter_config.json").is_file(),
    )
    return numbers | {"steps": cfg.steps}, facts


def forward(cfg: PPO, roles: torch.nn.Module, rollouts: Rollouts) -> dict[str, torch.Tensor]:
    """No-grad forward of every role over this rank's rollouts, in micro-batches of like length.

    Returns:
        policy, ref_policy: log-probs [B, Lr]; entropy: the policy's [B, Lr]; critic: values [B, Lr];
        reward_model: scores [B]; shared_states: [B, Lp + Lr, d]. What the run has not is absent.
    """
    names = [role for role in ("policy", "ref_policy", "critic", "reward_model") if role in roles.role_of]

    def every_role(ids: torch.Tensor, mask: torch.Tensor, slots: int) -> tuple[torch.Tensor | None, ...]:
        lower = roles.shared(ids, mask)  # the blocks that no role adapts, once for all
        results = [lower if cfg.keep_shared_states else None]
        for role in names:
            out = roles(role, ids, mask, slots, cfg.rollout.temperature, role == "policy", lower)
            results += [t for t in out if t is not None] if isinstance(out, tuple) else [out]
        return tuple(results)

    found = models.map_rows(
        every_role, rollouts.ids, rollouts.mask, rollouts.response_ids.shape[1], cfg.micro_batch_size
    )
    named = dict(zip(["shared_states", names[0], "entropy", *names[1:]], found, strict=True))
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def optimize(cfg: PPO, roles: torch.nn.Module, engines: dict[str, Engine], batch: Experience, world: World) -> Metrics:
    """One optimizer step of policy and critic on a minibatch that every rank holds and shares out.

    Returns:
        Metrics summed over ranks; each count is global.
    """
    algorithm = cfg.algorithm
    count = float(batch.response_mask.sum())  # of the whole step: the batch is the same on every rank
    slots = batch.response_mask.shape[1]
    mine = torch.arange(world.rank, len(batch.mask), world.size, device=batch.mask.device)
    micro_batches = [mine[i] for i in models.by_length(batch.mask[mine], cfg.micro_batch_size)]
    sums: dict[str, list[torch.Tensor]] = {}
    for number, index in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        part = batch.select(index)
        window, kept = models.trim(part.mask, slots)
        part = cut(part, window, kept)
        ids, mask = part.ids, part.mask
        lower = roles.shared(ids, mask) if part.shared_states is None else part.shared_states
        logprobs, entropy = engines["policy"](
            "policy", ids, mask, kept, cfg.rollout.temperature, algorithm.ent_coef > 0, lower
        )
        losses = {"policy": algorithm.policy_loss(part, logprobs, entropy)}
        engines["policy"].backward(losses["policy"], count, last)
        if algorithm.needs_critic:
            losses["critic"] = algorithm.critic_loss(part, engines["critic"]("critic", ids, mask, kept, lower=lower))
            engines["critic"].backward(losses["critic"], count, last)
        gap = ((logprobs.detach() - part.old_logprobs).exp() - 1).abs()[part.response_mask]
        metrics = {k: v for loss in losses.values() for k, v in loss.metrics.items()}
        metrics["policy/ratio_gap_max"] = (gap.max() if len(gap) else gap.sum(), 1)
        for name, pair in metrics.items():
            sums.setdefault(name, []).append(
                torch.stack([torch.as_tensor(x, dtype=torch.float64, device=ids.device) for x in pair])
            )
    norms = {f"{role}/grad_norm": (engine.step(), 1.0) for role, engine in engines.items()}
    local = {
        name: tuple(
            torch.stack(pairs).amax(0).tolist() if name.endswith("_max") else torch.stack(pairs).sum(0).tolist()
        )
        for name, pairs in sums.items()
    }
    reduced = world.reduce_metrics(local)
    return {name: (value, 1.0) for name, value in reduced.items()} | norms


def cut(batch: Experience, window: slice, slots: int) -> Experience:
    """The slots in `window` of what covers prompt and response, the first `slots` of what covers the response."""
    whole = ("ids", "mask", "shared_states")
    present = {f.name: getattr(batch, f.name) for f in fields(batch) if getattr(batch, f.name) is not None}
    return replace(batch, **{k: x[:, window] if k in whole else x[:, :slots] for k, x in present.items()})


def gather(world: World, group_size: int, pad_id: int, scored: ScoredRollouts, seen: dict[str, torch.Tensor]) -> tuple:
    """All ranks' rollouts and per-token results as one batch, prompts in the order drawn: the batch of a single rank."""
    if world.size == 1:
        return scored, seen
    device = scored.scores.device
    shares = world.gather(move((scored, seen), torch.device("cpu")))
    slots = max(share[0].rollouts.prompt_ids.shape[1] for share in shares)
    for theirs, results in shares:
        pad = slots - theirs.rollouts.prompt_ids.shape[1]
        theirs.rollouts.prompt_ids = torch.nn.functional.pad(theirs.rollouts.prompt_ids, (pad, 0), value=pad_id)
        theirs.rollouts.prompt_mask = torch.nn.functional.pad(theirs.rollouts.prompt_mask, (pad, 0), value=False)
        if "shared_states" in results:
            results["shared_states"] = torch.nn.functional.pad(results["shared_states"], (0, 0, pad, 0))
    rows = len(scored.scores)
    # Row i of rank r answers, as sibling i % G, the drawn prompt (i // G) * world + r.
    place = [
        ((i // group_size) * world.size + r) * group_size + i % group_size
        for r in range(world.size)
        for i in range(rows)
    ]
    order = torch.tensor(place).argsort()
    whole = (
        join([theirs for theirs, _ in shares]).select(order),
        {k: join([theirs[k] for _, theirs in shares])[order] for k in seen},
    )
    return move(whole, device)


def join(parts: list[Any]) -> Any:
    """Concatenate tensors, lists, dicts of them and step dataclasses along the rows."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts)
    if isinstance(first, list):
        return [item for part in parts for item in part]
    if isinstance(first, dict):
        return {key: join([part[key] for part in parts]) for key in first}
    if is_dataclass(first) and not isinstance(first, type):
        return type(first)(**{f.name: join([getattr(part, f.name) for part in parts]) for f in fields(first)})
    return first


def move(item: Any, device: torch.device) -> Any:
    """The same tuple, step dataclass or tensor on `device`."""
    if isinstance(item, torch.Tensor):
        return item.to(device)
    if isinstance(item, tuple):
        return tuple(move(part, device) for part in item)
    if isinstance(item, dict):
        return {key: move(value, device) for key, value in item.items()}
    if hasattr(item, "select"):
        return type(item)(**{f.name: move(getattr(item, f.name), device) for f in fields(item)})
    return item


def mean_metrics(updates: list[Metrics]) -> dict[str, float]:
    """Mean over the round's optimizer steps, maximum of the names that end in `_max`."""
    return {
        name: max(u[name][0] for u in updates)
        if name.endswith("_max")
        else sum(u[name][0] for u in updates) / len(updates)
        for name in updates[0]
    }


def sample_rows(tokenizer: Any, scored: ScoredRollouts, log_ratio: torch.Tensor, count: int = 4) -> list[dict]:
    """The first few rollouts of a step, to read."""
    texts = rewards.response_texts(tokenizer, scored.rollouts)
    kl = (log_ratio * scored.rollouts.response_mask).sum(1)
    return [
        {
            "prompt": scored.rollouts.meta[i]["prompt"],
            "response": texts[i],
            "score": float(scored.scores[i]),
            "kl": float(kl[i]),
        }
        for i in range(min(count, len(texts)))
    ]


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        """{"time/<phase>": seconds}, and "time/step" for the whole."""
        return {f"time/{phase}": s for phase, s in self.seconds.items()} | {
            "time/step": time.perf_counter() - self.started
        }
