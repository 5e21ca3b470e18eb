"""The log's benches run: they take the ports of the engine as they are, and nothing else checks that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(tmp_path: Path, module: str, *options: str) -> dict[str, object]:
    """Its figures; whether they are within their bounds is for a machine that does nothing else."""
    file = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", module, "--directory", str(tmp_path), "--json", str(file), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert file.exists(), done.stderr
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def test_ours_and_stock_do_what_the_bench_of_the_log_asks(tmp_path: Path) -> None:
    figures = run(tmp_path, "bench.raft", "--seconds", "0.2", "--only", "libp2p", "stock-unbatched")["figures"]
    for contender in ("libp2p", "stock-unbatched"):
        assert figures[contender]["256 in flight, leader: commands/s"] > 0  # type: ignore[index]
    assert "longest turn of a loop, less the wait for a core: ms" in figures["libp2p"]  # type: ignore[index]


def test_every_phase_of_the_bench_of_stalls_is_reached(tmp_path: Path) -> None:
    rows = run(tmp_path, "bench.stalls", "--jobs", "400", "--seconds", "0.5")["rows"]
    phases = dict.fromkeys(row["phase"] for row in rows)  # type: ignore[attr-defined]
    assert list(phases)[-4:] == [
        "started far behind",
        "it installs a snapshot",
        "started again, log replayed",
        "it catches up",
    ]


@pytest.mark.parametrize("name", ["backends", "blobs", "rpc", "sync"])
def test_a_bench_that_is_asked_for_help_explains_itself_and_measures_nothing(name: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"bench.{name}", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {name}.py"), done.stderr


def test_a_history_is_filled_and_measured(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench.history", "--jobs", "2000", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert file.exists(), done.stderr
    assert any("-l batch=0" in figure["what"] for figure in json.loads(file.read_text()))
