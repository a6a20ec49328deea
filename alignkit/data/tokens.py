"""Text to ids and ids to batches.

`encode_prompt` and `encode_response` are the only tokenisation in the project: the same text has the same ids in SFT,
in the reward model, in PPO and in evaluation.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.core.errors import InputError
from alignkit.core.types import ModelSource, PromptBatch, Rows
from alignkit.data import chat, ends
from alignkit.data.dataset import fingerprint
from alignkit.data.files import first_line, looks_like_a_file

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

Row = dict[str, Any]


def load_tokenizer(
    path: str | Path,
    *,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    template_date: str | None = None,
    base: str | Path | None = None,
    light: bool = False,
):
    """The tokenizer of a folder or hub id, ready for this project.

    Its eos token is what an answer ends with (`ends.decide`); `stops(tokenizer)` are all ids that a rollout stops at, and
    `tokenizer.notes` what there is to say of them. Its pad token exists and is not the eos token, so that eos is learnt
    and never masked; where the model has none of its own, `ends.choose_pad` takes a token it has. Padding is on the left.
    Save it with `save_tokenizer`.

    Args:
        chat_template: replaces the template: a Jinja text, a file of it, or the name of one of the model's own.
        template_date: the date that a template is told which asks for one; None: the one the folder keeps, if any.
        base: folder or hub id with the model's generation_config.json; None: `path`.
        light: go without torch where the folder allows it.

    Raises:
        InputError: it is no tokenizer, has no eos, or has several templates and none was asked for.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
        if not any((folder / name).is_file() for name in files):
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
            raise InputError(
                f"{path}: the folder is no model: it has no tokenizer.json (it holds: {found}): give a folder written "
                "by save_pretrained, a hub id, or the model/ of a finished stage"
            )
    elif looks_like_a_file(str(path)):
        raise InputError(f"{path}: no such model folder: give a folder written by save_pretrained, or a hub id")
    try:
        tokenizer = _loader(folder, light and not trust_remote_code).from_pretrained(
            str(folder) if folder.is_dir() else str(path), trust_remote_code=trust_remote_code
        )
    except Exception as error:  # OSError, ValueError, JSON, network: all say that this is no tokenizer we can have
        raise InputError(
            f"{path}: no tokenizer could be loaded: {first_line(error)}: check the path or the hub id"
        ) from error
    if tokenizer.eos_token is None or tokenizer.eos_token not in tokenizer.get_vocab():
        odd = "no eos_token" if tokenizer.eos_token is None else f"no token for its eos_token {tokenizer.eos_token!r}"
        raise InputError(f"{path}: the tokenizer has {odd}, so no answer could end: set it in tokenizer_config.json")
    tokenizer.chat_template = _templates(tokenizer, chat_template)
    if chat.ASKS not in json.dumps(tokenizer.chat_template):
        tokenizer.init_kwargs.pop(chat.DATE, None)
    elif template_date is not None:
        tokenizer.init_kwargs[chat.DATE] = template_date  # saved with the tokenizer
    words, rendered = ends.reader(tokenizer), template_of(tokenizer)
    end = ends.decide(words, rendered, ends.named_ends(_generation_config(base or path)))
    pad = ends.choose_pad(ends.with_eos(words, end.eos), end.stops, rendered)
    tokenizer.stops, tokenizer.notes = list(end.stops), [*end.notes, *ends.pad_note(words, pad)]
    if tokenizer.eos_token != end.eos:
        tokenizer.eos_token = end.eos
    if pad is not None:
        if not pad.control:  # a word: as a special token of a file it would be cut out of texts
            tokenizer.own_pad = tokenizer.pad_token
        tokenizer.pad_token = pad.token
    tokenizer.padding_side = "left"
    return tokenizer


