"""The client against the API over a real socket, the real state machine behind it."""

from __future__ import annotations

import io
import os
import re
import socket
import tarfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import msgspec
import pytest
import trio
from blake3 import blake3

from meshd import codec
from meshd.api.references import TREE_FILES_MAX
from meshd.client import Client
from meshd.errors import (
    Conflict,
    InvalidRequest,
    MeshError,
    NotAllowed,
    NotFound,
    TooLarge,
    Unavailable,
    UnknownOutcome,
    WaitTimeout,
)
from meshd.model import Inline, TaskState, Tree, TreeEntry, TreeRef
from meshd.views import BlobList, LogView
from tests.integration.api_server import Served, served

ECHO = {"run": {"args": ["echo", "hello"]}}


@pytest.fixture(scope="module")
def api() -> Iterator[Served]:
    with served(is_remote=True) as server:
        yield server


@pytest.fixture
def mesh(api: Served) -> Iterator[Client]:
    with Client([api.node]) as client:
        yield client


def test_a_job_goes_in_and_its_output_comes_out(mesh: Client) -> None:
    view = mesh.run(ECHO)
    assert (view.state, mesh.output(view.id)) == (TaskState.DONE, b"hello\n")


def test_sending_a_submission_again_does_not_run_it_twice(mesh: Client) -> None:
    job_id = mesh.new_id()
    assert mesh.submit(ECHO, job_id=job_id) == mesh.submit(ECHO, job_id=job_id)
    assert [job.id for job in mesh.jobs(limit=1000)].count(job_id) == 1


def test_a_job_is_found_by_prefix_name_and_last(mesh: Client) -> None:
    job = mesh.submit({**ECHO, "name": "greeting"})
    assert {mesh.job(text).id for text in (job, job[:30], "greeting", "last")} == {job}
    with pytest.raises(NotFound):
        mesh.job("nowhere")


def test_jobs_are_listed_by_state_and_label_over_pages(mesh: Client) -> None:
    for _ in range(3):
        mesh.submit({**ECHO, "labels": {"team": "pages"}})
    mesh.submit({"run": {"args": ["fail", "1"]}, "labels": {"team": "pages"}})
    assert len(list(mesh.jobs(labels={"team": "pages"}))) == 4
    assert len(list(mesh.jobs(labels={"team": "pages"}, states=["failed"]))) == 1
    assert len(list(mesh.jobs(labels={"team": "pages"}, limit=2))) == 2


def test_what_is_wrong_with_a_spec_is_said_with_its_path(mesh: Client) -> None:
    with pytest.raises(InvalidRequest, match=r"^run\.args\[1\]: expected text"):
        mesh.submit({"run": {"args": ["a", True]}})


def test_a_document_that_is_no_json_is_refused_before_it_is_sent(mesh: Client) -> None:
    loop: list[object] = []
    loop.append(loop)
    for value in (date(2024, 1, 1), b"x", {1, 2}, loop):
        with pytest.raises(InvalidRequest, match="cannot be written as JSON"):
            mesh.submit({**ECHO, "labels": {"a": value}})


def test_a_spec_of_a_hundred_megabytes_is_refused_and_the_node_lives(mesh: Client) -> None:
    begun = time.monotonic()
    with pytest.raises(TooLarge, match="over the limit of"):
        mesh.submit({"run": {"args": ["echo", "x" * 100_000_000]}})
    assert time.monotonic() - begun < 5
    assert mesh.run(ECHO).state is TaskState.DONE


def test_a_spec_that_fits_no_command_is_refused(mesh: Client) -> None:
    with pytest.raises(TooLarge, match="job of"):
        mesh.submit({**ECHO, "array": {"items": ["x" * 100] * 9000}})


def test_waiting_ends_when_it_was_said_to(mesh: Client) -> None:
    job = mesh.submit({"run": {"args": ["hang"]}})
    with pytest.raises(WaitTimeout):
        mesh.wait(job, timeout_s=0.1)
    with pytest.raises(Conflict, match="has no result yet"):
        mesh.result(job)
    assert mesh.cancel(job).id == job
    assert mesh.wait(job, timeout_s=10).state is TaskState.CANCELLED


