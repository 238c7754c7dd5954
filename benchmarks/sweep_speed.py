"""How many trial-steps per second each way of training a population makes, side by side in one run.

    python benchmarks/sweep_speed.py [--cases digits char_lm] [--populations 1 1024] [--quick] [--device cuda] [--write]

The contenders train the same trials: same model, first parameters, batches and learning rates, in float32 with Adam.

- plain loop: a hand-written PyTorch loop with torch.optim's fastest form, one trial after the other, in one process
  with a thread for each core, and in one single-threaded process per core;
- torch.compile: the same loops with the model compiled (one program for all trials);
- torch.func: all trials at once in eager mode, as in torch's tutorial on ensembling, with Adam written out;
- JAX: all trials at once in one program of vmap, scan and optax (`pip install 'fallline[bench]'`);
- fallline: the public `fl.sweep`.

All stand ready before the first repeat, in processes of their own with empty compile caches. The repeats are
interleaved, so that a slow minute of the machine hits all alike; medians are compared, the lowest and highest shown.
What is timed is training; compile time is shown apart. Loops train a few trials, and torch.func and JAX take fewer
steps, which leaves their rates as they are. Wherever two contenders trained the same trial equally long, their last
losses must agree. A matrix product 1024 × 1024 in float32, one thread per core at once, is timed in every repeat too:
the share of its rate is that of the products in a plain step, forward and backward. Memory is what a run takes at most
beyond what the processes had when they started, looked at in a run that is not timed.

The exit status is 1 where losses differ, and where what is asked for (lines with PASS and FAIL) is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from speed import contenders, jax_scan
from speed.cases import CASES, Case
from speed.contenders import Losses, Work
from speed.pages import Output, cores, machine
from speed.teams import Contender, ContenderFailed, Team

FALLLINE, PRODUCTS, JAX = "fallline", "matrix products", "JAX"
ONE = "plain loop"
PLAIN_LOOPS = f"plain loop, {cores()} processes" if cores() > 1 else ONE
# Of losses after up to some thousand steps of the same arithmetic in another order (other products, other threads),
# relative, in float32; after a few steps the tests ask for 3e-5.
TOLERANCE = 5e-2
# What --quick leaves of the steps.
QUICK = 1 / 16


@dataclass
class Row:
    """What one contender did in a case: the trial-steps per second of its repeats, and its last losses.

    `wholes` are the seconds of sweeps with all that is around their training.
    """

    team: Team
    rates: list[float] = field(default_factory=list)
    wholes: list[float] = field(default_factory=list)
    losses: Losses = field(default_factory=dict)
    peak: int = 0

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


@dataclass(frozen=True)
class Measured:
    """All that was measured of a case at one population; rows by contender."""

    case: Case
    population: int
    steps: int
    rows: dict[str, Row]
    left_out: dict[str, str]
    products: float
    difference: float
    device: torch.device

    @property
    def share(self) -> float:
        """Of the machine's rate of matrix products that fallline reaches."""
        return self.rows[FALLLINE].rate * self.case.floating_point_operations() / self.products

    def ratio(self, peer: str) -> float:
        """How many times as fast as a peer fallline is."""
        return self.rows[FALLLINE].rate / self.rows[peer].rate


def line_up(case: Case, population: int, device: torch.device) -> list[Contender]:
    """Who takes part."""
    found = [Contender(ONE, contenders.plain_loop, threads=None)]
    several = cores() if device.type == "cpu" and population > 1 else 1
    if several > 1:
        found.append(Contender(PLAIN_LOOPS, contenders.plain_loop, several))
    if case.model is not None:
        threads = 1 if several > 1 else None
        found.append(Contender("torch.compile", contenders.compiled_loop, several, threads))
        found.append(Contender("torch.func", contenders.ensemble, threads=None, share=0.05))
        if importlib.util.find_spec("jax") and importlib.util.find_spec("optax"):
            found.append(Contender(JAX, jax_scan.scan, share=0.25))
    return [*found, Contender(FALLLINE, contenders.fallline_sweep, share=1.0)]


