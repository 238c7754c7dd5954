"""Workers: processes that train packs side by side, one thread each, and send what they record to the parent.

A population of small tensors is faster in one thread per core, each with its own pack, than in one pack whose operators
share the cores. The processes are forked, as torch's own DataLoader does it, so tasks with lambdas need no pickling and
starting costs milliseconds. Where processes cannot be forked safely, packs are trained one after the other here.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from fallline.errors import FalllineError, InvalidSweep
from fallline.sweeps.packs import Block, Job, Pack, PackEnd, train_pack

Message = Block | PackEnd
# Below so many multiplications in all, starting processes takes longer than the training.
WORTH_A_PROCESS = 5e8


def worker_count(workers: int | str, *, device: torch.device, packs: int, work: float) -> int:
    """How many processes train: as many as asked for, or with "auto" one per core where that pays.

    Args:
        packs: how many packs there could be.
        work: trials × steps × parameters × batch size.

    Raises:
        InvalidSweep: for anything but "auto" or a whole number of at least 1.
    """
    if workers != "auto" and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise InvalidSweep(f"workers = {workers!r} is neither 'auto' nor a whole number of at least 1.")
    if not _can_fork(device):
        return 1
    if isinstance(workers, int):
        return min(workers, packs)
    return min(_cores(), packs) if work > WORTH_A_PROCESS else 1


def train_packs(job: Job, packs: Sequence[Pack], workers: int, stop: Callable[[], bool]) -> Iterator[Message | None]:
    """Trains packs in so many processes (here, if it is one); yields what they send, and None now and then.

    Args:
        stop: asked between messages; once it is True, every pack is brought to a checkpoint and the iterator ends.
    """
    if workers == 1:
        for pack in packs:
            for message in train_pack(job, pack, stop):
                yield message
                if isinstance(message, PackEnd) and not message.complete:
                    return
        return
    with contextlib.ExitStack() as stack:
        waiting = deque(packs)
        connections = [stack.enter_context(_worker(job)) for _ in range(workers)]
        busy: dict[Connection, bool] = {}
        for connection in connections:
            if waiting:
                connection.send(waiting.popleft())
                busy[connection] = True
        told = False
        while busy:
            if stop() and not told:
                told = True
                waiting.clear()
                for connection in busy:
                    connection.send("stop")
            ready = multiprocessing.connection.wait(list(busy), timeout=0.2)
            if not ready:
                yield None
            for connection in (c for c in busy if c in ready):
                message = _receive(connection)
                yield message
                if isinstance(message, PackEnd):
                    if waiting:
                        connection.send(waiting.popleft())
                    else:
                        busy[connection] = False
            busy = {connection: True for connection, working in busy.items() if working}


def use_one_thread() -> None:
    """Settings of a process that trains packs: one thread, and an allocator that keeps what it has.

    glibc gives tensors of a megabyte back to the system as soon as they are freed, and every new one costs page faults:
    half of the time of a small population's step.
    """
    torch.set_num_threads(1)
    with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing to set
        libc = ctypes.CDLL(None)
        trim_threshold, top_pad, mmap_threshold, arena_max = -1, -2, -3, -8
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(top_pad, 64 << 20)
        libc.mallopt(arena_max, 1)


@contextlib.contextmanager
def _worker(job: Job) -> Iterator[Connection]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(job, there, here), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: see the module's docstring
        process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()
        process.join(timeout=0.1)
        if process.is_alive():
            process.terminate()
            process.join()


def _work(job: Job, connection: Connection, parent_end: Connection) -> None:
    """The life of a worker: packs in, blocks out, until the parent is gone."""
    parent_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    use_one_thread()
    try:
        while True:
            pack = connection.recv()
            if pack == "stop":
                continue
            for message in train_pack(job, pack, lambda: _told_to_stop(connection)):
                connection.send(message)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    except FalllineError as error:
        connection.send(error)
    except BaseException:
        connection.send(traceback.format_exc())
    finally:
        sys.stdout.flush()
        os._exit(0)  # a forked process must not run the parent's exit handlers


def _told_to_stop(connection: Connection) -> bool:
    return connection.poll() and connection.recv() == "stop"


def _receive(connection: Connection) -> Message:
    try:
        message: Any = connection.recv()
    except (EOFError, ConnectionResetError):
        raise WorkerDied(
            "a worker process died without a word: most likely the machine ran out of memory. What was recorded is kept; "
            "resume with fewer workers."
        ) from None
    if isinstance(message, FalllineError):
        raise message
    if isinstance(message, str):
        raise RuntimeError(f"training failed in a worker process:\n{message}")
    assert isinstance(message, Block | PackEnd)
    return message


class WorkerDied(FalllineError, RuntimeError):
    """A worker process ended without saying why."""


def _can_fork(device: torch.device) -> bool:
    """Forking is safe on Linux while no GPU is in use, and a daemonic process may have no children."""
    return (
        sys.platform == "linux"
        and device.type == "cpu"
        and not torch.cuda.is_initialized()
        and not multiprocessing.current_process().daemon
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
