"""What the charts draw equals what the trials say, computed here a second time by other means."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from fallline.reports import charts, curves, reading, style


def tables(chart: charts.Chart) -> dict[str, list[dict]]:
    return chart.spec["datasets"]


@pytest.fixture(scope="module")
def drawn(result) -> dict[str, charts.Chart]:
    return {chart.name: chart for chart in charts.charts(result)}


def test_an_ordinary_sweep_has_these_charts(drawn) -> None:
    assert list(drawn) == ["sensitivity-lr", "room", "training-loss", "validation-metric"]


def test_the_sensitivity_chart_shows_the_means_over_seeds_of_the_trials(result, drawn) -> None:
    rows = tables(drawn["sensitivity-lr"])["rows"]
    seen = set()
    for row in rows:
        scores = [
            trial["final_metric"]
            for trial in result.trials.iter_rows(named=True)
            if (trial["optimizer"], trial["lr"], trial["status"]) == (row["optimizer"], row["x"], "completed")
        ]
        assert row["finished"] == len(scores) > 0
        assert row["seeds"] == 10
        assert row["mean"] == pytest.approx(sum(scores) / len(scores), rel=1e-4)
        assert (row["low"], row["high"]) == pytest.approx((min(scores), max(scores)), rel=1e-4)
        seen.add((row["optimizer"], row["x"]))
    finished = result.trials.filter(result.trials["status"] == "completed")
    assert seen == set(finished.select("optimizer", "lr").rows())


def test_the_divergence_boundary_is_the_lowest_rate_at_which_a_seed_diverged(result, drawn) -> None:
    lost = result.trials.filter(result.trials["status"] == "diverged")
    expected = {name: min(lost.filter(lost["optimizer"] == name)["lr"]) for name in lost["optimizer"].unique()}
    assert len(expected) == 4
    marked = {row["optimizer"]: row["x"] for row in tables(drawn["sensitivity-lr"])["boundaries"]}
    assert marked == expected
    assert {row["optimizer"]: row["boundary"] for row in tables(drawn["room"])["rows"]} == expected


def test_the_rings_stand_at_the_tuned_learning_rates(result, drawn) -> None:
    rings = {row["optimizer"]: row["x"] for row in tables(drawn["sensitivity-lr"])["tuned"]}
    assert rings == {entry.label: entry.setting["lr"] for entry in result.ranking}


def test_the_room_chart_shows_the_range_of_the_ranking(result, drawn) -> None:
    for entry, row in zip(result.ranking, tables(drawn["room"])["rows"], strict=True):
        assert (row["low"], row["high"], row["tuned"]) == (entry.lr_low, entry.lr_high, entry.setting["lr"])


def test_the_loss_curves_are_means_over_seeds_of_the_tuned_trials(make_result) -> None:
    result = make_result(("adam", "sgd"), rates=3, seeds=4, steps=1000)
    rows, block = curves.training_loss(result, list(result.ranking))
    assert block == 5
    for entry in result.ranking:
        own = [row for row in rows if row["optimizer"] == entry.label]
        assert len(own) == 200
        trials = [
            trial["trial"]
            for trial in result.trials.iter_rows(named=True)
            if trial["optimizer"] == entry.label and trial["lr"] == entry.setting["lr"]
        ]
        assert len(trials) == 4
        for at in (0, 77, 199):
            per_seed = [np.mean(result.history.train_loss[trial][5 * at : 5 * at + 5]) for trial in trials]
            assert own[at]["step"] == 5 * at + 2
            assert own[at]["mean"] == pytest.approx(np.mean(per_seed), rel=1e-4)
            assert (own[at]["low"], own[at]["high"]) == pytest.approx((min(per_seed), max(per_seed)), rel=1e-4)


def test_a_seed_that_ended_leaves_the_mean(make_result) -> None:
    result = make_result(("adam",), rates=3, seeds=4, steps=50)
    trials = reading.at_setting(reading.trials_of(result, result.ranking[0]), result.ranking[0].setting)["trial"]
    result.history.metric[trials[0], -3:] = np.nan
    row = curves.validation_metric(result, list(result.ranking))[-1]
    assert row["mean"] == pytest.approx(result.history.metric[trials[1:].to_numpy(), -1].mean(), rel=1e-4)


def test_a_second_hyperparameter_is_held_at_its_tuned_value_and_has_its_own_chart(make_result) -> None:
    result = make_result(("adam",), rates=5, seeds=4, steps=20, momenta=(0.0, 0.5, 0.9))
    found = {chart.name: chart for chart in charts.charts(result)}
    assert list(found)[:3] == ["sensitivity-lr", "sensitivity-momentum", "room"]
    tuned = result.ranking[0].setting
    for name, free, held in (
        ("sensitivity-lr", "lr", "momentum"),
        ("sensitivity-momentum", "momentum", "lr"),
    ):
        for row in tables(found[name])["rows"]:
            scores = [
                trial["final_metric"]
                for trial in result.trials.iter_rows(named=True)
                if trial[free] == row["x"] and trial[held] == tuned[held] and trial["status"] == "completed"
            ]
            assert row["mean"] == pytest.approx(np.mean(scores), rel=1e-4)


def test_an_optimizer_that_tried_one_value_is_in_no_chart_of_that_hyperparameter(make_result) -> None:
    result = make_result(("adam", "sgd"), rates=3, seeds=4, steps=20, momenta=(0.0, 0.9))
    fixed = (pl.col("optimizer") == "sgd") & (pl.col("momentum") != result.ranking[1].setting["momentum"])
    fewer = replace(result, trials=result.trials.filter(~fixed))
    labels = {row["optimizer"] for row in curves.sensitivity(fewer, list(result.ranking), "momentum").rows}
    assert labels == {result.ranking[0].label} == {"adam"}


def test_losses_are_never_drawn_in_one_chart(make_result) -> None:
    result = make_result(("adam", "sgd"), rates=3, seeds=4, steps=20, losses=("mse", "huber"))
    found = [chart for chart in charts.charts(result) if chart.name.startswith("training-loss")]
    assert len(found) == 2
    for chart in found:
        labels = {row["optimizer"] for row in tables(chart)["rows"]}
        assert len({label.split(" on ")[1] for label in labels}) == 1
    assert len(tables(charts.charts(result)[0])["rows"]) >= 8


def test_without_a_search_every_seed_is_shown(make_result) -> None:
    result = make_result(("adam", "sgd"), seeds=5, steps=20, one_rate=True)
    found = {chart.name: chart for chart in charts.charts(result)}
    assert list(found) == ["seeds", "training-loss", "validation-metric"]
    shown = sorted(row["metric"] for row in tables(found["seeds"])["rows"])
    assert shown == pytest.approx(sorted(result.trials["final_metric"]), rel=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [
        {"optimizers": ("adam",), "rates": 1},
        {"optimizers": ("adam",), "all_diverged": True},
        {"higher_is_better": False},
        {"seeds": 1},
        {"optimizers": tuple(f"optimizer {i}" for i in range(14))},
    ],
)
def test_every_kind_of_sweep_gives_valid_json_without_nan_and_words_for_each_chart(make_result, arguments) -> None:
    result = make_result(**{"rates": 5, "seeds": 4, "steps": 20, **arguments})
    found = charts.charts(result)
    assert found
    for chart in found:
        json.dumps(chart.spec, allow_nan=False)
        assert chart.findings
        assert chart.description
        assert len({row["optimizer"] for row in tables(chart)["rows"]}) <= charts.MOST


def test_labels_are_matched_to_trials_when_the_ranking_names_no_optimizer(result) -> None:
    for entry in result.ranking:
        bare = replace(entry, optimizer="", loss="")
        assert set(reading.trials_of(result, bare)["optimizer"]) == {entry.label}


def test_outliers_are_cut_off_and_the_note_says_where() -> None:
    rows = [{"mean": v, "low": v, "high": v} for v in (0.9, 0.85, 0.8, -1e6)]
    scale, _, note = style.metric_scale(rows, higher_is_better=True)
    low, high = scale.to_dict()["domain"]
    assert style.metric_scale(rows, higher_is_better=True, least=1e6)[2] == ""
    assert (high, low) == (0.9, pytest.approx(0.6, abs=0.31))
    assert f"below {low:g}" in note
    assert style.metric_scale(rows[:3], higher_is_better=True)[2] == ""


def test_errors_of_several_magnitudes_have_a_logarithmic_scale() -> None:
    rows = [{"mean": v, "low": v, "high": v} for v in (0.01, 1.0, 1e9)]
    scale, _, note = style.metric_scale(rows, higher_is_better=False)
    assert scale.to_dict()["type"] == "log"
    assert note == ""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colors_stand_out_from_their_ground(theme: str) -> None:
    ground = {"light": "#ffffff", "dark": "#161a20"}[theme]
    for color in style.THEMES[theme]["range"]["category"]:
        assert contrast(color, ground) >= 3, color  # WCAG 1.4.11, graphical objects
    assert contrast(style.THEMES[theme]["axis"]["labelColor"], ground) >= 4.5


def contrast(first: str, second: str) -> float:
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)
