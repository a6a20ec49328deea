"""Adapters that plain PEFT made: what alignkit continues, what it only takes as it answers, and the way on for the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import command, make_work, refused

from alignkit.core.errors import InputError
from alignkit.core.types import ModelSource
from alignkit.finetune.full import Full
from alignkit.finetune.lora import LoRA
from alignkit.models import adapters, loading
from alignkit.models.config import Model

PLAIN = {"base_model_name_or_path": "model", "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32}
BEYOND = {
    "use_dora": True, "modules_to_save": ["embed_tokens", "lm_head"], "bias": "lora_only", "task_type": "SEQ_CLS",
    "peft_type": "IA3", "use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4},
    "layer_replication": [[0, 2], [1, 2]], "init_lora_weights": "pissa", "trainable_token_indices": [1],
    "target_parameters": ["mlp.experts.gate_up_proj"], "lora_bias": True, "megatron_config": {"a": 1}, "use_qalora": True,
    "arrow_config": {"top_k": 1}, "loftq_config": {"loftq_bits": 4}, "corda_config": {"a": 1}, "alora_invocation_tokens": [1],
    "a_setting_of_a_later_peft": 3,
}  # fmt: skip


def source(folder: Path, **changes) -> ModelSource:
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | changes))
    return ModelSource("model", folder, str(folder))


@pytest.mark.parametrize("setting", BEYOND)
def test_what_cannot_be_continued_is_refused_from_its_json(tmp_path, setting):
    with pytest.raises(InputError, match=setting):
        LoRA(rank=16, alpha=32.0).check_start(source(tmp_path, **{setting: BEYOND[setting]}))


def test_what_peft_writes_of_plain_lora_is_continued(tmp_path):
    """Every setting at PEFT's own default, and those that only say where its layers are."""
    from peft import LoraConfig

    LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(saved) > 30 and adapters.beyond_lora(saved) == []
    for more in ({"layers_to_transform": [0, 1]}, {"init_lora_weights": "gaussian"}, {"fan_in_fan_out": True}):
        assert adapters.beyond_lora(saved | more) == []


def test_a_reward_run_goes_on_as_a_reward_and_not_as_a_policy(tmp_path):
    reward = source(tmp_path, task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    LoRA(rank=16, alpha=32.0).check_start(reward, scores=True)
    with pytest.raises(InputError, match=r"task_type=SEQ_CLS .*rewards.<name>.path"):
        LoRA(rank=16, alpha=32.0).check_start(reward)
    with pytest.raises(InputError, match="modules_to_save"):
        LoRA(rank=16, alpha=32.0).check_start(source(tmp_path, modules_to_save=["score", "embed_tokens"]), scores=True)


def test_a_policy_that_only_answers_may_be_what_peft_can_merge(tmp_path):
    for setting in ("use_dora", "modules_to_save", "bias", "use_rslora", "rank_pattern"):
        odd = source(tmp_path, **{setting: BEYOND[setting]})
        saved = adapters.read_config(tmp_path)
        adapters.check_merged(odd, saved, "policies.x=a", alone=False)
        with pytest.raises(InputError, match=rf"policies.x=a: .*{setting}"):
            adapters.check_merged(odd, saved, "policies.x=a", alone=True)
    for changes in ({"task_type": "SEQ_CLS"}, {"peft_type": "PROMPT_TUNING"}, {"init_lora_weights": "olora"}):
        odd = source(tmp_path, **changes)
        with pytest.raises(InputError, match=next(iter(changes))):
            adapters.check_merged(odd, adapters.read_config(tmp_path), "policies.x=a", alone=False)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "sample", "evaluate"])
def test_every_stage_refuses_a_classifier_as_its_model(tmp_path, stage):
    work = make_work(tmp_path / "work")
    file = work / "runs/base/sft/model/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": "SEQ_CLS"}))
    given = command(stage, "model.path=runs/base/sft")
    if stage == "evaluate":
        given = command(stage, "+policies.odd=runs/base/sft")
    refused(work, given, "adapter_config.json has task_type=SEQ_CLS", "rewards.<name>.path")


def test_full_finetuning_says_how_to_merge(tmp_path):
    with pytest.raises(InputError, match=r"finetune=full .*-merged: python -c"):
        Full().check_start(source(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True}]
)
def test_the_command_of_a_refusal_makes_a_model_of_it(tiny, tmp_path, settings):
    """Run as it is told; the folder it writes holds the policy that PEFT itself computes."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny),
        LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **settings),
    ).eval()
    with torch.no_grad():
        for parameter in (p for p in peft.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path / "adapter"
    peft.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    given = ModelSource(str(tiny), folder, str(folder))
    told = adapters.merge_command(given).replace("python", sys.executable, 1)
    subprocess.run(told, shell=True, check=True, capture_output=True)
    ids = torch.arange(4, 20)[None]
    merged = AutoModelForCausalLM.from_pretrained(adapters.merged_folder(given))
    with torch.no_grad():
        expected = peft(ids).logits
        assert torch.allclose(merged(ids).logits, expected, atol=1e-4)
        policy = loading.load_policy(given, Model(path=str(tiny)), 320)
        assert torch.allclose(policy(ids).logits, expected, atol=1e-4)
