"""Correct uses of the losses for soft labels, for distributions, for maps and for sequences.

Neighbours: `correct_of_classes` for one class for each sample, `correct_of_values`, `correct_of_training`.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional

from census.case import Made, correct
from census.scenes import (
    classes,
    convolution,
    images,
    inputs,
    label_map,
    language_model,
    network,
    padded,
    tokens,
)
from fallline import losses

# Soft labels and distributions.


@correct("soft labels")
def cross_entropy_of_one_hot_floats() -> Made:
    """One-hot rows of floats are probabilities."""
    x = inputs()
    return nn.CrossEntropyLoss(), network(8, 5)(x), functional.one_hot(classes(x, 5), 5).float()


@correct("soft labels")
def cross_entropy_of_mixup() -> Made:
    """Mixup of the labels."""
    x = inputs()
    hot, share = functional.one_hot(classes(x, 5), 5).float(), torch.rand(64, 1)
    return functional.cross_entropy, network(8, 5)(x), share * hot + (1 - share) * hot.flip(0)


@correct("soft labels")
def cross_entropy_of_hand_smoothed_labels() -> Made:
    """0.9 for the class, the rest shared by the others."""
    x = inputs()
    return losses.cross_entropy(), network(8, 5)(x), 0.875 * functional.one_hot(classes(x, 5), 5) + 0.025


@correct("soft labels")
def cross_entropy_of_a_teacher() -> Made:
    """Distillation by cross-entropy with the teacher's probabilities."""
    x = inputs()
    return nn.CrossEntropyLoss(), network(8, 5)(x), (3 * network(8, 5)(x)).softmax(1).detach()


@correct("soft labels")
def cross_entropy_of_annotators() -> Made:
    """The shares of five annotators' votes."""
    x = inputs()
    votes = functional.one_hot(torch.randint(4, (64, 5)), 4).float().mean(1)
    return losses.cross_entropy(label_smoothing=0.05), network(8, 4)(x), votes


@correct("soft labels")
def cross_entropy_of_soft_maps() -> Made:
    """Soft labels for each pixel, [N, C, H, W]."""
    x = images()
    return nn.CrossEntropyLoss(), convolution(3, 4)(x), (2 * torch.randn(8, 4, 8, 8)).softmax(1)


@correct("soft labels")
def cross_entropy_of_half_precision_soft_labels() -> Made:
    """Soft labels computed in float16, whose sums are 1 only to three digits."""
    x = inputs()
    return nn.CrossEntropyLoss(), network(8, 50)(x), (2 * torch.randn(64, 50)).half().softmax(1).float()


@correct("soft labels")
def cross_entropy_of_bfloat16_soft_labels() -> Made:
    """The same in bfloat16, to two digits."""
    x = inputs()
    return losses.cross_entropy(), network(8, 50)(x), (2 * torch.randn(64, 50)).bfloat16().softmax(1).float()


@correct("soft labels")
def kl_div_of_a_distillation() -> Made:
    """log_softmax of the student, softmax of the teacher, at temperature 4."""
    x = inputs()
    student, teacher = network(8, 5)(x), 3 * network(8, 5)(x).detach()
    return nn.KLDivLoss(reduction="batchmean"), (student / 4).log_softmax(1), (teacher / 4).softmax(1)


@correct("soft labels")
def kl_div_with_log_target() -> Made:
    """Logarithms on both sides."""
    x = inputs()
    student, teacher = network(8, 5)(x).log_softmax(1), (3 * network(8, 5)(x)).log_softmax(1).detach()
    return nn.KLDivLoss(reduction="batchmean", log_target=True), student, teacher


@correct("soft labels")
def fallline_kl_div() -> Made:
    """Fallline's kl_div, a hundred classes."""
    x = inputs()
    return losses.kl_div(), network(8, 100)(x).log_softmax(1), (3 * network(8, 100)(x)).softmax(1).detach()


@correct("soft labels")
def kl_div_of_one_hot_targets() -> Made:
    """Probabilities of exactly 0 and 1: 0·log 0 is 0."""
    x = inputs()
    student = network(8, 5)(x).log_softmax(1)
    loss = functools.partial(functional.kl_div, reduction="batchmean")
    return loss, student, functional.one_hot(classes(x, 5), 5).float()


@correct("soft labels")
def kl_div_of_next_tokens() -> Made:
    """Distillation of a language model, flattened to [N·T, V]."""
    words = tokens()
    student = language_model(20)(words).log_softmax(-1).flatten(0, 1)
    teacher = (3 * language_model(20)(words)).softmax(-1).flatten(0, 1).detach()
    return nn.KLDivLoss(reduction="batchmean"), student, teacher


# Maps and sequences.


@correct("maps and sequences")
def cross_entropy_of_label_maps() -> Made:
    """Segmentation, [N, C, H, W] against [N, H, W]."""
    model, x = convolution(3, 4), images()
    return nn.CrossEntropyLoss(), model(x), label_map(8, 4), model


