"""A job as a person writes it, in JSON and YAML: at the API, and as a file that the command line reads.

May be raised: InvalidRequest. What parses can be submitted: the log carries it, and the state machine answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress

import msgspec
from mesh_cli.document import parse_file
from msgspec import Raw

from fuzz.inputs import join, split
from fuzz.targets import machine as commands
from meshd import codec
from meshd.errors import InvalidRequest, MeshError
from meshd.raft.proposals import is_readable
from meshd.raft.state.commands import AnyAnswer, Batch, Stamped, Submit
from meshd.raft.state.machine import Machine
from meshd.spec import parse_job

FRAMED = False


def fuzz(data: bytes) -> None:
    with suppress(msgspec.MsgspecError, UnicodeError, RecursionError):  # as api/endpoint.py does
        _submit(msgspec.json.decode(data))
    with suppress(MeshError):
        _submit(parse_file(data, "job.yaml"))


def _submit(document: object) -> None:
    try:
        spec = parse_job(document)
    except InvalidRequest as error:
        # It is shown to whoever wrote it, and sent as JSON.
        json.dumps({"message": error.message, "hint": error.hint})
        msgspec.json.encode({"message": error.message, "hint": error.hint})
        return
    command = codec.encode(Submit(commands.job_id(1), spec))
    if len(command) <= codec.COMMAND_BYTES_MAX:
        assert is_readable(command)
        machine = Machine()
        for index, frame in enumerate(split(join(commands._prologue()))):
            machine.apply(
                index,
                codec.encode(Batch(1, commands.WALL_MS, (Stamped(commands.ORIGINS[frame[0] & 15], Raw(frame[1:])),))),
            )
        for answer in machine.apply(9, codec.encode(Batch(1, commands.WALL_MS, (Stamped(commands.A, Raw(command)),)))):
            codec.decode(answer, AnyAnswer)
        commands._check_views(machine)
        assert not machine.faults


def seeds() -> Iterator[bytes]:
    documents: list[object] = [
        {"run": {"args": ["echo", "hello"]}},
        {
            "name": "n", "backend": ["wasm", "process"], "run": {"module": f"blob:{'a' * 64}:5", "args": ["x"], "env": {"A": "b"}, "stdin": {"text": "hi"}, "fuel": 5},
            "inputs": {"d": f"tree:{'a' * 64}:1:2:3", "f": {"from": f"blob:{'b' * 64}:9", "executable": True}, "t": {"base64": "aGk="}}, "outputs": ["o/", "*.txt"],
            "array": {"items": ["a", 1, 2.5], "at_once": 2, "max_fails": 1}, "needs": {"cpu": "500m", "memory": "1Gi", "gpu": 1, "labels": "zone in (a,b), !x", "licence": 2},
            "retry": {"attempts": 3, "backoff": "1s..1m", "on": ["exit", "timeout"], "crash_limit": 5}, "timeout": {"run": "1h", "queue": 5, "total": 1e3},
            "on_lost": "wait", "lost_after": "auto", "priority": 9, "replicas": 1, "output_max": "1Mi", "labels": {"k": "v"},
        },
        {"run": {"args": ["x"]}, "array": "1-100:2%50", "timeout": "90s", "retry": 2, "lost_after": "30s"},
        {"run": {"args": ["x"]}, "array": {"each_line": f"blob:{'c' * 64}:7", "count": 9}},
        {"run": {"args": ["x"]}, "array": {"files": f"tree:{'d' * 64}:1:9:3", "per_task": 2}},
        {"run": {"args": ["x"]}, "arrray": 5, "needs": {"cpu": "nan"}}, {"run": {"args": ["x"], "env": {"MESHD_X": 1}}}, [], 5, "x", None,
    ]  # fmt: skip
    for document in documents:
        yield json.dumps(document).encode()
    yield from (
        b"run: {args: [echo, hello]}\narray: 10\n", b"run:\n  args: [x, 2001-99-99, 0x10, 1_000, .nan, !!binary aGk=]\n", b"a: &a [*a]\n",
        b"a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nrun: {args: *c}\n", b"!!python/object/apply:os.system [id]", b"? {a: 1}\n: 2\n",
        b"run: {args: [" + b"9" * 5000 + b"]}", b"[" * 2000, b"{a: " * 2000, b"run: {args: [0o777777777777777777777777]}", b"\xff\xfe", b"%YAML 9.9\n---\n", b"<<: 5\n", b"<<: [1]\nrun: x\n",
        b"2001-01-01: x\nrun: {args: [2001-01-01T00:00:00Z, 1:2:3, ~]}", b"!!set {a, b}", b"!!timestamp x", b"!!int x", b"!!float x", b"!!omap [a: 1, b]", b"- &x\n- *y\n",
    )  # fmt: skip
