"""The log: what is on disk after a crash, a resume or a NaN, and what a person sees while a stage runs."""

import io
import json
import os
import re
import subprocess
import sys
import time

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from alignkit.core.errors import InputError
from alignkit.core.io import append_jsonl, read_jsonl
from alignkit.tracking.console import _View, clock, follow, rate_text, short
from alignkit.tracking.run_log import NoLogger, RunLog, Tensorboard, Wandb

CONFIG = {"run_name": "mine", "seed": 3, "model": {"path": "tiny"}}


def child(code: str, *args) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)])


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=110, force_terminal=False)


# A stage as `follow` sees it: its own process, writing through RunLog.
STAGE = """
import sys, time
from pathlib import Path
from alignkit.tracking.run_log import NoLogger, RunLog
log = RunLog(Path(sys.argv[1]), "sft", 0, NoLogger(), {})
with log.progress("loading model", 1) as bar:
    bar.advance()
log.note("dropped 3 of 100 rows: empty answer")
with log.progress("training", 4) as bar:
    for step in range(4):
        time.sleep(0.25)
        bar.advance(loss=2.0 - step / 4, lr=3e-5)
with log.progress("saving", 1) as bar:
    bar.advance()
if len(sys.argv) > 2:
    log.error("input", sys.argv[2])
    sys.exit(2)
"""


def test_importing_it_loads_nothing_heavy():
    heavy = "import alignkit.tracking.run_log, sys; print([m for m in ('torch', 'wandb', 'rich', 'tensorboard') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", heavy], text=True).strip() == "[]"


# ------------------------------------------------------------------------------------------ files


def test_metrics_are_one_valid_json_object_a_line_even_with_nan(tmp_path):
    torch = pytest.importorskip("torch")
    with RunLog(tmp_path / "mine" / "sft", "sft", 0, NoLogger(), CONFIG) as log:
        log.log(1, {"loss": torch.tensor(0.5), "grad_norm": float("inf")})
        log.log(2, {"loss": float("nan"), "count": 7})
    lines = (tmp_path / "mine" / "sft" / "metrics.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]
    assert [row["step"] for row in strict] == [1, 2]
    assert strict[0]["loss"] == 0.5 and strict[0]["grad_norm"] == "inf"
    assert float(strict[1]["loss"]) != float(strict[1]["loss"]) and strict[1]["count"] == 7
    assert abs(strict[1]["wall_time"] - time.time()) < 60


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(tmp_path / "sft", "sft", 1, Wandb(), CONFIG)
    log.log(1, {"loss": 1.0})
    log.samples(1, [{"response": "hi"}])
    log.note("n")
    log.rewind(0)
    with log.progress("training", 2) as bar:
        bar.advance(loss=1.0)
        bar.update(2)
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_any_rank_is_told_and_the_first_is_the_cause(tmp_path):
    RunLog(tmp_path, "ppo", 1, None, CONFIG).error("run", "out of memory")
    RunLog(tmp_path, "ppo", 0, None, CONFIG).error("run", "connection closed by peer")
    error = follow(tmp_path / "logs" / "progress.jsonl", child("raise SystemExit(1)"), "ppo", plain_console())
    assert (error["error"], error["rank"]) == ("out of memory", 1)


def test_the_clock_of_a_phase_of_unknown_length_runs_on():
    view = _View("ppo")
    view.add({"what": "starting the engine", "done": 0, "total": 0, "elapsed": 1.0, "numbers": {}})
    assert view.speed(view.seen + 30) == "0:31"
    view.add({"what": "PPO", "done": 0, "total": 10, "elapsed": 0.0, "numbers": {}})
    assert view.speed(view.seen + 5) == "0:05"  # no rate yet
    view.add({"what": "PPO", "done": 2, "total": 10, "elapsed": 60.0, "numbers": {}})
    assert view.speed(view.seen) == "30 s/step  4:00 left"
    assert view.speed(view.seen + 20) == "30 s/step  3:40 left"
    view.add({"what": "PPO", "done": 10, "total": 10, "elapsed": 300.0, "numbers": {}})
    assert view.speed(view.seen + 20) == "5:00"


def test_a_line_cut_by_a_kill_spoils_only_itself(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    append_jsonl(path, {"step": 3, "text": "a line\u2028separator é"})
    assert [row["step"] for row in read_jsonl(path)] == [1, 3]
    assert read_jsonl(path)[1]["text"] == "a line\u2028separator é"
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_rewind_leaves_one_object_a_step_after_a_resume(tmp_path):
    first = RunLog(tmp_path, "ppo", 0, None, CONFIG)
    for step in range(1, 6):
        first.log(step, {"objective/score": step})
        first.samples(step, [{"response": "a", "score": float("nan")}])
    again = RunLog(tmp_path, "ppo", 0, None, CONFIG)
    again.rewind(3)
    again.log(4, {"objective/score": 40})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["objective/score"]) for row in rows] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert [row["step"] for row in read_jsonl(tmp_path / "samples.jsonl")] == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_progress_writes_first_and_last_and_few_between(tmp_path):
    log = RunLog(tmp_path, "sft", 0, None, CONFIG)
    with log.progress("tokenizing", 1000, unit="row") as bar:
        for _ in range(1000):
            bar.advance(loss=0.5)
    events = read_jsonl(tmp_path / "logs" / "progress.jsonl")
    assert 2 <= len(events) < 20
    assert events[0]["done"] == 0
    last = events[-1]
    assert (last["what"], last["done"], last["total"], last["unit"]) == ("tokenizing", 1000, 1000, "row")
    assert last["numbers"] == {"loss": 0.5} and last["elapsed"] >= 0 and last["time"] > 0


