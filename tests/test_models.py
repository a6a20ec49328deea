"""What `models` and `finetune` read off real models: against transformers and peft themselves, with any padding.

The number in a test's name is its number in the list of correctness tests. Every model has weights and adapters that
matter (see `nets`), dropout 0.5 in its saved config, and comes both with learned and with rotary positions.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nets import (
    HIDDEN,
    ONE,
    STYLES,
    VOCAB,
    generator,
    make_config,
    make_experience,
    make_rollouts,
    save_model,
    torch_engines,
)

from alignkit.algorithms.ppo import PPO
from alignkit.core.errors import RunError
from alignkit.core.types import ModelSource
from alignkit.finetune.critic import Critic
from alignkit.finetune.full import Full
from alignkit.finetune.lora import LoRA
from alignkit.models import loading
from alignkit.models.config import Model
from alignkit.models.score_heads import load_head, save_head, score_head
from alignkit.stages import ppo as stage

TUNES = {"full": Full(), "lora": LoRA(rank=4, alpha=8.0, dropout=0.5), "sft": LoRA(rank=4, alpha=8.0, dropout=0.5)}
TEMPERATURE = 0.7


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_adapter(base, folder, seed):
    """An adapter by peft whose B is not 0, with a scalar head beside it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(folder)
    save_scores(folder)
    return folder


def save_scores(folder):
    head = score_head(HIDDEN, generator(4))
    torch.nn.init.constant_(head.bias, 0.3)
    save_head(head, folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{style: {base, sft adapter, reward adapter, reward model: folders}}."""
    found = {}
    for style in STYLES:
        root = tmp_path_factory.mktemp(style)
        base = save_model(root / "base", style, dropout=0.5)
        found[style] = {
            "base": base,
            "sft": save_adapter(base, root / "sft", 1),
            "reward": save_adapter(base, root / "reward", 2),
            "reward_full": save_scores(save_model(root / "reward_full", style, seed=3, dropout=0.5)),
        }
    return found


def build(folders, tune, critic=None, vocab=VOCAB, **options):
    """(roles, finetune) with all four roles; `tune` is full, lora (a fresh adapter) or sft (an adapter continued)."""
    base, finetune = str(folders["base"]), replace(TUNES[tune], **options)
    source = ModelSource(base, folders["sft"] if tune == "sft" else None)
    reward = ModelSource(str(folders["reward_full"])) if tune == "full" else ModelSource(base, folders["reward"])
    return finetune.roles(Model(), source, reward, vocab, critic or Critic(), seed=0).eval(), finetune


def alone(folder, adapter=None):
    """The same model by transformers and peft, adapter folded in."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    return hf if adapter is None else PeftModel.from_pretrained(hf, adapter).merge_and_unload()


def forward(roles, rollouts, micro=4, **options):
    return stage.forward(make_config(PPO(), micro, temperature=TEMPERATURE, **options), roles, rollouts)


def padded_left(rollouts, pads: int):
    """The same prompts with `pads` more slots of padding."""
    rubbish = torch.randint(VOCAB, (len(rollouts.meta), pads), generator=generator(pads))
    return replace(
        rollouts,
        prompt_ids=torch.cat([rubbish, rollouts.prompt_ids], 1),
        prompt_mask=torch.cat([torch.zeros_like(rubbish, dtype=torch.bool), rollouts.prompt_mask], 1),
    )


def close(ours, theirs, bound):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)


# ----------------------------------------------------------------------------------------- 18, 19: dropout, no KL yet


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("style", STYLES)
def test_a_saved_dropout_is_off_in_train_mode(saved, style, tune):
    roles, _ = build(saved[style], tune, Critic("separate"))
    rollouts, found = make_rollouts(4), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(forward(roles.train(), rollouts))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_a_dropout_that_is_on_is_refused():
    noisy = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1))
    with pytest.raises(RunError, match="1 dropout layers are on, as 1"):
        loading.train_only(noisy, [])
    loading.disable_dropout(noisy)
    loading.train_only(noisy, [noisy[0].bias])
    assert not noisy[0].weight.requires_grad and noisy[0].bias.requires_grad


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("style", STYLES)
def test_at_the_start_the_policy_is_its_reference(saved, style, tune):
    """And its reference is what transformers and peft make of the same folders: the SFT adapter, not its base."""
    roles, _ = build(saved[style], tune)
    rollouts = make_rollouts(6)
    seen = forward(roles, rollouts)
    mask = rollouts.response_mask
    close(seen["policy"] * mask, seen["ref_policy"] * mask, 1e-6)
    experience = make_experience(make_config(PPO(kl_coef=10.0), temperature=TEMPERATURE), roles, rollouts, noise=0)
    assert (experience.rewards != 0).sum() == 6 and experience.kl_coef == 0  # the scores, and nothing beside them

    hf = alone(saved[style]["base"], saved[style]["sft"] if tune == "sft" else None)
    bare = alone(saved[style]["base"])
    for row in range(6):
        ids, start = rollouts.ids[row, rollouts.mask[row]][None], int(rollouts.prompt_mask[row].sum())
        with torch.no_grad():
            law, of_base = ((m(ids).logits / TEMPERATURE).log_softmax(-1)[0, start - 1 : -1] for m in (hf, bare))
        at = ids[0, start:, None]
        close(seen["ref_policy"][row, : len(at)], law.gather(1, at)[:, 0], 1e-5)
        close(seen["entropy"][row, : len(at)], -(law.exp() * law).sum(-1), 1e-5)
        assert tune != "sft" or (law - of_base).abs().max() > 0.1


