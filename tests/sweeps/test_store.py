"""The run directory: files merged without loss, torn files never read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fallline as fl
from fallline.errors import RunDirectoryError
from fallline.sweeps import store
from fallline.sweeps.packs import Block
from fallline.sweeps.store import RunDirectory, history_of


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """A run of two trials with nothing recorded."""
    fl.sweep(fl.tasks.line(), fl.optim.sgd(lr=0.1), seeds=2, steps=4, out=tmp_path / "run")
    for file in (tmp_path / "run" / "history").iterdir():
        file.unlink()
    return RunDirectory(tmp_path / "run")


def block(start: int, value: float, trials: tuple[int, ...] = (0, 1)) -> Block:
    rows = len(trials)
    losses = np.full((rows, 2), value) + np.arange(2)
    return Block(0, np.array(trials), start, losses, start + 2, np.full(rows, value), np.full(rows, value))


def test_many_files_are_merged_and_read_the_same(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "MOST_FILES", 10)
    for number in range(35):
        directory.append([block(2 * number, float(number))])
    assert len(list((directory.path / "history").iterdir())) <= 11
    history = history_of(directory.recorded(), 2, 70, 2, np.float64)
    np.testing.assert_array_equal(history.train_loss[0], np.repeat(np.arange(35.0), 2) + np.tile([0, 1], 35))
    np.testing.assert_array_equal(history.metric[1], np.arange(35.0))


def test_large_files_are_not_written_again(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "MOST_FILES", 5)
    monkeypatch.setattr(store, "LARGE_FILE", 0)  # every file is large
    for number in range(12):
        directory.append([block(2 * number, float(number))])
    assert len(list((directory.path / "history").iterdir())) == 12
    assert len(directory.recorded()) == 24


def test_of_a_block_that_was_trained_twice_the_later_one_counts(directory: RunDirectory):
    directory._next = 99_998  # and the order is that of the numbers, not of the names
    for value in (1.0, 2.0, 3.0, 4.0):
        directory.append([block(0, value)])
    assert directory.recorded()["metric"].to_list() == [4.0, 4.0]
    assert RunDirectory(directory.path)._next == 100_002


def test_a_merge_that_was_killed_half_way_reads_the_same(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    for number in range(3):
        directory.append([block(2 * number, float(number))])
    before = directory.recorded()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        directory._merge(directory._files())
    assert directory.recorded().sort("trial", "start").equals(before.sort("trial", "start"))


def test_torn_temporary_files_are_not_read(directory: RunDirectory):
    directory.append([block(0, 1.0)])
    (directory.path / "history" / ".00007.parquet.4711").write_bytes(b"PAR1 torn")
    (directory.path / ".spec.json.4711").write_text('{"task"')
    found = fl.load(directory.path)
    assert np.isfinite(found.history.train_loss[:, :2]).all()
    assert RunDirectory(directory.path)._next == directory._next


def test_a_block_of_which_trials_have_left_fills_the_others(directory: RunDirectory):
    directory.append([block(0, 1.0), block(2, 2.0, (1,))])
    history = history_of(directory.recorded(), 2, 4, 2, np.float64)
    assert np.isnan(history.train_loss[0, 2:]).all()
    np.testing.assert_array_equal(history.train_loss[1], [1, 2, 2, 3])


def test_a_table_that_is_damaged_is_named(directory: RunDirectory):
    (directory.path / "trials.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(RunDirectoryError, match=r"trials\.parquet cannot be read"):
        _ = fl.load(directory.path).trials
