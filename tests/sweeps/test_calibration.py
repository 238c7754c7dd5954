"""What is chosen is the fastest that was measured, within what was asked for; and every trial is in one pack."""

from __future__ import annotations

import math
import multiprocessing
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fallline as fl
from fallline.sweeps import calibration, compiled, engines, footprint, packs, search, workers
from fallline.sweeps.calibration import Ahead, Course, course_of
from fallline.sweeps.engines import EngineChoice
from fallline.sweeps.footprint import rows_in_cache
from fallline.sweeps.programs import Programs

CPU = torch.device("cpu")
VECTORISED = EngineChoice("vectorised", "the model can be vectorised")
SEQUENTIAL = EngineChoice("sequential", "asked for")
Times = dict[str, float]


def ahead(seeds: int = 20, task: fl.Task | None = None) -> Ahead:
    task = (task or fl.tasks.line()).check()
    chosen = search.configurations([fl.optim.sgd(lr=fl.grid([0.01, 0.1]))], [task.loss], samples=1, search_seed=0)
    return Ahead(task, search.trials(chosen, list(range(seeds))), CPU, 10**6, 1000, False)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Times], list[str]]:
    """Gives every way of training the time in a table, and lets two processes train; what is not in it fails."""

    def give(times: Times) -> list[str]:
        asked: list[str] = []

        def invented(ahead: Ahead, course: Course) -> float | None:
            asked.append(course.name)
            return times.get(course.name)

        monkeypatch.setattr(calibration, "_measured", invented)
        monkeypatch.setattr(
            calibration._Calibration, "_prepared_to_compile", lambda self, course: to_compile(course, 1)
        )
        monkeypatch.setattr(calibration._Calibration, "_compiled", compiled_course)
        monkeypatch.setattr(calibration._Calibration, "_prepared", lambda self, course: course)
        monkeypatch.setattr(workers, "cores", lambda: 2)
        monkeypatch.setattr(calibration, "COMPILING_SURELY_PAYS", math.inf)
        return asked

    return give


def to_compile(course: Course, missing: int) -> Any:
    """A course with so many programs that the cache does not have."""
    return calibration._Chunked(course, Programs(), {}, programs_of([1] * missing))


def programs_of(operations: list[int]) -> dict[Any, compiled.Source]:
    """Programs of so many operations."""

    def negated(times: int) -> fx.GraphModule:
        graph = fx.Graph()
        value = graph.placeholder("value")
        for _ in range(times):
            value = graph.call_function(torch.neg, (value,))
        graph.output(value)
        return fx.GraphModule({}, graph)

    return {i: compiled.Source(negated(times), []) for i, times in enumerate(operations)}


def compiled_course(self: Any, chunked: Any) -> Course:
    return replace(chunked.course, execution="compiled", chunk=8, cached=True)


ALL: Times = {
    "mapped, 2 workers": 50.0,
    "sequential, 2 workers": 60.0,
    "traced, 2 workers": 40.0,
    "traced, this process": 45.0,
    "compiled, 2 workers": 30.0,
}


@pytest.mark.parametrize("fastest", ALL)
def test_the_fastest_way_is_chosen(measured, fastest: str):
    times = {**ALL, fastest: 10.0}
    if fastest != "traced, this process":  # which is tried with whatever was the fastest so far
        times[fastest.replace("2 workers", "this process")] = 99.0
    asked = measured(times)
    course = course_of(ahead(), VECTORISED, asked="auto", asked_workers="auto")
    assert course.name == fastest
    assert course.engine == ("sequential" if fastest.startswith("sequential") else "vectorised")
    assert course.workers == (1 if "this process" in fastest else 2)
    assert set(asked) >= {"mapped, 2 workers", "sequential, 2 workers", "traced, 2 workers", "compiled, 2 workers"}
    assert course.reason.startswith(f"the model can be vectorised; {fastest}: 10 µs per trial-step (")
    assert course.facts["choice"] == fastest
    assert course.facts["alternatives"] == {name: times[name] for name in asked}
    assert course.facts["cached"] is fastest.startswith("compiled")
    assert course.facts["compile_seconds"] == 0
    again = Course(**course.recorded)
    assert (again.engine, again.execution, again.chunk) == (course.engine, course.execution, course.chunk)
    assert (again.workers, again.threads, again.largest) == (course.workers, course.threads, course.largest)


