"""The torture's own judgement: a history that is doctored is found out, and a seed is a whole run."""

from __future__ import annotations

import pytest

from torture.checker import Listed, Task, Trace, Verdict, judge
from torture.history import Op
from torture.plan import DEFAULT_FAULTS, DRILLS, Kill, Weather, both_ways, cuts, cycles, drill, victims

NODES = ["node1", "node2", "node3", "node4", "node5"]


def good() -> dict:
    """Three jobs, all acknowledged, finished and listed everywhere."""
    jobs = {"a": "", "b": "wait", "c": "fail"}
    return {
        "ops": [
            *(Op(0, "submit", "node1", job, 1.0, 2.0, "ok", is_new=True) for job in jobs),
            Op(0, "read", "node2", "b", 3.0, 3.1, "ok", seen="running/1/7"),
            Op(0, "read", "node2", "b", 5.0, 5.1, "ok", seen="done/2/9"),
        ],
        "listed": {node: [Listed(job, "done", True) for job in jobs] for node in NODES},
        "tasks": [Task("b", 0, "done", 2, 9), Task("c", 0, "done", 1, 8)],
        "traces": [
            Trace("b", 0, 1, 7, "begin"),
            Trace("b", 0, 2, 9, "begin"),
            Trace("b", 0, 2, 9, "end"),
            Trace("c", 0, 1, 8, "begin"),
            Trace("c", 0, 1, 8, "end"),
        ],
        "kinds": jobs,
        "absent": [],
    }


def test_a_good_history_is_good():
    assert judge(**good()) == Verdict(acknowledged=3)


def test_a_job_that_no_longer_is_at_one_of_the_nodes_is_lost():
    told = good()
    told["listed"]["node4"].pop(0)
    assert judge(**told).lost == ["a is not at node4"]


def test_a_job_that_a_read_missed_after_its_acknowledgement_is_lost():
    told = good()
    told["ops"].append(Op(1, "read", "node3", "a", 2.5, 2.6, "missing"))
    assert judge(**told).lost == ["a was acknowledged, then not found at node3 at 2.500"]


def test_a_read_that_began_before_the_acknowledgement_may_miss_the_job():
    told = good()
    told["ops"].append(Op(1, "read", "node3", "a", 1.9, 2.6, "missing"))
    assert judge(**told).is_good


def test_a_task_that_is_done_although_nothing_ran_is_lost():
    told = good()
    told["traces"].remove(Trace("c", 0, 1, 8, "end"))
    assert judge(**told).lost == ["c task 0 is done by attempt 1, which did not end"]


@pytest.mark.parametrize(
    ("doctor", "found"),
    [
        (lambda told: told["ops"].append(Op(1, "submit", "node2", "a", 3.0, 3.1, "ok", is_new=True)), "a was made at node1 and again at node2"),
        (lambda told: told["listed"]["node1"].append(Listed("a", "done", True)), "a is listed twice at node1"),
        (lambda told: told["ops"].append(Op(1, "read", "node3", "b", 6.0, 6.1, "ok", seen="done/1/7")), "b ended as done/1/7 at node3, and as done/2/9"),
        (lambda told: told["traces"].append(Trace("b", 0, 2, 9, "begin")), "b task 0 attempt 2 began twice"),
        (lambda told: told["traces"].append(Trace("b", 0, 1, 7, "end")), "b task 0 attempt 1 (end) was alive beside attempt 2, on_lost: wait"),
        (lambda told: told["traces"].insert(0, Trace("a", 0, 2, 5, "begin")) or told["traces"].insert(0, Trace("a", 0, 1, 6, "begin")), "a task 0: the fences of its attempts are [6, 5]"),
        (lambda told: told["traces"].append(Trace("c", 0, 2, 10, "begin")), "c task 0 attempt 2 began, although on_lost: fail and [1] had begun"),
    ],
    ids=["made twice", "listed twice", "ended in two ways", "one attempt twice", "two at a time", "fence fell", "fail started twice"],
)  # fmt: skip
def test_what_is_done_twice_is_doubled(doctor, found):
    told = good()
    doctor(told)
    verdict = judge(**told)
    assert verdict.doubled == [found] and not verdict.lost and not verdict.stuck


def test_a_job_that_does_not_finish_is_stuck():
    told = good()
    for node in NODES:
        told["listed"][node][0] = Listed("a", "held", False)
    assert judge(**told).stuck == ["a is still held"]


def test_a_node_that_does_not_come_back_is_stuck():
    assert judge(**good() | {"absent": ["node5 is not ready"]}).stuck == ["node5 is not ready"]


def test_two_leaders_in_one_term_are_found():
    assert judge(**good() | {"reigns": {3: {"x"}, 4: {"y", "z"}}}).doubled == ["term 4 had 2 leaders: y, z"]


def test_an_unacknowledged_job_may_be_there_or_not_but_has_to_finish():
    told = good()
    told["ops"].append(Op(1, "submit", "node2", "d", 3.0, 3.1, "unknown"))
    assert judge(**told).is_good
    for node in NODES:
        told["listed"][node].append(Listed("d", "ready", False))
    assert judge(**told).stuck == ["d is still ready"]


def test_a_seed_is_a_whole_run():
    assert list(cycles(7, 200)) == list(cycles(7, 200))
    assert {fault for cycle in cycles(7, 400, DEFAULT_FAULTS) for fault in cycle.faults} == set(DEFAULT_FAULTS)


def test_a_fifth_of_the_cycles_cut_the_network():
    cut = [cycle for cycle in cycles(3, 1000) if cycle.weather and cuts(cycle, NODES[:3], None)]
    assert len(cut) >= 200


def test_only_the_faults_that_were_asked_for_happen():
    assert {fault for cycle in cycles(7, 50, ["kill-all", "slow"]) for fault in cycle.faults} == {"kill-all", "slow"}


@pytest.mark.parametrize("name", DRILLS)
def test_a_drill_is_one_fault_again_and_again(name):
    assert len({cycle.faults for cycle in drill(name, 5)}) == 1 and len(list(drill(name, 5))) == 5


def test_a_minority_is_less_than_half_and_the_leader_is_killed_where_there_is_one():
    for cycle in cycles(5, 100):
        found = victims(cycle, NODES, "node2")
        match cycle.kill:
            case Kill.LEADER:
                assert found == ["node2"]
            case Kill.FOLLOWER:
                assert len(found) == 1 and found != ["node2"]
            case Kill.NODE:
                assert len(found) == 1
            case Kill.MINORITY:
                assert len(set(found)) == 2
            case Kill.ALL:
                assert set(found) == set(NODES)


@pytest.mark.parametrize("count", [3, 5])
def test_each_kind_of_partition_is_what_its_name_says(count):
    nodes = NODES[:count]
    seen = set()
    for cycle in cycles(11, 400):
        pairs = cuts(cycle, nodes, "node1")
        reversed_pairs = {(target, source) for source, target in pairs}
        if cycle.weather is Weather.PARTITION:
            side = min(({a for a in nodes if (a, b) not in pairs} for b in nodes), key=len)
            assert pairs == both_ways(side, set(nodes) - side) and 0 < len(side) <= count // 2
        elif cycle.weather is Weather.ONE_WAY:
            assert pairs and not pairs & reversed_pairs
        elif cycle.weather is Weather.BRIDGE:
            cut_off = {source for source, _ in pairs}
            assert pairs == reversed_pairs and len(cut_off) == count - 1
        else:
            assert not pairs
            continue
        seen.add(cycle.weather)
    assert len(seen) == 3
