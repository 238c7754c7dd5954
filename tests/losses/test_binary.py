"""The cross-entropies of yes or no and the asymmetric loss: torch's values and gradients, the paper's formula, and what
is exact where torch's is not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_expit
from torch.func import grad, vmap
from torch.nn import functional
from torch.testing._internal.common_modules import module_db

from fallline.errors import LossMismatch
from fallline.losses.binary import asymmetric, binary_cross_entropy, binary_cross_entropy_with_logits

SHAPES = st.sampled_from([(5,), (4, 1), (3, 2), (2, 3, 2)])
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])
SEEDS = st.integers(0, 10_000)
CHEAP = settings(max_examples=40, deadline=None)
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def drawn(seed, *shape, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss, prediction, target):
    """Of the values' sum, or of their weighted sum where they are not reduced."""
    leaf = prediction.detach().clone().requires_grad_()
    value = loss(leaf, target)
    (found,) = torch.autograd.grad((value * torch.arange(1, value.numel() + 1).view(value.shape)).sum(), leaf)
    return value.detach(), found


def assert_same(ours, theirs, prediction, target):
    value, found = gradient(ours, prediction, target)
    expected, slope = gradient(theirs, prediction, target)
    assert slope.abs().max() > 1e-6, "a problem without a gradient would prove nothing"
    torch.testing.assert_close(value, expected, **CLOSE)
    torch.testing.assert_close(found, slope, **CLOSE)


def torchs_samples(name):
    (info,) = [info for info in module_db if info.module_cls.__name__ == name]
    return info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=True)


@pytest.mark.parametrize(
    ("make", "name", "count"),
    [(binary_cross_entropy, "BCELoss", 6), (binary_cross_entropy_with_logits, "BCEWithLogitsLoss", 6)],
)
def test_every_sample_of_torchs_data_base(make, name, count):
    samples = torchs_samples(name)
    assert len(samples) >= count
    for sample in samples:
        keywords = sample.constructor_input.kwargs
        assert not sample.constructor_input.args
        theirs = getattr(torch.nn, name)(**keywords)
        assert_same(make(**keywords), theirs, *sample.forward_input.args)


@CHEAP
@given(shape=SHAPES, weighted=st.booleans(), positive=st.booleans(), hard=st.booleans(), how=REDUCTIONS, seed=SEEDS)
def test_binary_cross_entropy_with_logits_is_torchs(shape, weighted, positive, hard, how, seed):
    prediction = drawn(seed, *shape)
    prediction.view(-1)[0] = 0.0  # where a spelling by |z| has a kink
    target = drawn(seed + 1, *shape).sigmoid()
    target = target.round() if hard else target
    arguments = {
        "weight": drawn(seed + 2, shape[-1]).abs() if weighted else None,
        "pos_weight": drawn(seed + 3, shape[-1]).abs() if positive else None,
        "reduction": how,
    }
    ours = binary_cross_entropy_with_logits(**arguments)
    assert_same(ours, torch.nn.BCEWithLogitsLoss(**arguments), prediction, target)
    wants = grad(lambda y: torch.nn.BCEWithLogitsLoss(**{**arguments, "reduction": "sum"})(prediction, y))(target)
    slope = grad(lambda y: ours(prediction, y).sum() * (target.numel() if how == "mean" else 1))(target)
    torch.testing.assert_close(slope, wants, **CLOSE)


@CHEAP
@given(shape=SHAPES, weighted=st.booleans(), hard=st.booleans(), how=REDUCTIONS, seed=SEEDS)
def test_binary_cross_entropy_is_torchs(shape, weighted, hard, how, seed):
    prediction = drawn(seed, *shape).sigmoid()
    target = drawn(seed + 1, *shape).sigmoid()
    target = target.round() if hard else target
    arguments = {"weight": drawn(seed + 2, shape[-1]).abs() if weighted else None, "reduction": how}
    assert_same(binary_cross_entropy(**arguments), torch.nn.BCELoss(**arguments), prediction, target)


