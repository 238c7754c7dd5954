"""Optimizers as values: their arguments, search dimensions, printing, JSON, copies, and the catalogue's language."""

import copy
import inspect
import json
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fallline as fl
from fallline import dimensions
from fallline.optim import catalogue
from fallline.optim.serial import from_data, to_data
from plain_loop import PAIRS

CLASSES = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}
VALUES = [
    *(pair.ours for pair in PAIRS),
    fl.optim.adam(lr=fl.schedules.cosine(0.1, end=0.01), betas=(fl.schedules.constant(0.8), 0.9)),
    fl.optim.sgd(lr=fl.schedules.linear_warmup(fl.schedules.step(0.1), fraction=0.2)),
    fl.optim.chain(fl.optim.clip_by_global_norm(1.0), fl.optim.scale_by_lion(), fl.optim.negate(), fl.optim.sgd(0.1)),
    fl.optim.chain(),
    fl.optim.scale_by_rms(eps=0.1),
    fl.schedules.step(0.3, every=0.5),
]


@pytest.mark.parametrize("name", CLASSES)
def test_names_and_defaults_are_torchs(name):
    theirs = inspect.signature(CLASSES[name].__init__).parameters
    for argument, parameter in inspect.signature(getattr(fl.optim, name)).parameters.items():
        if argument == "decoupled_weight_decay" and torch.__version__ < "2.7":
            continue  # torch's Adam did not have it yet
        assert parameter.default == theirs[argument].default, argument


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_what_is_printed_makes_an_equal_value(value):
    again = eval(repr(value), {"fl": fl})
    assert again == value
    assert hash(again) == hash(value)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_survive_json(value):
    assert from_data(json.loads(json.dumps(to_data(value)))) == value


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_survive_pickling_and_copying(value):
    for again in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value), copy.copy(value)):
        assert again == value
        assert repr(again) == repr(value)


def test_different_values_are_not_equal():
    assert len({repr(v) for v in VALUES}) == len(VALUES)
    assert all(a != b for i, a in enumerate(VALUES) for b in VALUES[:i])


@settings(deadline=None, derandomize=True)
@given(lr=st.floats(0, 1e6), beta=st.floats(0, 1, exclude_max=True))
def test_numbers_survive_printing_and_json_exactly(lr, beta):
    value = fl.optim.adam(lr=lr, betas=(beta, 0.5))
    assert eval(repr(value), {"fl": fl}).numbers == value.numbers
    assert from_data(json.loads(json.dumps(to_data(value)))).numbers == value.numbers


@pytest.mark.parametrize("lr", [np.float64(0.5), np.float32(0.5), torch.tensor(0.5), np.array(0.5), Fraction(1, 2)])
def test_numbers_of_other_libraries_become_pythons(lr):
    value = fl.optim.sgd(lr=lr)
    assert repr(value) == "fl.optim.sgd(lr=0.5)"
    assert value == fl.optim.sgd(lr=0.5)
    json.dumps(to_data(value))


def test_a_list_of_betas_is_a_pair():
    assert fl.optim.adam(betas=[0.5, 0.6]) == fl.optim.adam(betas=(0.5, 0.6))


def own_rule():
    return fl.optim.per_tensor("own", lambda g, slots, p, n: (g, {}), {})


@fl.optim.described
def own(lr=0.1):
    return fl.optim.chain(own_rule(), fl.optim.scale_by_learning_rate(lr))


def test_an_own_optimizer_prints_as_its_own_call():
    assert repr(own(lr=0.2)) == "own(lr=0.2)"
    assert own(lr=0.2) == own(lr=0.2) != own(lr=0.3)
    assert own(lr=fl.grid([0.1, 0.2])).dimensions.keys() == {"lr"}


def test_what_nothing_made_is_copied_but_not_written_down():
    optimizer = fl.optim.chain(own_rule(), fl.optim.sgd())
    assert copy.deepcopy(optimizer) == optimizer
    for write in (pickle.dumps, to_data):
        with pytest.raises(
            (pickle.PicklingError, fl.errors.FalllineError), match=r"mark that with @fl.optim.described"
        ):
            write(optimizer)


def test_a_maker_that_is_gone_is_named():
    data = {"make": "fallline.optim.adam_family:adammm", "extra": [], "arguments": {}}
    with pytest.raises(fl.errors.UnknownName, match=r"adammm.*cannot be found any more"):
        from_data(data)


