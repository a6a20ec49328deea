"""`alignkit.algorithms.functional` against peers' numbers, closed forms and brute force, in float64.

`data/peer_values.json` holds inputs with what the named peer's own function made of them (kind `peer`), a formula
copied from the named file (`transcribed`) or a closed form. The number in a test's name is its number in the list of
correctness tests; a number without a test here needs a model, ranks or the whole stage.
"""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.algorithms import functional as F

PEERS = json.loads((Path(__file__).parent / "data" / "peer_values.json").read_text())
NAN, INF = math.nan, math.inf


def t64(x, **kwargs):
    return torch.tensor(x, dtype=torch.float64, **kwargs)


def inputs(case):
    given = PEERS[case]["inputs"]
    return {name: t64(x) if isinstance(x, list) else x for name, x in given.items()}


def peer(case, words):
    """The value of the one output of `case` whose source holds `words`."""
    (value,) = [o["value"] for o in PEERS[case]["outputs"] if words in json.dumps(o["source"])]
    return value


def close(actual, expected, tol=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tol)


def ragged(rows, steps, seed, interior=False):
    """(generator, mask [rows, steps]) with lengths from 0 to `steps`, and holes inside where `interior`."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, steps + 1, (rows,), generator=g)
    lengths[0] = steps
    mask = torch.arange(steps) < lengths[:, None]
    if interior:
        mask &= torch.rand(rows, steps, generator=g) < 0.7
    return g, mask


def randn(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def brute_gae(rewards, values, mask, gamma, lam):
    """The O(T^2) sum over the valid tokens of each row, in Python."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for b in range(len(mask)):
        valid = [t for t in range(mask.shape[1]) if mask[b, t]]
        following = [values[b, t].item() for t in valid[1:]] + [0.0] * bool(valid)
        deltas = [rewards[b, t].item() + gamma * v - values[b, t].item() for t, v in zip(valid, following, strict=True)]
        for i, t in enumerate(valid):
            advantages[b, t] = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(valid)))
            returns[b, t] = advantages[b, t] + values[b, t]
    return advantages, returns


# ------------------------------------------------------------------------------------------ 1-3: advantage estimation


@pytest.mark.parametrize("case", ["gae_g1.0_l0.95", "gae_g1.0_l1.0"])
def test_gae_matches_peers(case):
    x = inputs(case)
    advantages, returns = F.gae(x["rewards"], x["values"], x["mask"], x["gamma"], x["lam"])
    assert len(PEERS[case]["outputs"]) == 6
    for output in PEERS[case]["outputs"]:
        close(advantages, output["value"]["adv_unwhitened"])
        close(returns, output["value"]["returns"])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 7), st.sampled_from([0.0, 0.5, 0.99, 1.0]), st.sampled_from([0.0, 0.95, 1.0])
)
def test_gae_matches_closed_form(seed, steps, gamma, lam):
    g, mask = ragged(4, steps, seed)
    rewards, values = randn(g, 4, steps), randn(g, 4, steps)
    advantages, returns = F.gae(rewards, values, mask, gamma, lam)
    expected = brute_gae(rewards, values, mask, gamma, lam)
    close(advantages, expected[0])
    close(returns, expected[1])
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_gae_limits_of_lambda():
    g, mask = ragged(5, 9, 3)
    rewards, values = randn(g, 5, 9) * mask, randn(g, 5, 9) * mask
    following = torch.cat([values[:, 1:], torch.zeros(5, 1)], 1)
    close(F.gae(rewards, values, mask, 0.9, 0.0)[0], rewards + 0.9 * following - values)
    suffix_sums = rewards.flip(1).cumsum(1).flip(1)
    close(F.gae(rewards, values, mask, 1.0, 1.0)[0], (suffix_sums - values) * mask)


def test_gae_matches_cleanrl():
    """CleanRL's rollout is cut where the next step is an episode's first; the last value bootstraps unless done."""
    x = inputs("gae_cleanrl")
    expected = peer("gae_cleanrl", "cleanrl")
    dones = torch.cat([x["dones"], x["next_done"][None]])
    for env in range(2):
        rewards = x["rewards"][:, env].clone()
        rewards[-1] += x["gamma"] * x["next_value"][0, env] * (1 - dones[-1, env])
        advantages, start = [], 0
        for stop in [*(t for t in range(1, 5) if dones[t, env]), 5]:
            segment = slice(start, stop)
            mask = torch.ones(1, stop - start)
            a, _ = F.gae(rewards[None, segment], x["values"][None, segment, env], mask, x["gamma"], x["lam"])
            advantages.append(a[0])
            start = stop
        close(torch.cat(advantages), t64(expected["advantages"])[:, env])
        close(torch.cat(advantages) + x["values"][:, env], t64(expected["returns"])[:, env])


@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("interior", [False, True])
def test_gae_reads_nothing_outside_the_mask(poison, interior):
    g, mask = ragged(6, 8, 5, interior)
    rewards, values = randn(g, 6, 8), randn(g, 6, 8)
    clean = F.gae(rewards, values, mask, 0.97, 0.9)
    dirty = F.gae(rewards.masked_fill(~mask, poison), values.masked_fill(~mask, poison), mask, 0.97, 0.9)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b) and b.isfinite().all()
    assert clean[0][mask].abs().min() > 0


def test_gae_carries_across_interior_spans():
    """Rows with holes give what the same rows give with the holes taken out."""
    g, mask = ragged(6, 9, 11, interior=True)
    rewards, values = randn(g, 6, 9), randn(g, 6, 9)
    advantages, returns = F.gae(rewards, values, mask, 0.98, 0.9)
    for b in range(6):
        keep = mask[b]
        a, r = F.gae(rewards[b, keep][None], values[b, keep][None], torch.ones(1, keep.sum()), 0.98, 0.9)
        close(advantages[b, keep], a[0])
        close(returns[b, keep], r[0])
    # by hand: tokens 0 and 3 count, 1 and 2 are a tool's output
    a, _ = F.gae(t64([[1.0, 50, 50, 2]]), t64([[0.5, 70, 70, 0.25]]), t64([[1, 0, 0, 1]]), 0.5, 0.5)
    close(a, [[1 + 0.5 * 0.25 - 0.5 + 0.25 * 1.75, 0, 0, 1.75]])


# --------------------------------------------------------------------------------------------------- 4-6: whitening


def test_whiten_matches_peer():
    x = inputs("whiten")
    mask = x["mask"].bool()
    expected = peer("whiten", "masked_whiten")
    for shift, column in [(True, "shift_mean_true"), (False, "shift_mean_false")]:
        close(F.whiten(x["x"], mask, shift_mean=shift), t64(expected[column]) * mask, 1e-9)
    close(F.whiten(x["x"].masked_fill(~mask, NAN), mask.long()), t64(expected["shift_mean_true"]) * mask, 1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(-1e4, 1e4), st.floats(0.1, 100))
def test_whitened_has_mean_0_and_biased_variance_1(seed, offset, scale):
    g, mask = ragged(5, 7, seed)
    x = (randn(g, 5, 7) * scale + offset).masked_fill(~mask, INF)
    white = F.whiten(x, mask)
    assert abs(white[mask].mean()) < 1e-9
    assert abs(white[mask].var(correction=0) - 1) < 1e-5
    assert (white[~mask] == 0).all()
    kept_mean = F.whiten(x, mask, shift_mean=False)[mask].mean()
    assert abs(kept_mean - x[mask].mean()) < 1e-9 * max(1, abs(offset))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 12345.678])