def test_who_waits_for_the_end_asks_once_and_a_whole_id_is_not_looked_up(
    mesh: Client, api: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = mesh.submit(ECHO)
    asked: list[str] = []

    def counted(name: str) -> None:
        original = getattr(api.face, name)

        async def call(*arguments: object, **options: object) -> object:
            asked.append(name)
            return await original(*arguments, **options)

        monkeypatch.setattr(api.face, name, call)

    counted("wait_job")
    counted("query")
    mesh.wait(job)
    # The fake waits and follows by queries of its own: one each.
    assert asked == ["wait_job", "query"]
    mesh.output(job)
    assert asked == ["wait_job", "query", "query"]


def test_a_follower_sees_the_end_of_a_job_that_is_cancelled_meanwhile(mesh: Client, api: Served) -> None:
    job = mesh.submit({"run": {"args": ["hang"]}})
    pieces: list[object] = []

    def follow() -> None:
        with Client([api.node]) as client:
            pieces.extend(client.follow(job))

    follower = threading.Thread(target=follow)
    follower.start()
    mesh.cancel(job)
    follower.join(10)
    assert not follower.is_alive() and not pieces


def test_stdout_and_stderr_are_followed_apart(mesh: Client) -> None:
    job = mesh.submit({"run": {"args": ["fail", "3", "oops"]}})
    assert [(piece.stream, piece.data) for piece in mesh.follow(job)] == [("stderr", b"oops")]
    outcome = mesh.result(job).task.outcome
    assert outcome is not None and outcome.exit_code == 3


def test_a_follower_whose_connection_is_cut_in_a_later_attempt_misses_nothing(
    mesh: Client, api: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections = [
        [LogView(7, 0, b"of a node that is behind"), LogView(8, 0, b"second: one, tw"), LogView(8, 15, b"o")],
        [LogView(7, 0, b"a first attempt that says much. "), LogView(8, 0, b"second: "), LogView(8, 8, b"one, ")],
    ]

    async def follow_log(*_: object, **__: object) -> AsyncGenerator[LogView, None]:
        for piece in connections.pop():
            yield piece
            await trio.lowlevel.checkpoint()
        if connections:
            raise Unavailable("its node is gone")

    job = mesh.run(ECHO).id
    monkeypatch.setattr(api.face, "follow_log", follow_log)
    said = b"".join(piece.data for piece in mesh.follow(job, streams=["stdout"]))
    assert said == b"a first attempt that says much. second: one, two"


def test_failed_tasks_run_again_as_a_new_job(mesh: Client) -> None:
    job = mesh.run({"run": {"args": ["fail", "1"]}}).id
    again = mesh.retry(job)
    assert again != job and mesh.wait(again).retry_of == job


def test_a_job_that_no_node_can_run_is_explained(mesh: Client) -> None:
    job = mesh.submit({**ECHO, "needs": {"gpu": 8}})
    found = mesh.explain(job)
    assert not found.can_ever_run and "gpu" in found.nodes[0].lacks[0]
    mesh.cancel(job)


def test_a_blob_is_named_as_b3sum_would(mesh: Client, tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    (tmp_path / "a").write_bytes(data)
    ref = mesh.put_file(tmp_path / "a")
    assert ref.hash == blake3(data).hexdigest()
    target = io.BytesIO()
    assert mesh.get_blob(ref.hash, target) == len(data) and target.getvalue() == data
    assert mesh.blob_where(ref.hash[:12]).size == len(data)
    mesh.remove_blob(ref.hash)
    with pytest.raises(NotFound):
        mesh.get_blob(ref.hash, io.BytesIO())


def test_a_stream_of_unknown_length_becomes_a_blob(mesh: Client) -> None:
    assert mesh.put_stream(io.BytesIO(b"x" * 1_000_000)).size == 1_000_000


def test_blobs_are_listed_over_pages() -> None:
    with served() as api, Client([api.node]) as mesh:
        for n in range(2500):
            api.face.put(b"%d" % n)
        names = sorted(api.face.blobs)
        assert [blob.hash for blob in mesh.blobs()] == names
        assert [blob.hash for blob in mesh.blobs(prefix=names[7][:20])] == [names[7]]
        page = msgspec.json.decode(mesh._requester.json("GET", f"/v1/blobs?limit=2&after={names[3]}"), type=BlobList)
        assert ([blob.hash for blob in page.blobs], page.next) == (names[4:6], names[5])
        api.face.blobs |= {"ab12" * 16: b"", "ab12" * 15 + "ab13": b""}
        with pytest.raises(InvalidRequest, match="several blobs begin with"):
            mesh.blob_where("ab12ab12")


def test_a_directory_travels_there_and_back(mesh: Client, tmp_path: Path) -> None:
    source = tmp_path / "source"
    long_name = "n" * 150
    files = {"small": b"1", "empty": b"", "a/middle": os.urandom(50_000), f"a/{long_name}/{long_name}/large": os.urandom(2_500_000), "ünï/cödé": b"u"}  # fmt: skip
    for name, data in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    (source / "small").chmod(0o755)
    tree = mesh.put_directory(source)
    assert (tree.files, tree.bytes_total) == (5, sum(map(len, files.values())))
    assert mesh.get_directory(tree.blob.hash, tmp_path / "back") == 5
    assert {name: (tmp_path / "back" / name).read_bytes() for name in files} == files
    assert os.access(tmp_path / "back/small", os.X_OK) and not os.access(tmp_path / "back/empty", os.X_OK)


def test_a_directory_of_many_small_files_can_be_read_again(mesh: Client, api: Served) -> None:
    """Not all of them fit into its list: the limit of that is 32 MiB."""
    names = [f"{number % 97}/{number}" for number in range(9000)]
    tar = bytearray()
    for name in names:
        member = tarfile.TarInfo(name)
        member.size = 4096
        tar += member.tobuf() + name.encode().ljust(4096, b".")
    ref = msgspec.json.decode(_post_tar(mesh, bytes(tar + bytes(1024))), type=TreeRef)
    assert (ref.files, ref.bytes_total) == (9000, 9000 * 4096)
    tree = mesh.show_tree(ref.blob.hash)
    assert [entry.path for entry in tree.entries] == sorted(names)
    assert blake3(codec.encode(tree)).hexdigest() == ref.blob.hash
    assert len({type(entry.content) for entry in tree.entries}) == 2
    for entry in (tree.entries[0], tree.entries[-1]):
        data = entry.content.data if isinstance(entry.content, Inline) else api.face.blobs[entry.content.hash]
        assert data.startswith(entry.path.encode() + b".")


def test_a_list_of_more_files_than_a_directory_may_have_is_none(mesh: Client, api: Served) -> None:
    blob = api.face.put(codec.encode(Tree((TreeEntry("a", Inline(b"")),) * (TREE_FILES_MAX + 1))))
    with pytest.raises(InvalidRequest, match="at most 200000 files"):
        mesh.show_tree(blob.hash)


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "a/../../b"])
def test_a_tar_cannot_lead_out_of_its_directory(mesh: Client, name: str) -> None:
    member = tarfile.TarInfo(name)
    with pytest.raises(InvalidRequest):
        _post_tar(mesh, member.tobuf() + bytes(1024))


def test_a_tar_with_a_link_a_broken_tar_and_noise_are_refused(mesh: Client) -> None:
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    cut = tarfile.TarInfo("file")
    cut.size = 5000
    for data in (link.tobuf() + bytes(1024), cut.tobuf() + bytes(100), os.urandom(5000)):
        with pytest.raises(InvalidRequest):
            _post_tar(mesh, data)


def test_a_tar_with_header_upon_header_is_refused(mesh: Client) -> None:
    header = tarfile.TarInfo("more")
    header.type = tarfile.GNUTYPE_LONGNAME
    with pytest.raises(TooLarge, match="headers"):
        _post_tar(mesh, header.tobuf(tarfile.GNU_FORMAT) * 2000)


@pytest.mark.parametrize(
    "holes", [{"GNU.sparse.map": "abc"}, {"GNU.sparse.map": "0,0", "GNU.sparse.realsize": str(1 << 40)}]
)
def test_a_tar_with_holes_is_refused(mesh: Client, holes: dict[str, str]) -> None:
    member = tarfile.TarInfo("file")
    member.pax_headers = holes
    with pytest.raises(InvalidRequest):
        _post_tar(mesh, member.tobuf(tarfile.PAX_FORMAT) + bytes(1024))


def test_a_tar_may_say_where_it_comes_from_and_be_padded(mesh: Client) -> None:
    """As `git archive` does with a global header, and `tar` with a record of 10 KiB."""
    commit = tarfile.TarInfo("pax_global_header")
    payload = b"52 comment=" + b"a" * 40 + b"\n"
    commit.type, commit.size = tarfile.XGLTYPE, len(payload)
    file = tarfile.TarInfo("p/" * 2000 + "file")
    tar = commit.tobuf(tarfile.USTAR_FORMAT) + payload.ljust(512, b"\0") + file.tobuf(tarfile.PAX_FORMAT)
    answers = [_post_tar(mesh, tar + bytes(200_000)) for _ in range(2)]
    assert answers[0] == answers[1]


def test_inputs_that_are_named_by_path_are_uploaded(mesh: Client, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"from a file" * 1000)
    (tmp_path / "lines").write_text("a\nb\nc")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory/x").write_text("x")
    job = mesh.submit(
        {
            "run": {"args": ["cat"], "stdin": "in.txt"},
            "inputs": {"in.txt": "in.txt", "d/": "directory"},
            "array": {"each_line": "lines"},
        },
        base=tmp_path,
    )
    view = mesh.wait(job)
    assert (view.tasks, mesh.output(job, 2)) == (3, b"from a file" * 1000)
    with pytest.raises(NotFound, match=r"inputs\.gone: there is no file"):
        mesh.submit({**ECHO, "inputs": {"gone": "nowhere"}}, base=tmp_path)


def test_a_list_has_as_many_tasks_as_lines_whatever_else_they_contain(mesh: Client, tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes("a\fb\na\u2028b\r\n\na\rb".encode())
    job = mesh.submit({**ECHO, "array": {"each_line": "lines"}}, base=tmp_path)
    assert mesh.wait(job).tasks == 4


@pytest.mark.parametrize("count", [{}, {"count": 1}], ids=["counted", "count given"])
def test_a_list_that_no_node_could_read_is_refused_at_once(mesh: Client, tmp_path: Path, count: dict[str, int]) -> None:
    with open(tmp_path / "lines", "wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(TooLarge, match=r"array\.each_line: .* limit of 67108864"):
        mesh.submit({**ECHO, "array": {"each_line": "lines", **count}}, base=tmp_path)


def test_what_one_job_left_is_the_input_of_the_next(mesh: Client, tmp_path: Path) -> None:
    first = mesh.run({"run": {"args": ["files"]}, "outputs": ["out.txt"], "array": 3}).id
    second = mesh.run({**ECHO, "inputs": {"parts/": f"job:{first}"}})
    tree = mesh.outputs(first)
    assert second.spec.inputs[0].source == tree
    mesh.get_directory(tree.blob.hash, tmp_path)
    assert (tmp_path / "2/out.txt").read_text() == "task 2\n"
    hanging = mesh.submit({"run": {"args": ["hang"]}, "outputs": ["x"]})
    with pytest.raises(Conflict, match="has not finished"):
        mesh.submit({**ECHO, "inputs": {"parts/": f"job:{hanging}"}})
    mesh.cancel(hanging)


def test_a_job_that_names_a_blob_nobody_has_is_not_accepted(mesh: Client) -> None:
    for reference in (f"blob:{'ab' * 32}", f"blob:{'ab' * 32}:5", f"tree:{'ab' * 32}"):
        with pytest.raises(NotFound):
            mesh.submit({**ECHO, "inputs": {"x": reference}})


def test_a_blob_of_another_size_is_not_taken_for_it(mesh: Client) -> None:
    ref = mesh.put_bytes(b"seven b")
    with pytest.raises(InvalidRequest):
        mesh.submit({**ECHO, "inputs": {"x": f"blob:{ref.hash}:8"}})


def test_events_are_seen_live_and_resumed_by_position(mesh: Client, api: Served) -> None:
    mesh.run(ECHO)
    with Client([api.node]) as other:
        first = next(other.events(0))
        second = next(other.events(first.position))
    assert second.position > first.position and first.kind.startswith("job.")


def test_nodes_are_found_by_name_and_end_of_id(mesh: Client) -> None:
    row = mesh.node("fake")
    assert mesh.node(row.member.node[-8:]) == mesh.node("self") == row
    assert [view.is_safe for view in mesh.drain("fake")] == [False, True]
    mesh.undrain("fake")
    assert mesh.invite(["worker"], uses=2).startswith("meshd1-") and mesh.invites().invites[-1].uses_left == 2


# --- over the network ---------------------------------------------------------------------------------------------------


def test_a_token_opens_the_mesh_over_tls_and_only_it(mesh: Client, api: Served) -> None:
    node = f"127.0.0.1:{api.port}"
    token = mesh.create_token("ann", "operator")
    with Client([node], token=token) as client:
        assert (client.me().caller, client.me().role) == ("ann", "operator")
        assert client.run(ECHO).owner == "ann"
        assert client.ca_pem.strip() == api.ca_pem.strip()
        with pytest.raises(NotAllowed, match="needs the role admin"):
            client.create_token("eve", "admin")
    wrong = token.replace(token[5:15], "0123456789")
    with Client([node], token=wrong) as client, pytest.raises(NotAllowed, match="unknown or revoked"):
        client.me()
    with Client([node]) as client, pytest.raises(NotAllowed, match="needs a token"):
        client.me()


def test_a_viewer_looks_and_does_not_touch(mesh: Client, api: Served) -> None:
    token = mesh.create_token("viewer", "viewer")
    with Client([f"127.0.0.1:{api.port}"], token=token) as client:
        client.cluster()
        for touch in (lambda: client.submit(ECHO), lambda: client.put_bytes(b"x"), lambda: client.cancel("last")):
            with pytest.raises(NotAllowed, match="needs the role operator"):
                touch()


def test_a_revoked_token_stops_working(mesh: Client, api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshd.api.auth.KNOWN_S", 0.0)
    token = mesh.create_token("gone")
    with Client([f"127.0.0.1:{api.port}"], token=token) as client:
        client.me()
        mesh.revoke_token("gone")
        with pytest.raises(NotAllowed):
            client.me()


def test_a_token_is_not_sent_to_another_mesh(mesh: Client, api: Served) -> None:
    head, secret, _ = mesh.create_token("pinned").split("_")
    with (
        Client([f"127.0.0.1:{api.port}"], token=f"{head}_{secret}_{'0' * 32}") as client,
        pytest.raises(NotAllowed, match="the token was not sent"),
    ):
        client.me()


def test_a_node_with_somebody_elses_certificate_is_not_trusted(mesh: Client, api: Served) -> None:
    token, node = mesh.create_token("trusting"), f"127.0.0.1:{api.port}"
    with served(is_remote=True) as other, Client([node], token=token, ca_pem=other.ca_pem) as client:
        asked = pytest.raises(NotAllowed, match="is not a node of this mesh")
        with asked:
            client.me()


# --- failover -----------------------------------------------------------------------------------------------------------


def test_the_client_goes_on_with_the_next_node(mesh: Client, api: Served, tmp_path: Path) -> None:
    with Client([f"unix:{tmp_path}/nobody.sock", "127.0.0.1:1", api.node], token="mesh_x_" + "0" * 32) as client:
        assert client.run(ECHO).state is TaskState.DONE


def test_a_node_that_says_nothing_is_passed_over(api: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As an agent under SIGSTOP: its kernel takes the connection and the request, and nothing comes back.
    monkeypatch.setattr("meshd.client.client.ANSWER_S", 0.5)
    with socket.socket(socket.AF_UNIX) as stopped, Client([f"unix:{tmp_path}/s.sock", api.node]) as client:
        stopped.bind(f"{tmp_path}/s.sock")
        stopped.listen()
        assert client.summary() is not None


def test_a_node_that_reaches_no_voter_is_passed_over(api: Served) -> None:
    with served() as cut_off, Client([cut_off.node, api.node]) as client:
        cut_off.face.is_down = True
        assert client.run(ECHO).state is TaskState.DONE
        assert cut_off.face.proposals == 0


def test_a_mesh_that_comes_back_is_waited_for(api: Served) -> None:
    with served() as server, Client([server.node]) as client:
        server.face.is_down = True
        back = threading.Timer(0.7, lambda: setattr(server.face, "is_down", False))
        back.start()
        assert client.run(ECHO).state is TaskState.DONE


def test_nobody_there_is_said_at_once(tmp_path: Path) -> None:
    begun = time.monotonic()
    with (
        Client([f"unix:{tmp_path}/nobody.sock"]) as client,
        pytest.raises(Unavailable, match="no agent on this machine"),
    ):
        client.me()
    assert time.monotonic() - begun < 2


def test_a_node_that_was_restarted_is_asked_over_a_new_connection() -> None:
    with served() as server:
        client = Client([server.node])
        client.me()
    with served() as server, pytest.raises(MeshError):
        client.me()  # that socket is gone for good


def test_an_answer_that_is_cut_is_asked_for_again(mesh: Client, api: Served, tmp_path: Path) -> None:
    job = mesh.run({**ECHO, "array": 3}).id
    with _cutting(api, tmp_path) as asked, Client([f"unix:{tmp_path}/cut.sock"]) as client:
        assert [task.task for task in client.tasks(job)] == [0, 1, 2]
        assert len(asked) == 2


def test_a_refusal_that_is_cut_is_no_refusal(api: Served, tmp_path: Path) -> None:
    refused = b'HTTP/1.1 503 x\r\ncontent-length: 99\r\n\r\n{"error": {"co'
    with _cutting(api, tmp_path, lambda whole: refused), Client([f"unix:{tmp_path}/cut.sock"]) as client:
        assert client.me().name == "fake"


def test_what_may_be_done_is_not_repeated_where_its_answer_is_cut(mesh: Client, api: Served, tmp_path: Path) -> None:
    with _cutting(api, tmp_path) as asked, Client([f"unix:{tmp_path}/cut.sock"]) as client:
        with pytest.raises(UnknownOutcome, match="broke off") as cut:
            client.create_token("half-told")
        assert cut.value.hint and len(asked) == 1
    assert "half-told" in [token.name for token in mesh.tokens().tokens]


@contextmanager
def _cutting(
    api: Served, directory: Path, cut: Callable[[bytes], bytes] = lambda whole: whole[:-5]
) -> Iterator[list[bytes]]:
    """The node behind another socket whose first answer is cut, as of an agent that is killed. The heads it was asked with."""
    asked: list[bytes] = []

    def answer(listener: socket.socket) -> None:
        while True:
            try:
                caller, _ = listener.accept()
            except OSError:
                return
            with caller, caller.makefile("rb") as request, socket.socket(socket.AF_UNIX) as node:
                asked.append(b"".join(iter(request.readline, b"\r\n")))
                size = re.search(rb"content-length: (\d+)", asked[-1], re.IGNORECASE)
                body = request.read(int(size[1]) if size else 0)
                node.connect(str(api.socket))
                node.sendall(asked[-1] + b"connection: close\r\n\r\n" + body)
                whole = b"".join(iter(lambda: node.recv(1 << 16), b""))
                caller.sendall(cut(whole) if len(asked) == 1 else whole)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{directory}/cut.sock")
        listener.listen()
        server = threading.Thread(target=answer, args=(listener,), daemon=True)
        server.start()
        try:
            yield asked
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            server.join(10)


def _post_tar(mesh: Client, data: bytes) -> bytes:
    headers = {"content-type": "application/x-tar"}
    return mesh._requester.stream("POST", "/v1/trees", lambda: data, headers=headers).read()
