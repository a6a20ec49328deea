"""What architectures of transformers differ in: which can be trained and served, their logits, score head and weights' names.

What is refused is told from config.json alone, without torch. `tests/test_architectures.py` holds the lists against the
installed transformers and vLLM, and `tests/stages/test_architectures.py` sends the README's list through all stages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

from alignkit.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CLASSIFIER = "AutoModelForSequenceClassification"
CAUSAL = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel", "ForSequenceClassification", "ForRewardModel")
# Layers that carry a state from token to token (state-space, linear attention, convolutions), in some or all blocks.
RECURRENT = frozenset(
    {
        *("bamba", "deepseek_v4", "falcon_h1", "falcon_mamba", "granitemoehybrid", "inkling_text", "jamba"),
        *("kimi_linear", "lfm2", "lfm2_moe", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "plamo2"),
        *("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp_text", "recurrent_gemma", "rwkv", "xlstm"),
        *("zamba", "zamba2", "zaya"),
    }
)
# They see the whole text at once: as a "decoder" too they are none that answers.
ENCODERS = frozenset(
    {
        *("albert", "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "deberta", "deberta-v2"),
        *("distilbert", "electra", "ernie", "megatron-bert", "modernbert", "rembert", "roberta"),
        *("roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    }
)
# Decoders that vLLM has no code for, and whose own attention it cannot take the place of.
UNSERVED = frozenset(
    {
        *("biogpt", "blt", "codegen", "cpmant", "gpt_neo", "gpt_neox_japanese", "mpt", "openai-gpt", "reformer"),
        *("trocr", "xglm", "xlnet"),
    }
)
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CPU_HEADS = (
    32,
    64,
    80,
    96,
    112,
    128,
    160,
    192,
    224,
    256,
    512,
)  # dimensions that the attention of vLLM's CPU build takes


def refusals(facts: dict[str, Any], key: str) -> Iterator[str]:
    """One line for each reason why a model cannot be trained here at all.

    Args:
        facts: its config.json.
        key: the config key and value the model was given as.
    """
    kind, named = facts.get("model_type", ""), facts.get("architectures") or []
    own_code = "AutoModelForCausalLM" in (facts.get("auto_map") or {})
    senses = [name for name in facts if re.match("(text|vision|audio|image|speech|vq).*_config$", name)]
    if senses:
        yield (
            f"{key}: model_type={kind} has a {' and a '.join(senses)} (its config.json): a model of more than text, which "
            "alignkit does not train; save its language model by itself with transformers' class for it, "
            f"{kind.title().replace('_', '')}ForCausalLM or the like, and give that folder"
        )
    elif facts.get("is_encoder_decoder"):
        yield f"{key}: model_type={kind} is an encoder with a decoder; expected a causal language model: give a decoder, as Llama"
    elif kind in ENCODERS:
        yield f"{key}: model_type={kind} is an encoder; expected a causal language model: give a decoder, as Llama"
    elif kind in RECURRENT:
        yield (
            f"{key}: model_type={kind} has layers that carry a state from token to token, which alignkit does not train; "
            "expected attention in every layer: give a transformer, as Llama"
        )
    elif named and not own_code and not any(name.endswith((*CAUSAL, "Model")) for name in named):
        yield (
            f"{key}: architectures={named} (its config.json) is no causal language model; expected one that ends in "
            "ForCausalLM: give a decoder, as Llama"
        )


def unserved(facts: dict[str, Any], key: str, rollout: Any, cpu: bool) -> Iterator[str]:
    """One line for each reason why the rollout engine cannot answer with a model that can be trained.

    Args:
        rollout: the config of the engine.
        cpu: whether it would run in vLLM's CPU build.
    """
    if rollout.name not in ("vllm", "server"):
        return
    kind = facts.get("model_type", "")
    if kind in UNSERVED:
        yield f"rollout={rollout.name} with {key}: vLLM cannot run model_type={kind}: use rollout=hf"
    if is_mixture(facts) and (rollout.name == "server" or getattr(rollout, "payload", "") == "adapter"):
        told = "rollout=server" if rollout.name == "server" else "rollout.payload=adapter"
        yield (
            f"{told} with {key}: model_type={kind} is a mixture of experts, whose adapters are not sent to vLLM: use "
            "rollout=vllm with rollout.payload=merged, or rollout=hf"
        )
    size = head_dim(facts)
    if cpu and size and size not in CPU_HEADS and not getattr(rollout, "urls", None):
        yield (
            f"rollout={rollout.name} with {key}: its attention heads have dimension {size} (its config.json), and vLLM's CPU "
            f"build takes {', '.join(map(str, CPU_HEADS))}: use rollout=hf, or vLLM on a GPU"
        )


def is_mixture(facts: dict[str, Any]) -> bool:
    """Whether a config.json tells of experts, which PEFT adapts as tensors of one module rather than as linear layers."""
    return any((facts.get(name) or 0) > 1 for name in EXPERTS)


def head_dim(facts: dict[str, Any]) -> int | None:
    """The dimension of one attention head by a config.json; None where it does not say. Latent attention has its own."""
    if facts.get("kv_lora_rank"):
        return None
    if facts.get("head_dim"):
        return int(facts["head_dim"])
    width = next((facts[name] for name in ("hidden_size", "n_embd", "d_model") if facts.get(name)), 0)
    heads = next((facts[name] for name in ("num_attention_heads", "n_head", "n_heads") if facts.get(name)), 0)
    return int(width) // int(heads) if width and heads else None


def logits_of(hf: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[B, n, d] last hidden states -> [B, n, V]: the logits that the causal LM makes of them.

    Its own forward computes them, with `hidden` in the place of what its decoder returns: some architectures scale the
    logits (Granite, Cohere) or cap them (Gemma 2), and only their forward knows.
    """
    decoder = hf.get_decoder()
    own = vars(decoder).get("forward")
    decoder.forward = lambda *args, **kwargs: _states()(last_hidden_state=hidden)
    try:
        return hf(inputs_embeds=hidden, use_cache=False).logits
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own