def test_whiten_of_a_constant_or_one_token_is_0(value, dtype):
    constant = torch.full((7, 9), value, dtype=dtype)
    _, mask = ragged(7, 9, 2)
    one = torch.zeros(7, 9).index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(1.0))
    for m in (mask, one, torch.zeros(7, 9)):
        white = F.whiten(constant.masked_fill(m == 0, NAN), m)
        assert (white == 0).all()
        assert F.whiten(constant, m, moments=F.masked_moments(constant, m)).abs().max() < 1e-7


def test_whiten_over_the_global_batch_does_not_depend_on_the_shards():
    g, mask = ragged(9, 6, 21)
    x = randn(g, 9, 6) * 3 + 2
    mask[7:] = False  # a rank without a token
    whole = F.whiten(x, mask)
    shards = [slice(0, 2), slice(2, 7), slice(7, 9)]
    moments = sum(F.masked_moments(x[s].masked_fill(~mask[s], NAN), mask[s]) for s in shards)
    close(torch.cat([F.whiten(x[s], mask[s], moments=moments) for s in shards]), whole)
    close(torch.cat([F.whiten(x[s], mask[s], False, moments=moments) for s in shards]), F.whiten(x, mask, False))
    assert (F.whiten(x[shards[0]], mask[shards[0]]) - whole[shards[0]]).abs().max() > 0.01  # rank by rank it does


# ---------------------------------------------------------------------------------------------- 7-10: PPO's losses


def ppo_inputs():
    x = inputs("ppo_losses")
    return x["new_logprobs"], x["old_logprobs"], x["advantages"], x["mask"]


def fraction(metrics, name):
    total, count = metrics[name]
    return (total / count).item()


def test_policy_loss_matches_peers():
    new, old, advantages, mask = ppo_inputs()
    new.requires_grad_()
    total, count, metrics = F.policy_loss(new, old, advantages, mask, 0.2)
    assert count == 12
    losses = [o["value"]["pg_loss"] for o in PEERS["ppo_losses"]["outputs"] if "pg_loss" in o["value"]]
    plain = [x for x in losses if abs(x - 0.2776487964308742) < 1e-9]
    assert len(plain) == 8  # eight runs of seven peers agree
    close(total / count, plain[0], 1e-12)
    (total / count).backward()
    close(new.grad, peer("ppo_losses", "PolicyLoss(0.2,0.2) token mean")["grad_new_logprobs"], 1e-12)
    reference = peer("ppo_losses", "summarize_from_feedback")
    assert fraction(metrics, "policy/clip_fraction") == reference["pg_clipfrac"] == 0.25
    assert abs(fraction(metrics, "policy/approx_kl") - reference["approxkl_masked_mean_half_sq"]) < 1e-12
    assert abs(fraction(metrics, "policy/loss") - plain[0]) < 1e-12
    valid = mask.bool()
    ratios = (new - old).exp()[valid]
    assert abs(fraction(metrics, "policy/ratio") - ratios.mean()) < 1e-12
    assert abs(metrics["policy/ratio_max"][0] - ratios.max()) < 1e-12
    assert fraction(metrics, "policy/ratio_guarded") == 0
    assert not any(x.requires_grad for pair in metrics.values() for x in pair)


def test_higher_upper_clip_and_aggregations_match_peers():
    new, old, advantages, mask = ppo_inputs()
    total, count, _ = F.policy_loss(new, old, advantages, mask, 0.2, clip_range_high=0.28)
    close(total / count, peer("ppo_losses", "clip-higher")["pg_loss"], 1e-12)
    for aggregation, words in [
        ("sequence_mean_token_mean", "PolicyLoss seq-mean-token-mean"),
        ("sequence_mean_token_sum", "vanilla seq-mean-token-sum"),
    ]:
        total, count, _ = F.policy_loss(new, old, advantages, mask, 0.2, aggregation=aggregation)
        assert count == 3
        close(total / count, peer("ppo_losses", words)["pg_loss"], 1e-9)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.5])
def test_gradient_is_0_iff_the_clip_helps(ratio, advantage):
    logprobs = t64([[math.log(ratio)]], requires_grad=True)
    total, _, metrics = F.policy_loss(logprobs, t64([[0.0]]), t64([[advantage]]), t64([[1]]), 0.2)
    total.backward()
    clipped = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    close(logprobs.grad, [[0.0 if clipped else -advantage * ratio]])
    assert metrics["policy/clip_fraction"][0] == float(clipped)
    close(total.detach(), max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2)))


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.5, 1.5])
def test_at_the_edge_of_the_clip_nothing_is_clipped(ratio, advantage):
    logprobs = t64([[math.log(ratio)]], requires_grad=True)
    ratio = logprobs.exp().item()
    total, _, metrics = F.policy_loss(logprobs, t64([[0.0]]), t64([[advantage]]), t64([[1]]), abs(ratio - 1))
    total.backward()
    close(logprobs.grad, [[-advantage * ratio]])
    assert metrics["policy/clip_fraction"][0] == 0


@pytest.mark.parametrize("gap", [1000.0, INF])
def test_log_ratios_are_guarded_and_counted(gap):
    logprobs = t64([[gap, -gap, 0.0, NAN]], requires_grad=True)
    total, count, metrics = F.policy_loss(logprobs, torch.zeros(1, 4), -torch.ones(1, 4), t64([[1, 1, 1, 0]]), 0.2)
    total.backward()
    close(total.detach(), math.exp(20) + 0.8 + 1, 1e-6)
    assert metrics["policy/ratio_guarded"] == (2, 3) and count == 3
    assert logprobs.grad.tolist() == [[0, 0, 1, 0]]


def test_weights_multiply_the_clipped_loss_and_are_detached():
    new, old, advantages, mask = ppo_inputs()
    g = torch.Generator().manual_seed(0)
    weights = torch.rand(3, 6, generator=g, dtype=torch.float64, requires_grad=True)
    new, old, advantages = (x.requires_grad_() for x in (new, old, advantages))
    total, count, _ = F.policy_loss(new, old, advantages, mask, 0.2, weights=weights)
    total.backward()
    assert weights.grad is None and old.grad is None and advantages.grad is None
    expected, each = 0.0, t64(peer("ppo_losses", "PolicyLoss(0.2,0.2) token mean")["grad_new_logprobs"]) * 12
    for b, t in itertools.product(range(3), range(6)):
        rho, a = (new - old)[b, t].exp().item(), advantages[b, t].item()
        expected += mask[b, t].item() * weights[b, t].item() * max(-a * rho, -a * min(max(rho, 0.8), 1.2))
    close(total.detach(), expected)
    close(new.grad, each * weights.detach())
    assert count == 12  # a weight is not a count


