"""What a sweep costs against its trials, its steps, the parameters of its model, and the cores that train it.

    python benchmarks/scaling.py [--quick] [--device cuda] [--repeats 5] [--only trials cores] [--write]

Every point is the public `fl.sweep`, timed whole, in one process that has made the same sweep before; medians of
interleaved repeats are shown with the lowest and the highest.

- trials: `line`, 1 to 100,000 of them, 10 steps each;
- steps: `line`, 60 trials, 100 to 10,000 steps;
- parameters: digits with one hidden layer of 16 to 1,024, 60 trials, 50 steps;
- cores: digits, 500 trials, 1,000 steps, one worker to one per core.

A straight line is seconds = fixed + each × size; it is fitted so that every point's relative error counts alike, and
R² is of log seconds. The slope of log seconds against log size is shown too, over all points and over the upper half,
where the fixed cost has faded: 1 is in proportion. Where a point is more than 25 % off the line, the benchmark says
which one, by how much, and what may bend the line there. The last column says how the sweep chose to train.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import fallline as fl
from fallline.tasks import Task
from speed.cases import adams, mlp, of_full_batches
from speed.pages import Output, cores, machine

# What is called straight: no point is more than so many times its line, or less than one in so many.
STRAIGHT = 1.25
Sweep = Callable[[int], fl.Result]


@dataclass(frozen=True)
class Axis:
    """Something that a sweep's cost depends on.

    Attributes:
        sizes: at which it is measured.
        sweep: trains a sweep of a size.
        why: what may bend the line.
        inverse: whether the cost is expected to fall in proportion (cores).
    """

    name: str
    title: str
    sizes: tuple[int, ...]
    sweep: Sweep
    why: str
    inverse: bool = False


@dataclass(frozen=True)
class Line:
    """seconds = fixed + each × size, and how well the points lie on it.

    Attributes:
        r_squared: of log seconds.
        slope: of log seconds against log size, over all points.
        upper_slope: the same over the upper half of the points.
        ratios: seconds measured to seconds of the line, point by point.
    """

    fixed: float
    each: float
    r_squared: float
    slope: float
    upper_slope: float
    ratios: list[float]

    @property
    def straight(self) -> bool:
        return all(1 / STRAIGHT <= ratio <= STRAIGHT for ratio in self.ratios)


def fit(sizes: list[float], seconds: list[float]) -> Line:
    """The line with the least relative error through the points; neither of its numbers is negative."""
    from scipy.optimize import nnls

    x, y = np.asarray(sizes, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    (fixed, each), _ = nnls(np.stack([1 / y, x / y], axis=1), np.ones_like(y))
    expected = fixed + each * x
    left = np.log(y / expected)
    spread = np.log(y) - np.log(y).mean()
    r_squared = 1 - float(left @ left) / float(spread @ spread)
    half = len(x) // 2
    slope, upper = (float(np.polyfit(np.log(x[k:]), np.log(y[k:]), 1)[0]) for k in (0, min(half, len(x) - 2)))
    return Line(float(fixed), float(each), r_squared, slope, upper, (y / expected).tolist())


def parameters_of(width: int) -> int:
    return sum(p.numel() for p in mlp(width).parameters())


def on_cores(count: int, sweep: Callable[[], fl.Result]) -> fl.Result:
    """Sweeps with so many threads inside torch's operators."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return sweep()
    finally:
        torch.set_num_threads(before)


