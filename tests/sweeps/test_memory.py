"""What a sweep will take is foreseen, and what it takes is measured."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fallline as fl
from fallline.sweeps import engines, memory, workers
from fallline.sweeps.memory import Memory, Watch, in_use, predict
from fallline.sweeps.packs import Block, Job, Pack, PackEnd
from fallline.sweeps.search import configurations, trials
from fallline.sweeps.workers import train_packs

MB = 2**20
pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is measured on Linux only"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


def job_of(task: fl.Task, folder: Path, *, rates: int, steps: int, seeds: int = 2) -> Job:
    """Adam at so many learning rates, from so many seeds."""
    optimizer = fl.optim.adam(lr=fl.grid(np.geomspace(1e-4, 1e-2, rates).tolist()))
    chosen = configurations([optimizer], [task.loss], samples=1, search_seed=0)
    plans = trials(chosen, list(range(seeds)))
    (folder / "parameters").mkdir()
    return Job(task.check(), plans, "vectorised", torch.device("cpu"), steps, steps, folder, "best")


def packs_of(job: Job, size: int) -> list[Pack]:
    starts = range(0, len(job.plans), size)
    return [Pack(i, tuple(range(start, min(start + size, len(job.plans))))) for i, start in enumerate(starts)]


def trained(job: Job, packs: list[Pack], processes: int | None) -> tuple[Memory, int, int]:
    """What was predicted, what there was before, and the peak of the training; in bytes."""
    before = in_use()
    told = predict(job, packs, processes)
    with Watch(0.02) as watch:
        assert sum(isinstance(each, PackEnd) for each in train_packs(job, packs, processes, lambda: False)) == len(
            packs
        )
    return told, before, watch.peak


def wide() -> torch.nn.Module:
    """501,001 parameters."""
    return torch.nn.Sequential(torch.nn.Linear(1_000, 500), torch.nn.ReLU(), torch.nn.Linear(500, 1))


@pytest.mark.parametrize("processes", [None, 2])
@pytest.mark.parametrize(
    ("name", "rates", "size", "steps"),
    [("line", 50, 50, 50), ("digits", 64, 64, 20), ("digits", 16, 4, 20), ("digits_cnn", 20, 20, 3)],
)
def test_the_peak_is_foreseen(
    tmp_path: Path, name: str, rates: int, size: int, steps: int, processes: int | None
) -> None:
    job = job_of(getattr(fl.tasks, name)(), tmp_path, rates=rates, steps=steps)
    told, _, peak = trained(job, packs_of(job, size), processes)
    assert told.workers == (processes or 1)
    assert told.total == pytest.approx(peak, rel=0.2), f"{told} was measured as {peak / 1e9:.2f} GB"


def test_what_workers_add_is_foreseen(tmp_path: Path) -> None:
    x = torch.rand(64, 1_000)
    job = job_of(fl.Task("wide", wide, (x, x[:, :1]), "mse", validation="train"), tmp_path, rates=10, steps=4)
    told, before, peak = trained(job, packs_of(job, 10), 2)
    # Each of 20 trials has its parameters, two moments and a gradient in float32.
    assert peak - before > 20 * 4 * 4 * 501_001
    assert told.total - before == pytest.approx(peak - before, rel=0.25)


def test_data_are_in_memory_once(tmp_path: Path) -> None:
    x = torch.rand(20_000, 1_000)
    task = fl.Task("wide", lambda: torch.nn.Linear(1_000, 1), (x, x[:, :1]), "mse", validation=(x[:9], x[:9, :1]))
    job = job_of(task, tmp_path, rates=2, steps=40)
    told, before, peak = trained(job, packs_of(job, 1), 4)
    assert told.workers == 4
    assert 4 * told.worker + peak - before < 4 * x.nbytes, "no copy in each worker"
    assert told.total == pytest.approx(peak, rel=0.2)


@pytest.mark.slow
def test_the_history_at_the_end_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as workers would send them, without the training."""
    found: list[Any] = []

    def invented(job: Job, packs: list[Pack], *given: Any) -> Iterator[Block]:
        found.extend((in_use(), predict(job, packs, 2), watching.enter_context(Watch(0.02))))
        numbers = np.random.default_rng(0)
        for start in range(0, job.steps, job.evaluate_every):
            end = min(job.steps, start + job.evaluate_every)
            for rows in np.array_split(np.arange(len(job.plans)), 16):
                losses = numbers.random((len(rows), end - start), dtype=np.float32).astype(np.float64)
                yield Block(0, rows, start, losses, end, losses[:, 0], losses[:, 1])

    monkeypatch.setattr(workers, "train_packs", invented)
    optimizer = fl.optim.sgd(lr=fl.log_grid(1e-4, 1e-2, 100))
    with contextlib.ExitStack() as watching:
        result = fl.sweep(fl.tasks.line(), optimizer, seeds=10, steps=10_000, engine="sequential", progress=False)
    assert result.complete
    before, told, watch = found
    assert told.total == told.end
    assert watch.peak - before > 200 * MB, "the history dominates"
    assert told.total == pytest.approx(watch.peak, rel=0.2)


