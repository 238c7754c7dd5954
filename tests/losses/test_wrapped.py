"""Whatever serves as a loss is accepted, used exactly as it is, and checked where it is one of torch's."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fallline import losses
from fallline.errors import InvalidHyperparameter, LossMismatch, UnknownArgument, UnknownName
from fallline.losses import as_loss
from fallline.losses.catalogue import CATALOGUE
from fallline.losses.wrapped import FUNCTIONS

GENERATOR = torch.Generator().manual_seed(0)
OUTPUTS = torch.randn(6, 3, generator=GENERATOR)
NUMBERS = torch.randn(6, 3, generator=GENERATOR)
INDEX = torch.tensor([0, 2, 1, 1, 0, -100])

# Modules with parameters of their own, and one that is given a distance.
OWN_WEIGHTS = {"AdaptiveLogSoftmaxWithLoss", "LinearCrossEntropyLoss", "TripletMarginWithDistanceLoss", "NLLLoss2d"}
KNOWN = [
    (nn.MSELoss(), "regression", OUTPUTS, NUMBERS),
    (nn.L1Loss(reduction="sum"), "regression", OUTPUTS, NUMBERS),
    (nn.SmoothL1Loss(beta=0.5), "regression", OUTPUTS, NUMBERS),
    (nn.HuberLoss(delta=0.5), "regression", OUTPUTS, NUMBERS),
    (nn.CrossEntropyLoss(label_smoothing=0.1), "classification", OUTPUTS, INDEX),
    (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])), "classification", OUTPUTS, INDEX),
    (nn.CrossEntropyLoss(), "classification", OUTPUTS, NUMBERS.softmax(1)),
    (nn.NLLLoss(weight=torch.tensor([1.0, 2.0, 3.0])), "classification", OUTPUTS.log_softmax(1), INDEX),
    (nn.BCELoss(), "binary", OUTPUTS.sigmoid(), NUMBERS.sigmoid()),
    (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)), "binary", OUTPUTS, NUMBERS.sigmoid()),
    (functional.mse_loss, "regression", OUTPUTS, NUMBERS),
    (functional.l1_loss, "regression", OUTPUTS, NUMBERS),
    (functional.smooth_l1_loss, "regression", OUTPUTS, NUMBERS),
    (partial(functional.huber_loss, delta=0.5), "regression", OUTPUTS, NUMBERS),
    (functional.cross_entropy, "classification", OUTPUTS, INDEX),
    (
        partial(functional.nll_loss, ignore_index=2),
        "classification",
        OUTPUTS.log_softmax(1),
        INDEX.clamp(min=0),
    ),
    (functional.binary_cross_entropy, "binary", OUTPUTS.sigmoid(), NUMBERS.sigmoid()),
    (functional.binary_cross_entropy_with_logits, "binary", OUTPUTS, NUMBERS.sigmoid()),
]


@pytest.mark.parametrize(("thing", "kind", "prediction", "target"), KNOWN)
def test_torchs_own_losses_are_used_as_they_are(thing, kind: str, prediction: Tensor, target: Tensor) -> None:  # type: ignore[no-untyped-def]
    loss = as_loss(thing)
    assert loss.kind == kind
    assert torch.equal(loss(prediction, target), thing(prediction, target))
    values, weights = loss.terms(prediction, target, loss.numbers)
    total = values.sum() if loss.reduction == "sum" else values.mean()
    if weights is not None:
        total = values.sum() / weights.sum()
    torch.testing.assert_close(total, thing(prediction, target))
    assert loss.per_sample(prediction, target).shape == (6,)


@pytest.mark.parametrize(("thing", "kind", "prediction", "target"), KNOWN)
def test_it_is_known_what_torchs_own_losses_want(thing, kind: str, prediction: Tensor, target: Tensor) -> None:  # type: ignore[no-untyped-def]
    ours = losses.get(as_loss(thing).kin)()
    assert (as_loss(thing).prediction, as_loss(thing).target) == (ours.prediction, ours.target)
    wrong = target[:, None].float() if kind != "classification" else INDEX + 7
    assert "error" in {found.severity for found in losses.check(thing, prediction, wrong)}
    assert "error" not in {found.severity for found in losses.check(thing, prediction, target)}


def test_every_one_of_torchs_losses_is_known() -> None:
    ours = {make.__name__: info.plain() for make, info in ((i.make, i) for i in CATALOGUE.values())}
    torchs = {name for name in dir(nn) if name.endswith("Loss") and name not in OWN_WEIGHTS}
    assert {loss.torch_name for loss in ours.values()} - {""} == torchs
    assert set(FUNCTIONS.values()) == {name for name, loss in ours.items() if loss.torch_name}
    assert all(hasattr(functional, name) for name in FUNCTIONS)


def test_torchs_losses_of_several_parts_take_them_as_a_model_gives_them() -> None:
    mean, variance, target = OUTPUTS[:, 0], OUTPUTS[:, 1].exp(), NUMBERS[:, 0]
    loss = as_loss(nn.GaussianNLLLoss())
    expected = nn.GaussianNLLLoss()(mean, target, variance)
    torch.testing.assert_close(loss((mean, variance), target), expected)
    torch.testing.assert_close(loss(torch.stack([mean, variance], 1), target), expected)
    assert torch.equal(loss(mean, target, variance), expected)


def test_a_module_is_not_changed_by_being_wrapped() -> None:
    module = nn.MSELoss()
    as_loss(module).per_sample(OUTPUTS, NUMBERS)
    assert module.reduction == "mean"


def test_any_callable_is_a_loss_of_kind_other() -> None:
    def furthest(prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).abs().max()

    loss = as_loss(furthest)
    assert (loss.name, loss.kind) == ("furthest", "other")
    assert loss(OUTPUTS, NUMBERS) == furthest(OUTPUTS, NUMBERS)
    with pytest.raises(LossMismatch, match="furthest gives one number for a batch"):
        loss.per_sample(OUTPUTS, NUMBERS)


def test_a_module_of_ones_own_is_a_loss_too() -> None:
    class Furthest(nn.Module):
        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            return (prediction - target).abs().max()

    class Ignorant(Furthest):
        reduction = "mean"

    for module in (Furthest(), Ignorant()):
        loss = as_loss(module)
        assert loss(OUTPUTS, NUMBERS) == module(OUTPUTS, NUMBERS)
        with pytest.raises(LossMismatch, match="one number for a batch"):
            loss.per_sample(OUTPUTS, NUMBERS)


def test_batchmean_sums_within_a_sample() -> None:
    module = nn.KLDivLoss(reduction="batchmean")
    loss = as_loss(module)
    prediction, target = OUTPUTS.log_softmax(1), NUMBERS.softmax(1)
    torch.testing.assert_close(loss.per_sample(prediction, target).mean(), module(prediction, target))


@pytest.mark.parametrize(
    ("thing", "code"),
    [
        (nn.MSELoss(), "torch.nn.MSELoss()"),
        (nn.HuberLoss(delta=2.0), "torch.nn.HuberLoss(delta=2.0)"),
        (
            nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0])),
            "torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))",
        ),
        (functional.mse_loss, "torch.nn.functional.mse_loss"),
        (
            partial(functional.huber_loss, delta=2.0),
            "functools.partial(torch.nn.functional.huber_loss, delta=2.0)",
        ),
        ("l1", "torch.nn.L1Loss()"),
    ],
)
def test_the_code_of_a_wrapped_loss_makes_it_again(thing: object, code: str) -> None:
    assert as_loss(thing).code() == code


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        ("mes", "Did you mean 'mse'"),
        (nn.MSELoss, r"MSELoss\(\)"),
        (losses.mse, r"call it, mse\(\)"),
        (3, "of type int"),
        (None, "of type NoneType"),
    ],
)
def test_what_is_no_loss_is_refused(thing: object, words: str) -> None:
    with pytest.raises(UnknownName, match=words):
        as_loss(thing)


@pytest.mark.parametrize("thing", [nn.MSELoss(reduction="none"), partial(functional.mse_loss, reduction="none")])
def test_a_loss_without_reduction_is_refused(thing: object) -> None:
    with pytest.raises(LossMismatch, match="reduction='mean'"):
        as_loss(thing)


def test_a_wrapped_loss_survives_pickling() -> None:
    for thing in (nn.HuberLoss(delta=2.0), functional.mse_loss, partial(functional.huber_loss, delta=2.0)):
        loss = as_loss(thing)
        again = pickle.loads(pickle.dumps(loss))
        assert torch.equal(again(OUTPUTS, NUMBERS), loss(OUTPUTS, NUMBERS))
        assert again.code() == loss.code()


def test_what_torch_takes_and_ours_refuses_is_used_all_the_same() -> None:
    odd = nn.CrossEntropyLoss(label_smoothing=1.0, weight=torch.tensor([1.0, float("inf"), 1.0]))
    loss = as_loss(odd)
    assert loss.kind == "other"
    assert torch.equal(loss(OUTPUTS, INDEX).isnan(), odd(OUTPUTS, INDEX).isnan())


def test_a_loss_passes_through() -> None:
    loss = losses.mse()
    assert as_loss(loss) is loss


def test_numbers_that_a_loss_does_not_have_or_cannot_have_are_refused() -> None:
    with pytest.raises(UnknownArgument, match="no argument 'dleta'"):
        losses.huber()(OUTPUTS, NUMBERS, numbers={"dleta": 1.0})
    for loss, name, value in ((losses.huber(), "delta", -1.0), (losses.smooth_l1(), "beta", float("nan"))):
        with pytest.raises(InvalidHyperparameter, match=name):
            loss(OUTPUTS, NUMBERS, numbers={name: value})
    with pytest.raises(LossMismatch, match="expects a dictionary"):
        losses.huber()(OUTPUTS, NUMBERS, numbers=3)  # type: ignore[arg-type]
    torch.testing.assert_close(
        losses.huber()(OUTPUTS, NUMBERS, numbers={"delta": 0.3}), losses.huber(delta=0.3)(OUTPUTS, NUMBERS)
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((OUTPUTS,), "None as its target"),
        ((None, INDEX), "None as its prediction"),
        ((OUTPUTS, [0, 1]), "torch.tensor"),
    ],
)
def test_what_is_no_tensor_is_refused_in_a_sentence(arguments: tuple[object, ...], words: str) -> None:
    with pytest.raises(LossMismatch, match=words):
        losses.cross_entropy()(*arguments)


def test_sums_take_torchs_losses_and_weights_that_are_differentiated() -> None:
    mse, l1 = losses.mse(), nn.L1Loss()
    expected = mse(OUTPUTS, NUMBERS) + l1(OUTPUTS, NUMBERS)
    for both in (mse + l1, l1 + mse, sum([mse, l1]), mse + functional.l1_loss):
        torch.testing.assert_close(both(OUTPUTS, NUMBERS), expected)  # type: ignore[operator]
    slope = torch.func.grad(lambda w: (mse + w * losses.l1())(OUTPUTS, NUMBERS))(torch.tensor(0.5))
    torch.testing.assert_close(slope, l1(OUTPUTS, NUMBERS))
    levels = torch.tensor([[0.1, 0.5], [0.2, 0.9]])
    two = OUTPUTS[:, :2]
    mapped = torch.vmap(lambda q: losses.quantile(quantiles=(q[0], q[1]))(two, NUMBERS[:, 0]))(levels)
    for value, (low, high) in zip(mapped, levels.tolist(), strict=True):
        torch.testing.assert_close(value, losses.quantile(quantiles=(low, high))(two, NUMBERS[:, 0]))
