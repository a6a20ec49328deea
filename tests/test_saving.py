"""What of a model transformers reads and will not write again is found when it is loaded, and never when it is saved."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from alignkit.core.errors import InputError, RunError
from alignkit.models import loading
from alignkit.models.config import Model
from alignkit.training import saving

UNUSED = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def change(folder, file, **values):
    path = folder / file
    held = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(held | values))


def loaded(folder, auto="AutoModelForCausalLM", **kwargs):
    return loading.load_base(str(folder), Model(path=str(folder)), 0, auto, **kwargs)


@pytest.mark.parametrize(
    "file, values, unset",
    [
        ("generation_config.json", UNUSED, {"temperature": 0.9, "top_p": 0.6}),
        ("generation_config.json", {"top_k": 5, "typical_p": 0.3}, {"top_k": 5, "typical_p": 0.3}),  # greedy, unsaid
        ("generation_config.json", {"early_stopping": True, "length_penalty": 2.0}, {"early_stopping": True, "length_penalty": 2.0}),
        ("generation_config.json", {"output_scores": True}, {"output_scores": True}),
        ("generation_config.json", {"do_sample": True, "temperature": 0.9}, {}),
        ("config.json", {"temperature": 0.7, "num_beams": 4}, {}),  # transformers drops them when it reads
        ("config.json", {}, {}),
    ],
)  # fmt: skip
def test_every_model_that_loads_can_be_saved(folder, tmp_path, file, values, unset):
    change(folder, file, **{"eos_token_id": 3} | values if file.startswith("gen") else values)
    hf = loaded(folder)
    assert {name: hf.unwritable.get(name) for name in unset} == unset and bool(hf.unwritable) == bool(unset)
    said = saving.describe_unwritable(hf)
    assert len(said) == bool(unset) and all(f"{name}={value}" in said[0] for name, value in unset.items())
    hf.save_pretrained(tmp_path / "saved")
    again = loaded(tmp_path / "saved")
    assert torch.equal(again.lm_head.weight, hf.lm_head.weight) and again.unwritable == {}
    kept = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == 3
    assert kept.get("temperature") == (values.get("temperature") if values.get("do_sample") else None)


def test_a_classifier_of_such_a_base_can_be_saved(folder, tmp_path):
    change(folder, "config.json", temperature=0.7)
    change(folder, "generation_config.json", **UNUSED)
    hf = loaded(folder, "AutoModelForSequenceClassification", num_labels=1)
    hf.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_a_rehearsal_writes_what_the_end_writes_and_leaves_nothing(folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer, hf, run = AutoTokenizer.from_pretrained(folder), loaded(folder), tmp_path / "run"
    saving.rehearse(run, tokenizer, hf)
    assert list(run.iterdir()) == []
    hf.config.odd = {1, 2}  # as remote code may put it there
    with pytest.raises(InputError, match=r"run: what belongs beside the weights .*TypeError.*nothing was trained"):
        saving.rehearse(run, tokenizer, hf)
    assert list(run.iterdir()) == []


def test_a_checkpoint_that_is_there_takes_no_more_room(tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_000001" / "x").write_bytes(bytes(100))
    for free, fits in ((249, False), (250, True)):
        monkeypatch.setattr(saving.shutil, "disk_usage", lambda path, free=free: type("Usage", (), {"free": free}))
        if fits:
            saving.check_room(tmp_path, 50, 100, 3)
        else:
            with pytest.raises(RunError, match="make room, choose another runs_dir=, or lower keep_last="):
                saving.check_room(tmp_path, 50, 100, 3)


def test_what_fails_beside_the_weights_says_where_they_are(tmp_path):
    with (
        pytest.raises(RunError, match=rf"ZeroDivisionError after the training: .*whole in {tmp_path}"),
        saving.beside(tmp_path),
    ):
        raise ZeroDivisionError("division by zero")
    with (
        pytest.raises(RunError, match=r"written to .*/a/b: OSError: no; [\d,.]+ MiB are free"),
        saving.weights(tmp_path / "a" / "b"),
    ):
        raise OSError("no")
