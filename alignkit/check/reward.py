"""Whether a reward model that alignkit did not make reads the token ids that the policy speaks: before anything starts.

A run of ours has the hash of its tokenizer in its manifest (`artifacts.check_tokenizer`). Of any other reward model the
two tokenizers themselves are compared, without transformers.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError
from alignkit.core.io import read_json
from alignkit.core.types import Message, ModelSource
from alignkit.data.chat import load_tokenizer, template_of

# Where tokenisers differ: spaces at the ends, blank lines, letters beyond ASCII, digits, what looks like markup.
TEXTS = (
    "Hello, how are you?",
    "  spaces ",
    "two\n\nlines\n",
    "naïve café, 12½ €, 日本語 🙂",
    "<s> [INST] def f(x): return 1234567</s>",
)
CHAT: list[Message] = [{"role": "user", "content": "How are you?"}]
WAY_ON = (
    "give a reward model with the policy's tokenizer, or train one: alignkit reward model.path=<the policy's base> …"
)


def check_tokens(policy: ModelSource, reward: ModelSource, key: str, model: Any) -> list[str]:
    """Refuse a reward model with another tokenizer or chat template than the policy's.

    A token that only one of them has for padding is no difference: it is never read.

    Args:
        key: the config key and value of the reward model, for messages.
        model: the config node, whose chat_template replaces the policy's own.

    Returns:
        Lines to be said: what could not be compared, and at which token it is read.

    Raises:
        InputError: the first difference, on both sides.
    """
    ours, theirs = Path(policy.tokenizer), Path(reward.tokenizer)
    if reward.run is not None or ours == theirs:
        return []
    if not all((folder / "tokenizer.json").is_file() for folder in (ours, theirs)):
        return [f"{key}: whether it has the policy's tokenizer is not known: one of the two has no tokenizer.json here"]
    _check_vocabulary(ours, theirs, key)
    read = f"{key}: read at an answer's last token, which is the end token where the answer ended; train it on answers that end so"
    return [read, *_check_template(ours, theirs, key, model)]


def _check_vocabulary(ours: Path, theirs: Path, key: str) -> None:
    own, other = load_tokenizer(ours), load_tokenizer(theirs)
    mine, known = own.get_vocab(), other.get_vocab()
    padding = _padding(ours)
    for token, number in sorted(mine.items(), key=lambda item: item[1]):
        if known.get(token, None if token != padding else number) != number:
            there = f"{known[token]} there" if token in known else "none there"
            raise InputError(
                f"{key}: its tokenizer ({theirs}) is another than the policy's ({ours}): the token {token!r} is {number} here, {there}: {WAY_ON}"
            )
    for text in TEXTS:
        ids, others = (tokenizer.encode(text, add_special_tokens=False).ids for tokenizer in (own, other))
        if ids != others:
            raise InputError(
                f"{key}: its tokenizer ({theirs}) encodes {text!r} as {others[:8]}, the policy's ({ours}) as {ids[:8]}: {WAY_ON}"
            )


def _check_template(ours: Path, theirs: Path, key: str, model: Any) -> list[str]:
    told = model.template_date or date.today().isoformat()  # the same for both, whatever it is
    own, other = template_of(ours, model.chat_template, told), template_of(theirs, None, told)
    if own is None or other is None:
        without = [str(folder) for folder, template in ((ours, own), (theirs, other)) if template is None]
        known = f"{key}: whether it was trained with the policy's chat template is not known: {without[0]} has none"
        return [] if own is other else [known]
    if own.text == other.text:
        return []
    said, heard = own.render(CHAT, key), other.render(CHAT, key)
    if said != heard:
        at = next((i for i, (a, b) in enumerate(zip(said, heard, strict=False)) if a != b), min(len(said), len(heard)))
        near = slice(max(0, at - 10), at + 20)
        raise InputError(
            f"{key}: its chat template ({other.where}) writes {heard[near]!r} where the policy's ({own.where}) writes "
            f"{said[near]!r}: set model.chat_template to the one both were trained with, and take the other away from the reward "
            "model's folder"
        )
    return []


def _padding(folder: Path) -> str | None:
    path = folder / "tokenizer_config.json"
    token = (
        read_json(path, "save the tokenizer again with save_pretrained").get("pad_token") if path.is_file() else None
    )
    return token.get("content") if isinstance(token, dict) else token
