"""The named optimizers: each a sentence in the words of `transforms`, with torch.optim's argument names, defaults."""

from __future__ import annotations

from fallline.errors import InvalidHyperparameter
from fallline.optim.base import Number, Optimizer, Transform, chain
from fallline.optim.checks import flag, non_negative, real
from fallline.optim.description import described
from fallline.optim.transforms import (
    add_decayed_weights,
    negate,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_lion,
    scale_by_rms,
    trace,
)


@described
def sgd(
    lr: Number = 1e-3,
    momentum: Number = 0.0,
    dampening: Number = 0.0,
    weight_decay: Number = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Stochastic gradient descent with momentum: p ← p − lr · b, where b is a running sum of gradients.

    b = momentum · b + (1 − dampening)(g + weight_decay · p).

    Args:
        lr: learning rate, at least 0.
        momentum: at least 0; 0 keeps no buffer.
        dampening: how much less of each gradient enters the buffer, from the second step on.
        weight_decay: at least 0, coupled (part of the gradient).
        nesterov: look ahead: steps along g + momentum · b. Needs momentum > 0 and dampening 0.
        maximize: go uphill.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> sgd(lr=0.1, momentum=0.9)
    fl.optim.sgd(lr=0.1, momentum=0.9)

    Source: Robbins and Monro, 1951; Polyak, 1964; Nesterov, 1983. Equal to `torch.optim.SGD`.
    """
    non_negative("momentum", momentum)
    real("dampening", dampening)
    flag("nesterov", nesterov)
    if nesterov and (momentum == 0 or dampening != 0):
        raise InvalidHyperparameter("nesterov=True needs momentum above 0 and dampening 0.")
    stages = _gradient(weight_decay, maximize)
    if momentum != 0:
        stages.append(trace(momentum, dampening, nesterov=nesterov))
    return chain(*stages, scale_by_learning_rate(lr))


@described
def adam(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Adam: p ← p − lr · m̂/(√v̂ + eps), from running means of the gradient and of its square.

    Args:
        lr: learning rate, at least 0: about the largest change of an element per step.
        betas: decay rates of the two running means, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: at least 0, coupled: passes through the scaling. Decoupled: `adamw`.
        amsgrad: divide by the largest second moment so far.
        maximize: go uphill.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> adam(lr=0.01, betas=(0.8, 0.999))
    fl.optim.adam(lr=0.01, betas=(0.8, 0.999))

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015. Equal to `torch.optim.Adam`.
    """
    return chain(
        *_gradient(weight_decay, maximize),
        scale_by_adam(betas, eps, amsgrad=amsgrad),
        scale_by_learning_rate(lr),
    )


@described
def adamw(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Adam with decoupled weight decay: p ← p − lr · (m̂/(√v̂ + eps) + weight_decay · p).

    Args:
        lr: learning rate, at least 0; it also scales the weight decay.
        betas: decay rates of the two running means, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: at least 0; 0.01 by default, as in torch.
        amsgrad: divide by the largest second moment so far.
        maximize: go uphill (weights still decay towards zero).

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> adamw(weight_decay=0.1)
    fl.optim.adamw(lr=0.001, weight_decay=0.1)

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019. Equal to `torch.optim.AdamW`.
    """
    return chain(
        *_gradient(0.0, maximize),
        scale_by_adam(betas, eps, amsgrad=amsgrad),
        *_decay(weight_decay),
        scale_by_learning_rate(lr),
    )


@described
def rmsprop(
    lr: Number = 1e-2,
    alpha: Number = 0.99,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    momentum: Number = 0.0,
    centered: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """RMSprop: p ← p − lr · b, b = momentum · b + g/(√v + eps), from a running mean v of the squared gradient.

    Args:
        lr: learning rate, at least 0.
        alpha: decay rate of the running mean, at least 0.
        eps: added to the denominator outside the root, at least 0.
        weight_decay: at least 0, coupled.
        momentum: at least 0; 0 keeps no buffer.
        centered: subtract the squared running mean of the gradient from v.
        maximize: go uphill.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> rmsprop(lr=0.001, centered=True)
    fl.optim.rmsprop(lr=0.001, centered=True)

    Source: Tieleman and Hinton, 2012. Equal to `torch.optim.RMSprop`.
    """
    non_negative("momentum", momentum)
    stages = [*_gradient(weight_decay, maximize), scale_by_rms(alpha, eps, centered=centered)]
    if momentum != 0:
        stages.append(trace(momentum))
    return chain(*stages, scale_by_learning_rate(lr))


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
    return chain(*_gradient(0.0, maximize), scale_by_lion(betas), *_decay(weight_decay), scale_by_learning_rate(lr))


def _gradient(weight_decay: Number, maximize: bool) -> list[Transform]:
    """What happens to a gradient before anything else: its sign, then coupled weight decay."""
    flag("maximize", maximize)
    return [*([negate()] if maximize else []), *_decay(weight_decay)]


def _decay(weight_decay: Number) -> list[Transform]:
    non_negative("weight_decay", weight_decay)
    return [] if weight_decay == 0 else [add_decayed_weights(weight_decay)]
