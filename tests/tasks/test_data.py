"""Every kind of data gives the same tensors, and each bad one gives one clear sentence."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

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
    get_worker_info,
)

from fallline.errors import InvalidTask
from fallline.tasks import data as data_module
from fallline.tasks.data import Data, Loading, as_data, split

X = torch.arange(12.0).reshape(6, 2)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Pairs(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index], int(Y[index])


class Counted(Pairs):
    """Counts how often each sample is read, and by workers or not, over processes."""

    def __init__(self) -> None:
        self.reads = torch.zeros(2, len(X)).share_memory_()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads[int(get_worker_info() is not None), index] += 1
        return super().__getitem__(index)


class Failing(Pairs):
    """Sample 3 cannot be read."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 3:
            raise OSError("a truncated file")
        return super().__getitem__(index)


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


def test_a_collate_function_is_used() -> None:
    def doubled(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        return torch.stack([2 * x for x, _ in samples]), torch.tensor([y for _, y in samples])

    data, _ = as_data(DataLoader(Pairs(), batch_size=2, collate_fn=doubled), "train")
    assert torch.equal(data.x, 2 * X)


# Python warns of the fork by which torch's workers are started.
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_is_read_once_and_in_order_by_its_workers(workers: int) -> None:
    dataset = Counted()
    data, _ = as_data(DataLoader(dataset, batch_size=2, shuffle=True, drop_last=True, num_workers=workers), "train")
    assert torch.equal(data.x, X)
    expected = torch.zeros(2, 6)
    expected[int(workers > 0)] = 1
    assert torch.equal(dataset.reads, expected)


@forks
def test_workers_are_set_up_and_seeded_as_their_loader_says() -> None:
    class Drawn(Pairs):
        offset = 0.0

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return X[index] + self.offset + torch.rand(2), index

    def set_up(worker: int) -> None:
        get_worker_info().dataset.offset = 100.0 * (1 + worker)  # type: ignore[union-attr]

    def loader() -> DataLoader[tuple[Tensor, int]]:
        seeded = torch.Generator().manual_seed(5)
        return DataLoader(Drawn(), batch_size=2, num_workers=2, worker_init_fn=set_up, generator=seeded)

    expected = torch.cat([x for x, _ in loader()])
    assert (expected[::3] > 100).all()
    assert torch.equal(as_data(loader(), "train")[0].x, expected)


def test_reading_leaves_the_random_state_as_it_is() -> None:
    before = torch.get_rng_state()
    as_data(DataLoader(Pairs(), batch_size=2, shuffle=True), "train")
    as_data(Pairs(), "train")
    assert torch.equal(torch.get_rng_state(), before)


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_are_padded_to_their_longest_are_collated_at_once(workers: int) -> None:
    def padded(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        return torch.nn.utils.rnn.pad_sequence([x for x, _ in samples], True, -1.0), torch.tensor(
            [y for _, y in samples]
        )

    class Growing(Pairs):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.full((index + 1,), float(index)), index

    data, _ = as_data(DataLoader(Growing(), batch_size=2, collate_fn=padded, num_workers=workers), "train")
    rows = torch.arange(6.0)
    assert torch.equal(data.x, torch.where(rows[:, None] >= rows, rows[:, None], -1.0))


def test_numbers_of_another_type_in_a_later_batch_are_not_rounded() -> None:
    class Mixed(Pairs):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return X[index], (index if index < 4 else index + 0.5)  # type: ignore[return-value]

    data, _ = as_data(DataLoader(Mixed(), batch_size=2), "train")
    assert data.y.tolist() == [0, 1, 2, 3, 4.5, 5.5]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_reading_takes_little_more_memory_than_the_data() -> None:
    class Large(Dataset[tuple[Tensor, int]]):
        def __len__(self) -> int:
            return 640

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.full((2**15,), float(index)), index

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    data, _ = as_data(Large(), "train")
    assert torch.equal(data.x[:, 7].long(), data.y)
    assert status("VmHWM") - before < 1.4 * data.x.nbytes


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_read_is_named(workers: int) -> None:
    with pytest.raises(
        InvalidTask, match=r"^Sample 3 of the train data set Failing could not be read: OSError: a truncated file$"
    ):
        as_data(DataLoader(Failing(), batch_size=2, num_workers=workers), "train")


@forks
def test_a_worker_that_is_killed_does_not_take_us_with_it() -> None:
    class Deadly(Pairs):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            if index == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    with pytest.raises(InvalidTask, match=r"Samples \d to \d of the train data set Deadly .*worker.*(killed|exited)"):
        as_data(DataLoader(Deadly(), batch_size=2, num_workers=1), "train")


@forks
def test_what_fails_only_in_a_worker_is_told_in_a_line() -> None:
    class Shy(Pairs):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            if get_worker_info() is not None:
                raise ValueError("not here")
            return super().__getitem__(index)

    with pytest.raises(InvalidTask, match=r"^Samples 0 to 1 .* could not be read: ValueError: not here$"):
        as_data(DataLoader(Shy(), batch_size=2, num_workers=1), "train")


class Interrupted(Pairs):
    """Its first sample is read while Ctrl-C is pressed: the process that waits for it is told so."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 0:
            time.sleep(0.2)
            os.kill(os.getppid(), signal.SIGINT)
        time.sleep(0.5)
        return super().__getitem__(index)


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    """As at a terminal; a process that a shell has put into the background is born deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@forks
@pytest.mark.usefixtures("ctrl_c_interrupts")
@pytest.mark.parametrize(("dataset", "error"), [(Interrupted(), KeyboardInterrupt), (Failing(), InvalidTask)])
def test_no_process_is_left_behind(dataset: Pairs, error: type[BaseException]) -> None:
    with pytest.raises(error) as held:  # with it the whole traceback
        as_data(DataLoader(dataset, batch_size=1, num_workers=2), "train")
    assert held.tb is not None
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("watched", "patience", "shown"), [(True, 0.0, True), (True, 60.0, False), (False, 0.0, False)]
)
def test_long_reading_is_shown_to_who_watches(
    monkeypatch: pytest.MonkeyPatch, watched: bool, patience: float, shown: bool
) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: watched  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(data_module, "SECONDS_BEFORE_A_BAR", patience)
    data, _ = as_data(DataLoader(Pairs(), batch_size=2), "train")
    assert torch.equal(data.x, X)
    assert ("reading train data" in terminal.getvalue()) is shown


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
        (DataLoader(X[:2], batch_size=2), "data set Tensor is a Tensor, and is expected to be a pair"),
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
