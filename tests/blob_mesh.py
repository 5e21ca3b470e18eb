"""A few nodes with blobs, on the memory network, each with its own directory."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from meshd.blobs.fetch import Fetcher
from meshd.blobs.replicate import Replicator
from meshd.blobs.serve import BlobServer
from meshd.blobs.store import Store
from meshd.model import NodeId
from meshd.net.memory import MemoryNetwork, MemoryTransport
from meshd.net.rpc import StreamRpc


class Unheard:
    def peer_up(self, peer: NodeId) -> None: ...
    def peer_down(self, peer: NodeId) -> None: ...


@dataclass
class BlobNode:
    transport: MemoryTransport
    rpc: StreamRpc
    store: Store
    fetcher: Fetcher
    replicator: Replicator

    @property
    def me(self) -> NodeId:
        return self.transport.me


@dataclass
class BlobMesh:
    """`holders` is what gossip would say; `live` who it would call alive, other than oneself."""

    network: MemoryNetwork
    nursery: trio.Nursery
    directory: Path
    nodes: dict[NodeId, BlobNode] = field(default_factory=dict)
    holders: dict[str, list[NodeId]] = field(default_factory=dict)
    live: dict[NodeId, None] = field(default_factory=dict)

    async def add(self, name: str, *, serves_blobs: bool = True) -> BlobNode:
        me = NodeId(name)
        transport, rpc = await self.add_bare(name)
        store = await Store.open(self.directory / name)
        fetcher = Fetcher(transport, rpc, store, lambda blob: self.holders.get(blob, []))
        if serves_blobs:
            BlobServer(transport, rpc, store, may_remove=lambda peer: peer == "a")
        replicator = Replicator(rpc, store, fetcher, self._others(me))
        self.nodes[me] = BlobNode(transport, rpc, store, fetcher, replicator)
        self.live[me] = None
        for other in self.nodes:
            if other != me:
                await transport.connect(other, [f"/memory/{other}"], timeout_s=1)
        return self.nodes[me]

    async def add_bare(self, name: str) -> tuple[MemoryTransport, StreamRpc]:
        """A member that answers only what the test gives it to answer."""
        transport = self.network.transport(
            NodeId(name), lambda _peer, _protocol: True, lambda peer: [f"/memory/{peer}"], Unheard()
        )
        await self.nursery.start(lambda task_status: transport.serve(task_status=task_status))
        rpc = StreamRpc(transport)
        await self.nursery.start(lambda task_status: rpc.serve(task_status=task_status))
        return transport, rpc

    def _others(self, me: NodeId) -> Callable[[], Sequence[NodeId]]:
        return lambda: [node for node in self.live if node != me]


@asynccontextmanager
async def blob_mesh(directory: Path, *names: str) -> AsyncIterator[BlobMesh]:
    async with trio.open_nursery() as nursery:
        mesh = BlobMesh(MemoryNetwork(), nursery, directory)
        for name in names:
            await mesh.add(name)
        yield mesh
        nursery.cancel_scope.cancel()


def random_bytes(size: int) -> bytes:
    return os.urandom(size)
