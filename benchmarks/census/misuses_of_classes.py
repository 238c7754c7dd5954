"""Misuses of the losses for one of several classes. `misuses_of_values` has those for numbers and for yes or no,
`misuses_of_labels` what is wrong with the labels and weights of either."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional

from census.case import Made, misuse
from census.scenes import (
    classes,
    convolution,
    fitted,
    images,
    inputs,
    label_map,
    language_model,
    network,
    tokens,
)
from fallline import losses

# Probabilities where logits belong.


@misuse("double-softmax")
def cross_entropy_after_a_softmax_layer() -> Made:
    """A classifier that ends in Softmax, under torch's cross-entropy."""
    model, x = network(8, 5, nn.Softmax(dim=1)), inputs()
    return nn.CrossEntropyLoss(), model(x), classes(x, 5), model


@misuse("double-softmax")
def cross_entropy_function_of_softmax() -> Made:
    """The function cross_entropy of softmax(logits), ten classes."""
    x = inputs(128)
    return functional.cross_entropy, network(8, 10)(x).softmax(1), classes(x, 10)


@misuse("double-softmax")
def fallline_cross_entropy_of_trained_softmax() -> Made:
    """A trained, confident classifier that ends in Softmax."""
    x = inputs()
    y = classes(x, 4)
    model = fitted(network(8, 4), x, y, functional.cross_entropy, 200)
    return losses.cross_entropy(), model(x).softmax(1), y, model


@misuse("double-softmax")
def cross_entropy_of_two_softmax_columns() -> Made:
    """Yes or no as two classes, with a softmax in front of the loss."""
    x = inputs()
    return nn.CrossEntropyLoss(label_smoothing=0.1), network(8, 2)(x).softmax(-1), classes(x, 2)


@misuse("double-softmax")
def cross_entropy_of_softmax_over_a_thousand_classes() -> Made:
    """A thousand classes, whose probabilities are all near 0.001."""
    x = inputs(32)
    return losses.cross_entropy(), network(8, 1000)(x).softmax(1), classes(x, 1000)


@misuse("double-softmax")
def cross_entropy_of_softmax_maps() -> Made:
    """A segmentation network that ends in Softmax over its channels."""
    model, x = convolution(3, 4, nn.Softmax(dim=1)), images()
    return nn.CrossEntropyLoss(ignore_index=255), model(x), label_map(8, 4), model


@misuse("double-softmax")
def cross_entropy_of_softmax_in_half_precision() -> Made:
    """Probabilities in float16, whose sums are 1 only to three digits."""
    x = inputs()
    return nn.CrossEntropyLoss(), network(8, 6)(x).half().softmax(1), classes(x, 6)


@misuse("double-softmax")
def cross_entropy_of_softmax_in_bfloat16() -> Made:
    """Probabilities in bfloat16, whose sums are 1 only to two digits."""
    x = inputs()
    return losses.cross_entropy(), network(8, 30)(x).bfloat16().softmax(1), classes(x, 30)


@misuse("double-softmax")
def cross_entropy_of_softmax_against_soft_labels() -> Made:
    """Soft labels on one side, a softmax that should not be there on the other."""
    x = inputs()
    soft = functional.one_hot(classes(x, 5), 5) * 0.9 + 0.02
    return functional.cross_entropy, network(8, 5)(x).softmax(1), soft


@misuse("double-softmax")
def cross_entropy_of_one_softmax_sample() -> Made:
    """A batch of a single sample with a softmax."""
    x = inputs(1)
    return nn.CrossEntropyLoss(), network(8, 7)(x).softmax(1), torch.tensor([3])


@misuse("double-softmax")
def cross_entropy_of_next_token_probabilities() -> Made:
    """A language model whose probabilities, flattened to [N·T, V], go into cross-entropy."""
    words = tokens()
    probabilities = language_model(20)(words[:, :-1]).softmax(-1)
    return functional.cross_entropy, probabilities.reshape(-1, 20), words[:, 1:].reshape(-1)


@misuse("double-softmax")
def partial_cross_entropy_of_softmax() -> Made:
    """The function with its arguments bound by functools.partial."""
    x = inputs()
    return functools.partial(functional.cross_entropy, label_smoothing=0.05), network(8, 5)(x).softmax(1), classes(x, 5)


@misuse("double-softmax")
def focal_loss_of_softmax() -> Made:
    """The focal loss takes logits and was given probabilities."""
    x = inputs()
    return losses.focal(), network(8, 5)(x).softmax(1), classes(x, 5)


@misuse("double-softmax")
def generalized_cross_entropy_of_softmax() -> Made:
    """The generalized cross-entropy takes logits and was given probabilities."""
    x = inputs()
    return losses.generalized_cross_entropy(), network(8, 5)(x).softmax(1), classes(x, 5)


