"""A model folder that is not whole is refused before anything starts, and once more where it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from alignkit.check.model import check_source
from alignkit.core.errors import InputError
from alignkit.core.types import ModelSource
from alignkit.models import loaded, loading
from alignkit.models.config import Model
from alignkit.models.score_heads import HEAD_FILE, load_head, save_head, score_head

KEY = "model.path=model"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def check(folder: Path, adapter: Path | None = None, scores: bool = False) -> dict:
    return check_source(ModelSource(str(folder), adapter, str(folder)), KEY, scores=scores)


def load(folder: Path, **options):
    return loading.load_base(str(folder), Model(path=str(folder)), 320, **options)


def rewrite(folder: Path, change) -> None:
    """`change` {name: tensor} -> the tensors that are written instead."""
    file = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in change(load_file(file)).items()}
    save_file(weights, file, metadata={"format": "pt"})


def settings(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without(part: str):
    return lambda w: {name: tensor for name, tensor in w.items() if part not in name}


def wider(w):
    return {n: torch.cat([t, t]) if n.endswith("layers.1.mlp.up_proj.weight") else t for n, t in w.items()}


FAULTS = {
    "_orig_mod.": (lambda w: {"_orig_mod." + n: t for n, t in w.items()}, {}, "_orig_mod."),
    "module.": (lambda w: {"module." + n: t for n, t in w.items()}, {}, "module."),
    "a block": (without(".layers.1."), {}, "model.layers.1."),
    "a tensor of every block": (without("mlp.up_proj"), {}, "2 of 20 weights are missing, as model.layers.0.mlp.up_proj.weight"),
    "the last norm": (without("model.norm"), {}, "model.norm.weight"),
    "the output layer": (lambda w: w, {"tie_word_embeddings": False}, "lm_head.weight"),
    "another shape": (wider, {}, "layers.1.mlp.up_proj.weight"),
    "a block too many": (lambda w: w, {"num_hidden_layers": 1}, "model.layers.1."),
    "a value head": (lambda w: w | {"v_head.summary.weight": torch.ones(1, 32)}, {}, "v_head.summary.weight"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_not_the_architectures_are_refused_from_their_headers_and_at_load(folder, fault):
    change, facts, words = FAULTS[fault]
    rewrite(folder, change)
    settings(folder, **facts)
    with pytest.raises(InputError) as told:
        check(folder)
    assert words in str(told.value) and KEY in str(told.value)
    with pytest.raises(InputError, match="weights"):
        load(folder)


def test_a_header_that_claims_gigabytes_is_not_read(folder):
    with (folder / "model.safetensors").open("wb") as file:  # sparse: takes no disk
        file.write(((8 << 30) - 8).to_bytes(8, "little"))
        file.truncate(8 << 30)
    with pytest.raises(InputError, match=r"a header of 8,589,934,584 bytes, expected 100,000,000 at most"):
        check(folder)


def test_a_whole_model_passes_both(folder):
    assert check(folder)["model_type"] == "llama"
    rewrite(folder, lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    check(folder)
    assert load(folder).trained_rows == 320


def test_a_model_whose_states_alone_are_used_needs_no_output_layer(folder):
    settings(folder, tie_word_embeddings=False)
    rewrite(folder, lambda w: w | {"score.weight": torch.ones(1, 32)})
    with pytest.raises(InputError, match="weights"):
        load(folder)
    assert load(folder, headless=True) is not None
    assert load(folder, auto_class="AutoModelForSequenceClassification", num_labels=1) is not None


def shards(folder: Path) -> dict[str, str]:
    """The weights as two shards with an index."""
    weights, placed = load_file(folder / "model.safetensors"), {}
    for number, part in enumerate((".layers.0.", ""), start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        mine = {n: t for n, t in weights.items() if n not in placed and part in n}
        save_file(mine, folder / name, metadata={"format": "pt"})
        placed |= dict.fromkeys(mine, name)
    (folder / "model.safetensors").unlink()
    index(folder, placed)
    return placed


def index(folder: Path, placed: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def test_shards_are_read_as_one_model(folder):
    shards(folder)
    check(folder)
    load(folder)


def test_a_tensor_that_the_index_names_and_no_shard_holds_is_named(folder):
    placed = shards(folder)
    index(folder, placed | {"model.layers.9.x": placed["model.norm.weight"]})
    with pytest.raises(InputError, match=r"names 1 tensors that its shards lack, as model\.layers\.9\.x"):
        check(folder)


def test_a_tensor_in_two_files_is_named(folder):
    placed = shards(folder)
    first = folder / "model-00001-of-00002.safetensors"
    save_file(load_file(first) | {"model.norm.weight": torch.ones(32)}, first, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 tensors stand in two files, as model\.norm\.weight"):
        check(folder)
    assert placed


def test_a_shard_that_was_left_over_is_named(folder):
    whole = (folder / "model.safetensors").read_bytes()
    shards(folder)
    (folder / "model.safetensors").write_bytes(whole)
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors beside model\.safetensors"):
        check(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match="2 shards"):
        check(folder)


def test_packed_weights_without_a_word_on_how_to_unpack_them_are_named(folder):
    rewrite(folder, lambda w: {n: t.to(torch.int8) if "q_proj" in n else t for n, t in w.items()})
    with pytest.raises(InputError, match=r"q_proj\.weight as I8, and no quantization_config"):
        check(folder)


# ------------------------------------------------------------------------------------------------ adapters and heads


@pytest.fixture
def adapter(made, tmp_path) -> Path:
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(load(made), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


def some(adapter: Path, keep) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if keep(name)}
    save_file(tensors, file, metadata={"format": "pt"})


KEEP = {
    "nothing": (lambda name: False, "holds no weights"),
    "half": (lambda name: "layers.1" not in name, "7 modules of the base have no weights in it"),
    "one side": (lambda name: "layers.1.mlp.up_proj.lora_B" not in name, "one of lora_A and lora_B only"),
}


@pytest.mark.parametrize("kept", KEEP)
def test_an_adapter_that_is_not_whole_is_refused_wherever_it_is_loaded(made, adapter, kept):
    check(made, adapter)
    keep, words = KEEP[kept]
    some(adapter, keep)
    with pytest.raises(InputError, match=words):
        check(made, adapter)
    source, model = ModelSource(str(made), adapter, str(made)), Model(path=str(made))
    with pytest.raises(InputError, match=r"does not fit the base: \d+ weights"):
        loading.load_policy(source, model, 320)
    with pytest.raises(InputError, match="does not fit the base"):
        loading.continue_adapter(load(made), adapter)


def test_an_adapter_that_is_whole_is_loaded_as_it_is(made, adapter):
    source, model = ModelSource(str(made), adapter, str(made)), Model(path=str(made))
    assert loading.load_policy(source, model, 320) is not None
    assert loading.continue_adapter(load(made), adapter) is not None


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.ones(1, 32)},
        {"weight": torch.ones(2, 32), "bias": torch.ones(2)},
        {"weight": torch.ones(32), "bias": torch.ones(1)},
    ],
)
def test_a_head_that_is_none_is_refused(tmp_path, tensors):
    save_file(tensors, tmp_path / HEAD_FILE)
    with pytest.raises(InputError, match=r"score head holds .*expected weight \[1, hidden size\]"):
        load_head(tmp_path)


def test_a_head_of_another_width_is_refused_before_and_at_load(folder):
    save_head(score_head(48), folder)
    with pytest.raises(InputError, match="hidden_size=32"):
        check(folder, scores=True)
    with pytest.raises(InputError, match=r"reads states of 48 numbers, its model has hidden_size=32"):
        loading.make_roles({"reward_model": load(folder)}, {"reward_model": load_head(folder)}, lambda role: None)


# ---------------------------------------------------------------------------------------- tokenizer and embedding


def test_tokens_without_a_row_are_counted_and_named(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<one more>"})
    tokenizer.save_pretrained(folder)
    check(folder)  # a padding token needs no row
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="ids up to 322, the embedding 320 rows: 2 tokens have none, as '<tool>'"):
        check(folder)
    with pytest.raises(InputError, match="323 tokens, its embedding 320 rows"):
        load_with(folder, 323)
    loaded.check_rows(321, 320, "model")


def load_with(folder: Path, vocab: int):
    return loading.load_base(str(folder), Model(path=str(folder)), vocab)
