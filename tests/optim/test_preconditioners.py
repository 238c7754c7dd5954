"""Shampoo and SOAP, against pytorch_optimizer, against the papers' formulas, and in every engine."""

import numpy as np
import pytest
import torch
from pytorch_optimizer import SOAP, Shampoo
from scipy import linalg
from torch import Tensor, nn
from torch.func import vmap

import fallline as fl
from every_engine import assert_all_equal, in_every_engine
from fallline.optim.preconditioners import _eigenvectors, _iterated

F64 = torch.float64
STEPS = 50
SHAPES = {"matrix": (3, 4), "vector": (5,), "tensor": (2, 1, 3), "kernel": (2, 3, 2, 2)}


def start(shapes=SHAPES, dtype=F64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: (torch.randn(s, generator=generator, dtype=F64) + 1).to(dtype) for n, s in shapes.items()}


def gradient(name: str, p: Tensor, step: int) -> Tensor:
    """Of a bowl whose centre wanders: far from zero for every element, and of full rank."""
    phase = torch.arange(p.numel(), dtype=F64).reshape(p.shape) + len(name)
    return (p.double() - torch.sin(0.7 * step + phase**2) * 2).to(p.dtype)


def ours(optimizer, *, shapes=SHAPES, steps=STEPS) -> dict[str, Tensor]:
    params = start(shapes)
    state = optimizer.init(params)
    for step in range(steps):
        grads = {name: gradient(name, p, step) for name, p in params.items()}
        updates, state = optimizer.update(grads, state, params)
        params = {name: p + updates[name] for name, p in params.items()}
    return params


def theirs(make, *, shapes=SHAPES, steps=STEPS, before=lambda step, params: None) -> dict[str, Tensor]:
    params = {name: nn.Parameter(p) for name, p in start(shapes).items()}
    optimizer = make(list(params.values()))
    sizes = []
    for step in range(steps):
        for name, p in params.items():
            p.grad = gradient(name, p.detach(), step)
            sizes.extend(p.grad.abs().flatten().tolist())
        before(step, params)
        optimizer.step()
    assert all((p.detach() != start(shapes)[n]).all() for n, p in params.items()), "degenerate: an element never moved"
    assert sum(size > 1e-3 for size in sizes) > 0.98 * len(sizes), "degenerate: the gradients vanish"
    return {name: p.detach() for name, p in params.items()}


