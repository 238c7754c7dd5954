"""Normal likelihoods: torch's and scipy's values and gradients, every form of a prediction, and their limits."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional

from fallline.errors import InvalidHyperparameter, LossMismatch
from fallline.losses.likelihoods import beta_nll, evidential, gaussian_nll
from loss_gradients import CLOSE, assert_equal_functions, gradients

CHEAP = settings(max_examples=30, deadline=None)
F64 = torch.float64


def drawn(seed, *shape):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@CHEAP
@given(
    shapes=st.sampled_from(
        [((6,), (6,)), ((6, 3), (6, 3)), ((6, 3), (6, 1)), ((6, 3), (1, 3)), ((6, 3), (6,)), ((2, 3, 2), (2, 3))]
    ),
    full=st.booleans(),
    eps=st.sampled_from([0.0, 1e-6, 0.5]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 1000),
)
def test_gaussian_nll_is_torchs_in_torchs_order_for_every_shape_of_variance(shapes, full, eps, reduction, seed):
    mean, target = drawn(seed, *shapes[0]), drawn(seed + 1, *shapes[0])
    variance = drawn(seed + 2, *shapes[1]).abs() + 1e-3  # some below eps = 0.5: the gradient passes there too
    arguments = {"full": full, "eps": eps, "reduction": reduction}
    ours, torchs = gaussian_nll(**arguments), nn.GaussianNLLLoss(**arguments)
    assert_equal_functions(lambda m, v: ours(m, target, v), lambda m, v: torchs(m, target, v), mean, variance)
    assert_equal_functions(lambda m, v: ours((m, v), target), lambda m, v: torchs(m, target, v), mean, variance)


def test_gaussian_nll_takes_one_number_as_variance():
    mean, target = drawn(0, 5), drawn(1, 5)
    expected = functional.gaussian_nll_loss(mean, target, 0.7)
    torch.testing.assert_close(gaussian_nll()(mean, target, 0.7), expected, **CLOSE)
    one = torch.tensor(0.7, dtype=F64)
    torch.testing.assert_close(gaussian_nll()((mean, one), target), expected, **CLOSE)
    table = gaussian_nll()((mean.reshape(5, 1), one), target.reshape(5, 1))
    torch.testing.assert_close(table, expected, **CLOSE)
    parts, goal = gaussian_nll().arrange(mean, target, one)
    assert parts[0] is mean
    assert goal is target


def test_a_variance_below_eps_counts_as_eps_and_can_grow_again():
    variance = torch.tensor([-3.0, 0.0, 1e-9, 0.2], dtype=F64)
    mean, target = torch.zeros(4, dtype=F64), torch.full((4,), 2.0, dtype=F64)
    value, slopes = gradients(lambda v: gaussian_nll(eps=0.1, reduction="none")((mean, v), target), variance)
    at = torch.tensor([0.1, 0.1, 0.1, 0.2], dtype=F64)
    torch.testing.assert_close(value, 0.5 * (at.log() + 4 / at), **CLOSE)
    torch.testing.assert_close(slopes[0], 0.5 * (1 / at - 4 / at**2), **CLOSE)


def test_full_gaussian_nll_is_scipys():
    mean, target, log_variance = drawn(0, 9), drawn(1, 9), drawn(2, 9)
    expected = -stats.norm.logpdf(target, mean, (log_variance / 2).exp())
    found = gaussian_nll(full=True, log_variance=True, reduction="none")((mean, log_variance), target)
    torch.testing.assert_close(found, torch.from_numpy(expected), **CLOSE)


def test_the_logarithm_of_the_variance_gives_the_same_loss():
    mean, target, logarithm = drawn(0, 6, 2), drawn(1, 6, 2), drawn(2, 6, 2)
    for eps in (0.0, 1e-6, 0.5):
        assert_equal_functions(
            lambda m, s, e=eps: gaussian_nll(eps=e, log_variance=True)((m, s), target),
            lambda m, s, e=eps: functional.gaussian_nll_loss(m, target, s.exp(), eps=e) if e < 0.5 else clamped(m, s),
            mean,
            logarithm,
        )


def clamped(mean, logarithm):
    """The likelihood with a logarithm that is bounded by log ½, and goes on having the gradient there."""
    bounded = logarithm + (logarithm.clamp(min=math.log(0.5)) - logarithm).detach()
    return (0.5 * (bounded + (mean - drawn(1, 6, 2)) ** 2 / bounded.exp())).mean()


def test_every_form_of_a_mean_and_variance_gives_the_same():
    mean, target, variance = drawn(0, 6, 3), drawn(1, 6, 3), drawn(2, 6, 3).abs()
    expected = functional.gaussian_nll_loss(mean, target, variance)
    for form in ((mean, variance), torch.stack((mean, variance), 1), torch.cat((mean, variance), 1)):
        torch.testing.assert_close(gaussian_nll()(form, target), expected, **CLOSE)
    for goal in (target[:, 0], target[:, :1]):
        two = torch.stack((mean[:, 0], variance[:, 0]), 1)
        expected = functional.gaussian_nll_loss(mean[:, 0], target[:, 0], variance[:, 0])
        torch.testing.assert_close(gaussian_nll()(two, goal), expected, **CLOSE)
        values = gaussian_nll(reduction="none")(two, goal)
        assert values.shape == goal.shape
    torch.testing.assert_close(gaussian_nll().estimate(two), mean[:, 0])
    torch.testing.assert_close(gaussian_nll().estimate((mean, variance)), mean)


@pytest.mark.parametrize(
    ("mean", "variance", "target"),
    [
        ((4, 1), (4, 1), (4,)),
        ((4,), (4,), (4, 2)),
        ((4,), (4, 1), (4,)),
        ((4, 3), (4, 2), (4, 3)),
        ((4, 3), (1, 1), (4, 3)),
        ((4, 3), (3,), (4, 3)),
        ((4,), (1, 4), (4,)),
    ],
)
@pytest.mark.parametrize("make", [gaussian_nll, beta_nll])
def test_what_would_be_broadcast_is_refused(make, mean, variance, target):
    with pytest.raises(LossMismatch, match=make.__name__):
        make()((torch.zeros(mean), torch.ones(variance)), torch.zeros(target))


def test_a_prediction_without_a_variance_is_refused():
    for prediction in (torch.zeros(4), torch.zeros(4, 3), (torch.zeros(4),) * 3):
        with pytest.raises(LossMismatch, match="a mean and a variance"):
            gaussian_nll()(prediction, torch.zeros(4))


def test_torchs_expression_is_given_only_where_torch_has_the_loss():
    assert gaussian_nll().torch_name == "GaussianNLLLoss"
    assert gaussian_nll(log_variance=True).torch_name == ""
    assert gaussian_nll(log_variance=True).code() == "fl.losses.gaussian_nll(log_variance=True)"


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_gaussian_nll_is_finite_and_right_at_extreme_variances(dtype):
    mean = torch.tensor([0.0, 1e-14, 0.0, 1e4], dtype=dtype)
    variance = torch.tensor([1e-30, 1e-30, 1e30, 1e30], dtype=dtype)
    zero = torch.zeros_like(mean)
    with mpmath.workdps(50):
        exact = [(mpmath.mpf(float(m)), mpmath.mpf(float(v))) for m, v in zip(mean, variance, strict=True)]
        values = [float((mpmath.log(v) + m * m / v) / 2) for m, v in exact]
        steep = [float(m / v) for m, v in exact]
        wide = [float((1 - m * m / v) / 2) for m, v in exact]
    close = {"rtol": 1e-4 if dtype == torch.float32 else 1e-11, "atol": 0.0}
    for prediction_of, log_variance in ((variance, False), (variance.log(), True)):
        loss = gaussian_nll(eps=0.0, reduction="none", log_variance=log_variance)
        value, (moved, spread) = gradients(lambda m, v, loss=loss: loss((m, v), zero), mean, prediction_of)
        torch.testing.assert_close(value, torch.tensor(values, dtype=dtype), **close)
        torch.testing.assert_close(moved, torch.tensor(steep, dtype=dtype), **close)
        relative = spread if log_variance else spread * variance
        torch.testing.assert_close(relative, torch.tensor(wide, dtype=dtype), **close)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_logarithm_of_the_variance_may_be_anything(dtype):
    logarithm = torch.tensor([-1e4, -100.0, 1e4], dtype=dtype)
    zero = torch.zeros_like(logarithm)
    value, (moved, spread) = gradients(
        lambda m, s: gaussian_nll(log_variance=True, reduction="none")((m, s), zero), zero + 1, logarithm
    )
    low = math.log(1e-6)
    expected = torch.tensor([0.5 * (low + 1e6), 0.5 * (low + 1e6), 5e3], dtype=dtype)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(moved, torch.tensor([1e6, 1e6, 0.0], dtype=dtype), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(spread, torch.tensor([0.5 - 5e5, 0.5 - 5e5, 0.5], dtype=dtype), rtol=1e-5, atol=0.0)


def test_eps_may_be_swept_in_both_forms():
    mean, target, spread = drawn(0, 5), drawn(1, 5), drawn(2, 5)
    levels = torch.tensor([1e-6, 0.9], dtype=F64)
    for arguments, part in (({}, spread.abs()), ({"log_variance": True}, spread)):
        together = vmap(lambda e, a=arguments, s=part: gaussian_nll(**a)((mean, s), target, numbers={"eps": e}))(levels)
        alone = [gaussian_nll(eps=e, **arguments)((mean, part), target) for e in (1e-6, 0.9)]
        torch.testing.assert_close(together, torch.stack(alone), **CLOSE)
        assert not torch.allclose(*alone)


@pytest.mark.parametrize("log_variance", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_beta_nll_is_the_papers_with_a_weight_that_has_no_gradient(beta, log_variance):
    mean, target, logarithm = drawn(0, 6, 2), drawn(1, 6, 2), drawn(2, 6, 2)

    def typed(m, s):
        variance = s.exp() if log_variance else s
        weight = variance.detach() ** beta
        return (weight * (torch.log(variance) / 2 + (target - m) ** 2 / (2 * variance))).mean()

    part = logarithm if log_variance else logarithm.exp()
    loss = beta_nll(beta=beta, eps=0.0, log_variance=log_variance)
    assert_equal_functions(lambda m, v: loss((m, v), target), typed, mean, part)


def test_beta_of_zero_is_the_likelihood_and_of_one_moves_the_mean_as_the_squared_error():
    mean, target, variance = drawn(0, 6), drawn(1, 6), drawn(2, 6).abs()
    plain = functional.gaussian_nll_loss(mean, target, variance)
    torch.testing.assert_close(beta_nll(beta=0.0)((mean, variance), target), plain, **CLOSE)
    slope = grad(lambda m: beta_nll(beta=1.0, reduction="sum")((m, variance), target))(mean)
    torch.testing.assert_close(slope, mean - target, **CLOSE)
    torch.testing.assert_close(beta_nll().estimate((mean, variance)), mean)
    assert beta_nll().numbers == {"beta": 0.5, "eps": 1e-6}
    assert not beta_nll().torch_name


def test_the_weight_of_a_variance_below_eps_is_that_of_eps():
    variance = torch.tensor([1e-9], dtype=F64)
    value = beta_nll(beta=0.5, eps=0.04)((torch.zeros(1, dtype=F64), variance), torch.ones(1, dtype=F64))
    torch.testing.assert_close(value, torch.tensor(0.2 * 0.5 * (math.log(0.04) + 25), dtype=F64), **CLOSE)


def typed_evidential(gamma, raw_nu, raw_alpha, raw_beta, target, coefficient):
    """Equations 8 and 9 of Amini et al., and the links of section 3.3."""
    nu, alpha, beta = (1 + raw_nu.exp()).log(), (1 + raw_alpha.exp()).log() + 1, (1 + raw_beta.exp()).log()
    omega = 2 * beta * (1 + nu)
    likelihood = (
        0.5 * torch.log(math.pi / nu)
        - alpha * torch.log(omega)
        + (alpha + 0.5) * torch.log((target - gamma) ** 2 * nu + omega)
        + torch.lgamma(alpha)
        - torch.lgamma(alpha + 0.5)
    )
    return (likelihood + coefficient * (target - gamma).abs() * (2 * nu + alpha)).mean()


@CHEAP
@given(coefficient=st.sampled_from([0.0, 0.01, 1.0]), shape=st.sampled_from([(7,), (4, 2)]), seed=st.integers(0, 1000))
def test_evidential_is_the_papers(coefficient, shape, seed):
    raw = [drawn(seed + i, *shape) for i in range(4)]
    target = drawn(seed + 4, *shape)
    assert_equal_functions(
        lambda *parts: evidential(coefficient=coefficient)(parts, target),
        lambda *parts: typed_evidential(*parts, target, coefficient),
        *raw,
    )


def test_evidential_is_scipys_student_t_without_its_penalty():
    gamma, raw_nu, raw_alpha, raw_beta, target = (drawn(i, 9) for i in range(5))
    nu, alpha, beta = functional.softplus(raw_nu), 1 + functional.softplus(raw_alpha), functional.softplus(raw_beta)
    expected = -stats.t.logpdf(target, df=2 * alpha, loc=gamma, scale=(beta * (1 + nu) / (nu * alpha)).sqrt())
    found = evidential(coefficient=0.0, reduction="none")((gamma, raw_nu, raw_alpha, raw_beta), target)
    torch.testing.assert_close(found, torch.from_numpy(expected), **CLOSE)


def test_every_form_of_the_four_outputs_gives_the_same():
    raw, target = drawn(0, 6, 4, 2), drawn(1, 6, 2)
    expected = typed_evidential(*raw.unbind(1), target, 0.01)
    for form in (raw, raw.flatten(1), tuple(raw.unbind(1))):
        torch.testing.assert_close(evidential()(form, target), expected, **CLOSE)
        torch.testing.assert_close(evidential().estimate(form), raw[:, 0])
    flat = typed_evidential(*raw[:, :, 0].unbind(1), target[:, 0], 0.01)
    for goal in (target[:, 0], target[:, :1]):
        torch.testing.assert_close(evidential()(raw[:, :, 0], goal), flat, **CLOSE)


def test_evidential_refuses_parts_that_do_not_fit():
    one = torch.zeros(4)
    for prediction in (torch.zeros(4, 3), (one, one), (one, one, one, torch.zeros(4, 1)), (torch.zeros(4, 1),) * 4):
        with pytest.raises(LossMismatch, match="evidential"):
            evidential()(prediction, one)


def exact_evidential(raw, target):
    """Value and slopes of the likelihood in as many digits as it takes."""
    gamma, *rest = (mpmath.mpf(float(r)) for r in raw)

    def value(gamma, a, b, c):
        nu, alpha, beta = mpmath.log1p(mpmath.exp(a)), 1 + mpmath.log1p(mpmath.exp(b)), mpmath.log1p(mpmath.exp(c))
        omega, apart = 2 * beta * (1 + nu), mpmath.mpf(float(target)) - gamma
        likelihood = mpmath.log(mpmath.pi / nu) / 2 - alpha * mpmath.log(omega)
        likelihood += (alpha + mpmath.mpf(0.5)) * mpmath.log(apart**2 * nu + omega)
        return likelihood + mpmath.loggamma(alpha) - mpmath.loggamma(alpha + mpmath.mpf(0.5))

    here = (gamma, *rest)
    step = mpmath.mpf(10) ** -20
    slopes = []
    for i in range(4):
        up = [x + step if i == j else x for j, x in enumerate(here)]
        down = [x - step if i == j else x for j, x in enumerate(here)]
        slopes.append((value(*up) - value(*down)) / (2 * step))
    return float(value(*here)), [float(s) for s in slopes]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_evidential_is_finite_and_right_at_extreme_outputs(dtype):
    raws = [(0.5, a, b, c) for a in (-1e4, 1e4) for b in (-1e4, 1e4) for c in (-1e4, 1e4)]
    raws += [(0.5, -50.0, 3.0, 1.0), (0.5, 1.0, -60.0, -40.0), (1e4, 0.0, 0.0, 0.0), (0.5, 0.0, 20.0, 0.0)]
    raw, target = torch.tensor(raws, dtype=dtype), torch.full((len(raws),), 0.25, dtype=dtype)
    value, slopes = gradients(
        lambda *parts: evidential(coefficient=0.0, reduction="none")(parts, target), *raw.unbind(1)
    )
    with mpmath.workdps(60):
        exact = [exact_evidential(row, 0.25) for row in raws]
    relative = 1e-5 if dtype == torch.float32 else 1e-11
    expected = torch.tensor([e[0] for e in exact], dtype=dtype)
    torch.testing.assert_close(value, expected, rtol=relative, atol=10 * relative)
    for i, slope in enumerate(slopes):
        right = torch.tensor([e[1][i] for e in exact], dtype=dtype)
        assert slope.isfinite().all()
        # α·log Ω and its like meet at 1e4: what is left has the round-off of 1e4.
        torch.testing.assert_close(slope, right, rtol=1e2 * relative, atol=1e2 * relative)


def test_evidential_is_flat_where_nothing_differs():
    raw = torch.zeros(1, 4, dtype=F64)
    slope = grad(lambda r: evidential()(r, torch.zeros(1, dtype=F64)))(raw)
    assert slope.isfinite().all()
    assert slope[0, 0] == 0
    near = grad(lambda r: evidential()(r, torch.full((1,), 1e-12, dtype=F64)))(raw)
    torch.testing.assert_close(slope[0, 1:], near[0, 1:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "arguments",
    [{"beta": 1.1}, {"beta": -0.1}, {"beta": None}, {"eps": -1e-9}, {"log_variance": 1}, {"eps": math.nan}],
)
def test_beta_nll_refuses_what_is_outside_its_domain(arguments):
    with pytest.raises(InvalidHyperparameter, match=f"{next(iter(arguments))}="):
        beta_nll(**arguments)


def test_a_linear_layer_with_two_outputs_learns_mean_and_noise():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(512, 1, generator=generator, dtype=F64)
    y = 3 * x + 0.2 * torch.randn(512, 1, generator=generator, dtype=F64)
    for loss in (gaussian_nll(log_variance=True), beta_nll(log_variance=True)):
        layer = nn.Linear(1, 2, dtype=F64)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
        for _ in range(400):
            optimizer.zero_grad()
            loss(layer(x), y).backward()
            optimizer.step()
        mean, logarithm = layer(x).detach().unbind(1)
        torch.testing.assert_close(mean, 3 * x[:, 0], rtol=0, atol=0.1)
        torch.testing.assert_close((logarithm / 2).exp().mean(), torch.tensor(0.2, dtype=F64), rtol=0.15, atol=0)


def test_a_variance_beyond_all_numbers_has_a_finite_weighted_gradient():
    mean, spread = torch.ones(1, requires_grad=True), torch.full((1,), 1e4, requires_grad=True)
    beta_nll(log_variance=True)((mean, spread), torch.tensor([3.0])).backward()
    assert mean.grad.isfinite()
    assert spread.grad.isfinite()