def test_dual_clip():
    new, old, advantages, mask = ppo_inputs()
    for c in (1.3, 3.0):
        total, count, _ = F.policy_loss(new, old, advantages, mask, 0.2, dual_clip=c)
        close(total / count, peer("ppo_losses", f"dual_clip={c}")["pg_loss"], 1e-12)
    # ratio 5 and A = -2: 10 without, 3 * 2 = 6 with, and no gradient; a positive advantage is left alone
    logprobs = torch.log(t64([[5.0, 1.1, 5.0]])).requires_grad_()
    total, _, metrics = F.policy_loss(
        logprobs, torch.zeros(1, 3), t64([[-2.0, -2.0, 2.0]]), torch.ones(1, 3), 0.2, dual_clip=3.0
    )
    total.backward()
    close(total.detach(), 6 + 2.2 - 2.4)
    close(logprobs.grad, [[0, 2.2, 0]])
    assert metrics["policy/dual_clip_fraction"] == (1, 3)
    close(F.policy_loss(logprobs.detach(), torch.zeros(1, 3), t64([[-2.0, -2, 2]]), torch.ones(1, 3), 0.2)[0], 9.8)
    for c in (1.0, 0.5):
        with pytest.raises(ValueError, match=f"dual_clip is {c}"):
            F.policy_loss(new, old, advantages, mask, 0.2, dual_clip=c)


def test_value_loss_matches_peers():
    x = inputs("ppo_losses")
    values = x["new_values"].requires_grad_()
    total, count, metrics = F.value_loss(values, x["old_values"], x["returns"], x["mask"], 0.2)
    close((total / count).detach(), peer("ppo_losses", "ValueLoss(0.2)")["vf_loss"], 1e-12)
    assert count == 12
    (total / count).backward()
    grad = t64(peer("ppo_losses", "ValueLoss(0.2)")["grad_values"])
    close(values.grad, grad, 1e-12)
    assert (values.grad[x["mask"].bool()] == 0).sum() == (grad[x["mask"].bool()] == 0).sum() == 2  # clip fraction 2/12
    assert metrics["critic/clip_fraction"] == (2, 12)
    assert abs(fraction(metrics, "critic/loss") - 0.09461964708333333) < 1e-12
    total, count, metrics = F.value_loss(values, x["old_values"], x["returns"], x["mask"], None)
    close((total / count).detach(), peer("ppo_losses", "ValueLoss(None)")["vf_loss"], 1e-12)
    assert metrics["critic/clip_fraction"] == (0, 12)


def test_value_loss_has_the_half_once():
    total, _, _ = F.value_loss(t64([[3.0]]), t64([[3.0]]), t64([[1.0]]), t64([[1]]), 0.2)
    close(total, 2.0)  # 1/2 (3 - 1)^2


def test_total_loss_of_policy_value_and_entropy():
    x = inputs("ppo_losses")
    policy, n, _ = F.policy_loss(x["new_logprobs"], x["old_logprobs"], x["advantages"], x["mask"], x["clip"])
    value, m, _ = F.value_loss(x["new_values"], x["old_values"], x["returns"], x["mask"], x["vclip"])
    close(policy / n + x["vf_coef"] * value / m, peer("ppo_losses", "summarize_from_feedback")["loss"], 1e-12)
    # L = L_clip + c1 L_vf - c2 S of the PPO paper (eq. 9), written out for a softmax policy, and its gradient in logits
    g = torch.Generator().manual_seed(8)
    logits, actions = randn(g, 1, 8, 3).requires_grad_(), torch.randint(3, (1, 8), generator=g)
    ones, advantages, old = torch.ones(1, 8), randn(g, 1, 8), randn(g, 1, 8) - 1
    policy, n, _ = F.policy_loss(F.response_logprobs(logits, actions), old, advantages, ones, 0.2)
    (policy / n - 0.01 * F.masked_mean(F.entropy(logits), ones)).backward()
    expected = torch.zeros(1, 8, 3, dtype=torch.float64)
    for i in range(8):
        z, a, y = logits[0, i].tolist(), advantages[0, i].item(), actions[0, i].item()
        p = [math.exp(v) / sum(map(math.exp, z)) for v in z]
        h = -sum(q * math.log(q) for q in p)
        rho = p[y] / math.exp(old[0, i])
        live = not ((rho > 1.2 and a > 0) or (rho < 0.8 and a < 0))
        for k in range(3):
            expected[0, i, k] = (-a * rho * live * ((k == y) - p[k]) + 0.01 * p[k] * (math.log(p[k]) + h)) / 8
    close(logits.grad, expected)


# ------------------------------------------------------------------------------- 11-14: what is summed, and divided

PARTITIONS = [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[3, 0], [1, 2]], [[2], [0], [3], [1]], [[1], [0, 2, 3]]]
MODES = {
    "token_mean": "token-mean",
    "sequence_mean_token_mean": "seq-mean-token-mean",
    "sequence_mean_token_sum": "seq-mean-token-sum",
}


