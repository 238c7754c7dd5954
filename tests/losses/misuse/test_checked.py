"""A checked loss is the loss, with the same values, gradients and attributes; only its first batches are looked at."""

from __future__ import annotations

import copy
import functools
import pickle
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fallline import losses
from fallline.errors import LossMismatch, LossMisused, UnknownName
from fallline.losses.misuse import checked
from fallline.losses.wrapped import understood


def written_by_hand(prediction: Tensor, target: Tensor, power: float = 2.0) -> Tensor:
    return (prediction - target).abs().pow(power).mean()


LOSSES: dict[str, Any] = {
    "module": nn.MSELoss(),
    "function": functional.mse_loss,
    "partial": functools.partial(functional.huber_loss, delta=0.5),
    "fallline": losses.huber(delta=0.7),
    "by hand": written_by_hand,
}


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_the_same(name: str) -> None:
    loss, prediction = LOSSES[name], torch.randn(16, 2, requires_grad=True)
    target = torch.randn(16, 2)
    safe = checked(loss)
    for _ in range(5):
        [expected] = torch.autograd.grad(loss(prediction, target), prediction)
        value = safe(prediction, target)
        assert torch.equal(value, loss(prediction, target))
        assert torch.equal(torch.autograd.grad(value, prediction)[0], expected)
    assert prediction.grad is None


@pytest.mark.parametrize("name", [*LOSSES, "name"])
def test_the_first_batches_are_checked_and_no_more(name: str) -> None:
    loss = "mse" if name == "name" else LOSSES[name]
    safe: Any = checked(loss, batches=2)
    column, row = torch.randn(8, 1), torch.randn(8)
    for _ in range(2):
        with pytest.raises(LossMismatch, match="Mend it with"):  # a refused batch does not count
            safe(column, row)
        assert safe(row, row.flip(0)).ndim == 0
    if name in ("name", "fallline"):  # these refuse by themselves
        assert type(safe) is losses.Loss
        with pytest.raises(LossMismatch, match="would be broadcast") as caught:
            safe(column, row)
        assert "Mend it with" not in str(caught.value)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert safe(column, row).ndim == 0


def test_a_module_stays_a_module_and_becomes_what_it_was() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)
    safe = checked(loss)
    assert isinstance(safe, nn.CrossEntropyLoss)
    assert (safe.reduction, safe.label_smoothing) == ("mean", 0.1)
    assert list(safe.state_dict()) == list(loss.state_dict()) == ["weight"]
    assert repr(safe) == repr(loss)
    safe.double()
    assert safe.weight.dtype == loss.weight.dtype == torch.float64
    assert type(safe) is nn.CrossEntropyLoss
    for _ in range(3):
        assert "forward" in vars(safe)
        safe(torch.randn(6, 3).double(), torch.arange(6) % 3)
    assert vars(safe).keys() == vars(loss).keys()


def test_what_is_set_on_a_checked_module_is_what_is_checked() -> None:
    safe = checked(nn.CrossEntropyLoss())
    with pytest.raises(LossMismatch, match="label 255"):
        safe(torch.randn(6, 3), torch.tensor([0, 1, 2, 255, 0, 1]))
    safe.ignore_index = 255
    safe(torch.randn(6, 3), torch.tensor([0, 1, 2, 255, 0, 1]))


def test_a_module_with_parameters_trains() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_weight = nn.Parameter(torch.zeros(()))

        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            return self.log_weight.exp() * functional.mse_loss(prediction, target) - self.log_weight

    loss = Weighted()
    safe = checked(loss)
    assert [id(each) for each in safe.parameters()] == [id(each) for each in loss.parameters()]
    safe(torch.randn(8), torch.randn(8)).backward()
    assert loss.log_weight.grad is not None


def test_each_warning_is_given_once_and_points_to_the_training_loop() -> None:
    log, target = torch.randn(8, 3).log_softmax(1), torch.randn(8, 3).softmax(1)
    for loss in (nn.KLDivLoss(), functional.kl_div, losses.kl_div(reduction="mean")):
        safe = checked(loss)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            safe(log, target)
            safe(log, target)
        [warned] = [each for each in caught if each.category is LossMisused]
        assert warned.filename == __file__
        assert "Mend it with" in str(warned.message)