def of_model(source: ModelSource, model: Any, note: Callable[[str], None] | None = None, light: bool = False):
    """`load_tokenizer` of a resolved model under a stage's `model` settings.

    `note` is told of its ends where the command could not look at them before the start: of a hub id.
    """
    tokenizer = load_tokenizer(
        source.tokenizer,
        trust_remote_code=model.trust_remote_code,
        chat_template=model.chat_template,
        template_date=model.template_date,
        base=source.base,
        light=light,
    )
    if note is not None and not Path(source.tokenizer).is_dir():
        for line in tokenizer.notes:
            note(line)
    return tokenizer


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write it so that `load_tokenizer` gives the same again."""
    pad = tokenizer.pad_token
    if hasattr(tokenizer, "own_pad"):
        tokenizer.pad_token = tokenizer.own_pad
    tokenizer.save_pretrained(folder)
    tokenizer.pad_token = pad


def name_ends(hf, tokenizer) -> None:
    """Let the config and the generation config that are saved with a model name the ends and the padding it has here."""
    config, generation, ends = hf.config.get_text_config(), getattr(hf, "generation_config", None), stops(tokenizer)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if generation is not None:
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
        generation.pad_token_id = tokenizer.pad_token_id


def stops(tokenizer) -> list[int]:
    """The ids that end a rollout, the eos first."""
    return list(dict.fromkeys([tokenizer.eos_token_id, *getattr(tokenizer, "stops", [])]))


def _generation_config(path: str | Path) -> Path:
    """The folder of a model's generation_config.json: its own, or of a hub id the one in the hub's cache."""
    if Path(path).expanduser().is_dir() or looks_like_a_file(str(path)):
        return Path(path).expanduser()
    from transformers.utils import cached_file

    found = cached_file(
        str(path), "generation_config.json", _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return Path(found).parent if found else Path(path)


def _templates(tokenizer, chat_template: str | None) -> Any:
    """The chat template of a tokenizer, or {name: template} with the one in use as "default"."""
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {} if own is None else {"default": own}
    if chat_template is None or chat_template in named:
        default = chat.choose(named, chat_template, str(tokenizer.name_or_path))
        return {**named, "default": default} if isinstance(own, dict) else own
    return chat.given_template(chat_template, list(named))


def _loader(folder: Path, light: bool) -> Any:
    """AutoTokenizer, which imports torch; where `light`, the class it would choose for a folder with tokenizer.json."""
    if light and (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file():
        import transformers

        name = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("tokenizer_class")
        if name == "PreTrainedTokenizerFast":
            from transformers.tokenization_utils_tokenizers import TokenizersBackend as loader
        else:
            loader = getattr(transformers, name or "", None)
        if loader is not None:
            return loader
    from transformers import AutoTokenizer

    return AutoTokenizer


def tokenizer_hash(tokenizer) -> str:
    """First 16 hex digits of the SHA-256 of all that makes ids of text: vocabulary, special tokens, chat template, its date.

    The ids of a probe text stand for what has no common form in all tokenizers: merges and normalisation.
    """
    probe = "The 12 quick foxes' naïve café — don't jump!\n\tOK? ABCdef"
    told = tokenizer.init_kwargs.get(chat.DATE)
    return fingerprint(
        [
            tokenizer.get_vocab(),
            {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")},
            {"template": tokenizer.chat_template, "probe": tokenizer(probe).input_ids}
            | ({"date": told} if told else {}),
        ]
    )


def encode_prompt(tokenizer, prompt: str | list[dict[str, str]]) -> list[int]:
    """Ids of a prompt, up to where the response begins.

    Messages go through the chat template with its generation prompt. A string is one user message; where the
    tokenizer has no template it is used as it stands, with the special tokens the tokenizer puts in front.
    There is one bos at most and no eos at the end. Raises InputError for messages the template cannot render.
    """
    text, special = prompt_text(tokenizer, prompt)
    return prompt_ids(tokenizer, tokenizer(text, add_special_tokens=special).input_ids)


def prompt_text(tokenizer, prompt: str | list[dict[str, str]]) -> tuple[str, bool]:
    """A prompt as the text that is tokenised, and whether the tokenizer adds its special tokens to it."""
    template = template_of(tokenizer)
    if template is not None:
        return template.render(chat.messages_of(prompt), str(tokenizer.name_or_path) or "model.path"), False
    if not isinstance(prompt, str):
        raise InputError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template, so messages cannot be encoded: "
            "set model.chat_template, or give plain text prompts"
        )
    return prompt, True


def template_of(tokenizer) -> chat.Template | None:
    """The chat template that prompts are rendered with, and all that its text depends on.

    Raises:
        InputError: it has several, and none is the default.
    """
    text, name = tokenizer.chat_template, str(tokenizer.name_or_path)
    if isinstance(text, dict):
        text = chat.choose(text, None, name or "the tokenizer")
    special = tuple(tokenizer.special_tokens_map.items())
    return None if text is None else chat.Template(text, f"of {name}", special, tokenizer.init_kwargs.get(chat.DATE))


def prompt_ids(tokenizer, ids: list[int]) -> list[int]:
    """Ids of a prompt's text without a second bos at the start, nor an eos at the end of plain text."""
    while tokenizer.chat_template is None and ids and ids[-1] == tokenizer.eos_token_id:  # some close every text
        ids = ids[:-1]
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    return ids