def assert_equal(mine, expected, rtol=1e-10) -> None:
    for name, p in expected.items():
        torch.testing.assert_close(mine[name], p, rtol=rtol, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# Shampoo.


@pytest.mark.parametrize(
    "arguments",
    [{"lr": 0.1}, {"lr": 0.05, "weight_decay": 0.1}, {"lr": 0.1, "eps": 1e-2}, {"lr": 0.01, "maximize": True}],
    ids=str,
)
def test_shampoo_equals_pytorch_optimizer(arguments):
    """Vectors only with a large eps: in the null space of Σggᵀ, a small one magnifies round-off."""
    shapes = {n: s for n, s in SHAPES.items() if len(s) > 1 or arguments.get("eps") == 1e-2}
    renamed = {"matrix_eps" if name == "eps" else name: value for name, value in arguments.items()}
    mine = ours(fl.optim.shampoo(**arguments), shapes=shapes)
    assert_equal(mine, theirs(lambda params: Shampoo(params, **renamed), shapes=shapes))


def slow_shampoo(shape, *, lr, momentum=0.0, weight_decay=0.0, eps=1e-2, every=1, largest=1200, name="p", steps=STEPS):
    """Algorithm 2 of the paper, for one parameter, with scipy's powers of matrices."""
    p = start({name: shape})[name]
    sides = tuple(shape) or (1,)
    k = len(sides)
    statistics = [np.eye(side) * eps for side in sides]
    roots = [None] * k
    mean = np.zeros(sides)
    for step in range(steps):
        g = (gradient(name, p, step) + weight_decay * p).numpy().reshape(sides)
        mean = momentum * mean + (1 - momentum) * g
        moved = mean
        for axis, side in enumerate(sides):
            unfolded = np.moveaxis(g, axis, 0).reshape(side, -1)
            statistics[axis] = statistics[axis] + unfolded @ unfolded.T
            if side > largest:
                statistics[axis] = np.diag(np.diag(statistics[axis]))
            if step % every == 0:
                roots[axis] = linalg.fractional_matrix_power(statistics[axis], -1 / (2 * k)).real
            moved = np.moveaxis(np.tensordot(roots[axis], moved, (1, axis)), 0, axis)
        p = p - lr * torch.from_numpy(moved.reshape(shape))
    return p


@pytest.mark.parametrize("shape", [(3, 4), (5,), (), (1,), (2, 1, 3), (2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize(
    ("arguments", "slow"),
    [
        ({}, {}),
        ({"momentum": 0.9, "weight_decay": 0.05}, {"momentum": 0.9, "weight_decay": 0.05}),
        ({"precondition_frequency": 4}, {"every": 4}),
        ({"max_precondition_dim": 2}, {"largest": 2}),
        ({"max_precondition_dim": 3, "momentum": 0.5, "precondition_frequency": 3, "eps": 1e-3},
         {"largest": 3, "momentum": 0.5, "every": 3, "eps": 1e-3}),
    ],
    ids=["plain", "momentum and decay", "seldom", "diagonals", "all"],
)  # fmt: skip
def test_shampoo_equals_the_papers_formulas(shape, arguments, slow):
    arguments = {"eps": 1e-2, **arguments}
    found = ours(fl.optim.shampoo(lr=0.1, **arguments), shapes={"p": shape})["p"]
    assert (found != start({"p": shape})["p"]).all()
    torch.testing.assert_close(found, slow_shampoo(shape, lr=0.1, **slow), rtol=1e-9, atol=1e-10)


def test_shampoo_of_a_large_vector_is_adagrad():
    shapes = {"vector": (5,), "one": ()}
    mine = ours(fl.optim.shampoo(lr=0.1, eps=1e-12, max_precondition_dim=1), shapes=shapes)
    expected = theirs(lambda params: torch.optim.Adagrad(params, lr=0.1, eps=0.0, initial_accumulator_value=1e-12),
                      shapes=shapes)  # fmt: skip
    assert_equal(mine, expected)


def test_a_parameter_that_joins_late_waits_for_its_roots():
    optimizer = fl.optim.shampoo(lr=0.1, precondition_frequency=3)
    params = start({"seen": (2, 2), "late": (2, 2)})
    state = optimizer.init(params)
    sizes = []
    for step in range(5):
        names = ["seen"] if step == 0 else ["seen", "late"]
        updates, state = optimizer.update({n: gradient(n, params[n], step) for n in names}, state, params)
        sizes.append(float(updates["late"].abs().max()) if step else 0.0)
    assert sizes[:3] == [0.0, 0.0, 0.0]
    assert min(sizes[3:]) > 1e-3


# SOAP.


@pytest.fixture
def in_float64(monkeypatch):
    """pytorch_optimizer decomposes in float32 whatever the parameters are; here it is to be compared in float64."""
    qr = torch.linalg.qr

    class Exact(SOAP):
        def step(self, closure=None):
            with monkeypatch.context() as patch:
                patch.setattr(torch, "float32", torch.float64)
                patch.setattr(torch.linalg, "qr", lambda a: self.decomposed.append(a.dtype) or qr(a))
                return super().step(closure)

    Exact.decomposed = []
    return Exact


SOAPS = [
    {"lr": 0.01, "weight_decay": 0.0},
    {"lr": 0.01, "weight_decay": 0.1},
    {"lr": 0.02, "betas": (0.9, 0.8), "shampoo_beta": 0.7, "eps": 1e-3, "precondition_frequency": 3},
    {"lr": 0.01, "precondition_1d": True, "precondition_frequency": 1},
    {"lr": 0.01, "max_precondition_dim": 3, "precondition_frequency": 4},
    {"lr": 0.001, "maximize": True},
]


@pytest.mark.parametrize("arguments", SOAPS, ids=str)
def test_soap_equals_pytorch_optimizer(arguments, in_float64):
    """Theirs shrinks the weights after the update, from the second step on: p ← (p − lr·u)(1 − lr·wd)."""
    lr, wd = arguments["lr"], arguments.get("weight_decay", 0.01)
    shrunk = {"lr": lr * (1 - lr * wd), "weight_decay": wd / (1 - lr * wd)}

    def shrink_at_first(step, params):
        for p in params.values() if step == 0 else []:
            p.data.mul_(1 - lr * wd)

    # The products of a vector's first gradient have a null space of all but one dimension, and its basis is arbitrary.
    shapes = {**SHAPES, "scalar": (), **({"vector": (2,)} if arguments.get("precondition_1d") else {})}
    mine = ours(fl.optim.soap(**{**arguments, **shrunk}), shapes=shapes)
    expected = theirs(lambda params: in_float64(params, **arguments), shapes=shapes, before=shrink_at_first)
    assert set(in_float64.decomposed) == {F64}
    assert_equal(mine, expected, rtol=1e-9)


def slow_soap(shape, *, lr, betas=(0.95, 0.95), eps=1e-8, weight_decay=0.01, every=10, name="p", steps=STEPS):
    """Algorithm 3 of the paper for one matrix, every step renewed by algorithm 4, in numpy."""
    beta1, beta2 = betas
    p = start({name: shape})[name].numpy()
    left, right, m, v = np.zeros((shape[0],) * 2), np.zeros((shape[1],) * 2), np.zeros(shape), np.zeros(shape)
    for step in range(steps):
        g = gradient(name, torch.from_numpy(p), step).numpy()
        direction = np.zeros(shape)
        if step > 0:
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * (ql.T @ g @ qr) ** 2  # noqa: F821
            scale = np.sqrt(1 - beta2**step) / (1 - beta1**step)
            direction = ql @ (scale * (ql.T @ m @ qr) / (np.sqrt(v) + eps)) @ qr.T  # noqa: F821
        p = p - lr * (direction + weight_decay * p)
        left, right = beta2 * left + (1 - beta2) * g @ g.T, beta2 * right + (1 - beta2) * g.T @ g
        if step == 0:
            ql, qr = np.linalg.eigh(left)[1][:, ::-1], np.linalg.eigh(right)[1][:, ::-1]
        elif step % every == 0:
            bases = []
            for axis, (matrix, q) in enumerate([(left, ql), (right, qr)]):
                order = np.argsort(-np.diag(q.T @ matrix @ q))
                v = np.take(v, order, axis)
                bases.append(np.linalg.qr(matrix @ q[:, order])[0])
            ql, qr = bases
    return torch.from_numpy(p)


@pytest.mark.parametrize("every", [1, 3, 10, 100])
@pytest.mark.parametrize("shape", [(3, 4), (4, 4), (4, 3)], ids=str)
def test_soap_equals_the_papers_algorithm(shape, every):
    found = ours(fl.optim.soap(lr=0.02, precondition_frequency=every), shapes={"p": shape})["p"]
    torch.testing.assert_close(found, slow_soap(shape, lr=0.02, every=every), rtol=1e-9, atol=1e-10)


def test_soap_trains_vectors_with_adam_that_skips_the_first_step():
    shapes = {"vector": (5,), "scalar": ()}
    params, state = start(shapes), None
    optimizer = fl.optim.soap(lr=0.02, betas=(0.9, 0.99), eps=0.0, weight_decay=0.0)
    adam = fl.optim.adam(lr=0.02, betas=(0.9, 0.99), eps=0.0)
    state, of_adam = optimizer.init(params), adam.init(params)
    for step in range(20):
        grads = {n: gradient(n, p, step) for n, p in params.items()}
        updates, state = optimizer.update(grads, state, params)
        expected = {n: torch.zeros_like(p) for n, p in params.items()}
        if step:
            expected, of_adam = adam.update(grads, of_adam, params)
        assert_equal(updates, expected)
        params = {n: p + updates[n] for n, p in params.items()}


def test_the_signs_of_eigenvectors_do_not_matter():
    optimizer = fl.optim.soap(lr=0.02, precondition_frequency=3)
    params = start()
    state = optimizer.init(params)
    for step in range(12):
        grads = {n: gradient(n, p, step) for n, p in params.items()}
        turned = {
            n: {s: t * (-1.0) ** torch.arange(t.shape[1]) if s.startswith("basis") else t for s, t in slots.items()}
            for n, slots in state["slots"].items()
        }
        assert not torch.equal(turned["matrix"]["basis_0"], state["slots"]["matrix"]["basis_0"])
        updates, after = optimizer.update(grads, state, params)
        again, after_again = optimizer.update(grads, {**state, "slots": turned}, params)
        assert_equal(again, updates)
        for n, slots in after["slots"].items():
            torch.testing.assert_close(after_again["slots"][n]["exp_avg_sq"], slots["exp_avg_sq"], rtol=1e-9, atol=1e-9)
        state, params = after, {n: p + updates[n] for n, p in params.items()}


def statistics_of(rank, size=6, noise=0.0):
    generator = torch.Generator().manual_seed(rank)
    factor = torch.randn(size, rank, generator=generator, dtype=F64)
    other = torch.randn(size, size, dtype=F64)
    return factor @ factor.T + noise * (other + other.T)


@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_eigenvectors_are_those_of_the_matrix_and_in_its_null_space_round_off_does_not_choose(rank):
    matrix = statistics_of(rank)
    basis = _eigenvectors(matrix)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=F64))
    values = torch.diag(basis.T @ matrix @ basis)
    torch.testing.assert_close(basis @ torch.diag(values) @ basis.T, matrix)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix).flip(0), rtol=1e-10, atol=1e-10)
    nudged = _eigenvectors(statistics_of(rank, noise=1e-16))
    if rank > 0:
        torch.testing.assert_close(nudged.abs(), basis.abs(), rtol=0, atol=1e-11)
        iterated, order = _iterated(matrix, basis)
        assert order.tolist() == list(range(6))
        torch.testing.assert_close(iterated.abs(), basis.abs(), rtol=0, atol=1e-10)
    if 0 < rank < 5:
        plain = [torch.linalg.eigh(statistics_of(rank, noise=n))[1].abs() for n in (0.0, 1e-16)]
        assert (plain[0] - plain[1]).abs().max() > 1e-3, "the case is not one that round-off decides"


