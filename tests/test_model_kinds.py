"""What architectures differ in, against transformers' own models; and which are refused, by config.json alone.

The architectures are those that go through all stages in `stages/test_architectures.py`.
"""

from __future__ import annotations

import ast
import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_cli import command, invoke, make_work, refused
from tiny import ARCHITECTURES, VOCAB, tiny_architecture

from alignkit.core.errors import InputError
from alignkit.core.types import ModelSource
from alignkit.finetune.lora import LoRA
from alignkit.models import architectures, loading
from alignkit.models.config import Model

CLASSIFIER = architectures.CLASSIFIER
MIXTURES = ("mixtral", "qwen3_moe")
# What scales or caps logits, far from doing nothing.
SCALED = {
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 1.0, "query_pre_attn_scalar": 32},
    "gemma3_text": {"final_logit_softcapping": 1.0, "query_pre_attn_scalar": 32},
}


def load(folder, auto_class: str = "AutoModelForCausalLM", **settings):
    return loading.load_base(str(folder), Model(path=str(folder)), VOCAB, auto_class, **settings)


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [3, 12], the rows padded on the left, on the right, and not."""
    ids = torch.randint(4, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[0, :5], mask[1, 9:] = False, False
    return ids, mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(kind)`: that architecture, made once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny_architecture(tmp_path_factory.mktemp(kind), kind, **ARCHITECTURES[kind])
        return made[kind]

    return make


# ---------------------------------------------------------------------------------------------------------- log-probs


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_log_probs_are_those_of_transformers_own_logits(tmp_path, kind):
    """Row by row, without padding: what scales the logits and what gives positions is the architecture's business."""
    hf = load(tiny_architecture(tmp_path, kind, **ARCHITECTURES[kind] | SCALED.get(kind, {})))
    ids, mask = rows()
    starts = torch.tensor([8, 4, 6])
    with torch.no_grad():
        ours = loading.single_role(hf)("policy", ids, mask, starts, 4)[0]
        for row in range(3):
            plain = hf(ids[row, mask[row]][None]).logits[0].log_softmax(-1)
            first = int(starts[row] - (~mask[row, : starts[row]]).sum())
            for slot in range(4):
                token = ids[row, starts[row] + slot]
                assert abs(float(plain[first + slot - 1, token] - ours[row, slot])) < 1e-5


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_logits_are_other_logits(tmp_path, kind):
    """Or the test above would not see that they are not applied."""
    hf = load(tiny_architecture(tmp_path, kind, **SCALED[kind]))
    ids, _ = rows()
    with torch.no_grad():
        plain = hf.get_output_embeddings()(loading.trunk_hidden(hf, ids, torch.ones_like(ids, dtype=torch.bool)))
        assert float((hf(ids).logits - plain).abs().max()) > 0.1


def test_logits_of_given_states_leave_the_decoder_as_it_was(folder):
    hf = load(folder("opt"))  # whose decoder lies inside of its base model
    ids, _ = rows()
    before = {name: set(vars(part)) for name, part in hf.named_modules()}
    with pytest.raises(RuntimeError):
        architectures.logits_of(hf, torch.zeros(1, 2, 7))
    hidden = torch.zeros(1, 2, 128, requires_grad=True)
    architectures.logits_of(hf, hidden).sum().backward()
    assert hidden.grad is not None
    assert {name: set(vars(part)) for name, part in hf.named_modules()} == before
    with torch.no_grad():
        assert hf(ids).logits.shape == (3, 12, VOCAB)


# --------------------------------------------------------------------------------------------------------- score heads


