"""Misuses that lie in the target or the weights: coding, type, range, sums, what is ignored, class weights.

Neighbours: `misuses_of_batches` for a batch as a whole; `misuses_of_classes` and `misuses_of_values`, where it is the
prediction.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from census.case import Made, misuse
from census.scenes import (
    classes,
    convolution,
    images,
    inputs,
    label_map,
    language_model,
    network,
    reals,
    yes_or_no,
)
from fallline import losses

# How the target is coded.


@misuse("target-coding", "label-range", "domain")
def binary_logits_against_signs() -> Made:
    """BCEWithLogits against −1 and 1: the loss has no minimum."""
    model, x = network(8, 1), inputs()
    return nn.BCEWithLogitsLoss(), model(x), 2 * yes_or_no(x) - 1, model


@misuse("target-coding", "label-range", "domain")
def binary_logits_function_against_signs() -> Made:
    """The function, several columns."""
    x = inputs()
    return functional.binary_cross_entropy_with_logits, network(8, 4)(x), 2 * yes_or_no(x, 4) - 1


@misuse("target-coding", "label-range", "domain")
def fallline_binary_logits_against_signs() -> Made:
    """Fallline's loss, a batch with few positives."""
    x = inputs()
    return losses.binary_cross_entropy_with_logits(), network(8, 1)(x), 2 * yes_or_no(x, share=0.2) - 1


@misuse("target-coding", "label-range", "domain")
def binary_cross_entropy_against_signs() -> Made:
    """BCE of probabilities against −1 and 1."""
    x = inputs()
    return nn.BCELoss(), network(8, 1)(x).sigmoid(), 2 * yes_or_no(x) - 1


@misuse("target-coding", "label-range", "domain")
def binary_logits_against_mask_bytes() -> Made:
    """Masks as they come out of a PNG: 0 and 255."""
    model, x = convolution(3, 1), images()
    return nn.BCEWithLogitsLoss(), model(x), 255.0 * label_map(8, 2).unsqueeze(1), model


@misuse("target-coding", "label-range", "domain")
def binary_logits_against_one_and_two() -> Made:
    """Classes counted from 1, as many data sets have them."""
    x = inputs()
    return nn.BCEWithLogitsLoss(), network(8, 1)(x), 1 + yes_or_no(x)


@misuse("target-coding", "label-range", "domain")
def binary_logits_against_percentages() -> Made:
    """Fractions written as per cent, 0 to 100."""
    x = inputs()
    return losses.binary_cross_entropy_with_logits(), network(8, 1)(x), 100 * torch.rand(64, 1)


@misuse("target-coding", "label-range", "domain")
def binary_logits_against_class_indices() -> Made:
    """One output against the indices 0 to 4 as floats."""
    x = inputs()
    return nn.BCEWithLogitsLoss(), network(8, 1)(x), classes(x, 5).float().unsqueeze(1)


@misuse("target-coding", "domain")
def hinge_against_yes_or_no() -> Made:
    """The hinge loss wants −1 and 1: with 0, half of the samples have no gradient."""
    x = inputs()
    return losses.hinge(), network(8, 1)(x), yes_or_no(x)


@misuse("target-coding", "domain")
def squared_hinge_against_yes_or_no() -> Made:
    """The same for its square."""
    x = inputs()
    return losses.squared_hinge(), network(8, 1)(x), yes_or_no(x)


@misuse("target-coding", "zero-gradient", severity="note")
def handwritten_hinge_against_yes_or_no() -> Made:
    """A hinge loss by hand, (1 − t·p)₊, with 0 and 1."""
    x = inputs()
    return (lambda p, t: (1 - t * p).clamp(min=0).mean()), network(8, 1)(x), yes_or_no(x)


@misuse("target-coding", "domain")
def soft_margin_against_yes_or_no() -> Made:
    """SoftMarginLoss with 0 and 1."""
    x = inputs()
    return nn.SoftMarginLoss(), network(8, 1)(x), yes_or_no(x)


@misuse("target-coding", "domain")
def fallline_soft_margin_against_yes_or_no() -> Made:
    """Fallline's soft_margin with 0 and 1, three columns."""
    x = inputs()
    return losses.soft_margin(), network(8, 3)(x), yes_or_no(x, 3)


