"""What a task writes, read at any node: from the node that runs it while it runs, from its blob afterwards.

`attempt.log` answers with bytes from an offset, standing until there are some; it is asked only
while somebody follows, and reads what the job has written by then.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import suppress

import trio
from msgspec import Struct

from meshd import codec
from meshd.blobs.fetch import Fetcher
from meshd.errors import NotFound, Unavailable, UnknownOutcome
from meshd.model import BlobRef, Count, Inline, JobId, NodeId
from meshd.ports import BlobStore, Rpc
from meshd.raft.remote import MeshLog
from meshd.views import ListTasks, LogView, TaskPage, TaskView
from meshd.work.executor import Executor

PIECE_BYTES_MAX = 256 << 10
STAND_S = 5.0
LOOK_EVERY_S = 0.05
"""How often the file is looked at while a follower stands and nothing new is there."""
PAUSE_S = 0.2
QUERY_S = 10.0


class LogCall(Struct, frozen=True, array_like=True):
    fence: Count
    stream: str
    offset: Count
    stand_ms: Count


class LogPiece(Struct, frozen=True, array_like=True):
    data: bytes
    is_running: bool


class LogDesk:
    """Answers followers about the attempts that run here."""

    def __init__(self, executor: Executor, rpc: Rpc) -> None:
        self._executor = executor
        rpc.register("attempt.log", self._on_log)

    async def read(self, fence: int, stream: str, offset: int, stand_s: float) -> LogPiece:
        with trio.move_on_after(stand_s):
            while (data := await self._executor.read_output(fence, stream, offset, PIECE_BYTES_MAX)) is not None:
                if data:
                    return LogPiece(data, True)
                await trio.sleep(LOOK_EVERY_S)
            return LogPiece(b"", False)
        return LogPiece(b"", True)

    async def _on_log(self, peer: NodeId, body: bytes) -> bytes:
        call = codec.decode(body, LogCall)
        return codec.encode(await self.read(call.fence, call.stream, call.offset, min(call.stand_ms / 1000, STAND_S)))


class LogReader:
    """Follows a task over its attempts and nodes."""

    def __init__(self, me: NodeId, rpc: Rpc, desk: LogDesk, log: MeshLog, store: BlobStore, fetcher: Fetcher) -> None:
        self._me = me
        self._rpc = rpc
        self._desk = desk
        self._log = log
        self._store = store
        self._fetcher = fetcher

    async def follow(
        self, job: JobId, task: int, stream: str, *, offset: int, is_followed: bool, is_stale_ok: bool = False
    ) -> AsyncGenerator[LogView, None]:
        """From `offset` of its present attempt; with `is_followed` on until the task is final."""
        fence, at = 0, offset
        while True:
            view = await self._task(job, task, is_stale_ok=is_stale_ok)
            if view.fence != fence:
                at = offset if fence == 0 else 0
                fence = view.fence
            if view.outcome is not None and view.state.is_final:
                content = view.outcome.stdout if stream == "stdout" else view.outcome.stderr
                async for data in self._content(content, at):
                    yield LogView(fence, at, data)
                    at += len(data)
                return
            if view.node is not None:
                piece = await self._piece(view.node, fence, stream, at, STAND_S if is_followed else 0.1)
                while piece is not None and piece.data:
                    yield LogView(fence, at, piece.data)
                    at += len(piece.data)
                    piece = await self._piece(view.node, fence, stream, at, STAND_S if is_followed else 0.1)
            if not is_followed or view.state.is_final:
                return
            await trio.sleep(PAUSE_S)

    async def _task(self, job: JobId, task: int, *, is_stale_ok: bool) -> TaskView:
        query = ListTasks(job, start=task, stop=task + 1, limit=1)
        if (local := self._log.local) is not None:
            # What is final stays as it is: no need to ask whether this replica is the newest.
            with suppress(NotFound):
                seen: TaskPage = await local.answer(query, timeout_s=QUERY_S, is_stale_ok=True)
                if seen.tasks and seen.tasks[0].state.is_final:
                    return seen.tasks[0]
        page = await self._log.query(query, TaskPage, timeout_s=QUERY_S, is_stale_ok=is_stale_ok)
        if not page.tasks:
            raise NotFound(f"job {job} has no task {task}")
        return page.tasks[0]

    async def _piece(self, node: NodeId, fence: int, stream: str, at: int, stand_s: float) -> LogPiece | None:
        if node == self._me:
            return await self._desk.read(fence, stream, at, stand_s)
        call = codec.encode(LogCall(fence, stream, at, int(stand_s * 1000)))
        try:
            return codec.decode(await self._rpc.call(node, "attempt.log", call, timeout_s=stand_s + 3), LogPiece)
        except (Unavailable, UnknownOutcome):
            return None  # its node is slow or gone: the state will say what becomes of the task

    async def _content(self, content: BlobRef | Inline | None, at: int) -> AsyncGenerator[bytes, None]:
        match content:
            case Inline(data):
                if data[at:]:
                    yield data[at:]
            case BlobRef():
                await self._fetcher.fetch(content, timeout_s=60)
                while at < content.size:
                    data = await self._store.read(content.hash, at, PIECE_BYTES_MAX)
                    at += len(data)
                    yield data
