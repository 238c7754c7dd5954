"""What every loss must do, run over the catalogue's examples: no loss has tests of these kinds of its own."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap

import fallline as fl
from fallline.errors import InvalidHyperparameter, LossMismatch, UnknownArgument
from fallline.losses.base import Loss
from fallline.losses.catalogue import CATALOGUE

CASES = [
    pytest.param(info, arguments, id=f"{info.name}-{i}")
    for info in CATALOGUE.values()
    for i, arguments in enumerate(info.valid)
]
INVALID = [
    pytest.param(info, invalid, id=f"{info.name}-{i}")
    for info in CATALOGUE.values()
    for i, invalid in enumerate(info.invalid)
]
SWEPT = [
    pytest.param(info, name, values, id=f"{info.name}-{name}")
    for info in CATALOGUE.values()
    for name, values in info.sweeps.items()
]
EACH = [pytest.param(info, id=info.name) for info in CATALOGUE.values()]
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def drawn(info, seed=0):
    """The example's prediction, as a tuple of tensors that can be differentiated, and its target."""
    prediction, target = info.example(torch.Generator().manual_seed(seed))
    return prediction, target


def tensors(tree) -> tuple[Tensor, ...]:
    return tuple(tree) if isinstance(tree, tuple) else (tree,)


def like(tree, flat):
    return tuple(flat) if isinstance(tree, tuple) else flat[0]


def movable(tree) -> list[int]:
    """Which parts of a prediction can be differentiated (lengths cannot)."""
    return [i for i, part in enumerate(tensors(tree)) if part.is_floating_point()]


def of_movable(loss, prediction, target, **more):
    """The loss as a function of the differentiable parts of the prediction alone."""
    flat, moving = tensors(prediction), movable(prediction)

    def function(*some):
        whole = list(flat)
        for i, part in zip(moving, some, strict=True):
            whole[i] = part
        return loss(like(prediction, whole), target, **more)

    return function, tuple(flat[i] for i in moving)


def gradients(loss, prediction, target, **more):
    function, some = of_movable(loss, prediction, target, **more)
    leaves = [part.detach().clone().requires_grad_() for part in some]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves)


def made(info, arguments) -> Loss:
    return info.make(**arguments)


@pytest.mark.parametrize(("info", "arguments"), CASES)
def test_the_example_has_a_gradient_and_enough_samples(info, arguments):
    prediction, target = drawn(info)
    value, found = gradients(made(info, arguments), prediction, target)
    assert value.ndim == 0
    assert value.isfinite()
    assert any(g.abs().max() > 1e-6 for g in found), "a problem without a gradient would prove nothing"
    everything = [part for tree in (prediction, target) if tree is not None for part in tensors(tree)]
    if info.name != "linear_cross_entropy":  # whose classifier weights are no samples
        assert len({part.shape[0] for part in everything}) == 1
    assert everything[0].shape[0] >= 12
    assert all(part.dtype == torch.float64 for part in everything if part.is_floating_point())


