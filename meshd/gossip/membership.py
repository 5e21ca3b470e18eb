"""Who is alive, as far as this node can tell: SWIM with Lifeguard's doubts about oneself.

                    a probe fails here, or someone says so
        ALIVE ───────────────────────────────────────────────▶ SUSPECT ── no objection in time ──▶ DEAD
          ▲                                                        │                                 │
          └──────── a claim of a higher incarnation, signed by the node itself ────────────────────┘

Two claims can be made about a node in an incarnation: it lives, or it is accused. An
accusation counts for more; a higher incarnation for more still, and only the node itself
can prove one. So claims are mergeable and a replay changes nothing. Whoever speaks to an
accused node tells it so, some do at once, and it objects with its next incarnation. Death
is never hearsay: each node concludes it by itself, after the same time to object.

Sources: SWIM (Das 2002), Lifeguard (HashiCorp 2017). Unlike there, the members are given
(they are in the replicated state), so the dead stay in the table and are tried now and
then, which is how the halves of a partition find each other again.

Times are integer milliseconds of one monotonic clock. Call `handle` with a `Tick` at `due_ms` at the latest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from typing import assert_never

from meshd.gossip.messages import Claim, life_payload
from meshd.model import NodeId

PERIOD_MS = 500
"""One probe each. With 50 nodes an unannounced death is noticed within 2.3 s in 99 of 100 cases."""

CONTACT_MS = 900
"""Whoever spoke to us this recently needs no probe. Halves what a quiet mesh of three costs; hardly matters from ten on."""

PROBE_MS = 400
"""A member on a LAN answers in a few ms; a loop that is busy for longer is worth a second opinion."""

RELAY_MS = 500
"""Through others: theirs is a probe of 350 ms, plus the way."""

SUSPICION_MS = 1800
"""To object. With noticing, probe and relays it is under 5 s on a LAN, and about 3 s after a lost connection."""

DEAD_PERIOD_MS = 1000
"""How often one of the dead is tried."""

STALL_MS = 1000
"""Later than this for its own timer, a node was paused or starved: what it then believes of others is worthless."""

RELAYS = 2
"""Second opinions: with 5 % loss, a probe and two relays all fail for a living node in 1 of 300 cases."""

ROUND_STEPS_MAX = 16
"""Members passed over in one turn; in a small mesh this is all of them, in a large one few are passed over."""

PROBES_MAX = 64
"""In flight. A mesh that falls apart is probed on in the rounds to come."""

WITNESSES = 8
"""How many nodes, on average, probe a member at once when they hear it accused: enough to be sure that it hears of it."""

DOUBT_MAX = 3
"""Lifeguard's local health: a node in doubt about itself waits up to 1 + this times longer."""

Sign = Callable[[bytes], bytes]
Verify = Callable[[NodeId, bytes, bytes], bool]


class State(StrEnum):
    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Health:
    """What this node believes of another, and since when (its own clock)."""

    state: State
    since_ms: int
    incarnation: int


# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """`due_ms` has come."""


@dataclass(frozen=True, slots=True)
class MembersSet:
    nodes: frozenset[NodeId]


@dataclass(frozen=True, slots=True)
class PeerUp:
    """The transport has a new connection to this peer."""

    peer: NodeId


@dataclass(frozen=True, slots=True)
class PeerDown:
    """The transport lost its last connection to this peer."""

    peer: NodeId


@dataclass(frozen=True, slots=True)
class Heard:
    """Claims from a peer. `is_first_hand`: the peer itself spoke to us just now."""

    source: NodeId
    claims: tuple[Claim, ...]
    is_first_hand: bool = False


@dataclass(frozen=True, slots=True)
class ProbeEnded:
    """A direct probe came back; what it brought was told by `Heard` before."""

    probe: int
    answered: bool


@dataclass(frozen=True, slots=True)
class RelayEnded:
    """A relay reached the target, or could not (False), or did not answer itself (None)."""

    probe: int
    reached: bool | None