@misuse("target-coding", "domain")
def margin_ranking_against_yes_or_no() -> Made:
    """MarginRankingLoss with 1 for "the first is better" and 0 for "the second is"."""
    model, x, z = network(8, 1), inputs(), inputs()
    return nn.MarginRankingLoss(margin=1.0), (model(x), model(z)), yes_or_no(x), model


@misuse("target-coding", "domain")
def hinge_embedding_against_yes_or_no() -> Made:
    """HingeEmbeddingLoss with 1 for alike and 0 for not."""
    model, x, z = network(8, 4), inputs(), inputs()
    return nn.HingeEmbeddingLoss(), (model(x) - model(z)).norm(dim=1), yes_or_no(x).squeeze(1), model


@misuse("target-coding", "domain")
def cosine_embedding_against_yes_or_no() -> Made:
    """CosineEmbeddingLoss with 1 for alike and 0 for not: the zeros count for nothing."""
    model, x, z = network(8, 4), inputs(), inputs()
    return nn.CosineEmbeddingLoss(), (model(x), model(z)), yes_or_no(x).squeeze(1), model


@misuse("target-coding", "label-range")
def multilabel_margin_against_multi_hot() -> Made:
    """MultiLabelMarginLoss wants class indices, −1 after the last, and was given 0 or 1 for each class."""
    x = inputs()
    return nn.MultiLabelMarginLoss(), network(8, 6)(x), yes_or_no(x, 6, share=0.4).long()


@misuse("target-coding", "label-range", "domain")
def multilabel_soft_margin_against_signs() -> Made:
    """MultiLabelSoftMarginLoss wants 0 or 1 for each class, and was given −1 or 1."""
    x = inputs()
    return nn.MultiLabelSoftMarginLoss(), network(8, 6)(x), 2 * yes_or_no(x, 6) - 1


@misuse("target-coding", "shape", "target-type")
def cross_entropy_against_one_hot_integers() -> Made:
    """One-hot rows of type int64, as functional.one_hot makes them."""
    x = inputs()
    return nn.CrossEntropyLoss(), network(8, 5)(x), functional.one_hot(classes(x, 5), 5)


@misuse("target-coding", "shape", "target-type")
def nll_against_one_hot_floats() -> Made:
    """NLL takes indices only, and was given one-hot rows of floats."""
    x = inputs()
    return functional.nll_loss, network(8, 5)(x).log_softmax(1), functional.one_hot(classes(x, 5), 5).float()


@misuse("target-coding", "shape", "target-type")
def multi_margin_against_one_hot_integers() -> Made:
    """MultiMarginLoss takes indices only, and was given one-hot rows."""
    x = inputs()
    return nn.MultiMarginLoss(), network(8, 5)(x), functional.one_hot(classes(x, 5), 5)


@misuse("shape")
def cross_entropy_against_a_column_of_indices() -> Made:
    """Class indices [N, 1], as a data frame gives them."""
    x = inputs()
    return nn.CrossEntropyLoss(), network(8, 5)(x), classes(x, 5).unsqueeze(1)


# Its type.


@misuse("target-type")
def cross_entropy_against_float_indices() -> Made:
    """Class indices that a data frame has turned into floats."""
    x = inputs()
    return nn.CrossEntropyLoss(), network(8, 5)(x), classes(x, 5).float()


@misuse("target-type")
def cross_entropy_against_short_integers() -> Made:
    """Class indices of type int16."""
    x = inputs()
    return functional.cross_entropy, network(8, 5)(x), classes(x, 5).short()


@misuse("target-type")
def fallline_cross_entropy_against_float_maps() -> Made:
    """Label maps of floats."""
    x = images()
    return losses.cross_entropy(), convolution(3, 4)(x), label_map(8, 4).float()


@misuse("target-type")
def binary_logits_against_integers() -> Made:
    """Yes or no as int64."""
    x = inputs()
    return nn.BCEWithLogitsLoss(), network(8, 1)(x), yes_or_no(x).long()


@misuse("target-type", severity="note")
def mse_against_integers() -> Made:
    """Whole numbers as int64 under the squared error, which torch converts."""
    x = inputs()
    return nn.MSELoss(), network(8, 1)(x), (2 * reals(x)).long()


