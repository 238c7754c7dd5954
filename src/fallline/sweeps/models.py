"""The models of a population before the first step: what each seed makes, stacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fallline.sweeps.draws import Draw, record
from fallline.sweeps.stacked import MappedProgram
from fallline.tasks import Task
from fallline.training.batches import BatchOrder
from fallline.training.device import generator_state, with_generators
from fallline.training.layout import Layout
from fallline.training.step import Program, gradients


@dataclass(frozen=True)
class StackedModels:
    """The models of stacked trials.

    Attributes:
        program: the model and its loss, in training mode.
        layout: where each parameter lies in a row; those that take no part in the loss are among the constants.
        flat: the parameters [row, numbers].
        constants: buffers, frozen and unused parameters [row, …].
        shared: those that are the same in all trials, and that no step changes.
        draws: what a step draws, by the size of its mini-batch.
        generators: by seed, the state of the generator from which the model draws on.
    """

    program: MappedProgram
    layout: Layout
    flat: Tensor
    constants: dict[str, Tensor]
    shared: dict[str, Tensor]
    draws: dict[int, tuple[Draw, ...]]
    generators: dict[int, Tensor]


def stacked_models(task: Task, seeds: Sequence[int], order: BatchOrder, device: torch.device) -> StackedModels:
    """One model per seed, built as a plain loop would build it.

    Args:
        seeds: of each row.
        order: the mini-batches of the first seed.

    Raises:
        Unsupported: when the model draws random numbers that cannot be handed in as data.
    """
    flats: dict[int, Tensor] = {}
    constants: dict[int, dict[str, Tensor]] = {}
    generators: dict[int, Tensor] = {}
    with torch.random.fork_rng(with_generators(device)):
        draws = _draws(task, task.build_model(seeds[0]).to(device).train(), order, device)
        used, changed = _used_and_changed(task, Program(task.build_model(seeds[0]).train(), task.loss), order)
        for seed in dict.fromkeys(seeds):
            program = MappedProgram(task.build_model(seed), task.loss)
            generators[seed] = generator_state(device)
            params = program.trainable()
            layout = Layout.of({name: params[name] for name in used})
            flats[seed] = layout.flatten({name: params[name].detach() for name in used})
            unused = {name: p.detach() for name, p in params.items() if name not in used}
            constants[seed] = {**unused, **program.constants()}
    program.module.to(device).train()
    first = constants[seeds[0]]
    shared = {
        name: tensor.to(device)
        for name, tensor in first.items()
        if name not in changed and all(torch.equal(tensor, own[name]) for own in constants.values())
    }
    own = {
        name: torch.stack([constants[seed][name] for seed in seeds]).to(device) for name in first if name not in shared
    }
    flat = torch.stack([flats[seed] for seed in seeds]).to(device)
    return StackedModels(program, layout, flat, own, shared, draws, generators)


def _draws(task: Task, module: nn.Module, order: BatchOrder, device: torch.device) -> dict[int, tuple[Draw, ...]]:
    """What a step draws, by the size of its mini-batch: whole ones, and a short last one."""
    found = {}
    for step in dict.fromkeys((0, order.steps_per_epoch - 1)):
        index = order.at(step)
        x, y = (data.index_select(0, index).to(device) for data in (task.train.x, task.train.y))

        def run(x: Tensor = x, y: Tensor = y) -> None:
            task.loss(module(x), y)

        found[len(index)] = record(run, device)
    return found


def _used_and_changed(task: Task, program: Program, order: BatchOrder) -> tuple[list[str], list[str]]:
    """The parameters that get a gradient, and the buffers that a step changes.

    torch.optim leaves parameters without a gradient as they are, and so do we.
    """
    before = {name: buffer.clone() for name, buffer in program.module.named_buffers()}
    index = order.at(0)
    params = program.trainable()
    x, y = (data.index_select(0, index) for data in (task.train.x, task.train.y))
    found = gradients(task.loss(program.module(x), y), params)
    changed = [name for name, buffer in program.module.named_buffers() if not torch.equal(buffer, before[name])]
    return [name for name in params if name in found], changed