@pytest.mark.parametrize(("info", "arguments"), CASES)
def test_differentiable_once_and_twice(info, arguments):
    function, some = of_movable(made(info, arguments), *drawn(info))
    leaves = tuple(part.detach().clone().requires_grad_() for part in some)
    assert gradcheck(function, leaves, atol=1e-6, rtol=1e-5, fast_mode=True)
    assert gradgradcheck(function, leaves, atol=1e-6, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize(("info", "arguments"), CASES)
def test_a_population_gives_what_a_loop_gives(info, arguments):
    loss = made(info, arguments)
    examples = [drawn(info, seed) for seed in range(3)]
    functions = [of_movable(loss, *example) for example in examples]
    argnums = tuple(range(len(functions[0][1])))
    alone = [grad(function, argnums)(*some) for function, some in functions]
    for (prediction, target), found in zip(examples, alone, strict=True):
        for ours, plain in zip(found, gradients(loss, prediction, target)[1], strict=True):
            torch.testing.assert_close(ours, plain, **CLOSE)
    fixed = [i for i in range(len(tensors(examples[0][0]))) if i not in movable(examples[0][0])]
    stacked = [torch.stack([tensors(p)[i] for p, _ in examples]) for i in range(len(tensors(examples[0][0])))]
    targets = None if examples[0][1] is None else [
        torch.stack(parts) for parts in zip(*(tensors(t) for _, t in examples), strict=True)
    ]  # fmt: skip
    moving = [i for i in range(len(stacked)) if i not in fixed]

    def one(some, rest, target):
        whole = {**dict(zip(moving, some, strict=True)), **dict(zip(fixed, rest, strict=True))}
        parts = [whole[i] for i in range(len(whole))]
        return loss(like(examples[0][0], parts), None if target is None else like(examples[0][1], target))

    arguments_ = [stacked[i] for i in moving], [stacked[i] for i in fixed], targets
    together = vmap(grad(one), in_dims=(0, 0, None if targets is None else 0))(*arguments_)
    for position, ours in enumerate(together):
        torch.testing.assert_close(ours, torch.stack([each[position] for each in alone]), **CLOSE)
    shared = None if targets is None else [t[0] for t in targets]
    values = vmap(one, in_dims=(0, 0, None))(arguments_[0], arguments_[1], shared)
    expected = torch.stack([loss(p, examples[0][1]) for p, _ in examples])
    torch.testing.assert_close(values, expected, **CLOSE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("info", "arguments"), CASES)
def test_compiles_into_one_graph(info, arguments):
    torch.compiler.reset()
    loss = made(info, arguments)
    prediction, target = drawn(info)
    compiled = torch.compile(lambda p, t: loss(p, t), fullgraph=True, backend="aot_eager")
    ours, slopes = gradients(compiled, prediction, target)  # before it was ever called otherwise
    value, found = gradients(loss, prediction, target)
    torch.testing.assert_close(ours, value, **CLOSE)
    for a, b in zip(slopes, found, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize(("info", "name", "values"), SWEPT)
def test_each_trial_may_have_its_own_number(info, name, values):
    arguments = {} if info.valid[0] == {} else dict(info.valid[0])
    loss = made(info, arguments)
    assert name in loss.numbers
    prediction, target = drawn(info)
    numbers = torch.tensor(values, dtype=torch.float64)
    _, some = of_movable(loss, prediction, target)

    def at(value, *parts):
        function, _ = of_movable(loss, prediction, target, numbers={name: value})
        return function(*parts)

    together = vmap(at, in_dims=(0, *[None] * len(some)))(numbers, *some)
    slopes = vmap(grad(at, 1), in_dims=(0, *[None] * len(some)))(numbers, *some)
    assert not torch.allclose(together[0], together[1]), "numbers that do nothing would prove nothing"
    for row, value in enumerate(values):
        other = with_number(info, arguments, name, value)
        assert other.structure == loss.structure
        assert other.numbers[name] == value
        expected, found = gradients(other, prediction, target)
        torch.testing.assert_close(together[row], expected, **CLOSE)
        torch.testing.assert_close(slopes[row], found[0], **CLOSE)


def with_number(info, arguments, name, value) -> Loss:
    """The loss with another value for the number that the leaves of its call know by that name."""
    if name in inspect.signature(info.make).parameters:
        return info.make(**{**arguments, name: value})
    return info.make(**arguments).call.with_arguments({name: value})


@pytest.mark.parametrize(("info", "name", "values"), SWEPT)
def test_a_number_may_be_searched(info, name, values):
    if name not in inspect.signature(info.make).parameters:
        pytest.skip("a number of a part")
    dimension = fl.grid(list(values))
    template = info.make(**{**info.valid[0], name: dimension})
    assert template.dimensions == {name: dimension}
    chosen = template.chosen({id(dimension): values[1]})
    assert chosen == info.make(**{**info.valid[0], name: values[1]})
    with pytest.raises(InvalidHyperparameter, match="to be searched"):
        template(*drawn(info))


@pytest.mark.parametrize(("info", "arguments"), CASES)
def test_reductions_agree(info, arguments):
    prediction, target = drawn(info)
    if "reduction" not in inspect.signature(info.make).parameters:
        return
    by = {how: info.make(**{**arguments, "reduction": how}) for how in ("mean", "sum", "none")}
    values = by["none"](prediction, target)
    assert values.shape[0] == tensors(prediction)[0].shape[0]
    torch.testing.assert_close(by["sum"](prediction, target), values.sum(), **CLOSE)
    # CTC's mean divides each value by the length of its target, so that its values are others.
    terms, weights = by["mean"].terms(prediction, target, by["mean"].numbers)
    count = values.numel() if weights is None else weights.sum()
    torch.testing.assert_close(by["mean"](prediction, target), terms.sum() / count, **CLOSE)
    assert by["mean"].per_sample(prediction, target).shape[0] == values.shape[0]
    if weights is None and info.name != "kl_div":
        torch.testing.assert_close(by["mean"].per_sample(prediction, target).mean(), by["mean"](prediction, target))


@pytest.mark.parametrize(("info", "arguments"), CASES)
def test_a_samples_value_is_its_own(info, arguments):
    """Where a sample's value does not depend on the batch, changing one sample changes no other's value."""
    loss = made(info, arguments)
    prediction, target = drawn(info)
    other = drawn(info, seed=1)[0]
    before = loss.per_sample(prediction, target)
    for sample in range(3):  # the first may be one that counts for nothing
        flat = [p.clone() for p in tensors(prediction)]
        for i in movable(prediction):
            if flat[i].shape[0] == flat[0].shape[0]:
                flat[i][sample] = tensors(other)[i][sample]
        after = loss.per_sample(like(prediction, flat), target)
        if not torch.allclose(before[sample], after[sample]):
            break
    else:
        pytest.fail("no sample's value depends on its prediction")
    others = torch.arange(len(before)) != sample
    same = torch.allclose(before[others], after[others], rtol=1e-12, atol=1e-12)
    assert same is not info.over_batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("info", "arguments"), CASES)
def test_the_dtype_is_kept_and_the_value_near(info, arguments, dtype):
    def cast(tree):
        if tree is None:
            return None
        return like(tree, [p.to(dtype) if p.is_floating_point() else p for p in tensors(tree)])

    loss = made(info, arguments)
    prediction, target = drawn(info)
    value, found = gradients(loss, prediction, target)
    ours, slopes = gradients(loss, cast(prediction), cast(target))
    assert ours.dtype == dtype
    assert all(slope.dtype == dtype for slope in slopes)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(ours.double(), value, **tolerance)
    for a, b in zip(slopes, found, strict=True):
        assert a.isfinite().all()
        if dtype == torch.float32:
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("info", "arguments"), CASES)
def test_a_value_that_remembers_how_it_was_made(info, arguments):
    loss = made(info, arguments)
    again = pickle.loads(pickle.dumps(loss))
    assert again == loss
    assert hash(again) == hash(loss)
    assert eval(repr(loss), {"fl": fl, "torch": torch}) == loss
    prediction, target = drawn(info)
    for other in (again, eval(loss.code(), {"fl": fl, "torch": torch})):
        flat = tensors(prediction)
        if isinstance(other, torch.nn.Module) and (len(flat) > 1 or target is None or loss.arrange is not None):
            continue  # torch takes the parts in its own order; the tests against its data base do
        if isinstance(other, torch.nn.Module):
            other = other.double()
        torch.testing.assert_close(other(prediction, target), loss(prediction, target), **CLOSE)


