"""Where the numbers of a prediction come from: out of a linear layer, or out of a sigmoid behind one.

Fresh sigmoids and logits with a prior as their bias can hold the same values. Their derivatives with respect to that
bias differ: 1 for each logit, p·(1 − p) for each probability. Neighbours: `predictions`, which asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from fallline.losses.misuse.given import tensors

_MOST_NODES = 20_000
Origin: TypeAlias = Literal["linear", "sigmoid", "unknown"]


def origin(prediction: Any) -> Origin:
    """What made a prediction that still has its graph, by the derivative with respect to the bias of its last layer.

    >>> layer = torch.nn.Linear(3, 2)
    >>> origin(layer(torch.ones(8, 3))), origin(layer(torch.ones(8, 3)).sigmoid()), origin(torch.ones(8, 2))
    ('linear', 'sigmoid', 'unknown')
    """
    if not isinstance(prediction, Tensor) or prediction.grad_fn is None or prediction.ndim == 0:
        return "unknown"
    columns = prediction.shape[1] if prediction.ndim > 1 else 1
    leaves = list(_leaves(prediction))
    biases = [leaf for leaf in leaves if leaf.ndim == 1 and leaf.numel() == columns][:8]
    weights = [leaf for leaf in leaves if leaf.ndim > 1 and len(leaf) == columns][:8]
    if not biases and not weights:
        return "unknown"
    try:
        with torch.inference_mode(False), torch.enable_grad():
            found = torch.autograd.grad(prediction.sum(), [*biases, *weights], retain_graph=True, allow_unused=True)
    except RuntimeError:  # the graph was freed
        return "unknown"
    values = prediction.detach().double()
    slopes = values * (1 - values)
    each = torch.ones_like(values)
    answers = _compared(biases, found, lambda bias, gradient: gradient, _columns(each), _columns(slopes))
    if biases:
        return next(answers, "unknown")
    # Without a bias, W·∂/∂W of a sum of outputs is the sum of the layer's own outputs, each times its slope.
    logits = values.clamp(1e-12, 1 - 1e-12).logit()
    along = _compared(
        weights,
        found,
        lambda weight, gradient: (weight.detach().double() * gradient).flatten(1).sum(1),
        _columns(values),
        _columns(slopes * logits),
    )
    return next(along, "unknown")


def _columns(values: Tensor) -> Tensor:
    """The sum of each column."""
    return values.movedim(1, 0).flatten(1).sum(1) if values.ndim > 1 else values.sum().reshape(1)


def _compared(
    leaves: list[Tensor],
    gradients: tuple[Tensor | None, ...],
    measure: Callable[[Tensor, Tensor], Tensor],
    linear: Tensor,
    sigmoid: Tensor,
) -> Iterator[Origin]:
    for leaf, gradient in zip(leaves, gradients, strict=False):
        if gradient is None:
            continue
        measured = measure(leaf, gradient.double())
        if torch.allclose(measured, linear, rtol=1e-3):
            yield "linear"
        elif torch.allclose(measured, sigmoid, rtol=1e-2, atol=1e-6):
            yield "sigmoid"


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
