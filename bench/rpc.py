"""Calls per second and their latency, and bulk bytes, between two real processes on this machine.

    python bench/rpc.py

Numbers are of one machine at one time; CPU per call and per GB are what to compare.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).parents[1]))

from meshd.model import NodeId
from meshd.net.identity_key import KeyPair
from meshd.net.libp2p import Libp2pTransport
from meshd.net.rpc import StreamRpc
from meshd.ports import Stream

CALLS = 5000
BULK_BYTES = 256 << 20


class Quiet:
    def peer_up(self, peer: NodeId) -> None: ...
    def peer_down(self, peer: NodeId) -> None: ...


async def start(nursery: trio.Nursery) -> tuple[Libp2pTransport, StreamRpc]:
    transport = Libp2pTransport(
        KeyPair.generate(), ["/ip4/127.0.0.1/tcp/0"], gate=lambda _p, _q: True, book=lambda _p: [], events=Quiet()
    )
    rpc = StreamRpc(transport)

    async def echo(_peer: NodeId, body: bytes) -> bytes:
        return body

    async def swallow(stream: Stream) -> None:
        size = 0
        while data := await stream.read(1 << 20):
            size += len(data)
        await stream.write(b"%d" % size)

    rpc.register("echo", echo)
    transport.handle("/bench/bulk", swallow)
    await nursery.start(transport.serve)
    await nursery.start(rpc.serve)
    return transport, rpc


async def answer() -> None:
    async with trio.open_nursery() as nursery:
        transport, _ = await start(nursery)
        print(transport.me, transport.addresses[0], flush=True)


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def measure(peer: NodeId, address: str) -> None:
    async with trio.open_nursery() as nursery:
        transport, rpc = await start(nursery)
        began_at = time.perf_counter()
        await transport.connect(peer, [address], timeout_s=5)
        print(f"connect: {(time.perf_counter() - began_at) * 1000:.1f} ms")
        await rpc.call(peer, "echo", b"", timeout_s=5)
        for in_flight in (1, 16, 64, 256):
            took_ms: list[float] = []

            async def ask(count: int, took_ms: list[float] = took_ms) -> None:
                for _ in range(count):
                    called_at = time.perf_counter()
                    await rpc.call(peer, "echo", b"x" * 100, timeout_s=30)
                    took_ms.append((time.perf_counter() - called_at) * 1000)

            calls = CALLS if in_flight > 1 else CALLS // 5
            cpu, began_at = cpu_s(), time.perf_counter()
            async with trio.open_nursery() as callers:
                for _ in range(in_flight):
                    callers.start_soon(ask, calls // in_flight)
            took_s = time.perf_counter() - began_at
            took_ms.sort()
            print(
                f"{in_flight:4} in flight: {len(took_ms) / took_s:7.0f} calls/s, p50 {statistics.median(took_ms):.2f} ms, "
                f"p99 {took_ms[int(len(took_ms) * 0.99)]:.1f} ms, {(cpu_s() - cpu) / len(took_ms) * 1000:.3f} ms CPU each"
            )
        cpu, began_at = cpu_s(), time.perf_counter()
        stream = await transport.open_stream(peer, "/bench/bulk", timeout_s=5)
        for _ in range(BULK_BYTES >> 20):
            await stream.write(bytes(1 << 20))
        await stream.close_write()
        assert int(await stream.read(100)) == BULK_BYTES
        took_s = time.perf_counter() - began_at
        print(f"bulk: {BULK_BYTES / took_s / 1e6:.0f} MB/s, {(cpu_s() - cpu) / BULK_BYTES * 1e9:.1f} s CPU per GB sent")
        print(f"resident: {resident_bytes() / 1e6:.0f} MB")
        nursery.cancel_scope.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().answer:
        trio.run(answer)
        return
    with subprocess.Popen([sys.executable, __file__, "--answer"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        peer, address = other.stdout.readline().split()
        try:
            trio.run(measure, NodeId(peer), address)
        finally:
            other.kill()


if __name__ == "__main__":
    main()
