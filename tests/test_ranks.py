"""Data parallelism by DeepSpeed: two ranks do what one does, and one what torch alone does, at ZeRO 0, 1 and 2.

The number in a test's name is its number in the list of correctness tests. Rows are ragged and go to the ranks in turn,
so that ranks have different numbers of tokens and of micro-batches. Gradient descent; ZeRO 0 in float64.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nets import ONE, distance, make_rollouts, play, save_model, torch_engines, weights
from ranks import CLIPS, CONFIG, DTYPES, RATE, ROUNDS, ROWS, new_roles

# ZeRO 1 and 2 keep float32 master weights and reduce in float32: whatever the module's dtype, every step rounds weights
# of up to 2 to multiples of 1.2e-7, and the sum over ranks rounds differently than a single rank's. The weights move
# by 1e-2 and more, so that a wrong divisor is far outside.
BOUNDS = {0: 1e-10, 1: 5e-7, 2: 5e-7}


def start_ranks(script: str, size: int, *arguments: str) -> None:
    """Run `size` processes of a script beside this file, and wait for all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / script), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {k: str(v) for k, v in (shared | {"RANK": r, "LOCAL_RANK": r}).items()}
            | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        )
        for r in range(size)
    ]  # fmt: skip
    outputs = []
    try:
        outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)


def run_ranks(folder: Path, out: Path, size: int) -> dict:
    start_ranks("ranks.py", size, str(folder), str(out))
    return torch.load(out / f"{size}.pt", weights_only=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture(scope="module")
def one(model, tmp_path_factory):
    return run_ranks(model, tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two(model, tmp_path_factory):
    return run_ranks(model, tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def plain(model):
    """The same rounds by torch alone, in both dtypes."""
    found = {}
    for dtype in set(DTYPES.values()):
        roles = new_roles(model, dtype)
        engines = torch_engines(roles, rate=RATE, updates=ROUNDS, clips=CLIPS)
        found[dtype] = play(CONFIG, roles, engines, ONE, ROWS, 2, ROUNDS)
    return found


def test_ranks_have_different_numbers_of_tokens():
    for number in range(ROUNDS):
        mask = make_rollouts(ROWS, seed=number).response_mask
        assert mask[0::2].sum() != mask[1::2].sum()


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_two_ranks_end_where_one_does(one, two, zero):
    assert distance(one[zero]["weights"], two[zero]["weights"]) <= BOUNDS[zero]
    for ours, theirs in zip(one[zero]["metrics"], two[zero]["metrics"], strict=True):
        for name in ours.keys() - {"update/padding_fraction"}:
            assert theirs[name] == pytest.approx(ours[name], abs=1e-5 if zero else 1e-6 if "norm" in name else 1e-10), (
                name
            )


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_kl_coefficient_and_running_moments_do_not_depend_on_ranks(one, two, zero):
    """Those of the first round are the same bits; later ones differ as the weights do."""
    assert two[zero]["scores"] == one[zero]["scores"]
    assert two[zero]["kl"][0] == one[zero]["kl"][0]
    assert two[zero]["kl"] == pytest.approx(one[zero]["kl"], abs=1e-8 if zero else 1e-14)
    assert 1e-3 < abs(one[zero]["kl"][0] / 0.05 - 1) < 0.99 * 0.2 * ROWS / 100  # it moves, and not to its limit


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_deepspeed_does_what_torch_does(one, two, plain, model, zero, world):
    """DeepSpeed takes the norm that it clips by in float32; only the critic's gradient is clipped here."""
    ours, theirs = (one, two)[world - 1][zero], plain[DTYPES[zero]]
    start = weights(new_roles(model, DTYPES[zero]))
    policy = [
        {k: v for k, v in w.items() if k.startswith("models.0.")} for w in (start, ours["weights"], theirs["weights"])
    ]
    assert distance(*policy[:2]) > 1e-2
    assert distance(*policy[1:]) <= max(BOUNDS[zero], 1e-8)
    assert distance(ours["weights"], theirs["weights"]) <= max(BOUNDS[zero], 1e-7)
    for one_round, other in zip(ours["metrics"], theirs["metrics"], strict=True):
        for role in ("policy", "critic"):
            assert one_round[f"{role}/grad_norm"] == pytest.approx(other[f"{role}/grad_norm"], abs=1e-5)
            assert other["critic/grad_norm"] > 2 * CLIPS["critic"]


def test_the_learning_rate_moves_once_a_round(one):
    """1 - (u - 1) / U of round u of U, from the first one, never 0."""
    expected = [RATE * (1 - (u - 1) / ROUNDS) for u in range(1, ROUNDS + 1)]
    for zero in DTYPES:
        assert [pair[0] for pair in one[zero]["rates"]] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_discarded_step_leaves_nothing_in_deepspeed(one, two, zero, world):
    with_it, without = (one, two)[world - 1][zero]["stopped"]
    assert distance(with_it, without) == 0
