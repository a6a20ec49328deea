"""The estimators and what they share, against loops in plain Python: scores, rewards, advantages, losses and counts.

Six rows, three answers to each of two prompts. What lies outside a mask is NaN.
"""

from __future__ import annotations

import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch

from alignkit.algorithms import base
from alignkit.algorithms.base import KL_IN_LOSS, State, Surrogate
from alignkit.algorithms.grpo import GRPO
from alignkit.algorithms.ppo import PPO
from alignkit.algorithms.reinforce_pp import ReinforcePP
from alignkit.algorithms.rloo import RLOO
from alignkit.core.types import Experience, Rollouts, ScoredRollouts

GROUP, SLOTS = 3, 5
PROMPTS = [4, 4, 4, 2, 2, 2]  # tokens of each row's prompt
LENGTHS = [5, 3, 1, 4, 2, 5]  # tokens of each row's response
FINISHED = [False, True, True, True, True, True]
ROWS = range(6)
COEF = 0.3  # as the state holds it: the algorithms below are made with another


def randn(g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


class Given:
    """Rollouts, scores and what a forward pass made of them."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.mask = torch.arange(SLOTS) < torch.tensor(LENGTHS)[:, None]
        prompt_mask = torch.arange(4) >= 4 - torch.tensor(PROMPTS)[:, None]
        self.scores = randn(g, 6) * 2 + 1
        self.old = randn(g, 6, SLOTS) - 2
        self.ref, self.rollout = self.old + randn(g, 6, SLOTS), self.old + 0.6 * randn(g, 6, SLOTS)
        self.values = randn(g, 6, SLOTS)
        for x in (self.old, self.ref, self.rollout):
            x.masked_fill_(~self.mask, math.nan)
        ids = torch.randint(1, 9, (6, 4 + SLOTS), generator=g)
        rollouts = Rollouts(
            ids[:, :4] * prompt_mask, prompt_mask, ids[:, 4:] * self.mask, self.mask, self.rollout,
            torch.tensor(FINISHED), [{"row": i} for i in ROWS], 7,
        )  # fmt: skip
        self.scored = ScoredRollouts(rollouts, self.scores, {"gold": self.scores * 2})

    def experience(self, algorithm: Surrogate, coef: float = COEF):
        state = algorithm.start()
        state.kl.value = coef
        values = self.values if algorithm.needs_critic else None
        return algorithm.experience(self.scored, self.old, self.ref, values, state, GROUP)

    def rewards(self, coef: float, form=lambda r: r, after: int = 0, scores=None) -> list[list[float]]:
        """Rewards of every row's tokens; the score stands `after` slots behind the last one where there is a slot."""
        found = []
        for b, n in enumerate(LENGTHS):
            row = [-coef * form((self.old[b, t] - self.ref[b, t]).item()) for t in range(n)]
            row += [0.0] * (min(n + after, SLOTS) - n)
            row[-1] += (self.scores if scores is None else scores)[b].item()
            found.append(row)
        return found


def padded(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([row + [0.0] * (SLOTS - len(row)) for row in rows], dtype=torch.float64)


def over_tokens(values: list[float]) -> torch.Tensor:
    """One number a row, on each of its tokens."""
    return padded([[v] * n for v, n in zip(values, LENGTHS, strict=True)])


def close(actual: torch.Tensor, expected, tol: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tol)


def whitened(rows: list[list[float]]) -> tuple[torch.Tensor, float]:
    """Mean 0 and biased variance 1 over all tokens, and the std."""
    every = [a for row in rows for a in row]
    mean, std = statistics.fmean(every), (statistics.pvariance(every) + 1e-8) ** 0.5
    return padded([[(a - mean) / std for a in row] for row in rows]), std


def backwards(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Generalised advantages of one row."""
    found, carry, following = [], 0.0, 0.0
    for r, v in zip(reversed(rewards), reversed(values), strict=True):
        carry = r + gamma * following - v + gamma * lam * carry
        following = v
        found.insert(0, carry)
    return found


# -------------------------------------------------------------------------------------------------- scores and rewards


@pytest.mark.parametrize(
    "mode, penalised",
    [("replace", lambda s: -3.0), ("at_most", lambda s: min(s, -3.0)), ("subtract", lambda s: s - 3), ("none", None)],
)
def test_scores_are_normalised_then_clipped_then_penalised(mode, penalised):
    """Normalised by all scores up to and with their own batch; the penalty is neither normalised nor clipped."""
    algorithm = PPO(normalize_scores=True, score_clip=0.5, missing_eos=mode, missing_eos_value=-3.0)
    state, seen = algorithm.start(), []
    for seed in (0, 1):
        x = Given(seed)
        seen += x.scores.tolist()
        mean, std = statistics.fmean(seen), statistics.stdev(seen)
        expected = [min(max((s - mean) / std, -0.5), 0.5) for s in x.scores.tolist()]
        assert 0.5 in expected and any(-0.5 < s < 0.5 for s in expected)
        if penalised:
            expected = [s if done else penalised(s) for s, done in zip(expected, FINISHED, strict=True)]
        close(algorithm.shape_scores(x.scored, state), expected)
    assert state.scores.count == 12


LOW = torch.tensor([-6.0, -9.0, -7.5])
CUT = torch.tensor([True, False, True])


def worth(algorithm: PPO, scores=LOW, finished=CUT) -> list[float]:
    scored = SimpleNamespace(scores=scores, rollouts=SimpleNamespace(finished=finished))
    return algorithm.shape_scores(scored, algorithm.start()).tolist()


@pytest.mark.parametrize("options", [{}, {"score_clip": 8.0}, {"normalize_scores": True}, {"missing_eos_value": 4.0}])
def test_by_default_a_cut_answer_is_never_worth_more_than_it_scored(options):
    """Whatever lies below missing_eos_value: a penalty, a log-prob, a reward model's raw scores; or that is above 0."""
    own = worth(PPO(missing_eos="none", **options))
    assert worth(PPO(**options))[1] <= own[1]
    assert [worth(PPO(**options))[i] for i in (0, 2)] == [own[0], own[2]]
    assert worth(PPO(missing_eos="replace", **options))[1] == PPO(**options).missing_eos_value  # as peers have it


@pytest.mark.parametrize(
    "scores, finished, shaped, words",
    [
        (LOW, CUT, [-6.0, -9.0, -7.5], None),
        (
            LOW,
            CUT,
            [-6.0, -1.0, -7.5],
            "1 answers cut by their length are worth -1 on average, the 2 finished ones -6.75; 1 are",
        ),
        (torch.tensor([-6.0, -3.0, -7.5]), CUT, [-6.0, -3.0, -7.5], "worth -3 on average, the 2 finished ones -6.75: "),
        (torch.tensor([0.5, 0.9, -0.2]), CUT, [0.5, -1.0, -0.2], None),
        (LOW, ~CUT & False, [-1.0, -1.0, -1.0], "3 answers cut by their length are worth -1 on average; 3 are"),
        (LOW, ~CUT & False, [-6.0, -9.0, -7.5], None),  # cut by design, and nothing to compare with
        (LOW, CUT | True, [-6.0, -9.0, -7.5], None),
    ],
)
def test_where_it_pays_to_be_cut_the_run_says_so(scores, finished, shaped, words):
    said = base.cut_pays(base.cut_metrics(scores, torch.tensor(shaped), finished))
    assert said is None if words is None else words in said and "missing_eos" in said


def test_scores_are_left_alone_by_default_but_for_the_missing_end():
    x = Given()
    algorithm = PPO()
    state = algorithm.start()
    close(algorithm.shape_scores(x.scored, state), [-1.0, *x.scores[1:].tolist()])
    assert state.scores.count == 0


@pytest.mark.parametrize("algorithm", [PPO, RLOO, GRPO, ReinforcePP])
def test_the_kl_stands_in_the_reward_or_in_the_loss(algorithm):
    x, options = Given(), {"kl_coef": 0.1, "missing_eos": "none", "whiten_advantages": False}
    experience, _ = x.experience(algorithm(kl_in="reward", **options))
    close(experience.rewards, padded(x.rewards(COEF)))
    assert experience.kl_coef == 0
    experience, _ = x.experience(algorithm(kl_in="loss", **options))
    close(experience.rewards, padded(x.rewards(0.0)))
    assert experience.kl_coef == COEF


@pytest.mark.parametrize(
    "estimator, form", [("k2", lambda r: r * r / 2), ("k3", lambda r: math.exp(-r) - 1 + r), ("abs", abs)]
)
@pytest.mark.parametrize("algorithm", [PPO, RLOO])
def test_the_estimator_asked_for_is_the_one_in_the_reward(algorithm, estimator, form):
    x = Given()
    experience, _ = x.experience(algorithm(kl_estimator=estimator, missing_eos="none", peer_parity=True))
    close(experience.rewards, padded(x.rewards(COEF, form)))
    assert list(algorithm(kl_estimator=estimator).warnings()) and not list(algorithm().warnings())


def test_the_shaped_score_is_what_enters_the_reward():
    x = Given()
    experience, _ = x.experience(PPO(score_clip=0.5, missing_eos_value=-2.0))
    scores = [s if done else -2.0 for s, done in zip(x.scores.clamp(-0.5, 0.5).tolist(), FINISHED, strict=True)]
    close(experience.rewards, padded(x.rewards(COEF, scores=torch.tensor(scores))), 1e-6)


# ---------------------------------------------------------------------------------------------------------- advantages


def of_siblings(totals: list[float], b: int) -> list[float]:
    return [totals[i] for i in ROWS if i // GROUP == b // GROUP]


def test_rloo_compares_with_the_other_answers():
    x = Given()
    totals = [sum(row) for row in x.rewards(COEF)]
    expected = [totals[b] - (sum(of_siblings(totals, b)) - totals[b]) / (GROUP - 1) for b in ROWS]
    experience, _ = x.experience(RLOO(missing_eos="none"))
    close(experience.advantages, over_tokens(expected))
    assert experience.returns is None and experience.values is None


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
@pytest.mark.parametrize("scale_by_std", [True, False])
def test_grpo_compares_with_the_whole_group(scale_by_std, kl_in):
    x = Given()
    totals = [sum(row) for row in x.rewards(COEF if kl_in == "reward" else 0.0)]
    groups = [of_siblings(totals, b) for b in ROWS]
    expected = [
        (totals[b] - statistics.fmean(groups[b])) / (statistics.stdev(groups[b]) + 1e-6 if scale_by_std else 1)
        for b in ROWS
    ]
    experience, _ = x.experience(GRPO(kl_in=kl_in, missing_eos="none", scale_by_std=scale_by_std))
    close(experience.advantages, over_tokens(expected))
    assert experience.returns is None


def test_grpo_weighs_every_response_alike_and_has_its_kl_in_the_loss():
    x, algorithm = Given(), GRPO(missing_eos="none", importance="none")
    batch, _ = x.experience(algorithm)
    loss = algorithm.policy_loss(batch, x.old, None)  # of the old policy: every ratio is 1
    kl = [
        statistics.fmean((x.old[b, t] - x.ref[b, t]).item() ** 2 / 2 for t in range(n)) for b, n in enumerate(LENGTHS)
    ]
    close(loss.total, -batch.advantages[:, 0].sum() + COEF * sum(kl))
    assert loss.count == 6


def test_grpo_of_equal_scores_is_0():
    x = Given()
    x.scores.fill_(0.1)
    experience, _ = x.experience(GRPO(missing_eos="none"))
    assert experience.advantages.abs().max() < 1e-9


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("whiten", [True, False])
def test_reinforce_pp_sums_the_rewards_to_come(whiten, gamma):
    x = Given()
    expected = [
        [sum(gamma ** (j - t) * row[j] for j in range(t, len(row))) for t in range(len(row))] for row in x.rewards(COEF)
    ]
    experience, _ = x.experience(ReinforcePP(missing_eos="none", whiten_advantages=whiten, gamma=gamma))
    close(experience.advantages, whitened(expected)[0] if whiten else padded(expected), 1e-7)
    assert experience.returns is None


@pytest.mark.parametrize("slot", ["on_last_token", "after_eos"])
@pytest.mark.parametrize("whiten", [True, False])
def test_ppo_advantages_returns_and_masks(whiten, slot):
    """Behind the response the score may have a slot of its own: it has a value and a return, but is not whitened."""
    x, after = Given(), int(slot == "after_eos")
    rewards = x.rewards(COEF, after=after)
    values = [x.values[b, : len(row)].tolist() for b, row in enumerate(rewards)]
    advantages = [backwards(r, v, 0.9, 0.8) for r, v in zip(rewards, values, strict=True)]
    algorithm = PPO(missing_eos="none", score_slot=slot, gamma=0.9, gae_lambda=0.8, whiten_advantages=whiten)
    experience, metrics = x.experience(algorithm)
    close(experience.rewards, padded(rewards))
    assert experience.value_mask.sum(1).tolist() == [len(row) for row in rewards]
    assert torch.equal(experience.response_mask, x.mask)
    returns = [[a + v for a, v in zip(*pair, strict=True)] for pair in zip(advantages, values, strict=True)]
    close(experience.returns, padded(returns))
    of_response = [row[:n] for row, n in zip(advantages, LENGTHS, strict=True)]
    close(experience.advantages * x.mask, whitened(of_response)[0] if whiten else padded(of_response), 1e-7)
    errors = [r - v for rs, vs in zip(returns, values, strict=True) for r, v in zip(rs, vs, strict=True)]
    explained = 1 - statistics.pvariance(errors) / statistics.pvariance([r for row in returns for r in row])
    assert metrics["critic/explained_variance"] == (pytest.approx(explained), 1)
    assert metrics["critic/value"] == (pytest.approx(statistics.fmean(v for row in values for v in row)), 1)


@pytest.mark.parametrize("slot", ["on_last_token", "after_eos"])
def test_ppo_whitens_rewards_over_the_slots_that_have_one(slot):
    x = Given()
    rewards = x.rewards(COEF, after=int(slot == "after_eos"))
    every = [r for row in rewards for r in row]
    mean, std = statistics.fmean(every), statistics.pstdev(every)
    experience, _ = x.experience(PPO(missing_eos="none", score_slot=slot, whiten_rewards=True))
    close(experience.rewards, padded([[(r - mean) / std + mean for r in row] for row in rewards]), 1e-6)


def test_the_kl_in_the_loss_is_scaled_as_the_advantages_are():
    x = Given()
    values = [x.values[b, :n].tolist() for b, n in enumerate(LENGTHS)]
    advantages = [backwards(r, v, 1.0, 0.95) for r, v in zip(x.rewards(0.0), values, strict=True)]
    experience, _ = x.experience(PPO(kl_in="loss", missing_eos="none"))
    expected, std = whitened(advantages)
    assert abs(std - 1) > 0.1
    close(experience.advantages, expected, 1e-7)
    assert experience.kl_coef == pytest.approx(COEF / std)


# -------------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize(
    "options, weight",
    [
        ({}, lambda row, t: min(math.exp(row[t]), 2.0)),
        ({"importance_cap": 1.2, "importance_floor": 0.9}, lambda row, t: min(max(math.exp(row[t]), 0.9), 1.2)),
        ({"importance": "icepop", "importance_cap": 1.2}, lambda row, t: math.exp(row[t]) * (math.exp(row[t]) <= 1.2)),
        ({"importance": "sequence"}, lambda row, t: min(math.exp(sum(row)), 2.0)),
    ],
)
def test_importance_of_the_trainer_over_the_sampler(options, weight):
    x = Given()
    gaps = [(x.old[b, :n] - x.rollout[b, :n]).tolist() for b, n in enumerate(LENGTHS)]
    experience, metrics = x.experience(PPO(**options))
    expected = padded([[weight(row, t) for t in range(len(row))] for row in gaps])
    close(experience.weights, expected)
    assert metrics["rollout/importance_weight"] == (pytest.approx(float(expected.sum())), sum(LENGTHS))
    experience, metrics = x.experience(PPO(importance="none"))
    assert experience.weights is None and "rollout/importance_weight" not in metrics


def test_experience_holds_what_the_update_reads():
    x = Given()
    experience, _ = x.experience(PPO())
    for name in ("old", "ref", "rollout"):
        assert getattr(experience, f"{name}_logprobs") is getattr(x, name)
    assert experience.values is x.values
    assert experience.starts.tolist() == PROMPTS
    rollouts = x.scored.rollouts
    for b, (prompt, response) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        tokens = [*rollouts.prompt_ids[b, 4 - prompt :].tolist(), *rollouts.response_ids[b, :response].tolist()]
        assert experience.ids[b, experience.mask[b]].tolist() == tokens
        assert experience.mask[b].tolist() == [t < len(tokens) for t in range(4 + SLOTS)]


def test_metrics_of_the_rollouts():
    x = Given()
    _, metrics = x.experience(PPO(missing_eos="none"))
    kl = [(x.old[b, t] - x.ref[b, t]).item() for b in ROWS for t in range(LENGTHS[b])]
    gap = [abs((x.old[b, t] - x.rollout[b, t]).item()) for b in ROWS for t in range(LENGTHS[b])]
    expected = {
        "objective/score": (sum(x.scores.tolist()), 6),
        "objective/score_std": (statistics.pstdev(x.scores.tolist()), 1),
        "objective/score/gold": (2 * sum(x.scores.tolist()), 6),
        "objective/kl": (sum(kl), 6),
        "objective/kl_per_token": (sum(kl), 20),
        "objective/non_score_reward": (-COEF * sum(kl), 6),
        "rollout/length": (20, 6),
        "rollout/finished": (5, 6),
        "rollout/logprob_gap": (sum(gap), 20),
        "rollout/logprob_gap_max": (max(gap), 1),
    }
    for name, (total, count) in expected.items():
        assert metrics[name] == (pytest.approx(total), count), name


def test_the_state_of_a_run_survives_a_checkpoint():
    algorithm = PPO(adaptive_kl_target=6.0, adaptive_kl_horizon=100.0, normalize_scores=True)
    state = algorithm.start()
    state.kl.update(12.0, 10)
    assert state.kl.value == pytest.approx(0.05 * (1 + 0.2 * 10 / 100))
    Given().experience(algorithm)  # of another state
    assert state.scores.count == 0
    algorithm.shape_scores(Given().scored, state)
    resumed = algorithm.start()
    resumed.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert isinstance(resumed, State) and resumed.state_dict() == state.state_dict()
    assert resumed.kl.value == state.kl.value and resumed.scores.count == 6
    fixed = PPO().start()
    fixed.kl.update(12.0, 10)
    assert fixed.kl.value == 0.05


# -------------------------------------------------------------------------------------------------------------- losses


def summed(terms: list[list[float]], aggregation: str) -> float:
    return sum(sum(row) / (len(row) if aggregation == "sequence_mean_token_mean" else 1) for row in terms)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"])
@pytest.mark.parametrize("importance", ["token", "none"])
def test_policy_loss_by_hand(importance, aggregation):
    """Every part at once: both clips, the dual clip, importance weights, entropy, and the KL in the loss."""
    x = Given()
    batch, _ = x.experience(PPO(kl_in="loss", importance=importance, missing_eos="none"))
    algorithm = PPO(
        clip_range=0.1, clip_range_high=0.3, dual_clip=1.5, ent_coef=0.7, aggregation=aggregation, kl_in="loss",
        kl_estimator="k3+",
    )  # fmt: skip
    g = torch.Generator().manual_seed(5)
    logprobs = (x.old + 0.5 * randn(g, 6, SLOTS)).requires_grad_()
    entropy = randn(g, 6, SLOTS).abs().masked_fill(~x.mask, math.nan)
    loss = algorithm.policy_loss(batch, logprobs, entropy)

    surrogate, bonus, kl, dual = [], [], [], 0
    for b, n in enumerate(LENGTHS):
        surrogate.append([])
        kl.append([])
        bonus.append(entropy[b, :n].tolist())
        for t in range(n):
            a, rho = batch.advantages[b, t].item(), math.exp((logprobs[b, t] - x.old[b, t]).item())
            r = (logprobs[b, t] - x.ref[b, t]).item()
            weight = min(math.exp((x.old[b, t] - x.rollout[b, t]).item()), 2.0) if importance == "token" else 1.0
            term = max(-a * rho, -a * min(max(rho, 0.9), 1.3))
            dual += a < 0 and term > -1.5 * a
            surrogate[-1].append(weight * (min(term, -1.5 * a) if a < 0 else term))
            kl[-1].append(weight * rho * (math.exp(-r) - 1 + r))
    expected = summed(surrogate, aggregation) - 0.7 * summed(bonus, aggregation)
    assert dual and batch.kl_coef > 0
    close(loss.total.detach(), expected + batch.kl_coef * summed(kl, aggregation))
    count = 20 if aggregation == "token_mean" else 6
    assert loss.count == count == algorithm.policy_count(x.mask)
    assert loss.metrics["policy/kl_loss"] == (pytest.approx(summed(kl, aggregation)), count)
    assert loss.metrics["policy/loss"] == (pytest.approx(summed(surrogate, aggregation)), count)
    loss.total.backward()
    assert logprobs.grad.isfinite().all()


@pytest.mark.parametrize("algorithm", [PPO, RLOO, GRPO, ReinforcePP])
@pytest.mark.parametrize("estimator", KL_IN_LOSS)
def test_every_estimator_of_the_loss_has_an_experience(estimator, algorithm):
    x = Given()
    batch, _ = x.experience(algorithm(kl_in="loss", kl_estimator=estimator, missing_eos="none"))
    close(batch.rewards, padded(x.rewards(0.0)))


def test_policy_loss_without_extras_is_the_surrogate():
    x = Given()
    algorithm = RLOO(importance="none")
    batch, _ = x.experience(algorithm)
    loss = algorithm.policy_loss(batch, batch.old_logprobs.clone(), None)
    close(loss.total, -(batch.advantages * x.mask).sum())
    assert "policy/kl_loss" not in loss.metrics


@pytest.mark.parametrize("slot, count", [("on_last_token", 20), ("after_eos", 24)])
def test_critic_loss_covers_the_slots_that_have_a_value(slot, count):
    x = Given()
    algorithm = PPO(score_slot=slot, vf_coef=0.3, value_clip_range=0.4)
    batch, _ = x.experience(algorithm)
    values = (x.values + randn(torch.Generator().manual_seed(2), 6, SLOTS)).requires_grad_()
    loss = algorithm.critic_loss(batch, values)
    expected = 0.0
    for b, n in enumerate(LENGTHS):
        for t in range(min(n + (slot == "after_eos"), SLOTS)):
            v, old, target = values[b, t].item(), x.values[b, t].item(), batch.returns[b, t].item()
            near = old + min(max(v - old, -0.4), 0.4)
            expected += 0.5 * max((v - target) ** 2, (near - target) ** 2)
    close(loss.total.detach(), 0.3 * expected)
    assert loss.count == count
    assert loss.metrics["critic/loss"] == (pytest.approx(expected), count)


def test_a_minibatch_is_a_selection_of_rows():
    """The parts of a batch add up to the batch, and every field that has rows is cut."""
    x = Given()
    algorithm = PPO(kl_in="loss", score_slot="after_eos")
    batch, _ = x.experience(algorithm)
    logprobs = x.old + 0.3
    whole = algorithm.policy_loss(batch, logprobs, None)
    parts = [torch.tensor([4, 0]), torch.tensor([1, 5, 2]), torch.tensor([3])]
    cuts: list[Experience] = [batch.select(rows) for rows in parts]
    losses = [algorithm.policy_loss(cut, logprobs[rows], None) for cut, rows in zip(cuts, parts, strict=True)]
    close(sum(loss.total for loss in losses), whole.total)
    assert sum(loss.count for loss in losses) == whole.count
    values = [algorithm.critic_loss(cut, x.values[rows]).total for cut, rows in zip(cuts, parts, strict=True)]
    close(sum(values), algorithm.critic_loss(batch, x.values).total)
    assert all(cut.kl_coef == batch.kl_coef for cut in cuts)
