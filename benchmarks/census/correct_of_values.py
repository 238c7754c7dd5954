"""Correct uses of the losses for numbers, for likelihoods, and for yes or no.

Neighbours: `correct_of_classes`, `correct_of_sequences`, `correct_of_embeddings`, `correct_of_training`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from census.case import Made, correct
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

# Numbers.


@correct("numbers")
def mse_of_a_fresh_regression() -> Made:
    """The plain case, [N, 1] against [N, 1]."""
    model, x = network(8, 1), inputs()
    return nn.MSELoss(), model(x), reals(x), model


@correct("numbers")
def fallline_mse_of_rows() -> Made:
    """[N] against [N]."""
    x = inputs()
    return losses.mse(), network(8, 1)(x).squeeze(1), reals(x).squeeze(1)


@correct("numbers")
def l1_of_one_sample() -> Made:
    """A single number, [1, 1]."""
    x = inputs(1)
    return functional.l1_loss, network(8, 1)(x), torch.tensor([[0.3]])


@correct("numbers")
def mse_of_numbers_without_dimensions() -> Made:
    """A prediction and a target of shape []."""
    return nn.MSELoss(), network(8, 1)(torch.randn(8)).squeeze(), torch.tensor(0.3)


@correct("numbers")
def smooth_l1_of_boxes() -> Made:
    """Four coordinates of boxes, in parts of the image."""
    x = inputs()
    return nn.SmoothL1Loss(beta=0.1), network(8, 4)(x), torch.rand(64, 4)


@correct("numbers")
def huber_of_standardised_prices() -> Made:
    """Huber after standardising."""
    x = inputs()
    return losses.huber(delta=1.0), network(8, 1)(x), reals(x)


@correct("numbers")
def huber_of_prices_by_a_trained_model() -> Made:
    """Prices in their own unit, by a model that already predicts such."""
    x = inputs()
    y = 250_000 + 80_000 * reals(x)
    standard = fitted(network(8, 1), x, (y - 250_000) / 80_000, functional.mse_loss)
    return nn.HuberLoss(delta=10_000.0), 250_000 + 80_000 * standard(x), y


@correct("numbers")
def mse_of_temperatures_with_a_bias() -> Made:
    """Degrees around 20, and a last layer whose bias starts there."""
    model, x = network(8, 1), inputs()
    with torch.no_grad():
        model[2].bias.fill_(20.0)
    return nn.MSELoss(), model(x), 20 + 5 * reals(x), model


@correct("numbers")
def mse_of_a_zero_head() -> Made:
    """The last layer starts at zero: every prediction is 0."""
    model, x = network(8, 1), inputs()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    return losses.mse(), model(x), reals(x), model


@correct("numbers")
def mse_of_a_small_batch_of_equal_targets() -> Made:
    """Six ratings, all 3."""
    x = inputs(6)
    return nn.MSELoss(), network(8, 1)(x), torch.full((6, 1), 3.0)


@correct("numbers")
def mse_of_ratings() -> Made:
    """Ratings from 1 to 5 as floats."""
    x = inputs()
    return losses.mse(), network(8, 1)(x), (3 + reals(x)).round().clamp(1, 5)


@correct("numbers")
def mse_of_an_image_autoencoder() -> Made:
    """Pixels from 0 to 1, a sigmoid at the end."""
    x = images()
    model = convolution(3, 3, nn.Sigmoid())
    return nn.MSELoss(), model(x), x, model


@correct("numbers")
def l1_of_tanh_images() -> Made:
    """Pixels from −1 to 1, a tanh at the end."""
    x = images()
    return nn.L1Loss(), convolution(3, 3, nn.Tanh())(x), 2 * x - 1


@correct("numbers")
def mse_of_diffusion_noise() -> Made:
    """The network predicts the noise."""
    x = images()
    noise = torch.randn_like(x)
    model = convolution(3, 3)
    return nn.MSELoss(), model(0.6 * x + 0.8 * noise), noise, model


@correct("numbers")
def mse_of_probabilities_against_one_hot() -> Made:
    """The Brier score: a softmax under the squared error."""
    x = inputs()
    return losses.mse(), network(8, 5)(x).softmax(1), functional.one_hot(classes(x, 5), 5).float()


@correct("numbers")
def mse_of_sparse_targets() -> Made:
    """Rainfall: nine in ten targets are 0."""
    x = inputs(200)
    rain = torch.where(torch.rand(200, 1) < 0.1, torch.rand(200, 1) * 4, 0.0)
    return nn.MSELoss(), network(8, 1)(x), rain


@correct("numbers")
def mse_with_heavy_tails() -> Made:
    """Cauchy noise: a few targets are far away."""
    x = inputs(200)
    noise = torch.distributions.StudentT(2.0).sample((200, 1))
    return losses.log_cosh(), network(8, 1)(x), reals(x) + 0.5 * noise


@correct("numbers")
def charbonnier_of_images() -> Made:
    """Super-resolution."""
    x = images()
    return losses.charbonnier(), x + 0.1 * convolution(3, 3)(x), (x + 0.05 * torch.randn_like(x)).clamp(0, 1)


@correct("numbers")
def quantiles_of_a_regression() -> Made:
    """Three quantiles at once, [N, 3] against [N]."""
    x = inputs()
    return losses.quantile(quantiles=(0.1, 0.5, 0.9)), network(8, 3)(x), reals(x).squeeze(1)


@correct("numbers")
def mse_of_forecasts() -> Made:
    """Sequences [N, T, D]."""
    x = torch.randn(16, 24, 8)
    hidden, _ = nn.GRU(8, 4, batch_first=True)(x)
    return nn.MSELoss(), hidden, 0.5 * x[..., :4].roll(-1, 1)


@correct("numbers")
def mse_of_ages() -> Made:
    """Ages in years, not standardised, and a network that starts near 0: slow, and not wrong."""
    x = inputs()
    return nn.MSELoss(), network(8, 1)(x), (40 + 12 * reals(x)).clamp(min=0)


@correct("numbers")
def mse_of_a_teachers_logits() -> Made:
    """Distillation by the squared error of logits."""
    x = inputs()
    return nn.MSELoss(), network(8, 10)(x), 3 * network(8, 10)(x).detach()


@correct("numbers")
def smooth_l1_of_action_values() -> Made:
    """Deep Q-learning: the value of the action taken against a target of the frozen network."""
    x, taken = inputs(), torch.randint(4, (64, 1))
    target = torch.randn(64, 1) + 0.99 * network(8, 4)(inputs()).detach().amax(1, keepdim=True)
    return functional.smooth_l1_loss, network(8, 4)(x).gather(1, taken), target


# Likelihoods.


@correct("likelihoods")
def poisson_nll_of_log_rates() -> Made:
    """Counts with zeros among them."""
    x = inputs()
    return nn.PoissonNLLLoss(), network(8, 1)(x), counts(x)


@correct("likelihoods")
def poisson_nll_of_whole_numbers() -> Made:
    """Counts of type int64."""
    x = inputs()
    return losses.poisson_nll(), network(8, 1)(x), counts(x).long()


@correct("likelihoods")
def poisson_nll_of_rates() -> Made:
    """Rates themselves, by a softplus."""
    x = inputs()
    return nn.PoissonNLLLoss(log_input=False), network(8, 1, nn.Softplus())(x), counts(x)


@correct("likelihoods")
def fallline_poisson_nll_of_large_counts() -> Made:
    """Counts in the hundreds, and a bias that starts at their logarithm."""
    x = inputs()
    return losses.poisson_nll(), 6 + network(8, 1)(x), torch.poisson(400 * torch.exp(0.1 * reals(x)))


@correct("likelihoods")
def gaussian_nll_of_means_and_variances() -> Made:
    """A heteroscedastic regression."""
    model, x = network(8, 2), inputs()
    mean, spread = model(x).split(1, 1)
    return nn.GaussianNLLLoss(), (mean, functional.softplus(spread)), reals(x), model


@correct("likelihoods")
def gaussian_nll_below_zero() -> Made:
    """A trained one with small variances, whose loss is negative."""
    x = inputs()
    y = reals(x)
    return losses.gaussian_nll(), (y + 0.01 * network(8, 1)(x), torch.full((64, 1), 1e-4)), y


@correct("likelihoods")
def beta_nll_of_means_and_variances() -> Made:
    """The β-NLL."""
    x = inputs()
    mean, spread = network(8, 2)(x).split(1, 1)
    return losses.beta_nll(), (mean, spread.exp()), reals(x)


@correct("likelihoods")
def crps_of_a_gaussian() -> Made:
    """The continuous ranked probability score of a mean and a standard deviation."""
    x = inputs()
    mean, spread = network(8, 2)(x).split(1, 1)
    return losses.crps(), (mean, spread.exp()), reals(x)


@correct("likelihoods")
def crps_of_an_ensemble() -> Made:
    """Ten members, [N, 10] against [N]."""
    x = inputs()
    return losses.crps(distribution="ensemble"), network(8, 10)(x), reals(x).squeeze(1)


@correct("likelihoods")
def tweedie_of_claims() -> Made:
    """Claims: most are 0, the others positive."""
    x = inputs(200)
    claims = torch.where(torch.rand(200, 1) < 0.3, torch.exp(reals(x)), 0.0)
    return losses.tweedie(), network(8, 1)(x), claims


@correct("likelihoods")
def negative_binomial_of_counts() -> Made:
    """Overdispersed counts."""
    x = inputs()
    return losses.negative_binomial_nll(), network(8, 2)(x), counts(x).squeeze(1)


@correct("likelihoods")
def evidential_regression() -> Made:
    """Four parameters for each sample."""
    x = inputs()
    return losses.evidential(), network(8, 4)(x), reals(x).squeeze(1)


# Yes or no.


@correct("yes or no")
def binary_cross_entropy_of_probabilities_above_one_half() -> Made:
    """A bias of 62 %: all probabilities lie between 0.55 and 0.7."""
    model, x = network(8, 1, nn.Sigmoid()), inputs(200)
    nn.init.normal_(model[2].weight, std=0.02)
    nn.init.constant_(model[2].bias, 0.49)
    return nn.BCELoss(), model(x), yes_or_no(x, share=0.62), model


@correct("yes or no")
def binary_logits_of_class_maps() -> Made:
    """One-hot maps of four classes, yes or no for each."""
    x = images()
    return nn.BCEWithLogitsLoss(), convolution(3, 4)(x), functional.one_hot(label_map(8, 4)).permute(0, 3, 1, 2).float()


@correct("yes or no")
def binary_logits_of_a_teacher() -> Made:
    """A teacher's probabilities as targets."""
    x = inputs()
    return losses.binary_cross_entropy_with_logits(), network(8, 6)(x), (3 * network(8, 6)(x)).sigmoid().detach()


