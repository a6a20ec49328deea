"""Checkpoints: whole or passed over, the last ones kept, intact when the disk is full."""

from __future__ import annotations

import errno
import random
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from alignkit.core.errors import InputError, RunError
from alignkit.training import checkpoint
from alignkit.training.engine import World

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
    with pytest.raises(
        RunError, match=r"step_000004 cannot be written: .*No space left on device.*; [\d,]+ MiB are free"
    ):
        write(tmp_path, 4, full=True)
    found = checkpoint.newest(tmp_path, lambda text: pytest.fail(text))
    assert found is not None and found.name == "step_000002" and checkpoint.damage(found) is None


def test_a_disk_that_takes_no_more_bytes_stops_the_run_with_the_one_before_intact(tmp_path):
    """The operating system refuses, not a stand-in: a file of this process may have 20,000 bytes here."""
    write(tmp_path, 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(RunError, match=r"step_000004 cannot be written: .*File too large"):
            checkpoint.save(
                tmp_path, {"step": 4}, {"big": torch.Generator()}, {"policy": Weights(), "large": Large()}, ALONE, 1
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000002"]
    assert checkpoint.damage(tmp_path / "checkpoints" / "step_000002") is None


class Large(Weights):
    """An engine with a hundred thousand numbers."""

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        save_file({"weights": torch.zeros(100_000)}, folder / "weights.safetensors")


def test_one_that_does_not_read_back_removes_none(tmp_path, monkeypatch):
    write(tmp_path, 2, keep_last=1)
    sync = checkpoint.sync

    def rotten(path: Path) -> None:
        """A disk that turns a bit over once the file is down."""
        sync(path)
        if path.name == "weights":
            flip(path)

    monkeypatch.setattr(checkpoint, "sync", rotten)
    with pytest.raises(RunError, match=r"step_000004 does not read back .*policy/weights differs"):
        write(tmp_path, 4, keep_last=1)
    monkeypatch.undo()
    found = checkpoint.newest(tmp_path, lambda text: None)
    assert found is not None and found.name == "step_000002"


@pytest.mark.parametrize("keep_best, kept", [(None, [5]), ("score", [5, 3]), ("-score", [5, 1])])
def test_the_best_is_kept_beside_the_last(keep_best, kept, tmp_path):
    for step, score in enumerate((0.1, 0.5, 0.9, float("nan"), 0.7), start=1):
        state = {"step": step, "version": step, "merit": checkpoint.merit({"score": score}, keep_best)}
        checkpoint.save(tmp_path, state, {}, {"policy": Weights()}, ALONE, 1, keep_best)
    assert [p.name for p in checkpoint.steps(tmp_path)] == [f"step_{step:06d}" for step in kept]


def test_a_metric_that_is_not_logged_is_refused_with_those_that_are():
    with pytest.raises(InputError, match=r"keep_best=-scor: no such metric; this stage logs kl, score"):
        checkpoint.merit({"score": 1.0, "kl": 0.0}, "-scor")


def test_the_generators_of_torch_numpy_and_python_go_on(tmp_path):
    for module in (random, np.random, torch):
        (module.manual_seed if module is torch else module.seed)(7)
    random.gauss(0, 1), np.random.standard_normal()  # each keeps the second number of a pair
    write(tmp_path, 2)

    def numbers() -> list[float]:
        return [
            random.gauss(0, 1),
            random.random(),
            np.random.standard_normal(),
            np.random.rand(),
            float(torch.rand(())),
        ]

    expected = numbers()
    path = tmp_path / "checkpoints" / "step_000002"
    checkpoint.load(path, {"shuffle": torch.Generator()}, {"policy": Weights()}, ALONE)
    assert numbers() == expected
    checkpoint.load(path, {"shuffle": torch.Generator()}, {"policy": Weights()}, World(3, 4, 3, torch.device("cpu")))
    assert numbers() == expected  # a rank that was not there when it was saved
