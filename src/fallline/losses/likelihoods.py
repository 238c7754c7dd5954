"""Likelihoods of a number under a normal distribution whose mean and spread are both predicted.

Neighbours: `counts` for counts and amounts, `distributions` for other distances between distributions, `regression` for
predictions of one number. `matched` and `spread_over` say what parts of a prediction these families accept.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Generator, Tensor

from fallline.errors import LossMismatch
from fallline.losses.arguments import like, number, parts, reduced, same_shape, switch
from fallline.losses.base import Loss, Number, Numbers, Parts, Prediction, Target, loss_maker
from fallline.losses.info import Invalid, LossInfo
from fallline.losses.special import at_least, log_of, log_rising, log_softplus, softplus

_MEAN_AND_VARIANCE = "a mean and a variance"
_NORMAL_INVERSE_GAMMA = "gamma, nu, alpha and beta of a normal-inverse-gamma distribution"


def matched(name: str, prediction: Parts, target: Tensor, count: int, what: str) -> tuple[Tensor, ...]:
    """The parts of a prediction, as `parts` reads them; the first has the target's shape, or is refused."""
    found = parts(name, prediction, count, what)
    first = like(found[0], target)
    same_shape(name, first, target)
    return first, *(like(part, target) if part.shape == found[0].shape else part for part in found[1:])


def spread_over(name: str, what: str, spread: Tensor, mean: Tensor) -> Tensor:
    """A variance, scale or dispersion that fits a mean [N, …]: one for each number, or one for several.

    As in torch, it may lack the mean's last dimension, or be 1 in one of its dimensions; or it is a single number.

    Raises:
        LossMismatch: for any other shape, which would be broadcast in silence.
    """
    if spread.shape == mean.shape or spread.ndim == 0:
        return spread
    if spread.shape == mean.shape[:-1]:
        return spread.unsqueeze(-1)
    differing = [own for own, other in zip(spread.shape, mean.shape, strict=False) if own != other]
    if spread.ndim == mean.ndim and differing == [1]:
        return spread
    raise LossMismatch(
        f"{name} was given a mean of shape {list(mean.shape)} and a {what} of shape {list(spread.shape)}, and expects "
        f"equal shapes, or one {what} for several means (a dimension of size 1). Give the {what} the mean's shape: "
        f"{what}.reshape(mean.shape) if it has as many elements."
    )


def first_part(prediction: Parts, *, name: str, count: int, what: str) -> Tensor:
    """The first part of a prediction: the mean, where that comes first."""
    return parts(name, prediction, count, what)[0]


def _scaled_error(
    name: str, prediction: Parts, target: Tensor, eps: Number, log_variance: bool
) -> tuple[Tensor, Tensor]:
    """The squared error in units of the variance, and the logarithm of the variance."""
    mean, variance = matched(name, prediction, target, 2, _MEAN_AND_VARIANCE)
    variance = spread_over(name, "variance", variance, mean)
    error = (mean - target).square()
    if log_variance:
        logarithm = at_least(variance, log_of(eps))
        return error * (-logarithm).exp(), logarithm
    variance = at_least(variance, eps)
    return error / variance, variance.log()


def _gaussian(
    prediction: Parts, target: Tensor, numbers: Numbers, *, full: bool, log_variance: bool
) -> tuple[Tensor, None]:
    scaled, logarithm = _scaled_error("gaussian_nll", prediction, target, numbers["eps"], log_variance)
    values = 0.5 * (logarithm + scaled)
    return values + 0.5 * math.log(2 * math.pi) if full else values, None


def _beta(prediction: Parts, target: Tensor, numbers: Numbers, *, log_variance: bool) -> tuple[Tensor, None]:
    scaled, logarithm = _scaled_error("beta_nll", prediction, target, numbers["eps"], log_variance)
    # An infinite weight would make the gradient NaN.
    exponent = (numbers["beta"] * logarithm.detach()).clamp(max=0.5 * math.log(torch.finfo(logarithm.dtype).max))
    return exponent.exp() * (0.5 * (logarithm + scaled)), None


def _evidential(prediction: Parts, target: Tensor, numbers: Numbers) -> tuple[Tensor, None]:
    gamma, *raw = matched("evidential", prediction, target, 4, _NORMAL_INVERSE_GAMMA)
    for part in raw:
        same_shape("evidential", part, target)
    raw_nu, raw_alpha, raw_beta = raw
    nu, evidence = softplus(raw_nu), softplus(raw_alpha)
    alpha, log_alpha = 1 + evidence, evidence.log1p()
    # Of −α·log Ω + (α + ½)·log(d²ν + Ω) = ½·log Ω + (α + ½)·log(1 + d²ν/Ω), and of −½·log ν, only ν/Ω is needed.
    log_ratio = (log_softplus(raw_nu) - log_softplus(raw_beta)) - (math.log(2) + nu.log1p())
    distance = (target - gamma).abs()
    # By logarithms, because the quotient over- and underflows; where d = 0 it is 0 with slope 0.
    apart = distance > 0
    tail = torch.where(apart, softplus(log_ratio + 2 * torch.where(apart, distance, 1).log()), 0)
    rising = log_rising(torch.full_like(alpha, 0.5), log_alpha)  # log Γ(α + ½) − log Γ(α) − ½·log α
    likelihood = 0.5 * (math.log(math.pi) - log_ratio - log_alpha) + (alpha + 0.5) * tail - rising
    return likelihood + numbers["coefficient"] * distance * (2 * nu + alpha), None


