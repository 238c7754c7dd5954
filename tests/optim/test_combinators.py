"""Optimizers around optimizers, against their references: cautious, lookahead, accumulate, skip_not_finite."""

import copy
import json
import pickle

import numpy as np
import pytest
import pytorch_optimizer
import torch
from torch import nn

import fallline as fl
from fallline.errors import InvalidHyperparameter, Unsupported
from fallline.optim.around import around, combinator
from fallline.optim.serial import from_data, to_data
from fallline.sweeps import search
from fallline.sweeps.programs import Programs
from fallline.sweeps.vectorised import Population

o = fl.optim
F64 = torch.float64
SHAPES = {"matrix": (3, 4), "vector": (5,), "scalar": (), "empty": (0, 2), "tensor": (2, 1, 3)}
STEPS = 50


def start():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=F64) + 1 for name, shape in SHAPES.items()}


def gradient(p, step):
    """Of a bowl whose centre wanders faster than momentum follows, so that directions often disagree with it."""
    return p - 2 * torch.sin(0.9 * step + torch.arange(p.numel(), dtype=F64).reshape(p.shape))


def ours(rule, steps=STEPS, params=None):
    params = start() if params is None else params
    state = rule.init(params, steps=steps)
    for step in range(steps):
        grads = {name: gradient(p, step) for name, p in params.items()}
        updates, state = rule.update(grads, state, params, steps=steps)
        params = {name: p + updates[name] for name, p in params.items()}
    return params, state


def theirs(make, steps=STEPS):
    params = {name: nn.Parameter(p) for name, p in start().items() if p.numel()}
    optimizer = make(list(params.values()))
    for step in range(steps):
        for p in params.values():
            p.grad = gradient(p.detach(), step)
        optimizer.step()
    assert all((p.detach() != start()[name]).all() for name, p in params.items())
    return {name: p.detach() for name, p in params.items()}


def assert_equal(found, expected, rtol=1e-10):
    for name, p in expected.items():
        torch.testing.assert_close(found[name], p, rtol=rtol, atol=1e-13)


class CautiousReference(torch.optim.Optimizer):
    """The authors' C-AdamW and C-Lion, line by line, with torch's decoupled weight decay. Counts what was masked."""

    def __init__(self, params, lr, betas, weight_decay, eps=None, maximize=False):
        super().__init__(params, {})
        self.lr, self.betas, self.weight_decay, self.eps, self.maximize = lr, betas, weight_decay, eps, maximize
        self.masked = 0

    @torch.no_grad()
    def step(self):
        (b1, b2), lr = self.betas, self.lr
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
            g = -p.grad if self.maximize else p.grad
            state["t"] += 1
            p.mul_(1 - lr * self.weight_decay)
            if self.eps is None:
                update = torch.sign(b1 * state["m"] + (1 - b1) * g)
                state["m"] = b2 * state["m"] + (1 - b2) * g
            else:
                state["m"] = b1 * state["m"] + (1 - b1) * g
                state["v"] = b2 * state["v"] + (1 - b2) * g * g
                update = state["m"] / (1 - b1 ** state["t"])
                update = update / ((state["v"] / (1 - b2 ** state["t"])).sqrt() + self.eps)
            mask = (update * g > 0).to(g.dtype)
            self.masked += int((mask == 0).sum())
            mask = mask / mask.mean().clamp_(min=1e-3)
            p.add_(update * mask, alpha=-lr)


def cautious_reference(**arguments):
    made = []

    def make(params):
        made.append(CautiousReference(params, **arguments))
        return made[0]

    found = theirs(make)
    assert made[0].masked > 100, "the mask has to matter"
    return found


@pytest.mark.parametrize("maximize", [False, True])
def test_cautious_adamw_and_lion_are_the_papers(maximize):
    lr = 1e-3 if maximize else 0.05
    adamw = o.cautious(o.adamw(lr=lr, betas=(0.8, 0.95), weight_decay=0.1, maximize=maximize))
    reference = cautious_reference(lr=lr, betas=(0.8, 0.95), weight_decay=0.1, eps=1e-8, maximize=maximize)
    assert_equal(ours(adamw)[0], reference)
    lion = o.cautious(o.lion(lr=lr, betas=(0.8, 0.9), weight_decay=0.1, maximize=maximize))
    reference = cautious_reference(lr=lr, betas=(0.8, 0.9), weight_decay=0.1, maximize=maximize)
    assert_equal(ours(lion)[0], reference)


