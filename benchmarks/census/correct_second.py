"""A second collection of correct uses, written after the check had been fitted to the first.

Neighbours: `misuses_second`. Graphs that bear no second look, hooks, and losses by hand of other fields.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from census.case import Made, correct
from census.scenes import classes, convolution, images, inputs, label_map, network, reals, tokens, yes_or_no
from fallline import losses

GROUP = "second collection"


@correct(GROUP)
def cross_entropy_of_a_layer_without_bias() -> Made:
    """Linear(bias=False) at the end."""
    model, x = nn.Linear(8, 5, bias=False), inputs()
    return nn.CrossEntropyLoss(), model(x), classes(x, 5), model


@correct(GROUP)
def binary_logits_with_a_prior_and_no_history() -> Made:
    """Logits from 0.4 to 0.6 by a bias of 62 %, without their graph."""
    x = inputs(200)
    return nn.BCEWithLogitsLoss(), 0.49 + 0.04 * torch.randn(200, 1), yes_or_no(x, share=0.62)


@correct(GROUP)
def cross_entropy_of_cosines() -> Made:
    """Cosines as logits, without a temperature."""
    x = inputs()
    cosines = functional.normalize(network(8, 16)(x)) @ functional.normalize(torch.randn(5, 16)).T
    return nn.CrossEntropyLoss(), cosines, classes(x, 5)


@correct(GROUP)
def cross_entropy_with_checkpointing() -> Made:
    """Activations that are computed again in the backward pass."""
    model, x = network(8, 5), inputs().requires_grad_()
    return nn.CrossEntropyLoss(), checkpoint(model, x, use_reentrant=False), classes(x.detach(), 5), model


@correct(GROUP)
def cross_entropy_with_reentrant_checkpointing() -> Made:
    """The older kind, which refuses torch.autograd.grad."""
    model, x = network(8, 5), inputs().requires_grad_()
    return nn.CrossEntropyLoss(), checkpoint(model, x, use_reentrant=True), classes(x.detach(), 5), model


@correct(GROUP)
def mse_of_a_function_that_is_differentiable_once() -> Made:
    """A function by hand whose gradient has none."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * gradient

    model, x = network(8, 1), inputs()
    return losses.mse(), Twice.apply(model(x)), reals(x), model


@correct(GROUP)
def next_tokens_with_the_last_token_as_padding() -> Made:
    """Padding is the last of the vocabulary, at the ends, flattened."""
    words = tokens(16, 24, 50) - 1
    lengths = torch.randint(8, 25, (16, 1))
    y = torch.where(torch.arange(24) < lengths, words, 49)
    logits = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50))(y)
    return nn.CrossEntropyLoss(ignore_index=49), logits.flatten(0, 1), y.flatten()


@correct(GROUP)
def mse_of_heatmaps() -> Made:
    """Key points as small bumps on maps that are 0 nearly everywhere."""
    x = images()
    heat = torch.zeros(8, 1, 8, 8)
    heat[torch.arange(8), 0, torch.randint(8, (8,)), torch.randint(8, (8,))] = 1
    return nn.MSELoss(), convolution(3, 1)(x), heat


@correct(GROUP)
def own_overlap_loss() -> Made:
    """1 minus the intersection over union of class maps."""

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        p, t = prediction.softmax(1), functional.one_hot(target, 4).permute(0, 3, 1, 2)
        return 1 - ((p * t).sum((2, 3)) / (p + t - p * t).sum((2, 3))).mean()

    x = images()
    return loss, convolution(3, 4)(x), label_map(8, 4)


@correct(GROUP)
def own_unexplained_variance() -> Made:
    """1 − R²."""
    x = inputs()
    loss = lambda p, t: (p - t).square().sum() / (t - t.mean()).square().sum()  # noqa: E731
    return loss, network(8, 1)(x), reals(x)


@correct(GROUP)
def own_heavy_tailed_likelihood() -> Made:
    """Minus the log-density of Student's t."""
    x = inputs()
    loss = lambda p, t: -torch.distributions.StudentT(3.0, p, 0.01).log_prob(t).mean()  # noqa: E731
    x_target = reals(x)
    return loss, x_target + 0.01 * network(8, 1)(x), x_target


@correct(GROUP)
def own_mixture_density() -> Made:
    """A mixture of three normal distributions, of a tuple."""

    def loss(prediction: tuple[Tensor, ...], target: Tensor) -> Tensor:
        weight, mean, spread = prediction
        parts = torch.distributions.Normal(mean, functional.softplus(spread)).log_prob(target)
        return -(weight.log_softmax(1) + parts).logsumexp(1).mean()

    x = inputs()
    return loss, network(8, 9)(x).split(3, 1), reals(x)


@correct(GROUP)
def own_angular_loss() -> Made:
    """1 − cos of the difference of headings: a full turn makes none."""
    x = inputs()
    return (lambda p, t: (1 - (p - t).cos()).mean()), network(8, 1)(x), 3.1 * torch.tanh(reals(x))


@correct(GROUP)
def own_repulsion_from_the_target() -> Made:
    """Negative pairs are driven apart: the cosine above a margin is punished."""
    x = inputs()
    loss = lambda p, t: (functional.cosine_similarity(p, t) - 0.3).clamp(min=0).mean()  # noqa: E731
    return loss, network(8, 6)(x), functional.normalize(torch.randn(64, 6))


@correct(GROUP)
def own_entropy_regularised_loss() -> Made:
    """Cross-entropy minus a tenth of the entropy of the outputs."""

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        logs = prediction.log_softmax(1)
        return functional.nll_loss(logs, target) + 0.1 * (logs.exp() * logs).sum(1).mean()

    x = inputs()
    return loss, network(8, 5)(x), classes(x, 5)


@correct(GROUP)
def mse_of_free_parameters() -> Made:
    """The prediction is itself the parameter."""
    return losses.mse(), nn.Parameter(torch.randn(32, 2)), torch.randn(32, 2)