@pytest.mark.parametrize("mode", MODES)
def test_aggregation_matches_verl(mode):
    x = inputs("loss_aggregation")
    expected = peer("loss_aggregation", "agg_loss")[MODES[mode]]
    total, count = F.sum_tokens(x["loss"].masked_fill(x["mask"] == 0, NAN), x["mask"], mode)
    assert count == (11 if mode == "token_mean" else 4)
    close(total / count, expected, 1e-8)
    sums, counts = (x["loss"] * x["mask"]).sum(1), x["mask"].sum(1)
    close(F.aggregate(sums, counts, mode), expected, 1e-8)
    if mode == "token_mean":
        close(F.aggregate(sums.sum(), counts.sum()), expected, 1e-12)
        mean_of_means = peer("loss_aggregation", "mean of per-microbatch masked means")
        assert abs(mean_of_means - total / count) > 0.05
    else:
        with pytest.raises(ValueError, match="per sequence"):
            F.aggregate(sums.sum(), counts.sum(), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parts", PARTITIONS)
def test_micro_batches_do_not_change_loss_or_gradient(mode, parts):
    x = inputs("loss_aggregation")
    g = torch.Generator().manual_seed(4)
    new, old = x["loss"], randn(g, 4, 5)
    mask, values, returns = x["mask"], randn(g, 4, 5), randn(g, 4, 5)

    def step(parts):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
        sums = []
        for rows in parts:
            lp = scale * new[rows] + shift
            policy = F.policy_loss(lp, old[rows], returns[rows], mask[rows], 0.2, aggregation=mode)
            value = F.value_loss(scale * values[rows], old[rows], returns[rows], mask[rows], 0.2, mode)
            kl = F.kl_loss(lp, old[rows], values[rows], mask[rows], aggregation=mode)
            sums.append([(total, count) for total, count, _ in (policy, value, kl)])
        loss = sum(sum(t for t, _ in term) / sum(n for _, n in term) for term in zip(*sums, strict=True))
        loss.backward()
        return torch.stack([loss.detach(), scale.grad, shift.grad])

    close(step(parts), step(PARTITIONS[0]), 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_parts_of_a_step_share_its_denominator(mode):
    x = inputs("loss_aggregation")
    sums, counts = (x["loss"] * x["mask"]).sum(1), x["mask"].sum(1)
    n_step = 11 if mode == "token_mean" else 4
    parts = [F.aggregate(sums[rows], counts[rows], mode, denominator=n_step) for rows in ([0], [1, 2], [3])]
    close(sum(parts), F.aggregate(sums, counts, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("poison", [0.0, NAN, INF])
def test_empty_rows_and_micro_batches_add_nothing(mode, poison):
    g, _ = ragged(1, 1, 0)
    x = [randn(g, 4, 5) for _ in range(4)]
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[2] = False
    poisoned = [a.masked_fill(~mask, poison).requires_grad_() for a in x]
    lp, old, adv, ref = poisoned
    keep = [0, 1, 3]
    for loss, few in [
        (F.policy_loss(lp, old, adv, mask, 0.2, dual_clip=3.0, weights=ref, aggregation=mode),
         F.policy_loss(*(a[keep] for a in x[:3]), mask[keep], 0.2, dual_clip=3.0, weights=x[3][keep], aggregation=mode)),
        (F.value_loss(lp, old, adv, mask, 0.2, mode), F.value_loss(*(a[keep] for a in x[:3]), mask[keep], 0.2, mode)),
        (F.kl_loss(lp, old, ref, mask, weights=adv, aggregation=mode),
         F.kl_loss(x[0][keep], x[1][keep], x[3][keep], mask[keep], weights=x[2][keep], aggregation=mode)),
    ]:  # fmt: skip
        close(loss[0].detach(), few[0].detach())
        assert loss[1] == few[1] == (15 if mode == "token_mean" else 3)
        for name, (total, count) in loss[2].items():
            close(total, few[2][name][0])
            assert count == few[2][name][1]
        (grad,) = torch.autograd.grad(loss[0], lp)
        assert grad.isfinite().all() and (grad[2] == 0).all() and (grad[keep] != 0).any()
    empty = torch.zeros(4, 5)
    for total, count, metrics in [
        F.policy_loss(lp, old, adv, empty, 0.2, aggregation=mode),
        F.value_loss(lp, old, adv, empty, 0.2, mode),
        F.kl_loss(lp, old, ref, empty, aggregation=mode),
    ]:
        assert total == 0 and count == 0
        assert all(a == 0 and n == 0 for a, n in metrics.values())
        assert (torch.autograd.grad(total, lp)[0] == 0).all()
    assert F.aggregate(torch.zeros(3), torch.zeros(3), mode) == 0
    assert F.masked_mean(lp, empty) == 0


# -------------------------------------------------------------------------------- 22, 33: logits, temperature, entropy


def python_law(z, tau):
    top = max(z)
    weights = [math.exp((v - top) / tau) for v in z]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize("tau", [1.0, 0.7, 2.5])
def test_logprobs_and_entropy_use_logits_over_temperature(tau):
    g = torch.Generator().manual_seed(1)
    logits, labels = randn(g, 2, 3, 5) * 3, torch.randint(5, (2, 3), generator=g)
    logprobs, entropy = F.response_logprobs(logits, labels, tau), F.entropy(logits, tau)
    for b, t in itertools.product(range(2), range(3)):
        p = python_law(logits[b, t].tolist(), tau)
        assert abs(logprobs[b, t].item() - math.log(p[labels[b, t]])) < 1e-12
        assert abs(entropy[b, t].item() + sum(q * math.log(q) for q in p)) < 1e-12
    if tau != 1:
        assert (logprobs - F.response_logprobs(logits, labels) / tau).abs().min() > 1e-3  # lp(tau) is not lp / tau


def test_bad_temperatures_are_refused():
    for tau in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match="temperature"):
            F.entropy(torch.zeros(2, 3), tau)
        with pytest.raises(ValueError, match="temperature"):
            F.response_logprobs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), tau)


def test_entropy_limits():
    close(F.entropy(torch.zeros(4, 97, dtype=torch.float64)), [math.log(97)] * 4)
    close(F.entropy(t64([1.0, 1.0])), math.log(2))
    sure = torch.full((3, 11), -1e4)
    sure[:, 5] = 1e4
    assert (F.entropy(sure) == 0).all()
    ruled_out = t64([[0.0, 0.0, -INF]], requires_grad=True)
    h = F.entropy(ruled_out)
    close(h.detach(), [math.log(2)])
    h.sum().backward()
    close(ruled_out.grad, [[0, 0, 0]])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 6), st.floats(-1e4, 1e4))
def test_entropy_is_between_0_and_log_v(seed, log_scale, offset):
    g = torch.Generator().manual_seed(seed)
    h = F.entropy((randn(g, 20, 7) * 10**log_scale + offset).float())
    assert (h >= 0).all() and (h <= math.log(7) + 1e-6).all()


def test_a_step_on_the_entropy_bonus_raises_the_entropy():
    g = torch.Generator().manual_seed(2)
    logits = randn(g, 6, 9).requires_grad_()
    h = F.entropy(logits, 0.7)
    (-h.mean()).backward()
    with torch.no_grad():
        assert (F.entropy(logits - 0.1 * logits.grad, 0.7) > h).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunked_equals_full_in_value_and_gradient(dtype, monkeypatch):
    g = torch.Generator().manual_seed(6)
    logits, labels = randn(g, 3, 7, 13).to(dtype), torch.randint(13, (3, 7), generator=g)
    before = logits.clone()
    z = logits.double().clone().requires_grad_()
    logp = torch.log_softmax(z / 0.7, -1)
    expected = [-(logp.exp() * logp).sum(-1), logp.gather(-1, labels[..., None])[..., 0]]
    upstream = randn(g, 3, 7)
    grads = [torch.autograd.grad((e * upstream).sum(), z, retain_graph=True)[0] for e in expected]
    tol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    for elements in (1, 3 * 13 * 2, 10**9):
        monkeypatch.setattr(F, "CHUNK_ELEMENTS", elements)
        for i, f in enumerate([F.entropy, lambda x, tau: F.response_logprobs(x, labels, tau)]):
            x = logits.clone().requires_grad_()
            out = f(x, 0.7)
            assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            close(out.detach(), expected[i].detach(), tol)
            (out * upstream).sum().backward()
            close(x.grad, grads[i], tol if dtype != torch.bfloat16 else 2e-2)
            assert torch.equal(x.detach(), before)
            assert torch.equal(f(logits, 0.7), out.detach())


