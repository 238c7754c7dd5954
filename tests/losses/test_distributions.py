"""Distances between distributions: torch's, scipy's and the definitions' values and gradients, and their limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import nn
from torch.func import grad, vmap

from fallline.errors import InvalidHyperparameter, LossMismatch
from fallline.losses.base import Prediction, Target
from fallline.losses.distributions import crps, kl_div
from loss_gradients import CLOSE, assert_equal_functions, gradients

CHEAP = settings(max_examples=30, deadline=None)
F64 = torch.float64


def drawn(seed, *shape):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@CHEAP
@given(
    shape=st.sampled_from([(5,), (6, 4), (2, 3, 4)]),
    log_target=st.booleans(),
    reduction=st.sampled_from(["batchmean", "sum", "none"]),
    seed=st.integers(0, 1000),
)
def test_kl_div_is_torchs(shape, log_target, reduction, seed):
    ours, torchs = (make(reduction=reduction, log_target=log_target) for make in (kl_div, nn.KLDivLoss))
    logarithm = drawn(seed + 1, *shape).log_softmax(-1)
    target = logarithm if log_target else logarithm.exp()
    assert_equal_functions(ours, torchs, drawn(seed, *shape).log_softmax(-1), target)


def test_the_default_is_the_divergence_and_mean_is_torchs_mean():
    prediction, target = drawn(0, 6, 4), drawn(1, 6, 4).softmax(1)
    expected = stats.entropy(target.numpy(), prediction.softmax(1).numpy(), axis=1).mean()
    assert kl_div()(prediction.log_softmax(1), target).item() == pytest.approx(expected, rel=1e-12)
    assert kl_div(reduction="mean")(prediction.log_softmax(1), target).item() == pytest.approx(expected / 4, rel=1e-12)
    per_sample = kl_div().per_sample(prediction.log_softmax(1), target)
    torch.testing.assert_close(per_sample.mean(), kl_div()(prediction.log_softmax(1), target), **CLOSE)
    assert kl_div().code() == "torch.nn.KLDivLoss(reduction='batchmean')"


def test_the_divergence_is_that_of_torchs_distributions():
    ours = kl_div()
    target = drawn(1, 6, 4).softmax(1)

    def theirs(logits):
        predicted, true = torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(probs=target)
        return torch.distributions.kl_divergence(true, predicted).mean()

    assert_equal_functions(lambda logits: ours(logits.log_softmax(1), target), theirs, drawn(0, 6, 4))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("log_target", [False, True])
def test_a_target_of_zero_counts_nothing_even_against_a_probability_of_zero(log_target, dtype):
    probabilities = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]], dtype=dtype)
    target = probabilities.log() if log_target else probabilities
    inf = math.inf
    prediction = torch.tensor([[-inf, 0.0, -inf], [-0.5, -1e4, -1e4]], dtype=dtype)
    loss = kl_div(log_target=log_target, reduction="none")
    value, (slope, back) = gradients(loss, prediction, target)
    half = 0.5 * math.log(0.5)
    expected = torch.tensor([[0, 0, 0], [half + 0.25, half + 5e3, 0]], dtype=dtype)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(slope, -probabilities)
    assert back.isfinite().all()


def test_kl_div_says_what_it_wants():
    assert kl_div().target == Target.PROBABILITIES
    assert kl_div(log_target=True).target == Target.LOG_PROBABILITIES
    with pytest.raises(LossMismatch, match=r"kl_div .*these would be broadcast"):
        kl_div()(torch.zeros(4, 3), torch.zeros(4, 1))
    with pytest.raises(InvalidHyperparameter, match="log_target='yes'"):
        kl_div(log_target="yes")


def test_gaussian_crps_is_the_integral_that_defines_it():
    mean, target, scale = drawn(0, 6), drawn(1, 6), drawn(2, 6).abs() + 0.1
    found = crps(reduction="none")((mean, scale), target)
    for i in range(6):
        m, t, s = float(mean[i]), float(target[i]), float(scale[i])
        low = integrate.quad(lambda x, m=m, s=s: stats.norm.cdf(x, m, s) ** 2, min(m, t) - 12 * s, t, epsabs=1e-13)
        high = integrate.quad(lambda x, m=m, s=s: stats.norm.sf(x, m, s) ** 2, t, max(m, t) + 12 * s, epsabs=1e-13)
        assert found[i].item() == pytest.approx(low[0] + high[0], rel=1e-10, abs=1e-11)


@CHEAP
@given(
    shapes=st.sampled_from([((6,), (6,)), ((6, 3), (6, 3)), ((6, 3), (6, 1)), ((6, 3), (6,)), ((6,), ())]),
    log_scale=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_gaussian_crps_is_the_papers_closed_form(shapes, log_scale, seed):
    mean, target, logarithm = drawn(seed, *shapes[0]), drawn(seed + 1, *shapes[0]), drawn(seed + 2, *shapes[1])

    def typed(m, part):
        scale = part.exp() if log_scale else part
        scale = scale.unsqueeze(-1) if shapes == ((6, 3), (6,)) else scale
        normal = torch.distributions.Normal(torch.zeros((), dtype=F64), torch.ones((), dtype=F64))
        z = (target - m) / scale
        return scale * (z * (2 * normal.cdf(z) - 1) + 2 * normal.log_prob(z).exp() - 1 / math.sqrt(math.pi))

    loss = crps(log_scale=log_scale, reduction="none")
    part = logarithm if log_scale else logarithm.exp()
    assert_equal_functions(lambda m, s: loss((m, s), target), typed, mean, part)


def test_every_form_of_a_mean_and_scale_gives_the_same():
    mean, target, scale = drawn(0, 6, 3), drawn(1, 6, 3), drawn(2, 6, 3).abs() + 0.1
    expected = crps()((mean, scale), target)
    for form in (torch.stack((mean, scale), 1), torch.cat((mean, scale), 1)):
        torch.testing.assert_close(crps()(form, target), expected, **CLOSE)
        torch.testing.assert_close(crps().estimate(form), mean)
    pair = torch.stack((mean[:, 0], scale[:, 0]), 1)
    torch.testing.assert_close(crps()(pair, target[:, :1]), crps()(pair, target[:, 0]), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_gaussian_crps_without_spread_is_the_absolute_error_and_with_much_a_share_of_the_spread(dtype):
    mean = torch.tensor([0.0, 1e4, -3.0, 0.0, 2.0], dtype=dtype)
    scale = torch.tensor([1e-30, 1e-30, -5.0, 1e30, 1e6], dtype=dtype)
    target = torch.zeros_like(mean)
    share = (math.sqrt(2) - 1) / math.sqrt(math.pi)
    value, (moved, spread) = gradients(lambda m, s: crps(reduction="none")((m, s), target), mean, scale)
    expected = torch.tensor([share * 1e-6, 1e4, 3.0, share * 1e30, share * 1e6], dtype=dtype)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(moved, torch.tensor([0.0, 1.0, -1.0, 0.0, 0.0], dtype=dtype), rtol=1e-5, atol=1e-5)
    away = -1 / math.sqrt(math.pi)
    torch.testing.assert_close(spread, torch.tensor([share, away, away, share, share], dtype=dtype))
    logarithm = torch.tensor([-1e4, 1.0, 60.0], dtype=dtype)
    value, slopes = gradients(
        lambda m, s: crps(log_scale=True, reduction="none")((m, s), target[:3]), mean[:3], logarithm
    )
    assert value.isfinite().all()
    assert all(slope.isfinite().all() for slope in slopes)
    torch.testing.assert_close(value[2], torch.tensor(share * math.exp(60), dtype=dtype), rtol=1e-5, atol=0)


def double_sum(members, target, fair):
    """The definition, with all pairs of members."""
    size = members.shape[1]
    pairs = (members.unsqueeze(1) - members.unsqueeze(2)).abs().sum((1, 2))
    accuracy = (members - target.unsqueeze(1)).abs().mean(1)
    return accuracy - pairs / (2 * size * (size - 1 if fair else size))


@CHEAP
@given(
    shape=st.sampled_from([(40, 2), (5, 7), (9, 4, 2), (9, 3, 2, 2), (3, 50)]),
    fair=st.booleans(),
    seed=st.integers(0, 999),
)
def test_ensemble_crps_is_its_definition_over_all_pairs(shape, fair, seed):
    target = drawn(seed + 1, shape[0], *shape[2:])
    loss = crps(distribution="ensemble", fair=fair, reduction="none")
    assert_equal_functions(lambda x: loss(x, target), lambda x: double_sum(x, target, fair), drawn(seed, *shape))


def test_ensemble_crps_is_the_integral_of_its_step_function():
    members, target = drawn(0, 4, 9), drawn(1, 4)
    grid = np.linspace(-12, 12, 240_001)
    for x, t, found in zip(
        members, target, crps(distribution="ensemble", reduction="none")(members, target), strict=True
    ):
        steps = (x.numpy()[:, None] <= grid).mean(0)
        expected = np.trapezoid((steps - (grid >= t.item())) ** 2, grid)
        assert found.item() == pytest.approx(expected, rel=1e-3)


def test_a_large_ensemble_tends_to_the_gaussian_and_a_fair_one_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    members = 1 + 2 * torch.randn(20_000, 3, generator=generator, dtype=F64)
    target = torch.full((20_000,), 0.3, dtype=F64)
    exact = crps()((torch.tensor([1.0], dtype=F64), torch.tensor([2.0], dtype=F64)), target[:1]).item()
    fair = crps(distribution="ensemble", fair=True)(members, target).item()
    plain = crps(distribution="ensemble")(members, target).item()
    assert fair == pytest.approx(exact, abs=0.02)
    assert plain - exact > 0.2
    many = members[:, 0].expand(1, -1)
    assert crps(distribution="ensemble")(many, target[:1]).item() == pytest.approx(exact, abs=0.02)


def test_one_member_has_the_absolute_error_and_cannot_be_fair():
    one, target = drawn(0, 5, 1), drawn(1, 5)
    torch.testing.assert_close(crps(distribution="ensemble")(one, target), (one[:, 0] - target).abs().mean(), **CLOSE)
    with pytest.raises(LossMismatch, match="2 or more"):
        crps(distribution="ensemble", fair=True)(one, target)


def test_ensembles_far_from_zero_lose_no_digits():
    members, target = torch.linspace(0, 1, 8).expand(3, 8) + 2**20, torch.full((3,), 0.5) + 2**20
    found = crps(distribution="ensemble", reduction="none")(members, target)
    expected = double_sum(members.double(), target.double(), fair=False)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_equal_members_part():
    slope = grad(lambda x: crps(distribution="ensemble")(x, torch.zeros(1)))(torch.ones(1, 4))
    assert slope.isfinite().all()
    torch.testing.assert_close(slope.sum(), torch.tensor(1.0))
    assert slope.unique().numel() == 4


def test_shapes_of_ensembles():
    members, target = drawn(0, 6, 4), drawn(1, 6)
    loss = crps(distribution="ensemble", reduction="none")
    torch.testing.assert_close(loss(members, target.unsqueeze(1)), loss(members, target).unsqueeze(1), **CLOSE)
    torch.testing.assert_close(loss.estimate(members), members.mean(1))
    assert loss.prediction == Prediction.ENSEMBLE
    for prediction, goal in [((6,), (6,)), ((4, 6), (6,)), ((6, 4), (6, 4)), ((6, 4, 2), (6, 4)), ((6, 0), (6,))]:
        with pytest.raises(LossMismatch, match="crps"):
            loss(torch.zeros(prediction), torch.zeros(goal))
    with pytest.raises(LossMismatch, match=r"of type tuple.*torch\.stack"):
        loss((members[:, 0], members[:, 1]), target)


def test_an_ensemble_may_be_one_of_a_population():
    members, target = drawn(0, 3, 6, 4), drawn(1, 3, 6)
    loss = crps(distribution="ensemble")
    together = vmap(grad(loss))(members, target)
    alone = torch.stack([grad(loss)(members[i], target[i]) for i in range(3)])
    torch.testing.assert_close(together, alone, **CLOSE)


@pytest.mark.parametrize(
    ("mean", "scale", "target"),
    [((4, 1), (4, 1), (4,)), ((4,), (4, 1), (4,)), ((4,), (4,), (4, 2)), ((4, 3), (3,), (4, 3))],
)
def test_what_would_be_broadcast_is_refused(mean, scale, target):
    with pytest.raises(LossMismatch, match="crps"):
        crps()((torch.zeros(mean), torch.ones(scale)), torch.zeros(target))


@pytest.mark.parametrize(
    "arguments",
    [
        {"distribution": "normal"},
        {"distribution": None},
        {"fair": True},
        {"fair": 1, "distribution": "ensemble"},
        {"log_scale": True, "distribution": "ensemble"},
        {"eps": 0.0},
    ],
)
def test_arguments_outside_their_domain_are_refused(arguments):
    with pytest.raises(InvalidHyperparameter, match=f"{next(iter(arguments))}="):
        crps(**arguments)


def test_crps_learns_the_distribution_that_made_the_data():
    target = torch.from_numpy(stats.norm.ppf((np.arange(2000) + 0.5) / 2000, 1.5, 0.7))
    parts = torch.zeros(2, dtype=F64)
    loss = crps(log_scale=True)
    for _ in range(300):
        parts = parts - 0.5 * grad(lambda p: loss(p.expand(2000, 2), target))(parts)
    torch.testing.assert_close(parts[0], torch.tensor(1.5, dtype=F64), rtol=0, atol=1e-3)
    torch.testing.assert_close(parts[1].exp(), torch.tensor(0.7, dtype=F64), rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_spread_beyond_all_numbers_has_a_finite_gradient(dtype):
    mean = torch.ones(1, dtype=dtype, requires_grad=True)
    spread = torch.full((1,), 1e4, dtype=dtype, requires_grad=True)
    crps(log_scale=True)((mean, spread), torch.full((1,), 3.0, dtype=dtype)).backward()
    assert mean.grad.isfinite()
    assert spread.grad.isfinite()
