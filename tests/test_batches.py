"""How rows become micro-batches, and the rows of all ranks one batch: against loops in plain Python."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.core.types import Experience, Rollouts, ScoredRollouts
from alignkit.training import batches

# Rows of 5, 7, 6 and 3 tokens: sorting them is not its own inverse.
PROMPTS, LENGTHS, LP, LR = [3, 2, 4, 2], [2, 5, 2, 1], 4, 5


def rollouts() -> Rollouts:
    """Row b's prompt is 100 b + 1, 2, … padded on the left, its response 100 b + 51, 52, … padded on the right."""
    prompt_mask = torch.arange(LP) >= LP - torch.tensor(PROMPTS)[:, None]
    mask = torch.arange(LR) < torch.tensor(LENGTHS)[:, None]
    row = 100 * torch.arange(4)[:, None]
    return Rollouts(
        (row + prompt_mask.cumsum(1)) * prompt_mask, prompt_mask, (row + 50 + mask.cumsum(1)) * mask, mask,
        -(row + mask.cumsum(1)).float() * mask, torch.tensor([True, False, True, True]),
        [{"row": i} for i in range(4)], 3,
    )  # fmt: skip


def tokens(b: int) -> list[int]:
    return [100 * b + 1 + t for t in range(PROMPTS[b])] + [100 * b + 51 + t for t in range(LENGTHS[b])]


# ---------------------------------------------------------------------------------------------------------------- rows


def test_rows_flush_left():
    ids, mask, starts = rollouts().flush_left()
    assert ids.shape == mask.shape == (4, LP + LR) and mask.dtype == torch.bool
    assert starts.tolist() == PROMPTS
    for b in range(4):
        n = len(tokens(b))
        assert mask[b].tolist() == [t < n for t in range(LP + LR)]
        assert ids[b, :n].tolist() == tokens(b)
        assert ids[b, starts[b]] == 100 * b + 51
    assert batches.row_lengths(mask).tolist() == [len(tokens(b)) for b in range(4)]


def test_a_hole_is_no_end():
    assert batches.row_lengths(torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()).tolist() == [3, 2, 0]


def test_selected_rows_are_whole():
    scored = ScoredRollouts(rollouts(), torch.arange(4.0), {"gold": torch.arange(4.0) * 2})
    for index, expected in [(torch.tensor([2, 0]), [2, 0]), (slice(1, None, 2), [1, 3])]:
        part = scored.select(index)
        assert part.scores.tolist() == expected and part.score_parts["gold"].tolist() == [2 * b for b in expected]
        assert [m["row"] for m in part.rollouts.meta] == expected and part.rollouts.policy_version == 3
        for field in ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "rollout_logprobs", "finished"):
            assert torch.equal(getattr(part.rollouts, field), getattr(scored.rollouts, field)[expected])


# ------------------------------------------------------------------------------------------------------- micro-batches


def fits(lengths: list[int], size: int) -> bool:
    return len(lengths) <= size and len(lengths) * max(lengths) - sum(lengths) <= 0.1 * len(lengths) * max(lengths)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 9))
def test_micro_batches_are_sorted_full_and_little_padded(lengths, size):
    """Every row once, longest first, no more padding than allowed, and no row that had fitted into the batch before."""
    groups = [group.tolist() for group in batches.by_length(torch.tensor(lengths), size)]
    rows = [row for group in groups for row in group]
    assert sorted(rows) == list(range(len(lengths)))
    found = [[lengths[row] for row in group] for group in groups]
    assert [n for group in found for n in group] == sorted(lengths, reverse=True)
    assert all(fits(group, size) for group in found)
    assert not any(fits([*group, following[0]], size) for group, following in itertools.pairwise(found))
    padding, slots = batches.padding(torch.tensor(lengths), [torch.tensor(group) for group in groups])
    assert slots == sum(max(group) * len(group) for group in found) and slots - padding == sum(lengths)


