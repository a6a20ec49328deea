"""What ends an answer and what fills up a batch: one decision for ranks, dry runs and checks, from the tokenizer, the chat
template and generation_config.json. Needs neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError
from alignkit.core.io import read_json
from alignkit.core.types import Message
from alignkit.data.chat import Template, load_tokenizer, special_tokens, template_of
from alignkit.data.files import short_repr

# Tokens that models keep for padding or for nothing, best first.
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|pad|>", "[PAD]", "<pad>", "<|fim_pad|>", "<|endoftext|>", "<unk>")
UNUSED = re.compile("unused|reserved|extra|placeholder|dummy")  # in the names of control tokens that stand for nothing
NO_UTF8 = "ÿþýüûúùø÷öõÁÀ"  # how a byte-level vocabulary calls the bytes that UTF-8 has not: 0xFF to 0xF5, 0xC1, 0xC0
TALK: list[Message] = [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "omega"}]


@dataclass
class Words:
    """What of a tokenizer matters here."""

    ids: dict[str, int]  # the whole vocabulary
    control: dict[str, int]  # the tokens of it that are cut out of texts whole
    encode: Callable[[str], list[int]]  # without what a tokenizer puts around a text
    special: dict[str, str]  # {"eos_token": "</s>", …}


@dataclass(frozen=True)
class Ends:
    """What ends an answer."""

    eos: str  # what SFT and the reward model train, and a rollout stops at
    stops: tuple[int, ...]  # all that a rollout stops at, `eos` first
    notes: tuple[str, ...] = ()  # what a person should know of it, in full sentences


def decide(words: Words, template: Template | None, named: list[int]) -> Ends:
    """What ends an answer: the token that the template closes one with, else the tokenizer's eos token. Rollouts stop at
    both, and at the tokens that generation_config.json names.

    Args:
        named: eos_token_id of generation_config.json; [] where there is none.
    """
    own = words.special["eos_token"]
    notes: list[str] = []
    close, tail = (None, None) if template is None else closing(words, template)
    eos = own if close is None else close
    if template is not None and eos != own and _would_change(template, eos):
        notes.append(
            f"the chat template closes an answer with {eos!r} and writes the eos token {own!r} into prompts: answers are "
            f"trained to end with {own!r}, rollouts stop at both; give a template by model.chat_template that writes one of them"
        )
        eos = own
    text_of = {index: text for text, index in words.ids.items()}
    known = [index for index in named if index in text_of]
    stops = tuple(dict.fromkeys(words.ids[text] for text in (eos, close or eos, own)))
    stops = tuple(dict.fromkeys([*stops, *known]))
    if tail is not None and close is None:
        notes.append(
            f"the template closes an answer with {tail.strip()!r}, training closes it with the eos token {own!r}: "
            "a program that stops at the other one will not stop"
        )
    if len(known) < len(named):
        odd = ", ".join(str(index) for index in named if index not in text_of)
        notes.append(
            f"generation_config.json ends an answer at token {odd}, which the tokenizer has not: nothing stops there; mend its "
            "eos_token_id, or the tokenizer"
        )
    if eos != own and not notes:
        notes.append(
            f"an answer ends with {eos!r}, as the chat template closes one; the tokenizer's eos token is {own!r}: SFT and the "
            f"reward model train {eos!r}"
        )
    if len(stops) > 1:
        listed = ", ".join(repr(text_of[index]) for index in stops)
        notes.append(f"rollouts stop at each of {listed}, and a reward model reads each as {eos!r}")
    return Ends(eos, stops, tuple(notes))


def closing(words: Words, template: Template) -> tuple[str | None, str | None]:
    """(the control token right behind an answer, else None; the text behind an answer, or None where nothing ends with one)."""
    try:
        whole = template.render(TALK, prompt=False)
    except InputError:  # the template renders no answers
        return None, None
    found, _, tail = whole.rpartition(TALK[1]["content"])
    if not found:
        return None, None
    opens = {words.special.get("bos_token"), words.special.get("unk_token")} - {words.special["eos_token"]}
    behind = [text for text in {*words.control, words.special["eos_token"]} if tail.lstrip().startswith(text)]
    close = max(behind, key=len, default=None)
    return (None if close in opens else close), tail


def _would_change(template: Template, eos: str) -> bool:
    """Whether prompts read otherwise where the template is told another eos token."""
    told = replace(template, special=tuple((dict(template.special) | {"eos_token": eos}).items()))
    try:
        return any(told.render(messages) != template.render(messages) for messages in (TALK[:1], [*TALK, {**TALK[0]}]))
    except InputError:
        return False


def named_ends(folder: Path) -> list[int]:
    """`eos_token_id` of generation_config.json, one or several; [] where there is none.

    Raises:
        InputError: it is neither a token nor a list of them.
    """
    file = folder / "generation_config.json"
    found = read_json(file, "copy it again").get("eos_token_id") if file.is_file() else None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(index) is not int for index in ids):
        raise InputError(f"{file}: eos_token_id={short_repr(found)}: expected the id of a token, or a list of ids")
    return ids


@dataclass(frozen=True)
class Pad:
    """What fills up the rows of a batch. Every forward hides it, so any token serves; no row is made for it."""

    token: str
    control: bool  # it may be written into the tokenizer: no text has it


def choose_pad(words: Words, stops: tuple[int, ...], template: Template | None) -> Pad | None:
    """A token for padding of a tokenizer that has none, or the eos token; None: its own does.

    Best is one that is kept for padding or for nothing (`PAD_TOKENS`), then another control token without a part in this
    model's prompts and answers, then a token that no text has or, in want of one, the rarest, which stays a word of texts.
    """
    own, eos = words.special.get("pad_token"), words.special["eos_token"]
    if own is not None and own != eos and own in words.ids:
        return None
    # Where rare text comes out as <unk>, <unk> is a token of texts and no padding.
    in_texts = set(words.encode("a \u2603 \U0001f9ff \u0e01"))
    for token in PAD_TOKENS:
        if token in words.ids and words.ids[token] not in in_texts and token != eos:
            return Pad(token, True)
    apart = {eos, *words.special.values()}
    free = [t for t, i in words.control.items() if t not in apart and i not in (*stops, *in_texts)]
    free = [token for token in free if template is None or token not in template.text]
    if free:
        return Pad(min(free, key=lambda token: (not UNUSED.search(token), -words.control[token])), True)
    for byte in (*NO_UTF8, "<0xFF>", "<0xC0>"):
        if byte in words.ids and words.ids[byte] not in words.encode(byte):
            return Pad(byte, False)
    ordinary = words.ids.keys() - words.control.keys() - {eos}
    return Pad(max(ordinary, key=lambda token: words.ids[token]), False)  # the last merge is of the rarest text


def words_of(folder: Path) -> Words | None:
    """The tokenizer.json of a folder; None where there is none, or it names no eos token of its vocabulary."""
    if not (folder / "tokenizer.json").is_file():
        return None
    tokenizer, special = load_tokenizer(folder), dict(special_tokens(folder))
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if special.get("eos_token") not in ids:
        return None
    control = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return Words(ids, control, encode, special)


def of_folders(tokenizer: Path, base: Path, chat_template: str | None, told: str | None = None) -> list[str]:
    """What a stage says at its start of a model's template and ends: full sentences, none where all agree.

    Raises:
        InputError: a file of them cannot be used.
    """
    words, template = words_of(tokenizer), template_of(tokenizer, chat_template, told)
    notes: list[str] = []
    if template is not None and (system := template.own_system()):
        notes.append(
            f"the chat template puts a system message of its own where a prompt has none: {short_repr(system)}"
        )
    if words is None:
        return notes
    ends = decide(words, template, named_ends(base))
    return [*notes, *ends.notes, *pad_note(words, choose_pad(with_eos(words, ends.eos), ends.stops, template))]


def template_notes(template: Template) -> list[str]:
    """What a person should know of a template beside its ends: where other programs would show the model other texts."""
    notes = []
    if system := template.own_system():
        notes.append(
            f"the chat template puts a system message of its own where a prompt has none: {short_repr(system)}"
        )
    try:
        if not template.render(TALK, prompt=False).startswith(template.render(TALK[:1])):
            notes.append("the template renders a conversation otherwise than the prompt in front of its answer")
    except InputError as error:
        notes.append(f"the template renders no conversation that ends with an answer: {error}")
    return notes


def with_eos(words: Words, eos: str) -> Words:
    """The same tokenizer with another eos token."""
    return replace(words, special=words.special | {"eos_token": eos})


def pad_note(words: Words, pad: Pad | None) -> list[str]:
    """What a person should know of the padding, where it is not the tokenizer's own."""
    if pad is None:
        return []
    own = words.special.get("pad_token")
    why = "names no token for padding" if own is None else f"pads with its eos token {own!r}"
    return [
        f"the tokenizer {why}: {pad.token!r} fills up batches, where every forward hides it; the model gets no new row"
    ]


def reader(tokenizer: Any) -> Words:
    """A tokenizer of transformers."""
    control = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    return Words(tokenizer.get_vocab(), control, encode, dict(tokenizer.special_tokens_map))
