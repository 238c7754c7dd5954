"""Callables that compute one of torch's losses are known as what they compute; others are left unknown."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fallline.losses.misuse.check import check
from fallline.losses.misuse.given import given
from fallline.losses.misuse.recognised import recognised

N = 24


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).requires_grad_()


def labels(*shape: int, classes: int = 5) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(4))


def name_of(loss: Any, prediction: Tensor, target: Tensor) -> str:
    return recognised(given(loss, prediction, target, None)).name


def said(loss: Any, prediction: Tensor, target: Tensor) -> list[tuple[str, str]]:
    return [(found.severity, found.code) for found in check(loss, prediction, target) if found.severity != "note"]


class Own(nn.Module):
    """A loss of one's own."""

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return 0.5 * functional.cross_entropy(prediction, target) + 0.0


def shifted(prediction: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(prediction[:, :-1].reshape(-1, 5), target[:, 1:].reshape(-1))


@pytest.mark.parametrize(
    ("loss", "prediction", "target", "computes"),
    [
        (lambda p, t: functional.cross_entropy(p, t), drawn(N, 5), labels(N), "cross_entropy"),
        (lambda p, t: functional.cross_entropy(p, t, reduction="sum"), drawn(N, 5), labels(N), "cross_entropy"),
        (lambda p, t: functional.cross_entropy(p, t, label_smoothing=0.1), drawn(N, 5), labels(N), "cross_entropy"),
        (lambda p, t: -p.log_softmax(1).gather(1, t[:, None]).mean(), drawn(N, 5), labels(N), "cross_entropy"),
        (Own(), drawn(N, 5), labels(N), "cross_entropy"),
        (shifted, drawn(N, 7, 5), labels(N, 7), "cross_entropy"),
        (
            lambda p, t: functional.cross_entropy(p.view(-1, 5), t.view(-1)),
            drawn(N, 7, 5),
            labels(N, 7),
            "cross_entropy",
        ),
        (functools.partial(lambda k, p, t: k * functional.nll_loss(p, t), 3), drawn(N, 5), labels(N), "nll"),
        (lambda p, t: functional.multi_margin_loss(p, t), drawn(N, 5), labels(N), "multi_margin"),
        (
            lambda p, t: -(t * p.log_softmax(1)).sum(1).mean(),
            drawn(N, 5),
            drawn(N, 5).detach().softmax(1),
            "cross_entropy",
        ),
        (lambda p, t: ((p - t) ** 2).mean(), drawn(N, 1), 2 * drawn(N, 1).detach(), "mse"),
        (lambda p, t: (p.squeeze(-1) - t).abs().mean(), drawn(N, 1), drawn(N).detach(), "l1"),
        (lambda p, t: functional.huber_loss(p, t), drawn(N, 2), -drawn(N, 2).detach(), "smooth_l1"),
        (
            lambda p, t: functional.binary_cross_entropy(p.sigmoid(), t.float()),
            drawn(N, 1),
            labels(N, 1, classes=2),
            "binary_cross_entropy_with_logits",
        ),
        (
            lambda p, t: functional.binary_cross_entropy(p, t),
            drawn(N, 1).sigmoid(),
            labels(N, 1, classes=2).float(),
            "binary_cross_entropy",
        ),
        (
            lambda p, t: functional.kl_div(p, t, reduction="batchmean"),
            drawn(N, 5).log_softmax(1),
            drawn(N, 5).detach().softmax(1),
            "kl_div",
        ),
        (
            lambda p, t: functional.soft_margin_loss(p, t),
            drawn(N),
            2 * labels(N, classes=2).float() - 1,
            "soft_margin",
        ),
    ],
)
def test_what_computes_a_loss_of_torch_is_known_by_its_name(
    loss: Any, prediction: Tensor, target: Tensor, computes: str
) -> None:
    assert name_of(loss, prediction, target).endswith(f"(computes {computes})")


@pytest.mark.parametrize(
    ("loss", "prediction", "target"),
    [
        (lambda p, t: -functional.cross_entropy(p, t), drawn(N, 5), labels(N)),
        (lambda p, t: functional.cross_entropy(p / 2, t), drawn(N, 5), labels(N)),
        (lambda p, t: functional.cross_entropy(-p, t), drawn(N, 5), labels(N)),
        (lambda p, t: functional.cross_entropy(p, t) + 1e-3, drawn(N, 5), labels(N)),
        (lambda p, t: functional.cross_entropy(p, t, label_smoothing=0.2), drawn(N, 5), labels(N)),
        (lambda p, t: functional.cross_entropy(p.log(), t), drawn(N, 5).softmax(1), labels(N)),
        (lambda p, t: functional.mse_loss(p, t).sqrt(), drawn(N, 1), 2 * drawn(N, 1).detach()),
        (lambda p, t: functional.mse_loss(p + 0.1 * torch.randn_like(p), t), drawn(N, 1), 2 * drawn(N, 1).detach()),
        (
            lambda p, t: functional.binary_cross_entropy_with_logits(p, (t + 1) / 2),
            drawn(N, 1),
            2 * labels(N, 1, classes=2).float() - 1,
        ),
        (lambda p, t: functional.relu(1 - p * t).mean(), drawn(N), labels(N, classes=2).float()),
        (lambda p, t: (p * 0).sum() + 1.0, drawn(N, 5), labels(N)),
        (lambda p, t: torch.tensor(((p - t).detach().numpy() ** 2).mean()), drawn(N, 1), 2 * drawn(N, 1).detach()),
        (lambda p, t: functional.mse_loss(p.detach(), t) + 0 * p.sum(), drawn(N, 1), 2 * drawn(N, 1).detach()),
        (lambda p, t: functional.mse_loss(p, t) if len(p) == N else p.sum(), drawn(N, 1), 2 * drawn(N, 1).detach()),
        (lambda p, t: functional.mse_loss(p, t) if len(p) != N else p.sum(), drawn(N, 1), 2 * drawn(N, 1).detach()),
    ],
)
def test_what_computes_something_else_stays_unknown(
    loss: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, target: Tensor
) -> None:
    assert name_of(loss, prediction, target) == "lambda"


def test_the_rules_of_the_loss_hold_for_the_callable_at_their_severity() -> None:
    wrapped = lambda p, t: functional.cross_entropy(p, t)  # noqa: E731
    assert said(wrapped, drawn(N, 5).softmax(1), labels(N)) == [("error", "double-softmax")]
    assert said(wrapped, drawn(N, 5), labels(N) + 1) == [("error", "label-range")]
    assert said(wrapped, drawn(N, 5), torch.full((N,), -100)) == [("error", "all-ignored")]
    assert said(wrapped, drawn(N, 1), torch.zeros(N).long()) == [("error", "one-class")]
    assert said(wrapped, drawn(N, 5), labels(N)) == []


def test_padding_that_the_callable_ignores_is_no_label_out_of_range() -> None:
    target = torch.where(torch.arange(N) < 4, 255, labels(N))
    ignoring = lambda p, t: functional.cross_entropy(p, t, ignore_index=255)  # noqa: E731
    assert "cross_entropy" in name_of(ignoring, drawn(N, 5), target)
    assert said(ignoring, drawn(N, 5), target) == []


@pytest.mark.parametrize(
    ("loss", "code"),
    [
        (lambda p, t: functional.cross_entropy(p.softmax(1), t), "double-softmax"),
        (lambda p, t: functional.nll_loss(p.log_softmax(0), t), "softmax-axis"),
        (lambda p, t: functional.cross_entropy(p.softmax(0), t), "softmax-axis"),
        (lambda p, t: functional.cross_entropy(p.sigmoid(), t), "double-sigmoid"),
        (lambda p, t: functional.nll_loss(p.softmax(1), t), "not-log-probabilities"),
    ],
)
def test_a_step_too_many_inside_a_callable_is_warned_of(loss: Any, code: str) -> None:
    assert said(loss, drawn(N, 5), labels(N)) == [("warning", code)]


def test_the_callable_is_tried_at_most_three_times_and_nothing_is_disturbed() -> None:
    calls = []

    def counting(prediction: Tensor, target: Tensor) -> Tensor:
        calls.append(prediction.shape)
        prediction.mul_(1)
        return functional.cross_entropy(prediction, target) + 0 * torch.rand(())

    prediction, state = drawn(N, 5), torch.get_rng_state()
    before = prediction.detach().clone()
    assert "cross_entropy" in name_of(counting, prediction, labels(N))
    assert len(calls) <= 3
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(prediction, before)


def test_of_large_tensors_only_the_first_samples_are_tried() -> None:
    seen = []

    def counting(prediction: Tensor, target: Tensor) -> Tensor:
        seen.append(prediction.numel())
        return functional.mse_loss(prediction, target)

    big = torch.randn(1 << 14, 32, requires_grad=True)
    assert "mse" in name_of(counting, big, torch.zeros(1 << 14, 32))
    assert max(seen) <= 1 << 15
    wide = torch.randn(2, 1 << 17, requires_grad=True)
    seen.clear()
    assert "mse" not in name_of(counting, wide, torch.zeros(2, 1 << 17))
    assert seen == []


def test_half_precision_is_known_too() -> None:
    wrapped = lambda p, t: functional.cross_entropy(p, t)  # noqa: E731
    assert said(wrapped, drawn(N, 5).bfloat16().softmax(1), labels(N)) == [("error", "double-softmax")]
    assert "mse" in name_of(lambda p, t: ((p - t) ** 2).mean(), drawn(N, 1).double(), drawn(N, 1).detach().double() + 1)


def settings_of(loss: Any, prediction: Tensor, target: Tensor) -> Any:
    return recognised(given(loss, prediction, target, None)).settings


def test_the_reduction_is_known_and_a_multiple_has_none_of_its_own() -> None:
    summed = lambda p, t: functional.cross_entropy(p, t, reduction="sum")  # noqa: E731
    assert settings_of(summed, drawn(N, 5), labels(N))["reduction"] == "sum"
    assert settings_of(lambda p, t: summed(p, t) / len(p), drawn(N, 5), labels(N))["reduction"] == "mean"
    assert settings_of(lambda p, t: summed(p, t) / N, drawn(N, 5), labels(N))["reduction"] == "mean"


def test_losses_that_agree_on_small_errors_are_told_apart() -> None:
    small, near = drawn(N, 2).sigmoid(), drawn(N, 2).detach().sigmoid() ** 2
    assert "smooth_l1" in name_of(lambda p, t: functional.smooth_l1_loss(p, t), small, near)
    assert "mse" in name_of(lambda p, t: functional.mse_loss(p, t), small, near)


def test_what_the_callable_does_to_its_arguments_is_undone() -> None:
    target = labels(N, classes=2)
    squeezing = lambda p, t: functional.binary_cross_entropy_with_logits(p.squeeze(1), t.float())  # noqa: E731
    case = recognised(given(squeezing, drawn(N, 1), target, None))
    assert isinstance(case.prediction, Tensor)
    assert case.prediction.shape == (N,)
    half = drawn(N, 3).bfloat16()
    assert "mse" in name_of(lambda p, t: ((p - t) ** 2).mean(), half, (2 * half).detach())


def test_a_callable_that_empties_its_arguments_leaves_them_full() -> None:
    def emptying(prediction: Tensor, target: Tensor) -> Tensor:
        value = ((prediction - target) ** 2).mean()
        with torch.no_grad():
            target.zero_()
            prediction.data.zero_()
        return value

    prediction, target = drawn(N, 1), drawn(N, 1).detach() + 1
    name_of(emptying, prediction, target)
    assert bool(prediction.any())
    assert bool(target.any())
