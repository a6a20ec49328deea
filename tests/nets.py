"""Two-layer language models with learned and with rotary positions, rollouts for them, and the rounds of PPO on both."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import torch

from alignkit.core.types import Experience, ModelSource, Rollouts, ScoredRollouts
from alignkit.finetune.critic import Critic
from alignkit.finetune.full import Full
from alignkit.models.config import Model
from alignkit.stages import ppo as stage
from alignkit.training import batches
from alignkit.training.engine import Optimizer, World

VOCAB, HIDDEN = 97, 32
STYLES = ("gpt2", "llama")
ONE = World(0, 1, 0, torch.device("cpu"))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def language_model(style: str, seed: int = 0, vocab: int = VOCAB, dropout: float = 0.0):
    """Weights of 0.3, not transformers' 0.02: a law over tokens that is far from uniform, and depends on positions."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": vocab, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 0}
    torch.manual_seed(seed)
    if style == "gpt2":
        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        return GPT2LMHeadModel(GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, **shape, **off))
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**shape, **sizes, **more, attention_dropout=dropout))


def save_model(folder: Path, style: str, **options) -> Path:
    language_model(style, **options).save_pretrained(folder)
    return folder


def full_roles(folder: Path, critic: Critic | None = None, vocab: int = VOCAB, dtype=torch.float64):
    """Policy, critic and reference as models of their own; the policy a little off the reference."""
    roles = Full().roles(Model(), ModelSource(str(folder)), None, vocab, critic, seed=0).to(dtype).eval()
    noise = generator(1)
    with torch.no_grad():
        for parameter in roles.model("policy").parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise, dtype=dtype))
    return roles


def make_rollouts(rows: int, seed: int = 0, slots: int = 9, prompt_slots: int = 7, empty: tuple[int, ...] = ()):
    """Prompts of 1 to `prompt_slots` tokens with responses of 1 to `slots`; rubbish where there is padding."""
    g = generator(seed)
    prompts = torch.randint(1, prompt_slots + 1, (rows,), generator=g)
    responses = torch.randint(1, slots + 1, (rows,), generator=g)
    responses[list(empty)] = 0
    mask = torch.arange(slots) < responses[:, None]
    return Rollouts(
        prompt_ids=torch.randint(VOCAB, (rows, prompt_slots), generator=g),
        prompt_mask=torch.arange(prompt_slots) >= prompt_slots - prompts[:, None],
        response_ids=torch.randint(VOCAB, (rows, slots), generator=g),
        response_mask=mask,
        rollout_logprobs=-5 * torch.rand(rows, slots, generator=g) * mask,
        finished=torch.rand(rows, generator=g) < 0.7,
        meta=[{}] * rows,
        policy_version=1,
    )


def make_config(algorithm, micro: int = 4, mini: int = 10**6, temperature: float = 1.0, **options) -> SimpleNamespace:
    """What `stages.ppo` reads of its config."""
    given = {"mini_batch_size": mini, "micro_batch_size": micro, "keep_shared_states": False, "ptx": None} | options
    return SimpleNamespace(algorithm=algorithm, rollout=SimpleNamespace(temperature=temperature), **given)


def make_experience(cfg, roles, rollouts: Rollouts, group_size: int = 1, noise: float = 0.2) -> Experience:
    """Experience with random scores, its old log-probs and values off by `noise`: the clips have something to do."""
    g = generator(7)
    scores = torch.randn(len(rollouts.meta), generator=g, dtype=torch.float64)
    seen = stage.forward(cfg, roles, rollouts)
    for name in {"policy", "critic"} & seen.keys():
        seen[name] = seen[name] + noise * torch.randn(seen[name].shape, generator=g, dtype=seen[name].dtype)
    experience, _ = cfg.algorithm.experience(
        ScoredRollouts(rollouts, scores), seen["policy"], seen["ref_policy"], seen.get("critic"),
        cfg.algorithm.start(), group_size,
    )  # fmt: skip
    experience.shared_states = seen.get("shared_states")
    return experience


