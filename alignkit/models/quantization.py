"""Bases held in 4 bits: NF4 with double quantisation (arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def arguments(dtype: str) -> dict[str, Any]:
    """What `from_pretrained` is told; the layers compute in `dtype`."""
    import torch
    from transformers import BitsAndBytesConfig

    shape = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": shape, "device_map": {"": device}}


def layers(hf: nn.Module) -> dict[str, Any]:
    """{name: layer} of those held in 4 bits, not PEFT's wrappers around them."""
    return {
        name: part
        for name, part in hf.named_modules()
        if type(part).__module__.startswith("bitsandbytes.") and hasattr(part.weight, "quant_state")
    }


def keep_gradients(hf: nn.Module) -> None:
    """On a CPU with avx512_bf16 a forward in eval mode packs a layer's weight, and no gradient comes through it any more
    (bitsandbytes 0.50): every rollout is such a forward."""
    for layer in layers(hf).values():
        layer.support_avx512bf16_for_cpu = False


def dense_weight(layer: Any) -> Tensor:
    """[out, in]: the weight that such a layer computes with."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def written_out(hf: PreTrainedModel) -> PreTrainedModel:
    """The same with its 4-bit weights, if any, as ordinary ones: an adapter trained on those belongs to these values."""
    return hf.dequantize() if layers(hf) else hf


def keep_dtype(peft: Any) -> Any:
    """Hide from TRL that the base is in 4 bits: its trainers round the adapters of such bases to bfloat16."""
    if layers(peft):
        peft.get_base_model().is_loaded_in_4bit = False
    return peft
