"""Prodigy against its authors' package, D-Adaptation against the algorithm line by line; one d for all parameters."""

from __future__ import annotations

import contextlib
import io
import math

import prodigyopt
import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn

import fallline as fl
from dadapt_adam import DAdaptAdam

STEPS = 60
SHAPES = {"matrix": (3, 4), "vector": (5,), "scalar": (), "empty": (0, 2), "tensor": (2, 1, 3)}
PRODIGY = [
    {},
    {"lr": 0.3, "d0": 1e-4, "weight_decay": 0.1},
    {"d0": 1e-3, "weight_decay": 0.1, "decouple": False, "betas": (0.8, 0.95)},
    {"d0": 1e-3, "use_bias_correction": True, "safeguard_warmup": True, "lr": 0.5},
    {"d0": 1e-2, "beta3": 0.9, "d_coef": 2.0, "eps": 1e-3},
    {"d0": 1e-3, "growth_rate": 1.05, "use_bias_correction": True},
]
D_ADAPTATION = [
    {},
    {"lr": 0.3, "d0": 1e-4, "weight_decay": 0.1},
    {"d0": 1e-3, "weight_decay": 0.1, "decouple": True, "betas": (0.8, 0.95)},
    {"d0": 1e-3, "use_bias_correction": True, "eps": 1e-3, "weight_decay": 0.05, "decouple": True},
    {"d0": 1e-3, "growth_rate": 1.05},
]
CASES = [("prodigy", prodigyopt.Prodigy, a) for a in PRODIGY] + [("d_adaptation", DAdaptAdam, a) for a in D_ADAPTATION]
IDS = [f"{name}-{i}" for i, (name, _, _) in enumerate(CASES)]
NAMES = ["prodigy", "d_adaptation"]


def start(dtype=torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: (torch.randn(s, generator=generator, dtype=torch.float64) + 1).to(dtype) for n, s in SHAPES.items()}


def gradient(name: str, p: Tensor, step: int) -> Tensor:
    """Of a bowl whose centre wanders: far from zero for every element at nearly every step."""
    phase = torch.arange(p.numel(), dtype=torch.float64).reshape(p.shape) + len(name)
    return (p.double() - 3 - torch.sin(0.7 * step + phase) * 2).to(p.dtype)


def make(reference, params, **arguments):
    with contextlib.redirect_stdout(io.StringIO()):  # prodigyopt tells about weight decay
        return reference(params, **arguments)


def learnt(optimizer) -> float:
    """The d of the reference."""
    return float(optimizer.d if hasattr(optimizer, "d") else optimizer.param_groups[0]["d"])


def step_of(optimizer, params, state, step, **extra):
    grads = {n: gradient(n, p, step) for n, p in params.items()}
    updates, state = optimizer.update(grads, state, params, **extra)
    return {n: p + updates[n] for n, p in params.items()}, state


def close(mine: dict[str, Tensor], theirs: dict[str, Tensor], *, rtol=1e-10, atol=1e-13) -> None:
    for name, expected in theirs.items():
        torch.testing.assert_close(mine[name], expected.detach(), rtol=rtol, atol=atol)


@pytest.mark.parametrize(("name", "reference", "arguments"), CASES, ids=IDS)
def test_every_update_and_every_d_equals_the_reference(name, reference, arguments):
    optimizer = getattr(fl.optim, name)(**arguments)
    params, state = start(), optimizer.init(start())
    theirs = {n: nn.Parameter(p) for n, p in start().items()}
    other = make(reference, list(theirs.values()), **arguments)
    found = []
    for step in range(STEPS):
        params, state = step_of(optimizer, params, state, step)
        for n, p in theirs.items():
            p.grad = gradient(n, p.detach(), step)
        other.step()
        close(params, theirs)
        found.append(learnt(other))
        for own in state["slots"].values():
            assert float(own["d"]) == pytest.approx(found[-1], rel=1e-10)
    assert len(set(found)) > 4, "the problem is degenerate: d was hardly adapted"
    moved = {n: (params[n] - p).abs().min() for n, p in start().items() if p.numel()}
    assert min(moved.values()) > 1e-3, "the problem is degenerate: a parameter hardly moved"


