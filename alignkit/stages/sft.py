"""Supervised fine-tuning: TRL's SFTTrainer on prompts and completions, the loss on completion tokens and the end token."""

from __future__ import annotations

import torch
from trl import SFTConfig, SFTTrainer

from alignkit import artifacts, data, models, saving, tokens
from alignkit.config import SFT
from alignkit.engine import World
from alignkit.log import RunLog
from alignkit.stages import _measure, _trl


def main(cfg: SFT, world: World, log: RunLog) -> tuple[dict, dict]:
    # 1. Rows and tokens.
    source = artifacts.resolve_model(cfg.model.path)
    tokenizer = tokens.load_tokenizer(
        source.tokenizer, trust_remote_code=cfg.model.trust_remote_code, chat_template=cfg.model.chat_template
    )
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
        processing_class=tokenizer,
        callbacks=[reporter],
    )

    # 3. Train, write the model for the next stage, measure it on the held-out rows.
    metrics = _trl.train(trainer, cfg, world, log)
    with saving.weights(cfg.run_dir / "model"):
        trainer.save_model(str(cfg.run_dir / "model"))
    if evaluation is not None:
        with saving.beside(cfg.run_dir / "model"):
            pad_id, micro = tokenizer.pad_token_id, cfg.micro_batch_size
            metrics |= _measure.held_out(trainer, evaluation, pad_id, world, micro)
    facts = artifacts.describe(
        source,
        tokenizer_hash=tokens.tokenizer_hash(tokenizer),
        data_hash=data.fingerprint(rows),
        adapter=(cfg.run_dir / "model" / "adapter_config.json").is_file(),
        nf4=cfg.finetune.nf4,
    )
    return metrics, facts
