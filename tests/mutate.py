"""Plants faults in a copy of the package, one at a time, and runs the tests that should fail: all of them must.

`python tests/mutate.py` tries every fault of the list below; `--only 5 17` some of them, by number; `--list` none.
A line a fault tells which test caught it. The last line is JSON, {"faults": n, "caught": n, "survived": [...]}, and the
exit code is 1 if a fault survived, 2 if the list is out of date or the tests fail without a fault.

Every `old` must stand in its file exactly once, so that the list cannot rot unseen. A fault counts as caught where a
test failed; one that keeps the tests from being collected, or hangs, is an error of the list.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "alignkit"
TIMEOUT = 300  # seconds of processor time for the tests of one fault
# Imported once, before the first fork. Nothing of the package is among them.
PRELOADED = ("torch", "torch._dynamo", "sympy", "numpy", "omegaconf", "pytest", "hypothesis")
OF_MODELS = ("transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama", "peft")

# What catches what: arguments of pytest, files relative to tests/.
FUNCTIONAL = ("test_functional.py",)
ALGORITHMS = ("test_algorithms.py",)
BATCHES = ("test_batches.py",)
MODELS = ("test_models.py",)
UPDATE = ("test_update.py",)
STEP = ("test_ppo_step.py", "-kdepend_on_micro or whole_batch or without_a_response or without_a_token")
ROUND = ("test_ppo_step.py", "-kepochs_times or gradient_of_its_own or early_stop")
TEMPERATURE = ("test_ppo_step.py", "-kratio_1 or one_temperature")
PTX = ("test_ppo_step.py", "-kptx_has")
OPTIMIZER = ("test_ppo_step.py", "-kadams_first or schedules")
LEARNING = ("test_enumerated.py::test_ppo_reaches_the_known_optimum[1.0-1.0-0]",)
NEED_MODELS = {"test_models.py", "test_update.py", "test_ppo_step.py"}


class Outdated(Exception):
    """The list does not fit the package, or the tests fail without a fault."""


@dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in one file of alignkit/; `note` says what that stands for where it is not obvious."""

    file: str
    old: str
    new: str
    note: str = ""
    tests: tuple[str, ...] = FUNCTIONAL

    def __str__(self) -> str:
        change = f"{self.old.strip()} → {self.new.strip() or '(nothing)'}"
        return f"{self.file}: {self.note or change}".replace("\n", " ⏎ ")


def of(file: str, tests: tuple[str, ...], *changes: tuple[str, ...]) -> list[Fault]:
    return [Fault(file, *change, **{"tests": tests}) for change in changes]


F = "algorithms/functional.py"
S = "algorithms/shaping.py"

