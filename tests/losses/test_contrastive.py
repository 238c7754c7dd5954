"""The contrastive losses are the papers' formulas, typed as slow loops, and torch's cross-entropies where they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional

from fallline.errors import LossMismatch
from fallline.losses.contrastive import info_nce, siglip, supervised_contrastive

CHEAP = settings(max_examples=15, deadline=None)
SIZES = st.tuples(st.integers(2, 5), st.integers(2, 4))
SEEDS = st.integers(0, 10_000)
TEMPERATURES = st.floats(0.2, 2.0)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum() / (x.square().sum().sqrt() * y.square().sum().sqrt())


def surprise(positive: Tensor, everything: list[Tensor]) -> Tensor:
    """−log of a softmax's share, as written."""
    return -torch.log(positive.exp() / torch.stack([each.exp() for each in everything]).sum())


def clip(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Radford et al. 2021, figure 3: for each sample, images against texts and texts against images, averaged."""
    values = []
    for i in range(len(a)):
        of_image = [cosine(a[i], b[j]) / temperature for j in range(len(a))]
        of_text = [cosine(a[j], b[i]) / temperature for j in range(len(a))]
        values.append((surprise(of_image[i], of_image) + surprise(of_text[i], of_text)) / 2)
    return torch.stack(values)


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Chen et al. 2020, equation 1, with the 2N augmented samples in the order a₁ … a_N, b₁ … b_N."""
    z, n = torch.cat([a, b]), len(a)

    def loss(i: int, j: int) -> Tensor:
        others = [cosine(z[i], z[k]) / temperature for k in range(2 * n) if k != i]
        return surprise(cosine(z[i], z[j]) / temperature, others)

    return torch.stack([(loss(k, k + n) + loss(k + n, k)) / 2 for k in range(n)])


def predictive_coding(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """van den Oord et al. 2018, equation 4, with f = exp(z·ẑ/τ)."""
    values = []
    for i in range(len(a)):
        scores = [(a[i] * b[j]).sum() / temperature for j in range(len(a))]
        values.append(surprise(scores[i], scores))
    return torch.stack(values)


def l_out(views: Tensor, labels: list[int], temperature: float) -> list[Tensor | None]:
    """Khosla et al. 2020, equation 2: one value for each anchor of [N, V, D], None for those without positives."""
    z = [(labels[n], views[n, v]) for n in range(views.shape[0]) for v in range(views.shape[1])]
    values: list[Tensor | None] = []
    for i, (label, anchor) in enumerate(z):
        logits = {a: cosine(anchor, z[a][1]) / temperature for a in range(len(z)) if a != i}
        positives = [p for p in logits if z[p][0] == label]
        terms = [surprise(logits[p], list(logits.values())) for p in positives]
        values.append(torch.stack(terms).sum() / len(positives) if positives else None)
    return values


def sigmoid_pairs(x: Tensor, y: Tensor, t: float, b: float) -> Tensor:
    """Zhai et al. 2023, equation in section 3.2, before the sum over i."""
    values = []
    for i in range(len(x)):
        terms = []
        for j in range(len(x)):
            z = 1 if i == j else -1
            terms.append(-torch.log(1 / (1 + torch.exp(-z * (t * cosine(x[i], y[j]) + b)))))
        values.append(torch.stack(terms).sum())
    return torch.stack(values)


def assert_same(ours: Callable[..., Tensor], expected: Callable[..., Tensor], *moving: Tensor) -> None:
    """Equal values, and equal gradients of a weighted sum of them."""
    arguments = [each.detach().clone().requires_grad_() for each in moving]
    found, right = ours(*arguments), expected(*arguments)
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)
    slope = 1 + 0.1 * torch.arange(right.numel(), dtype=torch.float64).reshape(right.shape)
    slopes = torch.autograd.grad(right, arguments, slope)
    assert min(each.abs().max() for each in slopes) > 1e-6, "a problem without a gradient would prove nothing"
    for one, other in zip(torch.autograd.grad(found, arguments, slope), slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


KINDS = {
    "clip": ({}, clip),
    "nt_xent": ({"within_views": True}, nt_xent),
    "predictive coding": ({"symmetric": False, "normalize": False}, predictive_coding),
}


@CHEAP
@given(kind=st.sampled_from(sorted(KINDS)), sizes=SIZES, temperature=TEMPERATURES, seed=SEEDS)
def test_info_nce_is_the_papers_loops(kind: str, sizes: tuple[int, int], temperature: float, seed: int) -> None:
    arguments, slow = KINDS[kind]
    views = 0.5 * drawn(seed, *sizes), 0.5 * drawn(seed + 1, *sizes)
    for number in (temperature, torch.tensor(temperature, dtype=torch.float64)):
        loss = info_nce(temperature=number, reduction="none", **arguments)
        assert_same(lambda a, b, loss=loss: loss((a, b)), lambda a, b: slow(a, b, temperature), *views)


def test_info_nce_is_a_cross_entropy_against_the_diagonal() -> None:
    a, b, where = drawn(0, 9, 5), drawn(1, 9, 5), torch.arange(9)

    def torchs(a: Tensor, b: Tensor) -> Tensor:
        logits = functional.normalize(a) @ functional.normalize(b).T / 0.1
        return (functional.cross_entropy(logits, where) + functional.cross_entropy(logits.T, where)) / 2

    assert_same(lambda a, b: info_nce()((a, b)), torchs, a, b)


def test_one_direction_within_views_has_its_own_view_as_negatives_and_not_itself() -> None:
    a, b, where = drawn(0, 9, 5), drawn(1, 9, 5), torch.arange(9)

    def torchs(a: Tensor, b: Tensor) -> Tensor:
        own = (a @ a.T / 3).masked_fill(torch.eye(9, dtype=torch.bool), -math.inf)
        return functional.cross_entropy(torch.cat([a @ b.T / 3, own], 1), where, reduction="none")

    loss = info_nce(within_views=True, symmetric=False, normalize=False, temperature=3, reduction="none")
    assert_same(lambda a, b: loss((a, b)), torchs, a, b)


def test_equal_similarities_are_worth_the_logarithm_of_the_number_of_candidates() -> None:
    same = torch.ones(7, 3)
    assert info_nce()((same, same)).item() == pytest.approx(math.log(7))
    assert info_nce(within_views=True)((same, same)).item() == pytest.approx(math.log(13))


@pytest.mark.parametrize("arguments", [{}, {"within_views": True}, {"symmetric": False, "normalize": False}])
def test_swapping_the_views_changes_only_an_asymmetric_loss(arguments: dict[str, Any]) -> None:
    a, b = drawn(0, 6, 4), drawn(1, 6, 4)
    loss = info_nce(reduction="none", **arguments)
    assert torch.allclose(loss((a, b)), loss((b, a))) is arguments.get("symmetric", True)


@CHEAP
@given(
    sizes=SIZES,
    views=st.integers(1, 3),
    classes=st.integers(1, 3),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.int8, torch.uint8, torch.uint16, torch.bool]),
    temperature=TEMPERATURES,
    seed=SEEDS,
)
def test_supervised_contrastive_is_the_papers_loops(
    sizes: tuple[int, int], views: int, classes: int, dtype: torch.dtype, temperature: float, seed: int
) -> None:
    samples, dimensions = sizes[0] + 1, sizes[1]
    labels = torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(seed))
    labels[1], labels[2] = labels[0], classes  # two of the same class; one or more alone
    labels = labels.to(dtype)
    embeddings = drawn(seed, samples, views, dimensions)

    def slow(x: Tensor) -> Tensor:
        values = l_out(x, labels.tolist(), temperature)
        rows = [values[n * views : (n + 1) * views] for n in range(samples)]
        return torch.stack([torch.stack(row).mean() if None not in row else x.new_zeros(()) for row in rows])

    for number in (temperature, torch.tensor(temperature, dtype=torch.float64)):
        none = supervised_contrastive(temperature=number, reduction="none")
        assert_same(lambda x, none=none: none(x, labels), slow, embeddings)
    counted = [value for value in l_out(embeddings, labels.tolist(), temperature) if value is not None]
    mean = supervised_contrastive(temperature=temperature)
    torch.testing.assert_close(mean(embeddings, labels), torch.stack(counted).mean(), rtol=1e-11, atol=1e-11)


