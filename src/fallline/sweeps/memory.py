"""How much memory a sweep takes: predicted before it starts, and measured while it runs.

Forked workers share what was there before the fork: the data, the libraries, the programs. So the memory of a sweep is
what its parent has, once, and what each worker has for itself. The latter is not modelled but rehearsed: a process like
a worker builds the largest pack, takes two steps and evaluates it. What grows only later is added by formula.

Everything here reads `/proc`. Where there is none, all is by formula.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from fallline.sweeps import engines
from fallline.sweeps.packs import SECONDS_BETWEEN_CHECKPOINTS, Job, Pack
from fallline.sweeps.workers import forked, use_one_thread

# Where Linux tells what processes take.
PROC = Path("/proc")
# A rehearsal that takes longer is ended; what it has told by then is believed.
SECONDS_TO_REHEARSE = 5.0
# Steps that are rehearsed: the second one begins with what the first one left.
STEPS_TO_REHEARSE = 2
# A loss in the history: float64.
BYTES_PER_LOSS = 8
# Copies of a block's losses in a worker: the pieces, joined, the rows under way, pickled.
COPIES_OF_A_BLOCK = 4
# Copies of the history in the parent at the end, in polars and numpy: 4.4 to 6.3 on histories of 15 to 150 MB.
COPIES_OF_THE_HISTORY = 5.6
# Copies of a pack's state while its checkpoint is written.
COPIES_OF_A_CHECKPOINT = 2
# What the parent takes for tables and their files, however small the sweep; measured.
TABLES = 12 * 2**20
# A worker that traces a new size, when trials have diverged and left, takes 55 MB for it. Whether any will is not
# known, so half of it is foreseen.
HALF_OF_TRACING = 27 * 2**20
# By formula: for each parameter itself, its gradient, state and updates on the way. `make_packs` counts alike.
NUMBERS_PER_PARAMETER = 6


@dataclass(frozen=True)
class Memory:
    """Memory of a sweep at its peak, in bytes.

    Attributes:
        parent: what this process has while packs are trained, without what training them takes.
        worker: what training packs takes, in each worker or, without workers, here.
        workers: how many train side by side.
        end: what this process has when the history is put together, after the workers have gone.
        gpu: what is allocated on the GPU.

    >>> print(Memory(parent=350_000_000, worker=130_000_000, workers=2, end=400_000_000))
    0.61 GB in all: 0.35 GB here and 0.13 GB in each of 2 workers
    """

    parent: int
    worker: int
    workers: int
    end: int = 0
    gpu: int = 0

    @property
    def total(self) -> int:
        """The peak over all processes together; the GPU's memory is not in it."""
        return max(self.parent + self.workers * self.worker, self.end)

    def __str__(self) -> str:
        told = f"{self.total / 1e9:.2f} GB"
        if self.total == self.end:
            told += " here, when the history is put together"
        elif self.workers > 1:
            told += (
                f" in all: {self.parent / 1e9:.2f} GB here and {self.worker / 1e9:.2f} GB in each of "
                f"{self.workers} workers"
            )
        return f"{told}, and {self.gpu / 1e9:.2f} GB on the GPU" if self.gpu else told


def predict(job: Job, packs: Sequence[Pack], workers: int | None, *, rehearse: bool = True) -> Memory:
    """The memory that training these packs will take at its peak, as far as one can tell before.

    It takes as long as building a pack, two steps of it and an evaluation, and at most `SECONDS_TO_REHEARSE`. Nothing
    that goes wrong on the way is an error: then the formula has to do.

    Args:
        job: the sweep.
        packs: what is to be trained.
        workers: as for `train_packs`: how many processes; None trains here.
        rehearse: False leaves it at the formula, which takes no time.
    """
    history = len(job.plans) * job.steps * BYTES_PER_LOSS
    here = _here()
    parent, end = here + TABLES, here + TABLES + int(COPIES_OF_THE_HISTORY * history)
    if not packs:
        return Memory(here, 0, 1, end)
    pack = max(packs, key=lambda pack: len(pack.trials))
    block = COPIES_OF_A_BLOCK * len(pack.trials) * min(job.evaluate_every, job.steps) * BYTES_PER_LOSS
    gpu = 0
    found = None
    # Whatever fails in a rehearsal will fail in the sweep, which knows what to say about it.
    with contextlib.suppress(Exception):
        if not rehearse:
            pass
        elif job.device.type == "cuda":
            gpu = _on_gpu(job, pack)
        elif _can_rehearse():
            # Here, programs may be made for several threads, which a forked process does not have.
            own = job if workers else replace(job, programs=None)
            found = _in_a_process(own, pack, as_worker=workers is not None)
            if found is not None and workers and job.programs is not None and job.chunk is None:
                found += HALF_OF_TRACING
    if found is None:
        found = 0 if gpu else _by_formula(job, pack)
    return Memory(parent, found + block, min(workers, len(packs)) if workers else 1, end, gpu)


def _on_gpu(job: Job, pack: Pack) -> int:
    """The peak of the GPU's memory in a rehearsal, with what is there already."""
    torch.cuda.reset_peak_memory_stats(job.device)
    for _ in _rehearsal(job, pack):
        pass
    peak = torch.cuda.max_memory_allocated(job.device)
    torch.cuda.empty_cache()
    return peak


def _can_rehearse() -> bool:
    return can_look() and not torch.cuda.is_initialized() and not multiprocessing.current_process().daemon


