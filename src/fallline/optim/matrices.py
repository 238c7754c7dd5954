"""Steps shaped by a parameter as a matrix: its rows and columns (Adafactor), or its singular values (Muon)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fallline.description import SinglePrecision, described
from fallline.errors import InvalidHyperparameter
from fallline.optim.base import Optimizer, chain
from fallline.optim.checks import WrongType, flag, in_interval, non_negative, real
from fallline.optim.info import Invalid, OptimizerInfo
from fallline.optim.transform import Number, Numbers, Slots, Transform, cast, per_tensor
from fallline.optim.transforms import above_zero, decay, incoming, scale_by_learning_rate

# torch multiplies bfloat16 matrices with up to so many products one way on CPUs, and larger ones another way.
SMALL_PRODUCT = 16**3
ADJUSTMENTS = (None, "original", "match_rms_adamw")


@described
def scale_by_factored_rms(beta2_decay: Number = -0.8, eps1: Number | None = None) -> Transform:
    """Adafactor's direction: u = g / √max(v̂, eps1²), with v̂ a mean of g² that keeps only its rows' and columns' means.

    For a matrix r = lerp(r, mean over columns of g², t^beta2_decay), c likewise over rows, v̂ = r·cᵀ / mean(r); of a
    tensor with more dimensions the last two are the matrix. For a vector or a scalar v̂ is the whole mean.

    Args:
        beta2_decay: exponent of the share of the newest gradient, at most 0.
        eps1: lower bound of √v̂ and of mean(r), at least 0; None is the rounding unit of the parameter's dtype.

    Source: Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018. Arithmetic as in
    `torch.optim.Adafactor`, which bounds v̂ from below where the paper adds eps1 to g².
    """
    in_interval("beta2_decay", beta2_decay, -math.inf, 0.0)
    if eps1 is not None:
        non_negative("eps1", eps1)
    numbers = {"beta2_decay": beta2_decay, **({} if eps1 is None else {"eps1": eps1})}

    def starting(p: Tensor, n: Numbers) -> dict[str, Tensor | None]:
        if p.dim() < 2:
            return {"row_var": None, "col_var": None}
        return {
            "row_var": torch.zeros_like(p[..., :1]),
            "col_var": torch.zeros_like(p[..., :1, :]),
            "variance": None,
        }

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        (enter,) = cast(g, slots["step"] ** n["beta2_decay"])
        unit = n["eps1"] if "eps1" in n else torch.full_like(slots["step"], torch.finfo(p.dtype).eps)
        lowest, lowest_square = cast(g, above_zero(g, unit), above_zero(g, unit * unit))
        if g.dim() < 2:
            changed = {"variance": slots["variance"] + (g * g - slots["variance"]) * enter}
            estimate = changed["variance"]
        else:
            rows = slots["row_var"] + (_mean_square(g, -1) - slots["row_var"]) * enter
            columns = slots["col_var"] + (_mean_square(g, -2) - slots["col_var"]) * enter
            changed = {"row_var": rows, "col_var": columns}
            estimate = rows * columns / torch.maximum(rows.mean(-2, keepdim=True), lowest)
        return g * torch.maximum(estimate, lowest_square).rsqrt(), changed

    slots = ["row_var", "col_var", "variance"]
    return per_tensor("scale_by_factored_rms", rule, numbers, slots=slots, initial=starting, counts=True)


@described
def clip_by_rms(d: Number = 1.0) -> Transform:
    """Shortens each parameter's update to a root mean square of at most d: u = g / max(1, RMS(g)/d).

    Args:
        d: at least 1.

    Source: Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018, section 6.
    """
    in_interval("d", d, 1.0, math.inf)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        (shrink,) = cast(g, 1 / torch.clamp(_root_mean_square(g) / n["d"], min=1))
        return g * shrink, {}

    return per_tensor("clip_by_rms", rule, {"d": d})


@described
def scale_by_parameter_rms(eps2: Number = 1e-3) -> Transform:
    """Steps in proportion to the parameter: u = g · max(eps2, RMS(p)).

    Args:
        eps2: the size that a parameter near zero is taken to have, at least 0.

    Source: Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018, section 8.
    """
    non_negative("eps2", eps2)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        (size,) = cast(g, torch.maximum(_root_mean_square(p), n["eps2"]))
        return g * size, {}

    return per_tensor("scale_by_parameter_rms", rule, {"eps2": eps2})


@described
def scale_by_capped_learning_rate(lr: Number, weight_decay: Number = 0.0) -> Transform:
    """A step downhill with a rate of at most 1/√t: u = −min(lr, 1/√t) · g − lr · weight_decay · p.

    Args:
        lr: the learning rate, at least 0.
        weight_decay: at least 0; its rate is lr itself.
    """
    non_negative("lr", lr)
    non_negative("weight_decay", weight_decay)
    decays = weight_decay != 0

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        (size,) = cast(g, -torch.minimum(n["lr"], slots["step"].rsqrt()))
        if not decays:
            return g * size, {}
        (pull,) = cast(g, -n["lr"] * n["weight_decay"])
        return g * size + p * pull, {}

    numbers = {"lr": lr, **({"weight_decay": weight_decay} if decays else {})}
    return per_tensor("scale_by_capped_learning_rate", rule, numbers, counts=True, elementwise=True)


@described
def adafactor(
    lr: Number = 1e-2,
    beta2_decay: Number = -0.8,
    eps: tuple[Number | None, Number] = (None, 1e-3),
    d: Number = 1.0,
    weight_decay: Number = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Adafactor: p ← p − max(eps2, RMS(p)) · min(lr, 1/√t) · û, with state for rows and columns only.

    û is g/√v̂, shortened to a root mean square of d; v̂ is made of the means of g² over the rows and over the columns.

    Args:
        lr: largest relative learning rate, at least 0.
        beta2_decay: the newest gradient's share of the means is t^beta2_decay; at most 0.
        eps: (lower bound of √v̂, or None for the rounding unit of the dtype; lower bound of RMS(p)), both at least 0.
        d: largest root mean square of û, at least 1.
        weight_decay: at least 0, decoupled.
        maximize: go uphill (weights still decay towards zero).

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> adafactor(beta2_decay=-1.0)
    fl.optim.adafactor(lr=0.01, beta2_decay=-1.0)

    Source: Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018. Equal to
    `torch.optim.Adafactor`, except that with parameters of several dtypes each has the rounding unit of its own, where
    torch takes that of the first for all.
    """
    if not isinstance(eps, tuple | list) or len(eps) != 2:
        raise WrongType(f"eps = {eps!r} is not a pair: give (eps1, eps2).")
    return chain(
        *incoming(0.0, maximize),
        scale_by_factored_rms(beta2_decay, eps[0]),
        clip_by_rms(d),
        scale_by_parameter_rms(eps[1]),
        scale_by_capped_learning_rate(lr, weight_decay),
    )