# Its range.


@misuse("label-range")
def cross_entropy_of_labels_from_one() -> Made:
    """Classes 1 to 5 for five outputs."""
    x = inputs()
    return nn.CrossEntropyLoss(), network(8, 5)(x), 1 + classes(x, 5)


@misuse("label-range")
def fallline_cross_entropy_of_a_missing_label() -> Made:
    """−1 where the label is not known."""
    x = inputs()
    y = classes(x, 5)
    y[3] = -1
    return losses.cross_entropy(), network(8, 5)(x), y


@misuse("label-range")
def cross_entropy_of_void_pixels() -> Made:
    """Label maps with 255 for void, without ignore_index=255."""
    x = images()
    y = label_map(8, 4)
    y[:, 0] = 255
    return nn.CrossEntropyLoss(), convolution(3, 4)(x), y


@misuse("label-range")
def fallline_nll_of_labels_from_one() -> Made:
    """Log-probabilities of three classes and labels 1 to 3."""
    x = inputs()
    return losses.nll(), network(8, 3)(x).log_softmax(1), 1 + classes(x, 3)


@misuse("label-range")
def focal_loss_of_too_few_outputs() -> Made:
    """Ten classes for a network of nine outputs."""
    x = inputs(200)
    return losses.focal(), network(8, 9)(x), classes(x, 10)


@misuse("label-range")
def ordinal_ranks_from_one() -> Made:
    """Ranks 1 to 5 for four thresholds, which tell 0 to 4 apart."""
    x = inputs()
    return losses.ordinal(), network(8, 4)(x), 1 + classes(x, 5)


@misuse("label-range", "target-coding")
def ctc_with_the_blank_among_its_targets() -> Made:
    """The blank, 0, must not be a target of CTC."""
    spoken = network(8, 6)(torch.randn(12, 4, 8)).log_softmax(-1)
    targets = torch.randint(1, 6, (4, 3))
    targets[:, 1] = 0
    return nn.CTCLoss(), (spoken, torch.full((4,), 12)), (targets, torch.full((4,), 3))


@misuse("shape", "not-finite", says=r"too (long|short)|target.?length|longer than")
def ctc_with_targets_longer_than_the_input() -> Made:
    """Eight labels cannot fit into six steps: the loss is infinite."""
    spoken = network(8, 6)(torch.randn(6, 4, 8)).log_softmax(-1)
    return nn.CTCLoss(), (spoken, torch.full((4,), 6)), (torch.randint(1, 6, (4, 8)), torch.full((4,), 8))


# Its sum.


@misuse("not-normalised")
def cross_entropy_of_multi_hot_rows() -> Made:
    """Several ones in a row: this is yes or no for each class, and not one of several."""
    model, x = network(8, 6), inputs()
    return nn.CrossEntropyLoss(), model(x), yes_or_no(x, 6, share=0.4), model


@misuse("not-normalised")
def fallline_cross_entropy_of_votes() -> Made:
    """How many of five annotators chose each class, as counts."""
    x = inputs()
    votes = functional.one_hot(torch.randint(4, (64, 5)), 4).sum(1).float()
    return losses.cross_entropy(), network(8, 4)(x), votes


@misuse("not-normalised")
def cross_entropy_of_a_mixup_that_adds_up_to_two() -> Made:
    """Mixup that forgot its weights: the sum of two one-hot rows."""
    x = inputs()
    hot = functional.one_hot(classes(x, 5), 5).float()
    return functional.cross_entropy, network(8, 5)(x), hot + hot.flip(0)


@misuse("not-normalised")
def cross_entropy_of_smoothed_labels_that_forgot_the_rest() -> Made:
    """0.9 for the class and 0 for the others: a tenth of the probability is lost."""
    x = inputs()
    return nn.CrossEntropyLoss(), network(8, 10)(x), 0.9 * functional.one_hot(classes(x, 10), 10)


@misuse("not-normalised", "not-probabilities", "domain")
def cross_entropy_against_the_teachers_logits() -> Made:
    """Distillation with the teacher's logits in place of its probabilities."""
    x = inputs()
    return nn.CrossEntropyLoss(), network(8, 5)(x), 3 * network(8, 5)(x).detach()


