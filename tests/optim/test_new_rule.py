"""A new optimizer in six lines: what `@rule` makes equals the named optimizers, and mistakes are found at once."""

import inspect
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import fallline as fl
from fallline.errors import InvalidHyperparameter, UnknownArgument
from fallline.optim.new_rule import InvalidRule
from fallline.optim.serial import from_data, to_data
from plain_loop import Lion

F64 = torch.float64
SHAPES = {"matrix": (3, 4), "vector": (5,), "scalar": (), "empty": (0, 2), "tensor": (2, 1, 3)}


@fl.optim.rule(elementwise=True)
def my_adam(g, p, m, v, step, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
    "Adam, written by a user."
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    direction = m / (1 - betas[0] ** step) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
    return -lr * direction, m, v


@fl.optim.rule(elementwise=True)
def my_sgd(g, p, buffer, *, lr=1e-3, momentum=0.0, nesterov=False, weight_decay=0.0):
    g = g + weight_decay * p
    buffer = momentum * buffer + g
    return -lr * (g + momentum * buffer if nesterov else buffer), buffer


@fl.optim.rule(elementwise=True)
def my_lion(g, p, m, *, lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.0):
    u = (beta1 * m + (1 - beta1) * g).sign() + weight_decay * p
    return -lr * u, beta2 * m + (1 - beta2) * g


@fl.optim.rule
def normalised(g, p, *, lr=0.1, eps=1e-8, power=1):
    "Gradient descent with steps of one length."
    return -lr * (g / (g.norm() + eps)) ** power


@fl.optim.rule(domains={"share": (0.0, 0.5), "base": (1.0, None)})
def bounded(g, p, *, lr=0.1, share=0.25, base=2.0):
    return -lr * share * g * base


PAIRS = [
    (my_adam(lr=0.01), lambda ps: torch.optim.Adam(ps, lr=0.01)),
    (my_adam(lr=0.02, betas=(0.8, 0.95), eps=1e-4), lambda ps: torch.optim.Adam(ps, 0.02, (0.8, 0.95), 1e-4)),
    (my_sgd(lr=0.02, momentum=0.9), lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.9)),
    (
        my_sgd(lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    (my_lion(lr=1e-3, weight_decay=0.1), lambda ps: Lion(ps, lr=1e-3, weight_decay=0.1)),
]


def start():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=F64) + 1 for name, shape in SHAPES.items()}


def gradient(p, step):
    """Of a bowl whose centre wanders."""
    return p - 2 * torch.sin(0.7 * step + torch.arange(p.numel(), dtype=F64).reshape(p.shape))


@pytest.mark.parametrize(("mine", "make"), PAIRS, ids=lambda value: repr(value) if hasattr(value, "call") else "torch")
def test_a_rule_of_a_few_lines_equals_torch(mine, make):
    params, state = start(), None
    theirs = {name: nn.Parameter(p.clone()) for name, p in params.items()}
    optimizer = make(list(theirs.values()))
    state = mine.init(params)
    for step in range(50):
        grads = {name: gradient(p, step) for name, p in params.items()}
        assert torch.cat([g.flatten() for g in grads.values()]).abs().min() > 1e-6
        updates, state = mine.update(grads, state, params)
        params = {name: p + updates[name] for name, p in params.items()}
        for p in theirs.values():
            p.grad = gradient(p.detach(), step)
        optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close(p, theirs[name].detach(), rtol=1e-10, atol=1e-13)
        assert p.numel() == 0 or (p != start()[name]).all()


def mlp():
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def task():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 8, generator=generator, dtype=F64)
    return fl.Task("test", mlp, (x, (x.sum(1) > 0).long()), "cross_entropy", batch_size=16)