def _in_torchs_order(prediction: Tensor, target: Tensor, variance: Tensor | float) -> tuple[Parts, Tensor]:
    given = variance if isinstance(variance, Tensor) else prediction.new_tensor(variance)
    return (prediction, given), target


@loss_maker
def gaussian_nll(
    *, full: bool = False, eps: Number = 1e-6, reduction: str = "mean", log_variance: bool = False
) -> Loss:
    """The negative log-likelihood of a normal distribution: ½·(log v + (t − μ)²/v), with the variance v predicted too.

    Prediction: mean μ and variance v as a tuple, or as one tensor [N, 2, …] or [N, 2d, …] with the means first, so that
    a layer Linear(…, 2) will do (with `log_variance`, as its outputs may be negative). μ has the target's shape [N, …];
    from [N, 2] also a target [N, 1] is met. v has μ's shape, or one without its last dimension or with a 1 in one of
    its dimensions, or is a single number. Target: real values. The estimate for metrics is μ.

    Called with three tensors it takes them in torch's order: `gaussian_nll()(input, target, var)`, and is equal to
    `torch.nn.GaussianNLLLoss`, except that shapes [N, 1] against [N] are refused where torch broadcasts them to
    [N, N], and that a variance below 0 counts as `eps` where torch raises an error.

    Args:
        full: also add the constant ½·log 2π.
        eps: the least variance, ≥ 0: a smaller one is replaced by it, and still has the gradient at `eps` (as in
            torch), so that it can grow again. 0 leaves variances as they are.
        reduction: "mean", "sum" or "none".
        log_variance: the second part is log v, which may be any real number, and the loss never divides by v.

    Raises:
        InvalidHyperparameter: for an `eps` below 0, a switch that is not True or False, an unknown `reduction`.
        LossMismatch: when called with parts or shapes that do not fit.

    Source: D. A. Nix and A. S. Weigend, "Estimating the mean and variance of the target probability distribution",
    ICNN 1994.

    >>> gaussian_nll(log_variance=True)(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([1.0, 1.0]))
    tensor(1.)
    """
    log_variance = switch("gaussian_nll", "log_variance", log_variance)
    return Loss(
        name="gaussian_nll",
        kind="regression",
        terms=partial(_gaussian, full=switch("gaussian_nll", "full", full), log_variance=log_variance),
        prediction=Prediction.DISTRIBUTION,
        target=Target.REAL,
        shapes=("[N, …] and [N, …], or [N, 2, …]", "[N, …]"),
        formula="½·(log v + (t − μ)²/v)",
        reference="Nix and Weigend 1994",
        numbers={"eps": number("gaussian_nll", "eps", eps, low=0)},
        reduction=reduced("gaussian_nll", reduction),
        estimate=partial(first_part, name="gaussian_nll", count=2, what=_MEAN_AND_VARIANCE),
        arrange=_in_torchs_order,
        torch_name="" if log_variance else "GaussianNLLLoss",
    )


@loss_maker
def beta_nll(*, beta: Number = 0.5, eps: Number = 1e-6, reduction: str = "mean", log_variance: bool = False) -> Loss:
    """The normal likelihood with each sample weighted by a power of its variance: ⌊v^β⌋·½·(log v + (t − μ)²/v).

    ⌊·⌋ is a constant to the gradient, so the gradient is not the derivative of the value. With plain `gaussian_nll`,
    β = 0, samples with a large variance hardly move the mean, and may never be learnt; with β = 1 the mean moves as
    under the squared error; β = ½ lies between. The value at β > 0 is not a likelihood: compare models by
    `gaussian_nll`.

    Prediction: mean μ and variance v, in the forms that `gaussian_nll` takes. Target: real values [N, …]. The
    estimate for metrics is μ.

    Args:
        beta: β from 0 to 1.
        eps: the least variance, ≥ 0, as in `gaussian_nll`.
        reduction: "mean", "sum" or "none".
        log_variance: the second part is log v, which may be any real number.

    Raises:
        InvalidHyperparameter: for a number outside its domain, or an unknown `reduction`.
        LossMismatch: when called with parts or shapes that do not fit.

    Source: M. Seitzer et al., "On the pitfalls of heteroscedastic uncertainty estimation with probabilistic neural
    networks", ICLR 2022.

    >>> beta_nll(beta=1.0, log_variance=True)(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0]]))
    tensor(2.)
    """
    log_variance = switch("beta_nll", "log_variance", log_variance)
    return Loss(
        name="beta_nll",
        kind="regression",
        terms=partial(_beta, log_variance=log_variance),
        prediction=Prediction.DISTRIBUTION,
        target=Target.REAL,
        shapes=("[N, …] and [N, …], or [N, 2, …]", "[N, …]"),
        formula="⌊v^β⌋·½·(log v + (t − μ)²/v)",
        reference="Seitzer et al. 2022",
        numbers={
            "beta": number("beta_nll", "beta", beta, low=0, high=1),
            "eps": number("beta_nll", "eps", eps, low=0),
        },
        reduction=reduced("beta_nll", reduction),
        estimate=partial(first_part, name="beta_nll", count=2, what=_MEAN_AND_VARIANCE),
        arrange=_in_torchs_order,
    )


