"""A loss or gradient that is not finite ends the run before the optimizer step is taken, its batch kept for inspection."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from alignkit.core.errors import RunError


class NotFinite(ArithmeticError):
    """Its text says what is not finite."""


@contextmanager
def guarded(cfg: Any, rank: int, step: int, batch: Any) -> Iterator[None]:
    """Optimizer steps in here are refused where a gradient is not finite; `check` refuses losses.

    torch calls the hook in every optimizer's `step`, the ones inside DeepSpeed's too, when gradients are reduced, clipped
    and about to be used. A norm that is not finite makes every clipped gradient so, whichever rank it came from.

    Args:
        batch: a dataclass, or a list of dicts (micro-batches), whose tensors are written to `<run_dir>/debug/` in that case.

    Raises:
        RunError: it says what was not finite, where the batch is and what to try.
    """
    hook = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: check_gradients(optimizer))
    try:
        yield
    except NotFinite as error:
        path = cfg.run_dir / "debug" / f"step_{step:06d}_rank_{rank}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors_of(batch).items()}, path)
        raise RunError(
            f"step {step}: {error}; no optimizer step was taken with it, and its batch is in {path}: look there for odd rows, "
            f"lower optimizer.learning_rate={cfg.optimizer.learning_rate:g}, or use model.dtype=float32"
        ) from None
    finally:
        hook.remove()


def check(losses: Mapping[str, float]) -> None:
    """Refuse losses that are not finite."""
    if bad := [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]:
        raise NotFinite(" and ".join(bad))


def check_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Refuse gradients whose norm is not finite: one number is read a step."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if gradients and not math.isfinite(norm := float(torch.nn.utils.get_total_norm(gradients))):
        raise NotFinite(f"the norm of the gradient is {norm}")


def tensors_of(batch: Any) -> dict[str, torch.Tensor]:
    """{name: tensor} of a dataclass, {"<number>/<name>": tensor} of a list of dicts."""
    if is_dataclass(batch):
        items = {f.name: getattr(batch, f.name) for f in fields(batch)}
    else:
        items = {f"{i}/{name}": item for i, part in enumerate(batch) for name, item in part.items()}
    return {name: item for name, item in items.items() if isinstance(item, torch.Tensor)}
