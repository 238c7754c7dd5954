"""Likelihoods of counts and amounts: numbers that are never negative, and spread the more the larger they are.

Neighbours: `likelihoods` for the normal distribution, `regression` for predictions of one real number.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Generator, Tensor

from fallline.errors import InvalidHyperparameter
from fallline.losses.arguments import number, reduced, same_shape, switch
from fallline.losses.base import Loss, Number, Numbers, Parts, Prediction, Target, loss_maker
from fallline.losses.info import Invalid, LossInfo
from fallline.losses.likelihoods import first_part, matched, spread_over
from fallline.losses.special import expm1_ratio, log1p_ratio, log_rising, softplus

_MEAN_AND_DISPERSION = "the logarithms of a mean and of a dispersion"


def _floating(target: Tensor, prediction: Tensor) -> Tensor:
    """Whole numbers as real ones of the prediction's type: a logarithm of integers would be single precision."""
    return target if target.is_floating_point() else target.to(prediction.dtype)


def _poisson(
    prediction: Tensor, target: Tensor, numbers: Numbers, *, log_input: bool, full: bool
) -> tuple[Tensor, None]:
    same_shape("poisson_nll", prediction, target)
    target = _floating(target, prediction)
    if log_input:
        values = prediction.exp() - target * prediction
    else:
        values = prediction - target * (prediction + numbers["eps"]).log()
    if full:
        several = target > 1
        count = torch.where(several, target, 1)
        values = values + torch.where(several, count * count.log() - count + 0.5 * (2 * math.pi * count).log(), 0)
    return values, None


def _negative_binomial(prediction: Parts, target: Tensor, numbers: Numbers, *, log_input: bool) -> tuple[Tensor, None]:
    """−log P(t) = log Γ(t + 1) + log(1 + αμ)/α + t·log(1/μ + α) − [log Γ(t + 1/α) − log Γ(1/α) + t·log α]."""
    first, second = matched("negative_binomial_nll", prediction, target, 2, _MEAN_AND_DISPERSION)
    second = spread_over("negative_binomial_nll", "dispersion", second, first)
    target = _floating(target, first)
    log_mean, log_dispersion = first, second
    if not log_input:
        log_mean, log_dispersion = (first + numbers["eps"]).log(), (second + numbers["eps"]).log()
    log_mean, log_dispersion = torch.broadcast_tensors(log_mean, log_dispersion)
    # log(1 + αμ)/α is μ where α is nothing, and softplus(log αμ)/α where αμ would overflow.
    log_product = log_mean + log_dispersion
    large = log_product > 0
    at_small = log1p_ratio(torch.where(large, 0, log_product).exp())
    at_large = softplus(torch.where(large, log_product, 0))
    normaliser = torch.where(large, -log_dispersion, log_mean).exp() * torch.where(large, at_large, at_small)
    # t·log α goes where it makes no large difference: log_rising leaves it out for 1/α < 1.
    shift = torch.where(log_dispersion > 0, log_dispersion, 0)
    per_count = torch.logaddexp(-log_mean - shift, log_dispersion - shift)
    rising = log_rising(target, -log_dispersion)
    return torch.lgamma(target + 1) + normaliser + target * per_count - rising, None


def _tweedie(prediction: Tensor, target: Tensor, numbers: Numbers) -> tuple[Tensor, None]:
    same_shape("tweedie", prediction, target)
    target = _floating(target, prediction)
    power = numbers["power"]
    positive = target > 0
    logarithm = torch.where(positive, target, 1).log()
    # Neither difference cancels as p goes to 1 or 2, or the prediction to the target.
    off = torch.where(positive, prediction - logarithm, 0)
    above = ((2 - power) * logarithm).exp() * (expm1_ratio(off, 2 - power) - expm1_ratio(off, 1 - power))
    at_zero = ((2 - power) * torch.where(positive, 0, prediction)).exp() / (2 - power)
    return 2 * torch.where(positive, above, at_zero), None


def _mean_of_counts(prediction: Parts, *, log_input: bool) -> Tensor:
    mean = first_part(prediction, name="negative_binomial_nll", count=2, what=_MEAN_AND_DISPERSION)
    return mean.exp() if log_input else mean