@described
def scale_by_muon(
    momentum: Number = 0.95,
    eps: Number = 1e-7,
    *,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
) -> Transform:
    """Muon's direction: s · NS(g + momentum · (b − g)), or s · NS(b), with b a running mean of the gradient.

    NS takes a matrix to a nearly orthogonal one (all singular values near 1) by ns_steps of Newton and Schulz's
    iteration X ← aX + (b·XXᵀ + c·(XXᵀ)²)X from X = G/max(‖G‖, eps), in bfloat16. s makes up for the matrix's shape.

    Args:
        momentum: decay rate of b, at least 0.
        eps: smallest norm to divide by, at least 0.
        nesterov: look ahead by one step.
        ns_coefficients: (a, b, c).
        ns_steps: number of iterations, below 100.
        adjust_lr_fn: "original" or None for s = √max(1, rows/columns), "match_rms_adamw" for s = 0.2·√max(rows,
            columns).

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; "match_rms_adamw": Liu et
    al., "Muon is Scalable for LLM Training", 2025. Bit for bit the operations of `torch.optim.Muon`.
    """
    non_negative("momentum", momentum)
    non_negative("eps", eps)
    flag("nesterov", nesterov)
    coefficients = _three(ns_coefficients)
    if isinstance(ns_steps, bool) or not isinstance(ns_steps, int):
        raise WrongType(f"ns_steps = {ns_steps!r} is not a whole number: give one.")
    if not 0 <= ns_steps < 100:
        raise InvalidHyperparameter(f"ns_steps = {ns_steps} is outside [0, 100): give a number inside.")
    if adjust_lr_fn not in ADJUSTMENTS:
        raise InvalidHyperparameter(
            f"adjust_lr_fn = {adjust_lr_fn!r} is not known: give 'original' or 'match_rms_adamw'."
        )

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        enter, ahead = cast(g, 1 - n["momentum"], n["momentum"])
        mean = torch.lerp(slots["momentum_buffer"], g, enter)
        direction = torch.lerp(g, mean, ahead) if nesterov else mean
        orthogonal = torch.ops.fallline.newton_schulz(direction, n["eps"], coefficients, ns_steps)
        return orthogonal.to(g.dtype) * _stretch(p.shape, adjust_lr_fn), {"momentum_buffer": mean}

    numbers = {"momentum": momentum, "eps": eps}
    return per_tensor("scale_by_muon", rule, numbers, slots=["momentum_buffer"], check=_only_matrices)


