"""How many trial-steps per second each way of training a population makes, side by side in one run.

    python benchmarks/sweep_speed.py [--trials 256] [--steps 1000] [--repeats 5] [--optimizer adam]

The task is `digits` (MLP 64-64-10, batch 64). Every contender trains of the same trials: the optimizers at as many
learning rates as fit, over several seeds. The repeats are interleaved, so that a slow minute of the machine hits all
alike, and medians are compared. A run in which two contenders end at different losses is an error.

- plain loop: a hand-written PyTorch loop with torch.optim (fused where it exists), one thread, one process;
- plain loop, N processes: the same, the trials shared out among one single-threaded process per core;
- sequential engine, vectorised engine: `fallline.sweep`'s engines, with as many workers as cores.

What is timed is training: data, processes and models are ready, as they are for each contender before its first step.
A contender that is slow trains fewer of the trials (its rate does not depend on how many).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

import fallline as fl
from fallline.optim import Optimizer
from fallline.optim.catalogue import CATALOGUE
from fallline.sweeps import engines, packs, search
from fallline.sweeps.search import TrialPlan
from fallline.sweeps.workers import use_one_thread
from fallline.tasks import Task

Losses = dict[int, float]


@dataclass(frozen=True)
class Contender:
    """A way of training trials: what a process does with its share, and in how many processes."""

    name: str
    processes: int
    train: Callable[[Task, list[TrialPlan], int], Losses]
    prepare: Callable[[], None]
    trials: int


def plain_loop(task: Task, plans: list[TrialPlan], steps: int) -> Losses:
    """The loop that everybody writes, one trial after the other; the last mini-batch loss of each."""
    x, y = task.train.x, task.train.y
    loss_function = torch.nn.CrossEntropyLoss()
    found: Losses = {}
    for plan in plans:
        torch.manual_seed(plan.seed)
        model = task.model()
        optimizer = torch_optimizer(plan.configuration.optimizer, model)
        order = torch.Generator().manual_seed(plan.seed)
        step = 0
        while step < steps:
            for index in torch.randperm(len(x), generator=order).split(task.batch_size):
                optimizer.zero_grad()
                loss = loss_function(model(x[index]), y[index])
                loss.backward()
                optimizer.step()
                step += 1
                if step == steps:
                    break
        found[plan.index] = loss.item()
    return found


def torch_optimizer(optimizer: Optimizer, model: torch.nn.Module) -> torch.optim.Optimizer:
    """torch's own optimizer with the same arguments, fused if it can be."""
    info = CATALOGUE[optimizer.name]
    assert optimizer.call is not None
    kind: Any = getattr(torch.optim, info.torch_name)
    try:
        made: torch.optim.Optimizer = kind(model.parameters(), fused=True, **optimizer.call.arguments)
    except (TypeError, RuntimeError):
        made = kind(model.parameters(), **optimizer.call.arguments)
    return made


def engine(name: str) -> Callable[[Task, list[TrialPlan], int], Losses]:
    """One of fallline's engines on a share of the trials, cut into packs as a sweep would."""

    programs: dict[Any, Callable[..., Any]] = {}

    def train(task: Task, plans: list[TrialPlan], steps: int) -> Losses:
        device = torch.device("cpu")
        numbers = int(str(task.describe()["parameters"]))
        found: Losses = {}
        local = [TrialPlan(i, plan.configuration, plan.seed) for i, plan in enumerate(plans)]
        for pack in packs.make_packs(local, engine=name, device=device, numbers_per_trial=numbers, workers=1):
            own = [local[i] for i in pack.trials]
            population = engines.start(name, task, own, steps=steps, device=device, programs=programs)
            losses = population.train_steps(steps)
            for row, trial in enumerate(population.rows.tolist()):
                found[plans[trial].index] = float(losses[row, -1])
        return found

    return train


def work(contender: Contender, task: Task, plans: list[TrialPlan], steps: int, connection: Connection) -> None:
    """A process of a contender: warms up, then trains its share each time it is told to."""
    contender.prepare()
    contender.train(task, plans[:4], 5)
    connection.send("ready")
    while connection.recv() == "go":
        connection.send(contender.train(task, plans, steps))


