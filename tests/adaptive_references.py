"""Slow references of adaptive optimizers, written line by line from the papers, and the runs that compare with them.

A reference is `rule(p, g, state, t, **arguments) -> new p` for one parameter, with Python's numbers.
"""

import math

import torch
from torch import Tensor, nn

import fallline as fl

STEPS = 50
SHAPES = {"scalar": (), "vector": (5,), "matrix": (3, 4), "kernel": (2, 3, 2, 1), "empty": (0, 2)}


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
        updates, state = optimizer.update(grads, state, params, steps=steps)
        params = {name: p + updates[name] for name, p in params.items()}
    return params


def by_reference(rule, arguments, *, steps=STEPS, change=None) -> dict[str, Tensor]:
    """`change(t, arguments)` gives the arguments of step t, for schedules."""
    params, states = start(), {name: {} for name in SHAPES}
    told = Told(params)
    for t in range(1, steps + 1):
        now = change(t, arguments) if change is not None else arguments
        for name, p in params.items():
            g = gradient(name, p, t - 1)
            params[name] = rule(p, g, states[name], t, **now)
            told.see(name, g, params[name])
    told.prove()
    return params


def by_torch(make, *, steps=STEPS, prepare=None, dtype=torch.float64) -> dict[str, Tensor]:
    """`prepare(optimizer, p)` sets the state of a parameter before the first step."""
    params = {name: nn.Parameter(p) for name, p in start(dtype).items()}
    optimizer = make(list(params.values()))
    if prepare is not None:
        for p in params.values():
            prepare(optimizer, p)
    told = Told(start(dtype))
    for step in range(steps):
        for name, p in params.items():
            p.grad = gradient(name, p.detach(), step)
            told.see(name, p.grad, p.detach())
        optimizer.step()
    told.prove()
    return {name: p.detach() for name, p in params.items()}


class Told:
    """Proves that a comparison is not degenerate: every element moved, and gradients are far from zero."""

    def __init__(self, at: dict[str, Tensor]) -> None:
        self.at = {name: p.clone() for name, p in at.items()}
        self.moved = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in at.items()}
        self.sizes: list[float] = []

    def see(self, name: str, g: Tensor, p: Tensor) -> None:
        self.sizes.extend(g.abs().flatten().tolist())
        self.moved[name] |= p != self.at[name]

    def prove(self) -> None:
        assert all(moved.all() for moved in self.moved.values()), "a parameter never moved"
        assert sum(size > 1e-3 for size in self.sizes) > 0.98 * len(self.sizes), "the gradients vanish"


def assert_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor], *, rtol=1e-10, atol=1e-13) -> None:
    assert mine.keys() == theirs.keys() == SHAPES.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(mine[name], expected, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def in_a_row(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in SHAPES])


def assert_trials_equal_each_alone(rule, name="lr", values=(0.001, 0.02, 0.3), *, steps=4, rtol=1e-13) -> None:
    """Under vmap, with one number per trial; and where elements are updated by themselves, in rows of one tensor."""
    trials = [rule.with_numbers({**rule.hyperparameters, name: value}) for value in values]
    assert len({trial.numbers[name] for trial in trials}) == len(values)
    alone = [start(seed=i) for i in range(len(trials))]
    states = [trial.init(p) for trial, p in zip(trials, alone, strict=True)]
    numbers = {n: torch.tensor([t.numbers[n] for t in trials], dtype=torch.float64) for n in rule.numbers}
    together = {key: torch.stack([p[key] for p in alone]) for key in SHAPES}
    state = torch.func.vmap(rule.init)(together, numbers)
    rows = torch.stack([in_a_row(p) for p in alone]) if rule.elementwise else None
    columns = {n: v.unsqueeze(1) for n, v in numbers.items()}
    row_state = rule.init({"all": rows}, columns) if rule.elementwise else None
    for step in range(steps):
        grads = [{key: gradient(key, p[key], step) for key in SHAPES} for p in alone]
        g = {key: torch.stack([one[key] for one in grads]) for key in SHAPES}
        updates, state = torch.func.vmap(rule.update)(g, state, together, numbers)
        together = {key: p + updates[key] for key, p in together.items()}
        if rows is not None:
            flat = {"all": torch.stack([in_a_row(one) for one in grads])}
            moved, row_state = rule.update(flat, row_state, {"all": rows}, columns)
            rows = rows + moved["all"]
        for i, trial in enumerate(trials):
            own, states[i] = trial.update(grads[i], states[i], alone[i])
            alone[i] = {key: p + own[key] for key, p in alone[i].items()}
    for key in SHAPES:
        expected = torch.stack([p[key] for p in alone])
        torch.testing.assert_close(together[key], expected, rtol=rtol, atol=1e-15)
    if rows is not None:
        torch.testing.assert_close(rows, torch.stack([in_a_row(p) for p in alone]), rtol=rtol, atol=1e-15)


def assert_zero_gradients_do_no_harm(rule, *, decays: dict[str, bool] | bool = False, dtype=torch.float64) -> None:
    """No NaN, whatever else is zero; nothing moves but weights that decay."""
    for zero in (False, True):
        params = {name: p * 0 if zero else p for name, p in start(dtype).items()}
        state = rule.init(params)
        for _ in range(3):
            updates, state = rule.update({n: torch.zeros_like(p) for n, p in params.items()}, state, params)
            for name, u in updates.items():
                assert u.dtype == dtype
                assert u.shape == params[name].shape
                assert u.isfinite().all(), name
                decaying = decays[name] if isinstance(decays, dict) else decays
                assert (u != 0).all() if decaying and not zero else (u == 0).all(), name
            params = {name: p + updates[name] for name, p in params.items()}