@misuse("double-softmax")
def poly_loss_of_softmax() -> Made:
    """The poly loss takes logits and was given probabilities."""
    x = inputs()
    return losses.poly(), network(8, 5)(x).softmax(1), classes(x, 5)


@misuse("double-softmax")
def lovasz_of_softmax_maps() -> Made:
    """The Lovász loss takes logits and was given probabilities."""
    x = images()
    return losses.lovasz(), convolution(3, 4, nn.Softmax(dim=1))(x), label_map(8, 4)


@misuse("log-softmax-twice", severity="note")
def cross_entropy_after_log_softmax() -> Made:
    """LogSoftmax before cross-entropy: it does no harm but is one too many."""
    model, x = network(8, 5, nn.LogSoftmax(dim=1)), inputs()
    return nn.CrossEntropyLoss(), model(x), classes(x, 5), model


@misuse("log-softmax-twice", severity="note")
def fallline_cross_entropy_of_trained_log_softmax() -> Made:
    """The same with a trained network."""
    x = inputs()
    y = classes(x, 5)
    model = fitted(network(8, 5), x, y, functional.cross_entropy)
    return losses.cross_entropy(), model(x).log_softmax(1), y


# Logits or probabilities where log-probabilities belong.


@misuse("not-log-probabilities")
def nll_of_logits() -> Made:
    """The negative log-likelihood of outputs without LogSoftmax."""
    model, x = network(8, 5), inputs()
    return nn.NLLLoss(), model(x), classes(x, 5), model


@misuse("not-log-probabilities")
def nll_function_of_trained_logits() -> Made:
    """The same with logits that a cross-entropy has trained: far from 0, of both signs."""
    x = inputs()
    y = classes(x, 5)
    return functional.nll_loss, fitted(network(8, 5), x, y, functional.cross_entropy)(x), y


@misuse("not-log-probabilities")
def fallline_nll_of_logits() -> Made:
    """Fallline's nll of logits."""
    x = inputs(100)
    return losses.nll(), network(8, 3)(x), classes(x, 3)


@misuse("not-log-probabilities")
def nll_of_probabilities() -> Made:
    """The logarithm was forgotten: NLL of a softmax, which is a loss below 0."""
    x = inputs()
    return nn.NLLLoss(), network(8, 5, nn.Softmax(dim=1))(x), classes(x, 5)


@misuse("not-log-probabilities")
def fallline_nll_of_probabilities() -> Made:
    """Fallline's nll of a softmax over twenty classes."""
    x = inputs()
    return losses.nll(), network(8, 20)(x).softmax(1), classes(x, 20)


@misuse("not-log-probabilities")
def nll_of_logit_maps() -> Made:
    """A segmentation network without LogSoftmax."""
    model, x = convolution(3, 4), images()
    return nn.NLLLoss(), model(x), label_map(8, 4), model


@misuse("not-log-probabilities")
def nll_of_negative_logits() -> Made:
    """Logits that happen to be below 0 everywhere, and so look like logarithms."""
    x = inputs()
    return nn.NLLLoss(), network(8, 5)(x) - 4.0, classes(x, 5)


@misuse("not-log-probabilities", "not-normalised")
def nll_of_log_sigmoids() -> Made:
    """A log-sigmoid of each class instead of a log-softmax over them."""
    x = inputs()
    return functional.nll_loss, functional.logsigmoid(network(8, 5)(x)), classes(x, 5)


@misuse("not-log-probabilities")
def ctc_of_logits() -> Made:
    """CTC wants log-probabilities, [T, N, C], and was given the logits."""
    logits = network(8, 6)(torch.randn(12, 4, 8))
    return nn.CTCLoss(), (logits, torch.full((4,), 12)), (torch.randint(1, 6, (4, 3)), torch.full((4,), 3))


@misuse("not-log-probabilities")
def fallline_ctc_of_probabilities() -> Made:
    """CTC of a softmax without its logarithm; fallline's has the sample first, [N, T, C]."""
    probabilities = network(8, 6)(torch.randn(4, 12, 8)).softmax(-1)
    return losses.ctc(), probabilities, torch.randint(1, 6, (4, 3))


# The wrong axis.


@misuse("axis")
def cross_entropy_with_classes_last() -> Made:
    """Sequences [N, T, C] against [N, T]; the classes belong in dimension 1."""
    words = tokens()
    model = language_model(20)
    return nn.CrossEntropyLoss(), model(words), words.roll(-1, 1), model