@pytest.mark.parametrize("arguments", D_ADAPTATION[:3], ids=str)
def test_the_slow_reference_is_what_another_package_computes(arguments):
    """pytorch_optimizer sums in float32, which is why it cannot be the reference."""
    renamed = {("weight_decouple" if n == "decouple" else n): value for n, value in arguments.items()}
    slow, other = ({n: nn.Parameter(p) for n, p in start().items()} for _ in range(2))
    optimizers = [
        DAdaptAdam(list(slow.values()), **arguments),
        pytorch_optimizer.DAdaptAdam(list(other.values()), **renamed),
    ]
    for step in range(STEPS):
        for params, optimizer in zip((slow, other), optimizers, strict=True):
            for n, p in params.items():
                p.grad = gradient(n, p.detach(), step)
            optimizer.step()
    assert learnt(optimizers[0]) == pytest.approx(learnt(optimizers[1]), rel=1e-4)
    close({n: p.detach() for n, p in slow.items()}, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "reference", "arguments"), CASES, ids=IDS)
def test_as_torch_equals_the_reference(name, reference, arguments):
    ours, theirs = ({n: nn.Parameter(p) for n, p in start().items()} for _ in range(2))
    mine = getattr(fl.optim, name)(**arguments).as_torch(list(ours.values()))
    other = make(reference, list(theirs.values()), **arguments)
    for step in range(30):
        for params in (ours, theirs):
            for n, p in params.items():
                p.grad = gradient(n, p.detach(), step)
        mine.step()
        other.step()
    close({n: p.detach() for n, p in ours.items()}, theirs)


@pytest.mark.parametrize("decouple", [True, False])
def test_groups_of_parameters_share_d_and_decay_by_themselves(decouple: bool):
    """As in prodigyopt: one d over all groups, eps and weight decay of each group's own."""
    ours, theirs = ({n: nn.Parameter(p) for n, p in start().items()} for _ in range(2))

    def groups(params):
        first, *others = params.values()
        return [{"params": [first], "weight_decay": 0.2, "eps": 1e-2}, {"params": others, "weight_decay": 0.01}]

    mine = fl.optim.prodigy(d0=1e-3, decouple=decouple).as_torch(groups(ours))
    other = make(prodigyopt.Prodigy, groups(theirs), d0=1e-3, decouple=decouple)
    for step in range(30):
        for params in (ours, theirs):
            for n, p in params.items():
                p.grad = gradient(n, p.detach(), step)
        mine.step()
        other.step()
    close({n: p.detach() for n, p in ours.items()}, theirs)
    assert learnt(other) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_one_d0_for_all_groups(name):
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = getattr(fl.optim, name)(growth_rate=1.1).as_torch(
        [{"params": [params[0]], "d0": 1e-3}, {"params": [params[1]], "growth_rate": 1.2}]
    )
    for p in params:
        p.grad = torch.ones(2)
    with pytest.raises(fl.errors.InvalidHyperparameter, match="the same in every parameter group"):
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_that_joins_late_takes_the_d_there_is(name):
    optimizer = getattr(fl.optim, name)(d0=1e-3)
    reference = prodigyopt.Prodigy if name == "prodigy" else DAdaptAdam
    params, state = start(), optimizer.init(start())
    theirs = {n: nn.Parameter(p) for n, p in start().items()}
    other = make(reference, [theirs["vector"]], d0=1e-3)
    for step in range(20):
        with_gradient = ["vector"] if step < 10 else ["matrix", "vector"]
        if step == 10:
            other.param_groups[0]["params"].append(theirs["matrix"])
        grads = {n: gradient(n, params[n], step) for n in with_gradient}
        updates, state = optimizer.update(grads, state, params)
        params = {n: p + updates[n] if n in updates else p for n, p in params.items()}
        for n in with_gradient:
            theirs[n].grad = gradient(n, theirs[n].detach(), step)
        other.step()
    close(params, theirs)
    assert state["slots"]["matrix"]["d"] == state["slots"]["vector"]["d"] > 1e-3


