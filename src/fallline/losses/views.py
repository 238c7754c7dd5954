"""Embeddings as the losses for them take them: several of each sample, in parts of one shape; and their directions.

Neighbours: `embeddings`, `contrastive` and `redundancy`, which are the losses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fallline.errors import LossMismatch
from fallline.losses.arguments import parts
from fallline.losses.base import Parts


def together(name: str, prediction: Parts, target: Parts, count: int, what: str) -> tuple[Tensor, ...]:
    """The embeddings of a sample, `count` tensors of one shape: a tuple of them, or parts of one tensor.

    A tensor [N, count, …] or [N, count · D] holds them along dimension 1; the parts of the latter are [N, D], also
    where D = 1.

    Raises:
        LossMismatch: if there are not so many, if their shapes differ (nothing is broadcast), or if the target looks
            like another embedding, which would not be looked at.

    >>> together("triplet_margin", torch.zeros(8, 6), None, 3, "…")[0].shape
    torch.Size([8, 2])
    """
    if isinstance(prediction, Tensor) and prediction.ndim == 2:
        if isinstance(target, Tensor) and target.is_floating_point() and target.shape == prediction.shape:
            raise LossMismatch(
                f"{name} was given a prediction and a target of shape {list(target.shape)} that look like two "
                f"embeddings, and expects {what} in one prediction. Give a tuple: loss((first, second), target)."
            )
        if prediction.shape[1] == count:
            prediction = prediction.unsqueeze(2)
    found = parts(name, prediction, count, what)
    if any(each.shape != found[0].shape for each in found):
        shapes = ", ".join(str(list(each.shape)) for each in found)
        raise LossMismatch(
            f"{name} was given {what} of shapes {shapes}, and expects equal shapes. Reshape or expand them: nothing is "
            "broadcast."
        )
    return found


def two_views(name: str, prediction: Parts, target: Parts) -> tuple[Tensor, Tensor]:
    """The embeddings [N, D] of two views of the same N samples.

    Raises:
        LossMismatch: for anything else.

    >>> two_views("info_nce", torch.zeros(8, 2, 4), None)[1].shape
    torch.Size([8, 4])
    """
    first, second = together(name, prediction, target, 2, "the embeddings of two views")
    if first.ndim != 2:
        raise LossMismatch(
            f"{name} was given two views of shape {list(first.shape)}, and expects [N, D], one embedding for each "
            "sample. Flatten or average what is left: view.flatten(1) or view.mean(2)."
        )
    return first, second


def direction(embeddings: Tensor) -> Tensor:
    """Vectors along the last dimension divided by their lengths; a zero vector stays zero, with a gradient of 0.

    >>> direction(torch.tensor([[3e30, 4e30], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    # The largest entry is a constant to the gradient: a direction does not depend on the scale. Divided by it, the
    # squares neither over- nor underflow.
    largest = embeddings.detach().abs().amax(-1, keepdim=True)
    zero = largest == 0
    scaled = embeddings / torch.where(zero, 1.0, largest)
    square = scaled.square().sum(-1, keepdim=True)
    return scaled * torch.where(zero, 0.0, torch.where(zero, 1.0, square).rsqrt())
