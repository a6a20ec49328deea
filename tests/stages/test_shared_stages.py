"""A 2x2 sweep of PPO settings for real: SFT, sample and reward are made once, and the table has four rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

from command import alignkit
from jobs import STAGES, manifest, metrics

SHARED, OWN = ("sft", "sample", "reward"), ("ppo", "evaluate")


def test_a_sweep_of_ppo_trains_the_stages_before_it_once(tiny, rows, common):
    result = alignkit(
        "pipeline", *common, "run_name=sweep", f"model.path={tiny}", "finetune.last_layers=2", "rollout=hf", "rollout.max_new_tokens=6",
        "+reward@sample.rewards.gold=vader", "+reward@evaluate.rewards.gold=vader", "sample.finished_only=false",
        *(f"{stage}.data.path={rows}" for stage in ("sft", "sample", "ppo", "evaluate")), "sft.max_steps=2", "reward.max_steps=2",
        "sample.group_size=4", "reward.mini_batch_size=4", "reward.micro_batch_size=4", "evaluate.data.limit=8", "evaluate.bootstrap=50",
        "ppo.rollout_batch_size=8", "ppo.mini_batch_size=8", "ppo.algorithm.kl_coef=0.05,0.5", "ppo.steps=1,2", "-m",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    root = Path(common[0].removeprefix("runs_dir=")) / "sweep"
    jobs = sorted(path for path in root.iterdir() if path.is_dir())
    assert [job.name for job in jobs] == [
        f"ppo.algorithm.kl_coef={kl},ppo.steps={steps}" for kl in ("0.05", "0.5") for steps in (1, 2)
    ]
    for stage in SHARED:
        assert len({(job / stage).resolve() for job in jobs}) == 1
        assert sum(not (job / stage).is_symlink() for job in jobs) == 1
        assert result.stdout.count(f"{stage:<9} kept: same config and inputs as") == 3
    for stage in OWN:
        assert len({(job / stage).resolve() for job in jobs}) == 4
    for job in jobs:
        assert all(manifest(job / stage)["status"] == "done" for stage in STAGES)
        assert len(metrics(job / "ppo")) == int(job.name[-1])
        assert json.loads((job / "summary.json").read_text())["gold"]["ppo"]["mean"] is not None
    told = result.stdout[result.stdout.index("4 of 4 jobs of the sweep are done") :]
    assert len(re.findall(r"^ +[1-4] +0\.0?5 ", told, re.M)) == 4
    assert "<svg" in (root / "compare.html").read_text()
    node = json.loads(alignkit("lineage", jobs[-1], "--json").stdout)
    assert node["changes"] == [] and node["stage"] == "evaluate"
    again = alignkit("resume", jobs[-1])
    assert again.returncode == 0 and again.stdout.count("done: skipped") == 5, again.stderr + again.stdout
