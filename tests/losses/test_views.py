"""How embeddings are given: in parts of one shape; and what a direction is at extreme lengths."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from fallline.errors import InvalidHyperparameter, LossMismatch
from fallline.losses.arguments import switch
from fallline.losses.views import direction, together, two_views


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_a_tuple_and_tensors_of_two_or_three_dimensions_hold_the_same_views():
    first, second = drawn(5, 3), drawn(5, 3, seed=1)
    ways = [(first, second), [first, second], torch.stack([first, second], 1), torch.cat([first, second], 1)]
    for way in ways:
        found = two_views("info_nce", way, None)
        assert torch.equal(found[0], first)
        assert torch.equal(found[1], second)


def test_embeddings_of_one_dimension_keep_it():
    for count in (2, 3):
        found = together("triplet_margin", drawn(5, count), None, count, "embeddings")
        assert [tuple(each.shape) for each in found] == [(5, 1)] * count


@pytest.mark.parametrize(
    ("prediction", "words"),
    [
        (drawn(5, 3), "a tuple of 2 tensors"),
        (drawn(6), "a tuple of 2 tensors"),
        ((drawn(5, 3),), "a tuple of 2 tensors"),
        ((drawn(5, 3), drawn(5, 3), drawn(5, 3)), "a tuple of 2 tensors"),
        ((drawn(5, 3), drawn(1, 3)), r"\[5, 3\], \[1, 3\], and expects equal shapes"),
        ((drawn(5), drawn(5)), r"expects \[N, D\]"),
        (drawn(5, 2, 3, 3), r"view\.flatten\(1\)"),
    ],
)
def test_anything_but_two_views_is_refused(prediction, words):
    with pytest.raises(LossMismatch, match=words):
        two_views("info_nce", prediction, None)


def test_a_second_view_that_is_given_as_the_target_is_refused_and_targets_of_a_task_are_not():
    with pytest.raises(LossMismatch, match=r"loss\(\(first, second\), target\)"):
        two_views("info_nce", drawn(5, 4), drawn(5, 4, seed=1))
    for target in (None, torch.arange(5), drawn(5), drawn(5, 1), drawn(5, 3), torch.zeros(5, 4, dtype=torch.long)):
        assert two_views("info_nce", drawn(5, 4), target)[0].shape == (5, 2)


def test_a_direction_is_torchs_where_lengths_are_usual():
    x = drawn(6, 4).requires_grad_()
    slope = drawn(6, 4, seed=1)
    ours = torch.autograd.grad((direction(x) * slope).sum(), x)[0]
    torchs = torch.autograd.grad((functional.normalize(x, dim=-1) * slope).sum(), x)[0]
    assert torchs.abs().min() > 1e-4
    torch.testing.assert_close(direction(x), functional.normalize(x, dim=-1), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(ours, torchs, rtol=1e-13, atol=1e-13)
    assert gradcheck(direction, x)
    assert gradgradcheck(direction, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-100, -20, 0, 20, 100])
def test_a_direction_does_not_depend_on_the_length(exponent, dtype):
    scale = 2.0**exponent
    x = drawn(6, 4, dtype=dtype)
    slope = drawn(6, 4, seed=1, dtype=dtype)
    plain, scaled = x.clone().requires_grad_(), (scale * x).requires_grad_()
    expected = torch.autograd.grad((direction(plain) * slope).sum(), plain)[0]
    found = torch.autograd.grad((direction(scaled) * slope).sum(), scaled)[0]
    assert torch.equal(direction(scaled), direction(plain))
    assert torch.equal(found * scale, expected)
    assert found.dtype == dtype


def test_a_zero_vector_has_no_direction_and_no_gradient_once_or_twice():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    found = direction(x)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [0.6, 0.8]]))
    slope = torch.autograd.grad((found * torch.tensor([1.0, 2.0])).sum(), x, create_graph=True)[0]
    torch.testing.assert_close(slope, torch.tensor([[0.0, 0.0], [-0.064, 0.048]]))
    assert torch.autograd.grad(slope.sum(), x)[0].isfinite().all()


def test_a_switch_is_true_or_false():
    assert switch("info_nce", "normalize", False) is False
    for value in (1, None, "yes"):
        with pytest.raises(InvalidHyperparameter, match="expects True or False"):
            switch("info_nce", "normalize", value)
