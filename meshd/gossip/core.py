"""One node's gossip: who is alive, everyone's facts, and the talk that keeps them equal.

    quiet      ping a member twice a second; the roots in it agree, and that was all
    news       a changed claim or a new chunk is told to three others at once, who tell it on
    the rest   where a ping finds two roots that differ, compare buckets, then swap what is lacking

The first keeps the cost of a quiet mesh the same whatever its size, the second makes news
fast, the third makes it certain: whoever missed the news gets it from the next ping.

`answer` is what a peer asked; `ping`, `tell` and the three steps of an exchange make what we
ask. Who carries the bytes is not known here (service.py, or a simulator). Malformed input
raises InvalidRequest or TooLarge and changes nothing but a counter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from meshd import codec
from meshd.errors import InvalidRequest, MeshError, NotFound
from meshd.gossip import membership as swim
from meshd.gossip.digest import Tree
from meshd.gossip.facts import Facts, Merged, Verify
from meshd.gossip.membership import Changed, Health, Heard, Membership, Probe, Relay, Spread, State
from meshd.gossip.messages import (
    BUCKETS,
    CHUNKS_PER_NEWS_MAX,
    CLAIMS_PER_NEWS_MAX,
    DELTA_BYTES_MAX,
    MESSAGE_BYTES_MAX,
    Beat,
    Compare,
    News,
    Reach,
    Reached,
    Row,
    SignedChunk,
    Swap,
    Versions,
)
from meshd.gossip.own import Sign
from meshd.model import NodeId

FANOUT = 3
"""Who is told news. Told on by everyone once, it reaches 94 of 100 directly, in about log3(n) hops."""

NEWS_PERIOD_MS = 100
"""The first news leaves at once, later ones together: at most 30 messages a second, however much changes."""

NEWS_BYTES_MAX = 16 << 10
"""Chunks told on their own. What is larger is bulk (a node that starts, or writes itself anew) and is swapped once, not told thrice."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Compare and swap with this peer: `compare`, `swap`, `settle`, then report with `exchange_ended`."""

    peer: NodeId


@dataclass(frozen=True, slots=True)
class Tell:
    """Send these bytes to these peers; losing them costs only time."""

    peers: tuple[NodeId, ...]
    body: bytes


Effect = Probe | Relay | Changed | Exchange | Tell


@dataclass(slots=True)
class GossipCounters:
    malformed: int = 0
    """Messages, or chunks in them, that nobody could have meant."""
    exchanges: int = 0
    tells: int = 0


