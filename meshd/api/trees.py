"""Directories over HTTP travel as tar: any language and any shell can make one and take one.

A tar is untrusted input. It is read by the standard library in a thread, one member at a time and no header larger than
a path needs; only plain files are taken, and their paths are held to the rules of job inputs.
"""

from __future__ import annotations

import tarfile
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import IO, Annotated, cast

import trio
from msgspec import Meta, Struct
from starlette.requests import ClientDisconnect

from meshd.api.endpoint import Call, Endpoint, Rights, encode_answer
from meshd.api.face import Face
from meshd.api.references import TREE_BYTES_MAX, TREE_FILES_MAX, describe_tree, size_of, store_tree
from meshd.api.streams import ByteStream
from meshd.errors import Busy, InvalidRequest, MeshError, TooLarge
from meshd.model import INLINE_BYTES_MAX, BlobRef, Content, Inline, Tree, TreeEntry, TreeRef
from meshd.spec import check_path

PIECE_BYTES = 1 << 20
BATCH_BYTES = 1 << 20
BATCH_FILES = 128
"""Small files of one upload that are stored, synced and copied to other nodes together: one by one, each would cost a
sync on two disks and a round trip."""
BATCHES_AT_ONCE = 4
INLINED_BYTES_MAX = 8 << 20
"""Of small files that stand in the list itself; further ones are blobs, so that the list stays one that can be read."""
SHOWN_AT_ONCE = 500
HEADERS_BYTES_MAX = 8 << 10
"""Of what stands before one file in a tar: a path of 4 KiB, and twice its own block. `tarfile` needs time and memory that
grow with the square of it: 70 ms and 16 MiB for these."""
PADDING_BYTES_MAX = 1 << 20
"""Of zeros after the end of a tar: `tar` fills a record, 10 KiB unless told otherwise."""
TAR = "application/x-tar"

UPLOADS_AT_ONCE = 8
"""Each may hold two threads and some 10 MiB for as long as its line is slow."""
PLACE_S = 20.0
"""For one of these places; then the client does better to ask another node."""

_PLACES = trio.CapacityLimiter(UPLOADS_AT_ONCE)


class TreeQuery(Struct, forbid_unknown_fields=True):
    replicas: Annotated[int, Meta(ge=1, le=16)] = 2


async def put_tree(call: Call) -> TreeRef:
    """Store every file of the tar, then the tree that lists them."""
    replicas = call.query(TreeQuery).replicas
    upload = _Upload(call, replicas)
    entries = await upload.run()
    return await store_tree(call.face, entries, replicas=replicas)


async def show_tree(call: Call) -> ByteStream:
    """As JSON, in pieces: of a large tree the whole would hold the loop."""
    _, tree = await describe_tree(call.face, call.path("hash"))
    return ByteStream(_json_of(tree), "application/json")


async def get_tree(call: Call) -> ByteStream:
    """The directory as a tar."""
    _, tree = await describe_tree(call.face, call.path("hash"))
    return ByteStream(_tar_of(call.face, tree), TAR)


