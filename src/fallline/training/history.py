"""What was recorded of a trial."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.floating]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class History:
    """Losses and evaluations; the arrays of a sweep have the trial as their first dimension, those of a fit have not.

    Attributes:
        step: [record], the step (from 0) of each recorded training loss.
        train_loss: [..., record], the mini-batch loss before the update of that step; NaN after a trial has ended.
        evaluation_step: [evaluation], how many updates had been made at each evaluation.
        metric: [..., evaluation], the metric on the validation data; NaN after a trial has ended.
        validation_loss: [..., evaluation], the trial's own loss on the validation data.
    """

    step: Counts
    train_loss: Numbers
    evaluation_step: Counts
    metric: Numbers
    validation_loss: Numbers
