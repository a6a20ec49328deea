"""A reward model's scalar head: where it is, told from JSON and the headers of weights alone; how it is made, kept and read.

ours                  score_head.safetensors beside the weights
transformers, TRL     `score.weight` [1, d] of an AutoModelForSequenceClassification
PEFT                  the same in the adapter (`modules_to_save`), or in the sequence classifier it stands on
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.core.errors import InputError
from alignkit.core.types import ModelSource
from alignkit.models import loaded

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

HEAD_FILE = "score_head.safetensors"  # {"weight": [1, d], "bias": [1]}: the bias is the score normalisation
SCORE = "score.weight"
ADAPTER, BASE = "adapter_model.safetensors", "base_model.model."
OTHER_HEADS = (
    "v_head",
    "value_head",
    "reward_head",
    "regression_layer",
    "rm_head",
    "classifier",
    "classification_head",
)
WIDTHS = ("word_embed_proj_dim", "hidden_size", "n_embd", "d_model")  # OPT's head reads the first
BY = "expected that of transformers' AutoModelForSequenceClassification with num_labels=1: score.weight"
HEADER_LIMIT = 100_000_000  # bytes, safetensors' own


@dataclass(frozen=True)
class Head:
    """The tensors of a head."""

    file: Path
    weight: str  # [1, d]
    bias: str | None = None  # [1]
    ours: bool = False


def find(source: ModelSource) -> Head:
    """The head of a reward model whose folders are on this machine.

    Raises:
        InputError: it has none, or one that is no scalar score; in words that go on after the folder's name.
    """
    base, folder = Path(source.base), source.adapter or Path(source.base)
    if (folder / HEAD_FILE).is_file():
        return Head(folder / HEAD_FILE, "weight", "bias", ours=True)
    if source.run is not None:
        raise InputError(f"no reward model, it has no {HEAD_FILE}: give the folder of a finished reward run")
    facts = _json(base / "config.json") if base.is_dir() else {}  # a hub id is not looked at
    facts = facts | (facts.get("text_config") or {})
    held = _tensors(base, facts) if base.is_dir() else {}
    found = held
    if source.adapter is not None:
        _check_adapter(_json(source.adapter / "adapter_config.json"))
        found = {
            name.removeprefix(BASE).replace(".modules_to_save.default.", ".").replace(".modules_to_save.", "."): entry
            for name, entry in tensors(source.adapter, ADAPTER).items()
        }
        if lora := [name for name in found if name.startswith("score.lora_")]:
            raise InputError(f"its adapter changes the head by low rank ({lora[0]}): {_merge(source)}")
        if (
            SCORE not in found
            and SCORE in held
            and _json(source.adapter / "adapter_config.json").get("task_type") is None
        ):
            found = held
    if SCORE not in found:
        raise InputError(_why_none(found, facts, source))
    if "score.bias" in found:
        raise InputError(
            "has score.bias, which transformers' classifier does not read, so its scores would be others: save it without"
        )
    file, name, shape = found[SCORE]
    if len(shape) != 2 or shape[0] != 1:
        raise InputError(
            f"its head gives {shape[0] if shape else 0} numbers (score.weight {shape}), no single score: {BY} [1, d]"
        )
    width = next((facts[key] for key in WIDTHS if isinstance(facts.get(key), int)), shape[1])
    if shape[1] != width:
        raise InputError(
            f"its score.weight reads {shape[1]} numbers, but its base {source.base} gives {width}: the two are not one model"
        )
    return Head(file, name)


def _check_adapter(config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"its adapter is of PEFT's type {config.get('peft_type')}, which is not taken as a reward: merge it into its base first"
        )
    if config.get("task_type") not in (None, "SEQ_CLS"):
        raise InputError(f"its adapter is for the task {config['task_type']}, which has no score: expected SEQ_CLS")


def _tensors(base: Path, facts: dict[str, Any]) -> dict[str, tuple[Path, str, list[int]]]:
    """Those of a base, which must be a folder of its own without quantised weights."""
    if method := facts.get("quantization_config"):
        kind = method.get("quant_method", "quantised") if isinstance(method, dict) else "quantised"
        raise InputError(
            f"its base {base} has {kind} weights, which score otherwise than they did in training: give it unquantised"
        )
    if facts.get("is_encoder_decoder"):
        raise InputError(f"its base {base} is an encoder and decoder ({facts.get('model_type')}): {BY} of a decoder")
    return tensors(base)


def _why_none(found: dict[str, Any], facts: dict[str, Any], source: ModelSource) -> str:
    """Why there is no `score.weight`, in words."""
    kind = (facts.get("architectures") or ["a model of no named architecture"])[0]
    if renamed := [name for name in found if name.endswith(f".{SCORE}")]:
        return f"calls its head {renamed[0]}: save it again with the names of {kind}, its head as {SCORE}"
    if other := [name for name in found for part in OTHER_HEADS if part in name.split(".")]:
        return f"has another head ({other[0]}, {kind}): {BY}"
    if source.adapter is not None:
        return f"no reward model, neither the adapter nor its base has {SCORE}: save it with modules_to_save=['score'], or {_merge(source)}"
    if kind.endswith("ForSequenceClassification"):
        return f"the head's weights are not in the file ({kind}, no {SCORE}): save the whole model again with save_pretrained"
    return (
        f"no reward model, it has no {HEAD_FILE} and no {SCORE} ({kind}): give a finished reward run, as runs/<name>/reward, or "
        "an AutoModelForSequenceClassification with num_labels=1"
    )


def _merge(source: ModelSource) -> str:
    return (
        "merge it: AutoPeftModelForSequenceClassification.from_pretrained("
        f"{str(source.adapter)!r}, num_labels=1).merge_and_unload().save_pretrained(...)"
    )


def tensors(folder: Path, pattern: str = "*.safetensors") -> dict[str, tuple[Path, str, list[int]]]:
    """{name: (file, name, shape)} of the weights in a folder, from the files' headers."""
    found: dict[str, tuple[Path, str, list[int]]] = {}
    for file in sorted(folder.glob(pattern)):
        if file.name == HEAD_FILE or (file.name == ADAPTER and pattern != ADAPTER):
            continue
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > HEADER_LIMIT:
                raise InputError(f"{file} is no safetensors file (a header of {length} bytes): copy it again")
            header = json.loads(stream.read(length))
        found |= {name: (file, name, entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return found


def shares_base(source: ModelSource, base: str, nf4: bool) -> bool:
    """Whether a reward model is an adapter that scores the same beside others on `base`: plain LoRA, the base held alike."""
    if source.adapter is None or source.nf4 != nf4 or place(source.base) != place(base):
        return False
    if (source.adapter / HEAD_FILE).is_file():
        return True
    config = _json(source.adapter / "adapter_config.json")
    more = ("use_dora", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication", "use_qalora")
    kept = set(config.get("modules_to_save") or ()) - {"score", "classifier"}
    return not kept and config.get("bias") in (None, "none") and not any(config.get(key) for key in more)


def place(base: str) -> str:
    """A folder in one spelling; a hub id as it is."""
    return str(Path(base).resolve()) if Path(base).is_dir() else base


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is missing or damaged ({' '.join(str(error).split())[:120]}): save it again"
        ) from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged (found a {type(found).__name__}, expected an object): save it again")
    return found


# --------------------------------------------------------------------------------------------------------- with torch


def score_head(hidden_size: int, generator: torch.Generator | None = None, bias: bool = True) -> nn.Linear:
    """A scalar head: weight ~ N(0, 1/(d+1)), bias 0 (summarize-from-feedback's init_scale), float32."""
    import torch

    head = torch.nn.Linear(hidden_size, 1, bias=bias)
    torch.nn.init.normal_(head.weight, std=(hidden_size + 1) ** -0.5, generator=generator)
    if bias:
        torch.nn.init.zeros_(head.bias)
    return head


def save_head(head: nn.Linear, folder: Path) -> None:
    """Write `score_head.safetensors`."""
    from safetensors.torch import save_file

    save_file(
        {"weight": head.weight.detach().float().cpu().clone(), "bias": head.bias.detach().float().cpu().clone()},
        folder / HEAD_FILE,
    )


def load_head(source: ModelSource | Path) -> nn.Linear:
    """The scalar head of a reward model, in float32; `score_heads` says where it is. Without a bias where it has none.

    Raises:
        InputError: it has no such head.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    source = ModelSource(str(source)) if isinstance(source, Path) else source
    folder = source.adapter or Path(source.base)
    if (folder / HEAD_FILE).is_file():
        loaded.check_head(load_file(folder / HEAD_FILE), folder)
    found = find(source)
    with safe_open(found.file, framework="pt") as file:
        weight = file.get_tensor(found.weight)
        bias = None if found.bias is None else file.get_tensor(found.bias)
    head = torch.nn.Linear(weight.shape[1], 1, bias=bias is not None)
    head.load_state_dict({"weight": weight.float()} | ({} if bias is None else {"bias": bias.float()}))
    return head


def fetched(source: ModelSource) -> ModelSource:
    """The same with its base as a folder: of a hub id, where its files are kept after a download."""
    from huggingface_hub import snapshot_download

    if Path(source.base).is_dir() or (source.adapter is not None and (source.adapter / HEAD_FILE).is_file()):
        return source
    return replace(source, base=snapshot_download(source.base, allow_patterns=["*.json", "*.safetensors", "*.py"]))


def whole_adapter(hf: PreTrainedModel, adapter: Path) -> Any:
    """`hf` with all that PEFT saved in `adapter`, which it cannot be trained with.

    Raises:
        InputError: the saved weights are not exactly those of the adapter.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    peft = PeftModel.from_pretrained(hf, adapter, autocast_adapter_dtype=False)
    own, saved = get_peft_model_state_dict(peft), load_peft_weights(str(adapter), device="cpu")
    if odd := sorted(own.keys() ^ saved.keys()):
        raise InputError(
            f"{adapter}: its adapter does not fit the base: {len(odd)} weights differ in name, as {odd[0]}"
        )
    return peft
