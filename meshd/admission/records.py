"""What a node writes down of itself while it runs: each is on its disk before anybody rests on it."""

from __future__ import annotations

import trio
from msgspec.structs import replace

from meshd.admission.home import Counters, Home, MeshFile
from meshd.model import Certificate, KeyLink


class Records:
    def __init__(self, home: Home, mesh_file: MeshFile) -> None:
        self._home = home
        self.mesh_file = mesh_file
        self.counters = Counters()
        self._saving = trio.Lock()

    async def count_start(self) -> None:
        counters = self._home.counters()
        self.counters = replace(counters, starts=counters.starts + 1)
        await trio.to_thread.run_sync(self._home.write_counters, self.counters)

    async def save_epoch(self, epoch: int) -> None:
        async with self._saving:  # two threads may end in any order
            if epoch > self.counters.epoch:
                counters = replace(self.counters, epoch=epoch)
                await trio.to_thread.run_sync(self._home.write_counters, counters)
                self.counters = counters

    async def keep_certificate(self, certificate: Certificate, links: tuple[KeyLink, ...]) -> None:
        """With the keys that it is by: the next start has to know them."""
        self.mesh_file = replace(self.mesh_file, certificate=certificate, key_links=links)
        await trio.to_thread.run_sync(self._home.write_mesh, self.mesh_file)

    async def keep_journal(self) -> None:
        """There is one from now: without it this identity starts no more."""
        if not self.mesh_file.has_journal:
            self.mesh_file = replace(self.mesh_file, has_journal=True)
            await trio.to_thread.run_sync(self._home.write_mesh, self.mesh_file)

    def keep_refusal(self, why: str) -> None:
        """Blocks. A server's start counter rises with each start: tried often enough, an older copy would pass for the newest."""
        self._home.write_mesh(replace(self.mesh_file, refused=why))
