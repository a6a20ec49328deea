"""How ranks are started, what they find in their environment, and that none outlives those who started it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignkit.core.errors import InputError
from alignkit.launch import local
from alignkit.launch.local import Local, free_port
from alignkit.launch.node import devices

# Adapters on a frozen Llama, six forwards and backwards of rows of different lengths; prints the MiB that they added.
GRAPHS = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

def resident(peak):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(peak)) / 1024

torch.set_num_threads(1)
sizes = dict(vocab_size=64, hidden_size=192, intermediate_size=512, num_hidden_layers=12, num_attention_heads=4)
model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), LoraConfig(r=8, target_modules="all-linear"))
before = resident("VmRSS")
for length in (100, 92, 85, 98, 88, 96):
    model(input_ids=torch.zeros(8, length, dtype=torch.long)).logits.sum().backward()
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks of glibc's allocator")
def test_the_heap_of_a_rank_does_not_grow_with_every_graph():
    def added(environment: dict[str, str]) -> float:
        result = subprocess.run([sys.executable, "-c", GRAPHS], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return float(result.stdout)

    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    assert added(plain | Local().environment(1)) < 0.75 * added(plain)


def test_what_the_user_tells_glibc_comes_last_and_so_wins(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=7")
    assert Local().environment(1)["GLIBC_TUNABLES"].endswith(":glibc.malloc.tcache_count=7")
    monkeypatch.delenv("GLIBC_TUNABLES")
    assert Local().environment(1)["GLIBC_TUNABLES"].count("tcache_count") == 1


def launch(folder: Path, module: str, source: str, ranks: int = 1, **environment: str) -> subprocess.Popen:
    """What `Local` starts, with another module in the place of a stage's ranks."""
    (folder / f"{module}.py").write_text(source)
    launcher = Local(num_ranks=ranks)
    command = launcher.command("sft", Path("x"), free_port())
    command = [*command[: command.index("--module") + 1], module]
    found = os.environ | launcher.environment(1) | environment
    found["PYTHONPATH"] = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        command,
        cwd=folder,
        env=found,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("visible", "ranks", "expected"),
    [
        (None, 3, ["0", "1", "2"]),
        ("3", 1, ["3"]),
        ("5,4", 2, ["5", "4"]),
        (" 7 , 6 ,1", 2, ["7", "6"]),
        ("GPU-8f2c,GPU-11aa", 2, ["GPU-8f2c", "GPU-11aa"]),
        ("MIG-GPU-8f2c/1/0", 1, ["MIG-GPU-8f2c/1/0"]),
        ("", 2, ["-1", "-1"]),
        ("2", 2, ["2", "2"]),
    ],
)
def test_ranks_get_the_devices_that_are_visible_in_their_order(visible, ranks, expected):
    assert devices(visible, ranks) == expected


def test_the_ranks_see_the_devices_that_were_asked_for(tmp_path):
    # One write a rank: pieces of two could mix.
    source = "import os, sys\ne = os.environ\nsys.stdout.write(f\"SEES {e['CUDA_VISIBLE_DEVICES']} {e['RANK']} {e['WORLD_SIZE']}\\n\")\n"
    said, _ = launch(tmp_path, "say_devices", source, 2, CUDA_VISIBLE_DEVICES="3,1").communicate(timeout=300)
    assert "SEES 3,1 0 2" in said and "SEES 3,1 1 2" in said


def test_fewer_devices_than_ranks_are_refused_where_there_are_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    Local(num_ranks=3).check()  # on a CPU it names nothing
    monkeypatch.setattr(local, "GPUS", tmp_path)
    Local(num_ranks=2).check()
    with pytest.raises(InputError, match=r"num_ranks=3 with CUDA_VISIBLE_DEVICES=4,5, which names 2"):
        Local(num_ranks=3).check()


ENDLESS = """
import os, time
from alignkit.worker import end_with_parent
end_with_parent()
os.write(1, f"AT WORK {os.environ['RANK']} {os.getpid()}\\n".encode())  # at once, or the lines of two ranks mix
time.sleep(300)
"""


def test_no_rank_outlives_the_launcher(tmp_path):
    process = launch(tmp_path, "endless", ENDLESS, 2)
    assert process.stdout is not None
    ranks = []
    while len(ranks) < 2:
        line = process.stdout.readline()
        assert line, "the launcher ended"
        words = line.split()
        ranks += [int(words[3])] if words[:2] == ["AT", "WORK"] else []
    process.kill()
    end = time.monotonic() + 10
    while set(ranks) & set(local.group_members(process.pid)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not set(ranks) & set(local.group_members(process.pid))
    process.wait()


def test_what_is_left_of_a_group_is_ended_though_its_leader_is_gone(tmp_path):
    source = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])"
    leader = subprocess.Popen([sys.executable, "-c", source], start_new_session=True)
    leader.wait()
    assert len(local.group_members(leader.pid)) == 1
    local.end_group(leader)
    assert local.group_members(leader.pid) == []


def test_a_rank_that_a_signal_ended_is_the_reason_and_not_what_its_peers_lost():
    lost = {"error": "RuntimeError: Connection reset by peer", "kind": "run"}
    for code, who in ((-9, "the launcher of its ranks"), (247, "a rank")):
        found = local.explained(lost, code)
        assert (
            found is not None
            and found["error"].startswith(f"{who} was ended by SIGKILL")
            and "reset by peer" in found["error"]
        )
        assert local.explained(None, code) is not None
    assert local.explained(lost, 1) is lost and local.explained(None, 0) is None
    refused = {"error": "data.path=x", "kind": "input"}
    assert local.explained(refused, 241) is refused  # ended by the launcher when its peer refused
