"""The main job on real input: `make demo`.

Three agents form a mesh (processes of their own, directories, keys and ports; two join by invite). A wasm module
compiled here from C counts the words of every .py file of this machine's Python standard library, as a task array
submitted at node 2; a second job reduces what the first left behind; the result is read at node 3 and compared with
a plain single-process count. Then the array runs again, and an agent that is running its tasks is killed with -9.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from meshd.client import Client
from meshd.dev import DevMesh
from meshd.errors import MeshError
from meshd.model import JobId, TaskState
from meshd.views import JobView

HERE = Path(__file__).parent
FILES_PER_TASK = 16
TOP = 20
JOB_S = 100
IS_TERMINAL = sys.stderr.isatty()


def main() -> int:
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="meshd-demo-"))
    mesh = DevMesh(directory / "mesh")
    try:
        demo(mesh, directory)
    except MeshError as error:
        say(f"the demo failed: {error}")
        for log in sorted(mesh.directory.glob("*/agent.log")):
            say(f"--- {log}\n" + "\n".join(log.read_text().splitlines()[-8:]))
        return 1
    finally:
        mesh.stop()
        shutil.rmtree(directory, ignore_errors=True)
    say(f"\nDone in {time.monotonic() - began:.0f} s; nothing is left behind. Look next at:")
    say("  .venv/bin/meshd dev          a mesh of your own on this machine, to try `mesh run -- echo hello`")
    say("  README.md  docs/cli.md       several machines, and everything `mesh` can do")
    say("  make bench                   what it costs")
    return 0


def demo(mesh: DevMesh, directory: Path) -> None:
    modules = {name: compile_wasm(name, directory) for name in ("wordcount", "reduce")}
    library = copy_library(directory / "library")
    expected = plain_count(library)

    step("three agents: node1 founds a mesh, node2 and node3 join by invite")
    mesh.start("node1")
    with Client([mesh.socket("node1")]) as client:
        invite = client.invite(uses=2)
    for name in ("node2", "node3"):
        mesh.start(name, "--join", invite)
    with Client([mesh.socket("node2")]) as node2, Client([mesh.socket("node3")]) as node3:
        wait_until_it_survives_a_failure(node2)

        step(f"submit at node2: count the words of {count_files(library)} files, {FILES_PER_TASK} a task, in wasm")
        counted = count_words(node2, modules, library)
        watch(node3, counted)
        totals = reduce(node2, modules, counted)
        watch(node3, totals)

        step(f"read at node3: the {TOP} most frequent words")
        found = read_totals(node3, totals, directory / "found")
        print("\n".join(f"{count:>8}  {word}" for word, count in found[:TOP]))
        check(found, expected)

        step("once more, and node1 is killed with -9 while it runs tasks")
        counted = count_words(node2, modules, library)
        lost = kill_while_it_works(mesh, "node1", node3, counted)
        say(f"    node1 is gone; it held tasks {', '.join(map(str, lost))}")
        watch(node3, counted)
        check_each_done_once(node3, counted)
        totals = reduce(node2, modules, counted)
        watch(node3, totals)
        check(read_totals(node3, totals, directory / "again"), expected)


# --- what is run ------------------------------------------------------------------------------------------------------


def compile_wasm(name: str, directory: Path) -> Path:
    target = directory / f"{name}.wasm"
    source = HERE / f"{name}.c"
    step(f"compile examples/{name}.c to wasm")
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "wasm32-wasi", "-O2", "-s"]
    subprocess.run([*compiler, "-o", str(target), str(source)], check=True)
    return target


def copy_library(target: Path) -> Path:
    """Every .py file of the standard library, without what was installed on top of it."""
    source = Path(sysconfig.get_path("stdlib"))
    for file in sorted(source.rglob("*.py")):
        relative = file.relative_to(source)
        if "site-packages" not in relative.parts and file.is_file():
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / relative)
    return target


def count_files(library: Path) -> int:
    return sum(1 for file in library.rglob("*.py"))


def plain_count(library: Path) -> list[tuple[str, int]]:
    """The same count by one plain process, for comparison."""
    step("count in one plain process, for comparison")
    output = subprocess.run(
        [sys.executable, str(HERE / "plain_count.py"), str(library)], check=True, capture_output=True
    )
    return parse_totals(output.stdout)


def count_words(client: Client, modules: dict[str, Path], library: Path) -> JobId:
    return client.submit(
        {
            "name": "wordcount",
            "run": {"module": str(modules["wordcount"])},
            "array": {"files": str(library), "per_task": FILES_PER_TASK},
            "outputs": ["counts.txt"],
            "needs": {"cpu": 0.5, "memory": "128Mi"},
        }
    )


def reduce(client: Client, modules: dict[str, Path], counted: JobId) -> JobId:
    return client.submit(
        {
            "name": "reduce",
            "run": {"module": str(modules["reduce"]), "args": ["counts"]},
            "inputs": {"counts/": f"job:{counted}"},
            "outputs": ["total.txt"],
        }
    )


# --- what is seen -----------------------------------------------------------------------------------------------------


def wait_until_it_survives_a_failure(client: Client) -> None:
    began = time.monotonic()
    while (status := client.cluster()).failures_survived < 1:
        if time.monotonic() - began > 30:
            raise MeshError(f"the mesh survives no failure after 30 s: {status.advice}")
        time.sleep(0.05)
    say(f"    {len(status.voters)} voters; the mesh survives {status.failures_survived} failure")


def watch(client: Client, job: JobId) -> None:
    """Follow a job to its end, with progress. Raises MeshError unless all its tasks are done."""
    began = time.monotonic()

    def show(view: JobView) -> None:
        at_work = view.counts.leased + view.counts.running
        line = f"    {view.name}: {view.counts.done}/{view.tasks} done, {at_work} at work"
        if IS_TERMINAL:
            print(f"\r{line:<70}", end="\r", file=sys.stderr, flush=True)

    view = client.wait(job, timeout_s=JOB_S, on_change=show)
    say(f"    {view.name}: {view.counts.done} of {view.tasks} tasks done in {time.monotonic() - began:.1f} s{' ' * 20}")
    if view.state is not TaskState.DONE:
        failed = next(client.tasks(view.id, states=[TaskState.FAILED]), None)
        raise MeshError(f"{view.name} ended {view.state.value}: {failed.outcome if failed else ''}")


def kill_while_it_works(mesh: DevMesh, name: str, client: Client, job: JobId) -> list[int]:
    """kill -9 the agent at a moment at which it holds tasks of the job; returns those."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        held = [key.task for key in client.node(name).leased if key.job == job]
        if held:
            mesh.kill(name)
            return held
        time.sleep(0.005)
    raise MeshError(f"{name} was never seen with a task")


def check_each_done_once(client: Client, job: JobId) -> None:
    tasks = list(client.tasks(job))
    for task in tasks:
        if task.state is not TaskState.DONE:
            raise MeshError(f"task {task.task} is {task.state.value}")
    again = sum(task.attempt > 1 for task in tasks)
    say(f"    each of the {len(tasks)} tasks is done once; {again} of them took another attempt")


def read_totals(client: Client, job: JobId, target: Path) -> list[tuple[str, int]]:
    client.get_directory(client.outputs(job).blob.hash, target)
    return parse_totals(next(target.rglob("total.txt")).read_bytes())


def parse_totals(data: bytes) -> list[tuple[str, int]]:
    rows = [line.split() for line in data.decode().splitlines() if line]
    return [(row[1], int(row[0])) for row in rows]


def check(found: list[tuple[str, int]], expected: list[tuple[str, int]]) -> None:
    if found != expected:
        raise MeshError(f"the mesh counted {len(found)} words otherwise than one plain process did ({len(expected)})")
    total = sum(count for _, count in found)
    say(f"    equal to the plain count: {len(found)} different words, {total} in all")


def step(text: str) -> None:
    say(f"==> {text}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
