"""What the plan counts is what the run then logs: for the five stages of a pipeline, and for settings off the beaten path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import alignkit
from jobs import manifest, metrics, run_many

from alignkit.config import stages
from alignkit.data import tokens
from alignkit.data.dataset import Data
from alignkit.pipeline.stage import check_inputs
from alignkit.plan import counts, memory
from alignkit.plan import text as plan


def planned(run_dir: Path) -> counts.Work:
    """The plan of a finished run, from what the run itself read: its config, its model and its rows."""
    cfg = stages.load(run_dir / "config.yaml", run_dir.name)
    model = plan.Model.of(cfg, check_inputs(cfg, {}), None)
    return plan.make(cfg, model, memory.Device(2**35, gpu=False)).work


def notes(run_dir: Path) -> str:
    lines = (run_dir / "logs" / "progress.jsonl").read_text().splitlines()
    return "\n".join(json.loads(line).get("note", "") for line in lines)


def trained_as_planned(run_dir: Path) -> None:
    work, rows = planned(run_dir), [row for row in metrics(run_dir) if "train/num_tokens" in row]
    assert work.exact
    assert len(rows) == manifest(run_dir)["metrics"]["steps"] == work.steps == work.optimizer_steps
    assert rows[-1]["train/num_tokens"] == work.tokens
    unit = "pairs" if run_dir.name == "reward" else "rows"
    assert f"training {unit}: {work.rows.kept} rows" in notes(run_dir)
    assert work.held_out is None or f"held-out {unit}: {work.held_out.kept} rows" in notes(run_dir)


def test_sft_of_a_pipeline(pipeline):
    trained_as_planned(pipeline / "sft")


def test_reward_of_a_pipeline(pipeline):
    trained_as_planned(pipeline / "reward")
    assert planned(pipeline / "reward").rows.kept == manifest(pipeline / "reward")["metrics"]["train_pairs"]


def test_sample_and_evaluate_of_a_pipeline(pipeline):
    assert planned(pipeline / "sample").rows.kept == manifest(pipeline / "sample")["metrics"]["prompts"]
    answers = (pipeline / "evaluate" / "samples.jsonl").read_text().splitlines()
    assert planned(pipeline / "evaluate").sequences == len(answers)


def test_ppo_of_a_pipeline(pipeline):
    work, rows = planned(pipeline / "ppo"), metrics(pipeline / "ppo")
    assert len(rows) == work.steps
    assert sum(row["rollout/sequences"] for row in rows) == work.sequences
    assert sum(row["update/steps"] for row in rows) == work.optimizer_steps
    assert sum(row["rollout/tokens"] for row in rows) <= work.tokens  # answers may end early
    assert f"prompts: {work.rows.kept} rows" in notes(pipeline / "ppo")


def test_ppo_in_groups_with_epochs_and_prompts_left_out(tiny, rows, tmp_path):
    """Answers of one length each, so that the tokens are known too; prompts are drawn beyond an epoch."""
    prompts, _ = tokens.prompt_dataset(
        Data(path=str(rows), limit=20).rows("prompt"), tokens.load_tokenizer(str(tiny)), 500
    )
    limit = sorted(len(prompt["ids"]) for prompt in prompts)[9]
    mine = tmp_path / "mine.py"
    mine.write_text("def score(prompts, responses, meta):\n    return [float(len(r)) for r in responses]\n")
    job = [
        f"runs_dir={tmp_path}", "run_name=groups", "logger=none", f"model.path={tiny}", f"data.path={rows}", "rollout=hf", "algorithm=rloo",
        "group_size=4", "rollout_batch_size=24", "mini_batch_size=8", "micro_batch_size=2", "steps=3", "algorithm.ppo_epochs=2",
        "rollout.max_new_tokens=5", "rollout.min_tokens=5", "rollout.allow_biased_sampling=true", f"max_prompt_length={limit}",
        "algorithm.missing_eos=none", "~reward@rewards.reward_model", "+reward@rewards.mine=function", f"rewards.mine.target={mine}:score",
        "data.limit=20",
    ]  # fmt: skip
    assert run_many({"groups": job}, tmp_path) == {"groups": None}
    run_dir = tmp_path / "groups" / "ppo"
    work, logged = planned(run_dir), metrics(run_dir)
    assert 0 < work.rows.kept < work.rows.read == 20, "some prompts must be too long, or nothing is tested"
    assert work.rows.kept < 3 * 24 / 4, "the run must draw beyond an epoch"
    assert work.exact and sum(row["rollout/tokens"] for row in logged) == work.tokens
    assert sum(row["rollout/sequences"] for row in logged) == work.sequences == 72
    assert sum(row["update/steps"] for row in logged) == work.optimizer_steps == 3 * 2 * 3


@pytest.mark.parametrize(
    "settings", [["epochs=1.5", "eval_fraction=0"], ["epochs=1", "eval_fraction=0.25", "max_length=40"]]
)
def test_sft_on_two_ranks_with_an_odd_number_of_rows(settings, tiny, rows, common, tmp_path):
    run = f"run_name=odd-{len(settings)}"
    result = alignkit(
        "sft", *common, run, f"model.path={tiny}", f"data.path={rows}", "data.limit=37", "launcher.num_ranks=2",
        "mini_batch_size=8", "micro_batch_size=2", *settings,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    run_dir = Path(common[0].removeprefix("runs_dir=")) / run.removeprefix("run_name=") / "sft"
    work = planned(run_dir)
    assert manifest(run_dir)["metrics"]["steps"] == work.steps
    assert f"training rows: {work.rows.kept} rows" in notes(run_dir)
