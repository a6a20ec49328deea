"""What can be seen of a model folder before anything starts: its JSON, its weights' headers, its tokenizer and template.

Reads headers only: a folder of any size takes milliseconds. Neither torch nor transformers is imported.
"""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError
from alignkit.core.io import read_json
from alignkit.core.types import ModelSource
from alignkit.data.chat import load_tokenizer, template_of
from alignkit.models import adapters, score_heads, weights

Headers = dict[str, tuple[str, tuple[int, ...]]]  # {name: (dtype, shape)}

FLOATS = ("F64", "F32", "F16", "BF16")
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
    if not base.is_dir() and (source.base.startswith(("/", ".", "~")) or source.base.count("/") > 1):
        raise InputError(
            f"{key}: its base model {source.base} is not there: put it back, or train it anew from another"
        )
    facts: dict[str, Any] = {}
    held: Headers = {}
    own: Headers | None = None
    if base.is_dir():
        facts = read_json(base / "config.json", f"{key}: give a folder written by save_pretrained")
        held = check_weights(base, key)
    if source.adapter is not None:
        read_json(source.adapter / "adapter_config.json", f"{key}: give a folder written by PEFT's save_pretrained")
        if not (source.adapter / "adapter_model.safetensors").is_file():
            raise InputError(
                f"{key}: {source.adapter} has no adapter_model.safetensors: alignkit reads no pickled weights; save the "
                "adapter again with PEFT's save_pretrained"
            )
        own = check_weights(source.adapter, key)
    check_names(source, facts, held, own, key, scores)
    if scores and (source.adapter or base).is_dir():
        try:
            head = score_heads.find(source)
        except InputError as error:
            raise InputError(f"{key}: {error}") from None
        if head.ours and facts.get("hidden_size"):
            check_head(head.file, facts["hidden_size"], key)
    if tokenizer.is_dir():
        check_tokenizer(tokenizer, key)
        check_vocabulary(tokenizer, held, own, key)
    check_template(tokenizer, chat_template, key)
    return facts


def check_weights(folder: Path, key: str) -> Headers:
    """{name: (dtype, shape)} of the tensors that transformers or PEFT would read from a folder.

    Raises:
        InputError: a file is cut off or is not there, or it is not certain which file a tensor comes from.
    """
    headers = {file.name: read_header(file, key) for file in sorted(folder.glob("*.safetensors"))}
    index, single = folder / "model.safetensors.index.json", "model.safetensors"
    placed = read_json(index, f"{key}: copy it again").get("weight_map", {}) if index.is_file() else {}
    if missing := sorted(name for name in set(placed.values()) if name not in headers):
        raise InputError(f"{key}: {folder} lacks {missing[0]}, which {index.name} names: copy it again")
    read = [single] if single in headers else sorted(set(placed.values()))
    strays = sorted(
        name for name in headers if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) and name not in read
    )
    if strays and read:
        raise InputError(
            f"{key}: {folder} holds {strays[0]} beside {read[0]}, which is read alone: {len(strays)} files of another model "
            f"or of another save; remove them, or remove {read[0]} and keep {index.name}"
        )
    if strays:
        raise InputError(
            f"{key}: {folder} holds {len(strays)} shards, as {strays[0]}, without {index.name}: copy it too"
        )
    if not read:  # an adapter's folder; else nothing that transformers would look for
        return headers.get("adapter_model.safetensors", {})
    found: Headers = {}
    for name in read:
        if twice := sorted(found.keys() & headers[name].keys()):
            first = next(other for other in read if twice[0] in headers[other])
            raise InputError(
                f"{key}: {folder}: {len(twice)} tensors stand in two files, as {twice[0]} in {first} and {name}: save the "
                "model again with save_pretrained"
            )
        found |= headers[name]
    if lost := sorted(name for name, file in placed.items() if file in read and name not in headers[file]):
        raise InputError(
            f"{key}: {index} names {len(lost)} tensors that its shards lack, as {lost[0]} in {placed[lost[0]]}: copy it again"
        )
    return found


