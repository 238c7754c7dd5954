"""SIGKILL at any moment: what was recorded is read, nobody is left behind, and the sweep goes on."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
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
# A process of its own: one that is forked off a process that has used polars may wait for ever.
PROGRAM = f"""
import sys
from pathlib import Path
import torch
from small_sweep import small_sweep
from fallline.sweeps import packs
import fallline.sweeps.running
torch.set_num_threads(1)
packs.LARGEST_PACK = {{"cpu": 3}}
packs.SECONDS_BETWEEN_CHECKPOINTS = 0.0
sys.modules["fallline.sweeps.running"].SECONDS_BETWEEN_WRITES = 0.0
small_sweep(Path(sys.argv[1]), **{LONG!r})
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> fl.Result:
    """The sweep that nobody stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fallline.sweeps.packs.LARGEST_PACK", {"cpu": 3})
        return small_sweep(tmp_path_factory.mktemp("whole") / "run", **LONG)


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
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, str(out)], env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list((out / "history").glob("*.parquet"))) < files and child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay)
    child.kill()
    child.wait()
    deadline = time.monotonic() + 5
    while living(child.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert living(child.pid) == [], "a worker outlived its sweep"
    if not out.exists():
        with pytest.raises(RunDirectoryError, match="does not exist"):
            fl.load(out)
        return 0
    found = fl.load(out).history
    there = np.isfinite(found.train_loss)
    np.testing.assert_array_equal(found.train_loss[there], whole.history.train_loss[there])
    evaluated = np.isfinite(found.metric)
    np.testing.assert_array_equal(found.metric[evaluated], whole.history.metric[evaluated])
    assert len(fl.load(out).trials) == len(whole.trials)
    small_sweep(out, resume=True, **LONG)
    assert_same(fl.load(out), whole)
    return int(there.sum())


def test_a_killed_sweep_is_read_and_goes_on(tmp_path: Path, whole: fl.Result):
    recorded = kill_and_resume(tmp_path / "run", 0.0, whole, files=8)
    assert 0 < recorded < np.isfinite(whole.history.train_loss).sum()


@pytest.mark.slow
def test_a_sweep_can_be_killed_at_any_moment(tmp_path: Path, whole: fl.Result):
    draw = random.Random(0)
    for number in range(6):
        kill_and_resume(tmp_path / f"early {number}", draw.uniform(1.5, 4), whole)
        kill_and_resume(tmp_path / f"late {number}", draw.uniform(0, 0.1), whole, files=draw.randint(1, 60))