def test_a_matrix_one_view_a_tuple_and_a_tensor_of_views_are_the_same() -> None:
    x, y, labels = drawn(0, 6, 4), drawn(1, 6, 4), torch.tensor([0, 1, 0, 2, 1, 0])
    loss = supervised_contrastive()
    assert torch.equal(loss(x, labels), loss(x.unsqueeze(1), labels))
    assert torch.equal(loss((x,), labels), loss(x, labels))
    assert torch.equal(loss((x, y), labels), loss(torch.stack([x, y], 1), labels))
    assert not torch.allclose(loss((x, y), labels), loss(x, labels))


def test_with_a_label_of_its_own_for_each_sample_it_is_nt_xent() -> None:
    x, y = drawn(0, 6, 4), drawn(1, 6, 4)
    supervised = supervised_contrastive(temperature=0.3, reduction="none")
    unsupervised = info_nce(temperature=0.3, within_views=True, reduction="none")
    assert_same(lambda x, y: supervised((x, y), torch.arange(6)), lambda x, y: unsupervised((x, y)), x, y)


@pytest.mark.parametrize("arguments", [{}, {"normalize": False}, {"temperature": 1e-3}])
def test_an_anchor_without_positives_counts_for_nothing(arguments: dict[str, Any]) -> None:
    loss, x = supervised_contrastive(**arguments), drawn(0, 4, 3)
    alone, paired = torch.arange(4), torch.tensor([0, 0, 1, 2])
    assert loss(x, alone).item() == 0
    assert not grad(loss)(x, alone).any()
    values = loss.per_sample(x, paired)
    assert values[2:].tolist() == [0, 0]
    torch.testing.assert_close(loss(x, paired), values[:2].mean())
    assert grad(loss)(x, paired).isfinite().all()
    assert grad(loss)(x, paired)[2].any(), "it still is a negative of others"


