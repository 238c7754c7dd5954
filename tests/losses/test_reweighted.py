"""Focal, poly, generalised and symmetric cross-entropy: the formulas of their papers, and the limits where p is 0 or 1
to every digit that a number has."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_optimizer.loss import FocalLoss
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap
from torch.nn import functional

import loss_gradients
from fallline.errors import LossMismatch
from fallline.losses.reweighted import focal, generalized_cross_entropy, poly, symmetric_cross_entropy
from loss_gradients import labels, value_and_gradient

CHEAP = settings(max_examples=30, deadline=None)
SEEDS = st.integers(0, 10_000)
FURTHER = st.sampled_from([(), (3,), (2, 2)])
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])
IGNORED = st.sampled_from([-100, 0, 2, 255])
CLOSE = {"rtol": 1e-11, "atol": 1e-12}
EVERY = [
    focal(gamma=0.0),
    focal(gamma=0.3),
    focal(gamma=2.0),
    focal(gamma=0.5, alpha=[0.5, 1.0, 2.0]),
    poly(),
    poly(epsilon=-1.0),
    generalized_cross_entropy(),
    generalized_cross_entropy(q=1e-6),
    symmetric_cross_entropy(),
]


def drawn(seed, *shape, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(ours, theirs, prediction, target, **tolerance):
    loss_gradients.assert_same(ours, theirs, prediction, target, **(tolerance or CLOSE))


def of_probability(formula, ignored, reduction):
    """The loss with the value `formula(p, y)` for the probability p of the label y, as plainly as can be."""

    def loss(prediction, target):
        kept = target != ignored
        index = torch.where(kept, target, 0)
        p = prediction.softmax(1).gather(1, index.unsqueeze(1)).squeeze(1)
        values = torch.where(kept, formula(p, index), 0.0)
        return {"none": values, "sum": values.sum(), "mean": values.sum() / kept.sum()}[reduction]

    return loss


def problem(seed, further, ignored):
    prediction, target = drawn(seed, 6, 4, *further), labels(seed, 4, 6, *further)
    target[0], target[1] = ignored, 1
    return prediction, target


ALPHA = torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=torch.float64)


@CHEAP
@given(FURTHER, st.sampled_from([0.0, 0.4, 1.0, 2.0, 3.5]), st.booleans(), IGNORED, REDUCTIONS, SEEDS)
def test_focal_of_labels_is_the_papers_formula(further, gamma, several, ignored, reduction, seed):
    arguments = {"gamma": gamma, "ignore_index": ignored, "reduction": reduction}
    loss = focal(**arguments, alpha=ALPHA if several else None)

    def formula(p, y):
        return -(ALPHA[y] if several else 1.0) * (1 - p) ** gamma * p.log()

    assert_same(loss, of_probability(formula, ignored, reduction), *problem(seed, further, ignored))


@CHEAP
@given(FURTHER, st.sampled_from([-1.0, 0.0, 0.5, 2.0]), IGNORED, REDUCTIONS, SEEDS)
def test_poly_is_the_papers_formula(further, epsilon, ignored, reduction, seed):
    loss = poly(epsilon=epsilon, ignore_index=ignored, reduction=reduction)
    plain = of_probability(lambda p, y: -p.log() + epsilon * (1 - p), ignored, reduction)
    assert_same(loss, plain, *problem(seed, further, ignored))


@CHEAP
@given(FURTHER, st.sampled_from([0.1, 0.7, 1.0]), IGNORED, REDUCTIONS, SEEDS)
def test_generalized_cross_entropy_is_the_papers_formula(further, q, ignored, reduction, seed):
    loss = generalized_cross_entropy(q=q, ignore_index=ignored, reduction=reduction)
    plain = of_probability(lambda p, y: (1 - p**q) / q, ignored, reduction)
    assert_same(loss, plain, *problem(seed, further, ignored))


@CHEAP
@given(st.sampled_from([0.0, 0.1, 6.0]), st.sampled_from([0.1, 1.0]), st.sampled_from([-4.0, -9.0]), REDUCTIONS, SEEDS)
def test_symmetric_cross_entropy_is_the_papers_formula(alpha, beta, log_zero, reduction, seed):
    prediction, target = drawn(seed, 6, 4), labels(seed, 4, 6)

    def plain(z, y):
        p, rows = z.softmax(1), functional.one_hot(y, 4).double()
        reverse = -(p * rows.clamp(min=math.exp(log_zero)).log()).sum(1)
        values = alpha * functional.cross_entropy(z, y, reduction="none") + beta * reverse
        return {"none": values, "sum": values.sum(), "mean": values.mean()}[reduction]

    loss = symmetric_cross_entropy(alpha=alpha, beta=beta, log_zero=log_zero, reduction=reduction)
    assert_same(loss, plain, prediction, target)


@pytest.mark.parametrize("ignored", [-100, 2])
@pytest.mark.parametrize(
    "loss",
    [focal, poly, generalized_cross_entropy, symmetric_cross_entropy],
)
def test_at_one_end_of_their_numbers_they_are_the_cross_entropy(loss, ignored):
    limit = {
        focal: {"gamma": 0.0},
        poly: {"epsilon": 0.0},
        generalized_cross_entropy: {"q": 1e-13},
        symmetric_cross_entropy: {"alpha": 1.0, "beta": 0.0},
    }
    prediction, target = problem(0, (2, 3), ignored)
    torchs = torch.nn.CrossEntropyLoss(ignore_index=ignored)
    assert_same(loss(**limit[loss], ignore_index=ignored), torchs, prediction, target)


# The sigmoid form of the focal loss.


def torchvisions(gamma, alpha, reduction):
    """`sigmoid_focal_loss` as its documentation and the paper's equations 4 and 5 give it."""

    def loss(z, t):
        p = z.sigmoid()
        right = p * t + (1 - p) * (1 - t)
        values = functional.binary_cross_entropy_with_logits(z, t, reduction="none") * (1 - right) ** gamma
        if alpha is not None:
            values = (alpha * t + (1 - alpha) * (1 - t)) * values
        return {"none": values, "sum": values.sum(), "mean": values.mean()}[reduction]

    return loss