def test_what_is_asked_for_is_not_left(measured):
    fast = {"sequential, 2 workers": 1.0, "mapped, this process": 1.0, "traced, this process": 1.0}
    asked = measured({**ALL, **fast})
    assert course_of(ahead(), VECTORISED, asked="vectorised", asked_workers=2).name == "compiled, 2 workers"
    assert not {name for name in asked if "sequential" in name or "this process" in name}
    assert course_of(ahead(), VECTORISED, asked="auto", asked_workers=2).name == "sequential, 2 workers"
    assert course_of(ahead(), VECTORISED, asked="auto", asked_workers="auto").name in fast
    asked.clear()
    assert course_of(ahead(), SEQUENTIAL, asked="sequential", asked_workers=2).name == "sequential, 2 workers"
    assert course_of(ahead(), SEQUENTIAL, asked="sequential", asked_workers=1).name == "sequential, this process"
    assert {name.split(",")[0] for name in asked} == {"sequential"}
    assert course_of(ahead(), VECTORISED, asked="auto", asked_workers=1).threads is None
    assert course_of(ahead(), VECTORISED, asked="vectorised", asked_workers=3).workers == 3
    assert course_of(ahead(), VECTORISED, asked="compiled", asked_workers=2).name == "compiled, 2 workers"


def test_more_is_tried_only_where_it_pays(measured):
    seconds = {"mapped, 2 workers": 1.0, "sequential, 2 workers": 2.0}
    plenty = ahead()
    for left, tried in ((4.0, 2), (6.0, 2 + 1), (21.0, 2 + 2)):
        asked = measured({name: 1e6 * left * each / plenty.trial_steps for name, each in seconds.items()})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibration._Calibration, "_compiled", lambda self, chunked: None)
            assert course_of(plenty, VECTORISED, asked="auto", asked_workers="auto").name == "mapped, 2 workers"
        assert len(asked) == tried, f"with {left} s ahead: {asked}"


@pytest.mark.parametrize(("seconds", "chosen"), [(0.9, "sequential, 1 worker"), (1.1, "sequential, this process")])
def test_a_core_that_would_be_idle_is_tried(measured, seconds: float, chosen: str):
    one = replace(ahead(seeds=1), plans=ahead().plans[:1])
    ways = {"mapped, 1 worker": 2.0, "sequential, 1 worker": 1.0, "sequential, this process": 0.8}
    asked = measured({name: 1e6 * seconds * each / one.trial_steps for name, each in ways.items()})
    assert course_of(one, VECTORISED, asked="auto", asked_workers="auto").name == chosen
    assert ("sequential, this process" in asked) is (seconds > 1)


def test_what_the_cache_has_is_not_compared_with_traced_programs(measured, monkeypatch: pytest.MonkeyPatch):
    asked = measured(ALL)
    monkeypatch.setattr(calibration._Calibration, "_prepared_to_compile", lambda self, course: to_compile(course, 0))
    assert course_of(ahead(), VECTORISED, asked="auto", asked_workers="auto").name == "compiled, 2 workers"
    assert asked == ["mapped, 2 workers", "sequential, 2 workers", "compiled, 2 workers"]


