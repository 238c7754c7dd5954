"""`fit`: stopped and gone on with bit for bit, stopped early at its best, safe from the start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fallline as fl
from fallline.errors import InvalidHyperparameter, InvalidSweep, RunDirectoryError
from fallline.training import checkpoint
from fallline.training import fit as fitting
from fallline.training.interrupt import Interrupt


class Stop(Exception):
    """The process ends here."""


def noisy_task() -> fl.Task:
    """Dropout and batch normalisation: random numbers and buffers are part of what must be kept."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=g)
    model = lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))  # noqa: E731
    return fl.Task("noisy", model, (x, x.sum(1, keepdim=True)), "mse", batch_size=8)


def fit(out: Path | None = None, **settings: object) -> fl.Run:
    asked = {"epochs": 12, "seed": 3, "progress": False, **settings}
    return fl.fit(noisy_task(), fl.optim.adam(lr=0.01, weight_decay=0.1), out=out, **asked)  # type: ignore[arg-type]


def assert_same(found: fl.Run, expected: fl.Run) -> None:
    for name in ("step", "train_loss", "evaluation_step", "metric", "validation_loss"):
        np.testing.assert_array_equal(getattr(found.history, name), getattr(expected.history, name), name)
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("at", [1, 5, 11])
def test_a_fit_that_was_killed_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int):
    monkeypatch.setattr(fitting, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)

    def stop(report: fitting.EpochReport) -> None:
        if report.epoch == at:
            raise Stop

    with pytest.raises(Stop):
        fit(tmp_path / "run", on_epoch=stop)
    epochs: list[int] = []
    resumed = fit(tmp_path / "run", resume=True, on_epoch=lambda report: epochs.append(report.epoch))
    assert epochs == list(range(at, 13))
    assert_same(resumed, fit())


def test_an_interrupted_fit_returns_what_there_is_and_goes_on_in_the_middle_of_an_epoch(tmp_path: Path, monkeypatch):
    asked = iter(range(1))
    monkeypatch.setattr(Interrupt, "requested", property(lambda self: next(asked, None) is None, lambda *_: None),
                        raising=False)  # fmt: skip
    part = fit(tmp_path / "run")
    assert part.stopped == "interrupted"
    assert part.steps % 4 != 0  # not at the end of an epoch
    assert part.steps < 12 * 4
    assert len(part.history.train_loss) == part.steps
    monkeypatch.undo()
    whole = fit()
    np.testing.assert_array_equal(part.history.train_loss, whole.history.train_loss[: part.steps])
    assert_same(fit(tmp_path / "run", resume=True), whole)


def test_more_epochs_may_be_asked_for(tmp_path: Path):
    fit(tmp_path / "run", epochs=5)
    assert_same(fit(tmp_path / "run", epochs=12, resume=True), fit(epochs=12))
    with pytest.raises(RunDirectoryError, match="has made 48 steps, more than the 8 asked for"):
        fit(tmp_path / "run", epochs=2, resume=True)


def test_but_not_where_a_schedule_spans_them(tmp_path: Path):
    adam = fl.optim.adam(lr=fl.schedules.cosine(0.01))
    fl.fit(noisy_task(), adam, epochs=2, out=tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="its budget is 8, not 16"):
        fl.fit(noisy_task(), adam, epochs=4, out=tmp_path / "run", resume=True)


def test_patience_stops_and_returns_the_best_model(tmp_path: Path):
    adam = fl.optim.adam(lr=0.3)
    task = noisy_task()
    run = fl.fit(task, adam, epochs=200, patience=4, out=tmp_path / "run")
    assert run.stopped == "early stopping"
    best = int(np.argmin(run.history.metric))
    assert len(run.history.metric) == best + 1 + 4
    model = run.model.eval()
    with torch.no_grad():
        metric = float(task.metric(model(task.validation.x), task.validation.y))
    assert metric == run.history.metric[best]
    assert metric < run.history.metric[-1]
    until_best = fl.fit(task, adam, epochs=best + 1)
    for name, tensor in until_best.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    again = fl.fit(task, adam, epochs=200, patience=4, out=tmp_path / "run", resume=True)
    assert_same(again, run)


@pytest.mark.parametrize(
    "changed", [{"seed": 4}, {"loss": "l1"}, {"patience": 3}], ids=lambda changed: next(iter(changed))
)
def test_another_run_is_not_gone_on_with(tmp_path: Path, changed):
    fit(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=f"its {next(iter(changed))} is "):
        fit(tmp_path / "run", resume=True, **changed)
    with pytest.raises(RunDirectoryError, match="holds another run: resume it, or give another directory"):
        fit(tmp_path / "run")


def test_a_directory_that_cannot_be_written_is_found_before_training(tmp_path: Path, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_to_disk", full)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        fit(tmp_path / "run", on_epoch=lambda report: pytest.fail("it was trained"))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(fitting, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    to_disk, left = checkpoint._to_disk, iter(range(6))

    def filling(path: Path) -> None:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        to_disk(path)

    monkeypatch.setattr(checkpoint, "_to_disk", filling)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        fit(tmp_path / "run")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint"]
    assert_same(fit(tmp_path / "run", resume=True), fit())


def test_a_checkpoint_is_found_between_the_two_renamings_of_its_replacement(tmp_path: Path):
    checkpoint.write(tmp_path / "c", {"a": torch.ones(2)}, {"step": 1})
    (tmp_path / "c").rename(tmp_path / ".c-old")
    found = checkpoint.read(tmp_path / "c")
    assert found is not None
    assert found[1] == {"step": 1}
    checkpoint.write(tmp_path / "c", {"a": torch.zeros(2)}, {"step": 2})
    found = checkpoint.read(tmp_path / "c")
    assert found is not None
    assert found[1] == {"step": 2}
    (tmp_path / "c" / "state.json").write_text('{"step"')
    with pytest.raises(RunDirectoryError, match="not a checkpoint that can be read"):
        checkpoint.read(tmp_path / "c")


def test_a_fit_wants_concrete_numbers():
    line = fl.tasks.line()
    with pytest.raises((InvalidHyperparameter, InvalidSweep), match="lr"):
        fl.fit(line, fl.optim.sgd(lr=fl.grid([0.1, 0.2])))
    with pytest.raises(InvalidHyperparameter, match="lr"):
        fl.fit(line, fl.optim.sgd(lr=0.0))
    with pytest.raises(InvalidHyperparameter, match="not an optimizer"):
        fl.fit(line, torch.optim.SGD)  # type: ignore[arg-type]
