"""What cases are made of: small models, inputs, and targets that depend on the inputs as real ones do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def inputs(count: int = 64, width: int = 8) -> Tensor:
    """Standardised features [count, width]."""
    return torch.randn(count, width)


def images(count: int = 8, channels: int = 3, size: int = 8) -> Tensor:
    """Images [count, channels, size, size] with values from 0 to 1."""
    return torch.rand(count, channels, size, size)


def network(width: int, outputs: int, *last: nn.Module) -> nn.Sequential:
    """A freshly initialised perceptron, and whatever comes after its last layer."""
    return nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, outputs), *last)


def convolution(channels: int, outputs: int, *last: nn.Module) -> nn.Sequential:
    """A freshly initialised network from images to maps of the same size."""
    return nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, outputs, 3, padding=1), *last)


def language_model(vocabulary: int, *last: nn.Module, width: int = 16) -> nn.Sequential:
    """From tokens [N, T] to logits [N, T, vocabulary]."""
    return nn.Sequential(
        nn.Embedding(vocabulary, width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, vocabulary), *last
    )


def classes(x: Tensor, count: int) -> Tensor:
    """Class indices [N] that depend on the features, with noise; all classes about as frequent."""
    features = x.flatten(1)
    scores = features @ torch.randn(features.shape[1], count) / features.shape[1] ** 0.5
    return (scores + 0.3 * torch.randn_like(scores)).argmax(1)


def yes_or_no(x: Tensor, columns: int = 1, share: float = 0.5) -> Tensor:
    """0.0 or 1.0, shape [N, columns], that depend on the features; about this share of ones in each column."""
    features = x.flatten(1)
    scores = features @ torch.randn(features.shape[1], columns) + 0.3 * torch.randn(len(features), columns)
    return (scores > scores.quantile(1 - share, dim=0)).float()


def reals(x: Tensor, columns: int = 1) -> Tensor:
    """Standardised real targets [N, columns] that depend on the features."""
    features = x.flatten(1)
    target = features @ torch.randn(features.shape[1], columns) + 0.3 * torch.randn(len(features), columns)
    return (target - target.mean(0)) / target.std(0)


def counts(x: Tensor, columns: int = 1) -> Tensor:
    """Poisson counts [N, columns], zeros among them, whose rate depends on the features."""
    return torch.poisson(torch.exp(0.5 * reals(x, columns)))


def label_map(count: int, classes: int, size: int = 8) -> Tensor:
    """Class indices [count, size, size] in patches, as a segmentation has them."""
    coarse = torch.randn(count, classes, size // 4, size // 4)
    return nn.functional.interpolate(coarse, size=(size, size)).argmax(1)


def tokens(count: int = 8, length: int = 12, vocabulary: int = 20) -> Tensor:
    """Token indices [count, length] from 1 to vocabulary − 1, frequent and rare ones; 0 is left for padding."""
    share = 1.0 / torch.arange(2, vocabulary + 1)
    return 1 + torch.multinomial(share, count * length, replacement=True).reshape(count, length)


def padded(sequence: Tensor, padding: int, shortest: int = 4) -> Tensor:
    """The sequences [N, T] cut to lengths from `shortest` to T, with padding after their ends."""
    count, length = sequence.shape
    lengths = torch.randint(shortest, length + 1, (count, 1))
    lengths[0] = length
    return torch.where(torch.arange(length) < lengths, sequence, padding)


def fitted(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    loss: Callable[[Any, Any], Tensor],
    steps: int = 80,
    lr: float = 1e-2,
) -> nn.Module:
    """The model after some training."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x), target).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model