@pytest.mark.parametrize("compiles", [True, False])
@pytest.mark.parametrize("sure", [True, False])
def test_with_so_much_ahead_that_it_is_compiled_anyway_nothing_else_is_tried(
    measured, monkeypatch: pytest.MonkeyPatch, compiles: bool, sure: bool
):
    asked = measured(ALL)
    tried = []

    def compile_it(self: Any, chunked: Any) -> Course | None:
        tried.append(chunked)
        return compiled_course(self, chunked) if compiles and chunked is not None else None

    monkeypatch.setattr(calibration._Calibration, "_compiled", compile_it)
    left = ahead().seconds(ALL["mapped, 2 workers"])
    worth = calibration._worth(programs_of([1]))
    monkeypatch.setattr(calibration, "COMPILING_SURELY_PAYS", (left - 1 if sure else left + 1) / worth)
    course = course_of(ahead(), VECTORISED, asked="auto", asked_workers="auto")
    assert course.name == ("compiled, 2 workers" if compiles else "traced, 2 workers")
    assert ("traced, 2 workers" in asked) is not (sure and compiles)
    assert sum(chunked is not None for chunked in tried) == 1, "compiled once, whether it can be or not"


def test_compiling_pays_from_more_ahead_for_more_and_larger_programs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "cores", lambda: 2)
    small, large = 3.5 + 0.015 * 10, 3.5 + 0.015 * 600
    assert calibration._worth(programs_of([10])) == calibration._worth(programs_of([10, 10])) == 8.0
    assert calibration._worth(programs_of([600, 10])) == pytest.approx(1.5 * large)
    assert calibration._worth(programs_of([600, 600, 10])) == pytest.approx(1.5 * (2 * large + small) / 2)
    assert calibration._worth({}) == 8.0


@pytest.mark.parametrize(("seconds", "compiles"), [(18.0, False), (19.5, True)])
def test_it_is_compiled_where_it_pays(monkeypatch: pytest.MonkeyPatch, seconds: float, compiles: bool):
    """Two programs on two cores; one of 600 operations takes 12.5 seconds."""
    monkeypatch.setattr(workers, "cores", lambda: 2)
    tried = []
    monkeypatch.setattr(compiled, "compile_all", lambda missing, side_by_side: tried.append(missing) or iter(()))
    plenty = ahead()
    calibrated = calibration._Calibration(plenty, "auto", 8)
    calibrated.measured["mapped, 2 workers"] = 1e6 * seconds / plenty.trial_steps
    chunked = calibration._Chunked(Course("vectorised", workers=2), Programs(), {}, programs_of([600, 10]))
    assert calibrated._compiled(chunked) is None, "since nothing comes of it"
    assert tried == ([chunked.missing] if compiles else [])


def test_where_every_probe_fails_nothing_changes(measured):
    measured({})
    course = course_of(ahead(), VECTORISED, asked="auto", asked_workers="auto")
    assert course.name == "mapped, 2 workers"
    assert course.reason == VECTORISED.reason
    assert course.facts["alternatives"] == {}


@pytest.mark.parametrize("threads", [None, 1])
def test_a_probe_that_fails_measures_nothing(monkeypatch: pytest.MonkeyPatch, threads: int | None):
    course = Course("vectorised", workers=2 if threads else 1, threads=threads, largest=20)
    monkeypatch.setattr(calibration, "SECONDS_MEASURED", 0.01)
    found = calibration._measured(ahead(), course)
    assert found is not None
    assert 0.01 < found < 1e5, "microseconds"
    monkeypatch.setattr(engines, "start", lambda *given, **settings: 1 / 0)
    assert calibration._measured(ahead(), course) is None
    assert not multiprocessing.active_children()


def test_processes_side_by_side_share_the_work(monkeypatch: pytest.MonkeyPatch):
    """One takes 3 µs for a trial-step and the other 5, at the same time."""
    monkeypatch.setattr(calibration, "_side_by_side", lambda functions: [3e-6, 5e-6][: len(functions)])
    both = Course("vectorised", workers=2, threads=1, largest=20)
    assert calibration._measured(ahead(), both) == pytest.approx(2.0)
    assert calibration._measured(ahead(), replace(both, workers=1)) == pytest.approx(3.0)


# Sweeps.


