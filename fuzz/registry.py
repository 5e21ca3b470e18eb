"""All targets by name, and the corpus of each: one line of base64 for each input, sorted, in `corpus/NAME.txt`."""

from __future__ import annotations

import base64
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

NAMES = (
    "wire", "raft", "journal", "snapshot", "machine", "gossip", "calls", "methods", "replies", "blob_stream", "join",
    "muxer", "texts", "http", "api", "spec", "runner", "history",
)  # fmt: skip

CORPUS = Path(__file__).parent / "corpus"
INPUT_BYTES_MAX = 8192
"""Of what is kept; bounds far above are checked by hand-written tests."""
CORPUS_INPUTS_MAX = 150
CORPUS_BYTES_MAX = 96 << 10
"""Of one target, in the repository: replaying all of them has to fit `make test`."""


@dataclass(frozen=True, slots=True)
class Target:
    name: str
    is_framed: bool
    fuzz: Callable[[bytes], None]
    """Raises what nobody should be able to make the agent raise, and nothing else."""
    seeds: Callable[[], Iterable[bytes]]

    @property
    def corpus_file(self) -> Path:
        return CORPUS / f"{self.name}.txt"

    def corpus(self) -> list[bytes]:
        """What was found, and valid messages as they are now."""
        found = self.corpus_file.read_text().split() if self.corpus_file.exists() else ()
        return sorted({*self.seeds(), *(base64.b64decode(line) for line in found)})

    def keep(self, inputs: Iterable[bytes]) -> None:
        """What was found, the small ones first, as far as there is room; seeds are made anew each time."""
        kept: list[bytes] = []
        size = 0
        for data in sorted({*inputs}.difference(self.seeds()), key=lambda data: (len(data), data)):
            size += len(data)
            if len(kept) < CORPUS_INPUTS_MAX and len(data) <= INPUT_BYTES_MAX and size <= CORPUS_BYTES_MAX:
                kept.append(data)
        self.corpus_file.write_text("".join(base64.b64encode(data).decode() + "\n" for data in sorted(kept)))


def load(name: str) -> Target:
    """Imports only what this target needs: what is imported is what a coverage-guided fuzzer instruments."""
    module = importlib.import_module(f"fuzz.targets.{name}")
    return Target(name, module.FRAMED, module.fuzz, module.seeds)