INVALID = {
    "sgd": [
        {"lr": -1.0},
        {"lr": "fast"},
        {"lr": None},
        {"momentum": -0.5},
        {"weight_decay": -0.5},
        {"nesterov": True},
        {"momentum": 0.9, "nesterov": True, "dampening": 0.1},
    ],
    "adam": [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"eps": -1.0},
        {"eps": "x"},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"betas": 0.9},
        {"weight_decay": -1.0},
    ],
    "adamw": [{"lr": -1.0}, {"eps": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, 1.1)}, {"weight_decay": -1.0}],
    "rmsprop": [{"lr": -1.0}, {"alpha": -0.1}, {"eps": -1.0}, {"momentum": -0.1}, {"weight_decay": -1.0}],
}


@pytest.mark.parametrize(("name", "arguments"), [(n, a) for n, many in INVALID.items() for a in many], ids=str)
def test_what_torch_refuses_is_refused_alike_and_named(name, arguments):
    with pytest.raises((ValueError, TypeError)) as theirs:
        CLASSES[name]([torch.zeros(1, requires_grad=True)], **arguments)
    with pytest.raises(fl.errors.FalllineError) as ours:
        getattr(fl.optim, name)(**arguments)
    assert isinstance(ours.value, theirs.type)
    argument, value = next(iter(arguments.items()))
    if argument not in ("betas", "nesterov", "momentum"):
        assert f"{argument} = {value!r}" in str(ours.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fl.optim.adam(betas=(0.9, 1.0)), r"beta2 = 1\.0 is outside \[0, 1\)"),
        (lambda: fl.optim.adam(betas=0.9), r"betas = 0\.9 is not a pair"),
        (lambda: fl.optim.adam(lr=float("inf")), "lr = inf is not finite"),
        (lambda: fl.optim.adam(lr=True), "lr = True is not a number"),
        (lambda: fl.optim.adam(amsgrad=1), "amsgrad = 1 is neither"),
        (lambda: fl.optim.sgd(nesterov="yes", momentum=0.9), "nesterov = 'yes' is neither"),
        (lambda: fl.optim.sgd(momentum=-0.5), r"momentum = -0\.5 is negative"),
        (lambda: fl.optim.sgd(nesterov=True), "nesterov=True needs momentum"),
        (lambda: fl.optim.lion(betas=(0.9, 0.99, 0.999)), "is not a pair"),
        (lambda: fl.optim.clip_by_global_norm(0.0), r"max_norm = 0\.0 is not above 0"),
        (lambda: fl.optim.sgd(learning_rate=0.1), "no argument 'learning_rate'"),
        (lambda: fl.optim.sgd(momentun=0.1), "no argument 'momentun'. Did you mean 'momentum'"),
        (lambda: fl.optim.negate(lr=0.1), "no argument 'lr'. It takes none"),
        (lambda: fl.optim.scale_by_learning_rate(), "missing a required argument: 'lr'"),
        (lambda: fl.optim.sgd(0.1, 0.2, 0.3, 0.4, True, True), "too many positional"),
        (lambda: fl.optim.sgd(lr=fl.grid([0.1, -0.1])), r"lr = -0\.1 is negative"),
        (lambda: fl.optim.adam(betas=(fl.uniform(0.5, 1.0), 0.9)), r"beta1 = 1\.0 is outside"),
    ],
)
def test_a_mistake_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_template_names_its_dimensions_and_cannot_be_run():
    lr, beta, end = fl.log_grid(0.1, 1.0, 3), fl.uniform(0.5, 0.9), fl.grid([0.0, 0.01])
    template = fl.optim.adam(lr=fl.schedules.cosine(lr, end=end), betas=(beta, 0.99))
    assert template.dimensions == {"lr": lr, "lr.end": end, "beta1": beta}
    p = {"w": torch.zeros(1)}
    for run in (lambda: template.init(p), lambda: template.as_torch([torch.zeros(1)])):
        with pytest.raises(fl.errors.InvalidHyperparameter, match=r"leaves lr, lr\.end, beta1 to be searched"):
            run()
    concrete = template.chosen({id(lr): 0.2, id(beta): 0.6, id(end): 0.01})
    assert concrete == fl.optim.adam(lr=fl.schedules.cosine(0.2, end=0.01), betas=(0.6, 0.99))
    assert concrete.dimensions == {}
    assert concrete.numbers["lr:end"] == 0.01
    concrete.init(p)


def test_dimensions_in_a_chain_are_told_apart():
    first, second = fl.grid([0.1, 0.2]), fl.grid([0.3])
    template = fl.optim.chain(fl.optim.trace(first), fl.optim.trace(second))
    assert template.dimensions == {"momentum": first, "momentum_2": second}
    assert template.chosen({id(first): 0.2, id(second): 0.3}).numbers == {"momentum": 0.2, "momentum_2": 0.3}


