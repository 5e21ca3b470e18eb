"""What this node knows of the other members: their certificates, where they are, who is revoked.

Where to dial and whom to admit, never who votes. Learned from greetings, from answers at a
read barrier and from gossip; kept in peers.json so that a restarted node finds the mesh again
although addresses changed meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from msgspec.structs import replace

from meshd.admission.certificates import Greeting, Verify
from meshd.admission.home import KnownPeer
from meshd.admission.keyring import KeyRing
from meshd.errors import NotAllowed, Unavailable
from meshd.model import KeyLink, NodeId, Role
from meshd.views import MembersView

JOIN_PROTOCOL = "/meshd/join/1"
RPC_PROTOCOL = "/meshd/rpc/1"
RAFT_PROTOCOL = "/meshd/raft/1"
BLOB_PROTOCOL = "/meshd/blob/1"

ADDRESSES_MAX = 8
"""Kept for each peer: present ones first, then where it was before."""


class Directory:
    def __init__(
        self,
        me: NodeId,
        mesh: str,
        public_key: bytes,
        verify: Verify,
        known: Iterable[KnownPeer],
        links: Sequence[KeyLink] = (),
    ) -> None:
        """`public_key` is the mesh's first; `links` lead to its present one."""
        self._me = me
        self.keys = KeyRing(mesh, public_key, verify, links)
        self._peers: dict[NodeId, KnownPeer] = {peer.node: peer for peer in known if peer.node != me}
        self._roles: dict[NodeId, tuple[Role, ...]] = {}
        """As the replicated state says; certificates say the same, and are known sooner of some and later of others."""
        self._draining: frozenset[NodeId] = frozenset()
        self._revoked: frozenset[NodeId] = frozenset()
        self._servers: tuple[NodeId, ...] | None = None
        """As `servers` said last; None when that may have changed. Every call by way of a voter asks, and members are many."""
        self.position = 0
        """Log position of the newest list of members that was learned."""
        self.on_change: Callable[[], None] = lambda: None
        self.on_new_key: Callable[[], None] = lambda: None
        if links:
            self._drop_old_certificates()

    # --- asked -------------------------------------------------------------------------------------------------------

    def gate(self, peer: NodeId, protocol: str) -> bool:
        """May this authenticated peer speak this protocol? On calls, the greeting decides next, and says why not."""
        if protocol in (JOIN_PROTOCOL, RPC_PROTOCOL):
            return True
        if peer in self._revoked:
            return False
        roles = self.roles(peer)
        return bool(roles) and (protocol != RAFT_PROTOCOL or Role.SERVER in roles)

    def book(self, peer: NodeId) -> Sequence[str]:
        known = self._peers.get(peer)
        return known.addresses if known else ()

    def name(self, peer: NodeId) -> str:
        known = self._peers.get(peer)
        return known.name if known else ""

    def peers(self) -> tuple[KnownPeer, ...]:
        return tuple(self._peers[node] for node in sorted(self._peers))

    def peer(self, node: NodeId) -> KnownPeer | None:
        return self._peers.get(node)

    def is_revoked(self, node: NodeId) -> bool:
        return node in self._revoked

    def members(self) -> tuple[NodeId, ...]:
        """Everybody else that belongs to the mesh."""
        return tuple(sorted(node for node in self._peers if node not in self._revoked))

    def servers(self) -> tuple[NodeId, ...]:
        """Everybody else that may hold the log."""
        if self._servers is None:
            self._servers = tuple(node for node in self.members() if self.has_role(node, Role.SERVER))
        return self._servers

    def has_role(self, node: NodeId, role: Role) -> bool:
        return role in self.roles(node)

    def roles(self, node: NodeId) -> tuple[Role, ...]:
        """By its certificate, else by the state; none when neither knows it."""
        known = self._peers.get(node)
        if known is not None and known.certificate is not None:
            return known.certificate.roles
        return self._roles.get(node, ())

    # --- told --------------------------------------------------------------------------------------------------------

    def greet(self, peer: NodeId, greeting: Greeting) -> None:
        """A member showed its certificate. Raises NotAllowed; Unavailable while nobody here can say."""
        if peer in self._revoked:
            raise NotAllowed(
                f"node {peer} was removed from this mesh", hint="join again with a new invite and a new data directory"
            )
        if self.keys.learn(greeting.links):
            self._key_changed()
        is_newest = self.keys.check(greeting.certificate, peer)
        if not is_newest and peer not in self._roles:
            # Servers that were removed still have that key: only whom the state names comes in by it.
            if not self.position:
                raise Unavailable("this node does not know yet who is a member", hint="it asks the mesh: try again")
            raise NotAllowed(f"the certificate of {peer} is by a key that the mesh has changed since")
        self._learn(peer, greeting.name, greeting.addresses, greeting.api_address, is_fresh=True)
        known = self._peers[peer]
        held = known.certificate
        if is_newest and (held is None or held.version < greeting.certificate.version):
            self._store(replace(known, certificate=greeting.certificate))

    def learn_addresses(self, peer: NodeId, addresses: tuple[str, ...], api_address: str) -> None:
        if peer in self._peers:
            self._learn(peer, self._peers[peer].name, addresses, api_address, is_fresh=True)

    def learn_members(self, view: MembersView) -> None:
        """The members as of a log position: forgets those who are no longer in it."""
        if view.position < self.position:
            return
        self.position = view.position
        if self.keys.take(view.key_links):
            self._key_changed()
        self._revoked = frozenset(view.revoked)
        self._draining = frozenset(row.member.node for row in view.members if row.member.is_draining)
        present = {row.member.node for row in view.members}
        self._roles = {row.member.node: row.member.roles for row in view.members}
        for row in view.members:
            if row.member.node != self._me:
                member = row.member
                self._learn(member.node, member.name, member.addresses, member.api_address, is_fresh=False)
        # A list may be older than a greeting (a joiner replays the log from its beginning), and nobody greets twice on
        # one stream: whom the mesh's key vouches for is forgotten only when revoked.
        for node in [node for node in self._peers if node not in present]:
            if node in self._revoked or self._peers[node].certificate is None:
                del self._peers[node]
                self.on_change()
        self._servers = None

    def _key_changed(self) -> None:
        self._drop_old_certificates()
        self.on_change()
        self.on_new_key()

    def _drop_old_certificates(self) -> None:
        """From here on the state says who is what, until each shows a certificate by the new key."""
        for node, peer in self._peers.items():
            if peer.certificate is not None and (node in self._roles or not self.keys.is_newest(peer.certificate)):
                self._peers[node] = replace(peer, certificate=None)
        self._servers = None

    def begin_epoch(self) -> None:
        """Log positions begin anew, below some that were seen before; who was removed may be a member again."""
        self.position = 0
        self._revoked = frozenset()
        self._servers = None

    def is_draining(self, node: NodeId) -> bool:
        return node in self._draining

    def _learn(self, peer: NodeId, name: str, addresses: tuple[str, ...], api: str, *, is_fresh: bool) -> None:
        known = self._peers.get(peer) or KnownPeer(peer, name, ())
        ordered = (*addresses, *known.addresses) if is_fresh else (*known.addresses, *addresses)
        merged = tuple(dict.fromkeys(ordered))[:ADDRESSES_MAX]
        self._store(replace(known, name=name or known.name, addresses=merged, api_address=api or known.api_address))

    def _store(self, peer: KnownPeer) -> None:
        if self._peers.get(peer.node) != peer:
            self._peers[peer.node] = peer
            self._servers = None
            self.on_change()