def test_capped_attention_scores_are_capped(folder, tmp_path):
    """Gemma 2's: a cap so low that it changes every state, as transformers' plain attention computes it."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    for file in folder("gemma2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | {"attn_logit_softcapping": 0.05}))
    weights = load_file(tmp_path / "model.safetensors")  # scores above the cap
    weights = {n: w * 30 if "q_proj" in n or "k_proj" in n else w for n, w in weights.items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    ids, mask = rows()
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
        uncapped = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
        ours, wanted, other = (loading.trunk_hidden(hf, ids, mask)[mask] for hf in (load(tmp_path), plain, uncapped))
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)
    assert (other - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["granite", "cohere", "llama", "gpt2", "opt"])
def test_every_architecture_has_a_sequence_classifier(folder, tmp_path, kind):
    """Transformers' own where there is one; its trunk is the language model's, and saved it is read again the same."""
    import transformers

    classifier = load(folder(kind), CLASSIFIER, num_labels=1)
    own = type(classifier.config) in transformers.AutoModelForSequenceClassification._model_mapping
    assert own == (kind not in ("granite", "cohere"))
    ids, mask = rows()
    classifier.config.pad_token_id = 1
    with torch.no_grad():
        states = loading.trunk_hidden(classifier, ids, mask)
        assert torch.equal(states, loading.trunk_hidden(load(folder(kind)), ids, mask))
        classifier.save_pretrained(tmp_path)
        again = load(tmp_path, CLASSIFIER, num_labels=1)
        again.config.pad_token_id = 1
        assert torch.equal(again(ids).logits, classifier(ids).logits)
        assert torch.equal(loading.trunk_hidden(load(tmp_path, headless=True), ids, mask), states)


def test_a_classifier_of_code_that_came_with_the_model_is_asked_for_by_name():
    from transformers import PretrainedConfig

    class Own(PretrainedConfig):
        model_type = "made_up"

    with pytest.raises(InputError, match=r"made_up.*AutoModelForSequenceClassification.*auto_map"):
        architectures.auto_class(CLASSIFIER, Own())


# ------------------------------------------------------------------------------------------------------------- weights


def stored(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", *MIXTURES])
def test_weights_are_sent_as_they_lie_in_the_files(folder, kind):
    """An engine reads names and shapes of a checkpoint, whatever transformers makes of them in memory."""
    sent, files = dict(loading.named_weights(load(folder(kind)))), stored(folder(kind))
    assert sent.keys() == files.keys()
    assert all(torch.equal(sent[name], files[name]) for name in files)


@pytest.mark.parametrize("kind", ["gpt_neox", *MIXTURES])
def test_a_folded_adapter_is_the_policy_under_the_files_names(folder, tmp_path, kind):
    """PEFT adapts a mixture's experts too, which it wraps otherwise: what is sent makes a model that was never adapted."""
    from safetensors.torch import save_file

    source = ModelSource(str(folder(kind)), None, str(folder(kind)))
    roles = LoRA(rank=4).roles(Model(path=str(folder(kind))), source, None, VOCAB, None, 0)
    for name, parameter in roles.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    sent, files = dict(LoRA(rank=4).sync_payload(roles)), stored(folder(kind))
    assert sent.keys() == files.keys()
    save_file({name: tensor.contiguous() for name, tensor in sent.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder(kind) / "config.json").read_text())
    ids, _ = rows()
    roles.switch("policy")
    with torch.no_grad():
        adapted, merged = roles.model("policy")(ids).logits, load(tmp_path)(ids).logits
        assert float((adapted - merged).abs().max()) < 1e-5 * float(adapted.abs().max())
        assert float((adapted - load(folder(kind))(ids).logits).abs().max()) > 0.1
    if kind in MIXTURES:
        assert all(not torch.equal(sent[name], files[name]) for name in files if ".experts." in name)


# ------------------------------------------------------------------------------------------------------------ refusals

