"""Attempts in batches on a node of its own: real store, real spawner, real processes."""

from __future__ import annotations

import pytest
import trio
from msgspec.structs import replace

from meshd import model
from meshd.blobs.tree import pack_tree
from meshd.model import (
    Array,
    AttemptKey,
    BackendOffer,
    BlobRef,
    EndReason,
    Inline,
    Input,
    ItemsBlob,
    ItemsFiles,
    ItemsInline,
    ItemsRange,
    JobId,
    JobSpec,
    Needs,
    Offer,
    Resources,
    Run,
)
from tests.integration.test_executor import node, shell
from tests.scene import A, Scene

JOB = JobId("j")
NAMED_BYTES = 500
"""Of one task: three references to blobs, and who holds them."""


class Ends:
    def __init__(self):
        self.outcomes = {}
        self._told = trio.Event()

    def told(self, ends):
        for key, outcome in ends:
            assert key.task not in self.outcomes, "an attempt ended twice"
            self.outcomes[key.task] = outcome
        self._told.set()

    async def wait(self, number):
        with trio.fail_after(20):
            while len(self.outcomes) < number:
                self._told = trio.Event()
                await self._told.wait()


def keys(*tasks):
    return tuple(AttemptKey(JOB, task, 1, 42 + task) for task in tasks)


def start(executor, spec, *tasks, leash_s=None):
    ends = Ends()
    assert executor.planned.takes(spec)
    executor.planned.start(1, keys(*tasks), spec, leash_s, ends.told)
    assert ends.outcomes == {}, "told before it was handed on"
    return ends


async def test_a_batch_ends_attempt_by_attempt_as_if_each_had_run_alone(tmp_path):
    async with node(tmp_path) as (executor, _store):
        who = "echo $MESHD_JOB $MESHD_TASK $MESHD_ATTEMPT $MESHD_FENCE $MESHD_ITEM $MESHD_NODE; exit $MESHD_TASK"
        ends = start(executor, shell(who, array=Array(3, ItemsRange(10, 5))), 0, 1, 2)
        await ends.wait(3)
    assert [ends.outcomes[task].exit_code for task in range(3)] == [0, 1, 2]
    assert [ends.outcomes[task].stdout.data.decode() for task in range(3)] == [
        f"j {task} 1 {42 + task} {10 + 5 * task} me\n" for task in range(3)
    ]


async def test_items_come_from_their_list_and_one_too_many_has_none(tmp_path):
    async with node(tmp_path) as (executor, store):
        lines = await store.put_bytes(b"first\nsecond {item}")
        ends = start(executor, shell("echo {item}", array=Array(3, ItemsBlob(lines))), 0, 1, 2)
        await ends.wait(3)
    assert [ends.outcomes[task].stdout for task in (0, 1)] == [Inline(b"first\n"), Inline(b"second {item}\n")]
    assert ends.outcomes[2].reason is EndReason.INVALID and "2 lines" in ends.outcomes[2].message


async def test_lists_of_jobs_that_are_done_with_do_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("meshd.work.planned.LISTS_BYTES_KEPT", 5_000)
    monkeypatch.setattr("meshd.work.executor.LISTS_BYTES_KEPT", 5_000)
    async with node(tmp_path) as (executor, store):
        for number in range(5):
            lines = await store.put_bytes(b"%d\n" % number + b"x\n" * 2000)
            spec, key = (
                shell("echo {item}", array=Array(2001, ItemsBlob(lines))),
                AttemptKey(JobId(str(number)), 0, 1, number),
            )
            ends = Ends()
            executor.planned.start(1, (key,), spec, None, ends.told)
            await ends.wait(1)
            assert ends.outcomes[0].stdout == Inline(b"%d\n" % number)
    assert list(executor.planned._prepared) == ["4"] and list(executor._lists) == [lines]