def test_only_a_chunk_of_logits_is_upcast(monkeypatch):
    monkeypatch.setattr(F, "CHUNK_ELEMENTS", 2 * 2 * 50)
    seen, log_softmax = [], torch.Tensor.log_softmax
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda x, dim: seen.append(x.numel()) or log_softmax(x, dim))
    F.entropy(torch.zeros(2, 8, 50, dtype=torch.bfloat16))
    assert seen == [2 * 2 * 50] * 4
    F.entropy(torch.zeros(2, 8, 50, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert seen == [2 * 2 * 50] * 12  # backward makes each anew: none was kept


# ------------------------------------------------------------------------------ 25-28: from a response to its rewards


def test_truncate_at_the_first_stop():
    eos, end, pad = 2, 9, 0
    ids = torch.tensor(
        [[5, 6, 7, 8], [5, eos, 7, 8], [5, 6, 7, eos], [end, eos, 7, 8], [7, end, eos, end], [0, 5, 2, 5]]
    )
    out, mask, has_stop = F.truncate_at_stop(ids, [eos, end], pad)
    assert out.tolist() == [[5, 6, 7, 8], [5, 2, 0, 0], [5, 6, 7, 2], [9, 0, 0, 0], [7, 9, 0, 0], [0, 5, 2, 0]]
    assert mask.sum(1).tolist() == [4, 2, 4, 1, 2, 3]
    assert (mask == (torch.arange(4) < mask.sum(1, keepdim=True))).all()
    assert has_stop.tolist() == [False, True, True, True, True, True]
    only_eos = F.truncate_at_stop(ids, [eos], pad)
    assert only_eos[1].sum(1).tolist() == [4, 2, 4, 2, 3, 3]
    assert F.truncate_at_stop(ids, [], pad)[1].all()
    assert ids[1].tolist() == [5, eos, 7, 8]
    with pytest.raises(ValueError, match="pad_id 2 is also in stop_ids"):
        F.truncate_at_stop(ids, [eos], eos)


def test_an_eos_in_the_last_slot_or_another_stop_is_not_penalised():
    _, _, finished = F.truncate_at_stop(torch.tensor([[5, 6, 2], [5, 9, 7], [5, 6, 7]]), [2, 9], 0)
    scores = t64([0.5, 0.25, 3.0])
    assert F.missing_eos(scores, finished).tolist() == [0.5, 0.25, -1.0]
    assert F.missing_eos(scores, finished, "replace", -3.0).tolist() == [0.5, 0.25, -3.0]
    for value in (1.0, -1.0):
        assert F.missing_eos(scores, finished, "subtract", value).tolist() == [0.5, 0.25, 2.0]
    assert F.missing_eos(scores, finished, "none").tolist() == scores.tolist()
    for value, worth in ((-1.0, -1.0), (2.5, 2.5), (9.0, 3.0)):  # at most: never above what it scored
        assert F.missing_eos(scores, finished, "at_most", value).tolist() == [0.5, 0.25, worth]
    with pytest.raises(ValueError, match="replace, subtract, none"):
        F.missing_eos(scores, finished, "maybe")
    with pytest.raises(ValueError, match=r"\(3,\).*\(3, 1\)"):
        F.missing_eos(scores, finished[:, None])


def reward_inputs(seed=0):
    g, mask = ragged(5, 6, seed)
    mask[1] = torch.arange(6) < 4
    mask[2] = torch.arange(6) < 1
    mask[4] = False
    return randn(g, 5), randn(g, 5, 6) - 2, randn(g, 5, 6) - 2, mask


def test_the_score_stands_on_the_last_token():
    scores, lp, ref, mask = reward_inputs()
    poisoned = [x.masked_fill(~mask, NAN) for x in (lp, ref)]
    rewards = F.token_rewards(scores, *poisoned, mask, kl_coef=0.0)
    assert (rewards != 0).sum(1).tolist()[:3] == [1, 1, 1]
    for b in range(4):
        last = mask[b].sum() - 1
        close(rewards[b], torch.zeros(6).double().index_fill(0, last, 1.0) * scores[b])
    assert (rewards[4] == 0).all()  # nobody to give it to
    rewards = F.token_rewards(scores, *poisoned, mask, kl_coef=0.3)
    close(rewards.sum(1), (scores - 0.3 * ((lp - ref) * mask).sum(1)) * mask.any(1))
    assert (rewards[~mask] == 0).all() and not rewards.requires_grad


@pytest.mark.parametrize("estimator", F.KL_ESTIMATORS)
@pytest.mark.parametrize("slot", F.SCORE_SLOTS)
def test_rewards_match_brute_force(slot, estimator):
    scores, lp, ref, mask = reward_inputs(1)
    rewards = F.token_rewards(scores, lp.requires_grad_(), ref, mask, 0.05, estimator, slot)
    expected = torch.zeros(5, 6, dtype=torch.float64)
    form = {"k1": lambda r: r, "k2": lambda r: r * r / 2, "k3": lambda r: math.exp(-r) - 1 + r, "abs": abs}[estimator]
    for b in range(5):
        n = int(mask[b].sum())
        for t in range(n):
            expected[b, t] = -0.05 * form((lp[b, t] - ref[b, t]).item())
        if n:
            expected[b, min(n, 5) if slot == "after_eos" else n - 1] += scores[b]
    close(rewards, expected)
    assert not rewards.requires_grad


def test_with_holes_the_last_valid_token_gets_the_score():
    mask = torch.tensor([[1, 0, 1, 0, 0]])
    assert F.score_position(mask).tolist() == [[False, False, True, False, False]]
    assert F.score_position(mask, "after_eos").tolist() == [[False, False, False, True, False]]
    assert F.score_position(mask.bool()).tolist() == F.score_position(mask.float()).tolist()
    with pytest.raises(ValueError, match="on_last_token, after_eos"):
        F.score_position(mask, "before_eos")


@pytest.mark.parametrize("slot", F.SCORE_SLOTS)
def test_reward_pipeline_end_to_end(slot):
    """Stop, penalty, rewards, GAE and whitening against the loops of summarize_from_feedback_details, written anew.

    There the values are kept up to and with the slot behind the stop, set to 0 beyond, and the scan runs over all slots.
    """
    g = torch.Generator().manual_seed(3)
    ids = torch.tensor([[5, 6, 7, 8, 4, 5], [5, 6, 7, 2, 4, 4], [5, 2, 6, 6, 6, 2]])
    raw, lp, ref, values = randn(g, 3) * 9, randn(g, 3, 6) - 2, randn(g, 3, 6) - 2, randn(g, 3, 6)
    _, mask, finished = F.truncate_at_stop(ids, [2], 0)
    scores = F.missing_eos(F.clip_scores(raw, 5.0), finished)
    rewards = F.token_rewards(scores, lp, ref, mask, 0.05, score_slot=slot)
    advantages, returns = F.gae(rewards, values, mask | F.score_position(mask, slot), 1.0, 0.95)
    white = F.whiten(advantages, mask)

    expected = torch.zeros(3, 6, dtype=torch.float64)
    for b, n in enumerate([6, 4, 2]):
        r = [-0.05 * (lp[b, t] - ref[b, t]).item() if t < n else 0.0 for t in range(6)]
        end = n if slot == "after_eos" and n < 6 else n - 1
        r[end] += -1.0 if n == 6 else max(-5.0, min(5.0, raw[b].item()))
        v = [values[b, t].item() if t <= end else 0.0 for t in range(6)] + [0.0]
        carry = 0.0
        for t in reversed(range(6)):
            carry = r[t] + v[t + 1] - v[t] + 0.95 * carry
            expected[b, t] = carry if t <= end else 0.0
            assert abs(expected[b, t] + v[t] - returns[b, t]) < 1e-12
    close(advantages, expected)
    kept = expected[mask]
    close(white[mask], (kept - kept.mean()) / (kept.var(correction=0) + 1e-8).sqrt())


def test_the_slot_of_the_score_matters_to_the_last_token():
    """One token, gamma 1, lambda .95: the score reaches it whole, or through a value and a factor of .95."""
    mask = torch.tensor([[1, 0]])
    zeros, values = torch.zeros(1, 2).double(), t64([[0.3, 0.2]])
    for slot, expected in [("on_last_token", 2 - 0.3), ("after_eos", 0.2 - 0.3 + 0.95 * (2 - 0.2))]:
        rewards = F.token_rewards(t64([2.0]), zeros, zeros, mask, 0.1, score_slot=slot)
        advantages, _ = F.gae(rewards, values, mask.bool() | F.score_position(mask, slot), 1.0, 0.95)
        close(advantages[0, 0], expected)


# --------------------------------------------------------------------------------------------------- 30-32: the KL


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_match_verl(estimator):
    x = inputs("kl_estimators")
    lp = x["logp"].requires_grad_()
    kl = F.kl_estimate(lp, x["ref_logp"], estimator)
    expected = peer("kl_estimators", f'kl_penalty {estimator}"')
    close(kl.detach(), expected["value"])
    kl.sum().backward()
    close(lp.grad, expected["grad"])


def test_abs_matches_nemo_aligner_and_unknown_names_raise():
    x = inputs("kl_estimators")
    close(F.kl_estimate(x["logp"], x["ref_logp"], "abs"), peer("kl_estimators", "calculate_kl_penalty"))
    with pytest.raises(ValueError, match=r"k4.*k1, k2, k3, abs"):
        F.kl_estimate(x["logp"], x["ref_logp"], "k4")


@settings(max_examples=60, deadline=None)
@given(st.floats(-100, 100, width=32), st.sampled_from([torch.float32, torch.float64]))
def test_k3_is_finite_and_never_negative(r, dtype):
    for x in (r, r * 1e-6):
        k3 = F.kl_estimate(torch.tensor([x], dtype=dtype), torch.zeros(1, dtype=dtype), "k3")
        assert k3.isfinite().all() and (k3 >= 0).all()


def test_k3_holds_a_log_ratio_within_20():
    far = F.kl_estimate(torch.tensor([-100.0, 100.0]), torch.zeros(2), "k3")
    close(far, [math.exp(20) - 21, math.exp(-20) + 19], 64)  # float32 knows e^20 to 32


def two_laws():
    g = torch.Generator().manual_seed(9)
    return randn(g, 9), randn(g, 9).log_softmax(-1)


def test_expectations_are_exact():
    logits, ref = two_laws()
    lp = logits.log_softmax(-1)
    kl = (lp.exp() * (lp - ref)).sum()
    mean = {e: (lp.exp() * F.kl_estimate(lp, ref, e)).sum() for e in F.KL_ESTIMATORS}
    close(mean["k1"], kl)
    close(mean["k3"], kl)
    assert abs(mean["k2"] - kl) > 0.01 and abs(mean["abs"] - kl) > 0.01


@pytest.mark.parametrize("estimator", F.KL_LOSS_ESTIMATORS)
@pytest.mark.parametrize("on_policy", [True, False])
def test_kl_in_the_loss_has_the_gradient_of_the_kl(estimator, on_policy):
    """Every token of a 9-way vocabulary once, weighted by how often it is sampled: from the policy or from an old one."""
    logits, ref = two_laws()
    logits.requires_grad_()
    lp = logits.log_softmax(-1)
    old = lp.detach() if on_policy else randn(torch.Generator().manual_seed(1), 9).log_softmax(-1)
    ones = torch.ones(1, 9)
    total, count, metrics = F.kl_loss(lp[None], old[None], ref[None], ones, estimator, weights=old.exp()[None])
    (grad,) = torch.autograd.grad(total, logits, retain_graph=True)
    kl = (lp.exp() * (lp - ref)).sum()
    (expected,) = torch.autograd.grad(kl, logits)
    close(grad, expected, 1e-10)
    assert expected.abs().max() > 0.01 and count == 9
    assert metrics["policy/kl_loss"] == (total.detach(), count)
    if estimator != "k2":
        close(total.detach(), kl.detach())  # the value of an unbiased estimator


def test_straight_through_values_match_verl():
    x = inputs("kl_estimators")
    for estimator in ("k1+", "k3+"):
        lp = x["logp"].clone().requires_grad_()
        expected = peer("kl_estimators", f"kl_penalty {estimator} ")
        total, _, _ = F.kl_loss(lp, lp, x["ref_logp"], torch.ones(6), estimator)
        close(total.detach(), sum(expected["value"]))
        total.backward()
        close(lp.grad, expected["grad"])


@pytest.mark.parametrize("estimator", ["k1", "k3", "abs"])
def test_wrong_gradients_are_refused(estimator):
    logits, ref = two_laws()
    with pytest.raises(ValueError, match=f"'{estimator}' has a wrong gradient.*k2"):
        F.kl_loss(logits, logits, ref, torch.ones(9), estimator)
    lp = logits.requires_grad_().log_softmax(-1)  # and they are wrong
    (grad,) = torch.autograd.grad(
        (lp.exp().detach() * F.kl_estimate(lp, ref, estimator)).sum(), logits, retain_graph=True
    )
    (right,) = torch.autograd.grad((lp.exp() * (lp - ref)).sum(), logits)
    assert (grad - right).abs().max() > 0.01


def test_kl_controller_is_bit_equal_to_peers():
    x = PEERS["kl_controller"]["inputs"]
    controller = F.AdaptiveKL(x["init"], x["target"], x["horizon"])
    values = []
    for kl in x["kl_sequence"]:
        controller.update(kl, x["n_steps"])
        values.append(controller.value)
    assert len(PEERS["kl_controller"]["outputs"]) == 3
    for output in PEERS["kl_controller"]["outputs"]:
        assert values == output["value"]
    resumed = F.AdaptiveKL(x["init"], x["target"], x["horizon"])
    resumed.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    controller.update(torch.tensor(7.0), 512)
    resumed.update(7.0, 512)
    assert resumed.value == controller.value and isinstance(controller.value, float)


def test_kl_controller_refuses_what_cannot_steer():
    for target, horizon in [(0.0, 10), (-1.0, 10), (6.0, 0)]:
        with pytest.raises(ValueError, match="target"):
            F.AdaptiveKL(0.2, target, horizon)
    with pytest.raises(ValueError, match="finite"):
        F.AdaptiveKL(0.2, 6.0, 100).update(NAN, 8)
    fixed = F.FixedKL(0.05)
    fixed.update(100.0, 512)
    assert fixed.value == 0.05 and fixed.state_dict() == {"value": 0.05}


def test_the_kl_of_a_sequence_is_a_sum_over_its_tokens():
    """Twice the tokens at the same KL per token is twice the input, so the coefficient moves the other way."""
    short, long = F.AdaptiveKL(0.1, 6.0, 1000), F.AdaptiveKL(0.1, 6.0, 1000)
    short.update(10 * 0.5, 100)
    long.update(20 * 0.5, 100)
    assert short.value < 0.1 < long.value


# ---------------------------------------------------------------------------------------------- 34-36: reward models


def test_pairwise_loss_matches_peers():
    x = inputs("rm_pairwise")
    chosen, rejected, margin = x["chosen"], x["rejected"], x["margin"]
    expected = peer("rm_pairwise", "PairWiseLoss")
    close(F.pairwise_loss(chosen, rejected), expected["no_margin"])
    close(F.pairwise_loss(chosen, rejected, margin), expected["margin"])
    close(F.pairwise_loss(chosen, rejected, center_coef=0.01), peer("rm_pairwise", "centering")["total"])
    margin_case = peer("rm_margin_broadcast", "closed_form")
    close(F.pairwise_loss(chosen, rejected, margin), margin_case["correct"])
    assert abs(margin_case["correct"] - margin_case["buggy"]) > 1e-3
    far = t64([1000.0])
    close(F.pairwise_loss(-far, far), 2000.0)  # no overflow


def test_pairwise_loss_refuses_to_broadcast():
    column, row = torch.zeros(5, 1), torch.zeros(5)
    for args in [(column, row), (row, column), (column, column, row), (row, row, column), (row, row, torch.zeros(()))]:
        with pytest.raises(ValueError, match=r"\(5, 1\)|\(\)"):
            F.pairwise_loss(*args)


def test_kwise_loss():
    g = torch.Generator().manual_seed(5)
    scores = randn(g, 3, 4)
    expected = 0.0
    for row in scores.tolist():
        pairs = [math.log1p(math.exp(row[j] - row[i])) for i in range(4) for j in range(i + 1, 4)]
        assert len(pairs) == 6
        expected += sum(pairs) / 6 / 3
    close(F.kwise_loss(scores), expected)
    close(F.kwise_loss(scores[:, :2]), F.pairwise_loss(scores[:, 0], scores[:, 1]))
    assert F.kwise_loss(t64([[3.0, 2, 1]])) < F.kwise_loss(t64([[1.0, 2, 3]]))
    for shape in [(4,), (3, 1), (2, 3, 4)]:
        with pytest.raises(ValueError, match="K >= 2"):
            F.kwise_loss(torch.zeros(shape))


def test_a_prompt_weighs_the_same_whatever_its_k():
    for k in (2, 4, 9):
        close(F.kwise_loss(torch.zeros(2, k, dtype=torch.float64)), math.log(2))
    many = t64([[0.5] * 9], requires_grad=True)
    F.kwise_loss(many).backward()
    # a score that only loses: 8 of 36 pairs, each pulling with 1/2
    close(many.grad[0, -1], 8 / 36 / 2)


def test_score_gain_and_bias_match_peers():
    scores = inputs("rm_norm")["rewards"]
    gain, bias = F.score_gain_bias(scores, 0.0, 1.0)
    expected = peer("rm_norm", "set_reward_norm")
    assert abs(gain - expected["gain"]) < 1e-12 and abs(bias - expected["bias"]) < 1e-12
    close(gain * scores + bias, expected["after"])
    gain, bias = F.score_gain_bias(scores)
    assert gain == 1
    close(scores + bias, peer("rm_norm", "config.bias")["after"])
    with pytest.raises(ValueError, match="all equal"):
        F.score_gain_bias(t64([2.0, 2.0]), std=1.0)


# ------------------------------------------------------------------------------------ 43: importance weights


def weight_inputs():
    g, mask = ragged(4, 6, 13)
    mask[1] = False
    return randn(g, 4, 6), randn(g, 4, 6), mask


@pytest.mark.parametrize("floor", [None, 0.6])
@pytest.mark.parametrize("cap", [None, 2.0, 1.1])
@pytest.mark.parametrize("mode", F.IMPORTANCE_MODES)
def test_importance_weights_match_brute_force(mode, cap, floor):
    old, rollout, mask = weight_inputs()
    low, high = floor or 0.0, cap or INF
    expected = torch.zeros(4, 6, dtype=torch.float64)
    for b, t in itertools.product(range(4), range(6)):
        if mask[b, t]:
            span = mask[b].nonzero()[:, 0].tolist() if mode == "sequence" else [t]
            w = math.exp(sum((old[b, s] - rollout[b, s]).item() for s in span))
            outside = w < low or w > high
            expected[b, t] = (0.0 if outside else w) if mode == "icepop" else min(max(w, low), high)
    poisoned = [x.masked_fill(~mask, NAN).requires_grad_() for x in (old, rollout)]
    weights = F.importance_weights(*poisoned, mask, mode, cap, floor)
    close(weights, expected, 1e-9)
    assert not weights.requires_grad and weights.isfinite().all()


@pytest.mark.parametrize("mode", F.IMPORTANCE_MODES)
def test_importance_weights_are_1_where_the_engines_agree(mode):
    old, _, mask = weight_inputs()
    assert torch.equal(F.importance_weights(old, old, mask, mode), mask.double())


def test_importance_weights_edges():
    zeros, ones = torch.zeros(1, 2), torch.ones(1, 2)
    far = torch.tensor([[500.0, -500.0]])
    assert F.importance_weights(far, zeros, ones).tolist() == [[2.0, torch.tensor(-20.0).exp().item()]]
    assert F.importance_weights(far, zeros, ones, "icepop").tolist()[0][0] == 0
    assert F.importance_weights(far, zeros, ones, cap=None).isfinite().all()
    for cap, floor in [(0.5, 0.5), (2.0, 3.0), (2.0, -1.0), (0.0, None)]:
        with pytest.raises(ValueError, match="floor < cap"):
            F.importance_weights(zeros, zeros, ones, cap=cap, floor=floor)
    with pytest.raises(ValueError, match="token, sequence, icepop"):
        F.importance_weights(zeros, zeros, ones, "off")


# ----------------------------------------------------------------------------- 50: metrics, and moments over batches


def test_explained_variance():
    g, mask = ragged(5, 7, 17)
    returns = randn(g, 5, 7) * 2 + 1
    values = returns + randn(g, 5, 7) * 0.5 + 3
    kept, residual = returns[mask], (returns - values)[mask]
    expected = 1 - ((residual - residual.mean()) ** 2).sum() / ((kept - kept.mean()) ** 2).sum()
    close(F.explained_variance(values.masked_fill(~mask, NAN), returns.masked_fill(~mask, INF), mask), expected)
    close(F.explained_variance(returns + 4, returns, mask), 1.0)  # a constant error leaves nothing unexplained
    close(F.explained_variance(torch.zeros_like(returns), returns, mask), 0.0)
    assert F.explained_variance(values, torch.full_like(returns, 0.1), mask) == 0  # undefined: no NaN in a log
    parts = [slice(0, 1), slice(1, 5)]
    moments = tuple(sum(F.masked_moments(x[p], mask[p]) for p in parts) for x in (returns - values, returns))
    tenth = torch.full_like(returns, 0.1)
    assert F.explained_variance(values, tenth, mask, (moments[0], F.masked_moments(tenth, mask))) == 0
    for p in parts:
        close(F.explained_variance(values[p], returns[p], mask[p], moments), expected)


def test_metrics_do_not_depend_on_padding_or_splitting():
    g, mask = ragged(6, 5, 23)
    lp, old, adv, ret = (randn(g, 6, 5) for _ in range(4))

    def reduced(parts):
        sums = {}
        for rows, pad in parts:
            m = torch.cat([mask[rows], torch.zeros(len(rows), pad, dtype=torch.bool)], 1)
            a, b, c, d = (torch.cat([x[rows], torch.full((len(rows), pad), NAN)], 1) for x in (lp, old, adv, ret))
            for metrics in (F.policy_loss(a, b, c, m, 0.2, dual_clip=1.5)[2], F.value_loss(a, b, d, m, 0.2)[2]):
                for name, pair in metrics.items():
                    sums.setdefault(name, []).append(pair)
        return {
            name: max(a for a, _ in pairs)
            if name.endswith("_max")
            else sum(a for a, _ in pairs) / sum(n for _, n in pairs)
            for name, pairs in sums.items()
        }

    whole = reduced([([0, 1, 2, 3, 4, 5], 0)])
    assert set(whole) == {
        *("policy/" + x for x in ["loss", "clip_fraction", "approx_kl", "ratio", "ratio_max", "ratio_guarded"]),
        *("policy/dual_clip_fraction", "critic/loss", "critic/clip_fraction"),
    }
    assert 0 < whole["policy/clip_fraction"] < 1 and 0 < whole["critic/clip_fraction"] < 1
    for parts in ([([5, 4, 3, 2, 1, 0], 3)], [([0], 1), ([1, 2], 0), ([3, 4, 5], 2)]):
        for name, value in reduced(parts).items():
            close(value, whole[name])


def test_masked_mean():
    x = t64([[1.0, NAN], [3.0, 5.0]], requires_grad=True)
    mean = F.masked_mean(x, torch.tensor([[1, 0], [1, 1]]))
    close(mean.detach(), 3.0)
    mean.backward()
    close(x.grad, [[1 / 3, 0], [1 / 3, 1 / 3]])
    assert F.masked_mean(x, torch.tensor([[0, 0], [1, 0]])) == 3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 5), min_size=1, max_size=5), st.floats(-100, 100))
