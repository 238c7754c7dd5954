"""Broadcasting inside a callable of which nothing is known but what it returns.

A loss of [N, 1] against [N] that pairs every prediction with every target does not change when the targets change
places. A loss that squeezes its arguments itself does. Neighbours: `shapes`, for the losses whose wishes are known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fallline.losses.misuse.computing import Computed
from fallline.losses.misuse.finding import Finding, error
from fallline.losses.misuse.given import Given, shape


def broadcasting_findings(given: Given, outcome: Computed) -> Iterator[Finding]:
    """Whether a callable pairs all predictions with all targets."""
    if given.known or outcome.value is None or not isinstance(given.prediction, Tensor):
        return
    prediction, target = given.prediction, given.target
    if not isinstance(target, Tensor) or prediction.shape == target.shape or target.numel() != prediction.numel():
        return
    if prediction.squeeze().shape != target.squeeze().shape or target.numel() < 4 or target.numel() > 1 << 20:
        return
    try:
        together = torch.broadcast_shapes(prediction.shape, target.shape)
    except RuntimeError:
        return
    if together.numel() <= prediction.numel() or bool((target == target.flatten()[0]).all()):
        return
    here = float(outcome.value)
    turned = target.flatten().roll(1).reshape(target.shape)
    try:
        other = float(outcome.against(prediction, turned))
        meant = float(outcome.against(prediction, target.reshape(prediction.shape)))
    except Exception:
        return
    if math.isclose(here, other, rel_tol=1e-5) and not math.isclose(here, meant, rel_tol=1e-3):
        n = target.numel()
        yield error(
            "broadcast",
            f"{given.name} was given a prediction of shape {shape(prediction)} and a target of shape {shape(target)}, "
            f"and gave {here:.4g}, the same with the targets in another order; with equal shapes it gives {meant:.4g}.",
            f"Inside it the shapes are broadcast to {list(together)}: {together.numel()} pairs instead of {n}.",
            "target = target.reshape(prediction.shape)",
        )
