"""Fallline finds out which loss, optimizer and learning rate train a PyTorch model best, by training all the candidates
at once, and shows why.

    import fallline as fl
    result = fl.sweep(fl.tasks.digits())
    print(result)

Importing this package is fast: torch and everything that needs it are imported when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fallline import diagnosis, errors, evidence, losses, optim, tasks
    from fallline.diagnosis.sanity import check
    from fallline.dimensions import grid, log_grid, log_uniform, uniform
    from fallline.optim import schedules
    from fallline.sweeps.result import Result, load
    from fallline.sweeps.sweep import sweep
    from fallline.tasks import metrics
    from fallline.tasks.task import Task
    from fallline.training.fit import Run, fit

__version__ = "0.1.0"

# Where each public name lives; a name with an empty second part is the module itself.
_HOMES = {
    "Result": ("fallline.sweeps.result", "Result"),
    "Run": ("fallline.training.fit", "Run"),
    "Task": ("fallline.tasks.task", "Task"),
    "check": ("fallline.diagnosis.sanity", "check"),
    "diagnosis": ("fallline.diagnosis", ""),
    "errors": ("fallline.errors", ""),
    "evidence": ("fallline.evidence", ""),
    "fit": ("fallline.training.fit", "fit"),
    "grid": ("fallline.dimensions", "grid"),
    "load": ("fallline.sweeps.result", "load"),
    "log_grid": ("fallline.dimensions", "log_grid"),
    "log_uniform": ("fallline.dimensions", "log_uniform"),
    "losses": ("fallline.losses", ""),
    "metrics": ("fallline.tasks.metrics", ""),
    "optim": ("fallline.optim", ""),
    "schedules": ("fallline.optim.schedules", ""),
    "sweep": ("fallline.sweeps.sweep", "sweep"),
    "tasks": ("fallline.tasks", ""),
    "uniform": ("fallline.dimensions", "uniform"),
}

__all__ = [
    "Result",
    "Run",
    "Task",
    "check",
    "diagnosis",
    "errors",
    "evidence",
    "fit",
    "grid",
    "load",
    "log_grid",
    "log_uniform",
    "losses",
    "metrics",
    "optim",
    "schedules",
    "sweep",
    "tasks",
    "uniform",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        from fallline.errors import nearest

        raise AttributeError(f"module 'fallline' has no attribute {name!r}. {nearest(name, _HOMES)}")
    module, attribute = _HOMES[name]
    value = importlib.import_module(module)
    found = getattr(value, attribute) if attribute else value
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
