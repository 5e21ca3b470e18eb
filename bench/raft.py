"""How fast the replicated log is: three servers as processes, their frames on loopback TCP, every commit synced.

    python bench/raft.py [--seconds S] [--directory DIR]

Prints the median of one command at a time, and commands a second with 256 in flight, at the leader and at a
follower; the read barrier; then what three idle servers cost. The streams are plain TCP: what libp2p adds is
measured with the whole agent.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trio

from meshd import codec
from meshd.errors import MeshError, Unavailable
from meshd.model import NodeId
from meshd.ports import Committed, Stream, StreamHandler
from meshd.raft.commands import Batch
from meshd.raft.log import ServerLog

ROLES = ("leader", "follower")
COMMAND = codec.encode(b"x" * 100)


class Machine:
    """Answers with the number of the command."""

    def __init__(self) -> None:
        self.wall_ms = 0
        self.commands = 0

    def apply(self, index: int, batch: bytes) -> list[bytes]:
        entry = codec.decode(batch, Batch)
        self.wall_ms = entry.wall_ms
        answers = []
        for _ in entry.commands:
            self.commands += 1
            answers.append(codec.encode(self.commands))
        return answers

    def capture(self) -> Callable[[], bytes]:
        state = (self.commands, self.wall_ms)
        return lambda: codec.encode(state)

    def unpack(self, data: bytes) -> Callable[[], None]:
        commands, wall_ms = codec.decode(data, tuple[int, int])
        return lambda: self.__dict__.update(commands=commands, wall_ms=wall_ms)

    def next_timer_ms(self) -> int | None:
        return None


@contextmanager
def _lost(peer: NodeId) -> Iterator[None]:
    try:
        yield
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise Unavailable(f"{peer} is gone") from error


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

    async def close_write(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


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
                stream = await trio.open_tcp_stream("127.0.0.1", self._ports[peer])
                break
            except OSError:
                await trio.sleep(0.05)
        await stream.send_all(self.me.encode())
        return TcpStream(stream, peer)

    async def serve(self, *, task_status: trio.TaskStatus[object]) -> None:
        async def answer(stream: trio.SocketStream) -> None:
            peer = NodeId(bytes(await stream.receive_some(1)).decode())
            await self._handled.wait()  # it listens before its log is there
            with suppress(MeshError):
                await self._handler(TcpStream(stream, peer))

        await trio.serve_tcp(answer, self._ports[self.me], host="127.0.0.1", task_status=task_status)

    async def connect(self, peer: NodeId, addresses: object, *, timeout_s: float) -> None: ...
    async def drop(self, peer: NodeId) -> None: ...
    def connected(self) -> frozenset[NodeId]:
        return frozenset()


async def one_at_a_time(do: Callable[[], object], seconds: float) -> list[float]:
    took, until = [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        await do()  # type: ignore[misc]
        took.append((time.perf_counter() - began) * 1000)
    return took


async def in_flight(log: ServerLog, me: NodeId, width: int, seconds: float) -> float:
    done, until = 0, time.perf_counter() + seconds

    async def worker() -> None:
        nonlocal done
        while time.perf_counter() < until:
            result = await log.propose(me, COMMAND, timeout_s=10)
            assert isinstance(result, Committed), result
            done += 1

    async with trio.open_nursery() as nursery:
        for _ in range(width):
            nursery.start_soon(worker)
    return done / seconds


async def serve(me: NodeId, ports: dict[NodeId, int], directory: Path, seconds: float, pipe: object) -> None:
    transport = TcpTransport(me, ports)
    log = ServerLog(
        directory=directory / me,
        mesh="bench",
        me=me,
        machine=Machine(),
        transport=transport,
        servers=lambda: list(ports),
        founding=me == min(ports),
        on_applied=lambda index: None,
        on_leadership=lambda leads: None,
    )

    async def order(*what: object) -> object:
        pipe.send(what)  # type: ignore[attr-defined]
        return await trio.to_thread.run_sync(pipe.recv, abandon_on_cancel=True)  # type: ignore[attr-defined]

    async with trio.open_nursery() as nursery:
        await nursery.start(transport.serve)
        await nursery.start(log.serve)
        began = time.perf_counter()
        while len(log.voters) < 3 or log.leader is None:  # noqa: ASYNC110 - the log tells nobody when it has formed
            await trio.sleep(0.005)
        role = "leader" if log.leader == me else "follower"
        answer = await order("formed", role, time.perf_counter() - began)
        while answer != "stop":
            match answer:
                case "one":
                    figure: object = await one_at_a_time(lambda: log.propose(me, COMMAND, timeout_s=10), seconds)
                case "barrier":
                    figure = await one_at_a_time(lambda: log.barrier(timeout_s=10), seconds)
                case "many":
                    figure = await in_flight(log, me, 256, seconds)
                case _:
                    before = resource.getrusage(resource.RUSAGE_SELF)
                    await trio.sleep(seconds * 2)
                    after = resource.getrusage(resource.RUSAGE_SELF)
                    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                    figure = used / (seconds * 2) * 100
            answer = await order("figure", role, figure)
        nursery.cancel_scope.cancel()


def server(me: NodeId, ports: dict[NodeId, int], directory: Path, seconds: float, pipe: object) -> None:
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    trio.run(serve, me, ports, directory, seconds, pipe)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure")
    parser.add_argument("--directory", type=Path, help="where the journals lie; a temporary one otherwise")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(dir=options.directory, prefix="raft-bench-"))
    ports = {NodeId(name): free_port() for name in "abc"}
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for me in ports:
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=server, args=(me, ports, directory, options.seconds, theirs)))
            processes[-1].start()
            theirs.close()  # so that the death of a server is an EOFError here
            pipes.append(ours)
        by_role: dict[str, object] = {}
        rows: dict[str, object] = {}
        for pipe in pipes:
            _, role, formed_s = pipe.recv()
            by_role.setdefault(role, pipe)
            rows["three voters after, s"] = round(max(formed_s, float(rows.get("three voters after, s", 0))), 2)  # type: ignore[arg-type]
        for name, what in (("one at a time", "one"), ("read barrier", "barrier"), ("256 in flight", "many")):
            for role in ROLES:
                pipe = by_role[role]
                pipe.send(what)  # type: ignore[attr-defined]
                _, _, figure = pipe.recv()  # type: ignore[attr-defined]
                if isinstance(figure, list):
                    rows[f"{name}, {role}: p50 ms"] = round(statistics.median(figure), 2)
                    rows[f"{name}, {role}: p99 ms"] = round(statistics.quantiles(figure, n=100)[98], 2)
                else:
                    rows[f"{name}, {role}: commands/s"] = round(figure)
        for pipe in pipes:
            pipe.send("idle")
        rows["idle, all three: % of a core"] = round(sum(pipe.recv()[2] for pipe in pipes), 2)
        for pipe in pipes:
            pipe.send("stop")
        print(
            json.dumps(rows) if options.json else "\n".join(f"{name:<36}{figure:>10}" for name, figure in rows.items())
        )
    finally:
        for process in processes:
            process.join(5)
            process.kill()
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