@pytest.mark.parametrize(("name", "reference", "arguments"), CASES, ids=IDS)
def test_steps_with_zero_gradients_or_no_learning_rate_are_none(name, reference, arguments):
    """They neither move nor teach: as in the package, not even a bias correction counts them."""
    arguments = {**arguments, **({"weight_decay": 0.0} if not arguments.get("decouple", name == "prodigy") else {})}
    optimizer = getattr(fl.optim, name)(**arguments)
    params, state = start(), optimizer.init(start())
    theirs = {n: nn.Parameter(p) for n, p in start().items()}
    other = make(reference, list(theirs.values()), **arguments)
    for step in range(20):
        zero = step < 3
        grads = {n: gradient(n, p, step) * (not zero) for n, p in params.items()}
        updates, state = optimizer.update(grads, state, params)
        params = {n: p + updates[n] for n, p in params.items()}
        for n, p in theirs.items():
            p.grad = gradient(n, p.detach(), step) * (not zero)
        other.step()
        if zero:
            close(params, start(), rtol=0, atol=0)
            assert all(float(own["d"]) == optimizer.numbers["d0"] for own in state["slots"].values())
            assert all(t.isfinite().all() for own in state["slots"].values() for t in own.values())
    close(params, theirs)


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("limits", [{}, {"growth_rate": 1.1}], ids=["free", "limited"])
def test_a_learning_rate_of_zero_in_the_middle_is_a_step_left_out(bias_correction, limits):
    arguments = {"d0": 1e-3, "use_bias_correction": bias_correction, **limits}
    optimizer = fl.optim.prodigy(**arguments)
    params, state = start(), optimizer.init(start())
    theirs = {n: nn.Parameter(p) for n, p in start().items()}
    other = make(prodigyopt.Prodigy, list(theirs.values()), **arguments)
    for step in range(20):
        lr = 0.0 if step in (0, 1, 8) else 0.5 + 0.1 * math.sin(step)
        numbers = {n: torch.tensor(v, dtype=torch.float64) for n, v in {**optimizer.numbers, "lr": lr}.items()}
        params, state = step_of(optimizer, params, state, step, numbers=numbers)
        other.param_groups[0]["lr"] = lr
        for n, p in theirs.items():
            p.grad = gradient(n, p.detach(), step)
        other.step()
        close(params, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_without_momentum_a_step_is_the_limit_of_little_momentum(name):
    """Not so in prodigyopt, which scales the step by the new d there, and by the old one with any momentum."""
    ends = []
    for beta1 in (0.0, 1e-9):
        optimizer = getattr(fl.optim, name)(d0=1e-3, betas=(beta1, 0.99))
        params, state = start(), optimizer.init(start())
        for step in range(20):
            params, state = step_of(optimizer, params, state, step)
        ends.append(params)
    close(*ends, rtol=1e-5)


def test_d_adaptation_leaves_out_a_step_without_learning_rate():
    optimizer = fl.optim.d_adaptation(d0=1e-3, use_bias_correction=True)
    params, state = start(), optimizer.init(start())
    without, kept = start(), optimizer.init(start())
    for step in range(12):
        for lr in (1.0, 0.0):
            numbers = {n: torch.tensor(v, dtype=torch.float64) for n, v in {**optimizer.numbers, "lr": lr}.items()}
            params, state = step_of(optimizer, params, state, step, numbers=numbers)
        without, kept = step_of(optimizer, without, kept, step)
    close(params, without, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "reference", "arguments"), CASES, ids=IDS)
def test_low_precision_is_kept_and_finite(name, reference, arguments, dtype):
    optimizer = getattr(fl.optim, name)(**arguments)
    params = {n: torch.zeros_like(p) for n, p in start(dtype).items()}
    state = optimizer.init(params)
    for step in range(30):
        grads = {n: gradient(n, p, step) * (step > 1) for n, p in params.items()}
        updates, state = optimizer.update(grads, state, params)
        assert all(u.dtype == dtype and u.isfinite().all() for u in updates.values())
        params = {n: p + updates[n] for n, p in params.items()}
    assert updates["matrix"].abs().min() > 0
    for own in state["slots"].values():
        assert {t.dtype for t in own.values() if t.dim() > 0} <= {dtype}
        assert own["d"].dtype == torch.float64
        assert all(t.isfinite().all() for t in own.values())
    assert float(state["slots"]["matrix"]["d"]) >= optimizer.numbers["d0"]


