"""Reward models of transformers, TRL and PEFT as they come: scores, what PPO's roles make of them, and refusals."""

from __future__ import annotations

import json

import pytest
import torch
from nets import VOCAB, save_model
from safetensors.torch import load_file, save_file
from tiny import TEMPLATE, tiny_model

from alignkit.check import model
from alignkit.check import reward as check_reward
from alignkit.core.errors import InputError
from alignkit.core.types import ModelSource
from alignkit.finetune.critic import Critic
from alignkit.finetune.full import Full
from alignkit.finetune.lora import LoRA
from alignkit.models import loading
from alignkit.models.config import Model
from alignkit.models.source import resolve_model
from alignkit.runs import manifests

PAD = 1


def classifier(base, folder, adapter=None, labels=1, dtype=torch.float32, new_head=True):
    """A sequence classifier on `base` with a head of its own, saved whole or as a PEFT adapter; transformers' module."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(3)
    hf = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, dtype=dtype)
    hf.config.pad_token_id = PAD
    if new_head:
        torch.nn.init.normal_(hf.score.weight, std=0.3)
    if adapter is not None:
        hf = get_peft_model(hf, LoraConfig(task_type="SEQ_CLS", **adapter))
        for name, parameter in hf.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                torch.nn.init.normal_(parameter, mean=1.0 if "magnitude" in name else 0.0, std=0.2)
    hf.save_pretrained(folder)
    return hf.eval()


PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
ADAPTERS = {
    "whole": None,
    "adapter": PLAIN,
    "another rank": PLAIN | {"r": 2, "lora_alpha": 32, "use_rslora": True},
    "dora": PLAIN | {"use_dora": True},
    "bias": PLAIN | {"bias": "lora_only", "target_modules": ["q_proj", "c_attn"]},
    "head frozen in the base": PLAIN,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {style: save_model(root / style, style) for style in ("llama", "gpt2")}


def rows(seed=0):
    """ids [4, 9] and mask of four lengths, padded at the end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (4, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 5, 1, 7])[:, None]
    return ids.masked_fill(~mask, PAD), mask


def scores(role, ids, mask):
    with torch.no_grad():
        return role("reward_model", ids, mask, torch.zeros(len(ids), dtype=torch.long), 1)


