"""What gossip costs a node, by the size of the mesh: `python -m bench.scale_gossip [--nodes 3 10 100 1000]`.

The real core in a few nodes of a mesh that stands: all know one another and say the same. Each of the few pings whom it
chooses, for a while of virtual time; whoever it pings is one of the few, in turn, under the other's name. In a mesh at
rest all roots are equal, so that an answer is an answer. Every node sends as much as it receives, on average, so what
the few send, and are answered, is what any node sends and answers. Then one node says something new, and each that hears
of it tells three others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from bench.mesh import load
from meshd import codec
from meshd.gossip.core import Exchange, Gossip, Tell
from meshd.gossip.membership import Probe, ProbeEnded, Tick
from meshd.gossip.messages import CHUNKS_PER_NEWS_MAX, CLAIMS_PER_NEWS_MAX, Beat, News
from meshd.model import BackendOffer, NodeId, Offer, Resources
from meshd.neighbours import ADDRESS_FACT, LEADER_FACT, OFFER_FACT
from meshd.testing.gossiping import sign_as, verify

NODES = (3, 10, 100, 1_000)
QUIET_MS = 20_000
CHANGES = 50
OFFER = Offer(backends=(BackendOffer("wasm"), BackendOffer("process")), resources=Resources(cpu_milli=8_000))


@dataclass(frozen=True, slots=True)
class Cost:
    nodes: int
    pings_a_s: float
    """A node's, and as many answers to others."""
    bytes_a_s: float
    """Sent by a node at rest: pings and answers, without what carries them."""
    cpu_ms_a_s: float
    news_bytes: float
    """Sent by a node for one thing that any node says anew …"""
    news_us: float
    """… and its CPU."""
    all_bytes: int
    """What everybody says, as a newcomer gets it."""
    memory_kb: float
    """Of all that one node knows."""


def node_id(number: int) -> NodeId:
    return NodeId(f"12D3KooW{number:044d}")


def speaker(number: int) -> Gossip:
    """A node that has said what all nodes say; nobody else is known."""
    me = node_id(number)
    core = Gossip(me, 1, Random(number), sign_as(me), verify)
    core.set_members([me], 1)
    core.publish(ADDRESS_FACT, codec.encode(((f"/ip4/10.0.0.{number % 250}/tcp/7400",), "10.0.0.1:7401")))
    core.publish(OFFER_FACT, codec.encode(OFFER))
    if number == 0:
        core.publish(LEADER_FACT, codec.encode(7))
    core.handle(Tick(), 1)
    return core


def everything(nodes: int) -> list[News]:
    chunks = []
    claims = []
    for number in range(nodes):
        core = speaker(number)
        chunks += [chunk for owner in core.facts._owners.values() for chunk in owner.chunks.values()]
        claims.append(core._membership.claim)
    step = min(CHUNKS_PER_NEWS_MAX, CLAIMS_PER_NEWS_MAX)
    return [
        News(tuple(chunks[at : at + step]), tuple(claims[at : at + step]))
        for at in range(0, max(len(chunks), len(claims)), step)
    ]