# What is ignored.


@misuse("all-ignored")
def cross_entropy_of_ignored_labels_only() -> Made:
    """Every label is −100: the mean of nothing is NaN."""
    x = inputs()
    return nn.CrossEntropyLoss(), network(8, 5)(x), torch.full((64,), -100)


@misuse("all-ignored")
def cross_entropy_of_padding_only() -> Made:
    """A batch of which the truncation has left only padding."""
    words = torch.full((4, 12), 0)
    return nn.CrossEntropyLoss(ignore_index=0), language_model(20)(words).transpose(1, 2), words


@misuse("all-ignored")
def fallline_cross_entropy_of_void_pixels_only() -> Made:
    """Label maps that are void everywhere."""
    return losses.cross_entropy(ignore_index=255), convolution(3, 4)(images()), torch.full((8, 8, 8), 255)


@misuse("all-ignored")
def nll_of_ignored_labels_only() -> Made:
    """The same under NLL."""
    x = inputs()
    return functional.nll_loss, network(8, 5)(x).log_softmax(1), torch.full((64,), -100)


@misuse("ignored-class")
def cross_entropy_that_ignores_the_digit_zero() -> Made:
    """ignore_index=0 where 0 is one of ten digits: it is never learnt."""
    x = inputs(128)
    return nn.CrossEntropyLoss(ignore_index=0), network(8, 10)(x), classes(x, 10)


@misuse("ignored-class")
def fallline_cross_entropy_that_ignores_a_class() -> Made:
    """ignore_index=2, one of four classes that are mixed in the batch."""
    x = inputs(128)
    return losses.cross_entropy(ignore_index=2), network(8, 4)(x), classes(x, 4)


@misuse("ignored-class")
def nll_that_ignores_one_of_two_classes() -> Made:
    """ignore_index=0 with yes and no: only yes is left, and always right."""
    x = inputs()
    return nn.NLLLoss(ignore_index=0), network(8, 2)(x).log_softmax(1), classes(x, 2)


# Class weights.


@misuse("class-weights")
def cross_entropy_with_too_few_weights() -> Made:
    """Nine weights for ten classes."""
    x = inputs()
    return nn.CrossEntropyLoss(weight=torch.ones(9)), network(8, 10)(x), classes(x, 10)


@misuse("class-weights")
def fallline_cross_entropy_with_too_many_weights() -> Made:
    """Six weights for five classes."""
    x = inputs()
    return losses.cross_entropy(weight=torch.ones(6)), network(8, 5)(x), classes(x, 5)


@misuse("class-weights")
def cross_entropy_with_a_weight_of_zero() -> Made:
    """A class of the batch has weight 0: it is never learnt."""
    x = inputs(128)
    return nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 0.0, 1.0])), network(8, 4)(x), classes(x, 4)


@misuse("class-weights", "not-finite")
def cross_entropy_with_infinite_weights() -> Made:
    """One over the counts, with a class that does not occur."""
    x = inputs()
    y = classes(x, 4)
    weight = 64 / functional.one_hot(y, 5).sum(0).float()
    return nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1), network(8, 5)(x), y


@misuse("class-weights", "rewards-errors")
def cross_entropy_with_a_negative_weight() -> Made:
    """A weight below 0 rewards errors on its class."""
    x = inputs(128)
    return nn.CrossEntropyLoss(weight=torch.tensor([1.0, -0.5, 1.0])), network(8, 3)(x), classes(x, 3)


@misuse("class-weights", "broadcast", "shape", says=r"weight|broadcast|size of tensor")
def binary_logits_with_too_many_positive_weights() -> Made:
    """Three pos_weights for a network of five outputs."""
    x = inputs()
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0]))
    return loss, network(8, 5)(x), yes_or_no(x, 5)


@misuse("class-weights", "broadcast", "shape", says=r"weight|broadcast")
def binary_logits_with_positive_weights_of_two_classes() -> Made:
    """Two pos_weights, for no and for yes, where there is one output: they make two columns of it."""
    x = inputs()
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 9.0]))
    return loss, network(8, 1)(x), yes_or_no(x)