FAULTS: list[Fault] = [
    # Masks, moments and whitening.
    *of(F, FUNCTIONAL,
        ("x.sum() / mask.sum().clamp(min=1)", "x.sum() / mask.sum().clamp(min=2)"),
        ("_wide(x).masked_fill(~mask, 0) for x", "_wide(x) * mask for x", "NaN outside the mask is read"),
        ("    mask = mask.bool()\n    return mask, *", "    return mask, *", "a mask of numbers is not made bool"),
        ("if other != shape:", "if len(other) != len(shape):", "shapes that broadcast are taken"),
        ("x if x.dtype == torch.float64 else x.float()", "x.float()", "float64 is cut to float32"),
        ("x if x.dtype == torch.float64 else x.float()", "x", "half precision stays half"),
        ("x.square().sum()])", "x.abs().sum()])"),
        ("variance = mean_square - mean.square()", "variance = mean_square"),
        ("variance.masked_fill(variance <= 1e-13 * mean_square, 0)", "variance.clamp(min=0)",
         "rounding passes for a spread"),
        ("mean = mean + (x - mean).masked_fill(~mask, 0).sum() / count", "mean = mean + 0", "no second pass"),
        ("mean, (x - mean).masked_fill(~mask, 0).square().sum() / count",
         "mean, (x - mean).masked_fill(~mask, 0).square().sum() / (count - 1)", "unbiased variance in the whitening"),
        ("mean, (x - mean).masked_fill(~mask, 0).square().sum() / count",
         "mean, (x - mean).square().sum() / count", "padding counts in the variance"),
        ("white if shift_mean else white + mean", "white + mean if shift_mean else white"),
        ("white + mean).masked_fill(~mask, 0).to(x.dtype)", "white + mean).to(x.dtype)",
         "whitened padding is not 0"),
        ("torch.rsqrt(variance + eps)", "torch.rsqrt(variance)"),
        ("mean, variance = _mean_and_variance(x, mask, moments)", "mean, variance = _mean_and_variance(x, mask, None)",
         "whitened rank by rank"),
        ("explained = 1 - unexplained", "explained = 1 + unexplained"),
        ("explained.masked_fill(variance == 0, 0)", "explained"),
    ),
    # The KL and the rewards.
    *of(F, FUNCTIONAL,
        ('"k2": 0.5 * r.square()', '"k2": r.square()'),
        ("torch.expm1(-r) + r", "torch.expm1(r) - r", "k3 of the other direction"),
        ("torch.expm1(-r) + r", "torch.exp(-r) + r"),
        ("        r = r.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)\n", "", "k3 overflows"),
        ("r = _wide(logprobs) - _wide(ref_logprobs)", "r = _wide(ref_logprobs) - _wide(logprobs)",
         "the KL has the wrong sign"),
        ("(steps == slot) & (last >= 0)", "steps == slot", "an empty row gets a score"),
        ("(last + 1).clamp(max=mask.shape[-1] - 1)", "last + 1", "a full row gets no score behind its end"),
        (".amax(-1, keepdim=True) - 1", ".amax(-1, keepdim=True) - 2", "the score one slot early"),
        ("(mask.bool() * (steps + 1)).amax(-1, keepdim=True) - 1", "mask.bool().long().sum(-1, keepdim=True) - 1",
         "a hole in the mask moves the score"),
        ("0.0) - penalty", "0.0) + penalty", "the KL is a bonus"),
        ("@torch.no_grad()\ndef token_rewards", "def token_rewards", "rewards carry a gradient"),
        ("kl_coef * kl_estimate(logprobs, ref_logprobs, estimator)",
         'kl_coef * kl_estimate(logprobs, ref_logprobs, "k1")'),
    ),
    # Generalised advantage estimation.
    *of(F, FUNCTIONAL,
        ("+ gamma * next_value -", "+ next_value -"),
        ("delta + gamma * gae_lambda * next_advantage,", "delta + gae_lambda * next_advantage,"),
        ("delta + gamma * gae_lambda * next_advantage,", "delta + gamma * next_advantage,"),
        ("gae_lambda * next_advantage, next_advantage)", "gae_lambda * next_advantage, 0)",
         "a hole in the mask ends the response"),
        ("torch.where(valid, values[..., t], next_value)", "torch.where(valid, values[..., t], 0)"),
        ("torch.where(valid, values[..., t], next_value)", "values[..., t]", "the value of a masked slot bootstraps"),
        ("next_advantage.masked_fill(~valid, 0)", "next_advantage"),
        ("return advantages, advantages + values", "return advantages, advantages - values"),
    ),
    # Importance weights.
    *of(F, FUNCTIONAL,
        ("log_ratio = (old_logprobs - rollout_logprobs).detach()",
         "log_ratio = (rollout_logprobs - old_logprobs).detach()",
         "sampler over trainer"),
        ("log_ratio = (old_logprobs - rollout_logprobs).detach()", "log_ratio = old_logprobs - rollout_logprobs"),
        ("log_ratio.sum(-1, keepdim=True)", "log_ratio.mean(-1, keepdim=True)"),
        ("weights = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()", "weights = log_ratio.exp()"),
        ("weights.clamp(low, high)", "weights.clamp(max=high)", "the floor is not held"),
        ("torch.where(weights == held, weights, 0)", "held", "icepop clips instead of dropping"),
        ("else held).masked_fill(~mask, 0)", "else held)", "padding weighs"),
    ),
    # Sums and counts.
    *of(F, FUNCTIONAL,
        ("per_sequence = total / count.clamp(min=1)", "per_sequence = total / count.max()",
         "sequences divided by the longest"),
        ("per_sequence.masked_fill(count == 0, 0).sum(), (count > 0).sum()",
         "per_sequence.masked_fill(count == 0, 0).sum(), (count >= 0).sum()", "empty rows count"),
        ('count.clamp(min=1) if aggregation == "sequence_mean_token_mean"',
         'count.clamp(min=1) if aggregation == "sequence_mean_token_sum"'),
        ("own if denominator is None else denominator", "own", "a part of a step divides by its own count"),
        ("own if denominator is None else denominator).clamp(min=1)", "own if denominator is None else denominator)",
         "an empty batch is 0 / 0"),
    ),
    # The policy's loss.
    *of(F, FUNCTIONAL,
        ("raw_log_ratio, advantages = logprobs - old_logprobs.detach()",
         "raw_log_ratio, advantages = old_logprobs.detach() - logprobs", "the ratio upside down"),
        ("logprobs - old_logprobs.detach(), advantages.detach()", "logprobs - old_logprobs, advantages.detach()"),
        ("old_logprobs.detach(), advantages.detach()", "old_logprobs.detach(), advantages"),
        ("    log_ratio = raw_log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)", "    log_ratio = raw_log_ratio"),
        ("high = clip_range if clip_range_high is None else clip_range_high", "high = clip_range"),
        ("unclipped, clipped = -advantages * ratio, -advantages", "unclipped, clipped = advantages * ratio, advantages",
         "the loss is not negated"),
        ("ratio.clamp(1 - clip_range, 1 + high)", "ratio.clamp(max=1 + high)", "no lower clip"),
        ("loss = torch.maximum(unclipped, clipped)", "loss = torch.minimum(unclipped, clipped)",
         "optimistic, not pessimistic"),
        ("loss = torch.maximum(unclipped, clipped)", "loss = clipped"),
        ('"policy/clip_fraction": clipped > unclipped', '"policy/clip_fraction": clipped != unclipped'),
        ('"policy/approx_kl": 0.5 *', '"policy/approx_kl": 1.0 *'),
        ("raw_log_ratio.abs() > LOG_RATIO_LIMIT", "log_ratio.abs() > LOG_RATIO_LIMIT",
         "guarded tokens are not counted"),
        ("bound = -dual_clip", "bound = dual_clip"),
        ("torch.where(advantages < 0, torch.minimum(loss, bound), loss)", "torch.minimum(loss, bound)",
         "the dual clip bounds positive advantages too"),
        ("dual_clip <= 1", "dual_clip < 1"),
        ("loss = loss * weights.detach()", "loss = loss * weights", "importance weights get a gradient"),
        ("loss = loss * weights.detach()", "loss = loss * 1"),
        ("total, count = sum_tokens(loss, mask, aggregation)", "total, count = sum_tokens(loss, mask)"),
        ("sum_tokens(x.detach(), mask) for name, x in counted", "sum_tokens(x, mask) for name, x in counted",
         "metrics hold the graph"),
        ("sum_tokens(x.detach(), mask) for name, x in counted",
         "sum_tokens(x.detach(), torch.ones_like(mask)) for name, x in counted", "padding counts in the metrics"),
        ("valid_ratios = ratio.detach().masked_fill(~mask, 0).flatten()", "valid_ratios = ratio.detach().flatten()",
         "padding's ratio of 1 passes for the largest"),
    ),
    # The critic's loss, and the KL as a loss.
    *of(F, FUNCTIONAL,
        ("near_old = old_values + (values", "near_old = values + (values"),
        (".clamp(-value_clip_range, value_clip_range)", ".clamp(max=value_clip_range)"),
        ("sum_tokens(0.5 * torch.maximum(squares, clipped)", "sum_tokens(torch.maximum(squares, clipped)", "no half"),
        ("sum_tokens(0.5 * torch.maximum(squares, clipped)", "sum_tokens(0.5 * torch.minimum(squares, clipped)"),
        ("(clipped > squares).detach()", "(clipped >= squares).detach()"),
        ('kl = kl_estimate(logprobs, ref_logprobs, "k2")', 'kl = kl_estimate(logprobs, ref_logprobs, "k3")',
         "the gradient of KL(reference || policy)"),
        ('kl = kl_estimate(logprobs, ref_logprobs, "k2")', 'kl = kl_estimate(logprobs, ref_logprobs, "k1")',
         "a gradient of 0 in expectation"),
        (" - kl).detach()", " - kl)", "the estimator's own gradient"),
        ("(logprobs - old_logprobs).detach().clamp(", "(logprobs - old_logprobs).clamp("),
        ("    kl = kl * (logprobs - old_logprobs).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()\n", "",
         "the KL in the loss is taken for on-policy"),
        ("kl = kl * weights.detach()", "kl = kl * 1"),
        ("total, count = sum_tokens(kl, mask, aggregation)", "total, count = sum_tokens(kl, mask)"),
    ),
    # Losses of the reward model.
    *of(F, FUNCTIONAL,
        ("else chosen - rejected - margin", "else chosen - rejected + margin"),
        ("(chosen + rejected).square()", "(chosen - rejected).square()"),
        ("_same_shape(chosen=chosen, rejected=rejected, margin=margin)",
         "_same_shape(chosen=chosen, rejected=rejected)",
         "a margin [N, 1] broadcasts to [N, N]"),
        (".mean(1).mean()", ".sum(1).mean()", "a prompt weighs by its pairs"),
        ("offset=1", "offset=0", "an answer is compared with itself"),
        ("scores[:, better] - scores[:, worse]", "scores[:, worse] - scores[:, better]"),
    ),
    # Logits.
    *of(F, FUNCTIONAL,
        ("_wide(part) / temperature", "_wide(part) * temperature"),
        ("_wide(part) if temperature == 1 else _wide(part) / temperature", "_wide(part)", "no temperature"),
        ("_wide(part) if temperature == 1 else _wide(part) / temperature",
         "_wide(part + 0 * part.data.div_(temperature))",
         "the caller's logits are changed"),
        ("return -(logprobs.exp()", "return (logprobs.exp()"),
        ("logprobs.masked_fill(logprobs == -math.inf, 0)", "logprobs", "0 log 0 is NaN"),
        ("size = max(1, CHUNK_ELEMENTS *", "size = max(10**6, CHUNK_ELEMENTS *", "all logits upcast at once"),
        ("if torch.is_grad_enabled() and logits.requires_grad:", "if False:",
         "all upcast chunks are kept for backward"),
        ("if not temperature > 0", "if temperature < 0"),
    ),
    # Where a response ends, and what its score becomes.
    *of(S, FUNCTIONAL,
        ("if pad_id in stop_ids:", "if False:"),
        ("stops.cumsum(-1) - stops.long() == 0", "stops.cumsum(-1) == 0", "the stop token is cut off"),
        ("stops.cumsum(-1) - stops.long() == 0", "stops.cumsum(-1) <= 1", "what follows the stop token is kept"),
        ("stops.any(-1)", "stops[:, :-1].any(-1)", "a stop in the last slot is not seen"),
        ("response_ids.masked_fill(~mask, pad_id)", "response_ids"),
        ("scores.clamp(-limit, limit)", "scores.clamp(max=limit)"),
        ("torch.where(finished.bool(), scores, penalised[mode])",
         "torch.where(finished.bool(), penalised[mode], scores)",
         "finished responses are penalised"),
        ("scores - abs(value)", "scores - value", "a negative penalty rewards"),
        ("scores.clamp(max=value)", "scores.clamp(min=value)", "a cut answer is worth more than it scored"),
        ("scores.std(correction=0)", "scores.std()"),
        ("mean - gain * scores.mean()", "mean - scores.mean()"),
        ("max(self.count - 1, 1)", "max(self.count, 1)"),
        ("variance > (1e-6 * self.mean) ** 2", "variance > 0", "rounding passes for a spread of scores"),
        ("gap * gap * self.count * count / merged", "gap * gap * count / merged"),
        ("squares - total * mean", "squares"),
        ("self.mean += gap * count / merged", "self.mean += gap / 2"),
        ("        if count == 0:\n            return\n", "        if count == 0:\n            count = 1.0\n",
         "a rank without scores counts as one of 0"),
        ('"deviations": self.deviations', '"deviations": 0.0', "a checkpoint forgets the spread"),
        ("/ self.target - 1, -0.2)", "/ self.target - 1, -0.3)"),
        ("-0.2), 0.2)", "-0.2), 0.5)"),
        ("self.value *= 1 + error", "self.value *= 1 - error", "the KL coefficient runs away from its target"),
        ("if target <= 0 or horizon <= 0", "if target < 0 or horizon <= 0"),
        ("if not math.isfinite(kl_per_sequence)", "if False"),
        ("-> None:\n        pass\n", "-> None:\n        self.value *= 1.1\n", "a fixed KL coefficient moves"),
    ),
    # What every estimator shares.
    *of("algorithms/base.py", ALGORITHMS,
        ("        scores = scored.scores\n",
         "        scores = F.missing_eos(scored.scores, scored.rollouts.finished, self.missing_eos)\n",
         "the missing-EOS penalty also before normalising"),
        ("scores = state.scores.normalise(scores)\n        return F.clip_scores(scores, self.score_clip)",
         "scores = state.scores.normalise(F.clip_scores(scores, self.score_clip))\n        return scores",
         "clipped before normalised"),
        ("state.scores.update(F.masked_moments(scores))\n            scores = state.scores.normalise(scores)\n",
         "raw = scores\n            scores = state.scores.normalise(raw)\n"
         "            state.scores.update(F.masked_moments(raw))\n",
         "normalised by the batches before"),
        ("F.clip_scores(scores, self.score_clip)", "F.clip_scores(scores, None)"),
        ("self.missing_eos, self.missing_eos_value)", "self.missing_eos)"),
        ("ref_logprobs, mask, coef, self.reward_estimator)", "ref_logprobs, mask, self.kl_coef, self.reward_estimator)",
         "rewards use the KL coefficient of the start"),
        ('return self.estimator if self.kl_in == "reward" else "k1"', "return self.estimator",
         "an estimator of the loss is refused by the reward"),
        ('return self.estimator if self.kl_in == "reward" else "k1"', 'return "k1"',
         "the reward's KL is always k1"),
        ('state.kl.value if self.kl_in == "reward" else 0.0', "state.kl.value",
         "the KL stands in the reward and in the loss"),
        ('kl_coef = state.kl.value if self.kl_in == "loss" else 0.0', "kl_coef = state.kl.value",
         "the KL stands in the loss and in the reward"),
        ("            kl_coef /= (float(variance) + 1e-8) ** 0.5", "            kl_coef /= 1",
         "the KL is not scaled with the advantages"),
        ("kl_coef /= (float(variance) + 1e-8) ** 0.5", "kl_coef *= (float(variance) + 1e-8) ** 0.5"),
        ("(advantages - F.masked_mean(advantages, mask)).square()", "advantages.square()"),
        ("advantages = F.whiten(advantages, mask)", "advantages = F.whiten(advantages, value_mask)",
         "whitened over the slot behind the end too"),
        ("                self.importance,\n                self.importance_cap,",
         '                "token",\n                self.importance_cap,'),
        ("                self.importance_floor,\n            )", "            )", "the floor is not passed"),
        ("            weights=weights,\n", "", "importance weights are not kept"),
        ("            batch.weights, self.aggregation,\n", "            None, self.aggregation,\n",
         "importance weights are not passed to the surrogate"),
        ("mask, self.estimator, batch.weights, self.aggregation", "mask, self.estimator, None, self.aggregation",
         "importance weights are not passed to the KL"),
        ("self.clip_range, self.clip_range_high, self.dual_clip,", "self.clip_range, None, self.dual_clip,"),
        ("self.clip_range_high, self.dual_clip,", "self.clip_range_high, None,"),
        ("            batch.weights, self.aggregation,\n", "            batch.weights,\n",
         "the loss is always a mean over tokens"),
        ("total = total - self.ent_coef", "total = total + self.ent_coef", "the entropy is punished"),
        ("F.sum_tokens(entropy, mask, self.aggregation)[0]", "F.sum_tokens(entropy, mask)[0]"),
        ("total + batch.kl_coef * kl,", "total - batch.kl_coef * kl,", "the KL in the loss has the wrong sign"),
        ("total + batch.kl_coef * kl,", "total + self.kl_coef * kl,",
         "the KL in the loss has the coefficient of the start"),
        ("F.sum_tokens(mask.float(), mask, self.aggregation)[1]", "F.sum_tokens(mask.float(), mask)[1]",
         "sequences are divided by tokens"),
        ("value_mask=value_mask,", "value_mask=mask,", "the critic does not learn the slot of the score"),
        ('"kl": self.kl.state_dict(), "scores"', '"kl": {"value": 0.05}, "scores"',
         "a checkpoint forgets the KL coefficient"),
        ('        self.scores.load_state_dict(state["scores"])\n', "", "a resumed run forgets the scores"),
        ("ref_logprobs).masked_fill(~mask, 0)\n", "ref_logprobs).nan_to_num(1)\n", "padding counts in the logged KL"),
        ("F.FixedKL(self.kl_coef) if target is None else", "F.FixedKL(self.kl_coef) if True else"),
    ),
    # The estimators.
    *of("algorithms/ppo.py", ALGORITHMS,
        ("return response_mask | F.score_position(response_mask, self.score_slot)", "return response_mask"),
        ("coef, self.reward_estimator, self.score_slot", "coef, self.reward_estimator",
         "the score never stands behind the end"),
        ("rewards, self.value_mask(mask), shift_mean=False", "rewards, mask, shift_mean=False",
         "rewards whitened without the slot of the score"),
        ("self.value_mask(mask), shift_mean=False", "self.value_mask(mask)", "whitened rewards lose their mean"),
        ("mask, self.gamma, self.gae_lambda)", "mask, self.gae_lambda, self.gamma)"),
        ("batch.returns, batch.value_mask,", "batch.returns, batch.response_mask,",
         "the critic's loss and count leave out the slot of the score"),
        ("values, batch.values, batch.returns", "values, batch.returns, batch.values",
         "old values and returns swapped"),
        ("Loss(self.vf_coef * total,", "Loss(total,"),
        ("F.explained_variance(values, experience.returns, mask)",
         "F.explained_variance(values, experience.rewards, mask)"),
    ),
    *of("algorithms/rloo.py", ALGORITHMS,
        ("(total.sum(1, keepdim=True) - total) / (group_size - 1)", "total.mean(1, keepdim=True)",
         "the baseline holds the answer itself"),
        ("- total) / (group_size - 1)", "- total) / group_size"),
        ("rewards.sum(1).view(-1, group_size)", "rewards.sum(1).view(group_size, -1).T.contiguous()",
         "answers to other prompts are siblings"),
        ("(total - others).view(-1, 1) * mask", "(total - others).view(-1, 1) * mask / mask.sum(1, keepdim=True)"),
    ),
    *of("algorithms/grpo.py", ALGORITHMS,
        ("total.std(1, keepdim=True)", "total.std(1, keepdim=True, correction=0)", "biased std of a group"),
        ("total.std(1, keepdim=True) + 1e-6", "total.std() + 1e-6", "the std of the whole batch"),
        ("if self.scale_by_std:", "if True:"),
        ("total - total.mean(1, keepdim=True)", "total - total.mean()", "the mean of the whole batch"),
        ('aggregation: str = "sequence_mean_token_mean"', 'aggregation: str = "token_mean"'),
    ),
    *of("algorithms/reinforce_pp.py", ALGORITHMS,
        ("mask, self.gamma, 1.0)[0]", "mask, 1.0, 1.0)[0]"),
        ("mask, self.gamma, 1.0)[0]", "mask, self.gamma, 0.95)[0]"),
        ("rewards.new_zeros(rewards.shape)", "rewards", "rewards as values"),
    ),
    # Rows, and how they become batches.
    *of("core/types.py", BATCHES,
        ("self.prompt_ids.shape[1] - first", "first", "responses start where the padding was long"),
        ("self.prompt_ids.shape[1] - first", "self.prompt_mask.sum(1) - 1", "responses start a slot early"),
        ("mask.gather(1, at) & inside", "mask.gather(1, at)", "the last token is repeated behind the row"),
        ("torch.where(mask, slots, mask.shape[1]).amin(1)", "torch.zeros_like(slots).amin() + mask[:, 0] * 0",
         "rows keep their padding in front"),
        ("[value[int(i)] for i in index]", "[value[i] for i in range(len(index))]", "rows keep the wrong meta"),
    ),
    *of("training/batches.py", BATCHES,
        ("slots - valid - of[row] <= MAX_PADDING * slots", "slots - valid - of[row] <= 2 * MAX_PADDING * slots"),
        ("slots - valid - of[row] <= MAX_PADDING * slots", "slots - valid - of[row] < MAX_PADDING * slots"),
        ("slots - valid - of[row] <= MAX_PADDING * slots", "True", "padding without a limit"),
        ("len(group) < micro_batch_size and", "len(group) <= micro_batch_size and"),
        ("lengths.argsort(descending=True, stable=True)", "lengths.argsort(stable=True)"),
        ("            valid += of[row]\n", ""),
        ("max(range(len(groups)), key=lambda i: len(groups[i]))", "0", "always the first micro-batch is halved"),
        ("torch.arange(r, len(lengths), ranks, device=lengths.device)",
         "torch.arange(r * (len(lengths) // ranks), (r + 1) * (len(lengths) // ranks), device=lengths.device)",
         "ranks take blocks of rows"),
        ("by_length(lengths[shares[rank]], micro_batch_size, parts)",
         "by_length(lengths[shares[rank]], micro_batch_size)",
         "ranks make different numbers of micro-batches"),
        ("shares[rank][group] for group", "group for group", "every rank takes the first rows"),
        ("(mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)", "mask.sum(1)", "a hole ends a row"),
        ("int((lengths - starts).max()) + behind", "int((lengths - starts).max())",
         "the slot behind the end is cut off"),
        ("min(max(slots, 1), response_slots)", "max(slots, 1)"),
        ("min(max(slots, 1), response_slots)", "min(slots, response_slots)"),
        ("torch.cat(parts)[back]", "torch.cat(parts)", "results stay sorted by length"),
        ("torch.cat(groups).argsort()", "torch.cat(groups)", "results are permuted the other way round"),
        ("with torch.no_grad():", "with torch.enable_grad():"),
        ("pad(part, (0, response_slots - part.shape[1]))", "pad(part, (response_slots - part.shape[1], 0))",
         "cut slots come back in front"),
        ("x[:, :length] if name in whole else x[:, :slots]", "x[:, :slots] if name in whole else x[:, :slots]"),
        ('whole = ("ids", "mask", "shared_states")', 'whole = ("ids", "mask")'),
        ("((i // group_size) * world.size + r) * group_size + i % group_size", "r * rows + i",
         "ranks one behind the other"),
        ("prompt_ids, (pad, 0), value=pad_id", "prompt_ids, (0, pad), value=pad_id",
         "prompts of other ranks padded on the right"),
        ('results["shared_states"], (0, 0, 0, pad)', 'results["shared_states"], (0, 0, pad, 0)',
         "states of other ranks padded in front"),
        ("join([theirs[k] for _, theirs in shares])[order]", "join([theirs[k] for _, theirs in shares])",
         "log-probs of one prompt beside the rollout of another"),
    ),
    # Models and roles.
    *of("models/loading.py", MODELS,
        ("        attention_mask=mask.long(), position_ids", "        attention_mask=mask.long() * 0 + 1, position_ids",
         "padding is attended"),
        ("position_ids=position_ids(mask), ", "", "positions count the padding"),
        ("return (mask.cumsum(1) - mask).clamp(min=0)", "return mask.cumsum(1)", "positions start at 1"),
        ("hidden.shape[1], shift=-1)", "hidden.shape[1], shift=0)", "states behind the token, not before it"),
        ("last = torch.where(mask, slots, -1).amax(dim=1)", "last = slots.max().expand(len(mask))",
         "the score is read in the padding"),
        ("            part.p = 0.0\n", "            pass\n", "dropout stays on"),
        ("isinstance(part, nn.Dropout) and part.p > 0]", "False]", "a dropout is let through"),
        ("[..., : hf.trained_rows]\n            at", "\n            at", "rows of no token take part in the softmax"),
        ("yield name, tensor[: hf.trained_rows] if vocabulary else tensor", "yield name, tensor"),
        ("return logprobs, (F.entropy(logits, temperature)", "return logprobs, (F.entropy(logits)"),
        ("F.response_logprobs(logits, labels, temperature)", "F.response_logprobs(logits, labels)"),
        ("            switch(role)\n            hf = self.model(role)", "            hf = self.model(role)",
         "every role computes with the adapter of the last"),
        ("with only_blocks(hf, self.blocks, len(hf.base_model.layers), norm=True):",
         "with only_blocks(hf, 0, len(hf.base_model.layers), norm=True):", "shared blocks run twice"),
        ("bias = None if head.bias is None else head.bias.to(dtype)", "bias = None"),
    ),
    *of("models/loaded.py", MODELS,
        ("parameter.copy_(saved[key])", "parameter.copy_(parameter)",
         "adapters start anew"),
    ),
    *of("finetune/lora.py", MODELS,
        ('adapters |= {"policy", "ref_policy"}', 'adapters |= {"policy"}',
         "the reference is the base, not the SFT model"),
        (' + adapted[name].get_delta_weight("policy")', "", "the sampler gets the base"),
        (' + adapted[name].get_delta_weight("policy")', ' - adapted[name].get_delta_weight("policy")'),
        ("if f\".{role}.\" in name]", "if \".lora_\" in name]", "every adapter is trained"),
        ('if with_head and "critic" in roles.heads else []', "if False else []", "the critic's head is not trained"),
        ("start = reward if critic.weights", "start = source if critic.weights", "the critic starts as the policy"),
    ),
    *of("finetune/critic.py", MODELS,
        ("return copy.deepcopy(reward_head)", "return reward_head", "training the critic moves the reward model"),
    ),
    *of("finetune/lora.py", UPDATE,
        ("layer._disable_adapters = role not in adapters", "layer._disable_adapters = False",
         "the reference has the policy's adapter"),
    ),
    # A round of PPO.
    *of("stages/ppo.py", UPDATE,
        ('"critic": float(batch.value_mask.sum())', '"critic": float(batch.response_mask.sum())',
         "the critic's loss divided by the policy's tokens"),
        ('"policy": algorithm.policy_count(batch.response_mask)', '"policy": float(batch.response_mask.sum())',
         "a mean over sequences divided by tokens"),
        ('"policy": algorithm.policy_count(batch.response_mask)',
         '"policy": algorithm.policy_count(batch.response_mask[groups[0]])',
         "a step divided by the count of a micro-batch"),
    ),
    *of("stages/ppo.py", STEP,
        ("behind = int(batch.value_mask.sum() > batch.response_mask.sum())", "behind = 0",
         "the slot of the score is cut off the micro-batch"),
        ("part = batches.cut(part, length, slots)", "part = batches.cut(part, length - 1, slots)",
         "the last token is cut off"),
        ("for number, index in enumerate(groups):", "for number, index in enumerate(groups[:-1] or groups):",
         "the last micro-batch is left out"),
        ('pairs.amax(0) if name.endswith("_max") else pairs.sum(0)', "pairs.sum(0)", "maxima are added up"),
    ),
    *of("stages/ppo.py", TEMPERATURE,
        ('roles("policy", ids, mask, starts, slots, cfg.rollout.temperature,',
         'roles("policy", ids, mask, starts, slots, 1.0,', "the old policy at another temperature"),
        ("roles(role, ids, mask, starts, slots, cfg.rollout.temperature,", "roles(role, ids, mask, starts, slots, 1.0,",
         "the reference at another temperature"),
        ("*inputs, temperature, algorithm.ent_coef > 0", "*inputs, 1.0, algorithm.ent_coef > 0",
         "the policy at another temperature"),
    ),
    *of("stages/ppo.py", ROUND,
        ("torch.randperm(len(mask), generator=shuffle)", "torch.arange(len(mask))", "every epoch in the same order"),
        ("range(cfg.algorithm.ppo_epochs)", "range(1)"),
        ("order.split(cfg.mini_batch_size)", "order.split(cfg.micro_batch_size)", "micro-batches for minibatches"),
        ("order.split(cfg.mini_batch_size)",
         "order[: len(order) // cfg.mini_batch_size * cfg.mini_batch_size].split(cfg.mini_batch_size)",
         "the last, smaller minibatch is dropped"),
        ("            engine.discard()\n", "            pass\n", "the gradient of a discarded step stays"),
        ('metrics.get("policy/approx_kl", 0.0) > algorithm', 'metrics.get("policy/approx_kl", 0.0) < algorithm'),
    ),
    *of("stages/ppo.py", PTX,
        ("Loss(cfg.ptx.coef * loss.total", "Loss(loss.total"),
    ),
    *of("stages/ptx.py", PTX,
        ("total = float(counted.sum())", "total = 1.0", "the language-model loss is not divided"),
        ("-(logprobs * own).sum()", "(logprobs * own).sum()"),
        ("own = counted[index, :slots]", "own = counted[index, :slots] | mask[index, :slots]",
         "the prompt is learned too"),
    ),
    *of("training/engine.py", OPTIMIZER,
        ("eps: float = num(1e-5", "eps: float = num(1e-8"),
        ("done = (step - self.warmup_steps) / max(1, total - self.warmup_steps)", "done = step / total",
         "the schedule goes on during the warm-up"),
        ("return (step + 1) / self.warmup_steps", "return step / self.warmup_steps",
         "the first update of a warm-up is 0"),
        ("0.5 * (1 + math.cos(math.pi * done))", "math.cos(0.5 * math.pi * done)"),
    ),
    # The same kind of fault, where a policy that learns falls short of the known optimum.
    *of(F, LEARNING,
        ("0.0) - penalty", "0.0) + penalty", "learning: the KL is a bonus"),
        (".amax(-1, keepdim=True) - 1", ".amax(-1, keepdim=True) - 2", "learning: the score one slot early"),
        ("unclipped, clipped = -advantages * ratio, -advantages", "unclipped, clipped = advantages * ratio, advantages",
         "learning: the loss is not negated"),
    ),
    *of("algorithms/base.py", LEARNING,
        ('state.kl.value if self.kl_in == "reward" else 0.0', "0.5 * state.kl.value", "learning: half the KL"),
        ("            old_logprobs=old_logprobs,\n", "            old_logprobs=ref_logprobs,\n",
         "learning: the reference for the old policy"),
    ),
]  # fmt: skip


