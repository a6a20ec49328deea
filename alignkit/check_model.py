"""What can be seen of a model folder before anything starts: its JSON, its weights' headers, its tokenizer and template.

Reads headers only: a folder of any size takes milliseconds. Neither torch nor transformers is imported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignkit import score_heads
from alignkit.artifacts import read_json
from alignkit.chat import load_tokenizer, read_template, render
from alignkit.types import InputError, ModelSource

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
LAST = "the last thing that was said"


def check_source(
    source: ModelSource, key: str, chat_template: str | None = None, scores: bool = False
) -> dict[str, Any]:
    """Check base, adapter and tokenizer of a resolved model, where they are folders.

    Args:
        key: the config key and value the model was given as, for messages.
        chat_template: the template that replaces the tokenizer's own: a file, or a Jinja text.
        scores: whether it is to be a reward model, with a head.

    Returns:
        The base's config.json; {} for a hub id, which is not looked at.

    Raises:
        InputError: the file, what is wrong with it and what to do.
    """
    base, tokenizer = Path(source.base), Path(source.tokenizer)
    if not base.is_dir() and (base.is_absolute() or source.base.count("/") > 1):
        raise InputError(
            f"{key}: its base model {source.base} is not there: put it back, or train it anew from another"
        )
    facts = {}
    if base.is_dir():
        facts = read_json(base / "config.json", f"{key}: give a folder written by save_pretrained")
        check_weights(base, key)
    if source.adapter is not None:
        read_json(source.adapter / "adapter_config.json", f"{key}: give a folder written by PEFT's save_pretrained")
        if not (source.adapter / "adapter_model.safetensors").is_file():
            raise InputError(
                f"{key}: {source.adapter} has no adapter_model.safetensors: alignkit reads no pickled weights; save the "
                "adapter again with PEFT's save_pretrained"
            )
        check_weights(source.adapter, key)
    if scores and (source.adapter or base).is_dir():
        try:
            score_heads.find(source)
        except InputError as error:
            raise InputError(f"{key}: {error}") from None
    if tokenizer.is_dir():
        check_tokenizer(tokenizer, key)
    check_template(tokenizer, chat_template, key)
    return facts


def check_weights(folder: Path, key: str) -> None:
    """Refuse weights that are cut off or are not there: each header must describe exactly the bytes behind it."""
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length)) if 8 + length <= size else None
            ends = [entry["data_offsets"][1] for name, entry in (header or {}).items() if name != "__metadata__"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{key}: {file} is no safetensors file ({type(error).__name__}): copy it again") from None
        whole = 8 + length + max(ends, default=0)
        if header is None or whole != size:
            raise InputError(f"{key}: {file} has {size} bytes, expected {whole}: it was cut off; copy it again")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(read_json(index, f"{key}: copy it again").get("weight_map", {}).values())
        if missing := sorted(name for name in shards if not (folder / name).is_file()):
            raise InputError(f"{key}: {folder} lacks {missing[0]}, which {index.name} names: copy it again")


def check_tokenizer(folder: Path, key: str) -> None:
    """Refuse a folder without a tokenizer, or with one that is damaged or has no end token."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise InputError(
            f"{key}: {folder} has no tokenizer.json (it holds {found}): save the tokenizer there with save_pretrained"
        )
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            settings |= read_json(folder / name, f"{key}: save the tokenizer again with save_pretrained")
    if (folder / "tokenizer.json").is_file():
        load_tokenizer(folder)
    generic = settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
    if generic and not settings.get("eos_token"):  # other classes have an end token of their own
        raise InputError(
            f"{key}: {folder}/tokenizer_config.json has no eos_token, so no answer could end: name one, as <|im_end|>"
        )


def check_template(folder: Path, chat_template: str | None, key: str) -> None:
    """Refuse a chat template that does not compile, refuses one user message, or leaves out what was said last."""
    where, text = read_template(folder, chat_template)
    if text is None:
        return
    if LAST not in render(text, [{"role": "user", "content": LAST}], where, key, folder):
        raise InputError(
            f"{key}: the chat template {where} leaves out the last message: a prompt would not hold its question; "
            "mend it, or set model.chat_template to another"
        )
