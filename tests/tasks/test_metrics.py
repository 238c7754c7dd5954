"""Metrics have the values that a hand computes, also under vmap, and suit the kind of the loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import vmap

from fallline import losses
from fallline.errors import UnknownName
from fallline.losses import as_loss
from fallline.tasks import metrics

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 1.0, 5.0], [4.0, 1.0, 5.0]])


def test_accuracy_counts_right_labels() -> None:
    assert metrics.accuracy()(LOGITS, torch.tensor([0, 1, 0, 0])) == 0.5


def test_accuracy_leaves_ignored_labels_out() -> None:
    assert metrics.accuracy()(LOGITS, torch.tensor([0, -100, 0, -100])) == 0.5
    assert metrics.accuracy()(LOGITS, torch.full((4,), -100)) == 0


def test_accuracy_takes_further_dimensions_and_probabilities() -> None:
    prediction = torch.stack([LOGITS, LOGITS.flip(1)], dim=2)
    target = torch.tensor([[0, 0], [1, 1], [2, 2], [2, 2]])
    assert metrics.accuracy()(prediction, target) == 5 / 8
    probabilities = nn.functional.one_hot(torch.tensor([0, 1, 0, 0]), 3).float()
    assert metrics.accuracy()(LOGITS, probabilities) == 0.5


def test_binary_accuracy_has_a_threshold() -> None:
    prediction, target = (
        torch.tensor([[-1.0], [0.2], [0.9], [0.4]]),
        torch.tensor([[0.0], [1.0], [1.0], [0.0]]),
    )
    assert metrics.binary_accuracy()(prediction, target) == 0.75
    assert metrics.binary_accuracy(threshold=0.5)(prediction, target) == 0.75
    assert metrics.binary_accuracy(threshold=0.3)(prediction, target) == 0.5


def test_errors_are_means_over_all_elements() -> None:
    prediction, target = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert metrics.mse()(prediction, target) == 13 / 4
    assert metrics.mae()(prediction, target) == 5 / 4


@pytest.mark.parametrize("metric", [make() for make in metrics.registry.values()], ids=lambda metric: metric.name)
def test_a_metric_of_a_population_is_that_of_each_trial(metric: metrics.Metric) -> None:
    predictions = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 1, 2, -100]) if metric.name == "accuracy" else (predictions[0] > 0.3).float()
    together = vmap(metric, in_dims=(0, None))(predictions, target)
    torch.testing.assert_close(together, torch.stack([metric(each, target) for each in predictions]))
    assert together.dtype == predictions.dtype


@pytest.mark.parametrize(
    ("loss", "name", "higher_is_better"),
    [
        (losses.cross_entropy(), "accuracy", True),
        (nn.NLLLoss(), "accuracy", True),
        (losses.binary_cross_entropy_with_logits(), "binary accuracy", True),
        (losses.mse(), "mse", False),
        (nn.MSELoss(), "mse", False),
        (losses.l1(), "mae", False),
        (losses.huber(), "mae", False),
        (nn.SmoothL1Loss(), "mae", False),
        (nn.functional.l1_loss, "mae", False),
        (lambda p, t: (p - t).abs().max(), "validation loss", False),
    ],
)
def test_each_kind_of_loss_has_its_metric(loss: object, name: str, higher_is_better: bool) -> None:
    metric = metrics.for_loss(as_loss(loss))
    assert (metric.name, metric.higher_is_better) == (name, higher_is_better)


def test_a_loss_of_probabilities_is_judged_at_one_half() -> None:
    prediction, target = torch.tensor([[0.2], [0.8]]), torch.tensor([[0.0], [1.0]])
    for loss in (nn.BCELoss(), nn.functional.binary_cross_entropy):
        assert metrics.for_loss(as_loss(loss))(prediction, target) == 1


def test_the_validation_loss_is_the_loss() -> None:
    loss = losses.mse()
    assert metrics.validation_loss(loss)(LOGITS, LOGITS + 1) == 1


def test_metrics_come_from_names_and_callables() -> None:
    assert metrics.as_metric("mae").name == "mae"
    assert metrics.as_metric(metrics.accuracy()).higher_is_better

    def worst(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (prediction - target).abs().max()

    metric = metrics.as_metric(worst)
    assert (metric.name, metric.higher_is_better) == ("worst", False)


@pytest.mark.parametrize(
    ("thing", "words"),
    [("acuracy", "Did you mean 'accuracy'"), (metrics.accuracy, "call it"), (3, "of type int")],
)
def test_what_is_no_metric_is_refused(thing: object, words: str) -> None:
    with pytest.raises(UnknownName, match=words):
        metrics.as_metric(thing)