@pytest.mark.parametrize(
    ("prediction", "target", "words"),
    [
        (drawn(0, 6, 3), torch.arange(6).unsqueeze(1), r"target\.flatten\(\)"),
        (drawn(0, 6, 3), torch.arange(5), r"of shape \[6\]"),
        (drawn(0, 6, 2, 3), torch.arange(12), r"6 samples and a target of shape \[12\]"),
        (drawn(0, 6, 3), torch.arange(6.0), r"target\.long\(\)"),
        (drawn(0, 6, 3), None, "info_nce"),
        (drawn(0, 6), torch.arange(6), r"shape \[6\], and expects embeddings"),
        (drawn(0, 6, 2, 3, 3), torch.arange(6), r"prediction\.flatten\(2\)"),
        ((drawn(0, 6, 3), drawn(0, 1, 3)), torch.arange(6), r"\[\[6, 3\], \[1, 3\]\]"),
        ((drawn(0, 6, 2, 3), drawn(0, 6, 2, 3)), torch.arange(6), r"shape \[6, 2, 2, 3\]"),
    ],
)
def test_labels_and_views_that_cannot_be_meant_are_refused(prediction: Any, target: Any, words: str) -> None:
    with pytest.raises(LossMismatch, match=words):
        supervised_contrastive()(prediction, target)


@CHEAP
@given(sizes=SIZES, scale=st.floats(0.5, 20.0), bias=st.floats(-12.0, 3.0), seed=SEEDS)
def test_siglip_is_the_papers_loops(sizes: tuple[int, int], scale: float, bias: float, seed: int) -> None:
    views = drawn(seed, *sizes), drawn(seed + 1, *sizes)
    tensors = torch.tensor(scale, dtype=torch.float64), torch.tensor(bias, dtype=torch.float64)
    for t, b in ((scale, bias), tensors):
        loss = siglip(logit_scale=t, logit_bias=b, reduction="none")
        assert_same(lambda x, y, loss=loss: loss((x, y)), lambda x, y: sigmoid_pairs(x, y, scale, bias), *views)


