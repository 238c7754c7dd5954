"""The progress bar of long work: what is done, how fast, how long it will take. Silent where nobody watches."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """A bar on standard error with speed and time left.

    Args:
        title: what is being done.
        total: how much there is to do.
        unit: of what: "step", "trial".
        show: True or False; None shows it when standard error is a terminal.
    """

    def __init__(self, title: str, total: float, unit: str, *, show: bool | None = None) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self.show = sys.stderr.isatty() if show is None else show
        self.done: float = 0
        self._before: float = 0
        self._bar: Any = None
        self._started = time.monotonic()

    def __enter__(self) -> Progress:
        if self.show:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[counted]}"),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, counted="", speed="", note="")
        self._started = time.monotonic()
        return self

    def start_from(self, done: float) -> None:
        """Counts what was done by an earlier run; it does not enter the speed."""
        self._before = self.done = done
        self.advance(0)

    def advance(self, amount: float, note: str = "") -> None:
        """Counts `amount` more as done."""
        self.done += amount
        if self._bar is None:
            return
        speed = (self.done - self._before) / max(time.monotonic() - self._started, 1e-6)
        self._bar.update(
            self._task,
            completed=self.done,
            counted=f"{self.done:,.0f}/{self.total:,.0f} {self.unit}s",
            speed=f"{speed:,.1f} {self.unit}s/s",
            note=note,
        )

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