async def test_only_a_newline_ends_an_item_whatever_else_it_contains(tmp_path):
    items = ["a\fb", "a\rb", "a\x85b", "a\u2028b", "a\x1cb\x1db\x1eb\vb", "", "crlf", "last\r"]
    text = "\n".join(items).replace("crlf\n", "crlf\r\n")
    async with node(tmp_path) as (executor, store):
        lines = await store.put_bytes(text.encode())
        spec = shell('printf %s "$MESHD_ITEM"', array=Array(len(items), ItemsBlob(lines)))
        ends = start(executor, spec, *range(len(items)))
        await ends.wait(len(items))
    said = [outcome.stdout.data.decode() if outcome.stdout else "" for _, outcome in sorted(ends.outcomes.items())]
    assert said == items


async def test_an_item_that_no_variable_can_hold_is_the_jobs_fault(tmp_path):
    async with node(tmp_path) as (executor, _store):
        ends = start(executor, shell("true", array=Array(2, ItemsInline(("a\0b", "c")))), 0, 1)
        await ends.wait(2)
    assert [ends.outcomes[task].reason for task in (0, 1)] == [EndReason.INVALID, EndReason.EXIT]


async def test_an_item_is_as_large_as_a_variable_can_be_and_one_byte_more_is_the_jobs_fault(tmp_path):
    largest = "ü" + "x" * (131_060 - 2)  # with its name and a NUL 128 KiB
    async with node(tmp_path) as (executor, _store):
        items = ItemsInline(("a", largest, largest + "x", "b"))
        ends = start(executor, shell("true", array=Array(4, items)), 0, 1, 2, 3)
        await ends.wait(4)
    assert [ends.outcomes[task].reason for task in range(4)] == [
        EndReason.EXIT, EndReason.EXIT, EndReason.INVALID, EndReason.EXIT
    ]  # fmt: skip
    assert "131061 bytes" in ends.outcomes[2].message and "131060" in ends.outcomes[2].message


async def test_arguments_that_an_item_makes_too_large_are_the_jobs_fault(tmp_path):
    async with node(tmp_path) as (executor, _store):
        run = Run(args=("true", *["{item}" * 1000] * 30))
        spec = JobSpec(("process",), run, array=Array(3, ItemsInline(("a", "x" * 100, "b"))))
        ends = start(executor, spec, 0, 1, 2)
        await ends.wait(3)
    assert [ends.outcomes[task].reason for task in range(3)] == [EndReason.EXIT, EndReason.INVALID, EndReason.EXIT]
    assert "limit of 2097152" in ends.outcomes[1].message


async def test_large_output_of_a_batch_is_a_blob_with_its_holders_before_it_is_told(tmp_path):
    async with node(tmp_path) as (executor, store):
        script = "head -c $MESHD_ITEM /dev/zero; echo oops >&2"
        ends = start(executor, shell(script, array=Array(3, ItemsInline(("1024", "1025", "5000")))), 0, 1, 2)
        await ends.wait(3)
        small, over, large = (ends.outcomes[task] for task in range(3))
        assert small.stdout == Inline(bytes(1024)) and small.holders == ()
        for outcome, size in ((over, 1025), (large, 5000)):
            assert isinstance(outcome.stdout, BlobRef) and outcome.holders == ("me",)
            assert await store.get_bytes(outcome.stdout, bytes_max=1 << 20) == bytes(size)
            assert outcome.stderr == Inline(b"oops\n")


async def test_an_array_whose_tasks_all_say_much_fills_no_replica_and_is_read_whole(tmp_path, monkeypatch):
    """As 10⁶ tasks with 1 KiB each would; its 20 have as small a share."""
    monkeypatch.setattr(model, "RESULTS_BYTES", 20 * 100)
    tasks = range(20)
    spec = replace(shell("printf '%0900d' $MESHD_ITEM; echo ok >&2", array=Array(20)), needs=Needs(Resources()))
    scene = Scene(A, slots=20, offer=Offer(backends=(BackendOffer("process"),)))
    job = scene.submit(spec)
    leases = scene.leases(A)
    async with node(tmp_path) as (executor, store):
        ends = start(executor, spec, *tasks)
        await ends.wait(20)
        scene.report(A, *((leases[task], ends.outcomes[task]) for task in tasks))
        assert scene.job(job).counts.done == 20
        assert scene.machine._queue.outcome_bytes < 3 * model.RESULTS_BYTES + 20 * NAMED_BYTES
        for task in tasks:
            outcome = scene.task(job, task).outcome
            assert await store.get_bytes(outcome.stdout, bytes_max=1 << 20) == b"%0900d" % task
            assert outcome.stderr == Inline(b"ok\n")


