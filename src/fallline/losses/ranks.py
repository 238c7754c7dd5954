"""A loss for classes with an order: small, medium, large; one star to five. Neighbours: `classification` for classes
without one, `regression` for numbers whose distances count."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Generator, Tensor
from torch.nn.functional import logsigmoid

from fallline.errors import LossMismatch
from fallline.losses.arguments import reduced
from fallline.losses.base import Loss, Numbers, Prediction, Target, loss_maker
from fallline.losses.classification import class_weights
from fallline.losses.info import Invalid, LossInfo


def _coral(
    prediction: Tensor, target: Tensor, numbers: Numbers, *, importance_weights: tuple[float, ...] | None
) -> tuple[Tensor, None]:
    dimension = min(1, prediction.ndim - 1)
    if prediction.ndim == 0 or target.shape != (*prediction.shape[:dimension], *prediction.shape[dimension + 1 :]):
        fix = "Let the model give K − 1 logits in dimension 1, and the target one rank for each sample."
        if target.ndim == prediction.ndim and target.shape[-1:] == (1,):
            fix = "Take the last dimension of the target away: target.squeeze(-1)."
        elif target.shape == prediction.shape:
            fix = "Where these are the K − 1 answers of each sample, its rank is their sum: target.sum(1)."
        raise LossMismatch(
            f"ordinal was given a prediction of shape {list(prediction.shape)} and a target of shape "
            f"{list(target.shape)}, and expects logits of thresholds [N, K − 1, …] and ranks [N, …]. {fix}"
        )
    count = prediction.shape[dimension]
    along = [-1, *[1] * (prediction.ndim - 1 - dimension)]
    passed = target.unsqueeze(dimension) > torch.arange(count, device=prediction.device).reshape(along)
    # −log σ(f) where the threshold is passed, −log(1 − σ(f)) = −log σ(−f) where it is not.
    costs = -logsigmoid(torch.where(passed, prediction, -prediction))
    if importance_weights is not None:
        if len(importance_weights) != count:
            raise LossMismatch(
                f"ordinal was given {len(importance_weights)} importance weights and a prediction of shape "
                f"{list(prediction.shape)}, and expects {count}, one for each threshold."
            )
        costs = costs * prediction.new_tensor(importance_weights).reshape(along)
    return costs.sum(dimension), None


def _rank(prediction: Tensor) -> Tensor:
    return (prediction > 0).sum(min(1, prediction.ndim - 1)).to(prediction.dtype)


@loss_maker
def ordinal(*, importance_weights: Tensor | Sequence[float] | None = None, reduction: str = "mean") -> Loss:
    """CORAL: the cross-entropies of the K − 1 questions whether the rank is above k: −Σ_k λ_k·log σ(±f_k).

    The sign is + for the thresholds k < y that the rank y passes, − for the others. A guess two ranks off costs about
    twice as much as one that is one rank off. The rank that a prediction stands for, by which a task measures its
    error, is the number of thresholds with f_k > 0.

    In CORAL the thresholds share one score g(x), f_k = g(x) + b_k: then none of their answers contradict each other
    once the b_k have fallen into order. A last layer that does so:

        class Thresholds(torch.nn.Module):
            def __init__(self, features: int, ranks: int):
                super().__init__()
                self.score = torch.nn.Linear(features, 1, bias=False)
                self.bias = torch.nn.Parameter(torch.linspace(1, -1, ranks - 1))

            def forward(self, x):
                return self.score(x) + self.bias

    Prediction: logits of thresholds [N, K − 1] or [N, K − 1, d1, …]; or [K − 1] with a single rank. Target: ranks
    0, 1, …, K − 1, [N] or [N, d1, …], of an integer or a floating-point type. The mean divides by the number of
    samples.

    Args:
        importance_weights: λ, one finite number ≥ 0 for each threshold, shape [K − 1]; 1 for each if left out.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for weights below 0 or an unknown `reduction`.
        LossMismatch: when called with shapes that do not fit.

    Source: W. Cao, V. Mirjalili, S. Raschka, "Rank consistent ordinal regression for neural networks with application
    to age estimation", Pattern Recognition Letters 140 (2020).

    >>> loss = ordinal()
    >>> loss(torch.tensor([[0.0, 0.0], [20.0, -20.0]]), torch.tensor([2, 1]))
    tensor(0.6931)
    >>> loss.estimate(torch.tensor([[0.5, -0.5], [20.0, 10.0]]))
    tensor([1., 2.])
    """
    weights = class_weights("ordinal", importance_weights, "importance_weights", "threshold", low=0)
    return Loss(
        name="ordinal",
        kind="regression",
        terms=partial(_coral, importance_weights=weights),
        prediction=Prediction.THRESHOLD_LOGITS,
        target=Target.RANKS,
        shapes=("[N, K − 1, …]", "[N, …]"),
        formula="−Σ_k λ_k·log σ(f_k if y > k else −f_k)",
        reference="Cao et al. 2020",
        reduction=reduced("ordinal", reduction),
        estimate=_rank,
    )


def _ranked(generator: Generator) -> tuple[Tensor, Tensor]:
    score = torch.randn(12, 1, generator=generator, dtype=torch.float64)
    target = torch.arange(12)[torch.randperm(12, generator=generator)] % 4
    return score + torch.tensor([1.0, 0.1, -0.8], dtype=torch.float64), target


CATALOGUE = (
    LossInfo(
        ordinal,
        _ranked,
        valid=({}, {"importance_weights": (0.5, 1.0, 2.0)}),
        invalid=(
            Invalid({"importance_weights": (1.0, -1.0)}, "importance_weights"),
            Invalid({"importance_weights": 2.0}, "importance_weights=2.0"),
        ),
        source="W. Cao, V. Mirjalili, S. Raschka, Rank consistent ordinal regression for neural networks, 2020",
    ),
)
