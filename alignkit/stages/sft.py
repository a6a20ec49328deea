"""Supervised fine-tuning: TRL's SFTTrainer on prompts and completions, the loss on completion tokens and the end token."""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from alignkit.config.stages import SFT
from alignkit.data import dataset, tokens
from alignkit.models import loading
from alignkit.models.source import describe, resolve_model
from alignkit.stages import measure, trl
from alignkit.tracking.run_log import RunLog
from alignkit.training import saving
from alignkit.training.engine import World


def main(cfg: SFT, world: World, log: RunLog) -> tuple[dict, dict]:
    # 1. Rows and tokens.
    source = resolve_model(cfg.model.path)
    tokenizer = tokens.of_model(source, cfg.model, log.note)
    rows, held_out = trl.split_rows(cfg)
    train, dropped = tokens.sft_dataset(rows, tokenizer, cfg.max_length)
    log.note(f"training rows: {dropped.describe()}")
    evaluation = None
    if held_out:
        evaluation, dropped = tokens.sft_dataset(held_out, tokenizer, cfg.max_length)
        log.note(f"held-out rows: {dropped.describe()}")

    # 2. The base, and what of it trains.
    hf = loading.load_base(source.base, cfg.model, len(tokenizer), nf4=cfg.finetune.nf4)
    peft_config = cfg.finetune.peft_config("CAUSAL_LM", hf)
    if source.adapter is not None:
        hf = loading.continue_adapter(hf, source.adapter)
    elif peft_config is not None:
        torch.manual_seed(cfg.seed)
        hf = loading.new_adapter(hf, peft_config)
    if cfg.neftune_noise_alpha is not None:
        add_noise(hf, cfg.neftune_noise_alpha)
    names = {"loss": "policy/loss", "learning_rate": "policy/learning_rate"}
    reporter = trl.Reporter(log, names, ("policy/loss",))
    facts = describe(
        source,
        tokenizer_hash=tokens.tokenizer_hash(tokenizer),
        data_hash=dataset.fingerprint(rows),
        adapter=source.adapter is not None or peft_config is not None,
        nf4=cfg.finetune.nf4,
    )
    trainer = trl.careful(SFTTrainer, cfg, world, reporter, facts)(
        model=hf,
        args=trl.arguments(
            SFTConfig,
            cfg,
            world,
            max_length=None,  # over-long rows were left out whole, and counted
            completion_only_loss=True,
        ),
        train_dataset=train,
        processing_class=tokenizer,
        callbacks=[reporter],
    )

    # 3. Train, write the model for the next stage, measure it on the held-out rows.
    metrics = trl.train(trainer, cfg, world, log)
    model_dir = cfg.run_dir / "model"
    tokens.name_ends(hf, tokenizer)
    with saving.weights(model_dir):
        trainer.save_model(str(model_dir))
    with saving.beside(model_dir):
        if world.rank == 0:
            tokens.save_tokenizer(tokenizer, model_dir)
    if evaluation is not None:
        with saving.beside(model_dir):
            pad_id, micro = tokenizer.pad_token_id, cfg.micro_batch_size
            metrics |= measure.held_out(trainer, evaluation, pad_id, world, micro)
    facts = describe(
        source,
        tokenizer_hash=tokens.tokenizer_hash(tokenizer),
        data_hash=dataset.fingerprint(rows),
        adapter=(model_dir / "adapter_config.json").is_file(),
        nf4=cfg.finetune.nf4,
    )
    return metrics, facts


def add_noise(hf: Any, alpha: float) -> None:
    """Uniform noise on the embeddings of a causal LM while it trains (NEFTune, arXiv 2310.05914): within
    alpha / sqrt(l d) in a row of l tokens and d dimensions.

    transformers' own hook takes for l the slots of the batch, its padding too: what a row got depended on those beside it.
    """
    base = hf.get_base_model() if hasattr(hf, "get_base_model") else hf
    lengths: list[torch.Tensor] = []

    def note(module: Any, args: tuple, inputs: dict[str, Any]) -> None:
        lengths[:] = [inputs["attention_mask"].sum(1)]

    def noisy(module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        bound = alpha / (lengths[0] * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * bound[:, None, None].to(output.dtype)

    base.base_model.register_forward_pre_hook(note, with_kwargs=True)
    base.get_input_embeddings().register_forward_hook(noisy)
