"""Whether the weights in a folder are those of its config.json: names and shapes only, from the files' headers.

transformers fills what it does not find with random numbers, and passes over what it does not know. Here both are said
before anything starts. For the families below every name is known; of any other architecture the numbered lists (blocks,
experts) must be whole, each with what its siblings have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from alignkit.models.families import FAMILIES, Family

Shapes = Mapping[str, tuple[int, ...]]

# Left over from old checkpoints or written by hooks: transformers computes them, or never had a use for them.
HARMLESS = re.compile(r"(rotary_emb\.inv_freq|masked_bias|position_ids|\.attn\.bias|\.attention\.bias)$")
# What torch.compile, DDP, FSDP, DeepSpeed, PEFT and double wrapping put before or into the names.
WRAPPED = re.compile(
    r"(^|\.)(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|base_layer|modules_to_save)\."
    r"|^base_model\.model\.|^model\.model\.|^pretrained_model\.|\.lora_[AB]\."
)
BLOCKS = ("num_hidden_layers", "n_layer", "num_layers")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
SCORE = "score.weight"  # of a sequence classifier


def fault(config: dict[str, Any], shapes: Shapes, scores: bool = False) -> str | None:
    """What is wrong with the weights of a model, in one line; None: nothing that can be seen.

    Args:
        config: its config.json.
        shapes: {name: shape} of all tensors in its files.
        scores: it is used for its states alone, so the output layer may be missing.
    """
    names = {name: shape for name, shape in shapes.items() if not HARMLESS.search(name)}
    if not names:
        return "holds no weights"
    if wrapped := sorted(name for name in names if WRAPPED.search(name)):
        return (
            f"{len(wrapped)} of {len(names)} weights have the names of a wrapped model, as {wrapped[0]}: save the model "
            "itself (unwrapped, merged) with save_pretrained"
        )
    if not scores and SCORE in names:
        return f"{SCORE} is in it: a sequence classifier, no language model; give it as a reward, or give its base"
    text = config.get("text_config") or config
    family = FAMILIES.get(text.get("model_type", ""))
    if family is None or text is not config:
        return _lists(text, names) or _outer(config, text, names, scores)
    return _family(family, config, names, scores) or _lists(config, names)


def _family(family: Family, config: dict[str, Any], names: Shapes, scores: bool) -> str | None:
    """A fault of a model whose every name is known."""
    packed = bool(config.get("quantization_config"))  # other names behind the module's, and other shapes
    count = next((config[key] for key in BLOCKS if isinstance(config.get(key), int)), 0)
    found = {trunk_name(name, family): name for name in names}
    around, block = needed(family.around, config), needed(family.block, config)
    want = around + [f"{family.blocks}{number}.{name}" for number in range(count) for name in block]
    tied = config.get("tie_word_embeddings", family.tied)
    head = needed(family.head, config)
    want += [] if tied or scores else head

    def there(name: str) -> bool:
        module = name.rpartition(".")[0] + "."
        return name in found or (packed and any(other.startswith(module) for other in found))

    if missing := [name for name in want if not there(name)]:
        untied = f" (tie_word_embeddings is {str(tied).lower()})" if missing[0] in head else ""
        full = missing[0] if missing[0] in head else family.trunk + missing[0]
        return f"{len(missing)} of {len(want)} weights are missing, as {full}{untied}"
    if packed:
        return None
    known = {*around, *head, SCORE, *(f"{family.blocks}{n}.{name}" for n in range(count) for name in _allowed(family))}
    heads = {
        name for name in found if scores and not name.startswith(family.blocks)
    }  # a classifier's, whatever it is called
    if strange := sorted(found[name] for name in found.keys() - known - heads if not _open(family, name, count)):
        return (
            f"{len(strange)} weights belong to no part of a {config['model_type']} of {count} blocks, as {strange[0]}"
        )
    if odd := _halves(family, found, count):
        return odd
    sizes = _sizes(config)
    siblings: dict[str, tuple[str, tuple[int, ...]]] = {}  # what of a block -> where it first stands, and its shape
    for name, original in found.items():
        if at := re.match(rf"{re.escape(family.blocks)}\d+\.(.+)", name):
            first, alike = siblings.setdefault(at[1], (original, names[original]))
            if names[original] != alike:
                return f"{original} has shape {list(names[original])}, {first} has {list(alike)}"
        expected = _expected(name, around[0], head, sizes)
        shape = names[original]
        if expected is not None and not _agrees(shape, expected):
            return f"{original} has shape {list(shape)}, config.json says {list(expected)}"
    return None


def _halves(family: Family, found: Mapping[str, str], count: int) -> str | None:
    """A fault of a mixture's blocks, whose names are not listed: a part of a dense one's MLP, the router of experts."""
    mlp = [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    for number in range(count) if "*" in family.more else ():
        block = f"{family.blocks}{number}."
        lost = [name for name in mlp if block + name not in found]
        lost = lost if len(lost) < len(mlp) else []
        for part in ("mlp", "block_sparse_moe"):
            routed = any(name.startswith(f"{block}{part}.experts.") for name in found)
            lost += [f"{part}.gate.weight"] if routed and f"{block}{part}.gate.weight" not in found else []
        if lost:
            return f"{len(lost)} weights of a block are missing, as {family.trunk}{block}{lost[0]}"
    return None


def needed(spec: str, config: dict[str, Any]) -> list[str]:
    """The tensors that a `Family`'s words stand for."""
    found = []
    for word in spec.split():
        word, _, only = word.partition("@")
        if only and not config.get(only, True):
            continue
        name, _, key = word.rstrip("!").partition("?")
        biased = config.get(key, word.endswith("!")) if key else word.endswith("!")
        found += [f"{name}.weight", *([f"{name}.bias"] if biased else [])]
    return found


