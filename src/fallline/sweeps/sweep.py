"""`sweep`: many trials under one budget, trained at once, recorded as they go, and ranked."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from fallline.errors import (
    FalllineError,
    InvalidHyperparameter,
    InvalidSweep,
    RunDirectoryError,
    TrainedSequentially,
)
from fallline.losses import Loss, as_loss
from fallline.optim import Optimizer, adam, rmsprop, sgd
from fallline.optim.catalogue import learning_rate_grid
from fallline.sweeps import calibration, engines, search
from fallline.sweeps.packs import Job
from fallline.sweeps.result import Result
from fallline.sweeps.running import run
from fallline.sweeps.search import Configuration
from fallline.sweeps.store import RunDirectory, require_free
from fallline.tasks import Task
from fallline.tasks import registry as built_in_tasks
from fallline.training.batches import steps_per_epoch
from fallline.training.device import resolve_device
from fallline.training.fit import check_budget, check_seed, fingerprint

# Of a trial: enough evaluations to draw its curve, few enough to cost little.
EVALUATIONS = 20
# What may differ between a run and its continuation.
INCIDENTAL = (
    "created",
    "versions",
    "task_code",
    "command",
    "engine_reason",
    "course",
    "memory",
    "calibration",
    "workers",
    "seconds",
    "training_seconds",
    "trials_per_second",
    "complete",
    "packs",
)


def default_optimizers(points: int = 13) -> list[Optimizer]:
    """What a sweep races when it is not told: SGD, SGD with momentum, RMSprop and Adam, over so many learning rates."""
    return [
        sgd(lr=learning_rate_grid("sgd", points)),
        sgd(lr=learning_rate_grid("sgd", points), momentum=0.9),
        rmsprop(lr=learning_rate_grid("rmsprop", points)),
        adam(lr=learning_rate_grid("adam", points)),
    ]


def sweep(
    task: Task,
    optimizers: Sequence[Optimizer] | Optimizer | None = None,
    losses: Sequence[Any] | None = None,
    *,
    seeds: int | Sequence[int] = 10,
    steps: int | None = None,
    epochs: int | None = None,
    samples: int = 16,
    search_seed: int = 0,
    engine: str = "auto",
    device: str | torch.device = "auto",
    workers: int | str = "auto",
    evaluate_every: int | None = None,
    keep_parameters: str = "best",
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
    task_code: str | None = None,
    command: str | None = None,
) -> Result:
    """Trains every configuration with every seed, and ranks the optimizers.

    Args:
        task: what is trained.
        optimizers: with search dimensions for the hyperparameters to be tuned; by default SGD, SGD with momentum,
            RMSprop and Adam over 13 learning rates each.
        losses: losses to compare under the task's metric; by default the task's own.
        seeds: how many seeds (0, 1, …), or which.
        steps: updates per trial (1,000 when neither this nor `epochs` is given).
        epochs: passes over the training data per trial, instead of steps.
        samples: how many points are drawn for optimizers that search ranges.
        search_seed: draws them.
        engine: "vectorised", "sequential", or "auto": vectorised where the model allows it and it is faster, which is
            measured where there is much ahead. A vectorised step is compiled where that pays; "compiled" always does.
        device: "auto", "cpu", "cuda" or "cuda:N".
        workers: processes that train side by side on the CPU; "auto" is one per core where that pays.
        evaluate_every: steps between evaluations; by default a twentieth of training.
        keep_parameters: "best" keeps the final parameters of each configuration's best trial, "all" every trial's.
        out: the run directory; without one, results live as long as the returned object.
        resume: go on with the run in `out`, which must be the same sweep.
        progress: a progress bar; by default when a terminal watches.
        task_code, command: how the task is written in Python, and what was typed, for the report.

    Returns:
        The result. Ctrl-C ends the sweep and returns what there is; `resume=True` goes on from there.

    Warns:
        TrainedSequentially: with engine "auto", when the model cannot be vectorised; the message says why.

    Raises:
        InvalidTask, LossMismatch: when the task cannot be trained as it is.
        InvalidSweep, InvalidHyperparameter: for settings that make no sweep.
        DeviceUnavailable: for a device that is not there.
        RunDirectoryError: when `out` holds another run or cannot be written.

    >>> import fallline as fl
    >>> result = fl.sweep(fl.tasks.line(), [fl.optim.sgd(lr=fl.grid([0.01, 0.1, 1.0]))], seeds=2, steps=50)
    >>> result.trials["status"].to_list()
    ['completed', 'completed', 'completed', 'completed', 'diverged', 'diverged']
    >>> result.best.settings
    {'lr': 0.1}
    """
    began = time.monotonic()
    where = resolve_device(device)
    if not isinstance(task, Task):
        raise InvalidSweep(f"{task!r} is not a task: give fl.Task(…) or one of fl.tasks.")
    given = _losses(task, losses)
    chosen = search.configurations(_optimizers(optimizers), given, samples=samples, search_seed=search_seed)
    plans = search.trials(chosen, _seeds(seeds))
    budget = _steps(task, steps, epochs)
    every = max(1, -(-budget // EVALUATIONS)) if evaluate_every is None else evaluate_every
    check_budget("evaluate_every", every)
    if keep_parameters not in ("best", "all"):
        raise InvalidSweep(f"keep_parameters = {keep_parameters!r} is neither 'best' nor 'all'.")
    tasks = [task if loss is task.loss else task.with_loss(loss) for loss in dict.fromkeys(c.loss for c in chosen)]
    for each in tasks:
        each.warn(stacklevel=2)
    first = tasks[0]
    _check_parameters(first, chosen)
    rules = [c.optimizer for c in chosen]
    kinds = {each.loss.structure: each for each in tasks}
    choices = [engines.choose(engine, each, where, rules) for each in kinds.values()]
    choice = next((c for c in choices if c.engine == "sequential"), choices[0])
    if engine == "auto" and choice.engine == "sequential":
        warnings.warn(f"training one trial at a time: {choice.reason}.", TrainedSequentially, stacklevel=2)
    choice = engines.for_all(choice, engine, plans)
    parameters = int(str(first.describe()["parameters"]))
    spec = {
        "task": first.describe(),
        "task_code": task_code or _task_code(task),
        "data": fingerprint(task),
        "optimizers": _described_optimizers(optimizers),
        "losses": [
            {"label": label, "code": repr(loss)} for label, loss in zip(search.labels(given), given, strict=True)
        ],
        "seeds": _seeds(seeds),
        "steps": budget,
        "epochs": budget / steps_per_epoch(len(task.train.x), task.batch_size, task.drop_last),
        "evaluate_every": every,
        "samples": samples,
        "search_seed": search_seed,
        "engine": choice.engine,
        "device": _device_name(where),
        "keep_parameters": keep_parameters,
        "batch_order": _batch_order(task),
        "versions": _versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "seconds": 0.0,
        "trials_per_second": None,
        "complete": False,
    }
    if out is None and resume:
        raise RunDirectoryError("resume=True needs the directory of the run: give out=….")
    temporary = Path(mkdtemp(prefix="fallline-")) if out is None else None
    path = temporary / "run" if temporary is not None else Path(str(out))
    ahead = calibration.Ahead(first, plans, where, budget, parameters, progress)
    try:
        if resume:
            directory = _opened(path, spec, engine)
            course = calibration.resumed(ahead, choice, directory.spec)
        else:
            require_free(path)
            course = calibration.course_of(ahead, choice, asked=engine, asked_workers=workers)
            spec |= {
                "engine": course.engine,
                "engine_reason": course.reason,
                "course": course.recorded,
                "calibration": course.facts,
                "workers": course.workers,
                "packs": [list(pack.trials) for pack in ahead.packs(course)],
            }
            directory = RunDirectory.create(path, spec, chosen, plans)
        job = Job(
            first, plans, course.engine, where, budget, every, path, keep_parameters, course.programs, course.chunk
        )
        processes = None if course.threads is None else course.workers
        try:
            title = f"sweep {task.name} ({course.name})"
            run(job, directory, processes, progress, title, began, much=bool(course.measured))
        except FalllineError:
            if not resume and directory.recorded().is_empty():
                directory.remove()  # nothing to keep, nothing to go on from
            raise
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Result(path, temporary=temporary)


def _check_parameters(task: Task, chosen: Sequence[Configuration]) -> None:
    """Each optimizer can train every parameter of the model (Muon cannot train vectors)."""
    choosy = [c.optimizer for c in chosen if any(t.check is not None for t in c.optimizer.transforms)]
    if not choosy:
        return
    with torch.random.fork_rng([]):
        module = task.build_model(0)
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for optimizer in choosy:
        optimizer.check(params)


def _opened(path: Path, spec: dict[str, Any], asked: str) -> RunDirectory:
    """The run that is to be gone on with, which must be the same sweep."""
    if not path.exists():
        raise RunDirectoryError(f"there is nothing to resume at {path}: it does not exist. Leave resume out.")
    directory = RunDirectory(path)
    if asked == "auto":  # whatever was faster then
        spec = {**spec, "engine": directory.spec["engine"]}
    for name, here in _facts(spec):
        there = dict(_facts(directory.spec)).get(name)
        if here != there:
            raise RunDirectoryError(
                f"{path} holds another run: {name} was {_short(there)} there and is {_short(here)} now. "
                "Resume with the settings of that run, or give another directory."
            )
    directory.tidy()
    return directory


def _facts(spec: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What must agree between a run and its continuation, each with its name, as it comes back from JSON."""
    for key, value in _plain(spec).items():
        if key == "task":
            yield from ((f"the task's {name}", fact) for name, fact in value.items())
        elif key in ("optimizers", "losses"):
            yield key, [each["code"] for each in value]
        elif key not in INCIDENTAL:
            yield key, value


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _optimizers(given: Sequence[Optimizer] | Optimizer | None) -> list[Optimizer]:
    if given is None:
        return default_optimizers()
    found = [given] if isinstance(given, Optimizer) else list(given)
    if not found:
        raise InvalidSweep("optimizers is empty: give at least one, or leave it out for the default ones.")
    for each in found:
        if not isinstance(each, Optimizer):
            raise InvalidHyperparameter(f"{each!r} is not an optimizer of fallline: give one like fl.optim.adam().")
    return found


