"""Losses of two views without negatives: what keeps the embeddings apart is the statistics of the batch's dimensions.

Neighbours: `contrastive`, whose losses keep samples apart; `views` says how embeddings are given.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional

from fallline.losses.arguments import number, reduced
from fallline.losses.base import Loss, Number, Numbers, Parts, Prediction, Target, loss_maker
from fallline.losses.info import Invalid, LossInfo
from fallline.losses.views import two_views


def _off_diagonal(square: Tensor) -> Tensor:
    itself = torch.eye(square.shape[0], dtype=torch.bool, device=square.device)
    return square.masked_fill(itself, 0.0)


def _vicreg(prediction: Parts, target: Parts, numbers: Numbers) -> tuple[Tensor, None]:
    first, second = two_views("vicreg", prediction, target)
    samples, dimensions = first.shape
    count = max(samples - 1, 1)  # one sample alone has no variance, instead of 0/0
    spread, covariance = first.new_zeros(()), first.new_zeros(())
    for view in (first, second):
        centred = view - view.mean(0)
        deviation = (centred.square().sum(0) / count + numbers["eps"]).sqrt()
        spread = spread + 0.5 * functional.relu(numbers["gamma"] - deviation).mean()
        covariance = covariance + _off_diagonal(centred.mT @ centred / count).square().sum() / dimensions
    invariance = (first - second).square().mean(1)
    of_the_batch = numbers["std_coeff"] * spread + numbers["cov_coeff"] * covariance
    return numbers["sim_coeff"] * invariance + of_the_batch, None


def _barlow_twins(prediction: Parts, target: Parts, numbers: Numbers) -> tuple[Tensor, None]:
    first, second = (_standardised(view, numbers["eps"]) for view in two_views("barlow_twins", prediction, target))
    samples = first.shape[0]
    correlation = first.mT @ second / samples
    invariance = (1 - correlation.diagonal()).square().sum()
    redundancy = _off_diagonal(correlation).square().sum()
    return (invariance + numbers["lambd"] * redundancy).expand(samples), None


def _standardised(view: Tensor, eps: Number) -> Tensor:
    centred = view - view.mean(0)
    return centred * (centred.square().mean(0) + eps).rsqrt()


@loss_maker
def vicreg(
    *,
    sim_coeff: Number = 25.0,
    std_coeff: Number = 25.0,
    cov_coeff: Number = 1.0,
    gamma: Number = 1.0,
    eps: Number = 1e-4,
    reduction: str = "mean",
) -> Loss:
    """VICReg: the views agree (invariance), each dimension varies (variance), and no two together (covariance).

    λ·s + μ·v + ν·c over two views X and Y of N samples in D dimensions, with

        s = (1/N·D) Σ (x − y)²
        v = ½ Σ over both views of (1/D) Σⱼ max(0, γ − √(varⱼ + ε))
        c = Σ over both views of (1/D) Σ_{i ≠ j} covᵢⱼ²

    where variances and covariances divide by N − 1, as in the authors' code: the paper's equation for s does not divide
    by D, and that for v has no ½. A sample's value is its own part of s, plus v and c of the batch; the mean is the
    loss.

    Prediction: a tuple of two views [N, D], or one tensor [N, 2, D] or [N, 2·D]. The target is not looked at and may be
    left out. One sample alone has variances of 0 here, where the authors' code gives NaN.

    Args:
        sim_coeff, std_coeff, cov_coeff: λ, μ, ν ≥ 0.
        gamma: γ > 0, the standard deviation that each dimension should have, in the embeddings' unit.
        eps: ε > 0, which keeps the root differentiable where a dimension is constant.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for arguments outside their range.
        LossMismatch: when called with anything but two views of equal shape.

    Source: A. Bardes, J. Ponce, Y. LeCun, "VICReg: variance-invariance-covariance regularization for self-supervised
    learning", ICLR 2022.

    >>> collapsed = torch.ones(4, 3)
    >>> vicreg()((collapsed, collapsed))  # 25·(1 − 0.01): all agree, and nothing varies
    tensor(24.7500)
    """
    return Loss(
        name="vicreg",
        kind="other",
        terms=_vicreg,
        prediction=Prediction.EMBEDDINGS,
        target=Target.NOTHING,
        shapes=("two of [N, D]", "any"),
        formula="λ·mean (x − y)² + μ·mean max(0, γ − std) + ν·Σ_{i≠j} cov²/D",
        reference="Bardes 2022",
        numbers={
            "sim_coeff": number("vicreg", "sim_coeff", sim_coeff, low=0),
            "std_coeff": number("vicreg", "std_coeff", std_coeff, low=0),
            "cov_coeff": number("vicreg", "cov_coeff", cov_coeff, low=0),
            "gamma": number("vicreg", "gamma", gamma, above=0),
            "eps": number("vicreg", "eps", eps, above=0),
        },
        reduction=reduced("vicreg", reduction),
    )


@loss_maker
def barlow_twins(*, lambd: Number = 0.0051, eps: Number = 1e-5, reduction: str = "mean") -> Loss:
    """Barlow Twins: each dimension agrees between the views, and with no other dimension: Σ(1 − cᵢᵢ)² + λ Σ_{i≠j} cᵢⱼ².

    c is the correlation over the batch of dimension i of the first view and j of the second, each standardised as batch
    normalisation does, (x − mean)/√(var + ε) with the variance that divides by N. A sample's value is the loss of the
    batch, of which all have an equal share.

    Prediction: a tuple of two views [N, D], or one tensor [N, 2, D] or [N, 2·D]. The target is not looked at and may be
    left out. A dimension that is constant over the batch has correlation 0 with all.

    Args:
        lambd: λ ≥ 0, of the off-diagonal.
        eps: ε > 0, in the embeddings' unit squared: dimensions that vary less count as constant.
        reduction: "mean", "sum" (N times the mean) or "none".

    Raises:
        InvalidHyperparameter: for arguments outside their range.
        LossMismatch: when called with anything but two views of equal shape.

    Source: J. Zbontar, L. Jing, I. Misra, Y. LeCun, S. Deny, "Barlow Twins: self-supervised learning via redundancy
    reduction", ICML 2021.

    >>> collapsed = torch.ones(4, 3)
    >>> barlow_twins()((collapsed, collapsed))
    tensor(3.)
    """
    return Loss(
        name="barlow_twins",
        kind="other",
        terms=_barlow_twins,
        prediction=Prediction.EMBEDDINGS,
        target=Target.NOTHING,
        shapes=("two of [N, D]", "any"),
        formula="Σ (1 − c_ii)² + λ·Σ_{i≠j} c_ij²",
        reference="Zbontar 2021",
        numbers={
            "lambd": number("barlow_twins", "lambd", lambd, low=0),
            "eps": number("barlow_twins", "eps", eps, above=0),
        },
        reduction=reduced("barlow_twins", reduction),
    )


def _views(generator: Generator) -> tuple[Tensor, Tensor]:
    first = torch.randn(12, 1, 4, generator=generator, dtype=torch.float64)
    second = first + 0.5 * torch.randn(12, 1, 4, generator=generator, dtype=torch.float64)
    return 0.6 * torch.cat([first, second], 1), torch.arange(12)


CATALOGUE = (
    LossInfo(
        vicreg,
        _views,
        valid=({}, {"sim_coeff": 1.0, "std_coeff": 2.0, "cov_coeff": 3.0, "gamma": 1.5, "eps": 0.01}),
        invalid=(
            Invalid({"sim_coeff": -1.0}, "sim_coeff=-1.0"),
            Invalid({"std_coeff": -1.0}, "std_coeff=-1.0"),
            Invalid({"cov_coeff": -1.0}, "cov_coeff=-1.0"),
            Invalid({"cov_coeff": float("nan")}, "cov_coeff=nan"),
            Invalid({"gamma": 0.0}, "gamma=0.0"),
            Invalid({"eps": 0}, "eps=0"),
        ),
        sweeps={
            "sim_coeff": (25.0, 1.0),
            "std_coeff": (25.0, 1.0),
            "cov_coeff": (1.0, 10.0),
            "gamma": (1.0, 1.5),
            "eps": (1e-4, 0.1),
        },
        over_batch=True,
        source="A. Bardes, J. Ponce, Y. LeCun, VICReg, ICLR 2022",
    ),
    LossInfo(
        barlow_twins,
        _views,
        valid=({}, {"lambd": 0.5, "eps": 0.01}),
        invalid=(Invalid({"lambd": -1.0}, "lambd=-1.0"), Invalid({"eps": 0.0}, "eps=0.0")),
        sweeps={"lambd": (0.0051, 0.5), "eps": (1e-5, 0.5)},
        over_batch=True,
        source="J. Zbontar et al., Barlow Twins, ICML 2021",
    ),
)
