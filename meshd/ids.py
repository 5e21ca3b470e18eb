"""The ids of submissions: UUIDv7, made by whoever submits, so that sending again is safe (protocol.md 7)."""

from __future__ import annotations

import re

from meshd.model import JobId

_JOB_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def is_job_id(text: str) -> bool:
    """A whole id, as `new_job_id` makes them: it stands for itself, while anything shorter has to be looked up."""
    return _JOB_ID.fullmatch(text) is not None


def new_job_id(now_ms: int, random: bytes) -> JobId:
    """A UUIDv7 of this wall time and 10 random bytes; ids of later milliseconds sort later."""
    assert len(random) == 10
    noise = int.from_bytes(random, "big")
    number = (
        (now_ms & (1 << 48) - 1) << 80 | 0x7 << 76 | (noise >> 62 & 0xFFF) << 64 | 0b10 << 62 | noise & (1 << 62) - 1
    )
    text = f"{number:032x}"
    return JobId(f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}")
