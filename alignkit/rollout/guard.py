"""The door of a rollout server: every path asks for the key. Named to vLLM by `--middleware`, loaded in its process.

vLLM itself asks for the key on some paths only; others run a whole completion, or stop the engine, for whoever reaches
the port.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

OPEN = ("/health",)  # says nothing but that the server is up


class KeyGuard:
    """ASGI middleware: 401 without `Authorization: Bearer <VLLM_API_KEY>`; a websocket is closed."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        key = os.environ.get("VLLM_API_KEY", "")
        if not key:
            raise RuntimeError("VLLM_API_KEY is not set: a rollout server without a key would be open to all")
        self.app, self.wanted = app, f"Bearer {key}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket") or scope.get("path") in OPEN:
            return await self.app(scope, receive, send)
        given = dict(scope.get("headers") or ()).get(b"authorization", b"")
        if hmac.compare_digest(given, self.wanted):
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        said = b'{"error": "this server answers only who has its key"}'
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(said)).encode())]
        await send({"type": "http.response.start", "status": 401, "headers": head})
        await send({"type": "http.response.body", "body": said})