@correct("yes or no")
def binary_logits_of_a_fresh_classifier() -> Made:
    """The plain case."""
    model, x = network(8, 1), inputs()
    return nn.BCEWithLogitsLoss(), model(x), yes_or_no(x), model


@correct("yes or no")
def fallline_binary_logits_of_rows() -> Made:
    """[N] against [N], fallline's loss."""
    x = inputs()
    return losses.binary_cross_entropy_with_logits(), network(8, 1)(x).squeeze(1), yes_or_no(x).squeeze(1)


@correct("yes or no")
def binary_logits_of_a_trained_classifier() -> Made:
    """Logits that fit."""
    x = inputs()
    y = yes_or_no(x)
    model = fitted(network(8, 1), x, y, functional.binary_cross_entropy_with_logits, 200)
    return functional.binary_cross_entropy_with_logits, model(x), y, model


@correct("yes or no")
def binary_logits_with_the_prior_as_bias() -> Made:
    """A bias of the log-odds of 62 %: at the start, all logits lie between 0 and 1."""
    model, x = network(8, 1), inputs(200)
    nn.init.normal_(model[2].weight, std=0.02)
    nn.init.constant_(model[2].bias, 0.49)
    return nn.BCEWithLogitsLoss(), model(x), yes_or_no(x, share=0.62), model


