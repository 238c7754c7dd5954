"""Correct uses of the losses for classes: indices of one class for each sample. Neighbours: `correct_of_sequences` for
soft labels, maps and sequences, `correct_of_values` for numbers and yes or no, `correct_of_training` for the rest."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from census.case import Made, correct
from census.scenes import classes, fitted, inputs, network
from fallline import losses


@correct("classes")
def cross_entropy_of_a_fresh_classifier() -> Made:
    """The plain case, module and model."""
    model, x = network(8, 5), inputs()
    return nn.CrossEntropyLoss(), model(x), classes(x, 5), model


@correct("classes")
def fallline_cross_entropy_of_a_fresh_classifier() -> Made:
    """The plain case, fallline's loss and ten classes."""
    model, x = network(8, 10), inputs(128)
    return losses.cross_entropy(), model(x), classes(x, 10), model


@correct("classes")
def cross_entropy_function() -> Made:
    """The plain case, torch's function."""
    x = inputs()
    return functional.cross_entropy, network(8, 5)(x), classes(x, 5)


@correct("classes")
def cross_entropy_of_a_trained_classifier() -> Made:
    """Logits that fit the labels."""
    x = inputs()
    y = classes(x, 5)
    model = fitted(network(8, 5), x, y, functional.cross_entropy, 200)
    return nn.CrossEntropyLoss(), model(x), y, model


@correct("classes")
def cross_entropy_of_a_wrong_but_confident_classifier() -> Made:
    """Fine-tuning starts from logits of ±30, many of them wrong."""
    x = inputs()
    return nn.CrossEntropyLoss(), 60 * network(8, 5)(x), classes(x, 5)


@correct("classes")
def cross_entropy_of_one_sample() -> Made:
    """A batch of one."""
    x = inputs(1)
    return nn.CrossEntropyLoss(), network(8, 5)(x), torch.tensor([2])


@correct("classes")
def cross_entropy_of_one_sample_without_a_batch() -> Made:
    """Logits [C] against an index without dimensions."""
    return functional.cross_entropy, network(8, 5)(torch.randn(8)), torch.tensor(2)


@correct("classes")
def cross_entropy_of_two_classes() -> Made:
    """Yes or no as two classes."""
    x = inputs()
    return nn.CrossEntropyLoss(), network(8, 2)(x), classes(x, 2)


@correct("classes")
def cross_entropy_of_a_small_batch_of_one_class() -> Made:
    """Eight samples that happen to have the same label."""
    x = inputs(8)
    return losses.cross_entropy(), network(8, 4)(x), torch.full((8,), 1)


@correct("classes")
def cross_entropy_of_a_zero_head() -> Made:
    """A last layer that starts at zero: all logits are equal, and the body has no gradient yet."""
    model, x = network(8, 5), inputs()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    return nn.CrossEntropyLoss(), model(x), classes(x, 5), model


@correct("classes")
def cross_entropy_with_the_priors_as_biases() -> Made:
    """The last layer starts at zero weights and log-frequencies: every row is the same, and a log-probability."""
    model, x = network(8, 5), inputs(200)
    y = classes(x, 5)
    nn.init.normal_(model[2].weight, std=1e-3)
    with torch.no_grad():
        model[2].bias.copy_(((torch.bincount(y, minlength=5) + 1) / 205).log())
    return nn.CrossEntropyLoss(), model(x), y, model


@correct("classes")
def cross_entropy_of_as_many_classes_as_samples() -> Made:
    """Logits [5, 5]."""
    x = inputs(5)
    return nn.CrossEntropyLoss(), network(8, 5)(x), torch.tensor([4, 0, 1, 3, 1])


@correct("classes")
def cross_entropy_of_many_classes_in_a_small_batch() -> Made:
    """A thousand classes, of which sixteen occur."""
    x = inputs(16)
    return nn.CrossEntropyLoss(label_smoothing=0.1), network(8, 1000)(x), torch.randint(1000, (16,))


@correct("classes")
def cross_entropy_of_positive_logits() -> Made:
    """A ReLU after the last layer is odd, and its logits are ≥ 0."""
    x = inputs()
    return nn.CrossEntropyLoss(), network(8, 5, nn.ReLU())(x), classes(x, 5)


@correct("classes")
def cross_entropy_of_scaled_cosines() -> Made:
    """A cosine classifier with the temperature 0.1: logits from −10 to 10."""
    x = inputs()
    features, prototypes = functional.normalize(network(8, 16)(x)), functional.normalize(torch.randn(5, 16))
    return nn.CrossEntropyLoss(), features @ prototypes.T / 0.1, classes(x, 5)


@correct("classes")
def cross_entropy_of_negative_distances() -> Made:
    """Prototypical networks: the logits are minus squared distances, all below 0."""
    x = inputs()
    return losses.cross_entropy(), -torch.cdist(network(8, 6)(x), torch.randn(5, 6)).square(), classes(x, 5)


@correct("classes")
def cross_entropy_with_impossible_classes() -> Made:
    """Logits masked with −∞ where an action is not allowed; the labels are allowed ones."""
    x = inputs()
    y = classes(x, 6)
    forbidden = (torch.rand(64, 6) < 0.4) & (functional.one_hot(y, 6) == 0)
    return nn.CrossEntropyLoss(), network(8, 6)(x).masked_fill(forbidden, -torch.inf), y