def small(engine: str = "auto", **settings: Any) -> fl.Result:
    optimizers = [fl.optim.sgd(lr=fl.grid([0.01, 0.02, 0.1])), fl.optim.adam(lr=fl.grid([0.01, 0.1]))]
    asked = {"seeds": 3, "steps": 30, "engine": engine, "progress": False}
    return fl.sweep(fl.tasks.line(torch.float64), optimizers, **{**asked, **settings})


def test_a_small_sweep_is_not_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibration, "_measured", lambda *given: pytest.fail("it was measured"))
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda self: pytest.fail("a process was forked"))
    spec = small().spec
    assert spec["engine"] == "vectorised"
    assert spec["calibration"] == {
        "choice": "mapped, this process", "alternatives": {}, "compile_seconds": 0.0, "cached": False,
    }  # fmt: skip


@pytest.mark.parametrize(("trials", "engine"), [(1, "sequential"), (5, "sequential"), (6, "vectorised")])
def test_few_small_models_train_one_after_the_other(trials: int, engine: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibration, "_measured", lambda *given: pytest.fail("it was measured"))
    few = replace(ahead(), plans=ahead().plans[:trials], steps=1000, parameters=10)
    course = course_of(few, VECTORISED, asked="auto", asked_workers="auto")
    assert course.engine == engine
    assert course.threads is None
    assert (f"{trials} small models train faster one after the other" in course.reason) is (engine == "sequential")
    asked_for = course_of(few, EngineChoice("vectorised", "asked for"), asked="vectorised", asked_workers="auto")
    assert (asked_for.engine, asked_for.reason) == ("vectorised", "asked for")


def test_many_steps_of_small_models_are_worth_measuring(measured):
    asked = measured({"mapped, this process": 9.0, "sequential, this process": 5.0})
    of_steps = [replace(ahead(seeds=3), steps=steps, parameters=1) for steps in (1000, 100_000)]
    assert all(w.trial_steps * w.task.batch_size <= workers.WORTH_A_PROCESS for w in of_steps)
    assert course_of(of_steps[0], VECTORISED, asked="auto", asked_workers="auto").engine == "vectorised"
    assert not asked
    assert course_of(of_steps[1], VECTORISED, asked="auto", asked_workers="auto").engine == "sequential"
    assert asked


@pytest.mark.parametrize(("micro", "processes"), [(1.0, 1), (1e3, 2), (None, 2)])
def test_a_sweep_that_one_process_ends_soon_starts_no_others(
    monkeypatch: pytest.MonkeyPatch, measured, micro: float | None, processes: int
):
    """Between the sweeps that are surely small and surely large, this process is tried first."""
    times = {"mapped, 2 workers": 10.0} if micro is None else {"mapped, this process": micro, "mapped, 2 workers": 10.0}
    asked = measured(times)
    between = replace(ahead(seeds=50), steps=10_000, parameters=1000)
    count = between.trial_steps * between.parameters * between.task.batch_size
    assert workers.WORTH_A_PROCESS < count < workers.SURELY_WORTH_A_PROCESS
    course = course_of(between, VECTORISED, asked="auto", asked_workers="auto")
    assert asked[0] == "mapped, this process"
    assert course.workers == processes
    assert (asked == ["mapped, this process"]) is (processes == 1)
    assert ("too soon over" in course.reason) is (processes == 1)
    asked.clear()
    course_of(between, VECTORISED, asked="auto", asked_workers=2)
    assert asked[0] == "mapped, 2 workers", "two workers were asked for"
    asked.clear()
    course_of(replace(between, parameters=100_000), VECTORISED, asked="auto", asked_workers="auto")
    assert asked[0] == "mapped, 2 workers"


