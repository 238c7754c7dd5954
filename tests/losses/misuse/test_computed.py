"""What computing the loss brings to light: failures, NaN, gradients that are missing, 0, or point the wrong way."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fallline import losses
from fallline.errors import LossMismatch, UnknownName
from fallline.losses.misuse import Finding, check, require

N = 64


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(5)


def network(outputs: int, *last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, outputs), *last)


def classes(count: int = 5) -> Tensor:
    return torch.arange(N) % count


def said(loss: Any, prediction: Any, target: Any = None, model: nn.Module | None = None) -> list[tuple[str, str]]:
    return [(found.severity, found.code) for found in check(loss, prediction, target, model)]


def severe(loss: Any, prediction: Any, target: Any = None, model: nn.Module | None = None) -> list[str]:
    return [code for severity, code in said(loss, prediction, target, model) if severity != "note"]


# Failures.


def test_an_exception_becomes_a_finding_with_its_reason() -> None:
    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        raise KeyError("the reason")

    [found] = check(loss, torch.randn(N), torch.randn(N))
    assert (found.severity, found.code) == ("error", "fails")
    assert "KeyError" in found.message
    assert "the reason" in found.message


def test_a_class_or_a_maker_in_place_of_a_loss_is_a_finding_and_an_unknown_name_an_error() -> None:
    for thing in (nn.MSELoss, losses.mse):
        assert said(thing, torch.randn(N), torch.randn(N)) == [("error", "fails")]
    with pytest.raises(UnknownName):
        check("crossentropie", torch.randn(N), torch.randn(N))


def test_several_errors_are_raised_together() -> None:
    with pytest.raises(LossMismatch, match=r"(?s)2 ways.*1\. .*target\.to.*2\. "):
        require(
            losses.binary_cross_entropy_with_logits(pos_weight=torch.ones(3)),
            torch.randn(N, 1),
            torch.ones(N, 1).double(),
        )


def test_what_is_no_error_is_returned_in_the_order_of_severity() -> None:
    loss = nn.KLDivLoss(log_target=True)
    log = torch.randn(N, 3).log_softmax(1)
    found = require(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0])), torch.randn(N, 2), classes(2))
    assert [each.severity for each in found] == ["warning"]
    both = require(loss, log.exp().log(), log.flip(0))
    assert [each.severity for each in both] == ["warning"]
    mixed = check(nn.MSELoss(reduction="sum"), torch.randn(N, 1), 1e4 + torch.arange(N)[:, None])
    assert [each.severity for each in mixed] == sorted((each.severity for each in mixed), key="error warning note".find)


def test_a_loss_that_returns_more_than_the_loss() -> None:
    assert severe(lambda p, t: ((p - t).square().mean(), {"more": 1}), torch.randn(N), torch.randn(N)) == []
    inside = lambda p, t: {"loss": (p - t).square().mean()}  # noqa: E731
    assert severe(inside, torch.randn(N), torch.randn(N)) == []
    assert said(lambda p, t: "much", torch.randn(N), torch.randn(N)) == [("error", "fails")]
    assert said("quantile", torch.randn(N, 3), torch.randn(N)) == [("error", "shape")]
    assert said(lambda p, t: (p - t).square(), torch.randn(N), torch.randn(N)) == [("note", "reduction")]


def test_a_template_is_checked_with_an_example_of_its_search() -> None:
    import fallline as fl

    assert severe(losses.huber(delta=fl.log_uniform(0.1, 10)), torch.randn(N), torch.randn(N)) == []
    assert severe(losses.huber(delta=fl.log_uniform(0.1, 10)), torch.randn(N, 1), torch.randn(N)) == ["broadcast"]


# Numbers that are none.


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_inputs(value: float) -> None:
    prediction, target = torch.randn(N, 5), torch.randn(N, 5)
    prediction[3, 2] = value
    found = check("mse", prediction, target)
    assert [(each.severity, each.code) for each in found] == [("error", "not-finite")]
    assert "1 of 320" in found[0].seen
    assert "isfinite(prediction)" in found[0].fix
    assert "isfinite(target)" in check("mse", target, prediction)[0].fix
    assert severe(nn.MSELoss(), target, prediction) == ["not-finite"]
    assert said(nn.MSELoss(reduction="none"), target, prediction)[0] == ("warning", "not-finite")
    assert severe("cross_entropy", prediction, classes()) == ["not-finite"]


def test_masked_logits_are_fine_unless_a_label_is_masked() -> None:
    logits = torch.randn(N, 5).masked_fill(torch.arange(5) == 4, -math.inf)
    assert severe(nn.CrossEntropyLoss(), logits, classes(4)) == []
    assert severe(nn.CrossEntropyLoss(), logits, classes(5)) == ["not-finite"]


def test_a_loss_or_a_gradient_that_is_not_finite() -> None:
    same = torch.randn(N)
    wrong = [("error", "not-finite")]
    assert said(lambda p, t: (p - t).log().mean(), torch.randn(N), torch.randn(N)) == wrong
    root = lambda p, t: (p - t).square().sum().sqrt()  # noqa: E731
    assert said(root, same, same.clone()) == wrong  # 0 / 0 in its gradient
    assert said(root, same.half(), same.half()) == [("warning", "not-finite")]
    overflow = lambda p, t: (p * 1e4).square().mean()  # noqa: E731
    assert said(overflow, same.half(), None) == [("warning", "not-finite")]
    assert severe(lambda p, t: (p - t).square().mean().sqrt(), torch.randn(N), same) == []
    large = torch.full((N,), 300.0).half()
    assert said(nn.MSELoss(), large, -large)[0] == ("warning", "not-finite")


def test_missing_values_that_a_callable_leaves_out_are_its_own_business() -> None:
    target = torch.randn(N)
    target[::3] = math.nan
    assert severe(lambda p, t: (p - t)[~t.isnan()].square().mean(), torch.randn(N), target) == []


# Gradients of the prediction.


def test_a_loss_that_is_cut_off_from_its_prediction() -> None:
    logits, prediction, target = torch.randn(N, 5), torch.randn(N), torch.randn(N)
    cut = [("error", "detached")]
    assert said(lambda p, t: (p.argmax(1) != t).float().mean(), logits, classes()) == cut
    assert said(lambda p, t: (p - t).square().mean().item(), prediction, target) == cut
    assert said(lambda p, t: (p.detach() - t).square().mean(), prediction, target) == cut


def test_a_loss_that_is_constant_or_flat() -> None:
    assert severe(lambda p, t: p.softmax(1).sum(1).mean(), torch.randn(N, 5), torch.randn(N, 5)) == ["zero-gradient"]
    far = lambda p, t: (p.clamp(5, 6) - t).square().mean()  # noqa: E731
    assert severe(far, torch.randn(N), torch.randn(N)) == ["zero-gradient"]
    kept = 5 * (2.0 * (classes(2)) - 1)
    assert severe("hinge", kept, kept.sign()) == []  # every margin is kept: nothing to learn, and nothing wrong


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCELoss()])
def test_saturated_and_wrong(loss: nn.Module) -> None:
    target = (torch.arange(N) % 2).float()
    wrong = (300 * torch.randn(N)).sigmoid()
    assert "saturated" in severe(loss, wrong, target)
    assert severe(loss, torch.randn(N).sigmoid(), target) == []
    assert severe(loss, target.clone(), target) == []
    if isinstance(loss, nn.MSELoss):
        assert severe(loss, torch.zeros(N), target) == []  # a layer that starts at 0
        assert "saturated" in severe(loss, (300 * torch.randn(N)).tanh(), 2 * target - 1)


def test_a_hinge_by_hand_wants_signs() -> None:
    target = (torch.arange(N) % 2).float()
    hinge = lambda p, t: (1 - t * p).clamp(min=0).mean()  # noqa: E731
    assert "target-coding" in [code for _, code in said(hinge, torch.randn(N), target)]
    shifted = lambda p, t: (1.5 - t * p).clamp(min=0).pow(1.5).mean()  # noqa: E731
    assert said(shifted, torch.randn(N), target) == [("note", "target-coding")]  # like no loss that is known
    assert said(hinge, torch.randn(N), 2 * target - 1) == []


def test_a_sum_by_hand_is_a_note() -> None:
    assert said(lambda p, t: (p - t).square().sum(), torch.randn(N), torch.randn(N)) == [("note", "reduction")]
    assert said(lambda p, t: (p - t).square().mean(), torch.randn(N), torch.randn(N)) == []


# Gradients of the model.


def test_a_model_whose_parameters_all_move() -> None:
    model, x = network(5), torch.randn(N, 8)
    assert said("cross_entropy", model(x), classes(), model) == []


def test_a_detached_prediction_is_an_error_only_where_it_should_train() -> None:
    model, x = network(1), torch.randn(N, 8)
    target = torch.randn(N, 1)
    assert said("mse", model(x).detach(), target, model) == [("error", "detached")]
    assert said("mse", model(x).detach(), target) == []
    with torch.no_grad():
        assert said("mse", model(x), target, model) == []
    with torch.inference_mode():
        assert said("mse", model(x), target, model) == []
    assert said("mse", model.eval()(x).detach(), target, model) == [("note", "detached")]


def test_the_wrong_model_and_a_frozen_one() -> None:
    model, other, x = network(1), network(1), torch.randn(N, 8)
    assert said("mse", other(x), torch.randn(N, 1), model) == [("error", "detached")]
    frozen = network(1).requires_grad_(False)
    assert said("mse", frozen(x), torch.randn(N, 1), frozen) == [("warning", "detached")]
    assert said("mse", frozen(x.requires_grad_()), torch.randn(N, 1), frozen) == []


def test_checkpoints_hide_their_parameters() -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = network(5), torch.randn(N, 8, requires_grad=True)
    for reentrant in (True, False):
        assert said("cross_entropy", checkpoint(model, x, use_reentrant=reentrant), classes(), model) == []


def test_parameters_that_are_left_out() -> None:
    body, head, spare, x = network(16), nn.Linear(16, 5), nn.Linear(16, 2), torch.randn(N, 8)
    both = nn.ModuleList([body, head, spare])
    assert said("cross_entropy", head(body(x)), classes(), both) == [("note", "zero-gradient")]
    cut = nn.ModuleList([body, head])
    found = check("cross_entropy", head(body(x).detach()), classes(), cut)
    assert [(each.severity, each.code) for each in found] == [("warning", "zero-gradient")]
    assert "0.0.weight" in found[0].seen
    body.requires_grad_(False)
    assert said("cross_entropy", head(body(x)), classes(), cut) == []


def test_zeros_that_explain_zero_gradients() -> None:
    x, target = torch.randn(N, 8), torch.randn(N, 1)
    last = network(1)
    nn.init.zeros_(last[2].weight)
    assert said("mse", last(x), target, last) == []

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(8, 1).requires_grad_(False)
            self.a, self.b = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.zeros(2, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x @ self.a @ self.b

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.gamma, self.out = nn.Linear(8, 8), nn.Parameter(torch.zeros(8)), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x + self.gamma * self.block(x))

    for model in (LowRank(), Residual()):
        assert said("mse", model(x), target, model) == []


def test_zero_gradients_that_nothing_explains() -> None:
    x, target = torch.randn(N, 8), torch.randn(N, 1)
    dead = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    with torch.no_grad():
        dead[0].bias -= 100
    assert said("mse", dead(x), target, dead) == [("warning", "zero-gradient")]
    zero = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    for parameter in zero.parameters():
        nn.init.zeros_(parameter)
    assert severe("mse", zero(x), target, zero) == ["zero-gradient"]
    rounded = network(1)
    assert said("mse", rounded(x).round(), target, rounded) == [("error", "zero-gradient")]


def test_a_model_of_nan() -> None:
    model = network(1)
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    prediction = network(1)(torch.randn(N, 8))
    assert said("mse", prediction, torch.randn(N, 1), model) == [("error", "not-finite")]


# The direction.

SCORES = {
    "minus_mse": lambda p, t: -(p - t).square().mean(),
    "minus_l1": lambda p, t: -(p - t).abs().mean(),
    "similarity": lambda p, t: functional.cosine_similarity(p, t).mean(),
    "determination": lambda p, t: 1 - (p - t).square().sum() / (t - t.mean()).square().sum(),
    "correlation": lambda p, t: torch.corrcoef(torch.stack([p.flatten(), t.flatten()]))[0, 1],
}


@pytest.mark.parametrize("name", SCORES)
def test_a_score_that_is_minimised(name: str) -> None:
    prediction, target = torch.randn(N, 3), torch.randn(N, 3)
    score = SCORES[name]
    assert severe(score, prediction, target) == ["rewards-errors"]
    assert severe(lambda p, t: -score(p, t), prediction, target) == []


def test_a_forgotten_minus_of_classes_and_of_yes_and_no() -> None:
    logits, yes = torch.randn(N, 5), (torch.arange(N) % 2).float()
    assert said(lambda p, t: -functional.cross_entropy(p, t), logits, classes()) == [("warning", "rewards-errors")]
    likelihood = lambda p, t: p.log_softmax(1).gather(1, t[:, None]).mean()  # noqa: E731
    assert severe(likelihood, logits, classes()) == ["rewards-errors"]
    binary = lambda p, t: (t * functional.logsigmoid(p) + (1 - t) * functional.logsigmoid(-p)).mean()  # noqa: E731
    assert severe(binary, torch.randn(N), yes) == ["rewards-errors"]
    dice = lambda p, t: 2 * (p.sigmoid() * t).sum() / (p.sigmoid().sum() + t.sum())  # noqa: E731
    assert severe(dice, torch.randn(N), yes) == ["rewards-errors"]
    assert severe(lambda p, t: 1 - dice(p, t), torch.randn(N), yes) == []
    assert severe(lambda p, t: (p - t).mean(), torch.randn(N), torch.randn(N)) == ["rewards-errors"]
    assert severe(-1.0 * losses.mse(), torch.randn(N), torch.randn(N)) == ["rewards-errors"]
    assert severe(losses.mse() + -0.1 * losses.l1(), 3 * torch.randn(N), torch.randn(N)) == []


LEGITIMATE = {
    "ranking": (lambda p, t: -functional.logsigmoid(p - t).mean(), torch.randn(N) + 2, torch.randn(N) - 2),
    "repulsion": (lambda p, t: (-(p - t).square()).exp().mean(), torch.randn(N), torch.randn(N)),
    "generator": (lambda p, t: -p.mean(), torch.randn(N), torch.randn(N)),
    "policy": (
        lambda p, t: (torch.linspace(-1, 1, N) * p.log_softmax(1).gather(1, t[:, None]).squeeze(1)).mean(),
        torch.randn(N, 5),
        torch.arange(N) % 5,
    ),
    "contrast": (
        lambda p, t: functional.cross_entropy(p @ t.T, torch.arange(len(p))),
        torch.randn(N, 8),
        torch.randn(N, 8),
    ),
    "negative_likelihood": (lambda p, t: ((p - t).square() * 50 - 3).mean(), torch.randn(N) / 50, torch.zeros(N)),
    "distance": (
        lambda d, t: (t * d.square() + (1 - t) * (1 - d).clamp(min=0).square()).mean(),
        torch.rand(N) * 0.8,
        (torch.arange(N) % 2).float(),
    ),
    "overshooting": (nn.functional.mse_loss, 3 * (2.0 * (torch.arange(N) % 2) - 1), (torch.arange(N) % 2).float()),
    "few": (lambda p, t: -(p - t).square().mean(), torch.randn(4), torch.randn(4)),
}


def test_a_push_away_from_real_targets_is_a_note() -> None:
    away = lambda p, t: (functional.cosine_similarity(p, t) - 0.2).clamp(min=0).mean()  # noqa: E731
    target = functional.normalize(torch.randn(N, 6))
    assert said(away, torch.randn(N, 6), target) == [("note", "rewards-errors")]


@pytest.mark.parametrize("name", LEGITIMATE)
def test_what_legitimately_moves_away_is_no_warning(name: str) -> None:
    assert severe(*LEGITIMATE[name]) == []


def test_the_sign_is_seen_through_a_squeeze() -> None:
    column, row = torch.randn(N, 1), torch.randn(N)
    assert severe(lambda p, t: -(p.squeeze(1) - t).square().mean(), column, row) == ["rewards-errors"]
    assert severe(lambda p, t: (p.squeeze(1) - t).square().mean(), column, row) == []


def test_a_critic_of_two_outputs_is_left_alone() -> None:
    made, real = network(1)(torch.randn(N, 8)), network(1)(torch.randn(N, 8))
    assert severe(lambda p, t: p.mean() - t.mean(), made, real) == []


# Nothing is touched.


def test_nothing_changes() -> None:
    model, x = network(5), torch.randn(N, 8)
    prediction, target = model(x), classes()
    before = prediction.detach().clone()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            self.calls += 1
            noise = torch.rand(1) + random.random() + float(np.random.rand())
            prediction.mul_(1.0) if not prediction.requires_grad else None
            return functional.cross_entropy(prediction, target) * (1 + 0 * noise)

    loss = Noisy()
    check(loss, prediction, target, model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert loss.calls == 0
    assert torch.equal(prediction.detach(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    functional.cross_entropy(prediction, target).backward()  # the graph is still there
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_nothing_is_printed_or_warned(capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    check(nn.MSELoss(), torch.randn(N, 3), torch.randn(N, 1))
    check(lambda p, t: functional.mse_loss(p, t), torch.randn(N, 1), torch.randn(N))
    check(nn.KLDivLoss(), torch.randn(N, 3).log_softmax(1), torch.randn(N, 3).softmax(1))
    assert capsys.readouterr().out == ""
    assert len(recwarn) == 0


@pytest.mark.parametrize("name", sorted(losses.registry))
def test_the_examples_of_the_catalogue_are_correct_uses(name: str) -> None:
    from fallline.losses.catalogue import CATALOGUE

    info = CATALOGUE[name]
    prediction, target = info.example(torch.Generator().manual_seed(1))
    for arguments in info.valid:
        if "ignore_index" not in arguments:  # of a class that occurs
            assert severe(info.make(**arguments), prediction, target) == []


def test_large_tensors_are_judged_by_a_part_of_them() -> None:
    prediction, target = torch.randn(40_000, 50), torch.randint(50, (40_000,))
    assert severe("cross_entropy", prediction, target) == []
    assert severe("cross_entropy", prediction.softmax(1), target) == ["double-softmax"]
    target[-1] = 50
    assert severe("cross_entropy", prediction, target) == ["label-range"]
    wrong: list[Finding] = check(lambda p, t: -(p - t).square().mean(), torch.randn(300_000), torch.randn(300_000))
    assert [each.code for each in wrong] == ["rewards-errors"]


def test_numpy_arrays_and_sparse_targets_are_tensors() -> None:
    assert severe("mse", torch.randn(4, 4), np.ones((4, 4), dtype=np.float32)) == []
    assert severe(nn.MSELoss(), torch.randn(4, 4), torch.eye(4).to_sparse()) == []
