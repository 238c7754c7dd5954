"""Ctrl-C at a place of our choosing: the first one asks to stop at the next safe point, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether Ctrl-C was pressed since `listening` began."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[Interrupt]:
        """While inside, the first Ctrl-C (or SIGTERM) only sets `requested`; a second raises KeyboardInterrupt.

        Signals can be caught in the main thread only; elsewhere Ctrl-C acts as usual.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
        for kind in before:
            signal.signal(kind, self._note)
        try:
            yield self
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