def test_more_than_two_tensors_in_torchs_order() -> None:
    mean, target, variance = torch.randn(8, 1), torch.randn(8, 1), torch.rand(8, 1)
    assert torch.equal(
        checked(nn.GaussianNLLLoss())(mean, target, variance), nn.GaussianNLLLoss()(mean, target, variance)
    )
    by_name = checked(functional.gaussian_nll_loss)(mean, target=target, var=variance)
    assert torch.equal(by_name, functional.gaussian_nll_loss(mean, target, variance))
    ours = checked(losses.gaussian_nll())
    assert torch.isfinite(ours(mean, target, variance))
    for loss in (nn.GaussianNLLLoss(), functional.gaussian_nll_loss):
        with pytest.raises(LossMismatch, match="broadcast"):
            checked(loss)(mean, target.squeeze(1), variance)
    anchor, positive, negative = torch.randn(3, 8, 4)
    own = nn.TripletMarginWithDistanceLoss()
    assert torch.equal(checked(own)(anchor, positive, negative), own(anchor, positive, negative))
    with pytest.warns(LossMisused, match="anchor and as positive"):
        checked(nn.TripletMarginLoss())(anchor, anchor, negative)


def test_keywords_of_a_function_are_its_settings() -> None:
    safe = checked(functional.cross_entropy)
    labels = torch.tensor([0, 1, 255, 2])
    with pytest.raises(LossMismatch, match="label 255"):
        safe(torch.randn(4, 3), labels)
    assert torch.isfinite(safe(torch.randn(4, 3), target=labels, ignore_index=255))
    assert torch.isfinite(safe(input=torch.randn(4, 3), target=labels.clamp(max=2)))


def test_a_checked_loss_is_understood_as_what_it_wraps() -> None:
    assert understood(checked(functional.cross_entropy)).prediction == "logits"
    assert understood(checked(nn.NLLLoss())).prediction == "log-probabilities"
    assert understood(checked(losses.mse())).name == "mse"
    assert checked(written_by_hand).__name__ == "written_by_hand"
    with pytest.raises(UnknownName):
        checked("no such loss")
    assert checked(written_by_hand, batches=0) is written_by_hand


@pytest.mark.parametrize("name", LOSSES)
def test_copies_and_pickles(name: str) -> None:
    prediction, target = torch.randn(8), torch.randn(8)
    safe = checked(LOSSES[name])
    if name != "fallline":  # which travels as the call that made it
        with pytest.raises(LossMismatch):
            pickle.loads(pickle.dumps(safe))(prediction[:, None], target)
    for other in (copy.deepcopy(safe), copy.copy(safe), pickle.loads(pickle.dumps(safe))):
        assert torch.equal(other(prediction, target), LOSSES[name](prediction, target))


@pytest.mark.parametrize("name", LOSSES)
def test_compile_vmap_and_grad_pass_through(name: str) -> None:
    prediction, target = torch.randn(4, 8), torch.randn(4, 8)
    loss = LOSSES[name]
    torch._dynamo.reset()
    compiled = torch.compile(checked(loss), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(prediction, target), loss(prediction, target))
    torch.testing.assert_close(torch.vmap(checked(loss))(prediction, target), torch.vmap(loss)(prediction, target))
    gradient = torch.func.grad(checked(loss))(prediction, target)
    torch.testing.assert_close(gradient, torch.func.grad(loss)(prediction, target))


@pytest.mark.parametrize("name", LOSSES)
def test_later_batches_cost_next_to_nothing(name: str) -> None:
    prediction, target = torch.randn(64, 10), torch.randn(64, 10)
    loss, safe = LOSSES[name], checked(LOSSES[name])
    for _ in range(5):
        safe(prediction, target)

    def seconds(call: Any) -> float:
        best = float("inf")
        for _ in range(15):
            start = time.perf_counter()
            for _ in range(50):
                call(prediction, target)
            best = min(best, (time.perf_counter() - start) / 50)
        return best

    # A batch of digits costs 300 µs and more; one per cent of that is 3 µs.
    assert seconds(safe) - seconds(loss) < 3e-6