@loss_maker
def poisson_nll(*, log_input: bool = True, full: bool = False, eps: Number = 1e-8, reduction: str = "mean") -> Loss:
    """The negative log-likelihood of a count t under a Poisson distribution, up to log t!: exp(p) − t·p.

    The prediction p is the logarithm of the expected count; with `log_input=False` it is the expected count μ itself,
    and the loss μ − t·log(μ + ε). Prediction and target have equal shapes [N, …]; nothing is broadcast. Target: counts
    0, 1, …, of a floating or an integer type; other numbers ≥ 0 do too (rates). The estimate for metrics is exp(p), or
    μ. Equal to `torch.nn.PoissonNLLLoss`.

    Args:
        log_input: the prediction is a logarithm.
        full: add Stirling's approximation of log t!, t·log t − t + ½·log 2πt, where t > 1.
        eps: ε ≥ 0, which keeps log 0 away; without effect for a `log_input`.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for an `eps` below 0, a switch that is not True or False, an unknown `reduction`.
        LossMismatch: when called with shapes that differ.

    Source: P. McCullagh and J. A. Nelder, "Generalized linear models", 1989.

    >>> poisson_nll()(torch.tensor([0.0, 0.0]), torch.tensor([1, 3]))
    tensor(1.)
    """
    log_input = switch("poisson_nll", "log_input", log_input)
    return Loss(
        name="poisson_nll",
        kind="regression",
        terms=partial(_poisson, log_input=log_input, full=switch("poisson_nll", "full", full)),
        prediction=Prediction.LOG_RATES if log_input else Prediction.POSITIVE,
        target=Target.COUNTS,
        shapes=("[N, …]", "[N, …]"),
        formula="exp(p) − t·p" if log_input else "μ − t·log(μ + ε)",
        reference="McCullagh and Nelder 1989",
        numbers={"eps": number("poisson_nll", "eps", eps, low=0)},
        reduction=reduced("poisson_nll", reduction),
        estimate=torch.exp if log_input else None,
        torch_name="PoissonNLLLoss",
    )


@loss_maker
def negative_binomial_nll(*, log_input: bool = True, eps: Number = 1e-8, reduction: str = "mean") -> Loss:
    """The negative log-likelihood of a count t under a negative binomial distribution, −log P(t).

    With the mean μ and the dispersion α, the variance is μ + αμ² (the form called NB2): counts that spread more than
    Poisson's, to which it tends for α → 0. With r = 1/α,

        P(t) = Γ(t + r)/(Γ(r)·t!) · (r/(r + μ))^r · (μ/(r + μ))^t

    which is `scipy.stats.nbinom(r, r/(r + μ))`, and `torch.distributions.NegativeBinomial(r, logits=log αμ)`.

    Prediction: log μ and log α, any real numbers, as a tuple, or as one tensor [N, 2, …] or [N, 2d, …] with log μ
    first; log μ has the target's shape [N, …], and log α too, or one without its last dimension or with a 1 in one of
    its dimensions, or is a single number. Target: counts 0, 1, …, of a floating or an integer type. The estimate for
    metrics is μ. It is finite and right also for log α = ±10⁴ and for counts far beyond the prediction.

    Args:
        log_input: the parts are logarithms; with False they are μ and α themselves, above 0.
        eps: ≥ 0, added to μ and to α before their logarithm is taken; without effect for a `log_input`.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for an `eps` below 0, a switch that is not True or False, an unknown `reduction`.
        LossMismatch: when called with parts or shapes that do not fit.

    Source: J. M. Hilbe, "Negative binomial regression", 2011; the parameters as in A. C. Cameron and P. K. Trivedi,
    "Econometric models based on count data", J. Appl. Econometrics 1 (1986).

    >>> negative_binomial_nll()(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))  # a coin until the first head: P(0) = ½
    tensor(0.6931)
    """
    log_input = switch("negative_binomial_nll", "log_input", log_input)
    return Loss(
        name="negative_binomial_nll",
        kind="regression",
        terms=partial(_negative_binomial, log_input=log_input),
        prediction=Prediction.DISTRIBUTION,
        target=Target.COUNTS,
        shapes=("[N, …] and [N, …], or [N, 2, …]", "[N, …]"),
        formula="−log NB(t; mean μ, variance μ + αμ²)",
        reference="Cameron and Trivedi 1986",
        numbers={"eps": number("negative_binomial_nll", "eps", eps, low=0)},
        reduction=reduced("negative_binomial_nll", reduction),
        estimate=partial(_mean_of_counts, log_input=log_input),
    )


