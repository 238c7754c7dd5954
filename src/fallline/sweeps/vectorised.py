"""The vectorised engine: a population trained as one tensor program.

The parameters of all trials are stacked: row t of a flat matrix [trial, parameters] holds trial t, and each parameter
is a view [trial, *shape] of it. One mapped forward and backward pass serves all trials; then each family (trials whose
optimizers differ only in numbers) is updated by one call of its rule, with one number per row. No operation mixes rows,
so a trial does not depend on its neighbours.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from fallline.losses import Loss
from fallline.optim import Optimizer, State
from fallline.sweeps.search import TrialPlan
from fallline.sweeps.traced import trace
from fallline.tasks import Task
from fallline.training.batches import BatchOrder
from fallline.training.layout import FLAT, Layout
from fallline.training.step import Program, gradients, joined
from fallline.training.trial import apart_from, state_where

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]
# Diverged trials leave the population when they are at least this share of it: every new size has its price.
WORTH_COMPACTING = 1 / 8
# Rows that are updated together: what a rule computes on the way should stay in the cache until it is used.
LARGEST_FAMILY = 64
# Samples per mapped forward pass when the population is evaluated.
EVALUATION_CHUNK = 512


def _UNTRACEABLE(*arguments: Any) -> None:  # noqa: N802
    """Stands for a step that cannot be traced."""


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
    """Trials next to each other whose optimizers have one structure: their rows, numbers [row, 1] and state."""

    optimizer: Optimizer
    start: int
    stop: int
    numbers: dict[str, Tensor]
    state: State


class Population:
    """Trials trained together. `rows` holds the number of each trial that is still in it."""

    def __init__(
        self,
        task: Task,
        plans: Sequence[TrialPlan],
        *,
        steps: int,
        device: torch.device,
        programs: dict[Any, Callable[..., Any]] | None = None,
    ) -> None:
        self.task = task
        self.programs = programs
        self.steps = steps
        self.device = device
        self.step = 0
        self.constants: dict[str, Tensor] = {}
        self._flat: Tensor
        self._alive: Tensor
        ordered = sorted(plans, key=lambda plan: (repr(plan.configuration.optimizer.structure), plan.index))
        self.rows = np.array([plan.index for plan in ordered])
        self.seeds = [plan.seed for plan in ordered]
        self.train = (task.train.x.to(device), task.train.y.to(device))
        self.validation = (task.validation.x.to(device), task.validation.y.to(device))
        self.orders = {
            seed: BatchOrder(len(task.train.x), task.batch_size, seed, drop_last=task.drop_last, shuffle=task.shuffle)
            for seed in dict.fromkeys(self.seeds)
        }
        self._stack_models()
        self.loss_numbers = self._numbers_that_differ([plan.configuration.loss for plan in ordered])
        self.families = self._make_families([plan.configuration.optimizer for plan in ordered])
        self._index_rows()

    @property
    def alive(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """[row], whether the trial's losses have all been finite."""
        alive: np.ndarray[Any, np.dtype[np.bool_]] = self._alive.squeeze(1).cpu().numpy()
        return alive

    @_quietly
    def train_steps(self, count: int) -> Array:
        """Makes `count` steps; returns their mini-batch losses [row, count], NaN after the one that diverged."""
        losses = torch.empty(len(self.rows), count, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for position in range(count):
                alive = self._alive.squeeze(1)
                losses[:, position] = torch.where(alive, self._one_step(), torch.nan)
        return losses.cpu().numpy()

    @_quietly
    def evaluate(self) -> tuple[Array, Array]:
        """The metric and the loss [row] on the validation data, in evaluation mode."""
        x, y = self.validation
        self.program.module.eval()
        forward = vmap(self.program.predict, in_dims=(0, 0, None))
        with torch.no_grad():
            params = self.layout.views(self._evaluation_parameters())
            parts = [forward(params, self.constants, part) for part in x.split(EVALUATION_CHUNK)]
            prediction = joined(parts, dim=1)
            metric = vmap(self.task.metric, in_dims=(0, None))(prediction, y)
            loss = vmap(self._loss, in_dims=(0, None, 0))(prediction, y, self.loss_numbers)
        self.program.module.train()
        return metric.double().cpu().numpy(), loss.double().cpu().numpy()

    def compact(self) -> None:
        """Lets diverged trials leave, so that they stop costing, once there are enough of them to be worth it."""
        alive = self.alive
        if alive.all() or (alive.any() and (~alive).mean() < WORTH_COMPACTING):
            return
        self._keep(torch.from_numpy(np.flatnonzero(alive)).to(self.device))

    def _keep(self, keep: Tensor) -> None:
        """Only these rows stay."""
        families = []
        start = 0
        for family in self.families:
            own = keep[(keep >= family.start) & (keep < family.stop)] - family.start
            if len(own):
                numbers = {name: tensor[own] for name, tensor in family.numbers.items()}
                state = _map(family.state, lambda tensor, own=own: tensor[own])
                families.append(Family(family.optimizer, start, start + len(own), numbers, state))
                start += len(own)
        self.families = families
        self._flat = self._flat[keep]
        self.constants = {name: tensor[keep] for name, tensor in self.constants.items()}
        self.loss_numbers = {name: tensor[keep] for name, tensor in self.loss_numbers.items()}
        kept = keep.cpu().numpy()
        self.rows = self.rows[kept]
        self.seeds = [self.seeds[i] for i in kept]
        self._alive = self._alive[keep]
        self._index_rows()

    def parameters(self, row: int) -> dict[str, Tensor]:
        """A copy of one trial's parameters and buffers, on the CPU."""
        everything = {**self.constants, **self.layout.views(self._evaluation_parameters())}
        return {name: tensor[row].detach().cpu().clone() for name, tensor in everything.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that going on from here needs, as tensors by name."""
        kept = {"parameters": self._flat, "rows": torch.from_numpy(self.rows), "alive": self._alive}
        kept.update({f"constants/{name}": tensor for name, tensor in self.constants.items()})
        for number, family in enumerate(self.families):
            kept[f"family/{number}/step"] = family.state["step"]
            for name, slots in family.state["slots"].items():
                kept.update({f"family/{number}/slots/{slot}/{name}": tensor for slot, tensor in slots.items()})
        return kept

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Goes back to where `tensors()` were taken, after `step` steps."""
        inside = np.isin(self.rows, tensors["rows"].numpy())
        self._keep(torch.from_numpy(np.flatnonzero(inside)).to(self.device))
        self._flat.copy_(tensors["parameters"])
        self._alive = tensors["alive"].to(self.device)
        for name, tensor in self.constants.items():
            tensor.copy_(tensors[f"constants/{name}"])
        for number, family in enumerate(self.families):
            family.state["step"] = tensors[f"family/{number}/step"].to(self.device)
            for name, slots in family.state["slots"].items():
                for slot in slots:
                    slots[slot] = tensors[f"family/{number}/slots/{slot}/{name}"].to(self.device)
        self.step = step

    @_quietly
    def losses_and_gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Of every trial on its mini-batch of this step: losses [row] and gradients [row, *shape]."""
        x, y, dim = self._batch()
        return self._losses_and_gradients(dim, self._flat, self.constants, self.loss_numbers, x, y)

    def _one_step(self) -> Tensor:
        x, y, dim = self._batch()
        arguments = self._arguments(x, y)
        losses, updates, states = self._program(dim, *arguments)(*arguments)
        alive = self._alive = self._alive & torch.isfinite(losses).unsqueeze(1)
        # On a CPU asking whether all are alive is free, and saves a pass over the parameters.
        unharmed = self.device.type == "cpu" and bool(alive.all())
        for family, update, state in zip(self.families, updates, states, strict=True):
            rows = slice(family.start, family.stop)
            state = apart_from([self._flat], state)
            self._flat[rows].add_(update if unharmed else torch.where(alive[rows], update, 0))
            if family.optimizer.moves_evaluation and not unharmed:
                state = state_where(alive[rows], state, family.state)
            family.state = state
        self.step += 1
        return cast(Tensor, losses)

    def _evaluation_parameters(self) -> Tensor:
        """The parameters [row, parameters] with which each trial is evaluated."""
        if not any(family.optimizer.moves_evaluation for family in self.families):
            return self._flat
        chosen = self._flat.clone()
        for family in self.families:
            if family.optimizer.moves_evaluation:
                rows = slice(family.start, family.stop)

                def one(state: Any, params: Any, numbers: Any, optimizer: Optimizer = family.optimizer) -> Any:
                    return optimizer.evaluation_parameters(state, params, numbers, steps=self.steps)

                chosen[rows] = self._mapped(family, one, family.state, self._flat[rows], family.numbers)
        return chosen

    def _mapped(
        self,
        family: Family,
        rule: Callable[..., Any],
        state: State,
        flat: Tensor,
        numbers: dict[str, Tensor],
    ) -> Tensor:
        """`rule(state, params, numbers) -> params` for every row of a family, as a flat tensor."""
        if family.optimizer.elementwise:
            made: Tensor = rule(state, {FLAT: flat}, numbers)[FLAT]
            return made
        found = vmap(rule)(state, self.layout.views(flat), {name: each.squeeze(1) for name, each in numbers.items()})
        return self.layout.flatten(found, leading=1)

    def _arguments(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        """All tensors that a step reads."""
        states = [family.state for family in self.families]
        numbers = [family.numbers for family in self.families]
        return self._flat, self.constants, states, numbers, self.loss_numbers, x, y

    def _compute(
        self,
        dim: int | None,
        flat: Tensor,
        constants: dict[str, Tensor],
        states: list[State],
        numbers: list[dict[str, Tensor]],
        loss_numbers: dict[str, Tensor],
        x: Tensor,
        y: Tensor,
    ) -> tuple[Tensor, list[Tensor], list[State]]:
        """The pure step: losses, and the updates and the new state of each family."""
        losses, grads = self._losses_and_gradients(dim, flat, constants, loss_numbers, x, y)
        with torch.no_grad():
            gradient = self.layout.flatten(grads, leading=1)
            made = [
                self._update(family, state, own, flat, gradient, (dim, constants, loss_numbers, x, y))
                for family, state, own in zip(self.families, states, numbers, strict=True)
            ]
        return losses, [update for update, _ in made], [state for _, state in made]

    def _losses_and_gradients(
        self,
        dim: int | None,
        flat: Tensor,
        constants: dict[str, Tensor],
        loss_numbers: dict[str, Tensor],
        x: Tensor,
        y: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        def loss(params: Any, constants: Any, x: Any, y: Any, numbers: Any) -> Tensor:
            return self.program.at(numbers).loss_at(params, constants, x, y)

        with torch.enable_grad():
            leaves = {name: view.detach().requires_grad_() for name, view in self.layout.views(flat).items()}
            mapped = vmap(loss, in_dims=(0, 0, dim, dim, 0), randomness="error")
            losses = mapped(leaves, constants, x, y, loss_numbers)
            # Rows do not meet, so the gradient of the sum holds each row's own gradient.
            return losses.detach(), gradients(losses.sum(), leaves)

    def _update(
        self,
        family: Family,
        state: State,
        numbers: dict[str, Tensor],
        flat: Tensor,
        gradient: Tensor,
        batch: tuple[int | None, dict[str, Tensor], dict[str, Tensor], Tensor, Tensor],
    ) -> tuple[Tensor, State]:
        """A family's updates [row, parameters] and its new state."""
        rows = slice(family.start, family.stop)
        update = functools.partial(family.optimizer.update, steps=self.steps, step=self.step)
        if family.optimizer.elementwise:
            updates, state = update({FLAT: gradient[rows]}, state, {FLAT: flat[rows]}, numbers)
            return updates[FLAT], state
        dim, constants, loss_numbers, x, y = batch
        surveys = family.optimizer.surveys(self.step)

        def rule(g: Any, s: Any, p: Any, n: Any, own: Any, ours: Any, x: Any, y: Any) -> Any:
            landscape, left = self.program.at(ours).pure_landscape(p, own, x, y) if surveys else (None, {})
            return *update(g, s, p, n, landscape=landscape), left

        grads, params = self.layout.views(gradient[rows]), self.layout.views(flat[rows])
        arguments = grads, state, params, {name: each.squeeze(1) for name, each in numbers.items()}
        own = {name: tensor[rows] for name, tensor in constants.items()}
        ours = {name: tensor[rows] for name, tensor in loss_numbers.items()}
        if dim is not None:
            x, y = x[rows], y[rows]
        updates, state, left = vmap(rule, in_dims=(0, 0, 0, 0, 0, 0, dim, dim))(*arguments, own, ours, x, y)
        for name, tensor in left.items():
            own[name].copy_(tensor)
        return self.layout.flatten(updates, leading=1), state

    def _program(self, dim: int | None, *arguments: Any) -> Callable[..., Any]:
        """What computes a step for arguments of this shape: the traced program, or `_compute` as it is."""
        plain = functools.partial(self._compute, dim)
        if self.programs is None:
            return plain
        phases = tuple(family.optimizer.phase(self.step) for family in self.families)
        key = (*self._shape, dim, tuple(arguments[-2].shape), phases)
        if key not in self.programs:
            self.programs[key] = _UNTRACEABLE
            with contextlib.suppress(Exception):  # whatever keeps a model from being traced, it can be run
                program = trace(plain, *arguments)
                if self._agrees(program, plain, arguments):
                    self.programs[key] = program
        program = self.programs[key]
        return plain if program is _UNTRACEABLE else program

    def _agrees(self, program: Callable[..., Any], plain: Callable[..., Any], arguments: tuple[Any, ...]) -> bool:
        """Whether the traced program computes what the step does."""
        flat, constants, *rest = arguments
        with torch.no_grad():
            ours, updates, _ = program(flat, {name: tensor.clone() for name, tensor in constants.items()}, *rest)
            theirs, expected, _ = plain(flat, {name: tensor.clone() for name, tensor in constants.items()}, *rest)
        if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6, equal_nan=True):
            return False
        # Row by row in the norm: where a gradient is all but zero, round-off decides the sign of an adaptive update.
        pairs = [(a.nan_to_num(), b.nan_to_num()) for a, b in zip(updates, expected, strict=True)]
        return all(bool(((a - b).norm(dim=1) <= 0.05 * b.norm(dim=1) + 1e-12).all()) for a, b in pairs)

    def _batch(self) -> tuple[Tensor, Tensor, int | None]:
        """Inputs and targets, with the dimension that holds the trial: None where all trials see the same batch."""
        x, y = self.train
        indices = [order.at(self.step) for order in self.orders.values()]
        if len(indices) == 1:
            index = indices[0].to(self.device)
            return x.index_select(0, index), y.index_select(0, index), None
        index = torch.stack(indices).to(self.device)[self._seed_of_row]
        flat = index.flatten()
        return (
            x.index_select(0, flat).unflatten(0, index.shape),
            y.index_select(0, flat).unflatten(0, index.shape),
            0,
        )

    def _stack_models(self) -> None:
        """Initial parameters and constants of every row, from one model per seed."""
        flats: dict[int, Tensor] = {}
        constants: dict[int, dict[str, Tensor]] = {}
        with torch.random.fork_rng([]):
            module = self.task.build_model(self.seeds[0])
            used = self._parameters_in_use(Program(module, self.task.loss))
            for seed in self.orders:
                program = Program(self.task.build_model(seed), self.task.loss)
                params = program.trainable()
                self.layout = Layout.of({name: params[name] for name in used})
                unused = {name: p.detach() for name, p in params.items() if name not in used}
                flats[seed] = self.layout.flatten({name: params[name].detach() for name in used})
                constants[seed] = {**unused, **program.constants()}
        self.program = Program(program.module.to(self.device).train(), self.task.loss)
        self._flat = torch.stack([flats[seed] for seed in self.seeds]).to(self.device)
        self.constants = {
            name: torch.stack([constants[seed][name] for seed in self.seeds]).to(self.device)
            for name in constants[self.seeds[0]]
        }
        self._alive = torch.ones(len(self.rows), 1, dtype=torch.bool, device=self.device)

    def _parameters_in_use(self, program: Program) -> list[str]:
        """The parameters that get a gradient; torch.optim leaves the others as they are, and so do we."""
        index = next(iter(self.orders.values())).at(0)
        params = program.trainable()
        loss = self.task.loss(
            program.module(self.task.train.x.index_select(0, index)), self.task.train.y.index_select(0, index)
        )
        found = gradients(loss, params)
        return [name for name in params if name in found]

    def _loss(self, prediction: Any, y: Tensor, numbers: dict[str, Tensor]) -> Tensor:
        return self.program.at(numbers).loss(prediction, y)

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
            end = min(len(optimizers), start + LARGEST_FAMILY)
            while stop < end and optimizers[stop].structure == structure:
                stop += 1
            own = optimizers[start:stop]
            numbers = {
                name: torch.tensor([[o.numbers[name]] for o in own], dtype=torch.float64, device=self.device)
                for name in own[0].numbers
            }
            families.append(Family(own[0], start, stop, numbers, self._initial_state(own[0], start, stop, numbers)))
            start = stop
        return families

    def _initial_state(self, optimizer: Optimizer, start: int, stop: int, numbers: dict[str, Tensor]) -> State:
        flat = self._flat[start:stop]
        seeds = torch.tensor(self.seeds[start:stop], device=self.device)
        flatly = optimizer.elementwise

        def init(p: Any, n: Any, seed: Any) -> State:
            return optimizer.init({FLAT: p} if flatly else p, n, steps=self.steps, seed=seed)

        own = {name: each.squeeze(1) for name, each in numbers.items()}
        state = vmap(init)(flat if flatly else self.layout.views(flat), own, seeds)
        # Numbers of a flat state broadcast against the rows like the hyperparameters: [row, 1].
        return cast(State, _map(state, lambda t: t.unsqueeze(1) if flatly and t.dim() == 1 else t.clone()))

    def _index_rows(self) -> None:
        """What depends on which rows there are."""
        self.orders = {seed: self.orders[seed] for seed in dict.fromkeys(self.seeds)}
        position = {seed: i for i, seed in enumerate(self.orders)}
        self._seed_of_row = torch.tensor([position[seed] for seed in self.seeds], device=self.device)
        families = tuple((family.optimizer.structure, family.start, family.stop) for family in self.families)
        shared = tuple((n, number) for n, number in self.task.loss.numbers.items() if n not in self.loss_numbers)
        self._shape = (self.task.loss.structure, shared, self.steps, families)


def _map(tree: Any, change: Any) -> Any:
    """`change` applied to every tensor of a nested dictionary."""
    return {k: _map(v, change) for k, v in tree.items()} if isinstance(tree, dict) else change(tree)
