"""Values and gradients of losses in float64, and two losses that must agree in both."""

from __future__ import annotations

import torch

CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def labels(seed, classes, *shape):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def gradients(function, *inputs):
    """The value, and the gradients of the sum of its elements in every input."""
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value.sum(), leaves)


def assert_equal_functions(ours, theirs, *inputs):
    """Equal values, and equal gradients in every input, each of which must have one."""
    (value, slopes), (expected, rightly) = gradients(ours, *inputs), gradients(theirs, *inputs)
    assert all(slope.abs().max() > 1e-3 for slope in rightly), "a problem without a gradient would prove nothing"
    torch.testing.assert_close(value, expected, **CLOSE)
    for slope, right in zip(slopes, rightly, strict=True):
        torch.testing.assert_close(slope, right, **CLOSE)


def value_and_gradient(loss, prediction, target):
    """The loss, and the gradient of its elements summed with different factors."""
    leaf = prediction.detach().clone().requires_grad_()
    value = loss(leaf, target)
    factors = 1 + torch.arange(value.numel(), dtype=value.dtype).reshape(value.shape) / value.numel()
    return value.detach(), torch.autograd.grad((value * factors).sum(), leaf)[0]


def assert_same(ours, theirs, prediction, target, *, rtol, atol):
    """Equal values and gradients in the prediction, which must have one."""
    expected, slopes = value_and_gradient(theirs, prediction, target)
    assert slopes.abs().max() > 1e-6, "a problem without a gradient would prove nothing"
    value, found = value_and_gradient(ours, prediction, target)
    torch.testing.assert_close(value, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(found, slopes, rtol=rtol, atol=atol)
