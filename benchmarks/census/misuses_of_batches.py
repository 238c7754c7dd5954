"""Misuses that lie in the batch as a whole: rare classes, constant targets, numbers of samples that differ, no sample.

Neighbours: `misuses_of_labels` for the target of each sample.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from census.case import Made, misuse
from census.scenes import classes, inputs, language_model, network, padded, reals, tokens
from fallline import losses

# Rare and constant.


@misuse("imbalance", severity="note")
def binary_logits_with_one_yes_in_five_hundred() -> Made:
    """Two positives among a thousand, and no pos_weight."""
    x = inputs(1000)
    target = torch.zeros(1000, 1)
    target[[17, 803]] = 1
    return nn.BCEWithLogitsLoss(), network(8, 1)(x), target


@misuse("imbalance", severity="note")
def cross_entropy_with_a_class_of_ninety_nine_percent() -> Made:
    """One class has 99 % of the labels."""
    x = inputs(1000)
    y = torch.zeros(1000, dtype=torch.int64)
    y[::100] = 1 + torch.arange(10) % 3
    return losses.cross_entropy(), network(8, 4)(x), y


@misuse("constant-target", severity="note")
def cross_entropy_of_one_label() -> Made:
    """All of 512 labels are 3: the data came sorted, or the labels are lost."""
    x = inputs(512)
    return nn.CrossEntropyLoss(), network(8, 5)(x), torch.full((512,), 3)


@misuse("constant-target", severity="note")
def mse_of_one_target() -> Made:
    """All of 256 targets are 0.7."""
    x = inputs(256)
    return losses.mse(), network(8, 1)(x), torch.full((256, 1), 0.7)


@misuse("constant-target", severity="note")
def binary_logits_of_no_only() -> Made:
    """The positives got lost on the way: 256 times no."""
    x = inputs(256)
    return functional.binary_cross_entropy_with_logits, network(8, 1)(x), torch.zeros(256, 1)


# How many samples.


@misuse("batch-size")
def cross_entropy_of_one_label_too_few() -> Made:
    """64 predictions and 63 labels."""
    x = inputs()
    return nn.CrossEntropyLoss(), network(8, 5)(x), classes(x, 5)[1:]


@misuse("batch-size", "shape")
def mse_of_half_the_targets() -> Made:
    """64 predictions and 32 targets."""
    x = inputs()
    return losses.mse(), network(8, 1)(x), reals(x)[:32]


@misuse("batch-size")
def next_token_labels_that_are_not_shifted() -> Made:
    """Logits [N·(T − 1), V] and labels [N·T]: one was shifted, the other was not."""
    words = padded(tokens(), 0)
    logits = language_model(20)(words[:, :-1]).reshape(-1, 20)
    return nn.CrossEntropyLoss(ignore_index=0), logits, words.reshape(-1)


@misuse("empty")
def mse_of_nothing() -> Made:
    """A mask has removed every sample: the mean is NaN."""
    x = inputs()
    return nn.MSELoss(), network(8, 1)(x)[:0], reals(x)[:0]


@misuse("empty")
def fallline_cross_entropy_of_nothing() -> Made:
    """No sample, five classes."""
    x = inputs()
    return losses.cross_entropy(), network(8, 5)(x)[:0], classes(x, 5)[:0]
