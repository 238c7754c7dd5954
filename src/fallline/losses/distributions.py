"""Distances between distributions, and between a distribution and what came true.

Neighbours: `likelihoods` and `counts` for likelihoods, `regression` for predictions of one number, `classification`
for class probabilities.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Generator, Tensor

from fallline.errors import InvalidHyperparameter, LossMismatch
from fallline.losses.arguments import number, reduced, same_shape, switch
from fallline.losses.base import Loss, Number, Numbers, Parts, Prediction, Target, loss_maker
from fallline.losses.info import Invalid, LossInfo
from fallline.losses.likelihoods import first_part, matched, spread_over
from fallline.losses.special import at_least, log_of

_MEAN_AND_SCALE = "a mean and a scale"


def _divergence(prediction: Tensor, target: Tensor, numbers: Numbers, *, log_target: bool) -> tuple[Tensor, None]:
    same_shape("kl_div", prediction, target)
    # Where the target is 0 the value is 0, whatever the prediction's logarithm is: 0·(log 0 − x) would be NaN.
    nothing = target == (-math.inf if log_target else 0)
    known = torch.where(nothing, 0 if log_target else 1, target)
    logarithm, weight = (known, known.exp()) if log_target else (known.log(), known)
    return torch.where(nothing, 0, weight * (logarithm - prediction)), None


def _gaussian_crps(prediction: Parts, target: Tensor, numbers: Numbers, *, log_scale: bool) -> tuple[Tensor, None]:
    mean, scale = matched("crps", prediction, target, 2, _MEAN_AND_SCALE)
    scale = spread_over("crps", "scale", scale, mean)
    eps = numbers["eps"]
    if log_scale:  # up to where σ overflows; beyond, the gradient of an infinite value would be NaN
        largest = math.log(torch.finfo(scale.dtype).max) - 5
        scale = at_least(scale, log_of(eps)).clamp(max=largest).exp()
    else:
        scale = at_least(scale, eps)
    difference = target - mean
    # Beyond 50 scales, φ is 0 and Φ is 0 or 1 in every precision; the square would overflow.
    z = (difference / scale).clamp(-50, 50)
    density = (-0.5 * z.square()).exp() * math.sqrt(2 / math.pi)  # 2φ(z)
    return difference * torch.erf(z * math.sqrt(0.5)) + scale * (density - 1 / math.sqrt(math.pi)), None


def _ensemble_crps(prediction: Tensor, target: Tensor, numbers: Numbers, *, fair: bool) -> tuple[Tensor, None]:
    members = _members(prediction)
    outcome = (*members.shape[:1], *members.shape[2:])
    if target.shape == (*outcome, 1):
        members = members.unsqueeze(-1)
    elif target.shape != outcome:
        raise LossMismatch(
            f"crps was given an ensemble of shape {list(members.shape)} and a target of shape {list(target.shape)}, "
            f"and expects members along dimension 1 and a target of shape {list(outcome)}. Move the members there: "
            "prediction.movedim(…, 1)."
        )
    size = members.shape[1]
    if fair and size < 2:
        raise LossMismatch("crps with fair=True was given an ensemble of 1 member, and expects 2 or more.")
    errors = members - target.unsqueeze(1)
    # Σ_i Σ_j |x_i − x_j| = 2·Σ_i (2i − M − 1)·x_(i) with the members sorted, here as errors: their differences are the
    # same, and small numbers lose no digits.
    rank = torch.arange(1 - size, size, 2, dtype=errors.dtype, device=errors.device)
    spread = (rank.reshape(-1, *[1] * (errors.ndim - 2)) * errors.sort(1).values).sum(1)
    return errors.abs().mean(1) - spread / (size * (size - 1 if fair else size)), None


def _members(prediction: Parts) -> Tensor:
    if isinstance(prediction, Tensor) and prediction.ndim >= 2 and prediction.shape[1] > 0:
        return prediction
    given = f"shape {list(prediction.shape)}" if isinstance(prediction, Tensor) else f"type {type(prediction).__name__}"
    raise LossMismatch(
        f"crps was given an ensemble of {given}, and expects a tensor [N, M, …] of M members along dimension 1. "
        "Stack the members: torch.stack(members, 1)."
    )


def _mean_of_members(prediction: Parts) -> Tensor:
    return _members(prediction).mean(1)


@loss_maker
def kl_div(*, reduction: str = "batchmean", log_target: bool = False) -> Loss:
    """The Kullback-Leibler divergence of the prediction from the target: (1/N) Σ t·(log t − p), p = log-probabilities.

    Prediction: log-probabilities [N, …], as from `log_softmax`. Target: probabilities of the same shape, or their
    logarithms; nothing is broadcast. Each sample is one distribution over its further dimensions, or several.
    An element whose target is 0 adds 0 and has the gradient 0, also where p = −∞, where torch gives NaN.

    Otherwise equal to `torch.nn.KLDivLoss`, but for the default reduction: "batchmean", which is the divergence.
    Torch's default "mean" also divides by the number of elements of a sample, and is no divergence.

    Args:
        reduction: "batchmean" (Σ/N), "mean" (over all elements), "sum" or "none".
        log_target: the target holds log-probabilities.

    Raises:
        InvalidHyperparameter: if `reduction` is unknown or `log_target` not True or False.
        LossMismatch: when called with shapes that differ.

    Source: S. Kullback and R. A. Leibler, "On information and sufficiency", Ann. Math. Statist. 22 (1951).

    >>> kl_div()(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]))
    tensor(0.6931)
    """
    log_target = switch("kl_div", "log_target", log_target)
    return Loss(
        name="kl_div",
        kind="other",
        terms=partial(_divergence, log_target=log_target),
        prediction=Prediction.LOG_DENSITIES,
        target=Target.LOG_PROBABILITIES if log_target else Target.PROBABILITIES,
        shapes=("[N, …]", "[N, …]"),
        formula="Σ t·(log t − p)",
        reference="Kullback and Leibler 1951",
        reduction=reduced("kl_div", reduction, batchmean=True),
        torch_name="KLDivLoss",
    )


@loss_maker
def crps(
    *,
    distribution: str = "gaussian",
    log_scale: bool = False,
    eps: Number = 1e-6,
    fair: bool = False,
    reduction: str = "mean",
) -> Loss:
    """The continuous ranked probability score ∫ (F(x) − 1[x ≥ t])² dx of a predicted distribution F, in t's unit.

    It is least, in expectation, for the true distribution, and for a distribution without spread it is |x − t|.

    distribution="gaussian": F is normal with mean μ and standard deviation σ, and with z = (t − μ)/σ the score is
    σ·(z·(2Φ(z) − 1) + 2φ(z) − 1/√π). Prediction: μ and σ (not the variance) as a tuple, or as one tensor [N, 2, …] or
    [N, 2d, …] with the means first. μ has the target's shape [N, …]; σ too, or one without its last dimension or with
    a 1 in one of its dimensions, or is a single number. The estimate for metrics is μ.

    distribution="ensemble": F is that of M members, and the score (1/M) Σ_i |x_i − t| − (1/2M²) Σ_i Σ_j |x_i − x_j|,
    in M·log M steps. Prediction: [N, M, …] for a target [N, …]; [N, M] also for [N, 1]. Where members are equal, their
    gradients differ, so that they part. The estimate for metrics is the members' mean.

    Args:
        distribution: "gaussian" or "ensemble".
        log_scale: Gaussian: the second part is log σ, which may be any real number.
        eps: Gaussian: the least σ, > 0: a smaller one is replaced by it, and still has the gradient at `eps`.
        fair: ensemble: divide the second sum by 2M(M − 1), which makes the score's expectation that of endlessly many
            members drawn from the same distribution. Needs M ≥ 2.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for an unknown distribution or reduction, or a switch of the other distribution's.
        LossMismatch: when called with parts or shapes that do not fit.

    Source: T. Gneiting and A. E. Raftery, "Strictly proper scoring rules, prediction, and estimation", JASA 102 (2007);
    fair: C. A. T. Ferro, "Fair scores for ensemble forecasts", Q. J. R. Meteorol. Soc. 140 (2014).

    >>> crps()(torch.tensor([[0.0, 1.0]]), torch.tensor([0.0]))
    tensor(0.2337)
    >>> crps(distribution="ensemble")(torch.tensor([[0.0, 2.0]]), torch.tensor([1.0]))
    tensor(0.5000)
    """
    log_scale, fair = switch("crps", "log_scale", log_scale), switch("crps", "fair", fair)
    if distribution not in ("gaussian", "ensemble"):
        raise InvalidHyperparameter(
            f"crps was given distribution={distribution!r}, and expects 'gaussian' or 'ensemble'."
        )
    gaussian = distribution == "gaussian"
    if fair and gaussian:
        raise InvalidHyperparameter("crps was given fair=True for a Gaussian, and expects it with 'ensemble' alone.")
    if log_scale and not gaussian:
        raise InvalidHyperparameter(
            "crps was given log_scale=True for an ensemble, and expects it with 'gaussian' alone."
        )
    mean = partial(first_part, name="crps", count=2, what=_MEAN_AND_SCALE)
    return Loss(
        name="crps",
        kind="regression",
        terms=partial(_gaussian_crps, log_scale=log_scale) if gaussian else partial(_ensemble_crps, fair=fair),
        prediction=Prediction.DISTRIBUTION if gaussian else Prediction.ENSEMBLE,
        target=Target.REAL,
        shapes=("[N, …] and [N, …], or [N, 2, …]" if gaussian else "[N, M, …]", "[N, …]"),
        formula="∫ (F(x) − 1[x ≥ t])² dx",
        reference="Gneiting and Raftery 2007",
        numbers={"eps": number("crps", "eps", eps, above=0)},
        reduction=reduced("crps", reduction),
        estimate=mean if gaussian else _mean_of_members,
    )


def _two_distributions(generator: Generator) -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, 12, 4, generator=generator, dtype=torch.float64)
    return logits[0].log_softmax(1), logits[1].softmax(1)


def _mean_and_scale(generator: Generator) -> tuple[Tensor, Tensor]:
    """As an ensemble, these are two members."""
    mean = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    scale = 0.3 + torch.rand(12, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    return torch.stack((mean, scale), 1), mean + scale * noise


CATALOGUE = (
    LossInfo(
        kl_div,
        _two_distributions,
        valid=({}, {"reduction": "sum"}),
        invalid=(Invalid({"log_target": 1}, "log_target=1"), Invalid({"reduction": "average"}, "'batchmean'")),
        source="S. Kullback and R. A. Leibler, On information and sufficiency, Ann. Math. Statist. 22 (1951)",
    ),
    LossInfo(
        crps,
        _mean_and_scale,
        valid=({}, {"log_scale": True}, {"distribution": "ensemble"}, {"distribution": "ensemble", "fair": True}),
        invalid=(
            Invalid({"distribution": "laplace"}, "distribution='laplace'"),
            Invalid({"fair": True}, "fair=True"),
            Invalid({"distribution": "ensemble", "log_scale": True}, "log_scale=True"),
            Invalid({"eps": 0.0}, "eps=0.0"),
            Invalid({"log_scale": 1}, "log_scale=1"),
        ),
        sweeps={"eps": (1e-6, 0.8)},
        source="T. Gneiting and A. E. Raftery, Strictly proper scoring rules, prediction, and estimation, JASA 2007",
    ),
)
