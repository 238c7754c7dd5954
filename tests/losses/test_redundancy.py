"""VICReg and Barlow Twins are the papers' formulas, typed as slow loops, and made of torch's own statistics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional

from fallline.errors import LossMismatch
from fallline.losses.redundancy import barlow_twins, vicreg

CHEAP = settings(max_examples=12, deadline=None)
SIZES = st.tuples(st.integers(3, 5), st.integers(2, 3))
SEEDS = st.integers(0, 10_000)
COEFFICIENTS = st.tuples(st.floats(0.5, 30.0), st.floats(0.5, 30.0), st.floats(0.5, 5.0))


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_vicreg(
    x: Tensor, y: Tensor, coefficients: tuple[float, float, float], gamma: float = 1.0, eps: float = 1e-4
) -> Tensor:
    """Bardes et al. 2022, equations 1 to 6, with the authors' code's mean over dimensions in s and half in v."""
    n, d = x.shape

    def covariance(z: Tensor, i: int, j: int) -> Tensor:
        mean_i, mean_j = sum(z[k, i] for k in range(n)) / n, sum(z[k, j] for k in range(n)) / n
        return sum((z[k, i] - mean_i) * (z[k, j] - mean_j) for k in range(n)) / (n - 1)

    def v(z: Tensor) -> Tensor:
        return sum(torch.clamp(gamma - (covariance(z, j, j) + eps).sqrt(), min=0) for j in range(d)) / d

    def c(z: Tensor) -> Tensor:
        return sum(covariance(z, i, j) ** 2 for i in range(d) for j in range(d) if i != j) / d

    sim, std, cov = coefficients
    of_batch = std * (v(x) + v(y)) / 2 + cov * (c(x) + c(y))
    return torch.stack([sim * sum((x[k, j] - y[k, j]) ** 2 for j in range(d)) / d + of_batch for k in range(n)])


def slow_barlow_twins(x: Tensor, y: Tensor, lambd: float) -> Tensor:
    """Zbontar et al. 2021, equations 1 and 2, with embeddings centred along the batch."""
    n, d = x.shape

    def column(z: Tensor, i: int) -> list[Tensor]:
        mean = sum(z[b, i] for b in range(n)) / n
        return [z[b, i] - mean for b in range(n)]

    def c(i: int, j: int) -> Tensor:
        one, other = column(x, i), column(y, j)
        product = sum(a * b for a, b in zip(one, other, strict=True))
        return product / (sum(a * a for a in one).sqrt() * sum(b * b for b in other).sqrt())

    on_diagonal = sum((1 - c(i, i)) ** 2 for i in range(d))
    off_diagonal = sum(c(i, j) ** 2 for i in range(d) for j in range(d) if i != j)
    return on_diagonal + lambd * off_diagonal


def assert_same(ours: Callable[..., Tensor], expected: Callable[..., Tensor], *moving: Tensor) -> None:
    """Equal values, and equal gradients of a weighted sum of them."""
    arguments = [each.detach().clone().requires_grad_() for each in moving]
    found, right = ours(*arguments), expected(*arguments)
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)
    slope = 1 + 0.1 * torch.arange(right.numel(), dtype=torch.float64).reshape(right.shape)
    slopes = torch.autograd.grad(right, arguments, slope)
    assert min(each.abs().max() for each in slopes) > 1e-3, "a problem without a gradient would prove nothing"
    for one, other in zip(torch.autograd.grad(found, arguments, slope), slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@CHEAP
@given(sizes=SIZES, coefficients=COEFFICIENTS, gamma=st.floats(0.5, 3.0), eps=st.sampled_from([1e-4, 0.1]), seed=SEEDS)
def test_vicreg_is_the_papers_loops(
    sizes: tuple[int, int], coefficients: tuple[float, float, float], gamma: float, eps: float, seed: int
) -> None:
    views = drawn(seed, *sizes), drawn(seed + 1, *sizes)
    plain = {"sim_coeff": coefficients[0], "std_coeff": coefficients[1], "cov_coeff": coefficients[2]}
    plain |= {"gamma": gamma, "eps": eps}
    for numbers in (plain, {name: torch.tensor(value, dtype=torch.float64) for name, value in plain.items()}):
        loss = vicreg(reduction="none", **numbers)
        assert_same(
            lambda x, y, loss=loss: loss((x, y)), lambda x, y: slow_vicreg(x, y, coefficients, gamma, eps), *views
        )


def test_the_defaults_of_vicreg_are_the_authors() -> None:
    x, y = 0.5 * drawn(0, 8, 4), 0.5 * drawn(1, 8, 4)

    def torchs(x: Tensor, y: Tensor) -> Tensor:
        spread = sum(torch.relu(1 - torch.sqrt(z.var(0) + 0.0001)).mean() / 2 for z in (x, y))
        covariances = [torch.cov(z.T) for z in (x, y)]
        shared = sum((c.square().sum() - c.diagonal().square().sum()) / 4 for c in covariances)
        return 25 * functional.mse_loss(x, y) + 25 * spread + shared

    assert_same(lambda x, y: vicreg()((x, y)), torchs, x, y)
    assert torch.relu(1 - x.std(0)).any(), "the variance term takes part"


def test_a_samples_value_holds_its_own_invariance_and_the_batchs_rest() -> None:
    x, y = drawn(0, 6, 3), drawn(1, 6, 3)
    values = vicreg(reduction="none")((x, y))
    own = 25 * (x - y).square().mean(1)
    rest = values - own
    torch.testing.assert_close(rest, rest[0].expand(6))
    assert rest[0] > 0.01
    torch.testing.assert_close(vicreg()((x, y)), values.mean())
    torch.testing.assert_close(vicreg(reduction="sum")((x, y)), values.sum())


@CHEAP
@given(sizes=SIZES, lambd=st.floats(0.001, 2.0), seed=SEEDS)
def test_barlow_twins_is_the_papers_loops(sizes: tuple[int, int], lambd: float, seed: int) -> None:
    views = drawn(seed, *sizes), drawn(seed + 1, *sizes)
    for number in (lambd, torch.tensor(lambd, dtype=torch.float64)):
        # With an ε as small as rounding it is the correlation, as in the paper.
        loss = barlow_twins(lambd=number, eps=1e-18)
        assert_same(lambda x, y, loss=loss: loss((x, y)), lambda x, y: slow_barlow_twins(x, y, lambd), *views)


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_barlow_twins_standardises_as_batch_normalisation_does(eps: float) -> None:
    x, y = 0.1 * drawn(0, 8, 4) + 3, drawn(1, 8, 4)

    def torchs(x: Tensor, y: Tensor) -> Tensor:
        one, other = (functional.batch_norm(z, None, None, training=True, eps=eps) for z in (x, y))
        c = one.T @ other / 8
        weights = torch.full_like(c, 0.0051).fill_diagonal_(1)
        return (weights * (c - torch.eye(4, dtype=c.dtype)).square()).sum()

    assert_same(lambda x, y: barlow_twins(eps=eps)((x, y)), torchs, x, y)


def test_the_defaults_of_barlow_twins_are_the_authors() -> None:
    assert dict(barlow_twins().numbers) == {"lambd": 0.0051, "eps": 1e-5}
    assert dict(vicreg().numbers) == {"sim_coeff": 25.0, "std_coeff": 25.0, "cov_coeff": 1.0, "gamma": 1.0, "eps": 1e-4}


def test_barlow_twins_is_shared_equally() -> None:
    x, y = drawn(0, 6, 3), drawn(1, 6, 3)
    values = barlow_twins(reduction="none")((x, y))
    assert values.shape == (6,)
    assert len(set(values.tolist())) == 1
    torch.testing.assert_close(barlow_twins()((x, y)), values[0])


@pytest.mark.parametrize("loss", [vicreg(), barlow_twins()], ids=lambda loss: loss.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_collapsed_huge_tiny_and_single_batches_stay_finite(loss, dtype: torch.dtype) -> None:
    spread = drawn(0, 8, 2, 4)
    constant_dimension = spread.clone()
    constant_dimension[:, :, 1] = 7.0
    batches = {
        "huge": 1e4 * spread,
        "tiny": 1e-15 * spread,
        "far": spread + 1e4,
        "zero": 0 * spread,
        "collapsed": 0 * spread + 3,
        "a constant dimension": constant_dimension,
        "one sample": spread[:1],
    }
    for name, prediction in batches.items():
        value = loss(prediction.to(dtype))
        slope = grad(loss)(prediction.to(dtype))
        assert value.isfinite(), name
        assert value.dtype == slope.dtype == dtype
        assert slope.isfinite().all(), name


def test_limits_are_right_in_float32() -> None:
    spread = drawn(0, 8, 2, 4).float()
    collapsed = torch.full((8, 2, 4), 3.0)
    assert vicreg()(collapsed).item() == pytest.approx(25 * (1 - 0.01))
    assert barlow_twins()(collapsed).item() == 4
    assert not grad(vicreg())(collapsed).any()
    assert vicreg()(spread[:1]).item() == pytest.approx(
        25 * (spread[0, 0] - spread[0, 1]).square().mean().item() + 25 * 0.99
    )
    assert barlow_twins()(spread[:1]).item() == 4
    exact = barlow_twins()(spread.double() + 1e4).item()
    assert barlow_twins()(spread + 1e4).item() == pytest.approx(exact, rel=1e-2)
    huge = (1e4 * spread).double()
    assert vicreg()(1e4 * spread).item() == pytest.approx(vicreg()(huge).item(), rel=1e-5)
    assert barlow_twins()(1e4 * spread).item() == pytest.approx(barlow_twins()(huge).item(), rel=1e-5)


def test_a_constant_dimension_correlates_with_none() -> None:
    x, y = drawn(0, 8, 3), drawn(1, 8, 3)
    alone = barlow_twins()((x[:, :2], y[:, :2]))
    x[:, 2], y[:, 2] = 5.0, 0.1
    torch.testing.assert_close(barlow_twins()((x, y)), alone + 1)


def test_trials_have_their_own_numbers() -> None:
    predictions = drawn(0, 3, 8, 2, 4)
    numbers = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    for loss, name in ((vicreg(), "gamma"), (vicreg(), "std_coeff"), (barlow_twins(), "lambd")):

        def slope(prediction: Tensor, number: Tensor, loss=loss, name=name) -> Tensor:
            return grad(lambda p: loss(p, numbers={name: number}))(prediction)

        together = vmap(slope)(predictions, numbers)
        alone = torch.stack([slope(predictions[i], numbers[i]) for i in range(3)])
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", [vicreg(), barlow_twins()], ids=lambda loss: loss.name)
def test_a_tuple_is_the_tensor_and_anything_else_is_refused(loss) -> None:
    x, y = drawn(0, 6, 4), drawn(1, 6, 4)
    assert torch.equal(loss((x, y)), loss(torch.stack([x, y], 1), torch.arange(6)))
    with pytest.raises(LossMismatch, match=r"loss\(\(first, second\), target\)"):
        loss(x, y)
    with pytest.raises(LossMismatch, match="equal shapes"):
        loss((x, y[:1]))
    with pytest.raises(LossMismatch, match=r"expects \[N, D\]"):
        loss((x[0], y[0]))
