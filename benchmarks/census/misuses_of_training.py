"""Misuses that let nothing be learnt, or the wrong thing: no gradient, the wrong sign, a sum, a call that fails.

Neighbours: `misuses_of_classes`, `misuses_of_labels`, `misuses_of_values`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from census.case import Made, misuse
from census.scenes import classes, convolution, counts, images, inputs, label_map, network, reals, yes_or_no
from fallline import losses

# Predictions that lead nowhere.


@misuse("detached")
def cross_entropy_of_detached_logits() -> Made:
    """.detach() between the model and the loss."""
    model, x = network(8, 5), inputs()
    return nn.CrossEntropyLoss(), model(x).detach(), classes(x, 5), model


@misuse("detached")
def fallline_mse_of_data() -> Made:
    """.data of the prediction, which has no history."""
    model, x = network(8, 1), inputs()
    return losses.mse(), model(x).data, reals(x), model


@misuse("detached")
def mse_of_a_tensor_made_anew() -> Made:
    """torch.tensor(…) of the outputs."""
    model, x = network(8, 1), inputs()
    return nn.MSELoss(), torch.tensor(model(x).tolist()), reals(x), model


@misuse("detached", "target-type", says=r"does not require grad|can only be|dtype|long|int")
def fallline_mse_of_chosen_classes() -> Made:
    """The classes that the model chose, as integers, in place of its outputs."""
    model, x = network(8, 5), inputs()
    return losses.mse(), model(x).argmax(1), classes(x, 5).float(), model


@misuse("detached", "target-type", "zero-gradient", says=r"does not require grad|argmax|detach")
def mse_of_the_chosen_class() -> Made:
    """The squared error of argmax(logits), to which nothing can be led back."""
    model, x = network(8, 5), inputs()
    return nn.MSELoss(), model(x).argmax(1).float(), classes(x, 5).float(), model


@misuse("detached", says=r"does not require grad|detach")
def binary_logits_of_another_model() -> Made:
    """The prediction comes from a frozen copy; the model that is trained has no part in it."""
    model, copy, x = network(8, 1), network(8, 1).requires_grad_(False), inputs()
    return nn.BCEWithLogitsLoss(), copy(x), yes_or_no(x), model


@misuse(
    "detached", "zero-gradient", says=r"(gradient|parameter|graph).*(none|not used|unused)|not .* used in the graph"
)
def mse_of_the_wrong_model() -> Made:
    """The prediction comes from one model, and another one is to be trained."""
    model, other, x = network(8, 1), network(8, 1), inputs()
    return losses.mse(), other(x), reals(x), model


@misuse("detached", "fails", "reduction", says=r"does not require grad|detach|tensor|'float' object has no")
def own_loss_that_returns_a_float() -> Made:
    """A loss that ends in .item()."""
    model, x = network(8, 1), inputs()
    return (lambda p, t: (p - t).square().mean().item()), model(x), reals(x), model


@misuse("detached")
def own_loss_that_goes_through_numpy() -> Made:
    """A loss that is computed in numpy and made a tensor again."""
    model, x = network(8, 1), inputs()

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        error = prediction.detach().numpy() - target.numpy()
        return torch.tensor((error**2).mean())

    return loss, model(x), reals(x), model


@misuse("detached", "zero-gradient", says=r"does not require grad|gradient")
def own_loss_that_counts_errors() -> Made:
    """The error rate as a loss: a comparison has no gradient."""
    model, x = network(8, 5), inputs()
    return (lambda p, t: (p.argmax(1) != t).float().mean()), model(x), classes(x, 5), model


# Gradients that are exactly zero.


@misuse("zero-gradient", "collapsed")
def mse_after_a_dead_relu() -> Made:
    """A ReLU after the last layer, whose inputs are all negative."""
    x = inputs()
    model = network(8, 1, nn.ReLU())
    with torch.no_grad():
        model[2].bias -= 3.0
    return nn.MSELoss(), model(x), reals(x).exp(), model


@misuse("zero-gradient")
def mse_of_rounded_outputs() -> Made:
    """round() has the gradient 0 everywhere."""
    model, x = network(8, 1), inputs()
    return nn.MSELoss(), (2 * model(x)).round(), counts(x), model


@misuse("zero-gradient")
def fallline_l1_of_clamped_outputs() -> Made:
    """Outputs clamped to [5, 10], below which all of them start."""
    model, x = network(8, 1), inputs()
    return losses.l1(), model(x).clamp(5, 10), 7 + 0.5 * reals(x), model


@misuse("zero-gradient")
def mse_of_signs() -> Made:
    """sign() of the outputs, without a straight-through gradient."""
    model, x = network(8, 1), inputs()
    return losses.mse(), model(x).sign(), 2 * yes_or_no(x) - 1, model


@misuse("zero-gradient", severity="note")
def cross_entropy_over_a_cut_body() -> Made:
    """The features are detached: the body has parameters that are to move, and no way to them."""
    body, head, x = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32)), nn.Linear(32, 5), inputs()
    return nn.CrossEntropyLoss(), head(body(x).detach()), classes(x, 5), nn.Sequential(body, head)


@misuse("zero-gradient", "collapsed")
def own_loss_that_is_constant() -> Made:
    """The sum of a softmax is 1, whatever the network does."""
    model, x = network(8, 5), inputs()
    return (lambda p, t: p.softmax(1).sum(1).mean() + 0 * t.sum()), model(x), reals(x, 5), model


# Losses that reward errors.


@misuse("rewards-errors")
def own_loss_with_the_wrong_sign() -> Made:
    """The negative squared error, minimised."""
    x = inputs()
    return (lambda p, t: -(p - t).square().mean()), network(8, 1)(x), reals(x)


@misuse("rewards-errors")
def own_loss_that_is_a_coefficient_of_determination() -> Made:
    """R², which should be as high as possible, minimised."""
    x = inputs()

    def score(prediction: Tensor, target: Tensor) -> Tensor:
        return 1 - (prediction - target).square().sum() / (target - target.mean()).square().sum()

    return score, network(8, 1)(x), reals(x)


@misuse("rewards-errors")
def own_loss_that_is_a_log_likelihood() -> Made:
    """The log-probability of the right class, without its minus."""
    x = inputs()
    loss = lambda p, t: p.log_softmax(1).gather(1, t[:, None]).mean()  # noqa: E731
    return loss, network(8, 5)(x), classes(x, 5)


@misuse("rewards-errors")
def own_loss_that_is_a_similarity() -> Made:
    """The cosine similarity between outputs and targets, minimised."""
    x = inputs()
    return (lambda p, t: functional.cosine_similarity(p, t).mean()), network(8, 6)(x), reals(x, 6)


@misuse("rewards-errors")
def own_loss_that_is_a_dice_coefficient() -> Made:
    """The Dice coefficient of masks instead of 1 minus it."""
    x = images()

    def coefficient(prediction: Tensor, target: Tensor) -> Tensor:
        p = prediction.sigmoid()
        return 2 * (p * target).sum() / (p.sum() + target.sum())

    return coefficient, convolution(3, 1)(x), label_map(8, 2).unsqueeze(1).float()


@misuse("rewards-errors")
def own_binary_cross_entropy_without_its_minus() -> Made:
    """y·log p + (1 − y)·log(1 − p), as it stands before its minus."""
    x = inputs()

    def likelihood(prediction: Tensor, target: Tensor) -> Tensor:
        yes, no = functional.logsigmoid(prediction), functional.logsigmoid(-prediction)
        return (target * yes + (1 - target) * no).mean()

    return likelihood, network(8, 1)(x), yes_or_no(x)


@misuse("rewards-errors")
def own_loss_that_is_a_correlation() -> Made:
    """Pearson's correlation, minimised."""

    def correlation(prediction: Tensor, target: Tensor) -> Tensor:
        p, t = prediction - prediction.mean(), target - target.mean()
        return (p * t).sum() / (p.norm() * t.norm())

    x = inputs()
    return correlation, network(8, 1)(x), reals(x)


