"""YAML of others, secrets, and the socket that the ranks meet at: what is refused, what stays closed, what runs nothing."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys

import pytest
import yaml
from test_cli import command, invoke, make_work, refused

from alignkit.check import config as check_config
from alignkit.cli import entry
from alignkit.config import credentials, stages
from alignkit.core import foreign, terminal
from alignkit.core.errors import InputError, RunError
from alignkit.launch import scheduler
from alignkit.launch.slurm import Slurm
from alignkit.rollout.server import Server
from alignkit.runs import manifests
from alignkit.training import rendezvous

# Each makes the file `pwned` where Hydra is let have it.
CALL = (
    "{_target_: alignkit.tracking.run_log.write_atomic, path: {_target_: pathlib.Path, _args_: [pwned]}, text: hello}"
)
HOSTILE = {
    "callbacks": ("experiment/evil.yaml", f"# @package _global_\nhydra:\n  callbacks:\n    x: {CALL}\n"),
    "launcher": ("experiment/evil.yaml", f"# @package _global_\nhydra:\n  launcher: {CALL}\n"),
    "sweeper's target": ("experiment/evil.yaml", f"# @package _global_\nhydra:\n  sweeper: {CALL}\n"),
    "logging": (
        "experiment/evil.yaml",
        "# @package _global_\nhydra: {job_logging: {handlers: {x: {(): os.system}}}}\n",
    ),
    "an option of Hydra": ("hydra/callbacks/evil.yaml", f"x: {CALL}\n"),
    "a package": ("algorithm/evil.yaml", f"# @package hydra.callbacks\nx: {CALL}\n"),
    "a package of a default": ("experiment/evil.yaml", "# @package _global_\ndefaults: [x@hydra.callbacks]\n"),
    "an override": ("experiment/evil.yaml", "# @package _global_\ndefaults: [{override /hydra/launcher: joblib}]\n"),
    "the search path": ("experiment/evil.yaml", "# @package _global_\nhydra: {searchpath: [file:///elsewhere]}\n"),
}
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("foreign") / "work")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_config_file_that_sets_up_hydra_is_refused_before_hydra_reads_it(work, name):
    path, text = HOSTILE[name]
    own = work / f"own-{name.replace(' ', '-')}"
    (own / path).parent.mkdir(parents=True)
    (own / path).write_text(text)
    more = ["+experiment=evil"] if "experiment" in path else ["+hydra/callbacks=evil"] if "hydra" in path else []
    given = [*more, "--config-dir", own.name]
    for line in (
        command("sft", "dry_run=true", *given),
        ["plan", *command("sft", *given)],
        command("sft", *given, "--cfg", "job"),
        command("sft", *more, f"hydra.searchpath=[file://{own}]"),
        ["check", "data", *command("sft", *more, f"hydra.searchpath=[file://{own}]")],
    ):
        refused(work, line, path.rpartition("/")[2], "before a command begins")
    (found,) = own.rglob("*.yaml")
    assert "before a command begins" in str(check_config.check_file(found, own, entry.conf_dir())[1])
    assert not (work / "pwned").exists()


def test_what_to_sweep_may_stand_in_a_file(work):
    (work / "sweeps/experiment").mkdir(parents=True)
    (work / "sweeps/experiment/lr.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: 1,2\nmax_length: 99\n"
    )
    result = invoke(*command("sft", "+experiment=lr", "--config-dir", "sweeps", "dry_run=true"), cwd=work)
    assert result.code == 0 and "max_length: 99" in result.out


def test_aliases_size_and_encoding_are_refused(work, tmp_path):
    assert sum(len(line) for line in LAUGHS.splitlines()) < 500
    (work / "laughs/experiment").mkdir(parents=True)
    (work / "laughs/experiment/evil.yaml").write_text(f"# @package _global_\n{LAUGHS}")
    refused(work, command("sft", "+experiment=evil", "--config-dir", "laughs"), "line 3: *a is an alias")
    for text, words in (
        (LAUGHS.encode(), "alias"),
        (b"seed: 1 #" + b"x" * foreign.LIMIT, "1,048,585 bytes"),
        (b"run_name: gr\xf6\xdfe\n", "no UTF-8 text"),
    ):
        (tmp_path / "config.yaml").write_bytes(text)
        with pytest.raises(InputError, match=words):
            stages.load(tmp_path / "config.yaml", "sft")
    (tmp_path / "config.yaml").write_text("text: 2 * 3\n")
    assert foreign.load(tmp_path / "config.yaml") == yaml.safe_load("text: 2 * 3")


# ------------------------------------------------------------------------------------------------------------ secrets


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("launcher.env.WANDB_API_KEY", "something"),
        ("ppo.launcher.env.HF_TOKEN", "x"),
        ("launcher.setup.0", "export HF_TOKEN=hf_abc"),
        ("launcher.setup.1", "module load x; MY_PASSWORD='p q' run"),
        ("launcher.flags.0", "--export=ALL,API_KEY=abc"),
        ("model.path", "org/CANARY-12345"),  # what SOME_TOKEN is set to stands in it
        ("rollout.urls.0", "http://user:pass@host:8000"),
    ],
)
def test_a_secret_in_a_config_is_refused_without_being_shown(key, text):
    with pytest.raises(InputError) as refusal:
        credentials.check([(key, text)], {"SOME_TOKEN": "CANARY-12345", "PATH": "/bin"})
    assert key in str(refusal.value) and "CANARY" not in str(refusal.value) and "hf_abc" not in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("launcher.env.TOKENIZERS_PARALLELISM", "false"),
        ("launcher.env.NCCL_SOCKET_IFNAME", "ib0"),
        ("launcher.setup.0", "export HF_TOKEN=$(cat /keys/hf)"),
        ("launcher.setup.0", 'export HF_TOKEN="$MY_TOKEN"'),
        ("rollout.api_key_env", "ALIGNKIT_SERVER_KEY"),
        ("rollout.urls.0", "http://host:8000/a@b"),
        ("data.path", "keys/monkey=1"),
    ],
)
def test_what_is_no_secret_is_taken(key, text):
    credentials.check([(key, text)], {"SOME_TOKEN": "short", "A_KEY": os.getcwd(), "MONKEY": "keys/monkey=1"})


def test_keys_of_the_environment_do_not_reach_the_config(work, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    given = ["launcher=slurm", "+launcher.env.WANDB_API_KEY=${oc.env:WANDB_API_KEY}", "dry_run=true"]
    result = invoke(*command("sft", *given), cwd=work)
    assert result.code == 2 and "launcher.env.WANDB_API_KEY" in result.err and "0" * 40 not in result.err + result.out


def test_a_key_that_travels_in_the_clear_is_said(monkeypatch):
    monkeypatch.setenv("ALIGNKIT_SERVER_KEY", "k" * 20)
    assert "unencrypted" in Server(urls=["http://node7:8000"]).notes()[0]
    for urls in (["https://node7:8000"], ["http://127.0.0.1:8000"], ["http://localhost:1"], ["http://[::1]:8"], []):
        assert Server(urls=urls).notes() == []
    monkeypatch.delenv("ALIGNKIT_SERVER_KEY")
    assert Server(urls=["http://node7:8000"]).notes() == []


# ------------------------------------------------------------------------------------------------------- rendezvous


def listening(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_ranks_of_one_machine_listen_on_its_loopback_alone(free_port):
    code = (
        "import psutil, torch, torch.distributed as d\nfrom alignkit.training import rendezvous\nrendezvous.join('gloo')\n"
        "x = torch.ones(2); d.all_reduce(x); assert x.tolist() == [1, 1]\n"
        "print(sorted({c.laddr.ip for c in psutil.Process().net_connections('inet') if c.status == 'LISTEN'}))"
    )
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "LOCAL_RANK": "0"}
    place = {"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": str(free_port)}
    assert listening(code, **environment, **place) == "['127.0.0.1']"


def test_several_machines_meet_on_the_address_that_was_named(monkeypatch, free_port):
    found = socket.socket(fileno=rendezvous.listen("127.0.0.1", free_port))
    assert found.getsockname() == ("127.0.0.1", free_port)
    found.close()
    # A machine whose own name is on its loopback: others reach it by none of its other addresses but all of them.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 0, 0, "", ("127.0.1.1", free_port))])
    found = socket.socket(fileno=rendezvous.listen("node1", free_port))
    assert found.getsockname() == ("0.0.0.0", free_port)
    found.close()


def test_a_port_that_is_taken_is_said_and_then_refused(free_port):
    said: list[str] = []
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port))
        other.listen()
        with pytest.raises(RunError, match=rf"127.0.0.1:{free_port}: EADDRINUSE.*leave launcher.port out"):
            rendezvous.listen("127.0.0.1", free_port, said.append, patience=0.3)
    assert len(said) == 1 and "is taken by another program" in said[0]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(("local_rank", "visible", "device"), [(0, 1, 0), (3, 1, 0), (3, 4, 3), (1, 8, 1)])
def test_a_rank_takes_its_own_device_or_the_only_one_it_sees(local_rank, visible, device):
    assert rendezvous.own_device(local_rank, visible) == device


def test_a_rank_without_a_device_says_so():
    with pytest.raises(RunError, match=r"rank 2 of this machine sees 2 GPUs.*num_ranks"):
        rendezvous.own_device(2, 2)


# ------------------------------------------------------------------------------------------------------------- sbatch


def test_what_the_shell_says_to_sbatch_does_not_overrule_the_launcher():
    script = "#!/bin/bash\n#SBATCH --partition=gpu\n#SBATCH --time=1:00:00\necho --qos\n"
    names = ["SBATCH_EXPORT", "SBATCH_TIMELIMIT", "SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_QOS", "PATH"]
    assert scheduler.overruled(names, script) == ["SBATCH_EXPORT", "SBATCH_PARTITION", "SBATCH_TIMELIMIT"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("account", "a\ntouch pwned"), ("partition", "gpu\r"), ("flags", ["--comment=x\nrm -r y"]), ("mem", "1G\x1b[2J")],
)
def test_nothing_ends_the_line_of_a_directive(field, value):
    with pytest.raises(InputError, match=f"launcher.{field}="):
        Slurm(**{field: value}).check()


# ----------------------------------------------------------------------------------------------------------- terminals

HOSTILE_TEXT = "\x1b[2J\x1b]0;title\x07done\rfailed\x9b1A\u202e"
AS_SHOWN = r"\x1b[2J\x1b]0;title\x07done\rfailed\x9b1A\u202e"


def test_no_text_of_a_run_moves_the_cursor(work):
    run = work / "runs/hostile/sft"
    (run / "logs").mkdir(parents=True)
    manifests.write_manifest(run, stage="sft", status="failed", error=HOSTILE_TEXT, metrics={"eval_loss": 1.0})
    (run / "logs/sft.log").write_text(f"{HOSTILE_TEXT}\n", newline="")
    (run / "config.yaml").write_text('run_name: hostile\nruns_dir: runs\nseed: "\\e[2J"\n')
    for line in (["status", "runs/hostile"], ["report", "runs/hostile"], ["resume", "runs/hostile/sft", "--dry-run"]):
        result = invoke(*line, cwd=work)
        assert not moving(result.out + result.err), (line, result)
    assert AS_SHOWN in invoke("status", "runs/hostile", cwd=work).out
    logs = subprocess.run(
        [sys.executable, "-m", "alignkit", "logs", "runs/hostile", "-n", "1"], cwd=work, capture_output=True, text=True
    )
    assert logs.returncode == 0 and logs.stdout.endswith(AS_SHOWN.replace(r"\r", "\n") + "\n"), logs  # as bars have it
    assert not moving((work / "runs/hostile/report.html").read_text())
    result = invoke(*command("sft", "run_name=x", "data.path='\x1b[2J.jsonl'", without="data.path"), cwd=work)
    assert result.code == 2 and not moving(result.err)


def moving(text: str) -> list[str]:
    return [c for c in text if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or c == "\u202e"]


def test_colours_pass_and_what_wipes_does_not():
    held = io.StringIO()
    print("\x1b[1;32mgreen\x1b[0m \x1b[2K end \x1b[31", file=terminal.Screen(held))
    assert held.getvalue() == "\x1b[1;32mgreen\x1b[0m \\x1b[2K end \\x1b[31\n"


def test_what_is_read_once_is_refused(work):
    os.mkfifo(work / "pipe.jsonl")
    for line in (
        command("sft", "data.path=pipe.jsonl", without="data.path"),
        ["check", "data", "sft", "data.path=pipe.jsonl"],
    ):
        refused(work, line, "data.path=pipe.jsonl: a pipe or a device", "to a file")