def encode_response(tokenizer, text: str) -> list[int]:
    """Ids of a response: its tokens and one eos, no other special token."""
    return response_ids(tokenizer, tokenizer(text, add_special_tokens=False).input_ids)


def response_ids(tokenizer, ids: list[int]) -> list[int]:
    """Ids of a response's text, closed by one eos."""
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


# ------------------------------------------------------------------------------------------------- what trainers read


@dataclass
class Dropped:
    """How many rows went on and how many were too long. A row is kept whole or left out, never cut."""

    kept: int
    too_long: int
    max_length: int

    def describe(self) -> str:
        left_out = f"{self.too_long} of {self.kept + self.too_long} left out, longer than {self.max_length} tokens"
        return f"{self.kept} rows" + (f" ({left_out})" if self.too_long else "")


def _keep(encoded: list[Any], lengths: list[int], max_length: int, key: str) -> tuple[list[Any], Dropped]:
    """The elements no longer than `max_length` tokens, in order; InputError if there is none."""
    kept = [item for item, length in zip(encoded, lengths, strict=True) if length <= max_length]
    if not kept:
        found = (
            f"all {len(encoded)} rows are longer (the shortest has {min(lengths)})" if encoded else "there are no rows"
        )
        raise InputError(f"{key}={max_length} tokens: {found}: raise it or give shorter rows")
    return kept, Dropped(len(kept), len(encoded) - len(kept), max_length)


def sft_dataset(rows: Rows, tokenizer, max_length: int) -> tuple[Dataset, Dropped]:
    """Pre-tokenised columns for TRL 1.16's SFTTrainer, one row a dialogue:

        input_ids        list[int]  prompt + response + eos
        completion_mask  list[int]  0 on the prompt, 1 on the response and its eos

    The trainer takes a data set with `input_ids` as it is, without tokenising or adding an eos, and turns the mask
    into labels (-100 where it is 0) only under `SFTConfig(completion_only_loss=True)`: left at None it finds no
    `prompt` column and trains on every token. Pass `max_length=None` too: its own would cut rows (default 1024).
    """
    from datasets import Dataset

    pairs = [(encode_prompt(tokenizer, r["prompt"]), encode_response(tokenizer, r["completion"])) for r in rows]
    pairs, dropped = _keep(pairs, [len(p) + len(r) for p, r in pairs], max_length, "max_length")
    columns = {
        "input_ids": [prompt + response for prompt, response in pairs],
        "completion_mask": [[0] * len(prompt) + [1] * len(response) for prompt, response in pairs],
    }
    return Dataset.from_dict(columns), dropped


def preference_dataset(rows: Rows, tokenizer, max_length: int) -> tuple[Dataset, Dropped]:
    """Pre-tokenised columns for TRL 1.16's RewardTrainer, one row a pair:

        chosen_ids, rejected_ids  list[int]  prompt + response + eos

    The trainer takes a data set with both as it is and pads on the right. Pass `RewardConfig(max_length=None)`: its
    default leaves out pairs above 1024 tokens without a word. A pair is dropped if either side is too long.
    """
    from datasets import Dataset

    pairs = []
    for row in rows:
        prompt = encode_prompt(tokenizer, row["prompt"])
        pairs.append([prompt + encode_response(tokenizer, row[side]) for side in ("chosen", "rejected")])
    pairs, dropped = _keep(pairs, [max(map(len, pair)) for pair in pairs], max_length, "max_length")
    return Dataset.from_dict({"chosen_ids": [c for c, _ in pairs], "rejected_ids": [r for _, r in pairs]}), dropped


def prompt_dataset(rows: Rows, tokenizer, max_prompt_length: int) -> tuple[list[Row], Dropped]:
    """[{"ids": list[int], "index": int, "meta": row}]: `index` is the place in `rows`, also after rows were dropped."""
    ids = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    prompts = [{"ids": ids[index], "index": index, "meta": row} for index, row in enumerate(rows)]
    return _keep(prompts, [len(prompt) for prompt in ids], max_prompt_length, "max_prompt_length")


