"""One attempt on a node of its own: real store, real spawner, real processes."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio

from meshd import codec
from meshd.backends.process import ProcessBackend
from meshd.blobs.fetch import Fetcher
from meshd.blobs.replicate import Replicator
from meshd.blobs.store import Store
from meshd.blobs.tree import pack_tree
from meshd.model import (
    Array,
    AttemptKey,
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
    NodeId,
    Run,
    Timeout,
    Tree,
    TreeRef,
)
from meshd.net.memory import MemoryNetwork
from meshd.net.rpc import StreamRpc
from meshd.ports import BackendSettings, Leash
from meshd.work import executor as executor_module
from meshd.work.executor import Executor

ME = NodeId("me")


class Nobody:
    def peer_up(self, peer: NodeId) -> None: ...
    def peer_down(self, peer: NodeId) -> None: ...


@asynccontextmanager
async def node(tmp_path, peers=()):
    transport = MemoryNetwork().transport(ME, lambda p, q: True, lambda p: (), Nobody())
    rpc = StreamRpc(transport)
    store = await Store.open(tmp_path / "blobs")
    fetcher = Fetcher(transport, rpc, store, lambda blob: ())
    backend = ProcessBackend(BackendSettings(tmp_path / "backend", term_grace_s=0.5))
    (tmp_path / "backend").mkdir(mode=0o700, exist_ok=True)
    executor = Executor(
        directory=tmp_path / "attempts",
        me=ME,
        store=store,
        fetcher=fetcher,
        replicator=Replicator(rpc, store, fetcher, lambda: peers),
        backends={"process": backend},
        offered=lambda: ("process",),
    )
    executor.sweep()
    async with trio.open_nursery() as nursery:
        for serve in (transport.serve, rpc.serve, backend.serve, executor.serve):
            await nursery.start(serve)
        yield executor, store
        with trio.move_on_after(5):
            while list((tmp_path / "attempts").iterdir()):
                await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert list((tmp_path / "attempts").iterdir()) == [], "an attempt left its directory"


def shell(script, **kind):
    return JobSpec(backend=("process",), run=Run(args=("sh", "-c", script)), **kind)


async def run(executor, spec, task=0):
    return await executor.run(AttemptKey(JobId("j"), task, 1, 42 + task), spec, Leash())


async def test_an_attempt_knows_who_it_is(tmp_path):
    async with node(tmp_path) as (executor, _store):
        outcome = await run(executor, shell("echo $MESHD_JOB $MESHD_TASK $MESHD_ATTEMPT $MESHD_FENCE $MESHD_ITEM"), 3)
    assert outcome.is_success and outcome.stdout == Inline(b"j 3 1 45 3\n") and outcome.stderr is None


async def test_inputs_lie_where_the_spec_says_and_outputs_come_back_as_blobs(tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "b.txt").write_bytes(b"b" * 5000)
    async with node(tmp_path) as (executor, store):
        ref = await store.put_bytes(b"blob")
        tree = await pack_tree(source, store)
        outcome = await run(
            executor,
            shell(
                "cat in/blob in/inline > one.txt; cp dir/sub/b.txt two.txt",
                inputs=(
                    Input("in/blob", ref),
                    Input("in/inline", Inline(b"-inline")),
                    Input("dir", tree),
                ),
                outputs=("one.txt", "two.txt"),
            ),
        )
        assert outcome.is_success, outcome.message
        assert isinstance(outcome.outputs, TreeRef) and outcome.holders == (ME,)
        found = codec.decode(await store.get_bytes(outcome.outputs.blob, bytes_max=1 << 20), Tree)
        assert [entry.path for entry in found.entries] == ["one.txt", "two.txt"]
        assert found.entries[0].content == Inline(b"blob-inline")
        two = found.entries[1].content
        assert isinstance(two, BlobRef) and await store.get_bytes(two, bytes_max=1 << 20) == b"b" * 5000


async def test_each_task_of_an_array_gets_its_own_item(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    for name in "abcde":
        (files / name).write_text(name * 3)
    async with node(tmp_path) as (executor, store):
        lines = await store.put_bytes(b"first\nsecond\nthird")
        tree = await pack_tree(files, store)

        async def said(items, task, script='echo "$MESHD_ITEM"'):
            with trio.fail_after(20):  # the same fence again: what it left the last time is removed in a thread
                while list((tmp_path / "attempts").iterdir()):
                    await trio.sleep(0.001)
            outcome = await run(executor, shell(script, array=Array(5, items)), task)
            assert outcome.is_success, outcome
            return outcome.stdout.data.decode().split()

        assert await said(ItemsRange(10, 5), 2) == ["20"]
        assert await said(ItemsInline(("x", "y", "z", "u", "v")), 1) == ["y"]
        assert await said(ItemsBlob(lines), 2) == ["third"]
        assert await said(ItemsFiles(tree, 2), 1) == ["c", "d"]
        assert await said(ItemsFiles(tree, 2), 2, "ls; cat *") == ["e", "eee"], "only its own files are there"
        beyond = await run(executor, shell("true", array=Array(5, ItemsBlob(lines))), 4)
        assert beyond.reason is EndReason.INVALID and "3 lines" in beyond.message


async def test_an_item_is_put_into_the_arguments_and_never_through_a_shell(tmp_path):
    async with node(tmp_path) as (executor, _store):
        spec = JobSpec(
            backend=("process",),
            run=Run(args=("echo", "got {item}")),
            array=Array(1, ItemsInline(("$(touch /tmp/meshd-pwned); x",))),
        )
        outcome = await run(executor, spec)
    assert outcome.stdout == Inline(b"got $(touch /tmp/meshd-pwned); x\n")


async def test_arguments_that_an_item_makes_too_large_are_the_jobs_fault(tmp_path):
    async with node(tmp_path) as (executor, _store):
        args = ("true", *["{item}" * 1000] * 30)
        spec = JobSpec(("process",), Run(args=args), array=Array(2, ItemsInline(("a", "x" * 100))))
        assert (await run(executor, spec, 0)).is_success
        outcome = await run(executor, spec, 1)
    assert outcome.reason is EndReason.INVALID and "limit of 2097152" in outcome.message


async def test_large_output_becomes_a_blob_and_small_output_travels_with_the_outcome(tmp_path):
    async with node(tmp_path) as (executor, store):
        outcome = await run(executor, shell("head -c 100000 /dev/zero; echo oops >&2; exit 3"))
        assert (outcome.reason, outcome.exit_code) == (EndReason.EXIT, 3) and outcome.stderr == Inline(b"oops\n")
        assert isinstance(outcome.stdout, BlobRef) and store.has(outcome.stdout.hash)


async def test_a_task_of_a_large_array_leaves_little_in_the_log_and_a_number_still_stays_there(tmp_path):
    large = shell(
        "head -c $MESHD_ITEM /dev/zero > out; head -c $MESHD_ITEM /dev/zero; echo $MESHD_ITEM >&2",
        outputs=("out",),
        array=Array(1_000_000, ItemsInline(("10", "97"))),
    )
    async with node(tmp_path) as (executor, store):
        number, more = await run(executor, large, 0), await run(executor, large, 1)
        assert number.stdout == Inline(bytes(10)) and isinstance(number.outputs, Inline)
        assert more.stderr == Inline(b"97\n")
        assert await store.get_bytes(more.stdout, bytes_max=1 << 20) == bytes(97)
        found = codec.decode(await store.get_bytes(more.outputs.blob, bytes_max=1 << 20), Tree)
        assert found.entries[0].content == Inline(bytes(97))


async def test_an_output_that_was_promised_and_is_missing_is_the_jobs_fault(tmp_path):
    async with node(tmp_path) as (executor, _store):
        outcome = await run(executor, shell("true", outputs=("report.json",)))
    assert outcome.reason is EndReason.INVALID and "report.json" in outcome.message


async def test_an_input_that_nobody_has_is_not_the_jobs_fault(tmp_path):
    async with node(tmp_path) as (executor, _store):
        with trio.fail_after(30):
            outcome = await run(executor, shell("true", inputs=(Input("x", BlobRef("0" * 64, 5)),)))
    assert outcome.reason is EndReason.BACKEND and "0000" in outcome.message


@pytest.mark.parametrize("path", ["../escape", "/etc/escape", "a/../../escape"])
async def test_an_input_cannot_be_laid_outside_the_working_directory(tmp_path, path):
    async with node(tmp_path) as (executor, _store):
        outcome = await run(executor, shell("true", inputs=(Input(path, Inline(b"x")),)))
    assert outcome.reason is EndReason.INVALID and not (tmp_path / "escape").exists()


async def test_a_job_that_locks_its_directory_leaves_nothing_behind(tmp_path):
    async with node(tmp_path) as (executor, _store):
        outcome = await run(executor, shell("mkdir -p a/b; touch a/b/c; ln -s /etc link; chmod 0 a/b a"))
    assert outcome.is_success


async def test_stopping_an_attempt_leaves_nothing_running_and_nothing_on_disk(tmp_path):
    async with node(tmp_path) as (executor, _store):
        marker = tmp_path / "alive"
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run, executor, shell(f"touch {marker}; sleep 600"))
                while not marker.exists():
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()


async def test_the_time_limit_is_reported_as_such(tmp_path):
    async with node(tmp_path) as (executor, _store):
        outcome = await run(executor, shell("sleep 60", timeout=Timeout(run_ms=300)))
    assert outcome.reason is EndReason.TIMEOUT


async def test_an_input_that_rotted_on_this_disk_is_put_aside_and_never_given_to_a_job(tmp_path):
    async with node(tmp_path) as (executor, store):
        ref = await store.put_bytes(b"a" * 100_000)
        store.path(ref.hash).chmod(0o600)
        store.path(ref.hash).write_bytes(b"b" * 100_000)
        with trio.fail_after(30):
            outcome = await run(executor, shell("cat in", inputs=(Input("in", ref),)))
        # Nobody else has it here: the mesh could not do it, and the job is not to blame.
        assert outcome.reason is EndReason.BACKEND and ref.hash in outcome.message
        assert not store.has(ref.hash)


async def test_an_outcome_whose_blob_is_gone_before_it_lay_on_two_disks_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(executor_module, "REPLICATE_S", 0.2)
    async with node(tmp_path, peers=(NodeId("unreachable"),)) as (executor, store):

        async def remove_what_it_said():
            while not (kept := await store.list()):
                await trio.sleep(0.01)
            await store.remove(kept[0].hash)

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(remove_what_it_said)
                outcome = await run(executor, shell("head -c 100000 /dev/zero"))
    assert outcome.reason is EndReason.BACKEND and "not on this disk any more" in outcome.message
