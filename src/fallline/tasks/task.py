"""A task: a model factory, data, a loss, a metric and a batch size, checked before the first step is taken.

`data` makes tensors of what users give, `metrics` holds the yardsticks, `resolution` finds tasks by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fallline import losses
from fallline.errors import FalllineError, InvalidTask, LossMisused
from fallline.losses import Finding, Loss, as_loss
from fallline.losses.misuse.check import refuse
from fallline.losses.misuse.finding import errors_among, not_yet_said
from fallline.tasks.data import Data, as_data, split
from fallline.tasks.keywords import knows_its_keywords
from fallline.tasks.metrics import Metric, as_metric, for_loss

# What a finding can say about targets alone, whatever was predicted for them.
OF_THE_TARGET = ("label-range", "target-coding", "target-type", "not-normalised", "not-finite", "domain")


@dataclass(frozen=True)
class _Facts:
    """What one model, built for a look, tells about a task."""

    dtype: torch.dtype
    parameters: int
    model: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Task:
    """What is trained: a model factory, data, a loss, a metric and a batch size.

    Args:
        name: what tables and reports call it.
        model: a function without arguments that makes a new `torch.nn.Module`; it is called under
            `torch.manual_seed(seed)`.
        train: a pair (x, y) of tensors, numpy arrays or lists; a map-style `Dataset` of pairs; or a
            `DataLoader`, whose data set is read once through its collate function, whose `batch_size` and
            `drop_last` become the defaults here, and whose shuffling is replaced by the order that a trial's
            seed draws.
        loss: a `Loss`, a name, a torch loss, or any callable(prediction, target).
        validation: the same kinds as `train`; "train" for the training data themselves (tiny or noise-free
            tasks); None to split `validation_fraction` of the training data off.
        metric: a `Metric`, a name, or a callable of which lower is better; None chooses by the kind of the
            loss.
        batch_size: samples in a mini-batch; None for the `DataLoader`'s, or else min(64, n).
        drop_last: whether an epoch's last batch, if short, is left out; None for the `DataLoader`'s, or else
            False.
        shuffle: whether each epoch has its own order; None for the `DataLoader`'s, or else True.
        validation_fraction: between 0 and 1; used where `validation` is None.
        split_seed: draws the samples that are split off (see `data.split`).
        source: where the data come from, in a sentence.

    Attributes are named like the arguments; `train` and `validation` are `Data` with tensors x and y, `loss`
    is a `Loss` and `metric` a `Metric`. After `check()`, floating-point x and y have the type of the model's
    parameters.

    Raises:
        InvalidTask: for data, a model or a batch size that cannot be trained on.
        UnknownArgument: for a keyword that is not among these.

    >>> task = Task("line", lambda: nn.Linear(1, 1), ([[1.0], [2.0], [3.0]], [[2.0], [4.0], [6.0]]), "mse",
    ...             validation="train")
    >>> task.check().describe()["samples"]
    3
    """

    name: str
    model: Callable[[], nn.Module]
    train: Data
    validation: Data
    loss: Loss
    metric: Metric
    metric_was_given: bool
    batch_size: int
    drop_last: bool
    shuffle: bool
    source: str
    _facts: _Facts | None

    @knows_its_keywords
    def __init__(
        self,
        name: str,
        model: Callable[[], nn.Module],
        train: object,
        loss: object,
        validation: object = None,
        metric: object = None,
        batch_size: int | None = None,
        *,
        drop_last: bool | None = None,
        shuffle: bool | None = None,
        validation_fraction: float = 0.2,
        split_seed: int = 0,
        source: str = "",
    ) -> None:
        _require_factory(model)
        train_data, loading = as_data(train, "train")
        if validation is None:
            train_data, validation_data = split(train_data, validation_fraction, split_seed)
        elif isinstance(validation, str):
            if validation != "train":
                raise InvalidTask(
                    f"validation={validation!r} was given, and of words only 'train' is expected, for the "
                    "training data themselves. Give (x, y), a Dataset or a DataLoader, or nothing to split "
                    "a part off."
                )
            validation_data = train_data
        else:
            validation_data, _ = as_data(validation, "validation")
        if batch_size is None:
            batch_size = loading.batch_size if loading else min(64, len(train_data))
        drop_last = (loading.drop_last if loading else False) if drop_last is None else drop_last
        _require_batch_size(batch_size, drop_last, len(train_data))
        made_loss = as_loss(loss)
        self._set(
            name=str(name),
            model=model,
            train=train_data,
            validation=validation_data,
            loss=made_loss,
            metric=for_loss(made_loss, train_data.y) if metric is None else as_metric(metric),
            metric_was_given=metric is not None,
            batch_size=batch_size,
            drop_last=bool(drop_last),
            shuffle=bool((loading.shuffle if loading else True) if shuffle is None else shuffle),
            source=source,
            _facts=None,
        )

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return (
            f"Task({self.name!r}, {len(self.train)} + {len(self.validation)} samples, loss={self.loss.name}, "
            f"metric={self.metric.name}, batch_size={self.batch_size})"
        )

    def build_model(self, seed: int) -> nn.Module:
        """A new model: `torch.manual_seed(seed)`, then the factory is called.

        Raises:
            InvalidTask: if the factory raises, or returns no module with something to train.
        """
        torch.manual_seed(seed)
        try:
            model = self.model()
        except FalllineError:
            raise
        except Exception as error:
            raise InvalidTask(
                f"The model factory of task {self.name!r} fails: {type(error).__name__}: {error}"
            ) from error
        return _checked_model(model, self.name)

    def check(self) -> Task:
        """Build one model, give it one batch, and refuse what cannot be trained; the task itself is returned.

        Floating-point x and y of both data sets take the type of the model's parameters here, so call this
        before their use. The random state of the caller is untouched, and a second call costs nothing.

        Raises:
            InvalidTask: if the model does not accept the inputs, or the loss or the metric is not one finite
                number.
            LossMismatch: if the loss cannot compare the predictions with the targets (all of them are looked
                at).
        """
        refuse(self.findings)
        return self

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What can be said about the loss on these data, errors included; looked for once, as `check()` does.

        Raises:
            InvalidTask: if the model does not accept the inputs, or the loss or the metric is not one finite number.
        """
        return self._looked_at().findings

    def _looked_at(self) -> _Facts:
        if self._facts is not None:
            return self._facts
        with torch.random.fork_rng(devices=[]):
            model = self.build_model(0)
            dtype = next(each.dtype for each in model.parameters() if each.requires_grad)
            same = self.validation is self.train
            train = self.train.to(dtype)
            validation = train if same else self.validation.to(dtype)
            findings = self._findings_on(model, train, "train")
            others = [] if same else self._findings_on(model, validation, "validation")
            findings += [
                replace(each, seen=f"On the validation data: {each.seen}") for each in not_yet_said(others, findings)
            ]
            parameters = sum(each.numel() for each in model.parameters() if each.requires_grad)
        facts = _Facts(dtype, parameters, repr(model), tuple(findings))
        self._set(train=train, validation=validation, _facts=facts)
        return facts

    def warn(self, *, stacklevel: int = 2) -> None:
        """Warns of each finding that is very likely a mistake. Calls `check()`.

        Args:
            stacklevel: as in `warnings.warn`, from the caller's caller on.
        """
        for finding in self.check().findings:
            if finding.severity == "warning":
                words = f"{finding.message} Fix: {finding.fix} [{finding.code}]"
                warnings.warn(words, LossMisused, stacklevel=stacklevel + 1)

    def _findings_on(self, model: nn.Module, data: Data, role: str) -> list[Finding]:
        count = min(self.batch_size, len(data))
        rows = data.spread(count)
        prediction = self._prediction(model, data.x[rows], role)
        target = data.y[rows]
        found = []
        if isinstance(prediction, Tensor) and prediction.ndim and prediction.shape[0] == count:
            # One prediction seen by every target: all the labels are checked for the price of one batch.
            every = prediction[:1].detach().expand(len(data), *prediction.shape[1:])
            about = losses.check(self.loss, every, data.y)
            found = [each for each in errors_among(about) if each.code in OF_THE_TARGET]
        of_batch = losses.check(self.loss, prediction, target, model if role == "train" else None)
        found += not_yet_said(of_batch, found)
        if not errors_among(found):
            for what, function in (("loss", self.loss), (f"metric {self.metric.name!r}", self.metric)):
                self._require_number(what, function, prediction, target, role)
        return found

    def _prediction(self, model: nn.Module, x: Tensor, role: str) -> Any:
        model.eval()
        try:
            with torch.set_grad_enabled(role == "train"):
                return model(x)
        except Exception as error:
            raise InvalidTask(
                f"The model of task {self.name!r} does not accept {role} inputs of shape {list(x.shape)} "
                f"and type {str(x.dtype).removeprefix('torch.')}: {type(error).__name__}: {error}"
            ) from error

    def _require_number(
        self, what: str, function: Callable[[Any, Tensor], Tensor], prediction: Any, target: Tensor, role: str
    ) -> None:
        try:
            with torch.no_grad():
                value = function(prediction, target)
        except FalllineError:
            raise
        except Exception as error:
            raise InvalidTask(
                f"The {what} of task {self.name!r} fails on the first {role} batch: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(value, Tensor):
            raise InvalidTask(
                f"The {what} of task {self.name!r} returns a {type(value).__name__}, and a tensor with one "
                "number is expected. Return the tensor itself, without .item() or float()."
            )
        if value.ndim != 0:
            raise InvalidTask(
                f"The {what} of task {self.name!r} returns a tensor of shape {list(value.shape)}, and one "
                "number is expected. Take its mean or its sum."
            )
        if not bool(torch.isfinite(value)):
            raise InvalidTask(
                f"The {what} of task {self.name!r} is {float(value)} on the first {role} batch of a new "
                "model, and a finite number is expected. Scale the inputs or the initial parameters down."
            )

    def with_loss(self, loss: object) -> Task:
        """The same task under another loss. The metric stays, so that trials of both losses can be compared.

        >>> points = [[1.0], [2.0]], [[2.0], [4.0]]
        >>> Task("line", lambda: nn.Linear(1, 1), points, "mse").with_loss("l1").metric.name
        'mse'
        """
        other = object.__new__(Task)
        other._set(**{**self.__dict__, "loss": as_loss(loss), "_facts": None})
        return other

    def describe(self) -> dict[str, object]:
        """The facts of the task in words and numbers that fit into JSON. Calls `check()`."""
        facts = self.check()._looked_at()
        return {
            "name": self.name,
            "source": self.source,
            "samples": len(self.train),
            "validation_samples": len(self.validation),
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
            "shuffle": self.shuffle,
            "loss": self.loss.code() or self.loss.name,
            "metric": self.metric.name,
            "higher_is_better": self.metric.higher_is_better,
            "parameters": facts.parameters,
            "model": facts.model,
            "dtype": str(facts.dtype).removeprefix("torch."),
        }


def _require_factory(model: object) -> None:
    if isinstance(model, nn.Module):
        raise InvalidTask(
            f"The model was given as a module ({type(model).__name__}), and is expected as a function that "
            "makes one, since each trial starts from a new model. Write model=lambda: "
            f"{type(model).__name__}(...)."
        )
    if not callable(model):
        raise InvalidTask(
            f"The model was given as {model!r} of type {type(model).__name__}, and is expected as a "
            "function without arguments that makes a torch.nn.Module. Write model=lambda: "
            "torch.nn.Sequential(...)."
        )


def _checked_model(model: object, task: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise InvalidTask(
            f"The model factory of task {task!r} returned a {type(model).__name__}, and a torch.nn.Module "
            "is expected. Return the module that it makes."
        )
    trainable = [each for each in model.parameters() if each.requires_grad]
    if not trainable:
        raise InvalidTask(
            f"The model of task {task!r} ({type(model).__name__}) has no parameter to train. Give it a "
            "layer with parameters, or set requires_grad of those it has."
        )
    if any(isinstance(each, UninitializedParameter) for each in model.parameters()):
        raise InvalidTask(
            f"The model of task {task!r} has lazy parameters without a shape. Let the factory call the "
            "model once on a sample before it returns it, or give the layers their input sizes."
        )
    return model


def _require_batch_size(batch_size: object, drop_last: bool, samples: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InvalidTask(
            f"batch_size={batch_size!r} was given, and a whole number ≥ 1 is expected. Leave it out for "
            f"{min(64, samples)}, or give {samples} for the full batch."
        )
    if drop_last and batch_size > samples:
        raise InvalidTask(
            f"batch_size={batch_size} was given with drop_last for {samples} training samples, which leaves "
            f"no batch. Give at most {samples}, or drop_last=False."
        )
