"""Schedule-free optimizers against their authors' package: what is trained, and what is evaluated."""

from __future__ import annotations

import pytest
import schedulefree
import torch
from torch import Tensor, nn

import fallline as fl
from fallline.errors import InvalidHyperparameter

STEPS = 60
SHAPES = {"matrix": (3, 4), "vector": (5,), "scalar": (), "empty": (0, 2), "tensor": (2, 1, 3)}
CASES = [
    ("schedule_free_sgd", schedulefree.SGDScheduleFree, {"lr": 0.05}),
    ("schedule_free_sgd", schedulefree.SGDScheduleFree, {}),
    (
        "schedule_free_sgd",
        schedulefree.SGDScheduleFree,
        {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.1, "warmup_steps": 7, "r": 1.5, "weight_lr_power": 1.0},
    ),
    ("schedule_free_sgd", schedulefree.SGDScheduleFree, {"lr": 0.1, "warmup_steps": 1, "weight_lr_power": 0.0}),
    ("schedule_free_adamw", schedulefree.AdamWScheduleFree, {}),
    ("schedule_free_adamw", schedulefree.AdamWScheduleFree, {"lr": 0.03, "betas": (0.6, 0.9), "eps": 1e-3}),
    (
        "schedule_free_adamw",
        schedulefree.AdamWScheduleFree,
        {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.2, "warmup_steps": 9, "r": 0.5, "weight_lr_power": 3.0},
    ),
    ("schedule_free_adamw", schedulefree.AdamWScheduleFree, {"lr": 0.02, "warmup_steps": 200}),
]
IDS = [f"{name}-{i}" for i, (name, _, _) in enumerate(CASES)]


def start(dtype=torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: (torch.randn(s, generator=generator, dtype=torch.float64) + 1).to(dtype) for n, s in SHAPES.items()}


def gradient(name: str, p: Tensor, step: int) -> Tensor:
    """Of a bowl whose centre wanders: far from zero for every element at nearly every step."""
    phase = torch.arange(p.numel(), dtype=torch.float64).reshape(p.shape) + len(name)
    return (p.double() - torch.sin(0.7 * step + phase) * 2).to(p.dtype)


def close(mine: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance) -> None:
    for name, expected in theirs.items():
        torch.testing.assert_close(mine[name], expected.detach(), **{"rtol": 1e-10, "atol": 1e-13, **tolerance})


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(("name", "reference", "arguments"), CASES, ids=IDS)
def test_every_update_equals_the_authors_package(name, reference, arguments, foreach):
    optimizer = getattr(fl.optim, name)(**arguments)
    params, state = start(), optimizer.init(start())
    theirs = {n: nn.Parameter(p) for n, p in start().items()}
    other = reference(list(theirs.values()), foreach=foreach, **arguments)
    other.train()
    gap = 0.0
    for step in range(STEPS):
        grads = {n: gradient(n, p, step) for n, p in params.items()}
        updates, state = optimizer.update(grads, state, params)
        params = {n: p + updates[n] for n, p in params.items()}
        for n, p in theirs.items():
            p.grad = gradient(n, p.detach(), step)
        other.step()
        close(params, theirs)
        if step % 7 == 0 or step == STEPS - 1:
            found = optimizer.evaluation_parameters(state, params)
            other.eval()
            close(found, theirs, rtol=1e-9, atol=1e-12)
            gap = max(gap, float((found["matrix"] - params["matrix"]).abs().max()))
            other.train()
    assert gap > 1e-3, "the problem is degenerate: evaluation weights are those that are trained"
    moved = {n: (params[n] - p).abs().min() for n, p in start().items() if p.numel()}
    assert min(moved.values()) > 1e-4, "the problem is degenerate: a parameter hardly moved"


@pytest.mark.parametrize(("name", "reference", "arguments"), CASES, ids=IDS)
def test_evaluation_weights_are_the_weighted_mean_of_all_z(name, reference, arguments):
    """As in the paper, with nothing but z looked at: x = Σ w z / Σ w, w = tʳ · lrᵖ."""
    optimizer = getattr(fl.optim, name)(**arguments)
    params, state = start(), optimizer.init(start())
    lr, warmup = optimizer.arguments["lr"], optimizer.arguments["warmup_steps"]
    total, weights = torch.zeros(3, 4, dtype=torch.float64), 0.0
    for step in range(20):
        grads = {n: gradient(n, p, step) for n, p in params.items()}
        updates, state = optimizer.update(grads, state, params)
        params = {n: p + updates[n] for n, p in params.items()}
        rising = lr * min(1.0, (step + 1) / warmup) if warmup else lr
        w = (step + 1) ** optimizer.arguments["r"] * rising ** optimizer.arguments["weight_lr_power"]
        total, weights = total + w * state["slots"]["matrix"]["z"], weights + w
    found = optimizer.evaluation_parameters(state, params)["matrix"]
    torch.testing.assert_close(found, total / weights, rtol=1e-10, atol=1e-12)
    momentum = optimizer.numbers["momentum"]
    mixed = (1 - momentum) * state["slots"]["matrix"]["z"] + momentum * found
    torch.testing.assert_close(params["matrix"], mixed, rtol=1e-10, atol=1e-12)


