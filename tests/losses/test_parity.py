"""Our losses have torch's values and gradients, alone and under vmap, and stay finite where logits are
extreme."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional

from fallline import losses

SHAPES = st.sampled_from([(5,), (4, 1), (3, 2), (2, 3, 2)])
REDUCTIONS = st.sampled_from(["mean", "sum"])
SEEDS = st.integers(0, 10_000)
CHEAP = settings(max_examples=40, deadline=None)


def drawn(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(seed: int, classes: int, *shape: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(
    ours: Callable[[Tensor, Tensor], Tensor],
    torchs: Callable[[Tensor, Tensor], Tensor],
    prediction: Tensor,
    target: Tensor,
) -> None:
    expected = grad(torchs)(prediction, target)
    assert expected.abs().max() > 1e-6, "a problem without a gradient would prove nothing"
    torch.testing.assert_close(ours(prediction, target), torchs(prediction, target), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad(ours)(prediction, target), expected, rtol=1e-12, atol=1e-12)


@CHEAP
@given(
    pair=st.sampled_from([("mse", functional.mse_loss), ("l1", functional.l1_loss)]),
    shape=SHAPES,
    reduction=REDUCTIONS,
    seed=SEEDS,
)
def test_mse_and_l1_are_torchs(pair: Any, shape: tuple[int, ...], reduction: str, seed: int) -> None:
    name, function = pair
    ours = losses.get(name)(reduction=reduction)
    assert_same(ours, lambda p, t: function(p, t, reduction=reduction), drawn(seed, *shape), drawn(seed + 1, *shape))


@CHEAP
@given(shape=SHAPES, reduction=REDUCTIONS, delta=st.floats(0.1, 5.0), seed=SEEDS)
def test_huber_is_torchs(shape: tuple[int, ...], reduction: str, delta: float, seed: int) -> None:
    prediction, target = drawn(seed, *shape), drawn(seed + 1, *shape)

    def torchs(p: Tensor, t: Tensor) -> Tensor:
        return functional.huber_loss(p, t, delta=delta, reduction=reduction)

    for given_delta in (delta, torch.tensor(delta, dtype=torch.float64)):
        assert_same(losses.huber(delta=given_delta, reduction=reduction), torchs, prediction, target)


def test_huber_is_torchs_at_its_joint_and_at_zero() -> None:
    prediction = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    for delta in (1.0, torch.tensor(1.0, dtype=torch.float64)):
        assert_same(losses.huber(delta=delta), functional.huber_loss, prediction, torch.zeros_like(prediction))


@CHEAP
@given(
    further=st.sampled_from([(), (3,), (2, 2)]),
    weighted=st.booleans(),
    ignored=st.sampled_from([-100, 0, 2, 255]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=REDUCTIONS,
    seed=SEEDS,
)
def test_cross_entropy_of_labels_is_torchs(
    further: tuple[int, ...], weighted: bool, ignored: int, smoothing: float, reduction: str, seed: int
) -> None:
    prediction = drawn(seed, 6, 4, *further)
    target = labels(seed, 4, 6, *further)
    target[0] = ignored
    target[1] = 1  # at least one label counts
    weight = torch.tensor([0.2, 1.0, 2.0, 3.5], dtype=torch.float64) if weighted else None
    ours = losses.cross_entropy(weight=weight, ignore_index=ignored, label_smoothing=smoothing, reduction=reduction)
    torchs = torch.nn.CrossEntropyLoss(
        weight=weight, ignore_index=ignored, label_smoothing=smoothing, reduction=reduction
    )
    assert_same(ours, torchs, prediction, target)
    unreduced = torch.nn.CrossEntropyLoss(
        weight=weight, ignore_index=ignored, label_smoothing=smoothing, reduction="none"
    )
    torch.testing.assert_close(
        ours.per_sample(prediction, target), unreduced(prediction, target), rtol=1e-12, atol=1e-12
    )


@CHEAP
@given(
    further=st.sampled_from([(), (3,)]),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.3]),
    reduction=REDUCTIONS,
    seed=SEEDS,
)
def test_cross_entropy_of_probabilities_is_torchs(
    further: tuple[int, ...], weighted: bool, smoothing: float, reduction: str, seed: int
) -> None:
    prediction = drawn(seed, 5, 4, *further)
    target = drawn(seed + 1, 5, 4, *further).softmax(1)
    weight = torch.tensor([0.2, 1.0, 2.0, 3.5], dtype=torch.float64) if weighted else None
    arguments: dict[str, Any] = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    assert_same(losses.cross_entropy(**arguments), torch.nn.CrossEntropyLoss(**arguments), prediction, target)


@CHEAP
@given(shape=SHAPES, weighted=st.booleans(), positive=st.booleans(), reduction=REDUCTIONS, seed=SEEDS)
def test_binary_cross_entropy_is_torchs(
    shape: tuple[int, ...], weighted: bool, positive: bool, reduction: str, seed: int
) -> None:
    prediction = drawn(seed, *shape)
    prediction.view(-1)[0] = 0.0  # where a spelling by |z| has a kink
    target = drawn(seed + 1, *shape).sigmoid()
    arguments: dict[str, Any] = {
        "weight": drawn(seed + 2, shape[-1]).abs() if weighted else None,
        "pos_weight": drawn(seed + 3, shape[-1]).abs() if positive else None,
        "reduction": reduction,
    }
    assert_same(
        losses.binary_cross_entropy_with_logits(**arguments),
        torch.nn.BCEWithLogitsLoss(**arguments),
        prediction,
        target,
    )


@pytest.mark.parametrize(
    ("ours", "target"),
    [
        (losses.mse(), drawn(1, 3, 5, 4)),
        (losses.l1(), drawn(1, 3, 5, 4)),
        (losses.huber(delta=0.7), drawn(1, 3, 5, 4)),
        (losses.binary_cross_entropy_with_logits(pos_weight=2.0), drawn(1, 3, 5, 4).sigmoid()),
        (losses.cross_entropy(), labels(1, 4, 3, 5)),
        (losses.cross_entropy(), drawn(1, 3, 5, 4).softmax(-1)),
        (losses.cross_entropy(weight=[1, 2, 3, 4], label_smoothing=0.1, ignore_index=2), labels(1, 4, 3, 5)),
    ],
    ids=lambda value: value.name if isinstance(value, losses.Loss) else "",
)
def test_a_population_gives_what_a_loop_gives(ours: losses.Loss, target: Tensor) -> None:
    predictions = drawn(0, 3, 5, 4)
    together = vmap(grad(ours))(predictions, target)
    alone = torch.stack([grad(ours)(predictions[i], target[i]) for i in range(3)])
    assert (alone.abs().amax(dim=(1, 2)) > 1e-6).all()
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    shared = vmap(ours, in_dims=(0, None))(predictions, target[0])
    torch.testing.assert_close(shared, torch.stack([ours(each, target[0]) for each in predictions]))


def test_hyperparameters_may_be_vmapped() -> None:
    prediction, target, index = drawn(0, 6, 4), drawn(1, 6, 4), labels(0, 4, 6)
    deltas = torch.tensor([0.5, 2.0], dtype=torch.float64)
    smoothings = torch.tensor([0.0, 0.2], dtype=torch.float64)
    hubers = vmap(lambda delta: losses.huber(delta=delta)(prediction, target))(deltas)
    smoothed = vmap(lambda e: losses.cross_entropy(label_smoothing=e)(prediction, index))(smoothings)
    weighted = vmap(lambda e: losses.cross_entropy(weight=[1, 2, 3, 4], label_smoothing=e)(prediction, index))(
        smoothings
    )
    for each in range(2):
        delta, smoothing = float(deltas[each]), float(smoothings[each])
        torch.testing.assert_close(hubers[each], losses.huber(delta=delta)(prediction, target))
        torch.testing.assert_close(
            smoothed[each], functional.cross_entropy(prediction, index, label_smoothing=smoothing)
        )
        weights = torch.arange(1.0, 5.0, dtype=torch.float64)
        torch.testing.assert_close(
            weighted[each], functional.cross_entropy(prediction, index, weights, label_smoothing=smoothing)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_stay_finite_and_right(size: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[size, 0.0, -size], [0.5, size, 0.25]], dtype=dtype)
    index, yes = torch.tensor([2, 0]), torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.5]], dtype=dtype)
    for ours, torchs, target in [
        (losses.cross_entropy(), functional.cross_entropy, index),
        (losses.binary_cross_entropy_with_logits(), functional.binary_cross_entropy_with_logits, yes),
    ]:
        assert torch.isfinite(ours(logits, target))
        assert torch.isfinite(grad(ours)(logits, target)).all()
        torch.testing.assert_close(ours(logits, target), torchs(logits, target))
        torch.testing.assert_close(grad(ours)(logits, target), grad(torchs)(logits, target))


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 3.0]])
def test_where_every_label_is_ignored_the_loss_and_its_gradient_are_zero(weight: list[float] | None) -> None:
    loss = losses.cross_entropy(weight=weight, label_smoothing=0.1)
    prediction, target = drawn(0, 4, 3), torch.full((4,), -100)
    assert functional.cross_entropy(prediction, target).isnan(), "torch gives NaN here, the documented difference"
    assert loss(prediction, target) == 0
    assert (grad(loss)(prediction, target) == 0).all()


def test_the_dtype_is_kept() -> None:
    for dtype in (torch.float32, torch.float64):
        prediction = drawn(0, 4, 3).to(dtype)
        for name, make in losses.registry.items():
            target = labels(0, 3, 4) if name == "cross_entropy" else prediction.sigmoid()
            assert make()(prediction, target).dtype == dtype
        weighted = losses.cross_entropy(weight=[1.0, 2.0, 3.0], label_smoothing=0.1)
        assert weighted(prediction, labels(0, 3, 4)).dtype == dtype


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", sorted(losses.registry))
def test_values_per_sample_add_up_to_the_loss(name: str, reduction: str) -> None:
    loss = losses.get(name)(reduction=reduction)
    prediction = drawn(0, 5, 3)
    target = labels(0, 3, 5) if loss.kind == "classification" else drawn(1, 5, 3).sigmoid()
    values = loss.per_sample(prediction, target)
    assert values.shape == (5,)
    total = values.sum() if reduction == "sum" else values.mean()
    torch.testing.assert_close(total, loss(prediction, target))


@pytest.mark.parametrize(
    "loss",
    [
        losses.mse(),
        losses.l1(reduction="sum"),
        losses.huber(delta=0.5),
        losses.huber(delta=torch.tensor(0.5)),
        losses.cross_entropy(label_smoothing=0.1),
        losses.cross_entropy(weight=[1.0, 2.0, 0.5], ignore_index=2, reduction="sum"),
        losses.binary_cross_entropy_with_logits(pos_weight=3.0),
    ],
    ids=lambda loss: loss.code(),
)
def test_the_code_shown_is_the_same_loss(loss: losses.Loss) -> None:
    prediction = drawn(0, 5, 3).float()
    target = labels(0, 3, 5) if loss.kind == "classification" else drawn(1, 5, 3).float().sigmoid()
    plain = eval(loss.code(), {"torch": torch})
    torch.testing.assert_close(plain(prediction, target), loss(prediction, target))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(losses.registry))
def test_a_loss_compiles_without_a_graph_break(name: str) -> None:
    loss = losses.get(name)()
    prediction = drawn(0, 5, 3)
    target = labels(0, 3, 5) if loss.kind == "classification" else drawn(1, 5, 3).sigmoid()
    compiled = torch.compile(lambda p, t: loss(p, t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(prediction, target), loss(prediction, target))
