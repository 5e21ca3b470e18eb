"""Bits that turn over on the disk of one server at a time, while it is down: what it had acknowledged may be gone."""

from __future__ import annotations

from tests.sim.raft_world import Node, RaftWorld

BLOCK = 4096


def rot(world: RaftWorld, node: Node, *, flips: int = 1) -> None:
    """The process dies, and bits of what it has written turn over."""
    if node.server is not None:
        world.die(node, has_power=world.random.random() < 0.5)
    names = [name for name in node.disk.names() if name.startswith(("journal-", "snapshot-")) and "." not in name]
    journals = [name for name in names if name.startswith("journal-")]
    for _ in range(flips):
        name = world.random.choice(names)
        # Without any header that can be read a server has no name and does not start again.
        first = BLOCK if name == journals[-1] else 0
        # Most of a block is room that no frame needs: there it would not matter.
        if places := [place for place, byte in enumerate(node.disk.read(name)) if byte and place >= first]:
            node.disk.flip(name, world.random.choice(places) * 8 + world.random.randrange(8))
    world.counts["rot"] += 1


def goes_rotting(world: RaftWorld, seconds: float) -> None:
    """Plans it: one server at a time, the next when that one is up and out of doubt."""
    random, end = world.random, world.now + seconds
    rotten: list[Node] = []

    def next_one() -> None:
        if world.now >= end:
            return
        if rotten and rotten[0].server is not None and not rotten[0].server.engine.is_in_doubt:
            rotten.clear()
        if not rotten:
            node = world.nodes[random.choice(world.servers)]
            rotten.append(node)
            rot(world, node, flips=random.choice([1, 1, 3]))
            world.at(random.uniform(0.1, 2), lambda: world.revive(node.name))
        world.at(random.uniform(1, 3), next_one)

    world.at(2.0, next_one)
