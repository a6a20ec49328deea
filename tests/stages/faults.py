"""Faults of a weight sync, planted in the real parts: each a context manager; the third sync (or the start) goes wrong."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from alignkit.core.types import Payload
from alignkit.finetune.lora import LoRA
from alignkit.models import loading
from alignkit.rollout import canary as attest
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.server import ServerSampler
from alignkit.rollout.vllm import VLLM, VLLMSampler
from alignkit.training.engine import Optimizer

BAD = 3  # the version whose sync goes wrong


@contextmanager
def sync_skipped() -> Iterator[None]:
    sync = VLLMSampler.sync_weights

    def skip(self, payload, version):
        if version != BAD:
            sync(self, payload, version)

    with patch.object(VLLMSampler, "sync_weights", skip):
        yield


@contextmanager
def old_adapter_under_the_new_name() -> Iterator[None]:
    send = VLLMSampler._send_adapter

    def stale(self, payload, version):
        if version == BAD:
            before = self.lora.lora_path
            payload = Payload(payload.weights, lambda folder: shutil.copytree(before, folder))
        send(self, payload, version)

    with patch.object(VLLMSampler, "_send_adapter", stale):
        yield


@contextmanager
def old_weights_under_the_new_version() -> Iterator[None]:
    send = VLLMSampler._send_weights

    def stale(self, payload):
        if self.version + 1 != BAD:
            send(self, payload)

    with patch.object(VLLMSampler, "_send_weights", stale):
        yield


@contextmanager
def adapter_folded_twice() -> Iterator[None]:
    plain, syncs = LoRA.sync_payload, []

    def twice(self, roles):
        syncs.append(1)
        with attest.scaled_adapter(roles, 2.0 if len(syncs) == BAD else 1.0):
            return iter(list(plain(self, roles)))

    with patch.object(LoRA, "sync_payload", twice):
        yield


@contextmanager
def prefix_cache_left() -> Iterator[None]:
    sync = VLLMSampler.sync_weights

    def leave(self, payload, version):
        if version == BAD:
            with patch.object(self.llm, "reset_prefix_cache", lambda: None):
                sync(self, payload, version)
        else:
            sync(self, payload, version)

    with patch.object(VLLMSampler, "sync_weights", leave):
        yield


@contextmanager
def tied_head_left() -> Iterator[None]:
    send = VLLMSampler._send_weights

    def leave(self, payload):
        if self.version + 1 == BAD:
            with patch.object(self, "repack_tied_head", lambda: None):
                send(self, payload)
        else:
            send(self, payload)

    with patch.object(VLLMSampler, "_send_weights", leave):
        yield


@contextmanager
def wrong_base() -> Iterator[None]:
    """The engine loads the other tiny model, in a folder beside the right one."""
    start = VLLM.start

    def other(self, context):
        context.base = context.base.rstrip("/") + "-other"
        return start(self, context)

    with patch.object(VLLM, "start", other):
        yield


@contextmanager
def trainer_without_temperature() -> Iterator[None]:
    of = attest.Canary.of.__func__

    def cold(cls, cfg, prompts, tokenizer):
        canary = of(cls, cfg, prompts, tokenizer)
        canary.temperature = 1.0
        return canary

    with patch.object(attest.Canary, "of", classmethod(cold)):
        yield


@contextmanager
def disk_full() -> Iterator[None]:
    save, saves = LoRA.save, []

    def full(self, roles, folder):
        saves.append(1)
        if len(saves) == BAD:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, roles, folder)

    with patch.object(LoRA, "save", full):
        yield


@contextmanager
def servers_fail() -> Iterator[None]:
    """Server 1 hangs for a while in step 2; server 0 is killed in step 5; server 1 loses its engine process in step 8."""
    generate = ServerSampler.generate

    def troubled(self, prompts, group_size, seed, step, law=None):
        if step == 2:
            hang(self.replicas[1].process.pid, seconds=40)
        if step == 5:
            os.killpg(self.replicas[0].process.pid, signal.SIGKILL)
        if step == 8:
            subprocess.run(["pkill", "-KILL", "-P", str(self.replicas[1].process.pid)], check=True)
        rollouts = generate(self, prompts, group_size, seed, step, law)
        if step == 2:
            hanging.join()
        return rollouts

    hanging = threading.Thread()

    def hang(group, seconds):
        nonlocal hanging
        os.killpg(group, signal.SIGSTOP)
        hanging = threading.Timer(seconds, os.killpg, (group, signal.SIGCONT))
        hanging.start()

    with patch.object(ServerSampler, "generate", troubled):
        yield


@contextmanager
def last_server_killed() -> Iterator[None]:
    generate = ServerSampler.generate

    def killed(self, prompts, group_size, seed, step, law=None):
        if step == 1:
            os.killpg(self.replicas[0].process.pid, signal.SIGKILL)
        return generate(self, prompts, group_size, seed, step, law)

    with patch.object(ServerSampler, "generate", killed):
        yield


@contextmanager
def learning_rate() -> Iterator[None]:
    """A schedule that is at its end before the run begins."""
    with patch.object(Optimizer, "factor", lambda *_: 0.0):
        yield


@contextmanager
def ratio() -> Iterator[None]:
    """The update runs in training mode with dropout in its attention: its log-probs are not those of the experience."""
    from alignkit.stages import ppo

    update = ppo.update

    def training(cfg, roles, *rest):
        for part in roles.modules():
            if hasattr(part, "attention_dropout"):
                part.attention_dropout = 0.1
        roles.train()
        try:
            return update(cfg, roles, *rest)
        finally:
            roles.eval()

    with patch.object(ppo, "update", training):
        yield


@contextmanager
def rollout_gap() -> Iterator[None]:
    """The sampler keeps the weights it started with, and the canary that would stop the run is off."""
    start = HFSampler.__init__

    def keep(self, sampling, context):
        start(self, sampling, context)
        context.roles = copy.deepcopy(context.roles)

    with patch.object(HFSampler, "__init__", keep), patch.object(attest.Canary, "check", lambda *_: {}):
        yield


@contextmanager
def slow_rank() -> Iterator[None]:
    """The first rank comes a second late to what transformers' Trainer does last: it looks for checkpoints."""
    import transformers.trainer as hf

    look = hf.sort_checkpoints

    def late(*args, **options):
        time.sleep(float(os.environ["RANK"] == "0"))
        assert os.path.isdir(options["output_dir"]), "another rank has removed the folder"
        return look(*args, **options)

    with patch.object(hf, "sort_checkpoints", late):
        yield


