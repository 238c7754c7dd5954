"""Workers: processes that train packs side by side, one thread each, and send what they record to the parent.

A population of small tensors is faster in one thread per core, each with its own pack, than in one pack whose operators
share the cores. The processes are forked, as torch's own DataLoader does it, so tasks with lambdas need no pickling and
starting costs milliseconds. Where processes cannot be forked safely, packs are trained one after the other here.

A worker dies with its parent, however that ends; the parent notices when a worker dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from fallline.errors import FalllineError, InvalidSweep, RunDirectoryError
from fallline.sweeps.packs import Block, Job, Pack, PackEnd, train_pack

Message = Block | PackEnd
# Below so many multiplications in all, starting processes takes longer than the training; above so many, no core is
# done before processes have paid.
WORTH_A_PROCESS = 5e8
SURELY_WORTH_A_PROCESS = 1e10


def worker_count(workers: int | str, *, device: torch.device) -> int:
    """How many processes may train side by side: as many as asked for, or with "auto" one per core.

    Raises:
        InvalidSweep: for anything but "auto" or a whole number of at least 1.
    """
    if workers != "auto" and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise InvalidSweep(f"workers = {workers!r} is neither 'auto' nor a whole number of at least 1.")
    if not can_fork(device):
        return 1
    return workers if isinstance(workers, int) else cores()


def train_packs(
    job: Job, packs: Sequence[Pack], workers: int | None, stop: Callable[[], bool]
) -> Generator[Message | None, None, None]:
    """Trains packs in so many processes of one thread each; yields what they send, and None now and then.

    Args:
        workers: how many processes; None trains here, with the threads that torch has.
        stop: asked between messages; once it is True, every pack is brought to a checkpoint and the iterator ends.

    Raises:
        TrainingFailed: when the model, its loss or its metric raises an error.
        RunDirectoryError: when the disk is full.
        WorkerDied: when a worker process was killed.
    """
    if workers is None:
        try:
            for pack in packs:
                if stop():
                    return
                yield from train_pack(job, pack, stop)
        except FalllineError:
            raise
        except Exception as error:
            raise _named(error) from error
        return
    with contextlib.ExitStack() as stack:
        waiting = deque(packs)
        connections = [stack.enter_context(_worker(job)) for _ in range(min(workers, len(packs)))]
        busy: list[Connection] = []
        for connection in connections:
            _send(connection, waiting.popleft())
            busy.append(connection)
        told = False
        while busy:
            if stop() and not told:
                told = True
                waiting.clear()
                for connection in busy:
                    _send(connection, "stop")
            ready = multiprocessing.connection.wait(busy, timeout=0.2)
            if not ready:
                yield None
            for connection in [each for each in busy if each in ready]:
                message = _receive(connection)
                yield message
                if isinstance(message, PackEnd):
                    if waiting:
                        _send(connection, waiting.popleft())
                    else:
                        busy.remove(connection)


def use_one_thread() -> None:
    """Settings of a process that trains packs: one thread, and an allocator that keeps what it has.

    glibc gives tensors of a megabyte back to the system as soon as they are freed, and every new one costs page faults:
    half of the time of a small population's step.
    """
    gc.freeze()  # the collector would write to all that was inherited, and so make a copy of it
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
    here, there = multiprocessing.Pipe()
    process = forked(_work, job, there, here, os.getpid())
    there.close()
    try:
        yield here
    finally:
        here.close()
        end(process)


def forked(function: Callable[..., None], *arguments: Any, daemon: bool = True) -> BaseProcess:
    """A forked process that runs the function, beside threads if there are any: see the module's docstring.

    Args:
        daemon: whether it ends with this process; then it may start none itself.
    """
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, daemon=daemon)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    return process


def end(process: BaseProcess) -> None:
    """Ends a process that has nothing more to say."""
    process.join(timeout=0.1)
    if process.is_alive():
        process.kill()
        process.join()


def _work(job: Job, connection: Connection, parent_end: Connection, parent: int) -> None:
    """The life of a worker: packs in, blocks out, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with(parent)
    parent_end.close()
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
    except BaseException as error:
        with contextlib.suppress(OSError):
            connection.send(_Failure(_named(error), traceback.format_exc()))
    finally:
        sys.stdout.flush()
        os._exit(0)  # a forked process must not run the parent's exit handlers


def _die_with(parent: int) -> None:
    """The system ends this process when its parent ends, even by SIGKILL and in the middle of a long block.

    Without it a worker would only notice between blocks that nobody listens any more.
    """
    with contextlib.suppress(OSError, AttributeError):
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the system was told
        os._exit(0)


def _told_to_stop(connection: Connection) -> bool:
    return connection.poll() and connection.recv() == "stop"


@dataclass(frozen=True)
class _Failure:
    """What a worker sends when it cannot go on."""

    error: FalllineError
    trace: str


def _send(connection: Connection, message: Pack | str) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died, which `_receive` will find
        connection.send(message)


def _receive(connection: Connection) -> Message:
    try:
        message: Any = connection.recv()
    except (EOFError, ConnectionResetError):
        raise WorkerDied(
            "a worker process died without a word: most likely the machine ran out of memory. What was recorded is "
            "kept; resume with fewer workers."
        ) from None
    if isinstance(message, _Failure):
        message.error.add_note(f"In a worker process:\n{message.trace}")
        raise message.error
    assert isinstance(message, Block | PackEnd)
    return message


class WorkerDied(FalllineError, RuntimeError):
    """A worker process ended without saying why."""


class TrainingFailed(FalllineError, RuntimeError):
    """The model, its loss or its metric raised an error in the middle of training."""


# What the system says when a file cannot take what is written to it.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def _named(error: BaseException) -> FalllineError:
    """An error that ended training, as one of ours: with its own words, and where it happened."""
    if isinstance(error, FalllineError):
        return error
    if isinstance(error, OSError) and error.errno in _DISK:
        return RunDirectoryError(f"the run directory could not be written: {error.strerror}: {error.filename}.")
    frames = traceback.extract_tb(error.__traceback__)
    libraries = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    own = [frame for frame in frames if not frame.filename.startswith((*libraries, "<"))] or frames
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return TrainingFailed(f"training failed with {said}{place}. What was recorded before it is kept.")


def can_fork(device: torch.device) -> bool:
    """Forking is safe on Linux while no GPU is in use, and a daemonic process may have no children."""
    return (
        sys.platform == "linux"
        and device.type == "cpu"
        and not torch.cuda.is_initialized()
        and not multiprocessing.current_process().daemon
    )


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
