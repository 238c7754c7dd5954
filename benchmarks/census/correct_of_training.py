"""Correct uses that are unusual in how they are trained: losses by hand, precisions, models of which parts do not move.

Neighbours: `correct_of_classes`, `correct_of_sequences`, `correct_of_values`, `correct_of_embeddings`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from census.case import Made, correct
from census.scenes import classes, convolution, fitted, images, inputs, label_map, network, reals, yes_or_no
from fallline import losses

# Losses by hand.


@correct("losses by hand")
def own_mean_squared_error() -> Made:
    """A lambda."""
    x = inputs()
    return (lambda p, t: ((p - t) ** 2).mean()), network(8, 1)(x), reals(x)


@correct("losses by hand")
def own_focal_loss() -> Made:
    """A focal loss from cross_entropy with reduction="none"."""

    def focal(prediction: Tensor, target: Tensor) -> Tensor:
        values = functional.cross_entropy(prediction, target, reduction="none")
        return ((1 - (-values).exp()) ** 2 * values).mean()

    x = inputs()
    return focal, network(8, 5)(x), classes(x, 5)


@correct("losses by hand")
def own_cosine_loss() -> Made:
    """Minus the cosine similarity: between −1 and 1."""
    x = inputs()
    return (lambda p, t: -functional.cosine_similarity(p, t).mean()), network(8, 6)(x), reals(x, 6)


@correct("losses by hand")
def own_correlation_loss() -> Made:
    """Minus Pearson's correlation."""

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        p, t = prediction - prediction.mean(), target - target.mean()
        return -(p * t).sum() / (p.norm() * t.norm() + 1e-8)

    x = inputs()
    return loss, network(8, 1)(x), reals(x)


@correct("losses by hand")
def own_relative_error() -> Made:
    """The mean absolute percentage error of positive targets."""
    x = inputs()
    return (lambda p, t: ((p - t) / t).abs().mean()), network(8, 1, nn.Softplus())(x), reals(x).exp()


@correct("losses by hand")
def own_logarithmic_error() -> Made:
    """The squared error of log(1 + x), of positive outputs."""
    x = inputs()
    loss = lambda p, t: functional.mse_loss(torch.log1p(p), torch.log1p(t))  # noqa: E731
    return loss, network(8, 1, nn.Softplus())(x), reals(x).exp()


@correct("losses by hand")
def own_contrastive_loss_of_distances() -> Made:
    """Hadsell's loss: 1 for alike, 0 for not, in its own coding."""
    model, x, z = network(8, 4), inputs(), inputs()
    distance = (model(x) - model(z)).norm(dim=1, keepdim=True)
    loss = lambda d, t: (t * d.square() + (1 - t) * (1 - d).clamp(min=0).square()).mean()  # noqa: E731
    return loss, distance, yes_or_no(x), model


@correct("losses by hand")
def own_negative_evidence_bound() -> Made:
    """A Gaussian variational autoencoder with a small variance: the loss is negative."""
    x = images()
    variance = 0.01

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        error = (prediction - target).square() / variance
        return 0.5 * (error + math.log(2 * math.pi * variance)).flatten(1).sum(1).mean()

    return loss, x + 0.02 * convolution(3, 3)(x), x


@correct("losses by hand")
def own_variational_autoencoder() -> Made:
    """Reconstruction summed over the pixels, plus the divergence of the latent code, of a tuple of outputs."""
    x = images(channels=1)
    encoder, decoder = nn.Linear(64, 8), nn.Linear(4, 64)
    mean, log_variance = encoder(x.flatten(1)).chunk(2, 1)
    code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)

    def loss(prediction: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        pixels, m, v = prediction
        divergence = -0.5 * (1 + v - m.square() - v.exp()).sum()
        return functional.binary_cross_entropy_with_logits(pixels, target, reduction="sum") + divergence

    return loss, (decoder(code), mean, log_variance), x.flatten(1)


@correct("losses by hand")
def own_physical_residual() -> Made:
    """u″ + u = 0 at collocation points: there is no target."""
    points = torch.rand(64, 1, requires_grad=True)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
    u = model(points)
    first = torch.autograd.grad(u.sum(), points, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), points, create_graph=True)[0]
    return (lambda p, t: p.square().mean()), second + u, None, model


