"""How rows of different lengths become micro-batches (sorted, little padding, as many on every rank), and how the rows
of all ranks become one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignkit.core.types import Experience, ScoredRollouts

MAX_PADDING = 0.1  # of the slots of a micro-batch


def map_rows(
    function: Callable[[Tensor, Tensor, Tensor, int], Any],
    ids: Tensor,
    mask: Tensor,
    starts: Tensor,
    response_slots: int,
    micro_batch_size: int,
    behind: int = 0,
    *,
    together: bool = False,
) -> Any:
    """Run a no-grad forward over all rows, in micro-batches of like length with the padding cut off.

    Args:
        function: (ids [b, l], mask [b, l], starts [b], slots) -> [b], [b, slots], [b, l, d] or a tuple of those (None
            allowed).
        ids, mask, starts: rows [B, L] from slot 0 on, as `Rollouts.flush_left` gives them.
        response_slots: Lr, the slots of the result.
        behind: slots behind the last response token that are wanted too (the value after the end).
        together: make as many micro-batches as the rank that has most, on ranks with as many rows each.

    Returns:
        What `function` returns, for all B rows in their order, the cut slots back as 0.
    """
    pad = torch.nn.functional.pad
    lengths = row_lengths(mask)
    groups = by_length(lengths, micro_batch_size)
    if together:
        groups = by_length(lengths, micro_batch_size, largest(len(groups), ids.device))
    results: list[Any] = []
    with torch.no_grad():
        for index in groups:
            length, slots = window(lengths[index], starts[index], response_slots, behind)
            results.append(function(ids[index, :length], mask[index, :length], starts[index], slots))
    back = torch.cat(groups).argsort()

    def whole(parts: list[Any]) -> Any:
        if parts[0] is None:
            return None
        if isinstance(parts[0], tuple):
            return tuple(whole(list(column)) for column in zip(*parts, strict=True))
        if parts[0].dim() == 3:  # states of every slot
            parts = [pad(part, (0, 0, 0, mask.shape[1] - part.shape[1])) for part in parts]
        elif parts[0].dim() == 2:
            parts = [pad(part, (0, response_slots - part.shape[1])) for part in parts]
        return torch.cat(parts)[back]

    return whole(results)


def largest(number: int, device: torch.device) -> int:
    """The largest `number` of any rank; called by all ranks."""
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return number
    box = torch.tensor(number, device=device)
    torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MAX)
    return int(box)


def row_lengths(mask: Tensor) -> Tensor:
    """[B, L] bool -> [B] i64: slots up to the last valid one."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)


def window(lengths: Tensor, starts: Tensor, response_slots: int, behind: int = 0) -> tuple[int, int]:
    """(slots, response slots) that a micro-batch of these rows needs; at least one response slot."""
    slots = int((lengths - starts).max()) + behind
    return int(lengths.max()), min(max(slots, 1), response_slots)


def by_length(lengths: Tensor, micro_batch_size: int, parts: int = 1) -> list[Tensor]:
    """Row indices [b] of micro-batches: rows of like length together, longest first (memory peaks at once).

    A micro-batch ends at `micro_batch_size` rows, or before more than MAX_PADDING of its slots would be padding. Where
    that makes fewer than `parts`, the largest are halved, whatever padding the halves then have: ranks that reduce
    gradients together need the same number.
    """
    order = lengths.argsort(descending=True, stable=True).tolist()
    of = lengths.tolist()
    groups: list[list[int]] = []
    valid = 0  # slots of the last group that hold a token
    for row in order:
        group = groups[-1] if groups else []
        slots = of[group[0]] * (len(group) + 1) if group else 0
        if group and len(group) < micro_batch_size and slots - valid - of[row] <= MAX_PADDING * slots:
            group.append(row)
            valid += of[row]
        else:
            groups.append([row])
            valid = of[row]
    while len(groups) < parts:
        largest = max(range(len(groups)), key=lambda i: len(groups[i]))
        group = groups[largest]
        groups[largest : largest + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
    return [lengths.new_tensor(group) for group in groups]


def share_rows(lengths: Tensor, micro_batch_size: int, rank: int, ranks: int) -> list[Tensor]:
    """Micro-batches of one rank's share of the rows (every `ranks`-th), as many of them on every rank."""
    shares = [torch.arange(r, len(lengths), ranks, device=lengths.device) for r in range(ranks)]
    parts = max(len(by_length(lengths[share], micro_batch_size)) for share in shares)
    return [shares[rank][group] for group in by_length(lengths[shares[rank]], micro_batch_size, parts)]


def padding(lengths: Tensor, groups: list[Tensor]) -> tuple[int, int]:
    """(slots of padding, slots) that a forward over these micro-batches computes."""
    slots = sum(int(lengths[group].max()) * len(group) for group in groups)
    return slots - sum(int(lengths[group].sum()) for group in groups), slots


def cut(batch: Experience, length: int, slots: int) -> Experience:
    """The first `length` slots of what covers prompt and response, the first `slots` of what covers the response."""
    whole = ("ids", "mask", "shared_states")
    present = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "starts"}
    tensors = {name: x for name, x in present.items() if isinstance(x, Tensor)}
    return replace(batch, **{name: x[:, :length] if name in whole else x[:, :slots] for name, x in tensors.items()})


def gather(world: Any, group_size: int, pad_id: int, scored: ScoredRollouts, seen: dict[str, Tensor]) -> tuple:
    """All ranks' rollouts and per-token results as one batch, prompts in the order drawn: the batch of a single rank."""
    if world.size == 1:
        return scored, seen
    device = scored.scores.device
    shares = world.gather(move((scored, seen), torch.device("cpu")))
    slots = max(share[0].rollouts.prompt_ids.shape[1] for share in shares)
    for theirs, results in shares:
        pad = slots - theirs.rollouts.prompt_ids.shape[1]
        theirs.rollouts.prompt_ids = torch.nn.functional.pad(theirs.rollouts.prompt_ids, (pad, 0), value=pad_id)
        theirs.rollouts.prompt_mask = torch.nn.functional.pad(theirs.rollouts.prompt_mask, (pad, 0), value=False)
        if "shared_states" in results:
            results["shared_states"] = torch.nn.functional.pad(results["shared_states"], (0, 0, 0, pad))
    rows = len(scored.scores)
    # Row i of rank r answers, as sibling i % G, the drawn prompt (i // G) * world + r.
    place = [
        ((i // group_size) * world.size + r) * group_size + i % group_size
        for r in range(world.size)
        for i in range(rows)
    ]
    order = torch.tensor(place).argsort()
    whole = (
        join([theirs for theirs, _ in shares]).select(order),
        {k: join([theirs[k] for _, theirs in shares])[order] for k in seen},
    )
    return move(whole, device)


def join(parts: list[Any]) -> Any:
    """Concatenate tensors, lists, dicts of them and step dataclasses along the rows."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, list):
        return [item for part in parts for item in part]
    if isinstance(first, dict):
        return {key: join([part[key] for part in parts]) for key in first}
    if is_dataclass(first) and not isinstance(first, type):
        return type(first)(**{f.name: join([getattr(part, f.name) for part in parts]) for f in fields(first)})
    return first


def move(item: Any, device: torch.device) -> Any:
    """The same tuple, step dataclass or tensor on `device`."""
    if isinstance(item, Tensor):
        return item.to(device)
    if isinstance(item, tuple):
        return tuple(move(part, device) for part in item)
    if isinstance(item, dict):
        return {key: move(value, device) for key, value in item.items()}
    if hasattr(item, "select"):
        return type(item)(**{f.name: move(getattr(item, f.name), device) for f in fields(item)})
    return item
