"""Steps whose length follows the parameter's: each tensor's update is scaled by a trust ratio of norms."""

from __future__ import annotations

import torch
from torch import Tensor

from fallline.description import described
from fallline.optim.adam_family import scale_by_adam
from fallline.optim.base import Optimizer, chain
from fallline.optim.checks import flag, non_negative, positive
from fallline.optim.info import Invalid, OptimizerInfo
from fallline.optim.transform import Number, Numbers, Slots, Transform, cast, per_tensor
from fallline.optim.transforms import incoming, scale_by_learning_rate, trace


@described
def scale_by_lamb(weight_decay: Number = 0.0, max_norm: Number | None = None, *, exclude_1d: bool = False) -> Transform:
    """LAMB's trust ratio: u = φ(‖p‖)/‖r‖ · r with r = g + weight_decay · p.

    The ratio is 1 where ‖p‖ or ‖r‖ is 0. φ(‖p‖) is ‖p‖, or with max_norm the smaller of the two. Norms are taken over
    each parameter tensor, in float64. With exclude_1d, u = g for parameters of at most one dimension.

    Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", 2020, algorithm 2,
    of which it is what follows the scaling by Adam.
    """
    non_negative("weight_decay", weight_decay)
    flag("exclude_1d", exclude_1d)
    numbers: dict[str, Number] = {"weight_decay": weight_decay}
    if max_norm is not None:
        positive("max_norm", max_norm)
        numbers["max_norm"] = max_norm
    bounded = max_norm is not None

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        if exclude_1d and p.dim() <= 1:
            return g, {}
        (decay,) = cast(g, n["weight_decay"])
        direction = g + p * decay
        length, own = norm(p), norm(direction)
        wanted = torch.minimum(length, n["max_norm"]) if bounded else length
        (ratio,) = cast(g, torch.where((length > 0) & (own > 0), wanted / own, 1.0))
        return direction * ratio, {}

    return per_tensor("scale_by_lamb", rule, numbers)


