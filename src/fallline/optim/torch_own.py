"""Any other `torch.optim` optimizer as an optimizer of fallline: LBFGS, SparseAdam, one of your own.

It is not a rule but an object with a state of its own, so it trains one trial at a time, each in a loop that gives it a
closure. `state_to_tensors` and `state_from_tensors` take its `state_dict` apart for checkpoints.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fallline.description import Call, code, described
from fallline.errors import FalllineError, InvalidHyperparameter, Unsupported, unknown_argument
from fallline.optim.base import Optimizer
from fallline.optim.checks import WrongType
from fallline.optim.transform import Moment, Numbers, Params, Seed, Slots, Transform

# What the training loop asks of such an optimizer.
METHODS = ("step", "zero_grad", "state_dict", "load_state_dict")
TREE = "tree"


class TorchOwn(Optimizer):
    """Made by `from_torch`: an optimizer whose steps a torch optimizer makes."""

    @property
    def made_of(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """The class, and the arguments besides the parameters."""
        assert isinstance(self.call, Call)
        given = dict(self.call.arguments)
        return given.pop("optimizer_class"), given

    @property
    def name(self) -> str:
        """The name of the class."""
        return self.made_of[0].__name__

    @property
    def arguments(self) -> dict[str, Any]:
        """Every argument of the class that was given, by name."""
        return {name: value for name, value in super().arguments.items() if name != "optimizer_class"}

    def as_torch(self, params: Any, *, steps: int | None = None, seed: int = 0) -> torch.optim.Optimizer:  # type: ignore[override]
        """The torch optimizer on these parameters."""
        self._refuse_template()
        kind, given = self.made_of
        return kind(params, **given)

    def __repr__(self) -> str:
        kind, given = self.made_of
        told = ", ".join(f"{name}={code(value, 'fl.optim.')}" for name, value in given.items())
        return f"fl.optim.from_torch({code(kind)}{', ' if told else ''}{told})"


@described
def from_torch(optimizer_class: type[torch.optim.Optimizer], **arguments: Any) -> Optimizer:
    """An optimizer class in torch's style, and its arguments, as an optimizer for `fit` and `sweep`.

    Each trial makes one on its model's parameters and calls `step(closure)`, where the closure zeroes the gradients,
    computes the mini-batch's loss, goes backward and returns the loss. The loss that is recorded is the one before the
    update. In a sweep such trials run one at a time; the others stay vectorised.

    Args:
        optimizer_class: takes parameters and keywords, and has `step`, `zero_grad`, `state_dict`, `load_state_dict`.
        arguments: the keywords; each may be a search dimension.

    Raises:
        UnknownArgument: for a keyword that the class does not take.
        InvalidHyperparameter: for a value that the class refuses, or for something that is no such class.

    >>> import torch
    >>> from_torch(torch.optim.LBFGS, lr=1.0)
    fl.optim.from_torch(torch.optim.LBFGS, lr=1.0)
    """
    name = getattr(optimizer_class, "__name__", repr(optimizer_class))
    if not inspect.isclass(optimizer_class) or not all(hasattr(optimizer_class, method) for method in METHODS):
        raise WrongType(
            f"{optimizer_class!r} is not a class of optimizers: give one like torch.optim.LBFGS, with the methods "
            f"{', '.join(METHODS)}."
        )
    first, *others = inspect.signature(optimizer_class).parameters.values()
    keywords = [p.name for p in others if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in others)
    for each in arguments:
        if each == first.name or (each not in keywords and not takes_any):
            raise unknown_argument(f"{name}()", each, keywords)
    try:  # a matrix: some classes refuse all other parameters
        optimizer_class([torch.nn.Parameter(torch.zeros(2, 2))], **arguments)
    except Exception as error:
        told = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        kind = WrongType if isinstance(error, TypeError) else InvalidHyperparameter
        raise kind(f"{name}({told}) is refused: {str(error).rstrip('.')}.") from error
    return TorchOwn((Transform(name, {}, _no_rule, slots=_no_state),))


def _no_rule(
    updates: dict[str, Tensor], slots: Mapping[str, Slots], params: Params, numbers: Numbers, moment: Moment
) -> tuple[dict[str, Tensor], dict[str, Slots]]:
    raise _no_rule_error()


def _no_state(name: str, parameter: Tensor, numbers: Numbers, seed: Seed) -> Slots:
    raise _no_rule_error()


def _no_rule_error() -> FalllineError:
    return Unsupported(
        "an optimizer made by from_torch is no rule with init and update, and cannot be a part of another optimizer: "
        "train with it through fl.fit, fl.sweep or as_torch."
    )


@dataclass
class _Shelf:
    """Tensors put aside, each once."""

    tensors: dict[str, Tensor]
    places: dict[int, str]

    def put(self, tensor: Tensor) -> str:
        if id(tensor) not in self.places:
            self.places[id(tensor)] = str(len(self.tensors))
            self.tensors[str(len(self.tensors))] = tensor.detach().clone()
        return self.places[id(tensor)]


def state_to_tensors(state: Any) -> dict[str, Tensor]:
    """A torch `state_dict`, a tree of dictionaries, lists, tensors and plain values, as tensors by name.

    Its tensors are copied; the tree around them is JSON in a tensor of bytes.

    Raises:
        Unsupported: for a value of another kind.

    >>> state_from_tensors(state_to_tensors({"state": {0: {"steps": [1, None], "t": torch.tensor(2.0)}}}))
    {'state': {0: {'steps': [1, None], 't': tensor(2.)}}}
    """
    shelf = _Shelf({}, {})
    tree = json.dumps(_written(state, shelf)).encode()
    return {**shelf.tensors, TREE: torch.frombuffer(bytearray(tree), dtype=torch.uint8)}


def state_from_tensors(tensors: Mapping[str, Tensor]) -> Any:
    """What `state_to_tensors` made them of."""
    return _read(json.loads(bytes(tensors[TREE].cpu().numpy()).decode()), tensors)


def _written(value: Any, shelf: _Shelf) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": shelf.put(value)}
    if isinstance(value, Mapping):
        return {"items": [[_written(key, shelf), _written(item, shelf)] for key, item in value.items()]}
    if type(value) is list:
        return [_written(item, shelf) for item in value]
    if type(value) is tuple:
        return {"tuple": [_written(item, shelf) for item in value]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise Unsupported(f"a checkpoint cannot hold {value!r}, which is in the state of the optimizer.")


def _read(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_read(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_read(item, tensors) for item in value["tuple"])
    return {_read(key, tensors): _read(item, tensors) for key, item in value["items"]}
