"""SAM and Sophia, against plain loops that differentiate twice, against pytorch_optimizer, and in every engine."""

import zlib

import numpy as np
import pytest
import torch
from pytorch_optimizer import SAM, SophiaH
from torch import Tensor, nn

import fallline as fl
from every_engine import assert_all_equal, in_every_engine
from fallline.optim import Landscape
from fallline.optim.random import CURVATURE, rademacher

F64 = torch.float64
STEPS = 50
SHAPES = {"matrix": (3, 4), "vector": (5,), "scalar": (), "none": (0, 2), "tensor": (2, 1, 3)}


def start() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator, dtype=F64) + 1 for n, s in SHAPES.items()}


def loss_at(step: int, params) -> Tensor:
    """Curved differently everywhere, upwards and downwards, with elements that depend on each other."""
    total = torch.zeros((), dtype=F64)
    for name, p in params.items():
        phase = torch.arange(p.numel(), dtype=F64).reshape(p.shape) + len(name)
        total = total + (torch.cos(p + 0.3 * step + phase) + 0.3 * (p - torch.sin(phase)) ** 2).sum()
        total = total + 0.1 * p.sum() ** 2
    return total


def slopes(step, params):
    return torch.func.grad(lambda p: loss_at(step, p))(params)


def ours(optimizer, *, steps=STEPS):
    params = start()
    state = optimizer.init(params)
    for step in range(steps):
        around = Landscape.of(lambda p, step=step: loss_at(step, p), params) if optimizer.surveys(step) else None
        updates, state = optimizer.update(slopes(step, params), state, params, step=step, landscape=around)
        params = {n: p + updates[n] for n, p in params.items()}
    return params, state


def assert_moved(params):
    assert all((p != start()[n]).all() for n, p in params.items()), "degenerate: an element never moved"


