"""Losses for numbers: torch's, numpy's and scikit-learn's values and gradients, and what extreme differences do."""

from __future__ import annotations

import math
import pickle

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mean_pinball_loss
from torch.func import grad, jacrev, vmap
from torch.nn import functional

from fallline.dimensions import grid
from fallline.errors import InvalidHyperparameter, LossMismatch
from fallline.losses.base import Prediction
from fallline.losses.regression import charbonnier, huber, l1, log_cosh, mse, quantile, smooth_l1

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
CHEAP = settings(max_examples=30, deadline=None)
LEVELS = (0.1, 0.5, 0.9)


def drawn(seed, *shape):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal_functions(ours, theirs, prediction, *more):
    expected = grad(theirs)(prediction, *more)
    assert expected.abs().max() > 1e-3, "a problem without a gradient would prove nothing"
    torch.testing.assert_close(ours(prediction, *more), theirs(prediction, *more), **CLOSE)
    torch.testing.assert_close(grad(ours)(prediction, *more), expected, **CLOSE)


@CHEAP
@given(
    shape=st.sampled_from([(5,), (4, 1), (2, 3, 2)]),
    reduction=st.sampled_from(["mean", "sum"]),
    beta=st.one_of(st.just(0.0), st.floats(1e-3, 5.0)),
    seed=st.integers(0, 1000),
)
def test_smooth_l1_is_torchs(shape, reduction, beta, seed):
    def torchs(p, t):
        return functional.smooth_l1_loss(p, t, beta=beta, reduction=reduction)

    for given_beta in (beta, torch.tensor(beta, dtype=torch.float64)):
        loss = smooth_l1(reduction=reduction)
        assert_equal_functions(
            lambda p, t, b=given_beta, loss=loss: loss(p, t, numbers={"beta": b}),
            torchs,
            drawn(seed, *shape),
            drawn(seed + 1, *shape),
        )


def test_smooth_l1_is_torchs_at_its_joint_and_at_zero():
    prediction = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    for beta in (1.0, torch.tensor(1.0, dtype=torch.float64)):
        assert_equal_functions(
            lambda p, t, b=beta: smooth_l1()(p, t, numbers={"beta": b}),
            functional.smooth_l1_loss,
            prediction,
            torch.zeros(5, dtype=torch.float64),
        )


def test_a_swept_beta_of_zero_is_l1_also_where_nothing_differs():
    prediction = torch.tensor([-3.0, 0.0, 0.5], dtype=torch.float64)
    target = torch.zeros_like(prediction)
    torch.testing.assert_close(smooth_l1(beta=0.0)(prediction, target), l1()(prediction, target), **CLOSE)
    betas = torch.tensor([0.0, 1.0], dtype=torch.float64)
    slopes = vmap(grad(lambda p, b: smooth_l1()(p, target, numbers={"beta": b})), (None, 0))(prediction, betas)
    torch.testing.assert_close(slopes[0], grad(functional.l1_loss)(prediction, target), **CLOSE)
    torch.testing.assert_close(slopes[1], grad(functional.smooth_l1_loss)(prediction, target), **CLOSE)
    assert slopes.isfinite().all()


def test_a_tiny_beta_does_not_overflow():
    for dtype in (torch.float32, torch.float64):
        prediction = torch.tensor([1e4, 1e-3, 0.0], dtype=dtype)
        for beta in (1e-35, torch.tensor(1e-35, dtype=dtype)):

            def total(p, beta=beta):
                return smooth_l1(reduction="sum")(p, torch.zeros_like(p), numbers={"beta": beta})

            torch.testing.assert_close(total(prediction), prediction.abs().sum())
            torch.testing.assert_close(grad(total)(prediction), prediction.sign())