@correct("losses by hand")
def mse_of_a_physical_residual_against_zero() -> Made:
    """A residual under mse: every one of the targets is 0."""
    x = inputs(256)
    return nn.MSELoss(), network(8, 1)(x) - 0.3 * x[:, :1], torch.zeros(256, 1)


@correct("losses by hand")
def own_masked_error() -> Made:
    """Missing values are 0 in the target and left out by a mask that is closed over."""
    x = inputs()
    seen = (torch.rand(64, 3) < 0.6).float()
    loss = lambda p, t: (seen * (p - t).square()).sum() / seen.sum()  # noqa: E731
    return loss, network(8, 3)(x), reals(x, 3) * seen


@correct("losses by hand")
def own_negative_log_likelihood_of_a_distribution() -> Made:
    """A distribution of torch.distributions."""

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        mean, spread = prediction.chunk(2, 1)
        return -torch.distributions.Normal(mean, functional.softplus(spread) + 1e-3).log_prob(target).mean()

    x = inputs()
    return loss, network(8, 2)(x), reals(x)


@correct("losses by hand")
def own_policy_gradient() -> Made:
    """Minus the advantage times the log-probability of the action: as often negative as positive."""
    x = inputs()
    actions, advantage = torch.randint(4, (64,)), torch.randn(64)
    loss = lambda p, t: -(advantage * p.log_softmax(1).gather(1, t[:, None]).squeeze(1)).mean()  # noqa: E731
    return loss, network(8, 4)(x), actions


@correct("losses by hand")
def own_critic_of_wasserstein() -> Made:
    """The critic's loss: the mean over the made minus the mean over the real, without a lower end."""
    critic, x = network(8, 1), inputs()
    loss = lambda p, t: p[1].mean() - p[0].mean()  # noqa: E731
    return loss, (critic(x), critic(0.5 * inputs())), None, critic


@correct("losses by hand")
def own_generator_of_wasserstein() -> Made:
    """The generator's loss: minus the critic's mean; there is no target."""
    generator, critic = network(4, 8), network(8, 1).requires_grad_(False)
    return (lambda p, t: -p.mean()), critic(generator(inputs(64, 4))), None, generator


@correct("losses by hand")
def binary_logits_of_a_generator() -> Made:
    """A generator wants its samples called real: every target is 1."""
    generator, critic = network(4, 8), network(8, 1).requires_grad_(False)
    return nn.BCEWithLogitsLoss(), critic(generator(inputs(64, 4))), torch.ones(64, 1), generator


@correct("losses by hand")
def cross_entropy_of_a_momentum_contrast() -> Made:
    """MoCo: the positive comes first, so that every label is 0; there are 64 negatives."""
    queue, x = functional.normalize(torch.randn(64, 16)), inputs()
    encoder = network(8, 16)
    query, key = functional.normalize(encoder(x)), functional.normalize(encoder(x + 0.1 * inputs())).detach()
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / 0.07
    return nn.CrossEntropyLoss(), logits, torch.zeros(64, dtype=torch.int64), encoder


@correct("losses by hand")
def cross_entropy_of_images_and_texts() -> Made:
    """CLIP: logits [N, N], and sample i has the label i."""
    first, second = functional.normalize(network(8, 16)(inputs())), functional.normalize(network(8, 16)(inputs()))
    return functional.cross_entropy, first @ second.T / 0.07, torch.arange(64)


@correct("losses by hand")
def own_module_of_two_losses() -> Made:
    """A module that adds a weighted L1 to an MSE."""

    class Both(nn.Module):
        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            return functional.mse_loss(prediction, target) + 0.1 * functional.l1_loss(prediction, target)

    x = inputs()
    return Both(), network(8, 2)(x), reals(x, 2)


