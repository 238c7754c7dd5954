"""What every optimizer of the catalogue keeps to, with every set of arguments that its family names as valid.

Nothing here knows an optimizer by name: an entry in the catalogue is all that is needed to be tested. That an optimizer
computes what its paper says is tested beside its family; here it is shown that it is a pure function, that its numbers
are data, and that it goes downhill.
"""

import copy
import functools
import inspect
import io
import json
import math
import pickle
import re

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fallline as fl
from fallline.dimensions import Dimension
from fallline.errors import FalllineError, Unsupported
from fallline.optim import Landscape, Optimizer
from fallline.optim.catalogue import CATALOGUE
from fallline.optim.serial import from_data, to_data

STEPS = 50
SHAPES = {"matrix": (3, 4), "vector": (5,), "scalar": (), "tensor": (2, 1, 3)}
MATRICES = {"matrix": (3, 4), "tall": (5, 2)}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Every valid set of arguments of every optimizer.
CASES = [(name, index) for name, info in CATALOGUE.items() for index in range(len(info.valid))]
every_case = pytest.mark.parametrize("case", CASES, ids=[f"{name}-{index}" for name, index in CASES])
every_optimizer = pytest.mark.parametrize("name", CATALOGUE)
every_invalid = pytest.mark.parametrize(
    ("name", "index"),
    [(name, index) for name, info in CATALOGUE.items() for index in range(len(info.invalid))],
)


def make(name: str, arguments) -> Optimizer:
    """The optimizer; one around another gets sgd with momentum if it is given none."""
    info = CATALOGUE[name]
    inside = {"optimizer": fl.optim.sgd(lr=1e-2, momentum=0.9)} if info.wraps else {}
    return info.make(**{**inside, **arguments})


@functools.cache
def optimizer_of(case: tuple[str, int]) -> Optimizer:
    name, index = case
    return make(name, CATALOGUE[name].valid[index])


def start(case, dtype=torch.float64, shapes=None) -> dict[str, Tensor]:
    """Parameters of several shapes, none of them near 0."""
    chosen = shapes or (MATRICES if CATALOGUE[case[0]].matrices_only else SHAPES)
    generator = torch.Generator().manual_seed(len(case[0]))
    made = {}
    for name, shape in chosen.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        value = value + 0.5 * value.sign()
        if dtype.is_complex:
            value = torch.complex(value, torch.randn(shape, generator=generator, dtype=torch.float64))
        made[name] = value.to(dtype)
    return made


@functools.cache
def bowl_of(name: str, shape: tuple[int, ...], dtype) -> tuple[Tensor, Tensor]:
    """Of a parameter: what its elements' centres wander by, and their curvatures."""
    phase = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape) + len(name)
    return phase, (1 + 0.5 * torch.cos(phase)).to(dtype)


def away(step: int, name: str, p: Tensor) -> Tensor:
    phase, _ = bowl_of(name, tuple(p.shape), p.dtype)
    return p - (torch.sin(0.7 * step + phase) * 0.3 + 0.2).to(p.dtype)


def loss_at(step: int, params) -> Tensor:
    """A bowl for each parameter, with another curvature for each element and a centre that wanders."""
    total = []
    for name, p in params.items():
        gap = away(step, name, p)
        total.append((gap * gap * bowl_of(name, tuple(p.shape), p.dtype)[1]).sum())
    return torch.stack(total).sum() / 2


def slopes(step: int, params) -> dict[str, Tensor]:
    return {name: away(step, name, p) * bowl_of(name, tuple(p.shape), p.dtype)[1] for name, p in params.items()}


def test_the_slopes_are_those_of_the_loss():
    params = start(("sgd", 0))
    for name, expected in torch.func.grad(functools.partial(loss_at, 3))(params).items():
        torch.testing.assert_close(slopes(3, params)[name], expected, rtol=1e-14, atol=0)


def update(optimizer, grads, state, params, step, numbers=None, loss=loss_at):
    landscape = None
    if optimizer.surveys(step):
        landscape = Landscape.of(functools.partial(loss, step), params)
    return optimizer.update(grads, state, params, numbers, steps=STEPS, step=step, landscape=landscape)


def run(optimizer, params, state, begin, end, numbers=None):
    """From update `begin` to before `end`."""
    for step in range(begin, end):
        updates, state = update(optimizer, slopes(step, params), state, params, step, numbers)
        params = {name: p + updates[name] for name, p in params.items()}
    return params, state