def test_a_sweep_of_the_rule_is_the_sweep_of_the_named_optimizer():
    lr, momentum = fl.grid([0.01, 0.1]), fl.grid([0.3, 0.9])
    mine = [my_adam(lr=lr), my_sgd(lr=lr, momentum=momentum)]
    named = [fl.optim.adam(lr=lr), fl.optim.sgd(lr=lr, momentum=momentum)]
    runs = [fl.sweep(task(), each, seeds=2, steps=30, workers=w) for each, w in ((mine, 2), (named, 1))]
    assert runs[0].spec["engine"] == "vectorised"
    np.testing.assert_allclose(runs[0].history.train_loss, runs[1].history.train_loss, rtol=1e-10)
    assert len(np.unique(runs[0].history.train_loss[:, -1])) == 12


def test_a_rule_with_a_norm_is_trained_per_parameter_in_both_engines():
    assert not normalised().elementwise
    template = normalised(lr=fl.grid([0.01, 0.1]))
    runs = [fl.sweep(task(), [template], seeds=2, steps=20, engine=e) for e in ("vectorised", "sequential")]
    np.testing.assert_allclose(*(run.history.train_loss for run in runs), rtol=1e-10)


def test_numbers_and_schedules_reach_the_rule_and_options_do_not_move():
    assert my_adam().numbers == {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    assert my_sgd().numbers == {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0}
    assert my_sgd(lr=0.1, momentum=0.5).structure == my_sgd().structure
    assert my_sgd(nesterov=True).structure != my_sgd().structure
    rule, p = my_sgd(lr=fl.schedules.cosine(1.0)), {"w": torch.ones(1, dtype=F64)}
    state = rule.init(p, steps=2)
    first, state = rule.update(p, state, p, steps=2)
    second, state = rule.update(p, state, p, steps=2)
    assert (first["w"], second["w"]) == (-1.0, -0.5)


def test_the_signature_the_docstring_and_the_name_are_the_rules():
    assert my_adam.__doc__ == "Adam, written by a user."
    assert str(inspect.signature(my_sgd)) == "(*, lr=0.001, momentum=0.0, nesterov=False, weight_decay=0.0)"
    assert repr(my_adam(betas=(0.8, 0.9))) == "my_adam(lr=0.001, betas=(0.8, 0.9))"
    assert my_adam().name == "my_adam"


def test_what_a_rule_makes_travels_and_is_written_down():
    for value in (my_adam(lr=0.3), my_sgd(nesterov=True), my_adam(betas=(0.1, 0.2)).transforms[0]):
        assert pickle.loads(pickle.dumps(value)) == value
        assert from_data(to_data(value)) == value


def test_a_template_is_chosen_from():
    lr, beta = fl.log_grid(0.01, 1.0, 3), fl.uniform(0.5, 0.9)
    template = my_adam(lr=lr, betas=(beta, 0.99))
    assert template.dimensions == {"lr": lr, "beta1": beta}
    assert template.chosen({id(lr): 0.1, id(beta): 0.6}) == my_adam(lr=0.1, betas=(0.6, 0.99))


def test_as_torch_follows_a_scheduler():
    p = nn.Parameter(torch.zeros(2, dtype=F64))
    optimizer = my_sgd(lr=1.0).as_torch([p])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(3):
        p.grad = torch.ones(2, dtype=F64)
        optimizer.step()
        scheduler.step()
    assert p.tolist() == [-1.75, -1.75]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    """At step 300, bfloat16 could not even count the steps; eps = 1e-8 would be 0 in float16."""
    p = {"w": torch.full((3,), 2.0, dtype=dtype)}
    state = my_adam().init(p)
    for _ in range(300):
        updates, state = my_adam().update({"w": torch.tensor([1.0, 0.5, 0.0], dtype=dtype)}, state, p)
    assert updates["w"].dtype == state["slots"]["w"]["m"].dtype == dtype
    assert updates["w"].isfinite().all()
    assert updates["w"][:2].float() == pytest.approx([-1e-3, -1e-3], rel=0.2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: my_adam(lr=-1.0), r"lr = -1\.0 is negative"),
        (lambda: my_adam(eps=-1.0), r"eps = -1\.0 is negative"),
        (lambda: my_adam(lr=float("nan")), "lr = nan is not finite"),
        (lambda: my_adam(betas=(1.0, 0.9)), r"beta1 = 1\.0 is outside \[0, 1\)"),
        (lambda: my_adam(betas=0.9), r"betas = 0\.9 is not a tuple of 2 numbers"),
        (lambda: my_adam(betas=(0.9,)), "is not a tuple of 2"),
        (lambda: my_lion(beta2=1.0), r"beta2 = 1\.0 is outside"),
        (lambda: my_sgd(momentum=-0.1), r"momentum = -0\.1 is negative"),
        (lambda: my_sgd(weight_decay=-0.1), r"weight_decay = -0\.1 is negative"),
        (lambda: my_sgd(nesterov=1), "nesterov = 1 is neither"),
        (lambda: normalised(power=1.5), r"power = 1\.5 is not a whole number"),
        (lambda: bounded(share=0.6), r"share = 0\.6 is outside \[0, 0\.5\]"),
        (lambda: bounded(base=0.9), r"base = 0\.9 is outside \[1, inf\]"),
        (lambda: my_adam(lr=fl.grid([0.1, -0.1])), r"lr = -0\.1 is negative"),
    ],
)
def test_a_number_outside_its_domain_is_named(make, message):
    with pytest.raises(InvalidHyperparameter, match=message):
        make()