Event = Tick | MembersSet | PeerUp | PeerDown | Heard | ProbeEnded | RelayEnded


# --- effects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Probe:
    """Ping the peer; report `ProbeEnded`."""

    probe: int
    peer: NodeId
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class Relay:
    """Ask `relay` to ping `target`; report `RelayEnded`."""

    probe: int
    relay: NodeId
    target: NodeId
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class Spread:
    """The claim about this node is new here: tell others, and `to` in any case."""

    node: NodeId
    to: NodeId | None = None


@dataclass(frozen=True, slots=True)
class Changed:
    """A member's state is another one now."""

    node: NodeId
    state: State


Effect = Probe | Relay | Spread | Changed


@dataclass(slots=True)
class _Peer:
    claim: Claim
    state: State = State.ALIVE
    since_ms: int = 0
    dies_ms: int = 0
    """When suspicion becomes death."""
    contact_ms: int = -(2**53)
    """When it last spoke to us itself."""


@dataclass(slots=True)
class _Probing:
    target: NodeId
    incarnation: int
    started_ms: int
    relays_out: int = 0
    silent: int = 0


@dataclass(slots=True)
class MembershipCounters:
    forged: int = 0
    strangers: int = 0
    accusations: int = 0
    """Raised here."""
    objections: int = 0
    """Times this node was accused and objected."""
    stalls: int = 0
    deaths: int = 0


@dataclass(slots=True)
class _Turn:
    """What one call of `handle` decided."""

    now_ms: int
    effects: list[Effect] = field(default_factory=list)


