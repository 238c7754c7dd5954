"""Cross-entropy, negative log-likelihood and multi-class margin: torch's values and gradients, and where torch's are
not right, the right ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap
from torch.nn import functional
from torch.testing._internal.common_modules import module_db

import loss_gradients
from fallline.errors import LossMismatch
from fallline.losses.classification import cross_entropy, multi_margin, nll
from loss_gradients import labels, value_and_gradient

CHEAP = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 10_000)
FURTHER = st.sampled_from([(), (3,), (2, 2)])
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
WEIGHT = torch.tensor([0.2, 1.0, 2.0, 3.5], dtype=torch.float64)
BOTH = ("classes", "samples")


def drawn(seed, *shape, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(ours, theirs, prediction, target, **tolerance):
    loss_gradients.assert_same(ours, theirs, prediction, target, **(tolerance or CLOSE))


MAKERS = {"CrossEntropyLoss": cross_entropy, "NLLLoss": nll, "MultiMarginLoss": multi_margin}
SAMPLES = [
    pytest.param(MAKERS[name], info, sample, id=f"{name}-{i}")
    for info in module_db
    if (name := info.module_cls.__name__) in MAKERS
    for i, sample in enumerate(info.module_inputs_func(info, "cpu", torch.float64, True, True))
]


def test_torchs_data_base_has_samples_of_each():
    assert len(SAMPLES) >= 140
    assert {parameter.values[0] for parameter in SAMPLES} == set(MAKERS.values())


@pytest.mark.parametrize(("make", "info", "sample"), SAMPLES)
def test_every_sample_of_torchs_data_base_has_torchs_value_and_gradient(make, info, sample):
    assert not sample.constructor_input.args
    arguments = sample.constructor_input.kwargs
    prediction, target = (part.detach() for part in sample.forward_input.args)
    module = info.module_cls(**arguments)
    theirs = value_and_gradient(module, prediction, target)
    if theirs[0].isnan().any():
        assert (target == arguments["ignore_index"]).all(), "only where every label is ignored"
        assert make(**arguments)(prediction, target) == 0
        return
    ours = value_and_gradient(make(**arguments), prediction, target)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    reference = sample.reference_fn(module, prediction, target)
    torch.testing.assert_close(ours[0], torch.as_tensor(reference, dtype=torch.float64).reshape(ours[0].shape), **CLOSE)


@CHEAP
@given(
    further=FURTHER,
    weighted=st.booleans(),
    ignored=st.sampled_from([-100, 0, 2, 255]),
    smoothing=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    swept=st.booleans(),
    reduction=REDUCTIONS,
    seed=SEEDS,
)
def test_cross_entropy_of_labels_is_torchs(further, weighted, ignored, smoothing, swept, reduction, seed):
    prediction, target = drawn(seed, 6, 4, *further), labels(seed, 4, 6, *further)
    target[0] = ignored
    target[1] = 1  # at least one label counts
    arguments = {"weight": WEIGHT if weighted else None, "ignore_index": ignored, "reduction": reduction}
    number = torch.tensor(smoothing, dtype=torch.float64) if swept else smoothing
    ours, theirs = cross_entropy(**arguments), torch.nn.CrossEntropyLoss(**arguments, label_smoothing=smoothing)
    assert_same(lambda p, t: ours(p, t, numbers={"label_smoothing": number}), theirs, prediction, target)
    unreduced = torch.nn.CrossEntropyLoss(**{**arguments, "reduction": "none"}, label_smoothing=smoothing)
    ours = cross_entropy(**arguments, label_smoothing=smoothing)
    torch.testing.assert_close(ours.per_sample(prediction, target), unreduced(prediction, target), **CLOSE)


@CHEAP
@given(
    further=FURTHER,
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.3, 1.0]),
    reduction=REDUCTIONS,
    seed=SEEDS,
)
def test_cross_entropy_of_probabilities_is_torchs(further, weighted, smoothing, reduction, seed):
    prediction, target = drawn(seed, 5, 4, *further), drawn(seed + 1, 5, 4, *further).softmax(1)
    target[0] *= 0.5  # torch does not ask that they sum to 1
    arguments = {"weight": WEIGHT if weighted else None, "label_smoothing": smoothing, "reduction": reduction}
    assert_same(cross_entropy(**arguments), torch.nn.CrossEntropyLoss(**arguments), prediction, target)


@CHEAP
@given(further=FURTHER, weighted=st.booleans(), ignored=st.sampled_from([-100, 2]), reduction=REDUCTIONS, seed=SEEDS)
def test_nll_is_torchs(further, weighted, ignored, reduction, seed):
    prediction, target = drawn(seed, 6, 4, *further), labels(seed, 4, 6, *further)
    target[0], target[1] = ignored, 1
    arguments = {"weight": WEIGHT if weighted else None, "ignore_index": ignored, "reduction": reduction}
    assert_same(nll(**arguments), torch.nn.NLLLoss(**arguments), prediction, target)


@CHEAP
@given(
    p=st.sampled_from([1, 2]),
    margin=st.sampled_from([-0.5, 0.3, 2.0]),
    weighted=st.booleans(),
    reduction=REDUCTIONS,
    seed=SEEDS,
)
def test_multi_margin_is_torchs(p, margin, weighted, reduction, seed):
    prediction, target = drawn(seed, 9, 4), labels(seed, 4, 9)
    arguments = {"p": p, "margin": margin, "weight": WEIGHT if weighted else None, "reduction": reduction}
    assert_same(multi_margin(**arguments), torch.nn.MultiMarginLoss(**arguments), prediction, target)


@pytest.mark.parametrize("p", [1, 2])
def test_multi_margin_is_torchs_at_its_kink(p):
    prediction = torch.tensor([[1.0, 0.0, 0.5], [0.0, 3.0, 2.0]], dtype=torch.float64)
    target = torch.tensor([0, 1])
    assert_same(multi_margin(p=p), torch.nn.MultiMarginLoss(p=p), prediction, target)


def test_multi_margin_of_pixels_is_that_of_each_pixel():
    prediction, target = drawn(0, 3, 4, 2, 5), labels(0, 4, 3, 2, 5)
    flat = prediction.movedim(1, -1).reshape(-1, 4)
    loss = multi_margin(weight=WEIGHT, reduction="none")
    theirs = torch.nn.MultiMarginLoss(weight=WEIGHT, reduction="none")(flat, target.flatten())
    torch.testing.assert_close(loss(prediction, target).flatten(), theirs, **CLOSE)


# Where torch's class weights distort: what the docstring says of the two ways to weigh.


def fitted(loss, target, classes=3):
    """The probabilities that the loss asks for."""
    logits = torch.zeros(1, classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], lr=1, max_iter=200, tolerance_grad=1e-13, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        value = loss(logits, target)
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(1)[0]


def test_weights_of_classes_make_smoothing_predict_the_heavy_class_and_weights_of_samples_do_not():
    weight, smoothing = torch.tensor([0.05, 1.0, 10.0], dtype=torch.float64), 0.3
    smoothed = torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64)
    target = torch.tensor([0])
    distorted = smoothed * weight / (smoothed * weight).sum()
    torchs = torch.nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)
    assert distorted.argmax() == 2
    torch.testing.assert_close(fitted(torchs, target), distorted, rtol=1e-5, atol=1e-5)
    classes, samples = (cross_entropy(weight=weight, label_smoothing=smoothing, weighting=each) for each in BOTH)
    torch.testing.assert_close(fitted(classes, target), distorted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fitted(samples, target), smoothed, rtol=1e-5, atol=1e-5)
    soft = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    soft_samples = cross_entropy(weight=weight, weighting="samples")
    torch.testing.assert_close(fitted(soft_samples, soft), soft[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("swept", [False, True])
def test_weights_of_samples_make_a_weighted_mean_of_torchs_unweighted_cross_entropies(smoothing, swept):
    prediction, target = drawn(0, 8, 4), labels(0, 4, 8)
    target[0] = -100
    kept = WEIGHT[target.clamp(min=0)] * (target >= 0)

    def weighted_mean(p, t):
        each = functional.cross_entropy(p, t, label_smoothing=smoothing, reduction="none")
        return (each * kept).sum() / kept.sum()

    number = torch.tensor(smoothing, dtype=torch.float64) if swept else smoothing
    loss = cross_entropy(weight=WEIGHT, weighting="samples")
    assert_same(lambda p, t: loss(p, t, numbers={"label_smoothing": number}), weighted_mean, prediction, target)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_with_weights_of_samples_one_hot_rows_equal_their_indices(smoothing):
    prediction, target = drawn(0, 8, 4, 3), labels(0, 4, 8, 3)
    rows = functional.one_hot(target, 4).movedim(-1, 1).double()
    samples = cross_entropy(weight=WEIGHT, label_smoothing=smoothing, weighting="samples")
    assert_same(lambda p, t: samples(p, rows), samples, prediction, target)
    classes = cross_entropy(weight=WEIGHT, label_smoothing=smoothing)
    assert not torch.allclose(classes(prediction, rows), classes(prediction, target)), "torch's are not equal"


def test_with_weights_of_samples_soft_targets_weigh_with_the_mean_weight_of_their_classes():
    prediction, target = drawn(0, 6, 4), drawn(1, 6, 4).softmax(1)

    def by_hand(p, t):
        smoothed, each = 0.8 * t + 0.05, t @ WEIGHT
        return (each * -(smoothed * p.log_softmax(1)).sum(1)).sum() / each.sum()

    assert_same(cross_entropy(weight=WEIGHT, label_smoothing=0.2, weighting="samples"), by_hand, prediction, target)


def test_without_smoothing_both_ways_to_weigh_are_equal_for_labels():
    prediction, target = drawn(0, 8, 4), labels(0, 4, 8)
    classes, samples = (cross_entropy(weight=WEIGHT, weighting=each) for each in BOTH)
    assert_same(samples, classes, prediction, target)


# Where torch gives NaN.


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 3.0]])
@pytest.mark.parametrize("make", [cross_entropy, nll])
def test_where_every_label_is_ignored_the_loss_and_its_gradient_are_zero(make, weight):
    prediction, target = drawn(0, 4, 3), torch.full((4,), -100)
    assert functional.nll_loss(prediction, target).isnan(), "torch gives NaN here, the documented difference"
    value, slopes = value_and_gradient(make(weight=weight), prediction, target)
    assert value == 0
    assert (slopes == 0).all()


@pytest.mark.parametrize("make", [cross_entropy, nll])
def test_where_every_label_has_weight_zero_the_loss_and_its_gradient_are_zero(make):
    prediction = drawn(0, 4, 3)
    prediction[0, 1] = -math.inf
    value, slopes = value_and_gradient(make(weight=[1.0, 0.0, 1.0]), prediction, torch.ones(4, dtype=torch.int64))
    assert value == 0
    assert (slopes == 0).all()


MASKED = torch.tensor([[0.5, -math.inf, 1.5, -0.5], [0.25, 2.0, -math.inf, 0.75]], dtype=torch.float64)
POSSIBLE = torch.tensor([[0.5, 1.5, -0.5], [0.25, 2.0, 0.75]], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_impossible_classes_leave_the_cross_entropy_of_the_others(dtype):
    prediction, target = MASKED.to(dtype), torch.tensor([2, 0])
    rows = functional.one_hot(target, 4).to(dtype)
    expected, slopes = value_and_gradient(functional.cross_entropy, POSSIBLE, torch.tensor([1, 0]))
    slopes = torch.stack(
        [
            torch.stack([slopes[0, 0], torch.zeros(()).double(), slopes[0, 1], slopes[0, 2]]),
            torch.stack([slopes[1, 0], slopes[1, 1], torch.zeros(()).double(), slopes[1, 2]]),
        ]
    )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    zero = {"label_smoothing": torch.zeros((), dtype=dtype)}
    assert functional.cross_entropy(prediction, rows).isnan(), "torch gives NaN here, the documented difference"
    for goal in (target, rows):
        for numbers in (None, zero):  # zero: of one trial among others that smooth
            value, found = value_and_gradient(
                lambda p, t, n=numbers: cross_entropy()(p, t, numbers=n), prediction, goal
            )
            torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(found.double(), slopes, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weighting", BOTH)
def test_impossible_classes_of_weight_zero_count_for_nothing(weighting):
    weight = [2.0, 0.0, 3.0]
    prediction = torch.tensor([[0.5, -math.inf, 1.5]], dtype=torch.float64)
    for target in (torch.tensor([2]), torch.tensor([[0.3, 0.0, 0.7]], dtype=torch.float64)):
        loss = cross_entropy(weight=weight, weighting=weighting)
        left = target.clamp(max=1) if target.ndim == 1 else target[:, [0, 2]]
        expected = cross_entropy(weight=[2.0, 3.0], weighting=weighting)(prediction[:, [0, 2]], left)
        value, slopes = value_and_gradient(loss, prediction, target)
        torch.testing.assert_close(value, expected, **CLOSE)
        assert slopes.isfinite().all()
    smoothed = cross_entropy(weight=weight, label_smoothing=0.3)  # the smoothed part gives the class ε/C · 0
    p = prediction[0, [0, 2]].log_softmax(0)
    value, slopes = value_and_gradient(smoothed, prediction, torch.tensor([2]))
    torch.testing.assert_close(value, -(0.7 * 3.0 * p[1] + 0.1 * (2.0 * p[0] + 3.0 * p[1])) / 3.0, **CLOSE)
    assert slopes.isfinite().all()


@pytest.mark.parametrize("target", [torch.tensor([1, 2]), torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])])
def test_an_impossible_label_of_weight_zero_counts_for_nothing(target):
    prediction = torch.tensor([[0.5, -math.inf, 1.5], [0.5, 0.25, -0.5]], dtype=torch.float64)
    target = target.double() if target.is_floating_point() else target
    loss = cross_entropy(weight=[2.0, 0.0, 3.0], weighting="samples")
    value, slopes = value_and_gradient(loss, prediction, target)
    torch.testing.assert_close(value, functional.cross_entropy(prediction[1:], torch.tensor([2])), **CLOSE)
    assert slopes.isfinite().all()
    assert (slopes[0] == 0).all()


def test_an_ignored_sample_may_have_any_log_probabilities():
    prediction = torch.tensor([[-math.inf, 0.0], [-0.5, -1.0]], dtype=torch.float64)
    value, slopes = value_and_gradient(nll(), prediction, torch.tensor([-100, 0]))
    assert value == 0.5
    assert slopes.tolist() == [[0.0, 0.0], [-1.0, 0.0]]


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("smoothing", [0.1, 0.6])
def test_smoothing_gives_an_impossible_class_an_infinite_value_as_in_torch_and_a_finite_gradient(weight, smoothing):
    target = torch.tensor([2, 0])
    rows = functional.one_hot(target, 4).double()
    assert functional.cross_entropy(MASKED, target, weight, label_smoothing=smoothing) == math.inf
    loss = cross_entropy(weight=weight)
    for number in (smoothing, torch.tensor(smoothing, dtype=torch.float64)):
        for goal in (target, rows):
            value, slopes = value_and_gradient(
                lambda p, t, n=number: loss(p, t, numbers={"label_smoothing": n}), MASKED, goal
            )
            assert value == math.inf
            assert slopes.isfinite().all()
            assert slopes.abs().max() > 1e-3


def test_of_trials_that_smooth_and_that_do_not_only_the_first_are_infinite():
    smoothings = torch.tensor([0.0, 0.1], dtype=torch.float64)
    for weight in (None, WEIGHT):
        loss = cross_entropy(weight=weight)
        values = vmap(lambda e, loss=loss: loss(MASKED, torch.tensor([2, 0]), numbers={"label_smoothing": e}))(
            smoothings
        )
        plain = loss(MASKED, torch.tensor([2, 0]))
        torch.testing.assert_close(values[0], plain, **CLOSE)
        assert values[1] == math.inf


def test_the_gradient_with_respect_to_smoothing_is_right_at_zero():
    prediction, target = drawn(0, 6, 4), labels(0, 4, 6)
    slope = grad(lambda e: cross_entropy()(prediction, target, numbers={"label_smoothing": e}))
    at_zero = slope(torch.zeros((), dtype=torch.float64))
    plain = functional.cross_entropy
    # The value is linear in ε.
    expected = plain(prediction, target, label_smoothing=1.0) - plain(prediction, target)
    torch.testing.assert_close(at_zero, expected, **CLOSE)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_nan_in_the_logits_is_not_hidden(weight):
    prediction, target = drawn(0, 4, 4), labels(0, 4, 4)
    prediction[1, 2] = math.nan
    for goal in (target, functional.one_hot(target, 4).double()):
        assert cross_entropy(weight=weight)(prediction, goal).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_scores_stay_finite_and_right(size, dtype):
    scores = torch.tensor([[size, 0.0, -size], [0.5, size, 0.25]], dtype=dtype)
    index = torch.tensor([2, 0])
    rows = torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.0, 0.5]], dtype=dtype)
    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    for goal in (index, rows):
        assert_same(cross_entropy(), functional.cross_entropy, scores, goal, **tolerance)
    assert_same(nll(), functional.nll_loss, scores, index, **tolerance)
    for p in (1, 2):
        assert_same(multi_margin(p=p), torch.nn.MultiMarginLoss(p=p), scores, index, **tolerance)


# Shapes and types.


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type_count(dtype):
    prediction, target = drawn(0, 6, 4), labels(0, 4, 6)
    for make in (cross_entropy, nll, multi_margin):
        torch.testing.assert_close(make()(prediction, target.to(dtype)), make()(prediction, target), **CLOSE)
    target[0] = 255
    loss = cross_entropy(ignore_index=255)
    expected = cross_entropy()(prediction[1:], target[1:])
    torch.testing.assert_close(loss(prediction, target.to(torch.int64)), expected, **CLOSE)
    if dtype == torch.uint8:
        torch.testing.assert_close(loss(prediction, target.to(dtype)), expected, **CLOSE)


@pytest.mark.parametrize("make", [cross_entropy, nll, multi_margin])
@pytest.mark.parametrize(
    ("prediction", "target", "fix"),
    [
        ((8, 3), (1,), "dimension 1"),
        ((8, 3), (8, 1), "squeeze"),
        ((8, 3), (8, 3), "argmax"),
        ((8, 5, 3), (8, 5), "movedim"),
        ((8, 3, 5), (8, 1), "dimension 1"),
        ((8, 3, 5), (4, 5), "dimension 1"),
        ((8,), (8,), "argmax"),
        ((), (), "expects"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_fix(make, prediction, target, fix):
    with pytest.raises(LossMismatch, match=fix):
        make()(torch.zeros(prediction), torch.zeros(target, dtype=torch.int64))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_single_sample_needs_no_batch(smoothing):
    prediction, target = drawn(0, 4), drawn(1, 4).softmax(0)
    arguments = {"weight": WEIGHT, "label_smoothing": smoothing}
    for goal in (target, torch.tensor(2)):
        assert_same(cross_entropy(**arguments), torch.nn.CrossEntropyLoss(**arguments), prediction, goal)
    assert_same(nll(weight=WEIGHT), torch.nn.NLLLoss(weight=WEIGHT), prediction, torch.tensor(2))
    assert_same(multi_margin(weight=WEIGHT), torch.nn.MultiMarginLoss(weight=WEIGHT), prediction, torch.tensor(2))


def test_probabilities_of_another_shape_are_refused():
    with pytest.raises(LossMismatch, match="broadcast"):
        cross_entropy()(torch.zeros(8, 3), torch.zeros(1, 3))


@pytest.mark.parametrize("make", [cross_entropy, nll, multi_margin])
@pytest.mark.parametrize("weight", [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
def test_as_many_weights_as_there_are_not_classes_are_refused(make, weight):
    with pytest.raises(LossMismatch, match="expects 3"):
        make(weight=weight)(torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64))


def test_probabilities_cannot_be_ignored():
    with pytest.raises(LossMismatch, match="ignore_index=1"):
        cross_entropy(ignore_index=1)(torch.zeros(8, 3), torch.full((8, 3), 1 / 3))


def test_the_code_is_torchs_where_torch_computes_the_same():
    assert cross_entropy(label_smoothing=0.1).code() == "torch.nn.CrossEntropyLoss(label_smoothing=0.1)"
    assert nll(ignore_index=2).code() == "torch.nn.NLLLoss(ignore_index=2)"
    assert multi_margin(p=2).code() == "torch.nn.MultiMarginLoss(p=2)"
    ours = cross_entropy(weight=[1.0, 2.0], weighting="samples").code()
    assert ours == "fl.losses.cross_entropy(weight=(1.0, 2.0), weighting='samples')"