@correct("losses by hand")
def own_loss_of_dictionaries() -> Made:
    """Several heads in a dictionary."""
    x = inputs()
    body, first, second = network(8, 16), nn.Linear(16, 5), nn.Linear(16, 1)
    hidden = body(x)

    def loss(prediction: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
        kind = functional.cross_entropy(prediction["kind"], target["kind"])
        return kind + functional.mse_loss(prediction["size"], target["size"])

    prediction = {"kind": first(hidden), "size": second(hidden)}
    return loss, prediction, {"kind": classes(x, 5), "size": reals(x)}


@correct("losses by hand")
def own_pairwise_ranking_loss() -> Made:
    """A logistic loss of all pairs of scores, which depends on differences only."""

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        better = (target - target.T) > 0
        return (functional.softplus(-(prediction - prediction.T)) * better).sum() / better.sum()

    x = inputs(24)
    return loss, network(8, 1)(x), reals(x)


@correct("losses by hand")
def mse_without_reduction() -> Made:
    """reduction="none", to be weighted afterwards."""
    x = inputs()
    return nn.MSELoss(reduction="none"), network(8, 3)(x), reals(x, 3)


@correct("losses by hand")
def cross_entropy_function_without_reduction() -> Made:
    """The same with the function."""
    x = inputs()
    return functools.partial(functional.cross_entropy, reduction="none"), network(8, 5)(x), classes(x, 5)


@correct("losses by hand")
def weighted_sum_of_three_losses() -> Made:
    """fallline's sum of regression losses."""
    x = inputs()
    return losses.mse() + 0.1 * losses.l1() + 0.5 * losses.huber(), network(8, 1)(x), reals(x)


# Precisions and modes.


def autocast() -> Any:
    """bfloat16 on the CPU."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


@correct("precisions and modes", under=autocast)
def cross_entropy_under_autocast() -> Made:
    """Logits in bfloat16, labels in int64."""
    model, x = network(8, 5), inputs()
    return nn.CrossEntropyLoss(), model(x), classes(x, 5), model


@correct("precisions and modes", under=autocast)
def mse_under_autocast() -> Made:
    """A prediction in bfloat16 against a target in float32."""
    model, x = network(8, 1), inputs()
    return nn.MSELoss(), model(x), torch.randn(64, 1), model


@correct("precisions and modes", under=autocast)
def fallline_binary_logits_under_autocast() -> Made:
    """The same for yes or no."""
    model, x = network(8, 1), inputs()
    return losses.binary_cross_entropy_with_logits(), model(x), (torch.rand(64, 1) < 0.5).float(), model


@correct("precisions and modes")
def cross_entropy_in_double_precision() -> Made:
    """float64."""
    x = inputs().double()
    return losses.cross_entropy(), network(8, 5).double()(x), torch.randint(5, (64,))


@correct("precisions and modes")
def nll_in_half_precision() -> Made:
    """Log-probabilities in float16, whose exponentials add up to 1 only to three digits."""
    x = inputs()
    return functional.nll_loss, (3 * network(8, 40)(x)).half().log_softmax(1), classes(x, 40)


@correct("precisions and modes")
def nll_in_bfloat16() -> Made:
    """The same in bfloat16, to two digits."""
    x = inputs()
    return losses.nll(), (3 * network(8, 40)(x)).bfloat16().log_softmax(1), classes(x, 40)


@correct("precisions and modes")
def kl_div_in_bfloat16() -> Made:
    """Both sides in bfloat16."""
    x = inputs()
    student, teacher = network(8, 30)(x).bfloat16(), 3 * network(8, 30)(x).bfloat16().detach()
    return nn.KLDivLoss(reduction="batchmean"), student.log_softmax(1), teacher.softmax(1)


@correct("precisions and modes")
def binary_cross_entropy_of_half_precision_probabilities() -> Made:
    """A sigmoid in bfloat16, then float32 for the loss."""
    x = inputs()
    return nn.BCELoss(), (4 * network(8, 1)(x)).bfloat16().sigmoid().float(), yes_or_no(x)


@correct("precisions and modes")
def mse_in_half_precision() -> Made:
    """float16 on both sides, standardised."""
    x = inputs()
    return losses.mse(), network(8, 1)(x).half(), reals(x).half()


@correct("precisions and modes", under=torch.no_grad)
def cross_entropy_without_gradients() -> Made:
    """An evaluation under no_grad, without a model."""
    x = inputs()
    return nn.CrossEntropyLoss(), network(8, 5)(x), classes(x, 5)


@correct("precisions and modes", under=torch.no_grad)
def fallline_mse_without_gradients() -> Made:
    """The same, with a model in eval mode."""
    model, x = network(8, 1).eval(), inputs()
    return losses.mse(), model(x), reals(x), model


@correct("precisions and modes", under=torch.inference_mode)
def binary_logits_under_inference_mode() -> Made:
    """inference_mode, whose tensors may not be part of a graph afterwards."""
    x = inputs()
    return nn.BCEWithLogitsLoss(), network(8, 1)(x), yes_or_no(x)


@correct("precisions and modes")
def mse_of_bare_tensors() -> Made:
    """Two tensors without a history, as one tries a loss in an interpreter."""
    return nn.MSELoss(), torch.randn(16, 1), torch.randn(16, 1)


@correct("precisions and modes")
def cross_entropy_of_bare_tensors() -> Made:
    """The same for classes."""
    return losses.cross_entropy(), torch.randn(16, 5), torch.randint(5, (16,))


# Models of which parts do not move.


@correct("models")
def cross_entropy_over_a_frozen_body() -> Made:
    """A head on frozen features."""
    body, head, x = network(8, 16).requires_grad_(False), nn.Linear(16, 5), inputs()
    return nn.CrossEntropyLoss(), head(body(x)), classes(x, 5), nn.Sequential(body, head)


@correct("models")
def cross_entropy_of_a_low_rank_adaptation() -> Made:
    """LoRA: the second factor starts at zero, so that the first has a gradient of exactly zero."""

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(8, 5).requires_grad_(False)
            self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 5, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.base(x) + self.up(self.down(x))
            return hidden

    model, x = LowRank(), inputs()
    return nn.CrossEntropyLoss(), model(x), classes(x, 5), model


@correct("models")
def mse_of_zero_residual_branches() -> Made:
    """Residual branches that start at zero: their first layers have a gradient of exactly zero."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = network(8, 8)
            self.head = nn.Linear(8, 1)
            nn.init.zeros_(self.branch[2].weight)
            nn.init.zeros_(self.branch[2].bias)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(x + self.branch(x))
            return out

    model, x = Residual(), inputs()
    return losses.mse(), model(x), reals(x), model


@correct("models")
def cross_entropy_beside_an_unused_head() -> Made:
    """A model of two tasks, of which this loss trains one."""
    body, heads = network(8, 16), nn.ModuleDict({"kind": nn.Linear(16, 5), "size": nn.Linear(16, 1)})
    x = inputs()
    return nn.CrossEntropyLoss(), heads["kind"](body(x)), classes(x, 5), nn.ModuleList([body, heads])


@correct("models")
def cross_entropy_of_an_embedding_with_unused_rows() -> Made:
    """Most words of the vocabulary do not occur in the batch."""
    model = nn.Sequential(nn.EmbeddingBag(1000, 16), nn.Linear(16, 3))
    words = torch.randint(50, (64, 5))
    return nn.CrossEntropyLoss(), model(words), classes(words.float(), 3), model


@correct("models")
def cross_entropy_with_some_dead_units() -> Made:
    """A third of the hidden units is never active."""
    model, x = network(8, 5), inputs()
    with torch.no_grad():
        model[0].bias[::3] = -50.0
    return nn.CrossEntropyLoss(), model(x), classes(x, 5), model


@correct("models")
def mse_after_a_relu_for_positive_targets() -> Made:
    """A ReLU after the last layer, half of which is active."""
    model, x = network(8, 1, nn.ReLU()), inputs()
    return nn.MSELoss(), model(x), reals(x).clamp(min=0), model


@correct("models")
def cross_entropy_with_dropout_and_batch_normalisation() -> Made:
    """In training mode."""
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 5))
    x = inputs()
    return nn.CrossEntropyLoss(), model(x), classes(x, 5), model


@correct("models")
def mse_of_a_straight_through_estimator() -> Made:
    """round() with the gradient of the identity."""
    model, x = network(8, 1), inputs()
    latent = 2 * model(x)
    return nn.MSELoss(), latent + (latent.round() - latent).detach(), reals(x).round(), model


@correct("models")
def cross_entropy_of_a_perfect_classifier() -> Made:
    """Everything is learnt: the loss and its gradients are next to nothing."""
    x = inputs()
    y = classes(x, 3)
    model = fitted(network(8, 3), x, y, functional.cross_entropy, 400)
    return losses.cross_entropy(), 3 * model(x), y, model


@correct("models")
def triplets_that_are_far_enough_apart() -> Made:
    """At the end of a training, no triplet is within the margin: the loss and its gradient are 0."""
    x = inputs(16)
    anchor = network(8, 4)(x)
    return nn.TripletMarginLoss(margin=0.1), (anchor, anchor + 0.01, anchor + 5.0), None


@correct("models")
def mse_of_a_convolution() -> Made:
    """A map of labels as numbers, with the model."""
    x = images()
    model = convolution(3, 1)
    return nn.MSELoss(), model(x), label_map(8, 2).unsqueeze(1).float(), model
