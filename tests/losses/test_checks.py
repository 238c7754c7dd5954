"""Each check catches a misuse with a message that says how to mend it, and lets the correct uses pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from fallline import losses
from fallline.errors import InvalidHyperparameter, LossMismatch, UnknownArgument, UnknownName

ELEMENTWISE = ["mse", "l1", "huber", "binary_cross_entropy_with_logits"]
zeros, ones = torch.zeros, torch.ones


def label(*values: int) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize(
    ("prediction", "target", "fix"),
    [
        (zeros(3, 1), zeros(3), "target.unsqueeze(1)"),
        (zeros(3, 2, 1), zeros(3, 2), "target.unsqueeze(-1)"),
        (zeros(3), zeros(3, 1), "target.squeeze(-1)"),
        (zeros(4, 3), zeros(3, 4), "target.reshape(prediction.shape)"),
        (zeros(3, 2), zeros(3, 5), "as many outputs"),
        (zeros(3, 1), label(0, 1, 1)[:, None], "target.to(prediction.dtype)"),
        (zeros(3, 1), zeros(3, 1, dtype=torch.float64), "target.to(prediction.dtype)"),
        (label(1, 2), zeros(2), "without argmax"),
    ],
)
def test_elementwise_losses_refuse(name: str, prediction: Tensor, target: Tensor, fix: str) -> None:
    with pytest.raises(LossMismatch) as caught:
        losses.get(name)().check(prediction, target)
    assert fix in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 2, 2)])
def test_elementwise_losses_accept_equal_shapes(name: str, shape: tuple[int, ...]) -> None:
    losses.get(name)().check(zeros(shape), ones(shape))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_nothing_is_broadcast_when_called_even_under_vmap(name: str) -> None:
    loss = losses.get(name)()
    with pytest.raises(LossMismatch, match="would be broadcast"):
        loss(zeros(3, 1), zeros(3))
    with pytest.raises(LossMismatch, match="would be broadcast"):
        vmap(loss)(zeros(2, 3, 1), zeros(2, 3))


def test_probabilities_are_not_broadcast_when_called() -> None:
    with pytest.raises(LossMismatch):
        losses.cross_entropy()(zeros(3, 2), zeros(3, 1))


@pytest.mark.parametrize(
    ("prediction", "target", "fix"),
    [
        (zeros(3), label(0, 1, 0), "binary_cross_entropy_with_logits"),
        (zeros(3, 1), label(0, 0, 0), "one output for each class"),
        (zeros(3, 2), label(0, 1), "same samples"),
        (zeros(3, 2), label(0, 1, 1)[:, None], "target.squeeze(-1)"),
        (zeros(3, 2), zeros(3, 1), "target.squeeze(-1).long()"),
        (zeros(3, 2), zeros(3), "target.long()"),
        (zeros(3, 2), label(0, 1, 1).int(), "target.long()"),
        (zeros(2, 2), label(0, 1, 1, 0).reshape(2, 2), "target.argmax(1)"),
        (zeros(3, 5, 4), zeros(3, 5).long(), "prediction.movedim(-1, 1)"),
        (zeros(3, 2), label(0, 1, 2), "target - 1"),
        (zeros(3, 2), label(0, 9, 1), "10 outputs"),
        (zeros(3, 2), label(0, 1, -1), "ignore_index (-100)"),
        (zeros(2, 2), torch.tensor([[0.5, 0.5], [2.0, -1.0]]), "Normalise"),
        (zeros(2, 2, dtype=torch.float64), ones(2, 2) / 2, "target.to(prediction.dtype)"),
        (label(0, 1)[:, None].expand(2, 2), label(0, 1), "without argmax"),
    ],
)
def test_cross_entropy_refuses(prediction: Tensor, target: Tensor, fix: str) -> None:
    with pytest.raises(LossMismatch) as caught:
        losses.cross_entropy().check(prediction, target)
    assert fix in str(caught.value)


def test_a_label_out_of_range_is_shown_with_its_place() -> None:
    with pytest.raises(LossMismatch, match=r"the label 7 \(of sample 1, position \[2\]\) for 4 classes"):
        losses.cross_entropy().check(zeros(2, 4, 3), torch.tensor([[0, 1, 2], [3, 0, 7]]))


@pytest.mark.parametrize(
    ("prediction", "target"),
    [
        (zeros(3, 2), label(0, 1, -100)),
        (zeros(3, 2), label(1, 1, 1)),
        (zeros(2, 4, 3), zeros(2, 3).long()),
        (zeros(2, 4, 3), zeros(2, 4, 3)),
        (zeros(3, 2), ones(3, 2) / 2),
    ],
)
def test_cross_entropy_accepts(prediction: Tensor, target: Tensor) -> None:
    losses.cross_entropy().check(prediction, target)


def test_cross_entropy_checks_its_own_arguments_against_the_classes() -> None:
    losses.cross_entropy(weight=[1.0, 2.0]).check(zeros(3, 2), label(0, 1, 1))
    with pytest.raises(LossMismatch, match=r"class weights of shape \[3\] for 2 classes"):
        losses.cross_entropy(weight=[1.0, 2.0, 3.0]).check(zeros(3, 2), label(0, 1, 1))
    losses.cross_entropy(ignore_index=255).check(zeros(3, 2), label(0, 1, 255))
    with pytest.raises(LossMismatch, match="label 255"):
        losses.cross_entropy().check(zeros(3, 2), label(0, 1, 255))


@pytest.mark.parametrize(
    ("prediction", "target", "fix"),
    [
        (zeros(3, 1), torch.tensor([[-1.0], [1.0], [1.0]]), "(target + 1) / 2"),
        (zeros(3, 1), torch.tensor([[0.0], [2.0], [1.0]]), "0 for no and 1 for yes"),
        (zeros(3, 4), label(0, 1, 3), "cross_entropy"),
    ],
)
def test_binary_cross_entropy_refuses(prediction: Tensor, target: Tensor, fix: str) -> None:
    with pytest.raises(LossMismatch) as caught:
        losses.binary_cross_entropy_with_logits().check(prediction, target)
    assert fix in str(caught.value)


def test_binary_cross_entropy_checks_its_weights_against_the_outputs() -> None:
    each = losses.binary_cross_entropy_with_logits(pos_weight=torch.tensor([1.0, 2.0]))
    each.check(zeros(3, 2), ones(3, 2))
    with pytest.raises(LossMismatch, match="pos_weight of shape"):
        each.check(zeros(3, 4), ones(3, 4))
    with pytest.raises(LossMismatch, match="does not broadcast"):
        losses.binary_cross_entropy_with_logits(weight=ones(3, 3, 3))(zeros(3, 3), ones(3, 3))


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (losses.huber, {"delta": 0}),
        (losses.huber, {"delta": -1.0}),
        (losses.huber, {"delta": float("nan")}),
        (losses.huber, {"delta": "1"}),
        (losses.cross_entropy, {"label_smoothing": 1.5}),
        (losses.cross_entropy, {"label_smoothing": -0.1}),
        (losses.cross_entropy, {"weight": [-1.0, 1.0]}),
        (losses.cross_entropy, {"weight": [[1.0, 1.0]]}),
        (losses.cross_entropy, {"ignore_index": 1.0}),
        (losses.binary_cross_entropy_with_logits, {"pos_weight": -1}),
        (losses.mse, {"reduction": "none"}),
    ],
)
def test_arguments_outside_their_domain_are_refused(make: object, argument: dict[str, object]) -> None:
    with pytest.raises(InvalidHyperparameter, match=next(iter(argument))):
        make(**argument)  # type: ignore[operator]


@pytest.mark.parametrize("name", sorted(losses.registry))
def test_a_misspelt_keyword_names_the_nearest(name: str) -> None:
    with pytest.raises(UnknownArgument, match=rf"{name} has no argument 'reductoin'\. Did you mean 'reduction'\?"):
        losses.get(name)(reductoin="sum")


def test_a_misspelt_name_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'cross_entropy'"):
        losses.get("crossentropy")