@misuse("rewards-errors")
def own_module_with_the_wrong_sign() -> Made:
    """A module that returns the negative cross-entropy."""

    class Reward(nn.Module):
        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            return -functional.cross_entropy(prediction, target)

    x = inputs()
    return Reward(), network(8, 5)(x), classes(x, 5)


@misuse("rewards-errors", "domain")
def own_loss_without_a_square() -> Made:
    """The mean of prediction − target, which has no lower end."""
    x = inputs()
    return (lambda p, t: (p - t).mean()), network(8, 1)(x), reals(x)


# Reductions.


@misuse("reduction", severity="note")
def mse_summed_over_a_large_batch() -> Made:
    """reduction="sum" over 4096 samples: gradients 4096 times as large as a mean's."""
    x = inputs(4096)
    return nn.MSELoss(reduction="sum"), network(8, 1)(x), reals(x)


@misuse("reduction", severity="note")
def fallline_cross_entropy_summed_over_pixels() -> Made:
    """A sum over all pixels of all images."""
    x = images(16, size=32)
    return losses.cross_entropy(reduction="sum"), convolution(3, 4)(x), label_map(16, 4, 32)


@misuse("reduction", severity="note")
def binary_logits_function_that_sums() -> Made:
    """The function with reduction="sum" bound by a lambda, which hides it."""
    x = inputs(1000)

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(prediction, target, reduction="sum")

    return loss, network(8, 1)(x), yes_or_no(x)