@misuse("axis")
def fallline_cross_entropy_with_classes_last() -> Made:
    """The same, with fallline's loss."""
    words = tokens(4, 16, 30)
    return losses.cross_entropy(), language_model(30)(words), words.roll(-1, 1)


@misuse("axis")
def cross_entropy_with_channels_last() -> Made:
    """Segmentation logits [N, H, W, C] against [N, H, W]."""
    x = images()
    return functional.cross_entropy, convolution(3, 4)(x).permute(0, 2, 3, 1), label_map(8, 4)


@misuse("axis", "not-normalised")
def cross_entropy_of_soft_labels_with_classes_last() -> Made:
    """Soft labels [N, T, C]: the shapes are equal, so the loss is computed over the time."""
    hidden = torch.randn(16, 10, 8)
    soft = (2 * torch.randn(16, 10, 5)).softmax(-1)
    return nn.CrossEntropyLoss(), network(8, 5)(hidden), soft


@misuse("axis", "softmax-axis")
def nll_with_as_many_steps_as_classes() -> Made:
    """Log-probabilities [N, T, C] with T = C, normalised over the last axis."""
    hidden = torch.randn(16, 6, 8)
    model = network(8, 6, nn.LogSoftmax(dim=-1))
    return nn.NLLLoss(), model(hidden), torch.randint(6, (16, 6)), model


@misuse("axis")
def trained_cross_entropy_with_as_many_steps_as_classes() -> Made:
    """Trained logits [N, T, C] with T = C: right over the last axis, and given with that axis last."""
    hidden = torch.randn(16, 6, 8)
    y = classes(hidden.reshape(-1, 8), 6).reshape(16, 6)
    model = fitted(network(8, 6), hidden, y, lambda z, t: functional.cross_entropy(z.flatten(0, 1), t.flatten()), 200)
    return functional.cross_entropy, model(hidden), y


@misuse("axis", severity="note")
def fresh_cross_entropy_with_as_many_steps_as_classes() -> Made:
    """Fresh logits [N, T, C] with T = C: nothing in the numbers says which axis is which."""
    hidden = torch.randn(16, 6, 8)
    return nn.CrossEntropyLoss(), network(8, 6)(hidden), torch.randint(6, (16, 6))


@misuse("axis", "batch-size", "shape", says=r"transpose|batch.?size .* match")
def cross_entropy_of_transposed_logits() -> Made:
    """Logits [C, N] instead of [N, C]."""
    x = inputs()
    return nn.CrossEntropyLoss(), network(8, 5)(x).T, classes(x, 5)


@misuse("softmax-axis")
def nll_of_log_softmax_over_the_batch() -> Made:
    """LogSoftmax(dim=0): each class is normalised over the samples."""
    model, x = network(8, 5, nn.LogSoftmax(dim=0)), inputs()
    return nn.NLLLoss(), model(x), classes(x, 5), model


@misuse("softmax-axis", "double-softmax")
def cross_entropy_of_softmax_over_the_batch() -> Made:
    """Softmax over the batch, and one too many besides."""
    x = inputs()
    return losses.cross_entropy(), network(8, 5)(x).softmax(0), classes(x, 5)


@misuse("softmax-axis", "axis")
def nll_of_softmax_with_an_implied_axis() -> Made:
    """LogSoftmax() without a dimension takes axis 0 of [N, C, T]."""
    hidden = torch.randn(16, 8, 10)
    logits = nn.Conv1d(8, 5, 3, padding=1)(hidden)
    return nn.NLLLoss(), nn.LogSoftmax()(logits), torch.randint(5, (16, 10))  # type: ignore[call-arg]


@misuse("softmax-axis", "not-normalised")
def kl_div_of_softmax_over_the_batch() -> Made:
    """Both distributions of a distillation are normalised over the samples."""
    x = inputs()
    student, teacher = network(8, 5)(x).log_softmax(0), (3 * network(8, 5)(x)).softmax(0).detach()
    return nn.KLDivLoss(reduction="batchmean"), student, teacher


@misuse("softmax-axis", "axis")
def fallline_nll_of_softmax_over_the_width() -> Made:
    """A segmentation normalised over its last axis, the width of the image."""
    x = images()
    return losses.nll(), convolution(3, 4)(x).log_softmax(-1), label_map(8, 4)


# One output.


@misuse("one-class")
def cross_entropy_of_one_output_against_floats() -> Made:
    """Logits [N, 1] against floats [N, 1]: as probabilities of one class, the loss is always 0."""
    model, x = network(8, 1), inputs()
    return nn.CrossEntropyLoss(), model(x), yes_column(x), model


@misuse("one-class")
def fallline_cross_entropy_of_one_output() -> Made:
    """The same, with fallline's loss."""
    x = inputs()
    return losses.cross_entropy(), network(8, 1)(x), yes_column(x)


