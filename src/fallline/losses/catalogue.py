"""The list of losses: what `fallline losses` prints, what names resolve to, what contract tests run over."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fallline.description import written_arguments
from fallline.errors import UnknownName, nearest
from fallline.losses import (
    binary,
    classification,
    combination,
    contrastive,
    counts,
    distributions,
    embeddings,
    likelihoods,
    margins,
    overlap,
    ranks,
    redundancy,
    regression,
    reweighted,
    sequences,
    vocabulary,
)
from fallline.losses.base import Loss
from fallline.losses.info import LossInfo

FAMILIES = (
    regression,
    likelihoods,
    distributions,
    classification,
    reweighted,
    ranks,
    binary,
    margins,
    overlap,
    embeddings,
    contrastive,
    redundancy,
    sequences,
    vocabulary,
    combination,
    counts,
)
CATALOGUE: Mapping[str, LossInfo] = {info.name: info for family in FAMILIES for info in family.CATALOGUE}
registry: Mapping[str, Callable[..., Loss]] = {name: info.make for name, info in CATALOGUE.items()}
"""Every loss of this package: its name and the function that makes it."""


def get(name: str) -> Callable[..., Loss]:
    """The constructor of the loss called `name`.

    Raises:
        UnknownName: with the nearest name.

    >>> get("mse")().code()
    'torch.nn.MSELoss()'
    """
    if name not in registry:
        raise UnknownName(f"There is no loss {name!r}. {nearest(name, registry)}")
    return registry[name]


def parse(text: str) -> Loss:
    """A loss as it is written on the command line: `huber`, `huber:delta=0.5`.

    Raises:
        UnknownName: for a name that is not in the catalogue.
        UnknownArgument: for an argument that the loss does not take, one without a value, or one given twice.

    >>> parse("huber:delta=0.5")
    fl.losses.huber(delta=0.5)
    """
    name, _, rest = text.partition(":")
    maker: Callable[..., Loss] = get(name.strip())
    return maker(**written_arguments(rest, name.strip(), text))