@described
def scale_by_single_learning_rate(lr: Number, weight_decay: Number = 0.0, adjust_lr_fn: str | None = None) -> Transform:
    """Muon's step with a learning rate that torch has as a float32 tensor: lr · s and lr · weight_decay are rounded.

    Args:
        lr: learning rate, at least 0.
        weight_decay: at least 0, decoupled.
        adjust_lr_fn: the s by which `scale_by_muon` stretched what comes in.

    Source: `torch.optim.Muon`.
    """
    non_negative("lr", lr)
    non_negative("weight_decay", weight_decay)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        stretch = _stretch(p.shape, adjust_lr_fn)
        rate = n["lr"].to(torch.float32)
        kept = 1 - rate * n["weight_decay"].to(torch.float32)
        size, shrink = cast(g, (rate * stretch).double() / stretch, 1 - kept.double())
        return -(g * size + p * shrink), {}

    numbers = {"lr": lr, "weight_decay": weight_decay}
    return per_tensor("scale_by_single_learning_rate", rule, numbers)


@described
def muon(
    lr: Number = 1e-3,
    weight_decay: Number = 0.1,
    momentum: Number = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
    eps: Number = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
) -> Optimizer:
    """Muon: p ← p − lr · (s · NS(m) + weight_decay · p), where NS makes the momentum m of a matrix nearly orthogonal.

    For matrices only: train biases and embeddings with another optimizer beside it.

    Args:
        lr: learning rate, at least 0.
        weight_decay: at least 0, decoupled.
        momentum: decay rate of the running mean of the gradient, at least 0.
        nesterov: look ahead by one step.
        ns_coefficients: of the Newton-Schulz iteration.
        eps: smallest norm to divide by, at least 0.
        ns_steps: number of Newton-Schulz iterations, below 100.
        adjust_lr_fn: "original" or None for s = √max(1, rows/columns), "match_rms_adamw" for s = 0.2·√max(rows,
            columns), with which Adam's learning rates and weight decays can be kept.

    Raises:
        InvalidHyperparameter: for a number outside its domain; in `init`, for a parameter that is no matrix.

    >>> muon(lr=0.02)
    fl.optim.muon(lr=0.02)

    Source: Jordan et al., 2024. Equal to `torch.optim.Muon`, with two differences: ns_steps is checked here and not at
    the first step, and without Nesterov bfloat16 parameters keep their momentum, which torch overwrites with the
    normalised one.
    """
    scaling = scale_by_muon(
        momentum,
        eps,
        nesterov=nesterov,
        ns_coefficients=ns_coefficients,
        ns_steps=ns_steps,
        adjust_lr_fn=adjust_lr_fn,
    )
    if isinstance(lr, SinglePrecision):
        return chain(scaling, scale_by_single_learning_rate(lr, weight_decay, adjust_lr_fn))
    return chain(scaling, *decay(weight_decay), scale_by_learning_rate(lr))


def _mean_square(g: Tensor, dim: int) -> Tensor:
    """The mean of g² along a dimension; the norm does not overflow in half precision where g² does."""
    norm: Tensor = torch.linalg.vector_norm(g, dim=dim, keepdim=True)
    return norm.square() / max(g.shape[dim], 1)


def _root_mean_square(g: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(g)
    return norm.to(torch.float64) / math.sqrt(max(g.numel(), 1))


def _stretch(shape: Sequence[int], adjustment: str | None) -> float:
    """What makes up for a matrix's shape."""
    rows, columns = shape
    if adjustment == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / max(columns, 1)))


def _only_matrices(name: str, parameter: Tensor) -> None:
    if parameter.dim() != 2:
        raise InvalidHyperparameter(
            f"parameter {name!r} has shape {tuple(parameter.shape)}, but Muon trains matrices only: train the others "
            "with another optimizer, as muon_with_adamw does."
        )


def _three(value: Any) -> list[float]:
    if not isinstance(value, tuple | list) or len(value) != 3:
        raise WrongType(f"ns_coefficients = {value!r} are not three numbers: give (a, b, c).")
    for name, number in zip("abc", value, strict=True):
        real(f"ns_coefficients: {name}", number)
    return [float(number) for number in value]


@torch.library.custom_op(
    "fallline::newton_schulz",
    mutates_args=(),
    schema="(Tensor matrix, Tensor eps, float[] coefficients, int steps) -> Tensor",
)
def _newton_schulz(matrix: Tensor, eps: Tensor, coefficients: Sequence[float], steps: int) -> Tensor:
    """A nearly orthogonal matrix, in bfloat16, near each of [..., rows, columns]; every one as if it were alone.

    One operation for torch, so that neither vmap nor the tracer takes other products than `torch.optim.Muon`, whose
    last bits differ.
    """
    *leading, rows, columns = matrix.shape
    if matrix.numel() == 0:
        return matrix.new_zeros(matrix.shape, dtype=torch.bfloat16)
    a, b, c = coefficients
    x = matrix.bfloat16().reshape(-1, rows, columns)
    x = x.mT if rows > columns else x
    smallest = eps.bfloat16().expand(leading).reshape(-1, 1, 1)
    x = x / torch.maximum(torch.stack([each.norm() for each in x]).reshape(-1, 1, 1), smallest)
    for _ in range(steps):
        gram = _product(x, x.mT)
        x = _product(_product(gram, gram, gram, beta=b, alpha=c), x, x, beta=a)
    x = x.mT if rows > columns else x
    return x.reshape(matrix.shape).contiguous()


