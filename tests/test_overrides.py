"""What is typed for a text arrives letter by letter, whatever it looks like to Hydra's grammar, to YAML or to a shell."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from test_cli import command, invoke, make_work, refused

from alignkit.check import config as check_config
from alignkit.cli import entry
from alignkit.config import overrides, stages
from alignkit.core.errors import InputError
from alignkit.pipeline import sweep

LIKE_OTHERS = ["007", "1e3", "1_000", "0x10", "true", "null", "2026-11-26", "1.0", "~", "inf", "nan", "-1", "???x"]
LIKE_SYNTAX = [
    *(
        "lr=1e-4",
        "a=1,b=2/sft",
        "answers (1).jsonl",
        "a#b",
        "a:b",
        "[x]",
        "{x",
        "a$b",
        "a${b",
        "it's",
        'say "hi"',
        "a@b",
    ),
    *("größe.jsonl", "日本語/данные", "a  b", " lead", "tail\\", "'a' b", 'it\'s "both"', "choice(1", "%*?|!"),
]


@pytest.fixture(scope="module", autouse=True)
def registered():
    stages.register()


def composed(stage: str, *words: str):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(entry.conf_dir()), version_base="1.3"):
        return compose(stage, overrides.meant(stage, words))


@pytest.mark.parametrize("text", [*LIKE_OTHERS, *LIKE_SYNTAX])
def test_a_text_arrives_as_it_was_typed_and_comes_back_from_the_saved_config(text, tmp_path):
    keys = ["run_name", "model.path", "data.path", "+data.columns.prompt", "logger.project"]
    found = composed("sft", *(f"{key}={text}" for key in keys))
    assert [OmegaConf.select(found, key.lstrip("+")) for key in keys] == [text] * len(keys)
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.masked_copy(found, ["run_name"])))
    kept = OmegaConf.load(tmp_path / "config.yaml")
    assert OmegaConf.merge(OmegaConf.structured(stages.SFT), kept).run_name == text


@pytest.mark.parametrize("text", ["007", "a=1,b=2", "größe (1)"])
def test_texts_of_components_and_of_open_dictionaries(text):
    reward = ["+reward@rewards.f=function", f"rewards.f.target={text}"]
    found = composed("evaluate", *reward, f"+policies.a={text}", f"reference={text}", f"logger.tags=['{text}',b]")
    assert (found.rewards.f.target, found.policies.a, found.reference) == (text,) * 3 and found.logger.tags == [
        text,
        "b",
    ]
    assert composed("pipeline", f"sft.data.path={text}", f"model.path={text}").sft.data.path == text


def test_lists_and_dictionaries_of_texts_hold_texts():
    assert composed("sft", "logger.tags=[007,1e3]").logger.tags == ["007", "1e3"]
    assert composed("evaluate", "+policies={a:007,b:runs/x=1}").policies == {"a": "007", "b": "runs/x=1"}
    assert composed("sft", "logger.tags=[]").logger.tags == []


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("model.path='a=b'", "a=b"),
        ('model.path="a,b"', "a,b"),
        (r"model.path=a\,b\=c", "a,b=c"),  # Hydra's own escapes
        ("model.path=runs/${run_name}/sft", "runs/007/sft"),
        ("model.path=runs/${run_name}/a=1", "runs/007/a=1"),
        ("model.path=", ""),
    ],
)
def test_what_is_written_in_hydras_own_terms_keeps_its_meaning(word, value):
    assert composed("sft", "run_name=007", word).model.path == value


def test_none_is_none_only_where_a_text_may_be():
    found = composed("evaluate", "reference=null", "run_name=null")
    assert found.reference is None and found.run_name == "null"


def test_numbers_and_groups_are_left_to_hydra():
    words = ["seed=7", "optimizer.betas=[0.9,0.95]", "finetune=full", "~logger", "+reward@rewards.f=function", "-m"]
    assert overrides.meant("sft", words) == words


@pytest.mark.parametrize(
    ("word", "swept"),
    [
        ("run_name=007,1e3", ["007", "1e3"]),
        ("model.path=runs/kl/a=1/sft,b c", ["runs/kl/a=1/sft", "b c"]),
        ("model.path=choice(007,größe)", ["007", "größe"]),
        ("model.path='a,b',c", ["a,b", "c"]),
        ("run_name=a,", None),
    ],
)
def test_a_sweep_over_texts_is_over_those_texts(word, swept):
    handed = overrides.parsed(overrides.meant("sft", ["-m", word])[1])
    assert handed.is_sweep_override() == (swept is not None)
    if swept is not None:
        assert [getattr(value, "text", value) for value in handed.value().list] == swept


def test_without_a_sweep_a_comma_is_a_letter():
    assert composed("sft", "model.path=a,b").model.path == "a,b"


def test_a_comma_in_a_path_that_exists_is_asked_about_in_a_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a=1,b=2").mkdir()
    with pytest.raises(InputError, match="a=1 and b=2") as error:
        overrides.meant("sft", ["-m", "model.path=a=1,b=2"])
    for fix in ("model.path='a=1,b=2'", "model.path=choice(a=1,b=2)"):
        assert fix in str(error.value) and overrides.meant("sft", ["-m", fix])
    assert overrides.meant("sft", ["model.path=a=1,b=2"]) == ["model.path='a=1,b=2'"]


def test_the_jobs_of_a_sweep_are_called_by_what_was_typed():
    words = overrides.meant("sft", ["-m", "data.path=größe.jsonl,007"])
    name = sweep.job_name("x", words, ["data.path='größe.jsonl'", "seed=1"], [], 0)
    assert name == "x/data.path=größe.jsonl"


@pytest.mark.parametrize("text", [*LIKE_SYNTAX, "`x`", "!x", "a\"$b'c"])
def test_what_a_message_says_to_paste_is_that_word_in_bash(text):
    word = f"seed={overrides.in_quotes(text)}"
    done = subprocess.run(["bash", "-c", f"printf %s {overrides.as_shell(word)}"], capture_output=True, text=True)
    assert done.stdout == word
    handed = overrides.parsed(word).value()
    assert handed.replace("\\${", "${") == text


@pytest.fixture
def work(tmp_path):
    return make_work(tmp_path / "work")


def test_what_hydra_cannot_read_is_refused_with_the_word_to_paste(work):
    message = refused(work, command("sft", "seed=a(b"), "seed=a(b", "write \"seed='a(b'\"")
    assert "hydra.cc" not in message


@pytest.mark.parametrize("name", ["a${b.jsonl", "cost${1}.jsonl", r"cost\${seed}.jsonl"])
def test_what_the_config_keeps_for_references_is_no_part_of_a_name(work, name):
    refused(work, command("sft", f"data.path={name}"), "data.path", "${", "rename")


def test_a_key_that_hydra_has_no_letters_for(work):
    refused(
        work,
        command("sft", "+data.columns.größe=x"),
        "+data.columns.größe",
        "cannot be written as a key",
        "file of your own",
    )


def test_a_blank_that_the_shell_took_for_an_end(work):
    words = refused(
        work, command("sft", "data.path=my", "file.jsonl"), "'file.jsonl' has no value", "'data.path=my file.jsonl'"
    )
    assert "my file.jsonl" in words


@pytest.mark.parametrize(
    "path", ["answers (1).jsonl", "größe=1,2.jsonl", "a 'b' #1.jsonl", "ppo.kl_coef=0.05/rows.jsonl"]
)
def test_rows_are_found_under_any_name(work, path):
    (work / path).parent.mkdir(exist_ok=True)
    (work / "answers.jsonl").rename(work / path)
    (work / "model").rename(work / "model,=(é)")
    words = ["run_name=lr=1e-4", f"data.path={path}", "model.path=model,=(é)", "dry_run=true"]
    for more in (["sft"], ["plan", "sft"], ["check", "data", "sft"]):
        given = words[:-1] if more[0] != "sft" else words
        result = invoke(*more, *given, cwd=work)
        assert result.code == 0, result.err
    assert "path: " in invoke("sft", *words, "--help", cwd=work).out


def test_the_lints_name_a_command_that_can_be_pasted(work):
    lines = (work / "answers.jsonl").read_text()
    (work / "twice (1).jsonl").write_text(lines * 2)
    out = invoke(*command("sft", "data.path=twice (1).jsonl", "dry_run=true"), cwd=work).out
    assert "`alignkit check data sft 'data.path=twice (1).jsonl'`" in out


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("run_name: 007\n", 2, "run_name: '007'"),
        ("seed: 7\nmodel: {path: 1e3}\n", 3, "path: '1e3'"),
        ("data:\n  path: true\n", 3, "path: 'true'"),
        ("logger:\n  tags: [a, 2]\n", 3, "tags: '2'"),
    ],
)
def test_a_text_of_an_experiment_that_yaml_reads_as_something_else(work, text, line, key):
    (work / "mine" / "experiment").mkdir(parents=True)
    path = work / "mine" / "experiment" / "e.yaml"
    path.write_text("# @package _global_\n" + text)
    given = command("sft", "+experiment=e", "--config-dir", "mine")
    refused(work, given, f"mine/experiment/e.yaml line {line}", f"write {key}")
    with pytest.raises(InputError, match=key):
        overrides.check_experiment("sft", path)
    path.write_text("# @package _global_\nrun_name: '007'\nseed: 7\nmodel: {path: '1e3'}\n")
    overrides.check_experiment("sft", path)


def test_check_config_refuses_such_an_experiment(work):
    path = work / "mine" / "experiment" / "e.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\nrun_name: 007\n")
    words = check_config.check_file(path, work / "mine", entry.conf_dir())
    assert words[0] == [] and "line 2: run_name: 007 is a text, but YAML reads int there" in words[1]