@correct("maps and sequences")
def cross_entropy_of_label_maps_with_void() -> Made:
    """255 for void, ignored."""
    x = images()
    y = label_map(8, 4)
    y[:, :2] = 255
    return nn.CrossEntropyLoss(ignore_index=255), convolution(3, 4)(x), y


@correct("maps and sequences")
def cross_entropy_of_a_map_as_large_as_its_classes() -> Made:
    """Eight classes on 8×8 pixels and eight images: all sizes are equal."""
    x = images()
    return losses.cross_entropy(), convolution(3, 8)(x), label_map(8, 8)


@correct("maps and sequences")
def cross_entropy_of_volumes() -> Made:
    """Voxels, [N, C, D, H, W]."""
    x = torch.randn(2, 1, 4, 4, 4)
    return nn.CrossEntropyLoss(), nn.Conv3d(1, 3, 3, padding=1)(x), torch.randint(3, (2, 4, 4, 4))


@correct("maps and sequences")
def nll_of_label_maps() -> Made:
    """Log-softmax over the channels."""
    x = images()
    return losses.nll(), convolution(3, 4)(x).log_softmax(1), label_map(8, 4)


@correct("maps and sequences")
def lovasz_of_label_maps() -> Made:
    """The Lovász loss of logits."""
    x = images()
    return losses.lovasz(), convolution(3, 4)(x), label_map(8, 4)


@correct("maps and sequences")
def dice_and_cross_entropy_of_label_maps() -> Made:
    """The usual sum of two losses for segmentations."""
    x = images()
    return losses.cross_entropy() + 0.5 * losses.dice(), convolution(3, 4)(x), label_map(8, 4)


@correct("maps and sequences")
def next_tokens_with_classes_second() -> Made:
    """A language model transposed to [N, V, T]."""
    words = tokens()
    model = language_model(20)
    return nn.CrossEntropyLoss(), model(words[:, :-1]).transpose(1, 2), words[:, 1:], model


@correct("maps and sequences")
def next_tokens_flattened() -> Made:
    """A language model flattened to [N·T, V]."""
    words = tokens()
    return functional.cross_entropy, language_model(20)(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten()


@correct("maps and sequences")
def next_tokens_as_many_as_the_vocabulary() -> Made:
    """[N, V, T] with V = T."""
    words = tokens(8, 20, 20)
    return nn.CrossEntropyLoss(), language_model(20)(words).transpose(1, 2), words.roll(-1, 1)


@correct("maps and sequences")
def next_tokens_with_padding_zero() -> Made:
    """Padding is token 0 and is ignored; no word has that index."""
    words = padded(tokens(), 0)
    logits = language_model(20)(words).transpose(1, 2)
    return nn.CrossEntropyLoss(ignore_index=0), logits, words


@correct("maps and sequences")
def flattened_next_tokens_with_padding_zero() -> Made:
    """The same, flattened: the padding comes in runs."""
    words = padded(tokens(16, 24, 50), 0)
    return (
        functools.partial(functional.cross_entropy, ignore_index=0),
        language_model(50)(words).flatten(0, 1),
        words.flatten(),
    )


@correct("maps and sequences")
def fallline_next_tokens_with_padding_one() -> Made:
    """Padding is token 1, as RoBERTa has it."""
    words = padded(1 + tokens(16, 24, 50), 1)
    return losses.cross_entropy(ignore_index=1), language_model(51)(words).transpose(1, 2), words


@correct("maps and sequences")
def masked_words() -> Made:
    """Masked language modelling: 15 % of the tokens count, the others are −100."""
    words = tokens(16, 24, 50)
    y = torch.where(torch.rand(16, 24) < 0.15, words, -100)
    return nn.CrossEntropyLoss(), language_model(50)(words).flatten(0, 1), y.flatten()


@correct("maps and sequences")
def ctc_of_log_probabilities() -> Made:
    """torch's CTC, frames first, targets far shorter than the input."""
    spoken = network(8, 6)(torch.randn(30, 4, 8)).log_softmax(-1)
    lengths = torch.tensor([30, 28, 20, 15])
    return nn.CTCLoss(), (spoken, lengths), (torch.randint(1, 6, (4, 3)), torch.tensor([3, 3, 2, 1]))


@correct("maps and sequences")
def fallline_ctc_with_short_targets() -> Made:
    """Fallline's CTC, the sample first, −1 after the ends of the targets."""
    spoken = network(8, 6)(torch.randn(4, 30, 8)).log_softmax(-1)
    targets = torch.tensor([[1, 2, 2], [3, -1, -1], [5, 4, -1], [1, 1, 1]])
    return losses.ctc(), spoken, targets


@correct("maps and sequences")
def linear_cross_entropy_of_hidden_states() -> Made:
    """Hidden states [N, T, D] and the weights of the classifier [V, D]."""
    words = tokens()
    embedding = nn.Embedding(20, 16)
    return losses.linear_cross_entropy(), (embedding(words[:, :-1]), embedding.weight), words[:, 1:]
