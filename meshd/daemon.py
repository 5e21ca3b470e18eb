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
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, assert_never

import structlog
import trio

from meshd import codec
from meshd.admission.authority import Authority
from meshd.admission.founding import JOIN_S, Founding, Joining, Resuming, found_mesh, how_to_begin, join_mesh
from meshd.admission.greetings import Greetings, on_hello, say_hello
from meshd.admission.home import Home, MeshFile
from meshd.admission.introduction import Introduction, advertised, multiaddr
from meshd.admission.invites import Invite
from meshd.admission.join import JoinDesk, JoinRequest
from meshd.admission.records import Records
from meshd.agent import Agent, Tick
from meshd.api import server as api_server
from meshd.backends import registry
from meshd.backends.leftovers import take_over
from meshd.blobs.fetch import Fetcher
from meshd.blobs.replicate import Replicator
from meshd.blobs.serve import BlobServer
from meshd.blobs.store import Store
from meshd.config import Config, split_address
from meshd.directory import JOIN_PROTOCOL, Directory
from meshd.errors import Conflict, MeshError
from meshd.gossip.service import GossipService
from meshd.history.archive import FETCH_S, Archive
from meshd.history.keeping import lags_behind
from meshd.mediator import Mediator
from meshd.model import BackendProbe, NodeId, Role
from meshd.neighbours import Neighbours
from meshd.net.identity_key import KeyPair, verify
from meshd.net.libp2p import Libp2pTransport
from meshd.net.rpc import StreamRpc
from meshd.node import Node
from meshd.ports import BackendSettings, ProposeResult
from meshd.raft.clocks import boottime_ms, wall_clock_ms
from meshd.raft.log import ServerLog
from meshd.raft.messages import VoterId
from meshd.raft.remote import MeshLog
from meshd.raft.replica import Replica
from meshd.raft.settings import RaftSettings
from meshd.raft.state.commands import Found, RaiseFences, adds_work
from meshd.raft.state.machine import Machine
from meshd.raft.state.recovery import FENCES_LOST_MAX
from meshd.recovery.allegiance import Allegiance, open_epochs
from meshd.recovery.epochs import EpochFile, Epochs
from meshd.shell import Shell
from meshd.standing import Standing
from meshd.tally import Tally
from meshd.upkeep import Upkeep, list_members
from meshd.work.drain import Drain
from meshd.work.duty import Duty
from meshd.work.executor import Executor
from meshd.work.keeper import Keeper
from meshd.work.logs import LogDesk, LogReader
from meshd.work.offer import make_offer, slots, zone
from meshd.work.worker import HandOver, Worker

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
    is_alone: bool
    """No other member is known."""
    addresses: tuple[str, ...]
    api_port: int | None
    node: Node


