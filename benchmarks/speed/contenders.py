"""Ways to train trials with torch: functions that make themselves ready for their share, and say how to train it.

The model, its first parameters, the data and the batches of a trial are the same for all of them, so their losses must
agree. `jax_scan` holds the one that needs JAX, `teams` the processes that they live in.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

import fallline as fl
from fallline.optim import Optimizer
from fallline.optim.catalogue import CATALOGUE
from fallline.sweeps.search import TrialPlan
from speed.cases import CASES, batch_order
from speed.pages import cores

Losses = dict[tuple[int, int], float]


@dataclass(frozen=True)
class Work:
    """A contender's share of a case, in words and numbers that travel to another process.

    Attributes:
        trials: numbers of the trials that it trains.
        steps: how many steps each makes.
        marks: after which steps a contender that knows the losses of all steps tells them.
        threads: of torch; None for the faster of one and one per core.
    """

    case: str
    population: int
    trials: tuple[int, ...]
    steps: int
    device: str = "cpu"
    marks: tuple[int, ...] = ()
    threads: int | None = 1


@dataclass(frozen=True)
class Trained:
    """What a run gave.

    Attributes:
        losses: by trial and number of steps, the loss of the last mini-batch, before its update.
        seconds: of training alone.
        peak_bytes: on a GPU, the most that was allocated there.
        told: what else the contender says of itself.
    """

    losses: Losses
    seconds: float
    peak_bytes: int | None = None
    told: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ready:
    """A contender that has compiled what it compiles: the seconds that took, and how to train its share."""

    compile_seconds: float
    train: Callable[[], Trained]
    told: dict[str, Any] = field(default_factory=dict)


def plain_loop(work: Work) -> Ready:
    """The loop that everybody writes, one trial after the other."""
    task = CASES[work.case].task()

    def start() -> tuple[nn.Module, nn.Module]:
        model = task.model().to(work.device)
        return model, model

    threads = use_threads(work, _one_after_the_other(_beginning(work), start))
    return Ready(0.0, _one_after_the_other(work, start), {"threads": threads})


def compiled_loop(work: Work) -> Ready:
    """The same with `torch.compile`: one program, which gets each trial's first parameters."""
    task = CASES[work.case].task()
    model = task.model().to(work.device)
    forward = torch.compile(model)

    def start() -> tuple[nn.Module, nn.Module]:
        model.load_state_dict(task.model().state_dict())
        return model, forward

    threads = use_threads(work, _one_after_the_other(_beginning(work), lambda: (model, model)))
    began = time.perf_counter()
    _one_after_the_other(_beginning(work), start)()
    compile_seconds = time.perf_counter() - began
    return Ready(compile_seconds, _one_after_the_other(work, start), {"threads": threads})


def _beginning(work: Work) -> Work:
    """The first steps of the first trial."""
    return replace(work, trials=work.trials[:1], steps=10)


def use_threads(work: Work, train: Callable[[], Trained]) -> int:
    """Sets the threads of torch that are asked for, or the faster of one and one per core; trains a little for it."""
    choices = [work.threads] if work.threads is not None else [1, cores()]
    seconds = {}
    for threads in choices:
        torch.set_num_threads(threads)
        train()  # what torch loads at first use
        seconds[threads] = min(train().seconds for _ in range(3))
    chosen = min(seconds, key=seconds.__getitem__)
    torch.set_num_threads(chosen)
    return chosen


def _one_after_the_other(work: Work, start: Callable[[], tuple[nn.Module, nn.Module]]) -> Callable[[], Trained]:
    """Trains models that `start()` makes from the random state, each with what computes its predictions."""
    case = CASES[work.case]
    task = case.task().check()
    x, y = task.train.x.to(work.device), task.train.y.to(work.device)
    every = case.plans(work.population)
    full = len(x) // task.batch_size * task.batch_size

    def train_one(plan: TrialPlan) -> float:
        torch.manual_seed(plan.seed)
        model, forward = start()
        optimizer = torch_optimizer(plan.configuration.optimizer, model)
        order = torch.Generator().manual_seed(plan.seed)
        step = 0
        while step < work.steps:
            epoch = torch.randperm(len(x), generator=order)[:full].to(work.device).split(task.batch_size)
            for index in epoch[: work.steps - step]:
                optimizer.zero_grad()
                loss = case.loss(forward(x[index]), y[index])
                loss.backward()
                optimizer.step()
                step += 1
        return loss.item()

    def train() -> Trained:
        began = time.perf_counter()
        losses = {(trial, work.steps): train_one(every[trial]) for trial in work.trials}
        return Trained(losses, time.perf_counter() - began)

    return train