def test_the_peers_mask_differs_by_its_scale_alone():
    """pytorch_optimizer multiplies with n/(sum of m + 1), the authors' code with n/sum of m."""
    g, m = start()["matrix"], torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    rule = o.cautious(o.lion(lr=1.0, betas=(0.5, 0.9)))
    p = {"w": torch.zeros_like(g)}
    state = rule.init(p)
    state["slots"]["w"]["exp_avg"] = m
    found = rule.update({"w": g}, state, p)[0]["w"]
    expected = (0.5 * m + 0.5 * g).sign()
    agree = int((expected * g > 0).sum())
    assert 0 < agree < 12
    pytorch_optimizer.base.optimizer.BaseOptimizer.apply_cautious(expected, g)
    torch.testing.assert_close(-found * agree / (agree + 1), expected)


@o.described
def adam_with_its_rate_inside(lr: float = 0.05) -> o.Optimizer:
    """Adam as one transform, whose output is a step."""
    inner = o.scale_by_adam((0.8, 0.95))

    def apply(parts, updates, slots, params, n, moment):
        found, after = parts[0].apply(updates, slots, params, n, moment)
        return {name: -lr * u for name, u in found.items()}, after

    return o.chain(around("steps", [inner], apply))


def test_a_mask_is_the_same_before_and_behind_the_learning_rate():
    expected = ours(o.cautious(o.adam(lr=0.05, betas=(0.8, 0.95))))[0]
    for steps in (adam_with_its_rate_inside(), o.lookahead(o.adam(lr=0.05, betas=(0.8, 0.95)), k=1000)):
        assert_equal(ours(o.cautious(steps))[0], expected)
    # Uphill, a step goes along the gradient; a rate that warms up from 0 says nothing at the first step.
    up = o.adam(lr=0.001, betas=(0.8, 0.95), maximize=True)
    assert_equal(ours(o.cautious(o.lookahead(up, k=1000)))[0], ours(o.cautious(up))[0])
    warm = o.adam(lr=fl.schedules.linear_warmup(0.05, fraction=0.5), betas=(0.8, 0.95))
    assert_equal(ours(o.cautious(o.lookahead(warm, k=1000)))[0], ours(o.cautious(warm))[0])


def test_a_cautious_mask_of_zero_gradients_is_no_nan():
    p = {"w": torch.ones(3)}
    rule = o.cautious(o.adam())
    updates, _ = rule.update({"w": torch.zeros(3)}, rule.init(p), p)
    assert torch.equal(updates["w"], torch.zeros(3))


def test_cautious_does_not_lose_agreement_to_underflow():
    p = {"w": torch.zeros(2)}
    rule = o.cautious(o.sgd(lr=1.0))
    updates, _ = rule.update({"w": torch.full((2,), 1e-30)}, rule.init(p), p)
    assert (updates["w"] < 0).all()


def test_the_mean_of_parameters_stays_outside_of_the_mask():
    rule = o.cautious(o.chain(o.adam(lr=0.05), o.ema_of_parameters(0.0)))
    params, state = ours(rule)
    assert_equal(rule.evaluation_parameters(state, params), params)


@pytest.mark.parametrize(("k", "alpha"), [(5, 0.5), (3, 0.8), (1, 0.3), (7, 0.95)])
def test_lookahead_equals_the_reference(k, alpha):
    reference = theirs(
        lambda ps: pytorch_optimizer.Lookahead(torch.optim.Adam(ps, lr=0.05), k=k, alpha=alpha), steps=53
    )
    params, _ = ours(o.lookahead(o.adam(lr=0.05), k=k, alpha=alpha), steps=53)
    assert_equal(params, reference)
    assert (params["vector"] - ours(o.adam(lr=0.05), steps=53)[0]["vector"]).abs().max() > 1e-4


def test_lookahead_that_follows_all_the_way_is_the_optimizer_inside():
    assert_equal(ours(o.lookahead(o.adam(lr=0.05), alpha=1.0))[0], ours(o.adam(lr=0.05))[0])


def test_lookahead_trains_and_evaluates_the_fast_weights():
    rule = o.lookahead(o.sgd(lr=0.1), k=5)
    assert not rule.moves_evaluation
    params, state = ours(rule, steps=5)
    for name, p in params.items():
        torch.testing.assert_close(state["slots"][name]["slow"], p, rtol=0, atol=1e-15)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def data(count=96):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 8, generator=generator, dtype=F64)
    return x, (x.sum(1) > 0).long()


