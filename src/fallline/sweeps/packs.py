"""Packs: the trials that are trained together, the unit that workers take, checkpoint and hand back."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from fallline.sweeps import engines
from fallline.sweeps.programs import Programs
from fallline.sweeps.search import TrialPlan
from fallline.sweeps.vectorised import Array
from fallline.tasks import Task
from fallline.training import checkpoint

# A pack checkpoints itself at the end of a block when so many seconds have passed.
SECONDS_BETWEEN_CHECKPOINTS = 15.0
# How long Ctrl-C may have to wait.
SECONDS_PER_PIECE = 0.5
# Trials in a pack, at most; what stays in the cache or fits into the memory is mostly less.
LARGEST_PACK = {"cpu": 2048, "cuda": 4096}
# Trials whose optimizers have one structure get packs of their own when there are so many of them.
ENOUGH_FOR_A_PACK = 16


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
        programs: the programs of the vectorised engine's step, to which each worker may add; None makes none.
        chunk: rows of a population that are computed together; None for all.
    """

    task: Task
    plans: Sequence[TrialPlan]
    engine: str
    device: torch.device
    steps: int
    evaluate_every: int
    folder: Path
    keep_parameters: str
    programs: Programs | None = None
    chunk: int | None = None


def make_packs(
    plans: Sequence[TrialPlan], *, engine: str, largest: int, workers: int, chunk: int | None = None
) -> list[Pack]:
    """Cuts a sweep into packs of one kind of loss and one engine, alike in size.

    Trials of one kind of optimizer come together where there are enough of them, because they are updated together; and
    those of the same seed, because they share batches.

    Args:
        largest: trials in a pack.
        workers: how many packs are trained side by side.
        chunk: rows that are computed together; packs are cut at multiples of it where there are enough trials.
    """
    alike: dict[tuple[Hashable, str, Hashable], list[TrialPlan]] = {}
    for plan in plans:
        loss, own_engine = plan.configuration.loss.structure, engines.of_trial(engine, plan)
        alike.setdefault((loss, own_engine, plan.configuration.optimizer.structure), []).append(plan)
    largest = max(1, largest)
    groups: dict[tuple[Hashable, str, Hashable], list[TrialPlan]] = {}
    for (loss, own_engine, structure), own in alike.items():
        few = len(own) < min(ENOUGH_FOR_A_PACK, largest)
        groups.setdefault((loss, own_engine, None if few else structure), []).extend(own)
    packs: list[Pack] = []
    for (_, own_engine, _), own in groups.items():
        own.sort(key=lambda plan: (plan.seed, plan.index))
        if own_engine == "sequential":
            cuts = [[plan] for plan in own]
        elif chunk is not None:
            size = chunk * max(1, min(largest, -(-len(own) // workers)) // chunk)
            cuts = [own[start : start + size] for start in range(0, len(own), size)]
        else:
            count = min(len(own), -(-len(own) // (largest * workers)) * workers)
            cuts = [[own[i] for i in part] for part in np.array_split(np.arange(len(own)), count)]
        packs += [Pack(len(packs) + i, tuple(plan.index for plan in part)) for i, part in enumerate(cuts)]
    return packs


def train_pack(job: Job, pack: Pack, stop: Callable[[], bool]) -> Iterator[Block | PackEnd]:
    """Trains a pack to the end, block by block, going on from its checkpoint if it has one.

    Args:
        stop: asked every moment; True writes a checkpoint, in the middle of a block too, and ends.
    """
    plans = [job.plans[i] for i in pack.trials]
    population = engines.start(
        job.engine, job.task, plans, steps=job.steps, device=job.device, programs=job.programs, chunk=job.chunk
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
