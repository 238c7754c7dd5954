"""A result as a sweep would leave it, made from formulas: four optimizers × 13 learning rates × 10 seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import pytest

from fallline.evidence import Candidate, Ranking, rank

BEST = {
    "sgd": (0.3, 0.957, 1.2),
    "sgd momentum=0.9": (0.03, 0.968, 0.13),
    "rmsprop": (0.003, 0.969, 0.25),
    "adam": (0.01, 0.978, 0.9),
}


@dataclass(frozen=True)
class FakeHistory:
    step: np.ndarray
    train_loss: np.ndarray
    evaluation_step: np.ndarray
    metric: np.ndarray
    validation_loss: np.ndarray


@dataclass(frozen=True)
class FakeResult:
    spec: dict[str, Any]
    trials: pl.DataFrame
    history: FakeHistory
    ranking: Ranking
    code: str = "import torch\n\nprint('<the winner>')\n"
    best: Any = field(default=None)

    def reproduction_code(self) -> str:
        return self.code


def learning_rates(optimizer: str, count: int) -> list[float]:
    centre = BEST[optimizer][0] if optimizer in BEST else 0.01
    return [float(f"{centre * 10 ** (2.0 * (i / max(1, count - 1) * 2 - 1)):.3g}") for i in range(count)]


def build(
    optimizers: tuple[str, ...] = tuple(BEST),
    *,
    rates: int = 13,
    seeds: int = 10,
    steps: int = 100,
    losses: tuple[str, ...] = ("cross_entropy",),
    momenta: tuple[float, ...] = (),
    higher_is_better: bool = True,
    all_diverged: bool = False,
    interrupted: int = 0,
    task: str = "digits",
    one_rate: bool = False,
) -> FakeResult:
    rng = np.random.default_rng(7)
    step = np.arange(0, steps, max(1, steps // 1000))
    evaluation = np.unique(np.linspace(0, steps, 11).astype(int))
    rows, train, metric = [], [], []
    candidates = []
    for loss in losses:
        for optimizer in optimizers:
            centre, top, boundary = BEST.get(optimizer, (0.01, 0.97, 0.9))
            grid = [centre] if one_rate else learning_rates(optimizer, rates)
            settings = [
                ({} if one_rate else {"lr": lr}) | ({"momentum": m} if momenta else {})
                for lr in grid
                for m in momenta or (0.0,)
            ]
            scores = np.full((len(settings), seeds), np.nan)
            for index, setting in enumerate(settings):
                lr = setting.get("lr", centre)
                for seed in range(seeds):
                    distance = abs(math.log10(lr / centre)) + 0.1 * setting.get("momentum", 0.0)
                    final = max(0.1, top - 0.06 * distance**2.5 + rng.normal(0, 0.003 + 0.002 * distance))
                    if not higher_is_better:
                        final = (1 - final) * 30
                    lost = all_diverged or lr > boundary * (0.7 + 0.08 * seed)
                    end = int(steps * 0.1) + seed if lost else steps
                    curve = 2.3 * np.exp(-step * min(lr / centre, 1) / (0.12 * steps)) + 0.02 * (1 + distance)
                    curve = curve * np.exp(rng.normal(0, 0.25, step.size))
                    rises = final * (1 - 0.9 * np.exp(-evaluation / (0.1 * steps)))
                    train.append(np.where(step < end, curve, np.nan))
                    metric.append(np.where(evaluation <= end, rises, np.nan))
                    status = "diverged" if lost else "completed"
                    if interrupted and len(rows) < interrupted:
                        status = "interrupted"
                    if status == "completed":
                        scores[index, seed] = final
                    rows.append(
                        {
                            "trial": len(rows),
                            "configuration": index,
                            "loss": loss,
                            "optimizer": optimizer,
                            "seed": seed,
                            "lr": lr,
                            "momentum": setting.get("momentum", 0.9 if "momentum" in optimizer else 0.0),
                            "beta1": 0.9 if optimizer == "adam" else None,
                            "status": status,
                            "ended_at": end,
                            "final_train_loss": None if lost else float(curve[-1]),
                            "final_metric": final if status == "completed" else None,
                            "best_metric": final,
                            "best_step": end,
                            "final_validation_loss": 0.1,
                        }
                    )
            label = optimizer if len(losses) == 1 else f"{optimizer} on {loss}"
            candidates.append(Candidate(label, scores, settings, optimizer=optimizer, loss=loss))
    name = "accuracy" if higher_is_better else "mse"
    spec = {
        "task": {
            "name": task,
            "source": "scikit-learn's digits, 1,797 images of 8 × 8 points",
            "samples": 1437,
            "validation_samples": 360,
            "batch_size": 64,
            "drop_last": False,
            "shuffle": True,
            "loss": losses[0],
            "metric": name,
            "higher_is_better": higher_is_better,
            "parameters": 8970,
            "model": "Sequential(\n  (0): Linear(in_features=64, out_features=64)\n  (1): ReLU()\n)",
            "dtype": "float32",
        },
        "optimizers": [
            {
                "label": o,
                "name": o.split()[0],
                "arguments": {"lr": learning_rates(o, rates)},
                "code": f"fl.optim.{o.split()[0]}(lr=fl.grid([…]))",
            }
            for o in optimizers
        ],
        "losses": [{"label": loss, "code": f"fl.losses.{loss}()"} for loss in losses],
        "seeds": list(range(seeds)),
        "steps": steps,
        "epochs": steps / 23,
        "engine": "vectorised",
        "engine_reason": "the model can be vectorised",
        "device": "cpu",
        "versions": {"fallline": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "platform": "Linux-x86_64"},
        "batch_order": "A fresh torch.randperm of the training set each epoch, seeded by the trial's seed.",
        "created": "2025-01-02T03:04:05+00:00",
        "seconds": 41.3,
        "trials_per_second": 12.6,
        "command": f"fallline sweep {task}",
        "workers": 2,
    }
    ranking = rank(candidates, seeds=range(seeds), higher_is_better=higher_is_better, metric=name, resamples=2000)
    history = FakeHistory(step, np.array(train), evaluation, np.array(metric), np.array(metric))
    return FakeResult(spec, pl.DataFrame(rows, infer_schema_length=None), history, ranking)


@pytest.fixture(scope="session")
def make_result() -> Callable[..., FakeResult]:
    return build


@pytest.fixture(scope="session")
def result() -> FakeResult:
    return build()
