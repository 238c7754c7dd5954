"""Which engine trains a task, and why not the faster one.

Both engines offer the same few methods (see `Trained`), so whatever schedules, records and checkpoints trials does not
know which one is at work.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fallline.errors import FalllineError, InvalidSweep, Unsupported, nearest
from fallline.optim import Optimizer, sgd
from fallline.optim.torch_own import TorchOwn
from fallline.sweeps.programs import Programs
from fallline.sweeps.search import Configuration, TrialPlan
from fallline.sweeps.vectorised import Array, Population
from fallline.tasks import Task
from fallline.training.device import with_generators
from fallline.training.step import Program, gradients
from fallline.training.trial import Trial

# What torch.func's errors mean, by a part of their text.
EXPLANATIONS = {
    "randomness": "it draws random numbers, and each trial needs a stream of its own",
    "data-dependent": "its course depends on the data (an `if` on a tensor)",
    ".item()": "it takes a number out of a tensor (.item(), float() or int())",
}
ENGINES = ("auto", "vectorised", "compiled", "sequential")


class Trained(Protocol):
    """Trials under way: a population, or one trial by itself."""

    rows: np.ndarray[Any, np.dtype[Any]]

    @property
    def step(self) -> int: ...
    @property
    def alive(self) -> np.ndarray[Any, np.dtype[np.bool_]]: ...
    def train_steps(self, count: int) -> Array: ...
    def evaluate(self) -> tuple[Array, Array]: ...
    def compact(self) -> None: ...
    def parameters(self, row: int) -> dict[str, Tensor]: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def restore(self, tensors: dict[str, Tensor], step: int) -> None: ...


@dataclass(frozen=True)
class EngineChoice:
    """The engine that will train, and the sentence that says why."""

    engine: str
    reason: str


class Alone:
    """The sequential engine: one trial behind the methods of a population."""

    def __init__(self, task: Task, plans: Sequence[TrialPlan], *, steps: int, device: torch.device) -> None:
        (plan,) = plans
        self.rows = np.array([plan.index])
        self.trial = Trial(task, plan.configuration.optimizer, plan.seed, steps=steps, device=device)

    @property
    def step(self) -> int:
        return self.trial.step

    @property
    def alive(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return np.array([self.trial.alive])

    def train_steps(self, count: int) -> Array:
        return self.trial.train_steps(count)[None]

    def evaluate(self) -> tuple[Array, Array]:
        metric, loss = self.trial.evaluate()
        return np.array([metric]), np.array([loss])

    def compact(self) -> None:
        """One trial is never rid of itself."""

    def parameters(self, row: int) -> dict[str, Tensor]:
        return self.trial.parameters()

    def tensors(self) -> dict[str, Tensor]:
        return self.trial.tensors()

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        self.trial.restore(tensors, step)


def start(
    engine: str,
    task: Task,
    plans: Sequence[TrialPlan],
    *,
    steps: int,
    device: torch.device,
    programs: Programs | None = None,
    chunk: int | None = None,
) -> Trained:
    """The trials of a pack at step 0, under their own loss, in the engine of that name or, if need be, one by one.

    Args:
        programs: where the programs of a step are kept, for the next pack of the same shape too; None makes none.
        chunk: how many rows of a population are computed together; by default all of them.
    """
    task = task.with_loss(plans[0].configuration.loss)
    if of_trial(engine, plans[0]) == "sequential":
        return Alone(task, plans, steps=steps, device=device)
    return Population(task, plans, steps=steps, device=device, programs=programs, chunk=chunk)


def choose(engine: str, task: Task, device: torch.device, optimizers: Sequence[Optimizer] = ()) -> EngineChoice:
    """The engine for a task: the one asked for, or with "auto" the vectorised one where the model allows it.

    Args:
        optimizers: those that will train it.

    Raises:
        InvalidSweep: for a name that is no engine, or "vectorised" for a model that cannot be.
    """
    if engine not in ENGINES:
        raise InvalidSweep(f"there is no engine {engine!r}. {nearest(engine, ENGINES)}")
    if engine == "sequential":
        return EngineChoice("sequential", "asked for")
    obstacle = why_not_vectorised(task, device, optimizers)
    if obstacle is None:
        return EngineChoice("vectorised", "the model can be vectorised" if engine == "auto" else "asked for")
    if engine != "auto":
        raise InvalidSweep(f"the model cannot be vectorised: {obstacle}. Give engine='sequential' or 'auto'.")
    return EngineChoice("sequential", f"the model cannot be vectorised: {obstacle}")


def of_trial(engine: str, plan: TrialPlan) -> str:
    """The engine that trains a trial of a sweep: one that is no rule trains by itself."""
    return "sequential" if isinstance(plan.configuration.optimizer, TorchOwn) else engine


def for_all(choice: EngineChoice, asked: str, plans: Sequence[TrialPlan]) -> EngineChoice:
    """The choice for a task's model, seen again with the optimizers that train it.

    Raises:
        InvalidSweep: for "vectorised" with an optimizer that is no rule.
    """
    alone = list(dict.fromkeys(p.configuration.optimizer.name for p in plans if of_trial("", p) == "sequential"))
    if not alone or choice.engine == "sequential":
        return choice
    who = " and ".join(alone)
    if asked in ("vectorised", "compiled"):
        raise InvalidSweep(f"{who} cannot be vectorised: it is no rule, but torch's own. Give engine='auto'.")
    if all(of_trial("", plan) == "sequential" for plan in plans):
        return EngineChoice("sequential", f"{who} is no rule, but torch's own, which trains one trial at a time")
    return EngineChoice(choice.engine, f"{choice.reason}; {who}, torch's own, trains one trial at a time")


def why_not_vectorised(task: Task, device: torch.device, optimizers: Sequence[Optimizer] = ()) -> str | None:
    """What keeps a model from being trained as a population, or None.

    Two trials are taken one step as a population and as the modules they are; losses, gradients and buffers must agree.
    """
    optimizer = sgd(lr=1e-3)
    plans = [TrialPlan(i, Configuration(0, "probe", task.loss, optimizer, {}), seed) for i, seed in enumerate((0, 1))]
    try:
        population = Population(task, plans, steps=1, device=device)
        losses, grads = population.losses_and_gradients()
        population.evaluate()
        around = next((o for o in optimizers if any(t.surveys is not None for t in o.transforms)), None)
        if population.streams is not None and around is not None:
            return f"{around.name} looks at other parameters within a step, where the model draws other random numbers"
    except Unsupported as error:
        return _culprit(error, task)
    except FalllineError:
        raise
    except Exception as error:
        return _culprit(error, task)
    for row, plan in enumerate(plans):
        index = population.orders[plan.seed].at(0).to(device)
        x, y = (data.index_select(0, index) for data in population.train)
        with torch.random.fork_rng(with_generators(device)):
            program = Program(task.build_model(plan.seed).to(device).train(), task.loss)
            params = program.trainable()
            loss = task.loss(program.module(x), y)
        expected = gradients(loss, params)
        # One scale for all gradients: some are zero but for round-off, like that of a bias before BatchNorm.
        scale = max((float(g.abs().max()) for g in expected.values() if g.numel()), default=0.0)
        stacked = {**population.constants, **grads}
        found = {name: g[row] for name, g in stacked.items()} | population.shared | {"the loss": losses[row]}
        for name, alone in {**expected, **program.constants(), "the loss": loss.detach()}.items():
            if name not in found or not _agree(found[name], alone, scale if name in expected else None):
                return f"{_owner(program.module, name)} gives another result in a population than alone"
    return None


def _agree(value: Tensor, expected: Tensor, scale: float | None) -> bool:
    if value.shape != expected.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(value, expected)
    tolerance = 1e-6 if expected.dtype == torch.float64 else 1e-2
    if scale is None:
        scale = float(expected.abs().max()) if expected.numel() else 0.0
    return torch.allclose(value, expected, rtol=tolerance, atol=tolerance * scale + 1e-12, equal_nan=True)


def _owner(module: nn.Module, name: str) -> str:
    path = name.rpartition(".")[0]
    modules = dict(module.named_modules())
    return f"{type(modules[path]).__name__} {path!r}" if path in modules and path else name


def _culprit(error: Exception, task: Task) -> str:
    """The innermost module in the error's traceback, by type and name, and the error's first line."""
    with torch.random.fork_rng([]):
        names = {name: type(m).__name__ for name, m in task.build_model(0).named_modules()}
    message = next(iter(str(error).strip().removeprefix("vmap: ").splitlines()), "") or type(error).__name__
    for sign, meaning in EXPLANATIONS.items():
        if sign in message:
            message = meaning
    who = "the loss or the metric"
    chain: list[tuple[str, nn.Module]] = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            if not chain:
                chain = list(owner.named_modules())
            who = next((f"{type(m).__name__} {n!r}" if n else type(m).__name__ for n, m in chain if m is owner), who)
    if who == "the loss or the metric" and not names:
        who = "the model"
    return f"{who}: {message}"
