"""Broadcasting inside a callable of which nothing is known but what it returns.

A loss of [N, 1] against [N] that pairs every prediction with every target does not change when the targets change
places. A loss that squeezes its arguments itself does; and one that means all pairs, such as a distance between two
distributions, says so: it gives its arguments as many dimensions as each other. Neighbours: `shapes`, for the losses
whose wishes are known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fallline.losses.misuse.computing import Computed
from fallline.losses.misuse.finding import Finding, warning
from fallline.losses.misuse.given import Given, shape

# Steps that take two tensors element by element; losses do, too.
_ELEMENTWISE = frozenset(
    {
        "add",
        "radd",
        "sub",
        "rsub",
        "subtract",
        "mul",
        "rmul",
        "multiply",
        "div",
        "rdiv",
        "divide",
        "truediv",
        "rtruediv",
        "true_divide",
        "pow",
        "rpow",
        "maximum",
        "minimum",
        "max",
        "min",
        "where",
        "lt",
        "gt",
        "le",
        "ge",
        "eq",
        "ne",
        "hypot",
        "atan2",
        "xlogy",
        "logaddexp",
    }
)


class _Meetings(TorchFunctionMode):
    """Whether tensors of unequal numbers of dimensions have been broadcast to something larger than both."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.uneven = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "").strip("_")
        parts = [part for part in (*args, *(kwargs or {}).values()) if isinstance(part, Tensor)]
        if len(parts) >= 2 and (name in _ELEMENTWISE or name.endswith("_loss") or name.startswith("binary_cross")):
            self.steps += 1
            one, other = parts[-2:] if name == "where" else parts[:2]
            shape = together(one, other)
            larger = shape is not None and math.prod(shape) > max(one.numel(), other.numel())
            self.uneven |= larger and one.ndim != other.ndim
        return function(*args, **(kwargs or {}))


def together(one: Tensor, other: Tensor) -> list[int] | None:
    """The shape that two tensors are broadcast to; None where they cannot be."""
    rank = max(one.ndim, other.ndim)
    first, second = ([1] * (rank - part.ndim) + list(part.shape) for part in (one, other))
    if any(a != b and 1 not in (a, b) for a, b in zip(first, second, strict=True)):
        return None
    return [b if a == 1 else a for a, b in zip(first, second, strict=True)]


def broadcasting_findings(given: Given, outcome: Computed) -> Iterator[Finding]:
    """Whether a callable pairs all predictions with all targets."""
    if given.known or outcome.value is None or not isinstance(given.prediction, Tensor):
        return
    prediction, target = given.prediction, given.target
    if not isinstance(target, Tensor) or prediction.shape == target.shape or target.numel() != prediction.numel():
        return
    if prediction.squeeze().shape != target.squeeze().shape or target.numel() < 4 or target.numel() > 1 << 20:
        return
    pairs = together(prediction, target)
    if pairs is None or math.prod(pairs) <= prediction.numel() or bool((target == target.flatten()[0]).all()):
        return
    here = float(outcome.value)
    turned = target.flatten().roll(1).reshape(target.shape)
    meetings = _Meetings()
    try:
        with meetings:
            other = float(outcome.against(prediction, turned))
        if meetings.steps and not meetings.uneven:
            return
        meant = float(outcome.against(prediction, target.reshape(prediction.shape)))
    except Exception:
        return
    if math.isclose(here, other, rel_tol=1e-5) and not math.isclose(here, meant, rel_tol=1e-3):
        n = target.numel()
        yield warning(
            "broadcast",
            f"{given.name} was given a prediction of shape {shape(prediction)} and a target of shape {shape(target)}, "
            f"and gave {here:.4g}, the same with the targets in another order; with equal shapes it gives {meant:.4g}.",
            f"Inside it the shapes are broadcast to {pairs}: {math.prod(pairs)} pairs instead of {n}.",
            "target = target.reshape(prediction.shape)  # or target[None], if all pairs are meant",
        )
