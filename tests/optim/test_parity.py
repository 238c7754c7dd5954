"""Every named optimizer against torch.optim (lion against the paper's algorithm), update by update."""

import lion_pytorch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fallline as fl
from plain_loop import PAIRS, Lion

STEPS = 50
SHAPES = {"matrix": (3, 4), "vector": (5,), "scalar": (), "empty": (0, 2), "tensor": (2, 1, 3)}


def start(dtype=torch.float64, seed=0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) + 1 for n, s in SHAPES.items()}


def gradient(name: str, p: Tensor, step: int) -> Tensor:
    """Of a bowl whose centre wanders: far from zero for every element at nearly every step."""
    phase = torch.arange(p.numel(), dtype=torch.float64).reshape(p.shape) + len(name)
    return (p.double() - torch.sin(0.7 * step + phase) * 2).to(p.dtype)


def ours(optimizer, *, steps=STEPS, dtype=torch.float64) -> dict[str, Tensor]:
    params = start(dtype)
    state = optimizer.init(params)
    for step in range(steps):
        grads = {name: gradient(name, p, step) for name, p in params.items()}
        updates, state = optimizer.update(grads, state, params)
        params = {name: p + updates[name] for name, p in params.items()}
    return params


def torchs(make, *, steps=STEPS, dtype=torch.float64) -> dict[str, Tensor]:
    params = {name: nn.Parameter(p) for name, p in start(dtype).items()}
    optimizer = make(list(params.values()))
    sizes, moved = [], {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in params.items()}
    for step in range(steps):
        for name, p in params.items():
            p.grad = gradient(name, p.detach(), step)
            sizes.extend(p.grad.abs().flatten().tolist())
        optimizer.step()
        moved = {name: moved[name] | (p.detach() != start(dtype)[name]) for name, p in params.items()}
    assert all(m.all() for m in moved.values()), "the problem is degenerate: a parameter never moved"
    assert sum(size > 1e-3 for size in sizes) > 0.98 * len(sizes), "the problem is degenerate: its gradients vanish"
    return {name: p.detach() for name, p in params.items()}


def assert_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor], *, rtol=1e-10, atol=1e-13) -> None:
    for name, expected in theirs.items():
        assert mine[name].dtype == expected.dtype
        torch.testing.assert_close(mine[name], expected, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_fifty_updates_in_float64_equal_torch(pair):
    assert_equal(ours(pair.ours), torchs(pair.torch))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_in_float32_only_round_off_differs(pair):
    # lion's steps are ±lr by the sign of a sum that may round to either side of 0.
    atol = 2e-3 if pair.ours.name == "lion" else 2e-5
    theirs = torchs(pair.torch, dtype=torch.float32)
    for name, p in ours(pair.ours, dtype=torch.float32).items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-5, atol=atol)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_first_update_equals_torch(pair):
    assert_equal(ours(pair.ours, steps=1), torchs(lambda params: pair.torch(params), steps=1))


rates = st.floats(1e-4, 0.05)
decays = st.one_of(st.just(0.0), st.floats(1e-3, 0.5))
betas = st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 0.9999))
epsilons = st.floats(1e-10, 1e-2)
few = settings(max_examples=12, deadline=None, derandomize=True)


def check(name: str, torch_class, arguments: dict) -> None:
    mine = ours(getattr(fl.optim, name)(**arguments), steps=8)
    theirs = torchs(lambda params: torch_class(params, **arguments), steps=8)
    for key, p in mine.items():
        torch.testing.assert_close(p, theirs[key], rtol=1e-10, atol=1e-12)


@few
@given(
    lr=rates,
    momentum=st.one_of(st.just(0.0), st.floats(0.01, 0.99)),
    dampening=st.one_of(st.just(0.0), st.floats(-0.5, 1.5)),
    weight_decay=decays,
    nesterov=st.booleans(),
    maximize=st.booleans(),
)
def test_sgd_equals_torch_whatever_its_options(nesterov, momentum, dampening, **rest):
    if nesterov:
        momentum, dampening = max(momentum, 0.01), 0.0
    check("sgd", torch.optim.SGD, {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, **rest})


