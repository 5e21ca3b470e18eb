"""Whatever a person or a program sends as a job, the answer is a spec or InvalidRequest, and a spec fits the codec."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from meshd import codec
from meshd.errors import InvalidRequest
from meshd.model import JobSpec
from meshd.spec import parse_job
from meshd.units import format_duration, format_size, parse_duration_ms, parse_range, parse_size

HASH = "ab" * 32
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.builds(lambda: 10**5000),
    st.sampled_from(
        [
            "1-5", "10m", "1..2s", "256Mi", f"blob:{HASH}:7", f"tree:{HASH}:9:3:1", "auto", "wait", "wasm", "process",
            "\ud800", "9" * 400, "a/../b", "٣", 1e308, float("nan"), b"x",
        ]
    ),
)  # fmt: skip
KEYS = st.sampled_from(
    [
        "name", "backend", "run", "inputs", "outputs", "array", "needs", "retry", "timeout", "on_lost", "lost_after",
        "priority", "replicas", "output_max", "labels", "args", "module", "env", "stdin", "fuel", "range", "items",
        "each_line", "files", "per_task", "count", "at_once", "max_fails", "cpu", "memory", "gpu", "attempts",
        "backoff", "on", "crash_limit", "queue", "total", "text", "base64", "from", "executable", "\ud800", 7, None,
    ]
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=20,
)
JOBS = st.dictionaries(KEYS, ANYTHING, max_size=8).map(lambda job: {"run": {"args": ["x"]}, **job})


@settings(max_examples=400, deadline=None)
@given(ANYTHING | JOBS)
def test_a_document_is_a_spec_or_an_invalid_request(document: Any) -> None:
    with suppress(InvalidRequest):
        spec = parse_job(document)
        assert codec.decode(codec.encode(spec), JobSpec) == spec


@given(st.text(max_size=30) | st.floats() | st.integers())
@example("1\x1d")  # a space to str.strip, and not to float
def test_a_unit_is_read_or_refused(text: Any) -> None:
    for parse in (parse_duration_ms, parse_size):
        with suppress(InvalidRequest):
            assert parse(text) >= 0


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 1000))
def test_a_range_is_read_as_it_is_written(first: int, more: int, step: int) -> None:
    assert parse_range(f"{first}-{first + more}:{step}") == (first, first + more, step)


@given(st.integers(0, 2**53))
def test_what_is_shown_of_a_size_is_near_what_it_is(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= size * 0.06


@given(st.integers(0, 10**12))
def test_what_is_shown_of_a_duration_is_near_what_it_is(ms: int) -> None:
    assert abs(parse_duration_ms(format_duration(ms)) - ms) <= max(ms * 0.05, 50)
