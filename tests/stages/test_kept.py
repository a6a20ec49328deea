"""A checkpoint holds the model of its step as the stage's own `model/` would be, however it is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobs import manifest, run_many
from safetensors.torch import load_file
from test_zero import WHOLE, job

from alignkit.models.source import resolve_model
from alignkit.runs import hashes
from alignkit.training import checkpoint


@pytest.fixture(scope="module")
def pairs(rows, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    made = [json.loads(line) | {"rejected": "I hate it."} for line in rows.read_text().splitlines()]
    for row in made:
        row["chosen"] = row.pop("completion")
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def run_kept(cells: list[tuple], ranks: int, tiny: Path, data: dict[str, Path], folder: Path) -> Path:
    """Three steps of every stage, a checkpoint after each; of PPO, which writes none after its last, two steps as well."""
    jobs = {}
    for cell in cells:
        name, more = "-".join(cell), ["save_steps=1", "keep_last=3", "optimizer.schedule=constant"]
        more += {"ppo": ["critic_optimizer.schedule=constant"], "reward": ["normalize=none"]}.get(cell[0], [])
        jobs[name] = job(*cell, tiny, data, folder, *more)
        if cell[0] == "ppo":
            jobs[f"two-{name}"] = [*jobs[name], "steps=2", f"run_name=two-{name}"]
    errors = run_many(jobs, folder, ranks=ranks)
    assert not any(errors.values()), errors
    return folder


@pytest.fixture(scope="module", params=[1, 2])
def kept(request, tiny, rows, pairs, tmp_path_factory) -> Path:
    data = {"sft": rows, "reward": pairs, "ppo": rows}
    return run_kept(WHOLE, request.param, tiny, data, tmp_path_factory.mktemp("kept"))


@pytest.mark.slow
@pytest.mark.parametrize("cell", WHOLE, ids="-".join)
def test_a_checkpoint_is_the_model_of_its_step(cell, kept):
    stage, step = cell[0], 2 if cell[0] == "ppo" else 3
    folder = kept / "-".join(cell) / stage / "checkpoints" / f"step_{step:06d}"
    end = kept / (("two-" if stage == "ppo" else "") + "-".join(cell)) / stage
    assert checkpoint.damage(folder) is None
    source = resolve_model(str(folder))
    assert (source.run, source.adapter is None) == (folder, cell[1] == "full")
    for fact in ("adapter", "tokenizer_hash", "data_hash", "stage"):
        assert manifest(folder)[fact] == manifest(end)[fact]
    bases = [manifest(place)["base_model"] for place in (folder, end)]
    assert bases[0] | {"beside": ""} == bases[1] | {"beside": ""}
    for place, base in zip((folder, end), bases, strict=True):
        assert (place / base["beside"]).resolve() == Path(base["absolute"])
    files = {path.name for path in (end / "model").iterdir() if path.suffix in hashes.MODEL_FILES}
    assert files <= {path.name for path in (folder / "model").iterdir()}
    for path in (end / "model").glob("*.safetensors"):
        ours, theirs = load_file(folder / "model" / path.name), load_file(path)
        assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in theirs)