class PromptSampler:
    """The order in which prompts are used: every one once an epoch, in an order of `random.Random(seed + epoch)`.

    A step takes the next `n_global` prompts of one global order, going on into the next epoch where one ends; rank r
    of w takes every w-th of them from the r-th on. So the prompts of a step do not depend on the number of ranks, and
    every rank advances the same cursor. Deterministic, on the standard library's generator; no torch or numpy state.
    """

    def __init__(self, size: int, seed: int = 0):
        if size < 1:
            raise InputError(f"a sampler needs at least one prompt, found {size}")
        self.size, self.seed, self.epoch, self.cursor = size, seed, 0, 0
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        # Sorted by draws of random(), the one method whose values Python promises to keep from version to version.
        draw = random.Random(self.seed + self.epoch).random
        return sorted(range(self.size), key=lambda _: draw())

    def next(self, n_global: int, rank: int = 0, world: int = 1) -> list[int]:
        """Positions (0..size-1) of the next step: all `n_global` of them, or with `world` ranks this rank's share."""
        taken: list[int] = []
        while len(taken) < n_global:
            if self.cursor == self.size:
                self.epoch, self.cursor = self.epoch + 1, 0
                self._order = self._shuffled()
            part = self._order[self.cursor : self.cursor + n_global - len(taken)]
            taken += part
            self.cursor += len(part)
        return taken[rank::world]

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps; the next step after `load_state_dict` is the one that would have come."""
        return {"size": self.size, "seed": self.seed, "epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a checkpoint; InputError if it was of another number of prompts."""
        if state["size"] != self.size:
            raise InputError(
                f"the checkpoint was sampling from {state['size']} prompts, the data set has {self.size}: "
                "resume with the same data, or start a new run"
            )
        self.seed, self.epoch, self.cursor = state["seed"], state["epoch"], state["cursor"]
        self._order = self._shuffled()


def split_by_prompt(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """(the rows, those held out): `fraction` of the prompts with all their rows, no prompt in both."""
    prompts = list(dict.fromkeys(json.dumps(row["prompt"]) for row in rows))
    order = PromptSampler(len(prompts), seed).next(len(prompts))
    held_out = {prompts[i] for i in order[: round(fraction * len(prompts))]}
    keep = [json.dumps(row["prompt"]) not in held_out for row in rows]
    return [r for r, k in zip(rows, keep, strict=True) if k], [r for r, k in zip(rows, keep, strict=True) if not k]


def collate_prompts(prompts: Rows, pad_id: int) -> PromptBatch:
    """Elements of `prompt_dataset` as one batch: ids [P, Lp] i64 padded on the left, mask [P, Lp] bool."""
    import torch

    longest = max(len(prompt["ids"]) for prompt in prompts)
    padding = [longest - len(prompt["ids"]) for prompt in prompts]
    ids = [[pad_id] * pad + prompt["ids"] for pad, prompt in zip(padding, prompts, strict=True)]
    return PromptBatch(
        prompt_ids=torch.tensor(ids, dtype=torch.long),
        prompt_mask=torch.arange(longest).expand(len(prompts), -1) >= torch.tensor(padding)[:, None],
        prompt_index=torch.tensor([prompt["index"] for prompt in prompts], dtype=torch.long),
        draw=torch.tensor([prompt.get("draw", 0) for prompt in prompts], dtype=torch.long),
        meta=[prompt["meta"] for prompt in prompts],
    )


def collate_completions(rows: Rows, pad_id: int, device: Any = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of `sft_dataset` as one batch padded at the end: ids [B, L] i64, mask [B, L] bool, the slot of each row's
    first completion token [B] i64, and completion mask [B, Lr] bool from that slot on."""
    import torch

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    starts = torch.tensor([row["completion_mask"].index(1) for row in rows])
    longest = int(lengths.max())
    ids = torch.tensor([row["input_ids"] + [pad_id] * (longest - len(row["input_ids"])) for row in rows])
    mask = torch.arange(longest) < lengths[:, None]
    counted = torch.arange(int((lengths - starts).max())) < (lengths - starts)[:, None]
    return ids.to(device), mask.to(device), starts.to(device), counted.to(device)
