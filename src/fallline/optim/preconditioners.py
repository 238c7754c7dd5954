"""Optimizers that keep a matrix for each dimension of a parameter: Shampoo, and Adam in Shampoo's eigenbasis (SOAP).

A tensor [a, b, c] has one matrix [a, a], one [b, b] and one [c, c], each the sum or the running mean of the products of
the gradient with itself along the other dimensions. Decompositions of these matrices are expensive; they are made anew
at every so many steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fallline.description import described
from fallline.errors import Unsupported
from fallline.optim.base import Optimizer, chain
from fallline.optim.checks import flag, in_interval, non_negative, pair_of_betas, positive, whole
from fallline.optim.info import Invalid, OptimizerInfo
from fallline.optim.transform import Number, Numbers, Slots, Transform, cast, per_tensor
from fallline.optim.transforms import decay, incoming, scale_by_learning_rate

# As many dimensions as a parameter may have: those of a three-dimensional convolution, and one more.
MOST_DIMENSIONS = 6


@described
def scale_by_shampoo(
    momentum: Number = 0.0,
    eps: Number = 1e-6,
    precondition_frequency: int = 1,
    max_precondition_dim: int = 1200,
) -> Transform:
    """Shampoo's direction: for a matrix L^(−1/4) · m · R^(−1/4), with L = eps · I + Σ GGᵀ, R = eps · I + Σ GᵀG.

    m = momentum · m + (1 − momentum) · G. A tensor of k dimensions has k such matrices, with exponents −1/(2k); a
    vector is a tensor of one dimension, a number a vector of one. Of a dimension larger than `max_precondition_dim`
    only the matrix's diagonal is kept. The roots are renewed every `precondition_frequency` steps, from the first on.

    Source: Gupta, Koren and Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", 2018.
    """
    in_interval("momentum", momentum, 0.0, 1.0, open_high=True)
    positive("eps", eps)
    whole("precondition_frequency", precondition_frequency)
    whole("max_precondition_dim", max_precondition_dim)
    averages = momentum != 0

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers, renew: bool) -> tuple[Tensor, Slots]:
        changed: Slots = {}
        entering = g
        if averages:
            (enter,) = cast(g, 1 - n["momentum"])
            entering = changed["exp_avg"] = torch.lerp(slots["exp_avg"], g, enter)
        shape = _at_least_a_vector(g)
        gradient, moved = (_precise(t).reshape(shape) for t in (g, entering))
        for i in range(len(shape)):
            statistics, root = _precise(slots[f"statistics_{i}"]), _precise(slots[f"root_{i}"])
            statistics = statistics + _products(gradient, i, full=statistics.dim() == 2)
            changed[f"statistics_{i}"] = _stored(statistics, g)
            if renew:
                root = _inverse_root(statistics, n["eps"], 2 * len(shape))
                changed[f"root_{i}"] = _stored(root, g)
            # The first axis becomes the last, so that after all of them they stand as they did.
            moved = torch.tensordot(moved, root, ([0], [0])) if root.dim() == 2 else moved.movedim(0, -1) * root
        return _stored(moved.reshape(g.shape), g), changed

    def initial(p: Tensor, n: Numbers) -> dict[str, Tensor | None]:
        made: dict[str, Tensor | None] = {}
        shape = _at_least_a_vector(p)
        for i in range(MOST_DIMENSIONS):
            for slot in ("statistics", "root"):
                made[f"{slot}_{i}"] = None
                if i < len(shape):
                    sides = (shape[i],) * (2 if 1 < shape[i] <= max_precondition_dim else 1)
                    made[f"{slot}_{i}"] = p.new_zeros(sides)
        return made

    slots = [f"{slot}_{i}" for i in range(MOST_DIMENSIONS) for slot in ("statistics", "root")]
    numbers = {"eps": eps, **({"momentum": momentum} if averages else {})}
    return per_tensor(
        "scale_by_shampoo", rule, numbers,
        slots=[*slots, *(["exp_avg"] if averages else [])], initial=initial,
        check=_not_too_many_dimensions, phase=lambda step: step % precondition_frequency == 0,
    )  # fmt: skip


@described
def shampoo(
    lr: Number = 1e-3,
    momentum: Number = 0.0,
    weight_decay: Number = 0.0,
    eps: Number = 1e-6,
    precondition_frequency: int = 1,
    max_precondition_dim: int = 1200,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Shampoo: p ← p − lr · L^(−1/4) m R^(−1/4), with L = eps·I + Σ GGᵀ and R = eps·I + ΣGᵀG; Adagrad with matrices.

    Args:
        lr: learning rate, at least 0. Like Adagrad's, steps shrink as 1/√t by themselves.
        momentum: decay rate of the running mean m of the gradients, in [0, 1); it does not enter L and R.
        weight_decay: at least 0, coupled (part of the gradient).
        eps: what the matrices' diagonals start with, above 0.
        precondition_frequency: how many steps one decomposition of the matrices serves.
        max_precondition_dim: of dimensions larger than this, only the diagonal of the matrix is kept.
        maximize: go uphill.

    Raises:
        InvalidHyperparameter: for a number outside its domain.
        Unsupported: for a parameter of more than 6 dimensions.

    >>> shampoo(lr=0.1, precondition_frequency=10)
    fl.optim.shampoo(lr=0.1, precondition_frequency=10)

    Source: Gupta, Koren and Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", 2018. The paper's
    exponents −1/(2k) are those of pytorch_optimizer 4, to which the updates are equal for momentum 0 and a root per
    step. Otherwise they differ: that code mixes the previous preconditioned update into the gradient where the paper
    has a running mean of gradients, makes no update until the first `precondition_frequency` steps are over, and takes
    a plain gradient step for numbers without dimension.
    """
    return chain(
        *incoming(weight_decay, maximize),
        scale_by_shampoo(momentum, eps, precondition_frequency, max_precondition_dim),
        scale_by_learning_rate(lr),
    )