class SGD(Optimizer):
    """Plain gradient descent: Adam would turn rounding where a gradient is 0 into whole steps."""

    def build(self, parameters):
        return torch.optim.SGD(parameters, lr=self.learning_rate)


class TorchEngine:
    """`engine.Engine` on one process without DeepSpeed; keeps every forward's ids and every step's gradient."""

    def __init__(self, module, parameters, optimizer: Optimizer, updates: int = 1) -> None:
        self.module, self.parameters, self.optimizer = module, parameters, optimizer.build(parameters)
        self.rate, self.clip, self.update, self.updates = optimizer.learning_rate, optimizer.max_grad_norm, 0, updates
        self.forwards: list[torch.Tensor] = []
        self.gradients: list[list[torch.Tensor]] = []

    def __call__(self, role, ids, *args, **kwargs):
        self.forwards.append(ids)
        return self.module(role, ids, *args, **kwargs)

    def backward(self, losses, last):
        sum(loss.total / max(count, 1.0) for loss, count in losses).backward()

    def step(self) -> float:
        self.gradients.append([p.grad.clone() for p in self.parameters if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip or math.inf)
        self.optimizer.step()
        self.discard()
        return float(norm)

    def discard(self) -> None:
        self.optimizer.zero_grad()

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def next_update(self) -> None:
        self.at_update(self.update + 1)

    def at_update(self, update: int) -> None:
        self.update = update
        self.optimizer.param_groups[0]["lr"] = self.rate * max(1, self.updates - self.update) / self.updates


def torch_engines(roles, finetune=None, rate: float = 0.1, updates: int = 1, clips=None) -> dict[str, TorchEngine]:
    """An engine for each role that trains; gradients are clipped to norm `clips[role]`, and by default not at all."""
    parameters = {role: (finetune or Full()).parameters(roles, role) for role in ("policy", "critic")}
    optimizers = {role: SGD(rate, max_grad_norm=(clips or {}).get(role, 0.0)) for role in parameters}
    return {role: TorchEngine(roles, own, optimizers[role], updates) for role, own in parameters.items() if own}


def weights(roles) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in roles.state_dict().items()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between two states of a module."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def play(cfg, roles, engines, world: World, rows: int, group_size: int, rounds: int) -> dict:
    """Rounds of PPO as `stages.ppo.main` has them, on given rollouts: what came of them.

    A forward takes one row at a time, so that what the ranks bring is that of a single one to the last bit.
    """
    state, shuffle = cfg.algorithm.start(), generator(0)
    found: dict = {"metrics": [], "kl": [], "scores": [], "rates": []}
    mine = torch.arange(rows).view(-1, group_size)[world.rank :: world.size].flatten()
    for number in range(rounds):
        share = make_rollouts(rows, seed=number).select(mine)
        longest = int(share.prompt_mask.sum(1).max())
        share.prompt_ids, share.prompt_mask = share.prompt_ids[:, -longest:], share.prompt_mask[:, -longest:]
        scores = torch.randn(rows, generator=generator(100 + number), dtype=torch.float64)[mine]
        seen = stage.forward(SimpleNamespace(**{**vars(cfg), "micro_batch_size": 1}), roles, share)
        scored, seen = batches.gather(world, group_size, 0, ScoredRollouts(share, scores), seen)
        experience, metrics = cfg.algorithm.experience(
            scored, seen["policy"], seen["ref_policy"], seen["critic"], state, group_size
        )
        found["metrics"].append(stage.update(cfg, roles, engines, experience, world, shuffle, list(engines)))
        found["rates"].append([engine.learning_rate for engine in engines.values()])
        for engine in engines.values():
            engine.next_update()
        state.kl.update(metrics["objective/kl"][0] / metrics["objective/kl"][1], rows)
        found["kl"].append(state.kl.value)
        found["scores"].append(state.scores.state_dict())
    return found | {"weights": weights(roles)}
