"""One run of the whole pipeline on the tiny model, shared by the tests of the stages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from command import alignkit


@pytest.fixture(scope="session")
def common(tiny, rows, tmp_path_factory) -> list[str]:
    """Overrides of every command of this module."""
    return [f"runs_dir={tmp_path_factory.mktemp('runs')}", "logger=none"]


@pytest.fixture(scope="session")
def pipeline(tiny, rows, common) -> Path:
    """The whole pipeline on one rank; its run folder."""
    result = alignkit(
        "pipeline", *common, "run_name=whole", f"model.path={tiny}", "finetune.last_layers=2", "rollout.max_new_tokens=10",
        "+reward@sample.rewards.gold=vader", "+reward@evaluate.rewards.gold=vader", "sample.finished_only=false",
        *(f"{stage}.data.path={rows}" for stage in ("sft", "sample", "ppo", "evaluate")),
        "sft.mini_batch_size=8", "sft.micro_batch_size=4", "sft.epochs=2", "sft.optimizer.learning_rate=1e-2",
        "sample.group_size=6", "reward.mini_batch_size=4", "reward.micro_batch_size=2", "reward.eval_fraction=0.3",
        "ppo.steps=3", "ppo.rollout_batch_size=16", "ppo.mini_batch_size=8", "ppo.micro_batch_size=4", "ppo.group_size=2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    root = Path(common[0].removeprefix("runs_dir=")) / "whole"
    (root / "terminal.txt").write_text(result.stdout)
    return root
