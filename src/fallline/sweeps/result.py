"""What a sweep found: a view of its run directory."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import safetensors.torch
import torch

from fallline.errors import RunDirectoryError, UnknownName
from fallline.evidence import Candidate, Ranking, rank
from fallline.optim import Optimizer
from fallline.optim.serial import from_data
from fallline.sweeps import reproduction
from fallline.sweeps.packs import parameters_file
from fallline.sweeps.store import CONFIGURATIONS, TRIALS, RunDirectory, history_of
from fallline.training.history import History


@dataclass(frozen=True)
class Best:
    """The winning configuration.

    Attributes:
        label: the optimizer in words.
        loss: the loss in words.
        optimizer: concrete; `best.optimizer.as_torch(model.parameters())` trains with it.
        settings: the values that were chosen for what was searched.
        configuration: its number.
        trial: its trial with the best final metric, whose parameters are kept.
        code: the plain PyTorch program that repeats that trial.
    """

    label: str
    loss: str
    optimizer: Optimizer
    settings: dict[str, Any]
    configuration: int
    trial: int
    code: str


class Result:
    """A sweep's trials, history, ranking and winner, read from its run directory when they are asked for."""

    def __init__(self, path: str | Path, *, temporary: Path | None = None) -> None:
        self.path = Path(path)
        if temporary is not None:  # a directory that nobody asked for goes when the result goes
            weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)
        self._directory = RunDirectory(self.path)
        self.spec: dict[str, Any] = self._directory.spec

    @property
    def complete(self) -> bool:
        """Whether every trial was trained to its end."""
        return bool(self.spec.get("complete"))

    @cached_property
    def history(self) -> History:
        """Losses and evaluations of every trial."""
        dtype = np.float64 if self.spec["task"]["dtype"] == "float64" else np.float32
        plan = self._directory.table(TRIALS)
        return history_of(self._directory.recorded(), len(plan), self.spec["steps"], self.spec["evaluate_every"], dtype)

    @cached_property
    def trials(self) -> pl.DataFrame:
        """One row per trial: what it was and how it ended."""
        table = self._directory.table(TRIALS)
        if "status" in table.columns:
            return table
        return with_results(table, self._directory.recorded(), self.history, self._higher_is_better)

    @cached_property
    def ranking(self) -> Ranking:
        """The optimizers by their tuned validation metric, with how sure that is."""
        trials = self.trials
        ended = trials.group_by("seed").agg((pl.col("status") != "interrupted").all().alias("ended"))
        seeds = [seed for seed in self.spec["seeds"] if seed in set(ended.filter("ended")["seed"])]
        seeds = seeds or list(self.spec["seeds"])
        several = trials["loss"].n_unique() > 1
        candidates = []
        settings = {row["configuration"]: json.loads(row["settings"]) for row in self._configurations}
        own = trials.filter(pl.col("seed").is_in(seeds))
        for (loss, label), group in own.group_by("loss", "optimizer", maintain_order=True):
            table = group.pivot("seed", index="configuration", values="final_metric", maintain_order=True)
            scores = table.select(str(seed) for seed in seeds).to_numpy().astype(np.float64)
            candidates.append(
                Candidate(
                    label=f"{label} · {loss}" if several else str(label),
                    scores=scores,
                    settings=[settings[c] for c in table["configuration"]],
                    optimizer=str(label),
                    loss=str(loss),
                )
            )
        return rank(
            candidates,
            seeds=seeds,
            higher_is_better=self._higher_is_better,
            metric=self.spec["task"]["metric"],
        )

    @cached_property
    def best(self) -> Best:
        """The winning configuration."""
        entry = self.ranking[0]
        own = self.trials.filter((pl.col("optimizer") == entry.optimizer) & (pl.col("loss") == entry.loss))
        numbers = own["configuration"].unique(maintain_order=True).to_list()
        number = numbers[entry.configuration]
        row = self._configurations[number]
        trial = best_trial(own.filter(pl.col("configuration") == number), self._higher_is_better)
        optimizer = from_data(json.loads(row["made_by"]))
        seed = int(self.trials.filter(pl.col("trial") == trial)["seed"].item())
        return Best(
            label=entry.label,
            loss=entry.loss,
            optimizer=optimizer,
            settings=json.loads(row["settings"]),
            configuration=number,
            trial=trial,
            code=reproduction.code(self.spec, optimizer, row["loss_code"], seed),
        )

    def parameters(self, trial: int) -> dict[str, torch.Tensor]:
        """A trial's final parameters and buffers, by name.

        Raises:
            RunDirectoryError: for a trial whose parameters were not kept.
        """
        path = parameters_file(self.path, trial)
        if not path.exists():
            kept = sorted(int(p.stem) for p in path.parent.glob("*.safetensors"))
            shown = ", ".join(map(str, kept[:10])) + (" …" if len(kept) > 10 else "")
            raise RunDirectoryError(
                f"the parameters of trial {trial} were not kept; those of trials {shown or '(none)'} were, the best of "
                "each configuration. Sweep with keep_parameters='all' to keep every trial's."
            )
        return safetensors.torch.load_file(path)

    def report(self, path: str | Path | None = None) -> Path:
        """Writes the HTML report, by default as `report.html` in the run directory; returns where it is."""
        from fallline import reports

        target = Path(path) if path is not None else self.path / "report.html"
        reports.write_report(self, target)
        return target

    def reproduction_code(self) -> str:
        """The plain PyTorch program that repeats the winning trial, or why there is none any more."""
        try:
            return self.best.code
        except UnknownName as error:  # it was made by a function in a program that is not running now
            return f"# The program cannot be written: {error}\n"

    def __str__(self) -> str:
        from fallline import reports

        return reports.summary(self)

    def __repr__(self) -> str:
        return f"Result({str(self.path)!r}, {len(self.trials)} trials)"

    @property
    def _higher_is_better(self) -> bool:
        return bool(self.spec["task"]["higher_is_better"])

    @cached_property
    def _configurations(self) -> list[dict[str, Any]]:
        return self._directory.table(CONFIGURATIONS).to_dicts()


