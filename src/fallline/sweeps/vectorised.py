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
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from fallline.losses import Loss
from fallline.optim import Optimizer, State
from fallline.sweeps.captured import Captured
from fallline.sweeps.programs import Part, Programs, Run
from fallline.sweeps.search import TrialPlan
from fallline.sweeps.stacked import Batch, Stacked, leaves, mapped_tree, on_flat_list
from fallline.tasks import Task
from fallline.training.batches import BatchOrder
from fallline.training.layout import FLAT, Layout
from fallline.training.step import Program, gradients, joined

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]
Named = dict[str, Tensor]
# What runs a part of the step, and the tensors that it takes at every step.
Call = tuple[Run, list[Tensor]]
# Diverged trials leave the population when they are at least this share of it: every new size has its price.
WORTH_COMPACTING = 1 / 8
# Rows that are updated together on a CPU: what a rule computes on the way should stay in the cache until it is used.
LARGEST_FAMILY = 64
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


@dataclass
class Family:
    """Trials next to each other whose optimizers have one structure: their rows, numbers [row, 1] and state [row, …].

    Tensors of a state are written to in place, and stay where they are.
    """

    optimizer: Optimizer
    start: int
    stop: int
    numbers: Named
    state: State

    def rows(self, start: int, stop: int) -> Family:
        """A part of it, as views; `start` and `stop` count the population's rows."""
        rows = slice(start - self.start, stop - self.start)
        numbers = {name: tensor[rows] for name, tensor in self.numbers.items()}
        return Family(self.optimizer, start, stop, numbers, mapped_tree(self.state, lambda tensor: tensor[rows]))


