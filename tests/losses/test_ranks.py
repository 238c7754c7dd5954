"""CORAL: the sum of the binary cross-entropies of its thresholds, and the rank that a prediction stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_expit
from torch.func import vmap
from torch.nn import functional

from fallline.errors import LossMismatch
from fallline.losses.ranks import ordinal

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
WEIGHTS = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)


def drawn(seed, *shape):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ranks(seed, *shape):
    return torch.randint(4, shape, generator=torch.Generator().manual_seed(seed))


def value_and_gradient(loss, prediction, target):
    leaf = prediction.detach().clone().requires_grad_()
    value = loss(leaf, target)
    factors = 1 + torch.arange(value.numel(), dtype=value.dtype).reshape(value.shape) / value.numel()
    return value.detach(), torch.autograd.grad((value * factors).sum(), leaf)[0]


@settings(max_examples=40, deadline=None)
@given(
    further=st.sampled_from([(), (3,), (2, 2)]),
    weighted=st.booleans(),
    floating=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 10_000),
)
def test_it_is_torchs_binary_cross_entropy_summed_over_the_thresholds(further, weighted, floating, reduction, seed):
    prediction, target = drawn(seed, 6, 3, *further), ranks(seed, 6, *further)
    answers = torch.stack([target > k for k in range(3)], 1).double()
    assert torch.equal(answers.sum(1), target.double())

    def plain(f, _):
        values = functional.binary_cross_entropy_with_logits(f, answers, reduction="none")
        if weighted:
            values = values * WEIGHTS.reshape(3, *[1] * len(further))
        values = values.sum(1)
        return {"none": values, "sum": values.sum(), "mean": values.mean()}[reduction]

    loss = ordinal(importance_weights=WEIGHTS if weighted else None, reduction=reduction)
    expected, slopes = value_and_gradient(plain, prediction, target)
    assert slopes.abs().max() > 1e-6
    value, found = value_and_gradient(loss, prediction, target.double() if floating else target)
    torch.testing.assert_close(value, expected, **CLOSE)
    torch.testing.assert_close(found, slopes, **CLOSE)


def test_it_is_the_papers_equation():
    prediction, target = drawn(0, 5, 3), ranks(0, 5)
    total = 0.0
    for f, y in zip(prediction.numpy(), target.tolist(), strict=True):
        for k in range(3):
            answer = float(y > k)
            total -= log_expit(f[k]) * answer + (log_expit(f[k]) - f[k]) * (1 - answer)
    torch.testing.assert_close(ordinal()(prediction, target).item(), total / 5, rtol=1e-12, atol=1e-12)


def test_a_guess_further_off_costs_more():
    logits = torch.full((4, 3), -5.0)
    for guess in range(4):
        logits[guess, :guess] = 5.0  # passes so many thresholds
    costs = ordinal(reduction="none")(logits, torch.zeros(4, dtype=torch.int64))
    assert (costs.diff() > 4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_have_the_right_value_and_gradient(dtype):
    prediction = torch.tensor([[1e4, 1e4, -1e4], [1e4, -1e4, -1e4]], dtype=dtype)
    value, slopes = value_and_gradient(ordinal(reduction="none"), prediction, torch.tensor([2, 3]))
    assert value.tolist() == [0.0, 2e4]
    assert slopes.tolist() == [[0.0, 0.0, 0.0], [0.0, -1.5, -1.5]]


def test_the_estimate_is_the_number_of_thresholds_passed():
    prediction = torch.tensor([[1.0, 0.5, -0.5], [-1.0, -2.0, -3.0], [3.0, 2.0, 1.0], [0.0, -1.0, -1.0]])
    estimate = ordinal().estimate
    assert estimate(prediction).tolist() == [2.0, 0.0, 3.0, 0.0]
    assert estimate(prediction).dtype == torch.float32
    assert estimate(prediction[0]) == 2.0
    assert estimate(prediction.reshape(2, 2, 3).movedim(2, 1)).tolist() == [[2.0, 0.0], [3.0, 0.0]]
    assert vmap(estimate)(prediction.reshape(2, 2, 3)).tolist() == [[2.0, 0.0], [3.0, 0.0]]


def test_a_single_sample_needs_no_batch():
    prediction, target = drawn(0, 4, 3), ranks(0, 4)
    values = ordinal(reduction="none")(prediction, target)
    torch.testing.assert_close(ordinal()(prediction[1], target[1]), values[1], **CLOSE)


def test_the_layer_of_the_docstring_learns_ordered_thresholds_and_the_ranks():
    torch.manual_seed(0)
    lines = ordinal.__doc__.split("        class Thresholds")[1].split("    Prediction:")[0]
    scope = {"torch": torch}
    exec("\n".join(line[8:] for line in f"        class Thresholds{lines}".splitlines()), scope)
    model, loss = scope["Thresholds"](2, 4), ordinal()
    x = torch.randn(400, 2)
    target = torch.bucketize(x @ torch.tensor([1.0, -0.5]), torch.tensor([-1.0, 0.0, 0.7]))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss(model(x), target).backward()
        optimizer.step()
    assert (model.bias.diff() < 0).all()
    assert (loss.estimate(model(x)) == target).float().mean() > 0.95


@pytest.mark.parametrize(
    ("prediction", "target", "fix"),
    [((8, 3), (8, 1), "squeeze"), ((8, 3), (8, 3), "sum"), ((8, 3), (1,), "K − 1"), ((8, 3, 2), (8, 1), "K − 1")],
)
def test_shapes_that_do_not_fit_are_refused_with_the_fix(prediction, target, fix):
    with pytest.raises(LossMismatch, match=fix):
        ordinal()(torch.zeros(prediction), torch.zeros(target, dtype=torch.int64))


def test_as_many_weights_as_there_are_not_thresholds_are_refused():
    with pytest.raises(LossMismatch, match="expects 3"):
        ordinal(importance_weights=[1.0, 2.0])(torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64))
