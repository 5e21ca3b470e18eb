"""What this node says of itself: who vouches for it, what people call it, which start of it this is, where it is found."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Callable, Sequence

from meshd.admission.certificates import Greeting
from meshd.admission.home import KnownPeer, MeshFile
from meshd.admission.keyring import KeyRing
from meshd.config import Config, split_address
from meshd.model import EpochCertificate, Member, NodeId
from meshd.raft.state.commands import UpdateMember
from meshd.work.offer import zone

ADDRESSES_MAX = 8
"""Told of one node: those that its operator gave come first."""


class Introduction:
    """All of it as of the moment it is asked for: certificate, epoch and addresses change while an agent runs."""

    def __init__(
        self,
        *,
        me: NodeId,
        config: Config,
        version: str,
        start: int,
        mesh_file: Callable[[], MeshFile],
        epoch: Callable[[], EpochCertificate],
        keys: KeyRing,
        listening: Callable[[], Sequence[str]],
        wall_ms: Callable[[], int],
    ) -> None:
        """`start` counts the starts of this identity; `listening` is where its transport can be reached."""
        self._me = me
        self._config = config
        self._version = version
        self._start = start
        self._start_random = secrets.token_bytes(16)
        self._mesh_file = mesh_file
        self._epoch = epoch
        self._keys = keys
        self._listening = listening
        self._wall_ms = wall_ms
        self.api_address = config.api
        """With the port that it has got, once the API listens."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where this node can be found, as multiaddrs without /p2p."""
        return tuple(dict.fromkeys((*advertised(self._config), *self._listening())))[:ADDRESSES_MAX]

    @property
    def public_host(self) -> str:
        hosts = (address.split("/")[2] for address in self.addresses)
        return next((host for host in hosts if not host.startswith("127.")), "127.0.0.1")

    def greeting(self) -> Greeting:
        """The first thing on every stream of calls."""
        mesh_file = self._mesh_file()
        return Greeting(
            certificate=mesh_file.certificate,
            start_counter=self._start,
            start_random=self._start_random,
            wall_ms=self._wall_ms(),
            name=mesh_file.name,
            addresses=self.addresses,
            api_address=self.api_address,
            version=self._version,
            epoch=self._epoch(),
            links=self._keys.shown(),
        )

    def as_peer(self) -> KnownPeer:
        """As a newcomer is told of it."""
        mesh_file = self._mesh_file()
        return KnownPeer(self._me, mesh_file.name, self.addresses, self.api_address, mesh_file.certificate)

    def as_founder(self) -> Member:
        mesh_file = self._mesh_file()
        return Member(
            self._me, mesh_file.name, mesh_file.certificate.roles, self.addresses, self.api_address, self._wall_ms(),
            zone=zone(self._config),
        )  # fmt: skip

    def update(self) -> UpdateMember:
        """What the replicated state shall say of it."""
        return UpdateMember(self._mesh_file().name, self.addresses, self.api_address, zone(self._config))


def advertised(config: Config) -> tuple[str, ...]:
    """Where its operator says that others find it, as multiaddrs."""
    return tuple(multiaddr(address) for address in config.advertise)


def multiaddr(address: str) -> str:
    """HOST:PORT as a multiaddr."""
    host, port = split_address(address)
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        return f"/dns/{host}/tcp/{port}"
    return f"/ip{parsed.version}/{host}/tcp/{port}"
