"""What blobs cost: `python -m bench.blobs [MIB]`.

Small ones onto this disk, copies of small ones on a second node, and one large one fetched from
another process, both over libp2p on loopback. Both processes share this machine's cores.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import structlog
import trio

from meshd.blobs.fetch import Fetcher
from meshd.blobs.replicate import Replicator
from meshd.blobs.serve import BlobServer
from meshd.blobs.store import Store
from meshd.model import BlobRef, NodeId
from meshd.net.identity_key import KeyPair
from meshd.net.libp2p import Libp2pTransport
from meshd.net.rpc import StreamRpc

MIB = 1 << 20


class Unheard:
    def peer_up(self, peer: NodeId) -> None: ...
    def peer_down(self, peer: NodeId) -> None: ...


@asynccontextmanager
async def node(directory: Path) -> AsyncIterator[tuple[Libp2pTransport, Store, Fetcher, Replicator]]:
    transport = Libp2pTransport(
        KeyPair.generate(), ["/ip4/127.0.0.1/tcp/0"], gate=lambda _p, _m: True, book=lambda _p: (), events=Unheard()
    )
    rpc = StreamRpc(transport)
    store = await Store.open(directory)
    fetcher = Fetcher(transport, rpc, store, lambda _blob: ())
    BlobServer(transport, rpc, store, may_remove=lambda _p: False)
    replicator = Replicator(rpc, store, fetcher, lambda: sorted(transport.connected()))
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.serve)
        await nursery.start(rpc.serve)
        yield transport, store, fetcher, replicator
        nursery.cancel_scope.cancel()


async def serve(directory: Path, mib: int) -> None:
    """The other process: one large blob, and room for copies, until its stdin closes."""
    async with node(directory) as (transport, store, _fetcher, _replicator):
        writer = await store.create()
        for _ in range(mib):
            await writer.write(os.urandom(MIB))
        ref = await writer.commit()
        address = next(each for each in transport.addresses if "127.0.0.1" in each)
        print(transport.me, address, ref.hash, ref.size, flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)


async def each(label: str, work: Callable[[], Awaitable[object]], count: int) -> None:
    took: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        await work()
        took.append((time.perf_counter() - began) * 1000)
    took.sort()
    print(f"{label:<44} p50 {statistics.median(took):7.2f} ms   p99 {took[int(count * 0.99)]:7.2f} ms")


async def main(mib: int) -> None:
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        command = [sys.executable, "-m", "bench.blobs", "--serve", f"{scratch}/there", str(mib)]
        there = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
        assert there.stdin is not None and there.stdout is not None
        try:
            peer, address, blob, size = (await trio.to_thread.run_sync(there.stdout.readline)).split()
            async with node(Path(scratch, "here")) as (transport, store, fetcher, replicator):
                await transport.connect(NodeId(peer), [address], timeout_s=10)
                await measure(store, fetcher, replicator, BlobRef(blob, int(size)), NodeId(peer))
        finally:
            there.stdin.close()
            there.wait(30)


async def measure(store: Store, fetcher: Fetcher, replicator: Replicator, large: BlobRef, peer: NodeId) -> None:
    async def put(count: int, size: int) -> list[BlobRef]:
        return await store.put_many([os.urandom(size) for _ in range(count)])

    async def replicate(count: int, size: int) -> None:
        await replicator.ensure(await put(count, size), 2, timeout_s=30)

    await each("put 1 KiB, durable", partial(put, 1, 1024), 300)
    await each("put 16 x 1 KiB together", partial(put, 16, 1024), 50)
    await each("a call to the second node, for comparison", partial(fetcher.who_has, large.hash), 200)
    await each("put 1 KiB, durable on two nodes", partial(replicate, 1, 1024), 200)
    await each("put 16 x 1 KiB, durable on two nodes", partial(replicate, 16, 1024), 50)
    began, cpu = time.perf_counter(), time.process_time()
    await fetcher.fetch(large, hints=[peer], timeout_s=300)
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    mb = large.size / 1e6
    print(
        f"fetch {large.size / MIB:.0f} MiB over libp2p: {mb / took:.0f} MB/s; {cpu / mb * 1000:.1f} ms of CPU a MB here"
    )
    began = time.perf_counter()
    await store.export(large, store.directory.parent / "copy")
    print(f"export it, verified: {mb / (time.perf_counter() - began):.0f} MB/s")


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mib", type=int, nargs="?", default=256, help="of the large blob; %(default)s")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        trio.run(serve, options.serve, options.mib)
    else:
        trio.run(main, options.mib)
