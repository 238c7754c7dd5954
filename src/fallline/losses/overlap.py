"""Losses for segmentation: how much the predicted region and the true one overlap, image by image.

Dice, Jaccard and Tversky compare sums over an image's pixels; Lovász is the convex extension of the Jaccard index.
Neighbours: `binary` and `classification` judge pixel by pixel; a sum of both kinds, `cross_entropy() + dice()`, is
what most segmentation models are trained with.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor
from torch.nn import functional

from fallline.errors import InvalidHyperparameter, LossMismatch
from fallline.losses.arguments import number, reduced
from fallline.losses.base import Loss, Number, Numbers, Prediction, Target, loss_maker
from fallline.losses.info import Invalid, LossInfo

# Truth and kept pixels, [N, regions, pixels]: one region in the form for yes or no, one for each class else.
Regions: TypeAlias = tuple[Tensor, Tensor]


def _of_classes(name: str, prediction: Tensor, target: Tensor) -> bool:
    """Whether the target holds class indices; else it holds yes or no for each element of the prediction. Static.

    Raises:
        LossMismatch: if it is neither.
    """
    if prediction.shape == target.shape and prediction.ndim > 0:
        return False
    if prediction.ndim > 1 and target.shape == (prediction.shape[0], *prediction.shape[2:]):
        if prediction.shape[1] > 1 and not target.is_floating_point() and target.dtype != torch.bool:
            return True
        fix = "Give the target a second dimension: target.unsqueeze(1)."
        if prediction.shape[1] > 1:
            fix = "Class indices are of type int64: target.long()."
    else:
        fix = "Let the target have the prediction's shape, or its shape without dimension 1."
    raise LossMismatch(
        f"{name} was given a prediction of shape {list(prediction.shape)} and a target of shape {list(target.shape)} "
        f"and type {target.dtype}, and expects logits [N, …] and 0 or 1 of the same shape, or logits [N, C, …] with "
        f"C > 1 and class indices [N, …]. {fix}"
    )


def _regions(prediction: Tensor, target: Tensor, of_classes: bool, ignore_index: int) -> Regions:
    """What is true of each pixel, 1 or 0, and whether it is kept; ignored pixels are in no region."""
    target = target.reshape(target.shape[0], 1, -1)
    kept = target != ignore_index
    if not of_classes:
        return target.to(prediction.dtype) * kept, kept.to(prediction.dtype)
    flat = prediction.reshape(*prediction.shape[:2], -1)
    counts = kept.to(prediction.dtype)
    # An ignored pixel writes a 0 to class 0. A label out of range is an error here, and would be in no region if
    # labels were compared with each class.
    return torch.zeros_like(flat).scatter(1, target.long() * kept, counts), counts


def _averaged(values: Tensor, truth: Tensor, of_classes: bool, classes: str) -> Tensor:
    """One value for each image, of the values of its regions, [N, regions]: their mean, absent classes left out."""
    if not of_classes or classes == "all":
        return values.mean(1)
    present = (truth > 0).any(-1).to(values.dtype)
    return (values * present).sum(1) / present.sum(1).clamp(min=1)


def _counted(kept: Tensor) -> Tensor:
    """Which images have a pixel that is not ignored: those that the mean is over."""
    return (kept > 0).any(-1).any(-1)


def _overlap(
    prediction: Tensor,
    target: Tensor,
    numbers: Numbers,
    *,
    name: str,
    hits: float,
    squared: bool,
    classes: str,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """(α·FP + β·FN) / (h·TP + α·FP + β·FN + s), which is 1 − (h·TP + s) / (h·TP + α·FP + β·FN + s).

    Dice has h = 2 and α = β = 1, Jaccard and Tversky have h = 1. Sums of the errors themselves keep their digits where
    nearly everything is right.
    """
    of_classes = _of_classes(name, prediction, target)
    logits = _wide(prediction)
    truth, kept = _regions(logits, target, of_classes, ignore_index)
    probability = (logits.softmax(1) if of_classes else logits.sigmoid()).reshape(truth.shape) * kept
    right = (probability * truth).sum(-1)
    wrong = (probability * ((probability if squared else 1) - truth)).sum(-1)
    missed = (truth * ((truth if squared else 1) - probability)).sum(-1)
    errors = numbers.get("alpha", 1.0) * wrong + numbers.get("beta", 1.0) * missed
    whole = hits * right + errors + numbers["smooth"]
    # The whole is 0 only where nothing is predicted, nothing is true and s = 0: then nothing is wrong either.
    least = torch.finfo(whole.dtype).tiny * 2**20
    values = errors / torch.where(whole > least, whole, least)
    return _averaged(values, truth, of_classes, classes).to(prediction.dtype), _counted(kept)


def _lovasz(
    prediction: Tensor, target: Tensor, numbers: Numbers, *, classes: str, ignore_index: int
) -> tuple[Tensor, Tensor]:
    of_classes = _of_classes("lovasz", prediction, target)
    logits = _wide(prediction)
    truth, kept = _regions(logits, target, of_classes, ignore_index)
    if of_classes:
        errors = (truth - logits.softmax(1).reshape(truth.shape)).abs()
    else:
        errors = functional.relu(1 - logits.reshape(truth.shape) * (2 * truth - 1))
    ordered, order = torch.sort(errors * kept, dim=-1, descending=True, stable=True)
    steps = _steps((truth > 0.5).gather(-1, order), ordered.dtype)
    values = (ordered * steps).sum(-1)
    return _averaged(values, truth, of_classes, classes).to(prediction.dtype), _counted(kept)


def _wide(prediction: Tensor) -> Tensor:
    """In float32 at least: in half precision the sums over an image's pixels would overflow or lose them."""
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32))