VLLM, HF = SimpleNamespace(name="vllm"), SimpleNamespace(name="hf")
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "num_attention_heads": 4}
REFUSED = {
    "images": (
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}, "text_config": {}},
        ["model_type=gemma3", "vision_config", "ForCausalLM"],
    ),
    "images, by another name": (
        {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]},
        ["Qwen2VLForConditionalGeneration", "ForCausalLM"],
    ),
    "sound": ({"model_type": "phi4_multimodal", "audio_config": {}}, ["phi4_multimodal", "audio_config"]),
    "encoder and decoder": (
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        ["model_type=t5", "encoder"],
    ),
    "encoder": ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, ["model_type=bert", "encoder"]),
    "a state": ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, ["model_type=mamba", "state"]),
    "a state in some layers": ({"model_type": "jamba"}, ["model_type=jamba", "attention in every layer"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_trained_is_named_by_its_config(name):
    facts, words = REFUSED[name]
    (line,) = architectures.refusals(facts, "model.path=x")
    assert "\n" not in line and all(word in line for word in ("model.path=x", *words))


@pytest.mark.parametrize(
    "facts",
    [
        LLAMA,
        LLAMA | {"architectures": None},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},  # a reward model of all weights
        {"model_type": "chatglm", "architectures": ["ChatGLMModel"]},
        {"model_type": "own", "architectures": ["OwnThing"], "auto_map": {"AutoModelForCausalLM": "own.OwnThing"}},
        {"model_type": "dbrx", "architectures": ["DbrxForCausalLM"], "attn_config": {}, "ffn_config": {}},
    ],
    ids=lambda facts: f"{facts['model_type']} {facts['architectures']}",
)
def test_a_causal_language_model_is_taken(facts):
    assert [*architectures.refusals(facts, "x"), *architectures.unserved(facts, "x", VLLM, cpu=False)] == []


@pytest.mark.parametrize(
    ("facts", "cpu", "words"),
    [
        ({"model_type": "mpt", "d_model": 128, "n_heads": 4}, False, ["model_type=mpt", "rollout=hf"]),
        (LLAMA | {"head_dim": 16}, True, ["dimension 16", "32, 64", "rollout=hf"]),
        (LLAMA | {"hidden_size": 64}, True, ["dimension 16", "rollout=hf"]),
        ({"model_type": "gpt2", "n_embd": 192, "n_head": 4}, True, ["dimension 48", "rollout=hf"]),
    ],
)
def test_what_vllm_cannot_run_is_said_before_the_start(facts, cpu, words):
    (line,) = architectures.unserved(facts, "model.path=x", VLLM, cpu)
    assert all(word in line for word in words)
    assert [*architectures.unserved(facts, "model.path=x", HF, cpu)] == []
    assert cpu is False or [*architectures.unserved(facts, "model.path=x", VLLM, cpu=False)] == []
    remote = SimpleNamespace(name="server", urls=["http://h:1"])  # on what device is not known here
    assert cpu is False or [*architectures.unserved(facts, "model.path=x", remote, cpu)] == []


def test_adapters_of_a_mixture_are_folded_in_or_refused():
    from alignkit.rollout.vllm import choose_payload

    facts = {"model_type": "mixtral", "num_local_experts": 8, "hidden_size": 128, "num_attention_heads": 4}
    for rollout, told in (
        (SimpleNamespace(name="server", urls=None), "rollout=server"),
        (SimpleNamespace(name="vllm", payload="adapter"), "rollout.payload=adapter"),
    ):
        (line,) = architectures.unserved(facts, "model.path=x", rollout, cpu=False)
        assert told in line and "rollout.payload=merged" in line
    assert [*architectures.unserved(facts, "model.path=x", VLLM, cpu=False)] == []
    assert choose_payload("auto", 8, cpu=False, experts=True)[0] == "merged"
    assert choose_payload("auto", 8, cpu=False)[0] == "adapter"


def rewrite(work: Path, **changes) -> None:
    file = work / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("stage", ["sft", "ppo", "pipeline"])
def test_a_stage_on_it_is_refused_before_it_starts(tmp_path, stage):
    work = make_work(tmp_path / "work")
    rewrite(work, model_type="mamba", architectures=["MambaForCausalLM"])
    refused(work, command(stage, "model.path=model"), "model.path=model", "model_type=mamba")


def test_a_pipeline_says_at_its_start_that_a_later_stage_cannot_answer(tmp_path):
    work = make_work(tmp_path / "work")
    rewrite(work, model_type="gpt_neo", architectures=["GPTNeoForCausalLM"])
    refused(work, command("pipeline", "model.path=model"), "rollout=vllm", "model_type=gpt_neo", "rollout=hf")
    assert "rollout" not in invoke(*command("sft", "model.path=model", "dry_run=true"), cwd=work).err


def test_a_pipeline_says_at_its_start_that_a_later_stage_has_too_many_tokens(tmp_path):
    work = make_work(tmp_path / "work")
    refused(
        work, command("pipeline", "model.path=model", "ppo.max_prompt_length=2000"), "max_prompt_length=2000", "2048"
    )


# ------------------------------------------------------------------------------------------- the lists, by the libraries


def served_by_vllm() -> set[str]:
    """Class names in vLLM's table of language models, read without importing it."""
    spec = find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations is not None
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / "model_executor/models/registry.py").read_text())
    (table,) = [
        node.value for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_TEXT_GENERATION_MODELS"
    ]  # fmt: skip
    return set(ast.literal_eval(table))


@pytest.mark.slow
def test_the_lists_hold_for_every_causal_architecture_of_the_installed_libraries():
    """vLLM runs what is in its table, and by transformers' classes those whose attention it may replace."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    native, wrong = served_by_vllm(), []
    for kind, name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        module = importlib.import_module(CONFIG_MAPPING[kind].__module__.replace("configuration", "modeling"))
        causal = getattr(module, name, None)
        trunk = modeling_auto.MODEL_MAPPING_NAMES.get(kind)
        trunk = getattr(module, trunk[0] if isinstance(trunk, tuple) else trunk or "", causal)
        facts = {"model_type": kind, "architectures": [name]}
        try:
            facts |= {
                k: v for k, v in CONFIG_MAPPING[kind]().to_dict().items() if k.endswith("_config") or "encoder" in k
            }
        except Exception:  # a config that has no defaults
            continue
        trained = not [*architectures.refusals(facts, "x")]
        run = name in native or getattr(trunk, "_supports_attention_backend", False)
        if trained and getattr(causal, "_is_stateful", False):
            wrong.append(f"{kind} carries a state")
        if trained and run == (kind in architectures.UNSERVED):
            wrong.append(f"{kind} {'is run by' if run else 'is not run by'} vLLM")
    assert wrong == []
