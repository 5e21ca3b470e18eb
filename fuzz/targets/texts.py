"""Short texts from people and peers: invites, addresses, node ids, label selectors, durations, sizes, ranges, job ids, tokens.

May be raised: InvalidRequest; a label selector that parses is printed and parses again to itself.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import suppress

from fuzz.targets.join import _INVITE
from meshd.admission import invites
from meshd.admission.certificates import check
from meshd.api.auth import hash_secret, secret_of
from meshd.client import address as api_addresses
from meshd.errors import InvalidRequest, NotAllowed
from meshd.ids import is_job_id
from meshd.model import Certificate, JobId, NodeId, Role
from meshd.net import addresses
from meshd.net.identity_key import public_bytes, verify
from meshd.placement import parse_labels
from meshd.raft.state.ids import number_of
from meshd.units import parse_duration_ms, parse_range, parse_size

FRAMED = False
_PARSERS: tuple[Callable[[str], object], ...] = (
    invites.parse, addresses.parse, parse_duration_ms, parse_size, parse_range, is_job_id, api_addresses.parse_address,
    lambda text: number_of(JobId(text)), lambda text: public_bytes(NodeId(text)), lambda text: hash_secret(secret_of(text)),
)  # fmt: skip


def fuzz(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    for parse in _PARSERS:
        with suppress(InvalidRequest):
            parse(text)
    with suppress(InvalidRequest):
        terms = parse_labels(text[:1024])
        assert parse_labels(", ".join(map(str, terms))) == terms
    assert not verify(NodeId(text), b"x", data)
    # As it comes from the wire, where texts are UTF-8.
    node = NodeId(data.decode("utf-8", "replace"))
    with suppress(NotAllowed):
        check(Certificate("mesh", node, (Role.SERVER,), 1, data), "mesh", data[:32], node, verify)
    # An invite whose checksum is right, around any bytes.
    body = data[:1000]
    with suppress(InvalidRequest):
        invites.parse(invites.PREFIX + base64.urlsafe_b64encode(invites._checksum(body) + body).decode())


def seeds() -> Iterator[bytes]:
    yield from (
        text.encode()
        for text in (
            str(_INVITE), "/ip4/1.2.3.4/tcp/7373", "/ip6/::1/tcp/1", "/dns/a.example/tcp/65535", "/ip4/1.2.3.4/tcp/99999",
            "1h30m", "1.5h", "90", "500ms", "512Mi", "1.5G", "9" * 19, "1-100", "0-1000:10", "²", "1²", "٣", "1_000",
            "zone in (a,b), arch=x86_64, !spot", "a!=b,c notin (d, e)", "x", ",", "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp",
            "1" * 64, "018f0000-0000-7000-8000-000000000000", "mesh_abc_def", "unix:/run/x", "https://host:7374", "host:7374", "[::1]:80",
            "http://[::1", "https://host:99999999999999999999", "meshd1-", "meshd1-====", "\0", "1\x1d",
        )
    )  # fmt: skip
    from meshd import codec

    yield codec.encode(_INVITE)
