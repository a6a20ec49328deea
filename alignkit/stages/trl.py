"""What the two stages that TRL trains have in common: arguments, the split by prompt, logging, checkpoints.

The checkpoints are transformers' own (its Trainer reads them with `weights_only=True`, DeepSpeed unpickles its shards of
the optimizer: files that this run wrote, whose digests were checked). The Trainer writes them into `checkpoints/partial`;
a finished one is moved out of there with its digests, so a kill in mid-save leaves nothing that looks like one.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from alignkit.config import stages
from alignkit.config.stages import TrainStage
from alignkit.core.errors import InputError, Saved
from alignkit.core.types import Rows
from alignkit.data import tokens
from alignkit.runs import hashes, manifests
from alignkit.tracking.run_log import RunLog
from alignkit.training import checkpoint, finite, interrupt, saving
from alignkit.training.engine import World


def split_rows(cfg: TrainStage) -> tuple[Rows, Rows]:
    """(training rows, held-out rows): from `eval_data`, or `eval_fraction` of the prompts of `data`, no prompt in both."""
    rows = cfg.data.rows(cfg.row_kind)
    if cfg.eval_data.path:
        return rows, cfg.eval_data.rows(cfg.row_kind)
    return tokens.split_by_prompt(rows, cfg.eval_fraction, cfg.seed)


def arguments(cls: type, cfg: TrainStage, world: World, **extra: Any) -> Any:
    """TrainingArguments of class `cls` that say all that matters; DeepSpeed's config is written out, not `auto`."""
    accumulation = cfg.mini_batch_size // (cfg.micro_batch_size * world.size)
    optimizer = cfg.optimizer
    return cls(
        output_dir=str(cfg.run_dir / "checkpoints" / "partial"),
        per_device_train_batch_size=cfg.micro_batch_size,
        per_device_eval_batch_size=cfg.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=cfg.epochs,
        max_steps=cfg.max_steps,
        learning_rate=optimizer.learning_rate,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        lr_scheduler_type="constant_with_warmup" if optimizer.schedule == "constant" else optimizer.schedule,
        warmup_steps=optimizer.warmup_steps,
        bf16=cfg.model.dtype == "bfloat16",
        gradient_checkpointing=cfg.gradient_checkpointing,
        use_cpu=world.device.type == "cpu",
        seed=cfg.seed,
        data_seed=cfg.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if cfg.save_steps else "no",  # where a run is asked to stop it saves with either
        save_steps=cfg.save_steps or 500,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=world.device.type != "cpu",
        deepspeed=cfg.deepspeed.config(
            dtype=cfg.model.dtype,
            micro_batch_size=cfg.micro_batch_size,
            world=world.size,
            accumulation=accumulation,
            max_grad_norm=optimizer.max_grad_norm,
        ),
        **extra,
    )


def train(trainer: Any, cfg: TrainStage, world: World, log: RunLog) -> dict[str, float]:
    """`trainer.train()`, from the newest whole checkpoint of this run where there is one; {train_loss, steps}.

    Raises:
        Saved: a signal or a deadline stopped it, with a checkpoint of the step it had reached.
        RunError: a checkpoint could not be written, or a loss or gradient is not finite.
    """
    stop = StopEarly(world)
    trainer.add_callback(stop)
    found = checkpoint.newest(cfg.run_dir, log.note)
    saved = checkpoint.state_of(found) if found else {"step": 0, "tokens": 0}
    trainer._total_train_tokens = saved["tokens"]  # TRL counts them and logs the count, but saves it not
    log.rewind(saved["step"])
    if found:
        log.note(f"goes on from {found.name}")
        if saved["world_size"] != world.size:  # DeepSpeed's shards, a file a rank
            ranks = saved["world_size"]
            raise InputError(f"{found} is of {ranks} ranks, this run has {world.size}: set launcher.num_ranks={ranks}")
    partial = Path(trainer.args.output_dir)
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed attempt had begun to write
        partial.mkdir(parents=True)
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        model = saving.model_bytes(trainer.model, trained)
        checkpoint_bytes = model + saving.adam_bytes(trained)
        steps = math.ceil(epoch_steps(cfg, trainer) * cfg.epochs) if cfg.max_steps < 0 else cfg.max_steps
        saving.before(cfg, log, trainer.processing_class, trainer.model, model, checkpoint_bytes, steps)
    world.barrier()
    trainer.train(resume_from_checkpoint=str(found) if found else None)
    world.barrier()  # the Trainer ends with a look into its folder, on every rank
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    state = trainer.state
    if state.global_step < state.max_steps:
        raise Saved(state.global_step, state.max_steps, str(stop.reason))
    losses = [row["loss"] for row in state.log_history if "loss" in row]  # the Trainer's mean forgets earlier attempts
    return {"train_loss": sum(losses) / len(losses), "steps": state.global_step}


