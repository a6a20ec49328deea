"""What a loader says it did, taken at its word: transformers and PEFT fill in or pass over what does not fit, and only log it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError
from alignkit.models.weights import HARMLESS

EMBEDDINGS = (
    "embed_tokens",
    "lm_head",
    "wte",
    "word_embeddings",
    "embed_in",
    "embed_out",
)  # PEFT may save resized ones


def check_base(hf: Any, info: dict[str, Any], path: str, headless: bool) -> None:
    """Refuse a model whose weights did not all come from its files.

    Args:
        info: transformers' `output_loading_info`.
        headless: its output layer is another (a new scalar head) or is not used: what lies outside the trunk is not asked for.

    Raises:
        InputError: weights are missing, additional or of another shape, by the first name and their number.
    """
    trunk = f"{hf.base_model_prefix}."

    def asked(names: Iterable[str]) -> list[str]:
        return sorted(n for n in names if not HARMLESS.search(n) and (n.startswith(trunk) or not headless))

    fix = "save or copy the model again"
    if missing := asked(info["missing_keys"]):
        raise InputError(
            f"{path}: {len(missing)} weights are not in its files, as {missing[0]}, and would be random: {fix}"
        )
    if odd := sorted(info["mismatched_keys"]):
        name, there, wanted = odd[0]
        raise InputError(
            f"{path}: {len(odd)} weights have another shape than config.json says, as {name}: {list(there)}, expected "
            f"{list(wanted)}: {fix}"
        )
    if strange := asked(info["unexpected_keys"]):
        raise InputError(
            f"{path}: {len(strange)} weights in its files have no place in a {type(hf).__name__}, as {strange[0]}: {fix}, or mend "
            "model_type and num_hidden_layers in its config.json"
        )


def check_rows(vocab: int, rows: int, path: str) -> None:
    """Refuse a tokenizer with more than a padding token beyond the embedding: the rows of the others would be random."""
    if rows and vocab > rows + 1:
        raise InputError(
            f"{path}: its tokenizer has {vocab} tokens, its embedding {rows} rows: give the tokenizer that belongs to the model, or "
            "save the model with a resized embedding"
        )


def check_adapter(peft: Any, folder: Path, name: str) -> None:
    """Refuse an adapter whose saved weights are not exactly those of the adapter `name` it was loaded as.

    Raises:
        InputError: by the first name and their number.
    """
    from peft.utils import get_peft_model_state_dict

    saved = saved_names(folder)
    own = set(get_peft_model_state_dict(peft, adapter_name=name, save_embedding_layers=False))
    if not own:
        raise InputError(f"{folder}: its adapter adapts no module of the base")
    missing = sorted(own - saved)
    strange = sorted(n for n in saved - own if n.split(".")[-2] not in EMBEDDINGS)
    if odd := missing or strange:
        where = "are not in its file" if missing else "have no place on this base"
        raise InputError(f"{folder}: its adapter does not fit the base: {len(odd)} weights {where}, as {odd[0]}")


def copy_adapter(peft: Any, folder: Path, name: str) -> None:
    """Overwrite adapter `name` with the LoRA weights saved in `folder`; heads saved beside them are left out.

    Raises:
        InputError: the saved weights are not exactly those of the adapter.
    """
    import torch
    from peft.utils import load_peft_weights

    saved = {key: tensor for key, tensor in load_peft_weights(str(folder), device="cpu").items() if ".lora_" in key}
    own = {n.replace(f".{name}.", "."): p for n, p in peft.named_parameters() if f".{name}." in n and ".lora_" in n}
    if own.keys() != saved.keys():
        odd = sorted(own.keys() ^ saved.keys())
        raise InputError(f"{folder}: its adapter does not fit the base: {len(odd)} weights differ in name, as {odd[0]}")
    if odd := [
        key for key, parameter in own.items() if getattr(parameter, "ds_shape", parameter.shape) != saved[key].shape
    ]:
        raise InputError(
            f"{folder}: its adapter does not fit the base: {len(odd)} weights differ in shape, as {odd[0]}"
        )
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(saved[key])


def saved_names(folder: Path) -> set[str]:
    """The names in adapter_model.safetensors."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


def check_head(tensors: dict[str, Any], folder: Path) -> None:
    """Refuse a scalar head that is none: {"weight": [1, d], "bias": [1]}."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    weight = found.get("weight", ())
    if found.keys() != {"weight", "bias"} or len(weight) != 2 or weight[0] != 1 or found["bias"] != (1,):
        raise InputError(
            f"{folder}: its score head holds {found}, expected weight [1, hidden size] and bias [1]: train the reward model anew"
        )


def check_width(role: str, head: Any, hf: Any) -> None:
    """Refuse a head that reads states of another width than its model's."""
    config = hf.config.get_text_config()
    width = getattr(config, "word_embed_proj_dim", config.hidden_size)  # OPT's states may be narrower than its blocks
    if head.in_features != width:
        raise InputError(
            f"the head of {role} reads states of {head.in_features} numbers, its model has hidden_size={width}: it belongs to "
            "another model; train it anew on this one"
        )