class Few:
    """A mesh of which only some nodes are there."""

    def __init__(self, nodes: int) -> None:
        self.ids = [node_id(number) for number in range(nodes)]
        news = everything(nodes)
        self.claims = {claim.node: claim for each in news for claim in each.claims}
        bodies = [codec.encode(each) for each in news]
        self.all_bytes = sum(map(len, bodies))
        tracemalloc.start()
        self.one = self._knowing_all(0, bodies)
        self.memory = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        self.now_ms = 1_000_000

    def _knowing_all(self, number: int, bodies: list[bytes]) -> Gossip:
        core = speaker(number)
        core.set_members(self.ids, 1)
        for body in bodies:
            core.told(self.ids[-1], body, 1)
        # What it tells on of all this, and the probes of its start, are not what a mesh at rest says.
        for at_ms in range(500, 1_000_000, 500):
            self._turn(core, at_ms)
            if not core._has_news and at_ms > 20_000:
                break
        return core

    def _turn(self, core: Gossip, now_ms: int) -> tuple[int, int]:
        """Bytes that it sends, and how many pings, in one turn; everybody answers."""
        sent = pings = 0
        for effect in core.handle(Tick(), now_ms):
            match effect:
                case Probe(probe, peer, _):
                    sent += len(core.ping(peer))
                    pings += 1
                    core.ponged(peer, self.beat(core, peer), now_ms)
                    core.exchange_ended()
                    core.handle(ProbeEnded(probe, True), now_ms)
                case Tell(peers, body):
                    sent += len(peers) * len(body)
                case Exchange():
                    core.exchange_ended()
                case _:
                    pass
        return sent, pings

    def beat(self, core: Gossip, peer: NodeId) -> bytes:
        return codec.encode(Beat(core.root, self.claims[peer]))

    def quiet(self, for_ms: int) -> tuple[int, int, float]:
        """Bytes sent, pings sent, CPU in seconds; as many pings come as go."""
        core, random = self.one, Random(1)
        self.now_ms = core.due_ms
        until_ms = self.now_ms + for_ms
        sent = pings = 0
        others = self.ids[1:]
        start = time.thread_time()
        while self.now_ms < until_ms:
            more, asked = self._turn(core, self.now_ms)
            sent, pings = sent + more, pings + asked
            for peer in random.choices(others, k=asked):
                answer, _ = core.pinged(peer, self.beat(core, peer), self.now_ms)
                sent += len(answer)
            self.now_ms = max(core.due_ms, self.now_ms + 1)
        return sent, pings, time.thread_time() - start

    def news(self, changes: int) -> tuple[int, float]:
        """Bytes sent and CPU for so many things that another node says anew, one a second."""
        core, other = self.one, speaker(1)
        sent, cpu_s = 0, 0.0
        for change in range(changes):
            other.publish("blob/" + f"{change:064x}", b"")
            [chunk] = other.facts.seal()
            body = codec.encode(News((chunk,), ()))
            self.now_ms += 1_000
            start = time.thread_time()
            _, effects = core.told(self.ids[1], body, self.now_ms)
            cpu_s += time.thread_time() - start
            sent += sum(len(each.peers) * len(each.body) for each in effects if isinstance(each, Tell))
        return sent, cpu_s


def cost(nodes: int) -> Cost:
    mesh = Few(nodes)
    sent, pings, cpu_s = mesh.quiet(QUIET_MS)
    told, news_s = mesh.news(CHANGES)
    seconds = QUIET_MS / 1000
    return Cost(
        nodes=nodes,
        pings_a_s=pings / seconds,
        bytes_a_s=sent / seconds,
        cpu_ms_a_s=1e3 * cpu_s / seconds,
        news_bytes=told / CHANGES,
        news_us=1e6 * news_s / CHANGES,
        all_bytes=mesh.all_bytes,
        memory_kb=mesh.memory / 1024,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=NODES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    rows = [cost(nodes) for nodes in options.nodes]
    print(
        f"{'nodes':>6} {'pings/s':>8} {'bytes/s':>8} {'ms/s':>6} {'news bytes':>10} {'us':>6} {'all bytes':>10} {'KB':>8}"
    )
    for row in rows:
        print(
            f"{row.nodes:>6} {row.pings_a_s:>8.1f} {row.bytes_a_s:>8.0f} {row.cpu_ms_a_s:>6.2f} {row.news_bytes:>10.0f}"
            f" {row.news_us:>6.0f} {row.all_bytes:>10} {row.memory_kb:>8.0f}"
        )
    print(f"CPU of one thread; {load()}")
    if options.json:
        options.json.write_text(json.dumps({"load": load(), "costs": [asdict(row) for row in rows]}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
