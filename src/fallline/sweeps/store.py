"""The run directory: what a sweep writes, such that nothing written is ever lost or half read.

    spec.json               what was asked and how it is run; when it has ended, also the time it took
    configurations.parquet  one row per configuration: label, loss, optimizer (JSON), the values searched
    trials.parquet          one row per trial: configuration, seed, and once the sweep has ended its results
    history/00000.parquet   what blocks recorded, in files as they arrived; merged when there are many
    packs/00000/            checkpoints of packs under way
    parameters/000000.safetensors   final parameters of the trials that are kept

Every file is written under another name and renamed, so a file that is there is whole. The directory itself appears
under its name only when it can be read.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fallline.errors import RunDirectoryError
from fallline.optim.serial import to_data
from fallline.sweeps.packs import Block
from fallline.sweeps.search import Configuration, TrialPlan
from fallline.training.checkpoint import write_file
from fallline.training.history import History

SPEC, CONFIGURATIONS, TRIALS = "spec.json", "configurations.parquet", "trials.parquet"
HISTORY, PARAMETERS, PACKS = "history", "parameters", "packs"
# With more files of blocks than this they are merged into one, but for those that are large already: merging costs
# in proportion to what is merged, and a long sweep is not to be written again and again.
MOST_FILES = 128
LARGE_FILE = 2**25


class RunDirectory:
    """A run directory that is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec: dict[str, Any] = read_spec(path)
        self._next = 1 + max((int(file.stem) for file in self._files()), default=-1)

    @classmethod
    def create(
        cls, path: Path, spec: dict[str, Any], chosen: Sequence[Configuration], plans: Sequence[TrialPlan]
    ) -> RunDirectory:
        """Makes the directory with all that is known before the first step.

        Raises:
            RunDirectoryError: when there is something at that path already, or it cannot be written.
        """
        made: Path | None = None
        parents = [parent for parent in path.parents if not parent.exists()]
        try:
            require_free(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
            made.chmod(0o755)
            for folder in (HISTORY, PARAMETERS, PACKS):
                (made / folder).mkdir()
            _write_table(made / CONFIGURATIONS, _configuration_table(chosen))
            _write_table(made / TRIALS, plan_table(plans))
            write_file(made / SPEC, json.dumps(spec, indent=1))
            made.replace(path)  # an empty directory of that name gives way
            return cls(path)
        except BaseException as error:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
            for parent in parents:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            if isinstance(error, RunDirectoryError) or not isinstance(error, OSError):
                raise
            reason = error.strerror or str(error)
            raise RunDirectoryError(f"the run directory {path} could not be made: {reason}.") from error

    def tidy(self) -> None:
        """Removes what a killed process was in the middle of writing."""
        for folder in (self.path, self.path / HISTORY, self.path / "parameters"):
            for left in folder.glob(".*"):
                if left.is_file():
                    left.unlink()

    def append(self, blocks: Iterable[Block]) -> None:
        """Writes what blocks recorded, as one new file."""
        tables = [_block_table(block) for block in blocks]
        if tables:
            self._write_history(pl.concat(tables))
        files = self._files()
        if len(files) > MOST_FILES:
            large = [number for number, file in enumerate(files) if file.stat().st_size > LARGE_FILE]
            self._merge(files[large[-1] + 1 if large else 0 :])

    def recorded(self) -> pl.DataFrame:
        """One row per trial and block, as in `Block`; where a block was trained twice, the later one."""
        return _recorded(self._files())

    def table(self, name: str) -> pl.DataFrame:
        """`CONFIGURATIONS` or `TRIALS` as they were written."""
        return _read_table(self.path / name)

    def note(self, **facts: Any) -> None:
        """Adds to the specification."""
        self.spec = {**self.spec, **facts}
        write_file(self.path / SPEC, json.dumps(self.spec, indent=1))

    def finish(self, trials: pl.DataFrame, **facts: Any) -> None:
        """Writes the results of the trials, merges the history, and notes how the run ended."""
        self._merge(self._files())
        _write_table(self.path / TRIALS, trials)
        self.note(**facts)
        if facts.get("complete"):
            shutil.rmtree(self.path / PACKS, ignore_errors=True)

    def remove(self) -> None:
        """Deletes the whole directory."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _files(self) -> list[Path]:
        """The files of blocks, oldest first."""
        return sorted((self.path / HISTORY).glob("*.parquet"), key=lambda file: int(file.stem))

    def _merge(self, files: Sequence[Path]) -> None:
        """Makes one file of the newest ones. Killed on the way, both are there, which reads the same."""
        if len(files) > 1:
            self._write_history(_recorded(files))
            for file in files:
                file.unlink()

    def _write_history(self, table: pl.DataFrame) -> None:
        _write_table(self.path / HISTORY / f"{self._next:05d}.parquet", table)
        self._next += 1


def read_spec(path: Path) -> dict[str, Any]:
    """The specification of a run.

    Raises:
        RunDirectoryError: when the path holds no run.
    """
    try:
        spec: dict[str, Any] = json.loads((path / SPEC).read_text())
    except (FileNotFoundError, NotADirectoryError):
        what = "does not exist" if not path.exists() else "holds no sweep" if path.is_dir() else "is no directory"
        raise RunDirectoryError(f"{path} {what}: give the directory of a sweep (its --out).") from None
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path / SPEC} cannot be read: {error}.") from error
    return spec


def require_free(path: Path) -> None:
    """Refuses a path at which there is something already."""
    if path.is_dir():
        if (path / SPEC).exists():
            raise RunDirectoryError(f"{path} holds another run: resume it, or give another directory.")
        if any(path.iterdir()):
            raise RunDirectoryError(f"{path} holds other files and no run: give another directory.")
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise RunDirectoryError(f"{place} is a file: give a directory.")


def history_of(recorded: pl.DataFrame, trials: int, steps: int, evaluate_every: int, dtype: Any) -> History:
    """Blocks as arrays over [trial, record] and [trial, evaluation], NaN where nothing was recorded."""
    evaluation_step = evaluation_steps(steps, evaluate_every)
    train_loss = np.full((trials, steps), np.nan, dtype=dtype)
    metric = np.full((trials, len(evaluation_step)), np.nan)
    validation_loss = np.full((trials, len(evaluation_step)), np.nan)
    for (start, end), block in recorded.group_by("start", "evaluated_at"):
        rows = block["trial"].to_numpy()
        begin, finish = int(str(start)), int(str(end))
        train_loss[rows, begin:finish] = block["train_loss"].explode().to_numpy().reshape(len(rows), finish - begin)
        column = int(np.searchsorted(evaluation_step, finish))
        metric[rows, column] = block["metric"].to_numpy()
        validation_loss[rows, column] = block["validation_loss"].to_numpy()
    return History(np.arange(steps), train_loss, evaluation_step, metric, validation_loss)


def evaluation_steps(steps: int, evaluate_every: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """After how many updates trials are evaluated: each multiple of `evaluate_every`, and at the end.

    >>> evaluation_steps(10, 4).tolist()
    [4, 8, 10]
    """
    return np.unique(np.append(np.arange(evaluate_every, steps + 1, evaluate_every), steps)).astype(np.int64)


def plan_table(plans: Sequence[TrialPlan]) -> pl.DataFrame:
    """One row per trial: which configuration, which seed, and every hyperparameter (null where there is none)."""
    rows: list[dict[str, Any]] = []
    for plan in plans:
        configuration = plan.configuration
        arguments = {
            name: value
            for name, value in configuration.optimizer.arguments.items()
            if isinstance(value, bool | int | float | str)
        }
        arguments |= {f"loss.{n}": v for n, v in configuration.loss.numbers.items() if isinstance(v, int | float)}
        rows.append(
            {
                "trial": plan.index,
                "configuration": configuration.index,
                "loss": configuration.loss_label,
                "optimizer": configuration.label,
                "seed": plan.seed,
                **{n: float(v) if isinstance(v, int) and not isinstance(v, bool) else v for n, v in arguments.items()},
            }
        )
    return pl.DataFrame(rows, infer_schema_length=None)


def _configuration_table(chosen: Sequence[Configuration]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "configuration": [c.index for c in chosen],
            "optimizer": [c.label for c in chosen],
            "loss": [c.loss_label for c in chosen],
            "loss_code": [c.loss.code() for c in chosen],
            "made_by": [json.dumps(to_data(c.optimizer)) for c in chosen],
            "settings": [json.dumps(c.settings) for c in chosen],
        }
    )


def _block_table(block: Block) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "trial": block.trials,
            "start": np.full(len(block.trials), block.start),
            "evaluated_at": np.full(len(block.trials), block.evaluated_at),
            "train_loss": list(block.train_loss),
            "metric": block.metric,
            "validation_loss": block.validation_loss,
        },
        schema_overrides={"train_loss": pl.List(pl.Float64)},
    )


def _recorded(files: Sequence[Path]) -> pl.DataFrame:
    if not files:
        return pl.DataFrame(
            schema={
                "trial": pl.Int64,
                "start": pl.Int64,
                "evaluated_at": pl.Int64,
                "train_loss": pl.List(pl.Float64),
                "metric": pl.Float64,
                "validation_loss": pl.Float64,
            }
        )
    table = pl.concat([_read_table(file) for file in files])
    return table.unique(["trial", "start"], keep="last", maintain_order=True)


def _write_table(path: Path, table: pl.DataFrame) -> None:
    buffer = io.BytesIO()
    table.write_parquet(buffer)
    write_file(path, buffer.getvalue())


def _read_table(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}.") from error
