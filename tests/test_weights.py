"""Weights that are not those of the config.json beside them: told from names and shapes, for every architecture alike."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from alignkit.models import weights

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OWN = {
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "opt": SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": SHAPE | {"num_local_experts": 4},
    "qwen3_moe": SHAPE
    | {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [0, 1], "num_hidden_layers": 4},
    "gemma3_text": SHAPE | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
}
LISTED = sorted(weights.FAMILIES)
MORE = ["olmoe", "qwen2_moe", "jamba", "lfm2", "mpt", "gpt_bigcode"]  # blocks alike, or of two kinds
SPECIAL = {
    "jamba": {"mamba_d_state": 4, "mamba_d_conv": 2, "num_hidden_layers": 8, "mamba_dt_rank": 4, "num_experts": 2},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "olmoe": {"num_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model type, settings) -> (config.json, {name: shape}) as transformers saves such a model, made once each."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    known: dict = {}

    def make(kind: str, trunk: bool = False, **settings):
        key = json.dumps([kind, trunk, settings], sort_keys=True)
        if key not in known:
            config = CONFIG_MAPPING[kind](**OWN.get(kind, SHAPE) | SPECIAL.get(kind, {}) | settings)
            hf = AutoModelForCausalLM.from_config(config)
            folder = tmp_path_factory.mktemp(kind)
            (hf.base_model if trunk else hf).save_pretrained(folder)
            with safe_open(folder / "model.safetensors", "pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            known[key] = json.loads((folder / "config.json").read_text()), shapes
        return known[key]

    return make


@pytest.mark.parametrize("kind", [*LISTED, *MORE])
def test_what_transformers_saves_is_whole(made, kind):
    config, shapes = made(kind)
    assert weights.fault(config, shapes) is None


@pytest.mark.parametrize("kind", LISTED)
def test_no_single_weight_may_be_missing_or_renamed(made, kind):
    """Each tensor of each architecture in its turn: whatever is left out is named."""
    config, shapes = made(kind, tie_word_embeddings=False)
    for name in shapes:
        told = weights.fault(config, {other: at for other, at in shapes.items() if other != name})
        assert told and (name in told or name.rpartition(".")[0] in told or "expert" in told), (name, told)
        odd = {f"{other}_old" if other == name else other: at for other, at in shapes.items()}
        assert weights.fault(config, odd), name


@pytest.mark.parametrize("kind", LISTED)
def test_no_weight_of_a_block_or_of_the_vocabulary_may_have_another_shape(made, kind):
    config, shapes = made(kind)
    for name, shape in shapes.items():
        if ".1." in name or weights.EMBEDDING.search(name):
            told = weights.fault(config, shapes | {name: (shape[0] + 1, *shape[1:])})
            assert told and name.split(".")[-2] in told, (name, told)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox", "mixtral", "lfm2"])
@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "base_model.model.", "model.model.", "model._orig_mod.", "_fsdp_wrapped_module."],
)
def test_names_of_wrapped_models_are_told(made, kind, prefix):
    config, shapes = made(kind)
    told = weights.fault(config, {prefix + name.removeprefix("model."): at for name, at in shapes.items()})
    assert told and "save the model itself" in told


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "gemma2", "falcon", "opt"])
def test_a_trunk_saved_by_itself_is_whole_where_its_output_layer_is_tied(made, kind):
    config, shapes = made(kind, trunk=True, tie_word_embeddings=True)
    assert weights.fault(config, shapes) is None
    told = weights.fault(config | {"tie_word_embeddings": False}, shapes)
    assert told and "lm_head.weight (tie_word_embeddings is false)" in told
    assert weights.fault(config | {"tie_word_embeddings": False}, shapes, scores=True) is None


@pytest.mark.parametrize("kind", ["llama", "mixtral", "lfm2", "jamba", "gpt_bigcode"])
def test_blocks_are_counted(made, kind):
    config, shapes = made(kind)
    count = "n_layer" if "n_layer" in config else "num_hidden_layers"
    assert "of" in (weights.fault(config | {count: config[count] + 1}, shapes) or "")
    assert "block" in (weights.fault(config | {count: config[count] - 1}, shapes) or "")


def test_a_block_of_a_listed_kind_is_compared_with_its_own_kind(made):
    """Convolutions and attention stand in turn: a hole in the one is not hidden by the other."""
    config, shapes = made("lfm2", layer_types=["conv", "full_attention", "conv"])
    lost = next(name for name in shapes if name.startswith("model.layers.2.conv"))
    told = weights.fault(config, {name: at for name, at in shapes.items() if name != lost})
    assert told and lost in told


def test_what_old_checkpoints_carry_along_does_no_harm(made):
    config, shapes = made("llama")
    assert weights.fault(config, shapes | {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}) is None
    config, shapes = made("gpt2")
    assert weights.fault(config, shapes | {"h.0.attn.bias": (1, 1, 64, 64), "h.0.attn.masked_bias": ()}) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 65}, "has shape [64, 32], config.json says [65, 32]"),
        ({"hidden_size": 16, "head_dim": 8}, "config.json says"),
        ({"intermediate_size": 64}, "config.json says [32, 64]"),
        ({"num_key_value_heads": 4}, "k_proj.weight has shape [16, 32], config.json says [32, 32]"),
        ({"model_type": "qwen2"}, "9 of"),
        ({"attention_bias": True}, "q_proj.bias"),
    ],
)
def test_the_weights_of_another_config_are_told(made, change, words):
    config, shapes = made("llama")
    assert words in (weights.fault(config | change, shapes) or "")


def test_a_sequence_classifier_is_no_language_model(made):
    config, shapes = made("llama", tie_word_embeddings=True)
    assert "sequence classifier" in (weights.fault(config, shapes | {"score.weight": (1, 32)}) or "")
    assert weights.fault(config, shapes | {"score.weight": (1, 32)}, scores=True) is None
    assert "v_head" in (weights.fault(config, shapes | {"v_head.summary.weight": (1, 32)}) or "")


# ---------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def adapted(made, tmp_path_factory):
    """(model type, settings of the base) -> ({adapter_config.json}, {name: shape}) as PEFT saves it."""

    def make(kind: str, task: str = "CAUSAL_LM", targets="all-linear", **settings):
        from peft import LoraConfig, get_peft_model
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

        config = CONFIG_MAPPING[kind](**OWN.get(kind, SHAPE) | settings)
        auto = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
        folder = tmp_path_factory.mktemp("adapter")
        get_peft_model(
            auto.from_config(config), LoraConfig(r=4, target_modules=targets, task_type=task)
        ).save_pretrained(folder)
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return json.loads((folder / "adapter_config.json").read_text()), shapes

    return make


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox", "phi3", "bloom", "falcon", "gemma2"])
def test_an_adapter_fits_the_base_it_was_trained_on(made, adapted, kind):
    saved, shapes = adapted(kind)
    assert weights.adapter_fault(saved, shapes, *made(kind)) is None
    assert weights.adapter_fault(saved, shapes, *made(kind, trunk=True)) is None


def test_an_adapter_of_a_classifier_or_of_the_embedding_fits_too(made, adapted):
    saved, shapes = adapted("llama", task="SEQ_CLS")
    assert weights.adapter_fault(saved, shapes, *made("llama")) is None
    saved, shapes = adapted("llama", targets=["embed_tokens", "q_proj"])
    assert weights.adapter_fault(saved, shapes, *made("llama")) is None


@pytest.mark.parametrize(
    ("kind", "other", "words"),
    [
        ("llama", {"hidden_size": 64, "head_dim": 8}, "it was trained on a"),
        ("llama", {"num_hidden_layers": 5}, "14 of its 35 modules are not in the base, as model.layers.3."),
        ("llama", {"num_hidden_layers": 2}, "7 modules of the base have no weights in it, as layers.2."),
        ("gpt2", {}, "are not in the base, as transformer.h.0."),
    ],
)
def test_an_adapter_of_another_base_is_told(made, adapted, kind, other, words):
    saved, shapes = adapted(kind, **other)
    assert words in (weights.adapter_fault(saved, shapes, *made("llama")) or "")


def test_an_adapter_with_nothing_or_half_of_it_is_told(made, adapted):
    saved, shapes = adapted("llama")
    assert weights.adapter_fault(saved, {}, {}, {}) == "holds no weights"
    assert "no LoRA weights" in (weights.adapter_fault(saved, {"base_model.model.score.weight": (1, 32)}, {}, {}) or "")
    half = {name: at for name, at in shapes.items() if "layers.1.mlp.up_proj.lora_B" not in name}
    assert "layers.1.mlp.up_proj" in (weights.adapter_fault(saved, half, *made("llama")) or "")
