"""The same text has the same ids in reward training and in PPO: written by the reward stage, compared when PPO starts.

Tokenizers with equal hashes and a template of the same text may still be put together in another way (a second bos, an
end token more or less). A reward model that reads other ids than it was trained on scores noise, and nothing fails.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError
from alignkit.core.io import read_json, write_atomic
from alignkit.core.types import Rollouts, Rows
from alignkit.data import tokens
from alignkit.rollout.base import Context, pack_rollouts

FILE = "token_ids.json"  # in the reward model's folder: {"texts": [{"prompt", "response", "ids"}]}
# Where tokenisers differ: spaces at the ends, blank lines, letters beyond ASCII, what looks like markup.
TEXTS = (
    ("Hello!", "Hello, how are you?"),
    ("  a space before and after ", " the same here "),
    ("two\n\nparagraphs\n", "one line\nand another\n"),
    ("naïve café, 12½ €", "日本語 🙂"),
    ("<s> [INST] def f(x): return x</s>", "```python\n\tprint('x')\n```"),
)
ANY_LENGTH = 1 << 30


def write(rows: Rows, tokenizer: Any, folder: Path) -> None:
    """Write the ids that `tokens.preference_dataset` makes of fixed texts and of the first training pairs."""
    probes = [{"prompt": prompt, "chosen": response, "rejected": response} for prompt, response in TEXTS] + list(
        rows[:3]
    )
    encoded, _ = tokens.preference_dataset(probes, tokenizer, ANY_LENGTH)
    texts = [
        {"prompt": row["prompt"], "response": row["chosen"], "ids": ids}
        for row, ids in zip(probes, encoded["chosen_ids"], strict=True)
    ]
    write_atomic(folder / FILE, json.dumps({"texts": texts}, indent=1) + "\n")


def check(folder: Path, tokenizer: Any) -> str:
    """Compare the ids that PPO's own path makes of the recorded texts; what was found, in words.

    Raises:
        InputError: they differ; with the first text and both ids around the first difference.
    """
    if not (folder / FILE).is_file():
        return f"{folder} has no {FILE}: whether it was trained on the same token ids is not known"
    texts = read_json(folder / FILE, "train the reward model anew").get("texts", [])
    ids, mask, _ = as_rollouts(texts, tokenizer).flush_left()
    for text, row, valid in zip(texts, ids, mask, strict=True):
        ours, theirs = row[valid].tolist(), text["ids"]
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            near = slice(max(0, at - 2), at + 3)
            raise InputError(
                f"the reward model in {folder} was trained on other token ids than PPO makes of {text['response']!r} after "
                f"{text['prompt']!r}: {theirs[near]} there, {ours[near]} here, from token {max(0, at - 2)} on: use the "
                "tokenizer and model.chat_template it was trained with, or train it anew"
            )
    return f"the reward model reads the token ids it was trained on ({len(texts)} texts compared)"


def as_rollouts(texts: list[dict[str, Any]], tokenizer: Any) -> Rollouts:
    """Texts as the rollouts that PPO would have had of them: prompts collated, the response's ids packed behind."""
    prompts, _ = tokens.prompt_dataset([{"prompt": text["prompt"]} for text in texts], tokenizer, ANY_LENGTH)
    batch = tokens.collate_prompts(prompts, tokenizer.pad_token_id)
    responses = [tokens.encode_response(tokenizer, text["response"]) for text in texts]
    longest = max(map(len, responses))
    context = Context("", "", 0, 0, tokenizer.eos_token_id, tokenizer.pad_token_id, len(texts))
    zeros = [[0.0] * len(ids) for ids in responses]
    return pack_rollouts(batch, 1, responses, zeros, [True] * len(texts), context, 0, longest)


def same_ids(rollouts: Rollouts, tokenizer: Any) -> tuple[int, int]:
    """(how many finished responses have the very ids that their text encodes to, how many finished), whichever end they have.

    A sampler may reach a text by other tokens than the tokenizer would; scores are taken of the sampled ones.
    """
    same, finished, ends = 0, 0, tokens.stops(tokenizer)
    for ids, mask, done in zip(rollouts.response_ids, rollouts.response_mask, rollouts.finished, strict=True):
        kept = ids[mask].tolist()
        if done and kept[-1] in ends:
            text = tokenizer.decode(kept[:-1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            same, finished = same + (tokens.encode_response(tokenizer, text)[:-1] == kept[:-1]), finished + 1
    return same, finished
