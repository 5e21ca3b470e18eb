"""What is known, as a tree of hashes: equal roots mean equal knowledge, and cost eight bytes to compare.

    root (8 bytes, in every ping) ── differ ──▶ 64 buckets (512 bytes) ── differ ──▶ rows of those buckets

A hash is the XOR of its rows' hashes, so that a changed row costs the same in a mesh of
ten or ten thousand. Members could construct collisions with rows of their own; they would
only hide their own facts from someone.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from meshd import codec
from meshd.gossip.messages import BUCKETS, ROWS_MAX, Row
from meshd.model import NodeId


class Tree:
    def __init__(self) -> None:
        self._rows: list[dict[NodeId, tuple[Row, int]]] = [{} for _ in range(BUCKETS)]
        self._hashes = [0] * BUCKETS
        self._root = 0

    @property
    def root(self) -> bytes:
        return self._root.to_bytes(8, "big")

    @property
    def hashes(self) -> bytes:
        return b"".join(value.to_bytes(8, "big") for value in self._hashes)

    def put(self, row: Row) -> None:
        bucket = bucket_of(row.node)
        old = self._rows[bucket].get(row.node)
        if old is not None and old[0] == row:
            return
        value = int.from_bytes(blake2b(codec.encode(row), digest_size=8).digest(), "big")
        self._rows[bucket][row.node] = (row, value)
        self._mix(bucket, value ^ (old[1] if old is not None else 0))

    def drop(self, node: NodeId) -> None:
        bucket = bucket_of(node)
        old = self._rows[bucket].pop(node, None)
        if old is not None:
            self._mix(bucket, old[1])

    def differing(self, hashes: bytes, start: int) -> tuple[int, ...]:
        """Buckets unlike the peer's, from bucket `start` on, as many as have `ROWS_MAX` rows here together.

        A different start each time lets every bucket have its turn in a very large mesh.
        """
        mine = self.hashes
        chosen: list[int] = []
        rows = 0
        for bucket in (*range(start, BUCKETS), *range(start)):
            at = slice(8 * bucket, 8 * bucket + 8)
            if mine[at] == hashes[at]:
                continue
            rows += len(self._rows[bucket])
            if chosen and rows > ROWS_MAX:
                break
            chosen.append(bucket)
        return tuple(chosen)

    def rows(self, buckets: Sequence[int]) -> tuple[Row, ...]:
        """At most `ROWS_MAX`; a bucket alone is larger only in a mesh of 16,000 nodes."""
        return tuple(row for bucket in buckets for row, _ in self._rows[bucket].values())[:ROWS_MAX]

    def _mix(self, bucket: int, value: int) -> None:
        self._hashes[bucket] ^= value
        self._root ^= value


def bucket_of(node: NodeId) -> int:
    return blake2b(node.encode(), digest_size=1).digest()[0] % BUCKETS
