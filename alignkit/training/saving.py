"""What the end of a stage writes: tried before it begins, and then the weights first, everything else after them.

transformers checks what it writes more strictly than what it reads: a model may load, train for a week and not be saved.
So what stands beside the weights is written once at the start, aside, and the bytes still to come are compared with those
that are free.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.core.errors import InputError, RunError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

MIB = 2**20


def unset_unwritable(hf: PreTrainedModel) -> None:
    """Unset what of a model's generation settings transformers reads but will not write again.

    Those are settings without effect, such as a temperature beside do_sample=false. What was unset is kept in
    `hf.unwritable`, {name: value}, for `describe_unwritable`.
    """
    from transformers import GenerationConfig

    hf.unwritable = {}
    plain = GenerationConfig()
    found = getattr(hf, "generation_config", None)
    if found is None:
        return
    given = {name: getattr(found, name) for name in found.to_diff_dict() if hasattr(plain, name)}
    while (refusal := _refusal(found)) is not None:
        named = re.findall(r"^- `(\w+)`:", refusal, re.MULTILINE)
        odd = [name for name in named if getattr(found, name, None) != getattr(plain, name, None)]
        odd = odd or [n for n in given if not n.endswith("_token_id") and getattr(found, n) != getattr(plain, n)]
        if not odd:
            raise InputError(
                f"generation_config.json of {hf.config._name_or_path} cannot be saved again: {_line(refusal)}"
            )
        for name in odd:
            hf.unwritable[name] = getattr(found, name)
            setattr(found, name, getattr(plain, name, None))


def describe_unwritable(hf: Any) -> list[str]:
    """A line for the log where `unset_unwritable` unset something."""
    unset = {} if hasattr(hf, "peft_config") else hf.unwritable  # beside an adapter there are none
    if not unset:
        return []
    what = ", ".join(f"{name}={value}" for name, value in unset.items())
    return [f"{hf.config._name_or_path}: its generation settings hold {what}, which has no effect there: not saved"]


def _refusal(generation_config: Any) -> str | None:
    try:
        generation_config.validate(strict=True)
    except ValueError as error:
        return str(error)
    return None


def before(cfg: Any, log: Any, tokenizer: Any, model: Any, model_size: int, checkpoint_size: int, steps: int) -> None:
    """What rank 0 does before the first step of a stage that trains: `rehearse` and `check_room`.

    Args:
        model: what will be saved, a transformers model or PEFT's.
        model_size, checkpoint_size: bytes of it, and of a checkpoint.
    """
    for line in describe_unwritable(model):
        log.note(line)
    rehearse(cfg.run_dir, tokenizer, model)
    at_once = 0  # those that are kept, and the one being written
    if cfg.save_steps:
        at_once = min(cfg.keep_last + (cfg.keep_best is not None) + 1, max(steps - 1, 0) // cfg.save_steps)
    check_room(cfg.run_dir, model_size, checkpoint_size, at_once)


def rehearse(folder: Path, tokenizer: Any, model: PreTrainedModel | Any) -> None:
    """Write all that the end writes, but for the weights, and take it away again. Called by rank 0, before the first step.

    Args:
        folder: of the run.
        model: what will be saved, a transformers model or PEFT's.

    Raises:
        InputError: something of it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".rehearsal_", dir=folder) as aside:
            tokenizer.save_pretrained(aside)
            if hasattr(model, "peft_config"):
                model.create_or_update_model_card(aside)
                for config in model.peft_config.values():
                    config.save_pretrained(aside)
            else:
                model.config.save_pretrained(aside)
                if model.can_generate():
                    model.generation_config.save_pretrained(aside)
    except Exception as error:
        raise InputError(
            f"{folder}: what belongs beside the weights could not be written there ({type(error).__name__}: {_line(error)}): "
            "nothing was trained; mend the model's or the tokenizer's files, or the folder's rights"
        ) from error


def check_room(folder: Path, model: int, checkpoint: int, checkpoints: int) -> None:
    """Raise RunError where the disk has no room for a model of so many bytes and so many checkpoints of so many."""
    there = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    needed, free = model + max(checkpoints * checkpoint - there, 0), shutil.disk_usage(folder).free
    if needed > free:
        kept = f" and {checkpoints} checkpoints of {checkpoint / MIB:,.1f} MiB" if checkpoints else ""
        raise RunError(
            f"{folder}: {needed / MIB:,.1f} MiB of space are still to be written (a model of {model / MIB:,.1f} MiB{kept}), "
            f"{free / MIB:,.1f} MiB are free there: make room, choose another runs_dir=, or lower keep_last="
        )


def numbers(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers they are, those that ZeRO-3 has cut up too."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def adam_bytes(trained: Iterable[nn.Parameter]) -> int:
    """Of the float32 copy and the two moments that a checkpoint holds of every trained number."""
    return 12 * numbers(trained)


def model_bytes(model: Any, trained: Iterable[nn.Parameter]) -> int:
    """Of what is saved: all weights of a transformers model, the trained ones of PEFT's."""
    of = list(trained) if hasattr(model, "peft_config") else list(model.parameters())
    return sum(numbers([p]) * p.element_size() for p in of)


@contextmanager
def weights(folder: Path) -> Iterator[None]:
    """Inside, weights are written to `folder`.

    Raises:
        RunError: they cannot be; with the bytes that are free.
    """
    try:
        yield
    except Exception as error:
        raise RunError(
            f"the model cannot be written to {folder}: {type(error).__name__}: {_line(error)}; "
            f"{shutil.disk_usage(_nearest(folder)).free / MIB:,.0f} MiB are free there"
        ) from error


@contextmanager
def beside(folder: Path) -> Iterator[None]:
    """Inside, the weights in `folder` are whole; what fails here says so.

    Raises:
        RunError: something failed; where the weights are.
    """
    try:
        yield
    except Exception as error:
        raise RunError(
            f"{type(error).__name__} after the training: {_line(error)}; the trained weights are whole in {folder}"
        ) from error


def _nearest(folder: Path) -> Path:
    """The folder, or the first above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