def test_running_moments_equal_pooled_statistics(seed, sizes, offset):
    g = torch.Generator().manual_seed(seed)
    running, batches = F.RunningMoments(), []
    for n in sizes:
        batches.append(randn(g, n) * 3 + offset)
        halves = F.masked_moments(batches[-1][::2]) + F.masked_moments(batches[-1][1::2])  # two ranks
        running.update(halves)
    pooled = torch.cat(batches)
    assert running.count == len(pooled)
    if len(pooled) > 1:
        assert abs(running.mean - pooled.mean()) < 1e-9 and abs(running.std - pooled.std()) < 1e-9
        close(running.normalise(pooled), (pooled - pooled.mean()) / pooled.std(), 1e-8)
    resumed = F.RunningMoments()
    resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
    for r in (running, resumed):
        r.update(F.masked_moments(t64([1.0, 7.0])))
    assert (resumed.mean, resumed.std, resumed.count) == (running.mean, running.std, running.count)


def test_running_moments_of_equal_scores_scale_by_1():
    running = F.RunningMoments()
    assert running.std == 1
    for _ in range(3):
        running.update(F.masked_moments(t64([0.1] * 7)))
        assert running.std == 1
    close(running.normalise(t64([0.1, 1.1])), [0.0, 1.0])
    with pytest.raises(ValueError, match="finite"):
        running.update(F.masked_moments(t64([NAN])))


