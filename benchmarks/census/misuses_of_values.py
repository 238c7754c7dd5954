"""Misuses of the losses for numbers, for yes or no and for embeddings: shapes, domains, scales, what is not finite.

Neighbours: `misuses_of_classes`, `misuses_of_labels`, and `misuses_of_training` for what stops or reverses learning.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from census.case import Made, misuse
from census.scenes import (
    classes,
    convolution,
    counts,
    fitted,
    images,
    inputs,
    label_map,
    network,
    reals,
    yes_or_no,
)
from fallline import losses

# Shapes that broadcast in silence.


@misuse("broadcast")
def mse_of_a_column_against_a_row() -> Made:
    """Predictions [N, 1] against targets [N]: N² pairs."""
    model, x = network(8, 1), inputs()
    return nn.MSELoss(), model(x), reals(x).squeeze(1), model


@misuse("broadcast")
def l1_of_a_row_against_a_column() -> Made:
    """Predictions [N] against targets [N, 1]."""
    x = inputs()
    return functional.l1_loss, network(8, 1)(x).squeeze(1), reals(x)


@misuse("broadcast")
def smooth_l1_of_a_column_against_a_row() -> Made:
    """The same under smooth_l1."""
    x = inputs()
    return nn.SmoothL1Loss(), network(8, 1)(x), reals(x).squeeze(1)


@misuse("broadcast")
def huber_of_a_column_against_a_row() -> Made:
    """The same under the Huber loss."""
    x = inputs()
    return nn.HuberLoss(delta=0.5), network(8, 1)(x), reals(x).squeeze(1)


@misuse("broadcast")
def fallline_mse_of_a_column_against_a_row() -> Made:
    """Fallline's mse."""
    x = inputs()
    return losses.mse(), network(8, 1)(x), reals(x).squeeze(1)


@misuse("broadcast")
def log_cosh_of_a_column_against_a_row() -> Made:
    """Fallline's log_cosh."""
    x = inputs()
    return losses.log_cosh(), network(8, 1)(x), reals(x).squeeze(1)


@misuse("broadcast")
def charbonnier_of_maps_against_a_map_without_channel() -> Made:
    """Predictions [N, 1, H, W] against targets [N, H, W], N = H = W = 8."""
    x = images()
    return losses.charbonnier(), convolution(3, 1)(x), torch.rand(8, 8, 8)


@misuse("broadcast")
def mse_of_depth_maps_without_channel() -> Made:
    """Predictions [N, 1, H, W] against depths [N, H, W] for a batch of one."""
    x = images(1)
    return nn.MSELoss(), convolution(3, 1)(x), torch.rand(1, 8, 8)


@misuse("broadcast")
def mse_of_as_many_outputs_as_samples() -> Made:
    """Predictions [10, 10] of ten classes against ten labels as floats, [10]."""
    x = inputs(10)
    return functional.mse_loss, network(8, 10)(x), classes(x, 10).float()


@misuse("broadcast")
def mse_of_one_sample_against_the_batch() -> Made:
    """A prediction of the mean over the batch, [1, 1], against targets [64, 1]."""
    x = inputs()
    return nn.MSELoss(), network(8, 1)(x).mean(0, keepdim=True), reals(x)


@misuse("broadcast")
def poisson_nll_of_a_column_against_a_row() -> Made:
    """Log-rates [N, 1] against counts [N]."""
    x = inputs()
    return nn.PoissonNLLLoss(), network(8, 1)(x), counts(x).squeeze(1)


@misuse("broadcast")
def gaussian_nll_of_a_column_against_a_row() -> Made:
    """Means and variances [N, 1] against targets [N]."""
    model, x = network(8, 2), inputs()
    mean, spread = model(x).split(1, 1)
    return nn.GaussianNLLLoss(), (mean, functional.softplus(spread)), reals(x).squeeze(1), model


@misuse("broadcast")
def gaussian_nll_function_of_a_row_against_a_column() -> Made:
    """Means and variances [N] against targets [N, 1]."""
    x = inputs()
    mean, spread = network(8, 2)(x).unbind(1)
    return functional.gaussian_nll_loss, (mean, spread.exp()), reals(x)