def test_progress_keeps_the_last_state_of_a_phase_that_fails(tmp_path):
    log = RunLog(tmp_path, "sft", 0, None, CONFIG)
    with pytest.raises(ZeroDivisionError), log.progress("training", 9) as bar:
        bar.update(4, loss=1.5)
        raise ZeroDivisionError
    assert read_jsonl(tmp_path / "logs" / "progress.jsonl")[-1]["done"] == 4


# ------------------------------------------------------------------------------------------ trackers


@pytest.mark.parametrize("node", [NoLogger, Wandb, Tensorboard])
def test_nodes_are_config_nodes(node):
    config = OmegaConf.structured(node)
    assert OmegaConf.to_object(config) == node()


def test_wandb_refuses_an_unknown_mode():
    with pytest.raises(InputError, match=r"logger.mode='on' .* offline, online or auto"):
        Wandb(mode="on")


def test_wandb_offline_writes_and_a_resumed_run_keeps_its_id(tmp_path, capfd):
    run_dir = tmp_path / "mine" / "ppo"
    for _ in range(2):
        log = RunLog(run_dir, "ppo", 0, Wandb(tags=["test"]), CONFIG)
        log.log(1, {"objective/score": 0.5, "objective/kl": float("nan")})
        log.samples(1, [{"prompt": [{"role": "user", "content": "hi"}], "response": "yo", "score": 1}, {"score": 0.5}])
        log.close()
    files = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    run_id = (run_dir / "wandb" / "run_id").read_text()
    assert files and {path.name for path in files} == {f"run-{run_id}.wandb"}
    assert any(b"objective/score" in path.read_bytes() for path in files)
    assert list(run_dir.glob("wandb/offline-run-*/files/media/table/samples*.json"))
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""  # no wall of text


def test_wandb_auto_is_offline_without_a_login(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom alignkit.tracking.run_log import Wandb\n"
        "Wandb(mode='auto').start(Path(sys.argv[1]), 'mine', 'ppo', {}).close()\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "ppo"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stderr == ""
    assert list(tmp_path.glob("ppo/wandb/offline-run-*"))


def test_tensorboard_writes_numbers_that_read_back(tmp_path):
    log = RunLog(tmp_path / "mine" / "ppo", "ppo", 0, Tensorboard(), CONFIG)
    for step in (1, 2):
        log.log(step, {"objective/score": step / 4})
    log.samples(2, [{"prompt": "hi", "response": "yo"}])
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "mine" / "ppo" / "tensorboard"))
    events.Reload()
    assert [(item.step, item.value) for item in events.Scalars("objective/score")] == [(1, 0.25), (2, 0.5)]
    assert "samples/0/text_summary" in events.Tags()["tensors"]


# ------------------------------------------------------------------------------------------ follow