# Both.

BOTH = [
    fl.optim.shampoo(lr=0.1),
    fl.optim.shampoo(lr=0.1, momentum=0.9, precondition_frequency=3, max_precondition_dim=3),
    fl.optim.soap(lr=0.02),
    fl.optim.soap(lr=0.02, shampoo_beta=0.9, precondition_frequency=2, precondition_1d=True, max_precondition_dim=4),
]
every = pytest.mark.parametrize("optimizer", BOTH, ids=str)


@every
def test_zero_gradients_move_nothing_but_decaying_weights(optimizer):
    params = start({**SHAPES, "scalar": (), "none": (0, 2), "empty": (0,)})
    state = optimizer.init(params)
    for _ in range(5):
        updates, state = optimizer.update({n: torch.zeros_like(p) for n, p in params.items()}, state, params)
        for name, u in updates.items():
            torch.testing.assert_close(u, -2e-4 * params[name] if optimizer.name == "soap" else 0 * u)


@every
def test_a_trial_that_diverged_does_not_stop_the_others(optimizer):
    params = start({"w": (3, 4), "b": (5,)})
    rows = {n: torch.stack([p, p, p]) for n, p in params.items()}
    state = vmap(optimizer.init)(rows)
    alone = optimizer.init(params)
    for step in range(5):
        grads = {n: gradient(n, p, step) for n, p in params.items()}
        stacked = {n: torch.stack([g, g * torch.nan, g * 1e300]) for n, g in grads.items()}
        found, state = vmap(lambda g, s, p, step=step: optimizer.update(g, s, p, step=step))(stacked, state, rows)
        expected, alone = optimizer.update(grads, alone, params)
        for n, u in expected.items():
            torch.testing.assert_close(found[n][0], u, rtol=1e-9, atol=1e-12)
    assert not found["w"][1].isfinite().any()


