"""Correct uses of losses by hand that come from other fields, where low and high mean other things than usual.

Neighbours: `correct_of_training` has the usual ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from census.case import Made, correct
from census.scenes import counts, images, inputs, network, reals, yes_or_no

GROUP = "losses by hand"


@correct(GROUP)
def own_poisson_likelihood() -> Made:
    """exp(p) − t·p of log-rates: it may be negative, and is not lowest where p = t."""
    x = inputs()
    return (lambda p, t: (p.exp() - t * p).mean()), network(8, 1)(x), 3 * counts(x)


@correct(GROUP)
def own_pinball_loss() -> Made:
    """The 90 % quantile by hand: errors upwards cost less than errors downwards."""
    x = inputs()
    loss = lambda p, t: torch.maximum(0.9 * (t - p), -0.1 * (t - p)).mean()  # noqa: E731
    return loss, network(8, 1)(x), reals(x)


@correct(GROUP)
def own_exponential_loss() -> Made:
    """AdaBoost's loss, exp(−t·s), with −1 and 1."""
    x = inputs()
    return (lambda p, t: (-t * p).exp().mean()), network(8, 1)(x), 2 * yes_or_no(x) - 1


@correct(GROUP)
def own_binary_cross_entropy() -> Made:
    """The cross-entropy of probabilities, by hand."""

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        p = prediction.sigmoid().clamp(1e-6, 1 - 1e-6)
        return -(target * p.log() + (1 - target) * (1 - p).log()).mean()

    x = inputs()
    return loss, network(8, 1)(x), yes_or_no(x)


@correct(GROUP)
def own_survival_loss() -> Made:
    """Cox's partial likelihood: a higher risk means an earlier death, and some have not died."""

    def loss(prediction: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        time, died = target
        order = time.argsort(descending=True)
        risk = prediction[order]
        return -((risk - risk.logcumsumexp(0)) * died[order]).sum() / died.sum()

    x = inputs()
    return loss, network(8, 1)(x).squeeze(1), (reals(x).squeeze(1).exp(), (torch.rand(64) < 0.7).float())


@correct(GROUP)
def own_ranking_by_places() -> Made:
    """Place 1 is the best and should have the highest score: scores go down as targets go up."""

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        better = target < target.T
        return (functional.softplus(prediction.T - prediction) * better).sum() / better.sum()

    x = inputs(24)
    places = reals(x).argsort(0).argsort(0).float() + 1
    return loss, network(8, 1)(x), places


@correct(GROUP)
def own_proximal_policy_loss() -> Made:
    """PPO: the probability ratio is clipped, so that some actions have no gradient."""
    x, advantage = inputs(), torch.randn(64)
    policy, actions = network(8, 4), torch.randint(4, (64, 1))
    old = (policy(x) + 0.5 * torch.randn(64, 4)).log_softmax(1).gather(1, actions).squeeze(1).detach()

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        ratio = (prediction.log_softmax(1).gather(1, target).squeeze(1) - old).exp()
        return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()

    return loss, policy(x), actions, policy


@correct(GROUP)
def own_preference_loss() -> Made:
    """DPO: log-probabilities of a chosen and of a rejected answer; there is no target."""
    policy, chosen, rejected = network(8, 1), inputs(), inputs()
    loss = lambda p, t: -functional.logsigmoid(0.1 * (p[0] - p[1])).mean()  # noqa: E731
    return loss, (policy(chosen) - 20, policy(rejected) - 20), None, policy


@correct(GROUP)
def own_hinge_of_a_critic() -> Made:
    """The hinge loss of a critic: real above 1, made below −1."""
    critic, x = network(8, 1), inputs()
    loss = lambda p, t: ((1 - p[0]).clamp(min=0) + (1 + p[1]).clamp(min=0)).mean()  # noqa: E731
    return loss, (critic(x), critic(0.5 * inputs())), None, critic


@correct(GROUP)
def own_masked_autoencoder() -> Made:
    """Only the quarter of the pixels that was hidden counts: the others have no gradient."""
    x = images()
    hidden = (torch.rand(8, 1, 8, 8) < 0.25).float()
    model = network(8, 8)
    loss = lambda p, t: (hidden * (p - t).square()).sum() / (3 * hidden.sum())  # noqa: E731
    return loss, model(x * (1 - hidden)), x, model


@correct(GROUP)
def own_sparse_ratings() -> Made:
    """Ratings 1 to 5 where there are any, and 0 for none, which the loss leaves out."""
    x = inputs()
    ratings = torch.where(torch.rand(64, 12) < 0.2, (3 + reals(x, 12)).round().clamp(1, 5), 0.0)
    loss = lambda p, t: ((p - t).square() * (t > 0)).sum() / (t > 0).sum()  # noqa: E731
    return loss, 3 + network(8, 12)(x), ratings


@correct(GROUP)
def own_signal_to_noise_ratio() -> Made:
    """Minus the signal-to-noise ratio in decibels: negative once the signal is found."""

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return -10 * (target.square().sum(1) / (target - prediction).square().sum(1)).log10().mean()

    sound = torch.sin(torch.linspace(0, 30, 128) * (1 + torch.rand(16, 1)))
    return loss, 0.9 * sound + 0.1 * network(128, 128)(sound), sound
