"""The language-model loss beside PPO's: rows of its own, a batch an optimizer step, its own denominator (PPO-ptx)."""

from __future__ import annotations

from typing import Any

import torch

from alignkit.config.stages import PPO
from alignkit.core.types import Loss
from alignkit.data import tokens
from alignkit.tracking.run_log import RunLog
from alignkit.training import batches
from alignkit.training.engine import World


class PtxBatches:
    """An endless supply of batches of `cfg.ptx`."""

    def __init__(self, cfg: PPO, tokenizer: Any, log: RunLog) -> None:
        rows = cfg.ptx.data.rows("sft")
        self.rows, dropped = tokens.sft_dataset(rows, tokenizer, cfg.ptx.max_length)
        log.note(f"ptx: {dropped.describe()}")
        self.size, self.pad_id = cfg.ptx.mini_batch_size, tokenizer.pad_token_id
        self.order = tokens.PromptSampler(len(self.rows), cfg.seed)

    def next(self, world: World, micro_batch_size: int) -> list[tuple]:
        """This rank's micro-batches of the next batch: (inputs of the forward, log-probs -> Loss, the batch's tokens)."""
        drawn = [self.rows[i] for i in self.order.next(self.size)]
        ids, mask, starts, counted = tokens.collate_completions(drawn, self.pad_id, world.device)
        total = float(counted.sum())
        lengths, found = batches.row_lengths(mask), []
        for index in batches.share_rows(lengths, micro_batch_size, world.rank, world.size):
            length, slots = batches.window(lengths[index], starts[index], counted.shape[1])
            own = counted[index, :slots]

            def loss_of(logprobs: torch.Tensor, own: torch.Tensor = own) -> Loss:
                loss, count = -(logprobs * own).sum(), own.sum()
                return Loss(loss, count, {"policy/ptx_loss": (loss.detach(), count)})

            found.append(((ids[index, :length], mask[index, :length], starts[index], slots), loss_of, total))
        return found
