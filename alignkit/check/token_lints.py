"""What can be wrong with rows under one tokenizer and chat template: lengths, special tokens in texts, lost text."""

from __future__ import annotations

import re
from array import array
from typing import Any

import numpy as np

from alignkit.check.lints import Findings, answers, prompt_texts
from alignkit.core.errors import InputError
from alignkit.data import ends, tokens
from alignkit.data.chat import messages_of
from alignkit.data.rows import Kind

Row = dict[str, Any]


class TokenLints:
    """The lints of one tokenizer, and the lengths in tokens of everything it saw: 4 bytes a text."""

    def __init__(self, tokenizer: Any, max_length: int, key: str) -> None:
        """`max_length` tokens of a whole row, or of its prompt where `key` is "max_prompt_length"."""
        self.tokenizer, self.max_length, self.key = tokenizer, max_length, key
        self.kind: Kind | None = "prompt" if key == "max_prompt_length" else None  # other columns are no answers
        self.lengths: dict[str, array] = {}  # {field: tokens, the eos of an answer included}
        self._special = re.compile("|".join(map(re.escape, sorted(_specials(tokenizer), key=len, reverse=True))))
        apart = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id, None}
        self._unknown = tokenizer.unk_token_id if tokenizer.unk_token_id not in apart else None

    def check(self, rows: list[tuple[str, Row]], findings: Findings) -> None:
        """Findings of "template", "special_token", "unknown_token" and "too_long"."""
        kept, texts, template = [], [], tokens.template_of(self.tokenizer)
        for where, row in rows:
            try:
                text, special = tokens.prompt_text(self.tokenizer, row["prompt"])
            except InputError as error:
                findings.add("template", where, str(error))
                continue
            if template is not None and (change := template.change(messages_of(row["prompt"]), text)):
                findings.add("template", where, ": ".join(change))
            kept.append((where, row))
            texts.append(text)
        if not kept:
            return
        totals, unknown = np.zeros(len(kept), np.int64), np.zeros(len(kept), bool)
        encoded = self.tokenizer(texts, add_special_tokens=special).input_ids
        prompts = self._count("prompt", [tokens.prompt_ids(self.tokenizer, ids) for ids in encoded], unknown)
        if self.key == "max_length":
            for name, _ in answers(kept[0][1]):
                given = self.tokenizer([row[name] for _, row in kept], add_special_tokens=False).input_ids
                ids = [tokens.response_ids(self.tokenizer, part) for part in given]
                totals = np.maximum(totals, self._count(name, ids, unknown))
        for (where, row), length, odd in zip(kept, prompts + totals, unknown, strict=True):
            if length > self.max_length:
                findings.add("too_long", where, f"{length} tokens, {self.key}={self.max_length}")
            if odd:
                findings.add("unknown_token", where, f"part of the text becomes {self.tokenizer.unk_token}")
            if found := self._special.search(
                "\n".join([*prompt_texts(row["prompt"]), *(t for _, t in answers(row, self.kind))])
            ):
                findings.add("special_token", where, f"{found.group()!r} is read as that token, not as text")

    def _count(self, name: str, ids: list[list[int]], unknown: np.ndarray) -> np.ndarray:
        """Lengths [rows] i64, kept for the report; `unknown` is set where the unknown token is among them."""
        sizes = np.fromiter(map(len, ids), np.int64, len(ids))
        self.lengths.setdefault(name, array("i")).extend(sizes.tolist())
        if self._unknown is not None:
            unknown |= np.fromiter((self._unknown in row for row in ids), bool, len(ids))
        return sizes


def _specials(tokenizer: Any) -> set[str]:
    """The tokens of control: where a text spells one, it becomes that token."""
    added = tokenizer.added_tokens_decoder.values()
    words = {tokenizer.pad_token} if hasattr(tokenizer, "own_pad") else set()
    return {token.content for token in added if token.special} | (set(tokenizer.all_special_tokens) - words)


def template_notes(tokenizer: Any) -> list[str]:
    """What a person should know of a tokenizer and its template: how it begins and ends texts, in full sentences.

    Training puts an answer and one eos after the rendered prompt. Where the template itself would render the answer
    differently, other programs that use the template show the model texts it was not trained on.
    """
    template, bos = tokens.template_of(tokenizer), tokenizer.bos_token
    if template is None:
        return [
            "the tokenizer has no chat template: prompts are plain text, and messages are refused",
            *tokenizer.notes,
        ]
    notes, prompt = [*tokenizer.notes, *ends.template_notes(template)], template.render(ends.TALK[:1])
    if bos and prompt.startswith(bos + bos):
        notes.append(f"the template writes {bos} twice: one is kept")
    elif bos and tokenizer(prompt).input_ids[:2] == [tokenizer.bos_token_id] * 2:
        notes.append(
            f"the template writes {bos} and the tokenizer adds another: one is kept here, other programs may keep both"
        )
    return notes
