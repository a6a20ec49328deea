"""A checkpoint given as a model: taken as a finished run is, or refused with what to give instead."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from test_cli import STAGES, command, finished_run, invoke, make_work, refused

from alignkit.core.errors import RunError
from alignkit.models.source import resolve_model
from alignkit.pipeline import sharing
from alignkit.runs import manifests
from alignkit.training import checkpoint


def keep(run_dir: Path, step: int, model: bool = True) -> Path:
    """A checkpoint of a run as its stage writes it; without a model: as an earlier version did."""
    partial, final = run_dir / "checkpoints" / "partial", run_dir / "checkpoints" / f"step_{step:06d}"
    (partial / "policy").mkdir(parents=True)
    (partial / "policy" / "param.safetensors").write_bytes(b"moments and such")
    if model:
        shutil.copytree(run_dir / "model", partial / "model")
        (partial / "model" / "adapter_model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
        manifest = manifests.read_manifest(run_dir) or {}
        facts = {key: manifest[key] for key in ("base_model", "adapter", "tokenizer_hash")}
        manifests.describe_checkpoint(partial, run_dir, manifest["stage"], step, facts)
    checkpoint.publish(partial, final, {"step": step}, 9, None)
    return final.relative_to(run_dir.parents[2])


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """The usual folder, with two checkpoints of the runs base/sft, base/reward and base/ppo, which still runs."""
    folder = make_work(tmp_path / "work")
    for stage in ("sft", "reward", "ppo"):
        for step in (2, 4):
            keep(folder / "runs" / "base" / stage, step)
    manifests.write_manifest(folder / "runs/base/ppo", status="running")
    monkeypatch.chdir(folder)
    return folder


AT = "runs/base/{}/checkpoints/step_000002"


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_takes_one(work, stage):
    more = [f"+policies.kept={AT.format('ppo')}"] if stage == "evaluate" else [f"model.path={AT.format('sft')}"]
    more += [f"rewards.reward_model.path={AT.format('reward')}"] if stage == "ppo" else []
    result = invoke(*command(stage, *more, "dry_run=true"), cwd=work)
    assert (result.code, result.err) == (0, "")


def test_it_is_what_the_run_says_it_is(work):
    path = AT.format("ppo")
    source = resolve_model(path)
    assert (source.base, source.adapter, source.tokenizer) == (
        str(work / "model"),
        Path(path) / "model",
        f"{path}/model",
    )
    found = manifests.read_manifest(Path(path)) or {}
    assert (found["stage"], found["step"], found["status"], found["tokenizer_hash"]) == ("ppo", 2, "done", "t0")


def test_a_tokenizer_that_does_not_fit_is_refused_as_a_runs_is(work):
    finished_run(work / "runs/other/reward", "reward", work / "model", tokenizer_hash="t1")
    keep(work / "runs/other/reward", 1)
    more = [f"model.path={AT.format('sft')}", "rewards.reward_model.path=runs/other/reward/checkpoints/step_000001"]
    refused(work, command("ppo", *more), "step_000001 was made with another tokenizer", "(t1)")


def test_what_another_step_gives_is_another_input_and_is_shared_by_none(work):
    from test_sweeps import address_of as address

    paths = [f"runs/base/sft/checkpoints/step_00000{step}" for step in (2, 4)]
    assert len({address("sample", f"model.path={path}") for path in [*paths, "runs/base/sft"]}) == 3
    kept = manifests.read_manifest(Path(paths[0])) or {}
    assert "address" not in kept and not [run for run in sharing._stages(Path("runs")) if "checkpoints" in run.parts]


@pytest.mark.parametrize("fault", ["adapter_model.safetensors is missing", "model/ is not what was written"])
def test_a_damaged_one_is_refused_with_the_others_of_its_run(work, fault):
    file = work / AT.format("sft") / "model" / "adapter_model.safetensors"
    if "missing" in fault:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes() + b" ")
    path = AT.format("sft")
    refused(work, command("sft", f"model.path={path}"), f"model.path={path}", "damaged", fault, "give step_000004 of")


def test_one_of_an_earlier_version_names_the_command_that_makes_a_model(work):
    path = keep(work / "runs/base/ppo", 6, model=False)
    refused(work, command("sft", f"model.path={path}"), "holds no model", f"alignkit resume {work}/runs/base/ppo")


def test_one_that_trl_wrote_for_an_earlier_version_is_the_adapter_that_it_holds(work):
    path = work / keep(work / "runs/base/sft", 6, model=False)
    shutil.copytree(work / "runs/base/sft/model", path, dirs_exist_ok=True)
    assert resolve_model(str(path)).adapter == path


def test_a_stage_that_is_not_done_names_its_newest(work):
    message = refused(
        work, command("sample", "model.path=runs/base/ppo"), "is running, not done", "alignkit ppo run_name=base"
    )
    word = message.rpartition("take what it is so far: ")[2]
    assert word == "model.path=runs/base/ppo/checkpoints/step_000004"
    assert invoke(*command("sample", word, "dry_run=true"), cwd=work).code == 0


@pytest.mark.parametrize("tool", ["status", "logs", "cancel", "report", "compare", "lineage", "resume", "doctor"])
def test_a_command_about_runs_names_the_run_it_belongs_to(work, tool):
    path = AT.format("ppo")
    result = invoke(tool, path, cwd=work)
    assert result.code == 2 and result.err.count("\n") == 1
    assert f"{path} is a checkpoint of {work}/runs/base/ppo: give the run" in result.err


def test_a_report_is_of_a_run_and_not_of_a_stage(work):
    (work / "runs/base/reward/report.html").write_text("the card")
    said = invoke("report", "runs/base/reward", cwd=work)
    assert said.code == 0 and "runs/base/reward is a stage: the report is of the run that it belongs to" in said.out
    assert (work / "runs/base/reward/report.html").read_text() == "the card"


def test_the_doctor_says_what_is_there(work):
    shutil.rmtree(work / "runs/base/ppo")
    refused(work, ["doctor", "runs/base"], "no PPO run there", "it holds reward, sft")


def test_a_model_that_cannot_be_written_leaves_no_checkpoint(tmp_path):
    from test_checkpoint import ALONE, Weights

    def write_model(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"cannot be written.*No space left"):
        checkpoint.save(
            tmp_path, {"step": 1}, {"s": torch.Generator()}, {"policy": Weights(1.0, 1)}, ALONE, 2, None, write_model
        )
    assert not list((tmp_path / "checkpoints").iterdir())
