"""How a sweep is run: which engine, how its step is computed, in how many processes; measured on its own first steps.

What is measured is what will happen: packs of the sweep's own trials, in as many processes as will train, at the same
time. Small sweeps are not measured; they are over before the answer. Whatever is chosen computes the same numbers.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from fallline.sweeps import compiled, engines, packs, workers
from fallline.sweeps.footprint import rows_in_cache
from fallline.sweeps.packs import Pack
from fallline.sweeps.programs import Programs, Run
from fallline.sweeps.search import TrialPlan
from fallline.sweeps.vectorised import Population, in_order, one_seed_each
from fallline.tasks import Task
from fallline.training.progress import Progress

# Up to so many small models train faster one after the other: a step of a population takes about a millisecond, however
# small it is.
FEW_TRIALS = 5
SECONDS_PER_STEP = 1e-3
# Seconds of training ahead from which on something is worth its price: processes and the measuring of ways to use them
# (more than half a second for what halves the time at best), measuring at all where one process trains anyway, the
# threads of this process where fewer workers than cores would train, tracing (two seconds, most of it imports), and
# compiling, which costs more for larger programs.
WORTH_PROCESSES = 1.5
WORTH_MEASURING = 2.0
WORTH_THREADS = 1.0
WORTH_TRACING = 5.0
WORTH_COMPILING = 8.0
# What compiling a program takes, and each of its operations; how many times as much is to be ahead for it to pay; and
# how many times that, so that tracing, which halves what is ahead at best, would leave enough for it all the same.
SECONDS_TO_COMPILE = 3.5
SECONDS_TO_COMPILE_AN_OPERATION = 0.015
COMPILING_PAYS = 1.5
COMPILING_SURELY_PAYS = 3.0
# Programs of packs that are so much rarer than the most frequent kind are not compiled.
RARE = 0.1
# What the calls for a chunk cost, in rows; and how much more rows cost that do not share their mini-batch, so that the
# products with it are not a single one. Measured on the MLP of `digits`.
CALLS_IN_ROWS = 4
PRICE_OF_SEEDS = 1.35
# How long each way of training is measured.
SECONDS_MEASURED = 0.15


@dataclass(frozen=True)
class Course:
    """How a sweep is run.

    Attributes:
        engine: "vectorised" or "sequential".
        execution: how the vectorised engine computes its step: "mapped", "traced" or "compiled".
        workers: processes that train side by side.
        threads: of each of them; None for training in this process, with the threads that torch has.
        largest: trials in a pack.
        chunk: rows of a population that are computed together; None for all.
        reason: why, in a sentence.
        measured: microseconds per trial-step of each way that was measured, all processes taken together.
        compile_seconds: what compiling took.
        cached: whether the compiled programs came from the cache.
        programs: what was traced or compiled so far.
    """

    engine: str
    execution: str = "mapped"
    workers: int = 1
    threads: int | None = None
    largest: int = 64
    chunk: int | None = None
    reason: str = ""
    measured: dict[str, float] = field(default_factory=dict)
    compile_seconds: float = 0.0
    cached: bool = False
    programs: Programs | None = None

    @property
    def recorded(self) -> dict[str, Any]:
        """What going on in the same way needs."""
        return {
            "engine": self.engine,
            "execution": self.execution,
            "workers": self.workers,
            "threads": self.threads,
            "largest": self.largest,
            "chunk": self.chunk,
        }

    @property
    def facts(self) -> dict[str, Any]:
        """What is recorded with the run."""
        return {
            "choice": self.name,
            "alternatives": {name: round(micro, 3) for name, micro in self.measured.items()},
            "compile_seconds": round(self.compile_seconds, 2),
            "cached": self.cached,
        }

    @property
    def name(self) -> str:
        """Its name among the alternatives."""
        way = self.execution if self.engine == "vectorised" else self.engine
        if self.threads is None:
            return f"{way}, this process"
        return f"{way}, {self.workers} worker{'s' * (self.workers > 1)}"


@dataclass(frozen=True)
class Ahead:
    """What is to be trained."""

    task: Task
    plans: Sequence[TrialPlan]
    device: torch.device
    steps: int
    parameters: int
    show: bool | None

    @property
    def trial_steps(self) -> float:
        return float(len(self.plans)) * self.steps

    def seconds(self, micro: float) -> float:
        """How long training takes at so many microseconds per trial-step."""
        return self.trial_steps * micro * 1e-6

    def packs(self, course: Course) -> list[Pack]:
        most = min(course.largest, packs.LARGEST_PACK[self.device.type])
        return packs.make_packs(
            self.plans, engine=course.engine, largest=most, workers=course.workers, chunk=course.chunk
        )

    def trained(self, course: Course, pack: Pack) -> engines.Trained:
        """The trials of a pack at step 0."""
        return engines.start(
            course.engine,
            self.task,
            [self.plans[i] for i in pack.trials],
            steps=self.steps,
            device=self.device,
            programs=course.programs,
            chunk=course.chunk,
        )


def course_of(ahead: Ahead, choice: engines.EngineChoice, *, asked: str, asked_workers: int | str) -> Course:
    """How a sweep will be run.

    Args:
        choice: the engine that the model allows.
        asked: the engine that was asked for.
        asked_workers: "auto" or how many processes.

    Raises:
        InvalidSweep: for a number of workers that is none.
    """
    task = ahead.task
    rows = rows_in_cache(task, ahead.device)
    multiplications = ahead.trial_steps * ahead.parameters * task.batch_size
    small = asked != "compiled" and multiplications <= workers.WORTH_A_PROCESS
    few = small and asked == "auto" and choice.engine == "vectorised" and len(ahead.plans) <= FEW_TRIALS
    if few:
        reason = f"{choice.reason}; {len(ahead.plans)} small models train faster one after the other"
        choice = engines.EngineChoice("sequential", reason)
    processes = workers.worker_count(asked_workers, device=ahead.device)
    course = Course(choice.engine, largest=2 * rows, reason=choice.reason)
    unsure = not small and asked != "compiled" and multiplications <= workers.SURELY_WORTH_A_PROCESS
    if processes > 1 and asked_workers == "auto" and unsure:
        micro = _measured(ahead, course)
        if micro is not None and ahead.seconds(micro) <= WORTH_PROCESSES:
            told = f"{course.name}: {micro:.3g} µs per trial-step, too soon over to start others"
            return replace(course, reason=f"{course.reason}; {told}", measured={course.name: micro})
    if processes > 1 and not (small and asked_workers == "auto"):
        course = replace(course, workers=processes, threads=1)
        course = replace(course, workers=min(processes, len(ahead.packs(course))))
    if few or (small and ahead.steps * len(ahead.packs(course)) * SECONDS_PER_STEP <= WORTH_MEASURING):
        return course
    return _Calibration(ahead, asked, rows).best(course, any_workers=asked_workers == "auto")


def resumed(ahead: Ahead, choice: engines.EngineChoice, spec: dict[str, Any]) -> Course:
    """How a sweep was run before: it goes on in the same way, so that it ends bit for bit where it would have ended."""
    course = Course(**spec["course"], reason=choice.reason)
    if course.execution == "mapped":
        return course
    calibration = _Calibration(ahead, "compiled", course.chunk or 1)
    if course.execution == "compiled":
        return calibration._compiled(calibration._prepared_to_compile(course)) or calibration._traced(course)
    return calibration._traced(course)


@dataclass(frozen=True)
class _Chunked:
    """A course in chunks: programs that are traced, those that the cache has compiled, and those that it has not."""

    course: Course
    programs: Programs
    loaded: dict[Any, Run]
    missing: dict[Any, compiled.Source]


class _Calibration:
    """Measures one way after the other, as long as the next one is worth its price."""

    def __init__(self, ahead: Ahead, asked: str, rows: int) -> None:
        self.ahead = ahead
        self.asked = asked
        self.rows = rows
        self.measured: dict[str, float] = {}
        self.found: dict[str, Course] = {}
        self.notes: list[str] = []

    def best(self, course: Course, *, any_workers: bool) -> Course:
        """The fastest way, and what was measured to find it.

        Args:
            any_workers: whether training in this process is a way too.
        """
        if self.asked == "compiled":
            made = self._compiled(self._prepared_to_compile(course)) or self._traced(course)
            self._measure(made)
            return self._fastest(made)
        self._measure(course)
        if course.engine == "vectorised" and self.asked == "auto":
            self._measure(self._alone(course))
        chunked = self._prepared_to_compile(course) if course.engine == "vectorised" else None
        if chunked is not None and (
            not chunked.missing or self._ahead > COMPILING_SURELY_PAYS * _worth(chunked.missing)
        ):
            if (quicker := self._compiled(chunked)) is not None:
                self._measure(quicker)
                return self._fastest(course)
            chunked = None
        if course.engine == "vectorised" and self._ahead > WORTH_TRACING:
            self._measure(self._traced(course))
        enough = WORTH_COMPILING if course.workers == workers.cores() else WORTH_THREADS
        if any_workers and course.threads is not None and self._ahead > enough:
            self._measure(replace(self._fastest(course), workers=1, threads=None))
        if chunked is not None and (quicker := self._compiled(chunked)) is not None:
            self._measure(quicker)
        return self._fastest(course)

    def _traced(self, course: Course) -> Course:
        return self._prepared(replace(course, execution="traced", programs=Programs()))

    def _alone(self, course: Course) -> Course:
        """The sequential engine, as a course of this sweep."""
        count = min(course.workers, len(self.ahead.plans))
        return replace(course, engine="sequential", execution="mapped", workers=count, chunk=None)

    @property
    def _ahead(self) -> float:
        """Seconds that the fastest way so far would take."""
        return self.ahead.seconds(min(self.measured.values(), default=math.inf))

    def _measure(self, course: Course) -> None:
        micro = _measured(self.ahead, course)
        if micro is not None:
            self.measured[course.name] = micro
            self.found[course.name] = course

    def _fastest(self, course: Course) -> Course:
        if not self.measured:
            return replace(course, reason="; ".join([course.reason, *self.notes]))
        name = min(self.measured, key=lambda name: self.measured[name])
        chosen = self.found[name]
        others = ", ".join(f"{other} {micro:.3g}" for other, micro in self.measured.items() if other != name)
        told = f"{name}: {self.measured[name]:.3g} µs per trial-step" + (f" ({others})" if others else "")
        return replace(chosen, reason="; ".join([course.reason, told, *self.notes]), measured=dict(self.measured))

    def _prepared_to_compile(self, course: Course) -> _Chunked | None:
        """What is to be compiled, or None where the machine cannot, or there is too little ahead to look."""
        forced = self.asked == "compiled"
        obstacle = compiled.why_not(self.ahead.device)
        if obstacle is not None:
            if forced or self._ahead > WORTH_COMPILING:
                self._say(obstacle)
            return None
        if not forced and self._ahead < WORTH_TRACING:
            return None
        chunk = self._chunk(course)
        made = self._prepared(
            replace(course, execution="compiled", chunk=chunk, largest=2 * chunk, programs=Programs())
        )
        assert made.programs is not None
        sources = {key: compiled.Source(graph, like) for key, graph, like in made.programs.worth_compiling()}
        loaded = {key: run for key, source in sources.items() if (run := compiled.cached(source)) is not None}
        return _Chunked(made, made.programs, loaded, {key: s for key, s in sources.items() if key not in loaded})

    def _compiled(self, chunked: _Chunked | None) -> Course | None:
        """The compiled course, if there is enough ahead for what has to be compiled."""
        if chunked is None:
            return None
        made, programs, loaded, missing = chunked.course, chunked.programs, chunked.loaded, chunked.missing
        if missing and self.asked != "compiled" and self._ahead < _worth(missing):
            return None
        began = time.monotonic()
        if missing:
            with Progress(f"compiling {len(missing)} programs", len(missing), "program", show=self.ahead.show) as bar:
                for key, made_of_it in compiled.compile_all(missing, side_by_side=workers.can_fork(self.ahead.device)):
                    bar.advance(1)
                    if isinstance(made_of_it, compiled.NotCompiled):
                        self._say(f"{programs.name(key)} cannot be compiled: {made_of_it}")
                    else:
                        loaded[key] = made_of_it
        for key, run in loaded.items():
            try:
                if not programs.use(key, run):
                    self._say(f"{programs.name(key)} gives other numbers when it is compiled")
            except Exception as error:
                self._say(f"{programs.name(key)} cannot be run compiled: {compiled.reason_of(error)}")
        programs.examples.clear()
        if not any(program.compiled for program in programs):
            return None
        seconds = time.monotonic() - began if missing else 0.0
        return replace(made, compile_seconds=seconds, cached=not missing)

    def _chunk(self, course: Course) -> int:
        """Rows that are computed together: as many as stay in the cache, if there are so many for each process."""
        if course.chunk is not None:
            return course.chunk
        kinds = Counter((p.configuration.loss.structure, p.configuration.optimizer.structure) for p in self.ahead.plans)
        shares = [-(-count // course.workers) for count in kinds.values()]
        most = max(1, min(self.rows, max(shares)))
        seeds = len({plan.seed for plan in self.ahead.plans})

        def price(rows: int) -> float:
            # Rows that fill up a last chunk are computed for nothing, and every chunk costs calls.
            filled = sum(-(-count // rows) * rows for count in kinds.values())
            one_seed_each = all(count % (rows * seeds) == 0 for count in kinds.values())
            return filled * (1 + CALLS_IN_ROWS / rows) * (1 if one_seed_each else PRICE_OF_SEEDS)

        return min(range(most, (most - 1) // 2, -1), key=price)

    def _prepared(self, course: Course) -> Course:
        """With the programs of every kind of pack that there is, which forked workers then have from the beginning."""
        assert course.programs is not None
        kinds: dict[Any, list[Pack]] = {}
        for pack in self.ahead.packs(course):
            own = [self.ahead.plans[i] for i in pack.trials]
            if engines.of_trial(course.engine, own[0]) != "sequential":
                kinds.setdefault(_kind(own, course.chunk), []).append(pack)
        most = max(map(len, kinds.values()), default=0)
        for alike in sorted(kinds.values(), key=len, reverse=True):
            population = self.ahead.trained(course, alike[0])
            assert isinstance(population, Population)
            known = set(course.programs.examples)
            population.prepare()
            if len(alike) < RARE * most:  # what only such packs need is not worth compiling
                for key in set(course.programs.examples) - known:
                    del course.programs.examples[key]
        return course

    def _say(self, reason: str) -> None:
        """Once, by name: why something runs slower than it might."""
        note = f"not compiled: {reason}"
        if note not in self.notes:
            self.notes.append(note)


def _worth(missing: Mapping[Any, compiled.Source]) -> float:
    """Seconds of training ahead from which on compiling these programs pays."""
    each = [SECONDS_TO_COMPILE + SECONDS_TO_COMPILE_AN_OPERATION * source.operations for source in missing.values()]
    takes = max(max(each), sum(each) / workers.cores()) if each else 0.0
    return max(WORTH_COMPILING, COMPILING_PAYS * takes)


def _kind(plans: Sequence[TrialPlan], chunk: int | None) -> Hashable:
    """Packs with the same need the same programs."""
    one_seed = one_seed_each([plan.seed for plan in in_order(plans)], chunk)
    structures = tuple(sorted(Counter(repr(plan.configuration.optimizer.structure) for plan in plans).items()))
    return plans[0].configuration.loss.structure, one_seed, chunk or structures, frozenset(dict(structures))


def _measured(ahead: Ahead, course: Course) -> float | None:
    """Microseconds per trial-step, all processes taken together; None where it fails."""
    made = [
        pack
        for pack in ahead.packs(course)
        if engines.of_trial(course.engine, ahead.plans[pack.trials[0]]) == course.engine
    ]
    if not made:
        return None
    own = [made[i % len(made)] for i in range(course.workers)]
    try:
        if course.threads is None:
            return 1e6 * _seconds_per_trial_step(ahead, course, made[0])
        found = _side_by_side([partial(_seconds_per_trial_step, ahead, course, pack) for pack in own])
        return 1e6 * sum(found) / len(found) / len(found)
    except Exception:
        return None


def _seconds_per_trial_step(ahead: Ahead, course: Course, pack: Pack) -> float:
    trained = ahead.trained(course, pack)

    def seconds(count: int) -> float:
        began = time.perf_counter()
        trained.train_steps(count)
        return (time.perf_counter() - began) / count

    seconds(min(2, ahead.steps))
    count = max(1, min(16, int(SECONDS_MEASURED / 5 / seconds(1))))
    ends = time.perf_counter() + SECONDS_MEASURED
    found = [seconds(count)]
    while time.perf_counter() < ends:
        found.append(seconds(count))
    return statistics.median(found) / len(pack.trials)


def _side_by_side(functions: Sequence[Callable[[], float]]) -> list[float]:
    """What the functions return, each run in a forked process, as a worker would be, at the same time."""

    def run(function: Callable[[], float], connection: Any) -> None:
        workers.use_one_thread()
        with contextlib.suppress(BaseException):
            warnings.simplefilter("ignore")
            connection.send(function())
        os._exit(0)

    with contextlib.ExitStack() as stack:
        pipes = []
        for function in functions:
            here, there = multiprocessing.Pipe(duplex=False)
            process = workers.forked(run, function, there)
            there.close()
            stack.callback(workers.end, process)
            pipes.append(here)
        return [float(pipe.recv()) for pipe in pipes]
