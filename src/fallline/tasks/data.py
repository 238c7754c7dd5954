"""Two tensors from whatever holds samples: pairs of arrays, a `Dataset`, a `DataLoader`. `task` says what
for."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from fallline.errors import InvalidTask

# Samples of a data set that are read and stacked together.
READ_AT_ONCE = 64
# Reading that takes longer shows how far it is.
SECONDS_BEFORE_A_BAR = 1.0


@dataclass(frozen=True, eq=False)
class Data:
    """Samples: inputs x [N, …] and targets y [N, …].

    >>> len(Data(torch.zeros(3, 2), torch.zeros(3)))
    3
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return int(self.x.shape[0])

    def spread(self, count: int) -> Tensor:
        """The numbers of so many samples spread over all: data are often sorted."""
        return torch.linspace(0, len(self) - 1, count).long()

    def to(self, dtype: torch.dtype) -> Data:
        """The same samples, what is floating-point of them in the type `dtype`."""
        x = self.x.to(dtype) if self.x.is_floating_point() else self.x
        y = self.y.to(dtype) if self.y.is_floating_point() else self.y
        return Data(x, y)


@dataclass(frozen=True)
class Loading:
    """What a `DataLoader` said about batches, where one was given."""

    batch_size: int
    drop_last: bool
    shuffle: bool


def as_data(source: object, role: str) -> tuple[Data, Loading | None]:
    """The samples in `source` as tensors, and how a `DataLoader` would have batched them.

    Args:
        source: a pair (x, y) of tensors, numpy arrays or lists; a map-style `Dataset` of pairs, each of which
            is read once; a `DataLoader`, whose data set is read once and in order, with its workers and its collate
            function; or `Data`.
        role: "train" or "validation", for messages.

    Integer targets become int64, the type that torch's losses take; nothing else is converted here.

    Raises:
        InvalidTask: for anything else, for x and y of different lengths, no samples, and NaN or infinity.

    >>> data, loading = as_data(([[1.0], [2.0]], [2.0, 4.0]), "train")
    >>> data.x.shape, loading
    (torch.Size([2, 1]), None)
    """
    loading = None
    if isinstance(source, Data):
        pair: tuple[object, object] = (source.x, source.y)
    elif isinstance(source, DataLoader):
        loading = _loading(source, role)
        pair = _read(source, role)
    elif isinstance(source, IterableDataset):
        raise InvalidTask(_iterable(role))
    elif isinstance(source, Dataset):
        pair = _read(DataLoader(source, READ_AT_ONCE), role)
    elif isinstance(source, tuple | list) and len(source) == 2:
        pair = (source[0], source[1])
    else:
        size = f" of {len(source)} elements" if isinstance(source, tuple | list) else ""
        raise InvalidTask(
            f"The {role} data were given as a {type(source).__name__}{size}, and are expected as a pair (x, "
            "y) of tensors or arrays, a torch Dataset of such pairs, or a DataLoader. Put x and y into a "
            "tuple."
        )
    x, y = _tensor(pair[0], f"{role} x"), _tensor(pair[1], f"{role} y")
    if not y.is_floating_point() and y.dtype != torch.bool:
        y = y.long()
    _require_samples(x, y, role)
    _require_finite(x, f"{role} x")
    _require_finite(y, f"{role} y")
    return Data(x, y), loading


def _iterable(role: str) -> str:
    return (
        f"The {role} data were given as an IterableDataset, whose samples cannot be drawn by number. Pass a "
        "map-style Dataset (with __len__ and __getitem__), or its samples as tensors (x, y)."
    )


def _loading(loader: DataLoader[Any], role: str) -> Loading:
    """How a loader batches, where our seeded order can stand for its sampler."""
    sampler, batch_sampler = loader.sampler, loader.batch_sampler
    if isinstance(loader.dataset, IterableDataset):
        raise InvalidTask(_iterable(role))
    if type(batch_sampler) is not BatchSampler or loader.batch_size is None:
        raise InvalidTask(
            f"The {role} DataLoader makes its batches by {type(batch_sampler).__name__}, which a trial's "
            "seed cannot reproduce. Pass the dataset itself and a batch_size."
        )
    if type(sampler) is SequentialSampler:
        return Loading(loader.batch_size, loader.drop_last, shuffle=False)
    samples = len(loader.dataset) if isinstance(loader.dataset, Sized) else -1
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == samples:
        return Loading(loader.batch_size, loader.drop_last, shuffle=True)
    raise InvalidTask(
        f"The {role} DataLoader draws its samples by {type(sampler).__name__}, and only a plain shuffle or "
        "the given order can be drawn by a trial's seed. Pass the dataset itself."
    )


