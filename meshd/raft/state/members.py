"""Who belongs to the mesh, who may come in, and who may use its API.

Invites and tokens are kept as hashes of their secrets: nobody can take them out of the
state. Removed members are remembered for ever, because their certificates still exist.
A member that is a worker only may invite workers; what gives power over the mesh, servers do.
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from meshd.errors import Busy, Conflict, InvalidRequest, NotAllowed, NotFound
from meshd.model import KeyLink, Member, NodeId, Role
from meshd.raft.state.commands import (
    Accepted,
    CreateInvite,
    CreateToken,
    Found,
    Join,
    Joined,
    MembersChanged,
    RevokeInvite,
    RevokeToken,
    UpdateMember,
)
from meshd.raft.state.moment import Moment

MEMBERS_MAX = 10_000
REVOKED_MAX = 100_000
INVITES_MAX = 1_000
TOKENS_MAX = 1_000
ADDRESSES_MAX = 32
ADDRESS_CHARS_MAX = 256

INVITE_KEPT_MS = 24 * 3_600_000
"""How long a spent or expired invite is remembered, so that whoever uses it is told which of the two it is."""

TOKEN_ROLES = ("viewer", "operator", "admin")


class MemberRecord(Struct, frozen=True, array_like=True):
    member: Member
    certificate_version: int


class Invite(Struct, frozen=True, array_like=True):
    roles: tuple[Role, ...]
    uses: int
    uses_left: int
    expires_wall_ms: int
    is_revoked: bool = False


class Token(Struct, frozen=True, array_like=True):
    name: str
    role: str
    created_wall_ms: int
    secret_hash: str


class Members:
    def __init__(self, moment: Moment) -> None:
        self.mesh = ""
        self.records: dict[NodeId, MemberRecord] = {}
        self.revoked: dict[NodeId, None] = {}
        self.invites: dict[str, Invite] = {}
        self.tokens: dict[str, Token] = {}
        """By the hash of their secret."""
        self.key_links: tuple[KeyLink, ...] = ()
        """How the mesh's key was changed. That each is signed by the key before is checked by whoever follows them."""
        self._moment = moment

    def __contains__(self, node: NodeId) -> bool:
        return node in self.records

    def get(self, node: NodeId) -> Member | None:
        record = self.records.get(node)
        return None if record is None else record.member

    def server_ids(self) -> tuple[NodeId, ...]:
        return tuple(node for node, record in self.records.items() if record.member.is_server)

    def found(self, origin: NodeId, command: Found) -> Joined:
        if self.mesh:
            founder = self.records.get(origin)
            if self.mesh == command.mesh and founder is not None and origin == command.member.node:
                return Joined(founder.member, founder.certificate_version)
            raise Conflict(f"this mesh was founded as {self.mesh}")
        if not command.mesh or origin != command.member.node or not command.member.is_server:
            raise InvalidRequest("a mesh is founded by a server, with itself as the first member")
        self.mesh = command.mesh
        return self._add(command.member, command.member.roles)

    def join(self, origin: NodeId, command: Join) -> Joined:
        node = command.member.node
        if node in self.revoked:
            raise NotAllowed(
                f"{command.member.name} ({node}) was removed from this mesh for good",
                hint="start it with an empty data directory: a new identity can join",
            )
        record = self.records.get(node)
        if record is not None:
            return Joined(record.member, record.certificate_version)
        invite = self._usable_invite(command.secret_hash)
        roles = command.member.roles or invite.roles
        if not set(roles) <= set(invite.roles):
            granted, asked = ",".join(sorted(invite.roles)), ",".join(sorted(roles))
            raise NotAllowed(
                f"the invite grants {granted}, not {asked}", hint="ask for an invite with the roles you need"
            )
        if Role.SERVER in roles:
            # Else a worker could let itself in once more as a server: it reads the hashes of open invites.
            self.check_server(origin, "lets a server in", hint="knock at a server of this mesh")
        if len(self.records) >= MEMBERS_MAX:
            raise Busy(f"the mesh has {MEMBERS_MAX} members", hint="remove members that are gone: mesh node remove")
        joined = self._add(command.member, roles)
        self.invites[command.secret_hash] = replace(invite, uses_left=invite.uses_left - 1)
        return joined

    def _add(self, member: Member, roles: tuple[Role, ...]) -> Joined:
        if not member.node:
            raise InvalidRequest("a member needs a peer id")
        _check_addresses(member.addresses)
        member = replace(
            member,
            roles=tuple(sorted(set(roles))),
            joined_wall_ms=self._moment.wall_ms,
            is_draining=False,
        )
        record = self.records[member.node] = MemberRecord(member, certificate_version=1)
        self._moment.events.append(MembersChanged())
        return Joined(record.member, record.certificate_version)

    def _usable_invite(self, secret_hash: str) -> Invite:
        invite = self.invites.get(secret_hash)
        hint = "ask for a new one: mesh node invite"
        if invite is None:
            raise NotAllowed("this mesh knows no such invite", hint=hint)
        if invite.is_revoked:
            raise NotAllowed("the invite was revoked", hint=hint)
        if invite.expires_wall_ms <= self._moment.wall_ms:
            ago_s = (self._moment.wall_ms - invite.expires_wall_ms) // 1000
            raise NotAllowed(f"the invite expired {ago_s} s ago", hint=hint)
        if not invite.uses_left:
            raise NotAllowed(f"the invite has been used up: {invite.uses} of {invite.uses} uses", hint=hint)
        return invite

    def create_invite(self, origin: NodeId, command: CreateInvite) -> Accepted:
        if Role.SERVER in command.roles:
            hint = "`mesh node invite --role worker`, or ask a server: `mesh node ls` shows which nodes are"
            self.check_server(origin, "invites servers", hint=hint)
        if command.secret_hash in self.invites:
            return Accepted()
        if not command.roles:
            raise InvalidRequest("an invite grants at least one role")
        self._forget_old_invites()
        if len(self.invites) >= INVITES_MAX:
            raise Busy(
                f"{INVITES_MAX} invites are open",
                hint="`mesh node invites` lists them; DELETE /v1/invites/HASH revokes one",
            )
        self.invites[command.secret_hash] = Invite(
            roles=tuple(sorted(set(command.roles))),
            uses=command.uses,
            uses_left=command.uses,
            expires_wall_ms=self._moment.wall_ms + command.lifetime_ms,
        )
        return Accepted()

    def revoke_invite(self, command: RevokeInvite) -> Accepted:
        invite = self.invites.get(command.secret_hash)
        if invite is None:
            raise NotFound("this mesh knows no such invite")
        self.invites[command.secret_hash] = replace(invite, is_revoked=True)
        return Accepted()

    def _forget_old_invites(self) -> None:
        limit_ms = self._moment.wall_ms - INVITE_KEPT_MS
        self.invites = {key: invite for key, invite in self.invites.items() if invite.expires_wall_ms > limit_ms}
        # Short of room, what can no longer be used goes first, the oldest of it.
        for key in [key for key, invite in self.invites.items() if not self.is_open(invite)]:
            if len(self.invites) < INVITES_MAX:
                break
            del self.invites[key]

    def clock_moved(self, before_ms: int) -> None:
        """Every invite keeps the time that it had left; what had expired stays so."""
        by_ms = self._moment.wall_ms - before_ms
        if by_ms < 0:
            self.invites = {
                key: replace(invite, expires_wall_ms=max(invite.expires_wall_ms + by_ms, 0))
                for key, invite in self.invites.items()
            }

    def is_open(self, invite: Invite) -> bool:
        return not invite.is_revoked and invite.uses_left > 0 and invite.expires_wall_ms > self._moment.wall_ms

    def update(self, origin: NodeId, command: UpdateMember) -> Accepted:
        _check_addresses(command.addresses)
        if not command.name:
            raise InvalidRequest("a member needs a name")
        member = self.records[origin].member
        self._put(
            replace(
                member,
                name=command.name,
                addresses=command.addresses,
                api_address=command.api_address,
                zone=command.zone,
            )
        )
        return Accepted()

    def set_draining(self, origin: NodeId, node: NodeId, *, is_draining: bool) -> None:
        record = self.records.get(node)
        if record is None:
            raise NotFound(f"no member {node}", hint="see `mesh node ls`")
        if node != origin:
            self.check_server(origin, "drains other nodes")
        self._put(replace(record.member, is_draining=is_draining))

    def remove(self, origin: NodeId, node: NodeId, links: tuple[KeyLink, ...]) -> None:
        """Raises NotFound, NotAllowed, Conflict (the last server; another change of the key came first), Busy."""
        if node not in self.records:
            raise NotFound(f"no member {node}", hint="see `mesh node ls`")
        if node != origin:
            self.check_server(origin, "removes other nodes")
        if self.server_ids() == (node,):
            raise Conflict(f"{node} is the only server of this mesh", hint="let another server join first")
        if len(self.revoked) >= REVOKED_MAX:
            raise Busy(f"{REVOKED_MAX} members were removed from this mesh")
        if links and self.records[node].member.is_server:
            # There may be more than one new: a recovery loses entries, and nobody forgets a key.
            known = len(self.key_links)
            if links[:known] != self.key_links or len(links) <= known:
                raise Conflict("the mesh's key was changed at the same moment", hint="try again")
            self.key_links = links
        del self.records[node]
        self.revoked[node] = None
        self._moment.events.append(MembersChanged())

    def check_server(
        self, origin: NodeId, what: str, *, hint: str = "ask a server: `mesh node ls` shows which nodes are"
    ) -> None:
        """Workers run code that nobody trusts: whoever has taken one over shall not have the mesh (protocol.md 1)."""
        record = self.records.get(origin)
        if record is None or not record.member.is_server:
            name = origin if record is None else record.member.name or origin
            raise NotAllowed(f"only a server {what}, and {name} is a worker only", hint=hint)

    def _put(self, member: Member) -> None:
        record = self.records[member.node]
        if record.member != member:
            self.records[member.node] = replace(record, member=member)
            self._moment.events.append(MembersChanged())

    def create_token(self, origin: NodeId, command: CreateToken) -> Accepted:
        if command.role == "admin":
            # With one, any server would do in its own name what it refuses to a worker.
            self.check_server(origin, "makes tokens for administrators")
        if command.role not in TOKEN_ROLES:
            raise InvalidRequest(f"{command.role!r} is no role of a token", hint="one of " + ", ".join(TOKEN_ROLES))
        if not command.name:
            raise InvalidRequest("a token needs a name")
        token = self.tokens.get(command.secret_hash)
        if token is not None and (token.name, token.role) == (command.name, command.role):
            return Accepted()
        if token is not None or any(other.name == command.name for other in self.tokens.values()):
            raise Conflict(f"there is a token named {command.name}", hint=f"mesh token revoke {command.name}")
        if len(self.tokens) >= TOKENS_MAX:
            raise Busy(f"{TOKENS_MAX} tokens exist", hint="revoke some: mesh token revoke")
        self.tokens[command.secret_hash] = Token(command.name, command.role, self._moment.wall_ms, command.secret_hash)
        return Accepted()

    def revoke_token(self, origin: NodeId, command: RevokeToken) -> Accepted:
        for secret_hash, token in self.tokens.items():
            if token.name == command.name:
                if token.role == "admin":
                    self.check_server(origin, "revokes tokens of administrators")
                del self.tokens[secret_hash]
                return Accepted()
        raise NotFound(f"no token named {command.name}", hint="see `mesh token ls`")


def _check_addresses(addresses: tuple[str, ...]) -> None:
    if len(addresses) > ADDRESSES_MAX or any(len(address) > ADDRESS_CHARS_MAX for address in addresses):
        raise InvalidRequest(f"a member has at most {ADDRESSES_MAX} addresses of {ADDRESS_CHARS_MAX} characters")
