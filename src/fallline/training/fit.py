"""`fit`: one trial, trained to the end, kept safe on the way, and judged."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fallline.errors import InvalidHyperparameter, InvalidSweep, RunDirectoryError
from fallline.losses import Loss
from fallline.optim import Optimizer
from fallline.tasks import Task
from fallline.training import checkpoint
from fallline.training.batches import steps_per_epoch
from fallline.training.device import resolve_device
from fallline.training.history import History
from fallline.training.interrupt import Interrupt
from fallline.training.progress import Progress
from fallline.training.trial import Trial
from fallline.training.verdict import Verdict, verdict

CHECKPOINT = "checkpoint"
# Between two checkpoints at least this many seconds pass, so that writing them costs little.
SECONDS_BETWEEN_CHECKPOINTS = 10.0
# So long may Ctrl-C wait for a safe point inside an epoch.
SECONDS_BETWEEN_LOOKS = 0.3


@dataclass(frozen=True)
class Run:
    """What `fit` returns.

    Attributes:
        model: the trained model; after early stopping, as it was at its best evaluation.
        history: losses per step and evaluations.
        verdict: how it went, and what to do about it.
        task, optimizer, seed: what was trained.
        steps: how many updates were made.
        stopped: why it ended before its budget: "early stopping", "diverged", "interrupted", or "" if it did not.
    """

    model: nn.Module
    history: History
    verdict: Verdict
    task: Task
    optimizer: Optimizer
    seed: int
    steps: int
    stopped: str


@dataclass(frozen=True)
class EpochReport:
    """What `on_epoch` is told: the epoch just ended (from 1), of how many, its last mini-batch loss and evaluation."""

    epoch: int
    epochs: int
    loss: float
    metric: float
    validation_loss: float


def fit(
    task: Task,
    optimizer: Optimizer,
    *,
    loss: Loss | Callable[..., Any] | str | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    patience: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> Run:
    """Trains one configuration with one seed: exactly what the plain PyTorch loop does.

    Args:
        task: what is trained.
        optimizer: an optimizer with concrete hyperparameters.
        loss: trains with this loss instead of the task's.
        epochs: passes over the training data (20 when neither this nor `steps` is given).
        steps: updates, instead of epochs.
        seed: of the parameters and of the order of the mini-batches.
        device: "auto", "cpu", "cuda" or "cuda:N".
        patience: stop early when the validation metric has not improved for so many epochs, and return the best model.
        out: a directory for checkpoints.
        resume: go on from the checkpoint in `out`, with the settings that it was begun with; more epochs or steps may
            be asked for, unless a schedule spans them.
        progress: a progress bar; by default when a terminal watches.
        on_epoch: called after every epoch.

    Returns:
        The trained model with its history and a verdict. Ctrl-C ends training and returns what there is.

    Raises:
        InvalidTask, LossMismatch: when the task cannot be trained as it is. What is only very likely a mistake is
            warned of (`LossMisused`).
        InvalidSweep: for a budget that is none.
        RunDirectoryError: when `out` holds another run or cannot be written.

    >>> import fallline as fl
    >>> run = fl.fit(fl.tasks.line(), fl.optim.sgd(lr=0.05), epochs=200)
    >>> round(run.model.weight.item(), 1), run.verdict.outcome.value
    (2.0, 'converged')
    """
    where = resolve_device(device)
    budget, per_epoch = _budget(task, epochs, steps)
    check_seed(seed)
    if patience is not None and (isinstance(patience, bool) or not isinstance(patience, int) or patience < 1):
        raise InvalidSweep(f"patience = {patience!r} is not a whole number of at least 1.")
    if not isinstance(optimizer, Optimizer):
        raise InvalidHyperparameter(f"{optimizer!r} is not an optimizer of fallline: give one like fl.optim.adam().")
    lr = learning_rate(optimizer)
    if loss is not None:
        task = task.with_loss(loss)
    task.warn(stacklevel=2)
    trial = Trial(task, optimizer, seed, steps=budget, device=where)
    record = _Record(trial, budget, per_epoch, patience)
    identity = {**task.describe(), "data": fingerprint(task), "optimizer": repr(optimizer), "seed": seed}
    identity |= {"patience": patience, "budget": budget}
    folder = _folder(out, identity, resume, record)
    interrupt, stopped, written = Interrupt(), record.stopped(), time.monotonic()
    with interrupt.listening(), Progress(f"fit {task.name}", budget, "step", show=progress) as bar:
        bar.start_from(trial.step)
        while not stopped:
            record.advance()
            bar.advance(trial.step - bar.done, f"loss {record.losses[-1]:.4g}")
            report = record.end_of_epoch()
            if report is not None and on_epoch is not None:
                on_epoch(report)
            stopped = record.stopped() or ("interrupted" if interrupt.requested else "")
            if folder is not None and (stopped or time.monotonic() - written > SECONDS_BETWEEN_CHECKPOINTS):
                checkpoint.write(folder, record.tensors(), {**identity, "step": trial.step})
                written = time.monotonic()
    history = record.history()
    record.restore_best()
    return Run(
        trial.module,
        history,
        verdict(history.train_loss, per_epoch, lr),
        task,
        optimizer,
        seed,
        trial.step,
        "" if stopped == "finished" else stopped,
    )


def learning_rate(optimizer: Optimizer) -> float | None:
    """The optimizer's learning rate where it is one number.

    Raises:
        InvalidHyperparameter: when it is 0, with which nothing would be learnt.
    """
    lr = optimizer.arguments.get("lr")
    if isinstance(lr, int | float) and lr <= 0:
        raise InvalidHyperparameter(f"lr = {lr!r} would leave the model as it is: give a learning rate above 0.")
    return float(lr) if isinstance(lr, int | float) else None


def check_seed(seed: object) -> None:
    """A seed is a whole number that torch's generators take.

    Raises:
        InvalidSweep: for anything else.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InvalidSweep(f"seed = {seed!r} is not a whole number of at least 0.")


