"""What `fl.losses.checked` costs in somebody's own training loop, once it has checked the first batches.

    python -m benchmarks.checked_loss [--epochs 40]

A plain PyTorch loop trains digits with torch's CrossEntropyLoss, bare and checked, in turns, so that a slow minute of
the machine hits both alike; each number is the median over epochs, the ratio the median of the ratios of neighbours. A
second table has what one call of `fl.losses.check` costs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fallline as fl


def epoch(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """Seconds that one epoch takes, evaluation left out."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).split(64)
    began = time.perf_counter()
    for index in order:
        optimizer.zero_grad()
        loss(model(x[index]), y[index]).backward()
        optimizer.step()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40, help="pairs of epochs that are timed")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    task = fl.tasks.digits().check()
    x, y = task.train.x, task.train.y
    bare: Callable[[Tensor, Tensor], Tensor] = nn.CrossEntropyLoss()
    checked: Callable[[Tensor, Tensor], Tensor] = fl.losses.checked(nn.CrossEntropyLoss())
    model = task.build_model(0)
    epoch(model, checked, x, y)  # the first batches are checked here
    epoch(model, bare, x, y)
    seconds: dict[str, list[float]] = {"bare": [], "checked": []}
    for turn in range(asked.epochs):
        pair = [("bare", bare), ("checked", checked)]
        for name, loss in pair if turn % 2 else reversed(pair):
            seconds[name].append(epoch(model, loss, x, y))
    ratios = [b / a for a, b in zip(seconds["bare"], seconds["checked"], strict=True)]
    print("one epoch of digits, 23 batches of 64     milliseconds     ratio")
    print(f"bare torch.nn.CrossEntropyLoss()         {1e3 * statistics.median(seconds['bare']):13.2f}     1.000")
    shown = 1e3 * statistics.median(seconds["checked"])
    print(f"fl.losses.checked(…) after the first     {shown:13.2f}     {statistics.median(ratios):.3f}\n")
    print("one call of fl.losses.check               milliseconds")
    for count in (64, len(x)):
        times = []
        for _ in range(20):
            prediction = model(x[:count])
            began = time.perf_counter()
            fl.losses.check(bare, prediction, y[:count], model)
            times.append(time.perf_counter() - began)
        print(f"{count:5} samples of 10 classes             {1e3 * statistics.median(times):13.2f}")


if __name__ == "__main__":
    main()
