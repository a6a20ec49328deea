"""The stage that compares policies, whole, in this process: a figure called KL is one, or is not given."""

from __future__ import annotations

import json

import pytest
from nets import ONE
from test_house import composed
from tiny import tiny_model

from alignkit.config import stages
from alignkit.report import html, summary
from alignkit.runs import manifests
from alignkit.stages import evaluate
from alignkit.tracking.run_log import NoLogger, RunLog


def run(folder, tiny, name, *more):
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(6)))
    overrides = (
        f"runs_dir={folder}", f"run_name={name}", f"+policies.a={tiny}", f"+policies.b={folder / 'other'}",
        f"data.path={folder / 'rows.jsonl'}", "logger=none", "rollout=hf", "rollout.max_new_tokens=6", "bootstrap=100",
        "+reward@rewards.gold=vader", *more,
    )  # fmt: skip
    cfg = stages.to_config(composed("evaluate", *overrides), "evaluate")
    cfg.run_dir.mkdir(parents=True)
    with RunLog(cfg.run_dir, "evaluate", 0, NoLogger(), {}) as log:
        metrics, facts = evaluate.main(cfg, ONE, log)
    manifests.write_manifest(cfg.run_dir, stage="evaluate", status="done", metrics=metrics, **facts)
    return cfg.run_dir, metrics


@pytest.mark.parametrize(
    "law", [["rollout.top_p=0.9"], ["rollout.top_k=5", "rollout.temperature=0.7"], ["rollout.min_tokens=3"], []]
)
def test_the_kl_is_null_where_the_answers_are_not_of_the_policys_law(tiny, tmp_path, law):
    """The reference's own is 0 whatever was sampled; the temperature is the same on both sides and biases nothing."""
    tiny_model(tmp_path / "other", seed=1, hidden=64, layers=4)
    run_dir, metrics = run(tmp_path, tiny, "x", *law)
    policies = json.loads((run_dir / "results.json").read_text())["policies"]
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert policies["a"]["kl"] == 0.0 and metrics["a/kl"] == 0.0
    notes = (run_dir / "logs" / "progress.jsonl").read_text()
    if law:
        assert (
            policies["b"]["kl"] is None
            and "b/kl" not in metrics
            and f"{law[0]}: the policies' KL is not given" in notes
        )
        assert {row["kl"] for row in samples if row["policy"] == "b"} == {None}
    else:
        assert policies["b"]["kl"] == metrics["b/kl"] != 0 and "KL is not given" not in notes
    summary.write_summary(run_dir.parent)
    summary.print_summary(run_dir.parent)
    html.write_html(run_dir.parent)


def test_a_mean_of_what_is_not_known_is_not_known():
    assert evaluate.mean([1.0, 2.0]) == 1.5 and evaluate.mean([1.0, None]) is None and evaluate.mean([0.0]) == 0.0
