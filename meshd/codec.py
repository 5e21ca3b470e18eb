"""The only place that knows bytes: msgpack <-> values, with a limit before every parse.

Two kinds of values cross a boundary. Typed ones (`meshd.model`, commands, RPC bodies)
are msgspec structs, so that decoding checks every field and nonsense from a peer
becomes one clear error. Plain ones (Raft frames, runner messages) are tuples, ints
and bytes. Both are ordinary msgpack on the wire; neither can ever run code.
"""

from __future__ import annotations

from typing import Any, TypeVar, overload

import msgpack
import msgspec

from meshd.errors import InvalidRequest, TooLarge

FRAME_BYTES_MAX = 4 << 20
"""No single message is larger; bulk bytes go as blob ranges of 1 MiB."""

COMMAND_BYTES_MAX = 512 << 10
"""One command in the log. Larger things are blobs; a batch of completions stays far below."""

T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


def encode(value: Any) -> bytes:
    """Typed value to msgpack bytes. Equal values give equal bytes."""
    return _encoder.encode(value)


@overload
def decode(data: bytes | memoryview, kind: type[T], *, bytes_max: int = ...) -> T: ...
@overload
def decode(data: bytes | memoryview, kind: Any, *, bytes_max: int = ...) -> Any: ...
def decode(data: bytes | memoryview, kind: Any, *, bytes_max: int = FRAME_BYTES_MAX) -> Any:
    """Bytes to a checked value of `kind`. Raises InvalidRequest, or TooLarge before anything is parsed."""
    if len(data) > bytes_max:
        raise TooLarge(f"message of {len(data)} bytes is over the limit of {bytes_max}")
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"malformed {getattr(kind, '__name__', 'message')}: {error}") from error


def nesting(data: bytes) -> int:
    """How deep containers lie within one another in these bytes, which are one well-formed msgpack value.

    Without recursion: a decoder's own limit depends on how deep the stack already is where it is called.
    """
    at = deepest = 0
    open_containers: list[int] = []  # how many values each still lacks
    while at < len(data):
        head = data[at]
        values, skipped = _extent(data, at, head)
        at += 1 + skipped
        if values:
            open_containers.append(values)
            deepest = max(deepest, len(open_containers))
            continue
        while open_containers:
            open_containers[-1] -= 1
            if open_containers[-1]:
                break
            open_containers.pop()
    return deepest


_FIXED = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8, 0xD4: 2, 0xD5: 3,
          0xD6: 5, 0xD7: 9, 0xD8: 17}  # fmt: skip
"""Bytes after the head of floats, integers and small extensions."""
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2,
          0xDF: 4}  # fmt: skip
"""Bytes of the length that follows the head of byte strings, extensions, texts, arrays and maps."""


def _extent(data: bytes, at: int, head: int) -> tuple[int, int]:
    """(values in it, bytes to skip) of what begins with this head."""
    if head < 0x80 or head >= 0xE0:
        return 0, 0
    if head < 0x90:
        return 2 * (head & 15), 0
    if head < 0xA0:
        return head & 15, 0
    if head < 0xC0:
        return 0, head & 31
    if head not in _SIZED:
        return 0, _FIXED.get(head, 0)
    digits = _SIZED[head]
    length = int.from_bytes(data[at + 1 : at + 1 + digits], "big")
    if head >= 0xDC:
        return length * (2 if head >= 0xDE else 1), digits
    return 0, digits + length + (0xC7 <= head <= 0xC9)


def pack(value: Any) -> bytes:
    """Plain value (None, bool, int, float, str, bytes, list, tuple, dict) to msgpack bytes."""
    return msgpack.packb(value, use_bin_type=True)  # type: ignore[no-any-return]


def unpack(data: bytes | memoryview, *, bytes_max: int = FRAME_BYTES_MAX) -> Any:
    """Bytes to a plain value, arrays as tuples. Raises InvalidRequest, or TooLarge before anything is parsed."""
    if len(data) > bytes_max:
        raise TooLarge(f"message of {len(data)} bytes is over the limit of {bytes_max}")
    try:
        return msgpack.unpackb(data, use_list=False, raw=False, strict_map_key=False)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise InvalidRequest(f"malformed message: {error}") from error
