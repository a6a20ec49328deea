"""The plan: sizes against published counts and transformers, bytes against what autograd keeps, counts by brute force."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import BESIDE, MANDATORY, command, invoke, make_work, snapshot, write_rows
from test_house import seconds, typed

from alignkit.core.errors import InputError
from alignkit.data import tokens
from alignkit.plan import compute, counts, fit, memory
from alignkit.plan import text as plan
from alignkit.plan.shape import FAMILIES, Shape

# config.json of released models, what a count needs of it, and the parameters their publishers state.
LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
PUBLISHED = {
    "Llama-3-8B": (
        LLAMA | {
            "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 14336, "vocab_size": 128256,
        }, 8_030_261_248,
    ),
    "Llama-2-70B": (
        LLAMA | {
            "num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8,
            "intermediate_size": 28672, "vocab_size": 32000,
        }, 68_976_648_192,
    ),
    "SmolLM2-135M": (
        LLAMA | {
            "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
            "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
        }, 134_515_008,
    ),
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2", "num_hidden_layers": 24, "hidden_size": 896, "num_attention_heads": 14,
            "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True,
        }, 494_032_768,
    ),
    "GPT-2": ({"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}, 124_439_808),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_released_models(name):
    config, parameters = PUBLISHED[name]
    assert Shape.read(config, "config.json").parameters == parameters


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("tied", [None, True, False])
def test_parameters_are_those_of_the_model_that_transformers_makes(kind, tied):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "gpt2":
        sizes = {"vocab_size": 300, "n_embd": 64, "n_layer": 3, "n_head": 4}
    config = AutoConfig.for_model(kind, **sizes | ({} if tied is None else {"tie_word_embeddings": tied}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = Shape.read(json.loads(config.to_json_string()) | {"model_type": kind}, "config.json")
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    names = {
        name.rsplit(".", 1)[-1]: m.weight
        for name, m in model.base_model.named_modules()
        if "Linear" in type(m).__name__
    }
    for name, (inputs, outputs, _) in shape.linears.items() if kind != "gpt2" else ():
        assert tuple(names[name].shape) == (outputs, inputs)


def tiny_llama(layers: int, **more):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, **more,
        )
    )  # fmt: skip


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("last", [None, 2])
def test_parameters_of_an_adapter_are_those_that_peft_makes(targets, last):
    from peft import get_peft_model

    from alignkit.finetune.lora import LoRA

    model = tiny_llama(3)
    shape = Shape.read(model.config.to_dict(), "config.json")
    finetune = LoRA(rank=8, target_modules=targets, last_layers=last)
    peft = get_peft_model(model, finetune.peft_config("CAUSAL_LM", model))
    assert shape.adapter(8, targets, last) == sum(p.numel() for p in peft.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [None, 4])
def test_a_block_keeps_the_bytes_that_autograd_saves(dtype, rank):
    """Storages that a second block adds to what a forward saves, parameters aside, on rows with padding."""
    import torch
    from peft import LoraConfig, get_peft_model

    found = []
    for layers in (1, 2):
        model = tiny_llama(layers).to(getattr(torch, dtype))
        if rank is not None:
            get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"), autocast_adapter_dtype=False)
        own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        saved: dict[int, torch.Tensor] = {}

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        ids, mask = torch.zeros(2, 24, dtype=torch.long), torch.ones(2, 24, dtype=torch.long)
        mask[0, -5:] = 0
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        found.append(sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in own))
        del out
    shape = Shape.read(model.config.to_dict(), "config.json")
    assert (found[1] - found[0]) / 48 == memory.block_activations(shape, 24, 4 if dtype == "float32" else 2, rank)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fused_head_holds_the_bytes_that_torch_allocates(dtype):
    """Allocations and frees of TRL's backward, added up in their order; the frozen head is as wide as a tile."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from trl.trainer import utils

    tokens, width = 64, memory.TILE[1]
    hidden = torch.zeros(tokens, 16, dtype=getattr(torch, dtype), requires_grad=True)
    weight, targets = torch.zeros(width, 16, dtype=hidden.dtype), torch.zeros(tokens, dtype=torch.long)
    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    logprobs = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, chunk)[0]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        logprobs.sum().backward()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    shape = Shape.read(tiny_llama(1).config.to_dict() | {"vocab_size": width}, "config.json")
    expected = memory.fused_head(shape, tokens, hidden.element_size(), full=False, gpu=False)
    assert peak == pytest.approx(expected, rel=0.01)


