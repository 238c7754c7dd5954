"""The vectorised engine: a population trained as one tensor program.

The parameters of all trials are stacked: row t of a flat matrix [trial, numbers] holds trial t's parameters, and each
parameter is a view [trial, *shape] of it. Trials whose optimizers differ only in numbers lie next to each other, a
family. No operation mixes rows, so a trial does not depend on its neighbours.

A step is computed chunk by chunk: so many rows as stay in the cache, or fit into a device's memory. The programs that
compute it are made for a number of rows, so a population is filled up to a multiple of it: by copies of trials, which
are not alive and are not seen from outside.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from fallline.losses import Loss
from fallline.optim import Optimizer
from fallline.sweeps.chunks import Chunk, Family, Steps
from fallline.sweeps.draws import Streams
from fallline.sweeps.models import stacked_models
from fallline.sweeps.programs import Programs
from fallline.sweeps.search import TrialPlan
from fallline.sweeps.stacked import Batch, Named, Stacked, mapped_tree, with_dims
from fallline.tasks import Task
from fallline.training.batches import BatchOrder
from fallline.training.step import joined

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]
# Diverged trials leave the population when they are at least this share of it: every new size has its price.
WORTH_COMPACTING = 1 / 8
# And where a new size needs new programs, when they spare at least so many steps of a row.
ROW_STEPS_OF_A_PROGRAM = 20_000
# Numbers that are updated together on a CPU where there are no chunks: what a rule computes on the way should stay in
# the cache until it is used.
LARGEST_FAMILY = 2**19
# Samples per mapped forward pass when the population is evaluated.
EVALUATION_CHUNK = 512
# So many steps are made of one chunk of rows before the next one's turn: its parameters stay in the cache.
STEPS_IN_A_ROW = 32
# Without programs for a fixed number of rows, a population may have any; traced ones are made for multiples of this.
ROWS_OF_A_PROGRAM = 8

P = ParamSpec("P")
R = TypeVar("R")


def _quietly(function: Callable[P, R]) -> Callable[P, R]:
    """torch warns of operations that it maps one by one; they are slower than others, and right."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return function(*args, **kwargs)

    return wrapper


