"""Two tensors from whatever holds samples: pairs of arrays, a `Dataset`, a `DataLoader`. `task` says what
for."""

from __future__ import annotations

from collections.abc import Callable, Sized
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
            is read once; a `DataLoader`, whose data set is read with its collate function; or `Data`.
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
        pair = _collated(source.dataset, source.collate_fn, role)
    elif isinstance(source, IterableDataset):
        raise InvalidTask(_iterable(role))
    elif isinstance(source, Dataset):
        pair = _collated(source, default_collate, role)
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


def _collated(dataset: Any, collate: Callable[[list[Any]], Any], role: str) -> tuple[object, object]:
    """Every sample of a data set in one batch."""
    if type(dataset) is TensorDataset and collate is default_collate and len(dataset.tensors) == 2:
        return dataset.tensors[0], dataset.tensors[1]
    try:
        samples = [dataset[index] for index in range(len(dataset))]
    except Exception as error:
        raise InvalidTask(
            f"The {role} data set {type(dataset).__name__} could not be read: {type(error).__name__}: {error}"
        ) from error
    if not samples:
        raise InvalidTask(f"The {role} data hold no samples; at least 2 are needed. Pass a data set that is not empty.")
    if not isinstance(samples[0], tuple | list) or len(samples[0]) != 2:
        shape = f" of {len(samples[0])} elements" if isinstance(samples[0], tuple | list) else ""
        raise InvalidTask(
            f"Sample 0 of the {role} data set {type(dataset).__name__} is a "
            f"{type(samples[0]).__name__}{shape}, and is expected to be a pair (x, y). Let __getitem__ "
            "return x, y."
        )
    try:
        batch = collate(samples)
        x, y = batch
    except Exception as error:
        raise InvalidTask(
            f"The samples of the {role} data set {type(dataset).__name__} cannot be stacked into one batch "
            f"(x, y): {type(error).__name__}: {error}"
        ) from error
    return x, y


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
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
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
