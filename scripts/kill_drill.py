#!/usr/bin/env python
"""Kill single processes of a PPO run, and pairs of them, with SIGKILL at random moments: never two writers, nothing left behind.

    scripts/kill_drill.py --rollout vllm --kills 15 [--ranks 2] [--seed 0]

A run has a command, the launcher of its ranks, the ranks, and with `--rollout server` a server and its engine. Each in
turn, then pairs of them, are killed. Within a minute no process of the run may be left, or `alignkit status` must say that
it runs; while it does, a second start must be refused. Then the same command goes on with it, and in the end
`metrics.jsonl` (all but times) and the final weights must be those of an undisturbed run: two writers would have left a
step twice. The last line is one JSON object; the exit code is 1 if something did not hold.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from kill_resume import STEPS, Life, Run, prepare, raw_rows, steps_of

WITHIN = 60.0  # seconds until a run whose process was killed has ended, or goes on
MARK = "ALIGNKIT_DRILL"  # in the environment of all that a command starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollout", choices=["hf", "vllm", "server"], default="vllm")
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    roles = ["command", "launcher", *(f"rank {n}" for n in range(args.ranks))]
    roles += ["server", "engine"] if args.rollout == "server" else []
    aims = [(role,) for role in roles] + list(itertools.combinations(roles, 2))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = [*prepare(folder, "ppo", args.ranks), f"rollout={args.rollout}"]
        whole = Run(folder, "ppo", "whole", common)
        started = time.time()
        whole.finish()
        rows = raw_rows(whole.path)
        life = Life(rows[0]["wall_time"] - started, [row["wall_time"] for row in rows], rows)
        print(f"undisturbed: {time.time() - started:.0f} s, first step after {life.birth:.0f} s", flush=True)
        faults: list[str] = []
        kills = runs = survived = 0
        while kills < args.kills:
            run, runs = Run(folder, "ppo", f"killed-{runs}", common), runs + 1
            for _ in range(4):
                if kills == args.kills:
                    break
                aim = aims[kills % len(aims)]
                what, fault = kill(run, aim, life, draw)
                if what == "ended before":
                    break
                kills, survived = kills + 1, survived + (what == "goes on")
                faults += [f"{run.name}, {' and '.join(aim)}: {fault}"] if fault else []
                steps = len(raw_rows(run.path))
                print(f"{kills:>3} {run.name:<9} {' and '.join(aim):<22} {steps:>2} steps  {fault or what}", flush=True)
            if not run.is_done():
                run.finish()
            if fault := run.differs_from(whole):
                faults.append(f"{run.name}: {fault}")
            print(f"    {run.name}: {fault or 'identical'}", flush=True)
            left = [
                path.name for pattern in ("sync-*", ".spare", "checkpoints/*partial") for path in run.path.glob(pattern)
            ]
            faults += [f"{run.name}: {left} is left"] if left else []
    print(json.dumps({"rollout": args.rollout, "kills": kills, "runs": runs, "survived": survived, "faults": faults}))
    sys.exit(bool(faults))


def kill(run: Run, aim: tuple[str, ...], life: Life, draw: random.Random) -> tuple[str, str | None]:
    """Start or go on, kill the processes of these roles, and look at what is left: (what became of it, what is wrong)."""
    mark = uuid.uuid4().hex
    saved = max((int(p.name[5:]) for p in (run.path / "checkpoints").glob("step_*[0-9]")), default=0)
    process = subprocess.Popen(
        run.command, env=os.environ | {MARK: mark}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    started, early = time.time(), draw.random() < 0.4  # while it starts, or after some of its steps
    moment, steps = started + draw.random() * life.birth, draw.randint(1, max(1, STEPS - saved - 3))
    while process.poll() is None:
        found = {role: pid for pid, role in processes(mark, process.pid).items()}
        due = time.time() >= moment if early else len(steps_of(run.path, started)) >= steps
        if due and all(role in found for role in aim):
            break
        time.sleep(0.02)
    else:
        return "ended before", None
    for role in aim:
        os.kill(found[role], signal.SIGKILL)
    end = time.monotonic() + WITHIN
    before = len(raw_rows(run.path))
    while processes(mark, process.pid) and time.monotonic() < end and process.poll() is None and before < STEPS:
        if len(raw_rows(run.path)) > before + 1:  # it goes on without it: a server that was started again
            break
        time.sleep(0.1)
    while process.poll() is not None and processes(mark, process.pid) and time.monotonic() < end:
        time.sleep(0.1)
    status = ask("status", str(run.path.parent)).stdout
    if left := processes(mark, process.pid):
        fault = None
        if "running" not in status and "done" not in status:
            fault = f"{sorted(left.values())} live, and the status is {status!r}"
        elif process.poll() is not None and "command" not in aim:
            fault = f"{sorted(left.values())} live {WITHIN:.0f} s after the command ended"
        second = subprocess.run(run.command, capture_output=True, text=True, env=os.environ | {MARK: mark})
        refused = second.returncode == 2 and "in use by" in second.stderr
        if not refused and processes(mark, process.pid) and "kept:" not in second.stdout:
            fault = f"a second start ended with {second.returncode}: {second.stderr[-300:]}{second.stdout[-300:]}"
        ask("cancel", str(run.path))
        finish_off(mark, process)
        return "goes on", fault
    process.wait()
    return "ended", f"nothing lives, and the status is {status!r}" if "running" in status else None


def ask(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "alignkit", *words], capture_output=True, text=True)


def finish_off(mark: str, process: subprocess.Popen) -> None:
    """Wait for the end of what was told to end; it has a minute."""
    end = time.monotonic() + WITHIN
    while processes(mark, process.pid) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in processes(mark, process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def processes(mark: str, command: int) -> dict[int, str]:
    """{process: role} of what a command started, and of the command itself."""
    found: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() not in (entry / "environ").read_bytes():
                continue
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            rank = dict(
                line.partition("=")[::2]
                for line in (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            ).get("RANK")
        except OSError:
            continue
        if state in "ZX":
            continue
        if int(entry.name) == command:
            found[int(entry.name)] = "command"
        elif "alignkit.launch.node" in words:
            found[int(entry.name)] = "launcher"
        elif "-m alignkit.worker" in words:
            found[int(entry.name)] = f"rank {rank}"
        elif "api_server" in words:
            found[int(entry.name)] = "server"
        elif "EngineCore" in words:
            found[int(entry.name)] = "engine"
        else:
            found[int(entry.name)] = words[:60]
    return found


if __name__ == "__main__":
    main()