def test_an_unknown_keyword_tells_the_nearest():
    with pytest.raises(UnknownArgument, match=r"my_sgd\(\) has no argument 'momentun'. Did you mean 'momentum'"):
        my_sgd(momentun=0.9)


def test_a_domain_of_ones_own_is_asked():
    def even(name, value):
        if value % 2:
            raise InvalidHyperparameter(f"{name} is odd")

    @fl.optim.rule(domains={"k": even})
    def halves(g, p, *, lr=0.1, k=2.0):
        return -lr * g / k

    halves(k=4.0)
    with pytest.raises(InvalidHyperparameter, match="k is odd"):
        halves(k=3.0)


def no_parameter(g):
    return g


def without_default(g, p, *, lr):
    return -lr * g


def with_default(g, p, m=0.0, *, lr=0.1):
    return -lr * g, m


def open_ended(g, p, *states, lr=0.1):
    return -lr * g


def odd_default(g, p, *, lr=0.1, table=[1.0]):  # noqa: B006
    return -lr * g


def forgets_state(g, p, m, *, lr=0.1):
    return -lr * g


def too_many(g, p, *, lr=0.1):
    return -lr * g, g


def returns_none(g, p, *, lr=0.1):
    g = -lr * g


def wrong_shape(g, p, m, *, lr=0.1):
    return -lr * g, g.sum()


def wrong_update(g, p, *, lr=0.1):
    return -lr * g.mean()


def asks(g, p, *, lr=0.1):
    return -lr * g if g.sum() > 0 else lr * g


def takes_item(g, p, *, lr=0.1):
    return -lr * g / g.norm().item()


def in_place(g, p, m, *, lr=0.1):
    m.mul_(0.9).add_(g)
    return -lr * m, m


def misspelt(g, p, *, lr=0.1):
    return -lr * g.sgn_of()


def seeded(g, p, seed, *, lr=0.1):
    return -lr * g, seed


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_parameter, r"does not take a gradient and a parameter: begin with def no_parameter\(g, p"),
        (without_default, "no default for 'lr'"),
        (with_default, r"default for 'm', which is a state tensor: put a \*"),
        (open_ended, r"takes \*arguments"),
        (odd_default, r"table=\[1\.0\]: a default is a float"),
        (forgets_state, "returned 1 of the 2 tensors expected: return the update, m"),
        (too_many, "returned 2 of the 1 tensors expected"),
        (returns_none, "returned None for the update"),
        (wrong_shape, r"returned m of shape \(\) for a parameter of shape \(3, 4\)"),
        (wrong_update, r"returned the update of shape \(\)"),
        (asks, r"asks cannot be run for several trials at once.*torch\.where"),
        (takes_item, "cannot be run for several trials at once"),
        (in_place, "changes m in place"),
        (misspelt, "fails on a matrix: AttributeError.*sgn_of"),
        (seeded, "'seed', which is taken"),
        (3, "3 is not a function"),
    ],
)
def test_a_function_that_is_no_rule_is_refused_where_it_is_defined(function, message):
    with pytest.raises(InvalidRule, match=f"(?s){message}"):
        fl.optim.rule(function)


