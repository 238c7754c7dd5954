"""What can be said against a prediction and a target before a loss is computed: shapes, types, label ranges.

Each function raises `LossMismatch` or returns None, and is shared by our losses and torch's own. They read
values (minimum and maximum of the target), so they belong before the training loop, not into it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fallline.errors import LossMismatch


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def require_same_shape(name: str, prediction: Tensor, target: Tensor) -> None:
    """Refuse the silent broadcasting of an element-wise loss. Static: it also works under vmap and compile.

    >>> require_same_shape("mse", torch.zeros(3, 1), torch.zeros(3))
    Traceback (most recent call last):
    ...
    fallline.errors.LossMismatch: mse was given a prediction of shape [3, 1] and a target of shape [3], and
    expects equal shapes (these would be broadcast). Give the target a second dimension: target.unsqueeze(1).
    """
    if prediction.shape == target.shape:
        return
    if prediction.ndim == target.ndim + 1 and prediction.shape[:-1] == target.shape and prediction.shape[-1] == 1:
        fix = "Give the target a second dimension: target.unsqueeze(1)."
        if prediction.ndim != 2:
            fix = "Give the target a last dimension: target.unsqueeze(-1)."
    elif target.ndim == prediction.ndim + 1 and target.shape[:-1] == prediction.shape and target.shape[-1] == 1:
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
        f"{name} was given a prediction of shape {_shape(prediction)} and a target of shape "
        f"{_shape(target)}, and expects equal shapes{note}. {fix}"
    )


def require_floating_prediction(name: str, prediction: Tensor) -> None:
    """Refuse predictions that no gradient can flow through, such as class indices."""
    if not prediction.is_floating_point():
        raise LossMismatch(
            f"{name} was given a prediction of type {_type(prediction)}, and expects floating-point outputs "
            "of the model. Give the outputs themselves, without argmax, round or a comparison."
        )


def _require_floating_target(name: str, prediction: Tensor, target: Tensor) -> None:
    if not target.is_floating_point():
        raise LossMismatch(
            f"{name} was given a target of type {_type(target)}, and expects {_type(prediction)} like the "
            "prediction. Convert it: target.to(prediction.dtype)."
        )
    if target.dtype != prediction.dtype:
        raise LossMismatch(
            f"{name} was given a target of type {_type(target)} and a prediction of type "
            f"{_type(prediction)}, and expects one type for both. Convert it: target.to(prediction.dtype)."
        )


def check_elementwise(name: str, prediction: Tensor, target: Tensor) -> None:
    """The checks of a regression loss: equal shapes, equal floating-point types."""
    require_floating_prediction(name, prediction)
    require_same_shape(name, prediction, target)
    _require_floating_target(name, prediction, target)


def check_binary(
    name: str,
    prediction: Tensor,
    target: Tensor,
    *,
    pos_weight: Tensor | None = None,
    probabilities: bool = False,
) -> None:
    """The checks of a binary loss: those of a regression loss, and targets (of `BCELoss` predictions too) in
    [0, 1]."""
    if (
        prediction.ndim == 2
        and prediction.shape[1] > 1
        and target.ndim == 1
        and target.shape[0] == prediction.shape[0]
        and not target.is_floating_point()
    ):
        raise LossMismatch(
            f"{name} was given {prediction.shape[1]} outputs for each sample and one class index as target. "
            f"For one of {prediction.shape[1]} classes use cross_entropy; for yes or no let the model give "
            "one output."
        )
    check_elementwise(name, prediction, target)
    low, high = _extremes(target)
    if low < 0 or high > 1:
        raise LossMismatch(
            f"{name} was given targets from {low:g} to {high:g}, and expects them from 0 to 1. "
            + (
                "Map −1 and 1 to 0 and 1: (target + 1) / 2."
                if low == -1 and high <= 1
                else "Use 0 for no and 1 for yes."
            )
        )
    if probabilities:
        low, high = _extremes(prediction)
        if low < 0 or high > 1:
            raise LossMismatch(
                f"{name} was given predictions from {low:g} to {high:g}, and expects probabilities from 0 "
                "to 1. Use binary_cross_entropy_with_logits for outputs without a sigmoid."
            )
    outputs = list(prediction.shape[-1:])
    if pos_weight is not None and pos_weight.numel() != 1 and list(pos_weight.shape[-1:]) != outputs:
        raise LossMismatch(
            f"{name} was given a pos_weight of shape {_shape(pos_weight)} for a prediction of shape "
            f"{_shape(prediction)}, and expects one number or one for each of the last dimension's outputs."
        )


def _extremes(tensor: Tensor) -> tuple[float, float]:
    if tensor.numel() == 0:
        return 0.0, 0.0
    low, high = tensor.detach().aminmax()
    return float(low), float(high)


def check_classes(
    name: str,
    prediction: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    allow_probabilities: bool = True,
) -> None:
    """The checks of a loss over classes, whose dimension is 1: prediction [N, C, …], and as target class
    indices [N, …] of type int64 from 0 to C−1 (or `ignore_index`), or probabilities [N, C, …] of the
    prediction's type.

    >>> check_classes("cross_entropy", torch.zeros(2, 3), torch.tensor([1, 3]))
    Traceback (most recent call last):
    ...
    fallline.errors.LossMismatch: cross_entropy was given the label 3 (of sample 1) for 3 classes, and expects
    labels from 0 to 2. Labels that count from 1 need target - 1; otherwise give the model more outputs.
    """
    require_floating_prediction(name, prediction)
    if prediction.ndim < 2:
        raise LossMismatch(
            f"{name} was given a prediction of shape {_shape(prediction)}, and expects one output for each "
            "class: [N, C]. For yes or no with one output use binary_cross_entropy_with_logits."
        )
    classes = prediction.shape[1]
    if classes == 1:
        raise LossMismatch(
            f"{name} was given one class (prediction of shape {_shape(prediction)}), of which it is always "
            "0. Let the model give one output for each class, or use binary_cross_entropy_with_logits."
        )
    if weight is not None and list(weight.shape) != [classes]:
        raise LossMismatch(
            f"{name} was given class weights of shape {_shape(weight)} for {classes} classes. Give one "
            f"weight for each class: shape [{classes}]."
        )
    expected = prediction.shape[:1] + prediction.shape[2:]
    if target.is_floating_point() and target.shape == prediction.shape:
        _check_probabilities(name, prediction, target, allow_probabilities)
        return
    _require_index_shape(name, prediction, target, expected)
    if target.numel():
        _require_labels_in_range(name, target, classes, ignore_index)


def _check_probabilities(name: str, prediction: Tensor, target: Tensor, allowed: bool) -> None:
    if not allowed:
        raise LossMismatch(
            f"{name} was given floating-point targets of shape {_shape(target)}, and expects class indices. "
            "Give target.argmax(1), or use cross_entropy, which takes probabilities."
        )
    _require_floating_target(name, prediction, target)
    low, high = _extremes(target)
    if low < 0 or high > 1:
        raise LossMismatch(
            f"{name} was given class probabilities from {low:g} to {high:g}, and expects them from 0 to 1. "
            "Normalise them, or give class indices of type int64."
        )


def _require_index_shape(name: str, prediction: Tensor, target: Tensor, expected: Sequence[int]) -> None:
    given = (
        f"{name} was given a prediction of shape {_shape(prediction)} and a target of shape "
        f"{_shape(target)} and type {_type(target)}"
    )
    if list(target.shape) == [*expected, 1]:
        raise LossMismatch(
            f"{given}, and expects class indices of shape {list(expected)}. Take the last dimension away: "
            "target.squeeze(-1)" + (".long()." if target.dtype != torch.int64 else ".")
        )
    if target.shape == prediction.shape:
        raise LossMismatch(
            f"{given}, which looks like one-hot rows. Give class indices, target.argmax(1), or "
            "probabilities in floating point, target.to(prediction.dtype)."
        )
    if list(target.shape) != list(expected):
        if target.ndim == prediction.ndim - 1 and prediction.ndim > 2 and prediction.shape[:-1] == target.shape:
            fix = "The classes belong into dimension 1: prediction.movedim(-1, 1)."
        elif target.shape[:1] != prediction.shape[:1]:
            fix = "Both must hold the same samples."
        else:
            fix = "Let the model give one output for each class and the target one label for each sample."
        raise LossMismatch(f"{given}, and expects class indices of shape {list(expected)}. {fix}")
    if target.dtype != torch.int64:
        raise LossMismatch(f"{given}, and expects class indices of type int64. Convert them: target.long().")


def _require_labels_in_range(name: str, target: Tensor, classes: int, ignore_index: int) -> None:
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if not bool(wrong.any()):
        return
    first = wrong.nonzero()[0].tolist()
    label = int(target[tuple(first)])
    sample = f"sample {first[0]}" + (f", position {first[1:]}" if len(first) > 1 else "")
    if label < 0:
        fix = f"Labels to be left out must equal ignore_index ({ignore_index})."
    elif label == classes:
        fix = "Labels that count from 1 need target - 1; otherwise give the model more outputs."
    else:
        fix = f"Give the model {label + 1} outputs or more, or number the classes from 0."
    raise LossMismatch(
        f"{name} was given the label {label} (of {sample}) for {classes} classes, and expects labels from 0 "
        f"to {classes - 1}. {fix}"
    )
