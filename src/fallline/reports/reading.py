"""Looking things up in a result: which trials belong to which entry, and what to be careful about.

Reports read a result by its attributes alone (`Result` lists them), so they need neither torch nor the code
that trained. `curves` computes from what is found here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fallline.evidence import Entry, Ranking
from fallline.evidence.sentences import RECOMMENDED_SEEDS, total_seeds

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float64]

OUTCOMES = frozenset(
    {
        "trial",
        "configuration",
        "loss",
        "optimizer",
        "seed",
        "status",
        "ended_at",
        "final_train_loss",
        "final_metric",
        "best_metric",
        "best_step",
        "final_validation_loss",
    }
)
"""The columns of a result's trials that are not hyperparameters."""


class History(Protocol):
    """What was recorded: arrays whose first dimension is the trial, NaN after it ended."""

    @property
    def step(self) -> NDArray[Any]: ...
    @property
    def train_loss(self) -> NDArray[Any]: ...
    @property
    def evaluation_step(self) -> NDArray[Any]: ...
    @property
    def metric(self) -> NDArray[Any]: ...


class Result(Protocol):
    """What a report reads of the result of a sweep."""

    @property
    def spec(self) -> Mapping[str, Any]: ...
    @property
    def trials(self) -> pl.DataFrame: ...
    @property
    def history(self) -> History: ...
    @property
    def ranking(self) -> Ranking: ...
    def reproduction_code(self) -> str: ...


def hyperparameters(trials: pl.DataFrame) -> list[str]:
    """The columns of a table of trials that are hyperparameters of optimizers and hold numbers."""
    return [name for name, kind in trials.schema.items() if name not in OUTCOMES and kind.is_numeric()]


def trials_of(result: Result, entry: Entry) -> pl.DataFrame:
    """All the trials of an entry's candidate: [configuration × seed] rows.

    An entry that names its optimizer and loss is taken at its word; else its label must hold both.
    """
    import polars as pl

    trials = result.trials
    optimizer, loss = entry.optimizer, entry.loss
    if not optimizer:
        pairs = trials.select("optimizer", "loss").unique(maintain_order=True).rows()
        losses = {name for _, name in pairs}
        fitting = [
            (name, other) for name, other in pairs if name in entry.label and (len(losses) == 1 or other in entry.label)
        ]
        if not fitting:
            return trials.clear()
        # "sgd" is also part of "sgd momentum=0.9": the longest name that fits is meant.
        optimizer, loss = max(fitting, key=lambda pair: (len(pair[0]), len(pair[1])))
    chosen = trials.filter(pl.col("optimizer") == optimizer)
    return chosen.filter(pl.col("loss") == loss) if loss else chosen


def loss_of(result: Result, entry: Entry) -> str:
    """The name of the loss that an entry's trials minimised."""
    trials = trials_of(result, entry)
    return str(trials["loss"][0]) if trials.height else entry.loss


def at_setting(trials: pl.DataFrame, setting: Mapping[str, float], *, free: str | None = None) -> pl.DataFrame:
    """The trials whose hyperparameters equal a setting, one of them left free if so wished."""
    import polars as pl

    for name, value in setting.items():
        if name != free and name in trials.columns:
            trials = trials.filter((pl.col(name) - value).abs() <= 1e-9 * abs(value))
    return trials


def finished(trials: pl.DataFrame) -> pl.DataFrame:
    """The trials that reached the end with a finite metric."""
    import polars as pl

    return trials.filter((pl.col("status") == "completed") & pl.col("final_metric").is_finite())


def diverged(trials: pl.DataFrame) -> pl.DataFrame:
    """The trials that diverged, or ended with a metric that is no number."""
    import polars as pl

    lost = (pl.col("status") == "completed") & ~pl.col("final_metric").is_finite().fill_null(False)
    return trials.filter((pl.col("status") == "diverged") | lost)


def diverged_share(result: Result, entry: Entry) -> float:
    """The share of all the trials of an entry, at every configuration, that diverged; NaN without trials."""
    trials = trials_of(result, entry)
    return diverged(trials).height / trials.height if trials.height else float("nan")


def searched(result: Result) -> list[str]:
    """The hyperparameters of which some candidate tried two values or more, lr first."""
    found: list[str] = []
    for entry in result.ranking:
        trials = trials_of(result, entry)
        found += [
            name for name in hyperparameters(trials) if name not in found and trials[name].drop_nulls().n_unique() > 1
        ]
    return sorted(found, key=lambda name: name != "lr")


def cautions(result: Result) -> list[str]:
    """What a reader has to know before believing the ranking, a sentence each."""
    ranking = result.ranking
    said: list[str] = []
    interrupted = result.trials.filter(result.trials["status"] == "interrupted").height
    if interrupted:
        said.append(
            f"{interrupted} of {result.trials.height} trials were interrupted: the ranking is of what is "
            "done. Run the same command again to go on."
        )
    for entry in ranking:
        for name, side in entry.on_edge:
            further = "higher" if side == "high" else "lower"
            said.append(
                f"{entry.label}: the best {name}, {entry.setting[name]:.4g}, is the {side}est of its grid; "
                f"search {further} before you compare."
            )
        if entry.diverged:
            said.append(
                f"{entry.label}: {entry.diverged} of {entry.seeds_reported} reporting seeds diverged at its "
                "tuned configuration; they count as worse than any value, and the mean is over the others."
            )
    if ranking.selection_bias:
        said.append("One seed chose the configurations and also reports them: every value shown is too good.")
    # An answer of "no evidence" has already said how many seeds are needed.
    elif len(ranking.reporting_seeds) < RECOMMENDED_SEEDS - 1 and not ranking.undecided:
        said.append(
            f"{len(ranking.reporting_seeds)} reporting seeds are few: take {total_seeds(RECOMMENDED_SEEDS)} "
            f"seeds or more ({RECOMMENDED_SEEDS} of them reporting) before you believe a small difference."
        )
    return said
