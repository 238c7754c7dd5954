"""The losses of overlap: the papers' formulas as slow loops, other packages' values and gradients, and every way in
which a region can be empty."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pytorch_optimizer.loss.dice import DiceLoss
from pytorch_optimizer.loss.jaccard import JaccardLoss
from pytorch_optimizer.loss.lovasz import LovaszHingeLoss
from pytorch_optimizer.loss.tversky import TverskyLoss
from sklearn.metrics import f1_score, fbeta_score, jaccard_score
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap

from fallline.errors import LossMismatch
from fallline.losses.overlap import dice, jaccard, lovasz, tversky

SEEDS = st.integers(0, 10_000)
CHEAP = settings(max_examples=25, deadline=None)
CLOSE = {"rtol": 1e-11, "atol": 1e-12}
ALL = [dice, jaccard, tversky, lovasz]
EACH = pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
WEIGHED = pytest.mark.parametrize("make", ALL[:3], ids=lambda make: make.__name__)


def drawn(seed, *shape, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks(seed, *shape):
    return (drawn(seed, *shape) > 0.3).double()


def labels(seed, classes, *shape):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def gradient(loss, prediction, target):
    leaf = prediction.detach().clone().requires_grad_()
    value = loss(leaf, target)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def assert_same(ours, theirs, prediction, target):
    value, found = gradient(ours, prediction, target)
    expected, slope = gradient(theirs, prediction, target)
    assert slope.abs().max() > 1e-6, "a problem without a gradient would prove nothing"
    torch.testing.assert_close(value, expected, **CLOSE)
    torch.testing.assert_close(found, slope, **CLOSE)


def of_region(name, p, y, *, smooth=1.0, alpha=0.3, beta=0.7, squared=False):
    """One minus the index of one region: Milletari et al. 2016, Salehi et al. 2017, Rahman and Wang 2016."""
    true_positives = false_positives = false_negatives = predicted = true = 0.0
    for each, truth in zip(p, y, strict=True):
        true_positives = true_positives + each * truth
        false_positives = false_positives + each * (1 - truth)
        false_negatives = false_negatives + (1 - each) * truth
        predicted = predicted + (each**2 if squared else each)
        true = true + (truth**2 if squared else truth)
    if name == "dice":
        return 1 - (2 * true_positives + smooth) / (predicted + true + smooth)
    if name == "jaccard":
        return 1 - (true_positives + smooth) / (predicted + true - true_positives + smooth)
    errors = alpha * false_positives + beta * false_negatives
    return 1 - (true_positives + smooth) / (true_positives + errors + smooth)


def slow(name, prediction, target, *, classes="present", ignore_index=-100, region=of_region, **numbers):
    """The mean over images of the mean over classes, pixel by pixel; `region` takes what is predicted and true."""
    images = []
    for logits, truth in zip(prediction, target, strict=True):
        kept = [i for i, label in enumerate(truth.flatten().tolist()) if label != ignore_index]
        if not kept:
            continue
        if truth.shape == logits.shape:
            p = logits.flatten() if region is not of_region else 1 / (1 + torch.exp(-logits.flatten()))
            images.append(region(name, [p[i] for i in kept], [float(truth.flatten()[i]) for i in kept], **numbers))
            continue
        exponentials = torch.exp(logits.flatten(1))
        p = exponentials / exponentials.sum(0)
        found = []
        for c in range(len(logits)):
            y = [float(truth.flatten()[i] == c) for i in kept]
            if any(y) or classes == "all":
                found.append(region(name, [p[c, i] for i in kept], y, **numbers))
        images.append(sum(found) / len(found))
    return sum(images) / len(images)


ARGUMENTS = [
    (dice, {}),
    (dice, {"smooth": 0.0}),
    (dice, {"smooth": 0.5, "squared": True}),
    (jaccard, {}),
    (jaccard, {"smooth": 0.0}),
    (tversky, {}),
    (tversky, {"alpha": 0.9, "beta": 0.0, "smooth": 2.5}),
]


@pytest.mark.parametrize(("make", "numbers"), ARGUMENTS)
@pytest.mark.parametrize("shape", [(3, 1, 2, 3), (2, 5), (3, 2, 2)])
def test_yes_or_no_is_the_papers_formula(make, numbers, shape):
    prediction, target = drawn(0, *shape), masks(1, *shape)
    assert_same(make(**numbers), lambda p, t: slow(make.__name__, p, t, **numbers), prediction, target)
    soft = drawn(2, *shape).sigmoid()
    assert_same(make(**numbers), lambda p, t: slow(make.__name__, p, t, **numbers), prediction, soft)
    target.view(-1)[[0, 4]] = 255
    ours = make(**numbers, ignore_index=255)
    assert_same(ours, lambda p, t: slow(make.__name__, p, t, ignore_index=255, **numbers), prediction, target)


@pytest.mark.parametrize(("make", "numbers"), ARGUMENTS)
@pytest.mark.parametrize("classes", ["present", "all"])
@pytest.mark.parametrize("ignored", [-100, 255, 1])
def test_classes_are_the_papers_formula(make, numbers, classes, ignored):
    prediction, target = drawn(0, 3, 4, 2, 3), labels(1, 3, 3, 2, 3)  # class 3 occurs nowhere
    target[0, 0, :2] = ignored
    target[1] = 2
    chosen = {**numbers, "classes": classes, "ignore_index": ignored}
    assert_same(make(**chosen), lambda p, t: slow(make.__name__, p, t, **chosen), prediction, target)


@CHEAP
@given(smooth=st.sampled_from([0.0, 1.0, 3.5]), size=st.integers(2, 30), seed=SEEDS)
def test_an_image_is_another_packages_image(smooth, size, seed):
    prediction, target = drawn(seed, 1, 1, size), masks(seed + 1, 1, 1, size)
    assume(target.any())
    assume(target.sum() < size)
    for make, theirs in (
        (dice, DiceLoss(label_smooth=smooth, eps=0.0)),
        (jaccard, JaccardLoss("binary", label_smooth=smooth, eps=0.0)),
        (lambda smooth: tversky(alpha=0.2, beta=0.9, smooth=smooth), TverskyLoss(0.2, 0.9, smooth)),
    ):
        assert_same(make(smooth=smooth), theirs, prediction, target)
    several, index = drawn(seed, 1, 3, size + 3), labels(seed, 3, 1, size + 3)
    index[0, :3] = torch.arange(3)
    index[0, 3] = -100
    assert_same(dice(smooth=smooth), DiceLoss("multiclass", label_smooth=smooth, ignore_index=-100), several, index)
    whole = index.clamp(min=0)
    assert_same(jaccard(smooth=smooth), JaccardLoss("multiclass", label_smooth=smooth), several, whole)


@CHEAP
@given(seed=SEEDS, size=st.integers(2, 12))
def test_certain_predictions_have_scikit_learns_scores(seed, size):
    guess, truth = labels(seed, 3, 4, size), labels(seed + 1, 3, 4, size)
    certain = 1e3 * torch.nn.functional.one_hot(guess, 3).transpose(1, 2).double()
    for image in range(4):
        present = sorted(set(truth[image].tolist()))
        scores = {"labels": present, "average": "macro", "zero_division": 0.0}
        pair = truth[image].numpy(), guess[image].numpy()
        for loss, score in (
            (dice(smooth=0.0), f1_score(*pair, **scores)),
            (jaccard(smooth=0.0), jaccard_score(*pair, **scores)),
            (lovasz(), jaccard_score(*pair, **scores)),
            (tversky(alpha=0.2, beta=0.8, smooth=0.0), fbeta_score(*pair, beta=2.0, **scores)),
        ):
            found = loss(certain[image : image + 1], truth[image : image + 1])
            torch.testing.assert_close(float(found), 1 - score, **CLOSE)


def lovasz_extension(errors, y):
    """The convex closure of the Jaccard loss: with M the set of wrong pixels, Δ(M) = |M| / |M ∪ {y = 1}| (equation 6).

    Δ is submodular, so that its Lovász extension is the largest Σ_k e_π(k)·(Δ({π₁ … π_k}) − Δ({π₁ … π_(k−1)})) over
    all orders π.
    """

    def delta(wrong):
        return len(wrong) / len(wrong | {i for i, truth in enumerate(y) if truth}) if wrong else 0.0

    sums = []
    for order in itertools.permutations(range(len(y))):
        steps = [delta(set(order[: k + 1])) - delta(set(order[:k])) for k in range(len(y))]
        sums.append(sum(step * errors[i] for step, i in zip(steps, order, strict=True)))
    return torch.stack(sums).max()


def lovasz_region(name, p, y):
    """Lovász-Softmax, equation 8: the errors of one class are 1 − p where it is true, and p elsewhere."""
    return lovasz_extension([1 - each if truth else each for each, truth in zip(p, y, strict=True)], y)


def hinge_region(name, z, y):
    """The Lovász hinge, equations 11 and 12."""
    margins = [1 - each * (1 if truth else -1) for each, truth in zip(z, y, strict=True)]
    return lovasz_extension([m if m > 0 else 0 * m for m in margins], y)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("classes", ["present", "all"])
def test_lovasz_is_the_extension_of_the_jaccard_loss(classes, seed):
    prediction, target = drawn(seed, 2, 3, 5, scale=1.0), labels(seed + 1, 3, 2, 5)
    target[0] = seed % 3
    ours = lovasz(classes=classes)
    assert_same(ours, lambda p, t: slow("lovasz", p, t, classes=classes, region=lovasz_region), prediction, target)
    target[0, 1] = target[1, 4] = 255
    ours = lovasz(classes=classes, ignore_index=255)
    chosen = {"classes": classes, "region": lovasz_region, "ignore_index": 255}
    assert_same(ours, lambda p, t: slow("lovasz", p, t, **chosen), prediction, target)


@pytest.mark.parametrize("seed", range(6))
def test_the_lovasz_hinge_is_the_extension_of_the_jaccard_loss(seed):
    prediction, target = drawn(seed, 3, 1, 5), masks(seed + 1, 3, 1, 5)
    target[0] = seed % 2  # nothing true, or everything
    assert_same(lovasz(), lambda p, t: slow("lovasz", p, t, region=hinge_region), prediction, target)
    target[1, 0, :2] = target[0, 0, 3] = 255
    chosen = {"region": hinge_region, "ignore_index": 255}
    assert_same(lovasz(ignore_index=255), lambda p, t: slow("lovasz", p, t, **chosen), prediction, target)


def test_the_lovasz_hinge_is_another_packages():
    """In its float32 for the steps, and so only to round-off."""
    prediction, target = drawn(0, 4, 1, 20, 20), masks(1, 4, 1, 20, 20)
    value, slope = gradient(lovasz(), prediction, target)
    expected, wanted = gradient(LovaszHingeLoss(), prediction, target)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(slope, wanted, rtol=1e-3, atol=1e-7)


def test_the_order_of_equal_errors_does_not_matter():
    prediction = torch.tensor([[0.5, 0.5, 0.5, 0.5, -0.5, -0.5, 0.0, 0.0]]).double()
    target = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]]).double()
    value = lovasz()(prediction, target)
    expected = slow("lovasz", prediction[:, :6], target[:, :6], region=hinge_region)
    assert expected > 0.1
    torch.testing.assert_close(lovasz()(prediction[:, :6], target[:, :6]), expected, **CLOSE)
    for order in list(itertools.permutations(range(8)))[::997]:
        mixed = list(order)
        torch.testing.assert_close(lovasz()(prediction[:, mixed], target[:, mixed]), value, **CLOSE)
    once = lovasz()(prediction, target)
    assert torch.equal(once, lovasz()(prediction, target))


def test_certain_and_wrong_costs_the_jaccard_loss():
    target = labels(0, 3, 5, 7)
    certain = 1e3 * torch.nn.functional.one_hot(labels(1, 3, 5, 7), 3).transpose(1, 2).double()
    for classes in ("present", "all"):
        jaccards = jaccard(smooth=0.0, classes=classes, reduction="none")(certain, target)
        assert (jaccards > 0.1).all()
        torch.testing.assert_close(lovasz(classes=classes, reduction="none")(certain, target), jaccards, **CLOSE)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_nothing_there_and_nothing_predicted_costs_nothing(make, smooth, dtype):
    loss = make() if make is lovasz else make(smooth=smooth)
    empty = torch.zeros(2, 1, 3, 3, dtype=dtype)
    for size in (-1e4, -100.0, -92.0):
        value, slope = gradient(loss, empty + size, empty)
        assert slope.isfinite().all()
        if size == -1e4 or smooth:
            assert float(value) == pytest.approx(0, abs=1e-30)
        value, slope = gradient(loss, empty - size, empty)
        assert value > 0.7, "everything predicted where nothing is"
        assert slope.isfinite().all()
        value, slope = gradient(loss, empty - size, empty + 1)
        assert value == 0, "everything there and everything predicted"
        assert slope.isfinite().all()
        value, slope = gradient(loss, empty + size, empty + 1)
        assert value > 0.7, "nothing predicted where everything is"
        assert slope.isfinite().all()


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_of_classes_stay_finite_and_right(make, dtype):
    target = torch.tensor([[0, 1, 2, 2]])
    right = 1e4 * torch.nn.functional.one_hot(target, 3).transpose(1, 2).to(dtype)
    for loss in (make(), make(classes="all")):
        value, slope = gradient(loss, right, target)
        assert value == 0
        assert slope.isfinite().all()
        value, slope = gradient(loss, -right, target)
        assert value > 0.4
        assert slope.isfinite().all()
        one = torch.zeros_like(target)
        assert gradient(loss, 1e4 * torch.tensor([[[1.0], [0], [0]]]).expand(1, 3, 4).to(dtype), one)[0] == 0


def test_the_gradient_pushes_back_what_is_predicted_where_nothing_is():
    prediction, target = drawn(0, 2, 1, 4, 4), torch.zeros(2, 1, 4, 4).double()
    for make in ALL[:3]:
        assert (gradient(make(), prediction, target)[1] > 0).all()
        assert gradient(make(smooth=0.0), prediction, target)[0] == 1
    worst = gradient(lovasz(), prediction, target)
    torch.testing.assert_close(worst[0], (1 + prediction).clamp(min=0).amax((1, 2, 3)).mean(), **CLOSE)
    assert (worst[1] != 0).sum() == 2


@EACH
@pytest.mark.parametrize("of_classes", [False, True])
def test_ignored_pixels_and_images_count_for_nothing(make, of_classes):
    prediction = drawn(0, 3, 4, 6)
    target = labels(1, 4, 3, 6) if of_classes else masks(1, 3, 4, 6)
    whole = make(reduction="none")(prediction, target)
    target[1] = -100
    values = make(reduction="none")(prediction, target)
    assert values[1] == 0
    torch.testing.assert_close(values[[0, 2]], whole[[0, 2]], **CLOSE)
    torch.testing.assert_close(make()(prediction, target), whole[[0, 2]].mean(), **CLOSE)
    _, slope = gradient(make(), prediction, target)
    assert (slope[1] == 0).all()
    assert slope.isfinite().all()
    assert slope[0].abs().max() > 1e-6
    value, slope = gradient(make(), prediction, torch.full_like(target, -100))
    assert value == 0
    assert (slope == 0).all()


@EACH
def test_targets_may_be_of_any_type_that_tells_them_apart(make):
    prediction, target = drawn(0, 2, 3, 4), masks(1, 2, 3, 4)
    value = make()(prediction, target)
    for same in (target.bool(), target.long(), target.float(), target.to(torch.uint8)):
        assert torch.equal(make()(prediction, same), value)
    index = labels(2, 3, 2, 4)
    for same in (index.int(), index.to(torch.uint8)):
        assert torch.equal(make()(prediction, same), make()(prediction, index))


@EACH
def test_an_image_that_is_folded_differently_is_the_same(make):
    prediction, target = drawn(0, 2, 3, 4, 5), labels(1, 3, 2, 4, 5)
    torch.testing.assert_close(make()(prediction, target), make()(prediction.flatten(2), target.flatten(1)), **CLOSE)
    mask = masks(1, 2, 3, 4, 5)
    torch.testing.assert_close(make()(prediction, mask), make()(prediction.flatten(1), mask.flatten(1)), **CLOSE)


@EACH
def test_yes_or_no_under_vmap_and_differentiated_twice(make):
    prediction, target = drawn(0, 3, 4, 1, 2, 3), masks(1, 3, 4, 1, 2, 3)
    target[:, 0, 0, 0, 0] = -100
    together = vmap(grad(make()))(prediction, target)
    shared = vmap(grad(make()), in_dims=(0, None))(prediction, target[0])
    for i in range(3):
        torch.testing.assert_close(together[i], gradient(make(), prediction[i], target[i])[1], **CLOSE)
        torch.testing.assert_close(shared[i], gradient(make(), prediction[i], target[0])[1], **CLOSE)
    of = vmap(make(), in_dims=(None, 0))(prediction[0], target)
    torch.testing.assert_close(of[2], make()(prediction[0], target[2]), **CLOSE)
    index = labels(2, 3, 5, 2, 4)
    of = vmap(make(), in_dims=(None, 0))(drawn(3, 2, 3, 4), index)
    torch.testing.assert_close(of[4], make()(drawn(3, 2, 3, 4), index[4]), **CLOSE)
    leaf = prediction[0].requires_grad_()
    assert gradcheck(lambda p: make()(p, target[0]), (leaf,))
    assert gradgradcheck(lambda p: make()(p, target[0]).square(), (leaf,))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@EACH
def test_yes_or_no_compiles_into_one_graph(make):
    torch.compiler.reset()
    loss = make()
    compiled = torch.compile(lambda p, t: loss(p, t), fullgraph=True, backend="aot_eager")
    assert_same(loss, compiled, drawn(0, 2, 1, 3, 4), masks(1, 2, 1, 3, 4))


@WEIGHED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_class_that_is_neither_there_nor_predicted_has_a_finite_gradient(make, dtype):
    """Its sum of probabilities may be smaller than what can be divided by."""
    target = torch.tensor([[0, 1, 0, 1]])
    for size in (-80.0, -86.0, -88.0, -90.0, -95.0, -100.0, -103.0, -740.0, -1e4):
        prediction = torch.zeros(1, 3, 4, dtype=dtype)
        prediction[:, 2] = size
        value, slope = gradient(make(smooth=0.0, classes="all"), prediction, target)
        assert slope.isfinite().all()
        assert (slope[:, :2].abs() < 1).all()
        assert 0 < value < 1


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_holds_the_sums_over_a_large_image(make, dtype):
    prediction, target = drawn(0, 1, 400, 400).to(dtype), masks(1, 1, 400, 400).to(dtype)
    assert target.sum(dtype=torch.float32) > 60_000, "times the probability and with the false: past what float16 holds"
    value, slope = gradient(make(), prediction, target)
    expected, wanted = gradient(make(), prediction.double(), target.double())
    assert value.dtype == slope.dtype == dtype
    torch.testing.assert_close(value.double(), expected, rtol=0.01, atol=0)
    assert slope.isfinite().all()
    assert wanted.abs().max() > 1e-7


@WEIGHED
def test_nearly_right_keeps_its_digits_in_float32(make):
    target = masks(1, 1, 300, 300)
    prediction = (2 * target - 1) * 14 + drawn(0, 1, 300, 300, scale=0.1)
    exact = float(make()(prediction, target))
    assert 0 < exact < 1e-5
    assert float(make()(prediction.float(), target.float())) == pytest.approx(exact, rel=0.005)


def test_the_steps_of_lovasz_keep_their_digits_in_float32():
    prediction, target = drawn(0, 1, 700, 700, scale=1.0), masks(1, 1, 700, 700)
    exact, wanted = gradient(lovasz(), prediction, target)
    value, slope = gradient(lovasz(), prediction.float(), target.float())
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(slope.double().norm(), wanted.norm(), rtol=1e-5, atol=0)
    torch.testing.assert_close(slope.double().sum(), wanted.sum(), rtol=1e-4, atol=1e-7)


@EACH
@pytest.mark.parametrize(
    ("prediction", "target", "fix"),
    [
        (torch.zeros(2, 1, 3, 3), torch.zeros(2, 3, 3), "target.unsqueeze(1)"),
        (torch.zeros(2, 1, 3, 3), torch.zeros(2, 3, 3, dtype=torch.int64), "target.unsqueeze(1)"),
        (torch.zeros(2, 4, 3, 3), torch.zeros(2, 3, 3), "target.long()"),
        (torch.zeros(2, 4, 3, 3), torch.zeros(2, 3, 3, dtype=torch.bool), "target.long()"),
        (torch.zeros(2, 4, 3, 3), torch.zeros(2, 1, 3, 3, dtype=torch.int64), "without dimension 1"),
        (torch.zeros(2, 3, 3), torch.zeros(2, 1, 3, 3), "without dimension 1"),
        (torch.zeros(4, 3, 4), torch.zeros(4, 3, dtype=torch.int64), "without dimension 1"),
        (torch.zeros(()), torch.zeros(()), "without dimension 1"),
    ],
)
def test_shapes_of_neither_form_are_refused(make, prediction, target, fix):
    with pytest.raises(LossMismatch) as caught:
        make()(prediction, target)
    assert make.__name__ in str(caught.value)
    assert fix in str(caught.value)


@EACH
def test_a_label_out_of_range_is_no_silent_pixel(make):
    target = labels(0, 3, 2, 5)
    target[1, 2] = 3
    with pytest.raises((RuntimeError, IndexError)):
        make()(drawn(0, 2, 3, 5), target)
