"""PPO: prompts → generate → score → log-probs and values → experience → update → sync weights → log, step by step."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from alignkit.algorithms.base import cut_pays
from alignkit.config import stages
from alignkit.config.stages import PPO
from alignkit.core.errors import RunError, Saved
from alignkit.core.types import Experience, Loss, Metrics, Rollouts, ScoredRollouts
from alignkit.data import dataset, tokens
from alignkit.models import loading
from alignkit.models.source import check_tokenizer, describe, resolve_model
from alignkit.rewards import base as rewards
from alignkit.rollout import base as rollout
from alignkit.rollout import canary as attest
from alignkit.runs import manifests
from alignkit.stages import token_ids
from alignkit.stages.ptx import PtxBatches
from alignkit.tracking.run_log import Clock, RunLog
from alignkit.training import batches, checkpoint, finite, interrupt, saving
from alignkit.training.engine import Engine, World, gathered, recomputed


def main(cfg: PPO, world: World, log: RunLog) -> tuple[dict, dict]:
    algorithm = cfg.algorithm
    for line in algorithm.warnings():
        log.note(line)
    if cfg.rollout.biased:
        log.note(f"{cfg.rollout.biased}: no KL is given, objective/log_ratio is the mean log-ratio of what was sampled")
    if not algorithm.needs_critic:
        log.note(f"algorithm={algorithm.name} has no critic: critic.* and critic_optimizer.* are not used")

    # 1. Prompts, and the data of PPO-ptx.
    source = resolve_model(cfg.model.path)
    tokenizer = tokens.of_model(source, cfg.model, log.note)
    rows = cfg.data.rows("prompt")
    prompts, dropped = tokens.prompt_dataset(rows, tokenizer, cfg.max_prompt_length)
    log.note(f"prompts: {dropped.describe()}")
    order = tokens.PromptSampler(len(prompts), cfg.seed)
    ptx = PtxBatches(cfg, tokenizer, log) if cfg.ptx.coef else None

    # 2. Policy, reference, critic and reward model; an optimizer for each of the two that train.
    learned = {name: "reward_model" for name, item in cfg.rewards.items() if item.name == "reward_model"}
    reward_source = next((resolve_model(cfg.rewards[name].path, f"rewards.{name}.path") for name in learned), None)
    if reward_source is not None:
        check_tokenizer({"model": source, "reward_model": reward_source}, tokens.tokenizer_hash(tokenizer))
        log.note(token_ids.check(reward_source.adapter or Path(reward_source.base), tokenizer))
    with log.progress("loading the models", 0):
        critic = cfg.critic if algorithm.needs_critic else None
        roles = cfg.finetune.roles(cfg.model, source, reward_source, len(tokenizer), critic, cfg.seed)
        roles.ends = tokens.stops(tokenizer)
        engines = {
            role: Engine(
                roles, parameters, optimizer, cfg.deepspeed, world,
                dtype=cfg.model.dtype, micro_batch_size=cfg.micro_batch_size,
                updates=rounds_learned(algorithm, role, cfg.steps),
            )
            for role, optimizer in (("policy", cfg.optimizer), ("critic", cfg.critic_optimizer))
            if (parameters := cfg.finetune.parameters(roles, role))
        }  # fmt: skip

    facts = describe(
        source,
        tokenizer_hash=tokens.tokenizer_hash(tokenizer),
        data_hash=dataset.fingerprint(rows),
        adapter=None,
        nf4=cfg.finetune.nf4,
    )

    def write_weights(folder: Path) -> None:
        with gathered(roles.model("policy")):
            if world.rank == 0:
                tokens.name_ends(roles.model("policy"), tokenizer)
                cfg.finetune.save(roles, folder / "model")

    state, shuffle = algorithm.start(), torch.Generator().manual_seed(cfg.seed)
    first, version, merit, told = 0, 1, None, None
    if (found := checkpoint.newest(cfg.run_dir, log.note)) is not None:
        saved = checkpoint.load(found, {"shuffle": shuffle}, engines, world)
        first, version, merit = saved["step"], saved["version"], saved["merit"]
        order.load_state_dict(saved["order"])
        state.load_state_dict(saved["algorithm"])
        for role, engine in engines.items():
            engine.at_update(rounds_learned(algorithm, role, first))
        if ptx is not None:
            ptx.order.load_state_dict(saved["ptx"])
        log.note(f"goes on from {found.name}: step {first} of {cfg.steps}")
    log.rewind(first - 1)  # what an interrupted attempt logged beyond it

    if world.rank == 0:
        kept = cfg.finetune.saved(roles)
        trained = {role: cfg.finetune.parameters(roles, role) for role in engines}
        moments = sum(map(saving.adam_bytes, trained.values()))
        saving.before(cfg, log, tokenizer, kept, saving.model_bytes(kept, trained["policy"]), moments, cfg.steps)

    # 3. The engine that samples, holding the policy's weights.
    with log.progress("starting the engine", 0):
        sampler = cfg.rollout.start(
            rollout.Context.of(
                cfg, source, tokenizer, max_sequences=cfg.rollout_batch_size // world.size, roles=roles, note=log.note
            )
        )
        canary = attest.Canary.of(cfg, prompts, tokenizer)
        payload = cfg.finetune.payload(roles)
        with gathered(roles.model("policy")):
            sampler.sync_weights(payload, version)
        canary.check(sampler, roles, version)
    log.note(sampler.describe())
    score = rewards.start_all(cfg.rewards, rewards.Context(tokenizer))
    roles.eval()

    clock, background = Clock(), ThreadPoolExecutor(1)
    ahead: list[Future[Rollouts]] = []
    lag = getattr(cfg.rollout, "async_steps", 0)  # how many versions old rollouts may be

    def generate(step: int) -> Rollouts:
        drawn = order.next(cfg.rollout_batch_size // cfg.group_size)  # by all ranks
        again = [drawn[:i].count(prompt) for i, prompt in enumerate(drawn)]  # a prompt drawn twice: other answers
        mine = slice(world.rank, None, world.size)
        chosen = [prompts[i] | {"draw": n} for i, n in zip(drawn[mine], again[mine], strict=True)]
        batch = tokens.collate_prompts(chosen, tokenizer.pad_token_id)
        return sampler.generate(batch, cfg.group_size, cfg.seed, step)

    def save(step: int) -> None:  # the one that comes next
        progress = {"step": step, "version": version, "order": cursor, "algorithm": state.state_dict(), "merit": merit}
        progress |= {"ptx": ptx.order.state_dict()} if ptx is not None else {}

        def write(folder: Path) -> None:
            write_weights(folder)
            if world.rank == 0:
                tokens.save_tokenizer(tokenizer, folder / "model")
                adapter = (folder / "model" / "adapter_config.json").is_file()
                stages.save(cfg, folder / "config.yaml")
                manifests.describe_checkpoint(folder, cfg.run_dir, cfg.stage, step, facts | {"adapter": adapter})

        kept = (cfg.keep_last, cfg.keep_best)
        checkpoint.save(cfg.run_dir, progress, {"shuffle": shuffle}, engines, world, *kept, write)

    def stop_if_asked(step: int) -> None:
        if (reason := interrupt.process.due(world)) is not None:
            if found is None or step > first:
                save(step)
            raise Saved(step, cfg.steps, reason)

    cursor = order.state_dict()  # before the prompts of a step are drawn
    with log.progress("PPO", cfg.steps) as bar:
        for step in range(first, cfg.steps):
            stop_if_asked(step)

            # 4. Generate: this rank answers its share of the step's prompts (or did so while the last batch trained).
            with clock("generate"):
                rollouts = ahead.pop(0).result() if ahead else generate(step)
                if version - rollouts.policy_version > lag:
                    raise RunError(
                        f"rollouts of policy version {rollouts.policy_version} at version {version}: "
                        f"rollout.async_steps={lag} allows no such lag"
                    )
                rollouts = batches.move(rollouts, world.device)
                sampler.sleep()
            stop_if_asked(step)  # nothing has changed yet but the prompts drawn
            if step == first:
                same, finished = token_ids.same_ids(rollouts, tokenizer)
                log.note(f"{same} of {finished} finished responses have the ids that their text encodes to")
            cursor = order.state_dict()
            if lag and step + 1 < cfg.steps:
                ahead.append(background.submit(generate, step + 1))

            # 5. Log-probs of policy and reference, values, the reward model's scores: one pass, by the code that trains.
            with clock("forward"):
                seen = forward(cfg, roles, rollouts)

            # 6. Score: the learned reward, the programmatic ones, their weighted sum.
            with clock("score"):
                scored = score(rollouts, {name: seen.pop(role) for name, role in learned.items()})

            # 7. Experience of the global batch, the same on every rank.
            scored, seen = batches.gather(world, cfg.group_size, tokenizer.pad_token_id, scored, seen)
            old_logprobs, ref_logprobs, entropy = seen["policy"], seen["ref_policy"], seen["entropy"]
            experience, metrics = algorithm.experience(
                scored, old_logprobs, ref_logprobs, seen.get("critic"), state, cfg.group_size
            )
            experience.shared_states = seen.get("shared_states")
            if not told and (told := cut_pays(metrics)) is not None:
                log.note(f"step {step}: {told}")
            mask = experience.response_mask
            if cfg.rollout.biased:
                metrics = without_kl(metrics)
            metrics |= {
                "objective/entropy": (float((entropy * mask).sum()), int(mask.sum())),
                "objective/kl_coef": (state.kl.value, 1),
            }

            # 8. Update: every epoch in a new order, every optimizer step normalised by its own global token count.
            with clock("update"), recomputed(roles, cfg.gradient_checkpointing):
                learning = [role for role in engines if role == "critic" or step >= algorithm.policy_starts_at]
                numbers = update(cfg, roles, engines, experience, world, shuffle, learning, ptx)
                for role in learning:
                    numbers[f"{role}/learning_rate"] = engines[role].learning_rate
                    engines[role].next_update()
            if "policy" in learning and not cfg.rollout.biased:  # or the KL is 0 whatever the coefficient
                state.kl.update(metrics["objective/kl"][0] / metrics["objective/kl"][1], len(mask))

            # 9. Sync: the sampler gets the new weights under a new version, and proves that it answers with them.
            with clock("sync"):
                version += 1
                sampler.wake()
                with gathered(roles.model("policy")):
                    sampler.sync_weights(payload, version)
            with clock("attest"):
                numbers |= canary.check(sampler, roles, version)

            # 10. Log.
            numbers |= {name: total / max(count, 1) for name, (total, count) in metrics.items()}
            numbers |= clock.lap() | {"rollout/policy_version": scored.rollouts.policy_version}
            numbers |= {"rollout/sequences": len(mask), "rollout/tokens": int(experience.mask.sum())}
            log.log(step, numbers)
            if step % cfg.sample_every == 0:
                log.samples(step, sample_rows(tokenizer, scored, old_logprobs - ref_logprobs, cfg.rollout.biased))
            merit = checkpoint.merit(numbers, cfg.keep_best)
            if cfg.save_steps and (step + 1) % cfg.save_steps == 0 and step + 1 < cfg.steps:
                with clock("checkpoint"):
                    save(step + 1)
            bar.update(
                step + 1,
                **{n: numbers[f"objective/{n}"] for n in ("score", "kl", "entropy") if f"objective/{n}" in numbers},
            )

    # 11. The model for the next stage.
    with saving.weights(cfg.run_dir / "model"):
        write_weights(cfg.run_dir)
    with saving.beside(cfg.run_dir / "model"):
        if world.rank == 0:
            tokens.save_tokenizer(tokenizer, cfg.run_dir / "model")
        world.barrier()  # servers answer until the last rank has its answers
        sampler.close()
    log.note(clock.describe())
    facts["adapter"] = (cfg.run_dir / "model" / "adapter_config.json").is_file()
    return numbers | {"steps": cfg.steps}, facts


def rounds_learned(algorithm: Any, role: str, step: int) -> int:
    """In how many of the first `step` rounds the role learned: its schedule counts no others."""
    return max(0, step - algorithm.policy_starts_at) if role == "policy" else step


def forward(cfg: PPO, roles: torch.nn.Module, rollouts: Rollouts) -> dict[str, torch.Tensor]:
    """No-grad forward of every role over this rank's rollouts, in micro-batches of like length.

    Returns:
        policy, ref_policy: log-probs [B, Lr]; entropy: the policy's [B, Lr]; critic: values [B, Lr];
        reward_model: scores [B]; shared_states: [B, L, d]. What the run has not is absent.
    """
    others = [role for role in ("ref_policy", "critic", "reward_model") if role in roles.role_of]
    names = ["shared_states", "policy", "entropy", "critic_on_trunk", *others]

    def every_role(ids: torch.Tensor, mask: torch.Tensor, starts: torch.Tensor, slots: int) -> tuple:
        lower = roles.shared(ids, mask)  # the blocks that no role adapts, once for all
        found = [*roles("policy", ids, mask, starts, slots, cfg.rollout.temperature, True, lower)]
        for role in others:
            out = roles(role, ids, mask, starts, slots, cfg.rollout.temperature, lower=lower)
            found.append(out[0] if isinstance(out, tuple) else out)
        return lower if cfg.keep_shared_states else None, *found

    rows = rollouts.flush_left()
    slots = rollouts.response_ids.shape[1]
    found = batches.map_rows(every_role, *rows, slots, cfg.micro_batch_size, behind=1, together=loading.is_cut(roles))
    named = {name: tensor for name, tensor in zip(names, found, strict=True) if tensor is not None}
    if "critic_on_trunk" in named:
        named["critic"] = named.pop("critic_on_trunk")
    return named


def update(
    cfg: PPO,
    roles: torch.nn.Module,
    engines: dict[str, Engine],
    experience: Experience,
    world: World,
    shuffle: torch.Generator,
    learning: list[str],
    ptx: PtxBatches | None = None,
) -> dict[str, float]:
    """All optimizer steps of a round, on an experience that every rank holds.

    Args:
        engines: {"policy" | "critic": Engine}; `learning` names those that take steps in this round.
        shuffle: the order of the rows, the same on every rank.

    Returns:
        Means over the steps (the largest value of names that end in `_max`), how many steps were taken, and 1 for
        update/early_stop where target_kl ended the round.
    """
    steps: list[dict[str, float]] = []
    found: dict[str, float] = {"update/early_stop": 0.0}
    mask = experience.response_mask
    for epoch in range(cfg.algorithm.ppo_epochs):
        order = torch.randperm(len(mask), generator=shuffle)
        for number, rows in enumerate(order.split(cfg.mini_batch_size)):
            part = experience.select(rows.to(mask.device))
            metrics, taken = optimize(cfg, roles, {r: engines[r] for r in learning}, part, world, ptx)
            if epoch == number == 0 and "policy/ratio_gap_max" in metrics:
                found["policy/first_ratio_gap_max"] = metrics["policy/ratio_gap_max"]
            if not taken:
                found["update/early_stop"] = 1.0
                break
            steps.append(metrics)
        if found["update/early_stop"]:
            break
    return found | mean_metrics(steps or [metrics]) | {"update/steps": float(len(steps))}


def optimize(
    cfg: PPO,
    roles: torch.nn.Module,
    engines: dict[str, Engine],
    batch: Experience,
    world: World,
    ptx: PtxBatches | None = None,
) -> tuple[dict[str, float], bool]:
    """One optimizer step of policy and critic on a minibatch that every rank holds and shares out.

    Returns:
        (metrics over all ranks, whether the step was taken: False where approx_kl is above target_kl).
    """
    algorithm, temperature = cfg.algorithm, cfg.rollout.temperature
    behind = int(batch.value_mask.sum() > batch.response_mask.sum())
    lengths = batches.row_lengths(batch.mask)
    groups = batches.share_rows(lengths, cfg.micro_batch_size, world.rank, world.size)
    counts = {"policy": algorithm.policy_count(batch.response_mask), "critic": float(batch.value_mask.sum())}
    extra = ptx.next(world, cfg.micro_batch_size) if ptx is not None and "policy" in engines else []
    sums: dict[str, list[torch.Tensor]] = {}
    for number, index in enumerate(groups):
        last = number == len(groups) - 1
        part = batch.select(index)
        length, slots = batches.window(lengths[index], part.starts, batch.response_mask.shape[1], behind)
        part = batches.cut(part, length, slots)
        inputs = (part.ids, part.mask, part.starts, slots)
        lower = roles.shared(part.ids, part.mask) if part.shared_states is None else part.shared_states
        losses: dict[str, Loss] = {}
        if "policy" in engines:
            logprobs, entropy, values = engines["policy"]("policy", *inputs, temperature, algorithm.ent_coef > 0, lower)
            losses["policy"] = algorithm.policy_loss(part, logprobs, entropy)
            gap = ((logprobs.detach() - part.old_logprobs).exp() - 1).abs()[part.response_mask]
            losses["policy"].metrics["policy/ratio_gap_max"] = (gap.max() if len(gap) else gap.sum(), 1)
            if values is not None:  # a critic on the policy's trunk: one gradient for both
                losses["critic"] = algorithm.critic_loss(part, values)
            engines["policy"].backward([(loss, counts[role]) for role, loss in losses.items()], last and not extra)
        if "critic" in engines:
            losses["critic"] = algorithm.critic_loss(part, engines["critic"]("critic", *inputs, lower=lower))
            engines["critic"].backward([(losses["critic"], counts["critic"])], last)
        for loss in losses.values():
            collect(sums, loss.metrics)
    for number, (inputs, loss_of, count) in enumerate(extra):
        loss = loss_of(engines["policy"]("policy", *inputs)[0])
        engines["policy"].backward([(Loss(cfg.ptx.coef * loss.total, loss.count), count)], number == len(extra) - 1)
        collect(sums, loss.metrics)
    collect(sums, {"update/padding_fraction": batches.padding(lengths, groups)})
    metrics = world.reduce_metrics(reduce_steps(sums))
    with finite.guarded(cfg, world.rank, max(engine.update for engine in engines.values()), batch):
        finite.check({f"{role}/loss": metrics.get(f"{role}/loss", 0.0) for role, count in counts.items() if count})
        if algorithm.target_kl is not None and metrics.get("policy/approx_kl", 0.0) > algorithm.target_kl:
            for engine in engines.values():
                engine.discard()
            return metrics, False
        return metrics | {f"{role}/grad_norm": engine.step() for role, engine in engines.items()}, True


def collect(sums: dict[str, list[torch.Tensor]], metrics: Metrics) -> None:
    """Keep a micro-batch's (sum, count) pairs, on the device: reading them would wait for it."""
    for name, pair in metrics.items():
        kept = [x.double() if isinstance(x, torch.Tensor) else torch.tensor(float(x)).double() for x in pair]
        sums.setdefault(name, []).append(torch.stack([x.to(kept[0].device) for x in kept]))


