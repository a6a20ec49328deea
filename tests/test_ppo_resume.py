"""The PPO stage, whole, in this process: stopped at any of its boundaries and resumed, it ends as if it had not been.

torch's optimizers stand in for DeepSpeed's, and the policy samples for itself; `tests/stages` has the real ones.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nets import ONE, TorchEngine
from safetensors.torch import load_file
from test_house import composed

from alignkit.config import stages
from alignkit.core.errors import InputError, RunError, Saved
from alignkit.finetune.lora import LoRA
from alignkit.models.source import resolve_model
from alignkit.stages import ppo
from alignkit.tracking.run_log import NoLogger, RunLog
from alignkit.training import interrupt, saving

STEPS = 4


class AdamEngine(TorchEngine):
    """An engine with moments, built as DeepSpeed's is."""

    def __init__(self, module, parameters, optimizer, zero, world, *, dtype, micro_batch_size, updates) -> None:
        super().__init__(module, parameters, optimizer, updates)

    def save(self, folder: Path) -> None:
        folder.mkdir()
        torch.save([self.parameters, self.optimizer.state_dict()], folder / "state.pt")

    def load(self, folder: Path, update: int) -> None:
        parameters, optimizer = torch.load(folder / "state.pt", weights_only=False)
        for ours, theirs in zip(self.parameters, parameters, strict=True):
            ours.data.copy_(theirs)
        self.optimizer.load_state_dict(optimizer)
        self.at_update(update)


@pytest.fixture
def work(tmp_path, tiny, monkeypatch) -> Path:
    """A folder with prompts and a reward that draws from Python's generator, as a user's may."""
    random.seed(3)
    rows = [{"prompt": f"Tell me something {word}."} for word in ("good", "bad", "happy", "sad", "great")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(
        "import random\ndef score(prompts, responses, meta):\n"
        "    return [len(r) % 5 + random.random() for r in responses]\n"
    )
    monkeypatch.setattr(ppo, "Engine", AdamEngine)
    return tmp_path


def run(work: Path, tiny: Path, name: str, stop_at: int | None, monkeypatch, *more: str) -> Path:
    """The stage, asked to stop at its n-th boundary (a round has two)."""
    overrides = (
        f"runs_dir={work}", f"run_name={name}", f"model.path={tiny}", f"data.path={work / 'rows.jsonl'}", "logger=none",
        f"steps={STEPS}", "rollout=hf", "rollout.max_new_tokens=6", "rollout_batch_size=8", "mini_batch_size=4",
        "micro_batch_size=2", "group_size=2", "optimizer.learning_rate=1e-2", "algorithm.adaptive_kl_target=1",
        "algorithm.normalize_scores=true", "algorithm.missing_eos=none", "~reward@rewards.reward_model",
        "+reward@rewards.mine=function", f"rewards.mine.target={work / 'mine.py'}:score", *more,
    )  # fmt: skip
    cfg = stages.to_config(composed("ppo", *overrides), "ppo")
    asked = iter(range(10**6))
    due = SimpleNamespace(due=lambda world: "a test" if next(asked) == stop_at else None)
    monkeypatch.setattr(interrupt, "process", due)
    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    with RunLog(cfg.run_dir, "ppo", 0, NoLogger(), {}) as log:
        ppo.main(cfg, ONE, log)
    return cfg.run_dir


def notes(run_dir: Path) -> list[str]:
    events = [json.loads(line) for line in (run_dir / "logs" / "progress.jsonl").read_text().splitlines()]
    return [event["note"] for event in events if "note" in event]


def end(run_dir: Path) -> tuple[list[dict], dict[str, bytes]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if not k.startswith(("time/", "wall_time"))} for row in rows]
    return kept, {p.name: p.read_bytes() for p in (run_dir / "model").glob("*.safetensors")}


