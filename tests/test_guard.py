"""Every path of a rollout server asks for the key."""

from __future__ import annotations

import asyncio

import pytest

from alignkit.rollout.base import Context
from alignkit.rollout.guard import KeyGuard
from alignkit.rollout.serve import serve_command
from alignkit.rollout.server import Server


async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})


def ask(path: str, key: bytes | None = None, kind: str = "http") -> list[dict]:
    sent: list[dict] = []

    async def send(event: dict) -> None:
        sent.append(event)

    headers = [] if key is None else [(b"authorization", key)]
    asyncio.run(KeyGuard(answer)({"type": kind, "path": path, "headers": headers}, None, send))
    return sent


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")


@pytest.mark.parametrize(
    "path", ["/invocations", "/tokenize", "/pause", "/v1/completions", "/metrics", "/health/../pause", "//health"]
)
def test_a_path_without_the_key_is_refused(path):
    for given in (None, b"Bearer ", b"Bearer secre", b"secret", b"Bearer secret "):
        assert ask(path, given)[0]["status"] == 401
    assert ask(path, b"Bearer secret")[0]["status"] == 200
    assert ask(path, None, "websocket") == [{"type": "websocket.close", "code": 1008}]


def test_health_answers_all_and_no_key_is_no_server(monkeypatch):
    assert ask("/health")[0]["status"] == 200
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(RuntimeError, match="VLLM_API_KEY is not set"):
        KeyGuard(answer)


def test_a_started_server_has_it():
    context = Context("model", "float32", 0, 64, 3, 1, 4, adapter_rank=8)
    command = serve_command(Server(), context, "127.0.0.1", 1)
    assert command[command.index("--middleware") + 1] == f"{KeyGuard.__module__}.{KeyGuard.__name__}"
