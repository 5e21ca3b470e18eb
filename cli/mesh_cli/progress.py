"""A bar for whatever takes over a second, on a terminal. Shorter things, pipes and logs see nothing of it."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from mesh_cli.session import is_terminal

PATIENCE_S = 1.0


class Progress:
    """Shows one thing at a time: the bytes of a transfer, or the tasks of a job."""

    def __init__(self) -> None:
        self._is_shown = is_terminal()
        self._started_s = time.monotonic()
        self._what = ""
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def bytes(self, what: str, done: int, total: int) -> None:
        self._show(what, done, total, is_bytes=True)

    def tasks(self, what: str, done: int, total: int) -> None:
        self._show(what, done, total, is_bytes=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, what: str, done: int, total: int, *, is_bytes: bool) -> None:
        if not self._is_shown:
            return
        if what != self._what:
            self.close()
            self._what, self._started_s = what, time.monotonic()
        if self._bar is None:
            if time.monotonic() - self._started_s < PATIENCE_S or done >= total:
                return
            self._begin(is_bytes)
        self._bar.update(self._task, completed=done, total=total)
        if done >= total:
            self.close()

    def _begin(self, is_bytes: bool) -> None:
        # Rich takes longer to import than most commands take in all.
        from rich import progress
        from rich.console import Console

        from mesh_cli.output import plain

        columns: list[Any] = [progress.TextColumn("{task.description}", markup=False), progress.BarColumn()]
        columns += (
            [progress.DownloadColumn(binary_units=True), progress.TransferSpeedColumn()]
            if is_bytes
            else [progress.MofNCompleteColumn()]
        )
        columns.append(progress.TimeRemainingColumn())
        self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(plain(self._what))
        self._bar.start()