def test_one_dimension_in_two_places_stays_one():
    shared = fl.uniform(0.1, 0.5)
    template = fl.optim.adam(betas=(shared, shared))
    for again in (template, pickle.loads(pickle.dumps(template)), from_data(json.loads(json.dumps(to_data(template))))):
        assert again.dimensions["beta1"] is again.dimensions["beta2"]
    assert template.chosen({id(shared): 0.3}).numbers["beta2"] == 0.3


def test_two_equal_dimensions_stay_two():
    template = fl.optim.adam(betas=(fl.uniform(0.1, 0.5), fl.uniform(0.1, 0.5)))
    again = from_data(to_data(template))
    assert again.dimensions["beta1"] is not again.dimensions["beta2"]
    assert repr(again) == repr(template)
    assert eval(repr(template), {"fl": fl}).dimensions.keys() == {"beta1", "beta2"}


def test_options_pairs_and_schedules_can_be_searched():
    pairs, flags = fl.grid([(0.9, 0.99), [0.5, 0.6]]), fl.grid([True, False])
    template = fl.optim.adam(betas=pairs, amsgrad=flags)
    concrete = template.chosen({id(pairs): pairs.values[1], id(flags): True})
    assert concrete == fl.optim.adam(betas=(0.5, 0.6), amsgrad=True)
    assert from_data(json.loads(json.dumps(to_data(template)))).dimensions["betas"].values == pairs.values
    kinds = fl.grid([fl.schedules.cosine(0.1), fl.schedules.constant(0.1)])
    assert fl.optim.sgd(lr=kinds).chosen({id(kinds): kinds.values[0]}) == fl.optim.sgd(lr=fl.schedules.cosine(0.1))
    assert from_data(json.loads(json.dumps(to_data(kinds)))).values == kinds.values


@settings(deadline=None, derandomize=True)
@given(st.floats(1e-6, 1.0), st.floats(1.0001, 1e4), st.integers(2, 30))
def test_a_log_grid_has_equal_ratios_and_exact_ends(low, ratio, n):
    values = fl.log_grid(low, low * ratio, n).values
    assert (values[0], values[-1], len(values)) == (low, low * ratio, n)
    assert np.diff(np.log(values)) == pytest.approx(np.full(n - 1, np.log(ratio) / (n - 1)), rel=1e-4)


@settings(deadline=None, derandomize=True)
@given(st.floats(1e-6, 1.0), st.floats(1.0, 1e4), st.floats(0, 1), st.booleans())
def test_a_range_is_never_left(low, ratio, fraction, log):
    dimension = (fl.log_uniform if log else fl.uniform)(low, low * ratio)
    assert low <= dimension.at(fraction) <= low * ratio


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fl.grid([]), "no values"),
        (lambda: fl.grid([0.1, 0.1]), "twice"),
        (lambda: fl.grid([(1, 2), [1, 2]]), "twice"),
        (lambda: fl.grid([0.1, float("inf")]), "inf is not a finite"),
        (lambda: fl.grid(0.1), r"grid\(0\.1\) is not a list"),
        (lambda: fl.grid("abc"), "is not a list"),
        (lambda: fl.log_grid(0.0, 1.0, 3), r"low end 0\.0 is not above 0"),
        (lambda: fl.log_grid(1.0, 0.1, 3), "inverted"),
        (lambda: fl.log_grid(0.1, 1.0, 2.5), "n = 2.5"),
        (lambda: fl.log_grid(0.1, 1.0, 1), "two ends but one value"),
        (lambda: fl.log_grid(0.1, 0.1, 3), "same value 3 times"),
        (lambda: fl.uniform("a", 1.0), "'a' is not a finite"),
        (lambda: fl.uniform(1.0, 0.0), "inverted"),
        (lambda: fl.log_uniform(-1.0, 1.0), "not above 0"),
        (lambda: bool(fl.grid([1])), "no truth value"),
    ],
)
def test_a_mistaken_dimension_is_named(make, message):
    with pytest.raises(fl.errors.InvalidHyperparameter, match=message):
        make()