def test_siglip_is_a_binary_cross_entropy_of_all_pairs_divided_by_the_samples() -> None:
    def torchs(x: Tensor, y: Tensor) -> Tensor:
        truth = torch.eye(9, dtype=torch.float64)
        return functional.binary_cross_entropy_with_logits(2 * x @ y.T - 3, truth, reduction="sum") / 9

    loss = siglip(logit_scale=2.0, logit_bias=-3.0, normalize=False)
    assert_same(lambda x, y: loss((x, y)), torchs, drawn(0, 9, 4), drawn(1, 9, 4))


LOSSES = {
    "info_nce": lambda **more: info_nce(temperature=1e-3, **more),
    "nt_xent": lambda **more: info_nce(temperature=1e-3, within_views=True, **more),
    "supervised_contrastive": lambda **more: supervised_contrastive(temperature=1e-3, **more),
    "siglip": lambda **more: siglip(logit_scale=1e3, **more),
}
EACH = pytest.mark.parametrize("name", sorted(LOSSES))


def labels_of(name: str, samples: int) -> Tensor | None:
    return torch.arange(samples) // 2 if name == "supervised_contrastive" else None


@EACH
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_extreme_temperatures_and_embeddings_stay_finite(
    name: str, normalize: bool, dtype: torch.dtype, size: float
) -> None:
    loss = LOSSES[name](normalize=normalize)
    prediction = (size * drawn(0, 8, 2, 16)).to(dtype)
    value = loss(prediction, labels_of(name, 8))
    slope = grad(loss)(prediction, labels_of(name, 8))
    assert value.isfinite()
    assert value.dtype == slope.dtype == dtype
    assert slope.isfinite().all()
    if size > 1e-3:
        assert value > 0
        assert slope.any()


@EACH
def test_float32_at_a_temperature_of_a_thousandth_is_as_near_to_float64_as_rounding_allows(name: str) -> None:
    loss, prediction, labels = LOSSES[name](), drawn(0, 8, 2, 16), labels_of(name, 8)
    exact = loss(prediction, labels)
    near = loss(prediction.float(), labels).double()
    # A cosine is known to 1e-7, which the temperature makes 1e-4.
    assert abs(near - exact) < 1e-3
    assert exact > 100


@pytest.mark.parametrize("name", ["info_nce", "nt_xent"])
def test_a_tight_and_a_hopeless_batch_have_the_values_and_gradients_of_the_limit(name: str) -> None:
    loss = LOSSES[name]()
    right, wrong = (torch.eye(4), torch.eye(4)), (torch.eye(4), torch.eye(4).roll(1, 0))
    assert loss(right).item() == 0
    assert not grad(loss)(right)[0].any()
    assert loss(wrong).item() == pytest.approx(1000, rel=1e-6)  # the wrong one is nearer by a cosine of 1
    slope = grad(loss)(wrong)[0]
    assert slope.isfinite().all()
    # −positive/τ, half of it in each direction, divided by N = 4; along the anchor itself a direction cannot change.
    torch.testing.assert_close(slope[0], torch.tensor([0.0, 0.0, 0.0, -250.0]), rtol=1e-4, atol=1e-3)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_vectors_have_finite_values_and_do_not_move(name: str, dtype: torch.dtype) -> None:
    loss, labels = LOSSES[name](), labels_of(name, 6)
    prediction = drawn(0, 6, 2, 4).to(dtype)
    prediction[0], prediction[1, 0] = 0, 0
    slope = grad(loss)(prediction, labels)
    assert loss(prediction, labels).isfinite()
    assert slope.isfinite().all()
    assert not slope[0].any()
    assert not slope[1, 0].any()
    assert slope[2:].any()
    nothing = torch.zeros(6, 2, 4, dtype=dtype)
    assert loss(nothing, labels).isfinite()
    assert not grad(loss)(nothing, labels).any()


