"""Bytes that a peer sends never run code: nothing here unpickles but the client's executor, for its own jobs.

PySyncObj, which would, is given msgpack instead.
"""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pysyncobj import journal as stock_journal
from pysyncobj import serializer, syncobj

from fuzz.inputs import join
from fuzz.registry import NAMES, load
from fuzz.targets import raft
from fuzz.world import be_heard, be_quiet
from meshd import codec
from meshd.raft.messages import MEMBERSHIP, NO_OP, REPLICATED, Append
from meshd.raft.pysyncobj_state import _Msgpack

ROOT = Path(__file__).parents[2]
RUNS_CODE = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "code", "codeop"}
CALLS = {"eval", "exec", "compile", "__import__"}
UNPICKLES = ROOT / "meshd/client/pickles.py"
"""In the process of a job and in the program that submitted it; `lint-imports` keeps it out of the agent."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    be_quiet()
    yield
    be_heard()


def sources() -> list[Path]:
    return sorted({*(ROOT / "meshd").rglob("*.py"), *(ROOT / "cli").rglob("*.py")} - {UNPICKLES})


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_of_ours_can_turn_bytes_into_code(path: Path) -> None:
    assert not list(suspects(path.read_text()))


def test_the_agent_with_all_its_backends_loads_nothing_that_unpickles() -> None:
    code = (
        "import meshd.main, meshd.daemon, meshd.backends.wasm, meshd.backends.process, mesh_cli.main, sys;"
        "print({'meshd.client.pickles', 'cloudpickle'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr


def test_a_module_that_could_is_found() -> None:
    assert list(suspects(UNPICKLES.read_text()))
    assert list(suspects("from pickle import loads")) == ["pickle"]
    assert list(suspects("import marshal as m\nexec(m.loads(b''))")) == ["marshal", "exec"]
    assert list(suspects("import yaml\nyaml.load(x)\nyaml.safe_load(x)")) == ["yaml.load"]


def suspects(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                yield from (name.name for name in names if name.name.partition(".")[0] in RUNS_CODE)
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in RUNS_CODE:
                yield module
            case ast.Call(func=ast.Name(name)) if name in CALLS:
                yield name
            case ast.Call(func=ast.Attribute(ast.Name("yaml"), name)) if not name.startswith("safe_"):
                yield f"yaml.{name}"


def test_where_pysyncobj_unpickles_it_gets_msgpack() -> None:
    """Its other users of pickle are its journal files and its sockets, of which none is ever made."""
    assert syncobj.pickle is _Msgpack and serializer.pickle is _Msgpack
    assert _Msgpack.loads is codec.unpack and _Msgpack.dumps is codec.pack
    marker = object()
    assert syncobj.createJournal(marker) is marker
    assert not issubclass(type(raft.World(is_alone=True).journal), stock_journal.FileJournal)


@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_that_would_run_code_is_only_bytes(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "code-was-run"
    bomb = pickle.dumps(Bomb(marker))
    pickle.loads(bomb)
    assert marker.exists(), "the bomb works"
    marker.rmdir()
    target = load(name)
    yaml_bomb = b"!!python/object/apply:os.mkdir [" + str(marker).encode() + b"]"
    for payload in (bomb, codec.encode(bomb), codec.encode([bomb, {"x": bomb}]), yaml_bomb):
        target.fuzz(join([bytes([kind]) + payload for kind in range(16)]) if target.is_framed else payload)
    assert not marker.exists()


@pytest.mark.parametrize("kind", [REPLICATED, NO_OP, MEMBERSHIP, b"\x03"])
def test_a_leaders_entry_that_is_a_pickle_is_only_bytes(kind: bytes, tmp_path: Path) -> None:
    """Stock unpickles each of its kinds of commands."""
    marker = tmp_path / "code-was-run"
    bomb = pickle.dumps(Bomb(marker))
    append = Append(1, 1, 100_000, 3, 1, 0, ((NO_OP, 2, 1), (kind + bomb, 3, 1)))
    raft.fuzz(join([bytes([0]) + codec.encode(append), bytes([raft.DUE])]))
    assert not marker.exists()


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, (str(self.marker),)