def test_a_tenth_of_padding_is_let_in_and_more_is_not():
    assert [g.tolist() for g in batches.by_length(torch.tensor([8, 10]), 4)] == [[1, 0]]  # 2 of 20 slots
    assert [g.tolist() for g in batches.by_length(torch.tensor([7, 10]), 4)] == [[1], [0]]  # 3 of 20
    assert [g.tolist() for g in batches.by_length(torch.tensor([10, 10, 10, 6]), 4)] == [[0, 1, 2, 3]]  # 4 of 40
    assert [g.tolist() for g in batches.by_length(torch.tensor([10, 10, 10, 5]), 4)] == [[0, 1, 2], [3]]  # 5 of 40


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_as_many_micro_batches_as_asked_for(parts):
    groups = [group.tolist() for group in batches.by_length(torch.tensor([9] * 6), 4, parts)]
    assert sorted(row for group in groups for row in group) == list(range(6))
    assert len(groups) == parts and min(map(len, groups)) >= 1
    assert max(map(len, groups)) <= {2: 4, 3: 2, 5: 2}[parts]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_ranks_share_the_rows_and_make_as_many_micro_batches(ranks, each, size, seed):
    lengths = torch.randint(1, 50, (ranks * each,), generator=torch.Generator().manual_seed(seed))
    shares = [[g.tolist() for g in batches.share_rows(lengths, size, rank, ranks)] for rank in range(ranks)]
    for rank, share in enumerate(shares):
        assert sorted(row for group in share for row in group) == list(range(rank, ranks * each, ranks))
        assert all(1 <= len(group) <= size for group in share)
    assert len({len(share) for share in shares}) == 1
    alone = [len(batches.by_length(lengths[rank::ranks], size)) for rank in range(ranks)]
    assert len(shares[0]) == max(alone)  # and no more of them than the rank with the most needs


@pytest.mark.parametrize("behind", [0, 1])
def test_a_window_holds_all_tokens_and_no_more(behind):
    lengths, starts = torch.tensor([7, 9]), torch.tensor([3, 8])  # responses of 4 and 1
    assert batches.window(lengths, starts, 5, behind) == (9, 4 + behind)
    assert batches.window(lengths, starts, 4, behind) == (9, 4)  # never more than there are
    assert batches.window(torch.tensor([3]), torch.tensor([3]), 5) == (3, 1)  # an empty response keeps one slot


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_results_come_back_in_order(size, behind):
    """A forward that sees each row alone, and tells ids, response tokens, a state a slot, one number, None."""
    rows = rollouts().flush_left()
    shapes = []

    def forward(ids, mask, starts, slots):
        assert not torch.is_grad_enabled()
        shapes.append((*ids.shape, slots))
        ids = ids * mask
        at = (starts[:, None] + torch.arange(slots)).clamp(max=ids.shape[1] - 1)
        return None, ids.sum(1), ids.gather(1, at), torch.stack([ids, -ids], 2)

    nothing, sums, responses, states = batches.map_rows(forward, *rows, LR, size, behind)
    assert nothing is None
    assert sums.tolist() == [sum(tokens(b)) for b in range(4)]
    assert responses.shape == (4, LR) and states.shape == (4, LP + LR, 2)
    for b in range(4):
        whole = tokens(b) + [0] * (LP + LR - len(tokens(b)))
        assert states[b, :, 0].tolist() == whole and states[b, :, 1].tolist() == [-x for x in whole]
        assert responses[b, : LENGTHS[b]].tolist() == whole[PROMPTS[b] : PROMPTS[b] + LENGTHS[b]]
    ends = [p + n for p, n in zip(PROMPTS, LENGTHS, strict=True)]
    if size == 1:  # every row by itself, the longest first
        order = sorted(range(4), key=lambda b: -ends[b])
        assert shapes == [(1, ends[b], min(LENGTHS[b] + behind, LR)) for b in order]
        cut = [min(n + behind, LR) for n in LENGTHS]
        assert all((responses[b, cut[b] :] == 0).all() for b in range(4))
    assert sum(shape[0] for shape in shapes) == 4
    only = batches.map_rows(lambda ids, mask, starts, slots: ids[:, 0], *rows, LR, size)
    assert only.tolist() == [1, 101, 201, 301]


def experience(**more) -> Experience:
    given = rollouts()
    ids, mask, starts = given.flush_left()
    per_token = {
        name: torch.arange(20.0).view(4, LR) + 100 * i
        for i, name in enumerate(["old_logprobs", "ref_logprobs", "rollout_logprobs", "rewards", "advantages"])
    }
    return Experience(
        ids=ids, mask=mask, starts=starts, response_mask=given.response_mask, value_mask=given.response_mask,
        values=None, returns=None, **per_token, **more,
    )  # fmt: skip


