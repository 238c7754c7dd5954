"""Arguments that a loss refuses when it is made, and those that torch takes and the check speaks of."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from fallline import losses
from fallline.errors import InvalidHyperparameter, UnknownArgument, UnknownName
from fallline.losses.misuse import check


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (losses.huber, {"delta": 0}),
        (losses.huber, {"delta": -1.0}),
        (losses.huber, {"delta": float("nan")}),
        (losses.huber, {"delta": "1"}),
        (losses.cross_entropy, {"label_smoothing": 1.5}),
        (losses.cross_entropy, {"label_smoothing": -0.1}),
        (losses.cross_entropy, {"weight": [float("nan"), 1.0]}),
        (losses.cross_entropy, {"weight": [[1.0, 1.0]]}),
        (losses.cross_entropy, {"ignore_index": 1.0}),
        (losses.binary_cross_entropy_with_logits, {"pos_weight": -1}),
        (losses.mse, {"reduction": "average"}),
    ],
)
def test_arguments_outside_their_domain_are_refused(make: object, argument: dict[str, object]) -> None:
    with pytest.raises(InvalidHyperparameter, match=next(iter(argument))):
        make(**argument)  # type: ignore[operator]


@pytest.mark.parametrize("name", sorted(losses.registry))
def test_a_misspelt_keyword_names_the_nearest(name: str) -> None:
    known = "weights" if name == "weighted_sum" else "reduction"
    misspelt = "wieghts" if name == "weighted_sum" else "reductoin"
    with pytest.raises(UnknownArgument, match=rf"{name}\(\) has no argument '{misspelt}'\. Did you mean '{known}'\?"):
        losses.get(name)(**{misspelt: "sum"})


def test_a_misspelt_name_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'cross_entropy'"):
        losses.get("crossentropy")


def test_a_subclass_is_judged_as_the_loss_that_it_computes() -> None:
    class Mine(nn.CrossEntropyLoss):
        pass

    class Other(nn.CrossEntropyLoss):
        def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return functional.nll_loss(prediction.log(), target)

    probabilities, target = torch.randn(64, 4).softmax(1), torch.arange(64) % 4
    assert [found.code for found in check(Mine(), probabilities, target)] == ["double-softmax"]
    assert check(Other(), probabilities, target) == []
    found = check(Mine(ignore_index=3), probabilities.log(), target)
    assert {each.code for each in found} == {"ignored-class", "log-softmax-twice"}


def test_a_number_for_a_variance_and_shapes_without_values() -> None:
    assert check(nn.GaussianNLLLoss(), (torch.randn(32, 1), 0.5), torch.randn(32, 1)) == []
    empty = torch.randn(4, 3, device="meta")
    assert check(nn.MSELoss(), empty, empty) == []


def test_what_torch_takes_and_fallline_refuses_is_named_with_its_reason() -> None:
    found = check(nn.HingeEmbeddingLoss(margin=-1.0), torch.rand(8), torch.ones(8))
    assert [(each.severity, each.code) for each in found if each.code == "domain"] == [("warning", "domain")]
    assert "margin=-1.0" in found[0].seen
    negative = partial(functional.cross_entropy, weight=torch.tensor([1.0, -1.0]))
    found = check(negative, torch.randn(8, 2), torch.arange(8) % 2)
    assert [(each.severity, each.code) for each in found] == [("error", "class-weights")]