def test_before_the_first_update_the_evaluation_weights_are_the_parameters():
    optimizer = fl.optim.schedule_free_adamw()
    close(optimizer.evaluation_parameters(optimizer.init(start()), start()), start(), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "reference", "arguments"), CASES, ids=IDS)
def test_as_torch_equals_the_authors_package(name, reference, arguments):
    ours = {n: nn.Parameter(p) for n, p in start().items()}
    theirs = {n: nn.Parameter(p) for n, p in start().items()}
    mine = getattr(fl.optim, name)(**arguments).as_torch(list(ours.values()))
    other = reference(list(theirs.values()), **arguments)
    other.train()
    for step in range(30):
        for params in (ours, theirs):
            for n, p in params.items():
                p.grad = gradient(n, p.detach(), step)
        mine.step()
        other.step()
    close({n: p.detach() for n, p in ours.items()}, theirs)


@pytest.mark.parametrize("name", ["schedule_free_sgd", "schedule_free_adamw"])
def test_a_learning_rate_that_a_schedule_moves_is_the_one_set_by_hand(name):
    """The package reads group["lr"] at each step; a warm-up from 0 first averages nothing."""
    schedule = fl.schedules.cosine(0.2)
    optimizer = getattr(fl.optim, name)(lr=schedule)
    reference = schedulefree.SGDScheduleFree if name.endswith("sgd") else schedulefree.AdamWScheduleFree
    params, state = start(), optimizer.init(start(), steps=30)
    theirs = {n: nn.Parameter(p) for n, p in start().items()}
    other = reference(list(theirs.values()), lr=0.2)
    other.train()
    for step in range(30):
        grads = {n: gradient(n, p, step) for n, p in params.items()}
        updates, state = optimizer.update(grads, state, params, steps=30)
        params = {n: p + updates[n] for n, p in params.items()}
        other.param_groups[0]["lr"] = schedule(step / 30).item()
        for n, p in theirs.items():
            p.grad = gradient(n, p.detach(), step)
        other.step()
    close(params, theirs)
    other.eval()
    close(optimizer.evaluation_parameters(state, params, steps=30), theirs)


@pytest.mark.parametrize("name", ["schedule_free_sgd", "schedule_free_adamw"])
def test_a_learning_rate_of_zero_moves_and_averages_nothing(name):
    optimizer = getattr(fl.optim, name)(lr=0.0)
    params, state = start(), optimizer.init(start())
    for step in range(3):
        grads = {n: gradient(n, p, step) for n, p in params.items()}
        updates, state = optimizer.update(grads, state, params)
        assert all((u == 0).all() for u in updates.values())
    close(optimizer.evaluation_parameters(state, params), start(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "reference", "arguments"), CASES, ids=IDS)
def test_zero_gradients_are_no_nan_and_dtypes_are_kept(name, reference, arguments, dtype):
    arguments = {**arguments, "weight_decay": 0.0}
    for eps in [{}, {"eps": 0.0}] if name.endswith("adamw") else [{}]:
        optimizer = getattr(fl.optim, name)(**{**arguments, **eps})
        params, state = start(dtype), optimizer.init(start(dtype))
        for size in (0.0, 0.0, 0.5):
            grads = {n: torch.full_like(p, size) for n, p in params.items()}
            updates, state = optimizer.update(grads, state, params)
            assert all(u.isfinite().all() and u.dtype == dtype for u in updates.values())
            assert size or all((u == 0).all() for u in updates.values())
        assert updates["matrix"].abs().min() > 0
        for own in state["slots"].values():
            assert {t.dtype for t in own.values() if t.dtype != torch.float64} <= {dtype}
            assert all(t.isfinite().all() for t in own.values())
        assert {p.dtype for p in optimizer.evaluation_parameters(state, params).values()} == {dtype}


