#!/usr/bin/env python
"""Kill a run at random moments with SIGKILL, resume it, and compare its end with that of an undisturbed run, bit by bit.

    scripts/kill_resume.py --stage ppo --kills 20 [--ranks 2] [--seed 0]

The tests' tiny model, the real engines. A run is killed up to four times, each time somewhere in a random step of what is
left, then finished. `metrics.jsonl` (all but times) and the final weights must be those of the undisturbed run. The last
line is one JSON object; the exit code is 1 if a run ended differently.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["ppo", "sft", "reward"], default="ppo")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = prepare(folder, args.stage, args.ranks)
        whole = Run(folder, args.stage, "whole", common)
        whole.finish()
        kills = same = runs = 0
        while kills < args.kills:
            run, runs = Run(folder, args.stage, f"killed-{runs}", common), runs + 1
            here = 0
            while here < 4 and kills < args.kills:
                at = run.kill_somewhere(draw)
                if at is None:
                    break
                here, kills = here + 1, kills + 1
                print(f"kill {kills}: {run.name}, {at}", flush=True)
            run.finish()
            fault = run.differs_from(whole)
            same += fault is None
            print(f"{run.name}: {here} kills, {'identical' if fault is None else fault}", flush=True)
    print(json.dumps({"kills": kills, "runs": runs, "identical": same == runs}))
    sys.exit(same != runs)


def prepare(folder: Path, stage: str, ranks: int) -> list[str]:
    """The tiny model, its rows, and the overrides of every run."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import WORDS, tiny_model

    tiny_model(folder / "model", hidden=64, layers=4)
    rows = {
        "ppo": [{"prompt": f"Tell me something {w} about it {i}."} for i in range(4) for w in WORDS],
        "sft": [{"prompt": f"Say {w} {i}", "completion": f"I {w} it."} for i in range(4) for w in WORDS],
        "reward": [{"prompt": f"Say {w} {i}", "chosen": "a good day", "rejected": w} for i in range(4) for w in WORDS],
    }[stage]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(
        "def score(prompts, responses, meta):\n    return [float(len(r) % 7) for r in responses]\n"
    )
    common = [
        f"runs_dir={folder}", f"model.path={folder / 'model'}", f"data.path={folder / 'rows.jsonl'}", "logger=none",
        "resume=true", f"launcher.num_ranks={ranks}", "launcher.threads=1", "mini_batch_size=8", "micro_batch_size=2",
    ]  # fmt: skip
    if stage != "ppo":
        return [*common, f"max_steps={STEPS}", "epochs=10", "save_steps=2", "optimizer.learning_rate=1e-3"]
    return [
        *common, f"steps={STEPS}", "save_steps=2", "rollout_batch_size=16", "rollout.max_new_tokens=8",
        "optimizer.learning_rate=1e-3", "algorithm.adaptive_kl_target=1", "algorithm.adaptive_kl_horizon=256",
        "algorithm.normalize_scores=true", "algorithm.missing_eos=none", "~reward@rewards.reward_model",
        "+reward@rewards.mine=function", f"rewards.mine.target={folder / 'mine.py'}:score",
    ]  # fmt: skip


class Run:
    """One run folder and the command that fills it."""

    def __init__(self, folder: Path, stage: str, name: str, common: list[str]) -> None:
        self.name, self.path = name, folder / name / stage
        self.command = [sys.executable, "-m", "alignkit", stage, *common, f"run_name={name}"]

    def finish(self) -> None:
        """Run to the end."""
        done = subprocess.run(self.command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{self.name} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

    def kill_somewhere(self, draw: random.Random) -> str | None:
        """Start or resume, kill all its processes in a random step of what is left; where that was, None if it ended."""
        log = self.path / "metrics.jsonl"
        done = len(rows_of(log))
        target, wait = draw.randrange(min(done, STEPS - 1), STEPS), draw.random() * 1.5
        process = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        started = self.events()
        while process.poll() is None and not (self.events() > started and len(rows_of(log)) >= target):
            time.sleep(0.02)
        time.sleep(wait)
        if process.poll() is not None:
            return None
        for pid in processes(str(self.path)) | {process.pid}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()
        while processes(str(self.path)):
            time.sleep(0.1)
        files = [p.name for p in (self.path / "checkpoints").glob("*")] if (self.path / "checkpoints").is_dir() else []
        return f"after {len(rows_of(log))} steps and {wait:.2f} s, checkpoints {sorted(files)}"

    def events(self) -> int:
        """How often training began in this folder."""
        path = self.path / "logs" / "progress.jsonl"
        text = path.read_text() if path.exists() else ""
        return text.count('"PPO"') + text.count('"training"') if '"PPO"' in text or '"training"' in text else 0

    def differs_from(self, other: Run) -> str | None:
        """The first difference of metrics or weights, or None."""
        mine, theirs = (rows_of(run.path / "metrics.jsonl") for run in (self, other))
        for a, b in zip(mine, theirs, strict=False):
            if a != b:
                names = [key for key in a | b if a.get(key) != b.get(key)]
                return f"step {a['step']} differs in {', '.join(names)}"
        if len(mine) != len(theirs):
            return f"{len(mine)} logged steps, expected {len(theirs)}"
        files = [p for p in other.path.glob("model/*.safetensors")]
        same = all(p.read_bytes() == (self.path / "model" / p.name).read_bytes() for p in files)
        return None if files and same else "the final weights differ"


def rows_of(path: Path) -> list[dict]:
    """The logged steps without what a clock says."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a killed run
            continue
        timed = ("time/", "wall_time", "train/train_runtime", "train/train_s", "train/train_samples_per")
        rows.append(
            {k: v for k, v in row.items() if not k.startswith(timed) and "per_second" not in k and "runtime" not in k}
        )
    return rows


def processes(words: str) -> set[int]:
    """The processes whose command line holds `words`."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if words in (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                    found.add(int(entry.name))
            except OSError:
                continue
    return found


if __name__ == "__main__":
    main()
