"""Whom a client trusts whose token names a mesh: that mesh's authority, whatever else the node shows."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshd.admission.tls import make_authority
from meshd.client import trust
from meshd.client.address import Address
from meshd.errors import NotAllowed, Unavailable

NODE = Address(host="192.0.2.1", port=7374)
OURS, ANOTHERS = (make_authority(Ed25519PrivateKey.generate(), "a-mesh") for _ in range(2))


def token_of(ca_pem: str) -> str:
    return "mesh_secret_" + hashlib.sha256(ssl.PEM_cert_to_DER_cert(ca_pem)).hexdigest()[:32]


@pytest.fixture
def shows(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setattr(trust, "_fetch", lambda address: text)


def test_the_authority_that_the_token_names_is_trusted_and_kept(shows: Callable[[str], None]) -> None:
    shows(OURS)
    context, ca_pem = trust.pinned_context(NODE, token_of(OURS), "")
    assert context.get_ca_certs(binary_form=True) == [ssl.PEM_cert_to_DER_cert(ca_pem)]
    assert ssl.PEM_cert_to_DER_cert(ca_pem) == ssl.PEM_cert_to_DER_cert(OURS)


@pytest.mark.parametrize("between", ["", "\n", "\n\n# \n"])
def test_another_authority_behind_it_is_not_trusted_with_it(shows: Callable[[str], None], between: str) -> None:
    shows(OURS + between + ANOTHERS)
    try:
        context, ca_pem = trust.pinned_context(NODE, token_of(OURS), "")
    except (NotAllowed, Unavailable):
        return  # refusing the whole text is as good
    assert context.get_ca_certs(binary_form=True) == [ssl.PEM_cert_to_DER_cert(OURS)]
    assert ca_pem.count("BEGIN CERTIFICATE") == 1


@pytest.mark.parametrize("text", [ANOTHERS, ANOTHERS + OURS])
def test_another_authority_is_refused_before_the_token_is_sent(shows: Callable[[str], None], text: str) -> None:
    shows(text)
    with pytest.raises((NotAllowed, Unavailable)):
        trust.pinned_context(NODE, token_of(OURS), "")


@pytest.mark.parametrize("text", ["", "nonsense", "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_is_said_so(shows: Callable[[str], None], text: str) -> None:
    shows(text)
    with pytest.raises((NotAllowed, Unavailable)):
        trust.pinned_context(NODE, token_of(OURS), "")