def task(**arguments):
    return fl.Task("test", mlp, data(), "cross_entropy", batch_size=16, **arguments)


def test_a_sweep_of_k_and_alpha_is_one_family_and_equals_one_by_one():
    template = o.lookahead(o.adam(lr=0.05), k=fl.grid([2, 5]), alpha=fl.grid([0.2, 0.9]))
    together = fl.sweep(task(), [template], seeds=1, steps=30)
    assert len({c.optimizer.structure for c in configurations(template)}) == 1
    for i, (k, alpha) in enumerate([(2, 0.2), (2, 0.9), (5, 0.2), (5, 0.9)]):
        alone = fl.sweep(task(), [o.lookahead(o.adam(lr=0.05), k=k, alpha=alpha)], seeds=1, steps=30)
        np.testing.assert_allclose(together.history.train_loss[i], alone.history.train_loss[0], rtol=1e-10)
    assert len(np.unique(together.history.train_loss[:, -1])) == 4


def configurations(template):
    return search.configurations([template], [task().loss], samples=1, search_seed=0)


INNER = {
    "adamw": (lambda lr: o.adamw(lr=lr), lambda ps, lr: torch.optim.AdamW(ps, lr=lr)),
    "sgd": (lambda lr: o.sgd(lr=lr, momentum=0.9), lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9)),
}


def trained_small(rule, every, steps, batch=8):
    """`every` times as many steps with mini-batches of one part of the large ones."""
    model, (x, y) = mlp(), data()
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    state, path = rule.init(params, steps=steps * every), []
    for step in range(steps * every):
        rows = [(step * batch + i) % len(x) for i in range(batch)]
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        loss = nn.functional.cross_entropy(torch.func.functional_call(model, leaves, (x[rows],)), y[rows])
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        updates, new = rule.update(grads, state, params, steps=steps * every)
        path.append((updates, state, new))
        state = new
        params = {name: p + updates[name] for name, p in params.items()}
    return params, path


def trained_large(make, every, steps, scheduled=False, batch=8):
    model, (x, y) = mlp(), data()
    optimizer = make(list(model.parameters()))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps) if scheduled else None
    for step in range(steps):
        rows = [(step * batch * every + i) % len(x) for i in range(batch * every)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "cosine"])
def test_small_batches_accumulated_equal_large_ones(name, every, scheduled):
    mine, torchs = INNER[name]
    lr = fl.schedules.cosine(0.05) if scheduled else 0.05
    params, path = trained_small(o.accumulate(mine(lr), every), every, steps=20)
    expected = trained_large(lambda ps: torchs(ps, 0.05), every, 20, scheduled)
    assert_equal(params, expected)
    assert min((expected[n] - p).abs().max() for n, p in mlp().named_parameters()) > 1e-2
    for step, (updates, before, after) in enumerate(path):
        if (step + 1) % every:
            assert all((u == 0).all() for u in updates.values())
            changed = {s for s, t in after["slots"]["0.weight"].items() if not same(t, before["slots"]["0.weight"][s])}
            assert changed <= {"mean_gradient", *(f"begun_with_{n}" for n in mine(lr).hyperparameters)}


def same(a, b):
    return torch.equal(a, b)


def test_accumulate_in_a_sweep_and_in_fit_is_the_plain_rule():
    rule = o.accumulate(o.adam(lr=fl.schedules.cosine(0.05)), every=3)
    runs = [fl.sweep(task(), [rule], seeds=2, steps=31, engine=e) for e in ("vectorised", "sequential")]
    np.testing.assert_allclose(*(run.history.train_loss for run in runs), rtol=1e-9)
    fitted = fl.fit(task(), rule, seed=1, steps=31)
    np.testing.assert_allclose(fitted.history.train_loss, runs[0].history.train_loss[1], rtol=1e-9)


@combinator
def every_other(optimizer: o.Optimizer, rest: int = 0) -> o.Transform:
    """Twice the update at every second step, by a static phase."""

    def apply(parts, updates, slots, params, n, moment):
        found, after = parts[0].apply(updates, slots, params, n, moment)
        return ({k: 2 * u for k, u in found.items()} if moment.phase else found), after

    return around("every_other", [optimizer], apply, phase=lambda step: step % 2 == rest)


def test_phases_of_optimizers_inside_are_counted_in_their_own_updates():
    """Four steps of accumulate(every=2) are two of what is inside: its second update is the doubled one."""
    rule = o.accumulate(every_other(o.sgd(lr=1.0), rest=1), every=2)
    p = {"w": torch.zeros(1, dtype=F64)}
    state, moved = rule.init(p), []
    for _ in range(8):
        updates, state = rule.update({"w": torch.ones(1, dtype=F64)}, state, p)
        moved.append(-float(updates["w"]))
    assert moved == [0, 1, 0, 2, 0, 1, 0, 2]


