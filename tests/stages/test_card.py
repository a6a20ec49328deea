"""The report card of real reward models: a good one, one that learned length, and the good one made twenty times as sure."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from command import alignkit
from jobs import manifest
from safetensors.torch import load_file, save_file

from alignkit.data import tokens
from alignkit.models import loading
from alignkit.models.config import Model
from alignkit.models.score_heads import HEAD_FILE
from alignkit.models.source import resolve_model
from alignkit.report.card import report_card
from alignkit.stages.card import CHANGES, encode

KIND, UNKIND = ["good", "happy", "great", "love"], ["bad", "sad", "awful", "hate"]


def sentence(draw: random.Random, words: list[str], length: int) -> str:
    return " ".join(["x", draw.choice(words), *(draw.choice(["day", "hello"]) for _ in range(length))])


def by_content(draw: random.Random) -> tuple[str, str]:
    """(chosen, rejected): kind and unkind, of any length; one label in seven is wrong, so no good model is very sure."""
    pair = [sentence(draw, words, draw.randint(0, 8)) for words in (KIND, UNKIND)]
    return tuple(pair if draw.random() > 1 / 7 else pair[::-1])  # type: ignore[return-value]


def by_length(draw: random.Random) -> tuple[str, str]:
    """(chosen, rejected): whatever they say, the longer one is chosen."""
    short, long = sorted(draw.sample(range(12), 2))
    return sentence(draw, KIND + UNKIND, long), sentence(draw, KIND + UNKIND, short)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    """A folder with the runs good/reward and long/reward and their held-out pairs, good.jsonl and long.jsonl."""
    folder = tmp_path_factory.mktemp("cards")
    for name, pair in (("good", by_content), ("long", by_length)):
        draw = random.Random(0)
        for file, count in ((f"{name}-train.jsonl", 600), (f"{name}.jsonl", 150)):
            rows = [dict(zip(("chosen", "rejected"), pair(draw), strict=True)) for _ in range(count)]
            lines = [json.dumps({"prompt": f"Tell me something {i}."} | row) + "\n" for i, row in enumerate(rows)]
            (folder / file).write_text("".join(lines))
        done = alignkit(
            "reward", f"runs_dir={folder}", f"run_name={name}", f"model.path={tiny}", "logger=none", "finetune=full",
            f"data.path={folder / name}-train.jsonl", f"eval_data.path={folder / name}.jsonl", "epochs=3",
            "optimizer.learning_rate=2e-3", "normalize=none", "mini_batch_size=32", "micro_batch_size=32",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def card_of(run: Path) -> dict:
    return json.loads((run / "report_card.json").read_text())


def score_again(run: Path, rows: list[dict]) -> dict:
    """The card of a saved reward model, its scores read as PPO reads them."""
    source = resolve_model(str(run))
    tokenizer = tokens.load_tokenizer(source.tokenizer)
    roles = loading.load_reward(source, Model(), len(tokenizer)).eval()
    scores: dict[str, list[float]] = {"chosen": [], "rejected": []}
    for row in rows:
        for side, ids in encode(tokenizer, row).items():
            batch = torch.tensor([ids])
            score = roles(
                "reward_model", batch, torch.ones_like(batch, dtype=torch.bool), torch.zeros(1, dtype=torch.long), 1
            )
            scores[side.removesuffix("_ids")].append(float(score))
    lengths = [[len(tokens.encode_response(tokenizer, row[side])) for row in rows] for side in scores]
    return report_card(*scores.values(), *lengths)


def test_a_good_model_raises_no_flag(trained):
    card = card_of(trained / "good" / "reward")
    assert card["flags"] == {}
    assert card["accuracy"]["pairs"] == 150 and card["accuracy"]["low"] > 0.6
    assert card["accuracy"]["rate"] == manifest(trained / "good" / "reward")["metrics"]["eval_accuracy"]
    assert set(card["variants"]) == set(CHANGES) and all(v["pairs"] == 128 for v in card["variants"].values())
    page = (trained / "good" / "reward" / "report.html").read_text()
    assert page.count("<svg ") == 3


def test_a_model_that_learned_length_is_flagged(trained):
    card = card_of(trained / "long" / "reward")
    assert "long answers" in card["flags"]["length_biased"]
    notes = (trained / "long" / "reward" / "logs" / "progress.jsonl").read_text()
    assert "report card: held-out accuracy" in notes and "length_biased" in notes


def test_a_head_twenty_times_too_large_is_flagged(trained, tmp_path):
    rows = [json.loads(line) for line in (trained / "good.jsonl").read_text().splitlines()]
    written = card_of(trained / "good" / "reward")
    card = score_again(trained / "good" / "reward", rows)
    assert card["points"]["chosen"] == pytest.approx(written["points"]["chosen"], abs=1e-4)  # the card's own scores
    assert card["points"]["rejected_lengths"] == written["points"]["rejected_lengths"]
    run = tmp_path / "sure" / "reward"
    shutil.copytree(trained / "good" / "reward", run)
    head = run / "model" / HEAD_FILE
    save_file({name: 20 * tensor for name, tensor in load_file(head).items()}, head)
    card = score_again(run, rows)
    assert list(card["flags"]) == ["miscalibrated"] and "too sure" in card["flags"]["miscalibrated"]