def axes(device: str, quick: bool) -> list[Axis]:
    """What is measured; a quick run leaves out the larger sizes."""
    digits = partial(of_full_batches, fl.tasks.digits, 64)

    def sweep(task: Task, trials: int, steps: int, workers: int | str = "auto") -> fl.Result:
        points = min(trials, 10)
        return fl.sweep(
            task,
            adams(points),
            seeds=trials // points,
            steps=steps,
            evaluate_every=steps,
            device=device,
            workers=workers,
            progress=False,
        )

    found = [
        Axis(
            "trials",
            "line, 10 steps",
            (1, 10, 100, 1000, 10_000, 100_000),
            lambda size: sweep(fl.tasks.line(), size, 10),
            "what a sweep costs at all, whatever its size; what every pack costs; processes, which start at some size",
        ),
        Axis(
            "steps",
            "line, 60 trials",
            (100, 300, 1000, 3000, 10_000),
            lambda size: sweep(fl.tasks.line(), 60, size),
            "what a sweep costs at all; from some seconds of training on, a way that costs seconds at first and then "
            "is faster (the last column)",
        ),
        Axis(
            "parameters",
            "digits, one hidden layer, 60 trials, 50 steps",
            tuple(map(parameters_of, (16, 32, 64, 128, 256, 512, 1024))),
            lambda size: sweep(digits(model=partial(mlp, (size - 10) // 75)), 60, 50),
            "small models cost calls, whatever their size, and large ones arithmetic; processes, which start somewhere",
        ),
        Axis(
            "cores",
            "digits, 500 trials, 1,000 steps; size: workers, each of one thread",
            tuple(dict.fromkeys([1, *(2**k for k in range(1, 20) if 2**k < cores()), cores()])),
            lambda size: on_cores(size, lambda: sweep(digits(), 500, 1000, size)),
            "what is done once (checks, ranking), memory that cores share, and other work on the machine",
            inverse=True,
        ),
    ]
    if device != "cpu":
        found = [axis for axis in found if axis.name != "cores"]  # a GPU is trained from one process
    if quick:
        found = [Axis(a.name, a.title, a.sizes[:3], a.sweep, a.why, a.inverse) for a in found]
    return found


def measure(axis: Axis, repeats: int) -> tuple[list[list[float]], list[str]]:
    """Seconds [size][repeat], the repeats interleaved, after a sweep of each size that does not count; and the way in
    which each size was trained most often.
    """
    seconds: list[list[float]] = [[] for _ in axis.sizes]
    ways: list[list[str]] = [[] for _ in axis.sizes]
    for repeat in range(repeats + 1):
        for position, size in enumerate(axis.sizes):
            began = time.perf_counter()
            result = axis.sweep(size)
            if repeat:
                seconds[position].append(time.perf_counter() - began)
                ways[position].append(result.spec["calibration"]["choice"])
    return seconds, [statistics.mode(own) for own in ways]


def report(axis: Axis, seconds: list[list[float]], ways: list[str], output: Callable[[str], None]) -> None:
    """Prints the points of an axis, the line through them, and what is not straight."""
    output(f"\nseconds against {axis.name}: {axis.title}")
    output(f"{axis.name:>12}{'median':>11}{'lowest':>11}{'highest':>11}{'line':>11}{'off by':>9}  way")
    medians = [statistics.median(own) for own in seconds]
    sizes = [1 / size if axis.inverse else float(size) for size in axis.sizes]
    line = fit(sizes, medians) if len(sizes) > 2 else None
    for position, (size, own) in enumerate(zip(axis.sizes, seconds, strict=True)):
        row = f"{size:>12,}{medians[position]:>11.4f}{min(own):>11.4f}{max(own):>11.4f}"
        if line is not None:
            ratio = line.ratios[position]
            row += f"{medians[position] / ratio:>11.4f}{ratio - 1:>9.0%}"
        else:
            row += " " * 20
        output(f"{row}  {ways[position]}")
    if axis.inverse:
        gain = medians[0] / medians[-1]
        output(
            f"{axis.sizes[-1]} workers are {gain:.2f} times as fast as one ({gain / axis.sizes[-1]:.0%} of {axis.name})"
        )
    if line is None:
        return
    per = f"1/{axis.name.removesuffix('s')}" if axis.inverse else axis.name.removesuffix("s")
    output(
        f"seconds = {line.fixed:.3g} + {line.each:.3g} per {per}; R² {line.r_squared:.4f}; slope in logarithms "
        f"{line.slope:.2f}, of the upper half {line.upper_slope:.2f}"
    )
    if line.straight:
        output("straight")
        return
    worst = max(range(len(sizes)), key=lambda i: abs(np.log(line.ratios[i])))
    output(
        f"not straight: {axis.sizes[worst]:,} {axis.name} take {line.ratios[worst]:.2f} times what the line says. "
        f"What bends it: {axis.why}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [axis.name for axis in axes("cpu", quick=False)]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="AXIS", help=", ".join(names))
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats, of which the median counts (5)")
    parser.add_argument("--quick", action="store_true", help="3 repeats of the three smallest sizes, to try it out")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda or cuda:N")
    parser.add_argument("--write", action="store_true", help="put what is printed into docs/benchmarks.md")
    options = parser.parse_args()
    device = torch.device(options.device)
    repeats = 3 if options.quick else options.repeats
    output = Output()
    for text in machine(device):
        output(text)
    output(f"fl.sweep as a whole, medians of {repeats} interleaved repeats")
    for axis in axes(options.device, options.quick):
        if axis.name in options.only:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", fl.errors.TrainedSequentially)
                seconds, ways = measure(axis, repeats)
            report(axis, seconds, ways, output)
    if options.write:
        output.write(f"scaling:{device.type}")


if __name__ == "__main__":
    main()
