"""The verdict on a trial: one of five outcomes, read off its training losses, with what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray


class Outcome(StrEnum):
    """How a trial ended."""

    CONVERGED = "converged"
    STILL_IMPROVING = "still improving"
    TOO_SLOW = "too slow"
    UNSTABLE = "unstable"
    DIVERGED = "diverged"


@dataclass(frozen=True)
class Verdict:
    """An outcome and the sentence that says what was seen and what to do.

    Attributes:
        outcome: one of the five.
        sentence: what was seen, in numbers, and the next thing to try.
        step: for `diverged`, the step whose loss was no longer finite.
    """

    outcome: Outcome
    sentence: str
    step: int | None = None

    def __str__(self) -> str:
        return self.sentence


# A run is looked at in this many equal pieces, so that the noise of single mini-batches averages out.
PIECES = 20


def verdict(train_loss: NDArray[np.floating], steps_per_epoch: int = 1, lr: float | None = None) -> Verdict:
    """Judges a trial by its mini-batch losses.

    The losses are averaged in up to 20 pieces, of whole epochs where there are enough of them; with L₀ the loss before
    the first step, L the mean of the last quarter and L₋ that of the quarter before it:

    - *diverged*: a loss is not finite;
    - *unstable*: the loss rose above L₀ and did not come well below it again, or L is far above the lowest piece, or
      the loss rises in the last quarter;
    - *too slow*: L is less than 10 % below L₀ and still falling, or not below it by more than the noise;
    - *still improving*: L₋ − L is above its noise, and above 2 % of L₋ or 5 % of all that training gained;
    - *converged*: the rest, and a loss below a thousandth of L₀.

    Args:
        train_loss: [step], the mini-batch loss before each update.
        steps_per_epoch: to average over whole epochs.
        lr: the learning rate, for the advice.

    >>> import numpy as np
    >>> verdict(np.exp(-np.arange(100.0))).outcome
    <Outcome.CONVERGED: 'converged'>
    >>> verdict(np.array([1.0, 10.0, np.inf])).step
    2
    """
    losses = np.asarray(train_loss, dtype=np.float64)
    rate = f" (lr {lr:g})" if lr is not None else ""
    lower = f"a learning rate three to ten times lower than {lr:g}" if lr is not None else "a lower learning rate"
    higher = f"a learning rate three to ten times higher than {lr:g}" if lr is not None else "a higher learning rate"
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        step = int(bad[0])
        return Verdict(
            Outcome.DIVERGED,
            f"Diverged at step {step}: the loss was no longer finite{rate}. Try {lower}, or clip the gradient.",
            step,
        )
    if losses.size < 2:
        return Verdict(Outcome.STILL_IMPROVING, f"Too short to judge: {losses.size} step(s). Train for more steps.")
    course = _course(losses, steps_per_epoch)
    start, before, tail = course.start, course.before, course.tail
    if course.is_unstable:
        return Verdict(
            Outcome.UNSTABLE,
            f"Unstable: the loss was {start:.4g} at first, {course.lowest:.4g} at its lowest and {tail:.4g} over the "
            f"last part of training{rate}. Try {lower}, or a schedule that lowers it.",
        )
    if course.is_slow:
        fell = (start - tail) / abs(start)
        moved = f"lowered the loss by only {fell:.1%}" if fell > 0 else "did not lower the loss"
        return Verdict(
            Outcome.TOO_SLOW, f"Too slow: training {moved}, from {start:.4g} to {tail:.4g}{rate}. Try {higher}."
        )
    if course.is_falling:
        return Verdict(
            Outcome.STILL_IMPROVING,
            f"Still improving: the loss fell from {before:.4g} to {tail:.4g} in the last quarter of training. "
            f"Train for more steps, or try {higher}.",
        )
    if course.is_tiny:
        return Verdict(
            Outcome.CONVERGED,
            f"Converged: the loss went from {start:.4g} to {tail:.4g}, less than a thousandth of that. "
            "More steps would gain little.",
        )
    return Verdict(
        Outcome.CONVERGED,
        f"Converged: the loss went from {start:.4g} to {tail:.4g} and hardly moved in the last quarter of training. "
        "More steps will not help; another loss, model or optimizer might.",
    )


@dataclass(frozen=True)
class _Course:
    """How the losses went.

    Attributes:
        start: the first losses.
        lowest, highest: of the pieces.
        before, tail: the mean of the last quarter but one, and of the last.
        noise: of a single loss.
        doubt: of before − tail, two standard errors.
    """

    start: float
    lowest: float
    highest: float
    before: float
    tail: float
    noise: float
    doubt: float

    @property
    def is_unstable(self) -> bool:
        size = abs(self.start)
        blew_up = self.highest > self.start + max(3 * self.noise, 0.1 * size)
        learnt = self.tail < self.start - 0.05 * size
        far_above = self.tail > 2.5 * max(self.lowest, 0.02 * size) and self.lowest > 0
        rising = self.tail - self.before > max(self.doubt, 0.1 * abs(self.before), 0.02 * size)
        return (blew_up and not learnt) or far_above or rising

    @property
    def is_slow(self) -> bool:
        fell = self.start - self.tail
        return fell < 0.1 * abs(self.start) and (self.is_falling or fell < 3 * self.noise)

    @property
    def is_falling(self) -> bool:
        recent = self.before - self.tail
        worth = min(0.02 * abs(self.before), 0.05 * abs(self.start - self.tail))
        return recent > max(self.doubt, worth) and not self.is_tiny

    @property
    def is_tiny(self) -> bool:
        return abs(self.tail) < 1e-3 * abs(self.start)


def _course(losses: NDArray[np.float64], steps_per_epoch: int) -> _Course:
    pieces = _pieces(losses, steps_per_epoch)
    quarter = max(1, len(pieces) // 4)
    recent = pieces[-2 * quarter :]
    # The spread of successive differences is free of the trend; the median of them also of single spikes.
    single = np.abs(np.diff(losses[-max(2, losses.size // 4) :]))
    return _Course(
        start=float(losses[0]),
        lowest=float(pieces.min()),
        highest=float(pieces.max()),
        before=float(recent[:-quarter].mean()),
        tail=float(recent[-quarter:].mean()),
        noise=float(1.4826 * np.median(single) / np.sqrt(2)),
        doubt=float(2 * np.diff(recent).std() / np.sqrt(2) * np.sqrt(2 / quarter)),
    )


def _pieces(losses: NDArray[np.float64], steps_per_epoch: int) -> NDArray[np.float64]:
    """Means of up to `PIECES` equal pieces of the run, of whole epochs where there are at least as many epochs."""
    epochs = losses.size // steps_per_epoch
    if epochs >= PIECES:
        losses = losses[: epochs * steps_per_epoch].reshape(epochs, steps_per_epoch).mean(axis=1)
    return np.array([part.mean() for part in np.array_split(losses, min(PIECES, losses.size))])