def planted(fault: Fault, source: str) -> str:
    """`source` with the fault in it."""
    found = source.count(fault.old)
    if found != 1:
        raise Outdated(
            f"{fault}\n  its old text stands {found} times in alignkit/{fault.file}, not once: {fault.old!r}"
        )
    changed = source.replace(fault.old, fault.new)
    try:
        ast.parse(changed)
    except SyntaxError as error:
        raise Outdated(f"{fault}\n  is not Python: {error}") from error
    return changed


class Failures:
    """A pytest plugin that keeps the names of the tests that fail."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.names.append(report.nodeid.split("::", 1)[1])


def child(package: Path, tests: tuple[str, ...], log: Path) -> tuple[int, list[str]]:
    """pytest's exit code, and the tests that failed, with alignkit taken from `package`."""
    import pytest

    signal.setitimer(signal.ITIMER_PROF, TIMEOUT)  # ends the process
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.path.insert(0, str(package.parent))
    sys.dont_write_bytecode = True  # two faults of one length within a second would share their .pyc
    failures = Failures()
    arguments = [argument if argument.startswith("-") else str(TESTS / argument) for argument in tests]
    code = pytest.main(
        ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=short", *arguments], plugins=[failures]
    )
    if Path(sys.modules["alignkit"].__file__).parent != package:
        raise RuntimeError(f"the tests took alignkit from {sys.modules['alignkit'].__file__}")
    return int(code), failures.names


