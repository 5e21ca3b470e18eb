"""Which layer a sampled stack counts for, and what the bench makes of what it measured."""

from __future__ import annotations

import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.profile.benchmarks import Profile
from bench.profile.cpu import AGENT, COMMANDS, RUNNERS, SPAWNERS, Clocks, Cpu, Used, parse_stat, used
from bench.profile.flames import flame_graph
from bench.profile.layers import LAYERS, OTHER, POLL, Stack, layer_of, parse, shares
from bench.profile.report import Table, by_layer
from bench.profile.syncs import synced

LOOP = ("<frozen runpy>:_run_module_as_main", "meshd/main.py:_up", "trio/_core/_run.py:run")


def test_the_innermost_frame_that_is_known_decides() -> None:
    assert layer_of((*LOOP, "meshd/raft/server.py:Server.turn", "meshd/raft/state/queue.py:Queue.apply")) == (
        "the state machine"
    )


def test_what_trio_does_for_a_layer_is_trios() -> None:
    assert layer_of((*LOOP, "meshd/raft/log.py:Log.serve", "trio/_core/_run.py:CancelScope.__enter__")) == "trio"


def test_the_loop_itself_is_trios_and_its_poll_the_kernels() -> None:
    assert layer_of(LOOP) == "trio"
    assert layer_of((*LOOP, "trio/_core/_io_epoll.py:EpollIOManager.get_events")) == "the loop's poll of the kernel"


def test_what_a_layer_calls_of_the_standard_library_is_that_layers() -> None:
    assert layer_of((*LOOP, "meshd/raft/log.py:Log.serve", "contextlib.py:ExitStack.__exit__")) == "Raft"


def test_a_module_that_many_ask_counts_for_whoever_asked() -> None:
    asked = "meshd/placement.py:amounts_of"
    assert layer_of((*LOOP, "meshd/work/worker.py:Worker.handle", asked)) == "worker"
    assert layer_of((*LOOP, "meshd/raft/state/matching.py:match", asked)) == "the state machine"


def test_a_module_of_ours_without_a_layer_is_other_and_not_trios() -> None:
    assert layer_of((*LOOP, "meshd/tally.py:Tally.count")) == OTHER


@pytest.mark.parametrize("frames", [(), ("threading.py:Thread._bootstrap", "queue.py:Queue.get")])
def test_a_stack_without_a_known_frame_is_other(frames: tuple[str, ...]) -> None:
    assert layer_of(frames) == OTHER


def test_the_longest_beginning_that_fits_decides() -> None:
    assert layer_of(("meshd/raft/storage/disk.py:_File.sync",)) == "the journal's sync"
    assert layer_of(("meshd/raft/storage/disk.py:_File.write",)) == "the journal"


def test_the_agents_side_of_a_spawner_is_not_the_spawners_own() -> None:
    assert layer_of(("meshd/backends/spawners.py:Spawner.read",)) == "backend: messages to runners and spawners"
    assert layer_of(("meshd/backends/spawner.py:Spawner._start",)) == "the spawner's interpreter"


def test_a_line_of_the_sampler_is_a_stack_with_its_samples() -> None:
    line = "run (trio/_core/_run.py:2424);Guests.run.<locals>.<genexpr> (meshd/backends/wasm_guest.py:7) 12"
    assert parse(line) == [
        Stack(("trio/_core/_run.py:run", "meshd/backends/wasm_guest.py:Guests.run.<locals>.<genexpr>"), 12)
    ]


def test_a_file_whose_name_has_spaces_is_still_a_frame() -> None:
    line = "__init__ (<attrs generated methods outcome._impl.Error>:12) 3"
    assert parse(line) == [Stack(("<attrs generated methods outcome._impl.Error>:__init__",), 3)]


def test_shares_are_of_all_samples() -> None:
    stacks = [
        Stack(LOOP, 1),
        Stack(("meshd/work/worker.py:Worker.handle",), 2),
        Stack(("meshd/work/pace.py:ahead",), 1),
    ]
    assert shares(stacks, waiting=0.5) == {"trio": 0.25, "worker": 0.75}
    assert shares([], waiting=0.0) == {}


def test_a_wait_for_a_core_is_taken_from_where_threads_are_woken() -> None:
    poll = (*LOOP, "trio/_core/_io_epoll.py:EpollIOManager.get_events")
    stacks = [Stack(poll, 60), Stack(("meshd/work/worker.py:Worker.handle",), 40)]
    assert shares(stacks, waiting=0.5) == pytest.approx({POLL: 0.2, "worker": 0.8})
    assert shares(stacks, waiting=0.9) == {"worker": 1.0}


