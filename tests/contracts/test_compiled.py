"""The compiled step computes what the other engines and a plain loop compute, or is quietly left out, and says why.

A program takes some ten seconds to compile. So all tests share one task and one shape of population, and a cache that
the first of them fills, for all test processes; the rest load from it, or copies of its files stand in for a compiler.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fallline as fl
from fallline.optim.catalogue import CATALOGUE
from fallline.sweeps import calibration, compiled, packs
from fallline.sweeps.programs import Run
from fallline.sweeps.vectorised import Population
from fallline.training import checkpoint
from fallline.training.interrupt import Interrupt
from plain_loop import plain_run
from small_sweep import assert_same

pytestmark = pytest.mark.skipif(
    compiled.why_not(torch.device("cpu")) is not None, reason="there is no C++ compiler on this machine"
)
SEEDS = [0, 3, 5]
STEPS = 36
EVERY = 12
ROWS = 3
RATES = {"sgd": [0.05, 1e308], "adam": [0.003, 0.03]}


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def task(dtype: torch.dtype = torch.float64, *, samples: int = 83) -> fl.Task:
    """Ten batches of 8 and a short one of 3, unless there are fewer samples."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(103, 6, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(6, 3, generator=generator, dtype=torch.float64)).argmax(dim=1)
    train, validation = (x[:samples].to(dtype), y[:samples]), (x[83:].to(dtype), y[83:])
    return fl.Task("mine", lambda: model(dtype), train, "cross_entropy", validation, fl.metrics.accuracy(), 8)


def optimizers(sgd: list[float], adam: list[float]) -> list[fl.optim.Optimizer]:
    return [fl.optim.sgd(lr=fl.grid(sgd), momentum=0.9), fl.optim.adam(lr=fl.grid(adam))]


def sweep(engine: str = "compiled", rates: dict[str, list[float]] = RATES, **settings: Any) -> fl.Result:
    asked = {"seeds": SEEDS, "steps": STEPS, "evaluate_every": EVERY, "workers": 1, "keep_parameters": "all"}
    asked |= {"task": task(), "optimizers": optimizers(**rates), "engine": engine, "progress": False}
    return fl.sweep(**{**asked, **settings})


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """Three rows at a time, a pack for each optimizer, and no long measuring."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "rows_in_cache", lambda *given: ROWS)
        patch.setattr(calibration, "PRICE_OF_SEEDS", 1.0)  # so that chunks are as large as they may be
        patch.setattr(calibration, "SECONDS_MEASURED", 0.01)
        patch.setattr(packs, "ENOUGH_FOR_A_PACK", 4)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run of the tests share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="module")
def full_cache(folder: Path, small_chunks: None) -> Path:
    """The cache with the programs of `sweep()`; whoever comes first compiles them."""
    cache = folder / "programs"
    with (folder / "programs.lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setenv("FALLLINE_CACHE", str(cache))
        if not cache.exists():
            first = sweep()
            assert first.spec["calibration"]["cached"] is False
            assert first.spec["calibration"]["compile_seconds"] > 0
    assert len(list(cache.iterdir())) == 3, "the step of a whole batch and two updates; a short batch is rare"
    return cache


@pytest.fixture
def cache(full_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The full cache, in use."""
    monkeypatch.setenv("FALLLINE_CACHE", str(full_cache))
    return full_cache