def run(package: Path, tests: tuple[str, ...]) -> str | None:
    """The test that failed, None where all passed. In a process of its own, which has torch but not yet alignkit."""
    log = package.parent / "log"
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.write(writer, json.dumps(child(package, tests, log)).encode())
        except BaseException as error:
            os.write(writer, json.dumps((-1, [repr(error)])).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        found = answer.read()
    os.waitpid(process, 0)
    code, failed = json.loads(found) if found else (-1, ["killed, or out of time"])
    if code == 0:
        return None
    if code != 1 or not failed:
        tail = log.read_text(errors="replace")[-3000:] if log.exists() else ""
        raise Outdated(f"the tests {' '.join(tests)} did not run: exit code {code} {failed}\n{tail}")
    return failed[0]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="the numbers of some faults; default: all")
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    options = parser.parse_args(arguments)
    chosen = range(len(FAULTS)) if options.only is None else options.only
    if options.list:
        print("\n".join(f"{i:4} {FAULTS[i]}" for i in chosen))
        return 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutate_") as folder:
        try:
            survived = plant_all([(i, FAULTS[i]) for i in chosen], Path(folder).resolve())
        except Outdated as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        finally:
            gc.unfreeze()  # or libraries complain at exit that what they made is still there
    print(f"{time.monotonic() - start:.0f} s")
    print(json.dumps({"faults": len(chosen), "caught": len(chosen) - len(survived), "survived": survived}))
    return 1 if survived else 0


