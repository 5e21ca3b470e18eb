"""The only file that knows every adapter: builds them, opens their nurseries, stops them in order.

    home, key ─▶ found | join | resume ─▶ transport ─▶ calls ─▶ log (servers) ─▶ gossip ─▶ blobs ─▶ backends ─▶ shell ─▶ API

Each stage serves in a nursery of its own, inside the one before: stopping runs the other way round,
so that the API answers nothing that could no longer be done, and attempts are stopped while the log
still takes their reports.
"""

from __future__ import annotations

import os
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import structlog
import trio
from msgspec.structs import replace

from meshd import codec, tls
from meshd.agent import Agent, AgentEvent, Tick
from meshd.allegiance import REJOIN_HINT, Allegiance, open_epochs
from meshd.api import server as api_server
from meshd.authority import Authority
from meshd.backends import registry
from meshd.backends.leftovers import take_over
from meshd.blobs.fetch import Fetcher
from meshd.blobs.replicate import Replicator
from meshd.blobs.serve import BlobServer
from meshd.blobs.store import Store
from meshd.config import Config, split_address
from meshd.directory import JOIN_PROTOCOL, Directory
from meshd.drain import Drain
from meshd.durable import replace_file
from meshd.epochs import EpochFile, Epochs
from meshd.errors import Busy, Conflict, MeshError, NotAllowed, StartRefused
from meshd.executor import Executor
from meshd.founding import JOIN_S, found_mesh, join_mesh
from meshd.gossip.membership import State
from meshd.gossip.service import GossipService
from meshd.greetings import Greetings, on_hello, say_hello
from meshd.history.archive import FETCH_S, Archive
from meshd.history.keeping import lags_behind
from meshd.home import Counters, Home, MeshFile
from meshd.introduction import Introduction, advertised, multiaddr
from meshd.invites import Invite
from meshd.join import JoinDesk, JoinRequest
from meshd.keeper import Applied, Keeper, PeerGone
from meshd.logs import LogDesk, LogReader
from meshd.model import BackendProbe, Certificate, NodeId, Offer, Role
from meshd.neighbours import LEADER_FACT, OFFER_FACT, Neighbours
from meshd.net.identity_key import KeyPair, verify
from meshd.net.libp2p import Libp2pTransport
from meshd.net.rpc import StreamRpc
from meshd.node import Node
from meshd.offer import make_offer, slots, zone
from meshd.ports import BackendSettings, ProposeResult
from meshd.quorum import describe_stop
from meshd.raft.log import ServerLog
from meshd.raft.messages import VoterId
from meshd.raft.remote import MeshLog
from meshd.raft.replica import Replica
from meshd.raft.settings import RaftSettings
from meshd.raft.state.commands import Event, Found, MembersChanged, RaiseFences, Restored, adds_work
from meshd.raft.state.lineage import since
from meshd.raft.state.machine import Machine
from meshd.raft.state.recovery import FENCES_LOST_MAX
from meshd.shell import Shell
from meshd.tally import Tally
from meshd.upkeep import Upkeep, find_member
from meshd.views import GetMembers, MembersView
from meshd.worker import HandOver, Offering, Recovered, Worker

FOLLOW_AFTER_S = 2.0
"""A worker that hears of a recovery listens so long for another one: between two it does not choose."""
STOP_S = 5.0
"""For handing back what runs, when the agent is asked to stop."""

VERSION = package_version("meshd")
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Started:
    """What a person wants to know once the agent is up."""

    me: NodeId
    name: str
    mesh: str
    is_founded: bool
    addresses: tuple[str, ...]
    api_port: int | None
    node: Node


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


