from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import pytest
from msgspec.structs import replace

from meshd import codec
from meshd.errors import InvalidRequest
from meshd.model import (
    REFERENCE_BYTES,
    TASKS_MAX,
    Array,
    BlobRef,
    Inline,
    Input,
    ItemsBlob,
    ItemsFiles,
    ItemsInline,
    ItemsRange,
    JobSpec,
    Needs,
    OnLost,
    Resources,
    Retry,
    RetryOn,
    Run,
    Timeout,
    TreeRef,
)
from meshd.spec import parse_job, write_blob, write_tree

HASH = "ab" * 32
BLOB = f"blob:{HASH}:7"
TREE = f"tree:{HASH}:99:10:5000"
A_BLOB = BlobRef(HASH, 7)
A_TREE = TreeRef(BlobRef(HASH, 99), 10, 5000)


def echo(**more: Any) -> dict[str, Any]:
    return {"run": {"args": ["echo", "hello"]}, **more}


def test_a_command_alone_is_a_job_for_the_process_backend() -> None:
    assert parse_job(echo()) == JobSpec(backend=("process",), run=Run(args=("echo", "hello")))


def test_a_memory_limit_can_be_none_at_all_or_what_a_program_can_start_in() -> None:
    for size in (0, "1Mi", "4Gi"):
        parse_job(echo(needs={"memory": size}))
    assert parse_job({"run": {"module": BLOB}, "needs": {"memory": "64Ki"}}).needs.resources.memory == 65536


def test_a_module_alone_is_a_job_for_the_wasm_backend() -> None:
    spec = parse_job({"run": {"module": BLOB}})
    assert (spec.backend, spec.run.module) == (("wasm",), A_BLOB)


def test_every_key_of_a_document_reaches_the_spec() -> None:
    spec = parse_job(
        {
            "name": "resize",
            "backend": ["wasm", "process"],
            "run": {
                "module": BLOB,
                "args": ["--width", 640],
                "env": {"LANG": "C", "A": 1},
                "stdin": {"text": "in"},
                "fuel": 5,
            },
            "inputs": {"photos/": TREE, "model.bin": BLOB, "tool": {"from": BLOB, "executable": True}},
            "outputs": ["out/", "report.json"],
            "array": {"items": ["a", "b"], "at_once": 50, "max_fails": 10},
            "needs": {"cpu": 0.5, "memory": "256Mi", "gpu": 1, "disk": "1Gi", "labels": "arch=x86_64", "license": 2},
            "retry": {"attempts": 5, "backoff": "2s..5m", "on": ["exit", "timeout"], "crash_limit": 3},
            "timeout": {"run": "10m", "queue": "1h", "total": "2h"},
            "on_lost": "wait",
            "lost_after": "10m",
            "priority": 70,
            "replicas": 3,
            "output_max": "1Mi",
            "labels": {"team": "x"},
        }
    )
    assert spec == JobSpec(
        name="resize",
        backend=("wasm", "process"),
        run=Run(
            args=("--width", "640"),
            module=A_BLOB,
            env=(("A", "1"), ("LANG", "C")),
            stdin=Inline(b"in"),
            fuel=5,
        ),
        inputs=(Input("model.bin", A_BLOB), Input("photos", A_TREE), Input("tool", A_BLOB, executable=True)),
        outputs=("out/", "report.json"),
        array=Array(2, ItemsInline(("a", "b")), 50, 10),
        needs=Needs(Resources(500, 256 << 20, 1 << 30, 1, (("license", 2),)), "arch=x86_64"),
        retry=Retry(5, 2000, 300_000, (RetryOn.EXIT, RetryOn.TIMEOUT), 3),
        timeout=Timeout(600_000, 3_600_000, 7_200_000),
        on_lost=OnLost.WAIT,
        lost_after_ms=600_000,
        priority=70,
        replicas=3,
        output_bytes_max=1 << 20,
        labels=(("team", "x"),),
    )