def test_follow_a_good_stage_in_a_ci_log(tmp_path):
    console = plain_console()
    error = follow(tmp_path / "logs" / "progress.jsonl", child(STAGE, tmp_path), "sft", console)
    lines = console.file.getvalue().splitlines()
    assert error is None
    assert lines[0] == "sft  starting"
    assert "  sft: dropped 3 of 100 rows: empty answer" in lines
    assert sum("training  4/4" in line for line in lines) == 1  # the end of the phase, and nothing before ten seconds
    assert re.fullmatch(r"✓ sft +4/4  0:\d\d  loss 1\.25  lr 3e-5", lines[-1])
    assert len(lines) == 6 and "\x1b" not in console.file.getvalue()


def test_follow_draws_one_live_line_on_a_terminal(tmp_path):
    console = Console(file=io.StringIO(), width=110, force_terminal=True, color_system=None)
    follow(tmp_path / "logs" / "progress.jsonl", child(STAGE, tmp_path), "sft", console)
    text = console.file.getvalue()
    frames = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame) for frame in re.split(r"[\r\n]+", text)]
    assert any(re.search(r"sft +starting [━ ]+0:0\d", frame) for frame in frames)
    assert any(re.search(r"sft +training ━.* [123]/4 \d\.\d step/s  0:0\d left loss", frame) for frame in frames), (
        frames
    )
    assert any(frame.strip() == "sft: dropped 3 of 100 rows: empty answer" for frame in frames)
    assert max(map(len, frames)) <= 110
    assert re.fullmatch(r"✓ sft +4/4  0:\d\d  loss 1\.25  lr 3e-5", frames[-2])


def test_follow_returns_the_error_of_a_stage_that_stops(tmp_path):
    path = tmp_path / "logs" / "progress.jsonl"
    append_jsonl(path, {"error": "an earlier attempt", "kind": "run"})
    append_jsonl(path, {"what": "training", "done": 9, "total": 9, "elapsed": 1, "numbers": {}})
    offset = path.stat().st_size
    console = plain_console()
    error = follow(path, child(STAGE, tmp_path, "no column 'prompt'"), "sft", console, offset=offset)
    assert (error["kind"], error["error"]) == ("input", "no column 'prompt'")
    assert "9/9" not in console.file.getvalue()
    assert console.file.getvalue().splitlines()[-1].startswith("✗ sft ")
    assert console.file.getvalue().rstrip().endswith("stopped with exit code 2")


def test_follow_survives_no_file_half_lines_and_rubbish(tmp_path):
    console = plain_console()
    assert follow(tmp_path / "none.jsonl", child("raise SystemExit(1)"), "sft", console) is None
    assert "stopped with exit code 1" in console.file.getvalue()

    halves = """
import sys, time
with open(sys.argv[1], "w") as file:
    for part in ('not json\\n[1]\\n{"what": "tra', 'ining", "done": 1, "total": 2}\\n{"error": "o', 'ops", "kind": "run"}\\n'):
        file.write(part); file.flush(); time.sleep(0.4)
"""
    error = follow(tmp_path / "half.jsonl", child(halves, tmp_path / "half.jsonl"), "sft", plain_console())
    assert error == {"error": "oops", "kind": "run"}


def test_an_interrupt_leaves_the_terminal_clean(tmp_path):
    class Interrupted:
        polls = 0

        def poll(self):
            self.polls += 1
            if self.polls > 2:
                raise KeyboardInterrupt

    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with pytest.raises(KeyboardInterrupt):
        follow(tmp_path / "p.jsonl", Interrupted(), "ppo", console)
    assert console.file.getvalue().rstrip().endswith(("\x1b[2K", "\x1b[?25h")) or "\x1b[?25h" in console.file.getvalue()


# ------------------------------------------------------------------------------------------ words


def test_numbers_are_said_as_a_person_would():
    assert [clock(s) for s in (0, 7.4, 151, 3725)] == ["0:00", "0:07", "2:31", "1:02:05"]
    rates = [rate_text(r, "step") for r in (1240.0, 12.3, 1.31, 1 / 4.2, 1 / 32, 1 / 150)]
    assert rates == ["1,240 step/s", "12 step/s", "1.3 step/s", "4.2 s/step", "32 s/step", "2.5 min/step"]
    values = [0.41234, 1.2345, 31.04, 12345.6, 3e-5, 2.5e-4, 0.0, -0.5, 17, "nan", float("inf")]
    assert [short(v) for v in values] == [
        "0.412",
        "1.23",
        "31.0",
        "12,346",
        "3e-5",
        "2.5e-4",
        "0",
        "-0.500",
        "17",
        "nan",
        "inf",
    ]
