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
from test_house import composed

from alignkit import config, interrupt
from alignkit.log import NoLogger, RunLog
from alignkit.stages import ppo
from alignkit.types import InputError, Saved

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
        self.update = update - 1
        self.next_update()


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
    cfg = config.to_config(composed("ppo", *overrides), "ppo")
    asked = iter(range(10**6))
    due = SimpleNamespace(due=lambda world: "a test" if next(asked) == stop_at else None)
    monkeypatch.setattr(interrupt, "process", due)
    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    with RunLog(cfg.run_dir, "ppo", 0, NoLogger(), {}) as log:
        ppo.main(cfg, ONE, log)
    return cfg.run_dir


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
