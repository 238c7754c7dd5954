"""The step of stacked trials as two pure parts: losses with their gradients, and the update that follows.

Both parts take tensors whose first dimension is the trial, write to some of them, and mix no rows. The first part is
the same for every optimizer; the second reads nothing of the model, unless the optimizer surveys its surroundings. So
each is traced or compiled once for all trials that it serves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import vmap

from fallline.optim import Optimizer, State
from fallline.sweeps.batched import Batched
from fallline.sweeps.draws import Draw, Replaying
from fallline.training.layout import FLAT, Layout
from fallline.training.step import Program, gradients
from fallline.training.trial import state_where

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """What a step reads besides the parameters.

    Attributes:
        dim: the dimension of x and y that holds the trial; None where all trials see the same mini-batch.
        x, y: inputs and targets.
        constants: buffers and frozen parameters [row, …]; a step may change them (BatchNorm's statistics).
        shared: those that all trials have in common and no step changes (a mask), as they are.
        loss_numbers: the numbers [row] in which the trials' losses differ.
        draws: what the model draws in this step, in order.
        noise: the random numbers that were drawn, with the trials in the dimension that x has them in.
    """

    dim: int | None
    x: Tensor
    y: Tensor
    constants: Named
    shared: Named
    loss_numbers: Named
    draws: tuple[Draw, ...] = ()
    noise: tuple[Tensor, ...] = ()

    def rows(self, rows: slice) -> Batch:
        """The same for some of the trials."""
        x, y, *noise = (each if self.dim is None else each[rows] for each in (self.x, self.y, *self.noise))
        constants = {name: tensor[rows] for name, tensor in self.constants.items()}
        numbers = {name: tensor[rows] for name, tensor in self.loss_numbers.items()}
        return Batch(self.dim, x, y, constants, self.shared, numbers, self.draws, tuple(noise))


class MappedProgram(Program):
    """A model whose functions that vmap maps badly are replaced while it is called."""

    def predict(self, params: Mapping[str, Tensor], constants: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The functional form of the model: prediction for `x` with these parameters."""
        with Batched():
            return super().predict(params, constants, x)


@dataclass(frozen=True)
class Stacked:
    """A model and its loss over stacked trials.

    Attributes:
        program: the model and its loss.
        layout: where each parameter lies in a row.
        steps: how many updates training has in all.
    """

    program: Program
    layout: Layout
    steps: int

    def losses_and_gradients(self, params: Named, batch: Batch) -> tuple[Tensor, Named]:
        """Losses [row] and gradients [row, *shape] at the stacked parameters."""

        def loss(params: Any, constants: Any, x: Any, y: Any, numbers: Any, noise: Any) -> Tensor:
            program = self.program.at(numbers)
            if not batch.draws:
                return program.loss_at(params, constants, x, y)
            with Replaying(batch.draws, noise) as replaying:
                value = program.loss_at(params, constants, x, y)
            replaying.finish()
            return value

        with torch.enable_grad():
            at = {name: p.detach().requires_grad_() for name, p in params.items()}
            # What does not fit into the memory is made again, so nothing is changed before everything is computed.
            own = {name: tensor.clone() for name, tensor in batch.constants.items()}
            constants, dims = with_dims(own, batch.shared)
            mapped = vmap(loss, in_dims=(0, dims, batch.dim, batch.dim, 0, batch.dim), randomness="error")
            losses = mapped(at, constants, batch.x, batch.y, batch.loss_numbers, batch.noise)
            # Rows do not meet, so the gradient of the sum holds each row's own gradient.
            found = gradients(losses.sum(), at)
        with torch.no_grad():
            for name, tensor in batch.constants.items():
                tensor.copy_(own[name])
        return losses.detach(), found

    def differentiate(self, params: Named, slopes: Named, alive: Tensor, batch: Batch) -> Tensor:
        """The first part: writes the gradients to `slopes`; returns the losses [row] as they are recorded.

        A row whose loss is not finite is not alive from then on (`alive` [row, 1]); its later losses are NaN.
        """
        losses, found = self.losses_and_gradients(params, batch)
        with torch.no_grad():
            recorded = torch.where(alive.squeeze(1), losses.double(), torch.nan)
            alive.logical_and_(torch.isfinite(losses).unsqueeze(1))
            for name, slope in slopes.items():
                slope.copy_(found[name])
        return recorded

    def update(
        self,
        optimizer: Optimizer,
        step: int,
        masked: bool,
        grads: Named,
        params: Named,
        alive: Tensor,
        state: State,
        numbers: Named,
        batch: Batch | None,
    ) -> None:
        """The second part: moves parameters and state of trials whose optimizers have one structure, in place.

        The rule itself is pure. Nothing is changed before everything has been computed.

        Args:
            optimizer: any of the trials' optimizers.
            step: the number of this update, from 0.
            masked: whether some rows may not be alive; their parameters stay as they are.
            grads, params: [row, *shape] by name, or as flat ones for rules that work element by element.
            numbers: the hyperparameters [row, 1].
            batch: the mini-batch, for optimizers that survey the surroundings at this step.
        """
        with torch.no_grad():
            updates, new = self._rule(optimizer, step, grads, params, state, numbers, batch)
            if masked:
                updates = {name: torch.where(_beside(alive, update), update, 0) for name, update in updates.items()}
                if optimizer.moves_evaluation:
                    new = state_where(alive, new, state)
            before = list(leaves(state))
            given = {storage_of(tensor) for tensor in (*grads.values(), *params.values(), *before)}
            # What a rule hands on of what it was given would change under the copies below.
            after = [
                n if n is b or storage_of(n) not in given else n.clone()
                for b, n in zip(before, leaves(new), strict=True)
            ]
            for old, tensor in zip(before, after, strict=True):
                if tensor is not old:
                    old.copy_(tensor)
            for name, update in updates.items():
                params[name].add_(update)

    def _rule(
        self,
        optimizer: Optimizer,
        step: int,
        grads: Named,
        params: Named,
        state: State,
        numbers: Named,
        batch: Batch | None,
    ) -> tuple[Named, State]:
        """The updates and the new state."""
        update = functools.partial(optimizer.update, steps=self.steps, step=step)
        if optimizer.elementwise:
            return update(grads, state, params, numbers)

        def rule(g: Any, s: Any, p: Any, n: Any, own: Any, ours: Any, x: Any, y: Any) -> Any:
            if batch is None:
                return *update(g, s, p, n), {}
            landscape, left = self.program.at(ours).pure_landscape(p, own, x, y)
            return *update(g, s, p, n, landscape=landscape), left

        squeezed = {name: each.squeeze(1) for name, each in numbers.items()}
        if batch is None:
            seen: tuple[Any, ...] = ({}, {}, None, None)
            dims: tuple[Any, ...] = (0, 0, None, None)
        else:
            constants, of_constants = with_dims(batch.constants, batch.shared)
            seen = constants, batch.loss_numbers, batch.x, batch.y
            dims = of_constants, 0, batch.dim, batch.dim
        updates, new, left = vmap(rule, in_dims=(0, 0, 0, 0, *dims))(grads, state, params, squeezed, *seen)
        if batch is not None:
            for name, tensor in batch.constants.items():
                tensor.copy_(left[name])
        return updates, new

    def evaluation_parameters(self, optimizer: Optimizer, flat: Tensor, state: State, numbers: Named) -> Tensor:
        """The parameters [row, numbers] with which trials of one structure are evaluated."""

        def rule(state: Any, params: Any, numbers: Any) -> Any:
            return optimizer.evaluation_parameters(state, params, numbers, steps=self.steps)

        if optimizer.elementwise:
            return cast(Tensor, rule(state, {FLAT: flat}, numbers)[FLAT])
        squeezed = {name: each.squeeze(1) for name, each in numbers.items()}
        return self.layout.flatten(vmap(rule)(state, self.layout.views(flat), squeezed), leading=1)

    def initial_state(self, optimizer: Optimizer, flat: Tensor, numbers: Named, seeds: Tensor) -> State:
        """The state of trials of one structure before the first update."""
        flatly = optimizer.elementwise

        def init(p: Any, n: Any, seed: Any) -> State:
            return optimizer.init({FLAT: p} if flatly else p, n, steps=self.steps, seed=seed)

        own = {name: each.squeeze(1) for name, each in numbers.items()}
        state = vmap(init)(flat if flatly else self.layout.views(flat), own, seeds)

        def own_memory(tensor: Tensor) -> Tensor:
            # Numbers of a flat state broadcast against the rows like the hyperparameters: [row, 1].
            tensor = tensor.unsqueeze(1) if flatly and tensor.dim() == 1 else tensor
            return tensor.clone(memory_format=torch.contiguous_format)

        return cast(State, mapped_tree(state, own_memory))


def with_dims(constants: Named, shared: Named) -> tuple[Named, dict[str, int | None]]:
    """The constants of each trial and those of all, and the dimension of each that holds the trial."""
    return {**constants, **shared}, {**dict.fromkeys(constants, 0), **dict.fromkeys(shared)}


def leaves(tree: Any) -> Iterator[Tensor]:
    """The tensors of nested dictionaries, by the order of their names."""
    if isinstance(tree, dict):
        for name in sorted(tree):
            yield from leaves(tree[name])
    else:
        yield tree


def rebuilt(tree: Any, values: Iterator[Tensor]) -> Any:
    """Nested dictionaries like `tree` with these tensors as its leaves."""
    if isinstance(tree, dict):
        return {name: rebuilt(tree[name], values) for name in sorted(tree)}
    return next(values)


def mapped_tree(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` applied to every tensor of nested dictionaries."""
    return {k: mapped_tree(v, change) for k, v in tree.items()} if isinstance(tree, dict) else change(tree)


def _beside(alive: Tensor, like: Tensor) -> Tensor:
    """`alive` [row, 1] in a shape that broadcasts against [row, …]."""
    return alive.reshape(-1, *[1] * (like.dim() - 1))


def storage_of(tensor: Tensor) -> int:
    """What two tensors have in common that share memory, also when they are traced."""
    return int(tensor.untyped_storage()._cdata)


def on_flat_list(function: Callable[..., Any], trees: Sequence[Any]) -> Callable[..., list[Tensor]]:
    """`function(*trees)` as a function of the trees' tensors one after the other, which returns a list of tensors."""

    def flatly(*values: Tensor) -> list[Tensor]:
        given = iter(values)
        found = function(*(rebuilt(tree, given) for tree in trees))
        return [] if found is None else list(found)

    return flatly
