"""What the two stages that TRL trains have in common: arguments, the split by prompt, logging."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from alignkit import tokens
from alignkit.config import TrainStage
from alignkit.engine import World
from alignkit.log import RunLog
from alignkit.types import Rows


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
        output_dir=str(cfg.run_dir / "checkpoints"),
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
        save_strategy="steps" if cfg.save_steps else "no",
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


def train(trainer: Any, cfg: TrainStage, log: RunLog) -> Any:
    """`trainer.train()`, from the newest checkpoint of this run where there is one."""
    from transformers.trainer_utils import get_last_checkpoint

    folder = cfg.run_dir / "checkpoints"
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is not None:
        log.rewind(int(found.rsplit("-", 1)[1]))
        log.note(f"goes on from {found}")
    return trainer.train(resume_from_checkpoint=found)


class Reporter(TrainerCallback):
    """Hands what the trainer logs to our log: metrics.jsonl, tracker and the progress line."""

    def __init__(self, log: RunLog, names: dict[str, str], show: tuple[str, ...]) -> None:
        self.log, self.names, self.show, self.bar = log, names, show, None

    def on_train_begin(self, args, state, control, **_):
        self.bar = self.log.progress("training", state.max_steps)
        self.bar.__enter__()

    def on_log(self, args, state, control, logs=None, **_):
        metrics = {
            self.names.get(k, f"train/{k}"): float(v) for k, v in (logs or {}).items() if isinstance(v, (int, float))
        }
        if "loss" in (logs or {}):
            self.log.log(state.global_step, metrics)
            self.bar.update(state.global_step, **{k: metrics[k] for k in self.show if k in metrics})

    def on_train_end(self, args, state, control, **_):
        self.bar.__exit__()