class Team:
    """The processes of one contender, ready and waiting."""

    def __init__(self, contender: Contender, task: Task, plans: list[TrialPlan], steps: int) -> None:
        self.contender = contender
        context = multiprocessing.get_context("fork")
        self.trial_steps = len(plans) * steps
        self.pipes = []
        for part in range(contender.processes):
            here, there = context.Pipe()
            share = [plans[i] for i in np.array_split(np.arange(len(plans)), contender.processes)[part]]
            context.Process(target=work, args=(contender, task, share, steps, there), daemon=True).start()
            self.pipes.append(here)
        for pipe in self.pipes:
            pipe.recv()

    def run(self) -> tuple[float, Losses]:
        """Trial-steps per second of one repeat, and the last loss of every trial."""
        began = time.perf_counter()
        for pipe in self.pipes:
            pipe.send("go")
        found: Losses = {}
        for pipe in self.pipes:
            found.update(pipe.recv())
        return self.trial_steps / (time.perf_counter() - began), found


def check_equal(found: dict[str, Losses], plans: list[TrialPlan]) -> float:
    """The largest relative difference between two contenders' last losses, over trials that are stable.

    Where training is chaotic, round-off grows whatever computes it. That is so at the upper learning rates of each
    grid, which are left out of the comparison.
    """
    names = list(found)
    worst = 0.0
    for a in names:
        for b in names:
            shared = [i for i in found[a].keys() & found[b].keys() if stable(plans[i])]
            for i in shared:
                worst = max(worst, abs(found[a][i] - found[b][i]) / max(abs(found[b][i]), 1e-3))
    return worst


def stable(plan: TrialPlan) -> bool:
    """Whether the learning rate is in the lower half of what is usually searched."""
    low, high = CATALOGUE[plan.configuration.optimizer.name].learning_rates
    return float(plan.configuration.optimizer.numbers["lr"]) <= (low * high) ** 0.5 * 1.001


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=256, help="trials of the vectorised engine")
    parser.add_argument("--steps", type=int, default=1000, help="steps of every trial")
    parser.add_argument("--repeats", type=int, default=5, help="repeats, of which the median counts")
    known = [name for name, info in CATALOGUE.items() if info.torch_name and not info.matrices_only]
    parser.add_argument(
        "--optimizer", choices=[*known, "mixed"], default="mixed", help="mixed: the sweep's default optimizers"
    )
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    task = fl.tasks.digits().check()
    if options.optimizer == "mixed":
        from fallline.sweeps.sweep import default_optimizers

        optimizers = default_optimizers()
    else:
        low, high = CATALOGUE[options.optimizer].learning_rates
        optimizers = [CATALOGUE[options.optimizer].make(lr=fl.log_grid(low, high, 26))]
    chosen = search.configurations(optimizers, [task.loss], samples=1, search_seed=0)
    seeds = range(-(-options.trials // len(chosen)))
    plans = sorted(search.trials(chosen, list(seeds)), key=lambda plan: plan.seed)[: options.trials]
    plans = [TrialPlan(i, plan.configuration, plan.seed) for i, plan in enumerate(plans)]
    nothing = lambda: torch.set_num_threads(1)  # noqa: E731
    few = min(8, options.trials)
    contenders = [
        Contender("plain loop", 1, plain_loop, nothing, few // 2),
        Contender(f"plain loop, {cores} processes", cores, plain_loop, nothing, few),
        Contender(f"sequential engine, {cores} workers", cores, engine("sequential"), use_one_thread, few),
        Contender(f"vectorised engine, {cores} workers", cores, engine("vectorised"), use_one_thread, options.trials),
    ]
    stride = max(1, options.trials // few)
    shares = {c.name: plans if c.trials == options.trials else plans[::stride][: c.trials] for c in contenders}
    teams = [Team(contender, task, shares[contender.name], options.steps) for contender in contenders]
    rates: dict[str, list[float]] = {c.name: [] for c in contenders}
    found: dict[str, Losses] = {}
    for _ in range(options.repeats):
        for team in teams:
            rate, losses = team.run()
            rates[team.contender.name].append(rate)
            found[team.contender.name] = losses
    difference = check_equal(found, plans)
    print(f"digits, MLP 64-64-10, batch 64, {options.optimizer}, {options.trials} trials, {options.steps} steps")
    print(f"{cores} cores, torch {torch.__version__}, median of {options.repeats} interleaved repeats")
    base = statistics.median(rates[contenders[1].name])
    print(f"{'':34}{'trial-steps/s':>14}{'lowest':>10}{'highest':>10}{'µs each':>9}{'ratio':>8}")
    for name, measured in rates.items():
        median = statistics.median(measured)
        print(
            f"{name:34}{median:>14,.0f}{min(measured):>10,.0f}{max(measured):>10,.0f}{1e6 / median:>9.1f}"
            f"{median / base:>8.2f}"
        )
    print(f"largest relative difference between last losses: {difference:.1e}")
    if not np.isfinite(difference) or difference > 1e-2:
        raise SystemExit("the contenders do not end at the same losses")


if __name__ == "__main__":
    main()
