"""The PPO stage on a CUDA device, sampling with the trainer's own forward: `pytest -m gpu`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import alignkit
from jobs import metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def reward(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("reward") / "mine.py"
    path.write_text("def score(prompts, responses, meta):\n    return [float(len(r) % 7) for r in responses]\n")
    return f"{path}:score"


@pytest.mark.parametrize("finetune", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ppo_on_the_device(dtype, finetune, tiny, rows, reward, tmp_path):
    """First ratio 1 and KL 0 at step 0, to the rounding of the dtype: old and new log-probs are one function's."""
    result = alignkit(
        "ppo", "run_name=gpu", f"runs_dir={tmp_path}", "logger=none", f"model.path={tiny}", f"model.dtype={dtype}",
        f"finetune={finetune}", "rollout=hf", f"data.path={rows}", "steps=3", "rollout_batch_size=16", "mini_batch_size=8",
        "micro_batch_size=4", "rollout.max_new_tokens=8", "~reward@rewards.reward_model", "+reward@rewards.mine=function",
        f"rewards.mine.target={reward}", "algorithm.missing_eos=none",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    found = metrics(tmp_path / "gpu" / "ppo")
    assert len(found) == 3 and found[0]["objective/kl"] == pytest.approx(0, abs=1e-6 if dtype == "float32" else 0.5)
    assert found[0]["policy/first_ratio_gap_max"] <= (1e-4 if dtype == "float32" else 0.2)


def test_log_probs_on_the_device_are_those_of_the_host():
    from alignkit.algorithms import functional as F

    logits = torch.randn(4, 7, 1000, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 1000, (4, 7), generator=torch.Generator().manual_seed(1))
    for function in (lambda x, y: F.response_logprobs(x, y, 0.7), lambda x, y: F.entropy(x, 0.7)):
        torch.testing.assert_close(
            function(logits.cuda(), labels.cuda()).cpu(), function(logits, labels), rtol=0, atol=1e-5
        )


def test_one_base_and_four_models_lose_the_same():
    done = subprocess.run([sys.executable, str(SCRIPTS / "one_base.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loss_difference"] <= 1e-4 and found["parameters_ratio"] >= 3.5
