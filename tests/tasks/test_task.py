"""A task takes what users give, checks it before the first step, and says what is wrong in a sentence."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fallline import losses
from fallline.errors import InvalidTask, LossMismatch, UnknownArgument, UnknownName
from fallline.tasks import Data, Task
from fallline.tasks.metrics import mae

X = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10) % 4
NUMBERS = X.sum(1, keepdim=True)


def classifier() -> nn.Module:
    return nn.Linear(3, 4)


def regressor() -> nn.Module:
    return nn.Linear(3, 1)


def task(**changes: Any) -> Task:
    arguments: dict[str, Any] = {
        "name": "t",
        "model": classifier,
        "train": (X, LABELS),
        "loss": "cross_entropy",
    }
    return Task(**{**arguments, **changes})


def test_defaults_split_a_fifth_off_and_choose_metric_and_batch_size() -> None:
    made = task()
    assert (len(made.train), len(made.validation)) == (8, 2)
    assert (made.batch_size, made.drop_last, made.shuffle) == (8, False, True)
    assert (made.loss.name, made.metric.name, made.metric_was_given) == ("cross_entropy", "accuracy", False)
    assert task(train=(X.repeat(20, 1), LABELS.repeat(20))).batch_size == 64
    assert task(metric="mae").metric_was_given


def test_the_split_is_drawn_by_its_seed() -> None:
    assert torch.equal(task(split_seed=5).validation.x, task(split_seed=5).validation.x)
    assert not torch.equal(task(split_seed=5).validation.x, task(split_seed=6).validation.x)
    assert len(task(validation_fraction=0.5).validation) == 5


def test_validation_data_may_be_given_or_be_the_training_data() -> None:
    given = task(validation=(X[:4], LABELS[:4]))
    assert (len(given.train), len(given.validation)) == (10, 4)
    same = task(validation="train").check()
    assert same.validation is same.train
    assert len(same.train) == 10


def test_a_loader_sets_the_batches_and_arguments_override_it() -> None:
    loader: DataLoader[Any] = DataLoader(TensorDataset(X, LABELS), batch_size=3, drop_last=True)
    made = task(train=loader)
    assert (made.batch_size, made.drop_last, made.shuffle) == (3, True, False)
    made = task(train=loader, batch_size=5, drop_last=False, shuffle=True)
    assert (made.batch_size, made.drop_last, made.shuffle) == (5, False, True)


def test_check_gives_floating_data_the_models_type() -> None:
    arrays = (X.numpy().astype("float64"), NUMBERS.numpy().astype("float64"))
    made = task(model=regressor, train=arrays, loss="mse").check()
    assert {made.train.x.dtype, made.train.y.dtype, made.validation.x.dtype} == {torch.float32}
    double = task(model=lambda: regressor().double(), train=arrays, loss="mse").check()
    assert {double.train.x.dtype, double.train.y.dtype, double.validation.y.dtype} == {torch.float64}
    assert task().check().train.y.dtype == torch.int64


def test_check_leaves_the_callers_random_state_alone_and_works_once() -> None:
    calls = []

    def counted() -> nn.Module:
        calls.append(1)
        return classifier()

    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    made = task(model=counted).check().check()
    assert torch.equal(torch.randn(3), expected)
    assert made.describe()["parameters"] == 16
    assert len(calls) == 1


def test_a_model_is_what_its_seed_makes() -> None:
    torch.manual_seed(3)
    expected = classifier().state_dict()
    for name, value in task().build_model(3).state_dict().items():
        assert torch.equal(value, expected[name])


def test_describe_fits_into_json() -> None:
    description = task(source="made here").describe()
    assert json.loads(json.dumps(description)) == description
    assert description["samples"] == 8
    assert description["validation_samples"] == 2
    assert description["loss"] == "torch.nn.CrossEntropyLoss()"
    assert (description["metric"], description["higher_is_better"]) == ("accuracy", True)
    assert (description["dtype"], description["source"]) == ("float32", "made here")


def test_another_loss_keeps_data_and_metric() -> None:
    first = task(model=regressor, train=(X, NUMBERS), loss="mse").check()
    second = first.with_loss(losses.huber(delta=0.5)).check()
    assert (first.loss.name, second.loss.name, second.metric.name) == ("mse", "huber", "mse")
    assert second.train.x is not None
    assert torch.equal(second.train.x, first.train.x)
    with pytest.raises(LossMismatch):
        first.with_loss("cross_entropy").check()


def test_a_task_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        task().batch_size = 3  # type: ignore[misc]


@pytest.mark.parametrize("batch_size", [0, -1, True, 2.0, "8"])
def test_a_batch_size_that_is_no_positive_whole_number_is_refused(batch_size: object) -> None:
    with pytest.raises(InvalidTask, match="whole number ≥ 1"):
        task(batch_size=batch_size)


def test_an_epoch_without_a_batch_is_refused() -> None:
    with pytest.raises(InvalidTask, match="leaves no batch"):
        task(batch_size=9, drop_last=True)
    assert task(batch_size=9).batch_size == 9
    assert task(batch_size=8, drop_last=True).batch_size == 8


def test_a_misspelt_keyword_names_the_nearest() -> None:
    with pytest.raises(UnknownArgument, match=r"Task has no argument 'bach_size'\. Did you mean 'batch_size'"):
        task(bach_size=3)


def test_a_misspelt_loss_or_metric_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="'cross_entropy'"):
        task(loss="crossentropy")
    with pytest.raises(UnknownName, match="'accuracy'"):
        task(metric="acuracy")


def lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.LazyLinear(4)


def frozen() -> nn.Module:
    return nn.Linear(3, 4).requires_grad_(False)


def broken() -> nn.Module:
    raise KeyError("layers")


class Collapsing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum(1)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(3, 4), r"Write model=lambda: Linear\(\.\.\.\)"),
        (None, "given as None"),
        (lambda: 3, "returned a int"),
        (lambda: nn.ReLU(), "no parameter to train"),
        (frozen, "no parameter to train"),
        (lazy, "lazy parameters"),
        (broken, "fails: KeyError: 'layers'"),
        (lambda: nn.Linear(5, 4), r"inputs of shape \[8, 3\] and type float32: RuntimeError: mat1 and mat2"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(model: Any, words: str) -> None:
    with pytest.raises(InvalidTask, match=words):
        task(model=model).check()


def nan(prediction: Tensor, target: Tensor) -> Tensor:
    return prediction.mean() * float("nan")


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda p, t: (p - t).square(), r"returns a tensor of shape \[8, 1\]"),
        (lambda p, t: 3.0, "returned a float"),
        (lambda p, t: (p - t).mean().item(), "without .item"),
        (nan, "gave nan"),
        (lambda p, t: p.nonsense, "raised AttributeError"),
    ],
)
def test_a_loss_that_is_not_one_finite_number_is_refused(loss: Callable[..., Any], words: str) -> None:
    with pytest.raises((InvalidTask, LossMismatch), match=words):
        task(model=regressor, train=(X, NUMBERS), loss=loss).check()


def test_a_metric_that_is_not_one_number_is_refused() -> None:
    with pytest.raises(InvalidTask, match="metric 'metric' of task 't' returns a tensor of shape"):
        task(metric=lambda p, t: p).check()


@pytest.mark.parametrize("part", ["train", "validation"])
def test_every_label_is_looked_at_not_only_the_first_batch(part: str) -> None:
    labels = LABELS.clone()
    labels[9] = 4
    changes: dict[str, Any] = {"train": (X, LABELS), "validation": (X, LABELS), part: (X, labels)}
    with pytest.raises(LossMismatch, match=r"the label 4 \(of sample 9\) for 4 classes"):
        task(batch_size=2, **changes).check()
    task(batch_size=2, train=(X, LABELS), validation=(X, LABELS)).check()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": (X, LABELS.float())}, "target.long()"),
        ({"train": (X, LABELS[:, None])}, "target.squeeze"),
        ({"model": regressor, "train": (X, NUMBERS[:, 0]), "loss": "mse"}, "target.unsqueeze"),
        ({"model": lambda: Collapsing(3, 4)}, "one output for each class"),
    ],
)
def test_targets_that_do_not_suit_the_loss_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LossMismatch, match=words):
        task(**changes).check()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": (X[:1], LABELS[:1])}, "at least 2"),
        ({"train": (X[:0], LABELS[:0])}, "no samples"),
        ({"train": (X, LABELS), "validation": (X[:3], LABELS[:2])}, "validation data hold 3 inputs"),
        ({"validation": "test"}, "only 'train' is expected"),
        ({"validation_fraction": 0.0}, "between 0 and 1"),
        ({"train": (X / 0, LABELS)}, "train x is (NaN|infinite) at sample 0"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidTask, match=words):
        task(**changes)


def test_one_sample_will_do_where_nothing_is_split_off() -> None:
    assert len(task(train=(X[:1], LABELS[:1]), validation="train").check().train) == 1


def test_a_metric_and_a_name_of_ones_own_are_kept() -> None:
    made = task(model=regressor, train=Data(X, NUMBERS), loss=nn.MSELoss(), metric=mae(), name="mine")
    assert (made.name, made.metric.name) == ("mine", "mae")
    assert repr(made) == "Task('mine', 8 + 2 samples, loss=MSELoss, metric=mae, batch_size=8)"
