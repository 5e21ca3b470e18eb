"""One of the three servers that bench/raft.py measures: the real log on a real disk, its frames on TCP or on libp2p's streams.

Orders come as JSON lines on stdin, figures leave as JSON lines on stdout. The loads are closed loops inside this
process, so what asks and what is asked share the core: that is how an agent's API uses its log.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict
from hashlib import blake2b
from itertools import cycle
from pathlib import Path
from typing import Any

import structlog
import trio

from bench.turns import Steps, Turns
from meshd import codec, interpreter
from meshd.errors import MeshError, Unavailable
from meshd.model import NodeId
from meshd.net.identity_key import KeyPair
from meshd.net.libp2p import Libp2pTransport
from meshd.ports import Committed, Stream, StreamHandler, Transport
from meshd.raft.log import ServerLog
from meshd.raft.state.commands import Batch

ITEM_BYTES = 100
WARM_S = 0.3
POOL = 64
"""Different commands that are sent in turn."""
LOCALHOST = "127.0.0.1"


class Machine:
    """Unpacks each command's items and answers with how many there were so far."""

    def __init__(self) -> None:
        self.wall_ms = 0
        self.items = 0

    def apply(self, index: int, batch: bytes) -> list[bytes]:
        entry = codec.decode(batch, Batch)
        self.wall_ms = entry.wall_ms
        answers = []
        for command in entry.commands:
            self.items += len(codec.unpack(bytes(command.body)))
            answers.append(codec.encode(self.items))
        return answers

    def digest(self) -> str:
        return f"{self.items:032x}"

    def capture(self) -> Callable[[], bytes]:
        state = (self.items, self.wall_ms)
        return lambda: codec.encode(state)

    def unpack(self, data: bytes) -> Callable[[], None]:
        items, wall_ms = codec.decode(data, tuple[int, int])
        return lambda: self.__dict__.update(items=items, wall_ms=wall_ms)

    def next_timer_ms(self) -> int | None:
        return None


# --- what carries the frames -----------------------------------------------------------------------------------------


