"""Sixty inputs that nobody should wait for: each is refused within seconds, on one line with place, value and fix.

Exit code 2, no traceback, and nothing is left behind: `refused` compares the whole folder before and after.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
from test_cli import command, finished_run, make_work, refused, write_rows, write_weights

from alignkit.runs import manifests

SECONDS = 10  # of the processor: a busy machine changes nothing
ANSWER = {"prompt": "p", "completion": "c"}


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    """Write a file."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda work: ((work / name).parent.mkdir(parents=True, exist_ok=True), (work / name).write_bytes(raw))


def rows(*bad: object, name: str = "bad.jsonl") -> Callable[[Path], object]:
    """Write a good row and the bad ones behind it."""
    return text(name, "".join(json.dumps(row) + "\n" for row in (ANSWER, *bad)))


def nothing(work: Path) -> None:
    pass


# ------------------------------------------------------------------------------------------------------------ configs

EXPERIMENT = "# @package _global_\n"
# name: (what to write, the command line, words of the refusal)
CONFIGS = {
    "unknown key": (nothing, command("sft", "epoch=2"), ["'epoch'", "epochs?"]),
    "unknown nested key": (nothing, command("ppo", "algorithm.cliprange=1"), ["algorithm.cliprange", "algorithm.clip_range?"]),
    "unknown key of a dict entry": (
        nothing, command("sample", "rewards.gold.wieght=2"), ["rewards.gold.wieght", "rewards.gold.weight?"]
    ),
    "key of another option": (
        nothing,
        command("ppo", "algorithm=grpo", "group_size=2", "algorithm.gae_lambda=1"),
        ["algorithm.gae_lambda", "algorithm=grpo", "algorithm=ppo"],
    ),
    "unknown option": (nothing, command("sft", "finetune=lorra"), ["finetune", "lorra", "full", "lora"]),
    "no option": (nothing, command("sft", "finetune=null"), ["finetune=null", "finetune=<", "lora"]),
    "option by its name": (nothing, command("ppo", "finetune.name=full"), ["finetune.name=full", "finetune=<option>"]),
    "wrong type": (nothing, command("sft", "mini_batch_size=many"), ["mini_batch_size", "many", "Integer"]),
    "list for a number": (nothing, command("sft", "seed=[1,2]"), ["seed", "[1, 2]"]),
    "number for a list": (nothing, command("sft", "logger.tags=1"), ["logger.tags"]),
    "out of range": (nothing, command("ppo", "rollout.temperature=0"), ["rollout.temperature=0", "more than 0"]),
    "no number": (nothing, command("ppo", "algorithm.kl_coef=nan"), ["algorithm.kl_coef=nan", "0 or more"]),
    "batch arithmetic": (
        nothing, command("ppo", "mini_batch_size=24"), ["mini_batch_size=24", "rollout_batch_size=64", "try rollout_batch_size=72"]
    ),
    "fields that contradict each other": (
        nothing, command("ppo", "rollout=server", "finetune=full"), ["rollout=server", "finetune=full", "finetune=lora"]
    ),
    "no such experiment": (nothing, command("pipeline", "+experiment=nope"), ["experiment/nope", "quickstart"]),
    "unknown key in an experiment": (
        text("own/experiment/e.yaml", f"{EXPERIMENT}sft:\n  optimizer: {{learning_rat: 1}}\n"),
        command("pipeline", "+experiment=e", "--config-dir", "own"),
        ["sft.optimizer.learning_rat'", "sft.optimizer.learning_rate?"],
    ),
    "broken experiment": (
        text("own/experiment/e.yaml", f"{EXPERIMENT}seed: [1\nsteps: 3\n"),
        command("pipeline", "+experiment=e", "--config-dir", "own"),
        ["e.yaml", "line 3"],
    ),
    "interpolation to nowhere": (nothing, command("sft", "seed=${sed}"), ["sed", "seed"]),
    "a run name that leaves its folder": (nothing, command("sft", "run_name=a/../../b"), ["run_name", "'a/../../b'", "use letters"]),
    "a runs_dir that is a file": (
        nothing, command("sft", "runs_dir=answers.jsonl"), ["answers.jsonl/new/sft", "cannot be written", "runs_dir="]
    ),
    "a runs_dir that is read-only, for root too": (
        nothing, command("sft", "runs_dir=/sys/runs"), ["/sys/runs/new/sft", "cannot be written", "runs_dir="]
    ),
    "no config folder": (nothing, command("sft", "--config-dir", "nope"), ["nope"]),
    "an empty model.path": (nothing, command("sft", "model.path="), ["model.path=''", "hub id"]),
    "an empty data.path": (nothing, command("sft", "data.path="), ["data.path is not set", "give a file"]),
    "a policy without a path": (nothing, command("evaluate", "+policies.x="), ["policies.x=''", "hub id"]),
    "no key": (nothing, command("sft", "epochs"), ["'epochs'", "epochs=..."]),
}  # fmt: skip

