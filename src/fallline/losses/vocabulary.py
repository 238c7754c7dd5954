"""Cross-entropy of a linear classifier, from hidden states and the classifier's weights, without all the logits.

Here are the loss and what it makes of three statistics per token; `vocabulary_tiles` computes those, and
their gradients, tile by tile, and `vocabulary_triton` is its forward on CUDA. Neighbour: `classification`,
for logits that exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Generator, Tensor

from fallline.errors import InvalidHyperparameter, LossMismatch
from fallline.losses.arguments import number, reduced
from fallline.losses.base import Loss, Number, Numbers, Parts, Prediction, Target, loss_maker
from fallline.losses.classification import class_weights, label_to_ignore
from fallline.losses.info import Invalid, LossInfo
from fallline.losses.vocabulary_tiles import outright, statistics, tile_by_tile_pays, working

NAME = "linear_cross_entropy"


def _terms(
    prediction: Parts,
    target: Tensor,
    numbers: Numbers,
    *,
    class_weights: tuple[float, ...] | None,
    ignore_index: int,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    hidden, weight, bias = _checked(prediction, target, class_weights)
    shape, tokens, classes = target.shape, target.numel(), weight.shape[0]
    hidden, target = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1).long()
    given = torch.promote_types(hidden.dtype, weight.dtype)
    if given != torch.float64 and torch.is_autocast_enabled(hidden.device.type):
        given = torch.float32
        chosen = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(chosen), weight.to(chosen)
        bias = None if bias is None else bias.to(chosen)
    kept = target != ignore_index
    index = target * kept  # any class will do for an ignored label: its value is replaced by 0 below
    smoothing, z_loss, softcap = numbers["label_smoothing"], numbers["z_loss"], numbers.get("softcap")
    smooths = isinstance(smoothing, Tensor) or smoothing != 0
    dtype = working(hidden, weight)
    # Not new_ones, which under vmap makes one for each trial.
    weights = torch.ones(classes, dtype=dtype, device=hidden.device)
    if class_weights is not None:
        weights = torch.tensor(class_weights, dtype=dtype, device=hidden.device)
    if tokens == 0 or (chunk is None and not tile_by_tile_pays(tokens, classes)):
        surprise, spread, normaliser = outright(hidden, weight, bias, index, weights, softcap, smooths)
    else:
        limit = None if chunk is None else chunk * classes
        surprise, spread, normaliser = statistics(hidden, weight, bias, index, weights, softcap, smooths, limit)

    penalty = z_loss * normaliser.square() if isinstance(z_loss, Tensor) or z_loss != 0 else None
    values = (1 - smoothing) * surprise if smooths else surprise
    if penalty is not None:
        values = values + penalty
    counted = kept
    if class_weights is not None:
        counted = weights[index] * kept
        values = counted * values
        counted = counted.to(given)
    if smooths:
        values = values + smoothing / classes * spread
    values = torch.where(kept, values, 0.0).to(given)
    return values.reshape(shape), counted.reshape(shape)


def _checked(
    prediction: Parts, target: Tensor, class_weights: tuple[float, ...] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if not isinstance(prediction, (tuple, list)) or len(prediction) not in (2, 3):
        given = (
            f"a tensor of shape {list(prediction.shape)}" if isinstance(prediction, Tensor) else f"{prediction!r:.80}"
        )
        raise LossMismatch(
            f"{NAME} was given {given}, and expects (hidden states [N, …, D], classifier weights [V, D]) or those two "
            "and a bias [V]. Let the model return its last hidden states and its classifier's weight; for logits that "
            "exist there is cross_entropy."
        )
    hidden, weight, bias = prediction if len(prediction) == 3 else (*prediction, None)
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise LossMismatch(
            f"{NAME} was given hidden states of shape {list(hidden.shape)} and classifier weights of shape "
            f"{list(weight.shape)}, and expects [N, …, D] and [V, D], as torch.nn.Linear(D, V) holds it."
        )
    if target.is_floating_point() or target.shape != hidden.shape[:-1]:
        raise LossMismatch(
            f"{NAME} was given hidden states of shape {list(hidden.shape)} and a target of shape "
            f"{list(target.shape)} and type {target.dtype}, and expects a class index for each hidden state, "
            f"{list(hidden.shape[:-1])} of type torch.int64. For class probabilities there is cross_entropy, of logits."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise LossMismatch(
            f"{NAME} was given a bias of shape {list(bias.shape)} and classifier weights of shape "
            f"{list(weight.shape)}, and expects a bias of shape {list(weight.shape[:1])}."
        )
    if class_weights is not None and len(class_weights) != weight.shape[0]:
        raise LossMismatch(
            f"{NAME} was made with {len(class_weights)} class weights and was given a classifier of "
            f"{weight.shape[0]} classes. Give one weight for each class."
        )
    return hidden, weight, bias


def _in_order(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> tuple[Parts, Parts]:
    return (hidden, weight) if bias is None else (hidden, weight, bias), target


@loss_maker
def linear_cross_entropy(
    *,
    weight: Tensor | Sequence[float] | None = None,
    ignore_index: int = -100,
    label_smoothing: Number = 0.0,
    z_loss: Number = 0.0,
    softcap: Number | None = None,
    chunk: int | Literal["auto"] = "auto",
    reduction: str = "mean",
) -> Loss:
    """The cross-entropy of the logits z = W·h + b, of which only a tile exists at any time: log Σ_c exp(z_c) − z_y.

    Training a language model this way takes no memory in proportion to tokens times vocabulary. The forward pass keeps
    two numbers per token; the backward pass computes the logits again, tile by tile, and no gradient that nobody asks
    for. It works under `torch.vmap`, `torch.func.grad`, `torch.compile` and for second derivatives
    in reverse mode; what is computed in tiles has no forward-mode derivatives (`torch.func.jvp`, `hessian`).

    With class weights w, label smoothing ε over V classes and z-loss ζ, a token has the value
    (1 − ε)·w_y·(−log p_y) + (ε/V)·Σ_c w_c·(−log p_c) + ζ·w_y·(log Σ_c exp(z_c))², and the mean divides by Σ w_y over
    the tokens that are not ignored (w = 1 without class weights). An ignored token adds nothing, to the z-loss neither;
    where all are ignored, the loss is 0 with a zero gradient. A soft cap κ replaces z by κ·tanh(z/κ), in all of this.

    Prediction: (hidden states [N, …, D], classifier weight [V, D]), or those and a bias [V]. Target: class indices
    [N, …]. Also takes them in the order of `torch.nn.functional.linear_cross_entropy`: `loss(hidden, weight, target)`
    and `loss(hidden, weight, target, bias)`. Products of half-precision numbers are summed in float32, and their loss
    has their type; under `torch.autocast`, hidden states and classifier are multiplied in its type, and the loss is a
    float32 number.

    Args:
        weight: one number for each class, shape [V], usually ≥ 0; not the classifier's weight, which is part of the
            prediction.
        ignore_index: the label of those tokens that count for nothing.
        label_smoothing: ε from 0 to 1; a number or a 0-dimensional tensor.
        z_loss: ζ ≥ 0, often 1e-4, which keeps the normaliser log Σ exp(z) near 0; a number or a 0-dimensional tensor.
        softcap: κ > 0, which logits cannot exceed; 30 in Gemma 2; None for no cap. A number or a 0-dimensional tensor.
        chunk: how many logits may exist at once, in tokens: `chunk` · V of them (their tile may have more tokens and
            fewer classes). "auto" takes 2 million logits on a CPU and 16 million on a GPU, and all at once where there
            are no more than 4 million.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for a number outside its range, or an unknown `reduction`.
        LossMismatch: when called with shapes that do not fit together, or with class probabilities.
        RuntimeError: (torch's, on a CPU) for a label outside 0 … V − 1 that is not `ignore_index`.

    Unlike `torch.nn.LinearCrossEntropyLoss`, this has no parameters of its own; the chunked form of torch's has no
    label smoothing, no second derivatives and no `torch.func`, and its mean is NaN where every label is ignored.

    Source: E. Wijmans et al., "Cut your losses in large-vocabulary language models", arXiv 2411.09009; z-loss:
    A. Chowdhery et al., "PaLM", arXiv 2204.02311; soft cap: "Gemma 2", arXiv 2408.00118.

    >>> hidden, classifier = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0], [2.0]])
    >>> linear_cross_entropy()((hidden, classifier), torch.tensor([2, 0]))
    tensor(2.2753)
    """
    numbers = {
        "label_smoothing": number(NAME, "label_smoothing", label_smoothing, low=0, high=1),
        "z_loss": number(NAME, "z_loss", z_loss, low=0),
    }
    if softcap is not None:
        numbers["softcap"] = number(NAME, "softcap", softcap, above=0)
    return Loss(
        name=NAME,
        kind="other",
        terms=partial(
            _terms,
            class_weights=class_weights(NAME, weight),
            ignore_index=label_to_ignore(NAME, ignore_index),
            chunk=_chunk(chunk),
        ),
        prediction=Prediction.HIDDEN_STATES,
        target=Target.CLASSES,
        shapes=("([N, …, D], [V, D]) or ([N, …, D], [V, D], [V])", "[N, …]"),
        formula="log Σ_c exp(z_c) − z_y, z = W·h + b",
        reference="Wijmans 2024",
        numbers=numbers,
        reduction=reduced(NAME, reduction),
        arrange=_in_order,
    )


def _chunk(chunk: object) -> int | None:
    if chunk == "auto":
        return None
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise InvalidHyperparameter(f"{NAME} was given chunk={chunk!r}, and expects a number of tokens ≥ 1 or 'auto'.")
    return chunk


def _labelled(generator: Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    hidden = torch.randn(14, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    bias = torch.randn(12, generator=generator, dtype=torch.float64)
    return (hidden, weight, bias), torch.arange(14)[torch.randperm(14, generator=generator)] % 12


_WEIGHTS = (0.5, 1.0, 2.0, 3.0, 0.7, 1.3, 0.2, 1.0, 1.1, 0.9, 2.5, 0.4)

CATALOGUE = (
    LossInfo(
        linear_cross_entropy,
        _labelled,
        valid=(
            {"softcap": 2.0, "chunk": 4},
            {},
            {"chunk": 3},
            {"weight": _WEIGHTS, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 2.0, "chunk": 2},
            {"weight": _WEIGHTS, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 2.0},
            {"ignore_index": 2, "z_loss": 0.1},
        ),
        invalid=(
            Invalid({"label_smoothing": 1.5}, "label_smoothing=1.5"),
            Invalid({"z_loss": -1.0}, "z_loss=-1.0"),
            Invalid({"softcap": 0.0}, "softcap=0.0"),
            Invalid({"chunk": 0}, "chunk=0"),
            Invalid({"chunk": "small"}, "chunk='small'"),
            Invalid({"weight": [float("inf"), 1.0]}, "weight"),
            Invalid({"ignore_index": 1.0}, "ignore_index=1.0"),
        ),
        sweeps={"label_smoothing": (0.0, 0.3), "z_loss": (0.0, 0.1), "softcap": (1.0, 4.0)},
        source="E. Wijmans et al., Cut your losses in large-vocabulary language models, arXiv 2411.09009",
    ),
)
