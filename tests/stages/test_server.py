"""PPO with two real vLLM servers that hang, die and lose their engine while it runs; slow, for each takes a minute to start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import alignkit
from jobs import metrics, run_many

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(tiny, rows, tmp_path_factory) -> tuple[Path, dict]:
    """A run through three failures, and one that loses its only server: (folder, {name: error or None})."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "mine.py").write_text(
        "def score(prompts, responses, meta):\n    return [float(len(r) % 7) for r in responses]\n"
    )
    common = [
        f"runs_dir={folder}", f"data.path={rows}", "logger=none", "rollout=server", "rollout_batch_size=8",
        "mini_batch_size=8", "micro_batch_size=4", "rollout.max_new_tokens=8", "optimizer.learning_rate=1e-2",
        "~reward@rewards.reward_model", "+reward@rewards.mine=function", f"rewards.mine.target={folder / 'mine.py'}:score",
        "algorithm.missing_eos=none", f"model.path={tiny}",
    ]  # fmt: skip
    jobs = {
        "servers_fail": [
            *common,
            "run_name=servers_fail",
            "steps=10",
            "rollout.servers=2",
            "rollout.request_timeout_s=20",
        ],
        "overlap": [*common, "run_name=overlap", "steps=6", "rollout.async_steps=1"],
        "last_server_killed": [*common, "run_name=last_server_killed", "steps=3", "rollout.restarts=0"],
    }
    return folder, run_many(jobs, folder)


def notes(folder: Path, name: str) -> list[str]:
    lines = (folder / name / "ppo" / "logs" / "progress.jsonl").read_text().splitlines()
    return [event["note"] for event in map(json.loads, lines) if "note" in event]


def test_a_run_outlives_its_servers(served):
    folder, errors = served
    assert errors["servers_fail"] is None, errors["servers_fail"]
    rows = metrics(folder / "servers_fail" / "ppo")
    assert [row["step"] for row in rows] == list(range(10))
    for row in rows:
        assert row["rollout/canary_gap_max"] < 1e-4 and row["rollout/logprob_gap_max"] < 1e-4
        assert row["rollout/policy_version"] == row["step"] + 1
    said = "\n".join(notes(folder, "servers_fail"))
    assert "ReadTimeout" in said  # the hang of step 2
    assert "rollout server 0 ended (code -9): starting it again" in said  # the kill of step 5
    assert "status 500" in said or "RemoteProtocolError" in said or "ConnectError" in said  # the lost engine of step 8


def test_overlap_generates_a_step_ahead_and_is_corrected(served):
    """Rollouts are one version old from the second step on, and the importance weights say so."""
    folder, errors = served
    assert errors["overlap"] is None, errors["overlap"]
    rows = metrics(folder / "overlap" / "ppo")
    assert [row["rollout/policy_version"] for row in rows] == [1, 1, 2, 3, 4, 5]
    assert rows[0]["rollout/logprob_gap"] < 1e-5 < 1e-3 < rows[2]["rollout/logprob_gap"]
    assert all(row["rollout/canary_gap_max"] < 1e-4 for row in rows)


def test_the_last_server_takes_the_run_with_it_and_its_log_is_shown(served):
    folder, errors = served
    error = errors["last_server_killed"]
    assert error is not None and "RunError" in error
    assert "no rollout server is left of 1" in error or "a rollout request failed" in error
    assert "the end of a" in error and "INFO" in error  # lines of vLLM's own log
    assert len(metrics(folder / "last_server_killed" / "ppo")) == 1
    assert not (folder / "last_server_killed" / "ppo" / "model").exists()


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    """An adapter on the tiny model that moves its answers a long way."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter") / "model"
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("engine", [["rollout=server"], ["rollout=vllm", "rollout.payload=adapter"]], ids=" ".join)
def test_sample_and_evaluate_send_adapters_too(tiny, rows, adapter, tmp_path, engine):
    """The canary of each stage proves that the engine answers with the adapter, and the bare base between two of them."""
    (tmp_path / "mine.py").write_text(
        "def score(prompts, responses, meta):\n    return [float(len(r)) for r in responses]\n"
    )
    common = [
        f"runs_dir={tmp_path}", "run_name=served", f"data.path={rows}", "data.limit=8", "logger=none", *engine,
        "rollout.max_new_tokens=8", "+reward@rewards.mine=function", f"rewards.mine.target={tmp_path / 'mine.py'}:score",
    ]  # fmt: skip
    policies = [f"+policies.one={adapter}", f"+policies.base={tiny}", f"+policies.two={adapter}"]
    for name, own in (
        ("sample", [f"model.path={adapter}", "finished_only=false"]),
        ("evaluate", [*policies, "reference=base"]),
    ):
        done = alignkit(name, *common, *own)
        assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "served/evaluate/results.json").read_text())["policies"]
    # The adapter is far from the base: a hundred times further than the canary lets an engine be from the trainer.
    assert results["base"]["kl"] == 0 and results["one"]["kl"] > 0.1
    assert results["one"] == results["two"]
    assert (tmp_path / "served/sample/pairs.jsonl").read_text().count("\n") > 0
