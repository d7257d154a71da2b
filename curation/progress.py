"""Progress of a pass: counts, failures and an estimate of the time left, as a bar on a terminal or as lines in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from waver_core.telemetry import duration_text

_LINE_EVERY_S = 10.0


class Progress:
    """The estimate goes by bytes, since files differ more in size than in number."""

    def __init__(self, name: str, items: int, size_bytes: int, console: Console) -> None:
        self._name, self._items, self._bytes, self._console = name, items, size_bytes, console
        self._done = self._failed = self._bytes_done = 0
        self._started = self._last_line = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        if self._items and self._console.is_terminal:
            columns = (TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Bar(*columns, console=self._console)
            self._task = self._bar.add_task(self._name, total=self._items, note="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._items and kind is None:
            self._console.print(self._line())

    def advance(self, size_bytes: int, failed: bool) -> None:
        """One more item is done."""
        self._done, self._failed, self._bytes_done = self._done + 1, self._failed + failed, self._bytes_done + size_bytes
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=self._note())
        elif time.monotonic() - self._last_line > _LINE_EVERY_S and self._done < self._items:
            self._last_line = time.monotonic()
            self._console.print(self._line())

    def _note(self) -> str:
        parts = [f"{self._failed} failed"] if self._failed else []
        elapsed_s = time.monotonic() - self._started
        if self._done < self._items and self._bytes_done:
            parts.append(f"about {duration_text(elapsed_s * (self._bytes / self._bytes_done - 1))} left")
        else:
            parts.append(f"in {duration_text(elapsed_s)}")
        return ", ".join(parts)

    def _line(self) -> str:
        return f"{self._name:<9} {self._done:,} of {self._items:,}, {self._note()}"
