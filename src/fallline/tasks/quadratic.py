"""The noisy quadratic of DeepOBS: a built-in task whose curvature is known exactly."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fallline.losses import Loss
from fallline.losses.base import Numbers
from fallline.tasks.task import Task

DIMENSIONS = 100


def quadratic_deep(dtype: torch.dtype = torch.float32) -> Task:
    """A noisy quadratic in 100 dimensions with a deep network's curvature (DeepOBS); batches of 128.

    The loss of a batch is the mean of ½ (θ − x)ᵀ Q (θ − x) over its points x, where Q = Rᵀ diag(λ) R has 90
    eigenvalues from U(0, 1) and 10 from U(30, 60). θ starts at 1 in each coordinate, whatever the seed; x is
    drawn from N(0, 0.6²), 1,000 points for training and 1,000 for validation. As in DeepOBS the last short
    batch of an epoch is dropped: 7 steps an epoch. The model gives θ − x [N, 100], which the target 0 [N,
    100] is compared with.

    Source: F. Schneider, L. Balles, P. Hennig, "DeepOBS: A Deep Learning Optimizer Benchmark Suite", ICLR
    2019; the eigenvalues follow P. Chaudhari et al., "Entropy-SGD", arXiv 1611.01838.
    """
    train, validation = (
        torch.tensor(np.random.RandomState(seed).normal(0.0, 0.6, (1000, DIMENSIONS)).astype(np.float32))
        for seed in (42, 43)
    )
    return Task(
        "quadratic_deep",
        partial(Displacement, dtype),
        (train.to(dtype), torch.zeros(1000, DIMENSIONS, dtype=dtype)),
        quadratic_form(torch.tensor(hessian(), dtype=dtype)),
        validation=(validation.to(dtype), torch.zeros(1000, DIMENSIONS, dtype=dtype)),
        batch_size=128,
        drop_last=True,
        source=(
            "Generated as DeepOBS does: points from N(0, 0.6²) by numpy's RandomState(42) for training and "
            "RandomState(43) for validation, curvature by RandomState(42)."
        ),
    )


class Displacement(nn.Module):
    """A point θ, started at 1: x [N, 100] -> θ − x [N, 100]."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(DIMENSIONS, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta - x


def quadratic_form(matrix: Tensor) -> Loss:
    """The loss ½ (p − t)ᵀ Q (p − t), averaged over samples, for a symmetric Q [D, D] and p, t of shape [N,
    D].

    >>> quadratic_form(torch.tensor([[4.0]]))(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))
    tensor(10.)
    """
    return Loss(
        name="quadratic",
        kind="other",
        terms=partial(_quadratic_terms, matrix),
        written="lambda p, t: 0.5 * ((p - t) @ Q * (p - t)).sum(1).mean()",
    )


def _quadratic_terms(matrix: Tensor, prediction: Tensor, target: Tensor, numbers: Numbers) -> tuple[Tensor, None]:
    distance = prediction - target
    return 0.5 * (distance @ matrix.to(distance) * distance).sum(-1), None


def eigenvalues(draw: np.random.RandomState) -> NDArray[np.float64]:
    """90 eigenvalues from U(0, 1), then 10 from U(30, 60), shape [100]."""
    return np.concatenate([draw.uniform(0.0, 1.0, 90), draw.uniform(30.0, 60.0, 10)])


def rotation(draw: np.random.RandomState, dimensions: int) -> NDArray[np.float64]:
    """A rotation, uniform over SO(D), by the subgroup algorithm: shape [D, D].

    A rotation of d dimensions becomes one of d + 1: the new first axis is carried to a point v drawn on the
    sphere by the reflection at the bisector of the two.

    Source: P. Diaconis, M. Shahshahani, "The subgroup algorithm for generating uniform random variables",
    Probability in the Engineering and Informational Sciences 1 (1987). The order of draws is DeepOBS's.
    """
    angle = 2 * np.pi * draw.uniform()
    turned = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    for size in range(3, dimensions + 1):
        point = draw.normal(size=size)
        normal = -point / np.linalg.norm(point)
        normal[0] += 1
        normal /= np.linalg.norm(normal)
        larger = np.zeros((size, size))
        larger[0, 0] = 1
        larger[1:, 1:] = turned
        turned = larger - 2 * np.outer(normal, normal @ larger)
    return -turned


def hessian() -> NDArray[np.float64]:
    """Q = Rᵀ diag(λ) R, shape [100, 100]: eigenvalues first, then the rotation, from one RandomState(42)."""
    draw = np.random.RandomState(42)
    values = eigenvalues(draw)
    turned = rotation(draw, DIMENSIONS)
    matrix: NDArray[np.float64] = turned.T @ np.diag(values) @ turned
    return matrix
