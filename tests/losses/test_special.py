"""Special functions against mpmath with 60 digits: values and slopes, where branches meet and far away."""

from __future__ import annotations

import mpmath
import pytest
import torch
from torch.func import grad, vmap

from fallline.losses.special import at_least, expm1_ratio, log1p_ratio, log_rising, log_softplus, softplus

F64 = torch.float64


def exact(function, points):
    """The function and its slope at float64 points."""
    with mpmath.workdps(60):
        values = [function(mpmath.mpf(x)) for x in points]
        step = mpmath.mpf(10) ** -20
        slopes = [(function(x + step) - function(x - step)) / (2 * step) for x in map(mpmath.mpf, points)]
        return torch.tensor([[float(v) for v in values], [float(s) for s in slopes]], dtype=F64)


def log_of_softplus(x):
    return mpmath.log(mpmath.log1p(mpmath.exp(x)))


@pytest.mark.parametrize("name", ["softplus", "log_softplus"])
def test_softplus_and_its_logarithm(name):
    ours, theirs = {
        "softplus": (softplus, lambda x: mpmath.log1p(mpmath.exp(x))),
        "log_softplus": (log_softplus, log_of_softplus),
    }[name]
    points = [-1e4, -800.0, -700.0, -30.0, -10.001, -9.999, -3.0, 0.0, 3.0, 19.9, 20.1, 49.9, 50.1, 1e4]
    x = torch.tensor(points, dtype=F64)
    expected = exact(theirs, points)
    torch.testing.assert_close(ours(x), expected[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(vmap(grad(ours))(x), expected[1], rtol=1e-13, atol=0)


def test_log1p_ratio():
    points = [1e-300, 1e-9, 0.99e-4, 1.01e-4, 1e-2, 1.0, 1e6, 1e200]
    w = torch.tensor([0.0, *points], dtype=F64)
    with mpmath.workdps(60):
        values = [1.0, *(float(mpmath.log1p(x) / x) for x in points)]
    torch.testing.assert_close(log1p_ratio(w), torch.tensor(values, dtype=F64), rtol=1e-15, atol=0)
    assert vmap(grad(log1p_ratio))(w)[0] == -0.5
    assert vmap(grad(log1p_ratio))(w).isfinite().all()


def test_expm1_ratio():
    x = torch.tensor([-2.0, 0.0, 1e-12, 3.0], dtype=F64)
    torch.testing.assert_close(expm1_ratio(x, 1.0), torch.expm1(x), rtol=0, atol=0)
    torch.testing.assert_close(expm1_ratio(x, 1e-9), x, rtol=1e-8, atol=0)


def test_log_rising_is_a_difference_of_log_gammas():
    logarithms = [-1e4, -50.0, -1.0, -1e-9, 1e-9, 1.0, 2.7725, 2.7727, 3.0, 5.0, 20.0, 60.0]
    heights = [0.0, 0.5, 1.0, 2.0, 10.0, 1e3, 1e6]
    log_x, h = torch.cartesian_prod(torch.tensor(logarithms, dtype=F64), torch.tensor(heights, dtype=F64)).unbind(1)
    slope, value = grad(lambda x: log_rising(h, x).sum())(log_x), log_rising(h, log_x)
    with mpmath.workdps(120):
        for i, (height, logarithm) in enumerate(zip(h.tolist(), log_x.tolist(), strict=True)):
            x, a = mpmath.exp(mpmath.mpf(logarithm)), mpmath.mpf(height)
            expected = mpmath.loggamma(x + a) - mpmath.loggamma(x) - a * max(mpmath.mpf(logarithm), 0)
            steep = x * (mpmath.digamma(x + a) - mpmath.digamma(x)) - (a if logarithm > 0 else 0)
            size = 1 + height * max(1.0, float(mpmath.log(a + 2))) + max(-logarithm, 0)
            assert abs(value[i].item() - float(expected)) <= 1e-15 * size * 4, (height, logarithm)
            assert abs(slope[i].item() - float(steep)) <= 1e-14 * (1 + height), (height, logarithm)


def test_at_least_is_bounded_but_lets_the_gradient_through():
    x = torch.tensor([-1e30, 0.1, 2.0], dtype=F64)
    for floor in (0.5, torch.tensor(0.5, dtype=F64)):
        torch.testing.assert_close(at_least(x, floor), torch.tensor([0.5, 0.5, 2.0], dtype=F64), rtol=0, atol=0)
        slope = grad(lambda v, floor=floor: at_least(v, floor).square().sum())(x)
        torch.testing.assert_close(slope, torch.tensor([1.0, 1.0, 4.0], dtype=F64), rtol=0, atol=0)
