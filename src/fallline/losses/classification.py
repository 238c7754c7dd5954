"""Losses for classes: cross-entropy over several, and binary cross-entropy for yes or no. Neighbour:
`regression`.

Cross-entropy is spelt out instead of calling torch's, because `log_softmax` over a short last dimension and
the vmapped `nll_loss` cost three times as much on a CPU; the tests hold both to the same values and
gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from fallline.errors import InvalidHyperparameter, LossMismatch
from fallline.losses.base import Loss, checked_reduction, spelled
from fallline.losses.checks import check_binary, check_classes, require_same_shape
from fallline.losses.keywords import knows_its_keywords


def _cross_entropy(
    prediction: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float | Tensor,
) -> tuple[Tensor, Tensor | None]:
    if weight is not None:
        weight = weight.to(device=prediction.device, dtype=prediction.dtype)
    if target.is_floating_point():
        return _against_probabilities(prediction, target, weight, label_smoothing)
    return _against_indices(prediction, target, weight, ignore_index, label_smoothing)


def _shifted(prediction: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """Logits minus their maximum, and the logarithm of the sum of their exponentials, which is then at most
    log C.

    The maximum is a constant to the gradient: it cancels between the two.
    """
    shifted = prediction - prediction.detach().amax(dimension, keepdim=True)
    return shifted, shifted.exp().sum(dimension).log()


def _smooths(label_smoothing: float | Tensor) -> bool:
    return isinstance(label_smoothing, Tensor) or label_smoothing != 0


def _against_indices(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float | Tensor,
) -> tuple[Tensor, Tensor]:
    dimension = min(1, prediction.ndim - 1)
    if prediction.ndim != target.ndim + 1:
        check_classes("cross_entropy", prediction, target)  # says what is wrong; shapes are static
    kept = target != ignore_index
    index = target * kept  # any class will do for an ignored label: its value is replaced by 0 below
    shifted, normaliser = _shifted(prediction, dimension)
    picked = shifted.gather(dimension, index.unsqueeze(dimension)).squeeze(dimension)
    if weight is None:
        if _smooths(label_smoothing):
            picked = torch.lerp(picked, shifted.mean(dimension), label_smoothing)
        return torch.where(kept, normaliser - picked, 0.0), kept
    weights = weight[index] * kept
    values = weights * (normaliser - picked)
    if _smooths(label_smoothing):
        along = weight.reshape(-1, *[1] * (prediction.ndim - 1 - dimension))
        spread = weight.sum() * normaliser - (along * shifted).sum(dimension)
        values = (1 - label_smoothing) * values + label_smoothing / shifted.shape[dimension] * spread
    return torch.where(kept, values, 0.0), weights


def _against_probabilities(
    prediction: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float | Tensor
) -> tuple[Tensor, None]:
    require_same_shape("cross_entropy", prediction, target)
    dimension = min(1, prediction.ndim - 1)
    shifted, normaliser = _shifted(prediction, dimension)
    if _smooths(label_smoothing):
        target = target * (1 - label_smoothing) + label_smoothing / shifted.shape[dimension]
    if weight is not None:
        target = target * weight.reshape(-1, *[1] * (prediction.ndim - 1 - dimension))
    return (target * (normaliser.unsqueeze(dimension) - shifted)).sum(dimension), None


@knows_its_keywords
def cross_entropy(
    *,
    weight: Tensor | Sequence[float] | None = None,
    ignore_index: int = -100,
    label_smoothing: float | Tensor = 0.0,
    reduction: str = "mean",
) -> Loss:
    """The cross-entropy between logits z and classes: −log softmax(z)[y] = log Σ_c exp(z_c) − z_y.

    With class weights w and label smoothing ε over C classes, a sample has the value
    (1 − ε)·w_y·(−log p_y) + (ε/C)·Σ_c w_c·(−log p_c), and the mean divides by Σ w_y over the labels that are
    not ignored. Class probabilities q as target give −Σ_c w_c·q_c·log p_c, and their mean divides by their
    number.

    Prediction: logits [N, C] or [N, C, d1, …], without a softmax. Target: class indices [N] or [N, d1, …] of
    type int64, or probabilities of the prediction's shape and type. Equal to `torch.nn.CrossEntropyLoss`,
    except where every label is ignored: 0 with a zero gradient here, NaN there.

    Args:
        weight: one number ≥ 0 for each class, shape [C].
        ignore_index: the label of those samples that count for nothing.
        label_smoothing: ε from 0 to 1; a number or a 0-dimensional tensor.
        reduction: "mean" or "sum".

    Raises:
        InvalidHyperparameter: for weights below 0, an ε outside [0, 1], an `ignore_index` that is no whole
            number.
        LossMismatch: when called with shapes that cannot be compared.

    Source: label smoothing, C. Szegedy et al., "Rethinking the Inception architecture", arXiv 1512.00567.

    >>> cross_entropy()(torch.tensor([[0.0, 0.0], [0.0, 100.0]]), torch.tensor([0, 1]))
    tensor(0.3466)
    """
    given: dict[str, object] = {}
    if weight is not None:
        weight = _class_weights(weight)
        given["weight"] = weight.tolist()
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise InvalidHyperparameter(
            f"cross_entropy was given ignore_index={ignore_index!r}, and expects a whole number."
        )
    if not isinstance(label_smoothing, Tensor):
        _require_fraction("cross_entropy", "label_smoothing", label_smoothing)
    given |= {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    defaults = {"weight": None, "ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean"}
    return Loss(
        name="cross_entropy",
        kind="classification",
        terms=partial(_cross_entropy, weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing),
        arguments=given,
        reduction=checked_reduction(reduction),
        validate=partial(check_classes, "cross_entropy", weight=weight, ignore_index=ignore_index),
        source=partial(
            spelled,
            "torch.nn.CrossEntropyLoss",
            {**given, "weight": weight, "reduction": reduction},
            defaults,
        ),
    )


def _class_weights(weight: Tensor | Sequence[float]) -> Tensor:
    tensor = weight.detach() if isinstance(weight, Tensor) else torch.tensor(weight, dtype=torch.get_default_dtype())
    if tensor.ndim != 1 or not bool((tensor >= 0).all()) or not bool(tensor.isfinite().all()):
        raise InvalidHyperparameter(
            f"cross_entropy was given weight={tensor.tolist()}, and expects one finite number ≥ 0 for each class."
        )
    return tensor


def _require_fraction(loss: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InvalidHyperparameter(f"{loss} was given {name}={value!r}, and expects a number from 0 to 1.")


def _binary_cross_entropy(
    prediction: Tensor, target: Tensor, *, weight: Tensor | None, pos_weight: Tensor | None
) -> tuple[Tensor, None]:
    require_same_shape("binary_cross_entropy_with_logits", prediction, target)
    # −log(1 − σ(z)) = z − log σ(z), so that both parts need only log σ(z), which neither over- nor
    # underflows.
    log_likelihood = functional.logsigmoid(prediction)
    if pos_weight is not None:
        log_likelihood = log_likelihood * (1 + (pos_weight.to(prediction) - 1) * target)
    values = (1 - target) * prediction - log_likelihood
    if weight is not None:
        values = values * weight.to(prediction)
        if values.shape != prediction.shape:
            raise LossMismatch(
                f"binary_cross_entropy_with_logits was given a weight of shape {list(weight.shape)} that "
                f"does not broadcast to the prediction's shape {list(prediction.shape)}."
            )
    return values, None


@knows_its_keywords
def binary_cross_entropy_with_logits(
    *,
    weight: Tensor | float | None = None,
    pos_weight: Tensor | float | None = None,
    reduction: str = "mean",
) -> Loss:
    """The cross-entropy of yes or no for a logit z and a target y in [0, 1]: −y·log σ(z)·p − (1 − y)·log(1 −
    σ(z)).

    σ is the logistic function and p the `pos_weight`. Prediction and target have equal shapes [N, …] and
    types; nothing is broadcast. Equal to `torch.nn.BCEWithLogitsLoss`.

    Args:
        weight: a factor for each element that broadcasts to the prediction; the mean still divides by the
            number of elements.
        pos_weight: how many times a yes counts; > 1 for rare positives. One number, or one for each output.
        reduction: "mean" or "sum".

    Raises:
        InvalidHyperparameter: for weights below 0 or an unknown `reduction`.
        LossMismatch: when called with shapes that differ.

    >>> binary_cross_entropy_with_logits()(torch.tensor([[0.0], [200.0]]), torch.tensor([[1.0], [1.0]]))
    tensor(0.3466)
    """
    weight, pos_weight = _factor("weight", weight), _factor("pos_weight", pos_weight)
    given = {"weight": weight, "pos_weight": pos_weight}
    name = "binary_cross_entropy_with_logits"
    return Loss(
        name=name,
        kind="binary",
        terms=partial(_binary_cross_entropy, weight=weight, pos_weight=pos_weight),
        arguments={key: value.tolist() for key, value in given.items() if value is not None},
        reduction=checked_reduction(reduction),
        validate=partial(check_binary, name, pos_weight=pos_weight),
        source=partial(
            spelled,
            "torch.nn.BCEWithLogitsLoss",
            {**given, "reduction": reduction},
            {"weight": None, "pos_weight": None, "reduction": "mean"},
        ),
    )


def _factor(name: str, value: Tensor | float | None) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise InvalidHyperparameter(
            f"binary_cross_entropy_with_logits was given {name}={value!r}, and expects a finite number ≥ 0 or a tensor."
        )
    return torch.tensor(float(value))
