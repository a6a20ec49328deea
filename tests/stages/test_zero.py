"""ZeRO stages, full weights and adapters, one rank and two: the same losses and the same saved models; and QLoRA.

The short matrix is in every run of the suite; the whole one, three stages by four ZeRO stages by two ways to fine-tune by
two numbers of ranks in two launches, is slow.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from jobs import manifest, metrics, run_many

LOSSES = {
    "sft": ["policy/loss"],
    "reward": ["reward_model/loss"],
    "ppo": ["policy/loss", "critic/loss", "policy/grad_norm", "critic/grad_norm", "objective/kl"],
}
SHORT = {1: [("ppo", "lora", "zero0")], 2: [("ppo", "lora", "zero3")]}
ZEROS = ("zero0", "zero1", "zero2", "zero3")
WHOLE = [(stage, tune, zero) for stage in LOSSES for tune in ("lora", "full") for zero in ZEROS]


@pytest.fixture(scope="session")
def pairs(rows, tmp_path_factory) -> Path:
    """The rows as preferences: their completion over a short one."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    made = [{"prompt": x["prompt"], "chosen": x["completion"], "rejected": "I hate it."} for x in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in made))
    return path


def job(stage: str, tune: str, zero: str, tiny: Path, data: dict[str, Path], folder: Path, *more: str) -> list[str]:
    """Three steps of a stage, with several micro-batches a step on each of two ranks."""
    name = f"{stage}-{tune}-{zero}"
    common = [stage, f"runs_dir={folder}", f"run_name={name}", f"model.path={tiny}", f"data.path={data[stage]}"]
    common += ["logger=none", f"deepspeed={zero}", f"finetune={tune}", "micro_batch_size=2"]
    if stage != "ppo":
        return [*common, "max_steps=3", "mini_batch_size=8", "optimizer.learning_rate=1e-3", *more]
    (folder / "mine.py").write_text(
        "def score(prompts, responses, meta):\n    return [len(r) % 7 for r in responses]\n"
    )
    return [
        *common, "steps=3", "rollout_batch_size=8", "mini_batch_size=8", "rollout=hf", "rollout.max_new_tokens=6",
        "optimizer.learning_rate=1e-3", "critic_optimizer.learning_rate=1e-3", "~reward@rewards.reward_model",
        f"rollout.stop_token_ids={list(range(20, 80))}".replace(" ", ""), "+reward@rewards.mine=function",
        f"rewards.mine.target={folder / 'mine.py'}:score", *more,
    ]  # fmt: skip


def run_matrix(cells: list[tuple], ranks: int, tiny: Path, data: dict[str, Path], folder: Path) -> Path:
    jobs = {"-".join(cell): job(*cell, tiny, data, folder) for cell in cells}
    errors = run_many(jobs, folder, ranks=ranks)
    assert not any(errors.values()), errors
    return folder


def losses(folder: Path, cell: tuple) -> list[list[float]]:
    """[3 steps][metrics of LOSSES]."""
    found = [
        [float(row[name]) for name in LOSSES[cell[0]] if name in row]
        for row in metrics(folder / "-".join(cell) / cell[0])
    ]
    return [row for row in found if row][:3]


def logits(folder: Path, cell: tuple, tiny: Path) -> torch.Tensor:
    """What the saved model says, loaded by transformers and PEFT alone."""
    import transformers
    from peft import PeftModel

    model = folder / "-".join(cell) / cell[0] / "model"
    score = {"num_labels": 1} if cell[0] == "reward" else {}
    auto = transformers.AutoModelForSequenceClassification if score else transformers.AutoModelForCausalLM
    adapter = (model / "adapter_config.json").is_file()
    assert adapter == (cell[1] != "full")
    hf = auto.from_pretrained(tiny if adapter else model, **score)
    hf.config.pad_token_id = 1
    if adapter:
        hf = PeftModel.from_pretrained(hf, model)
    with torch.no_grad():
        return hf.eval()(input_ids=torch.arange(4, 44).view(2, 20)).logits


def check(one: Path, other: Path, of: tuple, cell: tuple, tiny: Path) -> None:
    first, second = losses(one, of), losses(other, cell)
    assert len(first) == len(second) == 3
    for a, b in zip(first, second, strict=True):
        assert b == pytest.approx(a, abs=1e-5), cell
    assert first[0] != first[2]
    gap = (logits(one, of, tiny) - logits(other, cell, tiny)).abs().max()
    assert gap <= 1e-4, (cell, gap)


@pytest.fixture(scope="module")
def short(tiny, rows, pairs, tmp_path_factory) -> dict[int, Path]:
    data = {"sft": rows, "reward": pairs, "ppo": rows}
    return {n: run_matrix(cells, n, tiny, data, tmp_path_factory.mktemp(f"zero{n}")) for n, cells in SHORT.items()}


def test_zero3_on_two_ranks_is_zero0_on_one(short, tiny):
    check(short[1], short[2], SHORT[1][0], SHORT[2][0], tiny)


@pytest.fixture(scope="module")
def whole(tiny, rows, pairs, tmp_path_factory) -> dict[int, Path]:
    data = {"sft": rows, "reward": pairs, "ppo": rows}
    return {n: run_matrix(WHOLE, n, tiny, data, tmp_path_factory.mktemp(f"whole{n}")) for n in (1, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("cell", WHOLE, ids="-".join)
def test_every_zero_stage_trains_alike_on_one_rank_and_two(cell, ranks, whole, tiny):
    check(whole[1], whole[ranks], (*cell[:2], "zero0"), cell, tiny)


@pytest.fixture(scope="module")
def quantised(tiny, rows, pairs, tmp_path_factory) -> Path:
    """SFT, reward and PPO with QLoRA, PPO with vLLM; each of them one step."""
    folder = tmp_path_factory.mktemp("qlora")
    data = {"sft": rows, "reward": pairs, "ppo": rows}
    jobs = {stage: job(stage, "qlora", "zero2", tiny, data, folder, "max_steps=1") for stage in ("sft", "reward")}
    jobs["ppo"] = job("ppo", "qlora", "zero2", tiny, data, folder, "steps=2", "rollout=vllm")
    errors = run_many(jobs, folder)
    assert not any(errors.values()), errors
    return folder


def test_qlora_trains_on_the_4_bit_base_and_says_so(quantised, tiny):
    for stage in LOSSES:
        run = quantised / f"{stage}-qlora-zero2" / stage
        assert manifest(run)["base_model"]["quantization"] == "nf4"
        assert manifest(run)["adapter"] is True
        assert torch.isfinite(logits(quantised, (stage, "qlora", "zero2"), tiny)).all()


def test_qlora_the_engine_answers_with_the_trainers_4_bit_weights(quantised):
    """The engine got them written out with the adapter folded in; the unquantised base is 100 times further away."""
    steps = metrics(quantised / "ppo-qlora-zero2" / "ppo")
    assert all(row["rollout/canary_gap_max"] <= 1e-5 for row in steps)


def test_a_rank_that_ends_its_training_late_finds_its_folder(tiny, rows, tmp_path):
    """The folder that the Trainer saves into goes when every rank is done with it, not when the first is."""
    late = job("sft", "lora", "zero0", tiny, {"sft": rows}, tmp_path)
    assert run_many({"slow_rank": late}, tmp_path, ranks=2) == {"slow_rank": None}
    assert not (tmp_path / "sft-lora-zero0" / "sft" / "checkpoints" / "partial").exists()