def boot_id() -> str:
    """Of this start of the kernel; empty where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def boot_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


async def run(
    config: Config,
    *,
    invite: Invite | None = None,
    may_found: bool = True,
    settings: RaftSettings | None = None,
    stop: trio.Event,
    task_status: trio.TaskStatus[Started] = trio.TASK_STATUS_IGNORED,
) -> None:
    """An agent, until `stop` is set: then it leaves in order. Cancelling cuts it off, as kill -9 would. Raises StartRefused and other MeshErrors when it cannot start or must stop."""
    home = Home(config.home)
    try:
        key = KeyPair.load_or_create(home.identity_key)
        name = config.name or socket.gethostname()
        mesh_file = home.mesh()
        is_founded = False
        if mesh_file is None and invite is None:
            if not may_found:
                raise StartRefused(
                    f"{home.path} belongs to no mesh yet",
                    hint="found one with `meshd up`, or join: `meshd up --join INVITE`",
                )
            mesh_file = await trio.to_thread.run_sync(found_mesh, home, key, name, config.roles)
            is_founded = True
        elif mesh_file is None:
            assert invite is not None
            mesh_file = await _join(home, key, name, config, invite)
        elif invite is not None and invite.mesh != mesh_file.mesh:
            raise StartRefused(
                f"{home.path} belongs to mesh {mesh_file.mesh}, the invite is for {invite.mesh}",
                hint="join with another --data-dir",
            )
        if mesh_file.has_journal and not home.has_journal():
            raise StartRefused(
                f"this identity has lost its journal: {home.raft} is empty",
                hint="`meshd rejoin` lets it join again with a new one; or restore the directory",
            )
        if mesh_file.refused:
            raise StartRefused(mesh_file.refused, hint=REJOIN_HINT)
        epochs = await trio.to_thread.run_sync(open_epochs, home, mesh_file.mesh)
        daemon = _Daemon(
            config, home, key, mesh_file, epochs, settings or RaftSettings(disk_free_min=config.disk_free), stop
        )
        try:
            await daemon.run(is_founded, task_status)
        finally:
            if daemon.server_log is not None and (why := daemon.server_log.why_refused):
                # Its start counter rises with each start: tried often enough, an older copy would pass for the newest.
                home.write_mesh(replace(daemon.mesh_file, refused=why))
    finally:
        home.close()


async def _join(home: Home, key: KeyPair, name: str, config: Config, invite: Invite) -> MeshFile:
    """Through a transport that only dials; the one that listens starts afterwards, as a member's."""
    transport = Libp2pTransport(key, [], gate=lambda peer, protocol: False, book=lambda peer: (), events=_Deaf())
    request = JoinRequest(
        mesh=invite.mesh,
        secret=invite.secret,
        name=name,
        addresses=advertised(config),
        api_address=config.api,
        version=VERSION,
        wall_ms=wall_ms(),
        zone=zone(config),
    )
    async with _serving(transport.serve):
        return await join_mesh(home, key, invite, request, transport)


class _Deaf:
    def peer_up(self, peer: NodeId) -> None: ...
    def peer_down(self, peer: NodeId) -> None: ...


