"""What the documents show works as shown."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from mesh_cli import main

from tests.integration.api_server import served

DOCS = Path(__file__).parents[2] / "docs"


def blocks(name: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)


def test_every_command_line_in_the_document_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = [line[2:] for block in blocks("cli.md", "console") for line in block.splitlines()]
    assert len(lines) > 15
    monkeypatch.chdir(tmp_path)
    with served() as api:
        monkeypatch.setenv("MESH_NODE", api.node)
        for line in lines:
            assert main.run(shlex.split(line)[1:]) == 0, line


def test_the_python_in_the_document_works(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("api.md", "python")
    with served() as api:
        monkeypatch.setenv("MESHD_DATA_DIR", str(api.directory))
        exec(code, {})
    assert capsys.readouterr().out.strip() == "hello"


def test_every_path_in_the_document_exists() -> None:
    from meshd.api.app import ENDPOINTS

    known = {endpoint.path for endpoint in ENDPOINTS} | {"/openapi.json"}
    shown = set(re.findall(r"(?<![\w.])/(?:v1/[\w/]+|openapi\.json)", (DOCS / "api.md").read_text()))
    for path in shown:
        general = re.sub(r"/jobs/(last|JOB)", "/jobs/{job}", path)
        assert re.sub(r"/tasks/0", "/tasks/{task}", general) in known, path
