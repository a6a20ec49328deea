"""A checkpoint of PPO's engines, of one rank or two, goes on with two ranks or one, at ZeRO 0, 1 and 2 with AdamW."""

from __future__ import annotations

from pathlib import Path

import pytest
from nets import distance, save_model
from reshard import RATE
from safetensors.torch import load_file
from test_ranks import start_ranks


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """What all jobs wrote: the checkpoints of one rank first, then two ranks', then one rank again."""
    model, out = save_model(tmp_path_factory.mktemp("gpt2"), "gpt2"), tmp_path_factory.mktemp("reshard")
    for size, jobs in ((1, ["save"]), (2, ["save", "load1", "load2"]), (1, ["load1", "load2"])):
        start_ranks("reshard.py", size, str(model), str(out), *jobs)
    return out


def weights(out: Path, job: str, size: int, zero: int, when: str) -> dict:
    found = load_file(out / f"{job}_{size}_zero{zero}.safetensors")
    return {name: tensor for name, tensor in found.items() if name.startswith(when)}


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("saved_by, resumed_by", [(1, 1), (2, 2), (1, 2), (2, 1)])
def test_another_number_of_ranks_goes_on_where_the_checkpoint_is(out, zero, saved_by, resumed_by):
    whole = {when: weights(out, "save", saved_by, zero, when) for when in ("start", "end")}
    moved = distance({k.removeprefix("start."): v for k, v in whole["start"].items()},
                     {k.removeprefix("end."): v for k, v in whole["end"].items()})  # fmt: skip
    assert moved > RATE / 2  # the second round without the moments of the first would be off by as much
    assert distance(whole["start"], weights(out, f"load{saved_by}", resumed_by, zero, "start")) == 0
    off = distance(whole["end"], weights(out, f"load{saved_by}", resumed_by, zero, "end"))
    assert off == 0 if saved_by == resumed_by else off <= 1e-5
