"""Valid messages made hostile: cut, flipped, spliced, nested a thousand deep, of wrong types and sizes, with keys twice.

A coverage-guided fuzzer rarely gets past the first check of a typed format by flipping bits. So a message is
read as a tree where it can be (msgpack or JSON, also inside of byte strings), one place in it is changed, and
the tree is written again by a writer that also writes what no honest encoder would.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

import msgpack

from fuzz.inputs import FRAMES_MAX, join, split

STEPS_MAX = 4
"""Changes made to one input."""
_DESCENT_MAX = 8
"""Byte strings within byte strings that are read as trees."""


class Raw(bytes):
    """Written as it is."""


class Pairs(list[tuple[Any, Any]]):
    """A map, which may have a key twice."""


_HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 127, 128, 255, 2**31, 2**32, 2**53 - 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1,
    -(2**63), 0.0, -0.5, 1e308, float("nan"), float("inf"), "", "\0", "a", "é", "../../etc", "x" * 300, "9" * 5000,
    b"", b"\0", b"x" * 300, [], [[]], Pairs(), Pairs([("a", 1), ("a", 2)]),
)  # fmt: skip

_HOSTILE_MSGPACK: tuple[Raw, ...] = tuple(
    Raw(data)
    for data in (
        b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
        b"\xdc\xff\xff", b"\xde\xff\xff", b"\xc5\xff\xff", b"\xc9\x00\x40\x00\x00\x01", b"\xd4\x01\x00",
        b"\xd6\xff\xff\xff\xff\xff", b"\xc7\x0c\xff" + b"\xff" * 12, b"\xc1", b"\xa2\xff\xfe", b"\xa3\xed\xa0\x80",
        b"\x91" * 600 + b"\xc0", b"\x81\xa1a" * 600 + b"\xc0", b"\x91" * 1500 + b"\xc0", b"",
    )
)  # fmt: skip

_HOSTILE_JSON: tuple[Raw, ...] = tuple(
    Raw(data)
    for data in (
        b"NaN", b"1e999", b"-0", b"9" * 5000, b"0." + b"9" * 400, b'"\\ud800"', b'"\\u0000"', b'"\xff\xfe"',
        b"[" * 3000 + b"]" * 3000, b'{"a":' * 3000 + b"1" + b"}" * 3000, b'{"a":1,"a":2}', b"", b"1.5", b'"1e9d"',
    )
)  # fmt: skip


def mutated(data: bytes, random: Random, *, is_framed: bool, others: list[bytes]) -> bytes:
    """Another input, near to this one; `others` give parts."""
    for _ in range(random.randint(1, STEPS_MAX)):
        data = _frames_changed(data, random, others) if is_framed else _message_changed(data, random, others)
    return data


def _frames_changed(data: bytes, random: Random, others: list[bytes]) -> bytes:
    frames = split(data) or [b""]
    at = random.randrange(len(frames))
    match random.randrange(8):
        case 0:
            del frames[at]
        case 1:
            frames.insert(at, frames[random.randrange(len(frames))])
        case 2 if others:
            theirs = split(random.choice(others)) or [b""]
            frames[at:at] = theirs[random.randrange(len(theirs)) :]
        case 3:
            other = random.randrange(len(frames))
            frames[at], frames[other] = frames[other], frames[at]
        case _:
            # The first byte of a frame says what it is and from whom.
            head = frames[at][:1]
            if random.random() < 0.15:
                head = bytes([random.randrange(256)])
            frames[at] = head + _message_changed(frames[at][1:], random, [])
    return join(frame[:60_000] for frame in frames[:FRAMES_MAX])


def _message_changed(data: bytes, random: Random, others: list[bytes]) -> bytes:
    for read, write, hostile in (
        (_read_msgpack, _write_msgpack, _HOSTILE_MSGPACK),
        (_read_json, _write_json, _HOSTILE_JSON),
    ):
        if random.random() < 0.8 and (tree := read(data)) is not None:
            with suppress(RecursionError):  # nested a thousand deep already
                return write(_tree_changed(tree[0], random, (*_HOSTILE, *hostile, *hostile), 0))
    return _bytes_changed(data, random, others)


def _bytes_changed(data: bytes, random: Random, others: list[bytes]) -> bytes:
    changed = bytearray(data)
    at = random.randrange(len(changed) + 1)
    match random.randrange(6):
        case 0:
            del changed[at:]
        case 1:
            del changed[at : at + random.randint(1, 8)]
        case 2 if changed:
            changed[min(at, len(changed) - 1)] ^= 1 << random.randrange(8)
        case 3:
            changed[at:at] = bytes(random.randrange(256) for _ in range(random.randint(1, 8)))
        case 4 if others:
            other = random.choice(others)
            changed[at:] = other[random.randrange(len(other) + 1) :]
        case _:
            part = bytes(changed[at : at + random.randint(1, 64)])
            changed[at:at] = part * random.randint(1, 8)
    return bytes(changed)


# --- trees ------------------------------------------------------------------------------------------------------------


def _tree_changed(tree: Any, random: Random, hostile: tuple[Any, ...], depth: int) -> Any:
    """The tree with one place in it changed, reached by a random walk from the top."""
    if isinstance(tree, bytes) and not isinstance(tree, Raw) and depth < _DESCENT_MAX and random.random() < 0.8:
        inner = _read_msgpack(tree)
        if inner is not None and isinstance(inner[0], list):
            return _write_msgpack(_tree_changed(inner[0], random, hostile, depth + 1))
    if isinstance(tree, list) and tree and random.random() < 0.85:
        at = random.randrange(len(tree))
        changed = type(tree)(tree)
        match random.randrange(12):
            case 0:
                del changed[at]
            case 1:
                changed.insert(at, changed[random.randrange(len(changed))])
            case 2:
                other = random.randrange(len(changed))
                changed[at], changed[other] = changed[other], changed[at]
            case 3 if isinstance(tree, Pairs):
                changed[at] = (random.choice(hostile), changed[at][1])
            case 4 if not isinstance(tree, Pairs):
                changed.append(random.choice(hostile))
            case _ if isinstance(tree, Pairs):
                key, value = changed[at]
                changed[at] = (key, _tree_changed(value, random, hostile, depth))
            case _:
                changed[at] = _tree_changed(changed[at], random, hostile, depth)
        return changed
    if isinstance(tree, int) and not isinstance(tree, bool) and random.random() < 0.6:
        return tree + random.choice((-2, -1, 1, 2, 10, 255, 256, 2**32))
    if isinstance(tree, str) and random.random() < 0.3:
        return tree + random.choice(
            ("x", "\0", "/..", " ", "é", tree * 50, "%", "\ud800".encode(errors="replace").decode())
        )
    return random.choice(hostile)


def _read_msgpack(data: bytes) -> tuple[Any] | None:
    return _read(
        lambda: msgpack.unpackb(
            data, raw=False, strict_map_key=False, unicode_errors="surrogateescape", object_pairs_hook=Pairs
        )
    )


def _read_json(data: bytes) -> tuple[Any] | None:
    return _read(lambda: json.loads(data.decode(), object_pairs_hook=Pairs)) if data[:1] in (b"{", b"[", b'"') else None


def _read(read: Callable[[], Any]) -> tuple[Any] | None:
    try:
        return (read(),)
    except Exception:  # whatever it is, it is no tree, and this is no decoder of the agent's
        return None


def _write_msgpack(tree: Any) -> bytes:
    if isinstance(tree, Raw):
        return bytes(tree)
    if isinstance(tree, Pairs):
        head = bytes([0x80 | len(tree)]) if len(tree) < 16 else b"\xde" + len(tree).to_bytes(2, "big")
        return head + b"".join(_write_msgpack(key) + _write_msgpack(value) for key, value in tree)
    if isinstance(tree, list):
        head = bytes([0x90 | len(tree)]) if len(tree) < 16 else b"\xdc" + len(tree).to_bytes(2, "big")
        return head + b"".join(map(_write_msgpack, tree))
    try:
        return msgpack.packb(tree, use_bin_type=True, unicode_errors="surrogateescape")  # type: ignore[no-any-return]
    except (ValueError, OverflowError):
        return b"\xcf" + b"\xff" * 8


def _write_json(tree: Any) -> bytes:
    if isinstance(tree, Raw):
        return bytes(tree)
    if isinstance(tree, Pairs):
        return b"{" + b",".join(_write_json(str(key)) + b":" + _write_json(value) for key, value in tree) + b"}"
    if isinstance(tree, list):
        return b"[" + b",".join(map(_write_json, tree)) + b"]"
    if isinstance(tree, bytes):
        return json.dumps(tree.decode("latin-1")).encode()
    return json.dumps(tree).encode()
