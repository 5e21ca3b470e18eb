"""The harness that compares us with others works with us alone; the others are not installed for the tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.peers.contenders import Contender
from bench.peers.driven import Failed, driven

ROOT = Path(__file__).parents[2]


def test_every_question_that_is_quick_has_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench.peers", "--question", "noop", "starts", "--contenders", "wasm, 1", "alone"]
    done = subprocess.run(
        [*command, "--sizes", "20", "--runs", "1", "--json", str(file)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    for name, column in (("noop", "20: tasks/s"), ("starts", "warm p50 ms")):
        rows = found[name]["rows"]
        assert [row["contender"] for row in rows] == ["meshd wasm, 1 node", "meshd function, alone"]
        assert all(row["figures"][column] > 0 for row in rows)
    assert "new module p50 ms" in found["starts"]["rows"][0]["figures"]


def test_a_contender_that_fails_is_said_and_leaves_nothing_behind(tmp_path: Path) -> None:
    broken = Contender("broken", "meshd", "", "", "", {"nodes": 1, "kind": "no such kind"})
    before = set(Path(ROOT / "build/peers/work").glob("*"))
    with pytest.raises(Failed, match="no such kind"), driven(broken, 1):
        pytest.fail("it started")
    assert set(Path(ROOT / "build/peers/work").glob("*")) <= before
