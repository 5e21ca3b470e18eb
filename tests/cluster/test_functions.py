"""Python functions on a real mesh: what `concurrent.futures` promises, and what happens when something dies."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, as_completed, wait
from pathlib import Path

import pytest

from meshd.client import MeshExecutor
from meshd.errors import InvalidRequest, JobFailed, Unavailable
from meshd.model import TaskState
from tests.cluster.conftest import Mesh, eventually

DOCS = Path(__file__).parents[2] / "docs"
WAIT_S = 60.0

# These functions travel by value: a node does not have this module.
import cloudpickle  # noqa: E402

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def executor(mesh3: Mesh) -> Iterator[MeshExecutor]:
    with MeshExecutor([mesh3.socket("node2"), mesh3.socket("node3")]) as made:
        yield made


def touch(directory: str, name: str) -> str:
    with open(os.path.join(directory, name), "a") as file:
        file.write(".")
    return name


def test_submit_map_and_as_completed(executor: MeshExecutor) -> None:
    assert executor.submit(pow, 2, exp=10).result(WAIT_S) == 1024
    assert list(executor.map(lambda a, b: a * b, range(200), range(200), timeout=WAIT_S)) == [n * n for n in range(200)]
    futures = {executor.submit(str, number): number for number in range(50)}
    assert {future.result(): futures[future] for future in as_completed(futures, timeout=WAIT_S)} == {
        str(number): number for number in range(50)
    }
    assert list(executor.map(len, [])) == []


def test_many_short_calls_are_few_tasks_and_faster_than_processes(executor: MeshExecutor, mesh3: Mesh) -> None:
    with mesh3.client() as client:
        before = client.summary().counts.done
        executor.submit(abs, 0).result(WAIT_S)
        began_s = time.monotonic()
        assert list(executor.map(abs, range(-20_000, 0), timeout=WAIT_S)) == list(range(20_000, 0, -1))
        assert time.monotonic() - began_s < 20
        assert client.summary().counts.done - before < 200


def test_with_a_chunksize_each_task_has_so_many_calls(mesh3: Mesh) -> None:
    with MeshExecutor([mesh3.socket("node1")], job={"name": "chunky"}) as executor:
        assert list(executor.map(os.path.basename, ["/a", "/b", "/c", "/d", "/e"], chunksize=2)) == list("abcde")
    with mesh3.client() as client:
        assert sum(job.tasks for job in client.jobs(name="chunky")) == 3


def test_what_a_function_raises_and_how_large_a_result_may_be(executor: MeshExecutor) -> None:
    def fail(number: int) -> None:
        raise LookupError(number)

    error = executor.submit(fail, 7).exception(WAIT_S)
    assert isinstance(error, LookupError) and error.args == (7,)
    assert "in fail" in str(error.__cause__)
    assert executor.submit(bytes, 300_000).result(WAIT_S) == bytes(300_000)
    assert executor.submit(len, b"x" * 300_000).result(WAIT_S) == 300_000


def test_a_call_that_kills_its_process_fails_alone(executor: MeshExecutor) -> None:
    def deadly(number: int) -> int:
        if number == 42:
            os.kill(os.getpid(), signal.SIGSEGV)
        return number

    # Several of them share a task: those before the deadly one keep their results, those behind it are sent again.
    futures = [executor.submit(deadly, number) for number in range(200)]
    assert not wait(futures, timeout=WAIT_S).not_done
    failure = futures.pop(42).exception(0)
    assert isinstance(failure, JobFailed) and "SIGSEGV" in str(failure)
    assert [future.result(0) for future in futures] == [number for number in range(200) if number != 42]


def test_a_running_call_is_stopped_by_cancel(executor: MeshExecutor, mesh3: Mesh, tmp_path: Path) -> None:
    def stand(directory: str) -> None:
        touch(directory, "began")
        time.sleep(3600)

    future = executor.submit(stand, str(tmp_path))
    eventually(lambda: (tmp_path / "began").exists() and future.running(), within_s=WAIT_S)
    assert future.cancel() and future.cancelled() and not future.running()
    with pytest.raises(CancelledError):
        future.result(0)
    with mesh3.client() as client:
        eventually(lambda: not client.summary().counts.leased + client.summary().counts.running, within_s=WAIT_S)


def test_a_job_that_somebody_else_cancels_ends_its_futures(executor: MeshExecutor, mesh3: Mesh, tmp_path: Path) -> None:
    future = executor.submit(lambda directory: (touch(directory, "began"), time.sleep(3600)), str(tmp_path))
    eventually(lambda: (tmp_path / "began").exists(), within_s=WAIT_S)
    with mesh3.client() as client:
        client.cancel(next(client.jobs(states=[TaskState.RUNNING, TaskState.LEASED], name="functions")).id)
    with pytest.raises(CancelledError):
        future.result(WAIT_S)


def test_long_calls_that_were_grouped_by_mistake_are_handed_back(mesh3: Mesh) -> None:
    def nap(number: int) -> int:
        time.sleep(0.6)
        return number

    # Three tasks at a time, so that the first guess puts three calls into each: 1.2 s of them are over the budget.
    with MeshExecutor([mesh3.socket("node1")], job={"name": "naps", "needs": {"cpu": os.cpu_count()}}) as executor:
        assert list(executor.map(nap, range(18), timeout=WAIT_S)) == list(range(18))
    with mesh3.client() as client:
        assert sum(job.tasks for job in client.jobs(name="naps")) > 6


def test_shutdown_takes_nothing_new_and_can_cancel(mesh3: Mesh) -> None:
    executor = MeshExecutor([mesh3.socket("node1")])
    futures = [executor.submit(time.sleep, 3600) for _ in range(20)]
    executor.shutdown(cancel_futures=True)
    assert all(future.cancelled() for future in futures)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, 1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mesh-executor")]


def test_a_mesh_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"nobody\.sock"):
        MeshExecutor([f"unix:{tmp_path}/nobody.sock"])


def test_a_dropped_executor_finishes_what_it_has_and_leaves_no_thread(mesh3: Mesh) -> None:
    threads = lambda: sum(thread.name.startswith("mesh-executor-") for thread in threading.enumerate())  # noqa: E731
    before = threads()
    futures = [MeshExecutor([mesh3.socket("node1")]).submit(abs, -number) for number in range(2)]
    gc.collect()
    assert [future.result(WAIT_S) for future in futures] == [0, 1]
    eventually(lambda: threads() == before, within_s=WAIT_S)


def test_a_mesh_that_goes_away_is_said_by_the_future(
    make_mesh: Callable[..., Mesh], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshd.client.couriers.GIVE_UP_S", 0.5)
    mesh = make_mesh("node1")
    with MeshExecutor([mesh.socket("node1")]) as executor:
        mesh.kill("node1")
        assert isinstance(executor.submit(abs, 1).exception(WAIT_S), Unavailable)


def test_a_call_that_no_node_can_run_is_warned_of(mesh3: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    with MeshExecutor([mesh3.socket("node1")], job={"needs": {"cpu": 100_000}}) as executor:
        future = executor.submit(pow, 1, 2)
        eventually(lambda: "node3: " in caplog.text, within_s=WAIT_S)
        assert "no node can run" in caplog.text and future.cancel()


def test_what_cannot_be_sent_is_refused_where_it_is_written(executor: MeshExecutor) -> None:
    with pytest.raises(TypeError):
        executor.submit(len, threading.Lock())  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="array"):
        MeshExecutor(job={"array": {"range": 3}})
    with pytest.raises(InvalidRequest, match="needs"):
        MeshExecutor(job={"needs": {"cpu": "many"}})


def test_calls_survive_the_node_that_runs_them(make_mesh: Callable[..., Mesh], tmp_path: Path) -> None:
    mesh = make_mesh("node1", "node2", "node3")
    names = {node: name for name, node in mesh.ids().items()}

    def once_lost(directory: str, number: int) -> int:
        touch(directory, f"{number}-at-{os.environ['MESHD_NODE']}")
        deadline = time.monotonic() + 120
        while number == 0 and os.environ["MESHD_ATTEMPT"] == "1" and time.monotonic() < deadline:
            time.sleep(0.05)
        return number

    with MeshExecutor([mesh.socket(name) for name in names.values()]) as executor:
        futures = [executor.submit(once_lost, str(tmp_path), number) for number in range(12)]
        victim = names[str(eventually(lambda: next(tmp_path.glob("0-at-*")).name[5:], within_s=WAIT_S))]
        mesh.kill(victim)
        assert [future.result(WAIT_S * 2) for future in futures] == list(range(12))
    assert len(list(tmp_path.glob("0-at-*"))) == 2, "run twice, resolved once"


def test_the_document_works_as_shown(mesh3: Mesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setenv("MESHD_DATA_DIR", str(mesh3.home("node1")))
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL)
    assert len(blocks) >= 4
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        exec(block, namespace)
    assert capsys.readouterr().out.splitlines()[:2] == ["168", str(sum(number * number for number in range(10_000)))]