@misuse("one-class", "label-range")
def cross_entropy_of_one_output_against_indices() -> Made:
    """Logits [N, 1] against the indices 0 and 1."""
    x = inputs()
    return functional.cross_entropy, network(8, 1)(x), classes(x, 2)


@misuse("one-class", "zero-gradient", "saturated", "collapsed")
def binary_cross_entropy_after_softmax_over_one_output() -> Made:
    """A softmax over one output is 1 for every sample."""
    model, x = network(8, 1, nn.Softmax(dim=1)), inputs()
    return nn.BCELoss(), model(x), yes_column(x), model


@misuse("one-class", "zero-gradient", "collapsed")
def nll_after_log_softmax_over_one_output() -> Made:
    """A log-softmax over one output is 0 for every sample."""
    x = inputs()
    return nn.NLLLoss(), network(8, 1)(x).log_softmax(1), torch.zeros(64, dtype=torch.int64)


def yes_column(x: torch.Tensor) -> torch.Tensor:
    """0.0 or 1.0, shape [N, 1]."""
    return classes(x, 2).float().unsqueeze(1)


# Divergences.


@misuse("not-log-probabilities")
def kl_div_of_probabilities() -> Made:
    """KLDivLoss wants the logarithms of the prediction."""
    x = inputs()
    student, teacher = network(8, 5)(x).softmax(1), (3 * network(8, 5)(x)).softmax(1).detach()
    return nn.KLDivLoss(reduction="batchmean"), student, teacher


@misuse("not-log-probabilities")
def kl_div_of_logits() -> Made:
    """KLDivLoss of raw outputs."""
    x = inputs()
    return nn.KLDivLoss(reduction="batchmean"), network(8, 5)(x), (3 * network(8, 5)(x)).softmax(1).detach()


@misuse("not-log-probabilities")
def fallline_kl_div_of_probabilities() -> Made:
    """Fallline's kl_div of probabilities of a hundred classes."""
    x = inputs()
    return losses.kl_div(), network(8, 100)(x).softmax(1), (3 * network(8, 100)(x)).softmax(1).detach()


@misuse("not-probabilities", "domain")
def kl_div_against_log_probabilities() -> Made:
    """The teacher's logarithms without log_target=True."""
    x = inputs()
    student, teacher = network(8, 5)(x).log_softmax(1), (3 * network(8, 5)(x)).log_softmax(1).detach()
    return functools.partial(functional.kl_div, reduction="batchmean"), student, teacher


@misuse("not-probabilities", "domain", "not-normalised")
def fallline_kl_div_against_logits() -> Made:
    """The teacher's logits without a softmax."""
    x = inputs()
    return losses.kl_div(), network(8, 5)(x).log_softmax(1), 3 * network(8, 5)(x).detach()


@misuse("not-log-probabilities")
def kl_div_with_its_arguments_swapped() -> Made:
    """kl_div(target, prediction): the probabilities first, the logarithms second."""
    x = inputs()
    student, teacher = network(8, 5)(x).log_softmax(1), (3 * network(8, 5)(x)).softmax(1).detach()
    return nn.KLDivLoss(reduction="batchmean"), teacher, student


@misuse("not-log-probabilities")
def kl_div_with_log_target_of_probabilities() -> Made:
    """log_target=True, and a target of probabilities."""
    x = inputs()
    student, teacher = network(8, 5)(x).log_softmax(1), (3 * network(8, 5)(x)).softmax(1).detach()
    return nn.KLDivLoss(reduction="batchmean", log_target=True), student, teacher


@misuse("reduction")
def kl_div_with_torchs_default_mean() -> Made:
    """torch's default mean divides by the classes too, and is no divergence."""
    x = inputs()
    student, teacher = network(8, 5)(x).log_softmax(1), (3 * network(8, 5)(x)).softmax(1).detach()
    return nn.KLDivLoss(), student, teacher


@misuse("reduction")
def fallline_kl_div_with_mean() -> Made:
    """The same, asked for by name where the default is right."""
    x = inputs()
    student, teacher = network(8, 12)(x).log_softmax(1), (3 * network(8, 12)(x)).softmax(1).detach()
    return losses.kl_div(reduction="mean"), student, teacher


@misuse("reduction", severity="note")
def kl_div_batchmean_of_sequences() -> Made:
    """batchmean over [N, T, V] sums over the T steps: the loss grows with the length."""
    words = tokens(8, 40)
    student, teacher = language_model(20)(words).log_softmax(-1), (3 * language_model(20)(words)).softmax(-1).detach()
    return nn.KLDivLoss(reduction="batchmean"), student, teacher