def test_cut_takes_slots_off_the_end_of_all_that_has_them():
    whole = experience(
        kl_coef=0.3, weights=torch.arange(20.0).view(4, LR), shared_states=torch.arange(72.0).view(4, 9, 2)
    )
    part = batches.cut(whole, 6, 3)
    for name in ("ids", "mask", "shared_states"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[:, :6])
    per_token = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "rewards", "advantages", "weights")
    for name in (*per_token, "response_mask", "value_mask"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[:, :3])
    assert part.starts.tolist() == PROMPTS and part.kl_coef == 0.3 and part.values is None and part.returns is None


# ----------------------------------------------------------------------------------------------------------- all ranks


def drawn(group_size: int, prompts: int) -> tuple[ScoredRollouts, dict[str, torch.Tensor]]:
    """What one rank would hold: `group_size` answers to each of up to 6 prompts of unequal lengths."""
    rows = prompts * group_size
    g = torch.Generator().manual_seed(rows)
    lengths = torch.tensor([6, 2, 4, 3, 1, 5])[:prompts].repeat_interleave(group_size)
    prompt_mask = torch.arange(6) >= 6 - lengths[:, None]
    prompt_ids = torch.randint(1, 99, (rows, 6), generator=g).where(prompt_mask, torch.tensor(0))
    mask = torch.arange(3) < torch.randint(1, 4, (rows, 1), generator=g)
    rolled = Rollouts(
        prompt_ids, prompt_mask, torch.randint(1, 99, (rows, 3), generator=g), mask, torch.rand(rows, 3, generator=g),
        torch.rand(rows, generator=g) < 0.5, [{"row": i} for i in range(rows)], 1,
    )  # fmt: skip
    seen = {"policy": torch.rand(rows, 3, generator=g), "shared_states": torch.rand(rows, 9, 2, generator=g)}
    scores = torch.rand(rows, generator=g)
    return ScoredRollouts(rolled, scores, {"gold": scores + 1}), seen


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_the_batch_of_all_ranks_is_that_of_one(group_size, ranks):
    whole, seen = drawn(group_size, prompts=6)
    shares = []
    for rank in range(ranks):  # prompts rank, rank + ranks, …, padded to the longest of them
        rows = torch.tensor(
            [p * group_size + i for p in range(rank, 6, ranks) for i in range(group_size)], dtype=torch.long
        )
        mine, slots = whole.select(rows), int(whole.rollouts.prompt_mask[rows].sum(1).max())
        for name in ("prompt_ids", "prompt_mask"):
            setattr(mine.rollouts, name, getattr(mine.rollouts, name)[:, -slots:])
        results = {"policy": seen["policy"][rows], "shared_states": seen["shared_states"][rows, : slots + 3]}
        shares.append((mine, results))
    assert ranks == 1 or len({share[0].rollouts.prompt_ids.shape[1] for share in shares}) > 1
    for rank in range(ranks):
        world = SimpleNamespace(size=ranks, rank=rank, gather=lambda mine: copy.deepcopy(shares))
        scored, results = batches.gather(world, group_size, 0, *copy.deepcopy(shares[rank]))
        assert torch.equal(scored.scores, whole.scores)
        assert torch.equal(scored.score_parts["gold"], whole.score_parts["gold"])
        assert scored.rollouts.meta == whole.rollouts.meta and scored.rollouts.policy_version == 1
        for name in ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "rollout_logprobs", "finished"):
            assert torch.equal(getattr(scored.rollouts, name), getattr(whole.rollouts, name)), name
        assert torch.equal(results["policy"], seen["policy"])
        states, expected = results["shared_states"], seen["shared_states"].clone()
        for b, row in enumerate(states):  # a share that was narrower has zeros at the end
            slots = int(shares[b // group_size % ranks][0].rollouts.prompt_ids.shape[1]) + 3
            expected[b, slots:] = 0
            assert torch.equal(row, expected[b])


def test_moving_keeps_everything():
    scored, seen = drawn(2, 3)
    moved, results = batches.move((scored, seen), torch.device("cpu"))
    assert torch.equal(moved.scores, scored.scores) and moved.rollouts.meta == scored.rollouts.meta
    assert results.keys() == seen.keys() and batches.move(None, torch.device("cpu")) is None
