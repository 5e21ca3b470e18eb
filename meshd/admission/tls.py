"""X.509 for the HTTPS API: the mesh's key is the authority, each node has a leaf. Peers never use these, only clients."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshd.durable import replace_file

_BEGIN = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_END = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)
# Validity is not what revokes a node (the state is), and a machine whose clock is off must stay reachable.


def make_authority(mesh_key: Ed25519PrivateKey, mesh: str) -> str:
    """The mesh's self-signed certificate, PEM. Made once at founding; its SHA-256 is what clients pin."""
    name = _name(f"meshd mesh {mesh}")
    builder = _builder(name, name, mesh_key.public_key()).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    return _pem(builder.sign(mesh_key, None))


def issue_leaf(mesh_key: Ed25519PrivateKey, ca_pem: str, request_pem: str) -> str:
    """Sign a node's request, PEM. Only its key, name and alternative names are taken over."""
    authority = x509.load_pem_x509_certificate(ca_pem.encode())
    request = x509.load_pem_x509_csr(request_pem.encode())
    builder = _builder(request.subject, authority.subject, request.public_key())
    names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    builder = (
        builder.add_extension(names, critical=False)
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
    names: list[x509.GeneralName] = [x509.DNSName("meshd"), x509.DNSName("localhost")]
    for host in dict.fromkeys((*hosts, "127.0.0.1", "::1")):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    request = x509.CertificateSigningRequestBuilder().subject_name(_name(node))
    request = request.add_extension(x509.SubjectAlternativeName(names), critical=False)
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