def _hang(*given: Any, **settings: Any) -> None:
    time.sleep(60)


def _die(*given: Any, **settings: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fail(*given: Any, **settings: Any) -> None:
    raise RuntimeError("of the model")


@pytest.mark.parametrize("start", [_hang, _die, _fail])
def test_a_rehearsal_that_fails_leaves_the_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    job = job_of(fl.tasks.digits(), tmp_path, rates=2, steps=10)
    monkeypatch.setattr(memory, "SECONDS_TO_REHEARSE", 0.5)
    monkeypatch.setattr(engines, "start", start)
    began = time.monotonic()
    told = predict(job, packs_of(job, 4), 2)
    assert time.monotonic() - began < 10
    # 4 trials of 4,810 parameters, each with 5 more numbers; mini-batches of float32 pixels.
    assert told.worker >= 4 * (6 * 4 * 4_810 + 64 * 64 * 4)
    assert told.parent > 100 * MB
    assert not multiprocessing.active_children()
    assert capfd.readouterr() == ("", "")


def test_without_proc_there_is_the_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(fl.tasks.digits(), tmp_path, rates=2, steps=10)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "PROC", Path("/nowhere"))
        by_formula = predict(job, packs_of(job, 4), 2)
        with pytest.raises(OSError, match="nowhere"):
            in_use()
    assert 100 * MB < by_formula.parent < 10_000 * MB
    assert 0 < by_formula.worker < predict(job, packs_of(job, 4), 2).worker


def test_a_prediction_leaves_the_random_state_as_it_is(tmp_path: Path) -> None:
    job = job_of(fl.tasks.line(), tmp_path, rates=2, steps=10)
    before = torch.get_rng_state()
    predict(job, packs_of(job, 4), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_left_to_train_takes_what_is_here(tmp_path: Path) -> None:
    job = job_of(fl.tasks.line(), tmp_path, rates=2, steps=10)
    assert predict(job, [], 2).worker == 0


@pytest.mark.parametrize("writes", [False, True])
def test_what_processes_share_counts_once(writes: bool) -> None:
    ours = torch.ones(50 * MB)  # 200 MB
    context = multiprocessing.get_context("fork")
    wake = context.Event()

    def child() -> None:
        torch.set_num_threads(1)
        if writes:
            ours.add_(1)
        float(ours.sum())
        wake.wait(10)

    before = in_use()
    process = context.Process(target=child, daemon=True)
    with Watch(0.02) as watch:
        process.start()
        time.sleep(0.7)
        wake.set()
        process.join()
    assert (watch.peak - before > 150 * MB) is writes
    assert watch.peak - before < 300 * MB
    assert in_use() - before < 50 * MB


def test_the_sentence_names_what_is_largest() -> None:
    assert str(Memory(2_000_000_000, 500_000_000, 1)) == "2.50 GB"
    assert str(Memory(350_000_000, 130_000_000, 2, end=1_234_000_000)) == (
        "1.23 GB here, when the history is put together"
    )
    assert str(Memory(350_000_000, 0, 1, gpu=1_500_000_000)) == "0.35 GB, and 1.50 GB on the GPU"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_on_a_gpu_is_foreseen(tmp_path: Path) -> None:
    job = replace(job_of(fl.tasks.digits_cnn(), tmp_path, rates=20, steps=20), device=torch.device("cuda"))
    told, _, _ = trained(job, packs_of(job, 40), None)
    assert told.gpu == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.2)
