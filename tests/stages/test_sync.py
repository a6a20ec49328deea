"""Fault drills of the weight sync, on the real engine: each is caught at its step, by name, and nothing is written after."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import metrics, run_many
from tiny import tiny_model

# {fault: (payload, what the message says, steps that were logged before)}
DRILLS = {
    "sync_skipped": ("merged", "answers with weights of version 2, the trainer is at 3", 1),
    "old_adapter_under_the_new_name": ("adapter", "the engine is stale", 1),
    "old_weights_under_the_new_version": ("merged", "the engine is stale", 1),
    "adapter_folded_twice": ("merged", "the policy's adapter was applied twice", 1),
    "prefix_cache_left": ("merged", "its prefix cache kept keys and values of older weights", 1),
    "tied_head_left": ("merged", "its packed copy of the output embedding is older", 1),
    "wrong_base": ("adapter", "another base model, dtype or chat template", 0),
    "trainer_without_temperature": ("merged", "the engine's answers fit 0.7, the trainer's is 1", 0),
    "disk_full": ("adapter", "cannot be written", 1),
}
HEALTHY = {"merged": 4, "adapter": 4, "no_prefix_cache": 4}


@pytest.fixture(scope="session")
def drills(tiny, rows, tmp_path_factory) -> tuple[Path, dict]:
    """All drills and three healthy runs: (folder, {name: error or None})."""
    folder = tmp_path_factory.mktemp("drills")
    base = tiny_model(folder / "base", hidden=64, layers=4)
    tiny_model(folder / "base-other", seed=1, hidden=64, layers=4)
    (folder / "mine.py").write_text(
        "def score(prompts, responses, meta):\n    return [float(len(r) % 7) for r in responses]\n"
    )
    common = [
        f"runs_dir={folder}", f"data.path={rows}", "logger=none", "steps=4", "rollout_batch_size=8", "mini_batch_size=8",
        "micro_batch_size=4", "rollout.max_new_tokens=8", "rollout.temperature=0.7", "max_prompt_length=160",
        "optimizer.learning_rate=1e-2", "~reward@rewards.reward_model", "+reward@rewards.mine=function",
        f"rewards.mine.target={folder / 'mine.py'}:score", "algorithm.missing_eos=none", f"model.path={base}",
    ]  # fmt: skip
    payloads = {name: drill[0] for name, drill in DRILLS.items()} | {name: name for name in ("merged", "adapter")}
    jobs = {name: [*common, f"run_name={name}", f"rollout.payload={payload}"] for name, payload in payloads.items()}
    jobs["tied_head_left"].append("finetune=full")
    jobs["no_prefix_cache"] = [*common, "run_name=no_prefix_cache", "rollout.prefix_caching=false"]
    names, errors = list(jobs), {}
    for first in range(0, len(names), 4):  # a process keeps its engines, a GiB of cache each, to its end
        errors |= run_many({name: jobs[name] for name in names[first : first + 4]}, folder)
    return folder, errors


@pytest.mark.parametrize("name", DRILLS)
def test_a_fault_is_caught_at_its_step_and_named(name, drills):
    folder, errors = drills
    _, says, steps = DRILLS[name]
    assert errors[name] is not None, "not caught"
    assert "RunError" in errors[name] and says in errors[name]
    run = folder / name / "ppo"
    logged = metrics(run) if (run / "metrics.jsonl").exists() else []
    assert len(logged) == steps
    assert not (run / "model").exists()


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_agree_with_the_trainer_after_every_sync(name, drills):
    folder, errors = drills
    assert errors[name] is None, errors[name]
    rows = metrics(folder / name / "ppo")
    assert len(rows) == HEALTHY[name]
    for row in rows:
        assert row["rollout/canary_gap_max"] < 1e-4
        assert row["rollout/logprob_gap_max"] < 1e-4
    assert any(row["rollout/canary_gap_max"] > 0 for row in rows)  # two engines: their roundings differ
    assert not list((folder / name / "ppo").glob("sync-*"))  # nothing of the adapters' way is left
