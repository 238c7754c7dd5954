"""How a loss is tried: on copies first, on the prediction with its graph where only that will do; and what that leaves.

Each correct use has the misuse beside it that looks like it and is still caught.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fallline import losses
from fallline.errors import InvalidHyperparameter, LossMismatch
from fallline.losses.misuse import check, checked
from fallline.losses.misuse.origin import origin

N = 64


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(11)


def network(width: int, outputs: int, *last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, outputs), *last)


def said(loss: Any, prediction: Any, target: Any = None, model: nn.Module | None = None) -> list[tuple[str, str]]:
    return [(found.severity, found.code) for found in check(loss, prediction, target, model)]


def severe(loss: Any, prediction: Any, target: Any = None, model: nn.Module | None = None) -> list[str]:
    return [code for severity, code in said(loss, prediction, target, model) if severity != "note"]


# Losses that need the graph.


def slope(u: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0].square().mean()


def test_a_loss_that_differentiates_with_respect_to_its_inputs_is_tried_with_the_graph() -> None:
    x, model = torch.linspace(0, 1, N)[:, None].requires_grad_(), network(1, 1)
    u = model(x)
    assert severe(slope, u, x) == severe(slope, u, x, model) == []
    assert torch.equal(checked(slope)(u, x), slope(u, x))
    slope(u, x).backward()  # the graph is still there, and nothing was left before
    assert model[0].weight.grad is not None
    known = lambda u, t: slope(u, x) + functional.mse_loss(u, t)  # noqa: E731
    assert severe(known, model(x), torch.zeros(N, 1), model) == []


def test_a_loss_that_needs_a_graph_that_is_not_there_fails() -> None:
    x, model = torch.linspace(0, 1, N)[:, None].requires_grad_(), network(1, 1)
    assert said(slope, model(x.detach()), x) == [("error", "fails")]
    assert said(slope, model(x).detach(), x.detach()) == [("error", "fails")]
    assert ("error", "detached") in said(slope, model(x), x, network(3, 3))
    blown = lambda u, x: slope(u, x) / 0  # noqa: E731
    assert said(blown, model(x), x, model) == [("error", "not-finite")]


def test_hooks_and_kept_gradients_do_not_notice_a_loss_that_needs_the_graph() -> None:
    x, model, calls = torch.linspace(0, 1, N)[:, None].requires_grad_(), network(1, 1), []
    u = model(x)
    u.retain_grad()
    u.register_hook(calls.append)
    check(slope, u, x, model)
    assert calls == []
    assert u.grad is None
    assert x.grad is None


def test_a_loss_that_changes_its_target_finds_it_restored_after_each_try() -> None:
    x, model = torch.linspace(0, 1, N)[:, None].requires_grad_(), network(1, 1)

    def loss(u: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        inputs, goal = targets
        goal.sub_(1)
        return slope(u, inputs) + (u - goal).square().mean()

    goal = torch.ones(N, 1)
    assert severe(loss, model(x), (x, goal)) == []
    assert torch.equal(goal, torch.ones(N, 1))
    goal.requires_grad_()
    quiet = torch.no_grad()(lambda goal: goal.sub_(1))
    assert severe(lambda u, both: slope(u, both[0]) + 0 * quiet(both[1]).sum(), model(x), (x, goal)) == []
    assert torch.equal(goal, torch.ones(N, 1))


def test_a_loss_that_trains_through_something_else_than_its_prediction_is_no_error() -> None:
    model, x, target = network(8, 1), torch.randn(N, 8), torch.randn(N, 1)
    prediction = model(x)
    assert severe(lambda p, t: functional.mse_loss(prediction, t), prediction, target, model) == []
    cut = lambda p, t: functional.mse_loss(prediction.detach(), t)  # noqa: E731
    assert severe(cut, prediction, target, model) == ["detached"]


# Losses that work in place.


def clamped(p: Tensor, t: Tensor) -> Tensor:
    return functional.mse_loss(p.clamp_(-1, 1), t)


def masked(p: Tensor, t: Tensor) -> Tensor:
    return functional.mse_loss(p.masked_fill_(t < 0, 0), t)


def assigned(p: Tensor, t: Tensor) -> Tensor:
    p[t < 0] = 0
    return functional.mse_loss(p, t)


@pytest.mark.parametrize("loss", [clamped, masked, assigned])
def test_a_loss_may_change_its_prediction_in_place(loss: Any) -> None:
    model, x, target = network(8, 1), torch.randn(N, 8), torch.randn(N, 1)
    prediction = model(x)
    before = prediction.detach().clone()
    assert severe(loss, prediction, target, model) == severe(loss, prediction, target) == []
    assert torch.equal(prediction, before)
    assert severe(loss, model(x).detach(), target, model) == ["detached"]
    assert torch.isfinite(checked(loss)(model(x), target))


def test_a_loss_may_change_its_target_in_place_and_does_so_once() -> None:
    def loss(p: Tensor, t: Tensor) -> Tensor:
        t.sub_(1)
        return (p - t).abs().pow(1.5).mean()

    target = torch.zeros(N, 1)
    check(loss, torch.randn(N, 1), target)
    assert torch.equal(target, torch.zeros(N, 1))
    checked(loss)(torch.randn(N, 1), target)
    assert torch.equal(target, -torch.ones(N, 1))


# How it is called, and what it returns.


class OfOne(nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        return functional.softplus(-scores).mean()


@pytest.mark.parametrize("loss", [lambda scores: functional.softplus(-scores).mean(), OfOne()])
def test_a_loss_with_one_argument(loss: Any) -> None:
    scores = torch.randn(N, 1, requires_grad=True)
    assert severe(loss, scores) == severe(loss, scores, torch.ones(N, 1)) == []
    assert torch.equal(checked(loss)(scores), loss(scores))


def test_a_type_error_inside_a_loss_is_not_taken_for_another_way_to_call_it() -> None:
    def loss(p: Tensor, t: Tensor | None = None) -> Tensor:
        if t is not None:
            raise TypeError("the reason")
        return p.mean()

    [found] = check(loss, torch.randn(N), torch.randn(N))
    assert found.code == "fails"
    assert "the reason" in found.seen
    assert said(lambda p, t, x: p.mean(), torch.randn(N), torch.randn(N)) == [("error", "fails")]


@pytest.mark.parametrize(
    "packed",
    [
        lambda value: {"loss": value, "n": 1},
        lambda value: {"first": value / 2, "second": value / 2, "count": torch.tensor(3)},
        lambda value: (value, {"more": 1}),
        lambda value: [{"loss": value}],
        lambda value: ("name", value),
        lambda value: SimpleNamespace(loss=value, logits=None),
    ],
)
def test_a_loss_may_come_with_other_things(packed: Any) -> None:
    prediction, target = torch.randn(N, requires_grad=True), torch.randn(N)
    assert severe(lambda p, t: packed((p - t).abs().pow(1.5).mean()), prediction, target) == []
    assert severe(lambda p, t: packed((p.detach() - t).abs().mean()), prediction, target) == ["detached"]
    checked(lambda p, t: packed((p - t).square().mean()))(prediction, target)


@pytest.mark.parametrize("value", [None, "text", {}, {"text": "text"}, (), object()])
def test_what_holds_no_number_fails(value: Any) -> None:
    assert said(lambda p, t: value, torch.randn(N), torch.randn(N)) == [("error", "fails")]


# Pairs on purpose.


def test_all_pairs_that_are_meant_are_no_finding_and_those_that_happen_are_a_warning() -> None:
    prediction, target = torch.randn(N, 1), torch.randn(N) + 1
    energy = lambda p, t: 2 * (p - t[None]).abs().mean() - (p - p.T).abs().mean()  # noqa: E731
    kernel = lambda p, t: (-(p - p.T).square()).exp().mean() - 2 * (-(p - t[None]).square()).exp().mean()  # noqa: E731
    assert severe(energy, prediction, target) == severe(kernel, prediction, target) == []
    power = lambda p, t: (p - t).abs().pow(1.7).mean()  # noqa: E731
    focal = lambda p, t: (p.sigmoid() - t.float()).abs().pow(3).mean()  # noqa: E731
    assert said(power, prediction, target) == [("warning", "broadcast")]
    assert said(focal, prediction, (target > 1).int()) == [("warning", "broadcast")]
    assert severe(lambda p, t: power(p.squeeze(1), t), prediction, target) == []


# The wrong way, or another way.

LABELS = torch.arange(N) % 5
YES = (torch.arange(N) % 2).float()
PUSHES_AWAY = {
    "negative advantages": (
        lambda p, t: (functional.cross_entropy(p, t, reduction="none") * -torch.linspace(0.1, 1, N)).mean(),
        (N, 5),
        LABELS,
    ),
    "distances": (lambda p, t: functional.cross_entropy(-p, t), (N, 5), LABELS),
    "unlikelihood": (lambda p, t: -(1 - p.softmax(1).gather(1, t[:, None]) + 1e-6).log().mean(), (N, 5), LABELS),
    "ranks": (
        lambda p, t: functional.binary_cross_entropy_with_logits(p, (t[:, None] > torch.arange(4)).float()),
        (N, 4),
        LABELS,
    ),
    "energies": (
        lambda p, t: (functional.softplus(p) * t + functional.softplus(-p) * (1 - t)).mean(),
        (N,),
        YES,
    ),
    "returns below 0": (lambda p, t: -(p * t).mean(), (N,), -torch.linspace(0.1, 1, N)),
    "shifted inside": (
        lambda p, t: functional.cross_entropy(p[:, :-1].reshape(-1, 50), t[:, 1:].reshape(-1)),
        (4, 16, 50),
        torch.arange(64).reshape(4, 16) % 50,
    ),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", PUSHES_AWAY)
def test_what_pushes_away_from_labels_on_purpose_is_no_warning(name: str, seed: int) -> None:
    loss, shape, target = PUSHES_AWAY[name]
    torch.manual_seed(seed)
    assert "rewards-errors" not in severe(loss, torch.randn(shape) - 6 * (name == "returns below 0"), target)


def intersection(p: Tensor, t: Tensor) -> Tensor:
    p, hot = p.softmax(1), functional.one_hot(t, 5)
    return ((p * hot).sum() + 1) / ((p + hot - p * hot).sum() + 1)


@pytest.mark.parametrize(
    ("loss", "shape", "target"),
    [
        (lambda p, t: -functional.cross_entropy(p, t), (N, 5), LABELS),
        (lambda p, t: 3 - 2 * functional.cross_entropy(p, t), (N, 5), LABELS),
        (lambda p, t: p.log_softmax(1).gather(1, t[:, None]).mean(), (N, 5), LABELS),
        (intersection, (N, 5), LABELS),
        (lambda p, t: -functional.binary_cross_entropy(p.sigmoid(), t), (N,), YES),
        (lambda p, t: -functional.soft_margin_loss(p, 2 * t - 1), (N,), YES),
        (lambda p, t: -functional.soft_margin_loss(p, t), (N,), 2 * YES - 1),
        (
            lambda p, t: torch.distributions.Normal(p, 0.3).log_prob(t).mean(),
            (N, 2),
            torch.linspace(-2, 2, 128).reshape(N, 2),
        ),
    ],
)
def test_what_is_minus_a_known_loss_is_a_warning(loss: Any, shape: tuple[int, ...], target: Tensor) -> None:
    assert said(loss, torch.randn(shape), target) == [("warning", "rewards-errors")]
    assert "rewards-errors" not in severe(lambda p, t: -loss(p, t), torch.randn(shape), target)


# Gradients of 0.


def test_a_bias_that_cancels_and_an_expert_without_samples_are_notes_at_most() -> None:
    layer = nn.Linear(16, 8)
    first, second = layer(torch.randn(N, 16)), layer(torch.randn(N, 16))
    assert said(nn.MSELoss(), (first - second).norm(dim=1), torch.rand(N), layer) == []

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 3) for _ in range(4))
            self.gate = nn.Linear(8, 4)

        def forward(self, x: Tensor, used: int) -> Tensor:
            weights = self.gate(x).softmax(1)
            return sum(weights[:, [i]] * each(x) * float(i >= 4 - used) for i, each in enumerate(self.experts))  # type: ignore[return-value]

    mixture = Mixture()
    x, target = torch.randn(N, 8), torch.arange(N) % 3
    assert said("cross_entropy", mixture(x, 2), target, mixture) == [("note", "zero-gradient")]
    assert said("cross_entropy", mixture(x, 4), target, mixture) == []


def test_layers_that_pass_nothing_on_are_a_warning() -> None:
    x, target = torch.randn(N, 8), torch.randn(N, 1)
    saturated = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    assert said("mse", saturated(1e6 * x), target, saturated) == [("warning", "zero-gradient")]
    dead = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    with torch.no_grad():
        dead[0].bias -= 100
    assert said("mse", dead(x), target, dead) == [("warning", "zero-gradient")]
    behind = nn.Sequential(nn.LayerNorm(8), *dead)
    assert said("mse", behind(x), target, behind) == [("warning", "zero-gradient")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_is_told_from_a_large_loss_by_its_gradient(dtype: torch.dtype) -> None:
    prediction = torch.randn(N, 5, dtype=dtype)
    far = lambda p, t: (p - t).square().mean() + p.abs().mean()  # noqa: E731
    raised = lambda p, t: (p - t).abs().pow(1.5).mean() + 1e8  # noqa: E731
    constant = lambda p, t: p.softmax(1).sum(1).mean() + 0 * t.sum()  # noqa: E731
    assert "zero-gradient" not in severe(far, prediction, 1e4 * torch.randn(N, 5, dtype=dtype))
    assert "zero-gradient" not in severe(raised, prediction, torch.randn(N, 5, dtype=dtype))
    assert severe(constant, prediction, torch.randn(N, 5, dtype=dtype)) == ["zero-gradient"]


# Where numbers come from.

ARRANGED = {
    "as it is": lambda p: p,
    "reshaped": lambda p: p.reshape(16, 16).permute(1, 0) * 1.0,
    "one dimension": lambda p: p.squeeze(1),
    "cut": lambda p: p[:100],
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ARRANGED)
def test_the_origin_does_not_depend_on_how_the_numbers_are_arranged(name: str, bias: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1, bias=bias))
    logits = 0.2 * model(torch.randn(256, 8))
    assert origin(ARRANGED[name](logits)) == "linear"
    assert origin(ARRANGED[name](model(torch.randn(256, 8)).sigmoid())) == "sigmoid"
    assert origin(ARRANGED[name](model(torch.randn(256, 8)).tanh())) == "unknown"


def test_arranged_logits_that_lie_in_the_unit_interval_are_no_double_sigmoid() -> None:
    model, target = network(8, 1), (torch.arange(256) % 2).float().reshape(16, 16)
    with torch.no_grad():
        model[2].weight *= 0.2
        model[2].bias.fill_(0.5)
    logits = ARRANGED["reshaped"](model(torch.randn(256, 8)))
    assert severe(nn.BCEWithLogitsLoss(), logits, target, model) == []
    probabilities = ARRANGED["reshaped"](model(torch.randn(256, 8)).sigmoid())
    assert severe(nn.BCEWithLogitsLoss(), probabilities, target, model) == ["double-sigmoid"]


# What is left behind.


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), losses.focal(), lambda p, t: functional.nll_loss(-p.exp(), t)])
def test_no_hook_is_called_and_no_gradient_kept(loss: Any) -> None:
    model, calls = network(8, 5), []
    prediction = model(torch.randn(N, 8))
    prediction.retain_grad()
    prediction.register_hook(lambda gradient: calls.append("prediction"))
    model[0].weight.register_hook(lambda gradient: calls.append("parameter"))
    check(loss, prediction, LABELS, model)
    assert calls == []
    assert prediction.grad is None
    functional.cross_entropy(prediction, LABELS).backward()
    assert sorted(calls) == ["parameter", "prediction"]
    assert prediction.grad is not None
    kept = prediction.grad
    check(loss, prediction, LABELS)
    assert prediction.grad is kept


def test_backward_hooks_of_modules_are_not_called() -> None:
    model, calls = network(8, 5), []
    model.register_full_backward_hook(lambda *arguments: calls.append(1))
    assert said("cross_entropy", model(torch.randn(N, 8)), LABELS, model) == []
    assert calls == []


def test_forward_hooks_of_a_checked_module_are_called_by_the_training_loop_alone() -> None:
    loss, calls = nn.MSELoss(), []
    loss.register_forward_hook(lambda *arguments: calls.append("after"))
    loss.register_forward_pre_hook(lambda *arguments: calls.append("before"))
    safe = checked(loss)
    safe(torch.randn(8), torch.randn(8))
    assert calls == ["before", "after"]
    with pytest.raises(LossMismatch):
        safe(torch.randn(8, 1), torch.randn(8))


def test_an_unknown_callable_is_called_a_few_times_only() -> None:
    calls = []

    def loss(p: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return (p - t).abs().pow(1.7).mean()

    check(loss, torch.randn(N, 3), torch.randn(N, 3))
    assert len(calls) <= 8


def test_nested_tensors_are_left_alone() -> None:
    jagged = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=torch.jagged)
    assert check(lambda p, t: p.values().square().mean(), jagged) == []


def test_a_large_batch_is_tried_on_its_first_samples_and_as_a_whole_where_that_fails() -> None:
    sizes = []

    def loss(p: Tensor, t: Tensor) -> Tensor:
        sizes.append(len(p))
        return (p - t).abs().pow(1.7).mean()

    prediction, target = torch.randn(1_500_000), torch.randn(1_500_000)
    assert severe(loss, prediction, target) == []
    assert max(sizes) < len(prediction)
    weight = torch.rand(1_500_000)
    assert severe(lambda p, t: (weight * (p - t).abs().pow(1.7)).mean(), prediction, target) == []
    late = lambda p, t: (p - t).abs().pow(1.7).mean() if len(p) < 1_500_000 else p.detach().mean()  # noqa: E731
    assert severe(late, prediction, target) == []  # only the first samples were looked at
    early = lambda p, t: (p[:10].detach() - t[:10]).abs().mean()  # noqa: E731
    assert severe(early, prediction, target) == ["detached"]


# The wrapper.


@pytest.mark.parametrize("batches", [-1, 2.5, "x", True])
def test_batches_is_a_whole_number(batches: Any) -> None:
    with pytest.raises(InvalidHyperparameter, match="batches"):
        checked(nn.MSELoss(), batches)


def test_what_is_set_on_a_checked_object_is_set_on_the_object() -> None:
    class Weighted:
        weight = 1.0

        def __call__(self, p: Tensor, t: Tensor) -> Tensor:
            return self.weight * functional.mse_loss(p, t)

    loss = Weighted()
    safe: Any = checked(loss)
    prediction, target = torch.randn(8), torch.randn(8)
    safe.weight = 3.0
    assert loss.weight == 3.0
    torch.testing.assert_close(safe(prediction, target), 3 * functional.mse_loss(prediction, target))