# ----------------------------------------------------------------------------------------------- 20, 21, 29: padding


@pytest.mark.parametrize("tune", ["full", "sft"])
@pytest.mark.parametrize("style", STYLES)
def test_padding_and_batch_mates_change_nothing(saved, style, tune):
    roles, _ = build(saved[style], tune)
    rollouts = make_rollouts(8)
    together = forward(roles, rollouts, micro=8)
    assert together.keys() == {"policy", "ref_policy", "entropy", "critic", "reward_model"}
    for row in range(8):
        one = rollouts.select(slice(row, row + 1))
        for pads in (0, 1, 7):
            by_itself = forward(roles, padded_left(one, pads))
            for name, value in by_itself.items():
                kept = slice(None) if value.dim() == 1 else rollouts.response_mask[row : row + 1]
                close(together[name][row : row + 1][kept], value[kept], 1e-5)


@pytest.mark.parametrize("tune", ["full", "sft"])
@pytest.mark.parametrize("style", STYLES)
def test_the_module_takes_padding_on_any_side_with_any_ids(saved, style, tune):
    """Padded on the left as the sampler has it, or flush left; whatever ids stand in the padding."""
    roles, _ = build(saved[style], tune)
    rollouts = padded_left(make_rollouts(6), 2)
    starts = torch.full((6,), rollouts.prompt_ids.shape[1])
    left, right = (rollouts.ids, rollouts.mask, starts), rollouts.flush_left()
    valid = rollouts.response_mask
    for role in ("policy", "ref_policy", "critic", "reward_model"):

        def values(ids, mask, starts, role=role):
            with torch.no_grad():
                out = roles(role, ids, mask, starts, valid.shape[1], TEMPERATURE)
            out = out[0] if isinstance(out, tuple) else out
            return out if out.dim() == 1 else out[valid]

        close(values(*left), values(*right), 1e-5)
        for ids, mask, at in (left, right):
            rubbish = torch.where(mask, ids, torch.randint(VOCAB, ids.shape, generator=generator(9)))
            assert not torch.equal(rubbish, ids)
            close(values(rubbish, mask, at), values(ids, mask, at), 1e-6)


@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("style", STYLES)
def test_a_score_is_the_head_on_the_last_token(saved, style, tune):
    """By transformers and peft, a row at a time; so are the critic's values, which start as the reward model's (37)."""
    folders = saved[style]
    roles, _ = build(folders, tune)
    hf = alone(folders["reward_full"]) if tune == "full" else alone(folders["base"], folders["reward"])
    head = load_head(folders["reward_full" if tune == "full" else "reward"])
    assert head.bias.item() == pytest.approx(0.3)
    rollouts = make_rollouts(6)
    seen = forward(roles, rollouts)
    for row in range(6):
        ids, start = rollouts.ids[row, rollouts.mask[row]][None], int(rollouts.prompt_mask[row].sum())
        with torch.no_grad():
            read = head(hf.base_model(ids).last_hidden_state)[0, :, 0]
        close(seen["reward_model"][row], read[-1], 1e-5)
        close(seen["critic"][row, : len(read) - start], read[start - 1 : -1], 1e-5)
    assert seen["reward_model"].std() > 0.3


@pytest.mark.parametrize("tune, kind", [("full", "separate"), ("sft", "adapter"), ("sft", "separate")])
@pytest.mark.parametrize("style", STYLES)
def test_a_critic_from_the_reward_model_ends_on_its_score(saved, style, tune, kind):
    """The value behind the last token is read off that token's state, where the score is read."""
    roles, _ = build(saved[style], tune, Critic(kind))
    rollouts = make_rollouts(10)
    seen = forward(roles, rollouts)
    lengths = rollouts.response_mask.sum(1)
    short = (lengths < rollouts.response_mask.shape[1]).nonzero().flatten()
    assert len(short) >= 5
    close(seen["critic"][short, lengths[short]], seen["reward_model"][short], 1e-6)


# --------------------------------------------------------------------------------- 40, 41: adapters, what is trained