def plant_all(faults: list[tuple[int, Fault]], folder: Path) -> list[str]:
    """Those that survived, as printed. The tests must pass on the copy before the first fault."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
    sources = {fault.file: (PACKAGE / fault.file).read_text() for _, fault in faults}
    changed = [planted(fault, sources[fault.file]) for _, fault in faults]  # all are checked before one is run
    for name in PRELOADED + (OF_MODELS if any(fault.tests[0] in NEED_MODELS for _, fault in faults) else ()):
        importlib.import_module(name)
    if "alignkit" in sys.modules:
        raise Outdated("alignkit is loaded already: a child would not see the fault")
    quicker = importlib.import_module("hypothesis").settings
    phases = [phase for phase in importlib.import_module("hypothesis").Phase if phase.name in ("explicit", "generate")]
    # Without `shrink`: no search for the smallest case.
    quicker.register_profile("faults", phases=phases, derandomize=True, database=None)
    quicker.load_profile("faults")
    gc.freeze()  # pytest collects garbage at its end: not that of a whole torch, in every child

    copy = folder / "alignkit"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for tests in dict.fromkeys(fault.tests for _, fault in faults):
        started = time.monotonic()
        if failed := run(copy, tests):
            raise Outdated(f"{failed} of {' '.join(tests)} fails without a fault")
        print(f"     passes without a fault {time.monotonic() - started:5.1f} s  {' '.join(tests)}", flush=True)
    survived: list[str] = []
    for (number, fault), text in zip(faults, changed, strict=True):
        started = time.monotonic()
        (copy / fault.file).write_text(text)
        try:
            caught_by = run(copy, fault.tests)
        except Outdated as error:
            raise Outdated(f"{number} {fault}\n  {error}") from error
        (copy / fault.file).write_text(sources[fault.file])
        took = f"{time.monotonic() - started:5.1f} s"
        print(f"{number:4} {'caught' if caught_by else 'SURVIVED':8} {took}  {fault}  [{caught_by}]", flush=True)
        if caught_by is None:
            survived.append(f"{number} {fault}")
    return survived


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