@CHEAP
@given(
    st.sampled_from([(5,), (4, 1), (3, 4), (2, 3, 2)]),
    st.sampled_from([0.0, 0.4, 1.0, 2.0, 3.5]),
    st.sampled_from([None, 0.0, 0.25, 1.0]),
    st.booleans(),
    REDUCTIONS,
    SEEDS,
)
def test_focal_of_yes_and_no_is_torchvisions(shape, gamma, alpha, soft, reduction, seed):
    prediction, target = drawn(seed, *shape), (drawn(seed + 1, *shape) > 0).double()
    target.view(-1)[0] = 1 - (alpha == 0.0)  # at least one element has a weight
    if soft:
        target.view(-1)[1:] = drawn(seed + 2, target.numel() - 1).sigmoid()
    loss = focal(gamma=gamma, alpha=alpha, reduction=reduction)
    assert_same(loss, torchvisions(gamma, alpha, reduction), prediction, target, rtol=1e-10, atol=1e-12)


def test_focal_of_yes_and_no_is_that_of_another_package():
    prediction, target = drawn(0, 8, 3), (drawn(1, 8, 3) > 0).double()
    assert_same(focal(gamma=1.5), FocalLoss(gamma=1.5), prediction, target, rtol=1e-10, atol=1e-12)


def test_of_two_classes_both_forms_of_the_focal_loss_are_equal():
    odds, target = drawn(0, 9), labels(0, 2, 9)
    logits = torch.stack([torch.zeros_like(odds), odds], 1)
    torch.testing.assert_close(
        focal(gamma=1.5, alpha=[0.75, 0.25], reduction="none")(logits, target),
        focal(gamma=1.5, alpha=0.25, reduction="none")(odds, target.double()),
        **CLOSE,
    )


# Both ends.

# Of log p and r = 1 − p: the value, and p · d/dp of it.
FORMULAS = {
    focal: (
        {"gamma": 0.25},
        lambda log, r: -(r**0.25) * log,
        lambda log, r: 0.25 * r ** mpmath.mpf(-0.75) * mpmath.exp(log) * log - r**0.25,
    ),
    poly: (
        {"epsilon": 2.0},
        lambda log, r: -log + 2 * r,
        lambda log, r: -1 - 2 * mpmath.exp(log),
    ),
    generalized_cross_entropy: (
        {"q": 0.5},
        lambda log, r: -2 * mpmath.expm1(log / 2),
        lambda log, r: -mpmath.exp(log / 2),
    ),
    symmetric_cross_entropy: (
        {"alpha": 0.5, "beta": 2.0},
        lambda log, r: -log / 2 + 8 * r,
        lambda log, r: mpmath.mpf(-0.5) - 8 * mpmath.exp(log),
    ),
}
LEADS = [-1e4, -700.0, -40.0, -1.0, 0.0, 1.0, 20.0, 40.0, 300.0, 1e4]