@misuse("broadcast")
def binary_logits_of_a_column_against_a_row() -> Made:
    """BCEWithLogits [N, 1] against [N]."""
    x = inputs()
    return nn.BCEWithLogitsLoss(), network(8, 1)(x), yes_or_no(x).squeeze(1)


@misuse("broadcast")
def binary_cross_entropy_of_a_column_against_a_row() -> Made:
    """BCE [N, 1] against [N]."""
    x = inputs()
    return functional.binary_cross_entropy, network(8, 1)(x).sigmoid(), yes_or_no(x).squeeze(1)


@misuse("broadcast")
def soft_margin_of_a_column_against_a_row() -> Made:
    """SoftMarginLoss [N, 1] against [N]."""
    x = inputs()
    return nn.SoftMarginLoss(), network(8, 1)(x), 2 * yes_or_no(x).squeeze(1) - 1


@misuse("broadcast")
def hinge_embedding_of_a_column_against_a_row() -> Made:
    """Distances [N, 1] against signs [N]."""
    model, x, z = network(8, 4), inputs(), inputs()
    distance = (model(x) - model(z)).norm(dim=1, keepdim=True)
    return nn.HingeEmbeddingLoss(), distance, 2 * yes_or_no(x).squeeze(1) - 1


@misuse("broadcast")
def margin_ranking_of_columns_against_a_row() -> Made:
    """Scores [N, 1] against signs [N]."""
    model, x, z = network(8, 1), inputs(), inputs()
    return nn.MarginRankingLoss(margin=0.5), (model(x), model(z)), 2 * yes_or_no(x).squeeze(1) - 1


@misuse("broadcast")
def own_loss_of_a_column_against_a_row() -> Made:
    """A root mean squared error by hand, which torch's warning does not reach."""
    x = inputs()
    return (lambda p, t: (p - t).square().mean().sqrt()), network(8, 1)(x), reals(x).squeeze(1)


@misuse("shape", "broadcast")
def mse_of_five_outputs_against_three() -> Made:
    """Five outputs, three columns of targets."""
    x = inputs()
    return nn.MSELoss(), network(8, 5)(x), reals(x, 3)


@misuse("axis", "shape")
def mse_of_images_with_channels_last() -> Made:
    """Images [N, 3, H, W] against [N, H, W, 3]."""
    x = images()
    return losses.mse(), convolution(3, 3)(x), x.permute(0, 2, 3, 1)


@misuse("shape")
def quantiles_of_too_few_outputs() -> Made:
    """Two outputs for three quantiles."""
    x = inputs()
    return losses.quantile(quantiles=(0.1, 0.5, 0.9)), network(8, 2)(x), reals(x).squeeze(1)


@misuse("shape", "target-coding")
def binary_logits_of_five_outputs_against_indices() -> Made:
    """Five outputs of yes or no, and one class index for each sample."""
    x = inputs()
    return nn.BCEWithLogitsLoss(), network(8, 5)(x), classes(x, 5).float()


# Logits and probabilities of yes.


@misuse("double-sigmoid")
def binary_logits_after_a_sigmoid_layer() -> Made:
    """A network that ends in Sigmoid, under BCEWithLogits."""
    model, x = network(8, 1, nn.Sigmoid()), inputs()
    return nn.BCEWithLogitsLoss(), model(x), yes_or_no(x), model


@misuse("double-sigmoid")
def binary_logits_function_of_probabilities() -> Made:
    """Six labels at once."""
    x = inputs()
    return functional.binary_cross_entropy_with_logits, network(8, 6)(x).sigmoid(), yes_or_no(x, 6, share=0.3)


@misuse("double-sigmoid")
def fallline_binary_logits_of_trained_probabilities() -> Made:
    """Confident probabilities, near 0 and 1."""
    x = inputs()
    y = yes_or_no(x)
    model = fitted(network(8, 1), x, y, functional.binary_cross_entropy_with_logits, 200)
    return losses.binary_cross_entropy_with_logits(), model(x).sigmoid(), y, model


@misuse("double-sigmoid")
def binary_logits_of_probability_masks() -> Made:
    """A segmentation network that ends in Sigmoid."""
    x = images()
    mask = label_map(8, 2).unsqueeze(1).float()
    return nn.BCEWithLogitsLoss(), convolution(3, 1, nn.Sigmoid())(x), mask