# Representations.


@misuse("collapsed", "zero-gradient")
def info_nce_of_collapsed_embeddings() -> Made:
    """Every sample has the same embedding."""
    first, second = torch.randn(1, 8).expand(32, 8), torch.randn(1, 8).expand(32, 8)
    layer = nn.Linear(8, 4)
    return losses.info_nce(), (layer(first), layer(second)), None


@misuse("collapsed", "constant-target", severity="note")
def supervised_contrastive_without_positives() -> Made:
    """Every sample has a label of its own, so that there is nothing to be near to."""
    x = inputs(32)
    return losses.supervised_contrastive(), network(8, 4)(x), torch.arange(32)


@misuse("collapsed", "zero-gradient")
def triplets_whose_positive_is_the_anchor() -> Made:
    """The same tensor is given for the anchor and for the positive."""
    model, x = network(8, 4), inputs()
    anchor = model(x)
    return nn.TripletMarginLoss(), (anchor, anchor, model(inputs())), None, model


@misuse("collapsed")
def info_nce_of_one_view() -> Made:
    """The same view twice: without augmentation there is nothing to learn."""
    view = network(8, 16)(inputs(32))
    return losses.info_nce(), (view, view), None


# Calls that fail.


@misuse("fails", "target-type")
def cross_entropy_of_a_data_frames_strings() -> Made:
    """Labels as a list of strings."""
    x = inputs(3)
    return nn.CrossEntropyLoss(), network(8, 2)(x), ["cat", "dog", "cat"]


@misuse("fails", says=r"instance|call it|made|constructor")
def a_class_in_place_of_a_loss() -> Made:
    """torch.nn.MSELoss without its brackets."""
    x = inputs()
    return nn.MSELoss, network(8, 1)(x), reals(x)


@misuse("fails", "shape", says=r"argument|positional")
def own_loss_with_three_arguments() -> Made:
    """A loss that wants the inputs, too."""

    def loss(prediction: Tensor, target: Tensor, x: Any) -> Tensor:
        return (prediction - target * x.mean()).square().mean()

    x = inputs()
    return loss, network(8, 1)(x), reals(x)
