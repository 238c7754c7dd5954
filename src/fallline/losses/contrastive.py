"""Contrastive losses: an embedding should be near its positives, and far from the rest of the batch.

A sample's value depends on the batch that it is in, and grows with the batch's size. Neighbours: `embeddings` for pairs
and triplets by themselves, `redundancy` for losses without negatives; `views` says how embeddings are given.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Generator, Tensor
from torch.nn import functional

from fallline.errors import LossMismatch
from fallline.losses.arguments import number, reduced, switch
from fallline.losses.base import Loss, Number, Numbers, Parts, Prediction, Target, loss_maker
from fallline.losses.info import Invalid, LossInfo
from fallline.losses.views import direction, two_views


def _itself(similarity: Tensor) -> Tensor:
    return torch.eye(similarity.shape[0], dtype=torch.bool, device=similarity.device)


def _among_others(similarity: Tensor) -> Tensor:
    """Logits [N, N] without each anchor itself, whose probability becomes 0.

    Finite instead of −∞: in a batch of one sample nothing is left, and −∞ − (−∞) is NaN wherever it is differentiated.
    """
    return similarity.masked_fill(_itself(similarity), torch.finfo(similarity.dtype).min)


def _info_nce(
    prediction: Parts, target: Parts, numbers: Numbers, *, within_views: bool, symmetric: bool, normalize: bool
) -> tuple[Tensor, None]:
    first, second = two_views("info_nce", prediction, target)
    if normalize:
        first, second = direction(first), direction(second)
    across = first @ second.mT

    def surprise(anchors: Tensor, candidates: Tensor) -> Tensor:
        # Against the positive's similarity, so that the positive's own logit is exactly 0 and the value never below.
        positive = candidates.diagonal().unsqueeze(1)
        logits = (candidates - positive) / numbers["temperature"]
        if within_views:
            own = _among_others((anchors @ anchors.mT - positive) / numbers["temperature"])
            logits = torch.cat([logits, own], 1)
        return logits.logsumexp(1)

    if not symmetric:
        return surprise(first, across), None
    return 0.5 * (surprise(first, across) + surprise(second, across.mT)), None


def _supervised_contrastive(
    prediction: Parts, target: Tensor, numbers: Numbers, *, normalize: bool
) -> tuple[Tensor, Tensor]:
    views = _views_of_each("supervised_contrastive", prediction)
    samples, count = views.shape[:2]
    _check_labels(samples, target)
    embeddings = views.flatten(0, 1)
    if normalize:
        embeddings = direction(embeddings)
    labels = target.unsqueeze(1).expand(samples, count).flatten()
    similarity = embeddings @ embeddings.mT
    positive = (labels.unsqueeze(1) == labels) & ~_itself(similarity)
    number_of_positives = positive.sum(1, keepdim=True)
    attraction = torch.where(positive, similarity, 0.0).sum(1, keepdim=True) / number_of_positives.clamp(min=1)
    has_positives = (number_of_positives > 0).squeeze(1)
    logits = _among_others((similarity - attraction) / numbers["temperature"])
    values = torch.where(has_positives, logits.logsumexp(1), 0.0)
    # With several views every anchor has positives, with one view the anchor is the sample.
    return values.reshape(samples, count).mean(1), has_positives.reshape(samples, count)[:, 0]


def _views_of_each(name: str, prediction: Parts) -> Tensor:
    """The embeddings [N, V, D] of V views of N samples."""
    if isinstance(prediction, (tuple, list)) and len({each.shape for each in prediction}) == 1:
        prediction = torch.stack(tuple(prediction), 1)
    elif isinstance(prediction, Tensor) and prediction.ndim == 2:
        prediction = prediction.unsqueeze(1)
    if isinstance(prediction, Tensor) and prediction.ndim == 3:
        return prediction
    given = [list(each.shape) for each in prediction] if isinstance(prediction, (tuple, list)) else prediction.shape
    raise LossMismatch(
        f"{name} was given a prediction of shape {list(given)}, and expects embeddings [N, D], or [N, V, D] of V "
        "views, or a tuple of views [N, D]. Flatten or average what is left: prediction.flatten(2), prediction.mean(3)."
    )


def _check_labels(samples: int, target: Parts) -> None:
    name = "supervised_contrastive"
    if not isinstance(target, Tensor):
        raise LossMismatch(
            f"{name} was given the target {target!r:.80}, and expects a label for each sample. Without labels, take "
            "info_nce(within_views=True)."
        )
    if target.shape != (samples,):
        raise LossMismatch(
            f"{name} was given {samples} samples and a target of shape {list(target.shape)}, and expects one label for "
            f"each sample, of shape [{samples}]. Views share their sample's label; target.flatten() mends [N, 1]."
        )
    if target.is_floating_point():
        raise LossMismatch(
            f"{name} was given a target of type {target.dtype}, and expects whole numbers. If they are labels: "
            "target.long()."
        )


def _siglip(prediction: Parts, target: Parts, numbers: Numbers, *, normalize: bool) -> tuple[Tensor, None]:
    first, second = two_views("siglip", prediction, target)
    if normalize:
        first, second = direction(first), direction(second)
    logits = numbers["logit_scale"] * (first @ second.mT) + numbers["logit_bias"]
    agreeing = torch.where(_itself(logits), logits, -logits)
    return -functional.logsigmoid(agreeing).sum(1), None


@loss_maker
def info_nce(
    *,
    temperature: Number = 0.1,
    symmetric: bool = True,
    within_views: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
) -> Loss:
    """The InfoNCE loss of two views of N samples: which of the N second views belongs to this first view?

    With similarities s(x, y) = x·y/τ of the embeddings' directions, an anchor aᵢ with the positive bᵢ has the value
    ℓ(aᵢ, bᵢ) = log Σ_c exp s(aᵢ, c) − s(aᵢ, bᵢ), where c runs over all N embeddings of the other view. A sample's value
    is the mean of both directions, ½·[ℓ(aᵢ, bᵢ) + ℓ(bᵢ, aᵢ)]: the loss of CLIP. Others are

        info_nce(within_views=True, temperature=0.5)                        NT-Xent of SimCLR: c also runs over
                                                                            the N − 1 other samples of the anchor's view
        info_nce(symmetric=False, normalize=False, temperature=1.0)         van den Oord's, with the predicted and the
                                                                            true representation as first and second view

    Prediction: a tuple of two views [N, D], or one tensor [N, 2, D] or [N, 2·D]. The target is not looked at and may be
    left out. Where all similarities are equal, the value is log N, or log(2N − 1) within views; a batch of one sample
    has no negatives and, across views, the value 0. A zero vector has the cosine 0 with all others, and the gradient 0.

    Args:
        temperature: τ > 0; 0.01 to 0.5 is usual. The smaller, the more only the nearest negatives count.
        symmetric: whether second views are anchors too.
        within_views: whether the anchor's own view holds negatives too.
        normalize: whether embeddings are divided by their lengths.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for arguments outside their range.
        LossMismatch: when called with anything but two views of equal shape.

    Source: A. van den Oord, Y. Li, O. Vinyals, "Representation learning with contrastive predictive coding",
    arXiv 1807.03748; A. Radford et al., "Learning transferable visual models from natural language supervision" (CLIP),
    ICML 2021; T. Chen et al., "A simple framework for contrastive learning of visual representations" (SimCLR),
    ICML 2020.

    >>> info_nce()((torch.eye(4), torch.eye(4)))
    tensor(0.0001)
    >>> info_nce()((torch.eye(4), torch.eye(4).flip(0)))
    tensor(10.0001)
    """
    return Loss(
        name="info_nce",
        kind="other",
        terms=partial(
            _info_nce,
            within_views=switch("info_nce", "within_views", within_views),
            symmetric=switch("info_nce", "symmetric", symmetric),
            normalize=switch("info_nce", "normalize", normalize),
        ),
        prediction=Prediction.EMBEDDINGS,
        target=Target.NOTHING,
        shapes=("two of [N, D]", "any"),
        formula="log Σ_c exp(cos(a, c)/τ) − cos(a, b)/τ",
        reference="van den Oord 2018",
        numbers={"temperature": number("info_nce", "temperature", temperature, above=0)},
        reduction=reduced("info_nce", reduction),
    )


@loss_maker
def supervised_contrastive(*, temperature: Number = 0.1, normalize: bool = True, reduction: str = "mean") -> Loss:
    """The supervised contrastive loss: an embedding should be near all those of the same label.

    With similarities s(x, y) = x·y/τ of the embeddings' directions, the positives P of an anchor (the other embeddings
    of its label) and all other embeddings A, an anchor z has the value −(1/|P|) Σ_{p ∈ P} log[exp s(z, p) / Σ_{a ∈ A}
    exp s(z, a)]: L_out, equation 2 of the paper. A sample's value is the mean over its views.

    Prediction: embeddings [N, D] or, with V views of each sample, [N, V, D] or a tuple of V tensors [N, D]. Target:
    labels [N] of any integer type. An anchor without a positive, alone with its label, counts for nothing: its value is
    0 and the mean does not divide by it, and the loss of a batch of such anchors is 0. The authors' code divides by all
    anchors, and multiplies by τ/base_temperature, which the paper's formula does not have; that is left to the learning
    rate.

    Args:
        temperature: τ > 0; the paper's is 0.1.
        normalize: whether embeddings are divided by their lengths.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for arguments outside their range.
        LossMismatch: when called with other shapes, or with labels that are no whole numbers.

    Source: P. Khosla et al., "Supervised contrastive learning", NeurIPS 2020.

    >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> supervised_contrastive(temperature=1.0)(embeddings, torch.tensor([0, 0, 1, 1]))
    tensor(0.5514)
    >>> supervised_contrastive(temperature=1.0)(embeddings, torch.tensor([0, 1, 0, 1]))
    tensor(1.5514)
    """
    name = "supervised_contrastive"
    return Loss(
        name=name,
        kind="other",
        terms=partial(_supervised_contrastive, normalize=switch(name, "normalize", normalize)),
        prediction=Prediction.EMBEDDINGS,
        target=Target.GROUPS,
        shapes=("[N, D] or [N, V, D]", "[N]"),
        formula="log Σ_a exp(cos(z, a)/τ) − mean_p cos(z, p)/τ",
        reference="Khosla 2020",
        numbers={"temperature": number(name, "temperature", temperature, above=0)},
        reduction=reduced(name, reduction),
    )


@loss_maker
def siglip(
    *, logit_scale: Number = 10.0, logit_bias: Number = -10.0, normalize: bool = True, reduction: str = "mean"
) -> Loss:
    """The sigmoid loss of two views of N samples: is this pair of a first and a second view of the same sample?

    With the cosines of all N² pairs, −(1/N) Σᵢ Σⱼ log σ(zᵢⱼ·(t·cos(xᵢ, yⱼ) + b)), where z is 1 for i = j and −1
    otherwise. A sample's value is the sum over the pairs of its first view.

    Prediction: a tuple of two views [N, D], or one tensor [N, 2, D] or [N, 2·D]. The target is not looked at and may be
    left out. The paper learns t = exp(t′) and b, from t = 10 and b = −10; here they are hyperparameters, and t itself
    is given: it multiplies, where the temperature of `info_nce` divides.

    Args:
        logit_scale: t > 0.
        logit_bias: b; −log(N − 1) are the log-odds of a pair to be of one sample.
        normalize: whether embeddings are divided by their lengths.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for arguments outside their range.
        LossMismatch: when called with anything but two views of equal shape.

    Source: X. Zhai, B. Mustafa, A. Kolesnikov, L. Beyer, "Sigmoid loss for language image pre-training", ICCV 2023.

    >>> siglip()((torch.eye(2), torch.eye(2)))
    tensor(0.6932)
    """
    return Loss(
        name="siglip",
        kind="other",
        terms=partial(_siglip, normalize=switch("siglip", "normalize", normalize)),
        prediction=Prediction.EMBEDDINGS,
        target=Target.NOTHING,
        shapes=("two of [N, D]", "any"),
        formula="−Σ_j log σ(±(t·cos(x, y_j) + b)), + for its own y",
        reference="Zhai 2023",
        numbers={
            "logit_scale": number("siglip", "logit_scale", logit_scale, above=0),
            "logit_bias": number("siglip", "logit_bias", logit_bias),
        },
        reduction=reduced("siglip", reduction),
    )


def _views(generator: Generator) -> tuple[Tensor, Tensor]:
    first = torch.randn(12, 1, 4, generator=generator, dtype=torch.float64)
    second = first + 0.7 * torch.randn(12, 1, 4, generator=generator, dtype=torch.float64)
    return torch.cat([first, second], 1), torch.arange(12)


def _labelled(generator: Generator) -> tuple[Tensor, Tensor]:
    embeddings = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2])
    return embeddings, labels[torch.randperm(12, generator=generator)]


CATALOGUE = (
    LossInfo(
        info_nce,
        _views,
        valid=(
            {},
            {"within_views": True, "temperature": 0.5},
            {"symmetric": False, "normalize": False, "temperature": 1.0},
            {"symmetric": False, "within_views": True},
        ),
        invalid=(
            Invalid({"temperature": 0.0}, "temperature=0.0"),
            Invalid({"temperature": -1}, "temperature=-1"),
            Invalid({"within_views": "both"}, "within_views='both'"),
            Invalid({"symmetric": None}, "symmetric=None"),
            Invalid({"normalize": 1}, "normalize=1"),
        ),
        sweeps={"temperature": (0.1, 0.5)},
        over_batch=True,
        source="A. van den Oord et al., Representation learning with contrastive predictive coding, arXiv 1807.03748",
    ),
    LossInfo(
        supervised_contrastive,
        _labelled,
        valid=({}, {"temperature": 0.5, "normalize": False}),
        invalid=(
            Invalid({"temperature": 0}, "temperature=0"),
            Invalid({"temperature": float("inf")}, "temperature=inf"),
            Invalid({"normalize": 1}, "normalize=1"),
        ),
        sweeps={"temperature": (0.1, 0.5)},
        over_batch=True,
        source="P. Khosla et al., Supervised contrastive learning, NeurIPS 2020",
    ),
    LossInfo(
        siglip,
        _views,
        valid=({}, {"logit_scale": 3.0, "logit_bias": -2.0, "normalize": False}),
        invalid=(
            Invalid({"logit_scale": 0.0}, "logit_scale=0.0"),
            Invalid({"logit_bias": float("nan")}, "logit_bias=nan"),
            Invalid({"normalize": "yes"}, "normalize='yes'"),
        ),
        sweeps={"logit_scale": (5.0, 10.0), "logit_bias": (-10.0, -1.0)},
        over_batch=True,
        source="X. Zhai et al., Sigmoid loss for language image pre-training, ICCV 2023",
    ),
)