class Gossip:
    def __init__(self, me: NodeId, incarnation: int, rng: Random, sign: Sign, verify: Verify) -> None:
        self._me = me
        self._rng = rng
        self._membership = Membership(me, incarnation, rng, sign, verify)
        self._facts = Facts(me, incarnation, sign, verify)
        self._tree = Tree()
        self._news_claims: dict[NodeId, None] = {}
        self._news_chunks: list[SignedChunk] = []
        self._news_to: set[NodeId] = set()
        self._next_news_ms = 0
        self._exchanging: NodeId | None = None
        self._counters = GossipCounters()
        self._merged = dict.fromkeys(Merged, 0)
        self._touch([me])

    # --- what is known ---

    @property
    def facts(self) -> Facts:
        """To read. Writing goes through `publish`."""
        return self._facts

    @property
    def root(self) -> bytes:
        """Equal at two nodes that know the same."""
        return self._tree.root

    @property
    def due_ms(self) -> int:
        """Call `handle(Tick(), now)` at this time at the latest."""
        return min(self._membership.due_ms, self._next_news_ms) if self._has_news else self._membership.due_ms

    def health(self, node: NodeId) -> Health | None:
        """None of a node that is no member; this node itself is alive since it started."""
        if node == self._me:
            return Health(State.ALIVE, 0, self._membership.claim.incarnation)
        return self._membership.health(node)

    def liveness(self) -> dict[NodeId, Health]:
        """All members and this node."""
        nodes = (self._me, *self._membership.members())
        return {node: health for node in nodes if (health := self.health(node)) is not None}

    def holders(self, blob: str) -> tuple[NodeId, ...]:
        """Nodes that say they have this blob and are not known to be dead; the surely alive first."""
        found = [(node, health.state) for node in self._facts.who_says(f"blob/{blob}") if (health := self.health(node))]
        found.sort(key=lambda entry: entry[1] is not State.ALIVE)
        return tuple(node for node, state in found if state is not State.DEAD)

    def counters(self) -> dict[str, int]:
        """Everything that was dropped, and why, by name."""
        merged = {f"chunks_{name}": count for name, count in self._merged.items()}
        return asdict(self._counters) | merged | asdict(self._membership.counters) | {"doubt": self._membership.doubt}

    # --- what happens here ---

    def publish(self, key: str, value: bytes | None) -> None:
        """Say this of this node; None takes it back. Leaves with the next `Tick`, which may be called at once.

        Raises InvalidRequest, TooLarge or Busy, see `OwnFacts.set`.
        """
        self._facts.set(key, value)

    def set_members(self, nodes: Iterable[NodeId], now_ms: int) -> list[Effect]:
        members = frozenset(nodes)
        for node in {*self._membership.members()} - members:
            self._tree.drop(node)
        self._facts.set_members(members)
        return self._decide(swim.MembersSet(members), now_ms, [*members])

    def handle(self, event: swim.Event, now_ms: int) -> list[Effect]:
        """Let time pass, or tell what happened to a connection, a probe or a relay."""
        return self._decide(event, now_ms)

    # --- what we ask ---

    def ping(self, peer: NodeId) -> bytes:
        return codec.encode(
            Beat(self._tree.root, self._membership.claim, self._membership.accusation_of(peer)),
        )

    def ponged(self, peer: NodeId, body: bytes, now_ms: int) -> list[Effect]:
        """The answer to our ping. Differing roots start an exchange, one at a time."""
        beat, effects = self._take_beat(peer, body, now_ms)
        if beat.root != self._tree.root and self._exchanging is None:
            self._exchanging = peer
            effects.append(Exchange(peer))
        return effects

    def compare(self) -> bytes:
        """First step of an exchange."""
        self._counters.exchanges += 1
        return codec.encode(Compare(self._tree.hashes))

    def swap(self, versions: bytes) -> bytes | None:
        """Second step: the peer's versions in, what it lacks and our own versions out. None if all is equal by now."""
        theirs = self._decode(versions, Versions)
        if not theirs.buckets:
            return None
        rows = self._tree.rows(theirs.buckets)
        return codec.encode(Swap(theirs.buckets, rows, self._lacking(theirs.buckets, theirs.rows)))

    def settle(self, peer: NodeId, news: bytes, now_ms: int) -> tuple[bool, list[Effect]]:
        """Last step: what we lacked. True when the news was full, so that another round is worth it."""
        body: News = self._decode(news, News)
        full = sum(len(signed.body) for signed in body.chunks) > DELTA_BYTES_MAX // 2
        is_full = full or len(body.chunks) == CHUNKS_PER_NEWS_MAX or len(body.claims) == CLAIMS_PER_NEWS_MAX
        return is_full, self._take_news(peer, body, now_ms)

    def exchange_ended(self) -> None:
        self._exchanging = None

    def reach(self, target: NodeId) -> bytes:
        """What to ask a relay: ping this node for us, and tell it what is held against it."""
        return codec.encode(Reach(target, self._membership.accusation_of(target)))

    def reached(self, relay: NodeId, body: bytes, now_ms: int) -> tuple[bool, list[Effect]]:
        """A relay's answer: did it reach the target?"""
        answer: Reached = self._decode(body, Reached)
        claims = () if answer.claim is None else (answer.claim,)
        return answer.is_reached, self._decide(Heard(relay, claims), now_ms)

    # --- what we are asked ---

    def pinged(self, peer: NodeId, body: bytes, now_ms: int) -> tuple[bytes, list[Effect]]:
        """Answer gossip.ping. Taken in first, so that an accused node's answer is its objection already."""
        _, effects = self._take_beat(peer, body, now_ms)
        return self.ping(peer), effects

    def told(self, peer: NodeId, body: bytes, now_ms: int) -> tuple[bytes, list[Effect]]:
        """Answer gossip.tell."""
        return b"", self._take_news(peer, self._decode(body, News), now_ms)

    def exchanged(self, peer: NodeId, body: bytes, now_ms: int) -> tuple[bytes, list[Effect]]:
        """Answer gossip.exchange, either step."""
        match self._decode(body, Compare | Swap):
            case Compare(hashes):
                buckets = self._tree.differing(hashes, self._rng.randrange(BUCKETS))
                return codec.encode(Versions(buckets, self._tree.rows(buckets))), []
            case Swap(buckets, rows, news):
                # Ours is decided before theirs is taken in, or it would be sent straight back.
                lacking = self._lacking(buckets, rows)
                return codec.encode(lacking), self._take_news(peer, news, now_ms)
            case _:
                raise AssertionError("closed by the decoder")

    def asked_to_reach(self, peer: NodeId, body: bytes, now_ms: int) -> tuple[NodeId, list[Effect]]:
        """Answer gossip.indirect: ping this target with what is held against it, then give `reach_answer`.

        Raises NotFound when the target is no member.
        """
        asked: Reach = self._decode(body, Reach)
        if self._membership.health(asked.target) is None:
            raise NotFound(f"{asked.target} is no member that {self._me} knows")
        claims = () if asked.about is None else (asked.about,)
        return asked.target, self._decide(Heard(peer, claims), now_ms)

    def reach_answer(self, target: NodeId, *, reached: bool) -> bytes:
        return codec.encode(Reached(reached, self._membership.claim_about(target) if reached else None))

    # --- inside ---

    def _decode(self, body: bytes, kind: object) -> Any:
        try:
            return codec.decode(body, kind, bytes_max=MESSAGE_BYTES_MAX)
        except MeshError:
            self._counters.malformed += 1
            raise

    def _take_beat(self, peer: NodeId, body: bytes, now_ms: int) -> tuple[Beat, list[Effect]]:
        beat: Beat = self._decode(body, Beat)
        if beat.mine.node != peer or beat.mine.is_accused or (beat.yours is not None and beat.yours.node != self._me):
            self._counters.malformed += 1
            raise InvalidRequest(f"a ping from {peer} speaks for another node")
        claims = (beat.mine,) if beat.yours is None else (beat.mine, beat.yours)
        return beat, self._decide(Heard(peer, claims, is_first_hand=True), now_ms)

    def _take_news(self, peer: NodeId, news: News, now_ms: int) -> list[Effect]:
        touched = []
        for signed in news.chunks:
            result, owner = self._facts.merge(signed)
            self._merged[result] += 1
            if owner is not None and result in (Merged.NEW, Merged.OVER_LIMIT, Merged.OUTBID):
                touched.append(owner)
                if result is Merged.NEW:
                    self._add_chunk(signed)
        return self._decide(Heard(peer, news.claims), now_ms, touched)

    def _lacking(self, buckets: tuple[int, ...], theirs: tuple[Row, ...]) -> News:
        known = {row.node: row for row in theirs}
        # A node the peer has no row of in a bucket it sent whole is one it knows nothing of.
        rows = [known.get(row.node, Row(row.node)) for row in self._tree.rows(buckets)]
        claims = []
        for row in rows:
            claim = self._membership.claim_about(row.node)
            if claim is not None and (claim.incarnation, claim.is_accused) > (row.life, row.is_accused):
                claims.append(claim)
        return News(self._facts.delta(rows), tuple(claims[:CLAIMS_PER_NEWS_MAX]))

    def _decide(self, event: swim.Event, now_ms: int, touched: Iterable[NodeId] = ()) -> list[Effect]:
        effects: list[Effect] = []
        changed = [*touched]
        for effect in self._membership.handle(event, now_ms):
            match effect:
                case Spread(node, to):
                    changed.append(node)
                    self._news_claims[node] = None
                    if to is not None:
                        self._news_to.add(to)
                case _:
                    effects.append(effect)
        self._touch(changed)
        if self._has_news and now_ms >= self._next_news_ms:
            effects += self._flush_news(now_ms)
        return effects

    def _flush_news(self, now_ms: int) -> list[Effect]:
        self._next_news_ms = now_ms + NEWS_PERIOD_MS
        written = self._facts.seal()
        for signed in written:
            self._add_chunk(signed)
        if written:
            self._touch([self._me])
        nodes = [*self._news_claims][:CLAIMS_PER_NEWS_MAX]
        claims = [claim for node in nodes if (claim := self._membership.claim_about(node)) is not None]
        peers = {*self._membership.some_alive(FANOUT), *self._news_to} - {self._me}
        news = News(tuple(self._news_chunks), tuple(claims))
        self._news_claims = {}
        self._news_chunks = []
        self._news_to = set()
        if not peers or not (news.chunks or news.claims):
            return []
        self._counters.tells += len(peers)
        return [Tell(tuple(sorted(peers)), codec.encode(news))]

    @property
    def _has_news(self) -> bool:
        return bool(self._news_claims or self._news_chunks or not self._facts.is_sealed)

    def _add_chunk(self, signed: SignedChunk) -> None:
        """Only what fits one message is told; the next pings find the rest."""
        size = sum(len(chunk.body) for chunk in self._news_chunks) + len(signed.body)
        if size <= NEWS_BYTES_MAX and len(self._news_chunks) < CHUNKS_PER_NEWS_MAX:
            self._news_chunks.append(signed)

    def _touch(self, nodes: Iterable[NodeId]) -> None:
        """Bring the tree's rows of these nodes up to date."""
        for node in nodes:
            claim = self._membership.claim_about(node)
            if claim is not None:
                incarnation, upto = self._facts.version(node)
                self._tree.put(Row(node, incarnation, upto, claim.incarnation, claim.is_accused))