@misuse("double-sigmoid")
def multilabel_soft_margin_of_probabilities() -> Made:
    """MultiLabelSoftMarginLoss applies the sigmoid itself."""
    x = inputs()
    return nn.MultiLabelSoftMarginLoss(), network(8, 6)(x).sigmoid(), yes_or_no(x, 6)


@misuse("double-sigmoid")
def asymmetric_loss_of_probabilities() -> Made:
    """The asymmetric loss takes logits of yes."""
    x = inputs()
    return losses.asymmetric(), network(8, 6)(x).sigmoid(), yes_or_no(x, 6, share=0.2)


@misuse("double-sigmoid")
def dice_of_probability_masks() -> Made:
    """Fallline's dice takes logits, and was given probabilities."""
    x = images()
    return losses.dice(), convolution(3, 1, nn.Sigmoid())(x), label_map(8, 2).unsqueeze(1).float()


@misuse("double-sigmoid")
def ordinal_loss_of_probabilities() -> Made:
    """The thresholds of CORAL are logits."""
    x = inputs()
    return losses.ordinal(), network(8, 4, nn.Sigmoid())(x), classes(x, 5)


@misuse("not-probabilities", "domain")
def binary_cross_entropy_of_logits() -> Made:
    """BCE of outputs without a sigmoid."""
    model, x = network(8, 1), inputs()
    return nn.BCELoss(), model(x), yes_or_no(x), model


@misuse("not-probabilities", "domain")
def fallline_binary_cross_entropy_of_tanh() -> Made:
    """BCE of a tanh, from −1 to 1."""
    x = inputs()
    return losses.binary_cross_entropy(), network(8, 1, nn.Tanh())(x), yes_or_no(x)


@misuse("swapped", says=r"order|swap|detach|requires? grad")
def binary_cross_entropy_with_its_arguments_swapped() -> Made:
    """BCE(target, prediction): it is the target that leads to the parameters."""
    model, x = network(8, 1, nn.Sigmoid()), inputs()
    return nn.BCELoss(), yes_or_no(x), model(x), model


@misuse("saturated")
def binary_cross_entropy_of_saturated_probabilities() -> Made:
    """Inputs that were not standardised: every probability is 0 or 1 exactly, half of them wrong."""
    x = 1000 * inputs()
    return nn.BCELoss(), network(8, 1, nn.Sigmoid())(x), yes_or_no(x)


@misuse("saturated")
def mse_of_saturated_probabilities() -> Made:
    """The squared error of such probabilities has no gradient at all."""
    x = 1000 * inputs()
    model = network(8, 1, nn.Sigmoid())
    return losses.mse(), model(x), yes_or_no(x), model


# Domains.


@misuse("domain", "target-coding")
def poisson_nll_of_negative_counts() -> Made:
    """Standardised counts are no counts."""
    x = inputs()
    return nn.PoissonNLLLoss(), network(8, 1)(x), reals(x)


@misuse("domain", "not-finite")
def poisson_nll_of_negative_rates() -> Made:
    """log_input=False, and rates below 0."""
    x = inputs()
    return nn.PoissonNLLLoss(log_input=False), network(8, 1)(x), counts(x)


@misuse("domain")
def gaussian_nll_of_negative_variances() -> Made:
    """The second output as it comes, without exp or softplus."""
    x = inputs()
    mean, spread = network(8, 2)(x).split(1, 1)
    return nn.GaussianNLLLoss(), (mean, spread), reals(x)


@misuse("domain")
def tweedie_of_negative_targets() -> Made:
    """Claims cannot be negative."""
    x = inputs()
    return losses.tweedie(), network(8, 1)(x), reals(x)


@misuse("domain")
def negative_binomial_of_negative_targets() -> Made:
    """Counts cannot be negative."""
    model, x = network(8, 2), inputs()
    return losses.negative_binomial_nll(), model(x), reals(x).squeeze(1)


@misuse("domain")
def hinge_embedding_of_embeddings() -> Made:
    """HingeEmbeddingLoss wants distances, and was given coordinates."""
    x = inputs()
    return nn.HingeEmbeddingLoss(), network(8, 4)(x), 2 * yes_or_no(x, 4) - 1