@EACH
def test_a_batch_of_one_sample_is_finite(name: str) -> None:
    loss, prediction = LOSSES[name](), drawn(0, 1, 2, 4)
    assert loss(prediction, labels_of(name, 1)).isfinite()
    assert grad(loss)(prediction, labels_of(name, 1)).isfinite().all()
    if name == "info_nce":
        assert loss(prediction).item() == 0
    single = supervised_contrastive()
    assert single(drawn(0, 1, 4), torch.tensor([3])).item() == 0
    assert not grad(single)(drawn(0, 1, 4), torch.tensor([3])).any()


@EACH
def test_normalised_embeddings_may_have_any_length(name: str) -> None:
    prediction, labels = drawn(0, 6, 2, 4), labels_of(name, 6)
    lengths = 10.0 ** torch.arange(-6, 6, dtype=torch.float64).reshape(6, 2, 1)
    torch.testing.assert_close(LOSSES[name]()(lengths * prediction, labels), LOSSES[name]()(prediction, labels))
    raw = LOSSES[name](normalize=False)
    assert not torch.allclose(raw(lengths * prediction, labels), raw(prediction, labels))
    unit = functional.normalize(prediction, dim=-1)
    torch.testing.assert_close(raw(unit, labels), LOSSES[name]()(prediction, labels))


@EACH
def test_the_target_of_two_views_is_not_looked_at(name: str) -> None:
    if name == "supervised_contrastive":
        return
    loss, prediction = LOSSES[name](), drawn(0, 6, 2, 4)
    assert torch.equal(loss(prediction, torch.arange(6)), loss(prediction))
    with pytest.raises(LossMismatch, match=r"loss\(\(first, second\), target\)"):
        loss(drawn(0, 6, 4), drawn(1, 6, 4))


def test_each_trial_has_a_temperature_and_shared_or_its_own_labels() -> None:
    numbers = torch.tensor([0.05, 0.2, 1.0], dtype=torch.float64)
    predictions, labels = drawn(0, 3, 6, 4), torch.tensor([[0, 0, 1, 1, 2, 3], [0, 1, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5]])
    loss = supervised_contrastive()

    def slope(prediction: Tensor, target: Tensor, temperature: Tensor) -> Tensor:
        return grad(lambda p: loss(p, target, numbers={"temperature": temperature}))(prediction)

    for dims, target in (((0, 0, 0), labels), ((0, None, 0), labels[0])):
        together = vmap(slope, in_dims=dims)(predictions, target, numbers)
        alone = [slope(predictions[i], labels[i] if target.ndim == 2 else target, numbers[i]) for i in range(3)]
        torch.testing.assert_close(together, torch.stack(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("within_views", [False, True])
def test_a_learned_temperature_has_a_gradient(within_views: bool) -> None:
    prediction, temperature = drawn(0, 6, 2, 4), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = info_nce(within_views=within_views)
    found = torch.autograd.grad(loss(prediction, numbers={"temperature": temperature}), temperature)[0]
    step = 1e-6
    up, down = (info_nce(within_views=within_views, temperature=0.3 + sign * step)(prediction) for sign in (1, -1))
    torch.testing.assert_close(found, (up - down) / (2 * step), rtol=1e-7, atol=1e-7)
    learned = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2, 3])
    value = supervised_contrastive()(prediction[:, 0], labels, numbers={"temperature": learned})
    assert torch.autograd.grad(value, learned)[0].abs() > 1e-3


def test_the_defaults_are_the_documented_ones() -> None:
    assert dict(info_nce().numbers) == {"temperature": 0.1}
    assert dict(supervised_contrastive().numbers) == {"temperature": 0.1}
    assert dict(siglip().numbers) == {"logit_scale": 10.0, "logit_bias": -10.0}