@pytest.mark.parametrize("name", ["schedule_free_sgd", "schedule_free_adamw"])
def test_complex_parameters_are_pairs_of_real_ones(name):
    optimizer = getattr(fl.optim, name)(lr=0.1, weight_decay=0.1)
    p = {"w": torch.complex(*torch.randn(2, 4, dtype=torch.float64))}
    q = {"w": torch.view_as_real(p["w"]).clone()}
    s, t = optimizer.init(p), optimizer.init(q)
    for step in range(10):
        g = gradient("w", q["w"], step)
        v, t = optimizer.update({"w": g}, t, q)
        u, s = optimizer.update({"w": torch.view_as_complex(g)}, s, p)
        p, q = {"w": p["w"] + u["w"]}, {"w": q["w"] + v["w"]}
    torch.testing.assert_close(torch.view_as_real(p["w"]), q["w"])
    found, expected = optimizer.evaluation_parameters(s, p)["w"], optimizer.evaluation_parameters(t, q)["w"]
    torch.testing.assert_close(torch.view_as_real(found), expected)
    assert (expected - q["w"]).abs().max() > 1e-3


@pytest.mark.parametrize("mapped", [False, True], ids=["stacked", "vmap"])
@pytest.mark.parametrize("name", ["schedule_free_sgd", "schedule_free_adamw"])
def test_trials_with_numbers_of_their_own_equal_each_alone(name, mapped):
    """Rows [trial, parameters] with numbers [trial, 1], as the vectorised engine has them, or the rule under vmap."""
    make = getattr(fl.optim, name)
    several = [(0.01, 0.5, 0, 0.0, 2.0), (0.3, 0.9, 6, 1.0, 0.0), (0.1, 0.7, 3, 2.5, 1.0)]
    keys = ("lr", "momentum", "warmup_steps", "r", "weight_lr_power")
    rule = make(weight_decay=0.1)
    trials = [rule.with_numbers({**rule.numbers, **dict(zip(keys, own, strict=True))}) for own in several]
    p = {"w": torch.randn(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}
    alone = [{"w": row.clone()} for row in p["w"]]
    states = [t.init(a) for t, a in zip(trials, alone, strict=True)]
    numbers = {n: torch.tensor([[t.numbers[n]] for t in trials], dtype=torch.float64) for n in rule.numbers}
    state = torch.func.vmap(rule.init)(p)
    if mapped:
        numbers = {n: v.squeeze(1) for n, v in numbers.items()}
    else:
        own = {n: t.unsqueeze(1) if t.dim() == 1 else t for n, t in state["slots"]["w"].items()}
        state = {"step": state["step"].unsqueeze(1), "slots": {"w": own}}
    update, evaluation = rule.update, rule.evaluation_parameters
    if mapped:
        update, evaluation = torch.func.vmap(update), torch.func.vmap(evaluation)
    for step in range(8):
        g = {"w": gradient("w", p["w"], step)}
        updates, state = update(g, state, p, numbers)
        p = {"w": p["w"] + updates["w"]}
        for i, trial in enumerate(trials):
            moved, states[i] = trial.update({"w": g["w"][i]}, states[i], alone[i])
            alone[i] = {"w": alone[i]["w"] + moved["w"]}
    torch.testing.assert_close(p["w"], torch.stack([a["w"] for a in alone]), rtol=1e-13, atol=0)
    expected = [t.evaluation_parameters(s, a)["w"] for t, s, a in zip(trials, states, alone, strict=True)]
    torch.testing.assert_close(evaluation(state, p, numbers)["w"], torch.stack(expected), rtol=1e-13, atol=0)
    assert (p["w"] - torch.stack(expected)).abs().max() > 1e-3


def test_a_direction_of_any_kind_can_be_averaged():
    """Lion's direction with the step of schedule-free: x of z's that each move by ±lr."""
    optimizer = fl.optim.chain(fl.optim.scale_by_lion(), fl.optim.schedule_free_step(0.5))
    params = {"w": torch.zeros(3, dtype=torch.float64)}
    state = optimizer.init(params)
    for _ in range(3):
        g = {"w": torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)}
        updates, state = optimizer.update(g, state, params)
        params = {"w": params["w"] + updates["w"]}
    expected = torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)  # the mean of 0.5, 1.0 and 1.5
    torch.testing.assert_close(optimizer.evaluation_parameters(state, params)["w"], expected)


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(InvalidHyperparameter, match=r"momentum = .* follows a schedule: give one number"):
        fl.optim.schedule_free_sgd(momentum=fl.schedules.cosine(0.9))
    with pytest.raises(InvalidHyperparameter, match=r"beta1 = .* follows a schedule: give one number"):
        fl.optim.schedule_free_adamw(betas=(fl.schedules.cosine(0.9), 0.99))
    for betas in ((0.0, 0.9), (1.0, 0.9)):
        with pytest.raises(InvalidHyperparameter, match="beta1"):
            fl.optim.schedule_free_adamw(betas=betas)
    with pytest.raises(InvalidHyperparameter, match="warmup_steps = -1 is negative"):
        fl.optim.schedule_free_sgd(warmup_steps=-1)
