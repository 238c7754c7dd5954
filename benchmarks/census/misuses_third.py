"""A third collection of misuses: those that an independent tester found the check to miss or to name wrongly.

Losses in a wrapper that hides which of torch's they are, few samples, arguments in each other's place. The check was
mended for them afterwards; docs/misuse.md tells what it caught before.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

from census.case import Made, misuse
from census.scenes import classes, inputs, network, reals, yes_or_no
from fallline import losses


class Wrapped(nn.Module):
    """A module of one's own whose forward only calls one of torch's losses."""

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(prediction, target) + 0.0


@misuse("double-softmax")
def wrapped_cross_entropy_of_softmax() -> Made:
    """A lambda that calls cross_entropy, on a softmax."""
    x = inputs()
    model = nn.Sequential(network(8, 10), nn.Softmax(1))
    return lambda p, t: functional.cross_entropy(p, t), model(x), classes(x, 10), model


@misuse("double-softmax")
def module_round_cross_entropy_of_softmax() -> Made:
    """A module whose forward calls cross_entropy, on a softmax."""
    x = inputs()
    return Wrapped(), network(8, 10)(x).softmax(1), classes(x, 10)


@misuse("double-softmax")
def partial_with_a_position_round_cross_entropy_of_softmax() -> Made:
    """A functools.partial with a positional argument round cross_entropy, on a softmax."""
    x = inputs()

    def scaled(factor: float, prediction: Tensor, target: Tensor) -> Tensor:
        return factor * functional.cross_entropy(prediction, target)

    return functools.partial(scaled, 0.5), network(8, 5)(x).softmax(1), classes(x, 5)


@misuse("double-softmax")
def shifted_language_model_of_softmax() -> Made:
    """A language model that shifts inside its loss, on a softmax."""
    words = torch.randint(50, (4, 16))
    prediction = torch.randn(4, 16, 50, requires_grad=True).softmax(-1)
    return (
        lambda p, t: functional.cross_entropy(p[:, :-1].reshape(-1, 50), t[:, 1:].reshape(-1)),
        prediction,
        words,
    )


@misuse("double-softmax")
def softmax_inside_a_wrapped_cross_entropy() -> Made:
    """A softmax inside a function that calls cross_entropy."""
    x = inputs()
    return lambda p, t: functional.cross_entropy(p.softmax(1), t), network(8, 5)(x), classes(x, 5)


@misuse("not-log-probabilities")
def wrapped_nll_of_probabilities() -> Made:
    """A lambda that calls nll_loss, on probabilities."""
    x = inputs()
    return lambda p, t: functional.nll_loss(p, t), network(8, 10)(x).softmax(1), classes(x, 10)


@misuse("not-log-probabilities")
def wrapped_nll_of_logits() -> Made:
    """A lambda that calls nll_loss, on logits."""
    x = inputs()
    return lambda p, t: functional.nll_loss(p, t), 3 * network(8, 10)(x), classes(x, 10)


@misuse("not-log-probabilities")
def wrapped_kl_div_of_probabilities() -> Made:
    """A lambda that calls kl_div, on probabilities."""
    x = inputs()
    target = torch.randn(len(x), 5).softmax(1)
    return lambda p, t: functional.kl_div(p, t, reduction="batchmean"), network(8, 5)(x).softmax(1), target


@misuse("double-sigmoid")
def wrapped_binary_logits_of_sigmoid() -> Made:
    """A lambda that squeezes and calls binary_cross_entropy_with_logits, on a sigmoid."""
    x = inputs()
    model = nn.Sequential(network(8, 1), nn.Sigmoid())
    return (
        lambda p, t: functional.binary_cross_entropy_with_logits(p.squeeze(1), t.float()),
        model(x),
        yes_or_no(x).squeeze(1).long(),
        model,
    )


@misuse("double-sigmoid")
def sigmoid_twice_inside_a_function() -> Made:
    """binary_cross_entropy of a sigmoid of a sigmoid, inside a function."""
    x = inputs()
    return lambda p, t: functional.binary_cross_entropy(p.sigmoid().sigmoid(), t), network(8, 1)(x), yes_or_no(x)


@misuse("target-coding")
def wrapped_binary_logits_with_signs() -> Made:
    """A lambda round binary_cross_entropy_with_logits, with targets −1 and 1."""
    x = inputs()
    return lambda p, t: functional.binary_cross_entropy_with_logits(p, t), network(8, 1)(x), 2 * yes_or_no(x) - 1


@misuse("target-coding")
def wrapped_soft_margin_with_zero_and_one() -> Made:
    """A lambda round soft_margin_loss, with targets 0 and 1."""
    x = inputs()
    return lambda p, t: functional.soft_margin_loss(p, t), network(8, 1)(x), yes_or_no(x)


@misuse("one-class")
def wrapped_cross_entropy_of_one_output() -> Made:
    """A lambda round cross_entropy of a single output."""
    x = inputs()
    return lambda p, t: functional.cross_entropy(p, t), network(8, 1)(x), torch.zeros(len(x), dtype=torch.long)


@misuse("softmax-axis")
def softmax_over_the_batch_inside_a_function() -> Made:
    """A log-softmax over the batch, inside a function that calls nll_loss."""
    x = inputs()
    return lambda p, t: functional.nll_loss(p.log_softmax(0), t), network(8, 10)(x), classes(x, 10)


@misuse("label-range", says=r"out of bounds")
def wrapped_cross_entropy_with_labels_from_one() -> Made:
    """A lambda round cross_entropy, with labels that count from 1."""
    x = inputs()
    return lambda p, t: functional.cross_entropy(p, t), network(8, 5)(x), torch.arange(len(x)) % 5 + 1


@misuse("swapped")
def labels_before_probabilities() -> Made:
    """binary_cross_entropy(labels, probabilities), without the model."""
    x = inputs()
    return functional.binary_cross_entropy, yes_or_no(x), network(8, 1)(x).sigmoid()


@misuse("swapped")
def class_indices_before_logits() -> Made:
    """cross_entropy(labels, logits)."""
    x = inputs()
    return functional.cross_entropy, classes(x, 10), network(8, 10)(x)


@misuse("scale")
def house_prices_of_four_houses() -> Made:
    """Four targets of 300 000 against fresh predictions."""
    x = inputs(4)
    return nn.L1Loss(), network(8, 1)(x), 80_000 * reals(x) + 300_000


@misuse("scale")
def house_price_of_one_house() -> Made:
    """One target of 300 000."""
    x = inputs(1)
    return nn.MSELoss(), network(8, 1)(x), torch.full((1, 1), 3e5)


@misuse("scale")
def house_prices_in_a_loss_by_hand() -> Made:
    """A squared error by hand, of targets of 300 000."""
    x = inputs()
    return lambda p, t: ((p - t) ** 2).mean(), network(8, 1)(x), 80_000 * reals(x) + 300_000


@misuse("double-sigmoid")
def eight_probabilities_with_their_graph() -> Made:
    """Eight sigmoids with their graph into binary_cross_entropy_with_logits."""
    x = inputs(8)
    model = nn.Sequential(network(8, 1), nn.Sigmoid())
    return functional.binary_cross_entropy_with_logits, model(x), yes_or_no(x), model


@misuse("one-class")
def softmax_of_one_output_as_a_probability() -> Made:
    """A softmax over a single output into BCELoss."""
    x = inputs()
    model = nn.Sequential(network(8, 1), nn.Softmax(1))
    return nn.BCELoss(), model(x), yes_or_no(x), model


@misuse("saturated")
def sigmoids_of_enormous_inputs() -> Made:
    """Inputs that are 5000 times too large, all of them at the same end."""
    x = inputs().abs()
    model = nn.Sequential(nn.Linear(8, 1, bias=False), nn.Sigmoid())
    with torch.no_grad():
        model[0].weight.copy_(-model[0].weight.abs())  # type: ignore[operator,union-attr]
    return nn.BCELoss(), model(5000 * x), yes_or_no(x), model


@misuse("zero-gradient", "detached")
def rounded_outputs() -> Made:
    """Outputs rounded to whole numbers."""
    x = inputs()
    model = network(8, 1)
    return nn.MSELoss(), model(x).round(), torch.randint(3, (len(x), 1)).float(), model


@misuse("ignored-target")
def triplets_with_class_labels() -> Made:
    """One output for each class, and labels, into a loss of triplets."""
    x = inputs(64)
    return losses.triplet_margin(), network(8, 3)(x), torch.arange(64) % 3


@misuse("class-weights")
def the_tenth_weight_is_negative() -> Made:
    """A negative weight of the last of ten classes."""
    x = inputs()
    return nn.CrossEntropyLoss(weight=torch.tensor([1.0] * 9 + [-1.0])), network(8, 10)(x), classes(x, 10)
