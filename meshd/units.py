"""How people write durations, sizes and ranges, and back: `90s`, `1h30m`, `512Mi`, `1-10:2`. Shared by specs and the CLI."""

from __future__ import annotations

import re

from meshd.errors import InvalidRequest

_DURATION_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 7 * 86_400_000}
_SIZE = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15,
    "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40, "pi": 2**50,
}  # fmt: skip
_DURATION_PART = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)(ms|s|m|h|d|w)", re.ASCII)
_SIZE_WHOLE = re.compile(r"(\d{1,19}(?:\.\d{1,6})?)\s*([kmgtp]i?)?b?", re.ASCII | re.IGNORECASE)

_UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi")

DURATION_CHARS_MAX = 100
AMOUNT_MAX = 2**53
"""Larger whole numbers are not exact in JSON."""


def parse_duration_ms(text: str | int | float) -> int:
    """`90s`, `1h30m`, `1.5h`, `500ms`; a bare number is seconds. Milliseconds. Raises InvalidRequest."""
    wrong = InvalidRequest(f"{shorten(text)} is not a duration", hint="write it like 90s, 10m or 1h30m")
    if isinstance(text, bool):
        raise wrong
    if isinstance(text, int | float):
        return _whole(text * 1000, wrong)
    if len(text) > DURATION_CHARS_MAX:
        raise wrong
    text = text.strip().lower()
    if re.fullmatch(r"\d{1,12}(\.\d{1,6})?", text, re.ASCII):
        return _whole(float(text) * 1000, wrong)
    total, end = 0.0, 0
    for part in _DURATION_PART.finditer(text):
        if part.start() != end:
            raise wrong
        total += float(part[1]) * _DURATION_MS[part[2]]
        end = part.end()
    if end != len(text) or not text:
        raise wrong
    return _whole(total, wrong)


def parse_size(text: str | int | float) -> int:
    """`512Mi`, `1.5G`, `4096`: Ki, Mi, Gi, Ti, Pi are powers of 1024; k, M, G, T, P of 1000. Bytes. Raises InvalidRequest."""
    wrong = InvalidRequest(f"{shorten(text)} is not a size", hint="write it like 512Mi, 2Gi or 4096")
    if isinstance(text, bool):
        raise wrong
    if isinstance(text, int | float):
        return _whole(text, wrong)
    match = _SIZE_WHOLE.fullmatch(text.strip())
    if match is None:
        raise wrong
    return _whole(float(match[1]) * _SIZE[(match[2] or "").lower()], wrong)


def parse_range(text: str) -> tuple[int, int, int]:
    """`1-10`, `0-100:5`, or one number: (first, last, step), both ends included. Raises InvalidRequest."""
    match = re.fullmatch(r"(\d{1,15})(?:-(\d{1,15}))?(?::(\d{1,15}))?", text.strip(), re.ASCII)
    wrong = InvalidRequest(f"{shorten(text)} is not a range", hint="write it like 1-100 or 0-1000:10")
    if match is None:
        if re.fullmatch(r"\d+(-\d+)?(:\d+)?", text.strip(), re.ASCII):
            raise InvalidRequest(f"{shorten(text)} has too many tasks, or too large numbers")
        raise wrong
    first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
    if step < 1:
        raise InvalidRequest(f"{shorten(text)} has a step of 0", hint=wrong.hint)
    if last < first:
        raise wrong
    return first, last, step


def format_duration(ms: int) -> str:
    """Two units at most: `1.5s`, `2m05s`, `3h07m`, `4d02h`."""
    if ms < 1000:
        return f"{ms}ms"
    seconds = ms // 1000
    if seconds < 60:
        return f"{ms / 1000:.1f}s"
    for unit, size, small, small_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // small_size:02}{small}"
    raise AssertionError(ms)


def format_size(size: int) -> str:
    """`17B`, `1.5Ki`, `340Mi`."""
    if size < 1024:
        return f"{size}B"
    power = min((size.bit_length() - 1) // 10, 5)
    amount = size / 1024**power
    return f"{amount:.1f}{_UNITS[power]}" if amount < 10 else f"{amount:.0f}{_UNITS[power]}"


def shorten(value: object) -> str:
    """What a user wrote, quoted, at a length that fits a message."""
    try:
        text = str(value)
    except ValueError:  # an int of over 4,300 digits
        text = "a very long number"
    return repr(text if len(text) <= 80 else text[:77] + "…")


def _whole(amount: float, wrong: InvalidRequest) -> int:
    # NaN fails both comparisons.
    if not 0 <= amount <= AMOUNT_MAX:
        raise wrong
    return round(amount)