@pytest.fixture
def own_cache(full_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the full cache that a test may spoil, in use."""
    copy = tmp_path / "programs"
    shutil.copytree(full_cache, copy)
    monkeypatch.setenv("FALLLINE_CACHE", str(copy))
    return copy


@pytest.fixture(scope="module")
def sequential(small_chunks: None) -> fl.Result:
    return sweep("sequential")


def assert_equal(found: fl.Result, expected: fl.Result, tolerance: float = 1e-10) -> None:
    """All losses, metrics, statuses and final parameters."""
    assert found.trials["status"].to_list() == expected.trials["status"].to_list()
    for name in ("train_loss", "metric", "validation_loss"):
        ours, theirs = getattr(found.history, name), getattr(expected.history, name)
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance, err_msg=name)
    for trial, status in enumerate(expected.trials["status"]):
        if status == "completed":
            for name, p in expected.parameters(trial).items():
                torch.testing.assert_close(found.parameters(trial)[name], p, rtol=tolerance, atol=tolerance)


def assert_runs(result: fl.Result, execution: str) -> str:
    """The sweep went on, in that way; returns the sentence that says why."""
    assert result.complete
    assert result.spec["course"]["execution"] == execution
    assert result.spec["calibration"]["choice"].startswith(execution)
    return str(result.spec["engine_reason"])


# The same numbers.


@pytest.mark.parametrize("workers", [1, 2])
def test_the_compiled_engine_equals_the_sequential_one_and_a_plain_loop(
    cache: Path, sequential: fl.Result, workers: int, monkeypatch: pytest.MonkeyPatch
):
    sizes = []
    keep = Population._keep
    monkeypatch.setattr(
        Population, "_keep", lambda self, rows: (sizes.append((len(self.rows), len(rows))), keep(self, rows))
    )
    result = sweep(workers=workers)
    assert "not compiled" not in assert_runs(result, "compiled")
    assert result.spec["workers"] == workers
    assert len(result.spec["packs"]) == 2 * workers
    if workers == 1:
        assert sizes == [(6, 3)], "the three that diverged left together"
    assert_equal(result, sequential)
    plain = {
        "sgd": lambda lr: lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9),
        "adam": lambda lr: lambda params: torch.optim.Adam(params, lr=lr),
    }
    data = task().train
    diverged = 0
    for row in result.trials.to_dicts():
        make = plain[row["optimizer"].split("(")[0].split()[0]](row["lr"])
        run = plain_run(
            model, data.x, data.y, nn.functional.cross_entropy, make, seed=row["seed"], steps=STEPS, batch_size=8
        )
        losses = result.history.train_loss[row["trial"]]
        expected = run.losses.numpy()
        if row["status"] == "diverged":
            diverged += 1
            alive = np.logical_and.accumulate(np.isfinite(expected))
            assert 0 < alive.sum() < STEPS
            assert not np.isfinite(losses[~alive]).any()
            np.testing.assert_allclose(losses[alive], expected[alive], rtol=1e-10)
            continue
        assert expected[:10].mean() - expected[-10:].mean() > 0.05, "the problem is degenerate: nothing is learnt"
        np.testing.assert_allclose(losses, expected, rtol=1e-10, atol=1e-10)
        for name, p in run.parameters.items():
            assert (p - run.start[name]).abs().min() > 0, "a parameter did not move"
            torch.testing.assert_close(result.parameters(row["trial"])[name], p, rtol=1e-10, atol=1e-10)
    assert diverged == len(SEEDS)


def test_other_learning_rates_and_seeds_are_not_compiled_again(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "compile_all", lambda *given, **settings: pytest.fail("compiled again"))
    before = {file: file.read_bytes() for file in cache.iterdir()}
    other = {"rates": {"sgd": [0.5, 0.07], "adam": [0.1, 0.001]}, "seeds": [1, 2, 4], "steps": 24}
    result = sweep(**other)
    assert "not compiled" not in assert_runs(result, "compiled")
    assert result.spec["calibration"]["cached"] is True
    assert result.spec["calibration"]["compile_seconds"] == 0
    assert {file: file.read_bytes() for file in cache.iterdir()} == before
    assert_equal(result, sweep("sequential", **other))


def test_a_diverged_trial_is_frozen_and_disturbs_nobody(cache: Path):
    beside = sweep()
    alone = sweep(rates={**RATES, "sgd": [0.05, 0.05001]})
    stays = [0, 1, 2]
    for record in ("train_loss", "metric"):
        found, expected = getattr(beside.history, record), getattr(alone.history, record)
        # Bit for bit with torch 2.13; with torch 2.6 a last bit may differ.
        np.testing.assert_allclose(found[stays], expected[stays], rtol=1e-14, atol=0)
    assert beside.trials["status"].to_list()[3:6] == ["diverged"] * 3
    for trial in (3, 4, 5):
        losses = beside.history.train_loss[trial]
        last = int(np.isfinite(losses).sum())
        assert not np.isfinite(losses[last:]).any()


# Resume.


@pytest.mark.parametrize("engine", ["compiled", "auto"])
def test_a_stopped_sweep_goes_on_bit_for_bit(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str):
    monkeypatch.setattr(packs, "SECONDS_PER_PIECE", 0.0)  # a step or four between two questions whether to stop
    whole = sweep(out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        asked = iter([False] * 9)
        stop = property(lambda self: next(asked, True), lambda self, value: None)
        patch.setattr(Interrupt, "requested", stop, raising=False)
        assert not sweep(out=tmp_path / "part").complete
    (place,) = (tmp_path / "part" / "packs").iterdir()
    kept = checkpoint.read(place)
    assert kept is not None
    assert 0 < kept[1]["step"] - kept[1]["begin"] < EVERY, "it should have stopped in the middle of a block"
    resumed = sweep(engine, out=tmp_path / "part", resume=True)
    assert_runs(resumed, "compiled")
    assert_same(resumed, whole)


# What cannot be compiled is run as it is, and the sweep says so.


@pytest.mark.parametrize(("variable", "named"), [("CXX", "no-such-compiler"), ("PATH", r"(clan)?g\+\+")])
def test_without_a_compiler(sequential: fl.Result, monkeypatch: pytest.MonkeyPatch, variable: str, named: str):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(variable, "no-such-compiler")
    result = sweep()
    reason = assert_runs(result, "traced")
    assert reason.count("not compiled") == 1
    assert pytest.approx(0) == result.spec["calibration"]["compile_seconds"]
    assert re.search(rf"not compiled: there is no C\+\+ compiler \({named} is not installed\)", reason)
    assert_equal(result, sequential)


def refuse(source: compiled.Source) -> None:
    raise RuntimeError("no such operation\nand many lines more")


def be_killed(source: compiled.Source) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("refusal", "said"),
    [(refuse, "RuntimeError: no such operation"), (be_killed, "the compiler was killed")],
)
def test_a_compiler_that_refuses(
    tmp_path: Path,
    sequential: fl.Result,
    monkeypatch: pytest.MonkeyPatch,
    capfd,
    refusal: Callable[..., None],
    said: str,
):
    monkeypatch.setenv("FALLLINE_CACHE", str(tmp_path / "programs"))
    monkeypatch.setattr(compiled, "_compile", refusal)
    short_too = task(samples=27)  # two programs of one name
    result = sweep(task=short_too)
    reason = assert_runs(result, "traced")
    for part in ("the forward and backward pass", "the update of sgd", "the update of adam"):
        assert reason.count(f"not compiled: {part} cannot be compiled: {said}") == 1
    assert "many lines" not in reason
    assert capfd.readouterr() == ("", "")
    assert_equal(result, sweep("sequential", task=short_too))


def test_one_program_that_is_refused_leaves_the_others_compiled(
    own_cache: Path, sequential: fl.Result, monkeypatch: pytest.MonkeyPatch
):
    next(own_cache.iterdir()).unlink()
    monkeypatch.setattr(compiled, "_compile", refuse)
    result = sweep()
    assert assert_runs(result, "compiled").count("not compiled") == 1
    assert_equal(result, sequential)


def test_a_compiled_program_that_gives_other_numbers_is_not_used(
    cache: Path, sequential: fl.Result, monkeypatch: pytest.MonkeyPatch
):
    loaded = compiled._loaded

    def wrong(path: Path) -> Run:
        run = loaded(path)

        def other(tensors: list[torch.Tensor]) -> Any:
            before = [tensor.clone() for tensor in tensors]
            returned = run(tensors)
            for old, tensor in zip(before, tensors, strict=True):
                if tensor.is_floating_point():
                    tensor.add_(tensor - old, alpha=0.1)  # a tenth too far
            return returned

        return other

    monkeypatch.setattr(compiled, "_loaded", wrong)
    result = sweep()
    reason = assert_runs(result, "traced")
    for part in ("the forward and backward pass", "the update of sgd", "the update of adam"):
        assert reason.count(f"not compiled: {part} gives other numbers when it is compiled") == 1
    assert_equal(result, sequential)


def test_a_compiled_program_that_fails_is_not_used(cache: Path, sequential: fl.Result, monkeypatch: pytest.MonkeyPatch):
    def fail(tensors: list[torch.Tensor]) -> Any:
        raise RuntimeError("API call failed\nat some line")

    monkeypatch.setattr(compiled, "_loaded", lambda path: fail)
    result = sweep()
    reason = assert_runs(result, "traced")
    assert reason.count("not compiled: the update of adam cannot be run compiled: RuntimeError: API call failed") == 1
    assert "some line" not in reason
    assert_equal(result, sequential)


def test_a_program_that_cannot_be_named_is_not_compiled(sequential: fl.Result, tmp_path: Path, monkeypatch):
    """One that holds something else than tensors (a branch of its own, say)."""

    def no_key(source: compiled.Source) -> str:
        raise compiled.NotCompiled("it holds GraphModule 'true_graph_0'")

    monkeypatch.setenv("FALLLINE_CACHE", str(tmp_path / "programs"))
    monkeypatch.setattr(compiled.Source, "key", property(no_key))
    result = sweep()
    reason = assert_runs(result, "traced")
    assert reason.count("the update of adam cannot be compiled: it holds GraphModule 'true_graph_0'") == 1
    assert_equal(result, sequential)


def test_a_cache_that_cannot_be_written(tmp_path: Path, sequential: fl.Result, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FALLLINE_CACHE", str(tmp_path / "file" / "programs"))
    result = sweep()
    reason = assert_runs(result, "traced")
    said = f"{tmp_path / 'file' / 'programs'} cannot be written: Not a directory"
    assert reason.count(said) == reason.count("not compiled") == 3
    assert_equal(result, sequential)


def copied_from(folder: Path) -> Callable[[compiled.Source], None]:
    """A compiler that takes what another one made, and talks while it does."""

    def copy(source: compiled.Source) -> None:
        os.write(1, b"compiling")
        os.write(2, b"warning: nothing")
        shutil.copy(folder / f"{source.key}.pt2", compiled.directory())

    return copy


@pytest.mark.parametrize("harm", ["cut short", "overwritten", "empty"])
def test_a_broken_file_in_the_cache_is_made_again_and_nothing_is_printed(
    own_cache: Path, full_cache: Path, sequential: fl.Result, monkeypatch: pytest.MonkeyPatch, capfd, harm: str
):
    file = min(own_cache.iterdir())
    whole = file.read_bytes()
    file.write_bytes({"cut short": whole[: len(whole) // 2], "overwritten": b"x" * len(whole), "empty": b""}[harm])
    monkeypatch.setattr(compiled, "_compile", copied_from(full_cache))
    result = sweep()
    assert "not compiled" not in assert_runs(result, "compiled")
    assert result.spec["calibration"]["cached"] is False
    assert file.read_bytes() == whole
    assert capfd.readouterr() == ("", "")
    assert_equal(result, sequential)


def test_a_file_that_vanishes_while_it_is_found_is_made_again(
    own_cache: Path, full_cache: Path, sequential: fl.Result, monkeypatch: pytest.MonkeyPatch
):
    victim = min(own_cache.iterdir())
    vanished = []

    def touch(path: Path) -> None:
        if path == victim and not vanished:
            path.unlink()
            vanished.append(path)

    monkeypatch.setattr(compiled.os, "utime", touch)
    monkeypatch.setattr(compiled, "_compile", copied_from(full_cache))
    result = sweep()
    assert vanished
    assert "not compiled" not in assert_runs(result, "compiled")
    assert result.spec["calibration"]["cached"] is False
    assert_equal(result, sequential)


def test_a_cache_that_grows_too_large_loses_what_was_used_longest_ago(
    own_cache: Path, full_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    oldest, *others = sorted(own_cache.iterdir())
    os.utime(oldest, (1, 1))
    monkeypatch.setattr(compiled, "LARGEST_CACHE", sum(file.stat().st_size for file in others))
    assert list(compiled.compile_all({}, side_by_side=False)) == []
    assert sorted(own_cache.iterdir()) == others


# Every optimizer, and every kind of sweep; these really compile, for minutes.


def the_optimizer(name: str) -> fl.optim.Optimizer:
    """With the first of its valid arguments; one around another gets sgd with momentum."""
    info = CATALOGUE[name]
    inside = {"optimizer": fl.optim.sgd(lr=1e-2, momentum=0.9)} if info.wraps else {}
    return info.make(**{**inside, **info.valid[0]})


def matrices() -> nn.Module:
    """All of whose parameters Muon can train."""
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False)).double()


@pytest.mark.slow
def test_every_optimizer_can_be_compiled_and_equals_the_sequential_engine(tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setenv("FALLLINE_CACHE", str(tmp_path / "programs"))
    monkeypatch.setattr(calibration, "rows_in_cache", lambda *given: 2)
    monkeypatch.setattr(packs, "ENOUGH_FOR_A_PACK", 1)
    chosen = {name: the_optimizer(name) for name in CATALOGUE}
    own = fl.Task("mine", matrices, task(samples=32).train, "cross_entropy", "train", fl.metrics.accuracy(), 16)
    asked = {"task": own, "optimizers": list(chosen.values()), "seeds": [0, 3], "steps": 30}
    result, expected = (sweep(engine, **asked) for engine in ("compiled", "sequential"))
    assert "not compiled" not in assert_runs(result, "compiled")
    assert len(list((tmp_path / "programs").iterdir())) > 30
    assert capfd.readouterr() == ("", "")
    assert set(expected.trials["status"]) == {"completed"}
    start = own.build_model(0).state_dict()
    for trial in range(0, len(expected.trials), 2):
        assert all((p != start[name]).any() for name, p in expected.parameters(trial).items()), "nothing moved"
    assert_equal(result, expected, tolerance=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-3)])
def test_four_optimizers_over_a_short_last_batch(tmp_path: Path, monkeypatch, capfd, dtype, tolerance: float):
    """A short mini-batch that is one of four is compiled too."""
    monkeypatch.setenv("FALLLINE_CACHE", str(tmp_path / "programs"))
    chosen = [
        fl.optim.sgd(lr=fl.grid([0.05, 1e308])),
        fl.optim.sgd(lr=fl.grid([0.05, 0.2]), momentum=0.9),
        fl.optim.adam(lr=fl.grid([0.003, 0.03])),
        fl.optim.rmsprop(lr=fl.grid([0.003, 0.03])),
    ]
    asked = {"task": task(dtype, samples=27), "optimizers": chosen}
    expected = sweep("sequential", **asked)
    assert expected.trials["status"].to_list().count("diverged") == 3
    for workers in (1, 2):
        result = sweep(workers=workers, **asked)
        assert "not compiled" not in assert_runs(result, "compiled")
        assert result.spec["calibration"]["cached"] is (workers == 2)
        assert_equal(result, expected, tolerance)
    assert len(list((tmp_path / "programs").iterdir())) == 2 + 4
    assert capfd.readouterr() == ("", "")