def test_flops_of_full_training_are_six_a_weight_and_token():
    """6 N T (arXiv 2001.08361) for a model whose embedding and context are small against its blocks."""
    shape = Shape.read(PUBLISHED["Llama-2-70B"][0], "config.json")
    cfg = typed("sft", "finetune=full")
    work = counts.Work(
        counts.Rows(1, 1),
        None,
        1,
        1,
        1,
        1,
        tokens=1e6,
        response_tokens=1e6,
        exact=True,
        length=100,
        longest=100,
        slots=0,
    )
    total = sum(compute.flops(cfg, shape, work, False).values())
    assert total == pytest.approx(6 * shape.parameters * 1e6, rel=0.01)


def test_lora_saves_the_gradients_of_the_frozen_weights_and_the_blocks_below():
    shape = Shape.read(PUBLISHED["Llama-2-70B"][0], "config.json")
    work = counts.Work(
        counts.Rows(1, 1), None, 1, 1, 1, 1, tokens=1e6, response_tokens=0, exact=True, length=0, longest=1, slots=0
    )
    full, lora, half = (
        compute.flops(typed("reward", choice), shape, work, False)["train"]
        for choice in ("finetune=full", "finetune.rank=1", "finetune.last_layers=40")
    )
    assert lora / full == pytest.approx(2 / 3, rel=0.01)
    blocks = 2 * shape.layers * shape.block_matrix * 1e6
    assert half == pytest.approx(1.5 * blocks + 6e6 * shape.adapter(16, "all-linear", 40))


# ------------------------------------------------------------------------------------------------------------- counts


@pytest.fixture(scope="module")
def smol_tokens():
    from alignkit.data import demo

    return demo.model("smollm2-135m-instruct")


