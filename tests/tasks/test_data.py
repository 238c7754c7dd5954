"""Every kind of data gives the same tensors, and each bad one gives one clear sentence."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fallline.errors import InvalidTask
from fallline.tasks.data import Data, Loading, as_data, split

X = torch.arange(12.0).reshape(6, 2)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Pairs(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index], int(Y[index])


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(X[0], Y[0])])


@pytest.mark.parametrize(
    "source",
    [
        (X, Y),
        [X, Y],
        (X.numpy(), Y.numpy()),
        (X.double().numpy()[::-1][::-1], Y.numpy().astype(np.uint8)),
        (X.tolist(), Y.tolist()),
        (X, Y.int()),
        Data(X, Y),
        TensorDataset(X, Y),
        Subset(TensorDataset(X, Y), range(6)),
        Pairs(),
        DataLoader(Pairs(), batch_size=4),
        DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True),
    ],
    ids=lambda source: type(source).__name__,
)
def test_all_kinds_of_data_give_the_same_tensors(source: object) -> None:
    data, _ = as_data(source, "train")
    assert torch.equal(data.x.float(), X)
    assert torch.equal(data.y, Y)
    assert data.y.dtype == torch.int64
    assert len(data) == 6


def test_a_collate_function_is_used_once_on_all_samples() -> None:
    def doubled(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        return torch.stack([2 * x for x, _ in samples]), torch.tensor([y for _, y in samples])

    data, _ = as_data(DataLoader(Pairs(), batch_size=2, collate_fn=doubled), "train")
    assert torch.equal(data.x, 2 * X)


def test_a_loader_says_how_it_batches() -> None:
    dataset = TensorDataset(X, Y)
    shuffled = as_data(DataLoader(dataset, batch_size=4, shuffle=True, drop_last=True), "train")[1]
    in_order = as_data(DataLoader(dataset, batch_size=2), "train")[1]
    assert shuffled == Loading(4, drop_last=True, shuffle=True)
    assert in_order == Loading(2, drop_last=False, shuffle=False)


def test_read_only_and_shared_numpy_memory_is_copied() -> None:
    array = X.numpy().copy()
    array.flags.writeable = False
    assert torch.equal(as_data((array, Y), "train")[0].x, X)
    changed = X.numpy().copy()
    data, _ = as_data((changed, Y), "train")
    changed[:] = -1
    assert torch.equal(data.x, X)


def test_data_are_cut_off_from_a_graph() -> None:
    assert not as_data((X.clone().requires_grad_(), Y), "train")[0].x.requires_grad


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (X, "given as a Tensor"),
        ((X, Y, Y), "tuple of 3 elements"),
        ({"x": X}, "given as a dict"),
        (None, "given as a NoneType"),
        (Stream(), "IterableDataset"),
        (DataLoader(Stream()), "IterableDataset"),
        (DataLoader(Pairs(), sampler=WeightedRandomSampler([1.0] * 6, 6)), "WeightedRandomSampler"),
        (DataLoader(Pairs(), sampler=SubsetRandomSampler([0, 1])), "SubsetRandomSampler"),
        (DataLoader(Pairs(), sampler=RandomSampler(Pairs(), replacement=True)), "RandomSampler"),
        (DataLoader(Pairs(), sampler=RandomSampler(Pairs(), num_samples=3)), "RandomSampler"),
        (DataLoader(Pairs(), batch_size=None), "NoneType"),
        (DataLoader(Pairs(), batch_sampler=[[0, 1], [2, 3]]), "list"),
        (TensorDataset(X), "1 elements"),
        (TensorDataset(X, Y, Y), "3 elements"),
        ((X, Y[:5]), "6 inputs x and 5 targets y"),
        ((X[:0], Y[:0]), "no samples"),
        (TensorDataset(X[:0], Y[:0]), "no samples"),
        (Subset(Pairs(), []), "no samples"),
        (Subset(Pairs(), [9]), "IndexError"),
        ((torch.tensor(1.0), Y), "single number"),
        ((X.to_sparse(), Y), "to_dense"),
        ((X * 1j, Y), "complex"),
        (([[1.0], [1.0, 2.0]], Y), "train x of type list makes no tensor"),
        ((["a", "b"], [0, 1]), "train x of type list makes no tensor"),
    ],
    ids=lambda given: given if isinstance(given, str) else type(given).__name__,
)
def test_bad_data_are_refused(source: object, words: str) -> None:
    with pytest.raises(InvalidTask, match=words):
        as_data(source, "train")


def test_a_batch_sampler_of_torchs_own_is_no_obstacle() -> None:
    sampler = BatchSampler(SequentialSampler(Pairs()), batch_size=2, drop_last=False)
    with pytest.raises(InvalidTask, match="Pass the dataset itself"):
        as_data(DataLoader(Pairs(), batch_sampler=sampler), "train")


def test_samples_of_different_lengths_are_refused_with_the_reason() -> None:
    class Ragged(Pairs):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.zeros(index + 1), 0

    with pytest.raises(InvalidTask, match=r"Ragged cannot be stacked.*equal size"):
        as_data(Ragged(), "train")


@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "infinite")]
)
def test_values_that_are_not_finite_are_shown_with_their_place(value: float, word: str) -> None:
    x = X.clone()
    x[4, 1] = x[5, 0] = value
    with pytest.raises(InvalidTask, match=rf"train x is {word} at sample 4, position \[1\] \(2 such values"):
        as_data((x, Y), "train")
    y = torch.ones(6)
    y[3] = value
    with pytest.raises(InvalidTask, match=rf"validation y is {word} at sample 3 \(1 such value in all\)"):
        as_data((X, y), "validation")


def test_a_split_is_drawn_by_its_seed_and_keeps_the_order() -> None:
    data = Data(torch.arange(100.0), torch.arange(100))
    train, validation = split(data, 0.2, seed=3)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(3))
    assert torch.equal(validation.y, order[80:].sort().values)
    assert torch.equal(train.y, order[:80].sort().values)
    assert torch.equal(train.x.long(), train.y)
    assert not torch.equal(split(data, 0.2, seed=4)[1].y, validation.y)


@pytest.mark.parametrize(("samples", "fraction", "sizes"), [(2, 0.2, (1, 1)), (2, 0.9, (1, 1)), (10, 0.25, (8, 2))])
def test_both_parts_of_a_split_hold_a_sample(samples: int, fraction: float, sizes: tuple[int, int]) -> None:
    train, validation = split(Data(torch.zeros(samples, 1), torch.zeros(samples)), fraction, seed=0)
    assert (len(train), len(validation)) == sizes


@pytest.mark.parametrize("fraction", [0, 1, -0.2, 1.5, True, "0.2", float("nan")])
def test_a_fraction_outside_0_and_1_is_refused(fraction: object) -> None:
    with pytest.raises(InvalidTask, match="between 0 and 1"):
        split(Data(X, Y), fraction, seed=0)  # type: ignore[arg-type]


def test_one_sample_cannot_be_split() -> None:
    with pytest.raises(InvalidTask, match="1 sample, and at least 2"):
        split(Data(X[:1], Y[:1]), 0.2, seed=0)
