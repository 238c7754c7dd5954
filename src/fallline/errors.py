"""The mistakes that fallline names: one exception type per kind, each derived from the built-in one that fits.

Every message says what was given, what was expected and how to mend it. The command line prints the message
of any `FalllineError` as one sentence and ends with exit code 2; anything else is a defect of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FalllineError(Exception):
    """A mistake in what was asked of fallline, found before any training step was wasted on it."""

    def __str__(self) -> str:  # KeyError would show its message in quotes
        return str(self.args[0]) if self.args else ""


class UnknownName(FalllineError, KeyError):
    """A task, optimizer, loss or metric that does not exist."""


class UnknownArgument(FalllineError, TypeError):
    """A keyword that a function of fallline does not take."""


class InvalidHyperparameter(FalllineError, ValueError):
    """A number of an optimizer, a schedule or a search dimension outside its domain."""


class InvalidTask(FalllineError, ValueError):
    """A task that cannot be trained: its data, its model or its batch size."""


class LossMismatch(FalllineError, ValueError):
    """A prediction and a target that the loss cannot compare as they are."""


class InvalidSweep(FalllineError, ValueError):
    """A budget, a number of seeds, an engine or a combination of settings that makes no sweep."""


class RunDirectoryError(FalllineError, OSError):
    """A run directory that cannot be written or read, or that holds another run."""


class Unsupported(FalllineError, RuntimeError):
    """Something that an optimizer or a loss cannot do, such as training complex parameters."""


class DeviceUnavailable(FalllineError, RuntimeError):
    """A device that this machine does not have."""


class InvalidCourse(FalllineError, ValueError):
    """Settings with which the course cannot be opened or written."""


class TrainedSequentially(UserWarning):
    """A sweep goes on one trial at a time, because its model cannot be vectorised; the message says why."""


class LossMisused(UserWarning):
    """A loss that very likely does not measure what is meant; the message says why, and how to mend it."""


def unknown_argument(taker: str, name: str, known: Iterable[str]) -> UnknownArgument:
    """The error for a keyword that `taker` does not take, with the nearest one that it does.

    >>> unknown_argument("adam()", "beta", ["betas", "lr"])
    UnknownArgument("adam() has no argument 'beta'. Did you mean 'betas'?")
    """
    choices = list(known)
    hint = nearest(name, choices) if choices else "It takes none."
    return UnknownArgument(f"{taker} has no argument {name!r}. {hint}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint "Did you mean …?" for a misspelt name, or a list of all the known names.

    >>> nearest("adamm", ["adam", "sgd"])
    "Did you mean 'adam'?"
    >>> nearest("zzz", ["adam", "sgd"])
    'There are: adam, sgd.'
    """
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"There are: {', '.join(choices)}."
