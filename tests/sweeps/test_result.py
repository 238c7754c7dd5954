"""What a sweep returns, and what `load` reads back."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import fallline as fl
from fallline.errors import RunDirectoryError
from fallline.sweeps import reproduction
from small_sweep import STEPS, assert_same, small_sweep


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> fl.Result:
    return small_sweep(tmp_path_factory.mktemp("result") / "run", seeds=4)


def test_trials_say_what_each_was_and_how_it_ended(result: fl.Result):
    trials = result.trials
    assert trials.columns[:5] == ["trial", "configuration", "loss", "optimizer", "seed"]
    assert {"lr", "momentum", "status", "ended_at", "final_train_loss", "final_metric", "best_metric", "best_step",
            "final_validation_loss"} <= set(trials.columns)  # fmt: skip
    assert trials["trial"].to_list() == list(range(24))
    assert set(trials["status"]) == {"completed", "diverged"}
    assert trials.filter(optimizer="adam")["momentum"].null_count() == 12
    ended = trials.filter(status="completed")
    assert ended["ended_at"].unique().to_list() == [STEPS]
    rows = ended["trial"].to_numpy()
    np.testing.assert_array_equal(ended["final_metric"], result.history.metric[rows, -1])
    np.testing.assert_array_equal(ended["best_metric"], result.history.metric[rows].min(axis=1))
    np.testing.assert_array_equal(ended["final_train_loss"], result.history.train_loss[rows, -1].astype(float))
    for row in trials.filter(status="diverged").iter_rows(named=True):
        losses = result.history.train_loss[row["trial"]]
        assert not np.isfinite(losses[row["ended_at"]])
        assert np.isfinite(losses[: row["ended_at"]]).all()
        assert np.isnan(losses[row["ended_at"] + 1 :]).all()
        assert row["final_metric"] is None


def test_the_ranking_tunes_on_some_seeds_and_reports_on_the_others(result: fl.Result):
    ranking = result.ranking
    tuning, reporting = set(ranking.tuning_seeds), set(ranking.reporting_seeds)
    assert tuning
    assert reporting
    assert not tuning & reporting
    assert tuning | reporting == {0, 1, 2, 3}
    for entry in ranking:
        own = result.trials.filter(optimizer=entry.optimizer)
        mean = own.filter(pl.col("seed").is_in(list(tuning))).group_by("lr", maintain_order=True).agg(
            pl.col("final_metric").mean().alias("score"), pl.col("status").eq("completed").all().alias("all")
        )  # fmt: skip
        chosen = mean.filter("all").sort("score")["lr"][0]
        assert own["lr"][4 * entry.configuration] == chosen
        there = own.filter(pl.col("seed").is_in(list(reporting)) & (pl.col("lr") == chosen))["final_metric"]
        assert entry.mean == pytest.approx(there.mean())
    assert result.best.label == ranking[0].label
    assert result.best.settings["lr"] == result.trials.filter(trial=result.best.trial)["lr"].item()


def test_the_best_trials_parameters_are_kept(result: fl.Result):
    task = fl.tasks.diabetes().check()
    for _, own in result.trials.group_by("configuration"):
        kept = [t for t in own["trial"] if (result.path / "parameters" / f"{t:06d}.safetensors").exists()]
        ended = own.filter(status="completed").sort("final_metric")
        assert kept == ended["trial"].to_list()[:1]
        if kept:
            model = task.model().eval()
            model.load_state_dict(result.parameters(kept[0]))
            with torch.no_grad():
                metric = float(task.metric(model(task.validation.x), task.validation.y))
            assert metric == pytest.approx(ended["final_metric"][0], rel=1e-5)
    missing = result.trials.filter(status="diverged")["trial"][0]
    with pytest.raises(RunDirectoryError, match=f"trial {missing} were not kept.*keep_parameters='all'"):
        result.parameters(missing)


def test_all_parameters_are_kept_when_asked_for(tmp_path: Path):
    found = small_sweep(tmp_path / "run", keep_parameters="all")
    for trial in found.trials["trial"]:
        assert set(found.parameters(trial)) == set(fl.tasks.diabetes().model().state_dict())


def test_load_gives_what_sweep_gave(result: fl.Result):
    found = fl.load(result.path)
    assert_same(found, result)
    assert str(found) == str(result)
    assert found.spec == result.spec
    assert found.complete


def test_a_result_without_a_directory_takes_it_along_when_it_goes():
    found = small_sweep(None, steps=4)
    place = found.path
    assert place.exists()
    del found
    assert not place.parent.exists()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")  # which sophia needs
@pytest.mark.parametrize(
    "optimizer",
    [
        fl.optim.adam(lr=fl.grid([1e-3, 1e-2])),
        fl.optim.lion(lr=fl.grid([1e-4, 1e-3])),
        fl.optim.schedule_free_adamw(lr=1e-2),
        fl.optim.muon_with_adamw(lr=1e-2, adamw_for="4.*"),
        fl.optim.sam(fl.optim.sgd(lr=fl.grid([0.05, 0.1]))),
        fl.optim.sophia(lr=fl.schedules.cosine(1e-3)),
        fl.optim.nadam(lr=0.01, betas=(fl.schedules.linear(0.9, 0.5), 0.999)),
    ],
    ids=lambda optimizer: optimizer.name,
)
def test_the_winners_code_prints_the_metric_that_was_recorded(optimizer: fl.optim.Optimizer):
    found = fl.sweep(fl.tasks.digits(), optimizer, seeds=2, steps=80)
    recorded = found.trials.filter(trial=found.best.trial)["final_metric"].item()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(found.best.code, "code", "exec"), {})
    name, _, value = printed.getvalue().rpartition(":")
    assert name == "accuracy"
    assert float(value) == pytest.approx(recorded, abs=1e-6)


@fl.optim.rule
def half_step(g, p, *, lr=0.1):
    """p ← p − lr · g / 2."""
    return -lr * g / 2


def test_the_winners_code_imports_what_is_not_falllines():
    of_ones_own = fl.optim.cautious(half_step(lr=0.1))
    lines = reproduction.imports(fl.optim.chain(fl.optim.clip_by_global_norm(1.0), of_ones_own)).splitlines()
    assert lines == [f"from {__name__} import half_step"]
    assert reproduction.imports(fl.optim.from_torch(torch.optim.LBFGS, lr=0.1)) == ""
    assert reproduction.imports(fl.optim.muon_with_adamw(lr=0.1, adamw_for="head*")) == ""


def test_losses_are_compared_under_one_metric():
    found = fl.sweep(fl.tasks.diabetes(), fl.optim.adam(lr=0.01), ["mse", "huber", "l1"], seeds=2, steps=20)
    assert found.trials["loss"].n_unique() == 3
    assert len(found.ranking) == 3
    assert len({entry.label for entry in found.ranking}) == 3
    assert found.spec["task"]["metric"] == fl.tasks.diabetes().metric.name
    alone = fl.sweep(fl.tasks.diabetes(), fl.optim.adam(lr=0.01), ["l1"], seeds=2, steps=20)
    own = found.trials.filter(pl.col("loss").str.contains("l1"))["trial"].to_numpy()
    np.testing.assert_allclose(found.history.train_loss[own], alone.history.train_loss, rtol=1e-5)


def test_a_report_is_written_when_the_function_that_made_the_winner_is_gone(tmp_path, monkeypatch):
    fl.sweep(fl.tasks.line(), half_step(lr=0.01), seeds=2, steps=4, out=tmp_path / "run")
    found = fl.load(tmp_path / "run")
    monkeypatch.delitem(globals(), "half_step")
    assert "cannot be found any more" in found.reproduction_code()
    assert found.report(tmp_path / "report.html")
