"""What is counted as a job is submitted is what its tasks get; what is measured is what a program would be given."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from meshd.items import LineCount, Lines, Strings
from meshd.model import Run

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
    assert counted.lines == len(Lines(b"".join(chunks)))


@given(st.lists(st.text().filter(lambda text: "\n" not in text and not text.endswith("\r"))))
def test_lines_come_back_as_they_were_written(lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    assert list(Lines(text.encode())) == list(Lines(text.replace("\n", "\r\n").encode())) == lines


TEXT = st.lists(st.sampled_from(["{item}", "{", "item}", "{{item}}", "ü", "x"])).map("".join)


@given(st.lists(TEXT), st.dictionaries(st.sampled_from("ABC"), TEXT), TEXT)
def test_strings_are_measured_as_they_would_be_made(args: list[str], env: dict[str, str], item: str) -> None:
    made = [argument.replace("{item}", item) for argument in args]
    made += [f"{name}={value}" for name, value in (*env.items(), ("MESHD_ITEM", item))]
    assert Strings(Run(tuple(args), env=tuple(env.items()))).bytes_with(item) == sum(
        len(each.encode()) + 1 for each in made
    )
