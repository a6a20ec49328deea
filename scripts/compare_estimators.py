#!/usr/bin/env python
"""PPO's estimators on one SFT policy and reward model: GAE, RLOO, GRPO and REINFORCE++, judged on held-out prompts.

    scripts/quickstart.sh && scripts/compare_estimators.py runs/quickstart

Runs `alignkit ppo` once an estimator and `alignkit evaluate` over all of them, in <run>-estimators/. Finished runs are
kept, so a stopped comparison goes on where it was. Ends with the table in Markdown and one JSON line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

COMMON = [
    "data.path=demo:chitchat/train", "max_prompt_length=72", "steps=11", "rollout_batch_size=48", "mini_batch_size=16",
    "micro_batch_size=16", "finetune.last_layers=6", "rollout.temperature=0.8", "rollout.max_new_tokens=28",
    "optimizer.learning_rate=7e-4", "optimizer.warmup_steps=2", "algorithm.ppo_epochs=2", "algorithm.kl_coef=0.1",
    "logger=none", "resume=true",
]  # fmt: skip
ESTIMATORS = {
    "ppo": [
        "critic.head=zero", "critic_optimizer.learning_rate=7e-4", "critic_optimizer.warmup_steps=2",
        "algorithm.gae_lambda=1", "algorithm.value_clip_range=null",
    ],
    "rloo": ["algorithm=rloo", "group_size=4"],
    "grpo": ["algorithm=grpo", "group_size=4"],
    "reinforce_pp": ["algorithm=reinforce_pp"],
}  # fmt: skip


def main() -> None:
    if len(sys.argv) < 2 or not Path(sys.argv[1], "reward", "manifest.json").is_file():
        sys.exit("usage: scripts/compare_estimators.py <finished quickstart run> [overrides of alignkit ppo]")
    run, overrides = Path(sys.argv[1]), sys.argv[2:]
    root = run.parent / f"{run.name}-estimators"
    for name, own in ESTIMATORS.items():
        inputs = [f"model.path={run / 'sft'}", f"rewards.reward_model.path={run / 'reward'}"]
        alignkit("ppo", f"run_name={root.name}/{name}", f"runs_dir={run.parent}", *inputs, *COMMON, *own, *overrides)
    policies = [f"+policies.{name}={root / name / 'ppo'}" for name in ESTIMATORS]
    alignkit(
        "evaluate", f"run_name={root.name}", f"runs_dir={run.parent}", f"+policies.sft={run / 'sft'}", *policies,
        "+reward@rewards.gold=vader", "data.path=demo:chitchat/heldout", "data.limit=144", "max_prompt_length=72",
        "rollout.temperature=0.8", "rollout.max_new_tokens=28", "logger=none", "resume=true",
    )  # fmt: skip
    results = json.loads((root / "evaluate" / "results.json").read_text())
    print("\n| estimator | gold score | minus SFT, 95 % | KL, nats a response | finished | seconds a step |")
    print("|---|---|---|---|---|---|")
    found = {}
    for name in ("sft", *ESTIMATORS):
        entry = results["policies"][name]
        gain = results["differences"].get(f"{name}_minus_sft")
        said = f"{gain['mean']:+.3f} [{gain['ci_low']:+.3f}, {gain['ci_high']:+.3f}]" if gain else ""
        seconds = f"{step_seconds(root / name / 'ppo'):.1f}" if gain else ""
        print(f"| {name} | {entry['mean']:.3f} | {said} | {entry['kl']:.2f} | {entry['finished']:.0%} | {seconds} |")
        found[name] = {"gold": entry["mean"], "kl": entry["kl"]} | ({"gain": gain} if gain else {})
    print("\n" + json.dumps(found))


def alignkit(*arguments: str) -> None:
    code = subprocess.run([sys.executable, "-m", "alignkit", *arguments]).returncode
    if code:
        sys.exit(code)


def step_seconds(run_dir: Path) -> float:
    """Mean seconds of a step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return sum(row["time/step"] for row in rows) / len(rows)


if __name__ == "__main__":
    main()
