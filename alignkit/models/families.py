"""The names of the weights of well-known kinds of models, as `weights.py` looks for them in the files' headers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """The weights of one kind of model. A name stands for its `.weight`; with `!` there is a `.bias` too, with `?key` where
    config.json sets that key, with `?key!` unless it unsets it; with `@key` it is not there where that is unset. `more` may be there: names, or `*` for anything."""

    block: str
    around: str = "embed_tokens norm"  # of the trunk outside the blocks; the first is the embedding
    trunk: str = "model."
    blocks: str = "layers."
    head: str = "lm_head"
    tied: bool = False  # what config.json means where it does not say
    more: str = ""


_NORMS = "input_layernorm post_attention_layernorm"
_ATTENTION = "self_attn.q_proj?attention_bias self_attn.k_proj?attention_bias self_attn.v_proj?attention_bias"
_OUT = "self_attn.o_proj?attention_bias"
_MLP = "mlp.gate_proj?mlp_bias mlp.up_proj?mlp_bias mlp.down_proj?mlp_bias"
_QK = "self_attn.q_norm self_attn.k_norm"
_LLAMA = Family(f"{_NORMS} {_ATTENTION} {_OUT} {_MLP}")
_QKV_BIAS = "self_attn.q_proj! self_attn.k_proj! self_attn.v_proj!"
_AROUND_MLP = "pre_feedforward_layernorm post_feedforward_layernorm"
_SPARSE = Family(f"{_NORMS} {_ATTENTION} {_OUT}", more="*")
_GLM = "self_attn.q_proj?attention_bias! self_attn.k_proj?attention_bias! self_attn.v_proj?attention_bias! self_attn.o_proj"
_GPT = "transformer."

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "granite"), _LLAMA),
    "smollm3": Family(_LLAMA.block, tied=True),
    "qwen2": Family(f"{_NORMS} {_QKV_BIAS} self_attn.o_proj {_MLP}"),
    "qwen3": Family(f"{_LLAMA.block} {_QK}"),
    "gemma": Family(_LLAMA.block, tied=True),
    "gemma2": Family(f"{_LLAMA.block} {_AROUND_MLP}", tied=True),
    "gemma3_text": Family(f"{_LLAMA.block} {_AROUND_MLP} {_QK}", tied=True),
    "olmo2": Family(f"post_attention_layernorm post_feedforward_layernorm {_ATTENTION} {_OUT} {_MLP} {_QK}"),
    "cohere": Family(f"input_layernorm {_ATTENTION} {_OUT} {_MLP}", tied=True, more="*"),
    "cohere2": Family(f"input_layernorm {_ATTENTION} {_OUT} {_MLP}", tied=True),
    "phi3": Family(f"{_NORMS} self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj"),
    "glm": Family(f"{_NORMS} {_GLM} mlp.gate_up_proj mlp.down_proj"),
    "glm4": Family(
        f"{_NORMS} post_self_attn_layernorm post_mlp_layernorm {_GLM} mlp.gate_up_proj mlp.down_proj"
    ),
    "stablelm": Family(
        "input_layernorm! self_attn.q_proj?use_qkv_bias self_attn.k_proj?use_qkv_bias self_attn.v_proj?use_qkv_bias "
        "self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj",
        "embed_tokens norm!", more="*",
    ),
    "starcoder2": Family(
        "input_layernorm! post_attention_layernorm! self_attn.q_proj?use_bias! self_attn.k_proj?use_bias! "
        "self_attn.v_proj?use_bias! self_attn.o_proj?use_bias! mlp.c_fc?use_bias! mlp.c_proj?use_bias!",
        "embed_tokens norm!", tied=True,
    ),
    "phi": Family(
        f"input_layernorm! {_QKV_BIAS} self_attn.dense! mlp.fc1! mlp.fc2!", "embed_tokens final_layernorm!",
        head="lm_head!", more="self_attn.q_layernorm self_attn.k_layernorm",
    ),
    "mixtral": _SPARSE,
    "qwen3_moe": Family(f"{_SPARSE.block} {_QK}", more="*"),
    "gpt2": Family(
        "ln_1! attn.c_attn! attn.c_proj! ln_2! mlp.c_fc! mlp.c_proj!", "wte wpe ln_f!", _GPT, "h.", tied=True, more="*"
    ),
    "bloom": Family(
        "input_layernorm! self_attention.query_key_value! self_attention.dense! post_attention_layernorm! "
        "mlp.dense_h_to_4h! mlp.dense_4h_to_h!",
        "word_embeddings word_embeddings_layernorm! ln_f!", _GPT, "h.", tied=True,
    ),
    "falcon": Family(
        "self_attention.query_key_value?bias self_attention.dense?bias mlp.dense_h_to_4h?bias mlp.dense_4h_to_h?bias",
        "word_embeddings ln_f!", _GPT, "h.", tied=True, more="*",
    ),
    "gpt_neox": Family(
        "input_layernorm! post_attention_layernorm! attention.query_key_value?attention_bias! "
        "attention.dense?attention_bias! mlp.dense_h_to_4h! mlp.dense_4h_to_h!",
        "embed_in final_layer_norm!", "gpt_neox.", head="embed_out",
    ),
    "opt": Family(
        "self_attn_layer_norm!@layer_norm_elementwise_affine self_attn.q_proj?enable_bias! self_attn.k_proj?enable_bias! "
        "self_attn.v_proj?enable_bias! self_attn.out_proj?enable_bias! fc1?enable_bias! fc2?enable_bias! "
        "final_layer_norm!@layer_norm_elementwise_affine",
        "embed_tokens embed_positions final_layer_norm!@do_layer_norm_before", "model.decoder.", tied=True, more="*",
    ),
}  # fmt: skip
