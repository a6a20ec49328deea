"""Reward model: TRL's RewardTrainer on chosen and rejected responses, then the scores' zero point."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from trl import RewardConfig, RewardTrainer

from alignkit.algorithms import functional as F
from alignkit.config.stages import Reward
from alignkit.core.errors import RunError
from alignkit.data import dataset, tokens
from alignkit.models import loading
from alignkit.models.score_heads import save_head, score_head
from alignkit.models.source import check_tokenizer, describe, resolve_model
from alignkit.stages import card, token_ids, trl
from alignkit.tracking.run_log import RunLog
from alignkit.training import batches, saving
from alignkit.training.engine import World, gathered


def main(cfg: Reward, world: World, log: RunLog) -> tuple[dict, dict]:
    # 1. Pairs and tokens; the split is by prompt.
    source = resolve_model(cfg.model.path)
    tokenizer = tokens.of_model(source, cfg.model, log.note)
    check_tokenizer({"model": source}, tokens.tokenizer_hash(tokenizer))
    rows, held_out = trl.split_rows(cfg)
    train, dropped = tokens.preference_dataset(rows, tokenizer, cfg.max_length)
    log.note(f"training pairs: {dropped.describe()}")
    evaluation = None
    if held_out:
        evaluation, dropped = tokens.preference_dataset(held_out, tokenizer, cfg.max_length)
        log.note(f"held-out pairs: {dropped.describe()}")

    # 2. The base with a scalar head; its adapter starts as the SFT run's, where there is one.
    hf = loading.load_base(
        source.base, cfg.model, len(tokenizer), "AutoModelForSequenceClassification", cfg.finetune.nf4, num_labels=1
    )
    hf.config.pad_token_id = tokenizer.pad_token_id
    generator = torch.Generator().manual_seed(cfg.seed)
    hf.score = score_head(hf.config.hidden_size, generator, bias=False).to(hf.dtype)
    peft_config = cfg.finetune.peft_config("SEQ_CLS", hf)
    if peft_config is not None:
        torch.manual_seed(cfg.seed)
        hf = loading.adapt_for_scores(hf, peft_config, source.adapter)
    names = {name: f"reward_model/{name}" for name in ("loss", "accuracy", "learning_rate")}
    reporter = trl.Reporter(log, names, ("reward_model/loss", "reward_model/accuracy"))
    facts = describe(
        source, tokenizer_hash=tokens.tokenizer_hash(tokenizer), data_hash=dataset.fingerprint(rows),
        adapter=peft_config is not None, nf4=cfg.finetune.nf4,
    )  # fmt: skip

    def complete(model: Any, folder: Path, mean: float = 0.0, std: float = 1.0, normalize: str = "none") -> None:
        """Write the head, and the ids that the model was trained on."""
        with gathered(_head_of(model)):
            if world.rank == 0:
                save_head(normalised_head(model, mean, std, normalize), folder)
                token_ids.write(rows, tokenizer, folder)

    trainer = trl.careful(PairTrainer, cfg, world, reporter, facts, complete)(
        model=hf,
        args=trl.arguments(
            RewardConfig, cfg, world, max_length=None, center_rewards_coefficient=cfg.center_coef, disable_dropout=True
        ),
        train_dataset=train,
        processing_class=tokenizer,
        callbacks=[reporter],
    )

    # 3. Train, and write what was trained.
    metrics = trl.train(trainer, cfg, world, log) | {"train_pairs": len(train)}
    model_dir = cfg.run_dir / "model"
    tokens.name_ends(hf, tokenizer)
    with saving.weights(model_dir):
        trainer.save_model(str(model_dir))

    # 4. Score the held-out pairs (without any: the training pairs) for accuracy and zero point, and write the head; its
    # bias moves the mean score to 0, and its weight the spread to 1.
    def score(pairs) -> tuple[torch.Tensor, torch.Tensor]:
        return score_pairs(trainer, pairs, tokenizer.pad_token_id, world, cfg.micro_batch_size)

    with saving.beside(model_dir):
        chosen, rejected = score(evaluation if evaluation is not None else train)
        check_finite(chosen, rejected, cfg)
        mean, std = float(torch.cat([chosen, rejected]).mean()), float(torch.cat([chosen, rejected]).std(correction=0))
        metrics |= {"score_mean": mean, "score_std": std}
        if world.rank == 0:
            tokens.save_tokenizer(tokenizer, model_dir)
        complete(trainer.model, model_dir, mean, std, cfg.normalize)
        if evaluation is not None:
            metrics |= accuracy_metrics(chosen, rejected)
            card.write(cfg, (chosen, rejected), held_out, tokenizer, score, world, log)
    adapter = (model_dir / "adapter_config.json").is_file()
    facts = describe(
        source, tokenizer_hash=tokens.tokenizer_hash(tokenizer), data_hash=dataset.fingerprint(rows), adapter=adapter,
        nf4=cfg.finetune.nf4,
    )  # fmt: skip
    return metrics, facts


class PairTrainer(RewardTrainer):
    """TRL's, with a loss that is a sum over pairs, divided by those of the whole optimizer step on all ranks; TRL's own is
    a mean of the micro-batches' means, and so are its metrics."""

    own_counts: list[int]  # of the step's micro-batches; `_trl.careful` keeps them
    counts: list[int]
    losses: list[torch.Tensor]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        number, ranks = len(self.losses), self.accelerator.num_processes
        own = self.own_counts[number]  # 0: the pair fills up another rank's batch
        outputs = model(**inputs, use_cache=False)
        scores = outputs.logits.squeeze(-1).float()
        chosen, rejected = scores.chunk(2)
        mean = F.pairwise_loss(chosen, rejected, center_coef=self.args.center_rewards_coefficient or 0.0)
        self.keep_metrics(chosen.detach()[:own], rejected.detach()[:own], self.counts[number])
        loss = mean * own * ranks / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def keep_metrics(self, chosen: torch.Tensor, rejected: torch.Tensor, count: int) -> None:
        """TRL's metrics of a micro-batch, over the `count` pairs that all ranks have of it."""
        scores = torch.cat([chosen, rejected])
        bounds = torch.stack([scores.amin(), -scores.amax()]) if len(scores) else scores.new_full((2,), math.inf)
        low, high = self.accelerator.gather(bounds).reshape(-1, 2).amin(0).tolist()
        sums = torch.stack([(chosen > rejected).sum(), (chosen - rejected).sum(), scores.sum() / 2])
        accuracy, margin, mean = (self.accelerator.gather(sums).reshape(-1, 3).sum(0) / max(count, 1)).tolist()
        found = {"accuracy": accuracy, "margin": margin, "min_reward": low, "mean_reward": mean, "max_reward": -high}
        for name, value in found.items():
            self._metrics["train"][name].append(value)