# --------------------------------------------------------------------------------------------------------- data files

MANY = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def gz(work: Path) -> None:
    (work / "bad.jsonl.gz").write_bytes(gzip.compress(json.dumps(ANSWER).encode()))


def parquet(work: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p"] * 99, "completion": ["c"] * 99}), work / "bad.parquet")
    raw = (work / "bad.parquet").read_bytes()
    (work / "bad.parquet").write_bytes(raw[: len(raw) // 2])


def loop(work: Path) -> None:
    (work / "bad.jsonl").symlink_to(work / "other.jsonl")
    (work / "other.jsonl").symlink_to(work / "bad.jsonl")


# name: (what to write, the stage, its data.path, words of the refusal)
DATA = {
    "no file": (nothing, "sft", "answer.jsonl", ["answer.jsonl", "no such file", "did you mean answers.jsonl"]),
    "a folder": (text("bad/x.txt", ""), "sft", "bad", ["data.path=bad", "x.txt", "save_to_disk"]),
    "an empty file": (text("bad.jsonl", ""), "sft", "bad.jsonl", ["bad.jsonl", "no rows"]),
    "a file of blank lines": (text("bad.jsonl", "\n \n\n"), "sft", "bad.jsonl", ["bad.jsonl", "no rows"]),
    "bytes": (text("bad.jsonl", bytes(range(128, 256))), "sft", "bad.jsonl", ["bad.jsonl", "UTF-8"]),
    "UTF-16": (text("bad.jsonl", json.dumps(ANSWER).encode("utf-16")), "sft", "bad.jsonl", ["bad.jsonl", "UTF-8"]),
    "a line cut off": (text("bad.jsonl", '{"prompt": "p", "com\n'), "sft", "bad.jsonl", ["bad.jsonl line 1", "not JSON"]),
    "a trailing comma": (
        text("bad.jsonl", '{"prompt": "p", "completion": "c",}\n'), "sft", "bad.jsonl", ["bad.jsonl line 1", "column"]
    ),
    "a list for a row": (rows(["p", "c"]), "sft", "bad.jsonl", ["bad.jsonl line 2", "list", "expected an object"]),
    "an object for rows": (text("bad.json", '{"a": 1}'), "sft", "bad.json", ["bad.json", "expected a list"]),
    "brackets without end": (text("bad.jsonl", "[" * 200_000), "sft", "bad.jsonl", ["bad.jsonl line 1", "not JSON"]),
    "null": (rows(ANSWER | {"completion": None}), "sft", "bad.jsonl", ["line 2", "'completion'", "null", "string"]),
    "a number": (rows(ANSWER | {"completion": 7}), "sft", "bad.jsonl", ["line 2", "'completion'", "int 7", "write it as text"]),
    "NaN": (rows(ANSWER | {"prompt": float("nan")}), "sft", "bad.jsonl", ["line 2", "'prompt'", "nan"]),
    "a nested field": (rows(ANSWER | {"prompt": {"text": "p"}}), "sft", "bad.jsonl", ["line 2", "'prompt'", "dict"]),
    "white space": (rows(ANSWER | {"completion": " \n"}), "sft", "bad.jsonl", ["line 2", "'completion'", "empty", "remove the row"]),
    "half a character": (
        text("bad.jsonl", '{"prompt": "p \\ud83d", "completion": "c"}\n'), "sft", "bad.jsonl",
        ["bad.jsonl line 1", "'prompt'", "\\ud83d"],
    ),
    "another column": (
        rows({"question": "p", "completion": "c"}), "sft", "bad.jsonl", ["line 2", "'prompt'", "+data.columns.prompt=question"]
    ),
    "an unknown role": (
        rows({"messages": [MANY[0], {"role": "bot", "content": "a"}]}), "sft", "bad.jsonl", ["line 2", "messages[1].role", "'bot'"]
    ),
    "roles out of order": (rows({"messages": MANY[::-1]}), "sft", "bad.jsonl", ["line 2", "assistant, user", "cut it"]),
    "an empty conversation": (rows({"messages": []}), "sft", "bad.jsonl", ["line 2", "'messages'", "empty list"]),
    "no answer": (rows({"messages": MANY[:1]}), "sft", "bad.jsonl", ["line 2", "messages of user", "assistant"]),
    "a pair of the same": (
        text("bad.jsonl", json.dumps({"prompt": "p", "chosen": "a", "rejected": "a"})), "reward", "bad.jsonl",
        ["bad.jsonl line 1", "the same text 'a'", "remove the row"],
    ),
    "a ragged CSV": (
        text("bad.csv", "prompt,completion\np,c\np,c,d\n"), "sft", "bad.csv", ["bad.csv row 2", "3 columns", "expected 2"]
    ),
    "half a Parquet file": (parquet, "sft", "bad.parquet", ["bad.parquet", "unreadable Parquet", "write the file again"]),
    "a gz file": (gz, "sft", "bad.jsonl.gz", ["bad.jsonl.gz", "'.gz'", ".jsonl"]),
    "a loop of links": (loop, "sft", "bad.jsonl", ["bad.jsonl"]),
    # 300 bytes of one token each, and 19 tokens of ChatML
    "prompts that are too long": (
        text("bad.jsonl", json.dumps({"prompt": "p" * 300})), "ppo", "bad.jsonl",
        ["max_prompt_length=256", "all 1 rows", "319", "raise max_prompt_length"],
    ),
    "a line of 10 MB": (
        text("bad.jsonl", json.dumps({"prompt": "word " * 2_000_000})), "ppo", "bad.jsonl", ["max_prompt_length=256", "raise"]
    ),
    "a prompt that ends with the answer": (
        text("bad.jsonl", json.dumps({"prompt": MANY})), "ppo", "bad.jsonl", ["line 1", "'prompt'", "remove the last one"]
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------------------- models, tokenizers, runs


def cut(name: str, keep: int) -> Callable[[Path], object]:
    """Keep the first bytes of a file."""
    return lambda work: (work / name).write_bytes((work / name).read_bytes()[:keep])


def remove(name: str) -> Callable[[Path], object]:
    return lambda work: (work / name).unlink()


def change(name: str, **changes: object) -> Callable[[Path], object]:
    """Set keys of a JSON file; None removes one."""

    def apply(work: Path) -> None:
        found = json.loads((work / name).read_text()) | changes
        (work / name).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))

    return apply


def whole_weights(work: Path) -> None:
    """Weights of one tensor, the last bytes of which are lost on the way."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}).encode()
    (work / "model/model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(200))


def adapter(work: Path) -> None:
    (work / "adapter").mkdir()
    (work / "adapter/adapter_config.json").write_text('{"r": 16, "lora_alpha": 32}')
    write_weights(work / "adapter/adapter_model.safetensors")


def other_tokenizer(work: Path) -> None:
    finished_run(work / "runs/other/reward", "reward", work / "model", tokenizer_hash="t1")


def lost_base(work: Path) -> None:
    (work / "model").rename(work / "moved")


MODEL = command("sft", "model.path=model")
RUN = command("sft")
PPO = command("ppo")
TEMPLATE = "model/chat_template.jinja"
DROPS = "{% for m in messages[:-1] %}{{ m['content'] }}{% endfor %}"
MODELS = {
    "config.json is no JSON": (text("model/config.json", "{'a': 1}"), MODEL, ["model/config.json", "damaged", "save_pretrained"]),
    "config.json is a list": (text("model/config.json", "[]"), MODEL, ["model/config.json", "list", "expected an object"]),
    "weights cut off": (whole_weights, MODEL, ["model.safetensors", "bytes", "cut off", "copy it again"]),
    "weights cut in the header": (cut("model/model.safetensors", 9), MODEL, ["model.safetensors", "9 bytes", "copy it again"]),
    "weights that are none": (
        text("model/model.safetensors", b"<!DOCTYPE html>" * 9), MODEL, ["model.safetensors", "copy it again"]
    ),
    "a shard is missing": (
        text("model/model.safetensors.index.json", '{"weight_map": {"w": "model-00002.safetensors"}}'), MODEL,
        ["lacks model-00002.safetensors", "copy it again"],
    ),
    "an adapter without its base's name": (
        adapter, command("sft", "model.path=adapter"), ["adapter_config.json", "base_model_name_or_path"]
    ),
    "an adapter config that is no JSON": (
        text("adapter/adapter_config.json", "{"), command("sft", "model.path=adapter"), ["adapter_config.json", "damaged"]
    ),
    "a run whose base is gone": (lost_base, RUN, ["model.path=runs/base/sft", "base model", "put it back"]),
    "a run without its adapter": (
        remove("runs/base/sft/model/adapter_model.safetensors"), RUN, ["model.path=runs/base/sft", "no adapter_model.safetensors"]
    ),
    "an adapter of another rank": (
        change("runs/base/sft/model/adapter_config.json", r=8), RUN, ["rank=16", "finetune.rank=8"]
    ),
    "no tokenizer": (remove("model/tokenizer.json"), MODEL, ["model.path=model", "no tokenizer.json", "save_pretrained"]),
    "a tokenizer that is no JSON": (cut("model/tokenizer.json", 99), MODEL, ["model/tokenizer.json", "damaged", "save_pretrained"]),
    "a tokenizer of something else": (
        text("model/tokenizer.json", '{"a": 1}'), MODEL, ["model/tokenizer.json", "no tokenizer", "save_pretrained"]
    ),
    "no end token": (change("model/tokenizer_config.json", eos_token=None), MODEL, ["tokenizer_config.json", "eos_token", "name one"]),
    "a template with a syntax error": (text(TEMPLATE, "a\n{% for %}"), MODEL, [TEMPLATE, "line 2", "model.chat_template"]),
    "a template that drops the last message": (text(TEMPLATE, DROPS), MODEL, [TEMPLATE, "last message", "model.chat_template"]),
    "a template that refuses": (
        text(TEMPLATE, "{{ raise_exception('no user, please') }}"), MODEL, [TEMPLATE, "no user, please", "model.chat_template"]
    ),
    "a template that is nowhere": (
        nothing, command("sft", "model.chat_template=t.jinja"), ["model.chat_template=t.jinja", "neither a Jinja text nor a file"]
    ),
    "a damaged manifest": (cut("runs/base/sft/manifest.json", 30), RUN, ["runs/base/sft/manifest.json", "damaged", "run the stage again"]),
    "a manifest of something else": (
        text("runs/base/sft/manifest.json", "[1, 2]"), RUN, ["runs/base/sft/manifest.json", "list", "run the stage again"]
    ),
    "a manifest of a later version": (
        change("runs/base/sft/manifest.json", schema=99), RUN, ["manifest.json", "schema 99", "run the stage again"]
    ),
    "a manifest without a base": (
        change("runs/base/sft/manifest.json", base_model=None), RUN, ["manifest.json", "base_model.path", "run the stage again"]
    ),
    "a run that is not done": (
        lambda work: manifests.write_manifest(work / "runs/base/sft", status="failed"), RUN,
        ["runs/base/sft", "failed, not done", "alignkit sft run_name=base"],
    ),
    "a reward run without its head": (
        remove("runs/base/reward/model/score_head.safetensors"), PPO, ["runs/base/reward", "score_head.safetensors"]
    ),
    "a reward of another tokenizer": (
        other_tokenizer, command("ppo", "rewards.reward_model.path=runs/other/reward"), ["(t1)", "(t0)", "alignkit reward"]
    ),
    "a file for a model": (nothing, command("sft", "model.path=./answers.jsonl"), ["model.path='./answers.jsonl'", "no such folder"]),
}  # fmt: skip


CASES = [
    *(pytest.param(write, line, words, id=f"config: {name}") for name, (write, line, words) in CONFIGS.items()),
    *(
        pytest.param(write, command(stage, f"data.path={path}"), words, id=f"data: {name}")
        for name, (write, stage, path, words) in DATA.items()
    ),
    *(pytest.param(write, line, words, id=f"model: {name}") for name, (write, line, words) in MODELS.items()),
]


def test_there_are_enough():
    assert len(CONFIGS) >= 20 and len(DATA) >= 25 and len(MODELS) >= 15


@pytest.mark.parametrize(("write", "line", "words"), CASES)
def test_a_bad_input_is_refused_at_once_with_place_value_and_fix(tmp_path, write, line, words):
    work = make_work(tmp_path / "work")
    write(work)
    started = time.process_time()
    refused(work, line, *words)
    assert time.process_time() - started < SECONDS


@pytest.mark.parametrize(
    ("write", "stage", "path"),
    [
        (text("good.jsonl", b"\xef\xbb\xbf" + json.dumps(ANSWER).encode() + b"\r\n"), "sft", "good.jsonl"),
        (rows({"messages": MANY}, name="good.jsonl"), "sft", "good.jsonl"),
        (text("good.jsonl", json.dumps({"prompt": "\u2028 \U0001f9ff"}, ensure_ascii=False)), "ppo", "good.jsonl"),
    ],
    ids=["byte order mark", "both layouts", "line separator"],
)
def test_what_only_looks_odd_is_taken(tmp_path, write, stage, path):
    from test_cli import invoke

    work = make_work(tmp_path / "work")
    write(work)
    assert invoke(*command(stage, f"data.path={path}", "dry_run=true"), cwd=work).code == 0


def test_a_template_may_use_what_transformers_offers(tmp_path):
    from test_cli import invoke

    work = make_work(tmp_path / "work")
    template = (
        "{%- for m in messages %}{%- if loop.index0 > 9 %}{% break %}{% endif %}{% generation %}{{ bos_token }}"
        "{{ m | tojson }}{{ strftime_now('%Y') }}{% endgeneration %}\n{%- endfor %}"
    )
    (work / TEMPLATE).write_text(template)
    write_rows(work / "rows.jsonl", ANSWER)
    result = invoke(*command("sft", "model.path=model", "data.path=rows.jsonl", "dry_run=true"), cwd=work)
    assert (result.code, result.err) == (0, "")


def test_what_a_template_changes_is_said_alike_by_a_check_and_a_dry_run_and_refused_where_data_is_strict(tmp_path):
    from test_cli import invoke

    work = make_work(tmp_path / "work")
    template = (work / TEMPLATE).read_text()
    (work / TEMPLATE).write_text("{% set messages = messages[-1:] %}" + template.replace("<|im_end|>", "</end>"))
    system = {"role": "system", "content": "Be brief."}
    prompts = [[system, {"role": "user", "content": f"Hi {i}"}] for i in range(3)]
    write_rows(work / "rows.jsonl", *({"prompt": prompt, "completion": "Yo."} for prompt in prompts), ANSWER)
    given = ["model.path=model", "data.path=rows.jsonl"]
    checked = invoke("check", "data", "sft", *given, cwd=work)
    started = invoke(*command("sft", *given, "dry_run=true"), cwd=work)
    assert "drops system messages: the rendered prompt does not contain 'Be brief.'" in checked.out
    assert "rows.jsonl: the chat template drops system messages in 3 of 4 rows" in started.out
    for said in (checked.out, started.out):
        assert "the template closes an answer with '</end>', training closes it with the eos token '<|im_end|>'" in said
    strict = invoke(*command("sft", *given, "data.lint=strict"), cwd=work)
    assert strict.code == 2 and "drops system messages in 3 of 4 rows" in strict.err and strict.err.count("\n") == 1


def test_the_date_that_a_template_is_told_stands_in_the_config_of_a_run(tmp_path):
    from test_cli import invoke

    work = make_work(tmp_path / "work")
    template = (work / TEMPLATE).read_text()
    write_rows(work / "rows.jsonl", ANSWER)
    given = command("sft", "model.path=model", "data.path=rows.jsonl", "dry_run=true")
    assert "template_date: null" in invoke(*given, cwd=work).out
    (work / TEMPLATE).write_text("{{ strftime_now('%d %b %Y') }}" + template)
    said = invoke(*given, "model.template_date=2026-05-01", cwd=work).out
    assert "the chat template is told the date 2026-05-01" in said and "template_date: '2026-05-01'" in said
    assert f"the chat template is told the date {date.today().isoformat()}" in invoke(*given, cwd=work).out
    assert invoke(*given, "model.template_date=May", cwd=work).code == 2
    whole = invoke(*command("pipeline", "dry_run=true"), cwd=work)  # of models that are still to come, too
    assert (whole.code, whole.err) == (0, "")
