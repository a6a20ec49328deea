"""What an adapter's JSON says it is: plain LoRA, which alignkit continues, or something that only PEFT can merge."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError
from alignkit.core.types import ModelSource

# Settings of adapter_config.json that leave an adapter plain LoRA, whatever they are. Any other one, of today's PEFT or of
# a later one, must be unset.
PLAIN = {
    *(
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "inference_mode",
        "peft_version",
        "peft_type",
        "task_type",
    ),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "init_lora_weights", "megatron_core", "qalora_group_size", "runtime_config", "eva_config"),
}
UNSET: tuple[Any, ...] = (None, False, "none", [], {}, "")
STARTS = (
    None,
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
)  # of init_lora_weights: those that leave the base as it is
PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
HEADS = {"score", "classifier"}  # what PEFT saves whole beside a sequence classifier's adapter


def beyond_lora(saved: dict[str, Any], scores: bool = False) -> list[str]:
    """The settings of an adapter_config.json by which it is more than LoRA on linear layers, as "key=value".

    Args:
        scores: it is to be a reward model: a sequence classifier with its head.
    """
    kind, task = str(saved.get("peft_type") or "LORA"), saved.get("task_type")
    found = [] if kind == "LORA" else [f"peft_type={kind}"]
    if task not in ((None, "CAUSAL_LM", "SEQ_CLS") if scores else (None, "CAUSAL_LM")):
        found.append(f"task_type={task}")
    if saved.get("init_lora_weights") not in STARTS:
        found.append(f"init_lora_weights={saved['init_lora_weights']}")
    for key, value in saved.items():
        if (
            key not in PLAIN
            and value not in UNSET
            and not (scores and key == "modules_to_save" and set(value) <= HEADS)
        ):
            found.append(f"{key}={json.dumps(value)}")
    return found


def check_continued(source: ModelSource, saved: dict[str, Any], name: str, scores: bool = False) -> None:
    """Refuse an adapter that training would not go on with as it is.

    Args:
        name: of the `finetune` that would.

    Raises:
        InputError: the first setting that is beyond it, and the way on.
    """
    if odd := beyond_lora(saved, scores):
        more = f" (and {', '.join(setting.partition('=')[0] for setting in odd[1:])})" if odd[1:] else ""
        raise InputError(
            f"{source.adapter}/adapter_config.json has {odd[0]}{more}, which finetune={name} does not continue: {way_on(source, saved)}"
        )


def check_merged(source: ModelSource, saved: dict[str, Any], key: str, alone: bool) -> None:
    """Refuse an adapter that cannot be a policy which only answers.

    Args:
        alone: its files are sent to an engine, which takes plain LoRA; else PEFT folds it into the base.
    """
    odd = beyond_lora(saved)
    never = [word for word in odd if word.startswith(("task_type=", "init_lora_weights="))]
    if str(saved.get("peft_type") or "LORA") in PROMPTS:
        never = odd[:1]
    if wrong := never or (odd if alone else []):
        raise InputError(
            f"{key}: {source.adapter}/adapter_config.json has {wrong[0]}, so it is no policy as it lies: {way_on(source, saved)}"
        )


def way_on(source: ModelSource, saved: dict[str, Any]) -> str:
    """What to do with an adapter that is not taken, with the command."""
    if saved.get("task_type") not in (None, "CAUSAL_LM"):
        return (
            f"it is an adapter for {saved['task_type']}, no language model's: give the adapter or model of an SFT run (a reward "
            "model is given as rewards.<name>.path)"
        )
    if str(saved.get("peft_type") or "LORA") in PROMPTS:
        return f"it has no weights that could be merged: start from its base {source.base}"
    return f"merge it first and give {merged_folder(source)}: {merge_command(source)}"


def merged_folder(source: ModelSource) -> str:
    assert source.adapter is not None
    return f"{str(source.adapter).rstrip('/')}-merged"


def merge_command(source: ModelSource) -> str:
    """A shell command that writes base and adapter as one model, with the tokenizer."""
    code = (
        "import sys; from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; "
        "M.from_pretrained(sys.argv[1]).merge_and_unload().save_pretrained(sys.argv[3]); "
        "T.from_pretrained(sys.argv[2]).save_pretrained(sys.argv[3])"
    )
    words = [str(source.adapter), source.tokenizer or source.base, merged_folder(source)]
    return f'python -c "{code}" {shlex.join(words)}'


def read_config(adapter: Path) -> dict[str, Any]:
    """adapter_config.json; it was checked before to be an object."""
    return json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
