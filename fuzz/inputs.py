"""What an input is: the bytes of one message, or of several, each behind a length of two bytes."""

from __future__ import annotations

from collections.abc import Iterable

FRAMES_MAX = 64
"""In one input: enough for an election, a log and a snapshot."""


def split(data: bytes) -> list[bytes]:
    """Never fails: a length beyond the end means the rest."""
    frames: list[bytes] = []
    at = 0
    while at + 2 <= len(data) and len(frames) < FRAMES_MAX:
        size = int.from_bytes(data[at : at + 2], "little")
        frames.append(data[at + 2 : at + 2 + size])
        at += 2 + size
    return frames


def join(frames: Iterable[bytes]) -> bytes:
    return b"".join(len(frame).to_bytes(2, "little") + frame for frame in frames)