def assert_equal(mine, expected, rtol=1e-10):
    for name, p in expected.items():
        torch.testing.assert_close(mine[name], p, rtol=rtol, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def uphill(params, grads, rho, adaptive, eta):
    """Where the second gradient is taken: equations 2 and 3 of Foret et al., equation 4 of Kwon et al."""
    scale = {n: p.detach().abs() + eta if adaptive else torch.ones_like(p) for n, p in params.items()}
    norm = sum(((scale[n] * g) ** 2).sum() for n, g in grads.items()).sqrt()
    return {n: p.detach() + rho * scale[n] ** 2 * grads[n] / norm for n, p in params.items()}


SAMS = [
    ({"lr": 0.05}, torch.optim.SGD, {"rho": 0.05}),
    ({"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}, torch.optim.SGD, {"rho": 0.3}),
    ({"lr": 0.05}, torch.optim.Adam, {"rho": 0.5, "adaptive": True}),
    ({"lr": 0.05}, torch.optim.SGD, {"rho": 0.5, "adaptive": True, "eta": 0.2}),
]
each_sam = pytest.mark.parametrize(("arguments", "base", "own"), SAMS, ids=str)


def inner(base, arguments):
    return (fl.optim.sgd if base is torch.optim.SGD else fl.optim.adam)(**arguments)


@each_sam
def test_sam_equals_a_loop_with_two_gradients(arguments, base, own):
    params = {n: nn.Parameter(p) for n, p in start().items()}
    optimizer = base(list(params.values()), **arguments)
    rho, adaptive, eta = own["rho"], own.get("adaptive", False), own.get("eta", 0.01)
    for step in range(STEPS):
        first = slopes(step, {n: p.detach() for n, p in params.items()})
        second = slopes(step, uphill(params, first, rho, adaptive, eta))
        assert max((first[n] - second[n]).abs().max() for n in ("matrix", "vector")) > 1e-3
        for n, p in params.items():
            p.grad = second[n]
        optimizer.step()
    found = ours(fl.optim.sam(inner(base, arguments), **own))[0]
    assert_moved(found)
    assert_equal(found, {n: p.detach() for n, p in params.items()})


@each_sam
def test_sam_equals_pytorch_optimizer(arguments, base, own):
    """To float32's precision, in which that code sums the norm; its ASAM has no eta."""
    params = {n: nn.Parameter(p) for n, p in start().items()}
    optimizer = SAM(list(params.values()), base, **{n: v for n, v in own.items() if n != "eta"}, **arguments)
    for step in range(STEPS):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_at(step, params)
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
    without = {**own, "eta": 0.0}
    assert_equal(
        ours(fl.optim.sam(inner(base, arguments), **without))[0], {n: p.detach() for n, p in params.items()}, 1e-4
    )


def test_sam_of_a_large_radius_differs_from_what_is_inside():
    plain = ours(fl.optim.sgd(lr=0.05))[0]
    near, far = (ours(fl.optim.sam(fl.optim.sgd(lr=0.05), rho=rho))[0] for rho in (0.0, 0.5))
    assert_equal(near, plain)
    assert (far["matrix"] - plain["matrix"]).abs().max() > 1e-2


def test_sams_norm_is_over_all_parameters_and_a_zero_gradient_stays():
    p = {"a": torch.tensor([0.0], dtype=F64), "b": torch.tensor([0.0], dtype=F64)}
    optimizer = fl.optim.sam(fl.optim.sgd(lr=1.0), rho=0.5)
    seen = []
    around = Landscape(lambda at: seen.append(at) or at, lambda v: v)
    state = optimizer.init(p)
    optimizer.update(
        {"a": torch.tensor([3.0], dtype=F64), "b": torch.tensor([4.0], dtype=F64)}, state, p, landscape=around
    )
    torch.testing.assert_close(seen[0]["a"], torch.tensor([0.3], dtype=F64))
    torch.testing.assert_close(seen[0]["b"], torch.tensor([0.4], dtype=F64))
    still, _ = optimizer.update({n: torch.zeros_like(v) for n, v in p.items()}, state, p, landscape=around)
    assert all((u == 0).all() for u in still.values())
    assert optimizer.update({}, state, p, landscape=around)[0] == {}
    with pytest.raises(fl.errors.FalllineError, match="looks at the loss around"):
        optimizer.update(p, state, p, step=0)


def test_sam_goes_around_what_looks_around_and_what_has_phases():
    """Every second step of the optimizer inside sees the curvature; every third renews its matrices."""
    for inside in (fl.optim.sophia(lr=0.01, update_period=2), fl.optim.soap(lr=0.01, precondition_frequency=3)):
        found, _ = ours(fl.optim.sam(inside, rho=0.3), steps=8)
        params = start()
        state = inside.init(params)
        for step in range(8):
            second = slopes(step, uphill(params, slopes(step, params), 0.3, False, 0.0))
            around = Landscape.of(lambda p, step=step: loss_at(step, p), params)
            updates, state = inside.update(second, state, params, step=step, landscape=around)
            params = {n: p + updates[n] for n, p in params.items()}
        assert_equal(found, params, rtol=1e-8)


def plain_loop(task, step_of, *, seed, steps):
    """Trains by `step_of(t, loss function of named parameters, named parameters, gradients) -> new parameters`."""
    torch.manual_seed(seed)
    model = task.model()
    params = {n: p.detach() for n, p in model.named_parameters()}
    order = torch.Generator().manual_seed(seed)
    losses = []
    while len(losses) < steps:
        for index in torch.randperm(len(task.train.x), generator=order).split(task.batch_size):
            x, y = task.train.x[index], task.train.y[index]

            def loss(at, x=x, y=y):
                return torch.nn.functional.cross_entropy(torch.func.functional_call(model, at, (x,)), y)

            losses.append(loss(params).item())
            params = step_of(len(losses), loss, params)
            if len(losses) == steps:
                break
    return np.array(losses), params


@pytest.mark.parametrize("name", ["digits", "digits_cnn"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_equals_a_plain_loop_in_every_engine(name, adaptive):
    task, seed, steps = getattr(fl.tasks, name)(dtype=F64), 1, 25
    buffers = {}

    def step_of(t, loss, params):
        first = torch.func.grad(loss)(params)
        second = torch.func.grad(loss)(uphill(params, first, 0.2, adaptive, 0.01))
        new = {}
        for n, p in params.items():
            buffers[n] = 0.9 * buffers[n] + second[n] if t > 1 else second[n]
            new[n] = p - 0.05 * buffers[n]
        return new

    optimizer = fl.optim.sam(fl.optim.sgd(lr=0.05, momentum=0.9), rho=0.2, adaptive=adaptive)
    expected = plain_loop(task, step_of, seed=seed, steps=steps)
    assert_all_equal(in_every_engine(task, optimizer, steps=steps, seed=seed), expected, rtol=1e-9)


# Sophia.


def signs_of(name, p, step, seed=0):
    slot = torch.tensor(seed * 1_000_003 + zlib.crc32(name.encode()))
    return rademacher(p, slot, torch.tensor(float(step), dtype=F64), CURVATURE)


def hessian_products(loss, params, vector):
    """With the Hessian written out in full, over all parameters."""
    names = [n for n, p in params.items() if p.numel()]
    full = torch.func.jacrev(torch.func.grad(loss))({n: params[n] for n in names})
    found = {n: torch.zeros_like(p) for n, p in params.items()}
    for a in names:
        for b in names:
            block = full[a][b].reshape(params[a].numel(), params[b].numel())
            found[a] = found[a] + (block @ vector[b].flatten()).reshape(params[a].shape)
    return found


SOPHIAS = [
    {"lr": 0.05, "gamma": 30.0},
    {"lr": 0.05, "betas": (0.8, 0.5), "gamma": 1.0, "update_period": 1, "weight_decay": 0.0},
    {"lr": 0.02, "gamma": 0.3, "eps": 1e-2, "update_period": 3, "weight_decay": 0.3},
]


@pytest.mark.parametrize("arguments", SOPHIAS, ids=str)
def test_sophia_equals_the_papers_algorithm_with_whole_hessians(arguments):
    """Algorithm 3, line by line; its first step estimates the Hessian, too."""
    given = {"betas": (0.965, 0.99), "gamma": 0.01, "eps": 1e-12, "weight_decay": 0.1, "update_period": 10, **arguments}
    beta1, beta2 = given["betas"]
    params = start()
    m, h = ({n: torch.zeros_like(p) for n, p in params.items()} for _ in range(2))
    clipped = []
    for t in range(1, STEPS + 1):
        g = slopes(t - 1, params)
        if t % given["update_period"] == 1 % given["update_period"]:
            u = {n: signs_of(n, p, t) for n, p in params.items()}
            rest = {n: p for n, p in params.items() if p.numel() == 0}
            product = hessian_products(lambda p, t=t, rest=rest: loss_at(t - 1, {**rest, **p}), params, u)
            h = {n: beta2 * h[n] + (1 - beta2) * u[n] * product[n] for n in h}
        for n, p in params.items():
            m[n] = beta1 * m[n] + (1 - beta1) * g[n]
            ratio = m[n] / torch.maximum(given["gamma"] * h[n], torch.tensor(given["eps"], dtype=F64))
            clipped.extend((ratio.abs() > 1).flatten().tolist())
            params = {**params, n: p - given["lr"] * given["weight_decay"] * p - given["lr"] * ratio.clip(-1, 1)}
    found, state = ours(fl.optim.sophia(**arguments))
    assert_moved(found)
    assert 0.05 < np.mean(clipped) < 0.999, "degenerate: all steps or none are clipped"
    assert_equal(found, params)
    for n, mean in h.items():
        torch.testing.assert_close(state["slots"][n]["hessian"], mean, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("period", [1, 4, 10])
def test_sophia_equals_pytorch_optimizer_that_is_given_the_same_estimates(period):
    """Theirs is the paper's first version, clip(m / max(h, eps), rho) · lr: ours scaled by rho."""
    lr, rho, eps, decay = 0.5, 0.1, 1e-3, 0.2
    params = {n: nn.Parameter(p) for n, p in start().items()}
    theirs = SophiaH(list(params.values()), lr=lr, betas=(0.9, 0.8), weight_decay=decay, p=rho, eps=eps,
                     update_period=10**6, foreach=False)  # fmt: skip
    for step in range(STEPS):
        now = {n: p.detach().clone() for n, p in params.items()}
        for n, g in slopes(step, now).items():
            params[n].grad = g
        estimates = None
        if step % period == 0:
            u = {n: signs_of(n, p, step + 1) for n, p in now.items()}
            product = torch.func.vjp(lambda p, step=step: slopes(step, p), now)[1](u)[0]  # the Hessian is symmetric
            estimates = [u[n] * product[n] for n in now]
        elif step == 0:
            raise AssertionError
        theirs.step(hessian=estimates)
    mine = ours(fl.optim.sophia(lr=lr * rho, betas=(0.9, 0.8), gamma=rho, eps=rho * eps, weight_decay=decay / rho,
                                update_period=period))[0]  # fmt: skip
    assert_moved(mine)
    assert_equal(mine, {n: p.detach() for n, p in params.items()})


def test_the_estimate_is_the_hessians_diagonal_on_average():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 4, generator=generator, dtype=F64)
    hessian = a @ a.T
    params = {"w": torch.ones(4, dtype=F64)}
    around = Landscape.of(lambda p: 0.5 * p["w"] @ hessian @ p["w"], params)
    optimizer = fl.optim.sophia(betas=(0.9, 0.0), update_period=1)
    estimates = []
    for seed in range(4000):
        state = optimizer.init(params, seed=seed)
        _, state = optimizer.update(params, state, params, step=0, landscape=around)
        estimates.append(state["slots"]["w"]["hessian"])
    off = hessian - torch.diag(hessian.diag())
    deviation = off.square().sum(1).sqrt() / 4000**0.5  # of the mean of Σ_j u_i u_j H_ij
    assert ((torch.stack(estimates).mean(0) - hessian.diag()).abs() < 4 * deviation).all()
    diagonal = Landscape.of(lambda p: (p["w"] ** 2 * torch.arange(1.0, 5, dtype=F64)).sum(), params)
    _, state = optimizer.update(params, optimizer.init(params), params, step=0, landscape=diagonal)
    torch.testing.assert_close(state["slots"]["w"]["hessian"], 2 * torch.arange(1.0, 5, dtype=F64))


def test_sophia_looks_around_only_at_every_so_many_steps():
    optimizer = fl.optim.sophia(update_period=4)
    assert [step for step in range(10) if optimizer.surveys(step)] == [0, 4, 8]
    params = start()
    _, state = optimizer.update(slopes(1, params), optimizer.init(params), params, step=1)
    assert all((s["hessian"] == 0).all() for s in state["slots"].values())
    with pytest.raises(fl.errors.FalllineError, match="looks at the loss around"):
        optimizer.update(slopes(0, params), state, params, step=4)


def test_sophia_where_there_is_no_gradient_and_no_curvature():
    params = start()
    optimizer = fl.optim.sophia(lr=0.1, weight_decay=0.0)
    flat = Landscape.of(lambda p: sum((0 * v).sum() for v in p.values()), params)
    zeros = {n: torch.zeros_like(p) for n, p in params.items()}
    updates, _ = optimizer.update(zeros, optimizer.init(params), params, step=0, landscape=flat)
    assert all((u == 0).all() for u in updates.values())


@pytest.mark.parametrize("name", ["digits", "digits_cnn"])
def test_sophia_equals_a_plain_loop_in_every_engine(name):
    task, seed, steps = getattr(fl.tasks, name)(dtype=F64), 1, 25
    m, h = {}, {}

    def step_of(t, loss, params):
        g = torch.func.grad(loss)(params)
        if t % 4 == 1:
            u = {n: signs_of(n, p, t, seed) for n, p in params.items()}
            leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
            first = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
            product = torch.autograd.grad(first, list(leaves.values()), grad_outputs=list(u.values()))
            for (n, sign), each in zip(u.items(), product, strict=True):
                h[n] = 0.9 * h.get(n, 0) + 0.1 * sign * each
        new = {}
        for n, p in params.items():
            m[n] = 0.9 * m.get(n, 0) + 0.1 * g[n]
            new[n] = p * (1 - 0.003 * 0.1) - 0.003 * (m[n] / (0.5 * h[n]).clamp(min=1e-6)).clip(-1, 1)
        return new

    optimizer = fl.optim.sophia(lr=0.003, betas=(0.9, 0.9), gamma=0.5, eps=1e-6, update_period=4)
    expected = plain_loop(task, step_of, seed=seed, steps=steps)
    assert_all_equal(in_every_engine(task, optimizer, steps=steps, seed=seed), expected, rtol=1e-7)


def test_trials_that_differ_in_numbers_and_seeds_equal_each_alone_in_a_sweep():
    task = fl.tasks.digits(dtype=F64).check()
    optimizers = [
        fl.optim.sam(fl.optim.sgd(lr=fl.grid([0.1, 0.2])), rho=fl.grid([0.05, 0.5])),
        fl.optim.sophia(lr=fl.grid([1e-3, 1e-2]), gamma=0.1),
    ]
    runs = [
        fl.sweep(task, optimizers, seeds=2, steps=15, engine=engine, workers=1, progress=False).history.train_loss
        for engine in ("vectorised", "sequential")
    ]
    assert len(np.unique(runs[0][:, -1])) == len(runs[0]) == 12
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-9)


def with_batch_norm() -> fl.Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    y = (x[:, 0] > 0).long()
    model = lambda: nn.Sequential(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()  # noqa: E731
    return fl.Task("with batch norm", model, (x, y), "cross_entropy", validation="train", batch_size=8)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize(
    "optimizer",
    [
        fl.optim.sam(fl.optim.sgd(lr=0.05)),
        fl.optim.sophia(lr=0.01, update_period=3),
        fl.optim.mars(lr=0.01, approximate=False),
    ],
    ids=lambda optimizer: optimizer.name,
)
def test_what_looks_around_keeps_batch_norms_statistics_as_the_plain_loop_does(optimizer):
    task, steps = with_batch_norm().check(), 12
    found = [
        fl.sweep(task, [optimizer], seeds=[3], steps=steps, workers=1, engine=engine, keep_parameters="all")
        for engine in ("vectorised", "sequential")
    ]
    torch.manual_seed(3)
    model = task.model()
    loop = optimizer.as_torch(model.named_parameters(), steps=steps, seed=3)
    order, step = torch.Generator().manual_seed(3), 0
    while step < steps:
        for index in torch.randperm(40, generator=order).split(8):

            def closure(index=index, step=step):
                loop.zero_grad()
                loss = nn.functional.cross_entropy(model(task.train.x[index]), task.train.y[index])
                curves = any(t.curves for t in optimizer.transforms)
                loss.backward(create_graph=curves and loop.rule.surveys(step))
                return loss

            loop.step(closure)
            step += 1
            if step == steps:
                break
    for result in found:
        assert result.spec["engine"] in ("vectorised", "sequential")
        for name, value in result.parameters(0).items():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-8, atol=1e-10, msg=name)
