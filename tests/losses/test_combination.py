"""Weighted sums of losses: exactly the sum, searchable, and refused where the parts want different things."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional

import fallline as fl
from fallline.description import item_name
from fallline.errors import InvalidHyperparameter, LossMismatch, UnknownName
from fallline.losses.base import Loss, Prediction, Target
from fallline.losses.binary import binary_cross_entropy_with_logits
from fallline.losses.catalogue import CATALOGUE
from fallline.losses.classification import cross_entropy
from fallline.losses.combination import PREDICTIONS, TARGETS, scaled, weighted_sum
from fallline.losses.regression import huber, l1, mse

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
DELTA = f"{item_name('losses', 1)}.delta"  # the name that the leaves of a call give to it


def pair(shape=(6, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64),
        torch.randn(shape, generator=generator, dtype=torch.float64),
    )


def classes(shape=(6, 4, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
    return logits, torch.where(torch.arange(shape[-1]) == 2, -100, labels) if len(shape) > 2 else labels


def made_up(name, prediction, target, kind="other", **more):
    """A loss that wants these meanings."""
    return Loss(name, kind, lambda p, t, numbers: ((p - t).square(), None), prediction, target, **more)


def gradient(loss, prediction, target):
    leaf = prediction.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, target), leaf)[0]


def test_the_value_and_gradient_are_the_weighted_sum_of_torchs():
    prediction, target = pair()
    loss = weighted_sum(losses=(mse(), huber(delta=0.5), l1(reduction="sum")), weights=(1.0, -0.3, 0.25))

    def torchs(prediction, target):
        return (
            functional.mse_loss(prediction, target)
            - 0.3 * functional.huber_loss(prediction, target, delta=0.5)
            + 0.25 * functional.l1_loss(prediction, target, reduction="sum")
        )

    torch.testing.assert_close(loss(prediction, target), torchs(prediction, target), **CLOSE)
    wanted = gradient(torchs, prediction, target)
    assert wanted.abs().min() > 1e-3
    torch.testing.assert_close(gradient(loss, prediction, target), wanted, **CLOSE)


def test_means_that_divide_by_different_weights_stay_what_they_are():
    logits, labels = classes()
    weight = torch.tensor([0.5, 1.0, 2.0, 7.0], dtype=torch.float64)
    loss = 2 * cross_entropy(weight=weight) + 0.5 * cross_entropy(label_smoothing=0.2, reduction="sum")
    expected = 2 * functional.cross_entropy(logits, labels, weight) + 0.5 * functional.cross_entropy(
        logits, labels, label_smoothing=0.2, reduction="sum"
    )
    torch.testing.assert_close(loss(logits, labels), expected, **CLOSE)
    values = loss.per_sample(logits, labels)
    assert values.shape == (6,)
    torch.testing.assert_close(values.mean(), expected, **CLOSE)
    # A sample's value: its part of the weighted mean, times the number of samples.
    each = functional.cross_entropy(logits, labels, weight, reduction="none").sum(1)
    smooth = functional.cross_entropy(logits, labels, label_smoothing=0.2, reduction="none").sum(1)
    share = 6 * each / (weight[labels.clamp(min=0)] * (labels >= 0)).sum()
    torch.testing.assert_close(values, 2 * share + 0.5 * 6 * smooth, **CLOSE)


def test_nothing_to_average_is_nothing():
    logits, labels = classes()
    loss = weighted_sum(losses=(cross_entropy(), cross_entropy(ignore_index=3)), weights=(1.0, 2.0))
    nothing = torch.full_like(labels, -100)
    partly = weighted_sum(losses=(cross_entropy(),), weights=(3.0,))
    assert partly(logits, nothing) == 0
    assert (gradient(partly, logits, nothing) == 0).all()
    kept = torch.where(labels < 0, 3, labels)
    expected = functional.cross_entropy(logits, kept) + 2 * functional.cross_entropy(logits, kept, ignore_index=3)
    torch.testing.assert_close(loss(logits, kept), expected, **CLOSE)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 2, 3)])
def test_the_mean_of_the_values_per_sample_is_the_loss(shape):
    prediction, target = pair(shape)
    loss = weighted_sum(losses=(mse(), l1(reduction="sum"), huber()), weights=(1.0, 0.1, -2.0))
    values = loss.per_sample(prediction, target)
    assert values.shape == (5,)
    assert values.std() > 1e-3
    torch.testing.assert_close(values.mean(), loss(prediction, target), **CLOSE)
    assert loss.reduction == "mean"


def test_a_sum_of_sums_is_a_sum():
    prediction, target = pair()
    loss = mse(reduction="sum") + 2 * l1(reduction="sum")
    assert loss.reduction == "sum"
    each = (prediction - target).square() + 2 * (prediction - target).abs()
    torch.testing.assert_close(loss(prediction, target), each.sum(), **CLOSE)
    torch.testing.assert_close(loss.per_sample(prediction, target), each.sum(1), **CLOSE)


def test_a_batchmean_counts_samples():
    prediction, target = pair()
    by_sample = made_up("by_sample", Prediction.REAL, Target.REAL, reduction="batchmean")
    loss = weighted_sum(losses=(by_sample, l1()), weights=(1.0, 1.0))
    each = (prediction - target).square().sum(1) + (prediction - target).abs().mean(1)
    torch.testing.assert_close(loss(prediction, target), each.mean(), **CLOSE)
    torch.testing.assert_close(loss.per_sample(prediction, target), each, **CLOSE)


def test_one_sample_without_a_batch():
    logits, labels = classes((6, 4))
    loss = cross_entropy() + 0.5 * scaled(cross_entropy(label_smoothing=0.3), 2.0)
    whole = vmap(loss)(logits, labels)
    torch.testing.assert_close(whole, loss.per_sample(logits, labels), **CLOSE)
    mixed = weighted_sum(losses=(cross_entropy(), Loss("size", "other", _size, Prediction.LOGITS)), weights=(1.0, 0.5))
    expected = torch.stack(
        [functional.cross_entropy(z, y) + 0.5 * z.square().mean() for z, y in zip(logits, labels, strict=True)]
    )
    torch.testing.assert_close(vmap(mixed)(logits, labels), expected, **CLOSE)


def test_one_sample_without_a_batch_in_sums():
    logits, labels = classes((6, 4))
    size = Loss("size", "other", _size, Prediction.LOGITS, reduction="sum")
    loss = weighted_sum(losses=(cross_entropy(reduction="sum"), size), weights=(1.0, 0.5))
    expected = functional.cross_entropy(logits[0], labels[0]) + 0.5 * logits[0].square().sum()
    torch.testing.assert_close(loss(logits[0], labels[0]), expected, **CLOSE)


def _size(prediction, target, numbers):
    return prediction.square(), None


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name != "weighted_sum"])
def test_every_loss_adds_up(name):
    info = CATALOGUE[name]
    prediction, target = info.example(torch.Generator().manual_seed(0))
    for arguments in info.valid:
        part = info.make(**arguments)
        loss = part + 0.5 * part
        expected = 1.5 * part(prediction, target)
        assert expected.abs() > 1e-6
        torch.testing.assert_close(loss(prediction, target), expected, **CLOSE)
        values = loss.per_sample(prediction, target)
        assert values.ndim == 1
        torch.testing.assert_close(values.sum() if loss.reduction == "sum" else values.mean(), expected, **CLOSE)
        assert (loss.prediction, loss.target, loss.kind) == (part.prediction, part.target, part.kind)


def test_the_sums_that_people_train_with():
    logits, labels = classes((6, 4, 5))
    labels = labels.clamp(min=0)
    dice, focal = fl.losses.get("dice")(), fl.losses.get("focal")(gamma=2.0)
    loss = cross_entropy() + 0.5 * dice + 0.1 * focal
    expected = functional.cross_entropy(logits, labels) + 0.5 * dice(logits, labels) + 0.1 * focal(logits, labels)
    torch.testing.assert_close(loss(logits, labels), expected, **CLOSE)
    assert f"{item_name('losses', 2)}.gamma" in loss.numbers
    mask = (labels > 1).double()
    loss = binary_cross_entropy_with_logits() + dice
    expected = functional.binary_cross_entropy_with_logits(logits[:, 0], mask) + dice(logits[:, 0], mask)
    torch.testing.assert_close(loss(logits[:, 0], mask), expected, **CLOSE)
    assert (loss.prediction, loss.target, loss.kind) == (Prediction.YES_LOGITS, Target.YES_NO, "binary")
    gaussian, beta, crps = (fl.losses.get(each)() for each in ("gaussian_nll", "beta_nll", "crps"))
    assert (gaussian + beta).estimate is gaussian.estimate
    assert weighted_sum(losses=(nn.GaussianNLLLoss(), gaussian), weights=(1.0, 1.0)).kind == "regression"
    for different in (crps, fl.losses.get("gaussian_nll")(log_variance=True)):
        with pytest.raises(LossMismatch, match="parameters of different"):
            gaussian + different


def test_sums_of_different_losses_are_not_computed_together():
    first = weighted_sum(losses=(mse(), l1()), weights=(1.0, 2.0))
    assert first.structure == weighted_sum(losses=(mse(), l1()), weights=(1.0, 3.0)).structure
    assert first.structure != weighted_sum(losses=(l1(), mse()), weights=(1.0, 2.0)).structure


@given(
    st.lists(st.tuples(st.sampled_from(["mse", "l1", "huber"]), st.floats(-3, 3)), min_size=1, max_size=4),
    st.integers(1, 4),
    st.floats(-2, 2),
)
@settings(max_examples=40, deadline=None)
def test_plus_and_times_are_those_of_numbers(parts, samples, factor):
    prediction, target = pair((samples, 2))
    loss, expected = None, 0.0
    for name, weight in parts:
        part = fl.losses.get(name)()
        loss = weight * part if loss is None else loss + part * weight
        expected = expected + weight * part(prediction, target)
    torch.testing.assert_close(loss(prediction, target), expected, **CLOSE)
    torch.testing.assert_close((factor * loss)(prediction, target), factor * expected, **CLOSE)
    assert len(loss.arguments_of_call["losses"]) == len(parts), "it is flat"


def test_it_is_written_as_the_call_that_makes_it():
    loss = mse() + 0.5 * huber(delta=2.0)
    assert repr(loss) == (
        "fl.losses.weighted_sum(losses=(fl.losses.mse(), fl.losses.huber(delta=2.0)), weights=(1.0, 0.5))"
    )
    assert loss.code() == repr(loss)
    assert loss == weighted_sum(losses=[mse(), huber(delta=2.0)], weights=[1.0, 0.5])
    assert loss != weighted_sum(losses=(mse(), huber(delta=1.0)), weights=(1.0, 0.5))
    assert pickle.loads(pickle.dumps(loss)) == loss
    assert repr(mse() + l1() + (mse() + l1()) * 2).count("weighted_sum") == 1
    assert (mse() + l1()) * 2 == weighted_sum(losses=(mse(), l1()), weights=(2.0, 2.0))


def test_numbers_are_the_weights_and_those_of_the_parts():
    loss = mse() + 0.5 * huber(delta=2.0)
    assert loss.numbers == {"weight1": 1.0, "weight2": 0.5, DELTA: 2.0}
    nested = weighted_sum(losses=(l1(), loss), weights=(1.0, 3.0))
    prefix = item_name("losses", 1)
    assert nested.numbers == {
        "weight1": 1.0,
        "weight2": 3.0,
        f"{prefix}.weight1": 1.0,
        f"{prefix}.weight2": 0.5,
        f"{prefix}.{DELTA}": 2.0,
    }
    names = {name for name, _ in fl.description.leaves(nested.call)}
    assert nested.numbers.keys() <= names, "the names by which a sweep knows them"
    by_name = weighted_sum(losses=("huber", mse()), weights=(2.0, 1.0))
    assert by_name.numbers.keys() == {"weight1", "weight2"}
    torch.testing.assert_close(by_name(*pair()), (2 * huber() + mse())(*pair()), **CLOSE)


def test_each_trial_has_its_own_weights_and_numbers():
    prediction, target = pair()
    nested = weighted_sum(losses=(l1(), mse() + 0.5 * huber(delta=2.0)), weights=(1.0, 3.0))
    inner = f"{item_name('losses', 1)}.{DELTA}"
    rows = {"weight1": [0.1, -2.0, 0.0], inner: [0.3, 0.7, 1.5]}
    numbers = {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}

    def at(prediction, numbers):
        return nested(prediction, target, numbers=numbers)

    values = vmap(at, in_dims=(None, 0))(prediction, numbers)
    slopes = vmap(grad(at), in_dims=(None, 0))(prediction, numbers)
    for row in range(3):
        weight, delta = rows["weight1"][row], rows[inner][row]
        alone = weighted_sum(losses=(l1(), mse() + 0.5 * huber(delta=delta)), weights=(weight, 3.0))
        torch.testing.assert_close(values[row], alone(prediction, target), **CLOSE)
        torch.testing.assert_close(slopes[row], gradient(alone, prediction, target), **CLOSE)
        assert alone.structure == nested.structure


def test_dimensions_may_be_weights_and_numbers_of_parts():
    weight, delta = fl.log_grid(0.1, 1.0, 2), fl.grid([0.5, 1.0])
    template = mse() + weight * huber(delta=delta)
    assert template.dimensions == {"weight2": weight, DELTA: delta}
    with pytest.raises(InvalidHyperparameter, match="weight2"):
        template(*pair())
    chosen = template.chosen({id(weight): 0.1, id(delta): 0.5})
    assert chosen == mse() + 0.1 * huber(delta=0.5)
    half = 0.5 * template
    prediction, target = pair()
    expected = 0.5 * chosen(prediction, target)
    torch.testing.assert_close(half.chosen({id(weight): 0.1, id(delta): 0.5})(prediction, target), expected, **CLOSE)
    both = fl.grid([2.0, 3.0]) * (mse() + l1())
    dimension = next(iter(both.dimensions.values()))
    value = both.chosen({id(dimension): 3.0})(prediction, target)
    torch.testing.assert_close(value, 3 * (mse() + l1())(prediction, target), **CLOSE)
    assert list((fl.grid([2.0, 3.0]) * mse()).dimensions) == ["weight1"]


def largest(prediction, target):
    return (prediction - target).abs().max()


def test_any_callable_is_called_as_it_is():
    prediction, target = pair()
    module = nn.SmoothL1Loss(beta=0.3)
    loss = weighted_sum(losses=(module, largest, "mse", l1(reduction="sum")), weights=(2.0, 0.5, 1.0, 0.1))
    expected = (
        2 * module(prediction, target)
        + 0.5 * largest(prediction, target)
        + functional.mse_loss(prediction, target)
        + 0.1 * functional.l1_loss(prediction, target, reduction="sum")
    )
    torch.testing.assert_close(loss(prediction, target), expected, **CLOSE)
    with pytest.raises(LossMismatch, match="per sample"):
        loss.per_sample(prediction, target)
    assert loss.kind == "regression"
    assert "SmoothL1Loss" in loss.code()
    assert "fl.losses.mse()" in loss.code()
    known = weighted_sum(losses=(nn.MSELoss(), nn.L1Loss()), weights=(1.0, 2.0))
    torch.testing.assert_close(known.per_sample(prediction, target).mean(), known(prediction, target), **CLOSE)
    for written in (known, weighted_sum(losses=(nn.MSELoss(),), weights=(2.0,))):
        again = eval(written.code(), {"fl": fl, "torch": torch})
        assert again(prediction, target) == written(prediction, target)
    assert fl.losses.as_loss(largest) + mse() == weighted_sum(
        losses=(fl.losses.as_loss(largest), mse()), weights=(1.0, 1.0)
    )


@pytest.mark.parametrize(
    ("losses", "weights", "message"),
    [
        ((), (), "one or more"),
        (mse(), (1.0,), "in a tuple"),
        ("mse", (1.0,), "in a tuple"),
        ((mse(), l1()), (1.0,), "a number for each of 2 losses"),
        ((mse(), l1()), 1.0, "a number for each of 2 losses"),
        ((mse(),), (float("nan"),), "weight1=nan"),
        ((mse(), l1()), (1.0, float("inf")), "weight2=inf"),
        ((mse(),), (True,), "weight1=True"),
        ((mse(),), ("1",), "weight1='1'"),
    ],
)
def test_weights_must_be_numbers_one_for_each_loss(losses, weights, message):
    with pytest.raises(InvalidHyperparameter, match=message):
        weighted_sum(losses=losses, weights=weights)


def test_what_is_no_loss_is_refused():
    with pytest.raises(UnknownName, match="mze"):
        weighted_sum(losses=("mze",), weights=(1.0,))
    with pytest.raises(LossMismatch, match="reduction='none'"):
        weighted_sum(losses=(mse(), l1(reduction="none")), weights=(1.0, 1.0))
    for factor in (float("nan"), float("inf"), True):
        with pytest.raises(InvalidHyperparameter, match="multiplied"):
            scaled(mse(), factor)
    for wrong in ("2", None, mse()):
        with pytest.raises(TypeError):
            wrong * mse()
    with pytest.raises(TypeError):
        mse() + 1.0


def test_losses_that_want_different_things_are_refused():
    with pytest.raises(LossMismatch, match="mse wants real values, cross_entropy wants logits"):
        mse() + cross_entropy()
    probabilities = made_up("on_probabilities", Prediction.PROBABILITIES, Target.FRACTIONS)
    with pytest.raises(LossMismatch, match="share a prediction"):
        binary_cross_entropy_with_logits() + probabilities
    signs = made_up("hinge", Prediction.SCORES, Target.SIGNS)
    with pytest.raises(LossMismatch, match="share a target"):
        signs + made_up("other", Prediction.SCORES, Target.YES_NO)
    overlap = made_up("dice", Prediction.LOGITS, Target.CLASSES_OR_YES_NO)
    with pytest.raises(LossMismatch, match="share a prediction"):
        cross_entropy() + overlap + binary_cross_entropy_with_logits()


@pytest.mark.parametrize(
    ("parts", "prediction", "target", "kind"),
    [
        ((mse(), l1()), Prediction.REAL, Target.REAL, "regression"),
        (
            (made_up("dice", Prediction.LOGITS, Target.CLASSES_OR_YES_NO), cross_entropy()),
            Prediction.LOGITS,
            Target.CLASSES,
            "classification",
        ),
        (
            (
                made_up("focal", Prediction.LOGITS, Target.CLASSES_OR_YES_NO, "classification"),
                binary_cross_entropy_with_logits(),
            ),
            Prediction.YES_LOGITS,
            Target.YES_NO,
            "binary",
        ),
        (
            (made_up("dice", Prediction.LOGITS, Target.CLASSES_OR_YES_NO),) * 2,
            Prediction.LOGITS,
            Target.CLASSES_OR_YES_NO,
            "other",
        ),
        (
            (mse(), made_up("bce", Prediction.PROBABILITIES, Target.FRACTIONS, "binary")),
            Prediction.PROBABILITIES,
            Target.FRACTIONS,
            "binary",
        ),
        (
            (mse(), made_up("tweedie", Prediction.POSITIVE, Target.NOT_NEGATIVE)),
            Prediction.POSITIVE,
            Target.NOT_NEGATIVE,
            "regression",
        ),
        (
            (made_up("margin", Prediction.CLASS_SCORES, Target.CLASSES, "classification"), cross_entropy()),
            Prediction.LOGITS,
            Target.CLASSES,
            "classification",
        ),
        ((mse(), made_up("any", Prediction.ANYTHING, Target.NOTHING)), Prediction.REAL, Target.REAL, "regression"),
        (
            (made_up("a", Prediction.EMBEDDINGS, Target.NOTHING), made_up("b", Prediction.EMBEDDINGS, Target.NOTHING)),
            Prediction.EMBEDDINGS,
            Target.NOTHING,
            "other",
        ),
        (
            (made_up("a", Prediction.ANYTHING, Target.ANYTHING), made_up("b", Prediction.REAL, Target.NOTHING)),
            Prediction.REAL,
            Target.ANYTHING,
            "other",
        ),
    ],
    ids=lambda value: "+".join(part.name for part in value) if isinstance(value, tuple) else str(value),
)
def test_a_sum_wants_what_all_its_parts_are_content_with(parts, prediction, target, kind):
    for order in (parts, parts[::-1]):
        loss = weighted_sum(losses=order, weights=(1.0,) * len(parts))
        assert (loss.prediction, loss.target, loss.kind) == (prediction, target, kind)


def test_estimates_and_shapes_are_those_of_the_part_that_knows_most():
    def exponential(prediction):
        return prediction.exp()

    rates = made_up("poisson", Prediction.LOG_RATES, Target.COUNTS, estimate=exponential, shapes=("[N, …]", "[N, …]"))
    anything = fl.losses.as_loss(largest)
    loss = weighted_sum(losses=(anything, rates), weights=(1.0, 1.0))
    assert loss.estimate is exponential
    assert loss.shapes == rates.shapes
    assert (mse() + l1()).estimate is None


def test_distributions_in_different_parameters_are_refused():
    gaussian = made_up("gaussian_nll", Prediction.DISTRIBUTION, Target.REAL)
    beta = made_up("beta_nll", Prediction.DISTRIBUTION, Target.REAL)
    evidential = made_up("evidential", Prediction.DISTRIBUTION, Target.REAL)
    assert weighted_sum(losses=(gaussian, beta), weights=(1.0, 1.0)).prediction == Prediction.DISTRIBUTION
    with pytest.raises(
        LossMismatch, match=r"gaussian_nll \(mean and variance\) and evidential \(those of evidential\)"
    ):
        gaussian + evidential
    with pytest.raises(LossMismatch, match="parameters of different"):
        weighted_sum(losses=(weighted_sum(losses=(gaussian,), weights=(1.0,)), evidential), weights=(1.0, 1.0))
    nested = weighted_sum(losses=(gaussian + beta, beta), weights=(1.0, 1.0))
    assert nested.prediction == Prediction.DISTRIBUTION


def test_the_tables_of_meanings_are_closed():
    """What a special case of a special case is, is one."""
    for table in (PREDICTIONS, TARGETS):
        for meaning, others in table.items():
            if meaning.value in ("anything", "nothing"):
                continue
            assert meaning not in others
            for other in others:
                assert table.get(other, frozenset()) <= others
