"""The mesh's keys, one after the other: each is vouched for by the one before it (protocol.md 1).

    first key ──signs──▶ link 1: key 1 ──signs──▶ link 2: key 2 …      the mesh is named after the first

Removing a server changes the key, since that server has a copy. The links are in the replicated
state, and members show them in their greetings: one that was away follows the chain from the key
that it knows. Two chains that part cannot both be of the mesh; what the state says is the right one.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshd import codec
from meshd.admission import certificates
from meshd.admission.certificates import Sign, Verify, is_signed_by
from meshd.errors import NotAllowed
from meshd.model import Certificate, KeyLink, NodeId

LINKS_SHOWN = 64
"""In a greeting. Who missed more removals of servers than that joins again."""


def make_link(sign: Sign, mesh: str, serial: int, public_key: bytes) -> KeyLink:
    """`sign` is by the key before."""
    return KeyLink(serial, public_key, sign(_signed_bytes(mesh, serial, public_key)))


class KeyRing:
    def __init__(self, mesh: str, first: bytes, verify: Verify, links: Sequence[KeyLink] = ()) -> None:
        self._mesh = mesh
        self._verify = verify
        self.first = first
        self.links: tuple[KeyLink, ...] = ()
        self.learn(links)

    @property
    def serial(self) -> int:
        """How often the key was changed."""
        return len(self.links)

    @property
    def newest(self) -> bytes:
        return self.links[-1].public_key if self.links else self.first

    def shown(self) -> tuple[KeyLink, ...]:
        return self.links[-LINKS_SHOWN:]

    def check_next(self, link: KeyLink) -> None:
        """Raises NotAllowed unless it follows the newest key."""
        if link.serial != self.serial + 1 or not self._follows(self.newest, link):
            raise NotAllowed(f"change {link.serial} of the mesh's key does not follow change {self.serial}")

    def learn(self, links: Sequence[KeyLink]) -> bool:
        """Follow links that a peer shows; was there a new one? Raises NotAllowed, and then has learned nothing."""
        grown = list(self.links)
        for link in links:
            if link.serial <= len(grown):
                if link.serial < 1 or grown[link.serial - 1].public_key != link.public_key:
                    raise NotAllowed(
                        f"the mesh's key was changed in two ways: change {link.serial} is not the one known"
                    )
                continue
            before = grown[-1].public_key if grown else self.first
            if link.serial != len(grown) + 1 or not self._follows(before, link):
                raise NotAllowed(f"change {link.serial} of the mesh's key does not follow what is known here")
            grown.append(link)
        is_new = len(grown) > len(self.links)
        self.links = tuple(grown)
        return is_new

    def take(self, links: Sequence[KeyLink]) -> bool:
        """Links as the replicated state has them, from the first: they hold, whatever a peer showed before. Was that news?

        A list that is older than what was learned says nothing. Raises NotAllowed.
        """
        state = KeyRing(self._mesh, self.first, self._verify, links)
        if state.links == self.links[: state.serial]:
            return False
        self.links = state.links
        return True

    def check(self, certificate: Certificate, node: NodeId) -> bool:
        """Is it by the newest key? False: by an older one, which servers that were removed have too. Raises NotAllowed."""
        older = [self.first, *(link.public_key for link in self.links)][-LINKS_SHOWN:-1]
        signer = next((key for key in older if is_signed_by(key, certificate, self._verify)), self.newest)
        certificates.check(certificate, self._mesh, signer, node, self._verify)
        return signer == self.newest

    def is_newest(self, certificate: Certificate) -> bool:
        return is_signed_by(self.newest, certificate, self._verify)

    def _follows(self, before: bytes, link: KeyLink) -> bool:
        return self._verify(before, _signed_bytes(self._mesh, link.serial, link.public_key), link.signature)


def _signed_bytes(mesh: str, serial: int, public_key: bytes) -> bytes:
    return codec.pack(("meshd key", mesh, serial, public_key))
