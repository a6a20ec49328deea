#!/usr/bin/env python
"""What `alignkit plan` predicts a rank to hold at its peak, against what real runs held.

    scripts/plan_vs_measured.py [--only WORDS] [--folder FOLDER]

SFT, reward and PPO, with all weights and with adapters on a whole base and on one in 4 bits, in float32 and bfloat16, on one and two ranks, of a four-block
model made on the spot and of SmolLM2-135M: 72 cases. `--only "ppo smollm2 lora"` takes those whose name has all words,
`--only "sft tiny|ppo tiny"` either. A finished case in FOLDER is not run again.

Measured: on a GPU `torch.cuda.max_memory_allocated`, without one the peak of the resident memory of the process (VmHWM of
/proc), the libraries' own share included, as the plan includes it; of the ranks the largest. A run logs it as `peak_mib` in
its manifest. The last line is one JSON object: {"ratios": {case: predicted / measured}, "within_15_percent": n, "cases": n}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from alignkit.config import stages
from alignkit.pipeline.stage import check_inputs
from alignkit.plan import fit, memory
from alignkit.plan import text as plan

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

STAGES, MODELS, FINETUNE, DTYPES, RANKS = (
    ("sft", "reward", "ppo"), ("tiny", "smollm2"), ("lora", "qlora", "full"), ("float32", "bfloat16"), (1, 2),
)  # fmt: skip
PROMPT, ANSWER = 72, 40  # tokens of every row, the end among them: the longest row, which the plan reckons with, is met
SETTINGS = {
    "sft": ["max_length=112", "mini_batch_size=16", "micro_batch_size=8", "max_steps=3", "eval_fraction=0.1"],
    "reward": ["max_length=112", "mini_batch_size=8", "micro_batch_size=4", "max_steps=3", "eval_fraction=0.1"],
    "ppo": [
        "max_prompt_length=72", "rollout.max_new_tokens=28", "steps=2", "rollout_batch_size=32", "mini_batch_size=16",
        "micro_batch_size=8",
    ],
}  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", default="", help="words a case's name must have; | between alternatives")
    arguments.add_argument("--folder", type=Path, default=None, help="keeps models, data and runs here")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        inputs = prepare(folder)
        ratios = {}
        for case in itertools.product(STAGES, MODELS, FINETUNE, DTYPES, RANKS):
            name = "-".join(map(str, case))
            if given.only and not any(all(w in name for w in either.split()) for either in given.only.split("|")):
                continue
            predicted, measured, parts = compare(folder, inputs, *case)
            ratios[name] = round(predicted / measured, 3)
            print(
                f"{name:<30} predicted {predicted:8.1f} MiB  measured {measured:8.1f} MiB  {ratios[name]:.3f}  {parts}",
                flush=True,
            )
    near = sum(0.85 <= ratio <= 1.15 for ratio in ratios.values())
    print(json.dumps({"ratios": ratios, "within_15_percent": near, "cases": len(ratios)}))


def prepare(folder: Path) -> dict[str, str]:
    """Models, and rows for the tokenizer of each: {"tiny" | "smollm2": model path, "<model>-rows" | "<model>-pairs": file}."""
    from tiny import tiny_model

    from alignkit.data import dataset, tokens
    from alignkit.models.source import resolve_model

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tiny" / "config.json").is_file():
        tiny_model(folder / "tiny", hidden=64, layers=4)
    inputs = {"tiny": str(folder / "tiny"), "smollm2": "demo:smollm2-135m-instruct"}
    texts = dataset.Data(path="demo:chitchat/train", limit=96).rows("sft")
    for model in MODELS:
        tokenizer = tokens.load_tokenizer(resolve_model(inputs[model]).tokenizer)
        prompt, answer = (partial(encode, tokenizer) for encode in (tokens.encode_prompt, tokens.encode_response))
        made = [
            (lengthened(row["prompt"][-1]["content"], PROMPT, prompt), lengthened(row["completion"], ANSWER, answer))
            for row in texts
        ]
        rows = [{"prompt": before, "completion": after} for before, after in made if before and after]
        pairs = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
            for row, other in itertools.pairwise(rows)
            if row["completion"] != other["completion"]
        ]
        print(f"{model}: {len(rows)} rows and {len(pairs)} pairs of {PROMPT} + {ANSWER} tokens", flush=True)
        for name, lines in (("rows", rows), ("pairs", pairs)):
            inputs[f"{model}-{name}"] = str(folder / f"{model}-{name}.jsonl")
            Path(inputs[f"{model}-{name}"]).write_text(
                "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
            )
    return inputs


def lengthened(text: str, length: int, encode: Callable[[str], list[int]]) -> str | None:
    """The first words of a text and more of them, until it has `length` tokens; None where no number of words does."""
    words = text.split()[:5]
    while words and len(encode(" ".join(words))) < length:
        words.append(("day", "good", "sad", "love")[len(words) % 4])
    return " ".join(words) if len(encode(" ".join(words))) == length else None


def compare(
    folder: Path, inputs: dict[str, str], stage: str, model: str, finetune: str, dtype: str, ranks: int
) -> tuple[float, float, str]:
    """(predicted MiB, measured MiB, the predicted parts of the peak)."""
    name = f"{model}-{finetune}-{dtype}-{ranks}"
    overrides = [
        f"runs_dir={folder / 'runs'}", f"run_name={name}", f"model.path={inputs[model]}", f"finetune={finetune}", "logger=none",
        f"model.dtype={dtype}", f"launcher.num_ranks={ranks}", f"data.path={inputs[model + ('-pairs' if stage == 'reward' else '-rows')]}",
        *SETTINGS[stage],
    ]  # fmt: skip
    if stage == "ppo":  # its reward model is that of one rank in float32, made here where that case was not chosen
        reward = folder / "runs" / f"{model}-{finetune}-float32-1" / "reward"
        if not done(reward):
            compare(folder, inputs, "reward", model, finetune, "float32", 1)
        overrides.append(f"rewards.reward_model.path={reward}")
    run_dir = folder / "runs" / name / stage
    if not done(run_dir):
        command = [sys.executable, "-m", "alignkit", stage, *overrides, "resume=true"]
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if result.returncode:
            sys.exit(f"{stage} {name} failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    measured = max(json.loads((run_dir / "manifest.json").read_text())["peak_mib"])
    top = fit.peak(predicted(run_dir, stage))
    parts = " ".join(f"{part}={value / memory.MIB:.0f}" for part, value in top.parts.items() if value)
    return top.total / memory.MIB, measured, f"{top.name}: {parts}"


def predicted(run_dir: Path, stage: str) -> list[memory.Phase]:
    """The phases the plan of a run has, from its saved config."""
    cfg = stages.load(run_dir / "config.yaml", stage)
    model = plan.Model.of(cfg, check_inputs(cfg, {}), None)
    return plan.make(cfg, model, plan.detect()).phases


def done(run_dir: Path) -> bool:
    manifest = run_dir / "manifest.json"
    return manifest.is_file() and json.loads(manifest.read_text())["status"] == "done"


if __name__ == "__main__":
    main()
