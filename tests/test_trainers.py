"""The two stages that TRL trains: losses, metrics and weights are the same however the rows are cut into batches.

21 rows, so that the last step of an epoch is a short one, and on two ranks one of them has less of it than the other.
"""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from nets import ONE
from test_ranks import start_ranks
from tiny import WORDS, tiny_model
from torch.nn.functional import logsigmoid
from trainers import CENTER, CUTS, EPOCHS, RATE

from alignkit.data import tokens
from alignkit.stages import measure, trl
from alignkit.training.engine import World

ROWS = 21


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """(model, rows, pairs): files of ragged rows; some pairs are worded alike, so that scores tie."""
    folder = tmp_path_factory.mktemp("given")
    draw = random.Random(0)

    def say(n: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(n))

    prompts = [f"Say {i} {say(1 + i % 5)}" for i in range(ROWS)]
    rows = [{"prompt": p, "completion": say(1 + (i * 7) % 13)} for i, p in enumerate(prompts)]
    pairs = [
        {"prompt": p, "chosen": say(1 + (i * 7) % 13), "rejected": say(1 + (i * 5) % 11) + " sad"}
        for i, p in enumerate(prompts)
    ]
    for name, lines in (("rows", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tiny_model(folder / "model"), folder / "rows.jsonl", folder / "pairs.jsonl", rows, pairs


def ran(given, out, *zeros):
    found = {}
    for ranks in CUTS:
        start_ranks("trainers.py", ranks, *map(str, given[:3]), str(out), *zeros)
        for key, run in torch.load(out / f"{ranks}.pt", weights_only=False).items():
            found[key if isinstance(key, str) else (*key, ranks)] = run
    return found


@pytest.fixture(scope="module")
def runs(given, tmp_path_factory):
    return ran(given, tmp_path_factory.mktemp("runs"), "zero2")


def compare(runs, stage):
    """Every run of a stage against the first one with the same mini-batch."""
    for mini in (8, 24):
        alike = [run for key, run in runs.items() if key[0] == stage and key[2][0] == mini]
        assert len(alike) >= 2 and len(alike[0]["steps"]) == EPOCHS * -(-ROWS // mini)
        for other in alike[1:]:
            for ours, theirs in zip(alike[0]["steps"], other["steps"], strict=True):
                assert ours.keys() ^ theirs.keys() <= {"train/grad_norm"}  # of no ZeRO stage DeepSpeed tells none
                for name in ours.keys() & theirs.keys():
                    assert theirs[name] == pytest.approx(ours[name], abs=2e-6, rel=1e-5), name
            for name, value in alike[0]["metrics"].items():
                assert other["metrics"][name] == pytest.approx(value, abs=2e-6, rel=1e-5), name
            gap = max(float((alike[0]["weights"][k] - w).abs().max()) for k, w in other["weights"].items())
            assert gap < 2e-5, gap  # they moved by RATE and more a step


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_neither_micro_batches_nor_ranks_nor_a_short_last_batch_change_a_step(runs, stage):
    compare(runs, stage)


@pytest.mark.slow
def test_nor_does_the_zero_stage(given, tmp_path):
    found = ran(given, tmp_path, "zero0", "zero3")
    for stage in ("sft", "reward"):
        compare(found, stage)


def plain_sft(given, hf):
    """(loss over all rows, its tokens) by log-softmax, a row at a time; with gradient."""
    tokenizer = tokens.load_tokenizer(str(given[0]))
    dataset, _ = tokens.sft_dataset(given[3], tokenizer, 512)
    total, count = 0.0, 0
    for row in dataset:
        ids = torch.tensor([row["input_ids"]])
        law = hf(input_ids=ids).logits[0, :-1].log_softmax(-1)
        counted = torch.tensor(row["completion_mask"][1:]).bool()
        total = total - law.gather(1, ids[0, 1:, None])[counted].sum()
        count += int(counted.sum())
    return total / count, count


def plain_reward(given, hf):
    tokenizer = tokens.load_tokenizer(str(given[0]))
    dataset, _ = tokens.preference_dataset(given[4], tokenizer, 512)

    def scores(side):
        return torch.stack([hf(input_ids=torch.tensor([row[side]])).logits[0, 0] for row in dataset])

    chosen, rejected = scores("chosen_ids"), scores("rejected_ids")
    loss = -logsigmoid(chosen - rejected).mean() + CENTER * (chosen + rejected).square().mean()
    return loss, (float((chosen > rejected).float().mean()), float((chosen - rejected).mean()))


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_step_is_that_of_a_bare_loop(given, runs, stage, tmp_path):
    """Two steps over all rows by torch's AdamW, the second at half the rate; then the held-out loss of the weights."""
    import transformers

    auto = {"sft": "AutoModelForCausalLM", "reward": "AutoModelForSequenceClassification"}[stage]
    plain = {"sft": plain_sft, "reward": plain_reward}[stage]
    run = runs[stage, "zero2", (24, 3), 1]
    hf = getattr(transformers, auto).from_pretrained(given[0], **({"num_labels": 1} if stage == "reward" else {}))
    if stage == "reward":  # its head is drawn from the seed
        from alignkit.models.score_heads import score_head

        hf.score = score_head(hf.config.hidden_size, torch.Generator().manual_seed(0), bias=False)
    optimizer = torch.optim.AdamW(hf.parameters(), lr=RATE, eps=1e-5, weight_decay=0.0)
    for number, logged in enumerate(run["steps"]):
        loss, numbers = plain(given, hf)
        name = {"sft": "policy/loss", "reward": "reward_model/loss"}[stage]
        assert logged[name] == pytest.approx(loss.item(), abs=2e-6)
        if stage == "reward":
            assert (logged["reward_model/accuracy"], logged["train/margin"]) == pytest.approx(numbers, abs=1e-6)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * (1 - number / EPOCHS)
        optimizer.step()
        optimizer.zero_grad()
    state = hf.state_dict()
    assert max(float((state[name] - w).abs().max()) for name, w in run["weights"].items()) < 1e-5
    if stage == "sft":
        loss, count = plain(given, hf)
        assert run["metrics"]["eval_loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert run["metrics"]["eval_tokens"] == count


@pytest.mark.parametrize("where, head", [("measure", False), ("score", False), ("card", True)])
def test_the_weights_are_written_before_anything_else_can_fail(runs, where, head):
    said, files = runs[where]
    assert "ZeroDivisionError after the training: planted; the trained weights are whole in" in said
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(files)
    assert ("score_head.safetensors" in files) == head


class Law:
    """Uniform over V tokens, or rows of a table; counts its forwards."""

    def __init__(self) -> None:
        self.forwards = 0

    def __call__(self, ids, mask, labels):
        self.forwards += 1
        return (-math.log(7.0) * ids[:, 1:]).masked_fill(labels[:, 1:] == -100, 0)


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_the_held_out_loss_is_a_sum_over_tokens(micro):
    """Σ nll / Σ tokens, not the mean of the rows' or the batches' means; ids stand for the nats of a token, in ln 7."""
    rows = [{"input_ids": [9, *range(1, n)], "completion_mask": [0, 0, *[1] * (n - 2)]} for n in (3, 9, 4, 30)]
    counted = [i for n in (3, 9, 4, 30) for i in range(2, n)]
    law = Law()
    found = measure.completions(law, rows, 0, ONE, micro, together=False)
    assert found.tokens == len(counted) and found.loss == pytest.approx(math.log(7.0) * sum(counted) / len(counted))
    assert law.forwards >= 4 / micro


def test_every_rank_measures_as_many_rows(monkeypatch):
    """Five rows on three ranks: the one with a row less measures one that counts nothing."""
    rows = [{"input_ids": [1] * (3 + i), "completion_mask": [0, *[1] * (2 + i)]} for i in range(5)]
    shares = []
    for rank in range(3):
        world, law = World(rank, 3, rank, torch.device("cpu")), Law()
        monkeypatch.setattr(world, "sum", lambda tensor: tensor)
        shares.append((measure.completions(law, rows, 0, world, 1, together=False), law.forwards))
    assert [forwards for _, forwards in shares] == [2, 2, 2]
    assert [found.tokens for found, _ in shares] == [2 + 5, 3 + 6, 4]


def test_what_fills_up_a_batch_is_taken_out():
    batch = {"input_ids": torch.arange(12).reshape(4, 3), "attention_mask": torch.ones(4, 3)}
    labels = {"labels": torch.tensor([[-100, 1, 1], [-100, -100, 1], [-100, 1, 1], [5, 1, 1]])}
    assert trl.counted(batch | labels) == (7, 12) and trl.counted(batch) == (2, 12)
    kept, counts = trl.of_its_own(batch | labels, 2)
    assert kept["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5]] and counts == (3, 6)
    kept, counts = trl.of_its_own(batch, 1)  # two pairs: chosen, chosen, rejected, rejected
    assert kept["input_ids"].tolist() == [[0, 1, 2], [6, 7, 8]] and counts == (1, 6)
    kept, counts = trl.of_its_own(batch | labels, 0)
    assert kept["labels"].tolist() == [[-100] * 3] and counts == (0, 0)


def test_a_metric_of_a_step_weighs_its_micro_batches():
    assert trl.over_step("accuracy", [1.0, 0.5], [1, 3]) == pytest.approx(2.5 / 4)
    assert trl.over_step("min_reward", [1.0, -2.0], [1, 3]) == -2.0
    assert trl.over_step("max_reward", [1.0, -2.0], [1, 3]) == 1.0