@dataclass(frozen=True)
class Chunk:
    """Rows that are computed together, as views of the population's tensors; `slopes` holds their gradients."""

    start: int
    stop: int
    params: Named
    slopes: Named
    flat: Tensor
    flat_slopes: Tensor
    alive: Tensor
    constants: Named
    shared: Named
    loss_numbers: Named
    families: tuple[Family, ...]
    seeds: Tensor
    calls: dict[Hashable, Call] = field(default_factory=dict)

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


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
        # Of a step on a GPU, a graph for each chunk of rows, each shape of mini-batch and each phase.
        self._captures = device.type == "cuda" and programs is not None
        self._captured: dict[Hashable, Captured] = {}
        self._always_masked = device.type != "cpu" or chunk is not None
        self.layout: Layout
        self.stacked: Stacked
        self.constants: Named = {}
        self.shared: Named = {}
        self._flat: Tensor
        self._alive: Tensor
        ordered = sorted(plans, key=lambda plan: (repr(plan.configuration.optimizer.structure), plan.index))
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
        self._stack_models()
        self._alive[len(self.rows) :] = False
        self.loss_numbers = self._numbers_that_differ([plan.configuration.loss for plan in ordered])
        self.families = self._make_families([plan.configuration.optimizer for plan in ordered])
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
        for begin in range(0, count, STEPS_IN_A_ROW):
            recorded = losses[:, begin : begin + STEPS_IN_A_ROW]
            indices = self._indices(recorded.shape[1])
            waiting = list(reversed(self._chunks))
            made = {id(chunk): 0 for chunk in waiting}
            while waiting:
                chunk = waiting.pop()
                for position in range(made[id(chunk)], len(indices)):
                    try:
                        recorded[chunk.rows, position] = self._one_step(chunk, indices[position], self.step + position)
                    except torch.OutOfMemoryError:
                        halves = self._halve(chunk)
                        made.update({id(half): position for half in halves})
                        waiting.extend(reversed(halves))
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
        if alive.all() or not alive.any():
            if not alive.any():
                self._keep(np.flatnonzero(alive))
            return
        after = -(-int(alive.sum()) // self._multiple) * self._multiple
        if after < len(self._flat) and len(self._flat) - after >= WORTH_COMPACTING * len(self._flat):
            self._keep(np.flatnonzero(alive))

    def parameters(self, row: int) -> Named:
        """A copy of one trial's parameters and buffers, on the CPU."""
        own = {**self.layout.views(self._evaluation_parameters()), **self.constants}
        everything = {**{name: tensor[row] for name, tensor in own.items()}, **self.shared}
        return {name: tensor.detach().cpu().clone() for name, tensor in everything.items()}

    def tensors(self) -> Named:
        """Everything that going on from here needs, as tensors by name."""
        count = len(self.rows)
        kept = {"parameters": self._flat, "alive": self._alive}
        kept.update({f"constants/{name}": tensor for name, tensor in self.constants.items()})
        for number, family in enumerate(self.families):
            kept[f"family/{number}/step"] = family.state["step"]
            for name, slots in family.state["slots"].items():
                kept.update({f"family/{number}/slots/{slot}/{name}": tensor for slot, tensor in slots.items()})
        return {**{name: tensor.clone() for name, tensor in kept.items()}, "rows": torch.from_numpy(self.rows[:count])}

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
        self.step = step

    @_quietly
    def losses_and_gradients(self) -> tuple[Tensor, Named]:
        """Of every trial on its mini-batch of this step: losses [row] and gradients [row, *shape]."""
        (index,) = self._indices(1)
        whole = self._chunk(0, len(self._flat))
        return self.stacked.losses_and_gradients(whole.params, self._batch(index, whole))

    def prepare(self) -> None:
        """Makes the programs of a whole and of a short mini-batch, without a step."""
        last = next(iter(self.orders.values())).steps_per_epoch - 1
        for step in dict.fromkeys((0, min(last, self.steps - 1))):
            index = self._indices_at(step)
            for chunk in self._chunks:
                batch = self._batch(index, chunk)
                self._differentiation(chunk, batch)
                for family in chunk.families:
                    self._updating(chunk, family, step, batch)

    @property
    def _multiple(self) -> int:
        """Programs are made for a multiple of so many rows."""
        return self.chunk or (1 if self.programs is None else min(ROWS_OF_A_PROGRAM, len(self.rows)))

    def _one_step(self, chunk: Chunk, index: Tensor, step: int) -> Tensor:
        """One step of some rows; their losses as they are recorded."""
        batch = self._batch(index, chunk)
        if not self._captures:
            return self._computed(chunk, batch, step)
        key = "captured", batch.dim, batch.x.shape, tuple(family.optimizer.phase(step) for family in chunk.families)
        captured = self._captured.get((id(chunk), key))
        if captured is None:

            def compute(inputs: list[Tensor]) -> Tensor:
                return self._computed(chunk, replace(batch, x=inputs[0], y=inputs[1]), step)

            captured = self._captured[id(chunk), key] = Captured(compute)
        try:
            return captured([batch.x, batch.y])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # something in the model cannot be captured, and is run
            self._captures = False
            return self._computed(chunk, batch, step)

    def _computed(self, chunk: Chunk, batch: Batch, step: int) -> Tensor:
        run, tensors = self._differentiation(chunk, batch)
        (recorded,) = run([*tensors, batch.x, batch.y])
        for family in chunk.families:
            run, tensors = self._updating(chunk, family, step, batch)
            run(tensors)
        return recorded

    def _differentiation(self, chunk: Chunk, batch: Batch) -> Call:
        """The first part of a step of some rows; what it still takes is the mini-batch."""
        key = batch.dim, batch.x.shape
        call = chunk.calls.get(key)
        if call is not None:
            return call
        dim = batch.dim
        trees: list[Any] = [chunk.params, chunk.slopes, chunk.alive, chunk.constants, chunk.shared, chunk.loss_numbers]

        def differentiate(params: Named, slopes: Named, alive: Tensor, *seen: Any) -> list[Tensor]:
            constants, shared, numbers, x, y = seen
            return [self.stacked.differentiate(params, slopes, alive, Batch(dim, x, y, constants, shared, numbers))]

        tensors = [tensor for tree in trees for tensor in leaves(tree)]
        count = chunk.stop - chunk.start
        part = Part(
            ("differentiate", count, dim, tuple(batch.x.shape), tuple(batch.y.shape), self._loss_key),
            on_flat_list(differentiate, [*trees, batch.x, batch.y]),
            "the forward and backward pass",
            rare=self._is_rare(batch),
        )
        call = chunk.calls[key] = self._run_of(part, [*tensors, batch.x, batch.y]), tensors
        return call

    def _updating(self, chunk: Chunk, family: Family, step: int, batch: Batch) -> Call:
        """The second part of a step of a family's rows in a chunk, and all that it takes."""
        optimizer = family.optimizer
        own = slice(family.start - chunk.start, family.stop - chunk.start)
        # On a CPU asking whether all are alive is free, and saves a pass over the parameters.
        masked = self._always_masked or not bool(chunk.alive[own].all())
        phase = optimizer.phase(step)
        surveyed = batch.rows(own) if optimizer.surveys(step) else None
        seen = None if surveyed is None else (surveyed.dim, surveyed.x.shape)
        key = family.start, masked, phase, seen
        call = chunk.calls.get(key)
        if call is None:
            if optimizer.elementwise:
                grads, params = {FLAT: chunk.flat_slopes[own]}, {FLAT: chunk.flat[own]}
            else:
                grads, params = ({name: t[own] for name, t in each.items()} for each in (chunk.slopes, chunk.params))
            trees: list[Any] = [grads, params, chunk.alive[own], family.state, family.numbers]
            around: list[Any] = []
            if surveyed is not None:
                around = [surveyed.constants, surveyed.shared, surveyed.loss_numbers, surveyed.x, surveyed.y]

            def update(*trees: Any) -> None:
                batch = None
                if surveyed is not None:
                    batch = Batch(surveyed.dim, trees[8], trees[9], *trees[5:8])
                grads, params, alive, state, numbers = trees[:5]
                self.stacked.update(optimizer, step, masked, grads, params, alive, state, numbers, batch)

            tensors = [tensor for tree in (*trees, *around[:3]) for tensor in leaves(tree)]
            part = Part(
                ("update", optimizer.structure, own.stop - own.start, masked, self.steps, phase, seen, self._loss_key),
                on_flat_list(update, [*trees, *around]),
                f"the update of {optimizer.name}",
                rare=surveyed is not None and self._is_rare(surveyed),
            )
            call = chunk.calls[key] = self._run_of(part, [*tensors, *around[3:]]), tensors
        run, tensors = call
        return call if surveyed is None else (run, [*tensors, surveyed.x, surveyed.y])

    def _is_rare(self, batch: Batch) -> bool:
        """Whether it is a short last mini-batch, one among many."""
        samples = batch.x.shape[0 if batch.dim is None else 1]
        return samples < self.task.batch_size and next(iter(self.orders.values())).steps_per_epoch >= 10

    def _run_of(self, part: Part, tensors: list[Tensor]) -> Run:
        return part.run if self.programs is None else self.programs.of(part, tensors)

    def _evaluate(self, chunk: Chunk, flat: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.validation
        constants = {**chunk.constants, **chunk.shared}
        dims = {**dict.fromkeys(chunk.constants, 0), **dict.fromkeys(chunk.shared)}
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
        position = {seed: i for i, seed in enumerate(self.orders)}
        self._seed_of_row = torch.tensor([position[seed] for seed in self.seeds], device=self.device)
        self._slopes = torch.zeros_like(self._flat)
        shared = tuple((n, number) for n, number in self.task.loss.numbers.items() if n not in self.loss_numbers)
        self._captured.clear()
        self._loss_key = (self.task.loss.structure, shared)
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
        return Chunk(
            start, stop, params, own_slopes, flat, slopes, alive, constants, self.shared, numbers, families, seeds
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

    def _batch(self, index: Tensor, chunk: Chunk) -> Batch:
        """The mini-batches of some rows; one for all where there is one seed."""
        x, y = self.train
        if len(index) == 1:
            x, y = (data.index_select(0, index[0]) for data in (x, y))
            return Batch(None, x, y, chunk.constants, chunk.shared, chunk.loss_numbers)
        chosen = index[chunk.seeds]
        x, y = (data.index_select(0, chosen.flatten()).unflatten(0, chosen.shape) for data in (x, y))
        return Batch(0, x, y, chunk.constants, chunk.shared, chunk.loss_numbers)

    def _stack_models(self) -> None:
        """Initial parameters and constants of every row, from one model per seed."""
        flats: dict[int, Tensor] = {}
        constants: dict[int, dict[str, Tensor]] = {}
        with torch.random.fork_rng([]):
            module = self.task.build_model(self.seeds[0])
            used, changed = self._parameters_in_use(Program(module, self.task.loss))
            for seed in self.orders:
                program = Program(self.task.build_model(seed), self.task.loss)
                params = program.trainable()
                self.layout = Layout.of({name: params[name] for name in used})
                unused = {name: p.detach() for name, p in params.items() if name not in used}
                flats[seed] = self.layout.flatten({name: params[name].detach() for name in used})
                constants[seed] = {**unused, **program.constants()}
        program = Program(program.module.to(self.device).train(), self.task.loss)
        self.stacked = Stacked(program, self.layout, self.steps)
        self._flat = torch.stack([flats[seed] for seed in self.seeds]).to(self.device)
        first = constants[self.seeds[0]]
        self.shared = {
            name: tensor.to(self.device)
            for name, tensor in first.items()
            if name not in changed and all(torch.equal(tensor, own[name]) for own in constants.values())
        }
        self.constants = {
            name: torch.stack([constants[seed][name] for seed in self.seeds]).to(self.device)
            for name in first
            if name not in self.shared
        }
        self._alive = torch.ones(len(self.seeds), 1, dtype=torch.bool, device=self.device)

    def _parameters_in_use(self, program: Program) -> tuple[list[str], list[str]]:
        """The parameters that get a gradient, and the buffers that a step changes.

        torch.optim leaves parameters without a gradient as they are, and so do we.
        """
        before = {name: buffer.clone() for name, buffer in program.module.named_buffers()}
        index = next(iter(self.orders.values())).at(0)
        params = program.trainable()
        loss = self.task.loss(
            program.module(self.task.train.x.index_select(0, index)), self.task.train.y.index_select(0, index)
        )
        found = gradients(loss, params)
        changed = [name for name, buffer in program.module.named_buffers() if not torch.equal(buffer, before[name])]
        return [name for name in params if name in found], changed

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
        while start < len(optimizers):
            structure = optimizers[start].structure
            stop = start + 1
            end = len(optimizers) if self.device.type != "cpu" else min(len(optimizers), start + LARGEST_FAMILY)
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


def _filled_up(count: int, multiple: int) -> list[int]:
    """0, …, count − 1 and the last again and again, up to a multiple.

    >>> _filled_up(3, 2)
    [0, 1, 2, 2]
    """
    return [min(i, count - 1) for i in range(-(-count // multiple) * multiple)]