@pytest.mark.parametrize("which", ["tiny", "smol_tokens"])
def test_the_plain_tokenizer_gives_the_ids_of_transformers(which, request):
    folder = request.getfixturevalue(which)
    slow, plain = tokens.load_tokenizer(folder), counts.PlainTokenizer(str(folder))
    prompts = [
        "Hello there!",
        "naïve café — don't\n\n  stop",
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    ]
    for prompt in prompts:
        assert tokens.encode_prompt(plain, prompt) == tokens.encode_prompt(slow, prompt)
    for text in ("", "I love the day.", "  twelve <|im_end|> 12"):
        assert tokens.encode_response(plain, text) == tokens.encode_response(slow, text)


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 40])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("micro", "mini"), [(4, 8), (2, 8), (8, 16)])
def test_steps_of_an_epoch_by_brute_force(tmp_path, rows, ranks, micro, mini):
    """Batches dealt out to ranks, accumulated to optimizer steps, as accelerate and the Trainer do it."""
    write_rows(tmp_path / "a.jsonl", *({"prompt": f"p{i}", "completion": "c"} for i in range(rows)))
    cfg = typed(
        "sft", f"data.path={tmp_path}/a.jsonl", "eval_fraction=0", f"launcher.num_ranks={ranks}", f"micro_batch_size={micro}",
        f"mini_batch_size={mini}", "epochs=2",
    )  # fmt: skip
    work = counts.count(cfg, None)
    left, steps = rows, 0
    while left > 0:  # an optimizer step
        for _ in range(mini // micro // ranks):
            left -= min(left, micro * ranks)
        steps += 1
    assert (work.steps, work.sequences) == (2 * steps, 2 * rows)


# ---------------------------------------------------------------------------------------------------------------- fit


def llama_plan(*overrides: str, gib: float = 80, length: int = 512):
    shape = Shape.read(PUBLISHED["Llama-3-8B"][0], "config.json")
    cfg, device = typed("sft", *overrides), memory.Device(gib * memory.GIB, gpu=True)
    return cfg, lambda other: memory.predict(other, shape, device, 0, length)


def test_what_fits_is_left_alone_and_what_does_not_gets_the_cheapest_change_that_does():
    from alignkit.config import stages as config

    cfg, predict = llama_plan("model.dtype=bfloat16", "micro_batch_size=16", "mini_batch_size=16", length=2048)
    need = fit.peak(predict(cfg)).total
    assert need > 80 * memory.GIB
    overrides, _, after = fit.cheapest(cfg, 80 * memory.GIB, predict, config.components)
    assert overrides[0].startswith("micro_batch_size=") and after <= 80 * memory.GIB
    larger = 2 * int(overrides[0].split("=")[1])  # the next larger one does not fit: no more is given up than needed
    if larger < 16:
        assert (
            fit.peak(predict(fit.changed(cfg, [f"micro_batch_size={larger}"], config.components))).total
            > 80 * memory.GIB
        )


def test_full_training_of_8b_fits_no_gpu_of_80_gib_but_lora_does():
    from alignkit.config import stages as config

    cfg, predict = llama_plan("finetune=full", "model.dtype=bfloat16", "micro_batch_size=1")
    assert fit.peak(predict(cfg)).total > 16 * 8.03e9  # 2 weights, 2 gradients, 12 master and moments
    overrides, _, _ = fit.cheapest(cfg, 80 * memory.GIB, predict, config.components)
    assert overrides == ["finetune=lora"]


def test_qlora_holds_the_matrices_in_4_bits_and_the_rest_as_it_is():
    """arXiv 2305.14314: 4 bits a weight and 0.127 more for its scales, once those are quantised too."""
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    held = matrices * (4 + 0.127) / 8 + (8_030_261_248 - matrices) * 2
    weights = {}
    for name in ("lora", "qlora"):
        cfg, predict = llama_plan("model.dtype=bfloat16", f"finetune={name}", "micro_batch_size=1")
        phases = predict(cfg)
        weights[name] = phases[-1].parts["weights"]
    assert weights["lora"] == 2 * 8_030_261_248
    assert weights["qlora"] == pytest.approx(held, rel=1e-4) and weights["qlora"] < 0.4 * weights["lora"]


def test_8b_fits_12_gib_with_the_base_in_4_bits():
    from alignkit.config import stages as config

    cfg, predict = llama_plan("model.dtype=bfloat16", "micro_batch_size=1", gib=12)
    assert fit.peak(predict(cfg)).total > 12 * memory.GIB
    overrides, _, after = fit.cheapest(cfg, 12 * memory.GIB, predict, config.components)
    assert overrides[0] == "finetune=qlora" and after < 12 * memory.GIB


def test_a_base_in_4_bits_takes_the_bytes_that_the_plan_counts(tiny):
    pytest.importorskip("bitsandbytes")
    from alignkit.models import loading, quantization
    from alignkit.models.config import Model

    hf = loading.load_base(str(tiny), Model(path=str(tiny)), 0, nf4=True)
    shape = Shape.read(json.loads((tiny / "config.json").read_text()), "config.json")
    taken = 0.0
    for layer in quantization.layers(hf).values():
        state = layer.weight.quant_state
        taken += layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    others = sum(p.nbytes for p in hf.parameters()) - sum(x.weight.nbytes for x in quantization.layers(hf).values())
    assert taken + others == pytest.approx(shape.weight_bytes(4, nf4=True), rel=0.02)


def test_zero_shares_the_optimizer_between_the_ranks():
    one, eight = (memory.training(10**9, 2, 2, ranks, 10**6) for ranks in (1, 8))
    assert one["optimizer"] == 8 * eight["optimizer"] == 12e9


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def work(tmp_path):
    return make_work(tmp_path / "work")


@pytest.mark.parametrize("name", MANDATORY)
def test_a_plan_ends_with_the_launch_command_and_writes_nothing(work, name):
    before = snapshot(work)
    result = invoke("plan", *command(name), cwd=work)
    assert (result.code, result.err) == (0, "")
    launches = [line for line in result.out.splitlines() if line.startswith("$ ")]
    assert len(launches) == (5 if name == "pipeline" else 1)
    assert "model/config.json: model_type=''" in result.out  # what is missing is said
    assert snapshot(work) == before


@pytest.fixture
def seventy(work):
    """A 70B model's config.json, without weights or tokenizer."""
    (work / "big").mkdir()
    (work / "big" / "config.json").write_text(json.dumps(PUBLISHED["Llama-2-70B"][0]))
    return work


def test_a_70b_model_is_planned_from_its_config_alone(seventy):
    arguments = [
        "plan", "sft", "run_name=new", "model.path=big", "data.path=answers.jsonl", "model.dtype=bfloat16", "deepspeed=zero3",
        "launcher.num_ranks=8", "mini_batch_size=64", "--device-memory", "80GiB",
    ]  # fmt: skip
    out = invoke(*arguments, cwd=seventy).out
    assert "68,976,648,192 parameters" in out and "GiB, a GPU" in out


def test_a_dry_run_shows_the_plan_too(work):
    out = invoke(*command("ppo", "dry_run=true", "steps=7"), cwd=work).out
    assert "the run: 7 rounds = 448 prompts = 448 sequences = 14 optimizer steps" in out


def test_settings_that_differ_from_the_defaults_are_listed(work):
    out = invoke("plan", *command("sft", "seed=3", "finetune.rank=8", "epochs=1.0", "model.path=model"), cwd=work).out
    line = next(line for line in out.splitlines() if "not at their defaults" in line)
    assert "seed=3" in line and "finetune.rank=8" in line and "epochs" not in line and "max_length" not in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan"], ["give a command", "sft"]),
        (["plan", "pppo"], ["pppo", "ppo"]),
        (["plan", "sft", "--device-memory"], ["--device-memory needs a value", "80GiB"]),
        (["plan", "sft", "--device-memory=80"], ["--device-memory=80", "80GiB"]),
        (["plan", "sft", "--device-memory=1.2.3GiB"], ["expected a size"]),
        (["plan", *command("sft"), "--throughput=fast"], ["--throughput=fast", "tokens a second"]),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused_in_one_line(work, arguments, words):
    result = invoke(*arguments, cwd=work)
    assert result.code == 2 and len(result.err.splitlines()) == 1 and result.out == ""
    assert all(word in result.err for word in words), result.err


@pytest.mark.parametrize(
    ("text", "number"), [("80GiB", 80 * 2**30), ("80GB", 8e10), ("1.5 g", 1.5e9), ("500MiB", 500 * 2**20)]
)
def test_sizes(text, number):
    assert plan.size(text, "x") == number


def test_a_throughput_gives_the_hours(work, tiny):
    arguments = [*command("ppo", "steps=10", without="model.path"), f"model.path={tiny}", "--throughput=2"]
    arguments = [a for a in arguments if "reward_model" not in a] + [
        "~reward@rewards.reward_model",
        "+reward@rewards.v=vader",
    ]
    result = invoke("plan", *arguments, cwd=work)
    rows = [len(tokens.encode_prompt(tokens.load_tokenizer(tiny), f"p{i}")) for i in range(4)]
    sampled = tokens.PromptSampler(4, 0).next(640)
    total = sum(rows[i] for i in sampled) + 640 * 64
    assert f"at most {total:,}, {640 * 64:,} of them in answers" in result.out, result.err
    assert f"{total / 2 / 3600:.1f} h at 2 tokens a second" in result.out


def test_a_plan_loads_nothing_heavy_and_takes_less_than_three_seconds(seventy, monkeypatch):
    monkeypatch.chdir(seventy)
    arguments = ["plan", "pipeline", "run_name=x", "model.path=big", *BESIDE["pipeline"], "sft.data.path=answers.jsonl"]
    arguments += [f"{stage}.data.path=prompts.jsonl" for stage in ("sample", "ppo", "evaluate")]
    code = (
        "import sys, atexit, alignkit.cli\n"
        f"sys.argv = ['alignkit', *{arguments!r}]\n"
        "alignkit.cli.main()\n"
        "print([n for n in ('torch', 'vllm', 'transformers', 'deepspeed', 'datasets', 'peft') if n in sys.modules])"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.splitlines()[-1] == "[]"
    assert seconds(*arguments) < 3


def test_a_wrong_model_is_refused_by_name():
    with pytest.raises(InputError, match="model_type='mamba' is not among"):
        Shape.read({"model_type": "mamba"}, "config.json")
    with pytest.raises(InputError, match="no hidden_size"):
        Shape.read({"model_type": "llama", "num_hidden_layers": 2}, "config.json")
