"""From optimizers with search dimensions to concrete configurations, and from those to trials."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fallline.description import code, leaves
from fallline.dimensions import Dimension
from fallline.errors import InvalidSweep
from fallline.losses import Loss
from fallline.optim import Optimizer, Schedule, Transform
from fallline.optim.partitions import Labels
from fallline.optim.torch_own import TorchOwn
from fallline.training.fit import learning_rate


@dataclass(frozen=True)
class Configuration:
    """A loss and an optimizer with concrete hyperparameters.

    Attributes:
        index: its number in the sweep.
        label: the optimizer as it was given, in words: "sgd momentum=0.9".
        loss: what it minimises, concrete.
        optimizer: concrete.
        settings: the values that were chosen for the search dimensions, by the argument's name; those of the loss begin
            with "loss.".
        loss_label: the loss as it was given, in words: "focal alpha=0.25".
    """

    index: int
    label: str
    loss: Loss
    optimizer: Optimizer
    settings: dict[str, object]
    loss_label: str = ""


@dataclass(frozen=True)
class TrialPlan:
    """A configuration with a seed: what one trial is to be."""

    index: int
    configuration: Configuration
    seed: int


def labels(given: Sequence[Optimizer] | Sequence[Loss]) -> list[str]:
    """A short, unique name for each optimizer or loss: its name and what is not at its default.

    >>> from fallline.optim import lookahead, sgd
    >>> labels([sgd(lr=0.1), sgd(lr=0.1, momentum=0.9), sgd(lr=0.2), lookahead(sgd(lr=0.1, momentum=0.9), k=10)])
    ['sgd', 'sgd momentum=0.9', 'sgd (2)', 'lookahead(sgd momentum=0.9) k=10']
    """
    made: list[str] = []
    for each in given:
        label = base = _label(each)
        count = 1
        while label in made:
            count += 1
            label = f"{base} ({count})"
        made.append(label)
    return made


def configurations(
    optimizers: Sequence[Optimizer], losses: Sequence[Loss], *, samples: int, search_seed: int
) -> list[Configuration]:
    """Every concrete loss with every concrete optimizer.

    Grids are crossed with each other. Ranges are sampled: `samples` points, spread evenly by a scrambled Sobol
    sequence, each crossed with the grids. All optimizers draw from the same sequence, so they are searched alike.

    Raises:
        InvalidHyperparameter: for a learning rate of 0, or an argument that its optimizer refuses.
    """
    found: list[Configuration] = []
    for loss_label, loss in zip(labels(losses), losses, strict=True):
        for label, optimizer in zip(labels(optimizers), optimizers, strict=True):
            searched = optimizer.dimensions | {f"loss.{name}": d for name, d in loss.dimensions.items()}
            for values in _choices(searched.values(), samples, search_seed):
                chosen = {id(d): v for d, v in values.items()}
                rule = optimizer.chosen(chosen) if optimizer.dimensions else optimizer
                minimised = loss.chosen(chosen) if loss.dimensions else loss
                learning_rate(rule)
                settings = {name: values[d] for name, d in searched.items()}
                found.append(Configuration(len(found), label, minimised, rule, settings, loss_label))
    return found


def trials(chosen: Sequence[Configuration], seeds: Sequence[int]) -> list[TrialPlan]:
    """Every configuration with every seed, numbered from 0, the seeds of a configuration together."""
    pairs = itertools.product(chosen, seeds)
    return [TrialPlan(index, configuration, seed) for index, (configuration, seed) in enumerate(pairs)]


def _choices(searched: Iterable[Dimension], samples: int, search_seed: int) -> list[dict[Dimension, object]]:
    dimensions = list(dict.fromkeys(searched))
    grids = [d for d in dimensions if d.values is not None]
    ranges = [d for d in dimensions if d.values is None]
    drawn: list[dict[Dimension, object]] = [{}]
    if ranges:
        from scipy.stats import qmc  # slow to import, and rarely needed

        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise InvalidSweep(f"samples = {samples!r} is not a whole number of at least 1.")
        sequence = qmc.Sobol(len(ranges), seed=search_seed)
        points = sequence.random_base2(int(np.ceil(np.log2(samples))))[:samples]
        drawn = [{d: d.at(float(f)) for d, f in zip(ranges, point, strict=True)} for point in points]
    crossed = itertools.product(*(d.values or () for d in grids))
    return [dict(zip(grids, values, strict=True)) | point for values in crossed for point in drawn]


def _label(optimizer: Optimizer | Transform | Loss) -> str:
    """The name, the optimizers inside in parentheses, and the arguments that are not at their default."""
    call = optimizer.call
    if isinstance(optimizer, Loss) and (call is None or optimizer.whole is not None):
        return optimizer.name
    if call is None or call.extra:
        assert not isinstance(optimizer, Loss)
        stages = [optimizer.name] if isinstance(optimizer, Transform) else [t.name for t in optimizer.transforms]
        return " + ".join(stages) if stages else optimizer.name
    inside: list[str] = []
    told: list[str] = []
    maker, arguments = optimizer.made_of if isinstance(optimizer, TorchOwn) else (call.function, call.arguments)
    parameters = inspect.signature(maker).parameters
    for argument, given in arguments.items():
        if isinstance(given, Optimizer | Transform | Loss):
            inside.append(_label(given))
            continue
        if isinstance(given, tuple) and given and all(isinstance(each, Loss) for each in given):
            inside += map(_label, given)
            continue
        if isinstance(given, Mapping) and all(isinstance(each, Optimizer | Transform) for each in given.values()):
            inside += [f"{key}: {_label(each)}" for key, each in given.items()]
            continue
        default = dict(leaves(parameters[argument].default, argument)) if argument in parameters else {}
        found = [(argument, code(given))] if isinstance(given, Labels) else leaves(given, argument)
        told += [
            f"{name}={_value(value)}"
            for name, value in found
            if name != "lr" and not isinstance(value, Dimension) and not (name in default and default[name] == value)
        ]
        if argument == "lr" and isinstance(given, Schedule):
            told.append(f"lr {given.kind}")
    name = f"{optimizer.name}({', '.join(inside)})" if inside else optimizer.name
    return " ".join([name, *told])


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value.__name__ if inspect.isfunction(value) else str(value)
