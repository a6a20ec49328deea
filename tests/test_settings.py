"""A run that cannot be gone on with: what differs, what it was and is, and what may differ."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cli import command, invoke, make_work, refused, write_rows
from test_sweeps import typed

from alignkit.config import settings
from alignkit.core.errors import InputError
from alignkit.pipeline import stage as pipeline
from alignkit.runs import manifests


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    folder = make_work(tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


def begun(stage: str, *words: str, status: str = "failed", checkpoint: bool = True) -> None:
    """A run of a stage called "new" that has begun, and left a checkpoint."""
    cfg = typed(stage, *words)
    origin = pipeline.origin_of(cfg, pipeline.check_inputs(cfg, {}))
    with manifests.lock(cfg.run_dir):
        pipeline.open_run(cfg, "running", origin)
    manifests.write_manifest(cfg.run_dir, status=status, metrics={})
    if checkpoint:
        (cfg.run_dir / "checkpoints" / "step_000002").mkdir(parents=True)


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (["max_steps=4"], ["max_steps=8"], "max_steps was 4, is 8"),
        ([], ["micro_batch_size=4", "seed=3"], "seed was 0, is 3; micro_batch_size was 8, is 4"),
        ([], ["optimizer.learning_rate=1e-3"], "optimizer.learning_rate was 0.0002, is 0.001"),
        (["model.path=model"], ["model.path=model", "finetune=full"], "finetune was lora, is full"),
        (["model.path=model", "finetune.last_layers=2"], ["model.path=model"], "finetune.last_layers was 2, is null"),
        ([], ["model.path=model"], "model.path was runs/base/sft, is model"),
        ([], ["+data.columns.prompt=p"], "data.columns.prompt was not there, is p"),
    ],
)
def test_each_setting_that_differs_is_named_with_both_values(work, before, now, told):
    write_rows(
        work / "answers.jsonl",
        {"prompt": "a", "p": "a", "completion": "b"},
        {"prompt": "c", "p": "c", "completion": "d"},
    )
    begun("sft", *before)
    found = invoke(*command("sft", *now, "resume=true"), cwd=work)  # it says before which columns are not used
    message = found.err
    assert found.code == 2 and "has checkpoints of another config" in message and told in message
    assert "alignkit resume runs/new/sft goes on with the old ones" in message
    assert all(key in message for key in settings.FREE)


@pytest.mark.parametrize("free", ["save_steps=3", "keep_last=5", "keep_best=policy/loss", "max_seconds=9", "launcher.threads=1",
                                  "logger=tensorboard", "data.lint=off"])  # fmt: skip
def test_what_may_differ_goes_on(work, free):
    begun("sft")
    with pytest.raises(AssertionError, match="asked to start sft"):
        invoke(*command("sft", free, "resume=true"), cwd=work)


def test_a_run_that_is_done_says_no_less(work):
    begun("sft", status="done")
    message = refused(work, command("sft", "epochs=2", "resume=true"), "is done, but with another config")
    assert "epochs was 1.0, is 2.0" in message and "another run_name=" in message


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("sft", "rows", "the rows of data.path=answers.jsonl changed ("),
        ("sft", "model", "the model model.path=runs/base/sft changed ("),
        ("ppo", "code", "the code of rewards.mine.target=my_reward.py:score changed ("),
    ],
)
def test_contents_that_changed_are_named_as_contents(work, name, change, told):
    more = ["+reward@rewards.mine=function", "rewards.mine.target=my_reward.py:score"] if change == "code" else []
    begun(name, *more)
    if change == "rows":
        write_rows(work / "answers.jsonl", {"prompt": "other", "completion": "x"}, {"prompt": "y", "completion": "x"})
    elif change == "model":
        manifests.write_manifest(work / "runs/base/sft", started="later")
    else:
        (work / "my_reward.py").write_text(
            "def score(prompts, responses, meta):\n    return [1.0 for _ in responses]\n"
        )
    message = refused(work, command(name, *more, "resume=true"), told, "put back what it was")
    assert " was " not in message.split("(")[1]


def test_the_same_rows_under_another_name_are_no_difference(work):
    begun("sft")
    (work / "answers.jsonl").rename(work / "moved.jsonl")
    message = refused(
        work, command("sft", "data.path=moved.jsonl", "max_steps=3", "resume=true"), "max_steps was -1, is 3"
    )
    assert "data.path" not in message


def test_a_config_of_another_version_is_compared_as_data(work):
    begun("sft")
    file = work / "runs/new/sft/config.yaml"
    file.write_text(file.read_text().replace("max_length: 512\n", "gone_by_now: 3\n"))
    manifests.write_manifest(work / "runs/new/sft", address="of another version")
    message = refused(work, command("sft", "resume=true"), "max_length was not there, is 512")
    assert "gone_by_now was 3, is not there" in message


def test_a_folder_without_its_config_says_so(work):
    begun("sft")
    (work / "runs/new/sft/config.yaml").unlink()
    refused(work, command("sft", "seed=1", "resume=true"), "runs/new/sft/config.yaml cannot be read")


def test_in_a_pipeline_the_key_has_the_stage_before_it(work):
    begun("sft", "model.path=model")
    cfg = typed("sft", "model.path=model", "epochs=3", "resume=true")
    with pytest.raises(InputError, match=r"sft\.epochs was 1\.0, is 3\.0.*alignkit resume runs/new goes on"):
        pipeline.previous(cfg, pipeline.origin_of(cfg, pipeline.check_inputs(cfg, {})), "sft.")


def test_a_component_that_is_another_is_named_alone():
    old = {"finetune": {"name": "lora", "rank": 8}, "seed": 1, "launcher": {"name": "local"}}
    new = {"finetune": {"name": "full"}, "seed": 1, "launcher": {"name": "slurm"}}
    assert settings.differing(old, new) == [("finetune", "lora", "full")]


@pytest.mark.parametrize(
    ("line", "odd", "told"), [("seed: 0", "sead: 0", "sead"), ("name: lora", "name: lorra", "lorra")]
)
def test_resume_of_a_run_that_another_version_wrote_names_what_it_does_not_know(work, line, odd, told):
    begun("sft")
    file = work / "runs/new/sft/config.yaml"
    file.write_text(file.read_text().replace(line, odd))
    refused(work, ["resume", "runs/new/sft"], "config.yaml was written by another version", told, "another run_name=")


def test_resume_of_a_run_that_was_moved_says_where_its_config_has_it(work):
    begun("sft")
    (work / "runs/new").rename(work / "runs/other")
    refused(work, ["resume", "runs/other/sft"], "runs_dir=runs run_name=new", "move it back")