def load(path: str | Path) -> Result:
    """A sweep that was run before, complete or not, from its run directory.

    Raises:
        RunDirectoryError: when there is no run at that path.
    """
    return Result(path)


# What `with_results` adds to the plan of trials.
RESULT_COLUMNS = (
    "status",
    "ended_at",
    "final_train_loss",
    "final_metric",
    "best_metric",
    "best_step",
    "final_validation_loss",
)


def with_results(plan: pl.DataFrame, recorded: pl.DataFrame, history: History, higher_is_better: bool) -> pl.DataFrame:
    """The table of trials with how each ended.

    Adds `status` (completed, diverged, interrupted), `ended_at` (updates made), `final_train_loss`, `final_metric`,
    `best_metric`, `best_step`, `final_validation_loss`; null where there is none, as for a trial that diverged.

    Args:
        plan: the table of trials; results of an earlier, interrupted run are replaced.
        recorded: the blocks, one row per trial and block.
        history: the same as arrays.
    """
    trials, steps = history.train_loss.shape
    reached = np.zeros(trials, dtype=np.int64)  # up to which step anything was recorded
    np.maximum.at(reached, recorded["trial"].to_numpy(), recorded["evaluated_at"].to_numpy())
    bad = ~np.isfinite(history.train_loss) & (np.arange(steps) < reached[:, None])
    diverged = bad.any(axis=1)
    made = np.where(diverged, bad.argmax(axis=1), reached)
    status = np.where(diverged, "diverged", np.where(reached == steps, "completed", "interrupted"))
    rows = np.arange(trials)
    last = np.searchsorted(history.evaluation_step, made, side="right") - 1
    ended_well = ~diverged & (made > 0)
    worst = -np.inf if higher_is_better else np.inf
    metric = np.where(np.isnan(history.metric), worst, history.metric)
    best = metric.argmax(axis=1) if higher_is_better else metric.argmin(axis=1)
    any_metric = np.isfinite(metric).any(axis=1)
    final_loss = history.train_loss[rows, np.maximum(made - 1, 0)].astype(np.float64)
    return plan.select(pl.exclude(RESULT_COLUMNS)).with_columns(
        status=pl.Series(status),
        ended_at=pl.Series(made),
        final_train_loss=_where(ended_well, final_loss),
        final_metric=_where(ended_well, history.metric[rows, last]),
        best_metric=_where(any_metric, history.metric[rows, best]),
        best_step=_where(any_metric, history.evaluation_step[best].astype(np.float64)).cast(pl.Int64),
        final_validation_loss=_where(ended_well, history.validation_loss[rows, last]),
    )


def _where(there: Any, values: Any) -> pl.Series:
    """The values, null where there are none."""
    return pl.Series(np.where(there, values, np.nan)).fill_nan(None)


def best_trial(trials: pl.DataFrame, higher_is_better: bool) -> int:
    """The trial with the best final metric (the first of equals); the first one where none has any."""
    ordered = trials.sort("final_metric", descending=higher_is_better, nulls_last=True, maintain_order=True)
    return int(ordered["trial"][0])
