"""The processes of contenders: started, made ready, told to go, and watched for their memory.

Processes are spawned, so that none inherits threads or memory of another. The first one of a contender compiles with
empty caches, the others find what it compiled. They end when the pipe to them closes, however that happens.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from speed.contenders import Losses, Ready, Trained, Work

SECONDS_BETWEEN_LOOKS = 0.02
# Where programs that were compiled before would be found.
CACHES = ("FALLLINE_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")


@dataclass(frozen=True)
class Contender:
    """A way of training trials.

    Attributes:
        start: makes itself ready for its share of the work.
        threads: of torch in each process; None where the faster of one and one per core is taken.
        share: of the case's `trial_steps` in a run, where it trains the whole population; None where it trains a few
            trials, one after the other.
    """

    name: str
    start: Callable[[Work], Ready]
    processes: int = 1
    threads: int | None = 1
    share: float | None = None


class ContenderFailed(RuntimeError):
    """A process of a contender raised an error or died."""


class Team:
    """The processes of one contender. Use it in a `with` block."""

    def __init__(self, contender: Contender, works: list[Work]) -> None:
        self.contender = contender
        self.works = works
        self.trial_steps = sum(len(work.trials) * work.steps for work in works)
        self.compile_seconds = 0.0
        self.told: dict[str, Any] = {}

    def __enter__(self) -> Team:
        context = multiprocessing.get_context("spawn")
        self.caches = tempfile.mkdtemp(prefix="benchmark-")
        self.pipes: list[Connection] = []
        self.processes = []
        for work in self.works:
            here, there = context.Pipe()
            process = context.Process(target=_live, args=(self.contender, work, self.caches, there))
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=1)
            if process.is_alive():
                process.kill()
                process.join()
        shutil.rmtree(self.caches, ignore_errors=True)

    def get_ready(self) -> None:
        """Waits until every process is there, then lets it prepare and compile."""
        for pipe in self.pipes:
            self._answer(pipe)
        self.baseline = self._memory()
        ((self.compile_seconds, self.told),) = self._all("prepare", self.pipes[:1])
        self._all("prepare", self.pipes[1:])

    def run(self) -> tuple[float, Losses]:
        """The seconds of one repeat, and what losses it ended at."""
        answers: list[Trained] = self._all("go", self.pipes)
        found: Losses = {}
        for trained in answers:
            found |= trained.losses
            self.told |= trained.told
        if "rate" in self.told:
            self.told["rate"] = sum(trained.told["rate"] for trained in answers)
        self.peak_on_gpu = sum(trained.peak_bytes or 0 for trained in answers)
        return max(trained.seconds for trained in answers), found

    def peak_memory(self) -> int:
        """Bytes that a run takes at most beyond what the processes had when they started: of the GPU if that trains."""
        with watching(self._memory) as seen:
            self.run()
        if self.works[0].device.startswith("cuda"):
            return self.peak_on_gpu
        return max(self.baseline, *seen) - self.baseline

    def _memory(self) -> int:
        return sum(map(proportional_set_size, with_descendants([p.pid for p in self.processes if p.pid])))

    def _all(self, message: str, pipes: list[Connection]) -> list[Any]:
        for pipe in pipes:
            with contextlib.suppress(BrokenPipeError):  # it died, which `_answer` will find
                pipe.send(message)
        return [self._answer(pipe) for pipe in pipes]

    def _answer(self, pipe: Connection) -> Any:
        try:
            answer = pipe.recv()
        except (EOFError, ConnectionResetError):
            raise ContenderFailed(f"{self.contender.name}: a process died") from None
        if isinstance(answer, ContenderFailed):
            raise answer
        return answer


def _live(contender: Contender, work: Work, caches: str, connection: Connection) -> None:
    """The life of a process: is there, prepares, and trains each time it is told to."""
    os.environ.update({name: str(Path(caches) / name.lower()) for name in CACHES})
    on_gpu = work.device.startswith("cuda")
    try:
        torch.backends.cudnn.allow_tf32 = False  # one arithmetic for all
        connection.send("here")
        connection.recv()
        ready = contender.start(work)
        connection.send((ready.compile_seconds, ready.told))
        while connection.recv() == "go":
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            trained = ready.train()
            if on_gpu and trained.peak_bytes is None:
                trained = replace(trained, peak_bytes=torch.cuda.max_memory_allocated())
            connection.send(trained)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # nobody listens any more
    except Exception as error:
        lines = traceback.format_exc()
        with contextlib.suppress(OSError):
            connection.send(ContenderFailed(f"{contender.name}: {type(error).__name__}: {error}\n{lines}"))


@contextlib.contextmanager
def watching(look: Callable[[], int]) -> Iterator[list[int]]:
    """Collects what `look()` gives, again and again, as long as the block lasts."""
    seen = [look()]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SECONDS_BETWEEN_LOOKS):
            seen.append(look())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        seen.append(look())


def with_descendants(pids: list[int]) -> list[int]:
    """These processes and all that they started."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(pids)
    for pid in found:
        found += children.get(pid, [])
    return found


def proportional_set_size(pid: int) -> int:
    """Bytes of memory of a process, what it shares counted in parts; 0 if it is gone, or where /proc is not."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0