def _read(loader: DataLoader[Any], role: str) -> tuple[object, object]:
    """Every sample of a loader's data set, read once and in order by the loader's workers and collate function.

    Batches are copied into their place as they come, so that no more than the data and a few batches are in memory.
    Where they differ in shape (a collate function that pads to the longest sample of a batch), the samples are read
    again, and collated all at once.
    """
    dataset: Any = loader.dataset
    if type(dataset) is TensorDataset and loader.collate_fn is default_collate and len(dataset.tensors) == 2:
        return dataset.tensors[0], dataset.tensors[1]
    try:
        total = len(dataset)
    except Exception as error:
        raise InvalidTask(f"The {role} data set {_told(dataset, error)}") from error
    if total == 0:
        raise InvalidTask(f"The {role} data hold no samples; at least 2 are needed. Pass a data set that is not empty.")
    size = min(loader.batch_size or total, total)
    whole: list[Tensor] = []
    with _batches(loader, size, role) as batches:
        for start in range(0, total, size):
            rows = range(start, min(start + size, total))
            parts = [
                _tensor(part, f"{role} {name}")
                for name, part in zip("xy", _pair(_next(batches, loader, rows, role), dataset, role), strict=True)
            ]
            if size == total:
                return parts[0], parts[1]
            whole = whole or [part.new_empty(total, *part.shape[1:]) for part in parts]
            for all_rows, part in zip(whole, parts, strict=True):
                if part.dtype != all_rows.dtype or part.shape != (len(rows), *all_rows.shape[1:]):
                    return _pair(_collated(dataset, loader.collate_fn, range(total), role), dataset, role)
                all_rows[rows.start : rows.stop] = part
    return whole[0], whole[1]


@contextlib.contextmanager
def _batches(loader: DataLoader[Any], size: int, role: str) -> Iterator[Iterator[object]]:
    """Batches of so many samples in the order of the data; afterwards, however it ends, no process is left."""
    in_order = DataLoader(
        loader.dataset,
        size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        prefetch_factor=loader.prefetch_factor,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        # The seeds of the workers are drawn from it; where there are none, the caller's random state stays as it is.
        generator=loader.generator if loader.num_workers else torch.Generator(),
    )
    try:
        batches = iter(in_order)
    except Exception as error:
        raise InvalidTask(f"The workers of the {role} DataLoader do not start: {_last_line(error)}") from error
    try:
        with contextlib.closing(_shown(batches, f"reading {role} data", len(in_order))) as shown:
            yield shown
    finally:
        # By itself it would end its processes when it is forgotten, and a traceback does not forget.
        getattr(batches, "_shutdown_workers", lambda: None)()


def _shown(batches: Iterator[object], title: str, total: int) -> Generator[object, None, None]:
    """The batches, with a bar on standard error once reading has taken a while and if a terminal watches."""
    if sys.stderr.isatty():
        began = time.monotonic()
        done = 0
        while time.monotonic() - began < SECONDS_BEFORE_A_BAR and done < total:
            yield next(batches)
            done += 1
        if done < total:
            from rich.console import Console
            from rich.progress import track

            console = Console(stderr=True)
            batches = iter(track(batches, title, total, completed=done, console=console, transient=True))
    yield from batches


def _next(batches: Iterator[object], loader: DataLoader[Any], rows: range, role: str) -> object:
    """The next batch, which holds these samples.

    Raises:
        InvalidTask: for the sample that cannot be read, found by reading the batch again here, one by one.
    """
    try:
        return next(batches)
    except Exception as error:
        # What a worker caught can be met again; one that was killed or hangs is not to be followed.
        if not loader.num_workers or str(error).startswith("Caught "):
            _collated(loader.dataset, loader.collate_fn, rows, role)
        raise InvalidTask(
            f"Samples {rows.start} to {rows.stop - 1} of the {role} data set {_told(loader.dataset, error)}"
        ) from error