def epoch_steps(cfg: TrainStage, trainer: Any) -> int:
    """How many optimizer steps a pass over the rows takes."""
    return math.ceil(len(trainer.train_dataset) / cfg.mini_batch_size)


class StopEarly(TrainerCallback):
    """Has the trainer save and end where the run is asked to stop."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.reason: str | None = None

    def on_step_end(self, args, state, control, **_):
        self.reason = interrupt.process.due(self.world)
        if self.reason and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


def careful(
    cls: type,
    cfg: TrainStage,
    world: World,
    reporter: Reporter,
    facts: dict[str, Any],
    complete: Callable[[Any, Path], None] = lambda model, folder: None,
) -> type:
    """TRL's trainer `cls` with three things more, for which it has no callback.

    Args:
        facts: `models.source.describe` of the stage, for the checkpoints' manifests.
        complete: called by every rank with the model and the folder of a model that is written: what TRL leaves out.

    A step counts every row once: the rows that fill up the last batch of an epoch for the other ranks are taken out, the
    loss is divided by what the whole step counts (tokens, or pairs) over all ranks, and so are the metrics beside it.
    A loss or gradient that is not finite ends the run before its optimizer step: DeepSpeed steps inside the backward pass
    of a step's last micro-batch, so the losses of all its micro-batches are read just before that.
    A checkpoint that is written gets its digests and its name.
    """

    class Careful(cls):  # type: ignore[misc,valid-type]
        begun = -1  # the step that these belong to
        losses: list[torch.Tensor]
        micro_batches: list[dict[str, Any]]
        own_counts: list[int]  # what each micro-batch of the step counts on this rank,
        counts: list[int]  # on all ranks,
        read: list[int]  # and how many tokens it reads
        _total_train_tokens: int  # TRL's count
        loss_is_scaled_for_ga = True  # by `num_items_in_batch`, whatever the model's forward takes

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.accelerator.gather_for_metrics = self.accelerator.gather  # what it would leave out is out already

        def get_batch_samples(self, epoch_iterator: Iterator[dict], num_batches: int, device: Any) -> tuple[list, Any]:
            samples = list(islice(epoch_iterator, num_batches))
            at = self.accelerator.gradient_state
            left = at.remainder if samples and at.end_of_dataloader else 0  # rows of the epoch's last batch, 0: full
            found = [counted(batch) for batch in samples]
            if left > 0:
                rows = min(max(left - world.rank * cfg.micro_batch_size, 0), cfg.micro_batch_size)
                samples[-1], *found[-1:] = of_its_own(samples[-1], rows)
            self.own_counts = [count for count, _ in found]
            sums = world.sum(torch.tensor(found, device=device).reshape(-1, 2)).T.tolist()
            self.counts, self.read = sums
            return samples, torch.tensor(max(sum(self.counts), 1), device=device)

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.begun != self.state.global_step:
                self.begun, self.losses, self.micro_batches = self.state.global_step, [], []
            self.micro_batches.append(dict(inputs))
            with finite.guarded(cfg, world.rank, self.begun + 1, self.micro_batches):
                return super().training_step(model, inputs, *args, **kwargs)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            before = self._total_train_tokens
            found = super().compute_loss(model, inputs, *args, **kwargs)
            if model.training:
                self._total_train_tokens = before + self.read[len(self.losses)]
                self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
                self.losses.append((found[0] if isinstance(found, tuple) else found).detach())
                if self.accelerator.sync_gradients:
                    finite.check({"the loss": float(torch.stack(self.losses).sum())})
            return found

        def log(self, logs: dict[str, float], *args: Any) -> None:
            metrics = self._metrics["train"]
            self.state.epoch = self.state.global_step / epoch_steps(cfg, self)  # the Trainer's counts micro-batches
            for name, values in metrics.items():
                metrics[name] = [over_step(name, values, self.counts)] if name != "num_tokens" else values
            super().log(logs, *args)

        def _save_checkpoint(self, *args: Any) -> None:
            step = self.state.global_step
            partial, final = Path(self.args.output_dir), cfg.run_dir / "checkpoints" / f"step_{step:06d}"
            with checkpoint.intact(final, partial):
                super()._save_checkpoint(*args)
                world.barrier()  # every rank has written its files
                written = partial / f"checkpoint-{step}"
                if world.rank == 0:
                    link_model(written)
                complete(self.model, written / "model")
                if world.rank == 0:
                    stages.save(cfg, written / "config.yaml")
                    manifests.describe_checkpoint(written, cfg.run_dir, cfg.stage, step, facts)
                    state = {"step": step, "tokens": self._total_train_tokens, "world_size": world.size}
                    state["merit"] = checkpoint.merit(reporter.latest, cfg.keep_best)
                    checkpoint.publish(written, final, state, cfg.keep_last, cfg.keep_best)
            world.barrier()

    return Careful


def counted(batch: dict[str, torch.Tensor]) -> tuple[int, int]:
    """(what a micro-batch counts in the loss: the tokens with a label, or the pairs; the tokens it reads)."""
    labels = batch.get("labels")
    count = len(batch["input_ids"]) // 2 if labels is None else int((labels[:, 1:] != -100).sum())
    return count, int(batch["attention_mask"].sum())


def of_its_own(batch: dict[str, torch.Tensor], rows: int) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
    """The first `rows` rows (of pairs: of either side) of a micro-batch, and what they count.

    Where there are none, one is kept, as every rank must run as many forwards as the others, and nothing of it counts.
    """
    sides = 1 if "labels" in batch else 2
    kept = {name: torch.cat([side[: max(rows, 1)] for side in x.chunk(sides)]) for name, x in batch.items()}
    if rows == 0:
        return kept | ({"labels": torch.full_like(kept["labels"], -100)} if sides == 1 else {}), (0, 0)
    return kept, counted(kept)


def over_step(name: str, values: list[float], counts: list[int]) -> float:
    """A metric of an optimizer step from those of its micro-batches, each a mean over `counts` tokens or pairs."""
    if name.startswith(("min_", "max_")):
        return (min if name.startswith("min_") else max)(values)
    return sum(value * count for value, count in zip(values, counts, strict=True)) / max(sum(counts), 1)


def link_model(folder: Path) -> None:
    """Let the model in the Trainer's checkpoint stand in `model/` too: the same files, not copies where links can be made."""
    (folder / "model").mkdir()
    for path in [p for p in folder.iterdir() if p.suffix in hashes.MODEL_FILES and p.name != "trainer_state.json"]:
        try:
            os.link(path, folder / "model" / path.name)
        except OSError:  # a file system without hard links
            shutil.copy(path, folder / "model" / path.name)


class Reporter(TrainerCallback):
    """Hands what the trainer logs to our log: metrics.jsonl, tracker and the progress line."""

    def __init__(self, log: RunLog, names: dict[str, str], show: tuple[str, ...]) -> None:
        self.log, self.names, self.show, self.bar = log, names, show, None
        self.latest: dict[str, float] = {}  # metrics of the last step

    def on_train_begin(self, args, state, control, **_):
        self.bar = self.log.progress("training", state.max_steps)
        self.bar.__enter__()

    def on_log(self, args, state, control, logs=None, **_):
        metrics = {
            self.names.get(k, f"train/{k}"): float(v) for k, v in (logs or {}).items() if isinstance(v, (int, float))
        }
        if "loss" in (logs or {}):
            self.latest = metrics
            self.log.log(state.global_step, metrics)
            self.bar.update(state.global_step, **{k: metrics[k] for k in self.show if k in metrics})

    def on_train_end(self, args, state, control, **_):
        self.bar.__exit__()
