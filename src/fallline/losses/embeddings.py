"""Losses for distances and for pairs and triplets of embeddings, each pair or triplet by itself.

Neighbours: `contrastive`, where the other samples of the batch are what to keep away from, and `redundancy`, where the
statistics of the batch are the loss; `views` says how embeddings are given.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Generator, Tensor

from fallline.errors import InvalidHyperparameter, LossMismatch
from fallline.losses.arguments import like, number, parts, reduced, same_shape, switch
from fallline.losses.base import Loss, Number, Numbers, Parts, Prediction, Target, loss_maker
from fallline.losses.info import Invalid, LossInfo
from fallline.losses.views import direction, together


def _hinge_embedding(prediction: Tensor, target: Tensor, numbers: Numbers) -> tuple[Tensor, None]:
    same_shape("hinge_embedding", prediction, target)
    beyond = (numbers["margin"] - prediction).clamp(min=0)
    return torch.where(target != -1, prediction, 0.0) + torch.where(target != 1, beyond, 0.0), None


def _cosine_embedding(prediction: Parts, target: Tensor, numbers: Numbers) -> tuple[Tensor, None]:
    first, second = together("cosine_embedding", prediction, target, 2, "two embeddings")
    cosine = like((direction(first) * direction(second)).sum(-1), target)
    if cosine.shape != target.shape:
        raise LossMismatch(
            f"cosine_embedding was given pairs of shape {list(first.shape)} and a target of shape "
            f"{list(target.shape)}, and expects one target for each pair, of shape {list(first.shape[:-1])}."
        )
    apart = (cosine - numbers["margin"]).clamp(min=0)
    return torch.where(target == 1, 1 - cosine, 0.0) + torch.where(target == -1, apart, 0.0), None


def _margin_ranking(prediction: Parts, target: Tensor, numbers: Numbers) -> tuple[Tensor, None]:
    first, second = parts("margin_ranking", prediction, 2, "two scores")
    first, second = like(first, target), like(second, target)
    if not first.shape == second.shape == target.shape:
        raise LossMismatch(
            f"margin_ranking was given scores of shapes {list(first.shape)} and {list(second.shape)} and a target of "
            f"shape {list(target.shape)}, and expects equal shapes. Reshape them: nothing is broadcast."
        )
    return (target * (second - first) + numbers["margin"]).clamp(min=0), None


def _triplet_margin(prediction: Parts, target: Parts, numbers: Numbers, *, p: float, swap: bool) -> tuple[Tensor, None]:
    words = "the embeddings of an anchor, a positive and a negative"
    anchor, positive, negative = together("triplet_margin", prediction, target, 3, words)

    def distance(one: Tensor, other: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(one - other + numbers["eps"], p, -1)
        return length

    away = distance(anchor, negative)
    if swap:
        away = torch.minimum(away, distance(positive, negative))
    return (numbers["margin"] + distance(anchor, positive) - away).clamp(min=0), None


@loss_maker
def hinge_embedding(*, margin: Number = 1.0, reduction: str = "mean") -> Loss:
    """The hinge embedding loss of a distance d: d itself for a similar pair, max(0, m − d) for a dissimilar one.

    Prediction: distances ≥ 0, [N, …]. Target: 1 (similar) or −1 (dissimilar), of any type and the prediction's shape;
    nothing is broadcast. Equal to `torch.nn.HingeEmbeddingLoss`, which also takes margins ≤ 0, where dissimilar
    pairs count for nothing.

    Args:
        margin: m > 0, in the unit of the distances: how far apart dissimilar pairs should be.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: if `margin` is not a number above 0, or `reduction` is unknown.
        LossMismatch: when called with shapes that differ.

    >>> hinge_embedding(margin=2.0)(torch.tensor([0.5, 0.5, 3.0]), torch.tensor([1, -1, -1]))
    tensor(0.6667)
    """
    return Loss(
        name="hinge_embedding",
        kind="other",
        terms=_hinge_embedding,
        prediction=Prediction.DISTANCES,
        target=Target.SIGNS,
        shapes=("[N, …]", "[N, …]"),
        formula="d for t = 1, max(0, m − d) for t = −1",
        numbers={"margin": number("hinge_embedding", "margin", margin, above=0)},
        reduction=reduced("hinge_embedding", reduction),
        torch_name="HingeEmbeddingLoss",
    )


@loss_maker
def cosine_embedding(*, margin: Number = 0.0, reduction: str = "mean") -> Loss:
    """The cosine embedding loss: 1 − cos(x₁, x₂) for a similar pair, max(0, cos(x₁, x₂) − m) for a dissimilar one.

    Prediction: a tuple (x₁, x₂) of embeddings [N, D], or one tensor [N, 2, D] or [N, 2·D]; unbatched [D] with a
    0-dimensional target too. Target: 1 (similar) or −1 (dissimilar), [N], of any type. Called in torch's order,
    `loss(x1, x2, target)`, it equals `torch.nn.CosineEmbeddingLoss`, except for embeddings shorter than about 1e-5:
    torch adds 1e-12 to squared lengths, which bends the cosine of short vectors and makes the gradient at a zero vector
    a million times too large; here the cosine does not depend on the length, and that of a zero vector is 0 with a
    gradient of 0.

    Args:
        margin: m from −1 to 1, the cosine above which dissimilar pairs count; 0 to 0.5 is usual.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: if `margin` is not a number from −1 to 1, or `reduction` is unknown.
        LossMismatch: when called with shapes that cannot be compared.

    >>> same, turned = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    >>> cosine_embedding(reduction="none")((same, turned), torch.tensor([1, -1]))
    tensor([0.0000, 0.6000])
    """
    return Loss(
        name="cosine_embedding",
        kind="other",
        terms=_cosine_embedding,
        prediction=Prediction.EMBEDDINGS,
        target=Target.SIGNS,
        shapes=("two of [N, D]", "[N]"),
        formula="1 − cos(x₁, x₂) for t = 1, max(0, cos(x₁, x₂) − m) for t = −1",
        numbers={"margin": number("cosine_embedding", "margin", margin, low=-1, high=1)},
        reduction=reduced("cosine_embedding", reduction),
        arrange=lambda input1, input2, target: ((input1, input2), target),
        torch_name="CosineEmbeddingLoss",
    )


@loss_maker
def margin_ranking(*, margin: Number = 0.0, reduction: str = "mean") -> Loss:
    """The margin ranking loss, max(0, m − t·(x₁ − x₂)): the first score should be higher by m where t = 1.

    Prediction: a tuple (x₁, x₂) of scores [N, …], or one tensor that holds them along dimension 1, such as [N, 2].
    Target: 1 (the first is higher) or −1 (the second is), of any signed type and the scores' shape; scores [N] also go
    with a target [N, 1]. Called in torch's order, `loss(x1, x2, target)`, it equals `torch.nn.MarginRankingLoss`, which
    broadcasts shapes that differ; here they are refused.

    Args:
        margin: m, in the unit of the scores.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: if `margin` is not a finite number, or `reduction` is unknown.
        LossMismatch: when called with shapes that differ.

    Source: R. Herbrich, T. Graepel, K. Obermayer, "Large margin rank boundaries for ordinal regression", Advances in
    Large Margin Classifiers (2000).

    >>> margin_ranking(margin=1.0)(torch.tensor([[3.0, 1.0], [3.0, 1.0]]), torch.tensor([1, -1]))
    tensor(1.5000)
    """
    return Loss(
        name="margin_ranking",
        kind="other",
        terms=_margin_ranking,
        prediction=Prediction.REAL,
        target=Target.SIGNS,
        shapes=("two of [N, …]", "[N, …]"),
        formula="max(0, m − t·(x₁ − x₂))",
        reference="Herbrich 2000",
        numbers={"margin": number("margin_ranking", "margin", margin)},
        reduction=reduced("margin_ranking", reduction),
        arrange=lambda input1, input2, target: ((input1, input2), target),
        torch_name="MarginRankingLoss",
    )


@loss_maker
def triplet_margin(
    *, margin: Number = 1.0, p: float = 2, eps: Number = 1e-6, swap: bool = False, reduction: str = "mean"
) -> Loss:
    """The triplet loss, max(0, d(a, p) − d(a, n) + m) with d(x, y) = ‖x − y + ε‖ₚ.

    Prediction: a tuple (anchor, positive, negative) of embeddings [N, D], or one tensor [N, 3, D] or [N, 3·D];
    unbatched [D] too. The target is not looked at and may be left out. Called in torch's order,
    `loss(anchor, positive, negative)`, it equals `torch.nn.TripletMarginLoss`, which broadcasts shapes that differ;
    here they are refused.

    Args:
        margin: m > 0, in the unit of the distances.
        p: of the norm, ≥ 1; infinity is the largest difference.
        eps: ε ≥ 0, added to each difference: where anchor and positive are equal, it decides the gradient.
        swap: whether the distance from positive to negative counts where it is the smaller one.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for arguments outside their range.
        LossMismatch: when called with embeddings of different shapes.

    Source: V. Balntas, E. Riba, D. Ponsa, K. Mikolajczyk, "Learning local feature descriptors with triplets and shallow
    convolutional neural networks", BMVC 2016.

    >>> anchor, positive, negative = torch.tensor([[0.0]]), torch.tensor([[1.0]]), torch.tensor([[1.5]])
    >>> triplet_margin()(anchor, positive, negative)
    tensor(0.5000)
    """
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not p >= 1:
        raise InvalidHyperparameter(f"triplet_margin was given p={p!r}, and expects a number ≥ 1.")
    return Loss(
        name="triplet_margin",
        kind="other",
        terms=partial(_triplet_margin, p=p, swap=switch("triplet_margin", "swap", swap)),
        prediction=Prediction.EMBEDDINGS,
        target=Target.NOTHING,
        shapes=("three of [N, D]", "any"),
        formula="max(0, ‖a − p‖ − ‖a − n‖ + m)",
        reference="Balntas 2016",
        numbers={
            "margin": number("triplet_margin", "margin", margin, above=0),
            "eps": number("triplet_margin", "eps", eps, low=0),
        },
        reduction=reduced("triplet_margin", reduction),
        arrange=lambda anchor, positive, negative: ((anchor, positive, negative), None),
        torch_name="TripletMarginLoss",
    )


def _signs(generator: Generator) -> Tensor:
    return torch.tensor([1, -1]).repeat(6)[torch.randperm(12, generator=generator)]


def _distances(generator: Generator) -> tuple[Tensor, Tensor]:
    return 1.5 * torch.rand(12, generator=generator, dtype=torch.float64), _signs(generator).double()


def _pairs(generator: Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(12, 2, 4, generator=generator, dtype=torch.float64), _signs(generator)


def _scores(generator: Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(12, 2, generator=generator, dtype=torch.float64), _signs(generator)


def _triplets(generator: Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(12, 3, 4, generator=generator, dtype=torch.float64), torch.arange(12)


CATALOGUE = (
    LossInfo(
        hinge_embedding,
        _distances,
        valid=({}, {"margin": 0.7}),
        invalid=(Invalid({"margin": 0.0}, "margin=0.0"), Invalid({"margin": "1"}, "margin='1'")),
        sweeps={"margin": (0.5, 2.0)},
    ),
    LossInfo(
        cosine_embedding,
        _pairs,
        valid=({}, {"margin": 0.3}, {"margin": -0.5}),
        invalid=(Invalid({"margin": 1.5}, "margin=1.5"), Invalid({"margin": -2}, "margin=-2")),
        sweeps={"margin": (-0.5, 0.4)},
    ),
    LossInfo(
        margin_ranking,
        _scores,
        valid=({}, {"margin": 0.5}),
        invalid=(Invalid({"margin": float("nan")}, "margin=nan"), Invalid({"margin": None}, "margin=None")),
        sweeps={"margin": (0.0, 1.0)},
        source="R. Herbrich, T. Graepel, K. Obermayer, Large margin rank boundaries for ordinal regression (2000)",
    ),
    LossInfo(
        triplet_margin,
        _triplets,
        valid=({}, {"margin": 0.5, "swap": True}, {"p": 1}, {"p": 3.5}),
        invalid=(
            Invalid({"margin": 0}, "margin=0"),
            Invalid({"p": 0.5}, "p=0.5"),
            Invalid({"p": float("nan")}, "p=nan"),
            Invalid({"eps": -1e-6}, "eps=-1e-06"),
            Invalid({"swap": 1}, "swap=1"),
        ),
        sweeps={"margin": (0.5, 2.0), "eps": (1e-6, 0.5)},
        source="V. Balntas et al., Learning local feature descriptors with triplets and shallow CNNs, BMVC 2016",
    ),
)
