"""What a rank finds in its environment."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from alignkit.launch.local import Local

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