def reduce_steps(sums: dict[str, list[torch.Tensor]]) -> Metrics:
    """Sums over the micro-batches, maxima of the names that end in `_max`."""
    whole = {name: torch.stack(pairs) for name, pairs in sums.items()}
    return {
        name: tuple((pairs.amax(0) if name.endswith("_max") else pairs.sum(0)).tolist())
        for name, pairs in whole.items()
    }


def mean_metrics(steps: list[dict[str, float]]) -> dict[str, float]:
    """Mean over a round's optimizer steps, maximum of the names that end in `_max`."""
    return {
        name: max(s[name] for s in steps) if name.endswith("_max") else sum(s[name] for s in steps) / len(steps)
        for name in steps[0]
    }


def without_kl(metrics: Metrics) -> Metrics:
    """What is a KL only of answers sampled from the policy's own law, under the name of what it is of any."""
    return {name.replace("objective/kl", "objective/log_ratio"): pair for name, pair in metrics.items()}


def sample_rows(
    tokenizer: Any, scored: ScoredRollouts, log_ratio: torch.Tensor, biased: str, count: int = 4
) -> list[dict]:
    """The first few rollouts of a step, to read."""
    texts = rewards.response_texts(tokenizer, scored.rollouts)
    ratios = (log_ratio * scored.rollouts.response_mask).sum(1)
    return [
        {
            "prompt": scored.rollouts.meta[i]["prompt"],
            "response": texts[i],
            "score": float(scored.scores[i]),
            "log_ratio" if biased else "kl": float(ratios[i]),
        }
        for i in range(min(count, len(texts)))
    ]
