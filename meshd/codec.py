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