@pytest.mark.parametrize("info", EACH)
def test_it_says_what_it_is(info):
    loss = made(info, info.valid[0])
    assert loss.name == info.name
    assert loss.formula
    assert all(loss.shapes)
    assert loss.reference or loss.torch_name
    assert bool(info.source) or bool(loss.torch_name)
    doc = inspect.getdoc(info.make)
    assert ">>>" in doc
    assert "Raises:" in doc
    assert "Args:" in doc
    assert getattr(fl.losses, info.name) is info.make, "it is exported"
    assert not loss.torch_name or hasattr(torch.nn, loss.torch_name)


@pytest.mark.parametrize(("info", "invalid"), INVALID)
def test_arguments_outside_their_domain_are_refused(info, invalid):
    with pytest.raises(invalid.error) as caught:
        info.make(**{**info.valid[0], **invalid.arguments})
    assert invalid.message in str(caught.value)
    assert isinstance(caught.value, fl.errors.FalllineError)


@pytest.mark.parametrize("info", EACH)
def test_a_misspelt_argument_names_the_nearest(info):
    if "reduction" in inspect.signature(info.make).parameters:
        with pytest.raises(UnknownArgument, match="Did you mean 'reduction'"):
            info.make(**{**info.valid[0], "reductoin": "sum"})
        with pytest.raises(InvalidHyperparameter, match="reduction"):
            info.make(**{**info.valid[0], "reduction": "average"})


@pytest.mark.parametrize("info", EACH)
def test_what_is_given_is_left_as_it_is(info):
    loss = made(info, info.valid[0])
    prediction, target = drawn(info)
    copies = [part.clone() for tree in (prediction, target) if tree is not None for part in tensors(tree)]
    gradients(loss, prediction, target)
    now = [part for tree in (prediction, target) if tree is not None for part in tensors(tree)]
    assert all(torch.equal(a, b) for a, b in zip(copies, now, strict=True))


@pytest.mark.parametrize("info", EACH)
def test_the_example_is_no_misuse(info):
    for arguments in info.valid:
        prediction, target = drawn(info)
        found = fl.losses.check(made(info, arguments), prediction, target)
        assert [each for each in found if each.severity != "note"] == []


def test_a_loss_with_two_arguments_refuses_a_third():
    with pytest.raises(LossMismatch, match="3 tensors"):
        fl.losses.mse()(torch.zeros(2), torch.zeros(2), torch.zeros(2))