class _Daemon:
    """One running agent. Attributes are set as the stages are built; each is whole before the next begins."""

    def __init__(
        self,
        config: Config,
        home: Home,
        key: KeyPair,
        mesh_file: MeshFile,
        epochs: EpochFile,
        settings: RaftSettings,
        stop: trio.Event,
    ) -> None:
        self.config = config
        self.home = home
        self.key = key
        self.me = key.node_id
        self.mesh_file = mesh_file
        self.mesh = mesh_file.mesh
        self.public_key = bytes.fromhex(mesh_file.public_key)
        self.epochs = Epochs(self.mesh, self.public_key, verify, epochs, on_news=self._epoch_heard)
        self.is_settling = True
        self.settings = settings
        self.has_log = Role.SERVER in mesh_file.certificate.roles
        self.is_worker = Role.WORKER in mesh_file.certificate.roles
        self.counters = Counters()
        self.saving = trio.Lock()
        self.offer = Offer()
        self.is_draining = False
        self.work: trio.Nursery
        self.gossip: GossipService | None = None
        self.shell: Shell | None = None
        self.replica: Replica | None = None
        self.archive: Archive | None = None
        self.server_log: ServerLog | None = None
        self.stop = stop
        self.failure: MeshError | None = None
        """Why it stops, when nobody has asked it to."""

    async def run(self, is_founded: bool, task_status: trio.TaskStatus[Started]) -> None:
        counters = self.home.counters()
        self.counters = replace(counters, starts=counters.starts + 1)
        await trio.to_thread.run_sync(self.home.write_counters, self.counters)
        self.directory = Directory(
            self.me, self.mesh, self.public_key, verify, self.home.peers(), self.mesh_file.key_links
        )
        self.neighbours = Neighbours(self.me, self.directory, holds_log_alone=self._holds_log_alone)
        async with trio.open_nursery() as self.work:
            async with AsyncExitStack() as stages:
                task_status.started(await self._start(stages, is_founded))
                await self.stop.wait()
                with trio.move_on_after(STOP_S if self.failure is None else 0):
                    await self._hand_back()
            self.work.cancel_scope.cancel()
        if self.failure is not None:
            raise self.failure

    async def _start(self, stages: AsyncExitStack, is_founded: bool) -> Started:
        await self._start_net(stages)
        await self._start_log(stages, is_founded)
        await self._start_gossip(stages)
        await self._start_blobs(stages)
        await self._start_work(stages)
        api_port = await self._start_api(stages)
        await stages.enter_async_context(_serving(self.upkeep.serve))
        return Started(
            self.me, self.mesh_file.name, self.mesh, is_founded, self.introduction.addresses, api_port, self.node
        )

    # --- stages ------------------------------------------------------------------------------------------------------

    async def _start_net(self, stages: AsyncExitStack) -> None:
        host, port = split_address(self.config.listen)
        self.transport = Libp2pTransport(
            self.key,
            listen=[multiaddr(f"{host}:{port}")],
            gate=self.directory.gate,
            book=self.directory.book,
            events=self,
        )
        self.introduction = Introduction(
            me=self.me,
            config=self.config,
            version=VERSION,
            start=self.counters.starts,
            mesh_file=lambda: self.mesh_file,
            epoch=lambda: self.epochs.own,
            keys=self.directory.keys,
            listening=lambda: self.transport.addresses,
            wall_ms=wall_ms,
        )
        self.greetings = Greetings(
            directory=self.directory,
            greeting=self.introduction.greeting,
            hears=lambda peer: self.rpc.hears(peer),
            wall_ms=wall_ms,
            meet_epoch=self.epochs.meet,
        )
        self.rpc = StreamRpc(self.transport, greeting=self.greetings.ours, admit=self.greetings.admit)
        self.rpc.register("mesh.hello", on_hello)
        await stages.enter_async_context(_serving(self.transport.serve))
        await stages.enter_async_context(_serving(self.rpc.serve))
        self.allegiance = Allegiance(self.home, self.epochs, holds_log=self._holds_log)
        await say_hello(self.rpc, self.directory.members)
        await self.allegiance.settle()
        self.is_settling = False

    async def _start_log(self, stages: AsyncExitStack, is_founded: bool) -> None:
        if self.has_log:
            machine = Machine()
            is_founding = self.mesh_file.is_founder and not self.mesh_file.has_journal and not self.home.has_journal()
            self.server_log = ServerLog(
                directory=self.home.raft,
                mesh=self.mesh,
                me=self.me,
                machine=machine,
                transport=self.transport,
                servers=machine.server_ids,
                draining=lambda: [node for node in machine.server_ids() if machine.is_draining(node)],
                zones=machine.zones,
                founding=is_founding,
                settings=self.settings,
                on_applied=self._applied,
                on_leadership=self._leadership_changed,
                lineage=self.epochs.lineage,
                after_doubt=lambda: codec.encode(RaiseFences(machine.fence + FENCES_LOST_MAX)),
                adds_work=adds_work,
                lacks_history=self._lacks_history,
            )
            self.archive = Archive(self.me, machine, self.server_log, self.home.history_index)
            self.replica = Replica(self.server_log, machine, self._events_happened, self.archive)
            self.replica.register(self.rpc)
            self.machine = machine
        self.log = MeshLog(self.me, self.rpc, self.neighbours.voters, self.replica, self._why_stopped)
        self.authority = Authority(
            home=self.home,
            me=self.me,
            mesh=self.mesh,
            keys=self.directory.keys,
            ca_pem=self.mesh_file.ca_pem,
            rpc=self.rpc,
            servers=self.directory.servers,
            find_member=lambda node: find_member(self.log, node),
        )
        desk = JoinDesk(
            mesh=self.mesh,
            public_key=self.public_key,
            ca_pem=self.mesh_file.ca_pem,
            propose=lambda command: self.log.propose(command, timeout_s=JOIN_S / 2),
            certify=self.authority.certify,
            members=lambda: (self.introduction.as_peer(), *self.directory.peers()),
            wall_ms=wall_ms,
            epoch=lambda: self.epochs.own,
            links=lambda: self.directory.keys.links,
        )
        self.transport.handle(JOIN_PROTOCOL, desk.answer)
        if self.server_log is not None:
            await stages.enter_async_context(_serving(self.server_log.serve))
            if not self.mesh_file.has_journal:
                self.mesh_file = replace(self.mesh_file, has_journal=True)
                await trio.to_thread.run_sync(self.home.write_mesh, self.mesh_file)
            if self.mesh_file.is_founder:
                await self._claim_founding()

    async def _claim_founding(self) -> None:
        """The first command of a new mesh; on a later start the state has it already."""
        if self.machine.mesh:
            return
        member = self.introduction.as_founder()
        with trio.move_on_after(10):
            try:
                await self.log.propose(Found(self.mesh, member), timeout_s=10)
            except Conflict:
                return  # founded long ago: the journal had not been replayed yet

    async def _start_gossip(self, stages: AsyncExitStack) -> None:
        self.gossip = GossipService(
            self.me,
            self.rpc,
            sign=self.key.sign,
            verify=verify,
            rng=random.Random(),  # noqa: S311
            clock_ms=boot_ms,
            incarnation=self.counters.starts,
            on_change=self._liveness_changed,
        )
        self.gossip.set_members(self.directory.members())
        self.neighbours.gossip = self.gossip
        await stages.enter_async_context(_serving(self.gossip.serve))
        tally = Tally([self.transport.counters, self.rpc.counters, self.gossip.counters])
        await stages.enter_async_context(_serving(tally.serve))
        self.upkeep = Upkeep(
            me=self.me,
            home=self.home,
            directory=self.directory,
            neighbours=self.neighbours,
            gossip=self.gossip,
            mesh_log=self.log,
            authority=self.authority,
            about_me=self.introduction.update,
            members_known=self._members_known,
            is_server=self.has_log,
            certificate=lambda: self.mesh_file.certificate,
            keep_certificate=self._keep_certificate,
            lineage=lambda: self.epochs.lineage,
        )
        self.directory.on_new_key = self.upkeep.key_changed
        self.directory.on_change = self._directory_changed

    async def _start_blobs(self, stages: AsyncExitStack) -> None:
        assert self.gossip is not None
        gossip = self.gossip
        self.store = await Store.open(self.home.blobs, new_leaves_free=self.config.disk_free)
        for ref in await self.store.list():
            self._blob_changed(ref.hash, True)
        self.store.on_change(self._blob_changed)
        self.fetcher = Fetcher(self.transport, self.rpc, self.store, gossip.holders)
        BlobServer(self.transport, self.rpc, self.store, may_remove=self.is_server)
        self.replicator = Replicator(self.rpc, self.store, self.fetcher, self.neighbours.takers)
        if self.archive is not None:
            self.store.keeps = self.archive.names
            fetch = partial(self.fetcher.fetch, timeout_s=FETCH_S)
            await stages.enter_async_context(_serving(self.archive.serve, self.store, fetch))

    async def _start_work(self, stages: AsyncExitStack) -> None:
        probes: Sequence[BackendProbe] = ()
        lock = await take_over(self.home.backends) if self.is_worker else None
        if lock is not None:
            stages.callback(os.close, lock)
        backends = registry.load(
            BackendSettings(directory=self.home.backends, term_grace_s=self.config.term_grace_s, helpers_lock=lock)
        )
        if self.config.backends:
            backends = {name: each for name, each in backends.items() if name in self.config.backends}
        if self.is_worker:
            for backend in backends.values():
                await stages.enter_async_context(_serving(backend.serve))
            probes = tuple((await registry.probe_all(backends)).values())
            for probe in probes:
                log.info("backend.probed", backend=probe.name, works=probe.works, reason=probe.reason or probe.version)
        self.offer = make_offer(self.config, self.mesh_file.name, VERSION, probes)
        offered = tuple(each.name for each in self.offer.backends)
        self.executor = Executor(
            directory=self.home.attempts,
            me=self.me,
            store=self.store,
            fetcher=self.fetcher,
            replicator=self.replicator,
            backends=backends,
            offered=lambda: offered,
        )
        await trio.to_thread.run_sync(self.executor.sweep)
        await stages.enter_async_context(_serving(self.executor.serve))
        keeper = Keeper(self.machine) if self.has_log else None
        self.shell = Shell(
            me=self.me,
            agent=Agent(Worker(epoch=self.counters.epoch, boot=boot_id()), keeper),
            rpc=self.rpc,
            world=self,
            runs=self.executor,
            propose=self._propose_once,
            save_epoch=self._save_epoch,
        )
        self.log_desk = LogDesk(self.executor, self.rpc)
        self.drains = Drain(
            me=self.me,
            rpc=self.rpc,
            mesh_log=self.log,
            directory=self.directory,
            store=self.store,
            replicator=self.replicator,
            attempts_running=lambda: self.shell.attempts_running if self.shell else 0,
            is_voter=lambda: self.server_log is not None and self.server_log.is_voter,
            hand_over=lambda: self._feed(HandOver()),
            leave_lead=self._leave_lead,
        )
        await stages.enter_async_context(_serving(self.shell.serve))
        self.shell.feed(Tick(self.leading_term()))
        self._serve_or_drain()

    async def _start_api(self, stages: AsyncExitStack) -> int | None:
        assert self.gossip is not None
        self.node = Node(
            me=self.me,
            name=self.mesh_file.name,
            roles=self.mesh_file.certificate.roles,
            mesh=self.mesh,
            version=VERSION,
            ca_pem=self.mesh_file.ca_pem,
            mesh_log=self.log,
            rpc=self.rpc,
            directory=self.directory,
            gossip=self.gossip,
            neighbours=self.neighbours,
            store=self.store,
            fetcher=self.fetcher,
            replicator=self.replicator,
            logs=LogReader(self.me, self.rpc, self.log_desk, self.log, self.store, self.fetcher),
            drains=self.drains,
            authority=self.authority,
            addresses=lambda: self.introduction.addresses,
            clock_offset_ms=self.greetings.offset_ms,
            epochs=self.epochs,
        )
        tcp = split_address(self.config.api) if self.config.api else None
        context = await self._tls_context(tcp[0]) if tcp is not None else None
        listening = await stages.enter_async_context(
            _serving(api_server.serve, self.node, socket_path=self.home.socket, tcp=tcp, tls=context)
        )
        if tcp is not None:
            host = tcp[0] if tcp[0] not in ("0.0.0.0", "::") else self.introduction.public_host
            self.introduction.api_address = f"{host}:{listening.tcp_port}"
        port: int | None = listening.tcp_port
        return port

    async def _tls_context(self, host: str) -> ssl.SSLContext:
        key_file, certificate_file = self.home.path / "api.key", self.home.path / "api.pem"
        hosts = (host, self.introduction.public_host, socket.gethostname())
        request = await trio.to_thread.run_sync(tls.make_request, key_file, self.me, hosts)
        context = await trio.to_thread.run_sync(tls.server_context, certificate_file, key_file)
        if context is None:
            pem = await self.authority.api_certificate(request)
            await trio.to_thread.run_sync(replace_file, certificate_file, pem.encode())
            context = await trio.to_thread.run_sync(tls.server_context, certificate_file, key_file)
        if context is None:
            raise StartRefused(f"{certificate_file} is not of the key {key_file}", hint="remove both, then start again")
        return context

    # --- what others ask of this node --------------------------------------------------------------------------------

    async def _keep_certificate(self, certificate: Certificate) -> None:
        """With the keys that it is by: the next start has to know them."""
        self.mesh_file = replace(self.mesh_file, certificate=certificate, key_links=self.directory.keys.links)
        await trio.to_thread.run_sync(self.home.write_mesh, self.mesh_file)

    async def _propose_once(self, command: bytes) -> ProposeResult:
        return await self.log.propose_once(command, timeout_s=5)

    async def _save_epoch(self, epoch: int) -> None:
        async with self.saving:  # two threads may end in any order
            if epoch > self.counters.epoch:
                counters = replace(self.counters, epoch=epoch)
                await trio.to_thread.run_sync(self.home.write_counters, counters)
                self.counters = counters

    # --- shell.World --------------------------------------------------------------------------------------------------

    def now_ms(self) -> int:
        return boot_ms()

    def leading_term(self) -> int | None:
        if self.server_log is None or not self.server_log.leads():
            return None
        return self.server_log.term

    def leader(self) -> NodeId | None:
        if self.server_log is not None and self.server_log.is_voter:
            return self.server_log.leader
        voters = self.neighbours.voters()
        return voters[0] if voters else None

    def voters(self) -> Sequence[NodeId]:
        return self.neighbours.voters()

    def _lacks_history(self, voter: VoterId) -> bool:
        me = None if self.server_log is None else self.server_log.me
        return me is not None and lags_behind(self.machine.history, voter, me)

    def _holds_log_alone(self) -> bool:
        return self.server_log is not None and self.server_log.voters == (self.me,)

    def _why_stopped(self) -> str:
        """Only who holds the log knows who votes."""
        voters = () if self.server_log is None else self.server_log.voters
        return describe_stop({self._name_of(voter): self._is_alive(voter) for voter in voters})

    def _name_of(self, node: NodeId) -> str:
        return self.mesh_file.name if node == self.me else self.directory.name(node) or node

    def _is_alive(self, node: NodeId) -> bool:
        health = None if self.gossip is None else self.gossip.health(node)
        return node == self.me or (health is not None and health.state is State.ALIVE)

    def is_server(self, node: NodeId) -> bool:
        return node == self.me or self.directory.has_role(node, Role.SERVER)

    # --- what happens ------------------------------------------------------------------------------------------------

    def _feed(self, event: AgentEvent) -> None:
        if self.shell is not None:
            self.shell.feed(event)

    def _applied(self, position: int) -> None:
        if self.replica is not None:
            self.replica.applied(position)
        if self.archive is not None:
            self.archive.applied()

    def _events_happened(self, events: Sequence[Event]) -> None:
        self._feed(Applied(events, self.leading_term()))
        if any(isinstance(event, MembersChanged | Restored) for event in events):
            self._members_known(self.machine.answer(GetMembers()))

    def _leadership_changed(self, is_leader: bool) -> None:
        log.info("raft.leading" if is_leader else "raft.following", term=self.server_log.term if self.server_log else 0)
        if is_leader and self.gossip is not None and self.server_log is not None:
            self.gossip.publish(LEADER_FACT, codec.encode(since(self.epochs.lineage, self.server_log.term)))
        self._feed(Tick(self.leading_term()))

    def _members_known(self, view: MembersView) -> None:
        self.directory.learn_members(view)
        if self.me in view.revoked:
            self.failure = NotAllowed(
                "this node was removed from its mesh", hint="join again with a new invite and a new --data-dir"
            )
            self.stop.set()
            return
        mine = next((row.member for row in view.members if row.member.node == self.me), None)
        if mine is not None and mine.is_draining != self.is_draining:
            self.is_draining = mine.is_draining
            log.info("node.draining" if self.is_draining else "node.in_service")
            if self.shell is not None:
                self._serve_or_drain()

    def _serve_or_drain(self) -> None:
        assert self.gossip is not None
        self.gossip.publish(OFFER_FACT, codec.encode(self.offer))
        if self.is_worker:
            self._feed(Offering(0 if self.is_draining else slots(self.config), self.offer))
        if self.is_draining:
            self.work.start_soon(self.drains.move_out)

    def _holds_log(self) -> bool:
        return self.server_log is not None or (self.has_log and self.home.has_journal())

    def _epoch_heard(self) -> None:
        if not self.is_settling:
            self.is_settling = True
            self.work.start_soon(self._settle_epoch)

    async def _settle_epoch(self) -> None:
        """The mesh was recovered: this node goes along, or stops."""
        if not self.has_log:
            await trio.sleep(FOLLOW_AFTER_S)
        self.is_settling = False
        try:
            has_moved = await self.allegiance.settle()
        except StartRefused as error:
            self.failure = error
            self.stop.set()
            return
        if has_moved:
            self.directory.begin_epoch()
            for peer in self.directory.members():
                self.rpc.close(peer)
            self._feed(Recovered())

    def _liveness_changed(self, node: NodeId, state: State) -> None:
        log.info("node." + state.value, node=node, name=self.directory.name(node))
        self._tell_gone(node)

    def _tell_gone(self, node: NodeId) -> None:
        """Gossip and the own connection have to agree, whichever of them changed last."""
        health = self.gossip.health(node) if self.gossip is not None else None
        is_dead = health is not None and health.state is State.DEAD
        self._feed(PeerGone(node, is_dead and node not in self.transport.connected()))

    def _blob_changed(self, blob: str, is_present: bool) -> None:
        try:
            if self.gossip is not None:
                self.gossip.publish_blob(blob, present=is_present)
        except Busy:
            return  # more blobs than gossip tells of: whoever wants this one asks around

    def _directory_changed(self) -> None:
        self.upkeep.peers_changed()
        if self.gossip is not None:
            self.gossip.set_members(self.directory.members())

    def peer_up(self, peer: NodeId) -> None:
        if self.gossip is not None:
            self.gossip.peer_up(peer)
        self._tell_gone(peer)

    def peer_down(self, peer: NodeId) -> None:
        if self.gossip is not None:
            self.gossip.peer_down(peer)
        self._tell_gone(peer)

    def _leave_lead(self) -> None:
        self.work.start_soon(self._hand_over_lead)

    async def _hand_over_lead(self) -> None:
        """Where another voter can lead; a sole one goes on until the mesh has found it a successor."""
        if self.server_log is not None and self.server_log.leads() and len(self.server_log.voters) > 1:
            try:
                await self.server_log.hand_over()
            except MeshError as error:
                log.warning("raft.not_handed_over", error=str(error))

    async def _hand_back(self) -> None:
        """Asked to stop: lead no more, stop what runs and report it, so that others go on at once."""
        await self._hand_over_lead()
        if self.shell is not None and self.is_worker:
            self._feed(Offering(0, self.offer))
            self._feed(HandOver())
            await self.shell.wait_empty()


@asynccontextmanager
async def _serving(serve: Callable[..., Awaitable[None]], *arguments: Any, **options: Any) -> AsyncIterator[Any]:
    """A service runs for the length of the block; what it says once it can be used is the block's value."""
    async with trio.open_nursery() as nursery:
        value = await nursery.start(partial(serve, *arguments, **options))
        try:
            yield value
        finally:
            nursery.cancel_scope.cancel()
