"""What losses ask of their arguments: hyperparameters inside their domain, predictions in parts, equal shapes."""

from __future__ import annotations

from torch import Tensor

from fallline.errors import InvalidHyperparameter, LossMismatch
from fallline.losses.base import Number, Parts, Reduction


def parts(name: str, prediction: Parts, count: int, what: str) -> tuple[Tensor, ...]:
    """The parts of a prediction: a tuple of so many tensors, or one tensor that holds them along dimension 1.

    Args:
        name: of the loss, for the error.
        prediction: a tuple of `count` tensors, which are returned as they are; or a tensor [N, count, …], whose parts
            are [N, …]; or a tensor [N, count · d, …], whose parts are [N, d, …].
        what: the parts in words, for the error.

    Raises:
        LossMismatch: for anything else.

    >>> import torch
    >>> parts("gaussian_nll", torch.tensor([[1.0, 2.0]]), 2, "a mean and a variance")
    (tensor([1.]), tensor([2.]))
    """
    if isinstance(prediction, (tuple, list)) and len(prediction) == count:
        return tuple(prediction)
    if isinstance(prediction, Tensor) and prediction.ndim >= 2 and prediction.shape[1] == count:
        return prediction.unbind(1)
    if (
        isinstance(prediction, Tensor)
        and prediction.ndim >= 2
        and prediction.shape[1]
        and prediction.shape[1] % count == 0
    ):
        return tuple(prediction.chunk(count, 1))
    given = f"a tensor of shape {list(prediction.shape)}" if isinstance(prediction, Tensor) else f"{prediction!r:.80}"
    raise LossMismatch(
        f"{name} was given {given}, and expects {what}: a tuple of {count} tensors, or one tensor that holds them one "
        "after the other along dimension 1. Let the model's last layer give so many outputs."
    )


def like(part: Tensor, target: Tensor) -> Tensor:
    """A part [N] of a prediction for a target [N, 1], with the target's shape; any other part as it is."""
    return part.unsqueeze(-1) if target.shape == (*part.shape, 1) else part


def reduced(name: str, reduction: str, *, batchmean: bool = False) -> Reduction:
    """`reduction` if it is one.

    Raises:
        InvalidHyperparameter: if it is not.
    """
    if reduction == "mean" or reduction == "sum" or reduction == "none":
        return reduction  # type: ignore[return-value]
    if batchmean and reduction == "batchmean":
        return "batchmean"
    known = "'mean', 'sum', 'none' or 'batchmean'" if batchmean else "'mean', 'sum' or 'none'"
    raise InvalidHyperparameter(f"{name} was given reduction={reduction!r}, and expects {known}.")


def number(
    loss: str,
    name: str,
    value: Number,
    *,
    above: float | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Number:
    """A hyperparameter that lies in its domain; a tensor (under vmap or grad) is taken at its word.

    Args:
        above: the open lower bound.
        low, high: the closed bounds.

    Raises:
        InvalidHyperparameter: for a number outside, or for no number.

    >>> number("huber", "delta", 0.0, above=0)
    Traceback (most recent call last):
    ...
    fallline.errors.InvalidHyperparameter: huber was given delta=0.0, and expects a finite number above 0.
    """
    if isinstance(value, Tensor):
        return value
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and -float("inf") < value < float("inf")
    if real and (above is None or value > above) and (low is None or value >= low) and (high is None or value <= high):
        return value
    words = "a finite number"
    if low is not None and high is not None:
        words = f"a number from {low:g} to {high:g}"
    elif above is not None and high is not None:
        words = f"a number above {above:g} and up to {high:g}"
    elif above is not None:
        words += f" above {above:g}"
    elif low is not None:
        words += f" ≥ {low:g}"
    raise InvalidHyperparameter(f"{loss} was given {name}={value!r}, and expects {words}.")


def same_shape(name: str, prediction: Tensor, target: Tensor) -> None:
    """Refuses the silent broadcasting of an element-wise loss. Static: it also works under vmap and compile.

    >>> import torch
    >>> same_shape("mse", torch.zeros(3, 1), torch.zeros(3))
    Traceback (most recent call last):
    ...
    fallline.errors.LossMismatch: mse was given a prediction of shape [3, 1] and a target of shape [3], and
    expects equal shapes (these would be broadcast). Give the target a second dimension: target.unsqueeze(1).
    """
    if prediction.shape == target.shape:
        return
    if target.shape == prediction.shape[:-1] and prediction.shape[-1] == 1:
        fix = "Give the target a second dimension: target.unsqueeze(1)."
        if prediction.ndim != 2:
            fix = "Give the target a last dimension: target.unsqueeze(-1)."
    elif prediction.shape == target.shape[:-1] and target.shape[-1] == 1:
        fix = "Take the last dimension away: target.squeeze(-1)."
    elif prediction.numel() == target.numel():
        fix = "Both hold as many elements: target.reshape(prediction.shape) if their order is the same."
    else:
        fix = "Let the model's last layer give as many outputs as the target has columns."
    broadcasts = all(
        a == b or 1 in (a, b) for a, b in zip(reversed(prediction.shape), reversed(target.shape), strict=False)
    )
    note = " (these would be broadcast)" if broadcasts else ""
    raise LossMismatch(
        f"{name} was given a prediction of shape {list(prediction.shape)} and a target of shape "
        f"{list(target.shape)}, and expects equal shapes{note}. {fix}"
    )


def switch(loss: str, name: str, value: object) -> bool:
    """An argument that is True or False.

    Raises:
        InvalidHyperparameter: if it is neither.

    >>> switch("info_nce", "normalize", True)
    True
    """
    if isinstance(value, bool):
        return value
    raise InvalidHyperparameter(f"{loss} was given {name}={value!r}, and expects True or False.")
