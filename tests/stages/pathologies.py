"""Records PPO runs that go wrong in a known way, and some that do not: `python tests/stages/pathologies.py [NAME …]`.

Each is a real run of the PPO stage on the tiny model with one setting that is wrong; where no setting can cause the fault,
the function of its name in faults.py plants it. What `alignkit doctor` reads of a run
(metrics.jsonl, config.yaml, manifest.json) goes to tests/recorded/<name>/, where tests/test_doctor.py finds it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from jobs import run_many

from alignkit.runs import manifests

HERE = Path(__file__).resolve().parent

RECORDED = HERE.parent / "recorded"
KEPT = ("config.yaml", "metrics.jsonl")

# What the policy is paid for: vowels. `gold` wants a few of them and dislikes the rest.
REWARDS = """
def vowels(prompts, responses, meta):
    return [sum(response.count(letter) for letter in "aeiou") / 4 for response in responses]

def gold(prompts, responses, meta):
    return [min(score, 2.0) - 2 * max(score - 2.0, 0.0) for score in vowels(prompts, responses, meta)]
"""

BASE = [
    "runs_dir=runs", "model.path=tiny", "data.path=prompts.jsonl", "logger=none", "rollout=hf",
    "rollout.max_new_tokens=12", "algorithm.missing_eos=none", "~reward@rewards.reward_model",
    "+reward@rewards.vowels=function", "rewards.vowels.target=rewards.py:vowels", "steps=14",
    "rollout_batch_size=64", "mini_batch_size=16", "micro_batch_size=16", "algorithm.ppo_epochs=2", "sample_every=100",
    "optimizer.learning_rate=2e-3", "critic_optimizer.learning_rate=1e-2", "algorithm.value_clip_range=null",
]  # fmt: skip
# {name: what differs from BASE}
RUNS = {
    "learning_rate": ["steps=4"],
    "truncated": ["rollout.max_new_tokens=4", "algorithm.missing_eos=replace", "steps=4"],
    "rollout_gap": ["optimizer.learning_rate=5e-3", "steps=7"],
    "nan": ["optimizer.weight_decay=1e30", "steps=4"],
    "value_lag": ["critic_optimizer.learning_rate=1e-8", "steps=10"],
    "ratio": ["steps=4"],
    "over_optimisation": [
        "finetune=full", "optimizer.learning_rate=1e-3", "algorithm.kl_coef=0", "+reward@rewards.gold=function",
        "rewards.gold.target=rewards.py:gold", "rewards.gold.weight=0", "steps=20",
    ],
    "entropy_collapse": ["finetune=full", "optimizer.learning_rate=3e-2", "algorithm.kl_coef=0", "steps=30"],
    "kl_runaway": ["finetune=full", "optimizer.learning_rate=5e-3", "algorithm.kl_coef=0", "steps=20"],
    "healthy_grpo": ["seed=2", "algorithm=grpo", "group_size=4", "~algorithm.value_clip_range", "steps=9"],
    "healthy_ppo": ["seed=3", "finetune=full", "optimizer.learning_rate=6e-4", "steps=20"],
    "healthy_adaptive": [
        "seed=4", "finetune=full", "optimizer.learning_rate=1e-3", "algorithm.adaptive_kl_target=1", "algorithm.kl_coef=0.1",
        "algorithm.adaptive_kl_horizon=640", "algorithm.value_clip_range=0.2", "steps=20",
    ],
}  # fmt: skip


def prepare() -> None:
    """In the current folder: rewards.py, prompts and the tiny model."""
    sys.path.insert(0, str(HERE.parent))
    from tiny import tiny_model

    Path("rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"Tell me something about the number {i}."} for i in range(64)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_model("tiny")


def overrides(name: str) -> list[str]:
    """The command line of a run: BASE, with what the run sets itself in place of it."""
    own = {part.split("=")[0].lstrip("~+") for part in RUNS[name] if "@" not in part}
    base = [part for part in BASE if part.split("=")[0] not in own]
    mine = [
        part for part in RUNS[name] if not part.startswith("~algorithm.")
    ]  # ~: an option that its algorithm has not
    return [*base, *mine, f"run_name={name}"]


def record(names: list[str]) -> None:
    """Run `names` in one process and keep what the doctor reads."""
    shutil.rmtree("runs", ignore_errors=True)
    errors = run_many({name: overrides(name) for name in names}, Path.cwd())
    for name, error in errors.items():
        folder = RECORDED / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in KEPT:
            if (path := Path("runs", name, "ppo", file)).is_file():
                shutil.copy(path, folder)
        last = {} if error is None else {"error": error.strip().splitlines()[-1]}
        manifests.write_manifest(folder, stage="ppo", status="failed" if error else "done", **last)
        print(name, last or "done", flush=True)


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(RUNS)
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(os.environ.get("KEEP_IN", scratch))
        if not Path("tiny").is_dir():
            prepare()
        record(chosen)
