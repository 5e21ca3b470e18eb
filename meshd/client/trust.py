"""Whom to trust behind an address: the mesh whose CA the token names.

A token ends in a fingerprint of its mesh's CA certificate. The certificate itself is asked for over an
unverified connection, held against the fingerprint, and only then used; the token is sent after that.
"""

from __future__ import annotations

import hashlib
import http.client
import ssl

from meshd.client.address import Address
from meshd.client.http import CONNECT_S, Unreachable
from meshd.errors import NotAllowed, Unavailable

CA_BYTES_MAX = 64 << 10
FINGERPRINT_CHARS_MIN = 32


def pinned_context(address: Address, token: str, ca_pem: str) -> tuple[ssl.SSLContext, str]:
    """A context that accepts only nodes of the token's mesh, and the CA. Raises NotAllowed, Unavailable."""
    if not ca_pem:
        expected = fingerprint_of(token)
        certificate = _der_of(_fetch(address), address)
        if not hashlib.sha256(certificate).hexdigest().startswith(expected):
            raise NotAllowed(
                f"{address} belongs to another mesh than this token, or somebody is in between",
                hint="check the address; the token was not sent",
            )
        # Trusted is what was hashed and nothing else of the text: whoever is in between may have put another behind it.
        ca_pem = ssl.DER_cert_to_PEM_cert(certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=ca_pem)
    return context, ca_pem


def fingerprint_of(token: str) -> str:
    """Raises NotAllowed for a text that is no token."""
    parts = token.strip().split("_")
    if not token:
        raise NotAllowed("a node over the network needs a token", hint="`mesh token create NAME` there, then MESH_TOKEN or `mesh context add`")  # fmt: skip
    if len(parts) != 3 or parts[0] != "mesh" or len(parts[2]) < FINGERPRINT_CHARS_MIN:
        raise NotAllowed("this is not a token of a mesh that serves TLS", hint="a token looks like mesh_…_…")
    return parts[2]


def _fetch(address: Address) -> str:
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    connection = http.client.HTTPSConnection(address.host, address.port, timeout=CONNECT_S, context=unverified)
    try:
        connection.request("GET", "/v1/ca")
        response = connection.getresponse()
        data = response.read(CA_BYTES_MAX)
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"cannot reach {address}: {error or type(error).__name__}", hint="is this the API's port?") from error  # fmt: skip
    finally:
        connection.close()
    if response.status != 200:
        raise Unavailable(f"{address} does not show its mesh's certificate (status {response.status})")
    return data.decode("ascii", "replace")


def _der_of(pem: str, address: Address) -> bytes:
    try:
        return ssl.PEM_cert_to_DER_cert(pem.strip() + "\n")
    except ValueError as error:
        raise Unavailable(f"{address} shows no certificate; is it a mesh's API?") from error