class _Upload:
    """One tar on its way in: the parser's thread pulls bytes from the request and hands over files."""

    def __init__(self, call: Call, replicas: int) -> None:
        self._face = call.face
        self._chunks = call.request.stream()
        self._replicas = replicas
        self._entries: dict[str, TreeEntry] = {}
        self._paths_bytes = 0
        self._inlined_bytes = 0
        self._failure: MeshError | None = None
        # Its own, for the parser and who reads a large file for it: those that the agent lives on may not wait for a line.
        self._threads = trio.CapacityLimiter(2)
        self._room = trio.Semaphore(BATCHES_AT_ONCE)
        self._batch: list[tuple[str, bytes, bool]] = []
        self._batch_bytes = 0

    async def run(self) -> list[TreeEntry]:
        try:
            with trio.fail_after(PLACE_S):
                await _PLACES.acquire()
        except trio.TooSlowError as error:
            raise Busy(
                f"this node is taking {UPLOADS_AT_ONCE} directories already", hint="ask another, or again"
            ) from error
        try:
            await self._take()
        finally:
            _PLACES.release()
        if self._failure is not None:
            raise self._failure
        return list(self._entries.values())

    async def _take(self) -> None:
        async with trio.open_nursery() as self._nursery:
            try:
                await trio.to_thread.run_sync(self._parse, limiter=self._threads)
                await self._put_batch_soon()
                await self._read_padding()
            except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
                self._fail(InvalidRequest(f"this is not a tar: {error}"))
            except ClientDisconnect:
                self._fail(InvalidRequest("the upload ended before the tar did"))
            except MeshError as error:
                self._fail(error)

    def _fail(self, error: MeshError) -> None:
        if self._failure is None:
            self._failure = error
        self._nursery.cancel_scope.cancel()

    # --- in the thread

    def _parse(self) -> None:
        for member, file in _files(_Tape(lambda: trio.from_thread.run(self._next_chunk))):
            path = check_path(member.name.removeprefix("./"), "path in the tar")
            if path in self._entries:
                raise InvalidRequest(f"the tar has {path[:200]!r} twice")
            if len(self._entries) >= TREE_FILES_MAX:
                raise TooLarge(f"a directory is limited to {TREE_FILES_MAX} files")
            self._paths_bytes += len(path.encode())
            if self._paths_bytes > TREE_BYTES_MAX:
                raise TooLarge(
                    f"the paths in the tar are over the limit of {TREE_BYTES_MAX} bytes for a directory's list"
                )
            is_executable = bool(member.mode & 0o100)
            if member.size <= INLINE_BYTES_MAX and self._inlined_bytes + member.size <= INLINED_BYTES_MAX:
                self._inlined_bytes += member.size
                self._entries[path] = TreeEntry(path, Inline(file.read()), is_executable)
            elif member.size <= PIECE_BYTES:
                self._entries[path] = TreeEntry(path, Inline(b""), is_executable)
                trio.from_thread.run(self._put_soon, path, file.read(), is_executable)
            else:
                ref = trio.from_thread.run(self._put_large, file)
                self._entries[path] = TreeEntry(path, ref, is_executable)

    # --- in the loop

    async def _next_chunk(self) -> bytes:
        return await anext(self._chunks, b"")

    async def _read_padding(self) -> None:
        """What is left unread costs the client its connection."""
        left = PADDING_BYTES_MAX
        while left > 0 and (chunk := await self._next_chunk()):
            left -= len(chunk)

    async def _put_soon(self, path: str, data: bytes, is_executable: bool) -> None:
        self._batch.append((path, data, is_executable))
        self._batch_bytes += len(data)
        if self._batch_bytes >= BATCH_BYTES or len(self._batch) >= BATCH_FILES:
            await self._put_batch_soon()

    async def _put_batch_soon(self) -> None:
        await self._room.acquire()
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        self._nursery.start_soon(self._put_batch, batch)

    async def _put_batch(self, batch: list[tuple[str, bytes, bool]]) -> None:
        try:
            refs = await self._face.put_many([data for _, data, _ in batch], replicas=self._replicas)
            for (path, _, is_executable), ref in zip(batch, refs, strict=True):
                self._entries[path] = TreeEntry(path, ref, is_executable)
        except MeshError as error:
            self._fail(error)
        finally:
            self._room.release()

    async def _put_large(self, file: IO[bytes]) -> BlobRef:
        # The parser's thread is waiting for this very call, so another one may read from the file meanwhile;
        # what that one asks of the request comes back through `read`.
        async def chunks() -> AsyncGenerator[bytes, None]:
            while data := await trio.to_thread.run_sync(file.read, PIECE_BYTES, limiter=self._threads):
                yield data

        async with aclosing(chunks()) as source:
            view = await self._face.put_blob(source, replicas=self._replicas)
        return BlobRef(view.hash, view.size)