class Membership:
    def __init__(self, me: NodeId, incarnation: int, rng: Random, sign: Sign, verify: Verify) -> None:
        self._me = me
        self._rng = rng
        self._sign = sign
        self._verify = verify
        self._mine = self._new_claim(incarnation)
        self._peers: dict[NodeId, _Peer] = {}
        # Few at a time, so that a quiet tick costs the same in every mesh. Ordered, so that a seed decides a run.
        self._suspects: dict[NodeId, _Peer] = {}
        self._dead: dict[NodeId, _Peer] = {}
        self._order: list[NodeId] = []
        self._probes: dict[int, _Probing] = {}
        self._last_probe = 0
        self._doubt = 0
        self._next_probe_ms = 0
        self._next_dead_ms = 0
        self.due_ms = 0
        self.counters = MembershipCounters()

    # --- what others ask ---

    @property
    def claim(self) -> Claim:
        """This node's own, with its proof."""
        return self._mine

    @property
    def doubt(self) -> int:
        """0 when this node trusts its own timing, at most `DOUBT_MAX`."""
        return self._doubt

    def claim_about(self, node: NodeId) -> Claim | None:
        if node == self._me:
            return self._mine
        peer = self._peers.get(node)
        return peer.claim if peer is not None else None

    def accusation_of(self, node: NodeId) -> Claim | None:
        """What must be told to this node whenever it is spoken to, so that it can object."""
        peer = self._peers.get(node)
        return peer.claim if peer is not None and peer.claim.is_accused else None

    def health(self, node: NodeId) -> Health | None:
        peer = self._peers.get(node)
        return Health(peer.state, peer.since_ms, peer.claim.incarnation) if peer is not None else None

    def members(self) -> tuple[NodeId, ...]:
        """All but this node."""
        return tuple(self._peers)

    def some_alive(self, count: int, *, without: Iterable[NodeId] = ()) -> list[NodeId]:
        """Up to `count` random members that are alive."""
        left_out = set(without)
        alive = [node for node, peer in self._peers.items() if peer.state is State.ALIVE and node not in left_out]
        return self._rng.sample(alive, min(count, len(alive)))

    # --- the decision ---

    def handle(self, event: Event, now_ms: int) -> list[Effect]:
        turn = _Turn(now_ms)
        if self.due_ms and now_ms - self.due_ms > STALL_MS:
            self._on_stall(now_ms - self.due_ms)
        match event:
            case Tick():
                pass
            case MembersSet(nodes):
                self._on_members(nodes, turn)
            case PeerUp(peer):
                if (known := self._peers.get(peer)) is not None and (
                    known.state is not State.ALIVE or not known.claim.incarnation
                ):
                    self._probe(peer, turn)
            case PeerDown(peer):
                if (known := self._peers.get(peer)) is not None and known.state is State.ALIVE:
                    self._probe(peer, turn)
            case Heard():
                self._on_heard(event, turn)
            case ProbeEnded(probe, answered):
                self._on_probe_ended(probe, answered, turn)
            case RelayEnded(probe, reached):
                self._on_relay_ended(probe, reached, turn)
            case _:
                assert_never(event)
        self._on_time(turn)
        return turn.effects

    def _on_members(self, nodes: frozenset[NodeId], turn: _Turn) -> None:
        new = sorted(nodes - {self._me} - self._peers.keys())
        for node in new:
            self._peers[node] = _Peer(Claim(node, 0, False), since_ms=turn.now_ms)
        # First in the round, but one by one and each node in its own order: nobody is pinged by all at once.
        self._rng.shuffle(new)
        self._order += new
        for node in self._peers.keys() - nodes:
            del self._peers[node]
            self._suspects.pop(node, None)
            self._dead.pop(node, None)

    def _on_heard(self, event: Heard, turn: _Turn) -> None:
        if event.is_first_hand and (peer := self._peers.get(event.source)) is not None:
            peer.contact_ms = turn.now_ms
        for claim in event.claims:
            if claim.node == self._me:
                self._on_claim_about_me(claim, event.source, turn)
            elif (known := self._peers.get(claim.node)) is not None:
                self._on_claim(claim, known, turn)
            else:
                self.counters.strangers += 1

    def _on_claim_about_me(self, claim: Claim, source: NodeId, turn: _Turn) -> None:
        mine = self._mine.incarnation
        if claim.incarnation < mine or (claim.incarnation == mine and not claim.is_accused):
            return
        if claim.incarnation > mine and not self._is_proven(claim):
            self.counters.forged += 1
            return
        # Accused; or an older life of ours, under a clock that ran ahead, still counts for more.
        self._mine = self._new_claim(claim.incarnation + 1)
        self.counters.objections += 1
        self._doubt = min(DOUBT_MAX, self._doubt + 1)
        turn.effects.append(Spread(self._me, to=source))

    def _on_claim(self, claim: Claim, peer: _Peer, turn: _Turn) -> None:
        known = peer.claim
        if (claim.incarnation, claim.is_accused) <= (known.incarnation, known.is_accused):
            return
        if claim.incarnation == known.incarnation:
            claim = Claim(known.node, known.incarnation, claim.is_accused, known.proof)
        elif not self._is_proven(claim):
            self.counters.forged += 1
            return
        peer.claim = claim
        turn.effects.append(Spread(claim.node))
        if not claim.is_accused:
            self._move(claim.node, peer, State.ALIVE, turn)
            return
        # Of a dead node in a newer incarnation: it lived meanwhile, so it gets its time again.
        peer.dies_ms = turn.now_ms + SUSPICION_MS * (1 + self._doubt)
        self._move(claim.node, peer, State.SUSPECT, turn)
        if self._rng.random() * len(self._peers) < WITNESSES:
            self._probe(claim.node, turn)

    def _on_probe_ended(self, number: int, answered: bool, turn: _Turn) -> None:
        probing = self._probes.get(number)
        if probing is None:
            return
        if answered:
            del self._probes[number]
            self._doubt = max(0, self._doubt - 1)
            return
        peer = self._peers.get(probing.target)
        relays = self.some_alive(RELAYS, without=[probing.target]) if peer and peer.state is State.ALIVE else []
        probing.relays_out = len(relays)
        for relay in relays:
            turn.effects.append(Relay(number, relay, probing.target, RELAY_MS * (1 + self._doubt)))
        if not relays:
            self._conclude(number, turn)

    def _on_relay_ended(self, number: int, reached: bool | None, turn: _Turn) -> None:
        probing = self._probes.get(number)
        if probing is None:
            return
        if reached:
            del self._probes[number]
            return
        probing.relays_out -= 1
        probing.silent += reached is None
        if probing.relays_out == 0:
            self._conclude(number, turn)

    def _conclude(self, number: int, turn: _Turn) -> None:
        """Nobody reached the target. Unless it spoke meanwhile, accuse it."""
        probing = self._probes.pop(number)
        # Relays that keep silent too make it likelier that the fault is here (Lifeguard).
        self._doubt = min(DOUBT_MAX, self._doubt + probing.silent)
        peer = self._peers.get(probing.target)
        if peer is None or peer.contact_ms > probing.started_ms or peer.claim.incarnation != probing.incarnation:
            return
        if peer.state is State.ALIVE:
            self.counters.accusations += 1
            peer.claim = Claim(probing.target, probing.incarnation, True, peer.claim.proof)
            peer.dies_ms = turn.now_ms + SUSPICION_MS * (1 + self._doubt)
            turn.effects.append(Spread(probing.target))
            self._move(probing.target, peer, State.SUSPECT, turn)

    def _on_stall(self, late_ms: int) -> None:
        """This node was away: what it waited for may long have been there, and nobody could object to it."""
        self.counters.stalls += 1
        self._probes.clear()
        self._doubt = min(DOUBT_MAX, self._doubt + 1)
        for peer in self._suspects.values():
            peer.dies_ms += late_ms

    def _on_time(self, turn: _Turn) -> None:
        now_ms = turn.now_ms
        for node, peer in list(self._suspects.items()):
            if peer.dies_ms <= now_ms:
                self.counters.deaths += 1
                self._move(node, peer, State.DEAD, turn)
        if now_ms >= self._next_probe_ms:
            self._next_probe_ms = now_ms + PERIOD_MS
            self._probe_next(turn)
        if now_ms >= self._next_dead_ms:
            self._next_dead_ms = now_ms + DEAD_PERIOD_MS
            if self._dead:
                self._probe(self._rng.choice(list(self._dead)), turn)
        dying = (peer.dies_ms for peer in self._suspects.values())
        self.due_ms = min(self._next_probe_ms, self._next_dead_ms, *dying)

    def _probe_next(self, turn: _Turn) -> None:
        """The next of a random round of all; whoever has just spoken to us needs no probe."""
        is_in_touch = False
        for _ in range(ROUND_STEPS_MAX):
            if not self._order:
                self._order = list(self._peers)
                self._rng.shuffle(self._order)
            if not self._order:
                return
            node = self._order.pop()
            peer = self._peers.get(node)
            if peer is None or peer.state is State.DEAD:
                continue
            if turn.now_ms - peer.contact_ms < CONTACT_MS:
                is_in_touch = True
                continue
            self._probe(node, turn)
            return
        if is_in_touch:
            self._doubt = max(0, self._doubt - 1)

    def _probe(self, node: NodeId, turn: _Turn) -> None:
        if len(self._probes) >= PROBES_MAX or any(probing.target == node for probing in self._probes.values()):
            return
        self._last_probe += 1
        self._probes[self._last_probe] = _Probing(node, self._peers[node].claim.incarnation, turn.now_ms)
        turn.effects.append(Probe(self._last_probe, node, PROBE_MS * (1 + self._doubt)))

    def _move(self, node: NodeId, peer: _Peer, state: State, turn: _Turn) -> None:
        if peer.state is not state:
            self._suspects.pop(node, None)
            self._dead.pop(node, None)
            if state is not State.ALIVE:
                (self._suspects if state is State.SUSPECT else self._dead)[node] = peer
            peer.state = state
            peer.since_ms = turn.now_ms
            turn.effects.append(Changed(node, state))

    def _is_proven(self, claim: Claim) -> bool:
        return self._verify(claim.node, life_payload(claim.node, claim.incarnation), claim.proof)

    def _new_claim(self, incarnation: int) -> Claim:
        return Claim(self._me, incarnation, False, self._sign(life_payload(self._me, incarnation)))
