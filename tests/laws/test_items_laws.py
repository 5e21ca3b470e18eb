"""What is counted as a job is submitted is what its tasks get."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from meshd.items import LineCount, split_lines

BYTES = st.lists(st.sampled_from([b"\n", b"\r\n", b"\r", b"a", b"", "\u2028".encode(), b"\xe2", b"\x85", b"\f"])).map(
    b"".join
)


@given(st.lists(BYTES))
@example([])
@example([b"\n"])
@example([b"a\r", b"\n"])
def test_as_many_lines_are_counted_chunk_by_chunk_as_there_are_items(chunks: list[bytes]) -> None:
    counted = LineCount()
    for chunk in chunks:
        counted.add(chunk)
    assert counted.lines == len(split_lines(b"".join(chunks)))


@given(st.lists(st.text().filter(lambda text: "\n" not in text and not text.endswith("\r"))))
def test_lines_come_back_as_they_were_written(lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    assert split_lines(text.encode()) == split_lines(text.replace("\n", "\r\n").encode()) == tuple(lines)