def torch_optimizer(optimizer: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """torch's own optimizer with the same arguments, fused if it can be."""
    info = CATALOGUE[optimizer.name]
    assert optimizer.call is not None
    kind: Any = getattr(torch.optim, info.torch_name)
    try:
        made: torch.optim.Optimizer = kind(model.parameters(), fused=True, **optimizer.call.arguments)
    except (TypeError, RuntimeError):
        made = kind(model.parameters(), **optimizer.call.arguments)
    return made


def ensemble(work: Work) -> Ready:
    """torch.func in eager mode, as in torch's tutorial on ensembling, with Adam written out for stacked parameters."""
    case = CASES[work.case]
    task = case.task().check()
    device = torch.device(work.device)
    x, y = task.train.x.to(device), task.train.y.to(device)
    every = case.plans(work.population)
    plans = [every[trial] for trial in work.trials]
    models = [task.build_model(plan.seed).to(device) for plan in plans]
    stacked, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    lr = torch.tensor([float(plan.configuration.optimizer.numbers["lr"]) for plan in plans], device=device)
    orders = {seed: batch_order(len(x), task.batch_size, seed, work.steps) for seed in {plan.seed for plan in plans}}
    order = torch.stack([orders[plan.seed] for plan in plans], dim=1).to(device)  # [step, trial, sample]

    def loss(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return case.loss(functional_call(base, (params, buffers), (x,)), y)

    step = vmap(grad_and_value(loss))

    def train(steps: int) -> Trained:
        began = time.perf_counter()
        params = {name: p.detach().clone() for name, p in stacked.items()}
        adam = StackedAdam(params, lr)
        for index in order[:steps]:
            grads, losses = step(params, buffers, x[index], y[index])
            adam.step(params, grads)
        last = losses.tolist()
        seconds = time.perf_counter() - began
        return Trained({(t, steps): last[i] for i, t in enumerate(work.trials)}, seconds)

    threads = use_threads(work, lambda: train(2))
    return Ready(0.0, lambda: train(work.steps), {"threads": threads})


class StackedAdam:
    """torch.optim.Adam's arithmetic with its defaults, in place, on parameters [trial, …] with one lr each."""

    def __init__(self, params: dict[str, Tensor], lr: Tensor) -> None:
        self.lr = {name: lr.reshape(-1, *[1] * (p.dim() - 1)) for name, p in params.items()}
        self.mean = {name: torch.zeros_like(p) for name, p in params.items()}
        self.square = {name: torch.zeros_like(p) for name, p in params.items()}
        self.steps = 0

    def step(self, params: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
        self.steps += 1
        left1, left2 = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        for name, p in params.items():
            self.mean[name].lerp_(grads[name], 0.1)
            self.square[name].mul_(0.999).addcmul_(grads[name], grads[name], value=0.001)
            scale = self.square[name].sqrt().div_(left2**0.5).add_(1e-8)
            p.sub_(self.lr[name] * self.mean[name] / left1 / scale)


def fallline_sweep(work: Work) -> Ready:
    """The public sweep. The first one, from empty caches, is where it makes itself ready; `told` has its seconds.

    Training alone is timed by the sweep itself (`spec["training_seconds"]`); a sweep that does not say is timed whole.
    """
    case = CASES[work.case]
    points, seeds = case.grid(work.population)

    def train() -> Trained:
        began = time.perf_counter()
        result = fl.sweep(
            case.task(),
            case.optimizers(points),
            seeds=seeds,
            steps=work.steps,
            evaluate_every=-(-work.steps // case.evaluations),
            device=work.device,
            progress=False,
        )
        whole = time.perf_counter() - began
        history = result.history.train_loss
        losses = {(trial, mark): float(history[trial, mark - 1]) for trial in work.trials for mark in work.marks}
        spec = result.spec
        told = {"whole": whole, "timed": "training" if "training_seconds" in spec else "the whole sweep"}
        told |= {
            "engine": spec["engine"],
            "where": f"{spec['workers']} workers",
            "calibration": spec.get("calibration"),
        }
        return Trained(losses, float(spec.get("training_seconds", whole)), told=told)

    first = train()
    calibration = first.told.get("calibration") or {}
    return Ready(float(calibration.get("compile_seconds") or 0.0), train, {"first": first.told["whole"]})


def matrix_products(work: Work) -> Ready:
    """Products of square matrices, which is what the machine can do at most; `told` has the rate."""
    torch.set_num_threads(1)
    size, count = (4096, 50) if work.device.startswith("cuda") else (1024, 20)
    a, b = (torch.randn(size, size, device=work.device) for _ in range(2))

    def train() -> Trained:
        began = time.perf_counter()
        for _ in range(count):
            c = a @ b
        float(c[0, 0])
        seconds = time.perf_counter() - began
        return Trained({}, seconds, told={"rate": count * 2 * size**3 / seconds})

    train()
    return Ready(0.0, train)
