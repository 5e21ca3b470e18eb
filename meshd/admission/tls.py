"""X.509 for the HTTPS API: the mesh's key is the authority, each node has a leaf. Peers never use these, only clients."""

from __future__ import annotations

import datetime
import ipaddress
import re
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshd.durable import replace_file
from meshd.errors import InvalidRequest

_BEGIN = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_END = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)
_HOST = re.compile(r"[A-Za-z0-9._:-]+")
# Validity is not what revokes a node (the state is), and a machine whose clock is off must stay reachable.


def make_authority(mesh_key: Ed25519PrivateKey, mesh: str) -> str:
    """The mesh's self-signed certificate, PEM. Made once at founding; its SHA-256 is what clients pin."""
    name = _name(f"meshd mesh {mesh}")
    builder = _builder(name, name, mesh_key.public_key()).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    return _pem(builder.sign(mesh_key, None))


@dataclass(frozen=True, slots=True)
class LeafRequest:
    """What a node asks for that may be taken over; who it is, its connection says."""

    key: object
    hosts: tuple[str, ...]
    """As `canonical_host` writes them."""


def read_request(request_pem: str) -> LeafRequest:
    """Raises InvalidRequest, also for one that its key did not sign or that names anything but single hosts."""
    try:
        request = x509.load_pem_x509_csr(request_pem.encode())
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        is_signed = request.is_signature_valid
        key = request.public_key()
    except Exception as error:
        raise InvalidRequest(f"not a certificate signing request: {type(error).__name__}") from error
    if not is_signed:
        raise InvalidRequest("a certificate signing request that its key did not sign")
    for name in names:
        if not isinstance(name, x509.DNSName | x509.IPAddress) or not _HOST.fullmatch(str(name.value)):
            raise InvalidRequest("a certificate signing request may name hosts only, without wildcards")
    return LeafRequest(key, tuple(canonical_host(str(name.value)) for name in names))


def canonical_host(host: str) -> str:
    """One text for all ways to write an IP address or a DNS name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower().rstrip(".")
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def issue_leaf(mesh_key: Ed25519PrivateKey, ca_pem: str, node: str, request: LeafRequest) -> str:
    """The API certificate of a node, PEM."""
    authority = x509.load_pem_x509_certificate(ca_pem.encode())
    builder = _builder(_name(node), authority.subject, request.key)
    builder = (
        builder.add_extension(_hosts(request.hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    return _pem(builder.sign(mesh_key, None))


def make_request(key_file: Path, node: str, hosts: tuple[str, ...]) -> str:
    """A signing request for this node's API, PEM (blocks). Its key is made once, P-256, which every client speaks."""
    if (key := _key_in(key_file)) is None:
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        replace_file(key_file, pem)
    request = x509.CertificateSigningRequestBuilder().subject_name(_name(node))
    request = request.add_extension(_hosts(("meshd", "localhost", *hosts, "127.0.0.1", "::1")), critical=False)
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def server_context(certificate_file: Path, key_file: Path) -> ssl.SSLContext | None:
    """None where there is no certificate of this key: a crash may have come in between, and nobody rests on an old one (blocks)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(certificate_file, key_file)
    except OSError:  # ssl.SSLError too
        return None
    return context


def _key_in(file: Path) -> ec.EllipticCurvePrivateKey | None:
    """None also where a crash, or a full disk, left half of one."""
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), None)
    except (FileNotFoundError, ValueError):
        return None
    return key if isinstance(key, ec.EllipticCurvePrivateKey) else None


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _hosts(hosts: Iterable[str]) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys(hosts):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return x509.SubjectAlternativeName(names)


def _builder(subject: x509.Name, issuer: x509.Name, key: object) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)  # type: ignore[arg-type]
        .serial_number(x509.random_serial_number())
        .not_valid_before(_BEGIN)
        .not_valid_after(_END)
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