def test_scores_are_clipped_on_both_sides():
    scores = t64([-9.0, 0.5, 9.0])
    assert F.clip_scores(scores, 5.0).tolist() == [-5.0, 0.5, 5.0]
    assert F.clip_scores(scores, None) is scores
    with pytest.raises(ValueError, match="score limit is 0"):
        F.clip_scores(scores, 0)


# ------------------------------------------------------------------------------------------------ the whole interface

A, B_ = torch.zeros(3, 4), torch.zeros(3, 1)
LONG = torch.zeros(3, 4, dtype=torch.long)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: F.masked_mean(x, y),
        lambda x, y: F.masked_moments(x, y),
        lambda x, y: F.whiten(x, y),
        lambda x, y: F.gae(x, x, y, 1.0, 1.0),
        lambda x, y: F.gae(x, y, x, 1.0, 1.0),
        lambda x, y: F.gae(y, x, x, 1.0, 1.0),
        lambda x, y: F.kl_estimate(x, y, "k1"),
        lambda x, y: F.token_rewards(x[:, 0], x, y, x, 0.1),
        lambda x, y: F.token_rewards(x[:, 0], x, x, y, 0.1),
        lambda x, y: F.token_rewards(y, x, x, x, 0.1),
        lambda x, y: F.policy_loss(y, x, x, x, 0.2),
        lambda x, y: F.policy_loss(x, y, x, x, 0.2),
        lambda x, y: F.policy_loss(x, x, y, x, 0.2),
        lambda x, y: F.policy_loss(x, x, x, y, 0.2),
        lambda x, y: F.policy_loss(x, x, x, x, 0.2, weights=y),
        lambda x, y: F.value_loss(y, x, x, x, 0.2),
        lambda x, y: F.value_loss(x, y, x, x, 0.2),
        lambda x, y: F.value_loss(x, x, y, x, 0.2),
        lambda x, y: F.value_loss(x, x, x, y, 0.2),
        lambda x, y: F.kl_loss(x, x, y, x),
        lambda x, y: F.kl_loss(x, y, x, x),
        lambda x, y: F.kl_loss(x, x, x, x, weights=y),
        lambda x, y: F.sum_tokens(x, y),
        lambda x, y: F.aggregate(x[:, 0], y),
        lambda x, y: F.importance_weights(x, y, x),
        lambda x, y: F.importance_weights(x, x, y),
        lambda x, y: F.explained_variance(x, y, x),
        lambda x, y: F.response_logprobs(torch.zeros(3, 4, 7), y.long()),
    ],
)
def test_shapes_that_would_broadcast_raise(call):
    with pytest.raises(ValueError, match=r"\(3, 1\)") as caught:
        call(torch.zeros(3, 4), torch.zeros(3, 1))
    assert "(3, 4" in str(caught.value) or "(3,)" in str(caught.value)


