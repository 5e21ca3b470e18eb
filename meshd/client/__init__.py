"""`from meshd.client import Client, MeshExecutor`: a mesh from Python. See `meshd.client.client` and `.executor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshd.client.client import Client
    from meshd.client.executor import MeshExecutor

__all__ = ["Client", "MeshExecutor"]


def __getattr__(name: str) -> object:
    # Late, because the command line imports parts of this package before it knows that it needs a client.
    match name:
        case "Client":
            from meshd.client.client import Client

            return Client
        case "MeshExecutor":
            from meshd.client.executor import MeshExecutor

            return MeshExecutor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
