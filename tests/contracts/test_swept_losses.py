"""A loss with searched numbers: every trial is what it is alone, in every engine, and the ranking tunes the numbers."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from torch import nn

import fallline as fl
from fallline.errors import InvalidSweep
from fallline.losses.catalogue import CATALOGUE
from fallline.sweeps import packs, search
from small_sweep import assert_same

STEPS = 40
RATES = fl.grid([0.01, 0.05])


def task(dtype=torch.float64) -> fl.Task:
    """Digits in double precision, so that engines agree to the last digits."""
    digits = fl.tasks.digits()
    x, y, xv, yv = (t[:300] for t in (digits.train.x, digits.train.y, digits.validation.x, digits.validation.y))

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).to(dtype)

    return fl.Task("small digits", model, (x.to(dtype), y), "cross_entropy", validation=(xv.to(dtype), yv))


def swept(engine: str, losses, optimizers=None, **settings) -> fl.Result:
    asked = {"seeds": 2, "steps": STEPS, "workers": 1, "progress": False, "engine": engine}
    optimizers = optimizers or [fl.optim.sgd(lr=RATES, momentum=0.9), fl.optim.adam(lr=RATES)]
    return fl.sweep(task(), optimizers, losses, **{**asked, **settings})


class Table(nn.Module):
    """Predictions that are parameters: x [N] are the numbers of the rows to be looked up."""

    def __init__(self, prediction) -> None:
        super().__init__()
        self.several = isinstance(prediction, tuple)
        parts = prediction if self.several else (prediction,)
        self.floating = [part.is_floating_point() for part in parts]
        self.rows = [len(part) == len(parts[0]) for part in parts]
        self.table = nn.ParameterList([part.clone() for part in parts if part.is_floating_point()])
        for i, part in enumerate(part for part in parts if not part.is_floating_point()):
            self.register_buffer(f"fixed{i}", part)

    def forward(self, x):
        tables = iter(self.table)
        fixed = iter(self.buffers())
        parts = tuple(next(tables if floating else fixed) for floating in self.floating)
        parts = tuple(part[x] if rows else part for part, rows in zip(parts, self.rows, strict=True))
        return parts if self.several else parts[0]


@pytest.mark.parametrize("info", [pytest.param(info, id=info.name) for info in CATALOGUE.values()])
def test_every_loss_trains_in_both_engines(info):
    prediction, target = info.example(torch.Generator().manual_seed(0))
    count = len(prediction[0] if isinstance(prediction, tuple) else prediction)
    y = torch.zeros(count) if target is None else target[0] if isinstance(target, tuple) else target
    made = fl.Task(
        "table", lambda: Table(prediction), (torch.arange(count), y), info.make(**info.valid[0]), "train",
        metric=lambda p, t: (p[0] if isinstance(p, tuple) else p).mean(), batch_size=8,
    )  # fmt: skip
    searched = {n: fl.grid(list(v)) for n, v in info.sweeps.items() if n in inspect.signature(info.make).parameters}
    loss = info.make(**{**info.valid[0], **dict(list(searched.items())[:1])})
    rule = [fl.optim.sgd(lr=fl.grid([0.01, 0.1]))]
    asked = {"seeds": 2, "steps": 3, "workers": 1, "progress": False}
    together, alone = (fl.sweep(made, rule, [loss], engine=e, **asked) for e in ("vectorised", "sequential"))
    assert np.isfinite(alone.history.train_loss).all()
    assert len(set(alone.history.train_loss[:, 2].round(9).tolist())) > 1, "trials that are all alike prove nothing"
    np.testing.assert_allclose(together.history.train_loss, alone.history.train_loss, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(together.history.validation_loss, alone.history.validation_loss, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ["vectorised", "sequential"])
def test_every_trial_is_its_own_run(engine):
    smoothing = fl.losses.cross_entropy(label_smoothing=fl.grid([0.0, 0.1, 0.5]))
    result = swept(engine, [smoothing, fl.losses.cross_entropy(weight=[1.0] * 9 + [5.0])])
    assert result.trials.height == (3 + 1) * 4 * 2
    assert (result.trials["status"] == "completed").all()
    finals = []
    for row in result.trials.filter(result.trials["seed"] == 1).iter_rows(named=True):
        loss = fl.losses.cross_entropy(label_smoothing=row["loss.label_smoothing"])
        if "weight" in row["loss"]:
            loss = fl.losses.cross_entropy(weight=[1.0] * 9 + [5.0])
        rule = fl.optim.adam(lr=row["lr"]) if row["optimizer"] == "adam" else fl.optim.sgd(lr=row["lr"], momentum=0.9)
        run = fl.fit(task(), rule, loss=loss, steps=STEPS, seed=1, progress=False)
        np.testing.assert_allclose(result.history.train_loss[row["trial"]], run.history.train_loss, rtol=1e-9)
        np.testing.assert_allclose(row["final_validation_loss"], run.history.validation_loss[-1], rtol=1e-9)
        finals.append(run.history.train_loss[-1])
    assert len({round(final, 6) for final in finals}) == len(finals), "trials that are all alike would prove nothing"


def test_an_optimizer_that_looks_around_sees_the_trials_own_loss():
    losses = [fl.losses.cross_entropy(label_smoothing=fl.grid([0.0, 0.4]))]
    rule = fl.optim.sam(fl.optim.sgd(lr=0.05), rho=0.2)
    both = [swept(engine, losses, [rule]) for engine in ("vectorised", "sequential")]
    np.testing.assert_allclose(both[0].history.train_loss, both[1].history.train_loss, rtol=1e-9)
    assert abs(both[0].history.train_loss[0] - both[0].history.train_loss[2]).max() > 0.1


def test_a_traced_step_reads_the_numbers_of_its_pack(monkeypatch):
    losses = [fl.losses.cross_entropy(label_smoothing=fl.grid([0.0, 0.1, 0.3, 0.5]))]
    plain = swept("vectorised", losses)
    monkeypatch.setattr("fallline.sweeps.workers.WORTH_A_PROCESS", 0)
    monkeypatch.setattr("fallline.sweeps.calibration.WORTH_PROCESSES", 0)
    monkeypatch.setattr("fallline.sweeps.calibration.WORTH_TRACING", 0)
    speeds = {"mapped": 2.0, "traced": 1.0}
    monkeypatch.setattr("fallline.sweeps.calibration._measured", lambda ahead, course: speeds[course.execution])
    monkeypatch.setitem(packs.LARGEST_PACK, "cpu", 8)
    traced = swept("vectorised", losses)
    assert traced.spec["course"]["execution"] == "traced"
    np.testing.assert_allclose(traced.history.train_loss, plain.history.train_loss, rtol=1e-9)


def test_losses_that_differ_in_numbers_train_in_one_pack():
    losses = [fl.losses.cross_entropy(label_smoothing=fl.grid([0.0, 0.1])), fl.losses.cross_entropy(ignore_index=3)]
    chosen = search.configurations([fl.optim.adam(lr=RATES)], losses, samples=1, search_seed=0)
    plans = search.trials(chosen, [0])
    planned = packs.make_packs(plans, engine="vectorised", largest=64, workers=1)
    assert [len(pack.trials) for pack in planned] == [4, 2]


def test_the_ranking_tunes_the_loss_and_the_winner_can_be_repeated(tmp_path):
    loss = fl.losses.cross_entropy(label_smoothing=fl.grid([0.0, 0.9]))
    result = swept("auto", [loss], seeds=4, out=tmp_path / "run")
    assert [entry.optimizer for entry in result.ranking] != []
    assert set(result.ranking[0].setting) == {"lr", "loss.label_smoothing"}
    best = result.best
    assert best.settings.keys() == {"lr", "loss.label_smoothing"}
    smoothing = best.settings["loss.label_smoothing"]
    assert (f"label_smoothing={smoothing}" in best.code) is (smoothing > 0)
    assert "loss.label_smoothing" in result.trials.columns
    assert "label_smoothing" in result.report().read_text()
    assert str(fl.load(tmp_path / "run").best.settings) == str(best.settings)


def test_a_sweep_of_losses_goes_on_where_it_stopped(tmp_path):
    losses = [fl.losses.cross_entropy(label_smoothing=fl.grid([0.0, 0.2])), "cross_entropy:label_smoothing=0.5"]
    whole = swept("auto", losses, out=tmp_path / "whole", keep_parameters="all")
    again = swept("auto", losses, out=tmp_path / "whole", keep_parameters="all", resume=True)
    assert_same(again, whole)
    with pytest.raises(fl.errors.RunDirectoryError, match="losses"):
        swept("auto", losses[:1], out=tmp_path / "whole", keep_parameters="all", resume=True)


def test_two_losses_of_one_name_are_told_apart():
    first, second = (
        (lambda p, t: nn.functional.cross_entropy(p, t)),
        (lambda p, t: 2 * nn.functional.cross_entropy(p, t)),
    )
    digits = task()
    digits = fl.Task("digits", digits.model, digits.train, "cross_entropy", validation=digits.validation)
    result = fl.sweep(digits, [fl.optim.sgd(lr=0.05)], [first, second], seeds=1, steps=5, workers=1, progress=False)
    assert result.trials["loss"].to_list() == ["lambda", "lambda (2)"]
    np.testing.assert_allclose(2 * result.history.train_loss[0, 0], result.history.train_loss[1, 0])


def test_numbers_of_a_loss_cannot_be_chosen_by_its_own_value():
    made = task()
    mine = fl.Task("mine", made.model, made.train, lambda p, t: nn.functional.cross_entropy(p, t), made.validation)
    losses = [fl.losses.cross_entropy(label_smoothing=fl.grid([0.0, 0.9]))]
    with pytest.raises(InvalidSweep, match="give the task a metric"):
        fl.sweep(mine, [fl.optim.sgd(lr=0.05)], losses, seeds=1, steps=5, progress=False)


def test_ranges_of_a_loss_are_drawn():
    loss = fl.losses.cross_entropy(label_smoothing=fl.uniform(0.0, 0.5))
    result = swept("auto", [loss], [fl.optim.sgd(lr=0.05)], samples=4, seeds=1)
    drawn = result.trials["loss.label_smoothing"].to_list()
    assert len(set(drawn)) == 4
    assert all(0 <= value <= 0.5 for value in drawn)


def test_losses_of_another_structure_are_not_computed_together():
    mse, l1, quantile = fl.losses.mse(), fl.losses.l1(), fl.losses.quantile
    assert (mse + l1).structure != (l1 + mse).structure
    assert (mse + l1).structure == (mse + 0.5 * l1).structure
    assert quantile().structure != quantile(quantiles=(0.1, 0.5, 0.9)).structure
    assert quantile(quantiles=(0.2, 0.5)).structure == quantile(quantiles=(0.1, 0.5)).structure
    assert fl.losses.huber(reduction="sum").structure != fl.losses.huber().structure
    assert mse.structure != l1.structure
