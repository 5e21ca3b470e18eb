"""Directories as blobs: what a job leaves behind cannot reach out, what a tree names cannot get out."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from meshd import codec
from meshd.blobs import match, tree
from meshd.blobs.store import Store
from meshd.blobs.tree import check_tree, collect, materialise, pack_tree, refs_of, unpack_tree
from meshd.errors import InvalidRequest, MeshError, NotFound, TooLarge
from meshd.model import BlobRef, Inline, Tree, TreeEntry, TreeRef


@pytest.fixture
async def store(tmp_path: Path) -> Store:
    return await Store.open(tmp_path / "blobs")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    return tmp_path / "work"


def write(directory: Path, **files: str | bytes) -> None:
    for name, content in files.items():
        path = directory / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


async def tree_of(found: Inline | TreeRef | None, store: Store) -> Tree:
    assert found is not None
    data = found.data if isinstance(found, Inline) else await store.get_bytes(found.blob, bytes_max=1 << 26)
    return codec.decode(data, Tree, bytes_max=1 << 26)


async def paths(work: Path, patterns: list[str], store: Store) -> list[str]:
    return [entry.path for entry in (await tree_of(await collect(work, patterns, store), store)).entries]


async def test_no_patterns_collect_nothing(work: Path, store: Store) -> None:
    assert await collect(work, [], store) is None


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["report.json"], ["report.json"]),
        (["./report.json"], ["report.json"]),
        (["out/"], ["out/.hidden", "out/a.txt", "out/deep/b.txt", "out/deep/c.csv"]),
        (["out"], ["out/.hidden", "out/a.txt", "out/deep/b.txt", "out/deep/c.csv"]),
        (["out/deep/b.txt", "out/"], ["out/.hidden", "out/a.txt", "out/deep/b.txt", "out/deep/c.csv"]),
        (["*.json"], ["report.json"]),
        (["out/*"], ["out/a.txt", "out/deep/b.txt", "out/deep/c.csv"]),
        (["out/*/"], ["out/deep/b.txt", "out/deep/c.csv"]),
        (["out/*/*.txt"], ["out/deep/b.txt"]),
        (["out/.h*"], ["out/.hidden"]),
        (["**/*.txt"], ["out/a.txt", "out/deep/b.txt"]),
        (["out/**/?.[ct]*"], ["out/a.txt", "out/deep/b.txt", "out/deep/c.csv"]),
        (["nothing-*.log"], []),
        (["empty/"], []),
    ],
)
async def test_patterns_name_what_a_shell_would(
    work: Path, store: Store, patterns: list[str], expected: list[str]
) -> None:
    write(work, report_DOT_json="{}", out__a_DOT_txt="a", out__deep__b_DOT_txt="b", out__deep__c_DOT_csv="c")
    write(work, out___DOT_hidden="h")
    (work / "empty").mkdir()
    assert await paths(work, patterns, store) == expected


async def test_small_outputs_are_the_result_itself_and_large_ones_blobs(work: Path, store: Store) -> None:
    write(work, small="s" * 100, run="#!")
    (work / "run").chmod(0o755)
    found = await collect(work, ["small", "run"], store)
    assert isinstance(found, Inline) and await store.list() == []
    write(work, middle="m" * 5000, large=b"l" * 200_000)
    found = await collect(work, ["*"], store)
    assert isinstance(found, TreeRef) and (found.files, found.bytes_total) == (4, 205_102)
    entries = (await tree_of(found, store)).entries
    assert [(entry.path, type(entry.content), entry.executable) for entry in entries] == [
        ("large", BlobRef, False),
        ("middle", BlobRef, False),
        ("run", Inline, True),
        ("small", Inline, False),
    ]
    assert len(refs_of(Tree(entries))) == 2 and len(await store.list()) == 3


async def test_a_list_does_not_grow_without_end_with_what_is_in_it(
    work: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "LIST_BYTES_MAX", 20_000)
    for number in range(60):
        write(work, **{f"f{number}": os.urandom(1000)})
    found = await collect(work, ["*"], store)
    assert isinstance(found, TreeRef) and found.blob.size < 20_000
    assert len(refs_of(await tree_of(found, store))) > 40
    await materialise(check_tree(await tree_of(found, store)), work.parent / "copy", store)
    assert all((work.parent / "copy" / f"f{n}").read_bytes() == (work / f"f{n}").read_bytes() for n in range(60))


async def test_few_small_outputs_and_their_list_are_made_durable_together(
    work: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(work, a=b"a" * 5000, b=b"b" * 5000, c=b"c")
    batches: list[int] = []
    put_many = store._disk.put_many

    def counted(datas: list[bytes]) -> list[BlobRef]:
        batches.append(len(datas))
        return put_many(datas)

    monkeypatch.setattr(store._disk, "put_many", counted)
    found = await collect(work, ["*"], store)
    assert batches == [3], "two files and the list, in which the third lies"
    assert [type(entry.content) for entry in (await tree_of(found, store)).entries] == [BlobRef, BlobRef, Inline]
    await materialise(check_tree(await tree_of(found, store)), work.parent / "copy", store)
    assert (work.parent / "copy" / "b").read_bytes() == b"b" * 5000


async def test_missing_outputs_are_named(work: Path, store: Store) -> None:
    write(work, there="x")
    with pytest.raises(InvalidRequest, match=r"gone\.txt, out/"):
        await collect(work, ["there", "gone.txt", "out/"], store)


@pytest.mark.parametrize(
    "pattern", ["/etc/passwd", "../outside/secret", "a/../../outside", "", "/", "x//y", "a\0b", "x" * 300]
)
async def test_a_pattern_that_leads_out_is_refused(work: Path, store: Store, pattern: str) -> None:
    with pytest.raises(InvalidRequest):
        await collect(work, [pattern], store)


def link_file(work: Path) -> None:
    (work / "out" / "x").symlink_to("../../outside/secret")


def link_directory(work: Path) -> None:
    (work / "out").rmdir()
    (work / "out").symlink_to("../outside")


def link_inside(work: Path) -> None:
    (work / "out" / "x").symlink_to("../../outside")


def fifo(work: Path) -> None:
    os.mkfifo(work / "out" / "x")


def unix_socket(work: Path) -> None:
    here = os.getcwd()
    os.chdir(work / "out")  # a socket's path may have 108 bytes only
    try:
        socket.socket(socket.AF_UNIX).bind("x")
    finally:
        os.chdir(here)


def not_utf8(work: Path) -> None:
    (Path(os.fsdecode(os.fsencode(work / "out") + b"/\xff"))).write_text("x")


def too_deep(work: Path) -> None:
    directory = os.open(work / "out", os.O_RDONLY)
    for _ in range(200):
        os.mkdir("d", dir_fd=directory)
        inner = os.open("d", os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = inner
    os.close(directory)


def sparse(work: Path) -> None:
    with (work / "out" / "x").open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(
    "leave", [link_file, link_directory, link_inside, fifo, unix_socket, not_utf8, too_deep, sparse]
)
@pytest.mark.parametrize("patterns", [["out/"], ["out/*"], ["**"], ["out/x"]])
async def test_whatever_a_job_leaves_is_refused_quickly_and_nothing_of_it_kept(
    work: Path, store: Store, leave: Callable[[Path], None], patterns: list[str]
) -> None:
    (work / "out").mkdir()
    leave(work)
    with trio.fail_after(10):
        try:
            found = await collect(work, patterns, store)
        except InvalidRequest as error:
            said = str(error)
        else:
            said = "".join(entry.path for entry in (await tree_of(found, store)).entries)  # a glob passed a link by
    assert "secret" not in said and len(said) < 500
    for ref in await store.list():
        assert b"secret" not in await store.get_bytes(ref, bytes_max=1 << 20)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
async def test_an_unreadable_directory_is_said(work: Path, store: Store) -> None:
    write(work, out__x="x")
    (work / "out").chmod(0)
    with pytest.raises(InvalidRequest, match="Permission denied"):
        await collect(work, ["out/"], store)
    (work / "out").chmod(0o700)


async def test_limits_of_files_and_bytes_are_kept(work: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        write(work, **{f"f{number}": "x" * 10})
    with pytest.raises(TooLarge, match="199 bytes"):
        await collect(work, ["*"], store, bytes_max=199)
    monkeypatch.setattr(match, "FILES_MAX", 19)
    with pytest.raises(TooLarge, match="19 files"):
        await collect(work, ["*"], store)
    monkeypatch.setattr(match, "SCANNED_MAX", 15)
    with pytest.raises(TooLarge, match="look through"):
        await collect(work, ["*"], store)


async def test_a_file_swapped_for_a_link_after_it_was_found_is_not_followed(work: Path, tmp_path: Path) -> None:
    write(work, out__x="x")
    root = os.open(work, os.O_RDONLY)
    (found,) = match.find(root, ["out/"], bytes_max=100)
    (work / "out" / "x").unlink()
    (work / "out" / "x").symlink_to("../../outside/secret")
    with pytest.raises(InvalidRequest):
        match.open_file(root, found.path)
    (work / "out" / "x").unlink()
    (work / "out").rmdir()
    (work / "out").symlink_to(tmp_path / "outside")
    with pytest.raises(InvalidRequest):
        match.open_file(root, "out/secret")
    os.close(root)


async def test_equal_directories_make_equal_trees_wherever_they_are(tmp_path: Path, store: Store) -> None:
    files = {f"d{n % 7}__f{n}": os.urandom(n * 40) for n in range(50)}
    write(tmp_path / "one", **files)
    write(tmp_path / "two", **dict(reversed(files.items())))
    assert await pack_tree(tmp_path / "one", store) == await pack_tree(tmp_path / "two", store)


# --- laying out ------------------------------------------------------------------------------------------------------


def entries(*names: str) -> Tree:
    return Tree(tuple(TreeEntry(name, Inline(b"evil")) for name in names))


@pytest.mark.parametrize(
    "bad",
    [
        ("../outside/x",), ("/etc/x",), ("a/../../x",), ("a//x",), ("./x",), ("a/",), ("x\0",), (".",), ("..",),
        ("a", "a/b"), ("a", "a"), ("b", "a"), ("a/" * 200 + "x",), ("n" * 256,), ("a", "a-b", "a/b"),
    ],
)  # fmt: skip
async def test_a_tree_that_leads_out_or_contradicts_itself_writes_nothing(
    tmp_path: Path, store: Store, bad: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidRequest):
        await materialise(check_tree(entries(*bad)), tmp_path / "target", store)
    assert not (tmp_path / "target").exists() and not (tmp_path / "outside").exists()


async def test_links_in_the_way_are_not_followed(tmp_path: Path, work: Path, store: Store) -> None:
    ref = await store.put_bytes(b"evil")
    (work / "dir").symlink_to(tmp_path / "outside")
    (work / "file").symlink_to(tmp_path / "outside" / "secret")
    for path in ("dir/new", "file"):
        for content in (Inline(b"evil"), ref):
            with pytest.raises(InvalidRequest):
                await materialise(check_tree(Tree((TreeEntry(path, content),))), work, store)
    assert [(path.name, path.read_text()) for path in (tmp_path / "outside").iterdir()] == [("secret", "secret")]


async def test_what_is_there_is_not_overwritten(work: Path, store: Store) -> None:
    write(work, x="mine")
    with pytest.raises(InvalidRequest):
        await materialise(check_tree(entries("x")), work, store)
    with pytest.raises(InvalidRequest):
        await materialise(check_tree(entries("x/y")), work, store)
    assert (work / "x").read_text() == "mine"


async def test_a_tree_with_a_missing_blob_is_not_found(work: Path, store: Store) -> None:
    with pytest.raises(NotFound):
        await materialise(check_tree(Tree((TreeEntry("x", BlobRef("0" * 64, 5)),))), work, store)


def test_a_list_reads_as_it_was_written_and_nonsense_in_it_is_refused() -> None:
    tree = Tree((TreeEntry("a", Inline(b"x"), executable=True), TreeEntry("b", BlobRef("0" * 64, 5))))
    assert unpack_tree(codec.encode(tree), bytes_max=1000) == tree
    empty = b"\x81\xa7entries"
    for bad in (b"", empty + b"\x91\xc0", empty + b"\xdd" + (4 << 20).to_bytes(4, "big") + b"\xc0" * (4 << 20)):
        with pytest.raises(InvalidRequest):
            unpack_tree(bad, bytes_max=64 << 20)


async def test_too_many_files_are_refused_before_any_is_written(work: Path, store: Store) -> None:
    many = Tree(tuple(TreeEntry(f"f{n:06}", Inline(b"")) for n in range(match.FILES_MAX + 1)))
    with pytest.raises(InvalidRequest, match="100000"):
        check_tree(many)


async def test_a_full_disk_is_not_the_jobs_fault(work: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tree, "_write", full)
    with pytest.raises(MeshError) as failed:
        await materialise(check_tree(entries("x")), work, store)
    assert failed.value.code == "busy"