def log_and_rest(own, others):
    """log p and 1 − p to 60 digits, without a subtraction."""
    return -mpmath.log1p(others / own), others / (own + others)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("make", FORMULAS)
def test_values_and_gradients_keep_their_digits_however_certain_the_prediction(make, lead):
    arguments, formula, slope = FORMULAS[make]
    with mpmath.workdps(60):
        own, second, third = (mpmath.exp(mpmath.mpf(z)) for z in (lead, 0.25, -0.5))
        log, r = log_and_rest(own, second + third)
        expected = float(formula(log, r))
        # d log p/dz_y = r and d log p/dz_c = −p_c.
        total = own + second + third
        slopes = [float(slope(log, r) * each) for each in (r, -second / total, -third / total)]
    prediction = torch.tensor([[lead, 0.25, -0.5]], dtype=torch.float64)
    value, found = value_and_gradient(make(**arguments), prediction, torch.tensor([0]))
    torch.testing.assert_close(value.item(), expected, rtol=1e-11, atol=1e-300)
    # The gradient of expm1 near −1 is right to a last digit of 1.
    smallest = 1e-15 if make is generalized_cross_entropy else 1e-300
    torch.testing.assert_close(found[0], torch.tensor(slopes, dtype=torch.float64), rtol=1e-11, atol=smallest)


@pytest.mark.parametrize("answer", [0.0, 1.0])
@pytest.mark.parametrize("lead", LEADS)
def test_focal_of_yes_and_no_keeps_its_digits_however_certain_the_prediction(lead, answer):
    sign = 1 if answer else -1
    _, formula, slope = FORMULAS[focal]
    with mpmath.workdps(60):
        log, r = log_and_rest(mpmath.exp(mpmath.mpf(lead)), mpmath.mpf(1))
        expected, expected_slope = float(formula(log, r)), float(sign * slope(log, r) * r)
    prediction, target = torch.tensor([[sign * lead], [answer]], dtype=torch.float64)
    value, found = value_and_gradient(focal(gamma=0.25), prediction, target)
    torch.testing.assert_close(value.item(), expected, rtol=1e-11, atol=1e-300)
    torch.testing.assert_close(found.item(), expected_slope, rtol=1e-11, atol=1e-300)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_extreme_and_impossible_logits_have_finite_values_and_gradients(loss, dtype):
    inf = math.inf
    rows = [[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4], [0.0, -inf, 2.0], [0.0, -inf, -inf], [-1e4, -inf, -inf], [1.0] * 3]
    prediction = torch.tensor(rows, dtype=dtype, requires_grad=True)
    values = loss.per_sample(prediction, torch.zeros(6, dtype=torch.int64))
    (slopes,) = torch.autograd.grad(values.sum(), prediction, create_graph=True)
    (curvature,) = torch.autograd.grad(slopes.square().sum(), prediction)
    assert values.isfinite().all()
    assert slopes.isfinite().all()
    assert curvature.isfinite().all()
    assert (values[[0, 3, 4]] == 0).all(), "certain and right"
    assert (slopes[[0, 3, 4]] == 0).all()
    assert values[2] > 0.1 * values[5]
    assert slopes[2, 1] == 0, "an impossible class does not move"


@pytest.mark.parametrize("loss", EVERY[:-2], ids=repr)
def test_half_precision_has_room_for_certainty(loss):
    prediction = torch.tensor([[1e4, -math.inf, -math.inf]], dtype=torch.float16)
    value, slopes = value_and_gradient(loss, prediction, torch.tensor([0]))
    assert value == 0
    assert (slopes == 0).all()