class _Tape:
    """A tar as `tarfile` reads it: forward only. Headers it takes into memory as large as they say they are, and one
    before the other without end; so what it may read before it comes to a file has a bound."""

    def __init__(self, pull: Callable[[], bytes]) -> None:
        """`pull` waits for more bytes; none are the end."""
        self._pull = pull
        self._chunk = memoryview(b"")
        self._position = 0
        self._headers_bytes_left: int | None = None

    def bound_headers(self) -> None:
        self._headers_bytes_left = HEADERS_BYTES_MAX

    def begin_file(self) -> None:
        self._headers_bytes_left = None

    def read(self, size: int) -> bytes:
        if self._headers_bytes_left is not None:
            self._headers_bytes_left -= size
            if self._headers_bytes_left < 0:
                raise TooLarge(
                    f"a file in the tar has headers over the limit of {HEADERS_BYTES_MAX} bytes",
                    hint="leave extended attributes out: tar --no-xattrs",
                )
        parts: list[memoryview] = []
        while size > 0 and (part := self._take(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.StreamError("a file ends before it begins")
        while self._position < position and self._take(position - self._position):
            pass

    def _take(self, size: int) -> memoryview:
        if not self._chunk:
            self._chunk = memoryview(self._pull())
        part, self._chunk = self._chunk[:size], self._chunk[size:]
        self._position += len(part)
        return part


def _files(tape: _Tape) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """Raises InvalidRequest, TooLarge, and what tarfile raises for what is no tar: TarError, ValueError."""
    tape.bound_headers()
    with tarfile.TarFile(fileobj=cast("IO[bytes]", tape)) as tar:
        while (member := tar.next()) is not None:
            # A hole costs nothing to send, and its zeros are as many as the header says.
            if member.issparse() or not (member.isreg() or member.isdir()):
                raise InvalidRequest(f"{member.name[:200]!r} is neither a plain file nor a directory")
            if not member.isdir():
                tape.begin_file()
                file = tar.extractfile(member)
                assert file is not None
                yield member, file
            # Else tarfile keeps each of them to the end.
            tar.members.clear()  # type: ignore[attr-defined]
            tar.pax_headers = {}
            tape.bound_headers()


async def _json_of(tree: Tree) -> AsyncGenerator[bytes, None]:
    yield b'{"entries":['
    for start in range(0, len(tree.entries), SHOWN_AT_ONCE):
        entries = encode_answer(tree.entries[start : start + SHOWN_AT_ONCE])[1:-1]
        yield b"," + entries if start else entries
    yield b"]}"


async def _tar_of(face: Face, tree: Tree) -> AsyncGenerator[bytes, None]:
    for entry in tree.entries:
        head = tarfile.TarInfo(entry.path)
        head.size = size_of(entry)
        head.mode = 0o755 if entry.executable else 0o644
        yield head.tobuf(tarfile.PAX_FORMAT)
        async with aclosing(_content(face, entry.content)) as chunks:
            async for chunk in chunks:
                yield chunk
        if head.size % tarfile.BLOCKSIZE:
            yield bytes(tarfile.BLOCKSIZE - head.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


async def _content(face: Face, content: Content) -> AsyncGenerator[bytes, None]:
    if isinstance(content, Inline):
        yield content.data
        return
    async with aclosing(face.get_blob(content.hash)) as chunks:
        async for chunk in chunks:
            yield chunk


ENDPOINTS = (
    Endpoint(
        "POST", "/v1/trees", put_tree, "Store a directory, sent as a tar", Rights.OPERATOR, TreeRef, TreeQuery, TAR, 201
    ),
    Endpoint("GET", "/v1/trees/{hash}", show_tree, "What a directory contains", Rights.VIEWER, Tree),
    Endpoint("GET", "/v1/trees/{hash}/tar", get_tree, "A directory as a tar", Rights.VIEWER, TAR),
)