def test_stopped_at_any_boundary_it_ends_as_if_it_had_not_been(work, tiny, monkeypatch):
    random.seed(5)
    whole = end(run(work, tiny, "whole", None, monkeypatch))
    assert len(whole[0]) == STEPS and whole[1]
    for boundary in range(2 * STEPS):
        random.seed(5)
        with pytest.raises(Saved, match=rf"saved at step {boundary // 2} of {STEPS} \(a test\)"):
            run(work, tiny, f"stopped-{boundary}", boundary, monkeypatch)
        random.seed(6)  # another process
        assert end(run(work, tiny, f"stopped-{boundary}", None, monkeypatch)) == whole


def test_a_checkpoint_holds_the_model_of_its_step(work, tiny, monkeypatch):
    """The weights that the policy's engine has kept, as an adapter that is taken like a finished run's."""
    with pytest.raises(Saved, match=f"saved at step 2 of {STEPS}"):
        run(work, tiny, "kept", 4, monkeypatch)
    kept = work / "kept" / "ppo" / "checkpoints" / "step_000002"
    source = resolve_model(str(kept))
    assert (source.adapter, source.base, source.run) == (kept / "model", str(tiny), kept)
    trained = torch.load(kept / "policy" / "state.pt", weights_only=False)[0]
    saved = load_file(kept / "model" / "adapter_model.safetensors").values()
    assert len(saved) == len(trained) > 0
    assert sorted(float(t.double().sum()) for t in saved) == sorted(float(t.detach().double().sum()) for t in trained)


def test_stopped_again_before_it_moved_it_keeps_the_checkpoint_it_has(work, tiny, monkeypatch):
    for stop_at in (4, 0, 1):
        with pytest.raises(Saved, match=f"saved at step 2 of {STEPS}"):
            run(work, tiny, "again", stop_at, monkeypatch)
    found = [p.name for p in (work / "again" / "ppo" / "checkpoints").iterdir()]
    assert found == ["step_000002"]


def test_a_metric_to_keep_the_best_by_is_checked_in_the_first_step(work, tiny, monkeypatch):
    with pytest.raises(InputError, match=r"keep_best=objective/scor: no such metric; .*objective/score"):
        run(work, tiny, "typo", None, monkeypatch, "keep_best=objective/scor")
    assert not (work / "typo" / "ppo" / "checkpoints").exists()


WARMUP = "algorithm.critic_warmup=2"


def test_the_schedule_of_a_policy_that_stands_still_does_not_move(work, tiny, monkeypatch):
    """Its learning rate falls over the rounds in which it learns, and the KL coefficient moves in those alone."""
    random.seed(5)
    whole = end(run(work, tiny, "whole", None, monkeypatch, WARMUP))
    rows, still = whole[0], [{"policy/learning_rate", "policy/loss"} & row.keys() for row in whole[0]]
    assert still == [set(), set(), *[{"policy/learning_rate", "policy/loss"}] * 2]
    assert [row["policy/learning_rate"] for row in rows[2:]] == pytest.approx([1e-2, 5e-3])
    assert [row["critic/learning_rate"] for row in rows] == pytest.approx(
        [1e-4 * (1 - i / STEPS) for i in range(STEPS)]
    )
    assert [row["objective/kl"] for row in rows[:3]] == [0, 0, 0]
    coefs = [row["objective/kl_coef"] for row in rows]
    assert coefs[0] == coefs[1] == coefs[2] != coefs[3]
    for boundary in (3, 6):
        random.seed(5)
        with pytest.raises(Saved):
            run(work, tiny, f"stopped-{boundary}", boundary, monkeypatch, WARMUP)
        assert end(run(work, tiny, f"stopped-{boundary}", None, monkeypatch, WARMUP)) == whole


BIASED = ("rollout.top_p=0.9", "rollout.allow_biased_sampling=true")


def test_what_a_biased_sampler_says_is_given_no_kl(work, tiny, monkeypatch):
    run_dir = run(work, tiny, "biased", None, monkeypatch, *BIASED, "algorithm.adaptive_kl_target=null")
    rows, _ = end(run_dir)
    assert all("objective/log_ratio" in row and "objective/kl" not in row for row in rows)
    assert all("objective/kl_coef" in row for row in rows)
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert samples and all("log_ratio" in row and "kl" not in row for row in samples)
    assert any("rollout.top_p=0.9" in note and "no KL" in note for note in notes(run_dir))


