"""What must be true of the repository itself."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_agents_cores_can_be_used_without_an_event_loop():
    code = "import meshd.agent, meshd.raft.state.machine, meshd.gossip.core, sys; print({'trio', 'libp2p', 'pysyncobj'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "set()\n"


def test_the_command_line_imports_no_agent():
    code = "import mesh_cli.main, meshd.client, sys; print({'trio', 'libp2p', 'pysyncobj', 'starlette', 'wasmtime'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "set()\n"


def test_a_planted_breach_of_the_architecture_is_found(tmp_path):
    """`lint-imports` passes on the tree as it is, and not once a pure core reads a clock."""
    for name in ("meshd", "cli", ".importlinter"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(tmp_path / name)], check=True)
    queue = tmp_path / "meshd" / "raft" / "state" / "queue.py"
    assert lint(tmp_path).returncode == 0, lint(tmp_path).stdout
    queue.write_text(queue.read_text() + "\nimport time\n")
    found = lint(tmp_path)
    assert found.returncode != 0 and "meshd.raft.state.queue -> time" in found.stdout


def lint(directory: Path) -> subprocess.CompletedProcess[str]:
    linter = Path(sys.executable).parent / "lint-imports"
    return subprocess.run(
        [str(linter), "--no-cache"],
        capture_output=True,
        text=True,
        cwd=directory,
        env={"PYTHONPATH": f"{directory}:{directory / 'cli'}", "PATH": "/usr/bin:/bin"},
    )


def test_every_link_in_the_documents_leads_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_wheel_holds_the_packages_and_nothing_called_cli(tmp_path):
    pytest.importorskip("hatchling")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"meshd/py.typed", "meshd/main.py", "mesh_cli/main.py"} <= set(names)
    assert not [name for name in names if name.startswith(("cli/", "tests/", "bench/"))]