def _product(left: Tensor, right: Tensor, added: Tensor | None = None, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """left · right for every pair [matrix, row, column], or beta · added + alpha · left · right, as for one pair."""
    size = left.shape[1] * left.shape[2] * right.shape[2]
    alone = left.shape[0] == 1 or (left.device.type == "cpu" and size <= SMALL_PRODUCT)
    if added is None:
        return torch.stack([a @ b for a, b in zip(left, right, strict=True)]) if alone else torch.bmm(left, right)
    if not alone:
        return torch.baddbmm(added, left, right, beta=beta, alpha=alpha)
    each = zip(added, left, right, strict=True)
    return torch.stack([torch.addmm(one, a, b, beta=beta, alpha=alpha) for one, a, b in each])


@_newton_schulz.register_fake
def _(matrix: Tensor, eps: Tensor, coefficients: Sequence[float], steps: int) -> Tensor:
    return matrix.new_empty(matrix.shape, dtype=torch.bfloat16)


@_newton_schulz.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], matrix: Tensor, eps: Tensor, coefficients: Sequence[float], steps: int
) -> tuple[Tensor, int]:
    of_matrix, of_eps, *_ = in_dims
    size = info.batch_size
    matrix = matrix.expand(size, *matrix.shape) if of_matrix is None else matrix.movedim(of_matrix, 0)
    if of_eps is not None:
        # What is stacked comes first, then as many dimensions as the matrices are stacked in otherwise.
        eps = eps.movedim(of_eps, 0)
        eps = eps.reshape(size, *[1] * (matrix.dim() - 2 - eps.dim()), *eps.shape[1:])
    return torch.ops.fallline.newton_schulz(matrix, eps, coefficients, steps), 0


CATALOGUE = (
    OptimizerInfo(
        adafactor,
        learning_rates=(1e-4, 1.0),
        formula="p − RMS(p)·min(lr, 1/√t)·g/√v̂, v̂ of row and column means",
        paper="Shazeer & Stern",
        year=2018,
        torch_name="Adafactor",
        valid=(
            {},
            {"lr": 0.1, "weight_decay": 0.1},
            {"beta2_decay": -1.0, "d": 1.5},
            {"eps": (1e-4, 1e-2), "maximize": True},
        ),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"eps": (-1e-30, 1e-3)}, "eps1 = -1e-30 is negative"),
            Invalid({"eps": (None, -1e-3)}, "eps2 = -0.001 is negative"),
            Invalid({"eps": 1e-3}, "eps = 0.001 is not a pair", TypeError),
            Invalid({"d": 0.0}, "d = 0.0 is outside"),
            Invalid({"beta2_decay": 0.8}, "beta2_decay = 0.8 is outside"),
        ),
        settles={"lr": 0.1},
    ),
    OptimizerInfo(
        muon,
        learning_rates=(1e-4, 1.0),
        formula="p − lr·(s·NS(m) + wd·p), NS(m) nearly orthogonal",
        paper="Jordan et al.",
        year=2024,
        torch_name="Muon",
        valid=(
            {},
            {"lr": 0.01, "momentum": 0.8, "weight_decay": 0.2},
            {"nesterov": False, "weight_decay": 0.0, "ns_steps": 6},
            {"ns_coefficients": (3.4, -4.7, 2.0), "eps": 1e-5, "adjust_lr_fn": "match_rms_adamw"},
        ),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"momentum": -0.1}, "momentum = -0.1 is negative"),
            Invalid({"weight_decay": -0.1}, "weight_decay = -0.1 is negative"),
            Invalid({"ns_steps": 100}, "ns_steps = 100 is outside"),
            Invalid({"ns_steps": 2.5}, "ns_steps = 2.5 is not a whole number", TypeError),
            Invalid({"ns_coefficients": (1.0, 2.0)}, "are not three numbers", TypeError),
            Invalid({"adjust_lr_fn": "arbitrary"}, "adjust_lr_fn = 'arbitrary' is not known"),
        ),
        settles={"lr": 1e-2, "weight_decay": 0.0},
        matrices_only=True,
    ),
)