def boot_id() -> str:
    """Of this start of the kernel; empty where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


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
        beginning = how_to_begin(home.path, mesh_file, invite, may_found=may_found, has_journal=home.has_journal())
        match beginning:
            case Founding():
                mesh_file = await trio.to_thread.run_sync(found_mesh, home, key, name, config.roles)
            case Joining(by):
                mesh_file = await _join(home, key, name, config, by)
            case Resuming(mesh_file):
                pass
            case _:
                assert_never(beginning)
        epochs = await trio.to_thread.run_sync(open_epochs, home, mesh_file.mesh)
        daemon = _Daemon(
            config, home, key, mesh_file, epochs, settings or RaftSettings(disk_free_min=config.disk_free), stop
        )
        try:
            await daemon.run(isinstance(beginning, Founding), task_status)
        finally:
            if daemon.server_log is not None and (why := daemon.server_log.why_refused):
                daemon.records.keep_refusal(why)
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
        wall_ms=wall_clock_ms(),
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
        self.records = Records(home, mesh_file)
        self.mesh = mesh_file.mesh
        self.public_key = bytes.fromhex(mesh_file.public_key)
        self.epoch_file = epochs
        self.settings = settings
        self.has_log = Role.SERVER in mesh_file.certificate.roles
        self.is_worker = Role.WORKER in mesh_file.certificate.roles
        self.work: trio.Nursery
        self.replica: Replica | None = None
        self.archive: Archive | None = None
        self.server_log: ServerLog | None = None
        self.stop = stop
        self.failure: MeshError | None = None
        """Why it stops, when nobody has asked it to."""

    async def run(self, is_founded: bool, task_status: trio.TaskStatus[Started]) -> None:
        await self.records.count_start()
        self.directory = Directory(
            self.me, self.mesh, self.public_key, verify, self.home.peers(), self.records.mesh_file.key_links
        )
        self.neighbours = Neighbours(self.me, self.directory, holds_log_alone=lambda: self.standing.holds_log_alone())
        self.standing = Standing(self.me, self.records.mesh_file.name, self.directory, self.neighbours)
        async with trio.open_nursery() as self.work:
            self.mediator = Mediator(
                me=self.me,
                directory=self.directory,
                standing=self.standing,
                lineage=lambda: self.epochs.lineage,
                is_server=self.has_log,
                work=self.work,
                fail=self._fail,
            )
            self.epochs = Epochs(self.mesh, self.public_key, verify, self.epoch_file, on_news=self.mediator.epoch_heard)
            async with AsyncExitStack() as stages:
                task_status.started(await self._start(stages, is_founded))
                await self.stop.wait()
                with trio.move_on_after(STOP_S if self.failure is None else 0):
                    await self.duty.hand_back()
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
            self.me,
            self.records.mesh_file.name,
            self.mesh,
            is_founded,
            not self.directory.members(),
            self.introduction.addresses,
            api_port,
            self.node,
        )

    # --- stages ------------------------------------------------------------------------------------------------------

    async def _start_net(self, stages: AsyncExitStack) -> None:
        host, port = split_address(self.config.listen)
        self.transport = Libp2pTransport(
            self.key,
            listen=[multiaddr(f"{host}:{port}")],
            gate=self.directory.gate,
            book=self.directory.book,
            events=self.mediator,
        )
        self.mediator.transport = self.transport
        self.introduction = Introduction(
            me=self.me,
            config=self.config,
            version=VERSION,
            start=self.records.counters.starts,
            mesh_file=lambda: self.records.mesh_file,
            epoch=lambda: self.epochs.own,
            keys=self.directory.keys,
            listening=lambda: self.transport.addresses,
            wall_ms=wall_clock_ms,
        )
        self.greetings = Greetings(
            directory=self.directory,
            greeting=self.introduction.greeting,
            hears=lambda peer: self.rpc.hears(peer),
            wall_ms=wall_clock_ms,
            meet_epoch=self.epochs.meet,
        )
        self.rpc = StreamRpc(self.transport, greeting=self.greetings.ours, admit=self.greetings.admit)
        self.rpc.register("mesh.hello", on_hello)
        await stages.enter_async_context(_serving(self.transport.serve))
        await stages.enter_async_context(_serving(self.rpc.serve))
        allegiance = Allegiance(self.home, self.epochs, holds_log=self._holds_log)
        await say_hello(self.rpc, self.directory.members)
        await allegiance.settle()
        self.mediator.rpc, self.mediator.allegiance = self.rpc, allegiance
        self.mediator.is_settling = False

    async def _start_log(self, stages: AsyncExitStack, is_founded: bool) -> None:
        if self.has_log:
            machine = Machine()
            is_founding = (
                self.records.mesh_file.is_founder
                and not self.records.mesh_file.has_journal
                and not self.home.has_journal()
            )
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
                on_applied=self.mediator.applied,
                on_leadership=self.mediator.leadership_changed,
                lineage=self.epochs.lineage,
                after_doubt=lambda: codec.encode(RaiseFences(machine.fence + FENCES_LOST_MAX)),
                adds_work=adds_work,
                lacks_history=self._lacks_history,
            )
            self.archive = Archive(self.me, machine, self.server_log, self.home.history_index)
            self.replica = Replica(self.server_log, machine, self.mediator.events_happened, self.archive)
            self.replica.register(self.rpc)
            self.machine = machine
            self.standing.log = self.server_log
            self.mediator.machine, self.mediator.replica, self.mediator.archive = machine, self.replica, self.archive
        self.log = MeshLog(self.me, self.rpc, self.neighbours.voters, self.replica, self.standing.why_stopped)
        self.authority = Authority(
            home=self.home,
            me=self.me,
            mesh=self.mesh,
            keys=self.directory.keys,
            ca_pem=self.records.mesh_file.ca_pem,
            rpc=self.rpc,
            servers=self.directory.servers,
            members=lambda: list_members(self.log),
        )
        desk = JoinDesk(
            mesh=self.mesh,
            public_key=self.public_key,
            ca_pem=self.records.mesh_file.ca_pem,
            propose=lambda command: self.log.propose(command, timeout_s=JOIN_S / 2),
            certify=self.authority.certify,
            members=lambda: (self.introduction.as_peer(), *self.directory.peers()),
            wall_ms=wall_clock_ms,
            epoch=lambda: self.epochs.own,
            links=lambda: self.directory.keys.links,
        )
        self.transport.handle(JOIN_PROTOCOL, desk.answer)
        if self.server_log is not None:
            await stages.enter_async_context(_serving(self.server_log.serve))
            await self.records.keep_journal()
            if self.records.mesh_file.is_founder:
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
            clock_ms=boottime_ms,
            incarnation=self.records.counters.starts,
            on_change=self.mediator.liveness_changed,
        )
        self.gossip.set_members(self.directory.members())
        self.neighbours.gossip = self.standing.gossip = self.mediator.gossip = self.gossip
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
            members_known=self.mediator.members_known,
            is_server=self.has_log,
            certificate=lambda: self.records.mesh_file.certificate,
            keep_certificate=lambda it: self.records.keep_certificate(it, self.directory.keys.links),
            lineage=lambda: self.epochs.lineage,
        )
        self.directory.on_new_key = self.upkeep.key_changed
        self.mediator.upkeep = self.upkeep
        self.directory.on_change = self.mediator.directory_changed

    async def _start_blobs(self, stages: AsyncExitStack) -> None:
        self.store = await Store.open(self.home.blobs, new_leaves_free=self.config.disk_free)
        for ref in await self.store.list():
            self.mediator.blob_changed(ref.hash, True)
        self.store.on_change(self.mediator.blob_changed)
        self.fetcher = Fetcher(self.transport, self.rpc, self.store, self.gossip.holders)
        BlobServer(self.transport, self.rpc, self.store, may_remove=self.standing.is_server)
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
        offer = make_offer(self.config, self.records.mesh_file.name, VERSION, probes)
        offered = tuple(each.name for each in offer.backends)
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
        shell = self.mediator.shell = Shell(
            me=self.me,
            agent=Agent(Worker(epoch=self.records.counters.epoch, boot=boot_id()), keeper),
            rpc=self.rpc,
            world=self.standing,
            runs=self.executor,
            propose=self._propose_once,
            save_epoch=self.records.save_epoch,
        )
        self.log_desk = LogDesk(self.executor, self.rpc)
        self.drains = Drain(
            me=self.me,
            rpc=self.rpc,
            mesh_log=self.log,
            directory=self.directory,
            store=self.store,
            replicator=self.replicator,
            attempts_running=lambda: shell.attempts_running,
            is_voter=self.standing.is_voter,
            hand_over=lambda: self.mediator.feed(HandOver()),
            leave_lead=lambda: self.duty.leave_lead(),
        )
        self.duty = Duty(
            offer=offer,
            slots=slots(self.config) if self.is_worker else None,
            shell=shell,
            gossip=self.gossip,
            drains=self.drains,
            server_log=self.server_log,
            work=self.work,
        )
        await stages.enter_async_context(_serving(shell.serve))
        shell.feed(Tick(self.standing.leading_term()))
        self.mediator.duty = self.duty
        self.duty.take_up(is_draining=self.mediator.is_draining)

    async def _start_api(self, stages: AsyncExitStack) -> int | None:
        self.node = Node(
            me=self.me,
            name=self.records.mesh_file.name,
            roles=self.records.mesh_file.certificate.roles,
            mesh=self.mesh,
            version=VERSION,
            ca_pem=self.records.mesh_file.ca_pem,
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
        context = None
        if tcp is not None:
            hosts = (tcp[0], self.introduction.public_host, socket.gethostname())
            context = await self.authority.api_context(hosts)
        listening = await stages.enter_async_context(
            _serving(api_server.serve, self.node, socket_path=self.home.socket, tcp=tcp, tls=context)
        )
        if tcp is not None:
            host = tcp[0] if tcp[0] not in ("0.0.0.0", "::") else self.introduction.public_host
            self.introduction.api_address = f"{host}:{listening.tcp_port}"
        port: int | None = listening.tcp_port
        return port

    # --- what the stages ask ------------------------------------------------------------------------------------------

    async def _propose_once(self, command: bytes) -> ProposeResult:
        return await self.log.propose_once(command, timeout_s=5)

    def _lacks_history(self, voter: VoterId) -> bool:
        me = None if self.server_log is None else self.server_log.me
        return me is not None and lags_behind(self.machine.history, voter, me)

    def _holds_log(self) -> bool:
        return self.server_log is not None or (self.has_log and self.home.has_journal())

    def _fail(self, error: MeshError) -> None:
        self.failure = error
        self.stop.set()


@asynccontextmanager
async def _serving(serve: Callable[..., Awaitable[None]], *arguments: Any, **options: Any) -> AsyncIterator[Any]:
    """A service runs for the length of the block; what it says once it can be used is the block's value."""
    async with trio.open_nursery() as nursery:
        value = await nursery.start(partial(serve, *arguments, **options))
        try:
            yield value
        finally:
            nursery.cancel_scope.cancel()