@misuse("domain")
def crps_of_negative_spreads() -> Made:
    """A standard deviation as it comes out of the last layer."""
    x = inputs()
    mean, spread = network(8, 2)(x).split(1, 1)
    return losses.crps(), (mean, spread), reals(x)


@misuse("domain")
def beta_nll_of_negative_variances() -> Made:
    """The same for a variance, as one tensor [N, 2]."""
    x = inputs()
    return losses.beta_nll(), network(8, 2)(x), reals(x)


# Scales.


@misuse("scale")
def mse_of_house_prices() -> Made:
    """Prices around 250,000 and a network that starts near 0."""
    model, x = network(8, 1), inputs()
    return nn.MSELoss(), model(x), 250_000 + 80_000 * reals(x), model


@misuse("scale")
def huber_of_house_prices() -> Made:
    """The same under Huber: the line is reached everywhere, and every gradient is ±1."""
    x = inputs()
    return nn.HuberLoss(), network(8, 1)(x), 250_000 + 80_000 * reals(x)


@misuse("scale")
def l1_of_temperatures_in_kelvin() -> Made:
    """Temperatures around 290 with a spread of 10."""
    x = inputs()
    return losses.l1(), network(8, 1)(x), 290 + 10 * reals(x)


@misuse("scale")
def fallline_mse_of_micrometres_in_metres() -> Made:
    """Targets of 1e-5: an untrained network is a hundred thousand times too far away."""
    x = inputs()
    return losses.mse(), network(8, 1)(x), 1e-5 * reals(x)


@misuse("scale")
def gaussian_nll_of_populations() -> Made:
    """Populations of towns, and a variance that starts at 1."""
    x = inputs()
    mean, spread = network(8, 2)(x).split(1, 1)
    return functional.gaussian_nll_loss, (mean, spread.exp()), 40_000 * reals(x).exp()


# Not finite.


@misuse("not-finite")
def mse_against_missing_values() -> Made:
    """NaN where a measurement is missing."""
    x = inputs()
    target = reals(x)
    target[[5, 40]] = float("nan")
    return nn.MSELoss(), network(8, 1)(x), target


@misuse("not-finite")
def fallline_huber_against_infinity() -> Made:
    """A division by zero in the preparation of the data."""
    x = inputs()
    target = reals(x)
    target[7] = float("inf")
    return losses.huber(), network(8, 1)(x), target


@misuse("not-finite")
def cross_entropy_of_nan() -> Made:
    """A column of the inputs is constant, and was divided by its standard deviation."""
    x = inputs()
    x[:, 2] = 0.0 / torch.zeros(64)
    return nn.CrossEntropyLoss(), network(8, 5)(x), torch.randint(5, (64,))


@misuse("not-finite")
def cross_entropy_of_a_masked_target() -> Made:
    """A mask of −∞ that covers the right answer of some samples."""
    x = inputs()
    y = classes(x, 5)
    mask = torch.zeros(64, 5)
    mask[::8] = functional.one_hot(y[::8], 5) * 1.0
    return functional.cross_entropy, network(8, 5)(x).masked_fill(mask > 0, -torch.inf), y


@misuse("not-finite")
def mse_that_overflows_in_half_precision() -> Made:
    """An error of 300 has the square 90,000, and float16 ends at 65,504."""
    x = inputs()
    return nn.MSELoss(), network(8, 1)(x).half(), (300 + 50 * reals(x)).half()


@misuse("not-finite")
def nll_of_the_logarithm_of_zero() -> Made:
    """log(softmax) by hand of logits far apart: some probabilities are 0, and their logarithm −∞."""
    x = inputs()
    return nn.NLLLoss(), (400 * network(8, 5)(x)).softmax(1).log(), classes(x, 5)


@misuse("not-finite")
def own_loss_of_the_logarithm_of_a_negative_number() -> Made:
    """A logarithmic error of outputs that may be negative."""
    x = inputs()
    loss = lambda p, t: (torch.log(p) - torch.log1p(t)).square().mean()  # noqa: E731
    return loss, network(8, 1)(x), counts(x)