def test_phases_within_phases_each_get_their_own():
    p = {"w": torch.zeros(1, dtype=F64)}
    for rule, expected in [
        (every_other(every_other(o.sgd(lr=1.0), rest=1), rest=0), [2, 2, 2, 2]),
        (every_other(every_other(o.sgd(lr=1.0), rest=1), rest=1), [1, 4, 1, 4]),
        (every_other(o.lookahead(every_other(o.sgd(lr=1.0)), k=100)), [4, 1, 4, 1]),
        (o.partition(o.by_shape(), {"vectors": every_other(o.sgd(lr=1.0), rest=1)}), [1, 2, 1, 2]),
        (o.accumulate(o.accumulate(o.sgd(lr=1.0), 2), 2), [0, 0, 0, 1]),
    ]:
        state, moved = rule.init(p), []
        for _ in range(4):
            updates, state = rule.update({"w": torch.ones(1, dtype=F64)}, state, p)
            moved.append(-float(updates["w"]))
        assert moved == expected, rule


def looking(steps=lambda step: True):
    return o.Transform("looks", {}, lambda u, s, p, n, m: (u, {}), surveys=steps)


def test_accumulate_refuses_what_looks_around():
    for inner in (looking(), o.cautious(o.chain(looking(), o.sgd())), o.lookahead(o.chain(looking(), o.sgd()))):
        with pytest.raises(Unsupported, match=r"looks at the loss around the parameters.*use larger mini-batches"):
            o.accumulate(inner, every=2)
    with pytest.raises(Unsupported, match="sam"):
        o.accumulate(o.sam(o.sgd()), every=2)


def test_a_landscape_reaches_what_looks_around_inside():
    seen = []

    def apply(updates, slots, params, numbers, moment):
        seen.append(moment.landscape is not None)
        return updates, {}

    inner = o.Transform("looks", {}, apply, surveys=lambda step: step % 2 == 1)
    rule, p = o.lookahead(o.lookahead(o.chain(inner, o.sgd()))), {"w": torch.ones(1)}
    state = rule.init(p)
    around_here = o.Landscape.of(lambda at: at["w"].sum(), p)
    for step in range(4):
        assert rule.surveys(step) == (step % 2 == 1)
        _, state = rule.update(p, state, p, landscape=around_here)
    assert seen == [False, True, False, True]


def test_steps_with_gradients_that_are_not_finite_are_skipped_and_counted():
    rule, plain = o.skip_not_finite(o.adam(lr=0.1)), o.adam(lr=0.1)
    p = {"w": torch.ones(2, dtype=F64), "v": torch.ones(3, dtype=F64)}
    q, state, expected = dict(p), rule.init(p), plain.init(p)
    for step in range(12):
        g = {"w": gradient(p["w"], step), "v": gradient(p["v"], step)}
        if step in (0, 4, 5):
            g["w"] = torch.tensor([1.0, [torch.nan, torch.inf, -torch.inf][step % 3]], dtype=F64)
            before = copy.deepcopy(state["slots"])
            updates, state = rule.update(g, state, p)
            assert all((u == 0).all() for u in updates.values())
            for name, slots in before.items():
                for slot, tensor in slots.items():
                    assert slot == "skipped" or torch.equal(state["slots"][name][slot], tensor), slot
            continue
        updates, state = rule.update(g, state, p)
        p = {name: t + updates[name] for name, t in p.items()}
        updates, expected = plain.update(g, expected, q)
        q = {name: t + updates[name] for name, t in q.items()}
    assert all(torch.equal(p[name], q[name]) for name in p)
    assert {float(slots["skipped"]) for slots in state["slots"].values()} == {3.0}
    assert rule.together