def _in_a_process(job: Job, pack: Pack, *, as_worker: bool) -> int | None:
    """What a rehearsal took for itself, or None if it could not tell."""
    here, there = multiprocessing.Pipe(duplex=False)
    found: int | None = None
    process = forked(_rehearse, there, job, pack, as_worker)
    there.close()
    ends = time.monotonic() + SECONDS_TO_REHEARSE
    try:
        with contextlib.suppress(EOFError, OSError):
            while here.poll(max(0.0, ends - time.monotonic())):
                found = max(found or 0, here.recv())
    finally:
        here.close()
        process.kill()
        process.join()
    return found


def _rehearse(connection: Connection, job: Job, pack: Pack, as_worker: bool) -> None:
    """In a process of its own: tells after each stage how many bytes it takes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    try:
        gc.freeze()  # the garbage collector would write to all that is inherited, and so make a copy of it
        if as_worker:
            use_one_thread()
        inherited = _sizes(PROC / "self/status")["RssAnon"]
        torch.set_num_threads(1)  # the others were not forked with this one
        with contextlib.suppress(Exception):  # the sweep will meet it too, and say so
            for later in _rehearsal(job, pack):
                connection.send(_own_peak(inherited, as_worker=as_worker) + later)
    finally:
        os._exit(0)  # a forked process must not run the parent's exit handlers


def _rehearsal(job: Job, pack: Pack) -> Iterator[int]:
    """Builds a pack, takes steps, evaluates; yields at each stage what its checkpoints will take, if there are any."""
    plans = [job.plans[i] for i in pack.trials]
    trained = engines.start(
        job.engine,
        job.task.check(),
        plans,
        steps=job.steps,
        device=job.device,
        programs=job.programs,
        chunk=job.chunk,
    )
    yield 0
    seconds = 0.0
    for _ in range(min(STEPS_TO_REHEARSE, job.steps)):
        began = time.monotonic()
        trained.train_steps(1)
        seconds = time.monotonic() - began
        yield 0
    trained.evaluate()
    if seconds * job.steps < SECONDS_BETWEEN_CHECKPOINTS:
        yield 0
    else:
        yield COPIES_OF_A_CHECKPOINT * sum(_bytes(tensor) for tensor in trained.tensors().values())


def _own_peak(inherited: int, *, as_worker: bool) -> int:
    """The peak of what this process adds: what it has added now, and what it has freed since.

    A worker adds what it does not share, also where it writes to what is inherited. Here only what is new would count:
    free memory is used again.
    """
    status = _sizes(PROC / "self/status")
    added = _rollup("self")["Private_Dirty"] if as_worker else status["RssAnon"] - inherited
    return added + status["VmHWM"] - status["VmRSS"]


def _by_formula(job: Job, pack: Pack) -> int:
    """Parameters with all that belongs to them, a mini-batch for each trial, and the predictions of an evaluation."""
    parameters = int(str(job.task.describe()["parameters"]))
    x, y = job.task.train.x, job.task.train.y
    sample = (_bytes(x) + _bytes(y)) // len(x)
    samples = job.task.batch_size + len(job.task.validation)
    size = torch.finfo(torch.get_default_dtype()).bits // 8
    return len(pack.trials) * (NUMBERS_PER_PARAMETER * parameters * size + samples * sample)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Watch:
    """Measures the memory of this process and of all it starts: `peak`, in bytes, while it was entered.

    Pages that processes share count once. Other programs that use the same libraries do not change the figure.

    Args:
        seconds: between looks. A look takes some milliseconds for each process.

    Raises:
        OSError: on systems without `/proc`.

    >>> with Watch() as watch:
    ...     kept = torch.ones(10_000_000)
    >>> watch.peak > 40_000_000
    True
    """

    def __init__(self, seconds: float = 0.05) -> None:
        self.seconds = seconds
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_again, daemon=True)

    def __enter__(self) -> Watch:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _look_again(self) -> None:
        while not self._ended.wait(self.seconds):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, in_use())


def can_look() -> bool:
    """Whether this system tells what processes take."""
    return (PROC / "self/smaps_rollup").exists()


def in_use() -> int:
    """The memory that this process and all it has started take now, in bytes.

    Anonymous memory is shared among these processes only, so its proportional shares add up. Files are mostly the same
    libraries in every process: those of the process that has read most of them count.

    Raises:
        OSError: on systems without `/proc`.
    """
    own = files = 0
    for process in ("self", *_descendants("self")):
        try:
            rollup = _rollup(process)
        except OSError:
            if process == "self":
                raise
            continue  # it has ended
        own += rollup["Pss_Anon"] + rollup["Pss_Shmem"]
        files = max(files, rollup["Rss"] - rollup["Anonymous"])
    return own + files


def _here() -> int:
    """The memory of this process now; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        return _sizes(PROC / "self/status")["VmRSS"]
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _descendants(process: str) -> list[str]:
    found: list[str] = []
    with contextlib.suppress(OSError):  # it has ended
        for thread in (PROC / process / "task").iterdir():
            for child in (thread / "children").read_text().split():
                found += [child, *_descendants(child)]
    return found


def _rollup(process: str) -> dict[str, int]:
    return _sizes(PROC / process / "smaps_rollup")


def _sizes(path: Path) -> dict[str, int]:
    """The lines `name: 123 kB` of a file, in bytes."""
    parts = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {each[0]: 1024 * int(each[1]) for each in parts if len(each) == 3 and each[2] == "kB"}