def test_a_coefficient_cannot_adapt_to_a_kl_that_is_not_known(work, tiny, monkeypatch):
    with pytest.raises(InputError, match=r"adaptive_kl_target=1.* with rollout.top_p=0.9"):
        run(work, tiny, "biased", None, monkeypatch, *BIASED)


@pytest.mark.parametrize("mode, told", [("replace", 1), ("at_most", 0)])
def test_where_being_cut_pays_it_is_said_once_at_the_first_such_step(work, tiny, monkeypatch, mode, told):
    """Every score lies below -1, and the tiny model hardly ever ends within six tokens."""
    (work / "mine.py").write_text("def score(prompts, responses, meta): return [-9.0 for r in responses]\n")
    run_dir = run(
        work, tiny, mode, None, monkeypatch, f"algorithm.missing_eos={mode}", "algorithm.normalize_scores=false"
    )
    said = [note for note in notes(run_dir) if "cut by their length" in note]
    assert len(said) == told and all(note.startswith("step 0: ") and "missing_eos" in note for note in said)


# ------------------------------------------------------------------------------------------------- what the end writes


def after_the_start(function, error):
    """`function`, which raises from its second call on."""
    calls = []

    def called(*args, **kwargs):
        calls.append(args)
        if len(calls) > 1:
            raise error
        return function(*args, **kwargs)

    return called


@pytest.mark.parametrize("where", ["tokenizer", "sampler"])
def test_what_fails_after_the_training_does_not_lose_the_weights(work, tiny, monkeypatch, where):
    from transformers import PreTrainedTokenizerFast as Tokenizer

    from alignkit.rollout.hf import HFSampler

    if where == "tokenizer":
        monkeypatch.setattr(
            Tokenizer, "save_pretrained", after_the_start(Tokenizer.save_pretrained, TypeError("an object"))
        )
    else:
        monkeypatch.setattr(HFSampler, "close", after_the_start(lambda self: None, OSError("gone")), raising=False)
        HFSampler.close(None)  # that was its first
    with pytest.raises(RunError, match=r"(an object|gone); the trained weights are whole in .*lost/ppo/model"):
        run(work, tiny, "lost", None, monkeypatch)
    assert (work / "lost" / "ppo" / "model" / "adapter_model.safetensors").is_file()


def test_what_cannot_be_saved_is_found_before_the_first_step(work, tiny, monkeypatch):
    from transformers import PreTrainedTokenizerFast as Tokenizer

    def refuse(self, folder):
        raise TypeError("Object of type set is not JSON serializable")

    monkeypatch.setattr(Tokenizer, "save_pretrained", refuse)
    with pytest.raises(InputError, match=r"never/ppo: .*not JSON serializable.*nothing was trained"):
        run(work, tiny, "never", None, monkeypatch)
    assert (work / "never" / "ppo" / "metrics.jsonl").read_text() == ""
    assert not list((work / "never" / "ppo").glob(".rehearsal*"))


def test_a_disk_too_small_for_the_checkpoints_is_found_before_the_first_step(work, tiny, monkeypatch):
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    run(work, tiny, "fits", None, monkeypatch)
    with pytest.raises(
        RunError, match=r"of 0\.\d MiB and 3 checkpoints of \d\.\d MiB\), 1.0 MiB are free there: make room"
    ):
        run(work, tiny, "full", None, monkeypatch, "save_steps=1")
    assert (work / "full" / "ppo" / "metrics.jsonl").read_text() == ""


def test_a_disk_that_is_full_at_the_end_is_said_with_what_is_free(work, tiny, monkeypatch):
    def full(self, roles, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LoRA, "save", full)
    with pytest.raises(
        RunError, match=r"cannot be written to .*full/ppo/model: .*No space left.*; [\d,.]+ MiB are free"
    ):
        run(work, tiny, "full", None, monkeypatch)
