"""Requests of somebody who may do everything: each endpoint's path, query and JSON body.

May be raised: nothing; the answer is never 500. A frame is an endpoint's number, then what stands in its path (a second
such thing behind a byte 1), query and body, each behind a zero byte.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from functools import cache
from urllib.parse import quote_from_bytes

import msgspec

from fuzz import world
from fuzz.inputs import join, split
from fuzz.targets.http import Client, serve
from meshd.api.app import ENDPOINTS
from meshd.api.endpoint import Endpoint

FRAMED = True


def fuzz(data: bytes) -> None:
    requests = [_SUBMIT, *(_request(frame) for frame in split(data) if frame)]
    if len(requests) > 1:
        client = Client([*requests, b"GET /v1/health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"])
        world.run(lambda: serve(client, user="root"))
        answer = bytes(client.answer)
        assert b"HTTP/1.1 500" not in answer, answer[answer.index(b"HTTP/1.1 500") :][:600]


def _request(frame: bytes) -> bytes:
    endpoint = _endpoints()[frame[0] % len(_endpoints())]
    parameter, _, rest = frame[1:].partition(b"\0")
    query, _, body = rest.partition(b"\0")
    path = endpoint.path
    first, _, second = parameter.partition(b"\1")
    path = path.replace("{task}", quote_from_bytes(second, safe=""))
    for name in ("job", "node", "hash", "name"):
        path = path.replace("{" + name + "}", quote_from_bytes(first, safe=""))
    target = f"{path}?{quote_from_bytes(query, safe='=&%')}"
    head = f"{endpoint.method} {target} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode("ascii") + body


_SPEC = b'{"spec":{"run":{"args":["echo","hi"]},"array":2}}'
_SUBMIT = b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(_SPEC), _SPEC)
"""So that there is a job to ask for."""


@cache
def _endpoints() -> list[Endpoint]:
    # A stream of events has no end of its own.
    return [endpoint for endpoint in ENDPOINTS if endpoint.path not in ("/v1/events",)]


def seeds() -> Iterator[bytes]:
    def frame(number: int, parameter: str = "", query: str = "", body: object = None) -> bytes:
        data = body if isinstance(body, bytes) else b"" if body is None else msgspec.json.encode(body)
        return bytes([number]) + parameter.encode() + b"\0" + query.encode() + b"\0" + data

    endpoints = _endpoints()
    spec: object
    body: object
    trees = next(number for number, endpoint in enumerate(endpoints) if endpoint.path == "/v1/trees")
    for tar in _tars():
        yield join([frame(trees, body=tar)])
    for number, endpoint in enumerate(endpoints):
        yield join(
            [frame(number, parameter) for parameter in ("last\x010", "last\x01²", "self", "a" * 64, "x\r\n", "\0")]
        )
        if endpoint.path == "/v1/jobs" and endpoint.method == "POST":
            for spec in (
                {"run": {"args": ["echo", "hi"]}}, {"run": {"args": ["hang"]}, "array": 3, "needs": {"labels": "a in (b)"}},
                {"run": {"module": "blob:" + "a" * 64}}, {"run": {"args": ["x"], "stdin": "job:last"}, "inputs": {"d": "tree:" + "a" * 64}},
                {"run": {"args": ["x"]}, "array": {"each_line": "blob:" + "b" * 64}, "retry": {"attempts": 3, "backoff": "1s..2s"}},
                5, None, [], {"run": 7}, "run",
            ):  # fmt: skip
                yield join([frame(number, body={"spec": spec})])
            for nonsense in (
                b"{",
                b'{"spec":' + b"[" * 3000,
                b'{"spec":{"run":{"args":[' + b"9" * 5000 + b"]}}}",
                b'{"spec":NaN}',
                b'{"spec":{"name":"\\ud800"}}',
                b'{"spec":{"\xff":1}}',
                b'{"a":1,"a":2}',
                b'{"id":"' + b"\\u0000" * 40 + b'","spec":{}}',
            ):
                yield join([frame(number, body=nonsense)])
        elif endpoint.body is not None:
            for body in (
                {},
                {"tasks": [[0, 1]]},
                b'{"tasks":[[0,99999999999999999999999]]}',
                b'{"deadline_ms":1' + b"0" * 400 + b"}",
                {"roles": ["worker"], "uses": 1},
                {"name": "ann", "role": "admin"},
                {"deadline_ms": 5, "cancel": True},
                {"uses": 1e300},
                [],
                b"\xff",
                b"blob bytes",
            ):
                yield join([frame(number, "last", "", body)])
        yield join(
            [
                frame(number, "last", query)
                for query in (
                    "limit=5",
                    "limit=-1&state=done",
                    "limit=99999999999999999999999",
                    "timeout=nan",
                    "timeout=inf",
                    "timeout=1e999&after=5",
                    "start=²&stop=5",
                    "label=a%3Db,=&before=%ff",
                    "follow=maybe&offset=-1",
                    "stale=true&stale=false",
                )
            ]
        )


def _tars() -> Iterator[bytes]:
    def packed(name: str, data: bytes = b"x", **changed: object) -> bytes:
        head = tarfile.TarInfo(name)
        head.size = len(data)
        for field, value in changed.items():
            setattr(head, field, value)
        return head.tobuf(tarfile.PAX_FORMAT) + data.ljust(-(-len(data) // 512) * 512, b"\0")

    end = bytes(1024)
    yield packed("a") + packed("b/c", b"y" * 600, mode=0o755) + end
    yield packed("../a") + end
    yield packed("a") + packed("a") + end
    yield packed("l", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd") + end
    yield packed("d", b"", type=tarfile.DIRTYPE) + packed("é" * 60) + end
    yield packed("big", size=2**60)
    yield packed("p", pax_headers={"size": "-1", "path": "q\0", "GNU.sparse.major": "1"}) + end
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        yield packed("huge", type=kind, size=1 << 30) + end
        yield packed("", b"", type=kind) * 60
    yield packed("h", pax_headers={"GNU.sparse.map": "abc"}) + end
    yield packed("h", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}) + end
    broken = bytearray(packed("n") + end)
    broken[124:136] = b"\x80" + b"\xff" * 11
    yield bytes(broken)
    yield packed("n")[:300]
