"""Rows of a population that are computed together, and how a step of them is run."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fallline.optim import Optimizer, State
from fallline.sweeps.captured import Captured, NotCaptured
from fallline.sweeps.programs import Part, Programs, Run
from fallline.sweeps.stacked import Batch, Named, Stacked, leaves, mapped_tree, on_flat_list
from fallline.training.batches import BatchOrder
from fallline.training.layout import FLAT

# What runs a part of the step, and the tensors that it takes at every step.
Call = tuple[Run, list[Tensor]]


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
    """Rows that are computed together, as views of the population's tensors; `slopes` holds their gradients.

    `seeds` [row] counts the population's seeds; `seed` is the only one, where there is one. `calls` are the parts of a
    step that were made so far; `captured`, on a GPU, whole steps, one for each shape of mini-batch and each phase.
    """

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
    seed: int | None
    calls: dict[Hashable, Call] = field(default_factory=dict)
    captured: dict[Hashable, Captured] = field(default_factory=dict)

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


class Steps:
    """Makes steps of chunks of rows: through programs if there are some, on a GPU as one graph.

    Args:
        stacked: what a step computes.
        programs: made before, and those that are made here; None runs the functions as they are.
        loss_key: what is static about the loss.
        order: the mini-batches of any seed.
        device: where they are made.
        always_masked: whether updates are masked even where all trials are alive, so that one program will do.
    """

    def __init__(
        self,
        stacked: Stacked,
        programs: Programs | None,
        *,
        loss_key: Hashable,
        order: BatchOrder,
        device: torch.device,
        always_masked: bool,
    ) -> None:
        self.stacked = stacked
        self.programs = programs
        self.loss_key = loss_key
        self.order = order
        self._always_masked = always_masked
        self._captures = device.type == "cuda" and programs is not None

    def step(self, chunk: Chunk, batch: Batch, step: int) -> Tensor:
        """One step of some rows; their losses as they are recorded."""
        if not self._captures:
            return self._computed(chunk, batch, step)
        key = batch.dim, batch.x.shape, tuple(family.optimizer.phase(step) for family in chunk.families)
        captured = chunk.captured.get(key)
        if captured is None:

            def compute(inputs: list[Tensor]) -> Tensor:
                own = replace(batch, x=inputs[0], y=inputs[1], noise=tuple(inputs[2:]))
                return self._computed(chunk, own, step)

            captured = chunk.captured[key] = Captured(compute)
        try:
            return captured([batch.x, batch.y, *batch.noise])
        except NotCaptured:  # something in the model, which is run
            self._captures = False
            return self._computed(chunk, batch, step)

    def prepare(self, chunk: Chunk, batch: Batch, step: int) -> None:
        """Makes the programs of a step, without making it."""
        self._differentiation(chunk, batch)
        for family in chunk.families:
            self._updating(chunk, family, step, batch)

    def _computed(self, chunk: Chunk, batch: Batch, step: int) -> Tensor:
        run, tensors = self._differentiation(chunk, batch)
        (recorded,) = run([*tensors, batch.x, batch.y, *batch.noise])
        for family in chunk.families:
            self._update(chunk, family, step, batch)
        return recorded

    def _update(self, chunk: Chunk, family: Family, step: int, batch: Batch) -> None:
        """The update of a family's rows, or of one half after the other where all do not fit into the memory.

        It is not left to the whole step to be made again: the families before this one have moved.
        """
        try:
            run, tensors = self._updating(chunk, family, step, batch)
            run(tensors)
        except torch.OutOfMemoryError:
            if family.stop - family.start == 1:
                raise
            middle = (family.start + family.stop) // 2
            for half in (family.rows(family.start, middle), family.rows(middle, family.stop)):
                self._update(chunk, half, step, batch)

    def _differentiation(self, chunk: Chunk, batch: Batch) -> Call:
        """The first part of a step of some rows; what it still takes is the mini-batch."""
        key = batch.dim, batch.x.shape
        call = chunk.calls.get(key)
        if call is not None:
            return call
        dim, draws = batch.dim, batch.draws
        trees: list[Any] = [chunk.params, chunk.slopes, chunk.alive, chunk.constants, chunk.shared, chunk.loss_numbers]

        def differentiate(params: Named, slopes: Named, alive: Tensor, *seen: Any) -> list[Tensor]:
            constants, shared, numbers, x, y, *noise = seen
            own = Batch(dim, x, y, constants, shared, numbers, draws, tuple(noise))
            return [self.stacked.differentiate(params, slopes, alive, own)]

        tensors = [tensor for tree in trees for tensor in leaves(tree)]
        count = chunk.stop - chunk.start
        part = Part(
            ("differentiate", count, dim, tuple(batch.x.shape), tuple(batch.y.shape), self.loss_key, draws),
            on_flat_list(differentiate, [*trees, batch.x, batch.y, *batch.noise]),
            "the forward and backward pass",
            rare=self._is_rare(batch),
        )
        call = chunk.calls[key] = self._run_of(part, [*tensors, batch.x, batch.y, *batch.noise]), tensors
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
        key = family.start, family.stop, masked, phase, seen
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
                (
                    "update",
                    optimizer.structure,
                    own.stop - own.start,
                    masked,
                    self.stacked.steps,
                    phase,
                    seen,
                    self.loss_key,
                ),
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
        return samples < self.order.batch_size and self.order.steps_per_epoch >= 10

    def _run_of(self, part: Part, tensors: list[Tensor]) -> Run:
        return part.run if self.programs is None else self.programs.of(part, tensors)