def test_every_layers_files_exist() -> None:
    """A file that was renamed would count for another layer, silently."""
    root = Path(__file__).parents[2]
    ours = {key.partition(":")[0] for key in LAYERS if key.startswith("meshd/")}
    missing = [each for each in ours if not (root / each).exists() and not list(root.glob(f"{each}*.py"))]
    assert not missing


def test_syncs_that_overlap_cover_a_jobs_time_once() -> None:
    jobs = [(0.0, 1.0), (1.0, 2.0)]
    syncs = [(0.2, 0.4), (0.3, 0.5), (0.9, 1.1), (1.5, 1.7), (2.5, 2.6)]
    found = synced(jobs, syncs)
    assert found.a_job == 2.0  # the last began when all was over
    assert found.covered_p50_ms == pytest.approx((400 + 300) / 2)


def test_a_spawners_children_are_commands_and_whatever_is_new_has_used_all_that_it_used() -> None:
    roles = {1: AGENT, 2: SPAWNERS, 3: RUNNERS}
    before = Clocks({1: Cpu(1, 1), 2: Cpu(2, 0)}, {1: Cpu(), 2: Cpu(5, 5)}, {1: 0.5, 2: 0.0}, 100, 50)
    after = Clocks(
        {1: Cpu(2, 1), 2: Cpu(2, 1), 3: Cpu(3, 0)},
        {1: Cpu(9, 9), 2: Cpu(6, 7), 3: Cpu()},
        {1: 0.75, 2: 0.0, 3: 0.25},
        120,
        54,
    )
    assert used(roles, before, after) == Used(
        {AGENT: Cpu(1, 0), SPAWNERS: Cpu(0, 1), COMMANDS: Cpu(1, 2), RUNNERS: Cpu(3, 0)},
        {AGENT: 0.25, SPAWNERS: 0.0, RUNNERS: 0.25},
        idle=0.2,
        others=pytest.approx(0.4),
    )


def test_the_name_of_a_process_may_hold_spaces_and_parentheses() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    stat = f"7 (a (b) c) S {' '.join('0' * 10)} {ticks} {2 * ticks} {3 * ticks} {4 * ticks} 20 0 1"
    assert parse_stat(stat) == (Cpu(1, 2), Cpu(3, 4))


def test_a_table_says_what_it_is_in_markdown_and_in_text() -> None:
    table = Table("CPU", ["", "agent"], [["worker", "5.0"], ["trio", ""]])
    assert table.as_markdown() == "CPU:\n\n| | agent |\n| --- | --- |\n| worker | 5.0 |\n| trio | |"
    assert table.as_text() == "CPU\n        agent\nworker    5.0\ntrio"


def test_a_process_costs_what_the_kernel_counted_and_samples_say_where() -> None:
    worker, journal = ("meshd/work/worker.py:Worker.handle",), ("meshd/raft/storage/journal.py:Journal.append",)
    profile = Profile(
        tasks=1000,
        wall_s=1.0,
        used=Used({AGENT: Cpu(0.03, 0.01), RUNNERS: Cpu(0.02, 0)}, {AGENT: 0, RUNNERS: 0}, 0.5, 0.0),
        sampled={AGENT: [Stack(worker, 299), Stack(journal, 100), Stack(("queue.py:get",), 1)], RUNNERS: []},
        waiting={AGENT: 0.0, RUNNERS: 0.0},
    )
    table = by_layer("x", profile)
    assert table.head == ["", AGENT]
    assert table.rows == [["worker", "30"], ["the journal", "10"], ["the rest", "0.1"]]


def test_a_flame_graph_draws_a_caller_as_wide_as_all_that_it_calls() -> None:
    stacks = [Stack(("a.py:main", "a.py:<x>"), 1), Stack(("a.py:main", "a.py:g"), 3)]
    drawn = flame_graph("t", stacks)
    widths = {title: float(width) for title, width in re.findall(r'<title>(\S+).*?width="([\d.]+)"', drawn)}
    assert widths == {"t:": 1600.0, "a.py:main": 1600.0, "a.py:&lt;x&gt;": 400.0, "a.py:g": 1200.0}
    ElementTree.fromstring(drawn)