def score_pairs(
    trainer: RewardTrainer, pairs, pad_id: int, world: World, micro_batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw scores of every chosen and rejected response, each rank scoring its share: ([N], [N]) f32 on every rank."""
    model = trainer.model.eval()
    mine = list(range(world.rank, len(pairs), world.size))
    rows = [pairs[i][side] for i in mine for side in ("chosen_ids", "rejected_ids")]
    rows += [[pad_id]] * (2 * math.ceil(len(pairs) / world.size) - len(rows))  # as many on every rank
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows], device=world.device)
    mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows], device=world.device)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with gathered(head := _head_of(model)):
        scores = batches.map_rows(
            lambda i, m, starts, slots: loading.apply_head(head, loading.last_valid(loading.trunk_hidden(base, i, m), m)),
            ids, mask, torch.zeros(len(ids), dtype=torch.long, device=world.device), longest, 2 * micro_batch_size,
            together=loading.is_cut(base),
        )  # fmt: skip
    shares = world.gather((mine, scores[: 2 * len(mine)].reshape(-1, 2).cpu()))
    table = torch.empty(len(pairs), 2)
    for index, part in shares:
        if index:
            table[index] = part
    return table[:, 0], table[:, 1]


def check_finite(chosen: torch.Tensor, rejected: torch.Tensor, cfg: Reward) -> None:
    """Raise RunError unless all scores are finite."""
    if not all(bool(torch.isfinite(side).all()) for side in (chosen, rejected)):
        raise RunError(
            f"the scores are not finite after training with optimizer.learning_rate={cfg.optimizer.learning_rate:g}: "
            "lower it, or raise optimizer.warmup_steps"
        )


def accuracy_metrics(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, float]:
    """Held-out accuracy (a tie counts half), the margin, and how likely a coin reaches it (one-sided binomial)."""
    n = len(chosen)
    wins = int((chosen > rejected).sum())
    ties = int((chosen == rejected).sum())
    p = sum(math.comb(n, k) for k in range(wins, n + 1)) / 2**n
    return {
        "eval_accuracy": (wins + 0.5 * ties) / n,
        "eval_accuracy_p": p,
        "eval_pairs": n,
        "eval_margin": float((chosen - rejected).mean()),
        "eval_loss": float(-torch.nn.functional.logsigmoid(chosen - rejected).mean()),
    }


def normalised_head(model, mean: float, std: float, normalize: str) -> torch.nn.Linear:
    """The trained head with its scores' mean moved to 0 (`mean`) and spread to 1 (`mean_std`), or as it is (`none`)."""
    trained = _head_of(model)
    head = torch.nn.Linear(trained.weight.shape[1], 1)
    gain = 1.0 / max(std, 1e-8) if normalize == "mean_std" else 1.0
    with torch.no_grad():
        head.weight.copy_(trained.weight.float() * gain)
        head.bias.fill_(0.0 if normalize == "none" else -mean * gain)
    return head


def _head_of(model) -> torch.nn.Linear:
    """The score layer; PEFT keeps the trained one in `modules_to_save`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.score.modules_to_save["default"] if hasattr(base.score, "modules_to_save") else base.score