class Population:
    """Trials trained together. `rows` holds the number of each trial that is still in it.

    Args:
        task: what is trained.
        plans: the trials.
        steps: how many updates training has in all.
        device: where it is trained.
        programs: programs that were made before, and those that are made here; None runs the functions as they are.
        chunk: rows that are computed together; by default all of them.
    """

    def __init__(
        self,
        task: Task,
        plans: Sequence[TrialPlan],
        *,
        steps: int,
        device: torch.device,
        programs: Programs | None = None,
        chunk: int | None = None,
    ) -> None:
        self.task = task
        self.programs = programs
        self.steps = steps
        self.device = device
        self.step = 0
        self.chunk = chunk
        ordered = in_order(plans)
        self.rows = np.array([plan.index for plan in ordered])
        self.train = (task.train.x.to(device), task.train.y.to(device))
        self.validation = (task.validation.x.to(device), task.validation.y.to(device))
        filled = _filled_up(len(ordered), self._multiple)
        ordered = [ordered[i] for i in filled]
        self.seeds = [plan.seed for plan in ordered]
        self.orders = {
            seed: BatchOrder(len(task.train.x), task.batch_size, seed, drop_last=task.drop_last, shuffle=task.shuffle)
            for seed in dict.fromkeys(self.seeds)
        }
        self._order = self.orders[self.seeds[0]]
        first = stacked_models(task, self.seeds, self._order, device)
        self.layout, self.constants, self.shared, self._flat = first.layout, first.constants, first.shared, first.flat
        self.stacked = Stacked(first.program, first.layout, steps)
        self._draws = first.draws
        self.streams = Streams(first.generators, device) if any(first.draws.values()) else None
        self._alive = torch.ones(len(self.seeds), 1, dtype=torch.bool, device=device)
        self._alive[len(self.rows) :] = False
        self.loss_numbers = self._numbers_that_differ([plan.configuration.loss for plan in ordered])
        self.families = self._make_families([plan.configuration.optimizer for plan in ordered])
        # That stays so: programs for one mini-batch and for several are not the same.
        self._one_seed_each = one_seed_each(self.seeds, chunk)
        self._lay_out()

    @property
    def alive(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """[row], whether the trial's losses have all been finite."""
        alive: np.ndarray[Any, np.dtype[np.bool_]] = self._alive[: len(self.rows)].squeeze(1).cpu().numpy()
        return alive.copy()

    @_quietly
    def train_steps(self, count: int) -> Array:
        """Makes `count` steps; returns their mini-batch losses [row, count], NaN after the one that diverged."""
        losses = torch.empty(len(self._flat), count, dtype=torch.float64, device=self.device)
        in_a_row = STEPS_IN_A_ROW if self.streams is None else 1  # random numbers of many steps would fill the cache
        for begin in range(0, count, in_a_row):
            recorded = losses[:, begin : begin + in_a_row]
            indices = self._indices(recorded.shape[1])
            noise = [] if self.streams is None else self.streams.next(self._draws[indices[0].shape[1]])
            waiting = [(chunk, 0) for chunk in reversed(self._chunks)]
            while waiting:
                chunk, made = waiting.pop()
                for position in range(made, len(indices)):
                    try:
                        batch = self._batch(indices[position], chunk, noise)
                        recorded[chunk.rows, position] = self._steps.step(chunk, batch, self.step + position)
                    except torch.OutOfMemoryError:
                        waiting.extend((half, position) for half in reversed(self._halve(chunk)))
                        break
            self.step += len(indices)
        return losses[: len(self.rows)].cpu().numpy()

    @_quietly
    def evaluate(self) -> tuple[Array, Array]:
        """The metric and the loss [row] on the validation data, in evaluation mode."""
        module = self.stacked.program.module
        module.eval()
        metrics: list[Tensor] = []
        losses: list[Tensor] = []
        waiting = list(reversed(self._chunks))
        with torch.no_grad():
            flat = self._evaluation_parameters()
            while waiting:
                chunk = waiting.pop()
                try:
                    metric, loss = self._evaluate(chunk, flat[chunk.rows])
                except torch.OutOfMemoryError:
                    waiting.extend(reversed(self._halve(chunk)))
                    continue
                metrics.append(metric)
                losses.append(loss)
        module.train()
        found = (torch.cat(each)[: len(self.rows)].double().cpu().numpy() for each in (metrics, losses))
        metric_of_rows, loss_of_rows = found
        return metric_of_rows, loss_of_rows

    def compact(self) -> None:
        """Lets diverged trials leave, so that they stop costing, once there are enough of them to be worth it."""
        alive = self.alive
        if not alive.any():
            self._keep(np.flatnonzero(alive))
            return
        if self.chunk is not None and self._one_seed_each and len(self.orders) > 1:
            # Whole chunks leave, so that each still has one seed.
            under_way = alive.copy()
            for start in range(0, len(alive), self.chunk):
                under_way[start : start + self.chunk] = alive[start : start + self.chunk].any()
            if not under_way.all():
                self._keep(np.flatnonzero(under_way))
            return
        gone = len(self._flat) - -(-int(alive.sum()) // self._multiple) * self._multiple
        renewed = self.programs is not None and self.chunk is None
        enough = ROW_STEPS_OF_A_PROGRAM if renewed else 0
        if gone and gone >= WORTH_COMPACTING * len(self._flat) and gone * (self.steps - self.step) >= enough:
            self._keep(np.flatnonzero(alive))

    def parameters(self, row: int) -> Named:
        """A copy of one trial's parameters and buffers, on the CPU."""
        own = {**self.layout.views(self._evaluation_parameters()), **self.constants}
        everything = {**{name: tensor[row] for name, tensor in own.items()}, **self.shared}
        return {name: tensor.detach().cpu().clone() for name, tensor in everything.items()}

    def tensors(self) -> Named:
        """Everything that going on from here needs, as tensors by name."""
        kept = {"parameters": self._flat, "alive": self._alive}
        kept.update({f"constants/{name}": tensor for name, tensor in self.constants.items()})
        for number, family in enumerate(self.families):
            kept[f"family/{number}/step"] = family.state["step"]
            for name, slots in family.state["slots"].items():
                kept.update({f"family/{number}/slots/{slot}/{name}": tensor for slot, tensor in slots.items()})
        if self.streams is not None:
            kept.update({f"draws/{seed}": state for seed, state in self.streams.tensors().items()})
        return {**{name: tensor.clone() for name, tensor in kept.items()}, "rows": torch.from_numpy(self.rows)}

    def restore(self, tensors: Named, step: int) -> None:
        """Goes back to where `tensors()` were taken, after `step` steps."""
        inside = np.isin(self.rows, tensors["rows"].numpy())
        self._keep(np.flatnonzero(inside))
        self._flat.copy_(tensors["parameters"])
        self._alive.copy_(tensors["alive"])
        for name, tensor in self.constants.items():
            tensor.copy_(tensors[f"constants/{name}"])
        for number, family in enumerate(self.families):
            family.state["step"].copy_(tensors[f"family/{number}/step"])
            for name, slots in family.state["slots"].items():
                for slot in slots:
                    slots[slot].copy_(tensors[f"family/{number}/slots/{slot}/{name}"])
        if self.streams is not None:
            states = {n.removeprefix("draws/"): state for n, state in tensors.items() if n.startswith("draws/")}
            self.streams.restore({str(seed): states[str(seed)] for seed in self.orders})
        self.step = step

    @_quietly
    def losses_and_gradients(self) -> tuple[Tensor, Named]:
        """Of every trial on its mini-batch of this step: losses [row] and gradients [row, *shape]."""
        (index,) = self._indices(1)
        (whole,) = self._chunks
        noise = self._example_of_noise(index.shape[1])
        return self.stacked.losses_and_gradients(whole.params, self._batch(index, whole, noise))

    def prepare(self) -> None:
        """Makes the programs of a whole and of a short mini-batch, without a step."""
        last = self._order.steps_per_epoch - 1
        for step in dict.fromkeys((0, min(last, self.steps - 1))):
            index = self._indices_at(step)
            noise = self._example_of_noise(index.shape[1])
            for chunk in self._chunks:
                self._steps.prepare(chunk, self._batch(index, chunk, noise), step)

    @property
    def _multiple(self) -> int:
        """Programs are made for a multiple of so many rows."""
        return self.chunk or (1 if self.programs is None else min(ROWS_OF_A_PROGRAM, len(self.rows)))

    def _evaluate(self, chunk: Chunk, flat: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.validation
        constants, dims = with_dims(chunk.constants, chunk.shared)
        forward = vmap(self.stacked.program.predict, in_dims=(0, dims, None))
        params = self.layout.views(flat)
        prediction = joined([forward(params, constants, part) for part in x.split(EVALUATION_CHUNK)], dim=1)
        metric = vmap(self.task.metric, in_dims=(0, None))(prediction, y)
        return metric, vmap(self._loss, in_dims=(0, None, 0))(prediction, y, chunk.loss_numbers)

    def _evaluation_parameters(self) -> Tensor:
        """The parameters [row, numbers] with which each trial is evaluated."""
        if not any(family.optimizer.moves_evaluation for family in self.families):
            return self._flat
        chosen = self._flat.clone()
        for family in self.families:
            if family.optimizer.moves_evaluation:
                rows = slice(family.start, family.stop)
                chosen[rows] = self.stacked.evaluation_parameters(
                    family.optimizer, self._flat[rows], family.state, family.numbers
                )
        return chosen

    def _keep(self, rows: np.ndarray[Any, Any]) -> None:
        """Only these rows stay, and copies of them up to a multiple of what programs are made for."""
        self.rows = self.rows[rows]
        kept = rows[_filled_up(len(rows), self._multiple)] if len(rows) else rows
        keep = torch.from_numpy(kept).to(self.device)
        families = []
        start = 0
        for family in self.families:
            own = keep[(keep >= family.start) & (keep < family.stop)] - family.start
            if len(own):
                numbers = {name: tensor[own] for name, tensor in family.numbers.items()}
                state = mapped_tree(family.state, functools.partial(torch.index_select, dim=0, index=own))
                families.append(Family(family.optimizer, start, start + len(own), numbers, state))
                start += len(own)
        self.families = families
        self._flat = self._flat[keep]
        self.constants = {name: tensor[keep] for name, tensor in self.constants.items()}
        self.loss_numbers = {name: tensor[keep] for name, tensor in self.loss_numbers.items()}
        self.seeds = [self.seeds[i] for i in kept]
        self._alive = self._alive[keep]
        self._alive[len(rows) :] = False
        self._lay_out()

    def _halve(self, chunk: Chunk) -> list[Chunk]:
        """The chunk in two, from now on: it did not fit into the device's memory.

        Raises:
            torch.OutOfMemoryError: when it is a single row.
        """
        size = chunk.stop - chunk.start
        if size == 1:
            raise torch.OutOfMemoryError(
                f"a single trial with its mini-batch of {self.task.batch_size} does not fit into the memory of "
                f"{self.device}: give a smaller batch_size."
            )
        torch.cuda.empty_cache() if self.device.type == "cuda" else None
        middle = chunk.start + size // 2
        halves = [self._chunk(chunk.start, middle), self._chunk(middle, chunk.stop)]
        place = next(i for i, each in enumerate(self._chunks) if each is chunk)
        self._chunks[place : place + 1] = halves
        return halves

    def _lay_out(self) -> None:
        """What depends on which rows there are."""
        self.orders = {seed: self.orders[seed] for seed in dict.fromkeys(self.seeds)}
        if self.streams is not None:
            self.streams.keep(self.orders)
        position = {seed: i for i, seed in enumerate(self.orders)}
        self._seed_of_row = torch.tensor([position[seed] for seed in self.seeds], device=self.device)
        self._slopes = torch.zeros_like(self._flat)
        shared = tuple((n, number) for n, number in self.task.loss.numbers.items() if n not in self.loss_numbers)
        self._steps = Steps(
            self.stacked,
            self.programs,
            loss_key=(self.task.loss.structure, shared),
            order=self._order,
            device=self.device,
            always_masked=self.device.type != "cpu" or self.chunk is not None,
        )
        size = self.chunk or len(self._flat) or 1
        self._chunks = [
            self._chunk(start, min(start + size, len(self._flat))) for start in range(0, len(self._flat), size)
        ]

    def _chunk(self, start: int, stop: int) -> Chunk:
        rows = slice(start, stop)
        flat, slopes = self._flat[rows], self._slopes[rows]
        families = tuple(
            family.rows(max(start, family.start), min(stop, family.stop))
            for family in self.families
            if family.start < stop and start < family.stop
        )
        constants = {name: tensor[rows] for name, tensor in self.constants.items()}
        numbers = {name: tensor[rows] for name, tensor in self.loss_numbers.items()}
        params, own_slopes = self.layout.views(flat), self.layout.views(slopes)
        alive, seeds = self._alive[rows], self._seed_of_row[rows]
        seed = list(self.orders).index(self.seeds[start]) if self._one_seed_each else None
        return Chunk(
            start,
            stop,
            params,
            own_slopes,
            flat,
            slopes,
            alive,
            constants,
            self.shared,
            numbers,
            families,
            seeds,
            seed,
        )

    def _indices(self, count: int) -> list[Tensor]:
        """The samples [seed, sample] of the next steps, on the device."""
        made = [self._indices_at(step, move=False) for step in range(self.step, self.step + count)]
        if self.device.type == "cpu" or not made:
            return made
        moved = torch.cat([each.flatten() for each in made]).to(self.device)
        parts = moved.split([each.numel() for each in made])
        return [part.view(each.shape) for part, each in zip(parts, made, strict=True)]

    def _indices_at(self, step: int, *, move: bool = True) -> Tensor:
        found = torch.stack([order.at(step) for order in self.orders.values()])
        return found.to(self.device) if move else found

    def _example_of_noise(self, samples: int) -> list[Tensor]:
        """What the next step with so many samples would draw; the streams stay where they are."""
        if self.streams is None:
            return []
        before = self.streams.tensors()
        values = self.streams.next(self._draws[samples])
        self.streams.restore(before)
        return values

    def _batch(self, index: Tensor, chunk: Chunk, noise: list[Tensor]) -> Batch:
        """The mini-batches of some rows, and their random numbers; one for all where they have one seed."""
        own = chunk.constants, chunk.shared, chunk.loss_numbers, self._draws.get(index.shape[1], ())
        if chunk.seed is not None:
            x, y = (data.index_select(0, index[chunk.seed]) for data in self.train)
            return Batch(None, x, y, *own, tuple(value[chunk.seed] for value in noise))
        chosen = index[chunk.seeds]
        x, y = (data.index_select(0, chosen.flatten()).unflatten(0, chosen.shape) for data in self.train)
        return Batch(0, x, y, *own, tuple(value.index_select(0, chunk.seeds) for value in noise))

    def _loss(self, prediction: Any, y: Tensor, numbers: dict[str, Tensor]) -> Tensor:
        return self.stacked.program.at(numbers).loss(prediction, y)

    def _numbers_that_differ(self, losses: Sequence[Loss]) -> dict[str, Tensor]:
        """The numbers [row] of the trials' losses; those that all share are left to the loss itself, as constants."""
        return {
            name: torch.tensor([float(loss.numbers[name]) for loss in losses], dtype=torch.float64, device=self.device)
            for name in losses[0].numbers
            if len({float(loss.numbers[name]) for loss in losses}) > 1
        }

    def _make_families(self, optimizers: Sequence[Optimizer]) -> list[Family]:
        families: list[Family] = []
        start = 0
        whole = self.chunk is not None or self.device.type != "cpu"
        most = len(optimizers) if whole else max(1, LARGEST_FAMILY // max(1, self.layout.size))
        while start < len(optimizers):
            structure = optimizers[start].structure
            stop = start + 1
            end = min(len(optimizers), start + most)
            while stop < end and optimizers[stop].structure == structure:
                stop += 1
            own = optimizers[start:stop]
            numbers = {
                name: torch.tensor([[o.numbers[name]] for o in own], dtype=torch.float64, device=self.device)
                for name in own[0].numbers
            }
            seeds = torch.tensor(self.seeds[start:stop], device=self.device)
            state = self.stacked.initial_state(own[0], self._flat[start:stop], numbers, seeds)
            families.append(Family(own[0], start, stop, numbers, state))
            start = stop
        return families


def in_order(plans: Sequence[TrialPlan]) -> list[TrialPlan]:
    """Trials as they lie in a population: one kind of optimizer after the other, those of one seed together."""
    return sorted(plans, key=lambda plan: (repr(plan.configuration.optimizer.structure), plan.seed, plan.index))


def one_seed_each(seeds: Sequence[int], chunk: int | None) -> bool:
    """Whether the rows of every chunk have one seed.

    >>> one_seed_each([0, 0, 1, 1], 2), one_seed_each([0, 0, 1, 1], None)
    (True, False)
    """
    size = chunk or len(seeds)
    return all(len(set(seeds[start : start + size])) == 1 for start in range(0, len(seeds), size))


def _filled_up(count: int, multiple: int) -> list[int]:
    """0, …, count − 1 and the last again and again, up to a multiple.

    >>> _filled_up(3, 2)
    [0, 1, 2, 2]
    """
    return [min(i, count - 1) for i in range(-(-count // multiple) * multiple)]
