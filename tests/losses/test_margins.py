"""The margin losses: torch's and scikit-learn's values and gradients, and what is right where torch overflows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_expit
from sklearn.metrics import hinge_loss
from torch.autograd import gradgradcheck
from torch.func import grad, vmap
from torch.testing._internal.common_modules import module_db

from fallline.errors import LossMismatch
from fallline.losses.margins import hinge, multilabel_margin, multilabel_soft_margin, soft_margin, squared_hinge

SHAPES = st.sampled_from([(5,), (4, 1), (3, 2), (2, 3, 2)])
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])
SEEDS = st.integers(0, 10_000)
CHEAP = settings(max_examples=40, deadline=None)
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
MAKERS = {
    "SoftMarginLoss": (soft_margin, 4),
    "MultiLabelMarginLoss": (multilabel_margin, 8),
    "MultiLabelSoftMarginLoss": (multilabel_soft_margin, 5),
}


def drawn(seed, *shape, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signs(seed, *shape):
    return drawn(seed, *shape).sign()


def gradient(loss, prediction, target):
    """Of the values' sum, or of their weighted sum where they are not reduced."""
    leaf = prediction.detach().clone().requires_grad_()
    value = loss(leaf, target)
    (found,) = torch.autograd.grad((value * torch.arange(1, value.numel() + 1).view(value.shape)).sum(), leaf)
    return value.detach(), found


def assert_same(ours, theirs, prediction, target, moves=True):
    value, found = gradient(ours, prediction, target)
    expected, slope = gradient(theirs, prediction, target)
    assert not moves or slope.abs().max() > 1e-6, "a problem without a gradient would prove nothing"
    torch.testing.assert_close(value, expected, **CLOSE)
    torch.testing.assert_close(found, slope, **CLOSE)


@pytest.mark.parametrize("name", MAKERS)
def test_every_sample_of_torchs_data_base(name):
    make, count = MAKERS[name]
    (info,) = [info for info in module_db if info.module_cls.__name__ == name]
    samples = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=True)
    assert len(samples) >= count
    for sample in samples:
        keywords = sample.constructor_input.kwargs
        assert not sample.constructor_input.args
        theirs = getattr(torch.nn, name)(**keywords)
        assert_same(make(**keywords), theirs, *sample.forward_input.args)


@CHEAP
@given(shape=SHAPES, margin=st.sampled_from([1.0, 0.3, 2.5]), seed=SEEDS)
def test_hinge_is_scikit_learns_and_its_slope_is_the_sign(shape, margin, seed):
    scores, target = drawn(seed, *shape), signs(seed + 1, *shape)
    target.view(-1)[:2] = torch.tensor([1.0, -1.0])  # scikit-learn misreads the signs where all are equal
    value, slope = gradient(hinge(margin=margin), scores, target)
    expected = margin * hinge_loss(target.flatten().numpy(), (scores / margin).flatten().numpy())
    torch.testing.assert_close(float(value), expected, **CLOSE)
    short = target * scores < margin
    torch.testing.assert_close(slope, torch.where(short, -target, 0.0) / scores.numel(), **CLOSE)


@CHEAP
@given(shape=SHAPES, margin=st.sampled_from([1.0, 0.3, 2.5]), how=st.sampled_from(["mean", "sum"]), seed=SEEDS)
def test_squared_hinge_is_its_formula(shape, margin, how, seed):
    scores, target = drawn(seed, *shape), signs(seed + 1, *shape)
    value, slope = gradient(squared_hinge(margin=margin, reduction=how), scores, target)
    pairs = zip(scores.flatten().tolist(), target.flatten().tolist(), strict=True)
    count = scores.numel() if how == "mean" else 1
    shortfalls = [max(0.0, margin - t * s) for s, t in pairs]
    torch.testing.assert_close(float(value), sum(each**2 for each in shortfalls) / count, **CLOSE)
    wanted = -2 * target * torch.tensor(shortfalls, dtype=torch.float64).view(shape) / count
    torch.testing.assert_close(slope, wanted, **CLOSE)


@CHEAP
@given(shape=SHAPES, how=REDUCTIONS, seed=SEEDS)
def test_soft_margin_is_torchs(shape, how, seed):
    ours, theirs = soft_margin(reduction=how), torch.nn.SoftMarginLoss(reduction=how)
    assert_same(ours, theirs, drawn(seed, *shape), signs(seed + 1, *shape))


