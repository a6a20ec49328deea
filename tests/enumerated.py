"""The enumerated environment of spec tests 49 and 49b, trained by alignkit's own loop code.

Vocabulary 8, token 0 ends a response, at most 3 tokens: 400 responses, so that every expectation is an exact sum and the
best achievable objective is known. Policy and critic are tables with a row for each of the 73 prefixes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from alignkit.algorithms import functional as F
from alignkit.core.types import Rollouts, ScoredRollouts
from alignkit.stages import ppo as stage
from alignkit.training.engine import Optimizer, World

V, T = 8, 3
WORLD = World(0, 1, 0, torch.device("cpu"))


@dataclass
class Env:
    """Reference logits [73, 8], and the score of a response: token_score of each token plus table_score of all three."""

    ref_logits: torch.Tensor
    token_score: torch.Tensor
    table_score: torch.Tensor

    @classmethod
    def of(cls, case: dict) -> Env:
        names = ("ref_logits_by_prefix", "token_score", "table_score")
        return cls(*(torch.tensor(case[name], dtype=torch.float64) for name in names))

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(responses [400, 3] with 0 behind the end, mask [400, 3])."""
        rows = {}
        for y in itertools.product(range(V), repeat=T):
            n = y.index(0) + 1 if 0 in y else T
            rows[y[:n] + (0,) * (T - n)] = n
        ids = torch.tensor(list(rows))
        return ids, torch.arange(T) < torch.tensor(list(rows.values()))[:, None]

    def score(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ids = ids.masked_fill(~mask, 0)
        return (self.token_score[ids] * mask).sum(1) + self.table_score[ids[:, 0], ids[:, 1], ids[:, 2]]

    def sample(self, policy: torch.Tensor, rows: int, temperature: float, generator: torch.Generator) -> Rollouts:
        """`rows` responses from softmax(policy / temperature)."""
        law = (policy.detach() / temperature).log_softmax(-1)
        ids, logprobs = torch.zeros(rows, T, dtype=torch.long), torch.zeros(rows, T)
        for t in range(T):
            at = law[prefixes(ids)[:, t]]
            ids[:, t] = torch.multinomial(at.exp(), 1, generator=generator).squeeze(1)
            logprobs[:, t] = at.gather(1, ids[:, t : t + 1]).squeeze(1)
        ids, mask, finished = F.truncate_at_stop(ids, [0], pad_id=V)
        one = torch.ones(rows, 1, dtype=torch.long)
        return Rollouts(one, one.bool(), ids.masked_fill(~mask, 0), mask, logprobs * mask, finished, [{}] * rows, 1)

    def judge(self, logits: torch.Tensor, beta: float, temperature: float) -> float:
        """The fraction of the achievable improvement of E[score] - beta KL, exact."""
        ids, mask = self.leaves()
        scores, ref = self.score(ids, mask), leaf_logprobs(self.ref_logits / temperature, ids, mask)
        policy = leaf_logprobs(logits.double() / temperature, ids, mask)
        assert torch.isclose(ref.exp().sum(), torch.ones((), dtype=torch.float64))
        reached = (policy.exp() * (scores - beta * (policy - ref))).sum()
        base, best = (ref.exp() * scores).sum(), beta * (ref + scores / beta).logsumexp(0)
        return float((reached - base) / (best - base))


def prefixes(ids: torch.Tensor) -> torch.Tensor:
    """[B, 3] i64: the table row that predicts each token."""
    first, second = 1 + ids[:, 0], 9 + 8 * ids[:, 0] + ids[:, 1]
    return torch.stack([torch.zeros_like(first), first, second], 1)


def leaf_logprobs(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[N]: log-probs of whole responses."""
    at = logits.log_softmax(-1)[prefixes(ids)].gather(2, ids.unsqueeze(2)).squeeze(2)
    return (at * mask).sum(1)


class Tables(nn.Module):
    """Policy, reference and critic as tables, with the interface of `models.make_roles`."""

    def __init__(self, ref_logits: torch.Tensor, prefixes=prefixes) -> None:
        super().__init__()
        self.policy = nn.Parameter(ref_logits.float().clone())
        self.critic = nn.Parameter(torch.zeros(len(ref_logits)))
        self.register_buffer("ref_policy", ref_logits.float().clone())
        self.prefixes = prefixes
        self.role_of = {"policy": 0, "ref_policy": 1, "critic": 2}
        self.ref_temperature: float | None = None  # a planted fault: another temperature for the reference
        self.policy_temperature: float | None = None

    def shared(self, ids, mask):
        return None

    def forward(self, role, ids, mask, starts, response_slots, temperature=1.0, entropy=False, lower=None):
        slots = max(response_slots, 2) if len(self.critic) > 1 else response_slots
        at = (starts[:, None] + torch.arange(slots)).clamp(max=ids.shape[1] - 1)
        tokens = ids.gather(1, at)
        states = self.prefixes(tokens)[:, :response_slots]
        if role == "critic":
            return self.critic[states]
        temperature = (self.ref_temperature if role == "ref_policy" else self.policy_temperature) or temperature
        logits = getattr(self, role)[states]
        logprobs = F.response_logprobs(logits, tokens[:, :response_slots], temperature)
        return logprobs, (F.entropy(logits, temperature) if entropy else None), None


class PlainEngine:
    """`engine.Engine` on one process without DeepSpeed, for a table of 73 rows."""

    def __init__(self, module: nn.Module, parameter: nn.Parameter, optimizer: Optimizer, updates: int) -> None:
        self.module, self.schedule, self.updates, self.update = module, optimizer, updates, 0
        self.adam = optimizer.build([parameter])

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def backward(self, losses, last):
        sum(loss.total / max(count, 1.0) for loss, count in losses).backward()

    def step(self):
        self.adam.step()
        self.discard()
        return 0.0

    def discard(self):
        self.adam.zero_grad()

    def next_update(self):
        self.update += 1
        for group in self.adam.param_groups:
            group["lr"] = self.schedule.learning_rate * self.schedule.factor(
                min(self.update, self.updates - 1), self.updates
            )


@dataclass
class Bandit:
    """One state, five actions, one token a response."""

    ref: torch.Tensor
    rewards: torch.Tensor

    def score(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.rewards[ids[:, 0]]

    def sample(self, policy: torch.Tensor, rows: int, temperature: float, generator: torch.Generator) -> Rollouts:
        law = (policy.detach()[0] / temperature).log_softmax(-1)
        ids = torch.multinomial(law.exp(), rows, replacement=True, generator=generator)[:, None]
        one = torch.ones(rows, 1, dtype=torch.long)
        done = torch.ones(rows, dtype=torch.bool)
        return Rollouts(one, one.bool(), ids, one.bool(), law[ids[:, 0]][:, None], done, [{}] * rows, 1)

    def tables(self) -> Tables:
        """The same tables with one row: every prefix is the empty one."""
        return Tables(self.ref.log()[None], prefixes=torch.zeros_like)


def train(
    env, algorithm, *, temperature=1.0, seed=0, rounds=250, rows=512, rate=0.05, group_size=1, tables=None
) -> torch.Tensor:
    """The policy's table after `rounds` rounds of alignkit's forward, experience and update."""
    torch.manual_seed(seed)
    roles = tables or Tables(env.ref_logits)
    if not algorithm.needs_critic:
        del roles.role_of["critic"]
    optimizer = Optimizer(learning_rate=rate, schedule="linear")
    engines = {
        role: PlainEngine(roles, getattr(roles, role), optimizer, rounds)
        for role in ("policy", "critic")
        if role in roles.role_of
    }
    cfg = SimpleNamespace(
        algorithm=algorithm, rollout=SimpleNamespace(temperature=temperature), mini_batch_size=rows,
        micro_batch_size=rows, keep_shared_states=False, ptx=None,
    )  # fmt: skip
    state, generator = algorithm.start(), torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        rollouts = env.sample(roles.policy, rows, temperature, generator)
        scores = env.score(rollouts.response_ids, rollouts.response_mask).float()
        seen = stage.forward(cfg, roles, rollouts)
        experience, _ = algorithm.experience(
            ScoredRollouts(rollouts, scores), seen["policy"], seen["ref_policy"], seen.get("critic"), state, group_size
        )
        stage.update(cfg, roles, engines, experience, WORLD, generator, list(engines))
        for engine in engines.values():
            engine.next_update()
    return roles.policy.detach()
