"""What a case of the census is, how cases are registered and drawn. `scenes` holds what they are made of."""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import nn

Severity: TypeAlias = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")
# What a case returns: (loss, prediction, target) or (loss, prediction, target, model).
Made: TypeAlias = tuple[Any, ...]

# What a message of torch's would have to speak of to be the right reason, where a case does not say it itself.
REASONS = {
    "broadcast": r"target size .* (different|must be the same)|broadcast|same (size|dimension)|shape",
    "shape": r"size|shape|dimension|[01]D",
    "axis": r"(class|channel)\w* (dim|axis)|permute|transpose|dimension 1",
    "batch-size": r"batch.?size|size of tensor|target size|shape",
    "empty": r"empty|no (elements|samples)",
    "double-softmax": r"softmax|logit",
    "double-sigmoid": r"sigmoid|logit",
    "log-softmax-twice": r"softmax|logit",
    "not-log-probabilities": r"log.?(prob|softmax)|probabilit",
    "not-probabilities": r"probabilit|between 0 and 1",
    "not-normalised": r"sum|normali[sz]e|probabilit",
    "softmax-axis": r"softmax|sum to|implicit dimension",
    "one-class": r"one class|single (class|output)|n_classes|number of classes",
    "target-coding": r"[-−]1|between 0 and 1|one.?hot|multi.?target|class ind",
    "target-type": r"dtype|scalar type|long|float|can't be cast",
    "label-range": r"out of (bounds|range)|out-of-bounds",
    "all-ignored": r"ignore",
    "ignored-class": r"ignore",
    "class-weights": r"weight",
    "scale": r"scale|normali[sz]|standardi[sz]",
    "imbalance": r"imbalance|rare",
    "constant-target": r"constant|same (label|value|target)",
    "not-finite": r"nan|inf\b|infinit|finite|overflow",
    "saturated": r"saturat",
    "zero-gradient": r"gradient",
    "detached": r"detach|does not require grad",
    "reduction": r"reduction|batchmean",
    "swapped": r"order|swap",
    "ignored-target": r"label|target",
    "rewards-errors": r"sign|negative|decrease|maximi[sz]",
    "domain": r"negative|positive|domain|between 0 and 1",
    "collapsed": r"collaps|constant|identical",
    "fails": r"instance|constructor|argument|signature",
}


class Scene(NamedTuple):
    """A drawn case."""

    loss: Any
    prediction: Any
    target: Any
    model: nn.Module | None


@dataclass(frozen=True)
class Case:
    """A misuse or a correct use.

    Attributes:
        name: of the function that draws it.
        sentence: what it shows.
        group: the subject of a correct use; the first code of a misuse.
        make: draws it; everything random in it comes from torch's generator, which `drawn` seeds.
        codes: the codes that name a misuse rightly; () for a correct use.
        severity: how severe a finding must be at least to count: "note" where the same data may also be intended.
        reason: what a message of torch's must match to name the problem.
        under: the context, such as `torch.no_grad`, in which it is drawn and judged.
    """

    name: str
    sentence: str
    group: str
    make: Callable[[], Made]
    codes: tuple[str, ...] = ()
    severity: Severity = "warning"
    reason: re.Pattern[str] | None = None
    under: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext

    @contextlib.contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """A place in which torch's generator depends on the case and the seed alone, and is given back afterwards."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()) + seed)
            yield

    def drawn(self) -> Scene:
        """Draws it; to be called inside `seeded` and `under`."""
        made = self.make()
        return Scene(*made) if len(made) == 4 else Scene(*made, None)


MISUSES: dict[str, Case] = {}
CORRECT_USES: dict[str, Case] = {}


def misuse(
    *codes: str, says: str | None = None, severity: Severity = "warning"
) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Registers a misuse.

    Args:
        codes: the code that names it; further ones only where they are as true.
        says: a regular expression for torch's message; `REASONS` has one for each code.
        severity: the least severity with which it is caught.
    """
    reason = re.compile(says or "|".join(REASONS[code] for code in codes), re.IGNORECASE | re.DOTALL)

    def register(make: Callable[[], Made]) -> Callable[[], Made]:
        _add(MISUSES, Case(make.__name__, _sentence(make), codes[0], make, codes, severity, reason))
        return make

    return register


def correct(
    group: str, *, under: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Registers a correct use."""

    def register(make: Callable[[], Made]) -> Callable[[], Made]:
        _add(CORRECT_USES, Case(make.__name__, _sentence(make), group, make, under=under))
        return make

    return register


def _sentence(make: Callable[[], Made]) -> str:
    return " ".join((make.__doc__ or "").split())


def _add(register: dict[str, Case], case: Case) -> None:
    if case.name in MISUSES or case.name in CORRECT_USES:
        raise ValueError(f"There are two cases {case.name}.")
    register[case.name] = case
