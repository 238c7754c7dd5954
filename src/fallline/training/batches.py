"""The order of mini-batches, which is part of a trial: fixed by its seed, the same in every engine."""

from __future__ import annotations

import torch
from torch import Tensor


class BatchOrder:
    """The indices of successive mini-batches of one seed.

    Epoch e takes the e-th permutation of `torch.randperm(n, generator=g)`, `g = torch.Generator().manual_seed(seed)`,
    in slices of `batch_size`; the short last slice is kept unless `drop_last`. Without `shuffle` every epoch takes the
    samples as they stand. The indices are on `device`, where they are brought once per epoch.

    >>> order = BatchOrder(n=3, batch_size=2, seed=0)
    >>> [order.at(step).tolist() for step in range(3)]
    [[2, 0], [1], [2, 1]]
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        *,
        drop_last: bool = False,
        shuffle: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.shuffle = shuffle
        self.device = device
        self.steps_per_epoch = steps_per_epoch(n, batch_size, drop_last)
        self._epoch = -1
        self._rewind()

    def at(self, step: int) -> Tensor:
        """The indices of the batch at `step`, counted from 0 over all epochs; cheap when steps come in order."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch < self._epoch:
            self._rewind()
        while self._epoch < epoch:
            self._epoch += 1
            if self.shuffle:
                self._permutation = torch.randperm(self.n, generator=self._generator).to(self.device)
        return self._permutation[position * self.batch_size : (position + 1) * self.batch_size]

    def _rewind(self) -> None:
        self._epoch = -1
        self._generator = torch.Generator().manual_seed(self.seed)
        self._permutation = torch.arange(self.n, device=self.device)


def steps_per_epoch(n: int, batch_size: int, drop_last: bool) -> int:
    """How many mini-batches an epoch has.

    >>> steps_per_epoch(1000, 128, drop_last=False), steps_per_epoch(1000, 128, drop_last=True)
    (8, 7)
    """
    return max(1, n // batch_size) if drop_last else -(-n // batch_size)
