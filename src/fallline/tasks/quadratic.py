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
    batch of an epoch is dropped: 7 steps an epoch.

    What depends on the points alone is computed once: a sample is (Qx, ½ xᵀQx) [101], the model gives ½ θᵀQθ − θᵀQx +
    ½ xᵀQx, and the loss is the mean of that. The product with Q is then one per step, and not one per point.

    Source: F. Schneider, L. Balles, P. Hennig, "DeepOBS: A Deep Learning Optimizer Benchmark Suite", ICLR
    2019; the eigenvalues follow P. Chaudhari et al., "Entropy-SGD", arXiv 1611.01838.
    """
    matrix = torch.tensor(hessian())
    train, validation = (
        _terms_of(
            torch.tensor(np.random.RandomState(seed).normal(0.0, 0.6, (1000, DIMENSIONS)).astype(np.float32)), matrix
        )
        for seed in (42, 43)
    )
    return Task(
        "quadratic_deep",
        partial(Quadratic, matrix.to(dtype)),
        (train.to(dtype), torch.zeros(1000, dtype=dtype)),
        above_target(),
        validation=(validation.to(dtype), torch.zeros(1000, dtype=dtype)),
        batch_size=128,
        drop_last=True,
        source=(
            "Generated as DeepOBS does: points from N(0, 0.6²) by numpy's RandomState(42) for training and "
            "RandomState(43) for validation, curvature by RandomState(42)."
        ),
    )


class Quadratic(nn.Module):
    """A point θ, started at 1: (Qx, ½ xᵀQx) [N, 101] -> ½ (θ − x)ᵀ Q (θ − x) [N]."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(DIMENSIONS, dtype=matrix.dtype))
        self.register_buffer("matrix", matrix)

    def forward(self, terms: Tensor) -> Tensor:
        mixed, own = terms[..., :-1], terms[..., -1]
        return 0.5 * (self.theta @ self.matrix * self.theta).sum() - mixed @ self.theta + own


def _terms_of(points: Tensor, matrix: Tensor) -> Tensor:
    """(Qx, ½ xᵀQx) [N, 101] of points x [N, 100]."""
    mixed = points.double() @ matrix
    return torch.cat([mixed, 0.5 * (mixed * points).sum(1, keepdim=True)], dim=1)


def above_target() -> Loss:
    """The mean of prediction − target, for models that give the value to be minimised themselves.

    >>> above_target()(torch.tensor([3.0, 1.0]), torch.zeros(2))
    tensor(2.)
    """
    return Loss(name="quadratic", kind="other", terms=_difference, written="lambda p, t: (p - t).mean()")


def _difference(prediction: Tensor, target: Tensor, numbers: Numbers) -> tuple[Tensor, None]:
    return prediction - target, None


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
