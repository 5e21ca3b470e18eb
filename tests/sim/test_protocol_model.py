"""The protocol's promises in every order of events, and each rule seen to be needed.

Sizes are chosen so that all of this takes about 20 s; `states` raised by a factor of ten
found nothing more.
"""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from meshd.model import AttemptKey, OnLost, runs_of
from meshd.raft.state.commands import Leased, OpenSession
from meshd.raft.state.machine import Machine
from meshd.raft.state.matching import Node
from tests.sim.protocol_model import POLICIES, Faults, Model, Rules, Setup

FAULTS = {
    "a lapse": Faults(end=1),
    "two lapses": Faults(end=2, lists=0),
    "a crash and a lapse": Faults(crash=1, end=1),
    "a loss and a copy": Faults(loss=1, twice=1),
    "a lapse and a loss": Faults(end=1, loss=1),
    "a lapse and a copy": Faults(end=1, twice=1),
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("policy", POLICIES)
def test_no_promise_breaks_whatever_the_order(policy: str, faults: Faults) -> None:
    found = Model(Setup((policy,), faults, states=3_000)).explore()
    assert not found.broken, "\n".join(found.trace)


@pytest.mark.parametrize("policies", [("rerun", "rerun"), ("fail", "wait"), ("promise", "rerun")], ids="+".join)
@pytest.mark.parametrize("nodes", [1, 2])
def test_two_tasks_share_the_slots(policies: tuple[str, ...], nodes: int) -> None:
    found = Model(Setup(policies, Faults(end=1, lists=0), nodes=nodes, states=3_000)).explore()
    assert not found.broken, "\n".join(found.trace)


# --- every rule taken out, once ---------------------------------------------------------------------------------------


def adopts_nothing(machine: Machine) -> None:
    machine._leases.adopt = lambda node, key: False  # type: ignore[method-assign]


def adoption_sends_a_notice(machine: Machine) -> None:
    adopt = machine._leases.adopt

    def adopt_and_tell(node: Node, key: AttemptKey) -> bool:
        is_adopted = adopt(node, key)
        if is_adopted:
            machine._moment.events.append(Leased(node.id, node.epoch, *runs_of([key])))
        return is_adopted

    machine._leases.adopt = adopt_and_tell  # type: ignore[method-assign]


def loses_before_it_adopts(machine: Machine) -> None:
    hold = machine._leases.hold_leases

    def hold_and_lose(node: Node) -> None:
        hold(node)
        machine._leases.lose_held(node, "")

    machine._leases.hold_leases = hold_and_lose  # type: ignore[method-assign]


def fills_before_it_adopts(machine: Machine) -> None:
    hold = machine._leases.hold_leases

    def hold_and_fill(node: Node) -> None:
        hold(node)
        machine._sessions._offers = lambda *a: (offers(*a), machine._leases.fill())  # type: ignore[method-assign, func-returns-value, assignment]

    offers = machine._sessions._offers
    machine._leases.hold_leases = hold_and_fill  # type: ignore[method-assign]


def frees_also_newer_leases(machine: Machine) -> None:
    free = machine._leases.free_unheld
    machine._leases.free_unheld = lambda node, fence, held: free(node, 1 << 60, held)  # type: ignore[method-assign]


def opens_any_epoch(machine: Machine) -> None:
    def begin_always(node: Node, command: OpenSession) -> object:
        machine._sessions._begin(node, command)
        return open_(node, command)

    open_ = machine._sessions.open
    machine._sessions.open = begin_always  # type: ignore[method-assign, assignment]


def opening_leaves_old_leases(machine: Machine) -> None:
    machine._leases.hold_leases = lambda node: None  # type: ignore[method-assign]


def reconcile_frees_nothing(machine: Machine) -> None:
    machine._leases.free_unheld = lambda node, fence, held: None  # type: ignore[method-assign]


def treats_all_as_rerun(machine: Machine) -> None:
    for job in machine._queue.jobs.values():
        job.spec = replace(job.spec, on_lost=OnLost.RERUN, lost_after_ms=1)


ABLATIONS: dict[str, tuple[Setup, str]] = {
    "the node's floor": (Setup(("fail",), rules=Rules(floor=False)), "cg"),
    "the fence in Reconcile": (Setup(("fail",), break_machine=frees_also_newer_leases), "cg"),
    "Reconcile": (Setup(("rerun",), Faults(loss=1), break_machine=reconcile_frees_nothing), "d"),
    "adoption": (Setup(("wait",), Faults(end=1), break_machine=adopts_nothing), "h"),
    "adopting before losing": (Setup(("fail",), Faults(end=1), break_machine=loses_before_it_adopts), "h"),
    "adopting before filling": (
        Setup(("rerun", "rerun"), Faults(end=1, lists=0), nodes=1, break_machine=fills_before_it_adopts),
        "g",
    ),
    "adoption without a notice": (Setup(("fail",), Faults(end=1), break_machine=adoption_sends_a_notice), "ce"),
    "listing what has ended": (Setup(("fail",), Faults(end=1), rules=Rules(lists_ended=False)), "ch"),
    "the names in the answer to an opening": (
        Setup(("rerun",), Faults(end=2, lists=0), rules=Rules(drops_unnamed=False)),
        "g",
    ),
    "keeping what the node stopped by itself": (
        Setup(("fail",), Faults(end=1), rules=Rules(keeps_stopped=False)),
        "c",
    ),
    "the view from the sending": (
        Setup(("promise",), Faults(end=2, lists=0), rules=Rules(view_from_sending=False), states=40_000),
        "b",
    ),
    "rising epochs": (Setup(("fail",), Faults(end=1, twice=1), break_machine=opens_any_epoch, states=20_000), "acdh"),
    "an opening ends the older epoch": (Setup(("fail",), Faults(crash=1), break_machine=opening_leaves_old_leases), "c"),
    "`wait` waits": (Setup(("wait",), Faults(end=1), break_machine=treats_all_as_rerun), "b"),
    "`fail` fails": (Setup(("fail",), Faults(end=1), break_machine=treats_all_as_rerun), "c"),
}  # fmt: skip


@pytest.mark.parametrize(("setup", "promises"), ABLATIONS.values(), ids=ABLATIONS)
def test_without_the_rule_a_promise_breaks(setup: Setup, promises: str) -> None:
    found = Model(setup).explore()
    assert found.broken, f"nothing broke in {found.states} states: the rule is not needed, or the model does not see it"
    assert found.broken[1] in promises, found.broken
