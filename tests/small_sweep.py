"""A small sweep, the same every time, and what two results of it must agree in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import fallline as fl

STEPS = 60


def small_sweep(out: Path | None, **settings: Any) -> fl.Result:
    """Twelve trials, of which some diverge; `settings` change the sweep."""
    asked: dict[str, Any] = {"seeds": 2, "steps": STEPS, "workers": 1, "progress": False}
    lr = fl.grid([0.01, 1.0, 100.0])
    optimizers = [fl.optim.sgd(lr=lr, momentum=0.9), fl.optim.adam(lr=lr)]
    return fl.sweep(fl.tasks.diabetes(), optimizers, out=out, **{**asked, **settings})


def assert_same(found: fl.Result, expected: fl.Result) -> None:
    """Bit for bit the same trials."""
    for name in ("step", "train_loss", "evaluation_step", "metric", "validation_loss"):
        np.testing.assert_array_equal(getattr(found.history, name), getattr(expected.history, name), name)
    assert found.trials.equals(expected.trials)
    kept = sorted(path.name for path in (expected.path / "parameters").iterdir())
    assert sorted(path.name for path in (found.path / "parameters").iterdir()) == kept
    for name in kept:
        assert (found.path / "parameters" / name).read_bytes() == (expected.path / "parameters" / name).read_bytes()