@cache
def _states() -> Any:
    """What a decoder returns, with None for all that there may be beside the states: a cache, router logits, …"""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class States(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return dataclass(States)


def auto_class(name: str, config: Any) -> Any:
    """What loads a model of `config` by from_pretrained: transformers' class `name`, or where it has no sequence classifier
    of an architecture, one made as its others are: the decoder and a linear layer called `score`.

    Raises:
        InputError: the architecture is not in transformers, and its own code brings no sequence classifier.
    """
    import transformers
    from transformers.modeling_layers import GenericForSequenceClassification

    known = getattr(transformers, name)
    if name != CLASSIFIER or type(config) in known._model_mapping or name in (getattr(config, "auto_map", None) or {}):
        return known
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise InputError(
            f"model_type {config.model_type}: its own code has no {name}, which a reward model needs: add one to its "
            "auto_map, or train the reward model from another base"
        )
    causal = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    shared = next(
        c for c in causal.__mro__ if c.__name__.endswith("PreTrainedModel")
    )  # with its weights' names and init
    named = causal.__name__.replace("ForCausalLM", "").replace("LMHeadModel", "") + "ForSequenceClassification"
    body = {"__module__": causal.__module__, "base_model_prefix": shared.base_model_prefix}
    return type(shared)(named, (GenericForSequenceClassification, shared), body)


def attention(config: Any) -> dict[str, str]:
    """from_pretrained's argument for a model whose attention scores are capped: transformers' default (sdpa) passes over the
    cap without a word, and vLLM does not."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return {"attn_implementation": "eager"} if capped else {}


def checkpoint_names(hf: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the weights as they lie in the model's files, as save_pretrained would write them.

    transformers renames some weights when it loads them, and holds the experts of a mixture as one tensor. Converted
    block by block, so that no second copy of a whole model is held.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if not getattr(hf, "_weight_conversions", True):  # a model that was not loaded may have some too
        yield from weights
        return
    for _, block in groupby(weights, key=lambda pair: re.match(r"\D*\d*", pair[0])[0]):  # type: ignore[index]
        yield from revert_weight_conversion(hf, dict(block)).items()
