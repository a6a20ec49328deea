"""What SFT counts: the completion and its end token, with noise on the embeddings only while it trains."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from command import alignkit

from alignkit.algorithms import functional as F
from alignkit.data import tokens
from alignkit.models import loading
from alignkit.models.config import Model
from alignkit.models.source import resolve_model
from alignkit.rollout.base import Context
from alignkit.rollout.hf import HF
from alignkit.stages import sft

CASE = json.loads((Path(__file__).parent / "data" / "sft_masked_ce.json").read_text())


def test_masked_cross_entropy_matches_the_closed_form():
    """The label at t is scored by the logits at t - 1; a completion mask marks completion tokens."""
    logits = torch.tensor(CASE["inputs"]["logits"], dtype=torch.float64)
    ids = torch.tensor(CASE["inputs"]["input_ids"])
    completion, valid = (
        torch.tensor(CASE["inputs"][name]).bool()[:, 1:] for name in ("completion_mask", "attention_mask")
    )
    nll = -F.response_logprobs(logits[:, :-1], ids[:, 1:])
    assert float(F.masked_mean(nll, completion)) == pytest.approx(CASE["value"]["completion_token_mean"], abs=1e-9)
    assert float(F.masked_mean(nll, valid)) == pytest.approx(CASE["value"]["full_token_mean"], abs=1e-9)
    total, count = nll.masked_fill(~completion, 0).sum(1), completion.sum(1)
    of_examples = F.aggregate(total, count, "sequence_mean_token_mean")
    assert float(of_examples) == pytest.approx(CASE["value"]["completion_mean_of_example_means"], abs=1e-9)


def test_trl_trains_on_the_completion_and_its_eos_only(tiny, tmp_path):
    """The batches of TRL's own trainer: labels are the ids of the completion, its end token too, and -100 elsewhere."""
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = tokens.load_tokenizer(str(tiny))
    rows = [{"prompt": "hello", "completion": "a good day"}, {"prompt": "yes or no", "completion": "no"}]
    dataset, _ = tokens.sft_dataset(rows, tokenizer, 64)
    args = SFTConfig(str(tmp_path), completion_only_loss=True, max_length=None, use_cpu=True, report_to=[])
    model = AutoModelForCausalLM.from_pretrained(tiny)
    trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
    (batch,) = trainer.get_train_dataloader()
    found = [labels[labels != -100].tolist() for labels in batch["labels"]]
    expected = [[*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id] for row in rows]
    assert sorted(found) == sorted(expected)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert torch.equal(ids[labels != -100], labels[labels != -100])


@pytest.mark.parametrize("alpha", [5.0, 15.0])
def test_neftune_noise_is_bounded_by_each_rows_length_and_gone_in_evaluation(tiny, alpha):
    """Uniform within alpha / sqrt(l d), l the row's own tokens however far it is padded; in training only."""
    hf = loading.load_base(str(tiny), Model(path=str(tiny)), 0)
    embedding, seen = hf.get_input_embeddings(), []
    before = embedding.weight.detach().clone()
    sft.add_noise(hf, alpha)
    embedding.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    torch.manual_seed(0)
    ids, lengths = torch.randint(0, 50, (4, 60)), [60, 37, 12, 3]
    mask = (torch.arange(60) < torch.tensor(lengths)[:, None]).long()
    hf.train()(input_ids=ids, attention_mask=mask)
    hf.eval()(input_ids=ids, attention_mask=mask)
    noise = (seen[0] - before[ids]).abs()
    for row, length in enumerate(lengths):
        bound = alpha / math.sqrt(length * embedding.weight.shape[1])
        assert 0.95 * bound < float(noise[row, :length].max()) <= bound * (1 + 1e-5)
    assert torch.equal(seen[1], before[ids]) and torch.equal(embedding.weight, before)


def test_the_end_is_learned(tiny, tmp_path):
    """150 steps on completions of a word: the model ends at least 95 % of its answers by itself, and it did not before."""
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"Say {w} {i}", "completion": w}) + "\n" for i in range(40) for w in ("yes", "no")
        )
    )
    result = alignkit(
        "sft", "run_name=ends", f"runs_dir={tmp_path}", f"model.path={tiny}", f"data.path={path}", "logger=none",
        "finetune=full", "max_steps=150", "mini_batch_size=8", "micro_batch_size=8", "optimizer.learning_rate=3e-3",
        "eval_fraction=0",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    assert finished(str(tiny)) < 0.5
    assert finished(str(tmp_path / "ends" / "sft")) >= 0.95


def finished(path: str) -> float:
    """The share of 64 sampled answers that end within 12 tokens."""
    source = resolve_model(path)
    tokenizer = tokens.load_tokenizer(source.tokenizer)
    roles = loading.single_role(loading.load_policy(source, Model(path=path), len(tokenizer))).eval()
    rows = [{"ids": tokens.encode_prompt(tokenizer, f"Say yes {i}"), "index": i, "meta": {}} for i in range(64)]
    context = Context(source.base, "float32", 0, 64, tokenizer.eos_token_id, tokenizer.pad_token_id, 64, roles=roles)
    sampler = HF(max_new_tokens=12).start(context)
    rollouts = sampler.generate(tokens.collate_prompts(rows, tokenizer.pad_token_id), 1, 0, 0)
    return float(rollouts.finished.float().mean())