def works(contender: Contender, case: Case, population: int, device: torch.device, size: float) -> list[Work]:
    """The share of each of a contender's processes."""
    every = range(population)
    steps = case.steps(population, size, contender.share or 1.0)
    shared = {"case": case.name, "population": population, "steps": steps, "device": str(device)}
    if contender.share is not None:
        return [Work(trials=tuple(every), threads=contender.threads, **shared)]
    few = -(-int(case.slow_trial_steps * size) // steps)
    few = min(population, -(-few // contender.processes) * contender.processes)
    chosen = every[:: population // few][:few]
    parts = [tuple(chosen[part :: contender.processes]) for part in range(contender.processes)]
    return [Work(trials=part, threads=contender.threads, **shared) for part in parts]


def measure(case: Case, population: int, device: torch.device, repeats: int, size: float) -> Measured:
    """Runs all contenders of a case."""
    lined_up = line_up(case, population, device)
    shares = {contender.name: works(contender, case, population, device, size) for contender in lined_up}
    marks = tuple(sorted({work.steps for share in shares.values() for work in share}))
    count = cores() if device.type == "cpu" else 1
    products = Contender(PRODUCTS, contenders.matrix_products, count)
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        rows: dict[str, Row] = {}
        for contender in [products, *lined_up]:
            own = shares.get(contender.name, [Work(case.name, population, (), 1, str(device))] * count)
            team = Team(contender, [Work(**{**vars(work), "marks": marks}) for work in own])
            rows[contender.name] = Row(stack.enter_context(team))
        for name, row in list(rows.items()):
            with leaving_out(name, rows, left_out):
                row.team.get_ready()
        rates = []
        for _ in range(repeats):
            for name, row in list(rows.items()):
                with leaving_out(name, rows, left_out):
                    seconds, row.losses = row.team.run()
                    row.rates.append(row.team.trial_steps / seconds)
                    row.wholes.append(row.team.told.get("whole", seconds))
            rates.append(rows[PRODUCTS].team.told["rate"])
        del rows[PRODUCTS]
        for name, row in list(rows.items()):
            with leaving_out(name, rows, left_out):
                row.peak = row.team.peak_memory()
    difference = largest_difference(case, population, [row.losses for row in rows.values()])
    steps = case.steps(population, size)
    return Measured(case, population, steps, rows, left_out, statistics.median(rates), difference, device)


@contextlib.contextmanager
def leaving_out(name: str, rows: dict[str, Row], left_out: dict[str, str]) -> Iterator[None]:
    """A peer that fails takes no further part; the table says so."""
    try:
        yield
    except ContenderFailed as error:
        if name in (FALLLINE, PRODUCTS, ONE):
            raise
        left_out[name] = str(error).partition("\n")[0]
        del rows[name]


def largest_difference(case: Case, population: int, losses: Iterable[Losses]) -> float:
    """Between two losses of the same trial after the same steps, relative; infinite if none is comparable."""
    plans = case.plans(population)
    comparable = {plan.index for plan in plans if case.comparable(plan)}
    by_trial: dict[tuple[int, int], list[float]] = {}
    for found in losses:
        for (trial, steps), loss in found.items():
            by_trial.setdefault((trial, steps), []).append(loss)
    compared = [each for (trial, _), each in by_trial.items() if trial in comparable and len(each) > 1]
    if not compared or not all(math.isfinite(loss) for each in compared for loss in each):
        return math.inf
    return max((max(each) - min(each)) / max(abs(max(each)), 1e-3) for each in compared)


def table(measured: Measured) -> list[str]:
    """A line for each contender, and what the sweep says of itself."""
    case, rows = measured.case, measured.rows
    trials = "trial" if measured.population == 1 else "trials"
    lines = [
        f"{case.name}: {case.title}; {measured.population:,} {trials} × {measured.steps:,} steps",
        f"{'':26}{'proc.×thr.':>11}{'trials×steps':>14}{'trial-steps/s':>15}{'lowest':>10}{'highest':>10}"
        f"{'fallline is':>13}{'of products':>13}{'peak MB':>9}{'compile s':>11}",
    ]
    operations = case.floating_point_operations()
    for name, row in rows.items():
        team = row.team
        where = team.told.get("where") or f"{team.contender.processes}×{team.told['threads']}"
        own = sum(len(work.trials) for work in team.works)
        ratio = "" if name == FALLLINE else f"{measured.ratio(name):.2f}×"
        share = row.rate * operations / measured.products
        lines.append(
            f"{name:26}{where:>11}{f'{own:,}×{team.works[0].steps:,}':>14}{row.rate:>15,.0f}{min(row.rates):>10,.0f}"
            f"{max(row.rates):>10,.0f}{ratio:>13}{share:>13.1%}{row.peak / 1e6:>9,.0f}"
            f"{compile_seconds(measured, name):>11.1f}"
        )
    told, wholes = rows[FALLLINE].team.told, rows[FALLLINE].wholes
    lines.append(
        f"fl.sweep as a whole: first {told['first']:.2f} s (empty caches), again {statistics.median(wholes):.2f} s "
        f"({min(wholes):.2f} to {max(wholes):.2f}); rates above: {told['timed']}; engine {told['engine']}"
    )
    if calibration := told.get("calibration"):
        lines.append(f"calibration: {calibration}")
    lines.append(
        f"products: {measured.products / 1e9:,.1f} GFLOP/s; a plain step takes {operations / 1e6:,.3f} MFLOP; "
        f"largest relative difference between last losses: {measured.difference:.1e}"
    )
    return lines + [f"{name} was left out: {why}" for name, why in measured.left_out.items()]


def compile_seconds(measured: Measured, name: str) -> float:
    """What a contender took to compile; of a sweep that does not say, how much longer its first run was."""
    row = measured.rows[name]
    if name == FALLLINE and not row.team.compile_seconds:
        return max(0.0, row.team.told["first"] - statistics.median(row.wholes))
    return row.team.compile_seconds


def asked_for(measured: Measured) -> list[tuple[bool, str]]:
    """What the project asks of itself for this case, whether it holds, and the figure."""
    case, rows, population = measured.case.name, measured.rows, measured.population
    cpu = measured.device.type == "cpu"
    found: list[tuple[bool, str]] = [
        (measured.difference <= TOLERANCE, f"the contenders end at the same losses: {measured.difference:.1e}")
    ]

    def at_least(limit: float, value: float, what: str) -> None:
        found.append((value >= limit, f"{what}: {value:.2f}, asked for at least {limit:g}"))

    loops = [name for name in (ONE, PLAIN_LOOPS) if name in rows]
    best = max(loops, key=lambda name: rows[name].rate)
    if population == 1:
        at_least(0.9, measured.ratio(best), f"times the {best}")
    elif cpu and case in ("digits_cnn", "char_lm", "width256-batch32", "width256-batch128"):
        at_least(1.0, measured.ratio(best), f"times the best of the plain loops ({best})")
    if cpu and population == 1024 and case == "digits":
        at_least(10, measured.ratio(PLAIN_LOOPS), f"times the {PLAIN_LOOPS}, without compile time")
        trial_steps, first = population * measured.steps, rows[FALLLINE].team.told["first"]
        several = f"{trial_steps / rows[PLAIN_LOOPS].rate / first:.2f} times the {PLAIN_LOOPS}"
        at_least(6, trial_steps / rows[ONE].rate / first, f"times the {ONE}, the first sweep as a whole ({several})")
        if JAX in rows:
            at_least(1.3, measured.ratio(JAX), "times JAX")
        at_least(0.5, measured.share, "of the machine's rate of matrix products")
    if cpu and population == 1024 and case == "width16-batch32":
        at_least(20, measured.ratio(PLAIN_LOOPS), f"times the {PLAIN_LOOPS}")
    if case == "quadratic_deep":
        seconds = statistics.median(rows[FALLLINE].wholes)
        found.append((seconds < 10, f"seconds of the public sweep: {seconds:.2f}, asked for less than 10"))
    if not cpu and case == "digits" and population == 4096:
        at_least(300, measured.ratio(ONE), "times the plain loop on this GPU")
        if JAX in rows:
            at_least(1.0, measured.ratio(JAX), "times JAX on this GPU")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE", help=", ".join(CASES)
    )
    parser.add_argument(
        "--populations", nargs="+", type=int, metavar="N", help="instead of those that belong to each case"
    )
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats, of which the median counts (5)")
    parser.add_argument("--quick", action="store_true", help="3 repeats of a sixteenth of the steps, to try it out")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda or cuda:N")
    parser.add_argument(
        "--write", action="store_true", help="put what is printed into docs/benchmarks.md, in place of those cases"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    size, repeats = (QUICK, 3) if options.quick else (1.0, options.repeats)
    began = time.monotonic()
    output = Output()
    for line in machine(device):
        output(line)
    output(f"medians of {repeats} interleaved repeats; proc.×thr.: processes × threads of torch in each")
    missed = 0
    for name in options.cases:
        for population in options.populations or CASES[name].populations:
            started = time.monotonic()
            measured = measure(CASES[name], population, device, repeats, size)
            print(f"\n({time.monotonic() - started:.0f} seconds for what follows)", end="")
            output()
            for line in table(measured):
                output(line)
            for holds, sentence in asked_for(measured)[: 1 if options.quick else None]:
                missed += not holds
                output(f"{'PASS' if holds else 'FAIL'} {sentence}")
    if options.quick:
        output("\n--quick: too small for rates to mean much; only the losses are judged")
    print(f"\n{time.monotonic() - began:.0f} seconds in all")
    if options.write and options.cases == list(CASES) and not options.populations:
        output.write(f"sweep_speed:{device.type}")
    elif options.write:
        output.replace(f"sweep_speed:{device.type}")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