@functools.cache
def trajectory(case, stop: int):
    """Parameters and state after so many updates."""
    if stop == 0:
        params = start(case)
        return params, optimizer_of(case).init(params, steps=STEPS)
    params, state = trajectory(case, 0)
    if stop == STEPS:
        params, state = trajectory(case, STEPS // 2)
        return run(optimizer_of(case), params, state, STEPS // 2, STEPS)
    return run(optimizer_of(case), params, state, 0, stop)


def copy_of(tree):
    return {k: copy_of(v) for k, v in tree.items()} if isinstance(tree, dict) else tree.clone()


def same(a, b) -> bool:
    """Bit for bit, NaN included."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(1e30), b.nan_to_num(1e30))


def flattened(tree, prefix="") -> dict[str, Tensor]:
    found = {}
    for name, value in tree.items():
        found.update(flattened(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return found


def tensors_of(tree) -> list[Tensor]:
    return list(flattened(tree).values())


def test_the_catalogue_is_what_is_public():
    for name, info in CATALOGUE.items():
        assert getattr(fl.optim, name) is info.make
        assert info.valid, name
        assert 0 < info.learning_rates[0] < info.learning_rates[1], name


@every_case
def test_the_problem_moves_every_element(case):
    """Or what follows would compare nothing."""
    begin, state = trajectory(case, 0)
    after, _ = run(optimizer_of(case), begin, state, 0, 10)
    assert all(size > 1e-3 for p in slopes(0, begin).values() for size in p.abs().flatten())
    for name in begin:
        assert after[name].isfinite().all()
        assert (after[name] != begin[name]).all(), f"{name} did not move"


# Purity.


@every_case
def test_nothing_that_is_passed_in_is_changed_and_the_same_gives_the_same(case):
    optimizer = optimizer_of(case)
    params = start(case)
    numbers = {n: torch.tensor(v, dtype=torch.float64) for n, v in optimizer.numbers.items()}
    state = optimizer.init(params, numbers, steps=STEPS)
    assert same(params, start(case))
    for step in range(4):
        given = {"grads": slopes(step, params), "state": state, "params": params, "numbers": numbers}
        before = copy_of(given)
        updates, after = update(optimizer, given["grads"], state, params, step, numbers)
        kept = copy_of({"updates": updates, "state": after})
        assert same(given, before), "an argument was changed"
        again, after_again = update(optimizer, given["grads"], state, params, step, numbers)
        assert same({"updates": again, "state": after_again}, kept), "the same arguments gave something else"
        own, _ = update(optimizer, given["grads"], state, params, step)
        assert same(own, updates), "its own numbers gave something else than the same numbers passed in"
        params = {name: p + updates[name] for name, p in params.items()}
        assert same({"state": after}, {"state": kept["state"]}), "the state shares memory with an update"
        state = after


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_updates_and_state_keep_their_dtype_and_shape(case, dtype):
    optimizer = optimizer_of(case)
    params = start(case, dtype)
    first = state = optimizer.init(params, steps=STEPS)
    for step in range(3):
        updates, state = update(optimizer, slopes(step, params), state, params, step)
        assert {u.dtype for u in updates.values()} == {dtype}
        assert {n: u.shape for n, u in updates.items()} == {n: p.shape for n, p in params.items()}
        assert all(u.isfinite().all() for u in updates.values())
        params = {name: p + updates[name] for name, p in params.items()}
    before, after = flattened(first), flattened(state)
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    # What is shaped like the parameter is kept in its dtype; factors of a preconditioner may be more exact.
    for name, p in params.items():
        assert {t.dtype for t in state["slots"][name].values() if p.dim() and t.shape == p.shape} <= {dtype}
    if dtype == torch.float32:
        # Round-off moves an element whose sum of signs is near 0 to the other side, but not the parameters as a whole.
        exact = run(optimizer, start(case), optimizer.init(start(case), steps=STEPS), 0, 3)[0]
        moved = torch.cat([(exact[n] - start(case)[n]).flatten() for n in exact]).norm()
        gap = torch.cat([(params[n].double() - exact[n]).flatten() for n in exact]).norm()
        assert gap <= 0.1 * moved + 1e-6


@every_case
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=["complex64", "complex128"])
def test_complex_parameters_are_pairs_of_real_ones_or_refused(case, dtype):
    optimizer = optimizer_of(case)
    params = start(case, dtype)
    if not optimizer.elementwise:
        with pytest.raises(Unsupported, match="complex"):
            update(optimizer, slopes(0, params), optimizer.init(params, steps=STEPS), params, 0)
        return
    if "seed" in optimizer.slot_names or any(optimizer.surveys(step) for step in range(STEPS)):
        pytest.skip("its random numbers, or the loss around it, are not those of a pair")
    pairs = {name: torch.view_as_real(p).clone() for name, p in params.items()}
    state, of_pairs = optimizer.init(params, steps=STEPS), optimizer.init(pairs, steps=STEPS)
    for step in range(4):
        grads = slopes(step, params)
        updates, state = update(optimizer, grads, state, params, step)
        real_grads = {name: torch.view_as_real(g).clone() for name, g in grads.items()}
        real_updates, of_pairs = update(optimizer, real_grads, of_pairs, pairs, step)
        for name, u in updates.items():
            assert u.dtype == dtype
            torch.testing.assert_close(torch.view_as_real(u), real_updates[name], rtol=1e-6, atol=1e-7)
        params = {name: p + updates[name] for name, p in params.items()}
        pairs = {name: torch.view_as_real(p).clone() for name, p in params.items()}


# Numbers are data.


def other_numbers(optimizer: Optimizer, shares=(1.0, 0.8, 0.55)) -> list[Optimizer]:
    """The optimizer with other values for each of its numbers, where their domains allow it."""
    values = [{}, {}, {}]
    given = optimizer.hyperparameters
    for name, value in given.items():
        for trial, share in enumerate(shares):
            values[trial][name] = value
            for candidate in (value * share, value * (2 - share), value):
                try:
                    optimizer.with_numbers({**given, name: candidate})
                except FalllineError:
                    continue
                values[trial][name] = candidate
                break
    return [optimizer.with_numbers(own) for own in values]


@every_case
def test_trials_under_vmap_equal_each_alone(case):
    optimizer = optimizer_of(case)
    trials = other_numbers(optimizer)
    assert len({trial.structure for trial in trials}) == 1
    params = start(case)
    rows = {name: torch.stack([p, p * 0.9, p * 1.1]) for name, p in params.items()}
    alone = [{name: row[i].clone() for name, row in rows.items()} for i in range(3)]
    numbers = {n: torch.tensor([t.numbers[n] for t in trials], dtype=torch.float64) for n in optimizer.numbers}
    state = torch.func.vmap(lambda p, n: optimizer.init(p, n, steps=STEPS))(rows, numbers)
    states = [trial.init(own, steps=STEPS) for trial, own in zip(trials, alone, strict=True)]

    for step in range(5):

        def one(params, grads, state, numbers, step=step):
            return update(optimizer, grads, state, params, step, numbers)

        grads = [slopes(step, own) for own in alone]
        stacked = {name: torch.stack([g[name] for g in grads]) for name in rows}
        updates, state = torch.func.vmap(one)(rows, stacked, state, numbers)
        rows = {name: p + updates[name] for name, p in rows.items()}
        for i, trial in enumerate(trials):
            own, states[i] = update(trial, grads[i], states[i], alone[i], step)
            alone[i] = {name: p + own[name] for name, p in alone[i].items()}
    # The eigenvectors of an ill-conditioned factor are less exact than the factor.
    tolerance = 1e-13 if optimizer.elementwise else 1e-7
    for name, p in rows.items():
        expected = torch.stack([own[name] for own in alone])
        torch.testing.assert_close(p, expected, rtol=tolerance, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    if len(set(map(repr, trials))) == 3:
        assert not torch.allclose(rows["matrix"][0], start(case)["matrix"], rtol=1e-12, atol=0)


@every_case
def test_rows_of_a_flat_population_equal_each_alone(case):
    """[row, size] with numbers [row, 1]: what the vectorised engine makes of rules that work element by element."""
    optimizer = optimizer_of(case)
    if not optimizer.elementwise:
        pytest.skip("does not work element by element")
    trials = other_numbers(optimizer)
    params = start(case)
    whole = torch.cat([p.flatten() for p in params.values()])
    flat = torch.stack([whole, whole * 0.9, whole * 1.1])
    alone = [row.clone() for row in flat]
    numbers = {n: torch.tensor([[t.numbers[n]] for t in trials], dtype=torch.float64) for n in optimizer.numbers}
    squeezed = {n: t.squeeze(1) for n, t in numbers.items()}
    state = torch.func.vmap(lambda p, n: optimizer.init({"flat": p}, n, steps=STEPS))(flat, squeezed)
    state = {
        "step": state["step"].unsqueeze(1),
        "slots": {"flat": {n: t.unsqueeze(1) if t.dim() == 1 else t for n, t in state["slots"]["flat"].items()}},
    }
    states = [trial.init({"flat": own}, steps=STEPS) for trial, own in zip(trials, alone, strict=True)]
    views = start(case)
    parts = optimizer.init(views, steps=STEPS)
    for step in range(5):
        grads = [slopes(step, {"flat": own})["flat"] for own in alone]
        updates, state = optimizer.update(
            {"flat": torch.stack(grads)}, state, {"flat": flat}, numbers, steps=STEPS, step=step
        )
        flat = flat + updates["flat"]
        # The first trial's numbers are the optimizer's own: the same elements, as the parameters that they are.
        sizes = [p.numel() for p in views.values()]
        pieces = zip(views, grads[0].split(sizes), strict=True)
        own, parts = update(optimizer, {n: g.reshape(views[n].shape) for n, g in pieces}, parts, views, step)
        views = {name: p + own[name] for name, p in views.items()}
        for i, trial in enumerate(trials):
            found, states[i] = update(trial, {"flat": grads[i]}, states[i], {"flat": alone[i]}, step)
            alone[i] = alone[i] + found["flat"]
    torch.testing.assert_close(flat, torch.stack(alone), rtol=1e-13, atol=0)
    if "seed" not in optimizer.slot_names:
        torch.testing.assert_close(flat[0], torch.cat([p.flatten() for p in views.values()]), rtol=1e-13, atol=0)


@every_case
def test_going_on_from_a_saved_state_is_bit_for_bit_the_same(case):
    optimizer = optimizer_of(case)
    params, state = trajectory(case, STEPS // 2)
    expected = trajectory(case, STEPS)

    file = io.BytesIO()
    torch.save((params, state), file)
    file.seek(0)
    assert same(dict(enumerate(torch.load(file, weights_only=True))), {0: params, 1: state})

    tensors = {name: t.clone().contiguous() for name, t in flattened({"params": params, "state": state}).items()}
    tensors = safetensors.torch.load(safetensors.torch.save(tensors))
    again = {name: tensors[f"params/{name}"] for name in params}
    slots = {name: {s: tensors[f"state/slots/{name}/{s}"] for s in own} for name, own in state["slots"].items()}
    found = run(optimizer, again, {"step": tensors["state/step"], "slots": slots}, STEPS // 2, STEPS)
    assert same(dict(enumerate(found)), dict(enumerate(expected)))


def train_as_torch(optimizer, leaves, begin, end):
    for step in range(begin, end):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_at(step, leaves)
            loss.backward(create_graph=optimizer.rule.surveys(step))
            return loss

        optimizer.step(closure)


@every_case
@pytest.mark.filterwarnings(r"ignore:Using backward\(\) with create_graph=True")
def test_as_torch_is_the_rule_and_goes_on_from_a_saved_state_dict_bit_for_bit(case):
    rule = optimizer_of(case)
    leaves = {name: nn.Parameter(p) for name, p in start(case).items()}
    whole = rule.as_torch(leaves.items(), steps=STEPS)
    train_as_torch(whole, leaves, 0, 10)
    file = io.BytesIO()
    torch.save({"params": {n: p.detach() for n, p in leaves.items()}, "optimizer": whole.state_dict()}, file)
    train_as_torch(whole, leaves, 10, 20)

    file.seek(0)
    saved = torch.load(file, weights_only=False)
    resumed = {name: nn.Parameter(p) for name, p in saved["params"].items()}
    second = rule.as_torch(resumed.items(), steps=STEPS)
    second.load_state_dict(saved["optimizer"])
    train_as_torch(second, resumed, 10, 20)
    for name, p in leaves.items():
        assert torch.equal(resumed[name], p), name
        assert not torch.equal(p, start(case)[name]), f"{name} did not move"

    params, state = trajectory(case, 0)
    for name, p in run(rule, params, state, 0, 20)[0].items():
        torch.testing.assert_close(leaves[name].detach(), p, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@every_case
@pytest.mark.filterwarnings(r"ignore:Using backward\(\) with create_graph=True")
def test_as_torchs_state_does_not_change_with_the_parameter_or_its_gradient(case):
    """Both are written in place: `zero_grad(set_to_none=False)` must not reach into a slot that remembers them."""
    leaves = {name: nn.Parameter(p) for name, p in start(case).items()}
    optimizer = optimizer_of(case).as_torch(leaves.items(), steps=STEPS)
    train_as_torch(optimizer, leaves, 0, 2)
    for p in leaves.values():
        before = {slot: t.clone() for slot, t in optimizer.state[p].items()}
        with torch.no_grad():
            p.add_(1.0)
            p.grad.detach().add_(1.0)
        for slot, t in optimizer.state[p].items():
            assert torch.equal(t, before[slot]), slot


@every_case
def test_any_number_may_follow_a_schedule(case):
    """A schedule that stays where it is equals the number: no rule looks at the number before it is a tensor."""
    optimizer = optimizer_of(case)
    for place in number_places(optimizer):
        try:
            scheduled = with_argument(optimizer, place, lambda value: fl.schedules.constant(value))
        except FalllineError:  # the optimizer says so: nesterov without dampening, an average that needs one momentum
            assert place[0] != "lr"
            continue
        params, other = start(case), start(case)
        state, other_state = optimizer.init(params, steps=STEPS), scheduled.init(other, steps=STEPS)
        for step in range(3):
            updates, state = update(optimizer, slopes(step, params), state, params, step)
            found, other_state = update(scheduled, slopes(step, other), other_state, other, step)
            params = {name: p + updates[name] for name, p in params.items()}
            other = {name: p + found[name] for name, p in other.items()}
        for name, p in params.items():
            torch.testing.assert_close(other[name], p, rtol=1e-12, atol=1e-15, msg=lambda m, w=place: f"{w}: {m}")


def number_places(optimizer: Optimizer) -> list[tuple[str, int | None]]:
    """The arguments that are numbers of the rule: (name, place in the tuple)."""
    assert optimizer.call is not None
    annotations = {n: p.annotation for n, p in inspect.signature(optimizer.call.function).parameters.items()}
    found: list[tuple[str, int | None]] = []
    for name, value in optimizer.call.arguments.items():
        if "Number" not in str(annotations.get(name, "")):
            continue
        if isinstance(value, tuple):
            found += [(name, i) for i, item in enumerate(value) if is_finite(item)]
        elif is_finite(value):
            found.append((name, None))
    return found


def is_finite(value) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


def with_argument(optimizer: Optimizer, place: tuple[str, int | None], change) -> Optimizer:
    name, index = place
    arguments = dict(optimizer.call.arguments)
    value = arguments[name]
    if index is None:
        arguments[name] = change(value)
    else:
        arguments[name] = tuple(change(item) if i == index else item for i, item in enumerate(value))
    return optimizer.call.function(*optimizer.call.extra, **arguments)


def another(optimizer: Optimizer, place: tuple[str, int | None]) -> float | None:
    """Another value in the domain of an argument, if there is one."""
    name, index = place
    value = optimizer.call.arguments[name]
    value = value if index is None else value[index]
    for candidate in (value * 0.9, value * 1.1, 0.1, 0.5):
        if candidate == value:
            continue
        try:
            with_argument(optimizer, place, lambda _, c=candidate: c)
        except FalllineError:
            continue
        return candidate
    return None


@every_case
def test_every_number_can_be_searched(case):
    optimizer = optimizer_of(case)
    places = number_places(optimizer)
    info = CATALOGUE[case[0]]
    assert places or info.wraps, "no argument is a number"
    for place in places:
        value = optimizer.call.arguments[place[0]] if place[1] is None else optimizer.call.arguments[place[0]][place[1]]
        other = another(optimizer, place)
        if other is None:  # dampening beside nesterov
            assert place[0] != "lr"
            continue
        dimension = fl.grid([value, other])
        template = with_argument(optimizer, place, lambda _, d=dimension: d)
        assert [d for d in template.dimensions.values() if isinstance(d, Dimension)] == [dimension]
        with pytest.raises(FalllineError, match=r"leaves .* to be searched"):
            template.init(start(case))
        assert template.chosen({id(dimension): value}) == optimizer
        chosen = template.chosen({id(dimension): other})
        assert chosen != optimizer
        assert not chosen.dimensions
        assert chosen.arguments != optimizer.arguments


# Compiled once.


@every_optimizer
def test_other_numbers_compile_nothing_new(name):
    """The numbers are tensors to the compiler; a phase is another program."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    case = (name, 0)
    optimizer = optimizer_of(case)
    params = start(case, shapes={"matrix": (3, 4)})
    trials = other_numbers(optimizer)
    counter = CompileCounter()
    looks = any(optimizer.surveys(step) for step in range(STEPS))
    if looks:
        pytest.skip("derives the loss inside of the update, which the engines trace instead")

    def program(grads, state, params, numbers, step):
        return optimizer.update(grads, state, params, numbers, steps=STEPS, step=step)

    compiled = torch.compile(program, backend=counter, fullgraph=True, dynamic=False)
    steps = phases_of(optimizer)
    for step in steps:
        state = copy_of(optimizer.init(params, steps=STEPS))
        grads = slopes(step, params)
        frames = None
        for trial in trials:
            numbers = {n: torch.tensor(v, dtype=torch.float64) for n, v in trial.numbers.items()}
            found, after = compiled(grads, state, params, numbers, step)
            if frames is None:
                frames = counter.frame_count
                expected, _ = optimizer.update(grads, state, params, numbers, steps=STEPS, step=step)
                for key, u in expected.items():
                    torch.testing.assert_close(found[key], u, rtol=1e-9, atol=1e-12)
            state = copy_of(after)  # a slot may be the gradient itself
        assert counter.frame_count == frames, "other numbers, or a later state, were compiled anew"
    assert 1 <= counter.frame_count <= len(steps)


def phases_of(optimizer: Optimizer) -> list[int]:
    """The first step of each phase."""
    if not optimizer.has_phases:
        return [0]
    first: dict[object, int] = {}
    for step in range(STEPS):
        first.setdefault(optimizer.phase(step), step)
    return list(first.values())


# Downhill.


def bowl(params) -> Tensor:
    """Four elements, the last a hundred times steeper than the first."""
    scales = torch.tensor([[1.0, 5.0], [25.0, 100.0]], dtype=torch.float64)
    return 0.5 * (scales * params["w"].reshape(2, 2) ** 2).sum()


def valley(params) -> Tensor:
    """Rosenbrock's, in two pairs."""
    x, y = params["w"].reshape(2, 2)
    return ((1 - x) ** 2 + 100 * (y - x * x) ** 2).sum()


def bowl_slope(w: Tensor) -> Tensor:
    scales = torch.tensor([[1.0, 5.0], [25.0, 100.0]], dtype=torch.float64)
    return (scales * w.reshape(2, 2)).reshape(w.shape)


def valley_slope(w: Tensor) -> Tensor:
    x, y = w.reshape(2, 2)
    off = y - x * x
    return torch.stack([-2 * (1 - x) - 400 * x * off, 200 * off]).reshape(w.shape)


PROBLEMS = {
    "bowl": (bowl, bowl_slope, [[1.0, -1.0], [1.0, 0.5]], 2000, 1e-3),
    "valley": (valley, valley_slope, [[-0.5, 0.4], [0.6, 0.1]], 3000, 2e-2),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@every_optimizer
def test_it_settles_at_the_bottom(name, problem):
    """The loss at the end as a share of that at the start; evaluated where the optimizer says so."""
    info = CATALOGUE[name]
    loss, slope, begin, steps, share = PROBLEMS[problem]
    optimizer = make(name, info.settles)
    w = torch.tensor(begin, dtype=torch.float64)
    params = {"w": w if info.matrices_only else w.flatten()}
    first = float(loss(params))
    numbers = {n: torch.tensor(v, dtype=torch.float64) for n, v in optimizer.numbers.items()}
    state = optimizer.init(params, numbers, steps=steps)
    for step in range(steps):
        grads = {"w": slope(params["w"])}
        landscape = Landscape.of(loss, params) if optimizer.surveys(step) else None
        updates, state = optimizer.update(grads, state, params, numbers, steps=steps, step=step, landscape=landscape)
        params = {"w": params["w"] + updates["w"]}
    last = float(loss(optimizer.evaluation_parameters(state, params, numbers, steps=steps)))
    assert last < share * first, f"{last:.3g} of {first:.3g} is left"


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_slopes_are_those_of_the_problem(problem):
    loss, slope, begin, *_ = PROBLEMS[problem]
    w = torch.tensor(begin, dtype=torch.float64)
    torch.testing.assert_close(slope(w), torch.func.grad(lambda v: loss({"w": v}))(w))


# Edges.


def nothing(step, params):
    return torch.stack([(0 * p).sum() for p in params.values()]).sum()


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_zero_gradients_give_no_nan_and_move_nothing_but_decaying_weights(case, dtype):
    optimizer = optimizer_of(case)
    first = params = start(case, dtype)
    state = optimizer.init(params, steps=STEPS)
    for step in range(4):
        grads = {name: torch.zeros_like(p) for name, p in params.items()}
        updates, state = update(optimizer, grads, state, params, step, loss=nothing)
        assert all(u.isfinite().all() for u in updates.values())
        assert all(t.isfinite().all() for t in tensors_of(state))
        params = {name: p + updates[name] for name, p in params.items()}
    decays = any(value > 0 for name, value in optimizer.numbers.items() if name in CATALOGUE[case[0]].decays)
    draws = "seed" in optimizer.slot_names
    for name, p in params.items():
        moved = p != first[name]
        if decays or draws:
            assert (p - first[name]).abs().max() < 3.0, name
        else:
            assert not moved.any(), f"{name} moved by {float((p - first[name]).abs().max()):.3g}"


@every_case
def test_a_parameter_without_gradient_stays_with_its_state(case):
    optimizer = optimizer_of(case)
    params = start(case)
    frozen, *seen = params
    state = optimizer.init(params, steps=STEPS)
    before = copy_of(state["slots"][frozen])
    for step in range(3):
        grads = slopes(step, params)
        del grads[frozen]
        updates, state = update(optimizer, grads, state, params, step)
        assert set(updates) == set(seen)
        params = {name: p + updates[name] if name in updates else p for name, p in params.items()}
    assert all((params[name] != start(case)[name]).any() for name in seen)
    assert same(state["slots"][frozen], before)
    updates, state = update(optimizer, {}, state, params, 3)
    assert updates == {}


@every_case
def test_empty_and_single_parameters_are_trained_or_refused(case):
    optimizer = optimizer_of(case)
    if CATALOGUE[case[0]].matrices_only:
        for shape in ((), (5,), (2, 2, 2)):
            with pytest.raises(FalllineError, match="'w'"):
                optimizer.init({"w": torch.ones(shape, dtype=torch.float64)})
        return
    params = start(case, shapes={"none": (0,), "wide": (0, 3), "one": (), "row": (1,), "rest": (2, 2)})
    state = optimizer.init(params, steps=STEPS)
    for step in range(3):
        grads = slopes(step, params)
        updates, state = update(optimizer, grads, state, params, step)
        assert {n: u.shape for n, u in updates.items()} == {n: p.shape for n, p in params.items()}
        assert all(u.isfinite().all() for u in updates.values())
        params = {name: p + updates[name] for name, p in params.items()}
    assert (params["one"] != start(case, shapes={"none": (0,), "wide": (0, 3), "one": ()})["one"]).all()


@every_case
def test_it_can_be_written_down_and_made_again(case):
    optimizer = optimizer_of(case)
    assert pickle.loads(pickle.dumps(optimizer)) == optimizer
    assert copy.deepcopy(optimizer) == optimizer
    assert eval(repr(optimizer), {"fl": fl, "torch": torch}) == optimizer
    assert from_data(json.loads(json.dumps(to_data(optimizer)))) == optimizer
    again = optimizer.with_numbers(optimizer.hyperparameters)
    assert again.numbers == optimizer.numbers
    assert again.structure == optimizer.structure
    assert hash(optimizer) == hash(optimizer_of(case))


@every_invalid
def test_what_is_invalid_is_refused(name, index):
    invalid = CATALOGUE[name].invalid[index]
    with pytest.raises(invalid.error, match=re.escape(invalid.message)) as caught:
        make(name, invalid.arguments)
    assert isinstance(caught.value, FalllineError)