@contextmanager
def classes_left_alone() -> Iterator[None]:
    """No fault but a watch: starting vLLM's engine changes neither transformers' classes nor what the trainer computes."""
    start = VLLMSampler.__init__

    def watched(self, config, context):
        ids = torch.arange(10, 26)[None]
        every = torch.ones_like(ids, dtype=torch.bool)

        def hidden():
            with torch.no_grad():
                context.roles.switch("policy")
                return loading.trunk_hidden(context.roles.model("policy"), ids, every)

        before, states = dict(transformers_classes()), hidden()
        start(self, config, context)
        after = dict(transformers_classes())
        assert [cls for cls in before if before[cls] != after[cls]] == []
        assert torch.equal(states, hidden())

    with patch.object(VLLMSampler, "__init__", watched):
        yield


def transformers_classes(cls: type = PreTrainedModel) -> Iterator[tuple[type, tuple]]:
    """(class, (its bases, what it holds but for notes of transformers to itself)) of all model classes that are loaded."""
    for kind in type.__subclasses__(cls):
        if not hasattr(kind, "save_aot_compiled_function"):  # a subclass that vLLM made for itself
            yield kind, (kind.__bases__, {k: v for k, v in vars(kind).items() if not k.endswith("_cached_value")})
            yield from transformers_classes(kind)
