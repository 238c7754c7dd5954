"""A second collection of misuses, written after the check had been fitted to the first: what helped there is missing.

No graph, no bias, other shapes, other ways to make the same mistake. Its first result is told in docs/misuse.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from census.case import Made, misuse
from census.scenes import classes, convolution, images, inputs, label_map, network, reals, yes_or_no
from fallline import losses


@misuse("double-sigmoid")
def binary_logits_of_bare_probabilities() -> Made:
    """Fresh probabilities without a history."""
    x = inputs(200)
    return nn.BCEWithLogitsLoss(), network(8, 1)(x).sigmoid().detach(), yes_or_no(x)


@misuse("double-sigmoid")
def fallline_binary_logits_of_bare_confident_probabilities() -> Made:
    """Probabilities near 0 and 1, six labels, without a history."""
    x = inputs(100)
    y = yes_or_no(x, 6)
    return losses.binary_cross_entropy_with_logits(), (6 * (y - 0.5) + torch.randn(100, 6)).sigmoid(), y


@misuse("double-sigmoid")
def binary_logits_of_probabilities_of_a_layer_without_bias() -> Made:
    """A sigmoid after Linear(bias=False)."""
    x = inputs(200)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1, bias=False), nn.Sigmoid())
    return nn.BCEWithLogitsLoss(), model(x), yes_or_no(x), model


@misuse("double-softmax")
def cross_entropy_of_bare_softmax() -> Made:
    """A softmax without a history, in float64."""
    x = inputs()
    return losses.cross_entropy(), network(8, 5)(x).softmax(1).detach().double(), classes(x, 5)


@misuse("double-softmax")
def cross_entropy_of_clamped_softmax() -> Made:
    """A softmax clamped away from 0 and 1."""
    x = inputs()
    return nn.CrossEntropyLoss(), (5 * network(8, 5)(x)).softmax(1).clamp(1e-4, 1 - 1e-4), classes(x, 5)


@misuse("softmax-axis", "double-softmax")
def cross_entropy_of_softmax_over_the_steps() -> Made:
    """Sequences [N, C, T] with a softmax over T."""
    steps = nn.Conv1d(8, 5, 3, padding=1)(torch.randn(16, 8, 10)).softmax(-1)
    return nn.CrossEntropyLoss(), steps, torch.randint(5, (16, 10))


@misuse("not-log-probabilities")
def nll_of_sequences_of_logits() -> Made:
    """Logits [N, C, T] without LogSoftmax."""
    steps = nn.Conv1d(8, 5, 3, padding=1)(torch.randn(16, 8, 10))
    return losses.nll(), steps, torch.randint(5, (16, 10))


@misuse("not-log-probabilities")
def kl_div_of_sequences_of_probabilities() -> Made:
    """Probabilities [N, T, V] in place of their logarithms, without a history."""
    student, teacher = torch.randn(8, 12, 20).softmax(-1), (2 * torch.randn(8, 12, 20)).softmax(-1)
    return nn.KLDivLoss(reduction="batchmean"), student, teacher


@misuse("broadcast")
def mse_of_forecasts_with_a_last_axis() -> Made:
    """Forecasts [N, T, 1] against [N, T], N = T = 24."""
    hidden, _ = nn.GRU(8, 1, batch_first=True)(torch.randn(24, 24, 8))
    return nn.MSELoss(), hidden, torch.randn(24, 24)


@misuse("label-range", "target-coding")
def cross_entropy_of_signs_as_labels() -> Made:
    """−1 and 1 as the labels of two classes."""
    x = inputs()
    return nn.CrossEntropyLoss(), network(8, 2)(x), 2 * classes(x, 2) - 1


@misuse("target-type", "target-coding", "label-range", "domain")
def binary_logits_against_bytes() -> Made:
    """A mask of type uint8 with 0 and 255."""
    x = images()
    return losses.binary_cross_entropy_with_logits(), convolution(3, 1)(x), (255 * label_map(8, 2)[:, None]).byte()


@misuse("class-weights", "all-ignored", "not-finite")
def cross_entropy_with_weights_of_zero_only() -> Made:
    """Whole-number division has made every class weight 0."""
    x = inputs()
    return nn.CrossEntropyLoss(weight=torch.zeros(5)), network(8, 5)(x), classes(x, 5)


@misuse("zero-gradient", "detached", says=r"does not require grad|gradient")
def own_loss_that_compares_the_target_with_itself() -> Made:
    """A slip of the pen: (target − target)²."""
    model, x = network(8, 1), inputs()
    return (lambda p, t: (t - t).square().mean()), model(x), reals(x), model


@misuse("detached", "zero-gradient", says=r"does not require grad")
def cross_entropy_of_a_model_that_is_frozen_altogether() -> Made:
    """Freezing the body has frozen the head, too."""
    model, x = network(8, 5).requires_grad_(False), inputs()
    return nn.CrossEntropyLoss(), model(x), classes(x, 5), model


@misuse("rewards-errors")
def own_peak_signal_to_noise_ratio() -> Made:
    """The ratio in decibels, which should be high, minimised."""
    x = images()
    return (lambda p, t: -10 * (p - t).square().mean().log10()), convolution(3, 3, nn.Sigmoid())(x), x


@misuse("rewards-errors")
def own_intersection_over_union() -> Made:
    """The overlap of class maps, minimised."""

    def overlap(prediction: Tensor, target: Tensor) -> Tensor:
        p, t = prediction.softmax(1), functional.one_hot(target, 4).permute(0, 3, 1, 2)
        return ((p * t).sum((2, 3)) / (p + t - p * t).sum((2, 3))).mean()

    x = images()
    return overlap, convolution(3, 4)(x), label_map(8, 4)


@misuse("rewards-errors")
def own_gaussian_likelihood() -> Made:
    """The log-density of a normal distribution, without its minus."""
    x = inputs()
    loss = lambda p, t: torch.distributions.Normal(p, 0.5).log_prob(t).mean()  # noqa: E731
    return loss, network(8, 1)(x), reals(x)


@misuse("collapsed", "zero-gradient")
def vicreg_of_collapsed_embeddings() -> Made:
    """Every sample has the same embedding, in both views."""
    layer = nn.Linear(8, 4)
    view = layer(torch.randn(1, 8).expand(32, 8))
    return losses.vicreg(), (view, view + 0.0), None


@misuse("not-finite")
def huber_of_a_model_that_has_diverged() -> Made:
    """The parameters are NaN."""
    model, x = network(8, 1), inputs()
    with torch.no_grad():
        model[0].weight.mul_(float("nan"))
    return nn.HuberLoss(), model(x), reals(x), model


@misuse("scale")
def fallline_huber_of_revenues() -> Made:
    """Revenues of millions, several columns."""
    x = inputs()
    return losses.huber(), network(8, 3)(x), 4e6 + 1e6 * reals(x, 3)
