"""A sweep that was stopped goes on, and ends bit for bit where it would have ended."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import fallline as fl
from fallline.errors import RunDirectoryError
from fallline.sweeps import store, workers
from fallline.sweeps.workers import TrainingFailed, WorkerDied
from small_sweep import STEPS, assert_same, small_sweep

pytestmark = pytest.mark.usefixtures("small_packs")


@pytest.mark.parametrize("engine", ["vectorised", "sequential"])
@pytest.mark.parametrize("blocks", [3, 30])
def test_a_sweep_that_was_stopped_goes_on_where_it_was(tmp_path: Path, stop_after, engine: str, blocks: int):
    whole = small_sweep(tmp_path / "whole", engine=engine)
    stop_after(blocks)
    part = small_sweep(tmp_path / "part", engine=engine)
    assert not part.complete
    assert "interrupted" in part.trials["status"].to_list()
    there = np.isfinite(part.history.train_loss)
    assert there.any()
    np.testing.assert_array_equal(part.history.train_loss[there], whole.history.train_loss[there])
    assert list((tmp_path / "part" / "packs").iterdir())

    stop_after(0)
    resumed = small_sweep(tmp_path / "part", engine=engine, resume=True)
    assert resumed.complete
    assert_same(resumed, whole)
    assert set(resumed.trials["status"]) == {"completed", "diverged"}
    assert not (tmp_path / "part" / "packs").exists()


def test_workers_train_what_one_process_trains_and_resume_it(tmp_path: Path, stop_after):
    whole = small_sweep(tmp_path / "whole", workers=2)
    assert_same(whole, small_sweep(tmp_path / "alone"))
    stop_after(8)
    assert not small_sweep(tmp_path / "part", workers=2).complete
    stop_after(0)
    assert_same(small_sweep(tmp_path / "part", workers=2, resume=True), whole)


def test_a_finished_sweep_resumes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = small_sweep(tmp_path / "whole")
    monkeypatch.setattr(workers, "train_packs", lambda *arguments: pytest.fail("nothing is left to be trained"))
    assert_same(small_sweep(tmp_path / "whole", resume=True), whole)


def test_a_checkpoint_ahead_of_the_history_is_not_gone_on_from(tmp_path: Path, stop_after):
    whole = small_sweep(tmp_path / "whole")
    stop_after(5)
    small_sweep(tmp_path / "part")
    for file in (tmp_path / "part" / "history").glob("*.parquet"):
        file.unlink()  # as if the process had died between the checkpoint and the history
    stop_after(0)
    assert_same(small_sweep(tmp_path / "part", resume=True), whole)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"steps": STEPS + 1}, f"steps was {STEPS} there and is {STEPS + 1} now"),
        ({"seeds": 3}, "seeds was 0, 1 there and is 0, 1, 2 now"),
        ({"keep_parameters": "all"}, "keep_parameters was best there and is all now"),
        ({"engine": "sequential"}, "engine was vectorised there and is sequential now"),
        ({"losses": ["l1"]}, "loss was"),
    ],
)
def test_another_sweep_is_not_resumed(tmp_path: Path, changed, named: str):
    small_sweep(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=re.escape(named)):
        small_sweep(tmp_path / "run", resume=True, **changed)


def test_other_optimizers_and_other_data_are_not_resumed(tmp_path: Path):
    line = fl.tasks.line()
    fl.sweep(line, fl.optim.sgd(lr=0.1), seeds=1, steps=3, out=tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=r"optimizers was .*lr=0\.1.* there and is .*lr=0\.2"):
        fl.sweep(line, fl.optim.sgd(lr=0.2), seeds=1, steps=3, out=tmp_path / "run", resume=True)
    moved = fl.Task("line", line.model, (line.train.x + 1, line.train.y), "mse", "train", batch_size=line.batch_size)
    with pytest.raises(RunDirectoryError, match="holds another run: "):
        fl.sweep(moved, fl.optim.sgd(lr=0.1), seeds=1, steps=3, out=tmp_path / "run", resume=True)


def test_what_is_there_is_left_alone(tmp_path: Path):
    small_sweep(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(RunDirectoryError, match="holds another run: resume it, or give another directory"):
        small_sweep(tmp_path / "run")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_an_empty_directory_can_be_used(tmp_path: Path):
    (tmp_path / "run").mkdir()
    assert fl.sweep(fl.tasks.line(), fl.optim.sgd(lr=0.1), seeds=1, steps=3, out=tmp_path / "run").complete


def test_a_disk_that_fills_up_ends_the_sweep_and_keeps_what_was_written(tmp_path: Path, monkeypatch, stop_after):
    whole = small_sweep(tmp_path / "whole")
    monkeypatch.setattr("fallline.sweeps.running.SECONDS_BETWEEN_WRITES", 0.0)
    write, left = store.write_file, iter(range(9))

    def filling(path: Path, content: bytes | str) -> None:
        if next(left, None) is None:
            raise RunDirectoryError(f"{path} could not be written: No space left on device.")
        write(path, content)

    monkeypatch.setattr(store, "write_file", filling)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        small_sweep(tmp_path / "part")
    found = fl.load(tmp_path / "part")
    there = np.isfinite(found.history.train_loss)
    assert there.any()
    np.testing.assert_array_equal(found.history.train_loss[there], whole.history.train_loss[there])
    monkeypatch.setattr(store, "write_file", write)
    assert_same(small_sweep(tmp_path / "part", resume=True), whole)


@pytest.mark.parametrize("writes", [0, 1, 2, 3])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch, writes: int):
    write, left = store.write_file, iter(range(writes))

    def full(path: Path, content: bytes | str) -> None:
        if next(left, None) is None:
            raise RunDirectoryError(f"{path} could not be written: No space left on device.")
        write(path, content)

    monkeypatch.setattr(store, "write_file", full)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        small_sweep(tmp_path / "runs" / "mine")
    assert not (tmp_path / "runs" / "mine").exists()
    assert not list(tmp_path.rglob("*.parquet"))


class _FailsWhenTrained(torch.nn.Linear):
    def forward(self, x):
        if self.training and len(x) == 1:
            raise ValueError("expected more than 1 value per channel")
        return super().forward(x)


@pytest.mark.parametrize("count", [1, 2])
def test_a_model_that_fails_in_training_is_named_with_its_own_error(tmp_path: Path, count: int):
    line = fl.tasks.line()
    task = fl.Task("mine", lambda: _FailsWhenTrained(1, 1), (line.train.x, line.train.y), "mse", "train", batch_size=2)
    with pytest.raises(TrainingFailed, match=r"ValueError: expected more than 1 value .*\(test_resume.py, line \d+\)"):
        fl.sweep(task, fl.optim.sgd(lr=fl.grid([0.1, 0.2])), steps=4, workers=count, out=tmp_path / "run",
                 engine="sequential", evaluate_every=4)  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_worker_that_is_killed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "train_pack", lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(WorkerDied, match="resume with fewer workers"):
        small_sweep(tmp_path / "run", workers=2)
