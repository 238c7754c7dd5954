"""From search dimensions to configurations: grids crossed, ranges sampled, names unique."""

from __future__ import annotations

import itertools

import pytest

import fallline as fl
from fallline.errors import InvalidHyperparameter, InvalidSweep
from fallline.losses import as_loss
from fallline.sweeps.search import configurations, labels, trials

MSE = as_loss("mse")


def settings(optimizer: fl.optim.Optimizer, samples: int = 8, search_seed: int = 0) -> list[dict[str, object]]:
    return [c.settings for c in configurations([optimizer], [MSE], samples=samples, search_seed=search_seed)]


def test_grids_are_crossed():
    lrs, decays = [0.1, 0.2, 0.3], [0.1, 0.2]
    found = settings(fl.optim.adam(lr=fl.grid(lrs), weight_decay=fl.grid(decays)))
    pairs = [(each["lr"], each["weight_decay"]) for each in found]
    assert sorted(pairs) == sorted(itertools.product(lrs, decays))


def test_equal_grids_in_two_places_are_crossed_and_the_same_one_moves_together():
    assert len(settings(fl.optim.adam(lr=fl.grid([0.1, 0.2]), weight_decay=fl.grid([0.1, 0.2])))) == 4
    one = fl.grid([0.1, 0.2])
    found = settings(fl.optim.adam(lr=one, weight_decay=one))
    assert found == [{"lr": 0.1, "weight_decay": 0.1}, {"lr": 0.2, "weight_decay": 0.2}]


def test_ranges_are_sampled_inside_their_ends_and_the_same_every_time():
    optimizer = fl.optim.sgd(lr=fl.log_uniform(1e-4, 1.0), momentum=fl.uniform(0.0, 0.9))
    found = settings(optimizer, samples=11)
    assert len(found) == 11
    assert len({each["lr"] for each in found}) == 11
    assert all(1e-4 <= each["lr"] <= 1.0 and 0 <= each["momentum"] <= 0.9 for each in found)
    assert sum(each["lr"] < 1e-2 for each in found) in (5, 6)  # spread evenly in the logarithm
    assert found == settings(optimizer, samples=11)
    assert found != settings(optimizer, samples=11, search_seed=1)


def test_ranges_are_crossed_with_grids_and_reach_the_optimizer():
    optimizer = fl.optim.sgd(lr=fl.log_uniform(1e-4, 1.0), momentum=fl.grid([0.0, 0.9]))
    found = configurations([optimizer], [MSE], samples=4, search_seed=0)
    assert len(found) == 8
    for each in found:
        assert each.optimizer.arguments["lr"] == each.settings["lr"]
        assert each.optimizer.arguments["momentum"] == each.settings["momentum"]
        assert not each.optimizer.dimensions


@pytest.mark.parametrize("samples", [0, -1, 2.5, True])
def test_a_number_of_samples_that_is_none_is_refused(samples: object):
    with pytest.raises(InvalidSweep, match="samples"):
        settings(fl.optim.sgd(lr=fl.log_uniform(0.1, 1.0)), samples=samples)  # type: ignore[arg-type]


def test_a_learning_rate_of_0_is_refused():
    with pytest.raises(InvalidHyperparameter, match="lr"):
        settings(fl.optim.sgd(lr=fl.grid([0.0, 0.1])))


def test_labels_are_unique_and_say_what_differs():
    o = fl.optim
    given = [o.sgd(lr=0.1), o.sgd(lr=0.2), o.sgd(lr=0.1, momentum=0.9), o.sgd(lr=0.1, momentum=0.9, nesterov=True),
             o.adam(betas=(0.8, 0.9)), o.sgd(lr=fl.schedules.cosine(0.1)), o.sgd(lr=0.3)]  # fmt: skip
    found = labels(given)
    assert len(set(found)) == len(given)
    assert found[:4] == ["sgd", "sgd (2)", "sgd momentum=0.9", "sgd momentum=0.9 nesterov=True"]
    assert "0.8" in found[4]
    assert found[5] != "sgd"


def by_length(name, parameter):
    return "long" if parameter.numel() > 10 else "short"


def test_labels_of_optimizers_around_others_tell_what_differs_inside():
    o, lr = fl.optim, fl.grid([0.1, 0.2])
    given = [
        o.cautious(o.adamw(lr=lr)),
        o.cautious(o.adamw(lr=lr, weight_decay=0.1)),
        o.lookahead(o.cautious(o.lion(lr=lr)), k=fl.grid([5, 10]), alpha=0.8),
        o.lookahead(o.chain(o.clip_by_global_norm(1.0), o.sgd(lr=lr))),
        o.lookahead(o.trace(0.9)),
        o.accumulate(o.sgd(lr=fl.schedules.constant(0.1)), every=4),
        o.partition(o.by_shape(), {"matrices": o.adamw(lr=lr, eps=1e-6), "vectors": o.sgd(lr=lr)}),
        o.partition(by_length, {"long": o.adamw(), "short": o.sgd()}),
        o.muon_with_adamw(lr=lr),
        o.muon_with_adamw(lr=lr, adamw_lr=0.5),
    ]
    assert labels(given) == [
        "cautious(adamw)",
        "cautious(adamw weight_decay=0.1)",
        "lookahead(cautious(lion)) alpha=0.8",
        "lookahead(clip_by_global_norm + scale_by_learning_rate)",
        "lookahead(trace momentum=0.9)",
        "accumulate(sgd lr constant) every=4",
        "partition(matrices: adamw eps=1e-06, vectors: sgd) label=by_shape()",
        "partition(long: adamw, short: sgd) label=by_length",
        "muon_with_adamw",
        "muon_with_adamw adamw_lr=0.5",
    ]


def test_trials_are_every_configuration_with_every_seed():
    chosen = configurations([fl.optim.sgd(lr=fl.grid([0.1, 0.2]))], [MSE, as_loss("l1")], samples=1, search_seed=0)
    plans = trials(chosen, [3, 5])
    assert [plan.index for plan in plans] == list(range(8))
    assert [(plan.configuration.loss.name, plan.configuration.settings["lr"], plan.seed) for plan in plans] == list(
        itertools.product(["mse", "l1"], [0.1, 0.2], [3, 5])
    )
