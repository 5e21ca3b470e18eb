"""Blobs over HTTP: bytes in, their name out; the name in, the bytes out, from whichever node has them."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from msgspec import Meta, Struct
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from meshd.api.endpoint import Call, Endpoint, Rights
from meshd.api.streams import ByteStream
from meshd.errors import InvalidRequest, NotFound
from meshd.views import PAGE_MAX, BlobList, BlobView

BYTES = "application/octet-stream"
_HASH = re.compile(r"[0-9a-f]{64}")
PREFIX_CHARS_MIN = 6


class PutQuery(Struct, forbid_unknown_fields=True):
    replicas: Annotated[int, Meta(ge=1, le=16, description="On how many nodes it lies when this answers")] = 2


class BlobsQuery(Struct, forbid_unknown_fields=True):
    prefix: Annotated[str, Meta(max_length=64, description="With which their names begin")] = ""
    after: Annotated[str, Meta(max_length=64, description="The `next` of the page before")] = ""
    limit: Annotated[int, Meta(ge=1, le=PAGE_MAX)] = PAGE_MAX


async def put_blob(call: Call) -> BlobView:
    """Any size. Stored while it arrives; nothing stands if the upload breaks off."""
    replicas = call.query(PutQuery).replicas
    try:
        async with aclosing(_chunks(call)) as chunks:
            return await call.face.put_blob(chunks, replicas=replicas)
    except ClientDisconnect as error:
        raise InvalidRequest("the upload ended before its last byte") from error


async def get_blob(call: Call) -> ByteStream:
    blob = await _select(call)
    view = await call.face.blob_where(blob)
    return ByteStream(call.face.get_blob(blob), BYTES, size=view.size)


async def list_blobs(call: Call) -> BlobList:
    asked = call.query(BlobsQuery)
    return await call.face.list_blobs(prefix=asked.prefix, after=asked.after, limit=asked.limit)


async def where(call: Call) -> BlobView:
    return await call.face.blob_where(await _select(call))


async def remove(call: Call) -> Response:
    await call.face.remove_blob(await _select(call))
    return Response(status_code=204)


async def _select(call: Call) -> str:
    """A whole hash, or a prefix of it that is unique on this node's disk."""
    text = call.path("hash").removeprefix("blob:")
    if _HASH.fullmatch(text):
        return text
    if not re.fullmatch(rf"[0-9a-f]{{{PREFIX_CHARS_MIN},63}}", text):
        raise InvalidRequest(
            f"{text[:80]!r} is not the name of a blob",
            hint=f"it is 64 hexadecimal digits, or at least the first {PREFIX_CHARS_MIN} of them",
        )
    found = await call.face.list_blobs(prefix=text, after="", limit=1)
    if found.next is not None:
        raise InvalidRequest(f"several blobs begin with {text}", hint="give more of it")
    if found.blobs:
        return found.blobs[0].hash
    raise NotFound(f"no blob on this node begins with {text}", hint="give the whole name to look at other nodes, too")


async def _chunks(call: Call) -> AsyncGenerator[bytes, None]:
    async for chunk in call.request.stream():
        if chunk:
            yield chunk


ENDPOINTS = (
    Endpoint("PUT", "/v1/blobs", put_blob, "Store bytes", Rights.OPERATOR, BlobView, PutQuery, BYTES, 201),
    Endpoint("GET", "/v1/blobs", list_blobs, "Blobs on this node's disk", Rights.VIEWER, BlobList, BlobsQuery),
    Endpoint("GET", "/v1/blobs/{hash}", get_blob, "The bytes, verified", Rights.VIEWER, BYTES),
    Endpoint("GET", "/v1/blobs/{hash}/where", where, "Size, and which nodes have it", Rights.VIEWER, BlobView),
    Endpoint("DELETE", "/v1/blobs/{hash}", remove, "Remove it from all nodes", Rights.OPERATOR, None, status=204),
)
