"""Muon's products: bit for bit torch's for one matrix, and the same bits in a population, traced or compiled."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import vmap

import fallline as fl
from fallline.optim import matrices
from fallline.sweeps import search
from fallline.sweeps.programs import Programs
from fallline.sweeps.traced import trace
from fallline.sweeps.vectorised import Population
from plain_loop import plain_run

COEFFICIENTS = [3.4445, -4.775, 2.0315]
# With all products below, some above, and all above the size up to which torch multiplies in another way.
SHAPES = [
    (1, 1),
    (1, 5),
    (3, 7),
    (8, 3),
    (4, 200),
    (8, 60),
    (15, 17),
    (10, 64),
    (64, 10),
    (16, 16),
    (17, 17),
    (24, 40),
    (40, 24),
]
EPS = torch.tensor(1e-7, dtype=torch.float64)
in_torch = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


def iterated(g, eps=1e-7, coefficients=COEFFICIENTS, steps=5):
    """The iteration with torch's operations on one matrix, line by line."""
    a, b, c = coefficients
    x = g.bfloat16()
    x = x.T if g.shape[0] > g.shape[1] else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if g.shape[0] > g.shape[1] else x


def newton_schulz(g, eps=EPS):
    return torch.ops.fallline.newton_schulz(g, eps, COEFFICIENTS, 5)


def stack(shape, count=40, dtype=torch.float64):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_matrix_has_the_bits_of_the_plain_iteration(shape):
    for g in stack(shape, 10):
        assert torch.equal(newton_schulz(g), iterated(g))


@in_torch
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_plain_iteration_has_torchs_bits(shape):
    from torch.optim._muon import _zeropower_via_newtonschulz

    for g in stack(shape, 10):
        assert torch.equal(_zeropower_via_newtonschulz(g, tuple(COEFFICIENTS), 5, 1e-7), iterated(g))


