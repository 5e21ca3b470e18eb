"""Which mesh is meant: by name, by the environment, or by what was saved in one private file, `~/.config/meshd/contexts.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from meshd.errors import Corrupt, NotFound


@dataclass(frozen=True, slots=True)
class Context:
    nodes: tuple[str, ...]
    """Addresses, as `parse_address` reads them; tried in this order."""
    token: str = ""
    ca_pem: str = ""


@dataclass(frozen=True, slots=True)
class Contexts:
    current: str = ""
    saved: dict[str, Context] = field(default_factory=dict)

    def get(self, name: str) -> Context:
        if name not in self.saved:
            known = ", ".join(sorted(self.saved)) or "none"
            raise NotFound(f"no saved context {name!r}", hint=f"there are: {known}; `mesh context add` saves one")
        return self.saved[name]


def find_mesh(nodes: Sequence[str] = (), name: str = "", *, token: str = "") -> Context:
    """These nodes, or the saved context of that name; else what MESH_NODE or MESH_CONTEXT say; else the current context.

    No nodes in the answer: this machine's agent. This token, or MESH_TOKEN, goes before a saved one. Raises NotFound, Corrupt.
    """
    token = token or os.environ.get("MESH_TOKEN", "")
    if not nodes and not name:
        nodes, name = split_nodes(os.environ.get("MESH_NODE", "")), os.environ.get("MESH_CONTEXT", "")
    if nodes:
        return Context(tuple(nodes), token)
    contexts = load_contexts()
    name = name or contexts.current
    if not name:
        return Context((), token)
    saved = contexts.get(name)
    # A saved CA is of the mesh that the saved token names.
    return Context(saved.nodes, token or saved.token, "" if token and token != saved.token else saved.ca_pem)


def split_nodes(text: str) -> tuple[str, ...]:
    """Several with commas between them."""
    return tuple(part for part in text.split(",") if part)


def contexts_file() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if base else Path.home() / ".config") / "meshd" / "contexts.json"


def load_contexts() -> Contexts:
    """Raises Corrupt when the file cannot be understood."""
    path = contexts_file()
    try:
        found: Any = json.loads(path.read_bytes())
        saved = {
            str(name): Context(tuple(map(str, it["nodes"])), str(it.get("token", "")), str(it.get("ca_pem", "")))
            for name, it in found["contexts"].items()
        }
        return Contexts(str(found.get("current", "")), saved)
    except FileNotFoundError:
        return Contexts()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(
            f"cannot read {path}: {error}", hint="repair it, or move it away and add contexts anew"
        ) from error


def save_contexts(contexts: Contexts) -> None:
    """Replaced in one step, readable by the user alone: it holds tokens."""
    path = contexts_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    data = {"current": contexts.current, "contexts": {name: asdict(it) for name, it in contexts.saved.items()}}
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(data, file, indent=1)
    beside.replace(path)