class TcpStream:
    def __init__(self, stream: trio.SocketStream, peer: NodeId) -> None:
        self._stream = stream
        self.peer = peer

    async def read(self, bytes_max: int) -> bytes:
        with _lost(self.peer):
            return bytes(await self._stream.receive_some(bytes_max))

    async def write(self, data: bytes) -> None:
        with _lost(self.peer):
            await self._stream.send_all(data)

    def write_now(self, data: bytes) -> bool:
        return False

    async def close_write(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


@contextmanager
def _lost(peer: NodeId) -> Iterator[None]:
    try:
        yield
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise Unavailable(f"{peer} is gone") from error


class TcpTransport:
    """The part of ports.Transport that the log uses; a caller says its name and is believed."""

    addresses = ()

    def __init__(self, me: NodeId, ports: dict[NodeId, int]) -> None:
        self.me = me
        self._ports = ports
        self._handler: StreamHandler
        self._handled = trio.Event()

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        self._handler = handler
        self._handled.set()

    async def open_stream(self, peer: NodeId, protocol: str, *, timeout_s: float) -> Stream:
        while True:
            try:
                stream = await trio.open_tcp_stream(LOCALHOST, self._ports[peer])
                break
            except OSError:
                await trio.sleep(0.05)
        await stream.send_all(bytes([len(self.me)]) + self.me.encode())
        return TcpStream(stream, peer)

    async def serve(self, *, task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED) -> None:
        async def answer(stream: trio.SocketStream) -> None:
            (length,) = await stream.receive_some(1)
            peer = NodeId(bytes(await stream.receive_some(length)).decode())
            await self._handled.wait()  # it listens before its log is there
            with suppress(MeshError):
                await self._handler(TcpStream(stream, peer))

        await trio.serve_tcp(answer, self._ports[self.me], host=LOCALHOST, task_status=task_status)

    async def connect(self, peer: NodeId, addresses: object, *, timeout_s: float) -> None: ...
    async def drop(self, peer: NodeId, *, age_s: float = 0.0) -> None: ...
    def connected(self) -> frozenset[NodeId]:
        return frozenset()


class Silent:
    def peer_up(self, peer: NodeId) -> None: ...
    def peer_down(self, peer: NodeId) -> None: ...


def key_of(name: str) -> KeyPair:
    """The same in every process of the bench."""
    return KeyPair.from_secret(blake2b(name.encode(), digest_size=32).digest())


def transport_of(carrier: str, name: str, ports: dict[str, int]) -> tuple[Any, dict[str, NodeId]]:
    """(the transport, node ids by name)."""
    if carrier == "tcp":
        return TcpTransport(NodeId(name), {NodeId(it): port for it, port in ports.items()}), {
            it: NodeId(it) for it in ports
        }
    nodes = {it: key_of(it).node_id for it in ports}
    book = {nodes[it]: [f"/ip4/{LOCALHOST}/tcp/{port}"] for it, port in ports.items()}
    me = key_of(name)
    return Libp2pTransport(me, book[me.node_id], gate=lambda *_: True, book=book.__getitem__, events=Silent()), nodes


# --- loads -----------------------------------------------------------------------------------------------------------


async def load(log: ServerLog, me: NodeId, width: int, items: int, seconds: float) -> dict[str, Any]:
    """`width` commands in flight, each of so many items."""
    pool = cycle([codec.pack([os.urandom(ITEM_BYTES // 2).hex() for _ in range(items)]) for _ in range(POOL)])

    async def propose() -> None:
        result = await log.propose(me, next(pool), timeout_s=10)
        assert isinstance(result, Committed), result

    return await closed_loop(propose, width, seconds)


async def closed_loop(do: Callable[[], Awaitable[object]], width: int, seconds: float) -> dict[str, Any]:
    took_ms: list[float] = []
    asked = 0
    counts_from = time.perf_counter() + WARM_S
    until = counts_from + seconds

    async def worker() -> None:
        nonlocal asked
        while (began := time.perf_counter()) < until:
            asked += 1
            await do()
            now = time.perf_counter()
            if counts_from <= now <= until:
                took_ms.append((now - began) * 1e3)

    before_s = time.thread_time()
    async with trio.open_nursery() as nursery:
        for _ in range(width):
            nursery.start_soon(worker)
    loop_s = time.thread_time() - before_s
    return {
        "took_ms": took_ms,
        "asked": asked,
        "commands_s": len(took_ms) / seconds,
        "loop_us": loop_s / asked * 1e6,
    }


async def idle(seconds: float) -> dict[str, Any]:
    before = resource.getrusage(resource.RUSAGE_SELF)
    await trio.sleep(seconds)
    after = resource.getrusage(resource.RUSAGE_SELF)
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"percent": used_s / seconds * 100}


# --- the process -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def running(config: dict[str, Any], turns: Turns) -> AsyncIterator[tuple[ServerLog, NodeId]]:
    transport, nodes = transport_of(config["carrier"], config["me"], config["ports"])
    me = nodes[config["me"]]
    log = ServerLog(
        directory=Path(config["directory"]),
        mesh="bench",
        me=me,
        machine=Machine(),
        transport=_as_port(transport),
        servers=lambda: list(nodes.values()),
        founding=config["me"] == min(config["ports"]),
        on_applied=lambda index: None,
        on_leadership=lambda leads: None,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.serve)
        await nursery.start(log.serve)
        nursery.start_soon(turns.pulse)
        while len(log.voters) < len(nodes) or log.leader is None:  # noqa: ASYNC110 - the log tells nobody when it has formed
            await trio.sleep(0.005)
        yield log, me
        nursery.cancel_scope.cancel()


def _as_port(transport: Any) -> Transport:
    return transport  # type: ignore[no-any-return]


async def serve(config: dict[str, Any], turns: Turns) -> None:
    async with running(config, turns) as (log, me):

        def say(figures: dict[str, Any]) -> None:
            role = "leader" if log.leader == me else "follower"
            print(json.dumps({"role": role, "term": log.term, **asdict(turns.taken()), **figures}), flush=True)

        say({})
        async for line in trio.wrap_file(sys.stdin):
            order = json.loads(line)
            match order["do"]:
                case "load":
                    before = turns.count
                    figures = await load(log, me, order["width"], order["items"], order["seconds"])
                    say({**figures, "turns": (turns.count - before) / figures.pop("asked")})
                case "barrier":
                    say(await closed_loop(lambda: log.barrier(timeout_s=10), 1, order["seconds"]))
                case "idle":
                    turns.is_pulsing = False
                    say(await idle(order["seconds"]))
                case "tell":
                    say({})
                case _:
                    return
            await trio.lowlevel.checkpoint()
            turns.taken()  # what telling took is not the log's


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    interpreter.prepare()  # as the agent does
    config = json.loads(sys.argv[1])
    turns = Steps() if os.environ.get("BENCH_STEPS") else Turns()
    if profile := os.environ.get("BENCH_PROFILE"):
        import cProfile

        profiler = cProfile.Profile()
        profiler.runcall(trio.run, serve, config, turns, instruments=[turns])
        profiler.dump_stats(f"{profile}.{config['me']}")
        return
    trio.run(serve, config, turns, instruments=[turns])


if __name__ == "__main__":
    main()
