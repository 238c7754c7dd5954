"""The numbers behind the charts: means and ranges over seeds, thinned and rounded, as plain rows.

`charts` draws these rows and computes nothing itself, so a test can compare a chart with the trials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fallline.evidence import Entry
from fallline.reports import reading
from fallline.reports.reading import Floats, Result

if TYPE_CHECKING:
    import polars as pl

POINTS = 200
"""A curve has at most so many points: a screen shows no more, and the page stays small."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Sensitivity:
    """How the metric depends on one searched hyperparameter, the others held at their tuned values.

    Args:
        dimension: the hyperparameter.
        rows: per optimizer and value: mean, low and high over the seeds that finished, and how many finished.
        tuned: the rows at the tuned values.
        boundaries: per optimizer the lowest value at which some seed diverged, and how many did there.
    """

    dimension: str
    rows: list[Row]
    tuned: list[Row]
    boundaries: list[Row]


def rounded(value: float, digits: int = 5) -> float:
    """A number with few digits, so that it takes little room in a page.

    >>> rounded(0.123456789), rounded(1234567.0)
    (0.12346, 1234600.0)
    """
    return float(f"{value:.{digits}g}")


def sensitivity(result: Result, entries: Sequence[Entry], dimension: str) -> Sensitivity:
    """Mean, lowest and highest final metric over seeds for every value of a hyperparameter.

    Seeds that diverged are in no mean: they are counted beside it. An optimizer without this hyperparameter
    is left out.
    """
    rows: list[Row] = []
    tuned: list[Row] = []
    boundaries: list[Row] = []
    for entry in entries:
        trials = reading.trials_of(result, entry)
        if dimension not in trials.columns:
            continue
        trials = reading.at_setting(trials, entry.setting, free=dimension)
        tried = trials[dimension].drop_nulls().unique().sort().to_list()
        if len(tried) < 2 and dimension != "lr":
            continue
        boundary: Row | None = None
        for value in tried:
            here = trials.filter(trials[dimension] == value)
            lost = reading.diverged(here).height
            row = {
                "optimizer": entry.label,
                "x": value,
                **_over_seeds(here),
                "diverged": lost,
                "seeds": here.height,
            }
            if row["finished"]:
                rows.append(row)
                if math.isclose(value, entry.setting.get(dimension, math.nan), rel_tol=1e-9):
                    tuned.append(row)
            if lost and boundary is None:
                boundary = {"optimizer": entry.label, "x": value, "diverged": lost, "seeds": here.height}
        if boundary is not None:
            boundaries.append(boundary)
    return Sensitivity(dimension, rows, tuned, boundaries)


def _over_seeds(trials: pl.DataFrame) -> Row:
    scores = reading.finished(trials)["final_metric"].to_numpy()
    if scores.size == 0:
        return {"mean": None, "low": None, "high": None, "finished": 0}
    return {
        "mean": rounded(float(scores.mean())),
        "low": rounded(float(scores.min())),
        "high": rounded(float(scores.max())),
        "finished": int(scores.size),
    }


def room(result: Result, entries: Sequence[Entry]) -> list[Row]:
    """How much room every optimizer leaves for the learning rate, the others left out that tried only one.

    "lowest" and "highest" of those searched, "low", "high" and "decades" of those within 5 % of the "tuned"
    one, and "boundary", the lowest at which some seed diverged.
    """
    rows: list[Row] = []
    for entry in entries:
        trials = reading.trials_of(result, entry)
        if "lr" not in trials.columns or "lr" not in entry.setting:
            continue
        trials = reading.at_setting(trials, entry.setting, free="lr")
        rates = trials["lr"].drop_nulls()
        if rates.n_unique() < 2:
            continue
        rows.append(
            {
                "optimizer": entry.label,
                "lowest": rates.min(),
                "highest": rates.max(),
                "low": entry.lr_low,
                "high": entry.lr_high,
                "decades": entry.lr_decades,
                "tuned": entry.setting["lr"],
                "boundary": reading.diverged(trials)["lr"].min(),
            }
        )
    return rows


def final_metrics(result: Result, entries: Sequence[Entry]) -> list[Row]:
    """The final metric of every finished seed of the tuned configurations."""
    rows: list[Row] = []
    for entry in entries:
        tuned = reading.finished(reading.at_setting(reading.trials_of(result, entry), entry.setting))
        rows += [
            {"optimizer": entry.label, "seed": seed, "metric": rounded(score)}
            for seed, score in tuned.select("seed", "final_metric").iter_rows()
        ]
    return rows


def training_loss(result: Result, entries: Sequence[Entry]) -> tuple[list[Row], int]:
    """The training loss of the tuned configurations by step, and how many records each point averages."""
    step, loss = np.asarray(result.history.step), np.asarray(result.history.train_loss)
    block = max(1, math.ceil(step.size / POINTS))
    rows: list[Row] = []
    for entry in entries:
        rows += _curve(result, entry, step, loss, block)
    return rows, block


def validation_metric(result: Result, entries: Sequence[Entry]) -> list[Row]:
    """The validation metric of the tuned configurations against the step."""
    step, metric = np.asarray(result.history.evaluation_step), np.asarray(result.history.metric)
    block = max(1, math.ceil(step.size / POINTS))
    return [row for entry in entries for row in _curve(result, entry, step, metric, block)]


def _curve(result: Result, entry: Entry, step: Floats, values: Floats, block: int) -> list[Row]:
    tuned = reading.at_setting(reading.trials_of(result, entry), entry.setting)
    if tuned.height == 0 or step.size == 0:
        return []
    thinned = block_means(values[tuned["trial"].to_numpy()].astype(np.float64), block)
    # A block of steps is shown at its middle.
    places = block_means(step[None, :].astype(np.float64), block)[0]
    alive = np.isfinite(thinned)
    running = alive.sum(axis=0)
    mean = np.where(alive, thinned, 0.0).sum(axis=0) / np.maximum(running, 1)
    low = np.where(alive, thinned, np.inf).min(axis=0)
    high = np.where(alive, thinned, -np.inf).max(axis=0)
    return [
        {
            "optimizer": entry.label,
            "step": rounded(places[at], 7),
            "mean": rounded(mean[at]),
            "low": rounded(low[at]),
            "high": rounded(high[at]),
        }
        for at in np.flatnonzero(running)
    ]


def block_means(values: Floats, block: int) -> Floats:
    """Means of consecutive blocks of columns: [trial, record] to [trial, ceil(record / block)], NaN left out.

    A block in which nothing was recorded is NaN.

    >>> block_means(np.array([[1.0, 3.0, 5.0], [1.0, np.nan, np.nan]]), 2)
    array([[ 2.,  5.],
           [ 1., nan]])
    """
    rows, columns = values.shape
    blocks = math.ceil(columns / block)
    padded = np.full((rows, blocks * block), np.nan)
    padded[:, :columns] = values
    parts = padded.reshape(rows, blocks, block)
    known = np.isfinite(parts)
    count = known.sum(axis=2)
    return np.where(count > 0, np.where(known, parts, 0.0).sum(axis=2) / np.maximum(count, 1), np.nan)
