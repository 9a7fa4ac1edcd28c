"""What answers HTTP at the preview endpoint: the token, the routes, and who draws.

    POST /render    one picture (`RenderRequest`) as image/png
    GET  /adapters  what there is to draw with
    GET  /healthz   open to all; everything else asks for `Authorization: Bearer <token>`

Serve's own proxy stands before it and tells anyone at /-/healthz and /-/routes that it runs.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.types import ASGIApp, Receive, Scope, Send

from raylora.base.errors import UserError
from raylora.base.storage import open_storage
from raylora.gallery import Picture, catalogue, choose
from raylora.on_ray.replica import Refusal
from raylora.serving.library import Library
from raylora.serving.options import ServeOptions, read_request

_OPEN_PATH = "/healthz"
_MAX_BODY_BYTES = 64 * 1024


class Ingress:
    """Checks the token and the request, and hands it to a replica."""

    def __init__(self, replicas: Any, store: str, options: ServeOptions, digest: str) -> None:
        self._replicas = replicas
        self._library = Library(open_storage(store))
        self._options = options
        self._digest = digest
        self._last_seconds = 1.0

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve where the ingress runs, so nothing of the application is pickled."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.add_middleware(Guard, digest=self._digest)
        app.add_api_route(_OPEN_PATH, self.healthz, methods=["GET"])
        app.add_api_route("/adapters", self.adapters, methods=["GET"])
        app.add_api_route("/render", self.render, methods=["POST"])
        return app

    async def healthz(self) -> Response:
        """Says that the server answers, and nothing else."""
        return JSONResponse({"ok": True})

    async def adapters(self) -> Response:
        """Every complete checkpoint of every run."""
        try:
            return JSONResponse(await asyncio.to_thread(catalogue, self._library))
        except UserError as error:
            return _refused(Refusal.of(error))

    async def render(self, request: Request) -> Response:
        """Draw one picture."""
        try:
            body = await _body(request)
            if body is None:
                return _refused(Refusal(413, f"The body has more than {_MAX_BODY_BYTES} bytes."))
            asked = read_request(body)
            run, checkpoint = await asyncio.to_thread(choose, self._library, self._options, asked)
            drawn: Picture | Refusal = await self._replicas.render.remote(asked, run, checkpoint)
        except UserError as error:
            return _refused(Refusal.of(error))
        except (BackPressureError, DeploymentUnavailableError, RayActorError):
            seconds = str(max(1, math.ceil(self._last_seconds)))
            busy = Refusal(503, f"No replica is free; try again in {seconds} s.")
            return _refused(busy, {"Retry-After": seconds})
        if isinstance(drawn, Refusal):
            return _refused(drawn)
        self._last_seconds = drawn.seconds
        return _shown(drawn)


class Guard:
    """Lets only requests with the token through, whatever path they name."""

    def __init__(self, app: ASGIApp, digest: str) -> None:
        self._app = app
        self._digest = digest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "lifespan" and not self._allows(scope):
            refusal = Refusal(401, "This server needs the header Authorization: Bearer TOKEN.")
            await _refused(refusal, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        if scope["type"] == "http" and scope["path"] == _OPEN_PATH:
            return True
        words = [value for name, value in scope["headers"] if name == b"authorization"]
        kind, _, token = words[0].partition(b" ") if len(words) == 1 else (b"", b"", b"")
        right = hmac.compare_digest(token_digest(token), self._digest)
        return right and kind.lower() == b"bearer"


def token_digest(token: bytes) -> str:
    """What the cluster knows of the token; too little to make it from."""
    return hashlib.sha256(token).hexdigest()


def _shown(picture: Picture) -> Response:
    """The picture; its headers say what drew it."""
    headers = {
        "X-Raylora-Adapter": picture.hash,
        "X-Raylora-Checkpoint": picture.name,
        "X-Raylora-Seed": str(picture.seed),
    }
    return Response(picture.png, media_type="image/png", headers=headers)


def _refused(refusal: Refusal, headers: Mapping[str, str] | None = None) -> Response:
    """The sentence as JSON."""
    return JSONResponse({"detail": refusal.detail}, refusal.status, headers)


async def _body(request: Request) -> bytes | None:
    """The request's body; None when it is too long."""
    held = b""
    async for piece in request.stream():
        held += piece
        if len(held) > _MAX_BODY_BYTES:
            return None
    return held