def test_signs_may_be_whole_numbers():
    scores, target = drawn(0, 6), torch.tensor([1, -1, -1, 1, 1, -1])
    for loss in (hinge(), squared_hinge(), soft_margin()):
        torch.testing.assert_close(loss(scores, target), loss(scores, target.double()), **CLOSE)
    torch.testing.assert_close(
        multilabel_soft_margin()(scores, target > 0), multilabel_soft_margin()(scores, (target > 0).double()), **CLOSE
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_margin_is_exact_where_torchs_overflows(dtype):
    scores = torch.tensor([-1e4, -800.0, -100.0, -30.0, -21.0, -20.5, 0.0, 30.0, 80.0, 1e4], dtype=dtype)
    target = torch.ones_like(scores)
    torchs = gradient(torch.nn.SoftMarginLoss(), scores, target)
    assert torchs[0].isinf(), "the documented difference"
    assert torchs[1].isnan().any(), "the documented difference"
    for sign in (1, -1):
        values, slopes = gradient(soft_margin(reduction="sum"), sign * scores, sign * target)
        each = soft_margin(reduction="none")(sign * scores, sign * target)
        wanted = torch.from_numpy(-log_expit(scores.double().numpy())).to(dtype)
        torch.testing.assert_close(each, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=0)
        wanted = torch.from_numpy(-sign * expit(-scores.double().numpy())).to(dtype)
        torch.testing.assert_close(slopes, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=0)
        assert values.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_extreme_scores_stay_finite_and_right(dtype):
    scores = torch.tensor([1e4, 1e4, -1e4, -1e4], dtype=dtype)
    target = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype)
    size = float(scores[0])
    for loss, wanted, slope in (
        (hinge(reduction="none"), size + 1, 1),
        (squared_hinge(reduction="none"), (size + 1) ** 2, 2 * (size + 1)),
        (soft_margin(reduction="none"), size, 1),
    ):
        close = {"rtol": torch.finfo(dtype).eps * 4, "atol": 0}
        high = torch.tensor([0, wanted, wanted, 0], dtype=dtype)
        torch.testing.assert_close(loss(scores, target), high, **close)
        slopes = grad(lambda s, loss=loss: loss(s, target).sum())(scores)
        torch.testing.assert_close(slopes, torch.tensor([0, slope, -slope, 0], dtype=dtype), **close)
    yes = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=dtype)
    assert multilabel_soft_margin()(scores[None], yes) == size / 2
    slopes = grad(multilabel_soft_margin())(scores[None], yes)
    assert slopes.tolist() == [[0, 0.25, -0.25, 0]]
    sets = torch.tensor([[1, 2, -1, -1]])
    assert multilabel_margin()(scores[None], sets).isfinite()
    assert multilabel_margin()(scores[None].abs() * torch.tensor([-1, 1, 1, -1], dtype=dtype), sets) == 0


def test_the_corner_of_the_hinge_is_flat():
    corner = torch.tensor([1.0, -1.0]).double()
    assert gradient(hinge(), corner, corner)[1].tolist() == [0, 0]
    assert gradient(squared_hinge(), corner, corner)[1].tolist() == [0, 0]


@CHEAP
@given(samples=st.integers(1, 4), classes=st.integers(1, 6), how=REDUCTIONS, data=st.data(), seed=SEEDS)
def test_multilabel_margin_is_torchs_for_any_list(samples, classes, how, data, seed):
    """Lists of all lengths from none to full, with repeated classes, and with what follows the first −1."""
    row = st.lists(st.integers(-1, classes - 1), min_size=classes, max_size=classes)
    target = torch.tensor(data.draw(st.lists(row, min_size=samples, max_size=samples)))
    ours, theirs = multilabel_margin(reduction=how), torch.nn.MultiLabelMarginLoss(reduction=how)
    assert_same(ours, theirs, drawn(seed, samples, classes), target, moves=False)
    assert_same(ours, theirs, drawn(seed, samples, classes)[0], target[0], moves=False)


def test_multilabel_margin_under_vmap_and_differentiated_twice():
    scores = drawn(0, 3, 4, 5)
    target = torch.tensor([[3, 0, -1, 1, 2], [1, -1, -1, -1, -1], [-1, 0, 1, 2, 3], [4, 3, 2, 1, 0]])
    targets = torch.stack([target, target.flip(0), target.roll(1, 0)])
    for of, dims in ((targets, (0, 0)), (target, (0, None))):
        together = vmap(grad(multilabel_margin()), in_dims=dims)(scores, of)
        for i in range(3):
            wanted = gradient(torch.nn.MultiLabelMarginLoss(), scores[i], of[i] if dims[1] == 0 else of)[1]
            assert wanted.abs().max() > 1e-6
            torch.testing.assert_close(together[i], wanted, **CLOSE)
    assert gradgradcheck(lambda s: multilabel_margin()(s, target).square(), (scores[0].requires_grad_(),))


@CHEAP
@given(
    shape=st.sampled_from([(4,), (3, 4), (2, 3, 4)]),
    weighted=st.booleans(),
    soft=st.booleans(),
    how=REDUCTIONS,
    seed=SEEDS,
)
def test_multilabel_soft_margin_is_torchs(shape, weighted, soft, how, seed):
    weight = drawn(seed + 2, 4).abs() if weighted else None
    target = drawn(seed + 1, *shape).sigmoid()
    target = target if soft else target.round()
    theirs = torch.nn.MultiLabelSoftMarginLoss(weight=weight, reduction=how)
    assert_same(multilabel_soft_margin(weight=weight, reduction=how), theirs, drawn(seed, *shape), target)


@pytest.mark.parametrize("make", [hinge, squared_hinge, soft_margin, multilabel_margin, multilabel_soft_margin])
def test_shapes_that_would_broadcast_are_refused(make):
    with pytest.raises(LossMismatch, match=rf"{make().name} .*target.unsqueeze\(1\)"):
        make()(torch.zeros(3, 1), torch.ones(3))


def test_multilabel_losses_refuse_what_is_in_the_others_coding():
    with pytest.raises(LossMismatch, match=r"class indices of type int64.*multilabel_soft_margin"):
        multilabel_margin()(torch.zeros(2, 3), torch.ones(2, 3))
    for weights in ((1.0, 2.0), (1.0, 2.0, 3.0, 4.0), ((1.0,) * 3,) * 3):
        with pytest.raises(LossMismatch, match=r"multilabel_soft_margin .*weight"):
            multilabel_soft_margin(weight=weights)(torch.zeros(2, 3), torch.ones(2, 3))
