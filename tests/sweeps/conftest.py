"""Sweeps in small packs, and Ctrl-C at a block of our choosing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fallline.sweeps import packs
from fallline.training.interrupt import Interrupt


@pytest.fixture
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of three trials, which checkpoint themselves after every block; every block is written at once."""
    monkeypatch.setattr("fallline.sweeps.running.SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr(packs, "LARGEST_PACK", {"cpu": 3, "cuda": 3})
    monkeypatch.setattr(packs, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ctrl-C after so many blocks, as the engine sees it; 0 takes it back."""

    def ask(blocks: int) -> None:
        asked = iter(range(blocks))
        monkeypatch.setattr(
            Interrupt,
            "requested",
            property(lambda self: blocks > 0 and next(asked, None) is None, lambda self, value: None),
            raising=False,
        )

    return ask
