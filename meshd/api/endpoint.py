"""One row for each thing the API can do: the routes, the rights and the OpenAPI document all come from these rows."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from meshd.api.face import Face
from meshd.errors import InvalidRequest, TooLarge
from meshd.ids import is_job_id
from meshd.model import JobId
from meshd.views import GetJob, JobView

T = TypeVar("T")

PROPOSE_S = 20.0
"""For a command: a leader that died is replaced and asked again within this."""
QUERY_S = 10.0
BODY_BYTES_MAX = 64 << 10
"""Of a request's JSON, where an endpoint does not say otherwise."""


class Rights(IntEnum):
    """Whoever may more may also less."""

    ANYONE = 0
    VIEWER = 1
    OPERATOR = 2
    ADMIN = 3


@dataclass(frozen=True, slots=True)
class Caller:
    name: str
    rights: Rights


class ReadQuery(msgspec.Struct, forbid_unknown_fields=True):
    """What every read of the queue takes."""

    stale: Annotated[bool, msgspec.Meta(description="Whatever a node knows at once, also without a majority of the voters")] = False  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """A request, checked as far as any handler would."""

    face: Face
    request: Request
    caller: Caller

    def path(self, name: str) -> str:
        return str(self.request.path_params[name])

    def query(self, kind: type[T]) -> T:
        """The query string as this struct. Raises InvalidRequest."""
        return _convert(dict(self.request.query_params), kind, "query")

    async def body(self, kind: type[T], *, bytes_max: int = BODY_BYTES_MAX) -> T:
        """The JSON body as this struct. Raises InvalidRequest; TooLarge by the header, before a byte of it is read."""
        data = await self.read_body(bytes_max)
        try:
            return msgspec.json.decode(data or b"{}", type=kind)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise InvalidRequest(f"request body: {error}") from error

    async def read_body(self, bytes_max: int) -> bytes:
        announced = self.request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > bytes_max:
            raise TooLarge(
                f"request of {announced} bytes is over the limit of {bytes_max}",
                hint="large things go into blobs: `mesh blob put`, or --each-line FILE for a long list",
            )
        parts: list[bytes] = []
        size = 0
        try:
            async for chunk in self.request.stream():
                size += len(chunk)
                if size > bytes_max:
                    raise TooLarge(f"request is over the limit of {bytes_max} bytes")
                parts.append(chunk)
        except ClientDisconnect as error:
            raise InvalidRequest("the request ended before its body did") from error
        return b"".join(parts)

    async def job(self, *, is_stale_ok: bool = False) -> JobView:
        """The job that the path names by id, unique prefix, name or `last`. Raises NotFound, Conflict."""
        selector = self.path("job")
        if len(selector) > 256:
            raise InvalidRequest("a selector of over 256 characters")
        return await self.face.query(GetJob(selector), JobView, timeout_s=QUERY_S, is_stale_ok=is_stale_ok)

    async def job_id(self, *, is_stale_ok: bool = False) -> JobId:
        """As `job`. A whole id is taken as it is, without a look at the queue: what is asked next says NotFound."""
        selector = self.path("job")
        return JobId(selector) if is_job_id(selector) else (await self.job(is_stale_ok=is_stale_ok)).id

    def task(self) -> int:
        text = self.path("task")
        if not text.isdecimal() or len(text) > 8:
            raise InvalidRequest(f"{text[:40]!r} is not the number of a task")
        return int(text)


Handler = Callable[[Call], Awaitable[object]]
"""Answers a view (sent as JSON), or an ASGI response."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    method: str
    path: str
    handler: Handler
    summary: str
    rights: Rights
    answer: Any = None
    """The view that is answered, or the media type of a stream."""
    query: type[msgspec.Struct] | None = None
    body: Any = None
    """The struct that is expected as JSON, or the media type of a stream."""
    status: int = 200
    event: type[msgspec.Struct] | None = None
    """What each server-sent event carries as JSON."""


def encode_answer(answer: object) -> bytes:
    return msgspec.json.encode(answer)


def _convert(value: object, kind: type[T], what: str) -> T:
    try:
        return msgspec.convert(value, kind, strict=False)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise InvalidRequest(f"{what}: {error}") from error