def mean_free(g, p, *, lr=0.1):
    return -lr * (g - g.mean())


def last_dimension(g, p, *, lr=0.1):
    return -lr * g.cumsum(-1)


def own_norm(g, p, m, *, lr=0.1, clip=0.0):
    m = 0.9 * m + g
    return -lr * (m + clip * p.norm() * g), m


def filled(g, p, *, lr=0.1):
    return -torch.full_like(g, 1.0) * lr.reshape(())


@pytest.mark.parametrize("function", [mean_free, last_dimension, own_norm, filled])
def test_a_rule_that_is_not_elementwise_is_found_out(function):
    fl.optim.rule(function)
    with pytest.raises(InvalidRule, match="is not elementwise"):
        fl.optim.rule(elementwise=True)(function)


def test_an_option_that_makes_it_not_elementwise_is_found_out_when_it_is_given():
    @fl.optim.rule(elementwise=True)
    def perhaps(g, p, *, lr=0.1, centred=False):
        return -lr * (g - g.mean() if centred else g)

    perhaps(lr=0.2)
    with pytest.raises(InvalidRule, match="perhaps is not elementwise"):
        perhaps(centred=True)


def test_a_rule_for_matrices_alone_is_a_rule():
    @fl.optim.rule
    def rows(g, p, *, lr=0.1):
        return -lr * g / g.norm(dim=1, keepdim=True)

    p = {"w": torch.ones(2, 2)}
    torch.testing.assert_close(rows().update(p, rows().init(p), p)[0]["w"], torch.full((2, 2), -0.1 / 2**0.5))


def test_a_domain_for_what_is_no_number_is_named():
    with pytest.raises(InvalidRule, match=r"domains names 'lrr', which is no number of wide\. Did you mean 'lr'"):

        @fl.optim.rule(domains={"lrr": (0, 1)})
        def wide(g, p, *, lr=0.1):
            return -lr * g


def test_a_wrong_shape_that_only_some_parameters_show_is_named_at_the_first_use():
    @fl.optim.rule
    def flattens(g, p, *, lr=0.1):
        return (-lr * g).reshape(p.shape if p.dim() < 3 else -1)

    p = {"w": torch.ones(2, 2, 2)}
    with pytest.raises(InvalidRule, match=r"shape \(8,\) for a parameter of shape \(2, 2, 2\)"):
        flattens().update(p, flattens().init(p), p)


@fl.optim.rule(elementwise=True)
def heavy(g, p, before, *, lr=1e-2, mu=0.5):
    """Heavy ball: p ← p − lr · g + mu · (p − the p before)."""
    return -lr * g + mu * (p - torch.where(before == 0, p, before)), p


def test_a_rule_that_keeps_the_parameter_itself_keeps_its_value():
    """The engines move parameters in place; what the state remembers of them must not move with them."""

    task = fl.tasks.diabetes(dtype=torch.float64).check()
    found = [
        fl.sweep(task, [heavy(), fl.optim.sgd(lr=1e-2, momentum=0.5)], seeds=1, steps=20, workers=1, engine=engine)
        for engine in ("vectorised", "sequential")
    ]
    for result in found:  # the two are one algorithm
        losses = result.history.train_loss
        torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-9, atol=1e-12)


def test_a_number_that_is_also_an_item_of_a_tuple_is_refused():
    def doubled(g, p, *, lr=0.1, betas=(0.9, 0.99), beta1=0.5):
        """p ← p − lr · beta1 · betas · g."""
        return -lr * g * beta1 * betas[0]

    with pytest.raises(InvalidRule, match="has 'beta1' twice"):
        fl.optim.rule(doubled)
