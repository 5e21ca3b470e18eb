"""The API as an ASGI application: the rows of `Endpoint` with rights checked before, and errors made JSON after."""

from __future__ import annotations

import structlog
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from meshd.api import blobs, jobs, mesh, nodes, trees
from meshd.api.auth import Doorkeeper
from meshd.api.endpoint import Call, Caller, Endpoint, Rights, encode_answer
from meshd.api.face import Face
from meshd.api.openapi import make_document
from meshd.api.streams import error_body
from meshd.errors import MeshError, NotAllowed, NotFound

log = structlog.get_logger()

ENDPOINTS: tuple[Endpoint, ...] = (
    *jobs.ENDPOINTS,
    *blobs.ENDPOINTS,
    *trees.ENDPOINTS,
    *nodes.ENDPOINTS,
    *mesh.ENDPOINTS,
)


def create_app(face: Face) -> Starlette:
    document = encode_answer(make_document(ENDPOINTS, face.version))
    doorkeeper = Doorkeeper(face, trio.current_time)

    async def openapi(request: Request) -> Response:
        return _json(document, 200)

    routes = [Route("/openapi.json", openapi, methods=["GET"])]
    routes += [
        Route(endpoint.path, _Handler(face, doorkeeper, endpoint), methods=[endpoint.method]) for endpoint in ENDPOINTS
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _answer_http_error, Exception: _answer_bug})


class _Handler:
    """One endpoint as an ASGI application."""

    def __init__(self, face: Face, doorkeeper: Doorkeeper, endpoint: Endpoint) -> None:
        self._face = face
        self._doorkeeper = doorkeeper
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        try:
            caller = await self._identify(request)
            answer = await self._endpoint.handler(Call(self._face, request, caller))
            response = answer if callable(answer) else _json(encode_answer(answer), self._endpoint.status)
            await response(scope, receive, send)
        except MeshError as error:
            await _answer_error(error)(scope, receive, send)

    async def _identify(self, request: Request) -> Caller:
        needed = self._endpoint.rights
        local_user = request.scope["extensions"].get("meshd.user", "")
        if local_user:
            return Caller(local_user, Rights.ADMIN)
        if needed is Rights.ANYONE:
            return Caller("", Rights.ANYONE)
        address = request.client.host if request.client else "local"
        caller = await self._doorkeeper.identify(request.headers.get("authorization", ""), address)
        if caller.rights < needed:
            raise NotAllowed(
                f"token {caller.name!r} may not do this: it needs the role {needed.name.lower()}",
                hint=f"`mesh token create NAME --role {needed.name.lower()}`",
            )
        return caller


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """What the router itself refuses."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        return _json(
            encode_answer(error_body(MeshError(f"{request.url.path} does not take {request.method}"))),
            405,
            error.headers,
        )
    return _answer_error(NotFound(f"there is no {request.url.path[:200]}", hint="see /openapi.json"))


async def _answer_bug(request: Request, error: Exception) -> Response:
    return _answer_error(MeshError("the agent has a bug here", hint="its log says more; the request can be repeated"))


def _answer_error(error: MeshError) -> Response:
    headers = {"retry-after": "1"} if error.may_retry else None
    return _json(encode_answer(error_body(error)), error.http_status, headers)


def _json(data: bytes, status: int, headers: object = None) -> Response:
    extra = dict(headers) if isinstance(headers, dict) else {}
    return Response(data, status, {**extra, "content-type": "application/json"})