def test_log_cosh_is_the_logarithm_of_cosh():
    assert_equal_functions(log_cosh(), lambda p, t: (p - t).cosh().log().mean(), drawn(0, 6, 3), drawn(1, 6, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_cosh_keeps_its_digits_from_nothing_to_ten_thousand(dtype):
    sizes = [1e-15, 1e-6, 1e-3, 0.3, 0.999, 1.0, 1.001, 3.0, 20.0, 60.0, 1e4]
    points = torch.tensor([*sizes, *[-s for s in sizes]], dtype=dtype)
    with mpmath.workdps(60):
        exact = [mpmath.mpf(float(d)) for d in points]
        values = [float(abs(d) + mpmath.log1p(mpmath.exp(-2 * abs(d))) - mpmath.log(2)) for d in exact]
        slopes = [float(mpmath.tanh(d)) for d in exact]
    close = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 0.0}
    found = log_cosh(reduction="none")(points, torch.zeros_like(points))
    torch.testing.assert_close(found, torch.tensor(values, dtype=dtype), **close)
    slope = grad(lambda p: log_cosh(reduction="sum")(p, torch.zeros_like(p)))(points)
    torch.testing.assert_close(slope, torch.tensor(slopes, dtype=dtype), **close)


def test_log_cosh_curves_as_its_formula_even_at_zero():
    points = torch.tensor([0.0, 0.5, 1.0, 2.0, -400.0, 1e4], dtype=torch.float64)
    slope = grad(lambda p: log_cosh(reduction="sum")(p, torch.zeros_like(p)))
    curvature = jacrev(slope)(points).diagonal()
    torch.testing.assert_close(curvature, 1 - points.tanh().square(), rtol=1e-12, atol=1e-15)


@CHEAP
@given(eps=st.floats(1e-3, 10.0), seed=st.integers(0, 1000))
def test_charbonnier_is_its_formula(eps, seed):
    assert_equal_functions(
        charbonnier(eps=eps),
        lambda p, t: ((p - t) ** 2 + eps**2).sqrt().mean(),
        drawn(seed, 4, 3),
        drawn(seed + 1, 4, 3),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_charbonnier_neither_overflows_nor_underflows(dtype):
    difference = torch.tensor([0.0, 1e-4, 1e4, -1e4], dtype=dtype)
    values = charbonnier(reduction="none")(difference, torch.zeros_like(difference))
    expected = np.hypot(difference.double().numpy(), float(torch.tensor(1e-3, dtype=dtype)))
    torch.testing.assert_close(values.double(), torch.from_numpy(expected), rtol=4 * torch.finfo(dtype).eps, atol=0.0)
    slope = grad(lambda p: charbonnier(reduction="sum")(p, torch.zeros_like(p)))(difference)
    assert slope[0] == 0
    torch.testing.assert_close(slope[2:], torch.tensor([1.0, -1.0], dtype=dtype))
    if dtype != torch.float16:
        huge = torch.tensor([1e30], dtype=dtype)
        torch.testing.assert_close(charbonnier()(huge, -huge), torch.tensor(2e30, dtype=dtype))


@CHEAP
@given(level=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_quantile_is_scikit_learns_pinball_loss(level, seed):
    prediction, target = drawn(seed, 7, 2), drawn(seed + 1, 7, 2)
    expected = mean_pinball_loss(target.numpy(), prediction.numpy(), alpha=level)
    assert expected > 1e-3
    assert quantile(quantiles=level)(prediction, target).item() == pytest.approx(expected, rel=1e-12)

    def typed(p, t):
        return torch.where(t >= p, level * (t - p), (1 - level) * (p - t)).mean()

    assert_equal_functions(quantile(quantiles=level), typed, prediction, target)


def pinball(prediction, target, level):
    return torch.where(target >= prediction, level * (target - prediction), (1 - level) * (prediction - target))


def several_forms():
    """The same three quantiles of the same targets, in every form in which they may be given."""
    columns, target = drawn(0, 6, 3, 2), drawn(1, 6, 2)
    flat, single = columns[:, :, 0], target[:, 0]
    return {
        "[N, Q] for [N]": (flat, single, columns[:, :, 0]),
        "[N, Q] for [N, 1]": (flat, single.unsqueeze(1), columns[:, :, :1]),
        "[N, Q, 1] for [N, 1]": (flat.unsqueeze(2), single.unsqueeze(1), columns[:, :, :1]),
        "[N, Q, d] for [N, d]": (columns, target, columns),
        "[N, Q·d] for [N, d]": (columns.flatten(1), target, columns),
        "a tuple": (tuple(columns.unbind(1)), target, columns),
    }


@pytest.mark.parametrize("form", several_forms())
def test_several_quantiles_are_each_quantile_by_itself(form):
    prediction, target, columns = several_forms()[form]
    expected = torch.stack([pinball(columns[:, i], target, q) for i, q in enumerate(LEVELS)], 1)
    found = quantile(quantiles=LEVELS, reduction="none")(prediction, target)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(quantile(quantiles=LEVELS)(prediction, target), expected.mean(), **CLOSE)
    samples = quantile(quantiles=LEVELS).per_sample(prediction, target)
    torch.testing.assert_close(samples, expected.flatten(1).mean(1), **CLOSE)


def test_several_quantiles_have_each_quantiles_gradient():
    columns, target = drawn(0, 6, 3, 2), drawn(1, 6, 2)

    def typed(p):
        return torch.stack([pinball(p[:, i], target, q) for i, q in enumerate(LEVELS)]).mean()

    assert_equal_functions(lambda p: quantile(quantiles=LEVELS)(p, target), typed, columns)


def test_each_of_several_quantiles_may_be_swept():
    prediction, target = drawn(0, 6, 3), drawn(1, 6)
    loss = quantile(quantiles=LEVELS)
    levels = torch.tensor([0.2, 0.4], dtype=torch.float64)
    together = vmap(lambda q: loss(prediction, target, numbers={"quantile2": q}))(levels)
    alone = [quantile(quantiles=(0.1, q, 0.9))(prediction, target) for q in (0.2, 0.4)]
    torch.testing.assert_close(together, torch.stack(alone), **CLOSE)
    assert not torch.allclose(*alone)
    template = quantile(quantiles=(0.1, grid([0.2, 0.4]), 0.9))
    assert set(template.dimensions) == {"quantile2"}
    assert quantile(quantiles=(0.1, 0.4, 0.9)).structure == loss.structure


def test_the_estimate_is_the_quantile_nearest_the_median():
    prediction = drawn(0, 6, 3)
    for levels, column in [
        ((0.9, 0.4, 0.1), 1),
        ((0.45, 0.8, 0.9), 0),
        ((0.1, 0.2, 0.55), 2),
        ((0.1, 0.4, 0.6), 1),
        ((0.4, 0.6, 0.9), 0),
    ]:
        torch.testing.assert_close(quantile(quantiles=levels).estimate(prediction), prediction[:, column])
    estimate = quantile(quantiles=(0.3, 0.6)).estimate
    torch.testing.assert_close(estimate(prediction[:, :2].unbind(1)), prediction[:, 1])
    assert quantile().estimate is None
    assert quantile(quantiles=LEVELS).prediction == Prediction.QUANTILES


def test_what_minimises_the_quantile_loss_is_the_quantile():
    target = drawn(3, 4001).exp()
    levels = torch.tensor([0.05, 0.5, 0.8], dtype=torch.float64)
    expected = torch.quantile(target, levels)
    loss = quantile(quantiles=tuple(levels.tolist()))
    best = loss(expected.expand(len(target), 3), target)
    for step in (-0.2, 0.2):
        for i in range(3):
            moved = expected + step * torch.eye(3, dtype=torch.float64)[i]
            assert loss(moved.expand(len(target), 3), target) > best


def test_a_model_learns_several_quantiles():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2000, 1, generator=generator, dtype=torch.float64)
    prediction = torch.zeros(3, dtype=torch.float64)
    loss = quantile(quantiles=LEVELS)
    for _ in range(600):
        prediction = prediction - 0.05 * grad(lambda p: loss(p.expand(2000, 3), target))(prediction)
    torch.testing.assert_close(prediction, torch.tensor(LEVELS, dtype=torch.float64), rtol=0, atol=0.03)


@pytest.mark.parametrize("loss", [mse(), l1(), huber(), smooth_l1(), log_cosh(), charbonnier(), quantile()], ids=str)
@pytest.mark.parametrize("shapes", [((4, 1), (4,)), ((4,), (4, 1)), ((4, 2), (4, 1)), ((4,), (1,)), ((4,), ())])
def test_what_would_be_broadcast_is_refused(loss, shapes):
    with pytest.raises(LossMismatch, match=f"^{loss.name} .*these would be broadcast"):
        loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


@pytest.mark.parametrize(
    ("prediction", "target"),
    [((6, 3), (6, 3)), ((6, 4), (6,)), ((6,), (6,)), ((6, 3), (3,)), ((6, 3), (6, 2)), ((6, 3, 2), (6, 3))],
)
def test_quantiles_that_do_not_fit_are_refused(prediction, target):
    with pytest.raises(LossMismatch, match="quantile"):
        quantile(quantiles=LEVELS)(torch.zeros(prediction), torch.zeros(target))


@pytest.mark.parametrize("quantiles", [(0.5, 1.0), (0.0, 0.5), [0.5, -1], (), "all", True, None, (0.5, None), 1.0, 0])
def test_quantiles_that_are_none_are_refused(quantiles):
    with pytest.raises(InvalidHyperparameter, match="quantile"):
        quantile(quantiles=quantiles)


def test_quantiles_of_a_list_or_a_tensor_are_the_tuples():
    loss = quantile(quantiles=(0.25, 0.75))
    assert quantile(quantiles=[0.25, 0.75]) == loss == quantile(quantiles=torch.tensor([0.25, 0.75]))
    assert pickle.loads(pickle.dumps(loss)) == loss
    assert loss.code() == "fl.losses.quantile(quantiles=(0.25, 0.75))"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "loss", [mse(), l1(), huber(), smooth_l1(), log_cosh(), charbonnier(), quantile(quantiles=0.9)], ids=str
)
def test_differences_of_ten_thousand_are_finite_and_right(loss, dtype):
    far = torch.tensor([1e4, -1e4, 0.0], dtype=dtype)
    values = loss.per_sample(far, torch.zeros_like(far)).double()
    size = float(far[0])
    slopes = grad(lambda p: loss(p, torch.zeros_like(p)))(far).double() * 3
    height = {"mse": size**2, "huber": size - 0.5, "smooth_l1": size - 0.5, "log_cosh": size - math.log(2)}
    up, down = (0.1, 0.9) if loss.name == "quantile" else (1.0, 1.0)
    steep = 2 * size if loss.name == "mse" else 1.0
    expected = height.get(loss.name, size)
    near = {"rtol": 2e-2 if dtype == torch.bfloat16 else 1e-6, "atol": 2e-3}
    torch.testing.assert_close(values, torch.tensor([up * expected, down * expected, 0.0]).double(), **near)
    middle = -0.4 if loss.name == "quantile" else 0.0
    torch.testing.assert_close(slopes, torch.tensor([up * steep, -down * steep, middle]).double(), **near)
