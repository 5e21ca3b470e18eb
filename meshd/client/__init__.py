"""`from meshd.client import Client`: a mesh from Python. See `meshd.client.client`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshd.client.client import Client

__all__ = ["Client"]


def __getattr__(name: str) -> object:
    # Late, because the command line imports parts of this package before it knows that it needs a client.
    if name == "Client":
        from meshd.client.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