@described
def scale_by_soap(
    betas: tuple[Number, Number] = (0.95, 0.95),
    shampoo_beta: Number | None = None,
    eps: Number = 1e-8,
    precondition_frequency: int = 10,
    max_precondition_dim: int = 10_000,
    *,
    precondition_1d: bool = False,
) -> Transform:
    """SOAP's direction: Adam's in the eigenbasis of Shampoo's matrices; for a matrix Q_L (m' / (√v + eps)) Q_Rᵀ.

    With L and R the running means of GGᵀ and GᵀG, and Q_L and Q_R their eigenvectors: m = β₁m + (1 − β₁)G,
    m' = Q_Lᵀ m Q_R, v = β₂v + (1 − β₂)(Q_Lᵀ G Q_R)². Both means are corrected for their start, eps is not. The first
    gradient only makes L, R and their eigenvectors, and the update is 0; every `precondition_frequency` steps after it
    the eigenvectors are renewed by one power iteration and a QR decomposition.

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024, with the arithmetic of its code.
    """
    beta1, beta2 = pair_of_betas(betas)
    if shampoo_beta is not None:
        in_interval("shampoo_beta", shampoo_beta, 0.0, 1.0, open_high=True)
    non_negative("eps", eps)
    whole("precondition_frequency", precondition_frequency)
    whole("max_precondition_dim", max_precondition_dim)
    flag("precondition_1d", precondition_1d)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers, renewal: str | None) -> tuple[Tensor, Slots]:
        first = slots["step"] <= 1
        step = torch.clamp(slots["step"] - 1, min=1)  # the first gradient makes no update
        length = (1 - n["beta2"] ** step).sqrt() / (1 - n["beta1"] ** step)
        gradient = _precise(g)
        enter1, enter2, eps, length = cast(gradient, 1 - n["beta1"], 1 - n["beta2"], n["eps"], length)
        (enter,) = cast(gradient, 1 - n["shampoo_beta" if "shampoo_beta" in n else "beta2"])

        bases = [_precise(slots[f"basis_{i}"]) if f"basis_{i}" in slots else None for i in range(g.dim())]
        exp_avg = torch.lerp(_precise(slots["exp_avg"]), gradient, enter1)
        exp_avg_sq = torch.lerp(_precise(slots["exp_avg_sq"]), _turned(gradient, bases).square(), enter2)
        exp_avg, exp_avg_sq = (torch.where(first, torch.zeros_like(t), t) for t in (exp_avg, exp_avg_sq))
        turned = _turned(exp_avg, bases) / (exp_avg_sq.sqrt() + eps) * length
        update = torch.where(first, torch.zeros_like(gradient), _turned(turned, bases, back=True))

        changed: Slots = {}
        for i, basis in enumerate(bases):
            if basis is None:
                continue
            products = _products(gradient, i, full=True)
            changed[f"statistics_{i}"] = statistics = torch.lerp(_precise(slots[f"statistics_{i}"]), products, enter)
            if renewal == "decompose":
                changed[f"basis_{i}"] = _eigenvectors(statistics)
            elif renewal == "iterate":
                changed[f"basis_{i}"], order = _iterated(statistics, basis)
                exp_avg_sq = _reordered(exp_avg_sq, order, i)
        changed.update(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
        return _stored(update, g), {name: _stored(tensor, g) for name, tensor in changed.items()}

    def phase(step: int) -> str | None:
        if step == 0:
            return "decompose"
        return "iterate" if step % precondition_frequency == 0 else None

    def initial(p: Tensor, n: Numbers) -> dict[str, Tensor | None]:
        made: dict[str, Tensor | None] = {}
        turns = p.dim() > 1 or (p.dim() == 1 and precondition_1d)
        for i in range(MOST_DIMENSIONS):
            made[f"statistics_{i}"] = made[f"basis_{i}"] = None
            if turns and i < p.dim() and 1 < p.shape[i] <= max_precondition_dim:
                made[f"statistics_{i}"] = p.new_zeros(p.shape[i], p.shape[i])
                # Of a parameter that gets its first gradient later than others: its eigenvectors come with the next
                # renewal, and until then this is Adam.
                made[f"basis_{i}"] = torch.eye(p.shape[i], dtype=p.dtype, device=p.device)
        return made

    kept = [f"{slot}_{i}" for i in range(MOST_DIMENSIONS) for slot in ("statistics", "basis")]
    numbers = {"beta1": beta1, "beta2": beta2, "eps": eps}
    if shampoo_beta is not None:
        numbers["shampoo_beta"] = shampoo_beta
    return per_tensor(
        "scale_by_soap", rule, numbers,
        slots=["exp_avg", "exp_avg_sq", *kept], initial=initial,
        counts=True, check=_not_too_many_dimensions, phase=phase,
    )  # fmt: skip


@described
def soap(
    lr: Number = 3e-3,
    betas: tuple[Number, Number] = (0.95, 0.95),
    shampoo_beta: Number | None = None,
    eps: Number = 1e-8,
    weight_decay: Number = 0.01,
    precondition_frequency: int = 10,
    max_precondition_dim: int = 10_000,
    precondition_1d: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """SOAP: p ← p − lr · (Q_L (m'/(√v + eps)) Q_Rᵀ + weight_decay · p), Adam in the eigenbasis of Shampoo's matrices.

    Args:
        lr: learning rate, at least 0; it also scales the weight decay.
        betas: decay rates of Adam's two running means, each in [0, 1).
        shampoo_beta: decay rate of the matrices' running means, in [0, 1); that of the second moment, if left out.
        eps: added to the denominator, at least 0.
        weight_decay: at least 0, decoupled.
        precondition_frequency: how many steps one eigenbasis serves.
        max_precondition_dim: dimensions larger than this are not turned into an eigenbasis.
        precondition_1d: whether vectors are; otherwise they are trained with Adam.
        maximize: go uphill (weights still decay towards zero).

    Raises:
        InvalidHyperparameter: for a number outside its domain.
        Unsupported: for a parameter of more than 6 dimensions.

    >>> soap(lr=0.01, precondition_frequency=5)
    fl.optim.soap(lr=0.01, precondition_frequency=5)

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024. Arithmetic and defaults are those
    of the authors' code and of pytorch_optimizer 4, with these differences. Weights decay as in `torch.optim.AdamW`,
    before the update and at the first step too; that code shrinks the updated weights, from the second step on.
    Decompositions are made in the parameter's precision where that is higher than float32. In the null space of L and R
    (there is one while fewer directions have been seen than there are dimensions) that code leaves the basis, on which
    the update depends, to round-off; here it is a fixed one.
    """
    return chain(
        *incoming(0.0, maximize),
        scale_by_soap(
            betas, shampoo_beta, eps, precondition_frequency, max_precondition_dim, precondition_1d=precondition_1d
        ),
        *decay(weight_decay),
        scale_by_learning_rate(lr),
    )


def _not_too_many_dimensions(name: str, parameter: Tensor) -> None:
    if parameter.dim() > MOST_DIMENSIONS:
        raise Unsupported(
            f"parameter {name!r} has {parameter.dim()} dimensions, at most {MOST_DIMENSIONS} are supported: train it "
            "with another optimizer."
        )


def _precise(tensor: Tensor) -> Tensor:
    """At least float32: decompositions and long sums need it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _stored(tensor: Tensor, like: Tensor) -> Tensor:
    """In the parameter's dtype, and contiguous as it is once saved and loaded: other strides round otherwise."""
    return tensor.to(like.dtype).contiguous()


def _at_least_a_vector(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape) or (1,)


def _products(gradient: Tensor, axis: int, *, full: bool) -> Tensor:
    """The products of the gradient with itself along all axes but one: a matrix, or only its diagonal."""
    others = [i for i in range(gradient.dim()) if i != axis]
    if full:
        matrix: Tensor = torch.tensordot(gradient, gradient, (others, others))
        return matrix
    squares = gradient.square()
    return squares.sum(others) if others else squares


def _inverse_root(statistics: Tensor, eps: Tensor, root: int) -> Tensor:
    """(statistics + eps · I)^(−1/root), of a matrix or of a diagonal."""
    (floor,) = cast(statistics, eps)
    if statistics.dim() == 1:
        of_diagonal: Tensor = (statistics + floor) ** (-1 / root)
        return of_diagonal

    def power(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        powers: Tensor = (values.clamp(min=0) + floor) ** (-1 / root)  # round-off makes zeros negative
        found: Tensor = (vectors * powers) @ vectors.mT
        return found

    return _where_finite(statistics, power)


def _eigenvectors(statistics: Tensor) -> Tensor:
    """As columns, the largest eigenvalue's first.

    In the null space any basis is one of eigenvectors, and LAPACK's choice follows round-off. There the eigenvectors of
    a fixed diagonal matrix are taken, so that the same trial gets the same basis in every engine.
    """

    def columns(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        inside = (vectors * _vanishing(values).to(vectors.dtype)) @ vectors.mT  # the projection into the null space
        fixed = torch.arange(1, len(matrix) + 1, dtype=matrix.dtype, device=matrix.device).sqrt()
        told_apart = matrix - inside @ (fixed.unsqueeze(1) * inside) * (values.amax() / len(matrix) ** 0.5)
        found: Tensor = torch.linalg.eigh(told_apart)[1].flip(1)
        return found

    return _where_finite(statistics, columns)


def _iterated(statistics: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvectors after one power iteration, in the order of their estimated eigenvalues, and that order.

    The iteration would leave only round-off of vectors in the null space: these stay what they are.
    """
    product = statistics @ basis
    values = (basis * product).sum(0)
    vanishing = _vanishing(values)
    product = torch.where(vanishing, basis * values.amax(), product)
    order = torch.argsort(torch.where(vanishing, 0, values), descending=True, stable=True)
    turned, _ = torch.linalg.qr(_reordered(product, order, 1))
    return turned, order


def _vanishing(values: Tensor) -> Tensor:
    """Which eigenvalues are zero but for round-off."""
    return values <= values.amax() * len(values) * torch.finfo(values.dtype).eps


def _where_finite(matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of a matrix; NaN where that has no finite eigenvalues, for which LAPACK would stop all trials."""
    finite = (matrix.abs().amax() * (len(matrix) + 1)).isfinite()
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.where(finite, function(torch.where(finite, matrix, identity)), torch.nan)


def _reordered(tensor: Tensor, order: Tensor, axis: int) -> Tensor:
    shape = [1] * tensor.dim()
    shape[axis] = -1
    return torch.take_along_dim(tensor, order.reshape(shape), axis)


def _turned(tensor: Tensor, bases: list[Tensor | None], *, back: bool = False) -> Tensor:
    """A tensor in other bases, one per axis (None leaves an axis as it is), or back from them."""
    for basis in bases:
        # The first axis becomes the last, so that after all of them they stand as they did.
        tensor = tensor.movedim(0, -1) if basis is None else torch.tensordot(tensor, basis, ([0], [int(back)]))
    return tensor


CATALOGUE = (
    OptimizerInfo(
        shampoo,
        learning_rates=(1e-4, 1.0),
        formula="p − lr·L^(−1/4)·m·R^(−1/4), L = eps·I + ΣGGᵀ, R = eps·I + ΣGᵀG",
        paper="Gupta et al.",
        year=2018,
        valid=(
            {},
            {"lr": 1e-1, "momentum": 0.9, "weight_decay": 0.1, "precondition_frequency": 3},
            {"eps": 1e-2, "max_precondition_dim": 2},
            {"maximize": True},
        ),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"weight_decay": -1}, "weight_decay = -1 is negative"),
            Invalid({"momentum": 1.0}, "momentum = 1.0 is outside"),
            Invalid({"eps": 0.0}, "eps = 0.0 is not above 0"),
            Invalid({"precondition_frequency": 0}, "precondition_frequency = 0 is below 1"),
            Invalid({"max_precondition_dim": 1.5}, "max_precondition_dim = 1.5 is not a whole number", TypeError),
        ),
        settles={"lr": 0.3},
    ),
    OptimizerInfo(
        soap,
        learning_rates=(1e-5, 1e-1),
        formula="p − lr·(Q_L·(m'/(√v + eps))·Q_Rᵀ + wd·p), Adam in the eigenbasis of Shampoo's L and R",
        paper="Vyas et al.",
        year=2024,
        valid=(
            {},
            {"betas": (0.9, 0.99), "shampoo_beta": 0.8, "precondition_frequency": 2},
            {"weight_decay": 0.0, "max_precondition_dim": 3, "precondition_1d": True},
            {"weight_decay": 0.1, "maximize": True},
        ),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"weight_decay": -1}, "weight_decay = -1 is negative"),
            Invalid({"betas": (0.9, 1.0)}, "beta2 = 1.0 is outside"),
            Invalid({"shampoo_beta": 1.0}, "shampoo_beta = 1.0 is outside"),
            Invalid({"eps": -1.0}, "eps = -1.0 is negative"),
            Invalid({"precondition_frequency": 0}, "precondition_frequency = 0 is below 1"),
        ),
        settles={"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": 0.0},
    ),
)