@every
def test_only_as_many_dimensions_are_trained_as_there_are_slots(optimizer):
    six, seven = torch.ones(1, 2, 1, 1, 2, 1), torch.ones(1, 1, 1, 1, 1, 1, 2)
    optimizer.init({"w": six})
    with pytest.raises(fl.errors.Unsupported, match="'w' has 7 dimensions"):
        optimizer.init({"w": seven})


@every
def test_matrices_are_kept_only_where_they_are_needed(optimizer):
    slots = optimizer.init(start({"w": (3, 4), "b": (5,), "one": ()}))["slots"]
    sizes = {name: {s: t.numel() for s, t in own.items() if t.dim() and "exp" not in s} for name, own in slots.items()}
    largest = optimizer.arguments["max_precondition_dim"]
    if optimizer.name == "shampoo":
        side = lambda d: d * d if d <= largest else d  # noqa: E731
        assert sizes["w"] == {"statistics_0": 9, "root_0": 9, "statistics_1": side(4), "root_1": side(4)}
        assert sizes["b"] == {"statistics_0": side(5), "root_0": side(5)}
        assert sizes["one"] == {"statistics_0": 1, "root_0": 1}
    else:
        assert sizes["w"] == {"statistics_0": 9, "basis_0": 9, "statistics_1": 16, "basis_1": 16}
        assert sizes["b"] == {}, "vectors are not preconditioned, or are larger than the largest dimension"
        assert sizes["one"] == {}


@pytest.mark.parametrize("optimizer", BOTH[1:3], ids=str)
@pytest.mark.parametrize("task", [fl.tasks.digits, fl.tasks.digits_cnn], ids=["digits", "digits_cnn"])
def test_a_trial_is_the_same_in_every_engine(optimizer, task):
    """SOAP to 10⁻⁶: round-off in an eigenvector is larger by as much as its eigenvalue is smaller than the largest."""
    runs = in_every_engine(task(dtype=F64), optimizer, steps=25)
    assert_all_equal(runs, runs["sequential"], rtol=1e-6 if optimizer.name == "soap" else 1e-10)