def test_rare_packs_are_traced_beforehand_but_not_compiled(monkeypatch: pytest.MonkeyPatch):
    task = fl.tasks.line().check()
    optimizers = [fl.optim.sgd(lr=0.01), fl.optim.adam(lr=0.01)]
    sgd, adam = search.configurations(optimizers, [task.loss], samples=1, search_seed=0)
    plans = search.trials([sgd], list(range(88))) + search.trials([adam], list(range(8)))
    plans = [replace(plan, index=i) for i, plan in enumerate(plans)]
    monkeypatch.setattr(packs, "ENOUGH_FOR_A_PACK", 4)
    course = Course("vectorised", execution="compiled", largest=8, chunk=8, programs=Programs())
    kinds = Counter(
        plans[pack.trials[0]].configuration.optimizer.name
        for pack in Ahead(task, plans, CPU, 9, 2, False).packs(course)
    )
    assert kinds == {"sgd": 11, "adam": 1}
    made = calibration._Calibration(Ahead(task, plans, CPU, 9, 2, False), "compiled", 8)._prepared(course).programs
    assert {program.part.name for program in made} > {"the update of sgd", "the update of adam"}
    compiled = {made.name(key) for key, _, _ in made.worth_compiling()}
    assert "the update of sgd" in compiled
    assert "the update of adam" not in compiled


@pytest.mark.parametrize("asked_workers", ["auto", 2])
def test_a_measured_sweep_says_what_it_chose_and_is_right(monkeypatch: pytest.MonkeyPatch, asked_workers: int | str):
    expected = small("sequential", workers=1)
    monkeypatch.setattr(calibration, "SECONDS_MEASURED", 0.01)
    for name in ("WORTH_PROCESSES", "WORTH_TRACING", "WORTH_THREADS", "WORTH_COMPILING"):
        monkeypatch.setattr(calibration, name, 0.0)
    monkeypatch.setattr(workers, "WORTH_A_PROCESS", 0.0)
    monkeypatch.setattr(workers, "cores", lambda: 2)
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = small(workers=asked_workers)
    found = result.spec["calibration"]
    assert set(found["alternatives"]) >= {"mapped, 2 workers", "sequential, 2 workers", "traced, 2 workers"}
    assert any("this process" in name for name in found["alternatives"]) is (asked_workers == "auto")
    assert found["choice"] == min(found["alternatives"], key=found["alternatives"].get)
    assert result.spec["engine"] == result.spec["course"]["engine"]
    assert result.spec["workers"] == result.spec["course"]["workers"]
    assert f"{found['choice']}: " in result.spec["engine_reason"]
    assert result.spec["engine_reason"].count("not compiled: there is no C++ compiler") == 1
    np.testing.assert_allclose(result.history.train_loss, expected.history.train_loss, rtol=1e-10, atol=1e-20)
    np.testing.assert_allclose(result.history.metric, expected.history.metric, rtol=1e-10, atol=1e-20)


# Rows in the cache.


def wide(width: int, batch_size: int) -> fl.Task:
    x = torch.randn(64, 10)
    return fl.Task(
        "wide", lambda: nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, 1)), (x, x[:, :1]), "mse",
        "train", batch_size=batch_size,
    )  # fmt: skip


def test_rows_in_the_cache_are_those_that_fit(monkeypatch: pytest.MonkeyPatch):
    task = wide(100, 64)
    numbers = 100 * 11 + 101
    # Inputs, tanh's output and the prediction are kept for the backward pass; tanh's output also for the last layer.
    kept = 64 * (10 + 100 + 1)
    found = footprint.bytes_of_a_trial(task)
    assert 4 * 4 * numbers + 2 * 4 * 64 * 100 <= found <= 4 * 4 * numbers + 2 * 4 * (kept + 64)
    for cache in (10**5, 10**6):
        monkeypatch.setattr(footprint, "_cache", lambda cache=cache: cache)
        rows = rows_in_cache(task, CPU)
        assert rows in (8, 16, 32, 64, 128, 256, 512, 1024)
        assert rows == 8 or rows * found <= 4 * cache < 2 * rows * found
    assert rows > 8
    assert rows_in_cache(wide(5000, 64), CPU) == 8
    huge = wide(100_000, 64)
    assert footprint.bytes_of_a_trial(huge) > 2 * 4 * 10**6
    assert rows_in_cache(huge, CPU) == 1, "a trial that fills the cache alone gains nothing from neighbours"
    monkeypatch.setattr(footprint, "_cache", lambda: 2**30)
    assert rows_in_cache(task, CPU) == 1024


