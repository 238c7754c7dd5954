"""SIGKILL at any moment: what was recorded is read, nobody is left behind, and the sweep goes on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

import fallline as fl
from fallline.errors import RunDirectoryError
from small_sweep import assert_same, small_sweep

pytestmark = [
    pytest.mark.usefixtures("small_packs"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
LONG = {"steps": 400, "evaluate_every": 20, "workers": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> fl.Result:
    """The sweep that nobody stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fallline.sweeps.packs.LARGEST_PACK", {"cpu": 3})
        return small_sweep(tmp_path_factory.mktemp("whole") / "run", **LONG)


def sweep_in_its_own_group(out: Path) -> None:
    os.setpgid(0, 0)
    small_sweep(out, **LONG)


def living(group: int) -> list[int]:
    """The processes of a group that are not dead yet."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            state, _, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(int(entry.name))
    return found


def kill_and_resume(out: Path, delay: float, whole: fl.Result, *, files: int = 0) -> int:
    """Kills a sweep so many seconds after it has written so many files; returns how many losses it had recorded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = multiprocessing.get_context("fork").Process(target=sweep_in_its_own_group, args=(out,))
        child.start()
    assert child.pid is not None
    while len(list((out / "history").glob("*.parquet"))) < files and child.is_alive():
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    deadline = time.monotonic() + 5
    while living(child.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert living(child.pid) == [], "a worker outlived its sweep"
    if not out.exists():
        with pytest.raises(RunDirectoryError, match="does not exist"):
            fl.load(out)
        small_sweep(out, **LONG)
        recorded = 0
    else:
        found = fl.load(out).history
        there = np.isfinite(found.train_loss)
        np.testing.assert_array_equal(found.train_loss[there], whole.history.train_loss[there])
        evaluated = np.isfinite(found.metric)
        np.testing.assert_array_equal(found.metric[evaluated], whole.history.metric[evaluated])
        assert len(fl.load(out).trials) == len(whole.trials)
        recorded = int(there.sum())
        small_sweep(out, resume=True, **LONG)
    assert_same(fl.load(out), whole)
    return recorded


def test_a_sweep_that_is_killed_early_leaves_nothing_or_a_run(tmp_path: Path, whole: fl.Result):
    assert kill_and_resume(tmp_path / "run", 0.02, whole) == 0


@pytest.mark.parametrize("files", [1, 12])
def test_a_killed_sweep_is_read_and_goes_on(tmp_path: Path, whole: fl.Result, files: int):
    recorded = kill_and_resume(tmp_path / "run", 0.0, whole, files=files)
    assert 0 < recorded < np.isfinite(whole.history.train_loss).sum()


@pytest.mark.slow
def test_a_sweep_can_be_killed_at_any_moment(tmp_path: Path, whole: fl.Result):
    draw = random.Random(0)
    for number in range(12):
        kill_and_resume(tmp_path / f"early {number}", draw.uniform(0, 2), whole)
        kill_and_resume(tmp_path / f"late {number}", draw.uniform(0, 0.1), whole, files=draw.randint(1, 60))