@loss_maker
def evidential(*, coefficient: Number = 0.01, reduction: str = "mean") -> Loss:
    """Deep evidential regression: the likelihood of a target whose mean and variance are themselves uncertain.

    A normal-inverse-gamma distribution (γ, ν, α, β) over mean and variance leaves a Student t distribution for the
    target t. With Ω = 2β(1 + ν), the loss is its negative log-likelihood and λ times the error times the evidence:

        ½·log(π/ν) − α·log Ω + (α + ½)·log((t − γ)²·ν + Ω) + log Γ(α) − log Γ(α + ½) + λ·|t − γ|·(2ν + α)

    Prediction: four raw parts of the target's shape [N, …], any real numbers, as a tuple or as one tensor [N, 4, …] or
    [N, 4d, …]. The loss itself makes of them γ = r₁, ν = softplus(r₂), α = 1 + softplus(r₃), β = softplus(r₄): do not
    apply softplus before. Then β/(α − 1) is the noise expected in the data, β/(ν·(α − 1)) the variance of the mean.
    It stays finite and right for raw parts of ±10⁴. Target: real values. The estimate for metrics is γ.

    Args:
        coefficient: λ ≥ 0.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for a λ below 0 or an unknown `reduction`.
        LossMismatch: when called with parts or shapes that do not fit.

    Source: A. Amini et al., "Deep evidential regression", NeurIPS 2020 (equations 8 and 9, with λ = 0.01).

    >>> evidential()(torch.zeros(1, 4), torch.tensor([0.5]))
    tensor(1.1634)
    """
    return Loss(
        name="evidential",
        kind="regression",
        terms=_evidential,
        prediction=Prediction.DISTRIBUTION,
        target=Target.REAL,
        shapes=("four of [N, …], or [N, 4, …]", "[N, …]"),
        formula="−log t-density(γ, ν, α, β) + λ·|t − γ|·(2ν + α)",
        reference="Amini et al. 2020",
        numbers={"coefficient": number("evidential", "coefficient", coefficient, low=0)},
        reduction=reduced("evidential", reduction),
        estimate=partial(first_part, name="evidential", count=4, what=_NORMAL_INVERSE_GAMMA),
    )


def _mean_and_variance(generator: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    mean = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    variance = 0.3 + torch.rand(12, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    return (mean, variance), mean + variance.sqrt() * noise


def _four_outputs(generator: Generator) -> tuple[Tensor, Tensor]:
    raw = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return raw, raw[:, 0] + torch.randn(12, generator=generator, dtype=torch.float64)


CATALOGUE = (
    LossInfo(
        gaussian_nll,
        _mean_and_variance,
        valid=({}, {"full": True}, {"log_variance": True}),
        invalid=(
            Invalid({"eps": -1.0}, "eps=-1.0"),
            Invalid({"full": 1}, "full=1"),
            Invalid({"log_variance": "yes"}, "log_variance='yes'"),
        ),
        sweeps={"eps": (1e-6, 0.8)},
        source="D. A. Nix and A. S. Weigend, Estimating the mean and variance of the target distribution, ICNN 1994",
    ),
    LossInfo(
        beta_nll,
        _mean_and_variance,
        # Only at β = 0 is the gradient the derivative of the value, as the contract of differentiability wants it.
        valid=({"beta": 0.0}, {"beta": 0.0, "log_variance": True}),
        invalid=(
            Invalid({"beta": 1.5}, "beta=1.5"),
            Invalid({"beta": -0.5}, "beta=-0.5"),
            Invalid({"eps": -1.0}, "eps=-1.0"),
            Invalid({"log_variance": None}, "log_variance=None"),
        ),
        sweeps={"beta": (0.3, 1.0), "eps": (1e-6, 0.8)},
        source="M. Seitzer et al., On the pitfalls of heteroscedastic uncertainty estimation, ICLR 2022",
    ),
    LossInfo(
        evidential,
        _four_outputs,
        valid=({}, {"coefficient": 0.5}),
        invalid=(Invalid({"coefficient": -0.1}, "coefficient=-0.1"),),
        sweeps={"coefficient": (0.0, 0.5)},
        source="A. Amini et al., Deep evidential regression, NeurIPS 2020",
    ),
)