def test_one_positive_weight_is_a_number_and_several_are_fixed():
    one, several = binary_cross_entropy_with_logits(pos_weight=3), binary_cross_entropy_with_logits(pos_weight=(3.0, 2))
    assert one.numbers == {"pos_weight": 3}
    assert several.numbers == {}
    assert binary_cross_entropy_with_logits().numbers == {}
    assert one.structure == binary_cross_entropy_with_logits(pos_weight=0.5).structure
    assert several.structure != binary_cross_entropy_with_logits(pos_weight=(3.0, 1)).structure
    prediction, target = drawn(0, 4, 2), drawn(1, 4, 2).sigmoid()
    weights = torch.tensor([0.0, 2.0], dtype=torch.float64)
    each = vmap(lambda weight: binary_cross_entropy_with_logits(pos_weight=weight)(prediction, target))(weights)
    for found, weight in zip(each, weights, strict=True):
        wanted = functional.binary_cross_entropy_with_logits(prediction, target, pos_weight=weight)
        torch.testing.assert_close(found, wanted, **CLOSE)


def test_targets_may_be_booleans_or_whole_numbers():
    logits, target = drawn(0, 6), torch.tensor([0, 1, 1, 0, 1, 0])
    for loss, prediction in ((binary_cross_entropy_with_logits(), logits), (binary_cross_entropy(), logits.sigmoid())):
        for same in (target, target.bool(), target.float()):
            torch.testing.assert_close(loss(prediction, same), loss(prediction, target.double()), **CLOSE)


@pytest.mark.parametrize("yes", [0.0, 1.0])
def test_both_tails_of_the_logits_are_exact(yes):
    logits = torch.cat([torch.linspace(-700, 700, 57), torch.tensor([37.4, -37.4, 1e-9])]).double()
    target = torch.full_like(logits, yes)
    side = 1 if yes else -1
    values, slopes = gradient(binary_cross_entropy_with_logits(reduction="sum"), logits, target)
    each = binary_cross_entropy_with_logits(reduction="none")(logits, target)
    expected = torch.from_numpy(-log_expit(side * logits.numpy()))
    exact = torch.from_numpy(-side * expit(-side * logits.numpy()))
    torch.testing.assert_close(each, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(slopes, exact, rtol=1e-14, atol=0)
    torch.testing.assert_close(values, expected.sum(), **CLOSE)
    if yes:
        torchs = gradient(functional.binary_cross_entropy_with_logits, torch.tensor(40.0).double(), target[0])[1]
        assert torchs == 0, "torch has lost what is exact here, the documented difference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite_and_right(dtype):
    logits = torch.tensor([1e4, 1e4, 1e4, -1e4, -1e4, -1e4], dtype=dtype)
    target = torch.tensor([0.0, 0.5, 1.0, 0.0, 0.5, 1.0], dtype=dtype)
    loss = binary_cross_entropy_with_logits(reduction="none")
    size = float(logits[0])
    assert loss(logits, target).tolist() == [size, size / 2, 0, 0, size / 2, size]
    slopes = grad(lambda z: loss(z, target).sum())(logits)
    assert slopes.tolist() == [1, 0.5, 0, 0, -0.5, -1]
    weighted = binary_cross_entropy_with_logits(pos_weight=2.0, reduction="none")
    assert grad(lambda z: weighted(z, target).sum())(logits).tolist() == [1, 0.5, 0, 0, -1, -2]


SURE = [0.0, 1e-45, 1e-40, 1e-38, 1e-20, 1e-13, 0.3, 1 - 1e-7, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("yes", [0.0, 0.3, 1.0])
def test_sure_probabilities_have_torchs_values(yes, dtype):
    prediction = torch.tensor(SURE, dtype=dtype)
    target = torch.full_like(prediction, yes)
    ours = binary_cross_entropy(reduction="none")(prediction, target)
    torchs = functional.binary_cross_entropy(prediction, target, reduction="none")
    torch.testing.assert_close(ours, torchs, rtol=4 * torch.finfo(dtype).eps, atol=1e-44)
    assert ours.max() > 29


@pytest.mark.parametrize(("dtype", "lowest"), [(torch.float32, -72.0), (torch.float64, -99.0)])
def test_a_sigmoid_that_is_sure_of_the_wrong_answer_goes_on_learning(dtype, lowest):
    logits = torch.linspace(lowest, 12.0, 40, dtype=dtype)
    for yes in (0.0, 1.0):
        target = torch.full_like(logits, yes)
        _, slopes = gradient(lambda z, y: binary_cross_entropy(reduction="sum")(z.sigmoid(), y), logits, target)
        exact = torch.from_numpy(expit(logits.double().numpy())) - yes
        torch.testing.assert_close(slopes.double(), exact, rtol=1e-5, atol=1e-6)
    fifty = torch.tensor(-50.0, dtype=dtype)
    torchs = gradient(lambda z, y: functional.binary_cross_entropy(z.sigmoid(), y), fifty, torch.ones_like(fifty))[1]
    ours = gradient(lambda z, y: binary_cross_entropy()(z.sigmoid(), y), fifty, torch.ones_like(fifty))[1]
    assert abs(torchs) < 1e-9, "torch's gradient vanishes, the documented difference"
    assert ours == pytest.approx(-1, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_certainty_has_a_finite_gradient_of_the_right_sign(dtype):
    prediction = torch.tensor([0.0, 0.0, 1.0, 1.0, 1e-45, 1e-30], dtype=dtype)
    target = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1.0], dtype=dtype)
    _, slopes = gradient(binary_cross_entropy(reduction="sum"), prediction, target)
    assert slopes.isfinite().all()
    assert slopes[0] == 1
    assert slopes[3] == -1
    assert slopes[1] < -1e3
    assert slopes[2] > 500
    assert (slopes[4:] < -1e3).all()
    logits = torch.tensor([-200.0, 200.0, -200.0, 200.0], dtype=dtype)
    answers = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=dtype)
    _, slopes = gradient(lambda z, y: binary_cross_entropy()(z.sigmoid(), y), logits, answers)
    assert slopes.isfinite().all()
    if dtype == torch.float16:
        torchs = gradient(functional.binary_cross_entropy, prediction[3], target[3])[1]
        assert torchs.isnan(), "torch's gradient of a perfect prediction, the documented difference"