def test_float16_learns_the_d_that_float64_learns():
    """Kept as in the package, the second moment d²(1 − β₂)g² would be 0 in half precision."""
    found = []
    for dtype in (torch.float16, torch.float64):
        optimizer = fl.optim.prodigy(d0=1e-4)
        params = {n: torch.zeros_like(p) for n, p in start(dtype).items()}
        state = optimizer.init(params)
        for step in range(40):
            params, state = step_of(optimizer, params, state, step)
        found.append(float(state["slots"]["matrix"]["d"]))
    assert found[0] == pytest.approx(found[1], rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_trials_with_numbers_of_their_own_under_vmap_equal_each_alone(name):
    rule = getattr(fl.optim, name)(weight_decay=0.1, decouple=True, growth_rate=1.5, use_bias_correction=True)
    trials = [
        rule.with_numbers({**rule.numbers, "lr": lr, "d0": d0, "beta1": beta1, "growth_rate": growth})
        for lr, d0, beta1, growth in [(1.0, 1e-3, 0.9, 1.1), (0.3, 1e-2, 0.5, 2.0), (2.0, 1e-6, 0.0, 50.0)]
    ]
    generator = torch.Generator().manual_seed(1)
    p = {n: torch.randn(3, *s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}
    alone = [{n: stacked[i].clone() for n, stacked in p.items()} for i in range(3)]
    states = [t.init(a) for t, a in zip(trials, alone, strict=True)]
    numbers = {n: torch.tensor([t.numbers[n] for t in trials], dtype=torch.float64) for n in rule.numbers}
    state = torch.func.vmap(rule.init)(p, numbers)
    for step in range(12):
        g = {n: gradient(n, stacked, step) for n, stacked in p.items()}
        updates, state = torch.func.vmap(rule.update)(g, state, p, numbers)
        p = {n: stacked + updates[n] for n, stacked in p.items()}
        for i, trial in enumerate(trials):
            own, states[i] = trial.update({n: each[i] for n, each in g.items()}, states[i], alone[i])
            alone[i] = {n: each + own[n] for n, each in alone[i].items()}
    for n, stacked in p.items():
        torch.testing.assert_close(stacked, torch.stack([a[n] for a in alone]), rtol=1e-11, atol=1e-13)
    ds = state["slots"]["matrix"]["d"]
    torch.testing.assert_close(ds, torch.stack([s["slots"]["matrix"]["d"] for s in states]), rtol=1e-11, atol=0)
    assert len(set(ds.tolist())) == 3


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_was_passed_in_is_changed(name):
    optimizer = getattr(fl.optim, name)(d0=1e-3, weight_decay=0.1)
    params, state = start(), optimizer.init(start())
    for step in range(3):
        before = {n: {k: t.clone() for k, t in own.items()} for n, own in state["slots"].items()}
        held, kept = {n: p.clone() for n, p in params.items()}, state
        new, state = step_of(optimizer, params, state, step)
        assert all(torch.equal(params[n], held[n]) for n in params)
        assert all(torch.equal(kept["slots"][n][k], t) for n, own in before.items() for k, t in own.items())
        params = new


def test_what_a_sweep_may_search_and_a_family_shares():
    swept = fl.optim.prodigy(lr=fl.grid([0.5, 1.0]), d0=fl.log_grid(1e-6, 1e-4, 2), growth_rate=fl.grid([1.02, 1.5]))
    assert set(swept.dimensions) == {"lr", "d0", "growth_rate"}
    one, other = fl.optim.prodigy(d0=1e-5), fl.optim.prodigy(d0=1e-3, d_coef=2.0, lr=0.5)
    assert one.structure == other.structure
    assert one.structure != fl.optim.prodigy(growth_rate=1.1).structure
    assert fl.optim.prodigy(growth_rate=math.inf).numbers == fl.optim.prodigy().numbers  # as prodigyopt writes it
    assert fl.optim.d_adaptation(d0=1e-5).structure == fl.optim.d_adaptation(betas=(0.5, 0.9)).structure
    assert one.together
    assert not one.elementwise


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "arguments",
    [{"d0": 0.0}, {"growth_rate": 0.9}, {"eps": 0.0}, {"betas": (0.9, 1.0)}, {"lr": -1.0}, {"weight_decay": -0.1}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_numbers_outside_of_their_domain_are_refused(name, arguments):
    with pytest.raises(
        fl.errors.InvalidHyperparameter, match="beta2" if "betas" in arguments else next(iter(arguments))
    ):
        getattr(fl.optim, name)(**arguments)


def test_the_distance_does_not_overflow_where_its_products_would_in_half_precision():
    optimizer = fl.optim.prodigy(d0=1e-3)
    begin, here = {"w": torch.zeros(4, dtype=torch.float16)}, {"w": torch.full((4,), -300.0, dtype=torch.float16)}
    grads = {
        "w": torch.full((4,), 300.0, dtype=torch.float16)
    }  # ⟨g, p₀ − p⟩ is 4 · 90000, and 65504 the largest number
    _, state = optimizer.update(grads, optimizer.init(begin), here)
    assert float(state["slots"]["w"]["d"]) == pytest.approx(300.0, rel=1e-3)