@loss_maker
def tweedie(*, power: Number = 1.5, reduction: str = "mean") -> Loss:
    """The deviance of a compound Poisson-gamma distribution: amounts ≥ 0, many of them exactly 0, with a tail.

    The prediction η is the logarithm of the expected amount μ = exp η, and the variance goes as μ^p:

        2·(t^(2−p)/((1 − p)(2 − p)) − t·μ^(1−p)/(1 − p) + μ^(2−p)/(2 − p))

    It is 0 for μ = t and above 0 elsewhere. The quasi-likelihood that LightGBM and XGBoost descend, and half the
    deviance, which scikit-learn's regressor does, have half its gradient. Prediction and target have equal shapes
    [N, …]; nothing is broadcast. Target: amounts ≥ 0. The estimate for metrics is exp η. For a p near 1, where it
    becomes Poisson's deviance, or near 2, gamma's, it loses no digits.

    Args:
        power: p above 1 and below 2.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for a p outside (1, 2) or an unknown `reduction`.
        LossMismatch: when called with shapes that differ.

    Source: B. Jørgensen, "Exponential dispersion models", J. R. Statist. Soc. B 49 (1987).

    >>> tweedie(power=1.5)(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]))
    tensor(2.)
    """
    chosen = number("tweedie", "power", power, above=1)
    if not isinstance(chosen, Tensor) and chosen >= 2:
        raise InvalidHyperparameter(f"tweedie was given power={power!r}, and expects a number above 1 and below 2.")
    return Loss(
        name="tweedie",
        kind="regression",
        terms=_tweedie,
        prediction=Prediction.LOG_RATES,
        target=Target.NOT_NEGATIVE,
        shapes=("[N, …]", "[N, …]"),
        formula="deviance of t from μ = exp η where the variance goes as μ^p",
        reference="Jørgensen 1987",
        numbers={"power": chosen},
        reduction=reduced("tweedie", reduction),
        estimate=torch.exp,
    )


def _rates_and_counts(generator: Generator) -> tuple[Tensor, Tensor]:
    rates = 0.2 + 2 * torch.rand(12, 2, generator=generator, dtype=torch.float64)
    return rates, torch.poisson(1 + rates, generator=generator)


def _two_outputs(generator: Generator) -> tuple[Tensor, Tensor]:
    outputs = 0.2 + torch.rand(12, 2, generator=generator, dtype=torch.float64)
    return outputs, torch.poisson(1 + 3 * outputs[:, 0], generator=generator)


def _amounts(generator: Generator) -> tuple[Tensor, Tensor]:
    logarithms = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    events = torch.poisson(torch.ones(12, 2, dtype=torch.float64), generator=generator)
    return logarithms, events * (0.5 + torch.rand(12, 2, generator=generator, dtype=torch.float64))


CATALOGUE = (
    LossInfo(
        poisson_nll,
        _rates_and_counts,
        valid=({"log_input": False}, {}, {"full": True}, {"log_input": False, "full": True, "eps": 0.1}),
        invalid=(
            Invalid({"eps": -1.0}, "eps=-1.0"),
            Invalid({"log_input": 1}, "log_input=1"),
            Invalid({"full": "no"}, "full='no'"),
        ),
        sweeps={"eps": (0.01, 0.5)},
        source="P. McCullagh and J. A. Nelder, Generalized linear models, 1989",
    ),
    LossInfo(
        negative_binomial_nll,
        _two_outputs,
        valid=({"log_input": False}, {}),
        invalid=(Invalid({"eps": -1.0}, "eps=-1.0"), Invalid({"log_input": None}, "log_input=None")),
        sweeps={"eps": (0.01, 0.5)},
        source="A. C. Cameron and P. K. Trivedi, Econometric models based on count data, J. Appl. Econometr. (1986)",
    ),
    LossInfo(
        tweedie,
        _amounts,
        valid=({}, {"power": 1.1}),
        invalid=(
            Invalid({"power": 1.0}, "power=1.0"),
            Invalid({"power": 2}, "power=2"),
            Invalid({"power": "gamma"}, "power='gamma'"),
        ),
        sweeps={"power": (1.1, 1.9)},
        source="B. Jørgensen, Exponential dispersion models, J. R. Statist. Soc. B 49 (1987)",
    ),
)