@torch.no_grad()
def theirs(hf, ids, mask):
    return hf(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float()


@pytest.mark.parametrize("style", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_score_is_transformers_own(bases, tmp_path, style, kind):
    base = bases[style]
    if kind == "head frozen in the base":
        classifier(base, tmp_path / "base")
        base = tmp_path / "base"
    hf = classifier(base, tmp_path / "reward", ADAPTERS[kind], new_head=base in bases.values())
    if kind == "head frozen in the base":
        file = tmp_path / "reward" / "adapter_model.safetensors"
        kept = {name: tensor for name, tensor in load_file(file).items() if "score" not in name}
        save_file(kept, file, {"format": "pt"})
        config = json.loads((tmp_path / "reward/adapter_config.json").read_text())
        (tmp_path / "reward/adapter_config.json").write_text(
            json.dumps(config | {"modules_to_save": None, "task_type": None})
        )
    source = resolve_model(str(tmp_path / "reward"))
    role = loading.load_reward(source, Model(), VOCAB)
    ids, mask = rows()
    wanted = torch.cat(
        [theirs(hf, ids[i : i + 1, : mask[i].sum()], mask[i : i + 1, : mask[i].sum()]) for i in range(4)]
    )
    assert wanted.std() > 0.1
    torch.testing.assert_close(scores(role, ids, mask), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores(role, ids, mask), theirs(hf, ids, mask), atol=1e-5, rtol=0)
    left = [
        torch.stack([torch.roll(row, int((~m).sum())) for row, m in zip(x, mask, strict=True)]) for x in (ids, mask)
    ]
    torch.testing.assert_close(scores(role, *left), wanted, atol=1e-5, rtol=0)


def test_a_bfloat16_file_scores_as_transformers_does_in_both_dtypes(bases, tmp_path):
    hf = classifier(bases["llama"], tmp_path / "reward", dtype=torch.bfloat16)
    ids, mask = rows()
    source = ModelSource(str(tmp_path / "reward"))
    torch.testing.assert_close(
        scores(loading.load_reward(source, Model(dtype="bfloat16"), VOCAB), ids, mask), theirs(hf, ids, mask), atol=2e-2, rtol=1e-2
    )  # fmt: skip
    torch.testing.assert_close(
        scores(loading.load_reward(source, Model(), VOCAB), ids, mask), theirs(hf.float(), ids, mask), atol=1e-5, rtol=0
    )  # fmt: skip


def test_shards_and_a_regression_head_are_read(bases, tmp_path):
    hf = classifier(bases["llama"], tmp_path / "reward")
    hf.config.problem_type, hf.config.id2label = "regression", {0: "helpful"}
    hf.save_pretrained(tmp_path / "reward", max_shard_size="20KB")
    (tmp_path / "reward/model.safetensors").unlink(missing_ok=True)
    ids, mask = rows()
    role = loading.load_reward(resolve_model(str(tmp_path / "reward")), Model(), VOCAB)
    torch.testing.assert_close(scores(role, ids, mask), theirs(hf, ids, mask), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------- PPO's roles


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize(
    "kind", ["whole", "adapter", "another rank", "dora", "another base", "adapter of another base"]
)
def test_ppo_scores_with_it_as_it_is_whatever_its_base(bases, tmp_path, tune, kind):
    """Shared where it is plain LoRA on the policy's base, else held beside; only policy and critic train."""
    base = bases["llama"]
    other = save_model(tmp_path / "other", "gpt2", seed=5) if "another base" in kind else base
    hf = classifier(other, tmp_path / "reward", ADAPTERS.get(kind, PLAIN if kind.startswith("adapter") else None))
    reward = resolve_model(str(tmp_path / "reward"))
    finetune = LoRA(rank=4, alpha=8) if tune == "lora" else Full()
    roles = finetune.roles(Model(), ModelSource(str(base)), reward, VOCAB, Critic(), seed=0).eval()
    ids, mask = rows()
    torch.testing.assert_close(scores(roles, ids, mask), theirs(hf, ids, mask), atol=1e-5, rtol=0)
    shared = tune == "lora" and kind in ("adapter", "another rank")
    assert (roles.role_of["reward_model"] == roles.role_of["policy"]) is shared
    trained = {id(p) for role in ("policy", "critic") for p in finetune.parameters(roles, role)}
    assert {id(p) for p in roles.parameters() if p.requires_grad} == trained
    alone = set() if shared else {id(p) for p in roles.model("reward_model").parameters()}
    assert not alone & trained
    with torch.no_grad():
        values = roles("critic", ids, mask, torch.zeros(4, dtype=torch.long), 9)
    if tune == "full" or shared:  # the critic starts as it: behind the last token stands its score
        torch.testing.assert_close(values[0, -1], roles("critic", ids, mask, torch.tensor([8] * 4), 2)[0, 0])
    assert values.isfinite().all()


@pytest.mark.parametrize("setting", ["weights", "head"])
def test_a_critic_that_cannot_start_as_it_is_refused_with_both(bases, tmp_path, setting):
    classifier(bases["gpt2"], tmp_path / "reward")
    reward, critic = ModelSource(str(tmp_path / "reward")), Critic(**{setting: "reward_model"})
    with pytest.raises(
        InputError, match=f"critic.{setting}=reward_model.*{bases['llama']}.*reward is none on it.*weights=policy"
    ):
        critic.check_reward(LoRA(), reward, ModelSource(str(bases["llama"])))
    critic.check_reward(Full(), reward, ModelSource(str(bases["llama"])))


# ------------------------------------------------------------------------------------------------------------- refusals


def change(folder, drop=(), config=None, **tensors):
    """Rewrite the weights and the config.json of a saved model."""
    name = "adapter" if (folder / "adapter_config.json").is_file() else "model"
    file = folder / ("adapter_model.safetensors" if name == "adapter" else "model.safetensors")
    held = {key: tensor for key, tensor in load_file(file).items() if not any(word in key for word in drop)}
    save_file(held | {key.replace("__", "."): tensor for key, tensor in tensors.items()}, file, {"format": "pt"})
    path = folder / ("adapter_config.json" if name == "adapter" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))


D = 32
BAD = {
    "two labels": (lambda f: change(f, score__weight=torch.zeros(2, D)), "gives 2 numbers.*num_labels=1"),
    "no head": (lambda f: change(f, ["score"]), "head's weights are not in the file.*no score.weight"),
    "a bias": (lambda f: change(f, score__bias=torch.zeros(1)), "has score.bias"),
    "another width": (lambda f: change(f, score__weight=torch.zeros(1, D + 3)), "reads 35 numbers"),
    "a value head": (lambda f: change(f, ["score"], v_head__summary__weight=torch.zeros(1, D)), "v_head.summary.weight.*expected that"),
    "renamed": (lambda f: change(f, ["score"], module__score__weight=torch.zeros(1, D)), "(calls its head module.score.weight|names of a wrapped model, as module.score.weight)"),
    "a language model": (lambda f: change(f, ["score"], {"architectures": ["LlamaForCausalLM"]}), "no reward model.*LlamaForCausalLM"),
    "quantised": (lambda f: change(f, config={"quantization_config": {"quant_method": "gptq"}}), "gptq weights"),
    "an encoder": (lambda f: change(f, config={"is_encoder_decoder": True}), "encoder and decoder"),
}  # fmt: skip
BAD_ADAPTERS = {
    "another type": ({"peft_type": "IA3"}, (), "type IA3.*merge it"),
    "another task": ({"task_type": "CAUSAL_LM"}, (), "task CAUSAL_LM.*expected SEQ_CLS"),
    "no head": ({}, ["score"], "neither the adapter nor its base.*modules_to_save"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_no_scalar_score_is_refused_from_the_headers(bases, tmp_path, fault):
    spoil, words = BAD[fault]
    folder = tmp_path / "reward"
    hf = classifier(bases["llama"], folder)
    assert hf.config.hidden_size == D
    spoil(folder)
    with pytest.raises(InputError, match=f"rewards.x.path=r: .*{words}") as refused:
        model.check_source(ModelSource(str(folder), None, str(folder)), "rewards.x.path=r", scores=True)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("fault", BAD_ADAPTERS)
def test_an_adapter_without_a_score_is_refused_from_its_json(bases, tmp_path, fault):
    config, drop, words = BAD_ADAPTERS[fault]
    classifier(bases["llama"], tmp_path / "reward", PLAIN)
    change(tmp_path / "reward", drop, config)
    source = resolve_model(str(tmp_path / "reward"))
    with pytest.raises(InputError, match=f"rewards.x.path=r: .*{words}"):
        model.check_source(source, "rewards.x.path=r", scores=True)


def test_an_adapter_on_a_run_of_ours_is_one_on_its_model(bases, tmp_path):
    run = tmp_path / "runs/a/sft"
    (run / "model").mkdir(parents=True)
    for file in bases["llama"].iterdir():
        (run / "model" / file.name).write_bytes(file.read_bytes())
    manifests.write_manifest(run, stage="sft", status="done", adapter=False)
    hf = classifier(run / "model", tmp_path / "reward", PLAIN)
    change(tmp_path / "reward", config={"base_model_name_or_path": str(run)})
    source = resolve_model(str(tmp_path / "reward"))
    assert source.base == str(run / "model")
    ids, mask = rows()
    torch.testing.assert_close(
        scores(loading.load_reward(source, Model(), VOCAB), ids, mask), theirs(hf, ids, mask), atol=1e-5, rtol=0
    )
    manifests.write_manifest(run, adapter=True, base_model={"path": str(bases["llama"])})
    with pytest.raises(InputError, match=r"stands on another adapter.*merge"):
        resolve_model(str(tmp_path / "reward"))


# ------------------------------------------------------------------------------------------------------ whose tokens


@pytest.fixture
def pair(tmp_path):
    """A policy and a reward model with a tokenizer each, alike so far."""
    folders = [str(tiny_model(tmp_path / name)) for name in ("policy", "reward")]
    return [ModelSource(folder, None, folder) for folder in folders]


def edit_tokenizer(source, change):
    from pathlib import Path

    path = Path(source.tokenizer) / "tokenizer.json"
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))


def test_the_same_tokenizer_and_template_pass_with_a_word_on_the_end(pair):
    (line,) = check_reward.check_tokens(*pair, "rewards.x.path=r", Model(path="x"))
    assert "read at an answer's last token" in line


def test_another_vocabulary_is_refused_with_the_token_and_both_ids(pair):
    def swap(told):
        vocab = told["model"]["vocab"]
        vocab["good"], vocab["bad"] = vocab["bad"], vocab["good"]

    edit_tokenizer(pair[1], swap)
    with pytest.raises(
        InputError, match=r"rewards.x.path=r: its tokenizer .*the token '(good|bad)' is \d+ here, \d+ there"
    ):
        check_reward.check_tokens(*pair, "rewards.x.path=r", Model(path="x"))


def test_another_way_to_encode_is_refused_with_the_text(pair):
    edit_tokenizer(pair[1], lambda told: told["model"].update(merges=[]))
    with pytest.raises(InputError, match="encodes 'Hello, how are you"):
        check_reward.check_tokens(*pair, "rewards.x.path=r", Model(path="x"))


def test_a_padding_token_of_one_of_them_is_no_difference(pair):
    extra = {
        "id": 900,
        "content": "[PAD]",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    edit_tokenizer(pair[1], lambda told: told["added_tokens"].append(extra))
    assert check_reward.check_tokens(*pair, "rewards.x.path=r", Model(path="x"))
    with pytest.raises(InputError, match=r"the token '\[PAD\]' is \d+ here, none there"):
        check_reward.check_tokens(*reversed(pair), "rewards.x.path=r", Model(path="x"))


def test_another_template_is_refused_with_both_texts(pair):
    from pathlib import Path

    other = TEMPLATE.replace("<|im_start|>' + message", "<|user|>' + message")
    (Path(pair[1].tokenizer) / "chat_template.jinja").write_text(other)
    with pytest.raises(InputError, match=r"its chat template .*<\|user\|>.*<\|im_start\|>.*model.chat_template"):
        check_reward.check_tokens(*pair, "rewards.x.path=r", Model(path="x"))
    assert check_reward.check_tokens(*pair, "rewards.x.path=r", Model(path="x", chat_template=other))
