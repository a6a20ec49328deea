"""Checkpoints: whole or passed over, the last ones kept, intact when the disk is full."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

from alignkit import checkpoint
from alignkit.engine import World
from alignkit.types import InputError, RunError

ALONE = World(0, 1, 0, torch.device("cpu"))


class Weights:
    """An engine whose state is one number."""

    def __init__(self, value: float = 0.0, update: int = 0) -> None:
        self.value, self.update, self.full = value, update, False

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "weights").write_text(f"{self.value}" * 100)
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")

    def load(self, folder: Path, update: int) -> None:
        self.value, self.update = float((folder / "weights").read_text()[: len("1.0")]), update


def write(run_dir: Path, step: int, keep_last: int = 3, **faults) -> Weights:
    engine = Weights(float(step), update=step)
    engine.full = faults.get("full", False)
    shuffle = torch.Generator().manual_seed(step)
    checkpoint.save(
        run_dir, {"step": step, "version": step + 1}, {"shuffle": shuffle}, {"policy": engine}, ALONE, keep_last
    )
    return engine


def test_what_is_saved_comes_back(tmp_path):
    write(tmp_path, 1)
    torch.manual_seed(7)
    write(tmp_path, 2)
    expected = torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(2))
    engine, shuffle, said = Weights(), torch.Generator(), []
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None and found.name == "step_000002" and not said
    torch.manual_seed(0)
    state = checkpoint.load(found, {"shuffle": shuffle}, {"policy": engine}, ALONE)
    assert (state["step"], state["version"], engine.value, engine.update) == (2, 3, 2.0, 2)
    assert torch.equal(torch.rand(3), expected[0]) and torch.equal(torch.rand(3, generator=shuffle), expected[1])


def test_the_last_ones_are_kept(tmp_path):
    for step in (2, 4, 6, 100, 8):
        write(tmp_path, step, keep_last=2)
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step_000100", "step_000008"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("file", ["policy/weights", "state.json", "rank_0.safetensors", "digests.json"])
@pytest.mark.parametrize("spoil", [truncate, flip, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(spoil, file, tmp_path):
    write(tmp_path, 2)
    write(tmp_path, 4)
    spoil(tmp_path / "checkpoints" / "step_000004" / file)
    said: list[str] = []
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None and found.name == "step_000002"
    assert len(said) == 1 and "step_000004" in said[0]
    if not (spoil is flip and file == "digests.json"):  # one letter of a name there may be any file's
        assert file.rsplit("/", 1)[-1] in said[0]


def test_none_that_is_whole_is_an_error_and_not_a_start_from_scratch(tmp_path):
    for step in (2, 4):
        write(tmp_path, step)
        shutil.rmtree(tmp_path / "checkpoints" / f"step_{step:06d}" / "policy")
    with pytest.raises(InputError, match=r"no checkpoint .* is whole .*step_000004.*step_000002.*delete that folder"):
        checkpoint.newest(tmp_path, lambda text: None)


def test_an_unfinished_write_is_no_checkpoint(tmp_path):
    write(tmp_path, 2)
    (tmp_path / "checkpoints" / "step_000004.partial").mkdir()
    found = checkpoint.newest(tmp_path, lambda text: pytest.fail(text))
    assert found is not None and found.name == "step_000002"
    write(tmp_path, 4)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if "partial" in p.name] == []


def test_a_full_disk_stops_the_run_and_leaves_the_one_before_intact(tmp_path):
    write(tmp_path, 2)
    with pytest.raises(RunError, match=r"step_000004 cannot be written: .*No space left on device"):
        write(tmp_path, 4, full=True)
    found = checkpoint.newest(tmp_path, lambda text: pytest.fail(text))
    assert found is not None and found.name == "step_000002" and checkpoint.damage(found) is None


def test_another_number_of_ranks_is_refused_with_the_right_one(tmp_path):
    write(tmp_path, 2)
    path = tmp_path / "checkpoints" / "step_000002" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"world_size": 4}))
    with pytest.raises(InputError, match=r"launcher\.num_ranks=4"):
        checkpoint.load(path.parent, {}, {}, ALONE)
