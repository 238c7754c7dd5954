"""One trial in every engine there is: what an optimizer must agree with itself in."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import fallline as fl
from fallline.sweeps import search
from fallline.sweeps.programs import Programs
from fallline.sweeps.vectorised import Population

CPU = torch.device("cpu")
Trained = tuple[np.ndarray, dict[str, Tensor]]


def in_every_engine(task: fl.Task, optimizer: fl.optim.Optimizer, *, steps: int, seed: int = 1) -> dict[str, Trained]:
    """Losses per step and the parameters at the end, from a trial that has others beside it where the engine allows."""
    task = task.check()
    made = {}
    run = fl.fit(task, optimizer, steps=steps, seed=seed, progress=False)
    parameters = {name: p.detach() for name, p in run.model.named_parameters()}
    made["fit"] = np.asarray(run.history.train_loss).reshape(-1), parameters
    for engine in ("sequential", "vectorised"):
        result = fl.sweep(
            task, [optimizer], seeds=[seed + 1, seed], steps=steps, engine=engine, workers=1, keep_parameters="all",
            progress=False,
        )  # fmt: skip
        made[engine] = result.history.train_loss[1], result.parameters(1)
    plans = search.trials(search.configurations([optimizer], [task.loss], samples=1, search_seed=0), [seed + 1, seed])
    programs = Programs()
    population = Population(task, plans, steps=steps, device=CPU, programs=programs)
    losses = population.train_steps(steps)
    assert programs.all_traced, "the step was not traced"
    row = population.rows.tolist().index(1)
    made["traced"] = losses[row], population.parameters(row)
    return made


def assert_all_equal(runs: dict[str, Trained], expected: Trained, *, rtol: float) -> None:
    losses, parameters = expected
    assert abs(losses[0] - losses[-1]) > 1e-4, "the problem is degenerate: nothing is learnt"
    for engine, (own_losses, own_parameters) in runs.items():
        np.testing.assert_allclose(own_losses, losses, rtol=rtol, atol=rtol, err_msg=engine)
        assert own_parameters.keys() == parameters.keys()
        for name, p in parameters.items():
            torch.testing.assert_close(
                own_parameters[name], p, rtol=rtol, atol=rtol, msg=lambda m, e=engine, n=name: f"{e}, {n}: {m}"
            )