def _steps(yes: Tensor, dtype: torch.dtype) -> Tensor:
    """By how much the Jaccard loss grows with each further pixel that is wrong, in order; [..., pixels].

    After k pixels the loss is 1 − I/U, with I the true pixels that are left and U the true ones and the wrong others.
    A true pixel takes one from I: 1/U. Another adds one to U: I/(U − 1) − I/U = I/(U·(U − 1)). Spelt out like this no
    difference of nearly equal numbers is lost in float32, where images have millions of pixels. From U = 0, where
    nothing is true, to U = 1 the first wrong pixel costs all.
    """
    true = yes.sum(-1, keepdim=True)
    left, union = true - yes.cumsum(-1), true + (~yes).cumsum(-1)
    size = union.to(dtype)
    steps = torch.where(yes, 1 / size, left.to(dtype) / (size * (size - 1).clamp(min=1)))
    return torch.where(union == 1, 1.0, steps)


def _choices(name: str, classes: str, ignore_index: int) -> dict[str, Any]:
    if classes not in ("present", "all"):
        raise InvalidHyperparameter(f"{name} was given classes={classes!r}, and expects 'present' or 'all'.")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise InvalidHyperparameter(f"{name} was given ignore_index={ignore_index!r}, and expects a whole number.")
    return {"classes": classes, "ignore_index": ignore_index}


_SHAPES = ("[N, …] or [N, C, …]", "[N, …]")


