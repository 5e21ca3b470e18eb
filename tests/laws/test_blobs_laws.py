"""Laws of blobs: any bytes come back, any order of ranges is whole, any liar is found."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import trio
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd import codec
from meshd.blobs.match import check_path
from meshd.blobs.plan import RANGE_BYTES, Plan
from meshd.blobs.store import Store
from meshd.blobs.tree import materialise, pack_tree
from meshd.errors import InvalidRequest
from meshd.model import BlobRef, NodeId, Tree

NODES = [NodeId(name) for name in "abcd"]


@given(pieces=st.lists(st.binary(max_size=5000), max_size=8))
@settings(max_examples=30, deadline=None)
def test_any_bytes_come_back_however_they_were_put(
    pieces: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.getbasetemp() / "any_bytes"

    async def check() -> None:
        store = await Store.open(directory)
        whole = b"".join(pieces)
        writer = await store.create()
        for piece in pieces:
            await writer.write(piece)
        ref = await writer.commit()
        assert ref == await store.put_bytes(whole) == BlobRef(blake3(whole).hexdigest(), len(whole))
        assert await store.get_bytes(ref, bytes_max=len(whole)) == whole
        refs = await store.put_many(pieces)
        assert await store.get_many(refs, bytes_max=5000) == pieces
        assert {ref, *refs} <= set(await store.list())

    trio.run(check)


names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..") and len(name.encode()) <= 60
)


@given(
    files=st.dictionaries(
        st.lists(names, min_size=1, max_size=3).map("/".join),
        st.tuples(st.binary(max_size=3000), st.booleans()),
        max_size=8,
    )
)
@settings(max_examples=30, deadline=None)
def test_a_directory_comes_back_from_its_tree(
    files: dict[str, tuple[bytes, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    kept = {path: value for path, value in files.items() if not any(other.startswith(path + "/") for other in files)}

    async def check() -> None:
        store = await Store.open(tmp_path_factory.getbasetemp() / "trees")
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            (root / "in").mkdir()
            for path, (data, executable) in kept.items():
                (root / "in" / path).parent.mkdir(parents=True, exist_ok=True)
                (root / "in" / path).write_bytes(data)
                (root / "in" / path).chmod(0o755 if executable else 0o644)
            ref = await pack_tree(root / "in", store)
            tree = codec.decode(await store.get_bytes(ref.blob, bytes_max=1 << 20), Tree)
            await materialise(tree, root / "out", store)
            out = {
                str(path.relative_to(root / "out")): (path.read_bytes(), bool(path.stat().st_mode & 0o100))
                for path in (root / "out").rglob("*")
                if path.is_file()
            }
            assert out == kept and ref.files == len(kept)
            assert await pack_tree(root / "out", store) == ref

    trio.run(check)


@given(path=st.text(st.sampled_from("ab./\0"), max_size=12))
def test_a_checked_path_stays_below_its_directory(path: str) -> None:
    try:
        check_path(path)
    except InvalidRequest:
        return
    assert not path.startswith("/") and "\0" not in path
    assert (Path("/root") / path).parts[1] == "root" and ".." not in Path(path).parts


@given(data=st.data(), ranges=st.integers(1, 12), liars=st.sets(st.sampled_from(NODES)))
@settings(max_examples=300, deadline=None)
def test_a_plan_ends_whole_when_one_source_is_honest_and_blames_only_liars(
    data: st.DataObject, ranges: int, liars: set[NodeId]
) -> None:
    """Sources answer, vanish and come back in any order; a liar spoils every other range it gives."""
    plan = Plan(ranges * RANGE_BYTES - 5)
    honest = [node for node in NODES if node not in liars]
    banned: set[NodeId] = set()
    asked: list[tuple[NodeId, int]] = []
    disk: dict[int, str] = {}
    for _ in range(2000):
        sources = [node for node in NODES if node not in banned]
        if plan.is_complete:
            is_right = disk == dict.fromkeys(range(ranges), "right")
            found = plan.judge(is_right=is_right)
            assert found <= liars
            banned |= found
            plan.begin([node for node in NODES if node not in banned])
            if is_right:
                assert plan.is_complete
                return
            if not honest and len(banned) == len(NODES):
                return
            continue
        # Mostly progress, sometimes loss: one that never answers would never end, with or without a plan.
        action = data.draw(st.sampled_from(["answer"] * 6 + ["lose"])) if _ < 100 else "answer"
        if action == "lose":
            source = data.draw(st.sampled_from(sources))
            plan.lost(source)
            asked = [entry for entry in asked if entry[0] != source]
            continue
        for source in sources:
            if (wanted := plan.take(source)) is not None:
                assert wanted.offset + wanted.length <= plan.size
                asked.append((source, wanted.index))
        if asked:
            source, index = asked.pop(data.draw(st.integers(0, len(asked) - 1)) if _ < 100 else 0)
            digest = f"wrong by {source}" if source in liars and index % 2 == 0 else "right"
            disk[index] = digest
            plan.arrived(source, index, digest)
    raise AssertionError("the plan did not end")
