"""Directories that jobs worked in, removed also when the job took the rights away from its own. Runs in a thread."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def remove(directory: Path | str) -> None:
    """Never raises; what resists stays for the next start's sweep."""
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        return
    except OSError:
        try:
            os.chmod(directory, 0o700)
            for path, directories, _ in os.walk(directory):
                for each in directories:
                    if not os.path.islink(os.path.join(path, each)):  # never through a link: it may point anywhere
                        os.chmod(os.path.join(path, each), 0o700)
        except OSError:
            return
        shutil.rmtree(directory, ignore_errors=True)