@pytest.mark.parametrize(
    ("written", "array"),
    [
        (10, Array(10, ItemsRange(0))),
        ("1-9:2%3", Array(5, ItemsRange(1, 2), at_once=3)),
        ({"range": "5-5"}, Array(1, ItemsRange(5))),
        ({"each_line": BLOB, "count": 4}, Array(4, ItemsBlob(A_BLOB))),
        ({"files": TREE, "per_task": 3}, Array(4, ItemsFiles(A_TREE, 3))),
    ],
)
def test_an_array_is_written_in_several_ways(written: Any, array: Array) -> None:
    assert parse_job(echo(array=written)).array == array


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (None, "job: expected a mapping, got nothing"),
        ({}, "run: missing"),
        ({"run": {}}, "run: needs args (a command) or module (wasm)"),
        ({"run": {"args": ["a", True]}}, "run.args[1]: expected text, got true or false"),
        ({"run": {"args": "echo"}}, "run.args: expected a list, got text"),
        ({"run": {"args": ["a"], "environment": {}}}, "run.environment: no such key"),
        ({"run": {"args": ["a"], "env": {"A-B": "1"}}}, "run.env: 'A-B' is not a name for a variable"),
        ({"run": {"args": ["a\0"]}}, "run.args[0]: contains a NUL byte"),
        ({"run": {"args": [""]}}, "run.args[0]: empty; it names the command"),
        (echo(needs={"memory": 1}), "needs.memory: 1 byte is below 1.0Mi, the least that backend process can run in"),
        (
            echo(needs={"memory": "512"}),
            "needs.memory: 512 bytes are below 1.0Mi, the least that backend process can run in",
        ),
        (
            {"run": {"module": BLOB}, "needs": {"memory": 1}},
            "needs.memory: 1 byte is below 64Ki, the least that backend wasm can run in",
        ),
        ({"run": {"args": ["x"], "fuel": 5}}, "run.fuel: only backend wasm counts it"),
        ({"run": {"args": ["a"], "secrets": ["K"]}}, "run.secrets: not supported yet"),
        (echo(schedule={"at": "2h"}), "schedule: not supported yet"),
        (echo(timeout={"idle": "5m"}), "timeout.idle: not supported yet"),
        (echo(timeout={"run": "soon"}), "timeout.run: 'soon' is not a duration"),
        (echo(needs={"memory": "much"}), "needs.memory: 'much' is not a size"),
        (echo(needs={"cpu": "-1"}), "needs.cpu: '-1' is not a number of cores"),
        (echo(inputs={"../x": BLOB}), "inputs.../x: '../x' may not contain empty parts, `.` or `..`"),
        (echo(inputs={"/etc/passwd": BLOB}), "inputs./etc/passwd: '/etc/passwd' is not a relative path"),
        (echo(inputs={"a": BLOB, "a/b": BLOB}), "inputs.a/b: 'a' is a file, so nothing can lie below it"),
        (
            echo(inputs={"a": BLOB, "a-b": BLOB, "a/b/c": BLOB}),
            "inputs.a/b/c: 'a' is a file, so nothing can lie below it",
        ),
        (echo(inputs={str(n): BLOB for n in range(1025)}), "inputs: 1025 entries; at most 1024"),
        (echo(labels={str(n): "" for n in range(257)}), "labels: 257 entries; at most 256"),
        (echo(needs={str(n): 1 for n in range(257)}), "needs: 257 entries; at most 256"),
        ({"run": {"args": ["x"], "env": {f"v{n}": "" for n in range(257)}}}, "run.env: 257 entries; at most 256"),
        (echo(array="5%" + "1" * 100), f"array: %{'1' * 77}… is not how many run at once"),
        (echo(timeout="1m" * 60), f"timeout.run: '{('1m' * 60)[:77]}…' is not a duration"),
        (echo(inputs={"a": "./photos"}), "inputs.a: './photos' is a file on your machine, not in the mesh"),
        (echo(inputs={"a": "blob:12"}), "inputs.a: 'blob:12' is not blob:HASH:SIZE"),
        (echo(outputs=["../x"]), "outputs[0]: '../x' may not contain empty parts, `.` or `..`"),
        (echo(array="9-1"), "array.range: '9-1' is not a range"),
        (echo(array={"range": 3, "items": []}), "array: needs exactly one of: range, items, each_line, files"),
        (echo(array=0), "array.range: '0' is not between 1 and 10000000"),
        (echo(array="1-20000000"), "array: 20000000 tasks; it can be 1 to 10000000"),
        (echo(priority=101), "priority: '101' is not between 0 and 100"),
        (echo(on_lost="retry"), "on_lost: 'retry' is not one of rerun, wait, fail"),
        (echo(backend="wasm"), "run.module: missing; backend wasm runs a module"),
        (
            echo(retry={"on": ["lost"]}),
            "retry.on[0]: a lost node is the matter of on_lost and retry.crash_limit, leave `lost` out",
        ),
        (echo(name="a/b"), "name: 'a/b' is not a name"),
    ],
)
def test_what_is_wrong_is_said_with_its_path(document: object, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_job(document)
    assert caught.value.message == message


def test_files_may_lie_in_directories_and_beside_what_is_named_alike() -> None:
    named = {"a": A_TREE, "a/b": A_BLOB, "c-d": A_BLOB, "c/d": A_BLOB, "e": A_BLOB, "e.f": A_BLOB}
    written = {name: write_tree(ref) if isinstance(ref, TreeRef) else write_blob(ref) for name, ref in named.items()}
    assert {given.path: given.source for given in parse_job(echo(inputs=written)).inputs} == named


def test_no_document_of_a_megabyte_holds_its_reader() -> None:
    deep = "/".join("a" * 2000)
    for document in (echo(inputs={f"{deep}{n}": BLOB for n in range(250)}), echo(retry={"backoff": "1" * 1_000_000})):
        begun = time.process_time()
        with suppress(InvalidRequest):
            parse_job(document)
        assert time.process_time() - begun < 0.5


def test_a_mistyped_key_is_met_with_the_one_that_was_meant() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_job(echo(need={"cpu": 1}))
    assert caught.value.hint == "did you mean `needs`?"


def test_references_are_written_as_they_are_read() -> None:
    spec = parse_job(echo(inputs={"f": write_blob(A_BLOB), "d": write_tree(A_TREE)}))
    assert spec.inputs == (Input("d", A_TREE), Input("f", A_BLOB))


def test_a_name_may_not_look_like_an_id() -> None:
    with pytest.raises(InvalidRequest, match="looks like the id of a job"):
        parse_job(echo(name="0199aaaa-bbbb-7ccc-8ddd-eeeeeeeeeeee"))


def test_the_larger_an_array_the_less_of_each_task_stays_in_the_log() -> None:
    shares = {tasks: replace(parse_job(echo()), array=Array(tasks)).inline_bytes_max for tasks in (1, 16_384, 65_536)}
    assert shares == {1: 4096, 16_384: 4096, 65_536: 1024}
    assert replace(parse_job(echo()), array=Array(TASKS_MAX)).inline_bytes_max == REFERENCE_BYTES
    assert len(codec.encode(BlobRef(HASH, 1 << 40))) == REFERENCE_BYTES, "as a blob it would be more"
