"""A run that is read is what it was when it was made, and its base is found wherever the command is called from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from test_cli import command, invoke, make_work, refused

from alignkit.core.errors import InputError
from alignkit.models.source import resolve_model
from alignkit.pipeline import lineage
from alignkit.runs import hashes, manifests

ADAPTER = "runs/base/sft/model/adapter_model.safetensors"


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """The working directory, with runs whose base is the relative path `model` and whose manifests say what lies there."""
    folder = make_work(tmp_path / "work")
    monkeypatch.chdir(folder)
    for stage in ("sft", "reward", "ppo"):
        run = Path("runs/base") / stage
        (run / "config.yaml").write_text("runs_dir: runs\nrun_name: base\n")
        manifests.write_manifest(run, **made(run, "model"))
    return folder


def made(run: Path, base: str, verify: str = "auto") -> dict:
    facts = {"base_model": {"path": base, "hash": hashes.model_hash(Path(base)), "quantization": None}}
    return hashes.record(facts, run, verify)


def older(run: Path) -> None:
    """The manifest as versions before this record wrote it."""
    manifest = manifests.read_manifest(run) or {}
    manifest.pop("model_files")
    manifest["base_model"] = {key: manifest["base_model"][key] for key in ("path", "hash", "quantization")}
    (run / "manifest.json").write_text(json.dumps(manifest))


def pad(file: str, words: bytes = b" ") -> None:
    """Other bytes of a safetensors file with the same tensors: blanks at the end of its header."""
    length = int.from_bytes(Path(file).read_bytes()[:8], "little")
    header = Path(file).read_bytes()[8 : 8 + length].rstrip()
    Path(file).write_bytes((len(header) + len(words)).to_bytes(8, "little") + header + words)


SFT = command("sft", "dry_run=true")


# -------------------------------------------------------------------------------------------------------- unchanged


def test_a_run_that_is_as_it_was_made_is_read(work):
    assert invoke(*SFT, cwd=work).code == 0
    os.utime(ADAPTER)  # another time, the same bytes: the digest decides
    assert invoke(*SFT, cwd=work).code == 0


@pytest.mark.parametrize("age", [lambda run: None, older], ids=["new manifest", "old manifest"])
@pytest.mark.parametrize(
    ("file", "words"),
    [
        (ADAPTER, ["model.path=runs/base/sft", "runs/base/sft/model changed since it was made", " there, ", " now: "]),
        ("runs/base/sft/model/chat_template.jinja", ["runs/base/sft/model changed since it was made"]),
        ("model/model.safetensors", ["its base model model changed since it was made", "train anew"]),
    ],
)
def test_a_run_or_a_base_that_changed_is_refused_with_both_digests(work, age, file, words):
    age(Path("runs/base/sft"))
    then = hashes.model_hash(Path(file).parent)
    if file.endswith("safetensors"):
        pad(file)
    else:
        Path(file).write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    refused(work, SFT, *words, str(then), str(hashes.model_hash(Path(file).parent)))


@pytest.mark.parametrize("role", ["rewards.reward_model.path=runs/base/reward", "+policies.tuned=runs/base/ppo"])
def test_rewards_and_policies_are_held_against_their_manifests_too(work, role):
    run = role.partition("=")[2]
    pad(f"{run}/model/adapter_model.safetensors")
    refused(work, command("ppo" if "rewards" in role else "evaluate", role), f"{run}/model changed since it was made")


def test_what_changed_can_be_used_as_the_folder_it_is(work):
    pad(ADAPTER)
    assert invoke(*command("sft", "model.path=runs/base/sft/model", "dry_run=true"), cwd=work).code == 0


def test_the_same_size_and_time_are_trusted_until_everything_is_asked_for(work):
    before = Path(ADAPTER).stat()
    Path(ADAPTER).write_bytes((2).to_bytes(8, "little") + b"[]")
    os.utime(ADAPTER, ns=(before.st_atime_ns, before.st_mtime_ns))
    run = Path("runs/base/sft")
    hashes.check_unchanged(run, None, manifests.read_manifest(run) or {}, "model.path=x")
    with pytest.raises(InputError, match="changed since it was made"):
        hashes.check_unchanged(run, None, manifests.read_manifest(run) or {}, "model.path=x", "full")
    refused(work, command("sft", "verify=some"), "verify='some'", "auto", "full")


def test_every_byte_of_a_large_file_is_read_where_it_was_when_the_run_was_made(tmp_path):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    file = run / "model/model.safetensors"
    file.write_bytes(bytes(40 * 2**20))
    facts = hashes.record({"base_model": {"path": "org/name", "hash": None}}, run, "full")
    assert facts["base_model"]["kind"] == "hub" and len(facts["model_sha256"]) == 64
    changed = bytearray(40 * 2**20)
    changed[100_000] = 1  # between two of the sampled places
    file.write_bytes(changed)
    assert hashes.model_hash(run / "model") == facts["model_hash"]
    hashes.check_unchanged(run, None, facts, "model.path=run")
    with pytest.raises(InputError, match="changed since it was made"):
        hashes.check_unchanged(run, None, facts, "model.path=run", "full")


# ------------------------------------------------------------------------------------------------------- the base's place


@pytest.mark.parametrize("age", [lambda run: None, older], ids=["new manifest", "old manifest"])
def test_a_run_is_the_same_from_any_directory(work, age, monkeypatch):
    age(Path("runs/base/sft"))
    assert resolve_model("runs/base/sft").base == "model"
    elsewhere = work / "elsewhere"
    shutil.copytree("model", elsewhere / "model")
    pad(str(elsewhere / "model/model.safetensors"))  # another model of that name
    monkeypatch.chdir(elsewhere)
    assert resolve_model(str(work / "runs/base/sft")).base == str(work / "model")
    assert resolve_model(str(work / "runs/base/sft/model")).base == str(work / "model")
    assert (
        invoke(
            *command("sft", f"model.path={work}/runs/base/sft", f"data.path={work}/answers.jsonl", "dry_run=true"),
            cwd=elsewhere,
        ).code
        == 0
    )


def test_a_run_moves_with_its_base_and_may_be_renamed(work, tmp_path, monkeypatch):
    Path("runs/base").rename("runs/other")
    place = (work).rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert Path(resolve_model("moved/runs/other/sft").base).samefile(place / "model")
    assert lineage.trace(Path("moved/runs/other/sft"))["held"][2]["now"] == hashes.model_hash(place / "model")


def test_a_run_that_moves_alone_finds_its_base_where_it_was(work, tmp_path):
    shutil.copytree("runs/base/sft", tmp_path / "alone")
    assert resolve_model(str(tmp_path / "alone")).base == "model"
    os.chdir(tmp_path)
    assert resolve_model("alone").base == str(work / "model")


@pytest.mark.parametrize("base", ["org/model", "model"])
@pytest.mark.parametrize("age", [lambda run: None, older], ids=["new manifest", "old manifest"])
def test_a_folder_that_is_gone_is_never_asked_of_a_hub(work, base, age):
    run = Path("runs/base/sft")
    if base != "model":
        shutil.copytree("model", base)
        manifests.write_manifest(run, **made(run, base))
    age(run)
    Path(base).rename("gone")
    for given in ("runs/base/sft", "runs/base/sft/model") if base == "model" else ("runs/base/sft",):
        config = run / "model/adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
        with pytest.raises(InputError, match=f"its base model {base} was a folder and is not there: put it back"):
            resolve_model(given)


def test_a_folder_does_not_stand_in_for_a_hub_id(work):
    run = Path("runs/base/sft")
    manifests.write_manifest(run, **made(run, "org/name"))
    assert resolve_model("runs/base/sft").base == "org/name"
    shutil.copytree("model", "org/name")
    with pytest.raises(InputError, match="its base model org/name came from the hub, and here is a folder"):
        resolve_model("runs/base/sft")


def test_an_adapter_finds_a_base_beside_it(work, monkeypatch):
    shutil.copytree("runs/base/sft/model", "adapter")
    file = Path("adapter/adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "../model"}))
    (work / "elsewhere").mkdir()
    monkeypatch.chdir(work / "elsewhere")
    assert Path(resolve_model("../adapter").base).samefile(work / "model")
