"""Supervised fine-tuning: TRL's SFTTrainer on prompts and completions, the loss on completion tokens and the end token."""

from __future__ import annotations

import torch
from trl import SFTConfig, SFTTrainer

from alignkit import artifacts, data, models, tokens
from alignkit.config import SFT
from alignkit.engine import World
from alignkit.log import RunLog
from alignkit.stages import _trl


def main(cfg: SFT, world: World, log: RunLog) -> tuple[dict, dict]:
    # 1. Rows and tokens.
    source = artifacts.resolve_model(cfg.model.path)
    tokenizer = tokens.of_model(source, cfg.model, log.note)
    rows, held_out = _trl.split_rows(cfg)
    train, dropped = tokens.sft_dataset(rows, tokenizer, cfg.max_length)
    log.note(f"training rows: {dropped.describe()}")
    evaluation = None
    if held_out:
        evaluation, dropped = tokens.sft_dataset(held_out, tokenizer, cfg.max_length)
        log.note(f"held-out rows: {dropped.describe()}")

    # 2. The base, and what of it trains.
    hf = models.load_base(source.base, cfg.model, len(tokenizer), nf4=cfg.finetune.nf4)
    peft_config = cfg.finetune.peft_config("CAUSAL_LM", hf)
    if source.adapter is not None:
        hf = models.continue_adapter(hf, source.adapter)
    elif peft_config is not None:
        torch.manual_seed(cfg.seed)
        hf = models.new_adapter(hf, peft_config)
    names = {"loss": "policy/loss", "learning_rate": "policy/learning_rate"}
    reporter = _trl.Reporter(log, names, ("policy/loss",))
    trainer = _trl.careful(SFTTrainer, cfg, world, reporter)(
        model=hf,
        args=_trl.arguments(
            SFTConfig,
            cfg,
            world,
            max_length=None,  # over-long rows were left out whole, and counted
            completion_only_loss=True,
            neftune_noise_alpha=cfg.neftune_noise_alpha,
        ),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        callbacks=[reporter],
    )

    # 3. Train, measure on the held-out rows, write the model for the next stage.
    metrics = _trl.train(trainer, cfg, world, log)
    if evaluation is not None:
        metrics["eval_loss"] = trainer.evaluate()["eval_loss"]
    tokens.name_ends(hf, tokenizer)
    trainer.save_model(str(cfg.run_dir / "model"))
    if world.rank == 0:
        tokens.save_tokenizer(tokenizer, cfg.run_dir / "model")
    facts = artifacts.describe(
        source,
        tokenizer_hash=tokens.tokenizer_hash(tokenizer),
        data_hash=data.fingerprint(rows),
        adapter=(cfg.run_dir / "model" / "adapter_config.json").is_file(),
        nf4=cfg.finetune.nf4,
    )
    return metrics, facts