@loss_maker
def dice(
    *,
    smooth: Number = 1.0,
    squared: bool = False,
    classes: str = "present",
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Loss:
    """The Dice loss of an image, 1 − (2·Σ p·y + s) / (Σ p + Σ y + s), over its pixels with probabilities p and truth y.

    It has two forms, told apart by shape. Prediction: logits [N, …], one for each pixel, with target 0 or 1 of the same
    shape; p = σ(z), and all elements of an image are one region. Or prediction: logits [N, C, …] with class indices
    [N, …] of an integer type as target; p is the softmax over the C classes, each class is a region, and an image's
    value is the mean over classes. For several masks that are independent of each other, make each an image of its own:
    `prediction.flatten(0, 1)`.

    A value belongs to an image, [N], and the mean is over the images that have a pixel which is not ignored. Where the
    mask is empty and so is the prediction, the loss is 0; where only the mask is empty, it tends to 1 with the number
    of pixels that are predicted.

    Args:
        smooth: s ≥ 0 in pixels: as many, predicted where the mask is empty, have the loss ½. 0 is the index itself, and
            has no gradient there.
        squared: squares in the denominator, Σ p² + Σ y², as in the paper.
        classes: "present": the mean is over the classes that occur in the image's target; "all": over all C.
        ignore_index: the label of those pixels that count for nothing, in both forms.
        reduction: "mean" over the images, "sum" or "none".

    Raises:
        InvalidHyperparameter: for a `smooth` below 0, unknown `classes` or `reduction`, an `ignore_index` that is no
            whole number.
        LossMismatch: when called with shapes and types of neither form.

    Source: F. Milletari, N. Navab and S.-A. Ahmadi, "V-Net", 3DV 2016, arXiv 1606.04797.

    >>> dice(smooth=0.0)(torch.tensor([[100.0, 100.0, -100.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    tensor(0.3333)
    """
    if not isinstance(squared, bool):
        raise InvalidHyperparameter(f"dice was given squared={squared!r}, and expects True or False.")
    chosen = _choices("dice", classes, ignore_index)
    return Loss(
        name="dice",
        kind="other",
        terms=partial(_overlap, name="dice", hits=2.0, squared=squared, **chosen),
        prediction=Prediction.LOGITS,
        target=Target.CLASSES_OR_YES_NO,
        shapes=_SHAPES,
        formula="1 − (2·Σ p·y + s) / (Σ p + Σ y + s)",
        reference="Milletari et al. 2016",
        numbers={"smooth": number("dice", "smooth", smooth, low=0)},
        reduction=reduced("dice", reduction),
    )


@loss_maker
def jaccard(
    *, smooth: Number = 1.0, classes: str = "present", ignore_index: int = -100, reduction: str = "mean"
) -> Loss:
    """The Jaccard loss of an image, 1 − (I + s) / (U + s), with I = Σ p·y and U = Σ p + Σ y − I over its pixels.

    One minus intersection over union. Predictions, targets, empty masks and the mean over classes and images are those
    of `dice`.

    Args:
        smooth: s ≥ 0 in pixels; 0 is the index itself.
        classes: "present": the mean is over the classes that occur in the image's target; "all": over all C.
        ignore_index: the label of those pixels that count for nothing.
        reduction: "mean" over the images, "sum" or "none".

    Raises:
        InvalidHyperparameter: for a `smooth` below 0, unknown `classes` or `reduction`, an `ignore_index` that is no
            whole number.
        LossMismatch: when called with shapes and types of neither form.

    Source: M. A. Rahman and Y. Wang, "Optimizing intersection-over-union in deep neural networks for image
    segmentation", ISVC 2016.

    >>> jaccard(smooth=0.0)(torch.tensor([[100.0, 100.0, -100.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    tensor(0.5000)
    """
    chosen = _choices("jaccard", classes, ignore_index)
    return Loss(
        name="jaccard",
        kind="other",
        terms=partial(_overlap, name="jaccard", hits=1.0, squared=False, **chosen),
        prediction=Prediction.LOGITS,
        target=Target.CLASSES_OR_YES_NO,
        shapes=_SHAPES,
        formula="1 − (I + s) / (U + s), I = Σ p·y, U = Σ p + Σ y − I",
        reference="Rahman & Wang 2016",
        numbers={"smooth": number("jaccard", "smooth", smooth, low=0)},
        reduction=reduced("jaccard", reduction),
    )


@loss_maker
def tversky(
    *,
    alpha: Number = 0.3,
    beta: Number = 0.7,
    smooth: Number = 1.0,
    classes: str = "present",
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Loss:
    """The Tversky loss of an image, 1 − (TP + s) / (TP + α·FP + β·FN + s): Dice with a price for each kind of error.

    TP = Σ p·y, FP = Σ p·(1 − y), FN = Σ (1 − p)·y over the image's pixels. α = β = ½ is the Dice loss with twice its
    `smooth`, α = β = 1 the Jaccard loss. Predictions, targets, empty masks and the mean over classes and images are
    those of `dice`.

    Args:
        alpha: α ≥ 0, the price of a false positive.
        beta: β ≥ 0, the price of a false negative. The paper finds 0.3 and 0.7 best for small lesions.
        smooth: s ≥ 0 in pixels; 0 is the index itself.
        classes: "present": the mean is over the classes that occur in the image's target; "all": over all C.
        ignore_index: the label of those pixels that count for nothing.
        reduction: "mean" over the images, "sum" or "none".

    Raises:
        InvalidHyperparameter: for numbers below 0, unknown `classes` or `reduction`, an `ignore_index` that is no whole
            number.
        LossMismatch: when called with shapes and types of neither form.

    Source: S. S. M. Salehi, D. Erdogmus and A. Gholipour, "Tversky loss function for image segmentation using 3D fully
    convolutional deep networks", MLMI 2017, arXiv 1706.05721.

    >>> tversky(smooth=0.0)(torch.tensor([[100.0, 100.0, -100.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    tensor(0.2308)
    """
    chosen = _choices("tversky", classes, ignore_index)
    return Loss(
        name="tversky",
        kind="other",
        terms=partial(_overlap, name="tversky", hits=1.0, squared=False, **chosen),
        prediction=Prediction.LOGITS,
        target=Target.CLASSES_OR_YES_NO,
        shapes=_SHAPES,
        formula="1 − (TP + s) / (TP + α·FP + β·FN + s)",
        reference="Salehi et al. 2017",
        numbers={
            "alpha": number("tversky", "alpha", alpha, low=0),
            "beta": number("tversky", "beta", beta, low=0),
            "smooth": number("tversky", "smooth", smooth, low=0),
        },
        reduction=reduced("tversky", reduction),
    )


@loss_maker
def lovasz(*, classes: str = "present", ignore_index: int = -100, reduction: str = "mean") -> Loss:
    """The Lovász loss of an image: the convex extension, to errors of any size, of 1 − intersection over union.

    With the pixels' errors sorted, e₁ ≥ e₂ ≥ …, it is Σ_k e_k·(J_k − J_(k−1)), where J_k is the Jaccard loss when
    exactly the first k pixels are wrong. For yes or no the errors are hinges, max(0, 1 − z·t) with t = ±1 (the Lovász
    hinge); for classes they are |1[y = c] − p_c| with the softmax p, class by class (Lovász-Softmax), and the loss of a
    prediction that is certain, right or wrong, is the Jaccard loss itself.

    Predictions, targets and the mean over classes and images are those of `dice`. An empty mask costs its largest
    error. At equal errors the gradient is that of one of the orders: the value does not depend on it.

    Args:
        classes: "present": the mean is over the classes that occur in the image's target; "all": over all C.
        ignore_index: the label of those pixels that count for nothing.
        reduction: "mean" over the images, "sum" or "none".

    Raises:
        InvalidHyperparameter: for unknown `classes` or `reduction`, an `ignore_index` that is no whole number.
        LossMismatch: when called with shapes and types of neither form.

    Source: M. Berman, A. R. Triki and M. B. Blaschko, "The Lovász-Softmax loss", CVPR 2018, arXiv 1705.08790.

    >>> lovasz()(torch.tensor([[2.0, 0.0, -2.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    tensor(0.5000)
    """
    return Loss(
        name="lovasz",
        kind="other",
        terms=partial(_lovasz, **_choices("lovasz", classes, ignore_index)),
        prediction=Prediction.LOGITS,
        target=Target.CLASSES_OR_YES_NO,
        shapes=_SHAPES,
        formula="Σ_k e_k·(J_k − J_(k−1)), errors e₁ ≥ e₂ ≥ …, J_k = 1 − IoU with k pixels wrong",
        reference="Berman et al. 2018",
        reduction=reduced("lovasz", reduction),
    )


def _segmented(generator: Generator) -> tuple[Tensor, Tensor]:
    logits = torch.randn(12, 3, 3, 4, generator=generator, dtype=torch.float64)
    return logits, torch.randint(3, (12, 3, 4), generator=generator)


_INVALID = (
    Invalid({"classes": "some"}, "classes='some'"),
    Invalid({"ignore_index": 1.0}, "ignore_index=1.0"),
    Invalid({"ignore_index": True}, "ignore_index=True"),
)
_SMOOTH = (Invalid({"smooth": -1.0}, "smooth=-1.0"), *_INVALID)

CATALOGUE = (
    LossInfo(
        dice,
        _segmented,
        valid=({}, {"smooth": 0.0, "classes": "all"}, {"squared": True}),
        invalid=(*_SMOOTH, Invalid({"squared": 1}, "squared=1")),
        sweeps={"smooth": (0.0, 5.0)},
        source="F. Milletari, N. Navab and S.-A. Ahmadi, V-Net, 3DV 2016",
    ),
    LossInfo(
        jaccard,
        _segmented,
        valid=({}, {"smooth": 0.0, "classes": "all"}),
        invalid=_SMOOTH,
        sweeps={"smooth": (0.0, 5.0)},
        source="M. A. Rahman and Y. Wang, Optimizing intersection-over-union in deep neural networks, ISVC 2016",
    ),
    LossInfo(
        tversky,
        _segmented,
        valid=({}, {"alpha": 1.0, "beta": 0.0, "smooth": 0.0}),
        invalid=(
            *_SMOOTH,
            Invalid({"alpha": -0.1}, "alpha=-0.1"),
            Invalid({"beta": float("inf")}, "beta=inf"),
        ),
        sweeps={"alpha": (0.1, 1.0), "beta": (0.2, 2.0), "smooth": (0.0, 5.0)},
        source="S. S. M. Salehi, D. Erdogmus and A. Gholipour, Tversky loss function, MLMI 2017",
    ),
    LossInfo(
        lovasz,
        _segmented,
        valid=({}, {"classes": "all"}),
        invalid=_INVALID,
        source="M. Berman, A. R. Triki and M. B. Blaschko, The Lovász-Softmax loss, CVPR 2018",
    ),
)