@pytest.mark.parametrize("style", STYLES)
def test_without_its_adapter_a_model_is_its_base(saved, style):
    """Bitwise, whatever role computed before; a fresh adapter adds 0, and one that has learned moves its role only."""
    roles, finetune = build(saved[style], "lora")
    base, ids = alone(saved[style]["base"]), torch.randint(VOCAB, (3, 11), generator=generator(2))

    @torch.no_grad()
    def from_base(role):
        roles.switch("reward_model")
        roles.switch(role)
        return float((roles.model(role)(ids).logits - base(ids).logits).abs().max())

    assert from_base("policy") == 0 and from_base("ref_policy") == 0 and from_base("reward_model") > 0.1
    for parameter in finetune.parameters(roles, "policy"):
        parameter.data += 0.1
    assert from_base("policy") > 0.1 and from_base("ref_policy") == 0


@pytest.mark.parametrize("tune", ["full", "sft"])
@pytest.mark.parametrize("style", STYLES)
def test_synced_weights_are_the_policy_and_leave_the_base_alone(saved, style, tune):
    """Under the checkpoint's names; `merged` is a model of transformers that was never told of an adapter."""
    roles, finetune = build(saved[style], tune)
    before = {name: tensor.clone() for name, tensor in roles.state_dict().items()}
    payload = dict(finetune.sync_payload(roles))
    merged = alone(saved[style]["base"])
    missing, unexpected = merged.load_state_dict(payload, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected  # tied
    assert tune == "full" or any(
        not torch.equal(payload[n], t) for n, t in alone(saved[style]["base"]).state_dict().items()
    )
    ids = torch.randint(VOCAB, (3, 11), generator=generator(2))
    roles.switch("policy")
    with torch.no_grad():
        close(merged(ids).logits, roles.model("policy")(ids).logits, 1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in roles.state_dict().items())


def test_rows_added_for_a_pad_token_are_neither_synced_nor_sampled(saved):
    roles, finetune = build(saved["llama"], "sft", vocab=VOCAB + 1)
    rollouts, (plain, _) = make_rollouts(4), build(saved["llama"], "sft")
    assert {len(t) for n, t in finetune.sync_payload(roles) if "embed" in n} == {VOCAB}
    ours, theirs = forward(roles, rollouts), forward(plain, rollouts)
    close(ours["policy"], theirs["policy"], 1e-6)
    close(ours["entropy"], theirs["entropy"], 1e-6)


KINDS = ["full separate", "full trunk", "sft adapter", "sft trunk", "lora separate", "lora auto"]


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("style", STYLES)
def test_what_trains_is_what_the_optimizers_hold_and_what_moves(saved, style, kinds):
    tune, kind = kinds.split()
    roles, finetune = build(saved[style], tune, Critic(kind, head="random" if kind == "trunk" else "auto"))
    names = {p: name for name, p in roles.named_parameters()}
    own = {role: {names[p] for p in finetune.parameters(roles, role)} for role in ("policy", "critic")}
    trained = own["policy"] | own["critic"]
    assert own["policy"] and not own["policy"] & own["critic"] and bool(own["critic"]) == (kind != "trunk")
    of_values = own["policy" if kind == "trunk" else "critic"]
    assert {n for n in trained if "heads" in n} == {"heads.critic.weight", "heads.critic.bias"} <= of_values
    assert trained == {name for name, p in roles.named_parameters() if p.requires_grad}
    for role in ("ref_policy", "reward_model"):
        theirs = {names[p] for p in roles.model(role).parameters()} if tune == "full" else set()
        assert not trained & theirs and not any(f".{role}." in name for name in trained)

    before = {name: p.detach().clone() for name, p in roles.named_parameters()}
    experience = make_experience(make_config(PPO()), roles, make_rollouts(8))
    engines = torch_engines(roles, finetune)
    for _ in range(2):  # in the first step A of a fresh adapter has no gradient, as B is 0
        stage.optimize(make_config(PPO()), roles, engines, experience, ONE)
    assert {name for name, p in roles.named_parameters() if not torch.equal(p, before[name])} == trained


# ------------------------------------------------------------------- blocks that no role adapts are computed once


@pytest.mark.parametrize("kind", ["adapter", "trunk", "separate"])
def test_shared_states_change_neither_outputs_nor_steps(saved, kind):
    """Adapters on the last block only: the first is computed once for all roles, or once a round."""
    found = []
    for blocks, keep in ((1, True), (1, False), (0, False)):
        roles = LoRA(rank=4, last_layers=1).roles(
            Model(), ModelSource(str(saved["llama"]["base"])), None, VOCAB, Critic(kind, head="random"), seed=0
        )
        assert roles.blocks == 1
        roles.blocks = blocks
        cfg = make_config(PPO(), 2, keep_shared_states=keep)
        experience = make_experience(cfg, roles, make_rollouts(8))
        assert (experience.shared_states is not None) == keep
        engines = torch_engines(roles, LoRA())
        for _ in range(2):
            metrics, _ = stage.optimize(cfg, roles, engines, experience, ONE)
        found.append((experience, metrics, dict(roles.named_parameters())))
    for experience, metrics, parameters in found[:2]:
        assert torch.equal(experience.old_logprobs, found[2][0].old_logprobs)
        assert metrics == pytest.approx(found[2][1], abs=1e-6)
        for name, parameter in parameters.items():
            close(parameter, found[2][2][name], 1e-6)
