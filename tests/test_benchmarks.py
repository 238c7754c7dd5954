"""The benchmarks of sweeps compare like with like: every contender ends a trial at the same loss."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from fallline.training.batches import BatchOrder

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402
import sweep_speed  # noqa: E402
from speed import contenders, jax_scan  # noqa: E402
from speed.cases import CASES, QUADRATIC, batch_order  # noqa: E402
from speed.contenders import Losses, Work  # noqa: E402
from speed.pages import Output  # noqa: E402
from speed.teams import Contender, ContenderFailed, Team  # noqa: E402

STEPS, POPULATION = 12, 4
# Of losses after a few dozen steps in float32, relative.
TOLERANCE = 3e-5


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def work(case: str, steps: int = STEPS, population: int = POPULATION) -> Work:
    return Work(case, population, tuple(range(population)), steps, marks=(1, steps))


def by_hand(given: Work) -> Losses:
    """The last losses of a loop that is written here, with torch's Adam as it comes."""
    case = CASES[given.case]
    task = case.task().check()
    points, seeds = case.grid(given.population)
    rates = np.geomspace(1e-3, 1e-4, points)
    found = {}
    for trial in given.trials:
        torch.manual_seed(trial % seeds)
        model = task.model()
        adam = torch.optim.Adam(model.parameters(), lr=rates[trial // seeds])
        generator = torch.Generator().manual_seed(trial % seeds)
        order = torch.randperm(len(task.train), generator=generator)
        for step in range(given.steps):
            index = order[step * task.batch_size : (step + 1) * task.batch_size]
            loss = functional.cross_entropy(model(task.train.x[index]), task.train.y[index])
            adam.zero_grad()
            loss.backward()
            adam.step()
        untrained = functional.cross_entropy(task.build_model(trial % seeds)(task.train.x[index]), task.train.y[index])
        assert abs(loss.item() / untrained.item() - 1) > 20 * TOLERANCE, "training does something"
        found[trial, given.steps] = loss.item()
    return found


def assert_equal_at_the_end(losses: Losses, expected: Losses, given: Work) -> None:
    for trial in given.trials:
        assert losses[trial, given.steps] == pytest.approx(expected[trial, given.steps], rel=TOLERANCE), trial


@pytest.mark.parametrize("case", ["digits", "digits_cnn", pytest.param("char_lm", marks=pytest.mark.slow)])
def test_the_contenders_of_torch_end_at_the_losses_of_a_loop(case):
    given = work(case)
    expected = by_hand(given)
    ends = [expected[trial, STEPS] for trial in given.trials]
    assert min(abs(a / b - 1) for i, a in enumerate(ends) for b in ends[:i]) > 3 * TOLERANCE, "the trials are different"
    for start in (contenders.plain_loop, contenders.ensemble, contenders.fallline_sweep):
        train = start(given).train
        train()
        assert_equal_at_the_end(train().losses, expected, given)  # the second run starts anew


def test_a_loop_goes_on_over_epochs_and_the_sweep_tells_its_marks():
    epoch = 1438 // 64
    given = replace(work("digits", steps=2 * epoch + 3, population=1), marks=(epoch, epoch + 1, 2 * epoch + 3))
    told = contenders.fallline_sweep(given).train().losses
    assert told.keys() == {(0, mark) for mark in given.marks}
    for mark in given.marks:
        loss = contenders.plain_loop(replace(given, steps=mark)).train().losses
        assert told[0, mark] == pytest.approx(loss[0, mark], rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("jax") or not importlib.util.find_spec("optax"), reason="needs JAX")
@pytest.mark.parametrize("case", ["digits", "digits_cnn", "char_lm"])
def test_jax_ends_at_the_losses_of_a_loop(case):
    given = work(case)
    with Team(Contender("JAX", jax_scan.scan), [given]) as team:
        team.get_ready()
        _, losses = team.run()
        assert team.compile_seconds > 0
        assert team.peak_memory() > 1e6
    assert_equal_at_the_end(losses, by_hand(given), given)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile's own imports
def test_the_compiled_loop_gives_each_trial_its_own_parameters():
    given = work("digits")
    ready = contenders.compiled_loop(given)
    ready.train()
    assert_equal_at_the_end(ready.train().losses, by_hand(given), given)
    assert ready.compile_seconds > 0.1


def test_a_team_shares_its_work_out():
    halves = [replace(work("digits"), trials=part) for part in ((0, 2), (1, 3))]
    with Team(Contender("loops", contenders.plain_loop, processes=2), halves) as team:
        team.get_ready()
        seconds, losses = team.run()
    assert_equal_at_the_end(losses, by_hand(work("digits")), work("digits"))
    assert (team.trial_steps, seconds > 0) == (4 * STEPS, True)
    assert not any(process.is_alive() for process in team.processes)


@pytest.mark.slow
def test_a_team_names_who_fails():
    failing = Team(Contender("nobody", contenders.plain_loop), [replace(work("digits"), device="nowhere")])
    with failing as team, pytest.raises(ContenderFailed, match=r"nobody: RuntimeError.*nowhere"):
        team.get_ready()


def test_the_order_of_batches_is_a_trials_order():
    ours = BatchOrder(10, 4, seed=3, drop_last=True)
    assert batch_order(10, 4, 3, 7).tolist() == [ours.at(step).tolist() for step in range(7)]


def test_populations_and_steps():
    assert [CASES["digits"].grid(n) for n in (1, 7, 16, 1024, 4096)] == [(1, 1), (1, 7), (4, 4), (32, 32), (32, 128)]
    assert CASES["digits"].steps(1024) == 1000
    assert (QUADRATIC.grid(1080), QUADRATIC.steps(1080)) == ((27, 10), 700)
    assert len(QUADRATIC.plans(1080)) == 1080
    with pytest.raises(SystemExit, match="a multiple of 108"):
        QUADRATIC.grid(1000)


def test_floating_point_operations_of_a_step():
    forward = 2 * 64 * (64 * 64 + 64 * 10)
    assert CASES["digits"].floating_point_operations() == 3 * forward - 2 * 64 * 64 * 64  # no gradient of the data


def test_different_losses_are_seen():
    case = CASES["digits"]
    same = {(0, 5): 1.0, (1, 5): 2.0}

    def difference(*others: Losses) -> float:
        return sweep_speed.largest_difference(case, 4, [same, *others])

    assert difference({(0, 5): 1.0, (1, 7): 9.0}) == 0
    assert difference({(0, 5): 1.0}, {(1, 5): 2.5}) == pytest.approx(0.2)
    assert difference({(0, 5): math.nan}) == math.inf
    assert difference({(3, 5): 1.0}) == math.inf, "nothing was compared"


def verdicts(
    case: str, population: int, rates: dict[str, float], device: str = "cpu", seconds: float = 1.0
) -> list[str]:
    """What is said of a made-up measurement; the sweep makes 1,000,000 trial-steps per second."""
    rows = {}
    for name, rate in {**rates, "fallline": 1e6}.items():
        team = Team(Contender(name, contenders.plain_loop), [])
        team.told = {"first": seconds}
        rows[name] = sweep_speed.Row(team, [rate], [seconds])
    products = 2e6 * CASES[case].floating_point_operations()
    where = torch.device(device)
    steps = CASES[case].steps(population)
    made = sweep_speed.Measured(CASES[case], population, steps, rows, {}, products, 1e-6, where)
    return [f"{'PASS' if holds else 'FAIL'} {sentence}" for holds, sentence in sweep_speed.asked_for(made)][1:]


def test_what_is_asked_for_is_judged():
    one, several = sweep_speed.ONE, sweep_speed.PLAIN_LOOPS
    rates = {one: 9e4, several: 1e5, "JAX": 8e5}
    told = verdicts("digits", 1024, rates, seconds=2.0)
    assert [line[:4] for line in told] == ["PASS", "FAIL", "FAIL", "PASS"]
    assert [re.search(r": ([\d.]+), asked for at least ([\d.]+)", line).groups() for line in told] == [
        ("10.00", "10"),
        ("5.69", "6"),
        ("1.25", "1.3"),
        ("0.50", "0.5"),
    ]
    assert "(5.12 times the plain loop, " in told[1]
    assert verdicts("width16-batch32", 1024, rates)[0].startswith("FAIL")
    assert verdicts("char_lm", 1, {one: 1.1e6})[0].startswith("PASS")
    assert verdicts("char_lm", 1, {one: 1.2e6, "torch.compile": 1e5})[0].startswith("FAIL")
    assert verdicts("width256-batch32", 256, {one: 1e5, several: 1.1e6})[0].startswith("FAIL")
    assert verdicts("quadratic_deep", 1080, rates, seconds=9.9)[0].startswith("PASS")
    assert verdicts("quadratic_deep", 1080, rates, seconds=10.1)[0].startswith("FAIL")
    told = verdicts("digits", 4096, {one: 3.3e3, "JAX": 1.1e6}, device="cuda")
    assert [line[:4] for line in told] == ["PASS", "FAIL"]


def test_lines_are_told_from_curves():
    sizes = [1.0, 10.0, 100.0, 1000.0, 10_000.0]
    line = scaling.fit(sizes, [0.3 + 0.002 * size for size in sizes])
    assert (line.fixed, line.each, line.r_squared) == pytest.approx((0.3, 0.002, 1.0))
    assert line.straight
    assert line.upper_slope > line.slope
    curve = scaling.fit(sizes, [1e-3 * size**1.4 for size in sizes])
    assert not curve.straight
    assert curve.slope == pytest.approx(1.4)
    told: list[str] = []
    axis = scaling.Axis("trials", "made up", (1, 10, 100, 1000, 10_000), lambda size: None, "a reason")
    scaling.report(axis, [[1e-3 * size**1.4] for size in sizes], ["mapped"] * 5, told.append)
    assert re.fullmatch(r"not straight: [\d,]+ trials take [\d.]+ times what the line says\. .*a reason", told[-1])


def test_tables_are_written_between_their_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a:cpu -->\nold\n<!-- /a:cpu -->\nafter\n")
    output = Output()
    output("one")
    output("\ntwo")
    for _ in range(2):  # again and again
        output.write("a:cpu", page)
        assert page.read_text() == "before\n<!-- a:cpu -->\n\n```text\none\n\ntwo\n```\n\n<!-- /a:cpu -->\nafter\n"
    with pytest.raises(SystemExit, match="<!-- b:cpu -->"):
        output.write("b:cpu", page)


def test_some_cases_are_written_in_place_of_themselves(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a:cpu -->\n<!-- /a:cpu -->\nafter\n")
    whole = Output()
    whole("day 1, a machine\nversions\n\ncase A\n1\n\ncase B\n2")
    whole.write("a:cpu", page)
    again = Output()
    again("day 2, a machine\nversions")
    again("\ncase B\n3")
    for _ in range(2):
        again.replace("a:cpu", page)
        told = "day 1, a machine\nversions\n\ncase A\n1\n\ncase B\n3\nmeasured again by itself: day 2, a machine"
        assert page.read_text() == f"before\n<!-- a:cpu -->\n\n```text\n{told}\n```\n\n<!-- /a:cpu -->\nafter\n"
    again("\ncase C\n4")
    with pytest.raises(SystemExit, match="no lines that begin with 'case C'"):
        again.replace("a:cpu", page)


def test_the_page_has_a_place_for_every_table():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for name in ("sweep_speed", "scaling"):
        for device in ("cpu", "cuda"):
            assert page.count(f"<!-- {name}:{device} -->") == page.count(f"<!-- /{name}:{device} -->") == 1
