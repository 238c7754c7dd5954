"""mars against a reference with the arithmetic of the authors' code, and in the exact form of the paper's algorithm.

pytorch_optimizer's MARS is neither: it adds 10⁻¹⁵ to the second moment under the root, and eps before that is
corrected for its start. Without eps it differs by those 10⁻¹⁵ only, and is a second witness.
"""

import pytest
import torch
from pytorch_optimizer import MARS

import adaptive_references as references
import fallline as fl
from adaptive_references import (
    SHAPES,
    Told,
    assert_equal,
    assert_trials_equal_each_alone,
    assert_zero_gradients_do_no_harm,
    by_reference,
    by_torch,
    first_update_in_float32,
    make,
    named,
    ours,
    start,
)

CASES = [
    {"lr": 0.01},
    {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.3, "gamma": 0.4, "optimize_1d": True},
    {"lr": 0.01, "amsgrad": True, "lr_1d": 0.02, "betas_1d": (0.7, 0.9), "weight_decay_1d": 0.5},
    {"lr": 0.01, "weight_decay": 0.1, "gamma": 0.0, "weight_decay_1d": 0.0},
]
EVERY = [make("mars", **arguments) for arguments in CASES]


@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_mars_equals_the_arithmetic_of_the_authors_code(arguments):
    assert_equal(ours(make("mars", **arguments)), by_reference(references.mars, arguments))


@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_mars_without_eps_equals_pytorch_optimizer(arguments):
    arguments = {**arguments, "eps": 0.0}
    theirs = {**arguments, "ams_bound": arguments.get("amsgrad", False)}
    theirs.pop("amsgrad", None)
    assert_equal(ours(make("mars", **arguments)), by_torch(lambda params: MARS(params, **theirs)), rtol=1e-8)


def loss_at(step):
    """A loss whose curvature and minimum change from step to step: the old gradient is not the one at the old place."""

    def loss(at):
        total = 0.0
        for name, p in at.items():
            phase = torch.arange(p.numel()).reshape(p.shape)
            away = p - 2 * torch.sin(0.7 * step + phase + len(name))
            total = total + (0.06 * away**2 + 0.015 * (1 + step % 3) * away**4 / 10).sum()
        return total

    return loss


def slopes(sign, loss, at):
    leaves = {name: p.clone().requires_grad_() for name, p in at.items()}
    (sign * loss(leaves)).backward()
    return {name: p.grad for name, p in leaves.items()}


def exactly(rule, *, steps=50):
    """Ours, with the landscape of each step's loss."""
    params = start()
    state = rule.init(params)
    for step in range(steps):
        around = fl.optim.Landscape.of(loss_at(step), params)
        updates, state = rule.update(around.gradient(params), state, params, landscape=around)
        params = {name: p + updates[name] for name, p in params.items()}
    return params


def by_the_papers_exact_form(arguments, *, sign=1.0, steps=50):
    """h: the gradient of this step's loss at the parameters of the step before; of those of this step at first."""
    params, states = start(), {name: {} for name in SHAPES}
    before, told, clipped = params, Told(params), []
    for t in range(1, steps + 1):
        now, old = (slopes(sign, loss_at(t - 1), at) for at in (params, before))
        before, new = params, {}
        for name, p in params.items():
            new[name] = references.mars(p, now[name], states[name], t, h=old[name], **arguments)
            told.see(name, now[name], new[name])
            clipped.append(states[name].get("clipped", False))
        params = new
    told.prove()
    return params, clipped


@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_mars_in_its_exact_form_equals_the_papers_algorithm(arguments):
    theirs, clipped = by_the_papers_exact_form(arguments)
    assert 0 < sum(clipped) < len(clipped), "both short and long c appear"
    mine = exactly(make("mars", approximate=False, **arguments))
    assert_equal(mine, theirs)
    if arguments.get("gamma") != 0.0:
        assert not torch.allclose(mine["matrix"], exactly(make("mars", **arguments))["matrix"], rtol=1e-6)


@pytest.mark.parametrize("approximate", [True, False], ids=["approximate", "exact"])
def test_mars_uphill_on_a_loss_is_mars_downhill_on_its_negative(approximate):
    arguments = {"lr": 0.01, "gamma": 0.2, "weight_decay": 0.1}
    up = exactly(make("mars", approximate=approximate, maximize=True, **arguments), steps=6)
    if approximate:
        down = make("mars", **arguments)
        params, state = start(), down.init(start())
        for step in range(6):
            grads = fl.optim.Landscape.of(loss_at(step), params).gradient(params)
            updates, state = down.update({name: -g for name, g in grads.items()}, state, params)
            params = {name: p + updates[name] for name, p in params.items()}
    else:
        params, _ = by_the_papers_exact_form(arguments, sign=-1.0, steps=6)
    assert_equal(up, params)