@described
def lamb(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
    max_norm: Number | None = None,
    exclude_1d: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """LAMB: p ← p − lr · φ(‖p‖)/‖r‖ · r with r = m̂/(√v̂ + eps) + weight_decay · p, for each parameter tensor.

    Args:
        lr: learning rate, at least 0: by how large a part of its own length a parameter changes.
        betas: decay rates of the two running means, each in [0, 1).
        eps: added to Adam's denominator, at least 0.
        weight_decay: at least 0; inside the trust ratio. The paper trains BERT with 0.01.
        max_norm: φ(‖p‖) is at most this, above 0. None: φ(‖p‖) = ‖p‖. Some versions have 10.
        exclude_1d: neither decay nor rescale parameters of at most one dimension (biases, scales of normalisations), as
            the authors do for BERT.
        maximize: go uphill (weights still decay towards zero).

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> lamb(lr=0.01, weight_decay=0.01)
    fl.optim.lamb(lr=0.01, weight_decay=0.01)

    Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", 2020, algorithm 2.
    torch has none. Adam's bias corrections are part of the paper's algorithm; the authors' first code and
    pytorch_optimizer leave them out inside the ratio. The paper does not say what the ratio is where a norm is zero: it
    is 1 there, as in the authors' code. Clip gradients, as some versions do, with `chain(clip_by_global_norm(1.0), …)`.
    """
    return chain(
        *incoming(0.0, maximize),
        scale_by_adam(betas, eps),
        scale_by_lamb(weight_decay, max_norm, exclude_1d=exclude_1d),
        scale_by_learning_rate(lr),
    )


@described
def scale_by_lars(
    weight_decay: Number = 0.0, trust_coefficient: Number = 1e-3, eps: Number = 0.0, *, exclude_1d: bool = True
) -> Transform:
    """LARS's local learning rate: u = η‖p‖/(‖g‖ + weight_decay · ‖p‖ + eps) · (g + weight_decay · p).

    η is trust_coefficient. The ratio is 1 where ‖p‖ or the denominator is 0. Norms are taken over each parameter
    tensor, in float64. With exclude_1d, u = g for parameters of at most one dimension.

    Source: You et al., "Large Batch Training of Convolutional Networks", 2017, algorithm 1.
    """
    non_negative("weight_decay", weight_decay)
    non_negative("trust_coefficient", trust_coefficient)
    non_negative("eps", eps)
    flag("exclude_1d", exclude_1d)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        if exclude_1d and p.dim() <= 1:
            return g, {}
        length = norm(p)
        denominator = norm(g) + n["weight_decay"] * length + n["eps"]
        wanted = n["trust_coefficient"] * length / denominator
        decay, ratio = cast(g, n["weight_decay"], torch.where((length > 0) & (denominator > 0), wanted, 1.0))
        return (g + p * decay) * ratio, {}

    numbers = {"weight_decay": weight_decay, "trust_coefficient": trust_coefficient, "eps": eps}
    return per_tensor("scale_by_lars", rule, numbers)


@described
def lars(
    lr: Number = 0.1,
    momentum: Number = 0.9,
    weight_decay: Number = 0.0,
    trust_coefficient: Number = 1e-3,
    eps: Number = 0.0,
    nesterov: bool = False,
    exclude_1d: bool = True,
    *,
    maximize: bool = False,
) -> Optimizer:
    """LARS: b ← momentum · b + lr · λ · (g + weight_decay · p), p ← p − b, with λ = η‖p‖/(‖g‖ + weight_decay · ‖p‖).

    Args:
        lr: learning rate, at least 0.
        momentum: at least 0.
        weight_decay: at least 0; the paper trains with 0.0005.
        trust_coefficient: the paper's η, at least 0: lr · η is by how large a part of its own length a parameter
            changes.
        eps: added to the denominator of λ, at least 0.
        nesterov: look ahead along the momentum.
        exclude_1d: plain momentum, without λ and decay, for parameters of at most one dimension (biases, scales of
            normalisations).
        maximize: go uphill (weights still decay towards zero).

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> lars(lr=2.0, weight_decay=5e-4)
    fl.optim.lars(lr=2.0, weight_decay=0.0005)

    Source: You et al., "Large Batch Training of Convolutional Networks", 2017, algorithm 1. torch has none. As in the
    paper, lr enters the momentum; versions in the way of `torch.optim.SGD` multiply by it afterwards, which differs
    while lr moves. The paper names no default learning rate, and no value of λ where a norm is zero: it is 1 there.
    """
    flag("nesterov", nesterov)
    non_negative("momentum", momentum)
    return chain(
        *incoming(0.0, maximize),
        scale_by_lars(weight_decay, trust_coefficient, eps, exclude_1d=exclude_1d),
        scale_by_learning_rate(lr),
        *([] if momentum == 0 else [trace(momentum, nesterov=nesterov)]),
    )


def norm(tensor: Tensor) -> Tensor:
    """‖tensor‖ in float64: squares of half-precision numbers overflow early."""
    length: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return length


CATALOGUE = (
    OptimizerInfo(
        lamb,
        learning_rates=(1e-4, 1e-1),
        formula="p − lr·(‖p‖/‖r‖)·r, r = m̂/(√v̂ + eps) + wd·p",
        paper="You et al.",
        year=2020,
        valid=(
            {},
            {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1},
            {"weight_decay": 0.1, "max_norm": 1.0, "exclude_1d": True},
            {"maximize": True},
        ),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"weight_decay": -1}, "weight_decay = -1 is negative"),
            Invalid({"betas": (1.0, 0.0)}, "beta1 = 1.0 is outside"),
            Invalid({"max_norm": 0.0}, "max_norm = 0.0 is not above 0"),
        ),
        settles={"lr": 1e-2},
    ),
    OptimizerInfo(
        lars,
        learning_rates=(1e-2, 100.0),
        formula="b = μb + lr·η‖p‖/(‖g‖ + wd·‖p‖)·(g + wd·p); p − b",
        paper="You et al.",
        year=2017,
        valid=(
            {},
            {"lr": 2.0, "weight_decay": 0.1, "momentum": 0.8, "nesterov": True},
            {"momentum": 0.0, "eps": 1e-3},
            {"exclude_1d": False, "trust_coefficient": 0.01, "maximize": True},
        ),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"weight_decay": -1}, "weight_decay = -1 is negative"),
            Invalid({"momentum": -0.5}, "momentum = -0.5 is negative"),
            Invalid({"trust_coefficient": -1.0}, "trust_coefficient = -1.0 is negative"),
        ),
        settles={"lr": 1e-3, "momentum": 0.9},
    ),
)
