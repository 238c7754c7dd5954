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

    The losses are averaged in up to 20 pieces of whole epochs where there are enough of them. With L₁ the first, L the
    last and L* the lowest piece:
    *diverged*: a loss is not finite; *unstable*: L is above L₁, or more than 1.5 L* above L* in the last quarter's mean;
    *too slow*: all of training lowered the loss by under 10 %, and it is still falling; *converged*: the last quarter
    lowered it by under 2 % of what training did, and by under 5 % of itself, or within its noise, or below a thousandth
    of L₁; *still improving*: the rest.

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
    pieces = _pieces(losses, steps_per_epoch)
    first, last, lowest = pieces[0], pieces[-1], pieces.min()
    quarter = max(1, len(pieces) // 4)
    tail = pieces[-quarter:].mean()
    if len(pieces) < 2:
        return Verdict(Outcome.STILL_IMPROVING, f"Too short to judge: {losses.size} step(s). Train for more steps.")
    scale = max(abs(first), np.finfo(np.float64).tiny)
    if last > first + 0.05 * scale or (lowest > 0 and tail > 2.5 * lowest and tail > 0.1 * first):
        return Verdict(
            Outcome.UNSTABLE,
            f"Unstable: the loss was {lowest:.4g} at its lowest and {tail:.4g} over the last part of training{rate}. "
            f"Try {lower}, or a schedule that lowers it.",
        )
    gained = first - lowest
    before = pieces[-2 * quarter : -quarter].mean() if len(pieces) >= 2 * quarter + 1 else first
    recent = before - tail
    if gained < 0.1 * scale and recent > 0.05 * gained and gained > 0:
        return Verdict(
            Outcome.TOO_SLOW,
            f"Too slow: training lowered the loss by only {gained / scale:.1%}, from {first:.4g} to {last:.4g}{rate}. "
            f"Try {higher}.",
        )
    still = recent > 0.05 * abs(before) and recent > pieces[-quarter:].std() and before > 1e-3 * scale
    if gained <= 0 or (recent < 0.02 * gained and not still):
        return Verdict(
            Outcome.CONVERGED,
            f"Converged: the loss went from {first:.4g} to {last:.4g} and hardly moved in the last quarter of training. "
            "More steps will not help; another loss, model or optimizer might.",
        )
    return Verdict(
        Outcome.STILL_IMPROVING,
        f"Still improving: the loss fell from {before:.4g} to {tail:.4g} in the last quarter of training. "
        f"Train for more steps, or try {higher}.",
    )


def _pieces(losses: NDArray[np.float64], steps_per_epoch: int) -> NDArray[np.float64]:
    """Means of up to `PIECES` equal pieces of the run, of whole epochs where there are at least as many epochs."""
    epochs = losses.size // steps_per_epoch
    if epochs >= PIECES:
        losses = losses[: epochs * steps_per_epoch].reshape(epochs, steps_per_epoch).mean(axis=1)
    return np.array([part.mean() for part in np.array_split(losses, min(PIECES, losses.size))])
