"""The learned reward: a reward run's adapter (or model) and its scalar head, or a sequence classifier from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from alignkit.core.errors import InputError
from alignkit.core.fields import num
from alignkit.core.types import Rollouts
from alignkit.models import loading
from alignkit.rewards.base import Context, Scorer

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class RewardModel:
    """Score of a reward model, read at the last token of prompt and response."""

    name: str = "reward_model"
    path: str = MISSING  # a reward run, runs/<name>/reward, or an AutoModelForSequenceClassification with num_labels=1
    weight: float = 1.0  # in the sum of rewards
    micro_batch_size: int = num(16, ge=1)  # sequences of one forward, outside PPO
    min_accuracy: float = num(0.5, ge=0, le=1)  # on held-out pairs; PPO refuses what is surely (95 %) below; 0: none

    def check_accuracy(self, metrics: dict[str, Any], key: str) -> None:
        """Refuse a reward run by the `metrics` of its manifest; `key` is where the config names it.

        A run without held-out pairs has no accuracy: it is refused only where more than a coin's was asked for.

        Raises:
            InputError: naming both rates and what to do.
        """
        from alignkit.report.card import wilson  # imports numpy

        accuracy, pairs = metrics.get("eval_accuracy"), int(metrics.get("eval_pairs") or 0)
        told = f"or say {key}.min_accuracy=0 to take it as it is"
        if accuracy is None or not pairs:
            if self.min_accuracy > 0.5:
                raise InputError(
                    f"{key}.path={self.path}: its accuracy is not known, {key}.min_accuracy={self.min_accuracy:g} is wanted: train it "
                    f"with held-out pairs (eval_fraction=0.1), {told}"
                )
            return
        top = wilson(float(accuracy) * pairs, pairs)[1]
        if top < self.min_accuracy:
            raise InputError(
                f"{key}.path={self.path}: held-out accuracy {float(accuracy):.3f} of {pairs} pairs, at most {top:.3f} with 95 % "
                f"confidence, is below {key}.min_accuracy={self.min_accuracy:g}: train a better one (its report.html says where it "
                f"fails), {told}"
            )

    def start(self, context: Context) -> Scorer:
        """Loads the model at the first call: PPO never makes one, since it scores with its own `reward_model` role."""
        roles: list[nn.Module] = []

        def score(rollouts: Rollouts) -> Tensor:
            from alignkit.data import tokens
            from alignkit.training import batches

            if not roles:
                assert context.resolve is not None and context.model is not None  # given by every stage that scores
                roles.append(
                    loading.load_reward(context.resolve(self.path), context.model, len(context.tokenizer)).to(
                        context.device
                    )
                )
                roles[0].ends = tokens.stops(context.tokenizer)
            ids, mask, starts = (part.to(context.device) for part in rollouts.flush_left())
            slots = rollouts.response_ids.shape[1]
            return batches.map_rows(
                lambda *rows: roles[0]("reward_model", *rows), ids, mask, starts, slots, self.micro_batch_size
            ).cpu()

        return score