def first_update_in_float32(rule, g=(1.0, -2.0, 0.5), p=None) -> Tensor:
    params = {"w": torch.zeros(3) if p is None else p}
    updates, _ = rule.update({"w": torch.tensor(g)}, rule.init(params), params)
    return updates["w"]


def adan(p, g, state, t, *, lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0, no_prox=False):
    """Algorithm 1 of Xie et al. 2022 with the bias corrections, betas and first step of the authors' code."""
    beta1, beta2, beta3 = betas
    change = g - state["g"] if t > 1 else torch.zeros_like(g)
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * change
    state["n"] = beta3 * state.get("n", 0) + (1 - beta3) * (g + beta2 * change) ** 2
    state["g"] = g
    eta = lr / (torch.sqrt(state["n"] / (1 - beta3**t)) + eps)
    step = eta * (state["m"] / (1 - beta1**t) + beta2 * state["v"] / (1 - beta2**t))
    if no_prox:
        return p * (1 - lr * weight_decay) - step
    return (p - step) / (1 + lr * weight_decay)


def ademamix(
    p,
    g,
    state,
    t,
    *,
    lr=1e-3,
    betas=(0.9, 0.999, 0.9999),
    alpha=5.0,
    beta3_warmup=None,
    alpha_warmup=None,
    eps=1e-8,
    weight_decay=0.0,
):
    """Algorithm 1 of Pagliardini et al. 2024 with its schedulers f_α and f_β₃."""
    beta1, beta2, beta3 = betas
    if alpha_warmup is not None:
        alpha = min(t * alpha / alpha_warmup, alpha)
    if beta3_warmup is not None:
        ln_start, ln_end = math.log(beta1), math.log(beta3)
        share = t / beta3_warmup
        beta3 = min(math.exp(ln_start * ln_end / ((1 - share) * ln_end + share * ln_start)), beta3)
    state["m1"] = beta1 * state.get("m1", 0) + (1 - beta1) * g
    state["m2"] = beta3 * state.get("m2", 0) + (1 - beta3) * g
    state["nu"] = beta2 * state.get("nu", 0) + (1 - beta2) * g**2
    m1_hat = state["m1"] / (1 - beta1**t)
    nu_hat = state["nu"] / (1 - beta2**t)
    return p - lr * ((m1_hat + alpha * state["m2"]) / (torch.sqrt(nu_hat) + eps) + weight_decay * p)


def lamb(p, g, state, t, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, max_norm=None, exclude_1d=False):
    """Algorithm 2 of You et al. 2020."""
    beta1, beta2 = betas
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * g**2
    r = (state["m"] / (1 - beta1**t)) / (torch.sqrt(state["v"] / (1 - beta2**t)) + eps)
    if exclude_1d and len(p.shape) < 2:
        return p - lr * r
    r = r + weight_decay * p
    length, own = math.sqrt((p**2).sum()), math.sqrt((r**2).sum())
    phi = length if max_norm is None else min(length, max_norm)
    return p - lr * (phi / own if length > 0 and own > 0 else 1) * r


def lars(
    p,
    g,
    state,
    t,
    *,
    lr=0.1,
    momentum=0.9,
    weight_decay=0.0,
    trust_coefficient=1e-3,
    eps=0.0,
    nesterov=False,
    exclude_1d=True,
):
    """Algorithm 1 of You et al. 2017, where the learning rate enters the momentum."""
    if not (exclude_1d and len(p.shape) < 2):
        length, slope = math.sqrt((p**2).sum()), math.sqrt((g**2).sum())
        denominator = slope + weight_decay * length + eps
        local = trust_coefficient * length / denominator if length > 0 and denominator > 0 else 1
        g = local * (g + weight_decay * p)
    state["v"] = momentum * state.get("v", 0) + lr * g
    return p - (lr * g + momentum * state["v"] if nesterov else state["v"])


def mars(
    p,
    g,
    state,
    t,
    *,
    lr=3e-3,
    betas=(0.95, 0.99),
    eps=1e-8,
    weight_decay=0.0,
    amsgrad=False,
    gamma=0.025,
    optimize_1d=False,
    lr_1d=3e-3,
    betas_1d=(0.9, 0.95),
    weight_decay_1d=0.1,
    h=None,
):
    """MARS-AdamW of Yuan et al. 2024 with the arithmetic of the authors' code; h is None in the approximate form."""
    c = g
    if optimize_1d or len(p.shape) >= 2:
        h = state.get("g", torch.zeros_like(g)) if h is None else h
        c = g + gamma * betas[0] / (1 - betas[0]) * (g - h)
        length = math.sqrt((c**2).sum())
        if length > 1:
            c = c / length
        state["clipped"] = length > 1
    else:
        lr, betas, weight_decay = lr_1d, betas_1d, weight_decay_1d
    state["g"] = g
    state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * c
    state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * c**2
    v = state["v"]
    if amsgrad:
        v = state["largest"] = torch.maximum(state.get("largest", torch.zeros_like(v)), v)
    m_hat, v_hat = state["m"] / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return p - lr * (weight_decay * p + m_hat / (torch.sqrt(v_hat) + eps))


def named(rule) -> str:
    return repr(rule).removeprefix("fl.optim.")


def make(name: str, **arguments) -> fl.optim.Optimizer:
    return getattr(fl.optim, name)(**arguments)
