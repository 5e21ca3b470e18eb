"""`meshd recover`: a mesh that has lost its quorum for good goes on from one server's data (protocol.md 10).

    read this disk ─▶ ask every server that it knows ─▶ judge ─▶ say what may be lost ─▶ a new epoch

The server itself is stopped; its directory is locked and its key is used to ask, so that others
know whom they answer. Its log is not touched before the operator has agreed.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import trio
from msgspec.structs import replace

from meshd import codec
from meshd.admission.certificates import Greeting
from meshd.admission.greetings import DOUBLE, Greetings
from meshd.admission.home import Home, KnownPeer, MeshFile
from meshd.directory import Directory
from meshd.errors import Conflict, MeshError, StartRefused
from meshd.model import Member, NodeId, Role
from meshd.net.identity_key import KeyPair, verify
from meshd.net.libp2p import Libp2pTransport
from meshd.net.rpc import StreamRpc
from meshd.raft.log import Newest
from meshd.raft.messages import VoterId, node_of
from meshd.raft.state.lineage import RANDOM_BYTES, name_of
from meshd.raft.storage.disk import DirectoryDisk, Disk
from meshd.raft.storage.recovery import Kept, begin_epoch, jobs_to_hold, read_kept
from meshd.raft.storage.rehearsal import Rehearsal
from meshd.recovery.allegiance import mesh_key
from meshd.recovery.epochs import EpochFile, Epochs, certify_epoch

ASK_S = 3.0
DOUBLE_S = 12.0
"""A peer notices within 10 s that the agent which was stopped here is gone; until then it takes this for its double."""
HELD_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Asked:
    """A server that was asked how far its log goes."""

    node: NodeId
    name: str
    newest: Newest | None
    why: str = ""
    """It did not answer."""


@dataclass(frozen=True, slots=True)
class Refusal:
    why: str
    hint: str


def judge(
    me: NodeId, newest: tuple[int, int], voters: Sequence[VoterId], asked: Sequence[Asked], *, is_damaged: bool
) -> Refusal | None:
    """Why the mesh should not be recovered from here; None where nobody else could go on or has more.

    `is_damaged`: this server's own vote does not count before others have mended its log.
    """
    answered = [(each, each.newest) for each in asked if each.newest is not None]
    seats = {node_of(voter) for voter in voters}
    present = seats & {*([] if is_damaged else [me]), *(each.node for each, _ in answered)}
    if leading := [each.name for each, theirs in answered if theirs.leads]:
        return Refusal(f"the mesh is alive: {leading[0]} leads it", hint="start this server: `meshd up`")
    if len(present) > len(seats) // 2:
        return Refusal(
            f"{len(present)} of {len(seats)} voters are there, which is a quorum",
            hint="start this server: `meshd up`; --force gives up what the others have, where they cannot go on",
        )
    ahead = [(theirs.term, theirs.index, each.name) for each, theirs in answered if theirs.end > newest]
    if ahead:
        their_term, their_index, name = max(ahead)
        return Refusal(
            f"{name} has more: its log ends at entry {their_index} of term {their_term}, "
            f"this one's at entry {newest[1]} of term {newest[0]}",
            hint=f"recover there: stop the agent of {name}, then `meshd recover` on it",
        )
    # By this log or by its own: either may be the older one.
    if voting := [each.name for each, theirs in answered if theirs.is_voter or each.node in seats]:
        return Refusal(
            f"another voter answers, and has no more than this one: {', '.join(voting)}",
            hint="stop it first, or discard it with --force: it then has to rejoin",
        )
    return None


class Recovery:
    """One run of the command. `home` is locked by this process."""

    def __init__(self, home: Home) -> None:
        """Blocks. Raises StartRefused."""
        mesh = home.mesh()
        if mesh is None:
            raise StartRefused(f"{home.path} belongs to no mesh", hint="found one with `meshd up`")
        if Role.SERVER not in mesh.certificate.roles:
            raise StartRefused(f"{home.path} is of a worker, which holds no log", hint="recover on a server")
        self._home = home
        self._mesh: MeshFile = mesh
        self._key = KeyPair.load_or_create(home.identity_key)
        self._sign = mesh_key(home)
        self._random = secrets.token_hex(RANDOM_BYTES)
        self._file = home.epochs()

    async def run(self, *, is_forced: bool, say: Callable[[str], None], is_agreed: Callable[[], bool]) -> None:
        """Raises Conflict where it should not be done here, StartRefused where it cannot be, Corrupt."""
        if not self._home.has_journal():
            raise StartRefused(f"{self._home.raft} holds no journal", hint="recover on another server")
        disk = await trio.to_thread.run_sync(DirectoryDisk, self._home.raft)
        try:
            await self._run(disk, is_forced, say, is_agreed)
        finally:
            disk.close()

    async def _run(
        self, disk: Disk, is_forced: bool, say: Callable[[str], None], is_agreed: Callable[[], bool]
    ) -> None:
        me = self._key.node_id
        kept = await trio.to_thread.run_sync(self._read, Rehearsal(disk))
        own = kept.machine.members().get(me)
        if own is None or not own.is_server:
            raise StartRefused(
                "by its own log this node is no server of the mesh (any more)", hint="recover on another server"
            )
        term, index = kept.newest
        lineage = kept.journal.header.lineage
        say(f"mesh {self._mesh.mesh}, recovery {name_of(lineage)}: this log ends at entry {index} of term {term}")
        public_key = bytes.fromhex(self._mesh.public_key)
        known = EpochFile(certify_epoch(self._sign, self._mesh.mesh, lineage), (self._file.own, *self._file.heard))
        epochs = Epochs(self._mesh.mesh, public_key, verify, known, on_news=lambda: None)
        asked = await self._ask_all(kept, epochs)
        for each in asked:
            end = each.newest
            told = f"no answer ({each.why})" if end is None else f"its log ends at entry {end.index} of term {end.term}"
            say(f"asked {each.name}: {told}")
        refusal = judge(me, kept.newest, kept.voters, asked, is_damaged=bool(kept.journal.doubt))
        if epochs.decide() is not None:
            refusal = Refusal(
                "the mesh was recovered already, without this server",
                hint="`meshd rejoin` lets it join the recovered mesh; --force makes a second one of it",
            )
        if refusal is not None:
            if not is_forced:
                raise Conflict(refusal.why, hint=refusal.hint)
            say(f"forced, although {refusal.why}")
        await trio.to_thread.run_sync(self._say_what_follows, kept, asked, say)
        if not is_agreed():
            raise Conflict("nothing was changed", hint="`meshd recover --yes` does not ask")
        await trio.to_thread.run_sync(self._begin, disk)
        say("recovered: start this server with `meshd up`, and on the discarded ones run `meshd rejoin` first")

    def _read(self, disk: Disk) -> Kept:
        return read_kept(disk, mesh=self._mesh.mesh, me=self._key.node_id, random=secrets.token_hex(16))

    def _say_what_follows(self, kept: Kept, asked: Sequence[Asked], say: Callable[[str], None]) -> None:
        me, now_ms = self._key.node_id, time.time_ns() // 1_000_000
        names = {each.node: each.name for each in asked}
        lineage = (*kept.journal.header.lineage, self._random)
        discarded = [names.get(node_of(voter), node_of(voter)) for voter in kept.voters if node_of(voter) != me]
        say(f"recovery {name_of(lineage)} would begin, with this server as the only voter:")
        if discarded:
            say(f"  discarded voters: {', '.join(discarded)}; their logs are never merged, they have to rejoin")
        say(
            "  may be lost: what was acknowledged after this log's end: submissions, results, members, tokens; "
            "tasks that ended since then may run again"
        )
        if kept.journal.doubt:
            say(f"  lost on this disk: {kept.journal.doubt}; the damaged files are kept beside as *.bad-N")
        held = list(jobs_to_hold(kept, me=me, random=self._random, wall_ms=now_ms))
        say(f"  held until `mesh job release`: what may not run twice (on_lost wait or fail), in all {len(held)}")
        for job in held[:HELD_SHOWN]:
            say(f"    {job.id} {job.name}".rstrip())

    def _begin(self, disk: Disk) -> None:
        """The journal first: a start after a power cut finds the epoch there, and signs it."""
        kept = self._read(disk)
        now_ms = time.time_ns() // 1_000_000
        if self._mesh.refused:
            # Cut short after this, the older copy that it is would be refused again by whoever remembers.
            self._home.write_mesh(replace(self._mesh, refused=""))
        lineage = begin_epoch(kept, me=self._key.node_id, random=self._random, wall_ms=now_ms)
        kept.journal.close()
        self._home.write_epochs(EpochFile(certify_epoch(self._sign, self._mesh.mesh, lineage)))

    # --- asking the others --------------------------------------------------------------------------------------------

    async def _ask_all(self, kept: Kept, epochs: Epochs) -> list[Asked]:
        """Every server that this directory or its log knows of, all at once."""
        counters = replace(self._home.counters(), starts=self._home.counters().starts + 1)
        await trio.to_thread.run_sync(self._home.write_counters, counters)
        directory = Directory(
            self._key.node_id,
            self._mesh.mesh,
            bytes.fromhex(self._mesh.public_key),
            verify,
            _known(self._home.peers(), kept.machine.members().values()),
            self._mesh.key_links,
        )
        start_random = secrets.token_bytes(16)
        greeting = Greeting(
            self._mesh.certificate, counters.starts, start_random, time.time_ns() // 1_000_000, self._mesh.name, (),
            "", "", epochs.own, directory.keys.shown(),
        )  # fmt: skip
        transport = Libp2pTransport(self._key, [], gate=directory.gate, book=directory.book, events=_Deaf())
        greetings = Greetings(
            directory=directory,
            greeting=lambda: greeting,
            hears=lambda peer: False,
            wall_ms=lambda: time.time_ns() // 1_000_000,
            meet_epoch=epochs.meet,
        )
        rpc = StreamRpc(transport, greeting=greetings.ours, admit=greetings.admit)
        gone = {self._key.node_id, *kept.machine.revoked()}
        servers = sorted({*directory.servers(), *kept.machine.server_ids()} - gone)
        found: list[Asked] = []

        async def ask(node: NodeId) -> None:
            name = directory.name(node) or node
            deadline = trio.current_time() + DOUBLE_S
            while True:
                try:
                    answer = await rpc.call(node, "log.newest", b"", timeout_s=ASK_S)
                    found.append(Asked(node, name, codec.decode(answer, Newest)))
                except Conflict as error:
                    if DOUBLE not in error.message:
                        found.append(Asked(node, name, None, error.message))
                    elif trio.current_time() < deadline:
                        await trio.sleep(1)
                        continue
                    else:
                        raise StartRefused(error.message, hint="stop the agent of this identity first") from error
                except MeshError as error:
                    found.append(Asked(node, name, None, error.message))
                return

        async with trio.open_nursery() as services:
            await services.start(transport.serve)
            await services.start(rpc.serve)
            async with trio.open_nursery() as asking:
                for node in servers:
                    asking.start_soon(ask, node)
            services.cancel_scope.cancel()
        return sorted(found, key=lambda each: each.node)


def _known(peers: Iterable[KnownPeer], members: Iterable[Member]) -> list[KnownPeer]:
    """Where others may be found: as this node last saw them, and as they told the log."""
    known = {member.node: KnownPeer(member.node, member.name, member.addresses) for member in members}
    for peer in peers:
        told = known[peer.node].addresses if peer.node in known else ()
        known[peer.node] = replace(peer, addresses=tuple(dict.fromkeys((*peer.addresses, *told))))
    return list(known.values())


class _Deaf:
    def peer_up(self, peer: NodeId) -> None: ...
    def peer_down(self, peer: NodeId) -> None: ...
