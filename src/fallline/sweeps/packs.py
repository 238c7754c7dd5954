"""Packs: the trials that are trained together, the unit that workers take, checkpoint and hand back."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from fallline.sweeps import engines
from fallline.sweeps.search import TrialPlan
from fallline.sweeps.vectorised import Array
from fallline.tasks import Task
from fallline.training import checkpoint

# A pack checkpoints itself at the end of a block when so many seconds have passed.
SECONDS_BETWEEN_CHECKPOINTS = 15.0
# How long Ctrl-C may have to wait.
SECONDS_PER_PIECE = 0.5
# Trials in a pack: enough to fill the vector units, few enough that parameters and optimizer state stay in the cache.
LARGEST_PACK = {"cpu": 64, "cuda": 4096}
# Numbers that a pack may hold in parameters, gradients and optimizer state.
LARGEST_STATE = {"cpu": 2**25, "cuda": 2**29}


@dataclass(frozen=True)
class Pack:
    """Trials that one worker trains as one population; all have one engine, and losses that differ in numbers only."""

    index: int
    trials: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """What a pack recorded between two evaluations.

    Attributes:
        pack: the pack's number.
        trials: [row], the trials that were in the pack when the block began.
        start: the step at which it began.
        train_loss: [row, step of the block].
        evaluated_at: the step at which it ended and was evaluated.
        metric, validation_loss: [row]; NaN for a trial that diverged.
    """

    pack: int
    trials: np.ndarray[Any, np.dtype[Any]]
    start: int
    train_loss: Array
    evaluated_at: int
    metric: Array
    validation_loss: Array


@dataclass(frozen=True)
class PackEnd:
    """A pack has ended: at its budget (or because all its trials diverged), or because it was asked to stop."""

    pack: int
    complete: bool


@dataclass(frozen=True)
class Job:
    """All that training a pack needs, the same for every pack of a sweep.

    Attributes:
        task: what is trained, under each trial's own loss.
        plans: every trial of the sweep.
        evaluate_every: steps between evaluations, which end a block.
        folder: the run directory.
        keep_parameters: "best" (of each configuration) or "all".
        traced: whether the vectorised engine traces its step.
        programs: the traced steps by shape; a cache, which each worker fills for itself.
    """

    task: Task
    plans: Sequence[TrialPlan]
    engine: str
    device: torch.device
    steps: int
    evaluate_every: int
    folder: Path
    keep_parameters: str
    traced: bool = False
    programs: dict[Any, Callable[..., Any]] = field(default_factory=dict, repr=False)


def make_packs(
    plans: Sequence[TrialPlan], *, engine: str, device: torch.device, numbers_per_trial: int, workers: int
) -> list[Pack]:
    """Cuts a sweep into packs of one kind of loss and one engine, alike in size.

    Trials of the same seed come together, because they share batches.
    """
    kind = device.type
    largest = max(1, min(LARGEST_PACK[kind], LARGEST_STATE[kind] // max(1, 6 * numbers_per_trial)))
    packs: list[Pack] = []
    alike: dict[tuple[Hashable, str], list[TrialPlan]] = {}
    for plan in plans:
        alike.setdefault((plan.configuration.loss.structure, engines.of_trial(engine, plan)), []).append(plan)
    for (_, own_engine), own in alike.items():
        own.sort(key=lambda plan: (plan.seed, plan.index))
        count = len(own) if own_engine == "sequential" else -(-len(own) // largest)
        count = min(len(own), -(-count // workers) * workers)
        for part in np.array_split(np.array([plan.index for plan in own]), count):
            packs.append(Pack(len(packs), tuple(int(i) for i in part)))
    return packs


def train_pack(job: Job, pack: Pack, stop: Callable[[], bool]) -> Iterator[Block | PackEnd]:
    """Trains a pack to the end, block by block, going on from its checkpoint if it has one.

    Args:
        stop: asked every moment; True writes a checkpoint, in the middle of a block too, and ends.
    """
    plans = [job.plans[i] for i in pack.trials]
    task = job.task.with_loss(plans[0].configuration.loss)
    engine = engines.of_trial(job.engine, plans[0])
    population = engines.start(
        engine, task, plans, steps=job.steps, device=job.device, programs=job.programs if job.traced else None
    )
    place = job.folder / "packs" / f"{pack.index:05d}"
    block = _restored(population, place)
    written = time.monotonic()
    while population.step < job.steps and population.alive.any():
        block = block or _BlockUnderWay(population.step, population.alive, [])
        end = min(job.steps, (block.begin // job.evaluate_every + 1) * job.evaluate_every)
        if not _train_until(end, population, block, stop):
            checkpoint.write(place, {**population.tensors(), **block.tensors()}, block.state(population.step))
            yield PackEnd(pack.index, complete=False)
            return
        alive = population.alive
        if job.keep_parameters == "all":
            for row in np.flatnonzero(block.under_way & ~alive).tolist():
                _save_parameters(job, population, row)
        metric, validation_loss = population.evaluate() if alive.any() else (np.zeros(len(alive)),) * 2
        metric, validation_loss = (np.where(alive, each, np.nan) for each in (metric, validation_loss))
        ended = end == job.steps or not alive.any()
        if ended:  # before the last block is sent: whoever has that can rely on the parameters
            for row in _rows_to_keep(job, population, metric):
                _save_parameters(job, population, row)
        rows = block.under_way
        losses = np.concatenate(block.losses, axis=1)[rows]
        yield Block(pack.index, population.rows[rows], block.begin, losses, end, metric[rows], validation_loss[rows])
        population.compact()
        block = None
        if not ended and time.monotonic() - written > SECONDS_BETWEEN_CHECKPOINTS:
            checkpoint.write(place, population.tensors(), {"step": population.step, "begin": population.step})
            written = time.monotonic()
    yield PackEnd(pack.index, complete=True)


@dataclass(frozen=True)
class _BlockUnderWay:
    """A block that is not finished: where it began, who was alive then, and the losses [row, step] so far."""

    begin: int
    under_way: np.ndarray[Any, np.dtype[np.bool_]]
    losses: list[Array]

    def tensors(self) -> dict[str, torch.Tensor]:
        losses = np.concatenate(self.losses, axis=1) if self.losses else np.zeros((len(self.under_way), 0))
        return {"block/under_way": torch.from_numpy(self.under_way), "block/losses": torch.from_numpy(losses)}

    def state(self, step: int) -> dict[str, int]:
        return {"step": step, "begin": self.begin}


def _restored(population: engines.Trained, place: Path) -> _BlockUnderWay | None:
    """Puts the population back to its checkpoint, if it has one; returns the block that was under way, if one was."""
    found = checkpoint.read(place)
    if found is None:
        return None
    tensors, state = found
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith("block/")}
    population.restore(own, state["step"])
    if "block/losses" not in tensors:
        return None
    losses = [tensors["block/losses"].numpy()]
    return _BlockUnderWay(state["begin"], tensors["block/under_way"].numpy(), losses)


def _train_until(end: int, population: engines.Trained, block: _BlockUnderWay, stop: Callable[[], bool]) -> bool:
    """Trains to the end of the block in pieces of about `SECONDS_PER_PIECE`; False if it was asked to stop before."""
    piece = 4
    left = end - block.begin - sum(losses.shape[1] for losses in block.losses)
    while left and population.alive.any():
        if stop():
            return False
        count = min(piece, left)
        began = time.monotonic()
        block.losses.append(population.train_steps(count))
        left -= count
        piece = max(1, min(2 * piece, int(count * SECONDS_PER_PIECE / max(time.monotonic() - began, 1e-6))))
    block.losses.append(np.full((len(block.under_way), left), np.nan))  # when all have diverged
    return True


def parameters_file(folder: Path, trial: int) -> Path:
    """Where a trial's final parameters are kept."""
    return folder / "parameters" / f"{trial:06d}.safetensors"


def _rows_to_keep(job: Job, population: engines.Trained, metric: Array) -> list[int]:
    """The rows whose parameters are kept: of the trials that did not diverge all, or the best of each configuration."""
    finished = np.flatnonzero(population.alive).tolist()
    if job.keep_parameters == "all":
        return finished
    sign = 1 if job.task.metric.higher_is_better else -1
    best: dict[int, int] = {}
    for row in finished:
        configuration = job.plans[int(population.rows[row])].configuration.index
        held = best.setdefault(configuration, row)
        if sign * metric[row] > sign * metric[held]:
            best[configuration] = row
    return list(best.values())


def _save_parameters(job: Job, population: engines.Trained, row: int) -> None:
    path = parameters_file(job.folder, int(population.rows[row]))
    tensors = {name: tensor.contiguous() for name, tensor in population.parameters(row).items()}
    checkpoint.write_file(path, safetensors.torch.save(tensors))
