"""One optimizer step and one round of `stages.ppo` on real models: what may not change it, and how often it happens.

The number in a test's name is its number in the list of correctness tests. Gradient descent in float64, so that
equal means equal to rounding.
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import (
    ONE,
    STYLES,
    VOCAB,
    distance,
    full_roles,
    generator,
    make_config,
    make_experience,
    make_rollouts,
    save_model,
    torch_engines,
    weights,
)
from tiny import tiny_tokenizer

from alignkit.algorithms import functional as F
from alignkit.algorithms.grpo import GRPO
from alignkit.algorithms.ppo import PPO
from alignkit.algorithms.reinforce_pp import ReinforcePP
from alignkit.core.types import ModelSource
from alignkit.data.dataset import Data, Ptx
from alignkit.finetune.critic import Critic
from alignkit.finetune.full import Full
from alignkit.finetune.lora import LoRA
from alignkit.models.config import Model
from alignkit.stages import ppo as stage
from alignkit.stages.ptx import PtxBatches
from alignkit.training import batches
from alignkit.training.engine import Optimizer

ROWS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {style: save_model(tmp_path_factory.mktemp(style), style) for style in STYLES}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stretched(experience, more: int = 3):
    """The same experience in longer rows, with rubbish wherever a mask is off."""
    tensors = {n: x for n, x in vars(experience).items() if isinstance(x, torch.Tensor) and n != "starts"}
    long = {n: torch.nn.functional.pad(x, (0, more)) for n, x in tensors.items()}
    valid = long["value_mask"] | long["response_mask"]
    long |= {n: x.masked_fill(~valid, 1e30) for n, x in long.items() if x.is_floating_point()}
    rubbish = torch.randint(VOCAB, long["ids"].shape, generator=generator(3))
    return replace(experience, **long | {"ids": torch.where(long["mask"], long["ids"], rubbish)})


def three_steps(folder, algorithm, change=lambda x: x, micro=4, critic="separate", group_size=1):
    """(metrics of three optimizer steps, weights before, weights after, forwards of the policy)."""
    roles = full_roles(folder, Critic(critic, head="random") if algorithm.needs_critic else None)
    experience = make_experience(make_config(algorithm, ROWS), roles, make_rollouts(ROWS), group_size)
    before, engines, cfg = weights(roles), torch_engines(roles), make_config(algorithm, micro)
    metrics = [stage.optimize(cfg, roles, engines, change(experience), ONE) for _ in range(3)]
    assert all(taken for _, taken in metrics)
    return [numbers for numbers, _ in metrics], before, weights(roles), engines["policy"].forwards


CHANGES = {
    "a row at a time": {"micro": 1},
    "two rows": {"micro": 2},
    "another order": {"change": lambda e: e.select(torch.randperm(ROWS, generator=generator(5)))},
    "more padding": {"change": stretched, "micro": 3},
}
ALGORITHMS = {
    "ppo": (PPO(ent_coef=0.1), {}),
    "ppo on a trunk, score behind the end": (PPO(score_slot="after_eos", importance="sequence"), {"critic": "trunk"}),
    "KL in the loss, no critic": (ReinforcePP(kl_in="loss", aggregation="sequence_mean_token_sum"), {}),
    "grpo": (GRPO(), {"group_size": 4}),
}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("style", STYLES)
def test_a_step_does_not_depend_on_micro_batches_order_or_padding(folders, style, name):
    algorithm, options = ALGORITHMS[name]
    metrics, before, after, forwards = three_steps(folders[style], algorithm, **options)
    assert distance(before, after) > 1e-3 and len(forwards) < 3 * ROWS
    for how, changed in CHANGES.items():
        other_metrics, _, other, other_forwards = three_steps(folders[style], algorithm, **options, **changed)
        assert len(other_forwards) == 3 * ROWS or how != "a row at a time"
        assert distance(after, other) <= 1e-10, how
        for ours, theirs in zip(metrics, other_metrics, strict=True):
            for key in ours.keys() - {"update/padding_fraction"}:
                assert theirs[key] == pytest.approx(ours[key], abs=1e-10), (how, key)


def test_the_loss_is_that_of_the_whole_batch(folders):
    """Against the surrogate, the value loss and the entropy written down, with plain autograd and one forward."""
    roles = full_roles(folders["gpt2"], Critic(head="random"))
    algorithm = PPO(ent_coef=0.1, vf_coef=0.5)
    x = make_experience(make_config(algorithm, ROWS), roles, make_rollouts(ROWS))
    engines = torch_engines(roles)
    metrics, _ = stage.optimize(make_config(algorithm, 3), roles, engines, x, ONE)

    fresh = full_roles(folders["gpt2"], Critic(head="random"))
    hf, m = fresh.model("policy"), x.response_mask
    position = (x.mask.cumsum(1) - 1).clamp(min=0)
    states = [
        body(input_ids=x.ids, attention_mask=x.mask.long(), position_ids=position).last_hidden_state
        for body in (hf.transformer, fresh.model("critic").transformer)
    ]
    at = (x.starts[:, None] + torch.arange(m.shape[1])).clamp(max=x.ids.shape[1] - 1)
    policy, critic = (s.gather(1, (at - 1)[..., None].expand(-1, -1, s.shape[2])) for s in states)
    law = hf.lm_head(policy).log_softmax(-1)
    ratio = (law.gather(2, x.ids.gather(1, at)[..., None])[..., 0] - x.old_logprobs).exp()
    surrogate = torch.minimum(x.advantages * ratio, x.advantages * ratio.clamp(0.8, 1.2)) * x.weights
    entropy = -(law.exp() * law).sum(-1)
    values = fresh.heads["critic"](critic)
    near = x.values + (values - x.values).clamp(-0.2, 0.2)
    errors = torch.maximum((values - x.returns) ** 2, (near - x.returns) ** 2)
    (-(surrogate + 0.1 * entropy)[m].mean() + 0.5 * 0.5 * errors[m].mean()).backward()
    assert metrics["policy/ratio_max"] == pytest.approx(ratio[m].max().item(), abs=1e-10)
    assert metrics["policy/ratio_gap_max"] == pytest.approx((ratio - 1)[m].abs().max().item(), abs=1e-10)
    for role, engine in engines.items():
        expected = [p.grad for p in Full().parameters(fresh, role) if p.grad is not None]
        assert sum(g.abs().sum() for g in expected) > 1
        for ours, theirs in zip(engine.gradients[0], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mini, micro, steps", [(12, 4, 1), (8, 8, 2), (5, 2, 3), (1, 1, 12)])
def test_a_round_has_epochs_times_minibatches_steps(folders, mini, micro, steps):
    """The last minibatch may be a part: it is a step of its own, and no row of it goes elsewhere or nowhere."""
    algorithm = PPO(ppo_epochs=3)
    roles = full_roles(folders["gpt2"], Critic())
    rollouts = make_rollouts(ROWS)
    rollouts.prompt_ids[:] = torch.arange(ROWS)[:, None]  # names the row
    experience = make_experience(make_config(algorithm, ROWS), roles, rollouts)
    engines = torch_engines(roles)
    numbers = stage.update(
        make_config(algorithm, micro, mini), roles, engines, experience, ONE, generator(0), ["policy", "critic"]
    )
    assert numbers["update/steps"] == 3 * steps and numbers["update/early_stop"] == 0
    for engine in engines.values():
        assert len(engine.gradients) == 3 * steps
        rows = torch.cat([ids[:, 0] for ids in engine.forwards]).tolist()
        assert [sorted(rows[e * ROWS : (e + 1) * ROWS]) for e in range(3)] == [list(range(ROWS))] * 3
        assert rows[:ROWS] != rows[ROWS : 2 * ROWS]  # in another order
        assert max(map(len, engine.forwards)) <= micro


def test_every_step_holds_the_gradient_of_its_own_rows(folders):
    """Ten rows in minibatches of 8, micro-batches of 4: the second step is the mean over the last two rows' tokens."""
    algorithm = PPO()
    roles = full_roles(folders["gpt2"], Critic())
    experience = make_experience(make_config(algorithm, ROWS), roles, make_rollouts(10))
    engines = torch_engines(roles, rate=0.0)
    stage.update(make_config(algorithm, 4, 8), roles, engines, experience, ONE, generator(0), ["policy", "critic"])
    order = torch.randperm(10, generator=generator(0))
    for number, rows in enumerate((order[:8], order[8:])):
        alone = torch_engines(roles, rate=0.0)
        stage.optimize(make_config(algorithm, 10), roles, alone, experience.select(rows), ONE)
        for role, engine in engines.items():
            for ours, theirs in zip(engine.gradients[number], alone[role].gradients[0], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"])
@pytest.mark.parametrize("slot", ["on_last_token", "after_eos"])
def test_a_row_without_a_response_adds_nothing(folders, aggregation, micro, slot):
    algorithm = PPO(ent_coef=0.1, aggregation=aggregation, score_slot=slot, whiten_advantages=False)
    found = []
    for keep in (range(ROWS), [row for row in range(ROWS) if row not in (0, 5)]):
        roles = full_roles(folders["gpt2"], Critic(head="random"))
        rollouts = make_rollouts(ROWS, empty=(0, 5))
        experience = make_experience(make_config(algorithm, ROWS), roles, rollouts).select(torch.tensor(list(keep)))
        engines = torch_engines(roles)
        metrics, _ = stage.optimize(make_config(algorithm, micro), roles, engines, experience, ONE)
        found.append((metrics, weights(roles)))
    (metrics, after), (expected, without) = found
    assert distance(after, without) <= 1e-12
    for name in expected.keys() - {"update/padding_fraction"}:
        assert metrics[name] == pytest.approx(expected[name], abs=1e-12), name


def test_a_step_without_a_token_moves_nothing(folders):
    roles = full_roles(folders["gpt2"], Critic(head="random"))
    experience = make_experience(make_config(PPO(), 4), roles, make_rollouts(3, empty=(0, 1, 2)))
    before, engines = weights(roles), torch_engines(roles)
    stage.optimize(make_config(PPO(), 2), roles, engines, experience, ONE)
    assert distance(before, weights(roles)) == 0


def start_of(folder, kind):
    if kind == "full":
        return full_roles(folder, Critic(), dtype=torch.float32), Full()
    lora = LoRA(rank=4)
    roles = lora.roles(Model(), ModelSource(str(folder)), None, VOCAB, Critic(), seed=0)
    return roles, lora


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("style", STYLES)
def test_the_first_minibatch_has_ratio_1(folders, style, kind):
    """The same rows in the same micro-batches, and the round's own first minibatch in others; in train mode."""
    roles, finetune = start_of(folders[style], kind)
    algorithm = PPO(kl_coef=0.0)
    experience = make_experience(make_config(algorithm, 4, temperature=0.7), roles, make_rollouts(ROWS), noise=0)
    engines = torch_engines(roles.train(), finetune, rate=0.0)
    same, _ = stage.optimize(make_config(algorithm, 4, temperature=0.7), roles, engines, experience, ONE)
    cfg = make_config(algorithm, 3, ROWS // 2, temperature=0.7)
    other = stage.update(cfg, roles, engines, experience, ONE, generator(0), ["policy", "critic"])
    for numbers, name, bound in ((same, "ratio_gap_max", 1e-6), (other, "first_ratio_gap_max", 1e-4)):
        assert numbers[f"policy/{name}"] <= bound and abs(numbers["policy/ratio"] - 1) <= bound
        assert numbers["policy/clip_fraction"] == 0 and numbers["policy/approx_kl"] < 1e-9
        assert numbers["critic/clip_fraction"] == 0


def test_one_temperature_for_policy_old_reference_and_entropy(folders, monkeypatch):
    seen: list[tuple[str, float]] = []
    for name in ("response_logprobs", "entropy"):
        original = getattr(F, name)

        def spy(*args, name=name, original=original, temperature=1.0):
            seen.append((name, args[-1] if isinstance(args[-1], float) else temperature))
            return original(*args, **({} if isinstance(args[-1], float) else {"temperature": temperature}))

        monkeypatch.setattr(F, name, spy)
    roles = full_roles(folders["gpt2"], Critic())
    rollouts, cfg = make_rollouts(1), make_config(PPO(ent_coef=0.1), 4, temperature=0.7)
    experience = make_experience(cfg, roles, rollouts)
    assert sorted(seen) == [("entropy", 0.7)] + [("response_logprobs", 0.7)] * 2  # of the policy, and of the reference
    seen.clear()
    stage.optimize(cfg, roles, torch_engines(roles), experience, ONE)
    assert sorted(seen) == [("entropy", 0.7), ("response_logprobs", 0.7)]


# ---------------------------------------------------------------------------------- 45: the language-model loss beside


@pytest.fixture(scope="module")
def ptx_parts(tmp_path_factory):
    """(folder of a GPT-2 of the tokenizer's vocabulary, its tokenizer, config of ptx, rows)."""
    root = tmp_path_factory.mktemp("ptx")
    tokenizer = tiny_tokenizer(root)
    rows = [{"prompt": f"Hello {'day ' * i}?", "completion": "yes " * (7 - i) + "good"} for i in range(6)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = save_model(root / "model", "gpt2", vocab=len(tokenizer))
    return folder, tokenizer, Ptx(coef=27.8, data=Data(path=str(root / "rows.jsonl")), mini_batch_size=6, max_length=60)


def step_gradient(ptx_parts, rows, ppo: bool, ptx: bool, micro=2):
    """The policy's gradient of one optimizer step; without PPO all advantages are 0."""
    folder, tokenizer, config = ptx_parts
    roles = full_roles(folder, Critic(), vocab=len(tokenizer))
    cfg = make_config(PPO(), micro, ptx=config, seed=0)
    experience = make_experience(cfg, roles, make_rollouts(rows, seed=rows))
    experience.advantages *= ppo
    engines = torch_engines(roles)
    extra = PtxBatches(cfg, tokenizer, SimpleNamespace(note=lambda line: None)) if ptx else None
    metrics, _ = stage.optimize(cfg, roles, engines, experience, ONE, extra)
    return torch.cat([g.flatten() for g in engines["policy"].gradients[0]]), metrics


def test_the_gradients_add_up_and_ptx_has_a_denominator_of_its_own(ptx_parts):
    """The ptx gradient alone is that of torch's mean cross-entropy; it is the same beside 3 rows of PPO and 9."""
    folder, tokenizer, config = ptx_parts
    roles = full_roles(folder, Critic(), vocab=len(tokenizer))
    drawn = PtxBatches(make_config(PPO(), ptx=config, seed=0), tokenizer, SimpleNamespace(note=lambda line: None)).rows
    longest = max(len(row["input_ids"]) for row in drawn)
    pad = [longest - len(row["input_ids"]) for row in drawn]
    ids = torch.tensor([row["input_ids"] + [0] * n for row, n in zip(drawn, pad, strict=True)])
    counted = torch.tensor([row["completion_mask"] + [0] * n for row, n in zip(drawn, pad, strict=True)]).bool()
    mask = torch.tensor([[1] * (longest - n) + [0] * n for n in pad])
    logits = roles.model("policy")(input_ids=ids, attention_mask=mask).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1][counted[:, 1:]], ids[:, 1:][counted[:, 1:]])
    loss.backward()
    expected = 27.8 * torch.cat([p.grad.flatten() for p in roles.model("policy").parameters()])
    for rows, micro in ((3, 2), (9, 4)):
        ptx, metrics = step_gradient(ptx_parts, rows, ppo=False, ptx=True, micro=micro)
        ppo, _ = step_gradient(ptx_parts, rows, ppo=True, ptx=False, micro=micro)
        both, _ = step_gradient(ptx_parts, rows, ppo=True, ptx=True, micro=micro)
        assert ppo.abs().max() > 1e-3
        torch.testing.assert_close(ptx, expected, rtol=0, atol=1e-8)
        torch.testing.assert_close(both, ppo + ptx, rtol=0, atol=1e-8)
        assert metrics["policy/ptx_loss"] == pytest.approx(loss.item(), abs=1e-10)


# ------------------------------------------------------------------------------- 46, 47: the optimizer, an early stop


def test_adams_first_step_has_eps_1e_5_beside_the_root():
    """theta - lr g / (|g| + eps): the bias corrections cancel in the first step."""
    g = torch.tensor([1.0, 1e-3, 1e-5, -1e-6, 0.0], dtype=torch.float64)
    parameter = torch.nn.Parameter(torch.ones_like(g))
    parameter.grad = g.clone()
    Optimizer(learning_rate=0.5).build([parameter]).step()
    torch.testing.assert_close(parameter.detach(), 1 - 0.5 * g / (g.abs() + 1e-5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("total", [1, 4, 10])
def test_schedules(total):
    linear = [Optimizer(schedule="linear").factor(step, total) for step in range(total)]
    assert linear == pytest.approx([1 - (u - 1) / total for u in range(1, total + 1)], abs=1e-15) and linear[-1] > 0
    cosine = [Optimizer(schedule="cosine").factor(step, total) for step in range(total)]
    expected = torch.optim.lr_scheduler.CosineAnnealingLR(
        Optimizer(1.0).build([torch.nn.Parameter(torch.ones(1))]), total
    )
    for value in cosine:
        assert value == pytest.approx(expected.get_last_lr()[0], abs=1e-12)
        expected.optimizer.step()
        expected.step()
    assert {Optimizer(schedule="constant").factor(step, total) for step in range(total)} == {1.0}
    warm = [Optimizer(schedule="linear", warmup_steps=2).factor(step, total + 2) for step in range(total + 2)]
    assert warm == pytest.approx([0.5, 1.0, *linear], abs=1e-15)


def test_after_an_early_stop_nothing_moves_and_nothing_is_left_over(folders):
    """The minibatch that is discarded might as well not have been computed: this round and the next come out alike."""
    roles = full_roles(folders["gpt2"], Critic(head="random"))
    whole = make_experience(make_config(PPO(), ROWS), roles, make_rollouts(ROWS), noise=0)
    first, second = whole.select(slice(0, 6)), whole.select(slice(6, ROWS))
    after = {}
    for discarded in (True, False):
        roles = full_roles(folders["gpt2"], Critic(head="random"))
        engines = torch_engines(roles, rate=0.5)
        stop = PPO(target_kl=1e-12, ppo_epochs=3)
        if discarded:  # the first step is taken at KL 0, the second is not, and a third not tried
            numbers = stage.update(
                make_config(stop, 4, ROWS), roles, engines, first, ONE, generator(0), ["policy", "critic"]
            )
            assert numbers["update/early_stop"] == 1 and numbers["update/steps"] == 1
            assert [len(engine.gradients) for engine in engines.values()] == [1, 1]
            assert [sum(map(len, engine.forwards)) for engine in engines.values()] == [12, 12]
        else:
            stage.optimize(make_config(stop, 4), roles, engines, first, ONE)
        assert distance(weights(roles), weights(full_roles(folders["gpt2"], Critic(head="random")))) > 1e-4
        stage.optimize(make_config(PPO(), 4), roles, engines, second, ONE)
        after[discarded] = weights(roles)
    assert distance(after[True], after[False]) == 0


# ------------------------------------------------------------------------------------- micro-batches of all the ranks


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 20), st.integers(1, 70))
def test_there_are_as_many_micro_batches_as_asked_for(lengths, micro, parts):
    """Where there are rows enough: every row once, none too large, and halved no more than needed."""
    lengths, parts = torch.tensor(lengths), min(parts, len(lengths))
    groups = [group.tolist() for group in batches.by_length(lengths, micro, parts)]
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(1 <= len(group) <= micro for group in groups)
    assert len(groups) == max(parts, len(batches.by_length(lengths, micro)))