def trunk_name(name: str, family: Family) -> str:
    """A name without the trunk's: a trunk saved by itself has none, and OPT's may lack the half of it."""
    parts = family.trunk.rstrip(".").split(".")
    for first in range(len(parts)):
        if name.startswith(prefix := ".".join(parts[first:]) + "."):
            return name.removeprefix(prefix)
    return name


def _allowed(family: Family) -> list[str]:
    words = [re.split("[!?@]", word)[0] for word in f"{family.block} {family.more.replace('*', '')}".split()]
    return [f"{word}.{kind}" for word in words for kind in ("weight", "bias")]


def _open(family: Family, name: str, count: int) -> bool:
    """Whether a name that is not listed may be there: in a family with variants, but in no block beyond the last."""
    at = re.match(rf"{re.escape(family.blocks)}(\d+)\.", name)
    return "*" in family.more and (at is None or int(at[1]) < count)


def _sizes(config: dict[str, Any]) -> dict[str, int | None]:
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    own = config["model_type"] in ("stablelm", "phi", "opt", "falcon")  # their head_dim is not a setting
    head = None if own else config.get("head_dim") or (hidden // heads if hidden and heads else None)
    groups, inner = config.get("num_key_value_heads"), config.get("intermediate_size")
    inner = inner if isinstance(inner, int) else None
    return {
        "d": hidden,
        "v": config.get("vocab_size"),
        "q": head * heads if head and heads else None,
        "k": head * groups if head and groups else None,
        "f": inner,
        "F": 2 * inner if inner else None,
    }


_LEAVES = {
    "q_proj": "qd", "k_proj": "kd", "v_proj": "kd", "o_proj": "dq", "gate_proj": "fd", "up_proj": "fd", "down_proj": "df",
    "gate_up_proj": "Fd", "input_layernorm": "d", "post_attention_layernorm": "d", "norm": "d", "ln_f": "d",
}  # fmt: skip


def _agrees(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(b in (None, a) for a, b in zip(shape, expected, strict=True))


def _expected(
    name: str, embedding: str, head: list[str], sizes: dict[str, int | None]
) -> tuple[int | None, ...] | None:
    """The shape config.json gives a weight; None where it is not known."""
    if name == embedding or name == head[0]:
        width = None if embedding == "embed_tokens.weight" and sizes["q"] is None else sizes["d"]  # OPT may project
        return (sizes["v"], width)
    leaf = name.split(".")[-2] if name.endswith(".weight") and ".experts." not in name else ""
    return tuple(sizes[letter] for letter in _LEAVES[leaf]) if leaf in _LEAVES else None


# ------------------------------------------------------------------------------------------- any other architecture


def _lists(config: dict[str, Any], names: Shapes) -> str | None:
    """A fault of the numbered lists: a hole, a block beyond the last, a block without what its siblings have."""
    lists: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {}
    for name, shape in names.items():
        if at := re.search(r"(?:^|\.)(\d+)\.(.+)$", name):
            lists.setdefault(name[: at.start()], {}).setdefault(int(at[1]), {})[at[2]] = shape
    count = next((config[key] for key in BLOCKS if isinstance(config.get(key), int)), None)
    for prefix, entries in lists.items():
        is_main = len(lists) == 1 and count is not None  # of several, which one num_hidden_layers counts is not known
        last = count if is_main and count is not None else max(entries) + 1
        if hole := sorted(set(range(last)) - set(entries)):
            return f"{len(hole)} of {last} blocks are missing, as {prefix}.{hole[0]}.*"
        spare = (
            config.get("num_nextn_predict_layers") or 0
        )  # heads that guess further tokens: transformers passes over them
        if extra := sorted(number for number in entries if number >= last + spare):
            return f"{len(extra)} blocks are beyond num_hidden_layers={count}, as {prefix}.{extra[0]}.*"
        kinds: dict[tuple, list[int]] = {}
        for number in range(last):
            kinds.setdefault(kind_of(config, number, last), []).append(number)
        for alike in kinds.values():
            if odd := _odd(prefix, {number: entries[number] for number in alike}) or _experts(config, prefix, entries):
                return odd
    return None


def _experts(config: dict[str, Any], prefix: str, entries: dict[int, dict[str, tuple[int, ...]]]) -> str | None:
    """A fault of the experts of a mixture: fewer than config.json counts."""
    count = next((config[key] for key in ("num_local_experts", "num_experts") if isinstance(config.get(key), int)), 0)
    for number, entry in entries.items():
        found = {int(at[1]) for name in entry if (at := re.search(r"\.experts\.(\d+)\.", name))}
        if found and (hole := sorted(set(range(count)) - found)):
            return f"{len(hole)} of {count} experts of {prefix}.{number} are missing, as expert {hole[0]}"
        parts: dict[str, set[str]] = {}  # of each expert
        for name in entry:
            if at := re.match(r"(.*\.experts\.)(\d+)\.(.+)", name):
                parts.setdefault(at[1] + at[2], set()).add(at[3])
        whole = set().union(*parts.values())
        if lost := [f"{expert}.{part}" for expert, own in parts.items() for part in sorted(whole - own)]:
            return f"{len(lost)} weights of experts are missing that others have, as {prefix}.{number}.{lost[0]}"
    return None


def kind_of(config: dict[str, Any], number: int, count: int) -> tuple:
    """What may make a block another kind than its siblings: every setting that has an entry a block, lists blocks, or
    counts them off."""
    found: list[Any] = []
    for key, value in sorted(config.items()):
        if isinstance(value, (list, str)) and len(value) == count:
            found.append(str(value[number]))
        elif isinstance(value, list) and "layer" in key and all(isinstance(entry, int) for entry in value):
            found.append(number in value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            if re.search(r"(step|interval|period|freq)$", key):
                found += [number % value, (number + 1) % value]
            elif re.search(r"(dense|kv_shared|nope)", key) and "size" not in key:
                found += [number < value, number >= count - value]
    return tuple(found)


def _odd(prefix: str, entries: dict[int, dict[str, tuple[int, ...]]]) -> str | None:
    everything = {name for entry in entries.values() for name in entry}
    lacking = [f"{prefix}.{n}.{name}" for n, entry in entries.items() for name in sorted(everything - set(entry))]
    if lacking:
        return f"{len(lacking)} weights are missing that others of {prefix}.* have, as {lacking[0]}"
    first = next(iter(entries.values()))
    for number, entry in entries.items():
        for name in entry:
            if entry[name] != first[name]:
                return (
                    f"{prefix}.{number}.{name} has shape {list(entry[name])}, in {prefix}.{next(iter(entries))} it is "
                    f"{list(first[name])}"
                )
    return None


def _outer(config: dict[str, Any], text: dict[str, Any], names: Shapes, scores: bool) -> str | None:
    """A fault outside the blocks of an architecture that is not listed."""
    rows = [(name, shape[0]) for name, shape in names.items() if EMBEDDING.search(name)]
    vocab = text.get("vocab_size")
    packed = config.get("quantization_config")
    if rows and vocab and not packed and all(count < vocab for _, count in rows):
        return f"{rows[0][0]} has {rows[0][1]} rows, config.json says vocab_size={vocab}"
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    heads = [
        name
        for name in names
        if re.search(r"head|embed_out|output|decoder|cls", name) and not re.search(r"\.\d+\.", name)
    ]
    if tied is False and not heads and not scores and text.get("model_type"):
        return "no lm_head.weight is in it, while tie_word_embeddings is false"
    return None


# ---------------------------------------------------------------------------------------------------------- adapters


def adapter_fault(saved: dict[str, Any], shapes: Shapes, config: dict[str, Any], base: Shapes) -> str | None:
    """What is wrong with a LoRA adapter's weights on this base, in one line; None: nothing that can be seen.

    Args:
        saved: its adapter_config.json.
        shapes: {name: shape} of its tensors.
        config: the base's config.json, {} where it is not known.
        base: {name: shape} of the base's tensors, {} where they are not known.
    """
    if not shapes:
        return "holds no weights"
    if str(saved.get("peft_type") or "LORA") != "LORA":
        return None
    down, up = _sides(shapes, "A"), _sides(shapes, "B")
    if not down and not up:
        return f"holds no LoRA weights ({len(shapes)} other tensors, as {min(shapes)})"
    if halves := sorted(down.keys() ^ up.keys()):
        return f"{len(halves)} of its modules have one of lora_A and lora_B only, as {halves[0]}"
    if not base:
        return None
    family = FAMILIES.get(config.get("model_type", ""), Family("", trunk="model."))
    own = {
        trunk_name(name, family).rpartition(".")[0]: shape for name, shape in base.items() if name.endswith("weight")
    }
    mine = {trunk_name(module, family): module for module in down}
    fused = any("expert" in name or "block_sparse_moe" in name for name in base)  # transformers names those anew
    packed = config.get("quantization_config")
    strange = [module for name, module in mine.items() if name not in own and name != "lm_head"]
    if strange and not fused and not packed and "text_config" not in config:
        return f"{len(strange)} of its {len(mine)} modules are not in the base, as {strange[0]}"
    for name, module in mine.items():
        shape = (up[module][0], down[module][-1])
        if name in own and not packed and shape not in (own[name], own[name][::-1]):
            return f"it was trained on a {module} of {list(shape)}, the base has {list(own[name])}"
    partly = any(saved.get(key) for key in ("layers_to_transform", "exclude_modules", "layers_pattern"))
    if left := [] if partly or fused else _untouched(saved.get("target_modules"), mine.keys(), own):
        return f"{len(left)} modules of the base have no weights in it, as {left[0]}: it is another base's, or cut"
    return None


def _untouched(targets: Any, mine: Iterable[str], own: Shapes) -> list[str]:
    """The modules of the base that an adapter's `target_modules` mean and that it has no weights for.

    Where it names modules in full, only the blocks behind its last one are meant: a shorter base's adapter ends early.
    """
    if not isinstance(targets, list):
        return []
    mine = set(mine)
    wide = [target for target in targets if not re.search(r"\.\d+\.", target)]
    leaves = tuple(f".{target}" for target in wide)
    if len(wide) < len(targets):
        leaves += tuple({"." + target.rpartition(".")[2] for target in targets})
        last = max(map(_block, mine), default=-1)
        behind = [name for name in own if _block(name) > last or any(target.endswith(name) for target in targets)]
        own = {name: own[name] for name in behind if {_block(name) for name in mine} >= set(range(last + 1))}
    return sorted(n for n in own if f".{n}".endswith(leaves) and n not in mine and len(own[n]) == 2)


def _block(name: str) -> int:
    at = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(at[1]) if at else -1


def _sides(shapes: Shapes, side: str) -> dict[str, tuple[int, ...]]:
    """{module: shape} of one half of the LoRA weights, of linear layers and of embeddings."""
    end = re.compile(rf"\.lora_(?:{side}\.weight|embedding_{side})$")
    return {end.sub("", name).removeprefix("base_model.model."): at for name, at in shapes.items() if end.search(name)}


def beyond(ids: Iterable[tuple[str, int]], rows: int, pad: str | None) -> list[str]:
    """The tokens of a tokenizer that the embedding has no row for; the padding token needs none."""
    return [token for token, number in sorted(ids, key=lambda item: item[1]) if number >= rows and token != pad]
