"""Steps of one length for all elements: only the sign of a mean of gradients counts."""

from __future__ import annotations

import torch
from torch import Tensor

from fallline.description import described
from fallline.optim.base import Optimizer, chain
from fallline.optim.checks import pair_of_betas
from fallline.optim.info import Invalid, OptimizerInfo
from fallline.optim.transform import Number, Numbers, Slots, Transform, cast, per_tensor
from fallline.optim.transforms import (
    decay,
    incoming,
    scale_by_learning_rate,
)


@described
def scale_by_lion(betas: tuple[Number, Number] = (0.9, 0.99)) -> Transform:
    """Lion's direction: sign(β₁m + (1 − β₁)g), after which m = β₂m + (1 − β₂)g.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, algorithm 2.
    """
    beta1, beta2 = pair_of_betas(betas)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        enter1, enter2 = cast(g, 1 - n["beta1"], 1 - n["beta2"])
        exp_avg = slots["exp_avg"]
        return torch.lerp(exp_avg, g, enter1).sign(), {"exp_avg": torch.lerp(exp_avg, g, enter2)}

    return per_tensor("scale_by_lion", rule, {"beta1": beta1, "beta2": beta2}, slots=["exp_avg"], elementwise=True)


@described
def lion(
    lr: Number = 1e-4,
    betas: tuple[Number, Number] = (0.9, 0.99),
    weight_decay: Number = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Lion: p ← p − lr · (sign(β₁m + (1 − β₁)g) + weight_decay · p).

    Every element moves by lr at each step, so lr is usually three to ten times smaller than AdamW's.

    Args:
        lr: learning rate, at least 0.
        betas: of the interpolation that is signed, and of the running mean; each in [0, 1).
        weight_decay: at least 0, decoupled.
        maximize: go uphill.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> lion(lr=3e-4)
    fl.optim.lion(lr=0.0003)

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023. torch has none.
    """
    return chain(*incoming(0.0, maximize), scale_by_lion(betas), *decay(weight_decay), scale_by_learning_rate(lr))


CATALOGUE = (
    OptimizerInfo(
        lion,
        learning_rates=(1e-6, 1e-2),
        formula="p − lr·(sign(β₁m + (1−β₁)g) + wd·p)",
        paper="Chen et al.",
        year=2023,
        valid=({}, {"lr": 1e-3, "betas": (0.8, 0.95), "weight_decay": 0.1}, {"maximize": True}),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"weight_decay": -1}, "weight_decay = -1 is negative"),
        ),
        settles={"lr": 1e-3},
    ),
)