def test_a_sweep_skips_in_one_trial_alone():
    """One trial's loss has an infinite gradient at its first step; the others go on as without it."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1, dtype=F64))

        def forward(self, x):
            return (x - x.detach()).sum() + self.w.sqrt() * x

    x = torch.linspace(0.5, 1.5, 32, dtype=F64).reshape(-1, 1)
    rule = o.skip_not_finite(o.sgd(lr=fl.grid([0.1, 0.2])))
    runs = [fl.sweep(fl.Task("root", Root, (x, 2 * x), "mse", batch_size=8), [r], seeds=1, steps=10) for r in
            (rule, o.sgd(lr=fl.grid([0.1, 0.2])))]  # fmt: skip
    np.testing.assert_allclose(*(run.history.train_loss for run in runs), rtol=1e-12)


ALL = [
    o.cautious(o.adamw(lr=0.05)),
    o.cautious(o.lookahead(o.sgd(lr=0.05, momentum=0.9), k=3)),
    o.lookahead(o.cautious(o.lion(lr=0.01)), k=3, alpha=0.7),
    o.lookahead(o.adam(lr=fl.schedules.cosine(0.05))),
    o.accumulate(o.chain(o.clip_by_global_norm(0.5), o.adam(lr=0.05)), every=2),
    o.accumulate(o.adam(lr=fl.schedules.cosine(0.05)), every=2),
    o.accumulate(o.chain(o.adam(lr=0.05), o.ema_of_parameters(0.5)), every=3),
    o.skip_not_finite(o.adamw(lr=0.05)),
    o.accumulate(o.skip_not_finite(o.lookahead(o.sgd(lr=0.1, momentum=0.9))), every=2),
]


@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_engines_and_traced_programs_agree(rule):
    runs = [fl.sweep(task(), [rule], seeds=2, steps=20, engine=e) for e in ("vectorised", "sequential")]
    for name in ("train_loss", "metric", "validation_loss"):
        np.testing.assert_allclose(*(getattr(run.history, name) for run in runs), rtol=1e-8)
    chosen = search.trials(configurations(rule), [0, 1])
    losses = []
    for programs in (None, Programs()):
        population = Population(task(), chosen, steps=20, device=torch.device("cpu"), programs=programs)
        losses.append(population.train_steps(20))
        assert programs is None or programs.all_traced
    np.testing.assert_allclose(*losses, rtol=1e-9)


@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_values_travel_and_take_other_numbers(rule):
    assert eval(repr(rule), {"fl": fl}) == pickle.loads(pickle.dumps(rule)) == rule
    assert from_data(json.loads(json.dumps(to_data(rule)))) == rule
    changed = rule.with_numbers({**rule.hyperparameters, "lr": 0.123})
    assert changed.numbers["lr"] == 0.123
    if "lr" in rule.numbers:
        assert changed.structure == rule.structure
        assert {n: v for n, v in changed.numbers.items() if n != "lr"} == {
            n: v for n, v in rule.numbers.items() if n != "lr"
        }


@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_nothing_that_is_given_is_changed_and_a_restored_state_goes_on_bit_for_bit(rule):
    params, state = start(), rule.init(start(), steps=9)
    for step in range(9):
        grads = {name: gradient(p, step) for name, p in params.items()}
        given = copy.deepcopy((grads, state, params))
        updates, new = rule.update(grads, state, params, steps=9)
        again, anew = rule.update(*given, steps=9)
        for name, p in params.items():
            assert torch.equal(given[2][name], p)
            assert torch.equal(given[0][name], grads[name])
            assert torch.equal(updates[name], again[name])
            for slot, tensor in state["slots"][name].items():
                assert torch.equal(given[1]["slots"][name][slot], tensor)
                assert torch.equal(new["slots"][name][slot], anew["slots"][name][slot])
        params, state = {name: p + updates[name] for name, p in params.items()}, new


@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_as_torch_is_the_same_rule(rule):
    model, (x, y) = mlp(), data()
    params, _ = trained_small(rule, 1, 12)
    optimizer = rule.as_torch(model.named_parameters(), steps=12)
    for step in range(12):
        rows = [(step * 8 + i) % len(x) for i in range(8)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    assert_equal({n: p.detach() for n, p in model.named_parameters()}, params, rtol=1e-8)


def test_a_scheduler_of_torch_moves_the_rate_inside():
    p = nn.Parameter(torch.zeros(1, dtype=F64))
    optimizer = o.lookahead(o.sgd(lr=1.0), k=10).as_torch([p])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(3):
        p.grad = torch.ones(1, dtype=F64)
        optimizer.step()
        scheduler.step()
    assert p.item() == -1.75


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: o.lookahead(o.sgd(), k=0), r"k = 0 is outside \[1, inf\]"),
        (lambda: o.lookahead(o.sgd(), k=2.5), r"k = 2\.5 is not a whole number"),
        (lambda: o.lookahead(o.sgd(), k=fl.schedules.cosine(5.0)), "is a schedule: give one number"),
        (lambda: o.lookahead(o.sgd(), alpha=1.5), r"alpha = 1\.5 is outside \[0, 1\]"),
        (lambda: o.lookahead(o.sgd(), alpha=-0.5), r"alpha = -0\.5 is outside"),
        (lambda: o.accumulate(o.sgd(), every=0), "every = 0 is below 1"),
        (lambda: o.accumulate(o.sgd(), every=1.5), r"every = 1\.5 is not a whole number"),
        (lambda: o.cautious(0.1), r"cautious\(\) takes an optimizer, not 0\.1"),
        (lambda: o.lookahead("adam"), r"lookahead\(\) takes an optimizer, not 'adam'"),
        (lambda: o.skip_not_finite(None), r"takes an optimizer, not None"),
        (lambda: o.skip_not_finite(o.accumulate(o.sgd(), every=2)), r"write accumulate\(skip_not_finite"),
        (lambda: o.skip_not_finite(o.sam(o.sgd())), r"looks at a second gradient"),
        (lambda: o.lookahead(o.schedule_free_sgd()), r"finds its average"),
        (lambda: o.cautious(o.schedule_free_adamw()), r"finds its average"),
        (lambda: o.sam(5), r"sam\(\) takes an optimizer, not 5"),
    ],
)
def test_a_mistake_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_wrong_number_inside_is_named_as_without_the_combinator():
    with pytest.raises(InvalidHyperparameter, match=r"lr = -1 is negative"):
        o.lookahead(o.cautious(o.adam(lr=fl.grid([0.1, -1]))))


def test_accumulate_does_not_apply_a_gradient_twice():
    rule, p = o.accumulate(o.sgd(lr=1.0), every=2), {"w": torch.zeros(1), "v": torch.zeros(1)}
    state, one = rule.init(p), torch.ones(1)
    for v in (one, one, None, one):
        updates, state = rule.update({"w": one, "v": v}, state, p)
        p = {name: tensor + updates.get(name, 0) for name, tensor in p.items()}
    assert p["w"].item() == -2.0
    assert p["v"].item() == -1.5


def test_cautious_finds_the_direction_of_what_waits_for_long():
    rule, p = o.cautious(o.accumulate(o.sgd(lr=1.0), every=9)), {"w": torch.zeros(1)}
    state = rule.init(p)
    for _ in range(9):
        updates, state = rule.update({"w": torch.ones(1)}, state, p)
    assert updates["w"].item() == -1.0


def test_names_stay_apart_three_deep():
    inner = o.partition(o.by_shape(), {"matrices": o.sgd(lr=0.1), "vectors": o.sgd(lr=0.01)})
    rule = o.partition(o.by_name({"head": "head*"}, otherwise="body"), {"head": o.sgd(lr=1.0), "body": inner})
    assert rule.hyperparameters == {"lr": 1.0, "lr_2": 0.1, "lr_3": 0.01}
    p = {"head.w": torch.zeros(1), "body.w": torch.zeros(1, 1), "body.b": torch.zeros(1)}
    updates, _ = rule.update({name: torch.ones_like(t) for name, t in p.items()}, rule.init(p), p)
    assert [float(u) for u in updates.values()] == pytest.approx([-1.0, -0.1, -0.01])
    again = rule.with_numbers({"lr": 2.0, "lr_2": 0.2, "lr_3": 0.02})
    assert again.hyperparameters == {"lr": 2.0, "lr_2": 0.2, "lr_3": 0.02}

    flat = [o.trace(0.9), o.trace(0.5), o.trace(0.8), o.scale_by_learning_rate(1.0)]
    nested = o.chain(flat[0], o.lookahead(o.chain(*flat[1:]), k=1000))
    found = []
    for each in (o.chain(*flat), nested):
        p = {"w": torch.zeros(1, dtype=F64)}
        state = each.init(p)
        for _ in range(5):
            updates, state = each.update({"w": torch.ones(1, dtype=F64)}, state, p)
            p = {"w": p["w"] + updates["w"]}
        found.append(p["w"].item())
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_two_sources_of_noise_in_one_chain_differ():
    rule = o.chain(o.add_noise(1.0), o.add_noise(1.0))
    p = {"w": torch.zeros(20_000, dtype=F64)}
    updates, _ = rule.update(p, rule.init(p), p)
    alone = o.chain(o.add_noise(1.0))
    one, _ = alone.update(p, alone.init(p), p)
    assert updates["w"].var().item() == pytest.approx(2 * one["w"].var().item(), rel=0.05)
