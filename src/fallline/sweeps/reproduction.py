"""The program that repeats a trial with nothing but PyTorch's own loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fallline.description import Call
from fallline.description import code as code_of
from fallline.optim import Optimizer
from fallline.optim.catalogue import CATALOGUE
from fallline.optim.schedules import Schedule
from fallline.optim.torch_own import TorchOwn

PROGRAM = """\
import torch
import fallline as fl
{imports}
task = {task}.check()  # the model factory and the data; the rest is plain PyTorch
x, y = task.train.x, task.train.y

torch.manual_seed({seed})
model = task.model()
loss_function = {loss}
optimizer = {optimizer}
order = torch.Generator().manual_seed({seed})

step = 0
while step < {steps}:
    indices = {indices}
    for index in indices.split({batch_size}){drop}:
{update}
        step += 1
        if step == {steps}:
            break

model.eval()
with torch.no_grad(){evaluation}:
    prediction = model(task.validation.x)
print("{metric}:", float(task.metric(prediction, task.validation.y)))
"""


UPDATE = """\
        optimizer.zero_grad()
        loss = loss_function(model(x[index]), y[index])
        loss.backward()
        optimizer.step()"""

# For optimizers that ask for the loss and its gradient more than once in a step.
UPDATE_WITH_CLOSURE = """\

        def closure():
            optimizer.zero_grad()
            loss = loss_function(model(x[index]), y[index])
            loss.backward({differentiable})
            return loss

        optimizer.step(closure)"""


def code(spec: dict[str, Any], optimizer: Optimizer, loss_code: str, seed: int) -> str:
    """The program that repeats the trial of this optimizer and seed; it prints the final metric.

    Args:
        spec: of the sweep.
        loss_code: the loss in plain PyTorch, or "" for one that only the task knows.
    """
    task = spec["task"]
    n, batch_size = task["samples"], task["batch_size"]
    update = UPDATE
    if optimizer.looks_around or isinstance(optimizer, TorchOwn):
        differentiable = "create_graph=optimizer.rule.surveys(step)" if optimizer.curves else ""
        update = UPDATE_WITH_CLOSURE.format(differentiable=differentiable)
    return PROGRAM.format(
        imports=imports(optimizer),
        update=update,
        evaluation=", optimizer.evaluation_parameters()" if optimizer.moves_evaluation else "",
        task=spec["task_code"],
        seed=seed,
        loss=loss_code or "task.loss",
        optimizer=optimizer_code(optimizer, spec["steps"], seed),
        steps=spec["steps"],
        indices=f"torch.randperm({n}, generator=order)" if task["shuffle"] else f"torch.arange({n})",
        batch_size=batch_size,
        drop=f"[: {n // batch_size}]" if task["drop_last"] else "",
        metric=task["metric"],
    )


def imports(optimizer: Optimizer) -> str:
    """The lines that import what the optimizer is made of and is neither torch's nor ours."""
    lines: dict[str, None] = {}
    for made in parts(optimizer.call):
        module = made.__module__ or "__main__"
        if module.startswith(("torch.", "fallline.")):
            continue  # it is written with the package that it is in
        if module == "__main__":
            lines[f"# {made.__name__} is defined in the program that made the sweep: put it here.\n"] = None
        else:
            lines[f"from {module} import {made.__name__}\n"] = None
    return "".join(lines)


def parts(value: Any) -> Iterator[Callable[..., Any]]:
    """The functions and classes that a value is made of."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple):
        for item in value:
            yield from parts(item)
    elif isinstance(value, Call):
        yield value.function
        yield from parts((*value.extra, *value.arguments.values()))
    elif inspect.isfunction(value) or inspect.isclass(value):
        yield value
    else:
        yield from parts(value.call) if isinstance(getattr(value, "call", None), Call) else ()


def optimizer_code(optimizer: Optimizer, steps: int, seed: int) -> str:
    """The optimizer as it is made for a model: torch's own where torch has it, else ours as a torch optimizer."""
    if isinstance(optimizer, TorchOwn):
        kind, given = optimizer.made_of
        own = "".join(f", {name}={value!r}" for name, value in given.items())
        return f"{code_of(kind)}(model.parameters(){own})"
    info = CATALOGUE.get(optimizer.name)
    call = optimizer.call
    torch_has_it = info is not None and hasattr(torch.optim, info.torch_name or "-")
    scheduled = any(isinstance(number, Schedule) for number in optimizer.hyperparameters.values())
    if info is None or call is None or not torch_has_it or scheduled:
        drawn = f", seed={seed}" if any(name.startswith("seed") for name in optimizer.slot_names) else ""
        return f"{optimizer!r}.as_torch(model.named_parameters(), steps={steps}{drawn})"
    standard = info.make().call
    assert standard is not None
    told = [
        f"{name}={value!r}"
        for name, value in call.arguments.items()
        if name == "lr" or value != standard.arguments[name]
    ]
    return f"torch.optim.{info.torch_name}(model.parameters(), {', '.join(told)})"
