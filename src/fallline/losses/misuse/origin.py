"""Where the numbers of a prediction come from: out of a linear layer, or out of a sigmoid behind one.

Fresh sigmoids and logits with a prior as their bias can hold the same values. Their derivatives with respect to that
bias differ: 1 for each logit, p·(1 − p) for each probability. Neighbours: `predictions`, which asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from fallline.losses.misuse.computing import quietly
from fallline.losses.misuse.given import tensors

_MOST_NODES = 20_000
_MOST_LEAVES = 8
Origin: TypeAlias = Literal["linear", "sigmoid", "unknown"]


def origin(prediction: Any) -> Origin:
    """What made a prediction that still has its graph, by the derivative with respect to the bias of its last layer.

    >>> layer = torch.nn.Linear(3, 2)
    >>> origin(layer(torch.ones(8, 3))), origin(layer(torch.ones(8, 3)).sigmoid()), origin(torch.ones(8, 2))
    ('linear', 'sigmoid', 'unknown')
    """
    if not isinstance(prediction, Tensor) or prediction.grad_fn is None or prediction.ndim == 0:
        return "unknown"
    leaves = [leaf for leaf in _leaves(prediction) if leaf.is_floating_point()]
    biases = [leaf for leaf in leaves if leaf.ndim == 1][:_MOST_LEAVES]
    weights = [leaf for leaf in leaves if leaf.ndim > 1][:_MOST_LEAVES]
    if not biases and not weights:
        return "unknown"
    # Sums over all elements, however they were arranged since: plain ones, and ones that weigh extreme values more.
    values = prediction.detach().double()
    emphasis = ((values - values.mean()).square(), torch.ones_like(values))
    try:
        with quietly(prediction, *biases, *weights), torch.inference_mode(False), torch.enable_grad():
            found = [
                torch.autograd.grad(
                    (prediction * each.to(prediction.dtype)).sum(),
                    [*biases, *weights],
                    retain_graph=True,
                    allow_unused=True,
                )
                for each in emphasis
            ]
    except RuntimeError:  # the graph was freed
        return "unknown"
    slopes = values * (1 - values)
    # The derivative with respect to a bias is the slope. Without a bias, W·∂/∂W of a sum of outputs is the sum of what
    # comes out of the layer, each times its slope.
    logits = values.clamp(1e-12, 1 - 1e-12).logit()
    for start, group, measured in (
        (0, biases, (torch.ones_like(values), slopes)),
        (len(biases), weights, (values, slopes * logits)),
    ):
        linear, sigmoid = (tuple(float((each * what).sum()) for each in emphasis) for what in measured)
        for place, leaf in enumerate(group, start):
            gradients = [each[place] for each in found]
            sums = tuple(_along(leaf, gradient) for gradient in gradients if gradient is not None)
            if len(sums) != len(emphasis):
                continue
            if _close(sums, sigmoid):
                return "sigmoid"
            if _proportional(sums, linear):
                return "linear"
    return "unknown"


def _along(leaf: Tensor, gradient: Tensor) -> float:
    """A bias's derivatives altogether; a weight's, each times the weight."""
    return float((gradient if leaf.ndim == 1 else leaf.detach() * gradient).double().sum())


def _close(sums: tuple[float, ...], others: tuple[float, ...]) -> bool:
    return all(math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-6) for one, other in zip(sums, others, strict=True))


def _proportional(sums: tuple[float, ...], others: tuple[float, ...]) -> bool:
    """Whether the slope is the same for all values: a linear layer, and perhaps a factor."""
    (one, other), (first, second) = sums, others
    if min(abs(first), abs(second), abs(other)) < 1e-6:
        return False
    return math.isclose(one / first, other / second, rel_tol=1e-4)


def hides_parameters(prediction: Any) -> bool:
    """Whether the graph holds a step written in Python, which may reach parameters that the graph does not show."""
    return any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in _nodes(prediction))


def _leaves(prediction: Any) -> Iterator[Tensor]:
    """The parameters in the graph, those nearest to the prediction first."""
    for node in _nodes(prediction):
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            yield variable


def _nodes(prediction: Any) -> Iterator[Any]:
    seen: set[Any] = set()
    waiting = [each.grad_fn for each in tensors(prediction)]
    while waiting and len(seen) < _MOST_NODES:
        following = []
        for node in waiting:
            if node is None or node in seen:
                continue
            seen.add(node)
            yield node
            following += [each for each, _ in node.next_functions]
        waiting = following
