"""Every number of the configuration has bounds, every rule across fields refuses what it is for and names the fix."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pytest
from test_cli import command, invoke, make_work, refused, write_rows

from alignkit.config import stages

HEAVY = ("torch", "vllm", "deepspeed", "transformers", "trl", "peft", "datasets", "wandb")
# Numbers that may be anything finite.
FREE = {"weight", "missing_eos_value"}
# What makes an option of a group this option; no other value is taken.
OWN = {"stage"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("rules") / "work")


def numbers(cls: type, prefix: str = "") -> list[tuple[str, object]]:
    """(dotted key, field) of all numbers of a dataclass, those of the dataclasses in it too."""
    found, hints = [], get_type_hints(cls)
    for f in fields(cls):
        kinds = {hints[f.name], *get_args(hints[f.name])}
        for inner in filter(is_dataclass, kinds):
            found += numbers(inner, f"{prefix}{f.name}.")
        if kinds & {int, float}:
            found.append((f"{prefix}{f.name}", f))
    return found


CLASSES = [*stages.STAGES.values(), *(c for group in stages.GROUPS for c in stages.components(group).values())]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_number_has_bounds_beside_its_default(cls):
    without = [key for key, f in numbers(cls) if "bounds" not in f.metadata and f.name not in FREE | OWN]
    assert without == []


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("sft", "optimizer.learning_rate=0", ["optimizer.learning_rate=0", "0 < learning_rate <= 1"]),
        ("sft", "optimizer.learning_rate=-1e-4", ["optimizer.learning_rate=-0.0001"]),
        ("sft", "optimizer.learning_rate=1e4", ["optimizer.learning_rate=10000.0"]),
        ("sft", "optimizer.learning_rate=nan", ["optimizer.learning_rate=nan"]),
        ("sft", "optimizer.weight_decay=inf", ["optimizer.weight_decay=inf", "0 or more"]),
        ("sft", "optimizer.betas=[0.9,1.0]", ["optimizer.betas=1.0", "0 <= betas < 1"]),
        ("sft", "optimizer.betas=[0.9]", ["optimizer.betas=[0.9]", "two numbers"]),
        ("sft", "optimizer.eps=0", ["optimizer.eps=0", "more than 0"]),
        ("sft", "optimizer.warmup_steps=-1", ["optimizer.warmup_steps=-1", "0 or more"]),
        ("sft", "finetune.dropout=1", ["finetune.dropout=1", "0 <= dropout < 1"]),
        ("sft", "finetune.rank=0", ["finetune.rank=0", "1 or more"]),
        ("sft", "finetune.last_layers=0", ["finetune.last_layers=0", "1 or more, or null"]),
        ("sft", "epochs=0", ["epochs=0", "more than 0"]),
        ("sft", "seed=-1", ["seed=-1", "0 to 4294967295"]),
        ("sft", "save_steps=-1", ["save_steps=-1", "0 or more"]),
        ("sft", "neftune_noise_alpha=0", ["neftune_noise_alpha=0", "more than 0, or null"]),
        ("sft", "launcher.port=70000", ["launcher.port=70000", "1 to 65535, or null"]),
        ("reward", "center_coef=-1", ["center_coef=-1", "0 or more, or null"]),
        ("ppo", "algorithm.clip_range=0", ["algorithm.clip_range=0", "0 < clip_range < 1"]),
        ("ppo", "algorithm.gae_lambda=1.5", ["algorithm.gae_lambda=1.5", "from 0 to 1"]),
        ("ppo", "algorithm.missing_eos_value=nan", ["algorithm.missing_eos_value=nan", "a finite number"]),
        ("ppo", "sample_every=0", ["sample_every=0", "1 or more"]),
        ("ppo", "steps=-3", ["steps=-3", "1 or more"]),
        ("ppo", "rewards.reward_model.weight=inf", ["rewards.reward_model.weight=inf", "a finite number"]),
        ("ppo", "rollout.top_p=0", ["rollout.top_p=0", "0 < top_p <= 1"]),
        ("ppo", "rollout.gpu_memory_utilization=1.2", ["rollout.gpu_memory_utilization=1.2", "<= 1"]),
        ("pipeline", "ppo.optimizer.learning_rate=0", ["ppo.optimizer.learning_rate=0"]),
        ("ppo", "algorithm.name=rloo", ["algorithm.name=rloo", "algorithm=<option>"]),
        ("sft", "deepspeed.stage=3", ["deepspeed.stage=3", "deepspeed=<option>"]),
    ],
)
def test_a_number_outside_its_bounds(shared, name, override, words):
    refused(shared, command(name, override), *words)


SECOND = ["+reward@rewards.second=reward_model", "rewards.second.path=runs/base/reward"]
# (command, overrides, what the refusal names): one line a rule across fields.
RULES = [
    ("ppo", ["rollout=server", "finetune=full"], ["rollout=server", "finetune=full", "finetune=lora, or rollout=vllm"]),
    ("ppo", ["rollout.payload=adapter", "finetune=full"], ["rollout.payload=adapter", "rollout.payload=merged"]),
    ("ppo", ["rollout.payload=adapter", "finetune.rank=1024"], ["finetune.rank=1024", "512 at most"]),
    ("ppo", ["rollout=server", "finetune.rank=513"], ["finetune.rank=513", "512 at most", "rollout=vllm"]),
    ("sft", ["finetune.target_modules=[]"], ["finetune.target_modules=[]", "all-linear", "[q_proj,v_proj]"]),
    ("sft", ["finetune.target_modules=3"], ["finetune.target_modules=3", "all-linear"]),
    ("ppo", ["steps=5", "optimizer.warmup_steps=6"], ["optimizer.warmup_steps=6", "steps=5", "lower"]),
    ("ppo", ["steps=5", "critic_optimizer.warmup_steps=6"], ["critic_optimizer.warmup_steps=6", "steps=5"]),
    ("sft", ["max_steps=5", "optimizer.warmup_steps=6"], ["optimizer.warmup_steps=6", "max_steps=5"]),
    ("sft", ["max_steps=0"], ["max_steps=0", "-1"]),
    ("ppo", ["steps=5", "algorithm.critic_warmup=5"], ["algorithm.critic_warmup=5", "steps=5", "never learn"]),
    ("ppo", ["rewards.reward_model.weight=0"], ["rewards.reward_model.weight", "0", "another weight"]),
    ("ppo", SECOND, ["rewards.reward_model", "rewards.second", "~reward@rewards.second"]),
    (
        "ppo",
        ["rollout=server", "rollout.servers=2", "rollout.urls=[http://h:1]"],
        ["rollout.servers=2", "rollout.urls"],
    ),
    ("sft", ["eval_data.path=answers.jsonl"], ["eval_data.path=answers.jsonl", "data.path", "eval_fraction"]),
    ("sft", ["runs_dir="], ["runs_dir=''", "as runs"]),
    ("sft", ["max_length=4096"], ["max_length=4096", "2048", "lower max_length"]),
    ("ppo", ["max_prompt_length=2000"], ["max_prompt_length=2000", "rollout.max_new_tokens=64", "2064", "2048"]),
    (
        "ppo",
        ["ptx.coef=1", "ptx.data.path=answers.jsonl", "ptx.max_length=2049"],
        ["ptx.max_length=2049", "2048", "lower ptx.max_length"],
    ),
    ("sft", ["model.path=model", "finetune.last_layers=31"], ["finetune.last_layers=31", "30 layers"]),
    ("ppo", ["rollout.stop_token_ids=[259]"], ["rollout.stop_token_ids", "259", "0 to 258"]),
    ("ppo", ["rollout.min_tokens=65"], ["rollout.min_tokens=65", "rollout.max_new_tokens=64"]),
    ("ppo", ["rollout.top_k=5"], ["rollout.top_k=5", "rollout.allow_biased_sampling=true"]),
    ("ppo", ["algorithm.critic_warmup=1", "critic.kind=trunk"], ["algorithm.critic_warmup=1", "critic.kind=trunk"]),
    ("ppo", ["critic.kind=adapter", "finetune=full"], ["critic.kind=adapter", "finetune=full", "separate"]),
    ("ppo", ["algorithm.adaptive_kl_target=3", "algorithm.kl_coef=0"], ["algorithm.kl_coef=0", "above 0"]),
    ("ppo", ["algorithm.kl_in=loss", "algorithm.kl_estimator=k1"], ["algorithm.kl_estimator=k1", "kl_in=reward"]),
    ("ppo", ["algorithm=rloo"], ["algorithm=rloo", "group_size=1", "group_size=2"]),
]


@pytest.mark.parametrize(("name", "overrides", "words"), RULES, ids=[" ".join(o) for _, o, _ in RULES])
def test_a_rule_across_fields(shared, name, overrides, words):
    refused(shared, command(name, *overrides), *words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["finetune=full"], ["finetune=full", "gptq", "finetune=lora"]),
        (["deepspeed=zero3"], ["deepspeed=zero3", "gptq", "zero2"]),
    ],
)
def test_a_base_with_quantised_weights(tmp_path, overrides, words):
    work = make_work(tmp_path / "work")
    facts = json.loads((work / "model/config.json").read_text())
    facts["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (work / "model/config.json").write_text(json.dumps(facts))
    refused(work, command("sft", "model.path=model", *overrides), *words)


def test_a_model_whose_positions_are_scaled_is_not_judged_by_its_plain_limit(tmp_path):
    work = make_work(tmp_path / "work")
    facts = json.loads((work / "model/config.json").read_text())
    facts["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0}
    (work / "model/config.json").write_text(json.dumps(facts))
    assert invoke(*command("sft", "model.path=model", "max_length=4096", "dry_run=true"), cwd=work).code == 0


def test_value_clipping_without_a_critic_is_said_to_be_ppos(shared):
    message = refused(
        shared, command("ppo", "algorithm=rloo", "group_size=2", "algorithm.value_clip_range=0.1"), "algorithm=ppo"
    )
    assert "algorithm.value_clip_range" in message


# ------------------------------------------------------------------------------------------------------ check config


def test_check_config_lists_every_file_of_conf(tmp_path):
    result = invoke("check", "config", cwd=tmp_path)
    lines = result.out.splitlines()
    assert result.code == 0 and lines[-1].endswith(" files, 0 refused")
    assert any(line.endswith("conf/experiment/quickstart.yaml  ok (pipeline)") for line in lines)
    for name in stages.STAGES:
        assert any(line.endswith(f"conf/{name}.yaml  ok ({name})") for line in lines)


def test_check_config_of_an_own_folder_names_file_key_and_fix(tmp_path):
    files = {
        "experiment/good.yaml": ("# @package _global_\nsteps: 3\nrollout_batch_size: 64\n", ["ok (ppo)"]),
        "experiment/typo.yaml": ("# @package _global_\nppo:\n  stepz: 3\n", ["ppo.stepz", "did you mean ppo.steps?"]),
        "experiment/range.yaml": ("# @package _global_\noptimizer: {learning_rate: -1}\n", ["learning_rate=-1"]),
        "experiment/rule.yaml": ("# @package _global_\nsteps: 2\nalgorithm: {critic_warmup: 2}\n", ["critic_warmup=2"]),
        "experiment/broken.yaml": ("a: [\n", ["broken.yaml", "line 2"]),
        "finetune/big.yaml": ("defaults: [lora]\nrank: 64\n", ["ok (sft, reward, ppo, pipeline)"]),
        "reward/own.yaml": ("defaults: [function]\nweigth: 2\n", ["rewards.checked.weigth", "weight?"]),
        "optimiser/x.yaml": ("a: 1\n", ["no group optimiser"]),
    }
    for name, (text, _) in files.items():
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text(text)
    result = invoke("check", "config", "--config-dir", "own", cwd=tmp_path)
    assert result.code == 2 and result.out.endswith(", 6 refused\n")
    for name, (_, words) in files.items():
        (line,) = [line for line in result.out.splitlines() if line.startswith(f"own/{name}  ")]
        assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("arguments", "word"), [(["--config-dir", "nope"], "no such folder"), (["sft"], "--config-dir")]
)
def test_check_config_with_other_arguments(tmp_path, arguments, word):
    result = invoke("check", "config", *arguments, cwd=tmp_path)
    assert result.code == 2 and word in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize("line", [["check", "config"], command("pipeline", "dry_run=true")], ids=["check", "dry run"])
def test_checks_load_nothing_heavy_and_answer_within_five_seconds(tmp_path, line):
    """The files, rows, models, tokenizers and templates of five stages are looked at without torch."""
    work = make_work(tmp_path / "work")
    code = (
        "import sys, time\nfrom alignkit.cli import entry as cli\n"
        f"sys.argv = ['alignkit', *{line!r}]\ncli.main()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], time.process_time(), file=sys.stderr)"
    )
    took = []
    while not took or (min(took) >= 5 and len(took) < 3):  # the least of three: a core that is shared counts for more
        done = subprocess.run([sys.executable, "-c", code], cwd=work, capture_output=True, text=True)
        heavy, _, seconds = done.stderr.strip().rpartition(" ")
        assert (done.returncode, heavy) == (0, "[]"), done.stderr
        took.append(float(seconds))
    assert min(took) < 5


def test_an_experiment_may_refuse_a_key_inside_an_entry_of_a_dict(tmp_path):
    work = make_work(tmp_path / "work")
    (work / "own/experiment").mkdir(parents=True)
    (work / "own/experiment/e.yaml").write_text("# @package _global_\nrewards: {reward_model: {pth: x}}\n")
    refused(work, command("ppo", "+experiment=e", "--config-dir", "own"), "rewards.reward_model.pth", "path?")


def test_a_policy_that_is_no_path(tmp_path):
    work = make_work(tmp_path / "work")
    write_rows(work / "rows.jsonl", {"prompt": "p"})
    refused(work, command("evaluate", "+policies.bad=[a]"), "policies.bad")