def check_budget(name: str, value: object) -> None:
    """Steps and epochs are whole numbers above 0.

    Raises:
        InvalidSweep: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidSweep(f"{name} = {value!r} is not a whole number of at least 1.")


def fingerprint(task: Task) -> str:
    """A digest of the data, so that a run is not resumed on other data."""
    digest = hashlib.blake2b(digest_size=16)
    for data in (task.train, task.validation):
        for tensor in (data.x, data.y):
            stride = max(1, tensor.numel() // 2**20)
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.reshape(-1)[::stride].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _budget(task: Task, epochs: int | None, steps: int | None) -> tuple[int, int]:
    """The number of steps, and how many make an epoch."""
    per_epoch = steps_per_epoch(len(task.train.x), task.batch_size, task.drop_last)
    if steps is not None and epochs is not None:
        raise InvalidSweep("give either epochs or steps, not both.")
    if steps is not None:
        check_budget("steps", steps)
        return steps, per_epoch
    epochs = 20 if epochs is None else epochs
    check_budget("epochs", epochs)
    return epochs * per_epoch, per_epoch


def _folder(out: str | Path | None, identity: dict[str, Any], resume: bool, record: _Record) -> Path | None:
    """The checkpoint folder, made with its first checkpoint, or with the record put back to what it holds."""
    if out is None:
        if resume:
            raise RunDirectoryError("resume=True needs the directory of the run: give out=….")
        return None
    place = Path(out)
    folder = place / CHECKPOINT
    found = checkpoint.read(folder)
    if found is None:
        if resume:
            raise RunDirectoryError(f"there is nothing to resume at {out}: it holds no checkpoint. Leave resume out.")
        for each in (place, *place.parents):
            if each.exists() and not each.is_dir():
                raise RunDirectoryError(f"{each} is a file: give a directory.")
        if place.is_dir() and any(place.iterdir()):
            raise RunDirectoryError(f"{out} holds other files and no checkpoint: give another directory.")
        was_there = place.exists()
        try:  # now, so that a disk that cannot be written to is found before anything is trained
            checkpoint.write(folder, record.tensors(), {**identity, "step": 0})
        except BaseException:
            if not was_there:
                shutil.rmtree(place, ignore_errors=True)
            raise
        return folder
    tensors, state = found
    if not resume:
        raise RunDirectoryError(f"{out} holds another run: resume it, or give another directory.")
    spans = "fl.schedules." in identity["optimizer"]
    for key, here in identity.items():
        there = state.get(key)
        if there != here and (key != "budget" or spans):
            raise RunDirectoryError(
                f"{out} holds another run: its {key} is {there!r}, not {here!r}. "
                "Resume with the settings of that run, or give another directory."
            )
    if state["step"] > identity["budget"]:
        raise RunDirectoryError(
            f"the run in {out} has made {state['step']} steps, more than the {identity['budget']} asked for. "
            "Ask for more, or give another directory."
        )
    record.restore(tensors, state["step"])
    return folder


class _Record:
    """A trial with what was recorded of it."""

    def __init__(self, trial: Trial, budget: int, per_epoch: int, patience: int | None) -> None:
        self.trial = trial
        self.budget = budget
        self.per_epoch = per_epoch
        self.patience = patience
        self.losses: list[float] = []
        self.evaluations: list[tuple[float, float, float]] = []  # step, metric, validation loss
        self.best_model: dict[str, torch.Tensor] = {}
        self._best = 0  # which evaluation was the best so far (the first of equals)
        self._at_once = 1

    def advance(self) -> None:
        """Trains towards the end of the epoch or of the budget, no further than a fraction of a second takes."""
        trial = self.trial
        count = min(self._at_once, self._end_of_epoch() - trial.step)
        began = time.monotonic()
        before = trial.step
        losses = trial.train_steps(count)
        self.losses.extend(losses[: trial.step - before].tolist())
        if time.monotonic() - began < SECONDS_BETWEEN_LOOKS / 2:
            self._at_once *= 2
        elif time.monotonic() - began > SECONDS_BETWEEN_LOOKS:
            self._at_once = max(1, self._at_once // 2)

    def end_of_epoch(self) -> EpochReport | None:
        """Evaluates if an epoch has just ended, or training has."""
        trial = self.trial
        if trial.alive and trial.step % self.per_epoch and trial.step < self.budget:
            return None
        metric, validation_loss = trial.evaluate() if trial.alive else (np.nan, np.nan)
        self._note(trial.step, metric, validation_loss)
        if self.patience is not None and self._best == len(self.evaluations) - 1:
            self.best_model = trial.parameters()
        return EpochReport(
            -(-trial.step // self.per_epoch),
            -(-self.budget // self.per_epoch),
            self.losses[-1],
            metric,
            validation_loss,
        )

    def stopped(self) -> str:
        """Why training is over, or "" while it is not."""
        if not self.trial.alive:
            return "diverged"
        if self.trial.step >= self.budget:
            return "finished"
        if self.patience is not None and len(self.evaluations) - 1 - self._best >= self.patience:
            return "early stopping"
        return ""

    def restore_best(self) -> None:
        """Gives the model the parameters of its best evaluation with `patience`, of the latest one without."""
        if self.best_model or self.trial.optimizer.moves_evaluation:
            self.trial.module.load_state_dict(self.best_model or self.trial.parameters())

    def history(self) -> History:
        evaluations = np.array(self.evaluations, dtype=np.float64).reshape(-1, 3)
        return History(
            step=np.arange(len(self.losses)),
            train_loss=np.array(self.losses, dtype=np.float64),
            evaluation_step=evaluations[:, 0].astype(np.int64),
            metric=evaluations[:, 1],
            validation_loss=evaluations[:, 2],
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            **{f"trial/{name}": tensor for name, tensor in self.trial.tensors().items()},
            **{f"best/{name}": tensor for name, tensor in self.best_model.items()},
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "evaluations": torch.tensor(self.evaluations, dtype=torch.float64).reshape(-1, 3),
        }

    def restore(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        self.losses = tensors["losses"].tolist()
        for evaluation in tensors["evaluations"].tolist():
            self._note(*evaluation)
        self.best_model = {n.removeprefix("best/"): t for n, t in tensors.items() if n.startswith("best/")}
        own = {n.removeprefix("trial/"): t for n, t in tensors.items() if n.startswith("trial/")}
        self.trial.restore(own, step)
        self.trial.alive = bool(np.isfinite(self.losses).all())

    def _end_of_epoch(self) -> int:
        return min(self.budget, (self.trial.step // self.per_epoch + 1) * self.per_epoch)

    def _note(self, step: float, metric: float, validation_loss: float) -> None:
        self.evaluations.append((step, metric, validation_loss))
        sign = 1 if self.trial.task.metric.higher_is_better else -1
        best = self.evaluations[self._best][1]
        if np.isfinite(metric) and (np.isnan(best) or sign * metric > sign * best):
            self._best = len(self.evaluations) - 1