@correct("yes or no")
def binary_logits_of_a_zero_head() -> Made:
    """Every logit is 0."""
    model, x = network(8, 1), inputs()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    return losses.binary_cross_entropy_with_logits(), model(x), yes_or_no(x), model


@correct("yes or no")
def binary_logits_of_several_labels() -> Made:
    """Six labels at once, some rare."""
    x = inputs(200)
    return nn.BCEWithLogitsLoss(), network(8, 6)(x), yes_or_no(x, 6, share=0.1)


@correct("yes or no")
def binary_logits_with_positive_weights() -> Made:
    """One pos_weight for each label."""
    x = inputs(200)
    return nn.BCEWithLogitsLoss(pos_weight=torch.full((6,), 9.0)), network(8, 6)(x), yes_or_no(x, 6, share=0.1)


@correct("yes or no")
def binary_logits_of_a_rare_yes_with_its_weight() -> Made:
    """1 % of yes, and a pos_weight of 99."""
    x = inputs(1000)
    return losses.binary_cross_entropy_with_logits(pos_weight=99.0), network(8, 1)(x), yes_or_no(x, share=0.01)


@correct("yes or no")
def binary_logits_of_smoothed_labels() -> Made:
    """0.05 and 0.95."""
    x = inputs()
    return nn.BCEWithLogitsLoss(), network(8, 1)(x), 0.05 + 0.9 * yes_or_no(x)


