"""What the benchmarks of sweeps train: tasks, learning rates and seeds, the same for every contender.

A trial is known by its number: configurations (learning rates) vary slowly, seeds fast, as in a sweep's own table.
Contenders that are no part of fallline take from here only the model, the data and those numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fallline as fl
from fallline.optim import Optimizer
from fallline.sweeps import search
from fallline.sweeps.search import TrialPlan
from fallline.sweeps.sweep import default_optimizers
from fallline.tasks import Task

FEWEST_STEPS, MOST_STEPS = 20, 4000


@dataclass(frozen=True)
class Case:
    """A task with a population of optimizers.

    Attributes:
        task: makes it; without a short last batch, which not every contender could take.
        loss: the same as the task's, in plain torch.
        optimizers: with so many learning rates each.
        populations: the sizes that are measured by default.
        trial_steps: what a contender that trains the whole population makes in a run, in trials × steps.
        slow_trial_steps: the same of one that trains one trial after the other.
        model: which of `jax_contender.MODELS` is the same model; None where only plain loops take part.
        points: how many learning rates each optimizer has; None for as many as there are seeds, at most 32.
        evaluations: how often a sweep evaluates its trials.
        most_steps: of a trial in a run.
    """

    name: str
    title: str
    task: Callable[[], Task]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizers: Callable[[int], list[Optimizer]]
    populations: tuple[int, ...]
    trial_steps: int
    slow_trial_steps: int
    model: str | None
    points: int | None = None
    evaluations: int = 1
    most_steps: int = MOST_STEPS

    def steps(self, population: int, size: float = 1.0, share: float = 1.0) -> int:
        """How many steps each trial makes, in a run of that share of `trial_steps`, when all runs have that size."""
        return min(int(self.most_steps * size), max(FEWEST_STEPS, int(self.trial_steps * size * share) // population))

    def grid(self, population: int) -> tuple[int, int]:
        """How many learning rates of each optimizer, and how many seeds, make a population."""
        kinds = len(self.optimizers(2))
        if self.points is not None:
            points = self.points
        else:
            points = max(d for d in range(1, min(32, math.isqrt(population)) + 1) if population % d == 0)
        if population % (kinds * points):
            raise SystemExit(
                f"a population of {population} cannot be made of {kinds} optimizer(s) with {points} learning rates: "
                f"give a multiple of {kinds * points}."
            )
        return points, population // (kinds * points)

    def plans(self, population: int) -> list[TrialPlan]:
        """The trials of a sweep, with their numbers."""
        points, seeds = self.grid(population)
        chosen = search.configurations(self.optimizers(points), [self.task().loss], samples=1, search_seed=0)
        return search.trials(chosen, list(range(seeds)))

    def comparable(self, plan: TrialPlan) -> bool:
        """Whether round-off stays small. Where training is chaotic it grows, whatever computes it."""
        return float(plan.configuration.optimizer.numbers["lr"]) <= 1e-2

    def floating_point_operations(self) -> int:
        """Of the products of matrices in one plain step of one trial, forward and backward."""
        task = self.task().check()
        model = task.build_model(0).train()
        x, y = (data[: task.batch_size] for data in (task.train.x, task.train.y))
        with FlopCounterMode(display=False) as counter:
            self.loss(model(x), y).backward()
        return int(counter.get_total_flops())


def batch_order(samples: int, batch_size: int, seed: int, steps: int) -> Tensor:
    """The indices of a trial's batches [step, sample]: successive permutations, short last batches left out."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    while len(batches) < steps:
        order = torch.randperm(samples, generator=generator)
        batches += order[: samples // batch_size * batch_size].split(batch_size)
    return torch.stack(batches[:steps])


def adams(points: int) -> list[Optimizer]:
    """Adam at learning rates from 1e-3 down to 1e-4."""
    return [fl.optim.adam(lr=fl.grid(np.geomspace(1e-3, 1e-4, points).tolist()))]


def of_full_batches(make: Callable[[], Task], batch_size: int, model: Callable[[], nn.Module] | None = None) -> Task:
    """A built-in task with another batch size (and model), every batch full."""
    task = make()
    return fl.Task(
        task.name,
        model or task.model,
        (task.train.x, task.train.y),
        task.loss,
        (task.validation.x, task.validation.y),
        task.metric,
        batch_size,
        drop_last=True,
    )


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def above_target(prediction: Tensor, target: Tensor) -> Tensor:
    """For a model that gives the value to be minimised itself."""
    return (prediction - target).mean()


def _mlp_case(width: int, batch_size: int, populations: tuple[int, ...], trial_steps: int, slow: int) -> Case:
    name = f"width{width}-batch{batch_size}"
    title = f"digits, MLP 64-{width}-10, batch {batch_size}, Adam"
    task = partial(of_full_batches, fl.tasks.digits, batch_size, partial(mlp, width))
    return Case(name, title, task, nn.CrossEntropyLoss(), adams, populations, trial_steps, slow, model="mlp")


def _built_in_case(
    name: str,
    title: str,
    populations: tuple[int, ...],
    trial_steps: int,
    slow: int,
    model: str,
    most_steps: int = MOST_STEPS,
) -> Case:
    make = getattr(fl.tasks, name)
    task = partial(of_full_batches, make, make().batch_size)
    return Case(
        name, title, task, nn.CrossEntropyLoss(), adams, populations, trial_steps, slow, model, most_steps=most_steps
    )


QUADRATIC = Case(
    name="quadratic_deep",
    title="batch 128; SGD, SGD with momentum, RMSprop and Adam at 27 learning rates each",
    task=fl.tasks.quadratic_deep,
    loss=above_target,
    optimizers=default_optimizers,
    populations=(1080,),
    trial_steps=1080 * 700,
    slow_trial_steps=6000,
    model=None,
    points=27,
    evaluations=20,
)
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _built_in_case(
            "digits", "digits, MLP 64-64-10, batch 64, Adam", (1, 16, 256, 1024, 4096), 1_024_000, 8000, "mlp"
        ),
        _mlp_case(16, 32, (1, 1024), 4_096_000, 8000),
        _mlp_case(16, 128, (1024,), 2_048_000, 6000),
        _mlp_case(64, 32, (1024,), 1_024_000, 6000),
        _mlp_case(64, 128, (1024,), 512_000, 4000),
        _mlp_case(256, 32, (1, 256), 512_000, 4000),
        _mlp_case(256, 128, (1, 256), 256_000, 3000),
        _built_in_case(
            "digits_cnn", "digits_cnn, two convolutions, batch 64, Adam", (1, 64), 64_000, 1500, "cnn", 1000
        ),
        _built_in_case(
            "char_lm", "char_lm, a transformer of two layers, batch 32, Adam", (1, 16), 4000, 160, "transformer", 640
        ),
        QUADRATIC,
    )
}