def read_header(file: Path, key: str) -> Headers:
    """{name: (dtype, shape)} from the header of a safetensors file, which must describe exactly the bytes behind it."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > score_heads.HEADER_LIMIT:
                raise ValueError(f"a header of {length:,} bytes, expected {score_heads.HEADER_LIMIT:,} at most")
            header = json.loads(stream.read(length)) if 8 + length <= size else None
        entries = {name: entry for name, entry in (header or {}).items() if name != "__metadata__"}
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        found = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"{error}" if "header of" in str(error) else type(error).__name__
        raise InputError(f"{key}: {file} is no safetensors file ({said}): copy it again") from None
    whole = 8 + length + max(ends, default=0)
    if header is None or whole != size:
        raise InputError(f"{key}: {file} has {size} bytes, expected {whole}: it was cut off; copy it again")
    return found


def check_names(
    source: ModelSource, facts: dict[str, Any], base: Headers, adapter: Headers | None, key: str, scores: bool
) -> None:
    """Refuse weights that are not those of the config.json beside them, and an adapter that is not this base's."""
    known = facts.get("model_type") is not None  # else transformers would not load it either
    shapes = {name: shape for name, (_, shape) in base.items()}
    if known:
        if wrong := weights.fault(facts, shapes, scores=scores and adapter is None):
            raise InputError(
                f"{key}: {source.base} {wrong}: save or copy the model again; what is not in its files would be random"
            )
        packed = sorted(name for name, (dtype, _) in base.items() if dtype not in FLOATS and name.endswith(".weight"))
        if packed and not facts.get("quantization_config"):
            raise InputError(
                f"{key}: {source.base} has {packed[0]} as {base[packed[0]][0]}, and no quantization_config in its config.json "
                "that says how to read it: give the model in float, or its whole config.json"
            )
    if adapter is not None and source.adapter is not None and (known or not facts):
        saved = adapters.read_config(source.adapter)
        mine = {name: shape for name, (_, shape) in adapter.items()}
        if wrong := weights.adapter_fault(saved, mine, facts, shapes if known else {}):
            raise InputError(
                f"{key}: the adapter {source.adapter} {wrong} (base {source.base}): save it again, or give the base it was trained on"
            )


def check_head(file: Path, width: int, key: str) -> None:
    """Refuse a scalar head that reads states of another width."""
    found = {name: shape for name, (_, shape) in read_header(file, key).items()}
    if found and found != {"weight": (1, width), "bias": (1,)}:
        raise InputError(
            f"{key}: {file} holds {found}, expected weight (1, {width}) and bias (1,) for a model of hidden_size={width}: train "
            "the reward model anew"
        )


def check_vocabulary(tokenizer: Path, base: Headers, adapter: Headers | None, key: str) -> None:
    """Refuse a tokenizer with ids that the embedding has no row for; a padding token needs none."""
    tables = [shape for name, (_, shape) in {**base, **(adapter or {})}.items() if weights.EMBEDDING.search(name)]
    if not tables or not (tokenizer / "tokenizer.json").is_file():
        return
    settings = tokenizer / "tokenizer_config.json"
    pad = read_json(settings, "save the tokenizer again").get("pad_token") if settings.is_file() else None
    pad = pad.get("content") if isinstance(pad, dict) else pad
    ids = load_tokenizer(tokenizer).get_vocab(with_added_tokens=True)
    rows = max(shape[0] for shape in tables)
    if lost := weights.beyond(ids.items(), rows, pad):
        raise InputError(
            f"{key}: the tokenizer in {tokenizer} has ids up to {max(ids.values())}, the embedding {rows} rows: "
            f"{len(lost)} tokens have none, as {lost[0]!r}: give the tokenizer that belongs to the model, or save the model with a "
            "resized embedding"
        )


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
    template = template_of(folder, chat_template, date.today().isoformat())  # whatever day: nothing is kept of this
    if template is None:
        return
    if LAST not in template.render([{"role": "user", "content": LAST}], key):
        raise InputError(
            f"{key}: the chat template {template.where} leaves out the last message: a prompt would not hold its question; "
            "mend it, or set model.chat_template to another"
        )
