"""Sampling with `vllm serve` processes, started here or given by URL, reached over HTTP; a sync sends them the adapter."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.core.errors import InputError, RunError
from alignkit.core.fields import num
from alignkit.core.types import Payload, PromptBatch, Rollouts
from alignkit.rollout.base import LORA_RANKS, Context, Sampling, pack_rollouts, stream_seeds
from alignkit.rollout.serve import _end_with_parent, place, serve_command, serve_environment
from alignkit.runs.lock import SERVERS, sockets

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Server(Sampling):
    """vLLM servers, the requests of a step shared out among them."""

    name: str = "server"
    urls: list[str] = field(default_factory=list)  # of servers that run already, as http://host:8000; []: start some
    servers: int = num(1, ge=1)  # how many to start on this machine, where urls is empty
    async_steps: int = num(0, ge=0, le=1)  # 1: generate the next batch while this one trains; see importance
    api_key_env: str = "ALIGNKIT_SERVER_KEY"  # the environment variable with the key of the servers in urls
    request_timeout_s: float = num(300.0, gt=0)  # of one response
    retries: int = num(2, ge=0)  # of one request, on another server where there is one
    restarts: int = num(3, ge=0)  # how often servers that end are started again, in all, before the run stops
    start_timeout_s: float = num(600.0, gt=0)  # until a started server is healthy
    kv_cache_gib: float = num(1.0, gt=0)  # key-value cache of the CPU build
    gpu_memory_utilization: float = num(0.9, gt=0, le=1)  # share of the device that a started server may take
    enforce_eager: bool = True  # no CUDA graphs: starts faster, decodes slower on a GPU

    @property
    def adapters_only(self) -> bool:
        return True

    def check(self) -> None:
        super().check()
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise InputError(f"rollout.urls: {url!r} is no URL, expected http://host:port")

    def notes(self) -> list[str]:
        """What a person should know before it starts: who can read the key on its way."""
        open_ = [url for url in self.urls if re.match(r"http://(?!127\.|localhost\b|\[::1\])", url)]
        if not (open_ and os.environ.get(self.api_key_env)):
            return []
        return [
            f"rollout.urls={open_[0]}: the key in {self.api_key_env} goes there unencrypted: use https://, or a tunnel"
        ]

    def start(self, context: Context) -> ServerSampler:
        """Start the servers, or greet those given, and wait until all are healthy."""
        return ServerSampler(self, context)


@dataclass
class Replica:
    """One server: where it is and, if it was started here, its process and log."""

    url: str
    log: Path | None = None
    process: subprocess.Popen | None = None
    loaded: set[str] = field(default_factory=set)  # the adapters it can answer with
    place: tuple[str, int, list[str]] | None = None  # where it was started here, see `place`
    lost: bool = False  # it broke off an answer; its engine may be gone while it still listens

    @property
    def dead(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def holds(self, adapter: str | None) -> bool:
        """Whether it can be asked to answer with that adapter; None: with the bare base, which every server holds."""
        return not self.dead and not self.lost and (adapter is None or adapter in self.loaded)

    def last_words(self, lines: int = 12) -> str:
        """The end of its log."""
        if self.log is None or not self.log.is_file():
            return "(no log: it was not started here)"
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


class ServerSampler:
    """Servers and the threads that talk to them; see `Sampler`. Rank 0 starts them and sends the adapters."""

    def __init__(self, config: Server, context: Context) -> None:
        import httpx

        if (context.adapter_rank or 0) > LORA_RANKS[-1]:
            raise InputError(
                f"finetune.rank={context.adapter_rank}: vLLM takes adapters of rank {LORA_RANKS[-1]} at most"
            )
        self.sampling, self.context, self.version = config, context, 0
        self.adapter: str | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="sync-", dir=context.scratch)).absolute()
        self.key = os.environ.get(config.api_key_env, "") if config.urls else secrets.token_hex(16)
        self.key = context.shared(self.key)
        self.http = httpx.Client(
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {}, timeout=config.request_timeout_s
        )
        self.pool, self.lock, self.restarts = ThreadPoolExecutor(max_workers=64), threading.Lock(), 0
        if config.urls:
            self.replicas = [Replica(url.rstrip("/")) for url in config.urls]
        else:
            own = [self.launch(n) for n in range(config.servers)] if context.rank == 0 else []
            urls = context.shared([replica.url for replica in own])
            self.replicas = own or [Replica(url) for url in urls]
        for replica in self.replicas:
            self.wait(replica)
        self.closed = threading.Event()
        if context.rank == 0 and not config.urls:
            threading.Thread(target=self.watch, daemon=True).start()

    # ------------------------------------------------------------------------------------------------ processes

    def launch(self, number: int, where: tuple[str, int, list[str]] | None = None) -> Replica:
        """Start a server process in a group of its own; its output goes to logs/server_<n>.log.

        `where`: of the one before it that ended: the other ranks know that address.
        """
        where = where or place(number)
        host, port, prefix = where
        environment = serve_environment(self.sampling, self.key)
        if not prefix and self.context.scratch:  # by these what it leaves where it is killed is found
            folder = sockets(self.context.scratch)
            environment[SERVERS] = folder.name
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.stat().st_uid == os.getuid():
                environment["VLLM_RPC_BASE_PATH"] = str(folder)
        log = (self.context.scratch or self.folder) / "logs" / f"server_{number}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*prefix, *serve_command(self.sampling, self.context, host, port)], stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                start_new_session=True, preexec_fn=_end_with_parent, env=environment,
            )  # fmt: skip
        return Replica(f"http://{host}:{port}", log, process, place=where)

    def wait(self, replica: Replica) -> None:
        """Until the server says it is healthy.

        Raises:
            RunError: it ended, or start_timeout_s passed; with the last lines of its log.
        """
        deadline = time.monotonic() + self.sampling.start_timeout_s
        while not self.healthy(replica):
            if replica.dead or time.monotonic() > deadline:
                what = "ended" if replica.dead else f"was not healthy after {self.sampling.start_timeout_s:g} s"
                raise RunError(f"the rollout server {replica.url} {what}; the end of its log:\n{replica.last_words()}")
            time.sleep(0.5)

    def healthy(self, replica: Replica) -> bool:
        import httpx

        try:
            well = not replica.dead and self.http.get(f"{replica.url}/health", timeout=5).status_code == 200
            replica.lost = replica.lost and not well
            return well
        except httpx.HTTPError:
            return False

    def alive(self, adapter: str | None) -> list[Replica]:
        """The servers that hold this adapter.

        Raises:
            RunError: none is left; with the last lines of a log.
        """
        found = [r for r in self.replicas if r.holds(adapter)]
        if not found:
            raise RunError(
                f"no rollout server is left of {len(self.replicas)}; the end of a log:\n{self.replicas[0].last_words()}"
            )
        return found

    def revive(self) -> None:
        """Start servers that ended again, `restarts` times in all."""
        for number, replica in enumerate(self.replicas):
            if replica.process is not None and replica.dead and self.restarts < self.sampling.restarts:
                code, self.restarts = replica.process.returncode, self.restarts + 1
                self.context.note(f"rollout server {number} ended (code {code}): starting it again")
                with contextlib.suppress(ProcessLookupError):  # its engine, where it was killed alone
                    os.killpg(replica.process.pid, signal.SIGKILL)
                self.replicas[number] = self.launch(number, replica.place)

    def recover(self, adapter: str | None) -> None:
        """Where no server is left that holds `adapter` (None: the bare base, which all do): wait for one that is starting,
        and give it the adapter."""
        with self.lock:
            if any(r.holds(adapter) for r in self.replicas):
                return
            if self.context.rank != 0 and not self.sampling.urls:
                return self.wait_for_peer(adapter)
            deadline = time.monotonic() + self.sampling.start_timeout_s
            while time.monotonic() < deadline:
                self.revive()
                for replica in filter(self.healthy, self.replicas):
                    if adapter is None:
                        return
                    with contextlib.suppress(ServerFailure):  # it may go at this very moment
                        return self.load(replica, adapter, self.folder / f"version_{adapter.split('-')[1]}")
                if not any(r.process is not None and not r.dead for r in self.replicas):
                    return
                time.sleep(0.5)

    def wait_for_peer(self, adapter: str | None) -> None:
        """Until rank 0 has started a server again, where it was, and given it the adapter."""
        import httpx

        deadline = time.monotonic() + self.sampling.start_timeout_s
        while time.monotonic() < deadline:
            for replica in self.replicas:
                with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
                    models = self.http.get(f"{replica.url}/v1/models", timeout=5).json()["data"]
                    if (adapter or "base") in (held := {model["id"] for model in models}):
                        replica.loaded, replica.lost = held, False
                        return
            time.sleep(0.5)

    def watch(self) -> None:
        """Rank 0, beside its work: start again what ended; the other ranks may be all that ask for it at the moment."""
        while not self.closed.wait(1.0):
            if any(replica.dead for replica in self.replicas):
                self.recover(self.adapter)

    # ------------------------------------------------------------------------------------------------ contract

    def describe(self) -> str:
        return f"server: {len(self.replicas)} vLLM servers ({', '.join(r.url for r in self.replicas)}); a sync sends the adapter"

    @property
    def copies(self) -> int:
        """How many engines answer: the canary is sampled on each."""
        return len(self.alive(self.adapter))

    def sync_weights(self, payload: Payload, version: int) -> None:
        """Write the adapter to the shared folder and load it on every server, under a name that is never used again."""
        if version <= self.version:
            raise RunError(f"weights of version {version} pushed over version {self.version}: versions only grow")
        if payload.save_adapter is None:  # the base as it is
            self.adapter, self.version = None, version
            return
        folder = Path(self.context.shared(str(self.folder / f"version_{version}")))
        if self.context.rank == 0:
            try:
                payload.save_adapter(folder)
            except OSError as error:
                raise RunError(
                    f"sync: the adapter of version {version} cannot be written to {folder}: {error}"
                ) from error
        name = f"policy-{version}-{folder.parent.name}"
        if self.context.rank == 0:
            with self.lock:
                self.revive()
                for replica in self.replicas:
                    if self.healthy(replica):
                        self.load(replica, name, folder)
        shown = self.context.shared([replica.loaded for replica in self.replicas])
        for replica, loaded in zip(self.replicas, shown, strict=True):
            replica.loaded = loaded
        self.alive(name)
        self.adapter, self.version = name, version
        if self.context.rank == 0:
            shutil.rmtree(self.folder / f"version_{version - 2}", ignore_errors=True)

    def load(self, replica: Replica, name: str, folder: Path) -> None:
        """Give one server the adapter; of those before, only the last stays, for what is being generated with it."""
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": name in replica.loaded}
        self.post(replica, "/v1/load_lora_adapter", body)
        for old in replica.loaded - {self.adapter}:
            self.post(replica, "/v1/unload_lora_adapter", {"lora_name": old})
        replica.loaded = replica.loaded & {self.adapter} | {name}

    def post(self, replica: Replica, path: str, body: dict) -> Any:
        """The answer of one server.

        Raises:
            ServerFailure: it did not answer in time, or with another status than 200.
        """
        import httpx

        try:
            answer = self.http.post(replica.url + path, json=body)
        except httpx.HTTPError as error:
            gone = not isinstance(error, httpx.TimeoutException)
            raise ServerFailure(f"{replica.url}{path}: {type(error).__name__} {error}", gone) from None
        if answer.status_code != 200:
            said = f"{replica.url}{path}: status {answer.status_code}: {answer.text[:300]}"
            raise ServerFailure(said, gone=answer.status_code >= 500)
        return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text

    def generate(
        self, prompts: PromptBatch, group_size: int, seed: int, step: int, law: Sampling | None = None
    ) -> Rollouts:
        law = law or self.sampling
        slots = law.max_new_tokens
        rows = zip(prompts.prompt_ids, prompts.prompt_mask, strict=True)
        texts = [row[mask].tolist() for row, mask in rows for _ in range(group_size)]
        seeds = stream_seeds(prompts, group_size, seed, step)
        adapter, version = self.adapter, self.version  # a sync may come in between
        bodies = [
            {
                "model": adapter or "base", "prompt": ids, "max_tokens": slots, "temperature": law.temperature,
                "top_p": law.top_p, "top_k": law.top_k, "min_tokens": law.min_tokens, "seed": stream,
                "logprobs": 0, "return_token_ids": True, "ignore_eos": True,
                "stop_token_ids": self.context.stop_ids(law),
            }
            for ids, stream in zip(texts, seeds, strict=True)
        ]  # fmt: skip
        answers = list(self.pool.map(self.answer, range(len(bodies)), bodies))
        tokens = [answer["token_ids"] for answer in answers]
        logprobs = [answer["logprobs"]["token_logprobs"] for answer in answers]
        finished = [answer["finish_reason"] == "stop" for answer in answers]
        return pack_rollouts(prompts, group_size, tokens, logprobs, finished, self.context, version, slots)

    def answer(self, number: int, body: dict) -> dict:
        """One response, from the server whose turn it is; from another after a failure.

        Raises:
            RunError: it failed `retries` + 1 times, or no server is left.
        """
        failures: list[str] = []
        for attempt in range(self.sampling.retries + 1):
            adapter = None if body["model"] == "base" else body["model"]
            self.recover(adapter)
            servers = self.alive(adapter)
            replica = servers[(number + attempt) % len(servers)]
            try:
                return self.post(replica, "/v1/completions", body)["choices"][0]
            except ServerFailure as failure:
                failures.append(str(failure))
                if failure.gone:  # not asked again before it is healthy and has the adapter once more
                    replica.loaded, replica.lost = set(), True
                self.context.note(f"rollout request {number} failed, attempt {attempt + 1}: {failure}")
                time.sleep(0.5 * attempt)
        raise RunError(
            f"a rollout request failed {len(failures)} times, the last: {failures[-1]}; the end of a server's log:\n"
            f"{self.replicas[number % len(self.replicas)].last_words()}"
        )

    def remedies(self) -> list[tuple[str, Callable[[], None]]]:
        return []  # an adapter has a name of its own, and so have the cached keys and values made with it

    def use(self, roles: nn.Module) -> None:
        """Nothing to do: weights arrive by `sync_weights`."""

    def sleep(self) -> None:
        """Nothing: servers have devices of their own."""

    def wake(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """End the servers that were started here and remove the adapters' folder."""
        self.closed.set()
        for replica in self.replicas:
            if replica.process is not None and not replica.dead:
                os.killpg(replica.process.pid, signal.SIGTERM)
        for replica in self.replicas:
            if replica.process is not None:
                try:
                    replica.process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    os.killpg(replica.process.pid, signal.SIGKILL)
        self.pool.shutdown()
        self.http.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class ServerFailure(Exception):
    """A server did not answer a request as it should. `gone`: it refused or broke, rather than being slow."""

    def __init__(self, message: str, gone: bool) -> None:
        super().__init__(message)
        self.gone = gone