@correct("yes or no")
def binary_logits_of_confident_outputs() -> Made:
    """Logits of ±50, some wrong."""
    x = inputs()
    return nn.BCEWithLogitsLoss(), 100 * network(8, 1)(x), yes_or_no(x)


@correct("yes or no")
def binary_logits_of_masks() -> Made:
    """Masks, [N, 1, H, W]."""
    model, x = convolution(3, 1), images()
    return nn.BCEWithLogitsLoss(), model(x), label_map(8, 2).unsqueeze(1).float(), model


@correct("yes or no")
def binary_logits_of_a_small_batch_of_no() -> Made:
    """Four samples, no positive among them."""
    x = inputs(4)
    return nn.BCEWithLogitsLoss(), network(8, 1)(x), torch.zeros(4, 1)


@correct("yes or no")
def binary_cross_entropy_of_probabilities() -> Made:
    """BCE after a sigmoid."""
    model, x = network(8, 1, nn.Sigmoid()), inputs()
    return nn.BCELoss(), model(x), yes_or_no(x), model


@correct("yes or no")
def binary_cross_entropy_of_pixels() -> Made:
    """An autoencoder of digits: targets from 0 to 1, many of them 0."""
    x = (images(channels=1) - 0.5).clamp(min=0) * 2
    return functional.binary_cross_entropy, convolution(1, 1, nn.Sigmoid())(x), x


@correct("yes or no")
def fallline_binary_cross_entropy_of_confident_probabilities() -> Made:
    """A trained classifier, with probabilities up to 0.9999, and one of 1."""
    x = inputs()
    y = yes_or_no(x)
    logits = 8 * (2 * y - 1) + network(8, 1)(x)
    logits = torch.cat([torch.where(y[:1] > 0, 20.0, -20.0) + 0 * logits[:1], logits[1:]])
    return losses.binary_cross_entropy(), logits.sigmoid(), y


@correct("yes or no")
def asymmetric_loss_of_many_labels() -> Made:
    """Eighty labels, of which few hold."""
    x = inputs()
    return losses.asymmetric(), network(8, 80)(x), yes_or_no(x, 80, share=0.05)


@correct("yes or no")
def dice_of_masks() -> Made:
    """The Dice loss of logits of masks."""
    x = images()
    return losses.dice(), convolution(3, 1)(x), label_map(8, 2).unsqueeze(1).float()


@correct("yes or no")
def tversky_of_masks() -> Made:
    """The Tversky loss of logits of masks."""
    x = images()
    return losses.tversky(), convolution(3, 1)(x), label_map(8, 2).unsqueeze(1).float()


@correct("yes or no")
def jaccard_of_an_empty_mask() -> Made:
    """One of the images has nothing to be found."""
    x = images()
    mask = label_map(8, 2).unsqueeze(1).float()
    mask[3] = 0
    return losses.jaccard(), convolution(3, 1)(x), mask