@pytest.mark.parametrize(("name", "torch_class"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
@few
@given(lr=rates, betas=betas, eps=epsilons, weight_decay=decays, amsgrad=st.booleans(), maximize=st.booleans())
def test_adam_and_adamw_equal_torch_whatever_their_options(name, torch_class, **arguments):
    check(name, torch_class, arguments)


@few
@given(
    lr=rates,
    alpha=st.floats(0.0, 0.999),
    eps=epsilons,
    weight_decay=decays,
    momentum=st.one_of(st.just(0.0), st.floats(0.01, 0.95)),
    maximize=st.booleans(),
)
def test_rmsprop_equals_torch_whatever_its_options(**arguments):
    check("rmsprop", torch.optim.RMSprop, arguments)


@few
@given(lr=rates, alpha=st.floats(0.5, 0.999), eps=st.floats(1e-3, 1e-1), momentum=st.sampled_from([0.0, 0.9]))
def test_centered_rmsprop_equals_torch(**arguments):
    check("rmsprop", torch.optim.RMSprop, {**arguments, "centered": True})


@few
@given(lr=rates, betas=betas, weight_decay=decays)
def test_lion_equals_the_papers_algorithm(**arguments):
    check("lion", Lion, arguments)


def test_lion_uphill_is_lion_on_the_negated_gradient():
    p, g = {"w": torch.tensor([2.0, -1.0])}, {"w": torch.tensor([0.3, -0.4])}
    up, down = fl.optim.lion(weight_decay=0.1, maximize=True), fl.optim.lion(weight_decay=0.1)
    negated = {"w": -g["w"]}
    assert torch.equal(up.update(g, up.init(p), p)[0]["w"], down.update(negated, down.init(p), p)[0]["w"])


def test_bias_corrections_are_computed_in_float64_for_float32_parameters():
    """At β₂ = 1 − 10⁻⁷, the first correction is 10⁻⁷: in float32 it would be 1.19·10⁻⁷, and the step 9 % too long."""
    optimizer = fl.optim.adam(lr=1.0, betas=(0.9, 1 - 1e-7), eps=0.0)
    p = {"w": torch.zeros(3)}
    updates, _ = optimizer.update({"w": torch.tensor([1.0, -2.0, 0.5])}, optimizer.init(p), p)
    torch.testing.assert_close(updates["w"], torch.tensor([-1.0, 1.0, -1.0]), rtol=1e-6, atol=0)


def test_a_late_bias_correction_in_float32_is_as_exact_as_torchs():
    make = lambda params: torch.optim.Adam(params, lr=1e-3, betas=(0.9, 0.9999), eps=1e-12)  # noqa: E731
    truth = torchs(lambda params: torch.optim.Adam(params, lr=1e-3, betas=(0.9, 0.9999), eps=1e-12), steps=30)
    theirs = torchs(make, steps=30, dtype=torch.float32)
    mine = ours(fl.optim.adam(lr=1e-3, betas=(0.9, 0.9999), eps=1e-12), steps=30, dtype=torch.float32)
    for name in ("matrix", "vector", "tensor"):
        budget = (theirs[name].double() - truth[name]).abs().max()
        assert (mine[name].double() - truth[name]).abs().max() <= 2 * budget + 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_updates_and_state_keep_the_parameters_dtype(pair, dtype):
    params = {"w": torch.ones(3, dtype=dtype), "empty": torch.ones(0, dtype=dtype)}
    state = pair.ours.init(params)
    for _ in range(2):
        updates, state = pair.ours.update({n: p * 0.5 for n, p in params.items()}, state, params)
        assert {u.dtype for u in updates.values()} == {dtype}
        assert {t.dtype for n, t in state["slots"]["w"].items() if n != "step"} <= {dtype}
    assert updates["w"].isfinite().all()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_zero_gradients_move_nothing_but_decaying_weights(pair):
    optimizer = pair.ours
    params = {"w": torch.tensor([2.0, -3.0], dtype=torch.float64)}
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update({"w": torch.zeros(2, dtype=torch.float64)}, state, params)
        assert updates["w"].isfinite().all()
        decays = optimizer.arguments["weight_decay"] > 0
        assert (updates["w"] != 0).all() if decays else (updates["w"] == 0).all()


def test_a_second_moment_that_overflowed_stays_infinite_as_in_torch():
    p = nn.Parameter(torch.ones(2))
    q = nn.Parameter(torch.ones(2))
    mine, theirs = fl.optim.adam(lr=0.1).as_torch([p]), torch.optim.Adam([q], lr=0.1)
    for size in (1.0, 1e25, 1.0, 1.0):
        p.grad, q.grad = torch.full((2,), size), torch.full((2,), size)
        mine.step()
        theirs.step()
    assert p.isfinite().all()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_an_update_changes_nothing_that_was_passed_in(pair):
    params = start()
    state = pair.ours.init(params)
    for step in range(3):
        grads = {name: gradient(name, p, step) for name, p in params.items()}
        given = {"g": grads, "s": state, "p": params}
        before = copy_of(given)
        _, state = pair.ours.update(grads, state, params)
        assert same(given, before)


@pytest.mark.parametrize("pair", [p for p in PAIRS if p.ours.elementwise], ids=str)
@pytest.mark.parametrize("mapped", [False, True], ids=["stacked", "vmap"])
def test_trials_updated_together_equal_each_alone(pair, mapped):
    """Rows [trial, parameters] with numbers [trial, 1], as the vectorised engine has them, or the rule under vmap."""
    rule = pair.ours
    trials = [rule.with_numbers({**rule.hyperparameters, "lr": lr}) for lr in (0.001, 0.02, 0.3)]
    generator = torch.Generator().manual_seed(1)
    p = {"w": torch.randn(3, 7, generator=generator, dtype=torch.float64)}
    alone = [{"w": row.clone()} for row in p["w"]]
    states = [t.init(a) for t, a in zip(trials, alone, strict=True)]
    numbers = {n: torch.tensor([[t.numbers[n]] for t in trials], dtype=torch.float64) for n in rule.numbers}
    state = torch.func.vmap(rule.init)(p)
    if mapped:
        numbers = {n: v.squeeze(1) for n, v in numbers.items()}
    else:
        state = {
            "step": state["step"].unsqueeze(1),
            "slots": {"w": {n: t.unsqueeze(1) if t.dim() == 1 else t for n, t in state["slots"]["w"].items()}},
        }
    for step in range(5):
        g = {"w": gradient("w", p["w"], step)}
        update = torch.func.vmap(rule.update) if mapped else rule.update
        updates, state = update(g, state, p, numbers)
        p = {"w": p["w"] + updates["w"]}
        for i, trial in enumerate(trials):
            own, states[i] = trial.update({"w": g["w"][i]}, states[i], alone[i])
            alone[i] = {"w": alone[i]["w"] + own["w"]}
    torch.testing.assert_close(p["w"], torch.stack([a["w"] for a in alone]), rtol=1e-14, atol=0)


def test_a_parameter_without_gradient_keeps_its_step_count():
    optimizer = fl.optim.adam(lr=0.1)
    params = {"seen": torch.ones(1), "unseen": torch.ones(1)}
    state = optimizer.init(params)
    updates, state = optimizer.update({"seen": torch.ones(1)}, state, params)
    assert list(updates) == ["seen"]
    assert (state["slots"]["seen"]["step"], state["slots"]["unseen"]["step"], state["step"]) == (1, 0, 1)
    updates, state = optimizer.update({}, state, params)
    assert updates == {}
    assert state["step"] == 2


def test_misuse_of_update_is_named():
    optimizer = fl.optim.sgd()
    params = {"w": torch.ones(2)}
    state = optimizer.init(params)
    with pytest.raises(fl.errors.FalllineError, match=r"'v'.*no such parameter"):
        optimizer.update({"v": torch.ones(2)}, state, params)
    with pytest.raises(fl.errors.FalllineError, match=r"'w' has shape \(1,\), the parameter \(2,\)"):
        optimizer.update({"w": torch.ones(1)}, state, params)
    with pytest.raises(fl.errors.FalllineError, match=r"'v'.*in the state"):
        optimizer.update({"v": torch.ones(2)}, state, {"v": torch.ones(2)})
    for dtype in (torch.bool, torch.int64):
        with pytest.raises(fl.errors.FalllineError, match=r"'w' is torch"):
            optimizer.init({"w": torch.ones(2, dtype=dtype)})


def copy_of(tree):
    return {k: copy_of(v) for k, v in tree.items()} if isinstance(tree, dict) else tree.clone()


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b)


@pytest.mark.parametrize("arguments", [{"lr": 1e-2}, {"lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": 0.1}], ids=str)
def test_lion_equals_lion_pytorch(arguments):
    generator = torch.Generator().manual_seed(0)
    begin = {"w": torch.randn(4, 3, generator=generator).double(), "b": torch.randn(3, generator=generator).double()}
    theirs = {name: torch.nn.Parameter(p.clone()) for name, p in begin.items()}
    other, ours = lion_pytorch.Lion(theirs.values(), **arguments), fl.optim.lion(**arguments)
    params, state = dict(begin), ours.init(begin)
    for step in range(50):
        for p in theirs.values():
            p.grad = torch.sin(3 * p.detach() + step) + 0.1
        grads = {name: torch.sin(3 * p + step) + 0.1 for name, p in params.items()}
        other.step()
        updates, state = ours.update(grads, state, params)
        params = {name: p + updates[name] for name, p in params.items()}
    for name, p in params.items():
        torch.testing.assert_close(p, theirs[name].detach(), rtol=1e-10, atol=1e-12)
        assert (p != begin[name]).all()