def test_both_forms_agree_where_the_batch_is_always_the_same_but_for_the_first_step():
    """h is then the gradient of the step before in both; at the first step it is 0 in one, g in the other."""
    same = lambda at: sum((0.005 * (p - 1) ** 2).sum() for p in at.values())  # noqa: E731
    found = {}
    for approximate in (True, False):
        rule = make("mars", approximate=approximate, optimize_1d=True, gamma=0.5)
        params, steps = start(), []
        state = rule.init(params)
        for _ in range(3):
            around = fl.optim.Landscape.of(same, params)
            _, state = rule.update(around.gradient(params), state, params, landscape=around)
            steps.append(state["slots"]["matrix"]["exp_avg"])
            params = {name: p * 0.9 for name, p in params.items()}
        found[approximate] = steps
    first, mean = (found[approximate][0] for approximate in (True, False))
    torch.testing.assert_close(first, mean * (1 + 0.5 * 0.95 / 0.05))
    for t in (1, 2):
        entered = [found[a][t] - 0.95 * found[a][t - 1] for a in (True, False)]
        torch.testing.assert_close(*entered, rtol=1e-10, atol=1e-15)


def test_what_enters_the_means_is_no_longer_than_1():
    rule = make("mars", gamma=0.0)
    p = {"w": torch.zeros(2, 2, dtype=torch.float64)}
    for size, length in ((10.0, 1.0), (0.1, 0.2)):
        g = {"w": torch.full((2, 2), size, dtype=torch.float64)}
        _, state = rule.update(g, rule.init(p), p)
        assert state["slots"]["w"]["exp_avg"].norm().item() == pytest.approx(0.05 * length, rel=1e-12)


def test_parameters_of_few_dimensions_are_adamws_unless_told_otherwise():
    arguments = {"lr": 0.004, "betas": (0.8, 0.9), "weight_decay": 0.2}
    mine = ours(make("mars", lr_1d=0.004, betas_1d=(0.8, 0.9), weight_decay_1d=0.2))
    theirs = ours(fl.optim.adamw(**arguments))
    for name in ("scalar", "vector"):
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-14, atol=0)
    assert not torch.allclose(mine["matrix"], theirs["matrix"])
    assert "last_grad" not in make("mars").init(start())["slots"]["vector"]
    assert "last_grad" in make("mars").init(start())["slots"]["kernel"]


def test_the_first_bias_correction_is_computed_in_float64_for_float32_parameters():
    rule = make("mars", lr=1.0, betas=(0.9, 1 - 1e-7), eps=0.0, optimize_1d=True)
    found = first_update_in_float32(rule, g=(0.1, -0.2, 0.5))
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, -1.0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", EVERY, ids=named)
def test_in_float32_only_round_off_differs(rule):
    truth = ours(rule)
    for name, p in ours(rule, dtype=torch.float32).items():
        torch.testing.assert_close(p.double(), truth[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", EVERY, ids=named)
def test_trials_updated_together_equal_each_alone(rule):
    assert_trials_equal_each_alone(rule)


@pytest.mark.parametrize(
    ("name", "values"),
    [("gamma", (0.0, 0.1, 1.0)), ("lr_1d", (0.0, 0.01, 0.1)), ("beta1", (0.0, 0.5, 0.99)), ("betas_1d1", (0.0, 0.9))],
    ids=str,
)
def test_its_own_numbers_may_differ_between_trials(name, values):
    assert_trials_equal_each_alone(make("mars"), name, values)


def test_trials_of_the_exact_form_updated_together_equal_each_alone():
    rules = [make("mars", approximate=False, gamma=gamma) for gamma in (0.0, 0.1, 1.0)]
    numbers = {n: torch.tensor([r.numbers[n] for r in rules], dtype=torch.float64) for n in rules[0].numbers}
    alone = [start(seed=i) for i in range(3)]
    together = {name: torch.stack([p[name] for p in alone]) for name in SHAPES}
    state = torch.func.vmap(rules[0].init)(together, numbers)
    states = [rule.init(p) for rule, p in zip(rules, alone, strict=True)]

    def one(params, state, numbers, rule, step):
        around = fl.optim.Landscape.of(loss_at(step), params)
        return rule.update(around.gradient(params), state, params, numbers, landscape=around, step=step)

    for step in range(4):
        updates, state = torch.func.vmap(lambda p, s, n, step=step: one(p, s, n, rules[0], step))(
            together, state, numbers
        )
        together = {name: p + updates[name] for name, p in together.items()}
        for i, rule in enumerate(rules):
            own, states[i] = one(alone[i], states[i], None, rule, step)
            alone[i] = {name: p + own[name] for name, p in alone[i].items()}
    for name in SHAPES:
        expected = torch.stack([p[name] for p in alone])
        torch.testing.assert_close(together[name], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", EVERY, ids=named)
def test_zero_gradients_move_nothing_but_decaying_weights(rule, dtype):
    own = {name: rule.arguments["optimize_1d"] or len(shape) >= 2 for name, shape in SHAPES.items()}
    decays = {
        name: rule.arguments["weight_decay" if reduced else "weight_decay_1d"] > 0 for name, reduced in own.items()
    }
    assert_zero_gradients_do_no_harm(rule, decays=decays, dtype=dtype)


def test_the_exact_form_asks_for_the_landscape():
    rule, params = make("mars", approximate=False), start()
    with pytest.raises(fl.errors.FalllineError, match="looks at the loss around"):
        rule.update(params, rule.init(params), params)
    assert not make("mars").surveys(0)


def test_betas_1d_that_are_no_pair_are_refused():
    with pytest.raises(TypeError, match=r"betas_1d = 0\.9 is not a pair"):
        make("mars", betas_1d=0.9)