def test_values_of_numpy_and_torch_make_a_grid():
    assert fl.grid(np.array([0.5, 1.0])).values == fl.grid(torch.tensor([0.5, 1.0])).values == (0.5, 1.0)
    assert repr(fl.grid(np.array([[0.5, 1.0]]))) == "fl.grid([(0.5, 1.0)])"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("adam", fl.optim.adam()),
        ("sgd:momentum=0.9,nesterov=True", fl.optim.sgd(momentum=0.9, nesterov=True)),
        (" adam : betas=(0.8, 0.9) , eps=1e-6 ", fl.optim.adam(betas=(0.8, 0.9), eps=1e-6)),
        ("adam:betas=[0.8,0.9]", fl.optim.adam(betas=(0.8, 0.9))),
        ("sgd:", fl.optim.sgd()),
    ],
)
def test_text_names_an_optimizer(text, value):
    assert catalogue.parse(text) == value


def test_text_wins_over_defaults():
    assert catalogue.parse("sgd:lr=0.5", lr=0.1, momentum=0.9) == fl.optim.sgd(lr=0.5, momentum=0.9)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("adamm", "UnknownName", "no optimizer 'adamm'. Did you mean 'adam'"),
        ("", "UnknownName", "no optimizer ''"),
        ("sgd:momentun=0.9", "UnknownArgument", "Did you mean 'momentum'"),
        ("sgd:momentum", "UnknownArgument", "'momentum' in 'sgd:momentum' has no value"),
        ("sgd:lr=1,lr=2", "UnknownArgument", "'lr' is given twice"),
        ("sgd:lr=fast", "InvalidHyperparameter", "lr = 'fast' is not a number"),
        ("sgd:lr={[]:1}", "InvalidHyperparameter", "is not a number"),
        ("sgd:lr=-1", "InvalidHyperparameter", "lr = -1 is negative"),
        ("sgd:nesterov=true", "InvalidHyperparameter", "nesterov = 'true' is neither"),
        ("adam:betas=(0.9,0.99", "InvalidHyperparameter", "betas = '\\(0.9,0.99' is not a pair"),
    ],
)
def test_mistaken_text_is_named(text, kind, message):
    with pytest.raises(getattr(fl.errors, kind), match=message):
        catalogue.parse(text)


def test_the_catalogue_holds_every_named_optimizer():
    public = [name for name in fl.optim.__all__ if inspect.isfunction(getattr(fl.optim, name))]
    makers = {name for name in public if getattr(fl.optim, name).__annotations__.get("return") == "Optimizer"}
    makers |= {name for name in public if hasattr(getattr(fl.optim, name), "transform")}
    # What takes more than numbers and one other optimizer cannot be written on the command line.
    assert set(catalogue.CATALOGUE) == makers - {"chain", "partition", "from_torch"}
    assert len(makers) > 35
    for name, info in catalogue.CATALOGUE.items():
        assert info.make is getattr(fl.optim, name)
        assert not info.torch_name or hasattr(torch.optim, info.torch_name) or info.torch_name == "Muon"
        assert 1847 <= info.year <= 2026 or not info.paper
        grid = catalogue.learning_rate_grid(name, 5)
        assert isinstance(grid, dimensions.Dimension)
        assert (grid.values[0], grid.values[-1]) == info.learning_rates
        assert info.formula
        assert bool(info.paper) == (name not in {"accumulate", "skip_not_finite", "no_decay_on_vectors"})


def test_an_optimizer_around_another_is_parsed_from_inside_out():
    adamw, sgd = fl.optim.adamw, fl.optim.sgd
    assert catalogue.parse("cautious(adamw:betas=(0.8,0.9),lr=0.1)") == fl.optim.cautious(
        adamw(lr=0.1, betas=(0.8, 0.9))
    )
    assert catalogue.parse(" cautious( sgd ) ", lr=0.2) == fl.optim.cautious(sgd(lr=0.2))
    assert (
        catalogue.learning_rate_grid("cautious(sgd:momentum=0.9)").values == catalogue.learning_rate_grid("sgd").values
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cautious", r"write cautious\(adam\)"),
        ("adam(sgd)", "does not go around another"),
        ("cautious(adam", r"is not name\(optimizer\)"),
        ("cautious(adam)lr=1", r"is not name\(optimizer\)"),
        ("cautious(adamm)", "Did you mean 'adamw?'"),
        ("cautious(adam):k=3", "cautious.*no argument 'k'"),
    ],
)
def test_mistakes_around_another_optimizer_are_named(text, message):
    with pytest.raises(fl.errors.FalllineError, match=message):
        catalogue.parse(text)


def test_the_state_of_an_optimizer_is_counted():
    assert catalogue.state_of(fl.optim.sgd(lr=0.1)) == (0.0, ())
    assert catalogue.state_of(fl.optim.adam(amsgrad=True)) == (3.0, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