def _described_optimizers(given: Sequence[Optimizer] | Optimizer | None) -> list[dict[str, Any]]:
    found = _optimizers(given)
    return [
        {
            "label": label,
            "name": optimizer.name,
            "arguments": {name: _jsonable(value) for name, value in optimizer.arguments.items()},
            "code": repr(optimizer),
        }
        for label, optimizer in zip(search.labels(found), found, strict=True)
    ]


def _jsonable(value: object) -> object:
    return value if isinstance(value, bool | int | float | str | None) else repr(value)


def _losses(task: Task, given: Sequence[Any] | None) -> list[Loss]:
    if given is None:
        return [task.loss]
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise InvalidSweep(f"losses = {given!r} is not a list of losses: give for example losses=['mse', 'huber'].")
    found = [as_loss(each) for each in given]
    several = len(found) > 1 or any(loss.dimensions for loss in found)
    if several and isinstance(task.metric.function, Loss) and not task.metric_was_given:
        raise InvalidSweep(
            "values of different losses cannot be compared, and no metric can be chosen for these: give the task a "
            "metric."
        )
    return found


def _seeds(given: int | Sequence[int]) -> list[int]:
    if isinstance(given, int) and not isinstance(given, bool):
        if given < 1:
            raise InvalidSweep(f"seeds = {given!r}: give at least 1 (8 or more let a ranking be sure).")
        return list(range(given))
    if isinstance(given, bool | str) or not isinstance(given, Sequence) or not given:
        raise InvalidSweep(f"seeds = {given!r} is neither a number of seeds nor a list of them.")
    for seed in given:
        check_seed(seed)
    if len(set(given)) < len(given):
        raise InvalidSweep(f"seeds = {list(given)!r} holds the same seed twice.")
    return list(given)


def _steps(task: Task, steps: int | None, epochs: int | None) -> int:
    if steps is not None and epochs is not None:
        raise InvalidSweep("give either epochs or steps, not both.")
    if epochs is not None:
        check_budget("epochs", epochs)
        return epochs * steps_per_epoch(len(task.train.x), task.batch_size, task.drop_last)
    steps = 1000 if steps is None else steps
    check_budget("steps", steps)
    return steps


def _task_code(task: Task) -> str:
    return f"fl.tasks.{task.name}()" if task.name in built_in_tasks else "task"


def _batch_order(task: Task) -> str:
    if not task.shuffle:
        return "the samples as they stand, the same in every epoch"
    short = "dropped" if task.drop_last else "kept"
    return f"a new permutation every epoch, drawn by the trial's seed; a short last batch is {short}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _versions() -> dict[str, str]:
    return {
        "fallline": importlib.metadata.version("fallline"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
