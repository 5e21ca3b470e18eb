"""What is killed while the mesh survives a failure: nothing acknowledged is lost, nothing is done twice."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

from meshd.client import Client
from meshd.errors import MeshError
from tests.cluster.conftest import eventually

COUNT_RUNS = 'echo "$MESHD_TASK $MESHD_ATTEMPT" >> {log}'


def test_kill_9_of_a_worker_mid_task_its_task_runs_again_elsewhere(make_mesh):
    mesh = make_mesh("node1", "node2", "node3")
    names = {node: name for name, node in mesh.ids().items()}
    with mesh.client() as client:
        job = client.submit({"run": {"args": ["sleep", "4"]}, "array": {"range": "1-3"}, "needs": {"cpu": 2}})
        eventually(lambda: client.job(job).counts.running == 3, within_s=30)
        leader = mesh.leader()
        victim = next(names[task.node] for task in client.tasks(job) if names[task.node] != leader)
        mesh.kill(victim)
        with mesh.client(*[name for name in names.values() if name != victim]) as rest:
            assert rest.wait(job, timeout_s=60).state.value == "done"
            tasks = list(rest.tasks(job))
            assert sorted(task.attempt for task in tasks) == [1, 1, 2]


def test_kill_9_of_the_leader_mid_submission_loses_nothing_and_doubles_nothing(make_mesh):
    mesh = make_mesh("node1", "node2", "node3")
    leader = mesh.leader()
    acknowledged: list[str] = []
    errors: list[Exception] = []
    stop = threading.Event()

    def submit() -> None:
        # Asks the leader's own API first, so that it has to fail over by itself.
        with Client([mesh.socket(leader), *(mesh.socket(name) for name in mesh.agents if name != leader)]) as client:
            while not stop.is_set():
                try:
                    acknowledged.append(client.submit({"name": "under-fire", "run": {"args": ["true"]}}))
                except MeshError as error:
                    errors.append(error)

    thread = threading.Thread(target=submit)
    thread.start()
    eventually(lambda: len(acknowledged) >= 20, within_s=30)
    mesh.kill(leader)
    before = len(acknowledged)
    eventually(lambda: len(acknowledged) >= before + 20, within_s=30)
    stop.set()
    thread.join()
    assert not errors, f"a client saw an error although it knows three nodes: {errors[0]!r}"

    rest = [name for name in mesh.agents if name != leader]
    with mesh.client(*rest) as client:
        # Resubmitted ids do not double: the same id is the same job.
        for job in acknowledged[-3:]:
            assert client.submit({"name": "under-fire", "run": {"args": ["true"]}}, job_id=job) == job
        eventually(lambda: all(client.job(job).is_final for job in acknowledged), within_s=60)
        listed = Counter(job.id for job in client.jobs(name="under-fire", limit=10_000))
        assert set(acknowledged) <= set(listed) and set(listed.values()) == {1}
        assert {client.job(job).state.value for job in acknowledged} == {"done"}


def test_kill_9_of_all_agents_at_once_every_acknowledged_job_is_there_and_finishes(make_mesh):
    mesh = make_mesh("node1", "node2", "node3")
    with mesh.client() as client:
        finished = client.submit(
            {
                "run": {"args": ["sh", "-c", "head -c 20000 /dev/zero | tr '\\0' x > out.txt; echo done"]},
                "outputs": ["out.txt"],
            }
        )
        assert client.wait(finished, timeout_s=30).state.value == "done"
        computed_by = client.task(finished).node or client.task(finished).outcome.holders[0]
        slow = client.submit({"run": {"args": ["sleep", "2"]}, "array": {"range": "1-6"}})
        eventually(lambda: client.job(slow).counts.running > 0, within_s=20)
        acknowledged = [client.submit({"run": {"args": ["true"]}}) for _ in range(20)]
    for name in list(mesh.agents):
        mesh.agents[name].kill()
    for name in list(mesh.agents):
        mesh.agents[name].wait()
    names = _ids_on_disk(mesh)
    gone = next(name for name, node in names.items() if node == computed_by)
    rest = [name for name in mesh.agents if name != gone]
    for name in rest:
        mesh.start(name)
    with mesh.client(*rest) as client:
        for job in [finished, slow, *acknowledged]:
            assert client.wait(job, timeout_s=60).state.value == "done"
        # The node that computed it never comes back; its result lies on a second disk.
        assert client.output(finished) == b"done\n"
        client.get_directory(client.outputs(finished).blob.hash, mesh.directory / "out")
        [file] = (mesh.directory / "out").rglob("out.txt")
        assert file.read_bytes() == b"x" * 20_000
        assert {task.state.value for task in client.tasks(slow)} == {"done"}


def test_an_agent_killed_and_restarted_within_2_s_loses_no_task_to_a_stale_lease(make_mesh):
    mesh = make_mesh("node1", "node2", "node3")
    with mesh.client() as client:
        names = {node: name for name, node in mesh.ids().items()}
        job = client.submit({"run": {"args": ["sleep", "1"]}, "array": {"range": "1-12"}})
        eventually(lambda: client.job(job).counts.running >= 3, within_s=20)
        victim = next(names[task.node] for task in client.tasks(job) if task.node and names[task.node] != mesh.leader())
    mesh.kill(victim)
    killed = time.monotonic()
    mesh.start(victim)
    with mesh.client() as client:
        # A stale lease would hold its tasks until the old session ends, 12 s later.
        assert client.wait(job, timeout_s=30).state.value == "done"
        assert {task.state.value for task in client.tasks(job)} == {"done"}
        assert time.monotonic() - killed < 25
        eventually(lambda: all(row.session == "live" and not row.leased for row in client.nodes().members), within_s=15)


def test_a_killed_agent_is_seen_within_5_s_and_whole_again_within_5_s_of_its_return(make_mesh):
    mesh = make_mesh("node1", "node2", "node3")
    victim = next(name for name in mesh.agents if name != mesh.leader())
    rest = [name for name in mesh.agents if name != victim]
    for name in rest:
        with mesh.client(name) as client:
            eventually(lambda client=client: health(client, victim) == "alive", within_s=20)
    mesh.kill(victim)
    killed = time.monotonic()
    for name in rest:
        with mesh.client(name) as client:
            eventually(lambda client=client: health(client, victim) == "dead", within_s=5 - (time.monotonic() - killed))
    mesh.start(victim)
    back = time.monotonic()
    with mesh.client(*rest) as client, mesh.client(victim) as returned:
        eventually(lambda: health(client, victim) == "alive", within_s=5 - (time.monotonic() - back))
        eventually(lambda: client.node(victim).session == "live", within_s=5 - (time.monotonic() - back))
        eventually(lambda: all(node.health == "alive" for node in returned.cluster().nodes), within_s=5)
        assert returned.wait(returned.submit({"run": {"args": ["true"]}}), timeout_s=20).state.value == "done"


def health(client, name):
    return next(node.health for node in client.cluster().nodes if node.name == name)


def _ids_on_disk(mesh) -> dict[str, str]:
    from meshd.net.identity_key import KeyPair

    return {name: KeyPair.load(mesh.home(name) / "identity.key").node_id for name in mesh.agents}


def test_an_agent_whose_predecessors_jobs_still_run_starts_nothing_until_they_are_dead(make_mesh):
    """The agent is killed while its spawner is stopped: nobody has ended what it had started."""
    mesh = make_mesh("node1")
    log = mesh.directory / "runs"
    script = f"echo began $MESHD_ATTEMPT $$ >> {log}; sleep 30; echo ended $MESHD_ATTEMPT >> {log}"
    with mesh.client("node1") as client:
        job = client.submit({"run": {"args": ["sh", "-c", script]}, "on_lost": "wait"})
        eventually(lambda: log.exists() and log.read_text(), within_s=20)
    first = int(log.read_text().split()[2])
    spawner = parent_of(first)
    os.kill(spawner, signal.SIGSTOP)
    try:
        mesh.kill("node1")
        successor = threading.Thread(target=mesh.start, args=("node1",))
        successor.start()
        successor.join(timeout=3)
        assert successor.is_alive() and log.read_text().count("began") == 1
        assert parent_of(first) == spawner, "what ran still runs"
    finally:
        os.kill(spawner, signal.SIGCONT)
    successor.join(timeout=30)
    assert parent_of(first) == 0, "the helpers are gone, and what they held"
    eventually(lambda: "began 2" in log.read_text(), within_s=20)
    with mesh.client("node1") as client:
        client.cancel(job)


def parent_of(pid: int) -> int:
    """0 when there is no such process, or only what is left of one."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:2]
    except OSError:
        return 0
    return 0 if state == "Z" else int(parent)
