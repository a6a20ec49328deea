#!/usr/bin/env python
"""Kill a run with SIGKILL at random moments of its life, resume it, and compare its end with an undisturbed one's, bit by bit.

    scripts/kill_resume.py --stage ppo --kills 20 [--ranks 2] [--seed 0]

The tests' tiny model, the real engines. Kills take turns: anywhere between the start of the command and its expected end,
while a checkpoint is written (its `.partial` folder exists), and, for PPO, in the seconds in which weights are sent to the
sampler. A run is killed up to five times, then finished. `metrics.jsonl` (all but times) and the final weights must be those
of the undisturbed run. The last line is one JSON object; the exit code is 1 if a run ended differently.
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
STEPS, A_RUN = 12, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["ppo", "sft", "reward"], default="ppo")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    aims = ["anywhere", "saving", "syncing"] if args.stage == "ppo" else ["anywhere", "saving"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = prepare(folder, args.stage, args.ranks)
        whole = Run(folder, args.stage, "whole", common)
        started = time.time()
        whole.finish()
        rows = raw_rows(whole.path)
        life = Life(rows[0]["wall_time"] - started, [row["wall_time"] for row in rows], rows)
        print(f"undisturbed: {time.time() - started:.0f} s, first step after {life.birth:.0f} s")
        print(f"{'kill':>4} {'run':<9} {'aim':<9} {'after':>6} {'steps':>5}  checkpoints")
        kills = same = runs = 0
        caught = dict.fromkeys(aims, 0)
        while kills < args.kills:
            run, runs, here = Run(folder, args.stage, f"killed-{runs}", common), runs + 1, 0
            while here < A_RUN and kills < args.kills:
                aim = aims[kills % len(aims)]
                lived = run.kill(aim, life, draw)
                if lived is None:  # it ended before
                    break
                here, kills, caught[aim] = here + 1, kills + 1, caught[aim] + 1
                held = sorted(p.name for p in (run.path / "checkpoints").glob("*"))
                print(
                    f"{kills:>4} {run.name:<9} {aim:<9} {lived:>5.1f}s {len(raw_rows(run.path)):>5}  {' '.join(held)}",
                    flush=True,
                )
            run.finish()
            fault = run.differs_from(whole)
            same += fault is None
            print(f"     {run.name}: {here} kills, {'identical' if fault is None else fault}", flush=True)
    found = {"stage": args.stage, "ranks": args.ranks, "kills": kills, "aims": caught, "runs": runs}
    print(json.dumps(found | {"identical": same == runs}))
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
        "save_steps=2",
    ]  # fmt: skip
    if stage != "ppo":
        return [*common, f"max_steps={STEPS}", "epochs=10", "optimizer.learning_rate=1e-3"]
    return [
        *common, f"steps={STEPS}", "rollout_batch_size=16", "rollout.max_new_tokens=8",
        "optimizer.learning_rate=1e-3", "algorithm.adaptive_kl_target=1", "algorithm.adaptive_kl_horizon=256",
        "algorithm.normalize_scores=true", "algorithm.missing_eos=none", "~reward@rewards.reward_model",
        "+reward@rewards.mine=function", f"rewards.mine.target={folder / 'mine.py'}:score",
    ]  # fmt: skip


class Life:
    """When an undisturbed run does what, in seconds."""

    def __init__(self, birth: float, walls: list[float], rows: list[dict]) -> None:
        self.birth, self.rows = birth, rows  # from the command to the first step's end
        self.step = (walls[-1] - walls[0]) / (len(walls) - 1)

    def left(self, done: int) -> float:
        """From the command to its end, `done` steps being in its checkpoint."""
        return self.birth + self.step * (STEPS - done - 1)

    def sync(self, step: int) -> tuple[float, float]:
        """(from the end of the step before to the sync of `step`, how long that takes)."""
        times = self.rows[step]
        return times["time/step"] - times["time/sync"] - times["time/attest"], times["time/sync"]


class Run:
    """One run folder and the command that fills it."""

    def __init__(self, folder: Path, stage: str, name: str, common: list[str]) -> None:
        self.name, self.path = name, folder / name / stage
        self.command = [sys.executable, "-m", "alignkit", stage, *common, f"run_name={name}"]

    def is_done(self) -> bool:
        file = self.path / "manifest.json"
        return file.is_file() and json.loads(file.read_text())["status"] == "done"

    def finish(self) -> None:
        """Run to the end."""
        done = subprocess.run(self.command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{self.name} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

    def kill(self, aim: str, life: Life, draw: random.Random) -> float | None:
        """Start or resume, and kill all its processes; how many seconds it had lived, None if it ended by itself."""
        saved = max((int(p.name[5:]) for p in (self.path / "checkpoints").glob("step_*[0-9]")), default=0)
        target = draw.randrange(min(saved + 1, STEPS - 2), STEPS - 1)
        share, before = draw.random(), time.time()
        process = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        moment = time.time() + share * life.left(saved) if aim == "anywhere" else None
        while process.poll() is None:
            if moment is not None:
                if time.time() >= moment:
                    break
            elif aim == "saving":
                if len(steps_of(self.path, before)) >= 1 and (
                    list(self.path.glob("checkpoints/*.partial")) or list(self.path.glob("checkpoints/partial/*"))
                ):
                    moment = time.time() + share * 0.1
            elif (done := steps_of(self.path, before)) and done[-1]["step"] + 1 >= target:
                wait, length = life.sync(min(done[-1]["step"] + 1, STEPS - 1))
                moment = done[-1]["wall_time"] + wait + share * length
            time.sleep(0.005)
        if process.poll() is not None:
            return None
        lived = time.time() - before
        for pid in processes(str(self.path)) | {process.pid}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()
        while processes(str(self.path)):
            time.sleep(0.1)
        return lived

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


def raw_rows(path: Path) -> list[dict]:
    """The logged steps of a run folder."""
    log, rows = path / "metrics.jsonl", []
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line of a killed run
            continue
    return rows


def steps_of(path: Path, since: float) -> list[dict]:
    """The steps logged since a moment."""
    return [row for row in raw_rows(path) if row["wall_time"] > since]


def rows_of(path: Path) -> list[dict]:
    """The logged steps without what a clock says."""
    timed = ("time/", "wall_time", "train/train_runtime", "train/train_s", "train/train_samples_per")
    return [
        {k: v for k, v in row.items() if not k.startswith(timed) and "per_second" not in k and "runtime" not in k}
        for row in raw_rows(path.parent)
    ]


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