def _collated(dataset: Any, collate: Callable[[list[Any]], Any], rows: range, role: str) -> object:
    """These samples as one batch, read one by one in this process."""
    samples = []
    for index in rows:
        try:
            samples.append(dataset[index])
        except Exception as error:
            raise InvalidTask(f"Sample {index} of the {role} data set {_told(dataset, error)}") from error
    try:
        return collate(samples)
    except Exception as error:
        raise InvalidTask(
            f"The samples of the {role} data set {type(dataset).__name__} cannot be stacked into one batch "
            f"(x, y): {type(error).__name__}: {error}"
        ) from error


def _pair(batch: object, dataset: object, role: str) -> tuple[object, object]:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    size = f" of {len(batch)} elements" if isinstance(batch, tuple | list) else ""
    raise InvalidTask(
        f"A batch of the {role} data set {type(dataset).__name__} is a {type(batch).__name__}{size}, and is expected "
        "to be a pair (x, y). Let __getitem__, or the collate function, return x, y."
    )


def _told(dataset: object, error: Exception) -> str:
    return f"{type(dataset).__name__} could not be read: {_last_line(error)}"


def _last_line(error: Exception) -> str:
    """An error in a line; one that a worker caught ends with the line of the error that it met."""
    *trace, last = str(error).strip().splitlines() or [""]
    return last if trace else f"{type(error).__name__}: {last}"


def _tensor(array: object, name: str) -> Tensor:
    """A tensor on its own, apart from any graph."""
    if isinstance(array, Tensor):
        tensor = array.detach()
    else:
        try:
            # A copy of its own: neither read-only memory nor negative strides are any of torch's.
            tensor = torch.from_numpy(np.array(array))
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidTask(
                f"The array {name} of type {type(array).__name__} makes no tensor: {error}. Give numbers in "
                "rows of equal length: a tensor, a numpy array or a list."
            ) from error
    if tensor.layout != torch.strided:
        raise InvalidTask(f"The array {name} is sparse, and is expected dense. Give {name.split()[1]}.to_dense().")
    if tensor.ndim == 0:
        raise InvalidTask(f"The array {name} is a single number, and is expected to hold one entry for each sample.")
    if tensor.is_complex():
        raise InvalidTask(f"The array {name} is complex, and real numbers are expected. Give torch.view_as_real of it.")
    return tensor


def _require_samples(x: Tensor, y: Tensor, role: str) -> None:
    if x.shape[0] != y.shape[0]:
        raise InvalidTask(
            f"The {role} data hold {x.shape[0]} inputs x and {y.shape[0]} targets y, and each input needs "
            "one target. The first dimension of both counts the samples."
        )
    if x.shape[0] == 0 or x.numel() == 0:
        raise InvalidTask(
            f"The {role} data hold no samples (x of shape {list(x.shape)}). Pass data that are not empty."
        )


def _require_finite(tensor: Tensor, name: str) -> None:
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # NaN and infinity show in the extremes, which take no memory.
    if bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
        return
    first = (~torch.isfinite(tensor)).nonzero()[0].tolist()
    value = float(tensor[tuple(first)])
    where = f"sample {first[0]}" + (f", position {first[1:]}" if len(first) > 1 else "")
    what = "NaN" if value != value else "infinite"
    count = int((~torch.isfinite(tensor)).sum())
    raise InvalidTask(
        f"The array {name} is {what} at {where} ({count} such value{'s' * (count > 1)} in all), and finite "
        "numbers are expected. Remove or replace them first."
    )


def split(data: Data, fraction: float, seed: int) -> tuple[Data, Data]:
    """Split off a fraction of the samples, drawn by seed; both parts keep the order of the data.

    The last round(fraction·N), at least one, of `torch.randperm(N)` under a generator of its own are split
    off.

    Raises:
        InvalidTask: if the fraction is not between 0 and 1, or if there are fewer than two samples.

    >>> kept, apart = split(Data(torch.arange(10.0), torch.arange(10.0)), 0.2, seed=0)
    >>> len(kept), len(apart)
    (8, 2)
    """
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise InvalidTask(f"validation_fraction={fraction!r} was given, and a number between 0 and 1 is expected.")
    total = len(data)
    if total < 2:
        raise InvalidTask(
            f"The train data hold {total} sample, and at least 2 are needed to split validation data off. "
            "Give more, or validation data, or validation='train'."
        )
    apart = min(max(1, round(fraction * total)), total - 1)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    chosen, rest = order[total - apart :].sort().values, order[: total - apart].sort().values
    return Data(data.x[rest], data.y[rest]), Data(data.x[chosen], data.y[chosen])