def test_the_slope_ends_where_the_documentation_says():
    zero, one = torch.zeros(1), torch.ones(1)
    for dtype, nearest in ((torch.float32, 1.2325951644078310e-32), (torch.float64, math.exp(-100))):
        _, slope = gradient(binary_cross_entropy(), zero.to(dtype), one.to(dtype))
        assert float(slope) == pytest.approx(-1 / nearest, rel=1e-6)
        _, slope = gradient(binary_cross_entropy(), one.to(dtype), zero.to(dtype))
        assert float(slope) == pytest.approx(4 / torch.finfo(dtype).eps, rel=1e-6)
    for value in (math.exp(-101), math.exp(-99.5)):  # on both sides of the cut
        _, slope = gradient(binary_cross_entropy(), torch.tensor(value, dtype=torch.float64), one.double()[0])
        assert float(slope) == pytest.approx(-1 / max(value, math.exp(-100)), rel=1e-6)


def test_what_is_no_probability_has_no_value():
    for wrong in (-0.1, 1.1, -1e-9):
        for yes in (0.0, 1.0):
            assert binary_cross_entropy()(torch.tensor([0.5, wrong]).double(), torch.full((2,), yes).double()).isnan()


def ridnik(logits, target, gamma_neg, gamma_pos, clip):
    """Equations 4 to 7 of the paper, element by element."""
    total = torch.zeros((), dtype=logits.dtype)
    for z, y in zip(logits.flatten(), target.flatten(), strict=True):
        p = 1 / (1 + torch.exp(-z))
        if y == 1:
            total = total - (1 - p) ** gamma_pos * torch.log(p)
        elif p > clip:
            shifted = p - clip
            total = total - shifted**gamma_neg * torch.log(1 - shifted)
    return total


@pytest.mark.parametrize(
    "numbers", [(4.0, 1.0, 0.05), (2.0, 0.0, 0.2), (0.0, 3.0, 0.0), (1.0, 1.0, 0.0), (0.5, 0.5, 0.3), (0.0, 0.0, 0.1)]
)
def test_asymmetric_is_the_papers_formula(numbers):
    logits, target = drawn(0, 6, 4), drawn(1, 6, 4).sigmoid().round()
    assert ((logits.sigmoid() < 0.05) & (target == 0)).any(), "a negative that the clip silences"
    arguments = dict(zip(("gamma_neg", "gamma_pos", "clip"), numbers, strict=True))
    assert_same(asymmetric(**arguments, reduction="sum"), lambda z, y: ridnik(z, y, *numbers), logits, target)
    assert_same(asymmetric(**arguments), lambda z, y: ridnik(z, y, *numbers) / z.numel(), logits, target)