def test_half_precision_inputs_are_computed_in_float32():
    g, mask = ragged(4, 6, 29)
    half = [randn(g, 4, 6).to(torch.bfloat16) for _ in range(4)]
    full = [x.float() for x in half]
    for f in (
        lambda a, b, c, d: F.policy_loss(a, b, c, mask, 0.2)[0],
        lambda a, b, c, d: F.value_loss(a, b, c, mask, 0.2)[0],
        lambda a, b, c, d: F.kl_loss(a, b, c, mask)[0],
        lambda a, b, c, d: F.gae(a, b, mask, 0.99, 0.95)[0],
        lambda a, b, c, d: F.whiten(a, mask),
        lambda a, b, c, d: F.token_rewards(a[:, 0], b, c, mask, 0.1),
        lambda a, b, c, d: F.importance_weights(a, b, mask),
        lambda a, b, c, d: F.pairwise_loss(a[:, 0], b[:, 0]),
        lambda a, b, c, d: F.kwise_loss(a),
        lambda a, b, c, d: F.masked_mean(a, mask),
        lambda a, b, c, d: F.entropy(a),
    ):
        out = f(*half)
        assert out.dtype == torch.float32 and torch.equal(out, f(*full))


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_masks_may_be_bool_or_numbers(dtype):
    g, mask = ragged(4, 6, 31)
    a, b, c = (randn(g, 4, 6) for _ in range(3))
    m = mask.to(dtype)
    for f in (
        lambda m: F.policy_loss(a, b, c, m, 0.2)[0],
        lambda m: F.gae(a, b, m, 0.9, 0.9)[0],
        lambda m: F.whiten(a, m),
        lambda m: F.token_rewards(a[:, 0], b, c, m, 0.1, score_slot="after_eos"),
        lambda m: F.importance_weights(a, b, m, "sequence"),
    ):
        assert torch.equal(f(m), f(mask))
