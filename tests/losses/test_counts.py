"""Counts and amounts: torch's, scipy's and scikit-learn's values and gradients, and what becomes of them far out."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import mean_tweedie_deviance
from torch import nn
from torch.func import grad, vmap

from fallline.errors import InvalidHyperparameter, LossMismatch
from fallline.losses.base import Prediction
from fallline.losses.counts import negative_binomial_nll, poisson_nll, tweedie
from loss_gradients import CLOSE, assert_equal_functions, gradients

CHEAP = settings(max_examples=30, deadline=None)
F64 = torch.float64


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def counts(seed, *shape):
    return torch.randint(0, 12, shape, generator=torch.Generator().manual_seed(seed)).double()


@CHEAP
@given(
    log_input=st.booleans(),
    full=st.booleans(),
    eps=st.sampled_from([1e-8, 0.3]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 1000),
)
def test_poisson_nll_is_torchs(log_input, full, eps, reduction, seed):
    arguments = {"log_input": log_input, "full": full, "eps": eps, "reduction": reduction}
    ours, torchs = poisson_nll(**arguments), nn.PoissonNLLLoss(**arguments)
    target = counts(seed, 5, 3)
    target[0] = torch.tensor([0.0, 1.0, 2.0])  # on both sides of where Stirling's term begins
    prediction = drawn(seed, 5, 3) if log_input else drawn(seed, 5, 3).exp()
    assert_equal_functions(lambda p: ours(p, target), lambda p: torchs(p, target), prediction)


def test_full_poisson_nll_is_close_to_scipys_for_large_counts():
    log_rate, target = 4 + drawn(0, 9).abs(), 40 + 5 * counts(0, 9)
    found = poisson_nll(full=True, reduction="none")(log_rate, target)
    expected = torch.from_numpy(-stats.poisson.logpmf(target, log_rate.exp()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1 / (12 * 40))


def test_stirlings_term_leaves_finite_gradients_in_the_target():
    target = torch.tensor([0.0, 1.0, 5.0], dtype=F64)
    slope = grad(lambda t: poisson_nll(full=True, reduction="sum")(torch.zeros(3, dtype=F64), t))(target)
    torch.testing.assert_close(slope, torch.tensor([0.0, 0.0, math.log(5) + 0.1], dtype=F64), **CLOSE)


@pytest.mark.parametrize("full", [False, True])
def test_counts_may_be_integers(full):
    target = counts(1, 6)
    assert target.max() > 1
    prediction = drawn(0, 6)
    for loss in (poisson_nll(full=full), tweedie()):
        whole = loss(prediction, target.long())
        assert whole.dtype == F64
        torch.testing.assert_close(whole, loss(prediction, target), rtol=0, atol=0)
    pair = (prediction, drawn(2, 6))
    expected = negative_binomial_nll()(pair, target)
    torch.testing.assert_close(negative_binomial_nll()(pair, target.int()), expected, rtol=0, atol=0)


def test_estimates_are_in_the_targets_unit():
    logarithms = drawn(0, 4, 2)
    torch.testing.assert_close(poisson_nll().estimate(logarithms), logarithms.exp())
    torch.testing.assert_close(tweedie().estimate(logarithms), logarithms.exp())
    torch.testing.assert_close(negative_binomial_nll().estimate(logarithms), logarithms[:, 0].exp())
    torch.testing.assert_close(negative_binomial_nll(log_input=False).estimate(logarithms), logarithms[:, 0])
    assert poisson_nll(log_input=False).estimate is None
    assert poisson_nll(log_input=False).prediction == Prediction.POSITIVE


def torchs_negative_binomial(log_mean, log_dispersion, target):
    distribution = torch.distributions.NegativeBinomial(
        (-log_dispersion).exp(), logits=log_mean + log_dispersion, validate_args=False
    )
    return -distribution.log_prob(target)


@CHEAP
@given(
    shapes=st.sampled_from(
        [((6,), (6,)), ((4, 3), (4, 3)), ((4, 3), (4, 1)), ((4, 3), (1, 3)), ((4, 3), (4,)), ((6,), ())]
    ),
    seed=st.integers(0, 1000),
)
def test_negative_binomial_nll_is_torchs_distribution(shapes, seed):
    log_mean, log_dispersion, target = drawn(seed, *shapes[0]), drawn(seed + 1, *shapes[1]), counts(seed, *shapes[0])
    target.view(-1)[0] = 0

    def torchs(m, a):
        return torchs_negative_binomial(m, a.unsqueeze(-1) if shapes[1] == (4,) else a, target)

    loss = negative_binomial_nll(reduction="none")
    assert_equal_functions(lambda m, a: loss((m, a), target), torchs, log_mean, log_dispersion)


def test_negative_binomial_nll_is_scipys():
    mean, dispersion = drawn(0, 50).exp(), (2 * drawn(1, 50)).exp()
    target = counts(2, 50)
    size = 1 / dispersion
    expected = torch.from_numpy(-stats.nbinom.logpmf(target, size, size / (size + mean)))
    assert expected.std() > 0.1
    for loss, prediction in (
        (negative_binomial_nll(reduction="none"), (mean.log(), dispersion.log())),
        (negative_binomial_nll(reduction="none", log_input=False, eps=0.0), (mean, dispersion)),
    ):
        torch.testing.assert_close(loss(prediction, target), expected, rtol=1e-10, atol=1e-10)


def test_the_mean_and_variance_are_those_that_are_promised():
    mean, dispersion = 3.0, 0.4
    every = torch.arange(2000, dtype=F64)
    parts = torch.full_like(every, math.log(mean)), torch.full_like(every, math.log(dispersion))
    probability = (-negative_binomial_nll(reduction="none")(parts, every)).exp()
    expectation = (probability * every).sum().item()
    assert probability.sum().item() == pytest.approx(1, rel=1e-12)
    assert expectation == pytest.approx(mean, rel=1e-12)
    assert (probability * (every - mean) ** 2).sum().item() == pytest.approx(mean + dispersion * mean**2, rel=1e-12)


def test_every_form_of_a_mean_and_dispersion_gives_the_same():
    parts, target = drawn(0, 6, 2, 3), counts(0, 6, 3)
    expected = torchs_negative_binomial(parts[:, 0], parts[:, 1], target).mean()
    for form in (parts, parts.flatten(1), tuple(parts.unbind(1))):
        torch.testing.assert_close(negative_binomial_nll()(form, target), expected, **CLOSE)
    flat = torchs_negative_binomial(parts[:, 0, 0], parts[:, 1, 0], target[:, 0]).mean()
    for goal in (target[:, 0], target[:, :1]):
        torch.testing.assert_close(negative_binomial_nll()(parts[:, :, 0], goal), flat, **CLOSE)


def test_eps_keeps_zeros_of_mean_and_dispersion_finite():
    zero, target = torch.zeros(3, dtype=F64), torch.tensor([0.0, 1.0, 40.0], dtype=F64)
    value, slopes = gradients(
        lambda m, a: negative_binomial_nll(log_input=False, reduction="none")((m, a), target), zero, zero
    )
    poisson = 1e-8 - target * math.log(1e-8) + torch.lgamma(target + 1)
    torch.testing.assert_close(value, poisson, rtol=1e-6, atol=1e-7)
    assert all(slope.isfinite().all() for slope in slopes)


def exact_negative_binomial(log_mean, log_dispersion, target):
    """Value and both slopes with as many digits as it takes."""
    m, a, t = (mpmath.mpf(float(x)) for x in (log_mean, log_dispersion, target))
    mean, dispersion = mpmath.exp(m), mpmath.exp(a)
    size, product = 1 / dispersion, mpmath.exp(m + a)
    rising = mpmath.loggamma(t + size) - mpmath.loggamma(size) if a > -80 else t * mpmath.log(size)
    slope = (mpmath.digamma(t + size) - mpmath.digamma(size)) * size if a > -80 else t
    weighed = size * mpmath.log1p(product)
    value = mpmath.loggamma(t + 1) + weighed + t * mpmath.log1p(1 / product) - rising
    by_mean = (mean - t) / (1 + product)
    by_dispersion = -weighed + by_mean + slope
    return float(value), float(by_mean), float(by_dispersion)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_negative_binomial_nll_is_finite_and_right_at_its_limits(dtype):
    cases = [
        (0.0, -1e4, 3.0),  # Poisson
        (2.0, -60.0, 0.0),
        (2.0, -20.0, 5.0),
        (2.0, -2.7726, 5.0),  # where Stirling's series begins
        (2.0, -2.7725, 5.0),
        (0.0, 0.0, 0.0),
        (0.0, 0.0, 1.0),
        (1.5, 1e-6, 4.0),
        (0.0, 1e4, 0.0),  # a probability of almost 1 of 0
        (0.0, 1e4, 3.0),
        (1e4, 0.0, 3.0),
        (-1e4, 0.0, 0.0),
        (-1e4, 0.0, 3.0),
        (-1e4, -1e4, 2.0),
        (5e3, 5e3, 7.0),
        (12.0, -3.0, 1e6),
        (12.0, 1.0, 1e6),
        (0.0, -8.0, 1e9),
        (0.0, 3.0, 1e9),
        (18.0, -30.0, 6.5e7),
        (2.0, -4.0, 1e20),
        (2.0, 4.0, 1e20),
    ]
    log_mean, log_dispersion, target = torch.tensor(cases, dtype=dtype).unbind(1)
    loss = negative_binomial_nll(reduction="none")
    value, (by_mean, by_dispersion) = gradients(lambda m, a: loss((m, a), target), log_mean, log_dispersion)
    with mpmath.workdps(150):
        exact = torch.tensor(
            [exact_negative_binomial(*row) for row in zip(log_mean, log_dispersion, target, strict=True)], dtype=F64
        )
    assert exact.isfinite().all()
    # log t! alone is t·log t: of this size are the terms that a likelihood is the small difference of.
    size = 1 + log_mean.abs() + log_dispersion.abs() + target * (target + 2).log() + target * log_mean.abs()
    error = 16 * torch.finfo(dtype).eps
    assert ((value.double() - exact[:, 0]).abs() <= error * size.double()).all()
    slope_size = 1 + target.double() + exact[:, 1:].abs().amax(1)
    assert ((by_mean.double() - exact[:, 1]).abs() <= error * slope_size).all()
    assert ((by_dispersion.double() - exact[:, 2]).abs() <= error * slope_size).all()


def test_an_overdispersed_mean_has_every_digit_of_its_gradient():
    log_mean, log_dispersion = torch.tensor([18.0]), torch.tensor([0.0])
    target = torch.tensor([2e8])
    _, (by_mean, _) = gradients(lambda m, a: negative_binomial_nll()((m, a), target), log_mean, log_dispersion)
    mean = math.exp(18)
    assert by_mean.item() == pytest.approx((mean - 2e8) / (1 + mean), rel=1e-5)


def test_a_tiny_dispersion_is_the_poisson_distribution():
    log_mean, target = drawn(0, 8), counts(0, 8)
    expected = torch.from_numpy(-stats.poisson.logpmf(target, log_mean.exp()))
    for log_dispersion in (-40.0, -1e4):
        found = negative_binomial_nll(reduction="none")((log_mean, torch.full((8,), log_dispersion, dtype=F64)), target)
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(
    ("mean", "dispersion", "target"),
    [
        ((4, 1), (4, 1), (4,)),
        ((4,), (4, 1), (4,)),
        ((4, 3), (3,), (4, 3)),
        ((4,), (4,), (4, 2)),
        ((4, 2), (4, 3), (4, 2)),
    ],
)
def test_what_would_be_broadcast_is_refused(mean, dispersion, target):
    with pytest.raises(LossMismatch, match="negative_binomial_nll"):
        negative_binomial_nll()((torch.zeros(mean), torch.zeros(dispersion)), torch.zeros(target))
    for loss in (poisson_nll(), tweedie()):
        with pytest.raises(LossMismatch, match="these would be broadcast"):
            loss(torch.zeros(4, 1), torch.zeros(4))


@CHEAP
@given(power=st.floats(1.01, 1.99), seed=st.integers(0, 1000))
def test_tweedie_is_scikit_learns_deviance(power, seed):
    prediction = drawn(seed, 20)
    target = (counts(seed, 20) - 3).clamp(min=0) * drawn(seed + 1, 20).exp()
    assert 0 < (target == 0).sum() < 20
    expected = mean_tweedie_deviance(target.numpy(), prediction.exp().numpy(), power=power)
    assert tweedie(power=power)(prediction, target).item() == pytest.approx(expected, rel=1e-9)

    def typed(eta):
        mean = eta.exp()
        constant = target ** (2 - power) / ((1 - power) * (2 - power))
        return 2 * (constant - target * mean ** (1 - power) / (1 - power) + mean ** (2 - power) / (2 - power)).mean()

    (value, slopes), (right, rightly) = (
        gradients(f, prediction) for f in (lambda p: tweedie(power=power)(p, target), typed)
    )
    torch.testing.assert_close(value, right, rtol=1e-9, atol=1e-10)
    assert rightly[0].abs().max() > 1e-3
    torch.testing.assert_close(slopes[0], rightly[0], rtol=1e-10, atol=1e-10)


def test_tweedie_has_twice_the_gradient_of_the_quasi_likelihood():
    prediction, target = drawn(0, 9), counts(0, 9)
    slope = grad(lambda p: tweedie(power=1.3, reduction="sum")(p, target))(prediction)
    quasi = -target * ((1 - 1.3) * prediction).exp() + ((2 - 1.3) * prediction).exp()
    torch.testing.assert_close(slope, 2 * quasi, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("gap", [1e-3, 1e-6])
def test_tweedie_tends_to_the_poisson_and_the_gamma_deviance_without_losing_digits(gap, dtype):
    rounded = float(torch.tensor(gap, dtype=dtype))
    target = torch.tensor([0.5, 1.0, 3.0, 200.0], dtype=dtype)
    prediction = torch.tensor([0.1, 0.3, 0.9, 5.3], dtype=dtype)
    for power, limit in ((1 + gap, 1), (2 - gap, 2)):
        expected = [
            mean_tweedie_deviance([t], [m], power=limit)
            for t, m in zip(target.double(), prediction.double().exp(), strict=True)
        ]
        found = tweedie(power=power, reduction="none")(prediction, target)
        tolerance = 10 * rounded + (2e-5 if dtype == torch.float32 else 0)
        torch.testing.assert_close(found, torch.tensor(np.array(expected), dtype=dtype), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_tweedie_is_zero_at_the_target_and_finite_far_from_it(dtype):
    target = torch.tensor([1e-6, 0.3, 7.0, 1e6], dtype=dtype)
    value, slopes = gradients(lambda p: tweedie(reduction="none")(p, target), target.log())
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=torch.finfo(dtype).eps * 10)
    torch.testing.assert_close(slopes[0] / target.sqrt(), torch.zeros_like(value), rtol=0, atol=1e-5)
    far = torch.tensor([-1e4, -100.0, 60.0, 0.0, -1e4], dtype=dtype)
    amounts = torch.tensor([0.0, 1.0, 1e4, 1e4, 0.0], dtype=dtype)
    value, slopes = gradients(lambda p: tweedie(reduction="none")(p, amounts), far)
    expected = 4 * ((far / 2).exp() - 2 * amounts.sqrt() + torch.where(amounts > 0, amounts * (-far / 2).exp(), 0))
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    rightly = 2 * ((far / 2).exp() - torch.where(amounts > 0, amounts * (-far / 2).exp(), 0))
    torch.testing.assert_close(slopes[0], rightly, rtol=1e-5, atol=1e-6)


def test_a_prediction_too_large_for_its_type_has_an_infinite_gradient_and_none_that_is_no_number():
    far, amounts = torch.tensor([1e4, 1e4]), torch.tensor([0.0, 2.0])
    value, slopes = gradients(lambda p: tweedie(reduction="none")(p, amounts), far)
    assert value.tolist() == slopes[0].tolist() == [math.inf, math.inf]


def test_the_power_may_be_swept():
    prediction, target = drawn(0, 5), counts(0, 5)
    target[0] = 0
    powers = torch.tensor([1.1, 1.9], dtype=F64)
    slopes = vmap(grad(lambda p, q: tweedie()(p, target, numbers={"power": q})), (None, 0))(prediction, powers)
    alone = [grad(lambda p, q=q: tweedie(power=q)(p, target))(prediction) for q in (1.1, 1.9)]
    torch.testing.assert_close(slopes, torch.stack(alone), **CLOSE)


@pytest.mark.parametrize("power", [1.0, 2.0, 0, 3, math.inf, "1.5", None])
def test_a_power_without_a_distribution_is_refused(power):
    with pytest.raises(InvalidHyperparameter, match="power="):
        tweedie(power=power)