@pytest.mark.parametrize("loss", [focal(gamma=0.0), focal(), poly(), generalized_cross_entropy()], ids=repr)
def test_one_class_alone_is_certain(loss):
    value, slopes = value_and_gradient(loss, torch.tensor([[3.0]]), torch.tensor([0]))
    assert value == 0
    assert slopes == 0


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_of_yes_and_no_have_finite_values_and_gradients(gamma, dtype):
    prediction = torch.tensor([1e4, -1e4, 1e4, -1e4, 100.0, 0.0, 1e4], dtype=dtype, requires_grad=True)
    target = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5], dtype=dtype)
    values = focal(gamma=gamma, reduction="none")(prediction, target)
    (slopes,) = torch.autograd.grad(values.sum(), prediction, create_graph=True)
    (curvature,) = torch.autograd.grad(slopes.square().sum(), prediction)
    assert slopes.isfinite().all()
    assert curvature.isfinite().all()
    torch.testing.assert_close(values[:4], torch.tensor([0.0, 0.0, 1e4, 1e4], dtype=dtype))
    torch.testing.assert_close(slopes[:4], torch.tensor([0.0, 0.0, 1.0, -1.0], dtype=dtype))
    torch.testing.assert_close(values[6], torch.tensor(5e3 * 0.5**gamma, dtype=dtype))


def test_the_naive_focal_loss_has_no_gradient_where_ours_has():
    prediction, target = torch.tensor([40.0]), torch.tensor([1.0])
    assert value_and_gradient(torchvisions(0.5, None, "mean"), prediction, target)[1].isnan()
    assert -1e-20 < value_and_gradient(focal(gamma=0.5), prediction, target)[1] < 0


@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_the_worse_the_prediction_the_higher_the_loss(loss):
    logits = torch.zeros(50, 3, dtype=torch.float64)
    logits[:, 0] = torch.linspace(10, -10, 50)
    values = loss.per_sample(logits, torch.zeros(50, dtype=torch.int64))
    assert (values.diff() > 0).all()


# Labels, shapes, numbers.


@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_where_every_label_is_ignored_the_loss_and_its_gradient_are_zero(loss):
    value, slopes = value_and_gradient(loss, drawn(0, 4, 3), torch.full((4,), -100))
    assert value == 0
    assert (slopes == 0).all()


@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_a_single_sample_needs_no_batch_and_labels_may_be_of_any_integer_type(loss):
    prediction, target = drawn(0, 5, 3), labels(0, 3, 5)
    expected = loss.per_sample(prediction, target)
    torch.testing.assert_close(loss(prediction[2], target[2]), expected[2], **CLOSE)
    torch.testing.assert_close(loss.per_sample(prediction, target.to(torch.uint8)), expected, **CLOSE)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_focal_of_yes_and_no_is_differentiable_twice_and_under_vmap(gamma, alpha):
    prediction, target = drawn(0, 6, 2).requires_grad_(), (drawn(1, 6, 2) > 0).double()
    target[0, 0] = 0.3
    loss = focal(gamma=gamma, alpha=alpha)
    assert gradcheck(lambda z: loss(z, target), (prediction,))
    assert gradgradcheck(lambda z: loss(z, target), (prediction,))
    numbers = {"gamma": torch.tensor([0.5, 2.0], dtype=torch.float64)}
    if alpha is not None:
        numbers["alpha"] = torch.tensor([0.25, 0.6], dtype=torch.float64)
    together = vmap(lambda n: loss(prediction, target, numbers=n))(numbers)
    for row in range(2):
        alone = focal(**{name: float(value[row]) for name, value in numbers.items()})
        torch.testing.assert_close(together[row], alone(prediction, target), **CLOSE)


def test_one_alpha_does_not_say_which_class_it_weighs():
    with pytest.raises(LossMismatch, match="one alpha for each class"):
        focal(alpha=0.25)(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("arguments", [{"alpha": [1.0, 2.0, 3.0]}, {"ignore_index": 2}])
def test_what_is_of_class_indices_is_refused_for_yes_and_no(arguments):
    with pytest.raises(LossMismatch, match=next(iter(arguments))):
        focal(**arguments)(torch.zeros(4, 3), torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("prediction", "target"),
    [((8, 3), (8, 1)), ((8, 3), (1,)), ((8, 3, 2), (8, 1)), ((8,), (8,))],
)
@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_shapes_that_do_not_fit_are_refused(loss, prediction, target):
    with pytest.raises(LossMismatch, match=loss.name):
        loss(torch.zeros(prediction), torch.zeros(target, dtype=torch.int64))


def test_yes_and_no_are_not_broadcast():
    with pytest.raises(LossMismatch, match="broadcast"):
        focal()(torch.zeros(8, 1), torch.zeros(8))


def test_as_many_alphas_as_there_are_not_classes_are_refused():
    with pytest.raises(LossMismatch, match="expects 3"):
        focal(alpha=[1.0, 2.0])(torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64))
