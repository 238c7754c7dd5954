"""The losses for pairs and triplets of embeddings are torch's, and right where torch's are not: at zero vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import grad, vmap
from torch.nn import functional
from torch.testing._internal.common_modules import module_db

from fallline.errors import LossMismatch
from fallline.losses.embeddings import cosine_embedding, hinge_embedding, margin_ranking, triplet_margin

CHEAP = settings(max_examples=40, deadline=None)
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])
SEEDS = st.integers(0, 10_000)
MAKERS = {
    torch.nn.HingeEmbeddingLoss: hinge_embedding,
    torch.nn.CosineEmbeddingLoss: cosine_embedding,
    torch.nn.MarginRankingLoss: margin_ranking,
}
OF_TORCH = [
    pytest.param(MAKERS[info.module_cls], sample, id=f"{info.module_cls.__name__}-{i}")
    for info in module_db
    if info.module_cls in MAKERS
    for i, sample in enumerate(
        info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=True)
    )
]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signs(seed: int, *shape: int) -> Tensor:
    """−1 and 1, with at least one of each where there are two."""
    found = torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    found.view(-1)[:2] = torch.tensor([1, -1])[: found.numel()]
    return found


def assert_same(
    ours: Callable[..., Tensor], torchs: Callable[..., Tensor], moving: Sequence[Tensor], fixed: Sequence[Tensor] = ()
) -> None:
    """Equal values, and equal gradients of a weighted sum of them."""
    arguments = [each.detach().clone().requires_grad_() for each in moving]
    expected, found = torchs(*arguments, *fixed), ours(*arguments, *fixed)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    slope = 1 + 0.1 * torch.arange(expected.numel(), dtype=torch.float64).reshape(expected.shape)
    slopes = torch.autograd.grad(expected, arguments, slope)
    assert max(each.abs().max() for each in slopes) > 1e-3, "a problem without a gradient would prove nothing"
    for one, other in zip(torch.autograd.grad(found, arguments, slope), slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("maker", "sample"), OF_TORCH)
def test_every_sample_of_torchs_data_base_is_equal(maker: Callable[..., Any], sample: Any) -> None:
    arguments = sample.constructor_input.kwargs
    *moving, target = sample.forward_input.args
    assert sample.constructor_input.args == ()
    assert not sample.forward_input.kwargs
    module = next(kind for kind, ours in MAKERS.items() if ours is maker)(**arguments)

    def reference(*inputs: Tensor) -> Tensor:
        return module(*inputs)

    ours = maker(**arguments)
    value = sample.reference_fn(module, *[each.detach() for each in moving], target)
    torch.testing.assert_close(ours(*moving, target), value, rtol=1e-11, atol=1e-11)
    if moving[0].ndim:
        assert_same(ours, reference, moving, [target])
    else:
        torch.testing.assert_close(ours(*moving, target), reference(*moving, target))


def test_the_data_base_has_samples_of_three_modules() -> None:
    assert len(OF_TORCH) == 20
    assert {each.values[0] for each in OF_TORCH} == set(MAKERS.values())


@CHEAP
@given(
    shape=st.sampled_from([(5,), (4, 1), (2, 3, 2)]),
    margin=st.floats(0.1, 3.0),
    whole=st.booleans(),
    reduction=REDUCTIONS,
    seed=SEEDS,
)
def test_hinge_embedding_is_torchs(
    shape: tuple[int, ...], margin: float, whole: bool, reduction: str, seed: int
) -> None:
    target = signs(seed, *shape) if whole else signs(seed, *shape).double()
    torchs = torch.nn.HingeEmbeddingLoss(margin=margin, reduction=reduction)
    for number in (margin, torch.tensor(margin, dtype=torch.float64)):
        assert_same(hinge_embedding(reduction=reduction, margin=number), torchs, [drawn(seed, *shape).abs()], [target])


@CHEAP
@given(shape=st.sampled_from([(5, 3), (4, 2), (6, 8)]), margin=st.floats(-1.0, 0.5), reduction=REDUCTIONS, seed=SEEDS)
def test_cosine_embedding_is_torchs(shape: tuple[int, ...], margin: float, reduction: str, seed: int) -> None:
    torchs = torch.nn.CosineEmbeddingLoss(margin=margin, reduction=reduction)
    pair = [drawn(seed, *shape), drawn(seed + 1, *shape)]
    pair = [x + functional.normalize(x, dim=-1) for x in pair]  # so long that torch's 1e-12 does not matter
    for number in (margin, torch.tensor(margin, dtype=torch.float64)):
        assert_same(
            cosine_embedding(reduction=reduction, margin=number), torchs, pair, [signs(seed, shape[0]).double()]
        )


@CHEAP
@given(shape=st.sampled_from([(5,), (4, 1), (2, 3, 2)]), margin=st.floats(-0.5, 2.0), reduction=REDUCTIONS, seed=SEEDS)
def test_margin_ranking_is_torchs(shape: tuple[int, ...], margin: float, reduction: str, seed: int) -> None:
    pair = [drawn(seed, *shape), drawn(seed + 1, *shape)]
    target = signs(seed, *shape)
    pair[0].view(-1)[0] = pair[1].view(-1)[0] - target.view(-1)[0]  # at least one that is ranked wrongly
    torchs = torch.nn.MarginRankingLoss(margin=margin, reduction=reduction)
    for number in (margin, torch.tensor(margin, dtype=torch.float64)):
        assert_same(margin_ranking(reduction=reduction, margin=number), torchs, pair, [target])


@CHEAP
@given(
    shape=st.sampled_from([(5, 3), (4, 1), (2, 3, 2), (6,)]),
    margin=st.floats(2.0, 8.0),
    p=st.sampled_from([1, 1.5, 2, 3, float("inf")]),
    eps=st.sampled_from([1e-6, 0.0, 0.3]),
    swap=st.booleans(),
    reduction=REDUCTIONS,
    seed=SEEDS,
)
def test_triplet_margin_is_torchs(
    shape: tuple[int, ...], margin: float, p: float, eps: float, swap: bool, reduction: str, seed: int
) -> None:
    triplet = [drawn(seed + i, *shape) for i in range(3)]
    triplet[1] = triplet[1] + 2 * drawn(seed + 3, *shape).sign()  # positives are far away, so that the loss is not 0

    def torchs(*embeddings: Tensor) -> Tensor:
        return functional.triplet_margin_loss(*embeddings, margin=margin, p=p, eps=eps, swap=swap, reduction=reduction)

    for number in (margin, torch.tensor(margin, dtype=torch.float64)):
        assert_same(triplet_margin(margin=number, p=p, eps=eps, swap=swap, reduction=reduction), torchs, triplet)


def test_a_target_that_is_neither_sign_counts_as_in_torch() -> None:
    target = torch.tensor([0.0, 2.0, 1.0, -1.0], dtype=torch.float64)
    distances, pair = drawn(0, 4).abs(), [drawn(1, 4, 3), drawn(2, 4, 3)]
    none = {"reduction": "none"}
    assert_same(hinge_embedding(**none), torch.nn.HingeEmbeddingLoss(**none), [distances], [target])
    assert_same(cosine_embedding(**none), torch.nn.CosineEmbeddingLoss(**none), pair, [target])


def test_swap_takes_the_smaller_distance() -> None:
    triplet = tuple(torch.tensor([[x]], dtype=torch.float64) for x in (0.0, 2.0, 3.0))
    assert triplet_margin(eps=0)(triplet).item() == 0.0
    assert triplet_margin(eps=0, swap=True)(triplet).item() == 2.0


def test_tuples_one_tensor_and_torchs_order_are_the_same() -> None:
    a, b, c, t = drawn(0, 6, 4), drawn(1, 6, 4), drawn(2, 6, 4), signs(3, 6)
    for loss, embeddings, target in (
        (cosine_embedding(), (a, b), t),
        (margin_ranking(margin=1.0), (a[:, 0], b[:, 0]), t),
        (triplet_margin(), (a, b, c), None),
    ):
        expected = loss(embeddings, target)
        assert expected > 0
        in_order = embeddings if target is None else (*embeddings, target)
        for found in (
            loss(*in_order),
            loss(list(embeddings), target),
            loss(torch.stack(embeddings, 1), target),
            loss(torch.cat([each.reshape(6, -1) for each in embeddings], 1), target),
        ):
            assert torch.equal(found, expected)


def test_two_outputs_rank_against_targets_with_and_without_a_last_dimension() -> None:
    prediction, target = drawn(0, 6, 2), signs(1, 6)
    loss = margin_ranking(reduction="none")
    assert loss(prediction, target).shape == (6,)
    assert torch.equal(loss(prediction, target.unsqueeze(1)), loss(prediction, target).unsqueeze(1))
    pairs = drawn(0, 6, 2, 3)
    of_pairs = cosine_embedding(reduction="none")
    assert torch.equal(of_pairs(pairs, target.unsqueeze(1)), of_pairs(pairs, target).unsqueeze(1))


def test_the_target_of_triplets_is_carried_along_and_not_looked_at() -> None:
    embeddings = drawn(0, 6, 9)
    for target in (torch.arange(6), drawn(1, 6), torch.full((6,), float("nan"))):
        assert torch.equal(triplet_margin()(embeddings, target), triplet_margin()(embeddings))


@pytest.mark.parametrize(
    ("loss", "arguments", "words"),
    [
        (hinge_embedding(), (drawn(0, 5, 1), signs(1, 5)), r"target\.unsqueeze\(1\)"),
        (hinge_embedding(), (drawn(0, 5), signs(1, 1)), "would be broadcast"),
        (cosine_embedding(), (drawn(0, 5, 3), drawn(1, 1, 3), signs(2, 5)), "nothing is broadcast"),
        (
            cosine_embedding(),
            (drawn(0, 5, 3), drawn(1, 5, 3), signs(2, 1)),
            r"expects one target for each pair, .*\[5\]",
        ),
        (cosine_embedding(), (drawn(0, 5, 3), drawn(1, 5, 3), signs(2, 5, 3)), "one target for each pair"),
        (cosine_embedding(), (drawn(0, 5, 4), drawn(1, 5, 4)), "look like two embeddings"),
        (margin_ranking(), (drawn(0, 5, 1), drawn(1, 5), signs(2, 5)), r"\[5, 1\] and \[5\] .*broadcast"),
        (margin_ranking(), (drawn(0, 5, 1), drawn(1, 5, 1), signs(2, 5)), "expects equal shapes"),
        (margin_ranking(), (drawn(0, 5), drawn(1, 5), signs(2, 5, 5)), "expects equal shapes"),
        (margin_ranking(), (drawn(0, 5), drawn(1, 1), signs(2, 5)), "expects equal shapes"),
        (triplet_margin(), (drawn(0, 5, 3), drawn(1, 5, 3), drawn(2, 1, 3)), "nothing is broadcast"),
        (triplet_margin(), (drawn(0, 5, 4),), "a tuple of 3 tensors"),
        (triplet_margin(), (drawn(0, 5, 3), drawn(1, 5, 3)), "look like two embeddings"),
    ],
)
def test_shapes_that_torch_would_broadcast_or_that_are_no_pairs_are_refused(
    loss: Any, arguments: Any, words: str
) -> None:
    with pytest.raises(LossMismatch, match=words):
        loss(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [1, 2, 3, float("inf")])
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_the_gradient_is_finite_where_anchor_and_positive_are_equal(p: float, eps: float, dtype: torch.dtype) -> None:
    anchor = drawn(0, 4, 3).to(dtype).requires_grad_()
    positive, negative = anchor.detach().clone().requires_grad_(), (anchor.detach() + 0.25).requires_grad_()
    value = triplet_margin(p=p, eps=eps)(anchor, positive, negative)
    found = torch.autograd.grad(value, [anchor, positive, negative])
    expected = torch.autograd.grad(
        functional.triplet_margin_loss(anchor, positive, negative, p=p, eps=eps), [anchor, positive, negative]
    )
    for ours, torchs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, torchs)
    assert found[2].abs().max() > 0.01
    if eps == 0:
        torch.testing.assert_close(found[0], -found[2])  # only the negative pulls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_cosine_of_a_zero_vector_is_zero_and_it_is_not_moved(dtype: torch.dtype) -> None:
    first = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    second = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    for target, expected in ((torch.ones(3), 1.0), (-torch.ones(3), 0.5)):
        values = cosine_embedding(margin=-0.5, reduction="none")((first, second), target)
        assert values.tolist() == [expected] * 3
        for slope in torch.autograd.grad(values.sum(), [first, second]):
            assert not slope.any()


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e4, 1e15, 1e30])
def test_cosine_embedding_does_not_depend_on_lengths_in_float32(scale: float) -> None:
    pair, target = (drawn(0, 6, 4).float(), drawn(1, 6, 4).float()), torch.tensor([1, -1] * 3)
    loss = cosine_embedding(margin=-1.0)

    def scaled(first: Tensor) -> Tensor:
        return loss((first, scale * pair[1]), target)

    exact = grad(lambda first: loss((first, pair[1].double()), target))(pair[0].double())
    torch.testing.assert_close(scaled(scale * pair[0]), loss(pair, target))
    torch.testing.assert_close((grad(scaled)(scale * pair[0]) * scale).double(), exact, rtol=1e-4, atol=1e-5)
    assert exact.abs().max() > 1e-2


def test_huge_values_stay_finite_and_right_in_float32() -> None:
    large = torch.tensor([1e4, -1e4, 1e4, -1e4])
    target = torch.tensor([1, 1, -1, -1])
    assert hinge_embedding(reduction="none")(large, target).tolist() == [1e4, -1e4, 0.0, 10001.0]
    assert margin_ranking(reduction="none", margin=1.0)((large, -large), target).tolist() == [
        0.0,
        20001.0,
        20001.0,
        0.0,
    ]
    triplet = [torch.full((1, 4), x) for x in (0.0, 1e4, -3e4)]
    assert triplet_margin()(*triplet).item() == 0.0
    assert triplet_margin()(triplet[0], triplet[2], triplet[1]).item() == 40001.0


def test_every_pair_may_have_its_own_margin_under_vmap() -> None:
    prediction, target = drawn(0, 6, 2, 3), signs(1, 6)
    margins = torch.tensor([-0.9, -0.2], dtype=torch.float64)
    together = vmap(lambda m: cosine_embedding(margin=m)(prediction, target))(margins)
    alone = [cosine_embedding(margin=m)(prediction, target) for m in margins.tolist()]
    torch.testing.assert_close(together, torch.stack(alone))
    assert together[0] > together[1]


def test_the_infinity_norm_is_differentiable() -> None:
    triplet = [drawn(i, 5, 3).requires_grad_() for i in range(3)]
    assert gradcheck(triplet_margin(p=float("inf"), margin=3.0), triplet)
