"""Optimizers made of other optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fallline.optim.around import around, combinator
from fallline.optim.base import Optimizer, chain
from fallline.optim.description import described
from fallline.optim.transform import Moment, Numbers, Params, Slots, Stage, Transform

# Stages that come after the direction has been found: they are no part of what `cautious` masks.
AFTER_THE_DIRECTION = ("add_decayed_weights", "scale_by_learning_rate")


@described
def cautious(optimizer: Optimizer | Transform) -> Optimizer:
    """Moves an element only where the optimizer's direction agrees with the gradient: u ← u · m / max(mean(m), 10⁻³).

    m is 1 where u · g > 0, else 0, and its mean is taken over each parameter tensor. Decoupled weight decay and the
    learning rate at the end of the optimizer stay outside of the mask, so `cautious(adamw())` is the paper's C-AdamW
    and `cautious(lion())` its C-Lion.

    Args:
        optimizer: whose direction is masked.

    >>> from fallline.optim import adamw
    >>> cautious(adamw(lr=0.01))
    fl.optim.cautious(optimizer=fl.optim.adamw(lr=0.01))

    Source: Liang et al., "Cautious Optimizers: Improving Training with One Line of Code", 2024, algorithm 1.
    """
    stages = list(optimizer.transforms if isinstance(optimizer, Optimizer) else [optimizer])
    end = len(stages)
    while end and stages[end - 1].name in AFTER_THE_DIRECTION:
        end -= 1
    return chain(_agreeing.transform(chain(*stages[:end])), *stages[end:])  # type: ignore[attr-defined]


@combinator
def _agreeing(optimizer: Optimizer) -> Transform:
    """The part of an optimizer's updates that agrees with what comes in."""

    def apply(
        parts: Sequence[Stage],
        updates: dict[str, Tensor],
        slots: Mapping[str, Slots],
        params: Params,
        n: Numbers,
        moment: Moment,
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        found, slots = parts[0].apply(updates, slots, params, n, moment)
        masked = {}
        for name, u in found.items():
            mask = (u * updates[name] > 0).to(u.dtype)
            masked[name] = u * (mask / torch.clamp(mask.mean(), min=1e-3))
        return masked, dict(slots)

    return around("agreeing", [optimizer], apply, elementwise=False)
