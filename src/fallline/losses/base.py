"""What a loss is: values per sample, how they are reduced to one number, and what it wants to be given.

Each family of losses has a file of its own, whose `CATALOGUE` at its end says what else is known of them (`info`);
`catalogue` gathers them, `wrapped` makes a `Loss` of torch's own losses and of any callable, and `misuse` says what
is wrong with a prediction and a target.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import cached_property
from typing import Any, ClassVar, Literal, ParamSpec, TypeAlias

import torch
from torch import Tensor

from fallline.description import Call, code, described, leaves, plain, remembers_its_call, search_dimensions, substitute
from fallline.dimensions import Dimension
from fallline.errors import InvalidHyperparameter, LossMismatch, unknown_argument

P = ParamSpec("P")
Reduction: TypeAlias = Literal["mean", "sum", "none", "batchmean"]
Kind: TypeAlias = Literal["classification", "binary", "regression", "other"]
Number: TypeAlias = float | Tensor
Numbers: TypeAlias = Mapping[str, Number]
# A prediction or a target: a tensor, or a tuple of tensors (a mean and a variance; an anchor, a positive, a negative).
Parts: TypeAlias = Any
Terms: TypeAlias = Callable[[Parts, Parts, Numbers], tuple[Tensor, Tensor | None]]


class Prediction(StrEnum):
    """What the numbers of a prediction are."""

    LOGITS = "logits"  # one for each class, in dimension 1
    LOG_PROBABILITIES = "log-probabilities"  # of each class, in dimension 1; of sequences, in the last one
    CLASS_SCORES = "class scores"  # one for each class, in dimension 1; the highest wins
    YES_LOGITS = "logits of yes"  # one for each element of the target
    PROBABILITIES = "probabilities of yes"  # one for each element of the target
    SCORES = "scores"  # one for each element of the target; its sign decides
    THRESHOLD_LOGITS = "logits of thresholds"  # one for each of K − 1 ordered thresholds, in dimension 1
    REAL = "real values"
    POSITIVE = "positive values"
    LOG_RATES = "logarithms of rates"
    LOG_DENSITIES = "log-probabilities of any axis"  # kl_div: elementwise, as large as the target
    QUANTILES = "quantiles"
    ENSEMBLE = "members of an ensemble"
    DISTRIBUTION = "parameters of a distribution"  # parts: mean and variance, …
    DISTANCES = "distances"
    EMBEDDINGS = "embeddings"
    HIDDEN_STATES = "hidden states and classifier weights"
    ANYTHING = "anything"


class Target(StrEnum):
    """What the numbers of a target are."""

    CLASSES = "class indices"
    CLASSES_OR_PROBABILITIES = "class indices or probabilities"
    CLASSES_OR_YES_NO = "class indices, or 0 or 1 for each class"
    CLASS_SETS = "class indices, −1 after the last"  # multilabel_margin
    FRACTIONS = "0 to 1"
    YES_NO = "0 or 1"
    SIGNS = "−1 or 1"
    RANKS = "ranks 0, 1, …"
    REAL = "real values"
    POSITIVE = "positive values"
    NOT_NEGATIVE = "values ≥ 0"
    COUNTS = "counts 0, 1, …"
    PROBABILITIES = "probabilities"
    LOG_PROBABILITIES = "log-probabilities"
    SEQUENCES = "sequences of class indices"
    GROUPS = "a label for each sample"
    NOTHING = "nothing"
    ANYTHING = "anything"


@remembers_its_call
@dataclass(frozen=True, eq=False, repr=False)
class Loss:
    """A loss: a pure function of a prediction and a target, with a per-sample form and a reduction.

    With the values v and the weights w of `terms`, the loss is

        mean:       Σ v / Σ w   (w = 1 for each value where `terms` gives None; 0 where Σ w = 0)
        sum:        Σ v
        batchmean:  Σ v / N
        none:       v

    Made by the functions of `fl.losses`. With a search dimension among its arguments it is a template, of which a sweep
    makes concrete losses.

    Attributes:
        name: what users call it, such as "cross_entropy".
        kind: "classification" (class indices or class probabilities), "binary" (yes or no for each element),
            "regression" or "other". It chooses the default metric of a task.
        terms: (prediction, target, numbers) -> (values, weights). Values keep the sample as their first dimension and
            are what torch's `reduction="none"` gives; weights are what the mean divides by. Pure tensor arithmetic:
            numbers may be tensors with a value of their own for each trial.
        prediction, target: what it wants to be given.
        shapes: of prediction and target, in words.
        formula: in one line.
        reference: authors and year, or "".
        numbers: the hyperparameters that `terms` reads as data; everything else is static.
        reduction: "mean", "sum", "none" or, for kl_div, "batchmean".
        estimate: the prediction as one guess in the target's unit, for metrics; None where it is one.
        arrange: makes (prediction, target) of the arguments in torch's order, where those are more than two.
        torch_name: its class in torch.nn, or "".
        whole: a callable that is used exactly as it is instead of the reduced terms.
        written: the expression that makes `whole`.
        kin: the loss of this package that describes `whole`, by name.

    >>> from fallline import losses
    >>> loss = losses.mse()
    >>> loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    tensor(2.)
    >>> loss.per_sample(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    tensor([0., 4.])
    >>> loss.code()
    'torch.nn.MSELoss()'
    """

    name: str
    kind: Kind
    terms: Terms
    prediction: Prediction = Prediction.ANYTHING
    target: Target = Target.ANYTHING
    shapes: tuple[str, str] = ("", "")
    formula: str = ""
    reference: str = ""
    numbers: Mapping[str, Number] = field(default_factory=dict)
    reduction: Reduction = "mean"
    estimate: Callable[[Parts], Tensor] | None = None
    arrange: Callable[..., tuple[Parts, Parts]] | None = None
    torch_name: str = ""
    whole: Callable[..., Tensor] | None = None
    written: str = ""
    kin: str = ""
    call: Call | None = None

    _is_template: ClassVar[bool] = False

    def __post_init__(self) -> None:
        # Not a cached property: its lock cannot be compiled.
        if self.call is not None and any(True for _ in search_dimensions(self.call)):
            object.__setattr__(self, "_is_template", True)

    def __call__(
        self, prediction: Parts, target: Parts = None, *more: Tensor, numbers: Numbers | None = None
    ) -> Tensor:
        """The loss of a batch, a 0-dimensional tensor. Works under vmap, grad and compile.

        Args:
            prediction, target: tensors, or tuples of them where a loss has parts.
            more: for the losses that have more than two arguments in torch, all of them in torch's order.
            numbers: replaces some of `self.numbers` (the vectorised engine passes one value per trial).
        """
        self._refuse_template()
        # What torch calls with three arguments or more cannot be called with a prediction in parts; ours is its equal.
        if self.whole is not None and numbers is None and (more or self.arrange is None):
            return self.whole(prediction, target, *more)
        values, weights = self._terms(prediction, target, *more, numbers=numbers)
        if self.reduction == "none":
            return values
        if self.reduction == "sum":
            return values.sum()
        if self.reduction == "batchmean":
            return values.sum() / (values.shape[0] if values.ndim else 1)
        if weights is None:
            return values.mean()
        total = weights.sum()
        return values.sum() / (total + (total == 0))  # nothing to average (every label ignored) is 0, not NaN

    def per_sample(
        self, prediction: Parts, target: Parts = None, *more: Tensor, numbers: Numbers | None = None
    ) -> Tensor:
        """One value per sample, shape [N]; for class indices with further dimensions, the target's shape.

        Values of several elements are combined as the loss combines them: their mean, or their sum.

        Raises:
            LossMismatch: for a wrapped callable, of which only the reduced value is known.
        """
        values, _ = self._terms(prediction, target, *more, numbers=numbers)
        element_by_element = isinstance(prediction, Tensor) and values.shape == prediction.shape
        if values.ndim <= 1 or (self.kind == "classification" and not element_by_element):
            return values
        values = values.flatten(1)
        return values.sum(1) if self.reduction in ("sum", "batchmean") else values.mean(1)

    def code(self) -> str:
        """The plain PyTorch expression that makes the same loss; fallline's own where torch has none; "" if unknown."""
        if self.whole is not None or self.call is None:
            return self.written
        if not self.torch_name:
            return repr(self)
        kind = getattr(torch.nn, self.torch_name)
        torchs, ours = defaults_of(kind), defaults_of(self.call.function)
        if any(name not in torchs and value != ours[name] for name, value in self.call.arguments.items()):
            return repr(self)
        known = {name: value for name, value in self.call.arguments.items() if name in torchs}
        return spelled(f"torch.nn.{self.torch_name}", known, torchs)

    @property
    def arguments_of_call(self) -> dict[str, Any]:
        """The arguments that it was made with, by name, defaults included."""
        return dict(self.call.arguments) if self.call is not None else {}

    @property
    def dimensions(self) -> dict[str, Dimension]:
        """The search dimensions among the arguments, by the argument's name."""
        return dict(search_dimensions(self.call)) if self.call is not None else {}

    def chosen(self, values: Mapping[int, object]) -> Loss:
        """The concrete loss in which dimension `d` has become `values[id(d)]`."""
        made: Loss = substitute(self, values)
        return made

    @cached_property
    def structure(self) -> Hashable:
        """What is static: losses of equal structure differ only in `numbers`, and can be computed together."""
        if self.call is None or self.whole is not None:
            return id(self)
        fixed = [(name, _fixed(value)) for name, value in leaves(self.call) if name not in self.numbers]
        held = [
            each for value in self.call.arguments.values() for each in (value if isinstance(value, tuple) else (value,))
        ]
        inside = tuple(each.structure for each in held if isinstance(each, Loss))
        return f"{self.call.function.__module__}.{self.call.name}", tuple(fixed), tuple(self.numbers), inside

    def __add__(self, other: object) -> Loss:
        """The sum of two losses of the same prediction and target: `cross_entropy() + 0.5 * dice()`.

        The other one may be torch's, or any callable.
        """
        from fallline.losses.combination import added

        return added(self, other) if isinstance(other, Loss) or callable(other) else NotImplemented

    def __radd__(self, other: object) -> Loss:
        """The same with another's loss in front, or with the 0 that `sum` begins with."""
        from fallline.losses.combination import added

        if isinstance(other, int) and other == 0:
            return self
        return added(other, self) if callable(other) else NotImplemented

    def __mul__(self, factor: object) -> Loss:
        """The loss times a number or a search dimension."""
        from fallline.losses.combination import scaled

        return scaled(self, factor) if isinstance(factor, (int, float, Dimension, Tensor)) else NotImplemented

    __rmul__ = __mul__

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.call is not None:
            return self.__reduce__()
        return object.__new__, (Loss,), {each.name: getattr(self, each.name) for each in fields(self)}

    def _terms(
        self, prediction: Parts, target: Parts, *more: Tensor, numbers: Numbers | None
    ) -> tuple[Tensor, Tensor | None]:
        self._refuse_template()
        if more:
            if self.arrange is None:
                raise LossMismatch(
                    f"{self.name} was given {len(more) + 2} tensors, and expects a prediction and a target."
                )
            prediction, target = self.arrange(prediction, target, *more)
        self._require_tensors(prediction, target)
        if numbers is not None:
            self._require_numbers(numbers)
        read = self.numbers if numbers is None else {**self.numbers, **numbers}
        if any(isinstance(number, Tensor) for number in read.values()):
            first = prediction[0] if isinstance(prediction, tuple) else prediction
            dtype = first.dtype if first.is_floating_point() else torch.get_default_dtype()
            read = {n: v.to(first.device, dtype) if isinstance(v, Tensor) else v for n, v in read.items()}
        return self.terms(prediction, target, read)

    def _require_tensors(self, prediction: Parts, target: Parts) -> None:
        """A prediction, and a target unless it is not looked at, as tensors or tuples of them."""
        without = (Target.NOTHING, Target.GROUPS, Target.ANYTHING)  # a loss of groups says more about none
        for what, given in (("prediction", prediction), ("target", target)):
            if given is None and what == "target" and self.target in without:
                continue
            if given is None or isinstance(given, (bool, int, float, str)):
                raise LossMismatch(
                    f"{self.name} was given {given!r} as its {what}, and expects a tensor: loss(prediction, target)."
                )
            if isinstance(given, list) and not any(isinstance(part, Tensor) for part in given):
                raise LossMismatch(
                    f"{self.name} was given a list as its {what}, and expects a tensor: torch.tensor({what})."
                )

    def _require_numbers(self, numbers: Numbers) -> None:
        """Names that the loss has, and plain numbers in their domain; a tensor is taken at its word."""
        if not isinstance(numbers, Mapping):
            raise LossMismatch(
                f"{self.name} was given numbers={numbers!r}, and expects a dictionary: {{name: number}}."
            )
        for name in numbers:
            if name not in self.numbers:
                raise unknown_argument(f"{self.name}(numbers=…)", name, self.numbers)
        plain_ones = {name: value for name, value in numbers.items() if not isinstance(value, Tensor)}
        if plain_ones and self.call is not None and self.whole is None and not torch.compiler.is_compiling():
            self.call.with_arguments(plain_ones)  # which refuses what lies outside its domain

    def _refuse_template(self) -> None:
        if self._is_template:
            names = ", ".join(self.dimensions)
            raise InvalidHyperparameter(
                f"{self!r} leaves {names} to be searched: give numbers, or pass the loss to fl.sweep."
            )


def _fixed(value: object) -> Hashable:
    return value if isinstance(value, int | float | str | None) else repr(value)


def loss_maker(function: Callable[P, Loss]) -> Callable[P, Loss]:
    """Marks a function that makes a loss: what it returns remembers the call, so that it can be printed as code, swept,
    compared and sent to other processes. Tensors among the arguments become tuples of numbers; a 0-dimensional tensor
    that is part of a computation (under vmap or grad) stays what it is.

    Raises:
        UnknownArgument: (a TypeError) when the function is called with a keyword that it does not take.

    >>> from fallline.losses import huber
    >>> huber(dleta=2.0)
    Traceback (most recent call last):
    ...
    fallline.errors.UnknownArgument: huber() has no argument 'dleta'. Did you mean 'delta'?
    """
    return described(function, read=_read)


def _read(value: Any) -> Any:
    if isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value):
        return tuple(map(_read, value))
    if isinstance(value, Tensor):
        if value.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(value):
            return value
        return _tupled(value.tolist())
    return plain(value)


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def defaults_of(kind: Callable[..., Any]) -> dict[str, object]:
    """The default arguments of a function or class."""
    parameters = inspect.signature(kind).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def spelled(constructor: str, arguments: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    """A constructor call of torch's with only those arguments that differ from their defaults.

    Tuples and weights are spelt as the tensors that torch wants.

    >>> spelled("torch.nn.HuberLoss", {"delta": 2.0, "reduction": "mean"}, {"reduction": "mean"})
    'torch.nn.HuberLoss(delta=2.0)'
    """
    shown = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            dtype = "" if value.dtype == torch.get_default_dtype() else f", dtype={value.dtype}"
            shown.append(f"{name}=torch.tensor({value.tolist()}{dtype})")
        elif isinstance(value, tuple) or (name.endswith("weight") and isinstance(value, (int, float))):
            shown.append(f"{name}=torch.tensor({_listed(value)})")
        elif name not in defaults or value != defaults[name]:
            shown.append(f"{name}={code(value)}")
    return f"{constructor}({', '.join(shown)})"


def _listed(value: Any) -> Any:
    return list(map(_listed, value)) if isinstance(value, tuple) else value