def test_asymmetrics_defaults_are_the_papers_code():
    logits, target = drawn(0, 6, 4), drawn(1, 6, 4).sigmoid().round()
    explicit = asymmetric(gamma_neg=4.0, gamma_pos=1.0, clip=0.05)
    assert asymmetric() == explicit
    assert asymmetric().numbers == {"gamma_neg": 4.0, "gamma_pos": 1.0, "clip": 0.05}
    slope = grad(lambda clip: asymmetric()(logits, target, numbers={"clip": clip}))
    assert slope(torch.tensor(0.0).double()) < -1e-3
    assert slope(torch.tensor(0.1).double()) < -1e-4


def test_asymmetric_without_asymmetry_is_cross_entropy_and_focal():
    logits, target = drawn(2, 5, 3), drawn(3, 5, 3).sigmoid().round()
    plain = asymmetric(gamma_neg=0, gamma_pos=0, clip=0)
    assert_same(plain, functional.binary_cross_entropy_with_logits, logits, target)

    def focal(z, y):  # T.-Y. Lin et al. 2017, equation 4
        right = torch.where(y == 1, z.sigmoid(), 1 - z.sigmoid())
        return (-((1 - right) ** 2) * right.log()).mean()

    assert_same(asymmetric(gamma_neg=2, gamma_pos=2, clip=0), focal, logits, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [0.0, 1e-9, 0.05, 0.5])
def test_asymmetric_at_extreme_logits(clip, dtype):
    logits = torch.tensor([1e4, -1e4, 1e4, -1e4, 90.0, 90.0, -90.0, -90.0], dtype=dtype)
    target = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0], dtype=dtype)
    for clip_ in (clip, torch.tensor(clip, dtype=dtype)):
        numbers = {"gamma_neg": 4.0, "gamma_pos": 1.0, "clip": clip_}
        values = asymmetric(reduction="none")(logits, target, numbers=numbers)
        slopes = grad(lambda z, numbers=numbers: asymmetric(reduction="sum")(z, target, numbers=numbers))(logits)
        highest = -((1 - clip) ** 4) * math.log(clip) if clip else 1e4
        ninety = highest if clip else 90.0
        wanted = torch.tensor([0.0, 0.0, highest, 1e4, 0.0, ninety, 90.0, 0.0], dtype=dtype)
        torch.testing.assert_close(values, wanted, rtol=1e-6, atol=1e-6)
        steepest = 0.0 if clip else 1.0
        wanted = torch.tensor([0.0, 0.0, steepest, -1.0, 0.0, steepest, -1.0, 0.0], dtype=dtype)
        torch.testing.assert_close(slopes, wanted, rtol=1e-6, atol=1e-6)


def test_asymmetric_takes_numbers_of_each_trial_from_zero_on():
    logits, target = drawn(4, 6, 3), drawn(5, 6, 3).sigmoid().round()
    for name, values in (("clip", [0.0, 0.05, 0.9]), ("gamma_neg", [0.0, 0.5, 4.0]), ("gamma_pos", [0.0, 0.5, 4.0])):
        swept = torch.tensor(values, dtype=torch.float64)
        slopes = vmap(lambda v, name=name: grad(lambda z: asymmetric()(z, target, numbers={name: v}))(logits))(swept)
        for row, value in zip(slopes, values, strict=True):
            torch.testing.assert_close(row, grad(lambda z: asymmetric(**{name: value})(z, target))(logits), **CLOSE)  # noqa: B023


@pytest.mark.parametrize(
    "loss", [binary_cross_entropy(), binary_cross_entropy_with_logits(), asymmetric()], ids=lambda loss: loss.name
)
def test_shapes_that_would_broadcast_are_refused(loss):
    with pytest.raises(LossMismatch, match=rf"{loss.name} .*target.unsqueeze\(1\)"):
        loss(torch.full((3, 1), 0.5), torch.ones(3))


@pytest.mark.parametrize(
    ("make", "names"),
    [(binary_cross_entropy, ["weight"]), (binary_cross_entropy_with_logits, ["weight", "pos_weight"])],
)
def test_factors_that_do_not_fit_are_refused(make, names):
    prediction = torch.full((3, 2), 0.5)
    for name in names:
        for factors in ([1.0] * 3, [[[1.0, 2.0]]]):
            with pytest.raises(LossMismatch, match=name):
                make(**{name: torch.tensor(factors)})(prediction, prediction)
        assert make(**{name: torch.tensor([[1.0], [2.0], [3.0]])})(prediction, prediction).isfinite()