@correct("classes")
def cross_entropy_with_a_large_negative_mask() -> Made:
    """The same with −1e9."""
    x = inputs()
    y = classes(x, 6)
    forbidden = (torch.rand(64, 6) < 0.4) & (functional.one_hot(y, 6) == 0)
    return losses.cross_entropy(), network(8, 6)(x).masked_fill(forbidden, -1e9), y


@correct("classes")
def cross_entropy_with_balanced_weights() -> Made:
    """Class weights n/(C·n_c) against an imbalance of 9:1."""
    x = inputs(200)
    y = (torch.rand(200) < 0.1).long()
    weight = 200 / (2 * torch.bincount(y, minlength=2).clamp(min=1))
    return nn.CrossEntropyLoss(weight=weight.float()), network(8, 2)(x), y


@correct("classes")
def cross_entropy_with_weights_and_smoothing() -> Made:
    """Weights between 0.1 and 10 together with label smoothing."""
    x = inputs()
    weight = torch.tensor([0.1, 0.5, 1.0, 3.0, 10.0])
    return losses.cross_entropy(weight=weight, label_smoothing=0.1), network(8, 5)(x), classes(x, 5)


@correct("classes")
def cross_entropy_with_a_weight_of_zero_for_an_unused_class() -> Made:
    """The last output is reserved, occurs nowhere, and has weight 0."""
    x = inputs()
    return nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 1.0, 0.0])), network(8, 4)(x), classes(x, 3)


@correct("classes")
def cross_entropy_of_nine_to_one() -> Made:
    """An imbalance of 9:1 without weights."""
    x = inputs(500)
    return nn.CrossEntropyLoss(), network(8, 2)(x), (torch.rand(500) < 0.1).long()


@correct("classes")
def cross_entropy_with_some_labels_missing() -> Made:
    """A third of the labels is −100."""
    x = inputs()
    y = classes(x, 5)
    y[::3] = -100
    return nn.CrossEntropyLoss(), network(8, 5)(x), y


@correct("classes")
def cross_entropy_with_missing_labels_of_minus_one() -> Made:
    """−1 for missing labels, with ignore_index=−1."""
    x = inputs()
    y = classes(x, 5)
    y[::4] = -1
    return losses.cross_entropy(ignore_index=-1), network(8, 5)(x), y


@correct("classes")
def nll_of_log_probabilities() -> Made:
    """The plain case with LogSoftmax."""
    model, x = network(8, 5, nn.LogSoftmax(dim=1)), inputs()
    return nn.NLLLoss(), model(x), classes(x, 5), model


@correct("classes")
def fallline_nll_of_confident_log_probabilities() -> Made:
    """Log-probabilities of a trained classifier, down to −40."""
    x = inputs()
    y = classes(x, 5)
    model = fitted(network(8, 5), x, y, functional.cross_entropy, 200)
    return losses.nll(), (3 * model(x)).log_softmax(1), y


@correct("classes")
def nll_of_the_logarithm_of_averaged_probabilities() -> Made:
    """An ensemble: the logarithm of the mean of three softmaxes."""
    x = inputs()
    mean = torch.stack([network(8, 5)(x).softmax(1) for _ in range(3)]).mean(0)
    return functional.nll_loss, mean.log(), classes(x, 5)


@correct("classes")
def nll_of_one_almost_certain_class() -> Made:
    """A class with probability 1 to float32: its log-probability is 0 exactly."""
    x = inputs()
    y = classes(x, 3)
    logits = network(8, 3)(x) + 40 * functional.one_hot(y, 3)
    return nn.NLLLoss(), logits.log_softmax(1), y


@correct("classes")
def multi_margin_of_scores() -> Made:
    """MultiMarginLoss."""
    x = inputs()
    return nn.MultiMarginLoss(), network(8, 5)(x), classes(x, 5)


@correct("classes")
def focal_loss_of_logits() -> Made:
    """The focal loss, ten classes."""
    x = inputs(100)
    return losses.focal(gamma=2.0), network(8, 10)(x), classes(x, 10)


@correct("classes")
def poly_loss_of_logits() -> Made:
    """The poly loss."""
    x = inputs()
    return losses.poly(), network(8, 5)(x), classes(x, 5)


@correct("classes")
def generalized_cross_entropy_of_logits() -> Made:
    """The generalized cross-entropy, with noisy labels."""
    x = inputs()
    y = torch.where(torch.rand(64) < 0.3, torch.randint(5, (64,)), classes(x, 5))
    return losses.generalized_cross_entropy(), network(8, 5)(x), y


@correct("classes")
def symmetric_cross_entropy_of_logits() -> Made:
    """The symmetric cross-entropy."""
    x = inputs()
    return losses.symmetric_cross_entropy(), network(8, 5)(x), classes(x, 5)


@correct("classes")
def ordinal_loss_of_thresholds() -> Made:
    """CORAL: four thresholds for five ranks."""
    x = inputs()
    return losses.ordinal(), network(8, 4)(x), classes(x, 5)