@pytest.mark.parametrize("traced", [False, True], ids=["plain", "traced"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_stack_of_matrices_has_the_bits_of_each_alone(shape, traced):
    """Products that torch takes in another way for a stack differ in the last bit for about one matrix in a hundred."""
    g = stack(shape, 300)
    run = lambda g: vmap(newton_schulz)(g)  # noqa: E731
    together = (trace(run, g) if traced else run)(g)
    assert together.dtype == torch.bfloat16
    assert torch.equal(together, torch.stack([newton_schulz(each) for each in g]))


def test_products_of_a_stack_are_what_the_size_is_for(monkeypatch):
    """If they had the bits of each alone, every stack could be multiplied at once."""
    monkeypatch.setattr(matrices, "SMALL_PRODUCT", 0)
    differing = 0
    for shape in [(4, 16), (4, 200), (8, 60), (10, 40), (15, 17)]:
        g = stack(shape, 400)
        differing += int((vmap(newton_schulz)(g) != torch.stack([iterated(each) for each in g])).any((1, 2)).sum())
    if differing == 0:
        pytest.skip("on this machine torch multiplies stacks as it multiplies single matrices")


def test_every_matrix_of_a_nested_stack_has_an_eps_of_its_own():
    g = stack((3, 5), 6).reshape(2, 3, 3, 5)
    eps = torch.tensor([1e-7, 3.0, 50.0], dtype=torch.float64)
    both = vmap(vmap(newton_schulz), in_dims=(0, None))(g, eps)
    outer = vmap(vmap(newton_schulz, in_dims=(0, None)), in_dims=(0, 0))(g, eps[:2])
    inner = vmap(vmap(newton_schulz, in_dims=(None, 0)), in_dims=(0, None))(g[:, 0], eps)
    for i in range(2):
        for j in range(3):
            assert torch.equal(both[i, j], iterated(g[i, j], eps[j].item()))
            assert torch.equal(outer[i, j], iterated(g[i, j], eps[i].item()))
            assert torch.equal(inner[i, j], iterated(g[i, 0], eps[j].item()))
    assert not torch.equal(both[0, 0], newton_schulz(g[0, 0], eps[2])), "eps should matter"


def test_a_stack_may_lie_along_any_dimension():
    g = stack((3, 5), 4)
    expected = torch.stack([newton_schulz(each) for each in g])
    for dim in range(3):
        assert torch.equal(vmap(newton_schulz, in_dims=dim)(g.movedim(0, dim)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_nothing_that_is_passed_in_changes(dtype):
    g = stack((4, 6), 1, dtype)[0]
    before = g.clone()
    newton_schulz(g)
    assert torch.equal(g, before)
    assert torch.ops.fallline.newton_schulz(g, EPS, COEFFICIENTS, 0).data_ptr() != g.data_ptr()


def test_zeros_and_empty_matrices_stay_what_they_are():
    for shape in [(2, 3), (0, 3), (3, 0)]:
        assert torch.equal(newton_schulz(torch.zeros(shape)), torch.zeros(shape, dtype=torch.bfloat16))
    assert vmap(newton_schulz)(torch.zeros(4, 0, 3)).shape == (4, 0, 3)


def test_singular_values_come_near_one():
    values = torch.linalg.svdvals(newton_schulz(stack((20, 30), 1)[0]).double())
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(5, 3), (20, 30)], ids=str)
def test_it_compiles_without_a_break(shape):
    rule = fl.optim.muon(lr=0.1)
    p, g = ({"w": each} for each in stack(shape, 2))
    state = rule.init(p)
    expected = rule.update(g, state, p)[0]["w"]
    compiled = torch.compile(lambda g: rule.update(g, state, p)[0]["w"], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(g), expected, rtol=1e-12, atol=1e-14)


def data():
    x = torch.randn(90, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, (x.sum(1) > 0).long()


def matrices_only():
    layers = [nn.Linear(8, 24, bias=False), nn.Tanh(), nn.Linear(24, 20, bias=False), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(20, 2, bias=False)).double()


@pytest.fixture(scope="module")
def task():
    return fl.Task("matrices", matrices_only, data(), "cross_entropy", batch_size=16).check()


CHOICES = [
    fl.optim.muon(lr=fl.log_grid(0.003, 0.1, 3)),
    fl.optim.muon(lr=0.02, momentum=fl.grid([0.5, 0.9]), eps=0.3, weight_decay=0.0),
    fl.optim.muon(lr=0.02, nesterov=False, ns_coefficients=(3.4, -4.7, 2.0), adjust_lr_fn="match_rms_adamw"),
    fl.optim.adafactor(lr=fl.log_grid(0.01, 0.5, 3), weight_decay=0.01),
]


@pytest.mark.parametrize("traced", [False, True], ids=["plain", "traced"])
def test_a_population_equals_its_trials_one_by_one(task, traced):
    steps = 30
    plans = search.trials(search.configurations(CHOICES, [task.loss], samples=1, search_seed=0), [0, 5])
    programs = Programs() if traced else None
    population = Population(task, plans, steps=steps, device=torch.device("cpu"), programs=programs)
    losses = population.train_steps(steps)
    if traced:
        assert programs.all_traced
    alone = fl.sweep(task, CHOICES, seeds=[0, 5], steps=steps, engine="sequential", workers=1, keep_parameters="all")
    together = fl.sweep(task, CHOICES, seeds=[0, 5], steps=steps, engine="vectorised", workers=1)
    np.testing.assert_allclose(together.history.train_loss, alone.history.train_loss, rtol=1e-10)
    for row, trial in enumerate(population.rows):
        np.testing.assert_allclose(losses[row], alone.history.train_loss[trial], rtol=1e-10)
        for name, value in population.parameters(row).items():
            torch.testing.assert_close(value, alone.parameters(trial)[name], rtol=1e-10, atol=1e-12)


@in_torch
@pytest.mark.parametrize("engine", ["vectorised", "sequential"])
def test_every_trial_equals_a_plain_loop_with_torchs(task, engine):
    rates, seeds, steps = [0.003, 0.03, 0.1], [0, 3], 50
    for name, arguments in [("Muon", {}), ("Muon", {"nesterov": False}), ("Adafactor", {"weight_decay": 0.01})]:
        rule = getattr(fl.optim, name.lower())(lr=fl.grid(rates), **arguments)
        result = fl.sweep(task, [rule], seeds=seeds, steps=steps, engine=engine, workers=1, keep_parameters="all")
        for trial in range(len(result.trials)):
            lr, seed = rates[trial // len(seeds)], seeds[trial % len(seeds)]
            plain = plain_run(
                task.model, task.train.x, task.train.y, nn.CrossEntropyLoss(),
                lambda params, lr=lr, name=name, arguments=arguments: getattr(torch.optim, name)(
                    params, lr=lr, **arguments
                ),
                seed=seed, steps=steps, batch_size=task.batch_size,
            )  # fmt: skip
            np.testing.assert_allclose(result.history.train_loss[trial], plain.losses, rtol=1e-10)
            for parameter, value in result.parameters(trial).items():
                assert (plain.parameters[parameter] - plain.start[parameter]).abs().max() > 1e-3, "it did not move"
                torch.testing.assert_close(value, plain.parameters[parameter], rtol=1e-10, atol=1e-12)


def test_parameters_that_are_no_matrices_are_refused():
    for shape in [(), (3,), (2, 3, 4)]:
        with pytest.raises(ValueError, match=r"'b' has shape .* matrices only"):
            fl.optim.muon().init({"w": torch.ones(2, 2), "b": torch.ones(shape)})


@in_torch
def test_without_nesterov_bfloat16_parameters_keep_their_momentum():
    """torch normalises its buffer in place there: the next step starts from another momentum."""
    p, g = torch.ones(2, 3, dtype=torch.bfloat16), torch.full((2, 3), 40.0, dtype=torch.bfloat16)
    rule = fl.optim.muon(nesterov=False)
    _, state = rule.update({"w": g}, rule.init({"w": p}), {"w": p})
    torch.testing.assert_close(state["slots"]["w"]["momentum_buffer"], g * 0.05, rtol=0.02, atol=0)
    theirs = nn.Parameter(p)
    theirs.grad = g
    optimizer = torch.optim.Muon([theirs], nesterov=False)
    optimizer.step()
    assert optimizer.state[theirs]["momentum_buffer"].norm() < 1.1, "torch keeps it now: say so in muon's docstring"