def test_rows_of_a_chunk_are_few_enough_for_every_process():
    many = calibration._Calibration(ahead(seeds=50), "auto", 1024)
    assert many._chunk(Course("vectorised", workers=2)) == 50
    assert many._chunk(Course("vectorised", workers=1)) == 100
    assert many._chunk(Course("vectorised", workers=2, chunk=7)) == 7, "what was chosen before stays"
    # Of one seed each where that is not dear: 16 rows for each of 20 seeds, of which 32 would have two.
    sixteen = search.configurations(
        [fl.optim.sgd(lr=fl.grid(range(1, 17)))], [fl.losses.mse()], samples=1, search_seed=0
    )
    of_sixteen = replace(ahead(), plans=search.trials(sixteen, list(range(20))))
    assert calibration._Calibration(of_sixteen, "auto", 32)._chunk(Course("vectorised", workers=1)) == 16
    assert calibration._Calibration(of_sixteen, "auto", 64)._chunk(Course("vectorised", workers=1)) == 64
    # 100 rows in chunks of 64 would be 128; of 50, just 100.
    assert calibration._Calibration(ahead(seeds=50), "auto", 64)._chunk(Course("vectorised", workers=1)) == 50


# Packs.

OPTIMIZERS = [
    fl.optim.sgd(lr=0.1), fl.optim.sgd(lr=0.1, momentum=0.9), fl.optim.adam(lr=0.1), fl.optim.rmsprop(lr=0.1),
]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.sampled_from([["mse"], ["mse", "l1"]]),
    st.integers(1, 50),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 20)),
    st.sampled_from(["vectorised", "sequential"]),
)
def test_every_trial_is_in_one_pack_with_its_like(counts, losses, largest, processes, chunk, engine):
    given_losses = [fl.losses.mse() if name == "mse" else fl.losses.l1() for name in losses]
    configurations = search.configurations(OPTIMIZERS[: len(counts)], given_losses, samples=1, search_seed=0)
    plans = [
        search.TrialPlan(0, c, seed)
        for c in configurations
        for seed in range(next(n for o, n in zip(OPTIMIZERS, counts, strict=False) if o == c.optimizer))
    ]
    plans = [replace(plan, index=i) for i, plan in enumerate(plans)]
    made = packs.make_packs(plans, engine=engine, largest=largest, workers=processes, chunk=chunk)
    assert [pack.index for pack in made] == list(range(len(made)))
    assert sorted(trial for pack in made for trial in pack.trials) == list(range(len(plans)))
    kinds = Counter((p.configuration.loss.structure, p.configuration.optimizer.structure) for p in plans)
    short: Counter[Any] = Counter()
    for pack in made:
        own = [plans[i] for i in pack.trials]
        (loss,) = {plan.configuration.loss.structure for plan in own}
        structures = {plan.configuration.optimizer.structure for plan in own}
        enough = [s for s in structures if kinds[loss, s] >= min(packs.ENOUGH_FOR_A_PACK, largest)]
        assert not enough or len(structures) == 1, "an optimizer with enough trials shares a pack"
        assert [(p.seed, p.index) for p in own] == sorted((p.seed, p.index) for p in own)
        if engine == "sequential":
            assert len(own) == 1
        elif chunk is None:
            assert len(own) <= largest
        else:
            assert len(own) <= max(chunk, largest)
            group = loss, next(iter(structures)) if enough else None
            short[group] += len(own) % chunk > 0
    assert all(count <= 1 for count in short.values()), "only the last pack of a group may end in a part of a chunk"
