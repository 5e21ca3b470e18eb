"""The word count of wordcount.c and reduce.c in one plain process, to compare with.

python examples/plain_count.py PATH… > total.txt      files, or directories (their *.py, at any depth)
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

WORD = re.compile(rb"[A-Za-z0-9_]+")


def count(paths: Iterable[Path]) -> Counter[bytes]:
    words: Counter[bytes] = Counter()
    for path in paths:
        words.update(WORD.findall(path.read_bytes()))
    return words


def lines(words: Counter[bytes]) -> list[bytes]:
    """`count word`, the largest count first, then by word."""
    return [b"%d %s" % (n, word) for word, n in sorted(words.items(), key=lambda item: (-item[1], item[0]))]


def files(path: Path) -> Iterator[Path]:
    return (found for found in sorted(path.rglob("*.py")) if found.is_file()) if path.is_dir() else iter([path])


if __name__ == "__main__":
    found = [file for argument in sys.argv[1:] for file in files(Path(argument))]
    for line in lines(count(found)):
        sys.stdout.buffer.write(line + b"\n")
