"""Meshes of real gossip cores on virtual time: how soon a death is seen, who is wronged, and what quiet costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from meshd.gossip import membership
from meshd.gossip.core import Gossip
from meshd.gossip.membership import State
from tests.sim.gossip_world import World

DEAD, ALIVE = {State.DEAD}, {State.ALIVE}

SIZES = [(3, 20), (10, 8), (50, 1)]
"""Nodes, and seeds for as many; a larger mesh averages over more in one run."""


def each_seed(sizes: list[tuple[int, int]] = SIZES) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("size", "seed"), [(size, seed) for size, seeds in sizes for seed in range(seeds)])


def settled(size: int, seed: int, **network: float) -> World:
    world = World(size, seed, **network)
    return world.run(4_000)


@each_seed()
def test_a_killed_node_is_seen_dead_by_all_within_five_seconds_and_whole_again_after_its_restart(
    size: int, seed: int
) -> None:
    world = settled(size, seed)
    victim = world.ids[0]
    world.publish(victim, "offer", b"before")
    world.publish(victim, "blob/1", b"")
    world.run(1_000)

    world.kill(victim)
    assert world.run_until(lambda: world.seen(victim) == DEAD, 5_000) <= 3_000, "its lost connections were noticed"

    world.run(5_000)
    world.restart(victim)
    world.publish(victim, "offer", b"after")

    def is_whole() -> bool:
        offers = {node.core.facts.fact(victim, "offer") for node in world.up()}
        return world.seen(victim) == ALIVE and world.is_settled() and offers == {b"after"}

    world.run_until(is_whole, 5_000)
    assert {node.core.holders("1") for node in world.up()} == {()}, "what its earlier life had is not its own any more"


@each_seed()
def test_a_machine_that_loses_power_is_seen_dead_by_all_without_any_hint(size: int, seed: int) -> None:
    world = settled(size, seed)
    world.kill(world.ids[1], seen=False)

    world.run_until(lambda: world.seen(world.ids[1]) == DEAD, 5_000)


@each_seed()
def test_a_node_that_is_back_within_two_seconds_never_counts_as_dead(size: int, seed: int) -> None:
    world = settled(size, seed)
    world.kill(world.ids[0])
    world.run(1_500)
    world.restart(world.ids[0])
    world.run(8_000)

    assert world.is_settled() and State.DEAD not in {state for *_, state in world.changes}


@each_seed([(3, 10), (10, 4)])
def test_a_restart_overtakes_the_objections_of_the_life_before(size: int, seed: int) -> None:
    world = settled(size, seed)
    victim = world.ids[0]
    for _ in range(3):
        world.pause(victim)
        world.run(6_000)
        world.resume(victim)
        world.run(3_000)
    before = world.nodes[victim].core.liveness()[victim].incarnation
    assert before > world.nodes[victim].life + 1, "its next start counts for less than what it has objected with"

    world.kill(victim)
    world.run(100)
    world.restart(victim)
    world.publish(victim, "offer", b"after")
    world.run(4_000)

    assert world.seen(victim) == ALIVE and world.is_settled()
    assert {node.core.facts.fact(victim, "offer") for node in world.up()} == {b"after"}
    assert world.nodes[victim].core.liveness()[victim].incarnation > before


@each_seed()
def test_a_paused_node_is_taken_back_within_five_seconds_and_blames_nobody(size: int, seed: int) -> None:
    world = settled(size, seed)
    paused = world.ids[0]
    world.pause(paused)
    world.run(20_000)
    assert world.seen(paused) == DEAD

    changes = len(world.changes)
    world.resume(paused)
    world.run_until(lambda: world.seen(paused) == ALIVE and world.is_settled(), 5_000)
    world.run(3_000)

    assert [change for change in world.changes[changes:] if change[1] == paused] == []


@each_seed([(3, 20), (10, 5)])
def test_a_node_that_wakes_gives_the_accused_their_time_to_object(size: int, seed: int) -> None:
    world = settled(size, seed)
    slow, asleep = world.ids[:2]
    world.pause(slow)
    world.run_until(lambda: world.nodes[asleep].core.liveness()[slow].state is State.SUSPECT, 5_000)
    world.pause(asleep)
    world.resume(slow)
    world.run(20_000)

    world.resume(asleep)
    world.run(10_000)

    assert State.DEAD not in {state for _, at, about, state in world.changes if (at, about) == (asleep, slow)}


@each_seed([(4, 6), (10, 4), (50, 1)])
def test_the_halves_of_a_partition_bury_each_other_and_find_together_again(size: int, seed: int) -> None:
    world = settled(size, seed)
    half = world.ids[: size // 2]
    world.split(half)
    world.run(10_000)
    one, other = world.nodes[half[0]].core, world.nodes[world.ids[-1]].core
    assert {one.liveness()[node].state for node in world.ids[size // 2 :]} == DEAD
    assert {one.liveness()[node].state for node in half} == ALIVE
    world.publish(half[0], "leader", b"us")
    assert other.facts.fact(half[0], "leader") is None

    world.heal()
    world.run_until(world.is_settled, 5_000)

    assert all(world.seen(node) == ALIVE for node in world.ids)
    assert other.facts.fact(half[0], "leader") == b"us"


@each_seed([(3, 10), (10, 5), (50, 1)])
def test_five_percent_loss_kills_nobody(size: int, seed: int) -> None:
    world = settled(size, seed, loss=0.05)
    world.run(30_000 if size < 50 else 8_000)

    assert [change for change in world.changes if change[3] is State.DEAD] == []


@each_seed()
def test_a_new_fact_is_everywhere_within_two_seconds(size: int, seed: int) -> None:
    world = settled(size, seed, loss=0.02)
    world.publish(world.ids[0], "offer", b"new")

    def is_everywhere() -> bool:
        return all(node.core.facts.fact(world.ids[0], "offer") == b"new" for node in world.up())

    world.run_until(is_everywhere, 2_000)


def quiet_cost(size: int) -> float:
    """Bytes sent per node and second when nothing happens, and nobody has anything to compare."""
    world = settled(size, seed=1)
    world.run(2_000)
    assert world.is_settled()
    sent = world.bytes_sent
    exchanges = sum(node.core.counters()["exchanges"] for node in world.up())
    world.run(5_000)
    assert sum(node.core.counters()["exchanges"] for node in world.up()) == exchanges
    return (world.bytes_sent - sent) / 5 / size


def test_a_quiet_mesh_costs_each_node_the_same_from_10_to_200() -> None:
    small, large = quiet_cost(10), quiet_cost(200)

    assert large <= small * 1.05 < 500, "bytes a second: two pings and their answers"


def test_a_newcomer_gets_megabytes_while_small_news_still_passes() -> None:
    world = settled(3, seed=1)
    giver, reader = world.ids[:2]
    world.kill(reader)
    for number in range(19_000):
        world.nodes[giver].core.publish(f"blob/{number:064x}", b"")
    world.run(10_000)
    world.restart(reader)
    core = world.nodes[reader].core
    world.run(200)
    world.publish(world.ids[2], "offer", b"small")

    world.run_until(lambda: core.facts.fact(world.ids[2], "offer") == b"small", 1_000)
    world.run_until(lambda: len(core.facts.facts("blob/")) == 19_000, 5_000)


def test_a_seed_is_a_complete_description_of_a_run() -> None:
    assert settled(5, 7, loss=0.1).digest() == settled(5, 7, loss=0.1).digest() != settled(5, 8, loss=0.1).digest()


# --- the rules are needed: without them, the promises above break ---------------------------------------------------


def without_objection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership.Membership, "_on_claim_about_me", lambda *_: None)


def without_stall_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "STALL_MS", 2**53)


def without_trying_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "DEAD_PERIOD_MS", 2**53)


def without_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gossip, "swap", lambda *_: None)


@pytest.mark.parametrize(
    ("rule_out", "broken", "size", "seed"),
    [
        (without_objection, test_five_percent_loss_kills_nobody, 10, 0),
        (without_objection, test_a_paused_node_is_taken_back_within_five_seconds_and_blames_nobody, 3, 0),
        (without_stall_check, test_a_node_that_wakes_gives_the_accused_their_time_to_object, 3, 0),
        (without_trying_the_dead, test_the_halves_of_a_partition_bury_each_other_and_find_together_again, 10, 0),
        (without_exchanges, test_the_halves_of_a_partition_bury_each_other_and_find_together_again, 10, 0),
    ],
)
def test_the_promise_breaks_without_the_rule(
    monkeypatch: pytest.MonkeyPatch,
    rule_out: Callable[[pytest.MonkeyPatch], None],
    broken: Callable[[int, int], None],
    size: int,
    seed: int,
) -> None:
    rule_out(monkeypatch)

    with pytest.raises(AssertionError):
        broken(size, seed)
