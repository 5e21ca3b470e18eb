"""Answers other nodes about the blobs on this disk.

Nothing is served that this process has not seen whole and right: what it wrote itself,
or what it has verified since it started.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence

import structlog

from meshd import codec
from meshd.blobs.messages import (
    CALL_BYTES_MAX,
    PAGE_MAX,
    PROTOCOL,
    SMALL_BYTES_MAX,
    Coming,
    Contents,
    ListFrom,
    Name,
    Names,
    Page,
    Presence,
    Refusal,
    Sizes,
    Want,
    Wire,
)
from meshd.blobs.store import Store
from meshd.errors import Busy, Corrupt, InvalidRequest, MeshError, NotAllowed, NotFound, Unavailable
from meshd.model import BlobRef, NodeId
from meshd.ports import Rpc, Stream, Transport

STREAMS_MAX = 32
"""Served at a time, each with up to 2 MiB in memory; more would only share the same line."""

STREAMS_PER_PEER_MAX = 12
"""One peer cannot take all of them; it fetches four blobs at a time for itself and four for others, and may have just lost four streams."""

IDLE_S = 60.0
"""A stream without a request for so long is closed; a fetcher may wait so long for ranges that others give."""


class BlobServer:
    """`may_remove` says whose word is enough to delete: job code may speak through a worker, so not everyone's."""

    def __init__(self, transport: Transport, rpc: Rpc, store: Store, *, may_remove: Callable[[NodeId], bool]) -> None:
        self._store = store
        self._may_remove = may_remove
        self._streams: Counter[NodeId] = Counter()
        self._log = structlog.get_logger()
        transport.handle(PROTOCOL, self._serve_stream)
        rpc.register("blob.get", self._get)
        rpc.register("blob.have", self._have)
        rpc.register("blob.list", self._list)
        rpc.register("blob.remove", self._remove)

    async def _serve_stream(self, stream: Stream) -> None:
        peer = stream.peer
        wire = Wire(stream, silence_s=IDLE_S)
        if self._streams.total() >= STREAMS_MAX or self._streams[peer] >= STREAMS_PER_PEER_MAX:
            await wire.send(Refusal(Busy.code, "as many blobs as may be served at a time are being served"))
            await stream.close_write()
            return
        self._streams[peer] += 1
        try:
            while (want := await wire.receive(Want)) is not None:
                try:
                    size, data = await self._range(want)
                except MeshError as error:
                    await wire.send(Refusal(error.code, error.message[:1024]))
                    await stream.close_write()
                    return
                await wire.send(Coming(size, len(data)), data)
            await stream.close_write()
        except Unavailable as error:
            self._log.debug("blob.stream_lost", peer=peer, error=error.message)
        finally:
            self._streams[peer] -= 1
            self._streams += Counter()  # drops the zeros

    async def _range(self, want: Want) -> tuple[int, bytes]:
        try:
            await self._store.verify(want.blob)
            data = await self._store.read(want.blob, want.offset, want.length)
        except Corrupt as error:
            self._log.error("blob.corrupt", blob=want.blob, error=error.message)
            raise NotFound(f"blob {want.blob} is not on this node any more") from error
        if not data:
            raise InvalidRequest(f"blob {want.blob} has nothing at {want.offset}")
        return self._store.size(want.blob), data

    async def _get(self, _peer: NodeId, body: bytes) -> bytes:
        names = codec.decode(body, Names).blobs
        wanted: list[BlobRef] = []
        room = CALL_BYTES_MAX
        for blob in names:
            if self._store.has(blob) and (size := self._store.size(blob)) <= min(SMALL_BYTES_MAX, room):
                wanted.append(BlobRef(hash=blob, size=size))
                room -= size
        datas = {ref.hash: data for ref, data in zip(wanted, await self._read_right(wanted), strict=True)}
        return codec.encode(Contents(tuple(datas.get(blob) for blob in names)))

    async def _read_right(self, refs: list[BlobRef]) -> list[bytes | None]:
        datas: list[bytes | None] = []
        try:
            datas += await self._store.get_many(refs, bytes_max=SMALL_BYTES_MAX)
        except MeshError:
            # One of them is bad or gone: find it, and give the others.
            for ref in refs:
                try:
                    datas.append(await self._store.get_bytes(ref, bytes_max=SMALL_BYTES_MAX))
                except MeshError as error:
                    self._log.error("blob.unreadable", blob=ref.hash, error=error.message)
                    datas.append(None)
        return datas

    async def _have(self, _peer: NodeId, body: bytes) -> bytes:
        names = codec.decode(body, Names).blobs
        return codec.encode(Sizes(tuple(self._store.size(blob) if self._store.has(blob) else None for blob in names)))

    async def _list(self, _peer: NodeId, body: bytes) -> bytes:
        return codec.encode(page_after(await self._store.list(), codec.decode(body, ListFrom).after))

    async def _remove(self, peer: NodeId, body: bytes) -> bytes:
        blob = codec.decode(body, Name).blob
        if not self._may_remove(peer):
            raise NotAllowed(f"{peer} may not remove blobs of other nodes", hint="ask a server to")
        was_here = await self._store.remove(blob)
        if was_here:
            self._log.info("blob.removed", blob=blob, by=peer)
        return codec.encode(Presence((was_here,)))


def page_after(blobs: Sequence[BlobRef], after: str) -> Page:
    """The page that follows the blob named `after` in a sorted list."""
    start = bisect_right(blobs, after, key=lambda ref: ref.hash)
    return Page(tuple(blobs[start : start + PAGE_MAX]), is_last=start + PAGE_MAX >= len(blobs))
