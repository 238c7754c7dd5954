"""Every configuration and every error in torch's own database of its optimizers, torch's class against ours.

The database is part of torch's test utilities, which change global settings when they are imported and want a package
to compare texts with: it is read in another process.
"""

import copy
import functools
import inspect
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import fallline as fl

STEPS = 50
THIRTEEN = "SGD Adam AdamW RMSprop Adagrad Adadelta Adamax NAdam RAdam ASGD Rprop Adafactor Muon".split()  # noqa: SIM905
NAMES = [name for name in THIRTEEN if hasattr(torch.optim, name)]  # torch 2.6 has no Muon yet
REAL_ONLY = ("Adafactor", "Muon")
SWITCHES = {"foreach", "fused", "capturable", "differentiable"}
READ = """
import pickle, sys, types, unittest
try:
    import expecttest
except ImportError:
    sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
import torch
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db
dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
found = {}
for info in optim_db:
    valid = {d: [(i.desc, i.kwargs) for i in info.optim_inputs_func(device="cpu", dtype=d)] for d in dtypes}
    errors = [
        (e.optimizer_error_input.desc, e.optimizer_error_input.params, e.optimizer_error_input.kwargs, e.error_type,
         e.error_on == OptimizerErrorEnum.STEP_ERROR)
        for e in info.optim_error_inputs_func(device="cpu", dtype=torch.float64)
    ]
    found[info.optim_cls.__name__] = (valid, errors)
sys.stdout.buffer.write(pickle.dumps(found))
"""
# What the database leaves out: every number away from its default, and every branch.
MORE = {
    "SGD": [{"lr": 0.01, "momentum": 0.7, "dampening": 0.3, "weight_decay": 0.1, "maximize": True}],
    "Adam": [
        {"lr": 0.01, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.1, "amsgrad": True},
        {"lr": 0.01, "weight_decay": 0.3, "decoupled_weight_decay": True, "amsgrad": True, "maximize": True},
    ],
    "AdamW": [{"lr": 0.01, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.3, "maximize": True}],
    "RMSprop": [{"lr": 0.01, "alpha": 0.8, "eps": 1e-3, "momentum": 0.5, "weight_decay": 0.1}],
    "Adagrad": [{"lr": 0.3, "lr_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-2, "maximize": True}],
    "Adadelta": [{"lr": 2.0, "rho": 0.7, "eps": 1e-3, "weight_decay": 0.1}],
    "Adamax": [{"lr": 0.02, "betas": (0.7, 0.9), "eps": 1e-2, "weight_decay": 0.1}],
    "NAdam": [
        {"lr": 0.02, "betas": (0.7, 0.9), "eps": 1e-3, "momentum_decay": 0.1},
        {"lr": 0.02, "weight_decay": 0.3, "decoupled_weight_decay": True, "maximize": True},
    ],
    "RAdam": [
        {"lr": 0.02, "betas": (0.7, 0.9), "eps": 1e-3},  # rectified from the seventh step on
        {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.3, "decoupled_weight_decay": True},
        {"lr": 0.02, "betas": (0.9, 0.5)},  # never rectified
    ],
    "ASGD": [{"lr": 0.05, "lambd": 0.1, "alpha": 0.5, "t0": 10, "weight_decay": 0.1}],
    "Rprop": [{"lr": 0.05, "etas": (0.3, 1.7), "step_sizes": (0.01, 0.2), "maximize": True}],
    "Adafactor": [
        {"lr": 0.05, "beta2_decay": -0.5, "eps": (0.3, 2.0), "d": 1.2},
        {"lr": 0.9, "eps": (1e-4, 1e-3), "weight_decay": 0.02},
        {"lr": 0.2, "weight_decay": 0.3, "maximize": True},
    ],
    "Muon": [
        {"lr": 0.05, "nesterov": False, "weight_decay": 0.0, "adjust_lr_fn": "original"},
        {"lr": 0.02, "momentum": 0.5, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
        {"lr": 0.02, "eps": 20.0},
    ],
}
SHAPES = {"matrix": (3, 4), "vector": (5,), "scalar": (), "tensor": (2, 1, 3), "kernel": (4, 2, 3, 2)}
# With products below and above the size up to which torch multiplies in another way.
MATRICES = {"wide": (3, 7), "tall": (8, 3), "larger": (20, 24), "row": (1, 5)}


@functools.cache
def database() -> dict:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", READ], capture_output=True, check=True)
    return pickle.loads(done.stdout)


def takes(name: str) -> dict[str, inspect.Parameter]:
    found = dict(inspect.signature(getattr(torch.optim, name)).parameters)
    return {key: p for key, p in found.items() if key != "params" and key not in SWITCHES}


def configurations(name: str, dtype=torch.float64) -> list[tuple[str, dict]]:
    given = [(desc, kwargs) for desc, kwargs in database()[name][0][dtype] if "capturable" not in kwargs]
    assert len(given) >= 5
    given += [(str(kwargs), kwargs) for kwargs in MORE[name] if kwargs.keys() <= takes(name).keys()]
    if dtype == torch.float16 and isinstance(getattr(takes(name).get("eps"), "default", None), float):
        # As the database itself has it for Adam: with the small ones torch divides by 0.
        return [(desc, {**kwargs, "eps": 0.1}) for desc, kwargs in given]
    return given


def start(name: str, dtype) -> dict[str, torch.Tensor]:
    """Of size 1; smaller in half precision, where a step of a thousandth would change nothing."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for key, shape in (MATRICES if name == "Muon" else SHAPES).items():
        p = torch.randn(shape, generator=generator, dtype=torch.float64) + 1
        if dtype.is_complex:
            p = p + 1j * torch.randn(shape, generator=generator, dtype=torch.float64)
        made[key] = (p / 16 if dtype.itemsize == 2 else p).to(dtype)
    return made


def gradient(key: str, p: torch.Tensor, step: int) -> torch.Tensor:
    """Of a bowl whose centre wanders at a pace and in a direction of its own for every element."""
    wide = torch.complex128 if p.is_complex() else torch.float64
    phase = torch.arange(p.numel(), dtype=torch.float64).reshape(p.shape) * 1.3 + len(key)
    centre = 2 * torch.sin(0.7 * step + phase) + torch.cos(phase * phase)
    centre = centre + 1j * torch.cos(0.3 * step + phase) if p.is_complex() else centre
    return ((p.to(wide) - centre) * (1 + 0.1 * step)).to(p.dtype)


def torchs(name, kwargs, dtype, steps=STEPS) -> tuple[dict, dict]:
    """Parameters and state in the end, of a problem that is proven to be one."""
    params = {key: nn.Parameter(p) for key, p in start(name, dtype).items()}
    optimizer = getattr(torch.optim, name)(list(params.values()), **kwargs)
    sizes = []
    moved = {key: torch.zeros(p.shape, dtype=torch.bool) for key, p in params.items()}
    for step in range(steps):
        for key, p in params.items():
            p.grad = gradient(key, p.detach(), step)
            sizes.extend(p.grad.abs().flatten().tolist())
        optimizer.step()
        moved = {key: moved[key] | (p.detach() != start(name, dtype)[key]) for key, p in params.items()}
    share = torch.cat([m.flatten() for m in moved.values()]).double().mean()
    assert share == 1 or (dtype.itemsize == 2 and share > 0.1), "the problem is degenerate: elements never moved"
    assert sum(size > 1e-3 for size in sizes) > 0.95 * len(sizes), "the problem is degenerate: its gradients vanish"
    return {key: p.detach() for key, p in params.items()}, {key: dict(optimizer.state[p]) for key, p in params.items()}


def pure(name, kwargs, dtype, steps=STEPS) -> tuple[dict, dict]:
    optimizer = getattr(fl.optim, name.lower())(**kwargs)
    params = start(name, dtype)
    state = optimizer.init(params)
    for step in range(steps):
        grads = {key: gradient(key, p, step) for key, p in params.items()}
        updates, state = optimizer.update(grads, state, params)
        params = {key: p + updates[key] for key, p in params.items()}
    return params, state["slots"]


def as_torch(name, kwargs, dtype, steps=STEPS) -> tuple[dict, dict]:
    params = {key: nn.Parameter(p) for key, p in start(name, dtype).items()}
    optimizer = getattr(fl.optim, name.lower())(**kwargs).as_torch(list(params.values()))
    for step in range(steps):
        for key, p in params.items():
            p.grad = gradient(key, p.detach(), step)
        optimizer.step()
    return {key: p.detach() for key, p in params.items()}, {key: dict(optimizer.state[p]) for key, p in params.items()}


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def default_dtype(request):
    """torch keeps single numbers of the state (NAdam's product, ASGD's rate) in the default dtype, and so do we."""
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


def assert_close(mine, theirs, where, *, rtol, atol):
    for key, expected in theirs.items():
        assert mine[key].dtype == expected.dtype, where
        torch.testing.assert_close(
            mine[key], expected, rtol=rtol, atol=atol, msg=lambda m, key=key: f"{where}, {key}: {m}"
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("default_dtype")
def test_fifty_steps_in_float64_equal_torch(name):
    for desc, kwargs in configurations(name):
        theirs, their_state = torchs(name, kwargs, torch.float64)
        unread = {"step", "momentum_buffer" if not kwargs.get("momentum") and name != "Muon" else ""}
        for run in (pure, as_torch):
            mine, my_state = run(name, kwargs, torch.float64)
            assert_close(mine, theirs, f"{desc}, {run.__name__}", rtol=1e-10, atol=1e-12)
            for key, slots in their_state.items():
                expected = {slot: value for slot, value in slots.items() if value is not None and slot not in unread}
                assert_close(my_state[key], expected, f"{desc}, {run.__name__}, state", rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REAL_ONLY])
@pytest.mark.usefixtures("default_dtype")
def test_fifty_steps_with_complex_parameters_equal_torch(name):
    for desc, kwargs in configurations(name):
        theirs, _ = torchs(name, kwargs, torch.complex128)
        for run in (pure, as_torch):
            mine, _ = run(name, kwargs, torch.complex128)
            assert_close(mine, theirs, f"{desc}, {run.__name__}", rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_in_lower_precision_only_round_off_differs(name, dtype):
    """In rounding units of the largest parameter: an update rounds a few times, and there are ten."""
    for desc, kwargs in configurations(name, dtype):
        if name == "Muon" and dtype == torch.bfloat16 and kwargs.get("nesterov") is False:
            continue  # where torch loses the momentum: see test_muon.py
        theirs, _ = torchs(name, kwargs, dtype, steps=10)
        mine, _ = pure(name, kwargs, dtype, steps=10)
        allowed = 8 * torch.finfo(dtype).eps * max(p.abs().max().item() for p in theirs.values())
        if name == "Muon":  # whose products are in bfloat16 whatever the parameters are
            allowed += 8 * torch.finfo(torch.bfloat16).eps * float(kwargs.get("lr", 1e-3))
        assert_close(mine, theirs, desc, rtol=0, atol=allowed)


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_torchs(name):
    def ours(params, **kwargs):
        return getattr(fl.optim, name.lower())(**kwargs).as_torch(params)

    cases = database()[name][1]
    assert len(cases) >= 7
    for make in (getattr(torch.optim, name), ours):
        for desc, params, kwargs, error, when_stepping in copy.deepcopy(cases):
            given = [nn.Parameter(torch.randn(1, 1))] if params is None else params
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                optimizer = make(given, **kwargs) if when_stepping else None
                try:
                    if when_stepping:
                        for p in given:
                            p.grad = torch.ones_like(p)
                        optimizer.step()
                    else:
                        make(given, **kwargs)
                except error:
                    continue
            pytest.fail(f"{make.__name__}: {desc}: no {error.__name__}")


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_torchs_in_torchs_order_with_torchs_defaults(name):
    theirs = takes(name)
    mine = dict(inspect.signature(getattr(fl.optim, name.lower())).parameters)
    later = {"decoupled_weight_decay"} if name == "Adam" else set()  # torch 2.6 does not have it yet
    assert [key for key in mine if key in theirs or key not in later] == list(theirs)
    for key, p in theirs.items():
        assert mine[key].default == p.default, key


@pytest.mark.usefixtures("default_dtype")
def test_adafactor_bounds_the_mean_of_the_rows_from_below():
    """Where it is below eps1, but the rows times the columns are not: for gradients of some 0.7 with eps1 = 0.5."""
    p = nn.Parameter(torch.ones(2, 3))
    g = torch.tensor([[0.6, -0.7, 0.65], [-0.68, 0.62, 0.7]])
    theirs = torch.optim.Adafactor([p], eps=(0.5, 1e-3), d=3.0)
    rule = fl.optim.adafactor(eps=(0.5, 1e-3), d=3.0)
    mine = {"w": torch.ones(2, 3)}
    state = rule.init(mine)
    for _ in range(3):
        p.grad = g
        theirs.step()
        updates, state = rule.update({"w": g}, state, mine)
        mine = {"w": mine["w"] + updates["w"]}
    assert state["slots"]["w"]["row_var"].mean() < 0.5
    torch.testing.assert_close(mine["w"], p.detach(), rtol=1e-12, atol=0)
