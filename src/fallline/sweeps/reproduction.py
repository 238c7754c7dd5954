"""The program that repeats a trial with nothing but PyTorch's own loop."""

from __future__ import annotations

from typing import Any

from fallline.optim import Optimizer
from fallline.optim.catalogue import CATALOGUE

PROGRAM = """\
import torch
import fallline as fl

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
        optimizer.zero_grad()
        loss = loss_function(model(x[index]), y[index])
        loss.backward()
        optimizer.step()
        step += 1
        if step == {steps}:
            break

model.eval()
with torch.no_grad():
    prediction = model(task.validation.x)
print("{metric}:", float(task.metric(prediction, task.validation.y)))
"""


def code(spec: dict[str, Any], optimizer: Optimizer, loss_code: str, seed: int) -> str:
    """The program that repeats the trial of this optimizer and seed; it prints the final metric.

    Args:
        spec: of the sweep.
        loss_code: the loss in plain PyTorch, or "" for one that only the task knows.
    """
    task = spec["task"]
    n, batch_size = task["samples"], task["batch_size"]
    return PROGRAM.format(
        task=spec["task_code"],
        seed=seed,
        loss=loss_code or "task.loss",
        optimizer=optimizer_code(optimizer, spec["steps"]),
        steps=spec["steps"],
        indices=f"torch.randperm({n}, generator=order)" if task["shuffle"] else f"torch.arange({n})",
        batch_size=batch_size,
        drop=f"[: {n // batch_size}]" if task["drop_last"] else "",
        metric=task["metric"],
    )


def optimizer_code(optimizer: Optimizer, steps: int) -> str:
    """The optimizer as it is made for a model: torch's own where torch has it, else ours as a torch optimizer."""
    info = CATALOGUE.get(optimizer.name)
    call = optimizer.call
    if info is None or call is None or not info.torch_name or any(hasattr(v, "kind") for v in call.arguments.values()):
        return f"{optimizer!r}.as_torch(model.parameters(), steps={steps})"
    standard = info.make().call
    assert standard is not None
    told = [
        f"{name}={value!r}"
        for name, value in call.arguments.items()
        if name == "lr" or value != standard.arguments[name]
    ]
    return f"torch.optim.{info.torch_name}(model.parameters(), {', '.join(told)})"