async def test_list_that_nobody_has_is_not_the_jobs_fault(tmp_path):
    async with node(tmp_path) as (executor, _store):
        ends = start(executor, shell("true", array=Array(2, ItemsBlob(BlobRef("0" * 64, 5)))), 0, 1)
        await ends.wait(2)
    assert {outcome.reason for outcome in ends.outcomes.values()} == {EndReason.BACKEND}


async def test_what_waits_for_its_job_to_be_prepared_is_stopped_or_given_back(tmp_path):
    async with node(tmp_path) as (executor, store):
        lines = await store.put_bytes(b"a\nb\nc")
        ends = start(executor, shell("echo {item}", array=Array(3, ItemsBlob(lines))), 0, 1, 2)
        executor.planned.stop(keys(1)[0])
        assert ends.outcomes[1].reason is EndReason.CANCELLED
        assert await executor.planned.recall(keys(2)) == list(keys(2))
        await ends.wait(2)
        await trio.sleep(0.1)
    assert sorted(ends.outcomes) == [0, 1] and ends.outcomes[0].stdout == Inline(b"a\n")


async def test_one_that_runs_is_stopped_and_one_behind_it_given_back(tmp_path):
    async with node(tmp_path) as (executor, _store):
        ends = start(executor, shell("echo begun; sleep 60"), 0, 1)
        with trio.fail_after(20):
            while await executor.read_output(42, "stdout", 0, 100) != b"begun\n":
                await trio.sleep(0.01)
        assert await executor.read_output(42, "stdout", 2, 3) == b"gun"
        assert await executor.read_output(43, "stdout", 0, 100) is None
        assert await executor.planned.recall(keys(0, 1)) == list(keys(1))
        executor.planned.stop(keys(0)[0])
        await ends.wait(1)
    assert ends.outcomes[0].reason is EndReason.CANCELLED


async def test_an_end_that_a_backend_tells_of_twice_is_heard_once(tmp_path):
    async with node(tmp_path) as (executor, _store):
        backend = executor.choose(shell("true"))

        def start_and_tell_twice(plan, lane, attempts, ended):
            started(plan, lane, attempts, lambda finished: (ended(finished), ended(finished)))

        started, backend.start = backend.start, start_and_tell_twice
        ends = start(executor, shell("true"), 0, 1)
        await ends.wait(2)
    assert [ends.outcomes[task].reason for task in (0, 1)] == [EndReason.EXIT] * 2


async def test_the_leash_of_a_job_moves_for_all_its_attempts(tmp_path):
    async with node(tmp_path) as (executor, _store):
        spec = shell("sleep 60")
        now_s = trio.current_time() + 3600
        ends = start(executor, spec, 0, 1, leash_s=1e9 + now_s)
        await trio.sleep(0.3)
        executor.planned.move_leash(keys(0)[0], 1.0)  # long over
        await ends.wait(2)
    assert {outcome.reason for outcome in ends.outcomes.values()} == {EndReason.LOST}


@pytest.mark.parametrize("kind", ["inputs", "outputs", "stdin", "files", "backend"])
async def test_what_needs_something_laid_out_runs_by_itself(tmp_path, kind):
    files = tmp_path / "files"
    files.mkdir()
    async with node(tmp_path) as (executor, store):
        spec = {
            "inputs": lambda: shell("true", inputs=(Input("x", Inline(b"x")),)),
            "outputs": lambda: shell("true", outputs=("x",)),
            "stdin": lambda: shell("true"),
            "files": lambda: shell("true", array=Array(1, ItemsFiles(tree, 1))),
            "backend": lambda: shell("true"),
        }
        tree = await pack_tree(files, store)
        made = spec[kind]()
        if kind == "stdin":
            made = type(made)(backend=made.backend, run=Run(args=("true",), stdin=Inline(b"x")))
        if kind == "backend":
            made = type(made)(backend=("nothing",), run=made.run)
        assert not executor.planned.takes(made)
        assert executor.planned.takes(shell("true"))
