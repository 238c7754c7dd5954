"""A third collection of correct uses: those of which an independent tester found that the check refused or warned.

Losses that differentiate by the inputs, that work in place, that take or return other things; losses in which low means
yes, and models of which a part rests. The check was mended for them afterwards. Neighbours: `misuses_third`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from census.case import Made, correct
from census.scenes import classes, inputs, network, reals, yes_or_no

GROUP = "third collection"


def _smooth(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 9), nn.Tanh(), nn.Linear(9, 1))


@correct(GROUP)
def derivative_by_the_inputs() -> Made:
    """A physics-informed loss, whose target is the input."""
    x = torch.linspace(0, 1, 64)[:, None].requires_grad_()

    def residual(u: Tensor, x: Tensor) -> Tensor:
        return (torch.autograd.grad(u.sum(), x, create_graph=True)[0] + u).square().mean()

    return residual, _smooth(1)(x), x


@correct(GROUP)
def energies_and_forces() -> Made:
    """Forces as the derivative of energies by positions that the loss keeps."""
    x = torch.randn(16, 6, requires_grad=True)
    model, forces = _smooth(6), torch.randn(16, 6)

    def both(energy: Tensor, target: Tensor) -> Tensor:
        found = -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]
        return functional.mse_loss(energy, target) + functional.mse_loss(found, forces)

    return both, model(x), torch.randn(16, 1), model


@correct(GROUP)
def clamped_in_place() -> Made:
    """A loss that clamps its prediction in place."""
    x = inputs()
    return lambda p, t: functional.mse_loss(p.clamp_(-1, 1), t), nn.Linear(8, 1)(x), reals(x)


@correct(GROUP)
def shifted_inside_the_loss() -> Made:
    """A language model that shifts inside its loss."""
    prediction = torch.randn(4, 16, 50, requires_grad=True)

    def shifted(output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output[:, :-1].reshape(-1, 50), target[:, 1:].reshape(-1))

    return shifted, prediction, torch.randint(50, (4, 16))


@correct(GROUP)
def energy_distance_of_all_pairs() -> Made:
    """An energy distance, which compares all pairs on purpose."""

    def distance(p: Tensor, t: Tensor) -> Tensor:
        return 2 * (p - t[None]).abs().mean() - (p - p.T).abs().mean()

    return distance, torch.randn(64, 1, requires_grad=True), torch.randn(64)


@correct(GROUP)
def discrepancy_of_all_pairs() -> Made:
    """A maximum mean discrepancy in one dimension, which compares all pairs on purpose."""

    def discrepancy(p: Tensor, t: Tensor) -> Tensor:
        return torch.exp(-((p - p.T) ** 2)).mean() - 2 * torch.exp(-((p - t[None]) ** 2)).mean()

    return discrepancy, torch.randn(64, 1, requires_grad=True), torch.randn(64)


@correct(GROUP)
def ranks_by_thresholds() -> Made:
    """CORAL by hand: ranks against their thresholds."""

    def coral(p: Tensor, t: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(p, (t[:, None] > torch.arange(4)).float())

    return coral, torch.randn(64, 4, requires_grad=True), torch.randint(5, (64,))


@correct(GROUP)
def policy_gradient_of_losses_only() -> Made:
    """A policy gradient whose advantages are all negative."""
    x, advantage = inputs(), -torch.rand(64)

    def policy(logits: Tensor, action: Tensor) -> Tensor:
        return -(advantage * logits.log_softmax(1).gather(1, action[:, None])[:, 0]).mean()

    return policy, network(8, 3)(x), classes(x, 3)


@correct(GROUP)
def distances_to_prototypes() -> Made:
    """cross_entropy(−d) of distances to prototypes."""
    points = torch.randn(64, 8, requires_grad=True)
    distances = torch.cdist(points, torch.randn(5, 8))
    return lambda d, y: functional.cross_entropy(-d, y), distances, torch.randint(5, (64,))


@correct(GROUP)
def unlikely_classes() -> Made:
    """An unlikelihood loss, which keeps away from what is no target."""
    x = inputs()

    def unlikely(logits: Tensor, target: Tensor) -> Tensor:
        return -torch.log(1 - logits.softmax(1).gather(1, target[:, None]) + 1e-6).mean()

    return unlikely, network(8, 10)(x), classes(x, 10)


@correct(GROUP)
def low_energies_for_yes() -> Made:
    """Energies, of which low ones mean yes."""
    x = inputs()

    def energy(e: Tensor, y: Tensor) -> Tensor:
        return (functional.softplus(e) * y + functional.softplus(-e) * (1 - y)).mean()

    return energy, network(8, 1)(x), yes_or_no(x)


@correct(GROUP)
def twins_with_a_bias() -> Made:
    """The distance of two outputs of one layer, in which its bias cancels."""
    model = nn.Linear(16, 8)
    first, second = model(torch.randn(64, 16)), model(torch.randn(64, 16))

    def contrast(d: Tensor, y: Tensor) -> Tensor:
        return (y * d**2 + (1 - y) * functional.relu(1 - d) ** 2).mean()

    return contrast, (first - second).norm(dim=1), torch.randint(2, (64,)).float(), model


class Experts(nn.Module):
    """Each sample goes to one of four experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).softmax(1)
        chosen, found = gate.argmax(1), torch.zeros(len(x), 3)
        for i, expert in enumerate(self.experts):
            own = chosen == i
            found = found.index_add(0, own.nonzero()[:, 0], expert(x[own]) * gate[own, i : i + 1])
        return found


@correct(GROUP)
def experts_without_a_sample() -> Made:
    """A mixture of experts with four samples, so that some expert has none."""
    model, x = Experts(), inputs(4)
    return nn.CrossEntropyLoss(), model(x), torch.randint(3, (4,)), model


@correct(GROUP)
def an_enormous_constant() -> Made:
    """A squared error to which 1e8 is added."""
    x = inputs()
    return lambda p, t: ((p - t) ** 2).mean() + 1e8, network(8, 1)(x), reals(x)


@correct(GROUP)
def a_loss_of_one_argument() -> Made:
    """A generator's loss, which takes no target."""

    def generator(fake: Tensor) -> Tensor:
        return functional.softplus(-fake).mean()

    return lambda p, t=None: generator(p), network(8, 1)(inputs()), None


@correct(GROUP)
def labels_of_positions_beside_views() -> Made:
    """The places of a batch as the target of a wrapped cross_entropy of similarities."""
    a, b = (functional.normalize(torch.randn(32, 16, requires_grad=True), dim=1) for _ in range(2))
    wrapped: Any = lambda p, t: functional.cross_entropy(p, t)  # noqa: E731
    return wrapped, a @ b.T / 0.07, torch.arange(32)
