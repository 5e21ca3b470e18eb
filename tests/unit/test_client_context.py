"""Which mesh a program or a command speaks to when it is not told."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshd.client import Client, MeshExecutor
from meshd.client.context import Context, Contexts, find_mesh, save_contexts
from meshd.errors import NotFound, Unavailable

LAB = Context(("lab:7373",), "lab's token", "lab's CA")


@pytest.fixture(autouse=True)
def nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("MESH_NODE", "MESH_TOKEN", "MESH_CONTEXT"):
        monkeypatch.delenv(name, raising=False)


def test_where_nothing_says_otherwise_it_is_this_machines_agent() -> None:
    assert find_mesh() == Context(())


def test_the_environment_goes_before_what_is_saved_and_what_is_said_before_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_contexts(Contexts("lab", {"lab": LAB, "home": Context(("home:7373",))}))
    assert find_mesh() == LAB
    monkeypatch.setenv("MESH_CONTEXT", "home")
    assert find_mesh().nodes == ("home:7373",)
    monkeypatch.setenv("MESH_NODE", "one:1,two:2")
    assert find_mesh().nodes == ("one:1", "two:2")
    assert find_mesh(name="lab") == LAB
    assert find_mesh(["three:3"]).nodes == ("three:3",)


def test_another_token_than_the_saved_one_takes_no_saved_ca_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    save_contexts(Contexts("lab", {"lab": LAB}))
    assert find_mesh(token="lab's token") == LAB
    assert find_mesh(token="another") == Context(LAB.nodes, "another", "")
    monkeypatch.setenv("MESH_TOKEN", "a third")
    assert find_mesh() == Context(LAB.nodes, "a third", "")


def test_a_name_that_is_not_saved_is_told_with_those_that_are() -> None:
    save_contexts(Contexts("", {"lab": LAB}))
    with pytest.raises(NotFound, match="no saved context 'hom'"):
        find_mesh(name="hom")


def test_one_address_needs_no_list() -> None:
    with pytest.raises(Unavailable, match=r"/nowhere/api\.sock"):
        MeshExecutor("unix:/nowhere/api.sock")
    with Client("unix:/nowhere/api.sock,unix:/nowhere/else.sock") as client, pytest.raises(Unavailable, match="else"):
        client.me()
