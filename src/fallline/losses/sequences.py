"""Losses for sequences of labels that nobody has aligned with the frames of the prediction.

Neighbours: `classification` for one label per sample or per frame, `linear` for classifiers with many classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from fallline.errors import InvalidHyperparameter, LossMismatch
from fallline.losses.arguments import reduced
from fallline.losses.base import Loss, Numbers, Parts, Prediction, Target, loss_maker
from fallline.losses.info import Invalid, LossInfo

# The logarithm of "impossible" inside the recursion. −∞ would make NaN gradients (−∞ − −∞); this is so low that its
# exponential beside any other is 0 in every floating-point type, and so high that sums over all frames are finite.
_IMPOSSIBLE = -1e30


def _ctc(
    prediction: Parts, target: Parts, numbers: Numbers, *, blank: int, zero_infinity: bool, by_length: bool
) -> tuple[Tensor, None]:
    log_probs, targets, input_lengths, target_lengths = _batch(*_pair(prediction), *_pair(target), blank)
    values = _likelihood_of_any_alignment(log_probs, targets, input_lengths, target_lengths, blank)
    impossible = values < 0.5 * _IMPOSSIBLE
    values = torch.where(impossible, 0.0 if zero_infinity else float("inf"), -values)
    if by_length:
        values = values / target_lengths.clamp(min=1)
    first = _pair(prediction)[0]
    values = values.to(first.dtype)
    return (values.squeeze(0) if first.ndim == 2 else values), None


def _pair(given: Parts) -> tuple[Any, Any]:
    """A tensor and the lengths in it, None where all of it counts."""
    if isinstance(given, Tensor):
        return given, None
    if isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[0], Tensor):
        return given[0], given[1]
    raise LossMismatch(
        f"ctc was given {given!r:.80}, and expects a tensor, or a tuple of a tensor and the lengths of its sequences."
    )


def _batch(
    log_probs: Tensor, input_lengths: Any, targets: Tensor, target_lengths: Any, blank: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Log-probabilities [N, T, C], labels [N, S] with the blank after their ends, and lengths [N]."""
    if log_probs.ndim not in (2, 3) or not log_probs.is_floating_point():
        raise LossMismatch(
            f"ctc was given a prediction of shape {list(log_probs.shape)} and type {log_probs.dtype}, and expects "
            "log-probabilities [N, T, C] (sample, frame, class): logits.log_softmax(-1)."
        )
    if targets.is_floating_point() or targets.ndim not in (1, 2):
        raise LossMismatch(
            f"ctc was given a target of shape {list(targets.shape)} and type {targets.dtype}, and expects class "
            "indices [N, S] of type int64, with −1 after the end of each sequence."
        )
    if log_probs.ndim == 2 and targets.ndim == 1:
        log_probs, targets = log_probs.unsqueeze(0), targets.unsqueeze(0)
    if log_probs.ndim == 2:
        raise LossMismatch(
            f"ctc was given a prediction of shape {list(log_probs.shape)}, one sample, and a target of shape "
            f"{list(targets.shape)}. Give log-probabilities [N, T, C] with labels [N, S], or [T, C] with [S]."
        )
    samples, frames, classes = log_probs.shape
    if blank >= classes:
        raise LossMismatch(
            f"ctc was given blank={blank} and a prediction of shape {list(log_probs.shape)}, whose classes are 0 to "
            f"{classes - 1}. Let the model's last layer give one output more, for the blank."
        )
    if input_lengths is not None:
        input_lengths = _lengths("input_lengths", input_lengths, samples, frames, log_probs.device)
    if targets.ndim == 1:
        targets, target_lengths = _rows(targets, target_lengths, samples)
    if targets.shape[0] != samples:
        raise LossMismatch(
            f"ctc was given a prediction of {samples} samples, shape {list(log_probs.shape)}, and a target of shape "
            f"{list(targets.shape)}, and expects log-probabilities [N, T, C] and labels [N, S]. Where the frames come "
            "first, as torch has them, give prediction.transpose(0, 1)."
        )
    if target_lengths is None:
        target_lengths = (targets >= 0).cumprod(1).sum(1)
        if _readable(targets) and ((targets[:, :-1] < 0) & (targets[:, 1:] >= 0)).any():
            raise LossMismatch(
                "ctc was given labels after the −1 that ends their sequence, and expects −1 only at the end. Move the "
                "labels together, or give a tuple (targets, target_lengths)."
            )
    else:
        target_lengths = _lengths("target_lengths", target_lengths, samples, targets.shape[1], log_probs.device)
    counts = torch.arange(targets.shape[1], device=targets.device) < target_lengths.unsqueeze(1)
    if _readable(targets, target_lengths):
        wrong = counts & ((targets < 0) | (targets >= classes) | (targets == blank))
        if wrong.any():
            raise LossMismatch(
                f"ctc was given the label {targets[wrong][0].item()}, and expects labels from 0 to {classes - 1} other "
                f"than the blank, {blank}. Number the classes past it, and end shorter sequences with −1."
            )
    return log_probs, torch.where(counts, targets, blank).long(), input_lengths, target_lengths


def _lengths(name: str, given: Any, samples: int, longest: int, device: torch.device) -> Tensor:
    lengths = (given if isinstance(given, Tensor) else torch.tensor(given, device=device)).reshape(-1).to(device)
    if lengths.shape[0] != samples or lengths.is_floating_point():
        raise LossMismatch(
            f"ctc was given {name} of shape {list(lengths.shape)} and type {lengths.dtype}, and expects one whole "
            f"number for each of the {samples} samples."
        )
    if _readable(lengths) and samples and not 0 <= int(lengths.min()) <= int(lengths.max()) <= longest:
        raise LossMismatch(
            f"ctc was given {name} from {int(lengths.min())} to {int(lengths.max())}, and expects numbers from 0 to "
            f"{longest}, the length of the tensor."
        )
    return lengths


def _readable(*tensors: Tensor) -> bool:
    """Whether values may be looked at: not inside vmap or compile, nor where a device would have to be waited for."""
    return not torch.compiler.is_compiling() and all(
        tensor.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        for tensor in tensors
    )


def _rows(targets: Tensor, given: Any, samples: int) -> tuple[Tensor, Tensor]:
    """Labels that stand one sequence after the other in one dimension, as [N, S]."""
    if given is None:
        raise LossMismatch(
            f"ctc was given targets of shape {list(targets.shape)}, one sequence after the other, without their "
            "lengths. Give a tuple (targets, target_lengths), or targets [N, S] with −1 after each end."
        )
    lengths = _lengths("target_lengths", given, samples, targets.shape[0], targets.device)
    longest = targets.shape[0]  # no shape may depend on data that vmap or compile hide
    if _readable(lengths):
        if int(lengths.sum()) != longest:
            raise LossMismatch(
                f"ctc was given {longest} labels one after the other and target_lengths with the sum "
                f"{int(lengths.sum())}, and expects as many labels as their lengths say."
            )
        longest = int(lengths.max()) if samples else 0
    start = lengths.cumsum(0) - lengths
    index = start.unsqueeze(1) + torch.arange(longest, device=targets.device)
    rows = index.clamp(max=max(targets.shape[0] - 1, 0))
    return targets[rows], lengths


def _likelihood_of_any_alignment(
    log_probs: Tensor, targets: Tensor, input_lengths: Tensor | None, target_lengths: Tensor, blank: int
) -> Tensor:
    """log p(labels), [N], by the forward recursion over the states blank, y1, blank, y2, …, blank."""
    blanks = torch.full_like(targets, blank)
    states = functional.pad(torch.stack([blanks, targets], 2).flatten(1), (0, 1), value=blank)
    # From a label to the next one without a blank between them: not where they are the same label.
    barred = functional.pad((states[:, 2:] == states[:, :-2]) * _IMPOSSIBLE, (min(2, states.shape[1]), 0))
    precise = log_probs.float() if log_probs.dtype in (torch.float16, torch.bfloat16) else log_probs
    emitted = precise.clamp(min=_IMPOSSIBLE).gather(2, states.unsqueeze(1).expand(-1, log_probs.shape[1], -1))
    barred = barred.to(emitted.dtype)
    # Before the first frame only the first state can be occupied, and it has emitted nothing.
    alpha = functional.pad(
        emitted.new_zeros(()).expand(states.shape[0], 1), (0, states.shape[1] - 1), value=_IMPOSSIBLE
    )
    for frame, emission in enumerate(emitted.unbind(1)):
        before = functional.pad(alpha, (2, 0), value=_IMPOSSIBLE)
        ways = torch.stack([alpha, before[:, 1:-1], before[:, :-2] + barred])
        following = torch.logsumexp(ways, 0) + emission
        alpha = following if input_lengths is None else torch.where((frame < input_lengths)[:, None], following, alpha)
    last = 2 * target_lengths.unsqueeze(1).long()
    in_blank, in_label = alpha.gather(1, last), alpha.gather(1, (last - 1).clamp(min=0))
    in_label = torch.where(last > 0, in_label, _IMPOSSIBLE)
    return torch.logsumexp(torch.cat([in_blank, in_label], 1), 1)


def _in_torchs_order(
    log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor
) -> tuple[Parts, Parts]:
    sample_first = log_probs.transpose(0, 1) if log_probs.ndim == 3 else log_probs
    return (sample_first, input_lengths), (targets, target_lengths)


@loss_maker
def ctc(*, blank: int = 0, reduction: str = "mean", zero_infinity: bool = False) -> Loss:
    """Connectionist temporal classification: −log Σ_π Π_t p_t(π_t) over all alignments π of labels with frames.

    An alignment gives each frame a class; it spells the labels once repeated classes are merged and blanks are
    taken away. A sequence that has no alignment (fewer frames than labels and the blanks between equal labels) has
    the value ∞ and the gradient 0. The mean divides each sample by the length of its labels (by 1 where it has none)
    and then by the number of samples; sum and none do not divide.

    Prediction: log-probabilities [N, T, C], the sample first, made by log_softmax(-1) over classes that include the
    blank; or a tuple of them and the number of frames of each sample, `input_lengths` [N]. Target: class indices
    [N, S] other than the blank, with −1 after the end of each sequence; or a tuple of labels, [N, S] or all in one
    dimension, and `target_lengths` [N]. A sample without the first dimension is one, too. It also takes torch's four
    arguments, in torch's order and with the frames first: ctc()(log_probs [T, N, C], targets, input_lengths,
    target_lengths).

    Equal to `torch.nn.CTCLoss` in value, and in gradient with respect to logits before their log_softmax. torch
    returns that gradient, exp(log p) minus the posterior of each class, for the log-probabilities themselves, so that
    there it is no derivative and wrong where they are not normalised; here it is the derivative, minus the posterior.
    torch's gradient of an impossible alignment is NaN unless `zero_infinity` is set; its labels may contain the blank
    without an error. Half precision is computed in float32.

    Args:
        blank: the class that stands for no label, ≥ 0.
        reduction: "mean", "sum" or "none".
        zero_infinity: whether samples without any alignment count 0 instead of ∞.

    Raises:
        InvalidHyperparameter: if `blank` is no whole number ≥ 0, `zero_infinity` no bool or `reduction` unknown.
        LossMismatch: when called with shapes that do not fit together, or with lengths or labels out of range (these
            are looked at where it costs nothing: on the CPU, outside of vmap and compile).

    Source: A. Graves, S. Fernández, F. Gomez, J. Schmidhuber, "Connectionist temporal classification: labelling
    unsegmented sequence data with recurrent neural networks", ICML 2006.

    >>> half = torch.full((1, 2, 2), 0.5).log()  # the label 1 in two frames: 1 1, 1 blank or blank 1
    >>> ctc()(half, torch.tensor([[1]])).exp()
    tensor(1.3333)
    """
    if isinstance(blank, bool) or not isinstance(blank, int) or blank < 0:
        raise InvalidHyperparameter(f"ctc was given blank={blank!r}, and expects a whole number ≥ 0.")
    if not isinstance(zero_infinity, bool):
        raise InvalidHyperparameter(f"ctc was given zero_infinity={zero_infinity!r}, and expects True or False.")
    how = reduced("ctc", reduction)
    return Loss(
        name="ctc",
        kind="other",
        terms=partial(_ctc, blank=blank, zero_infinity=zero_infinity, by_length=how == "mean"),
        prediction=Prediction.LOG_PROBABILITIES,
        target=Target.SEQUENCES,
        shapes=("[N, T, C]", "[N, S]"),
        formula="−log Σ_π Π_t p_t(π_t), over all alignments π",
        reference="Graves et al. 2006",
        reduction=how,
        arrange=_in_torchs_order,
        torch_name="CTCLoss",
    )


def _spoken(generator: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    log_probs = torch.randn(12, 8, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    labels = torch.randint(1, 5, (12, 3), generator=generator)
    labels = torch.where(torch.arange(3) < (torch.arange(12) % 4).unsqueeze(1), labels, -1)
    return (log_probs, torch.arange(12) % 3 + 6), labels


def _blank_invalid(values: Sequence[object]) -> tuple[Invalid, ...]:
    return tuple(Invalid({"blank": value}, f"blank={value!r}") for value in values)


CATALOGUE = (
    LossInfo(
        ctc,
        _spoken,
        valid=({}, {"zero_infinity": True}, {"reduction": "sum"}),
        invalid=(*_blank_invalid((-1, 0.5, True, "0")), Invalid({"zero_infinity": 1}, "zero_infinity=1")),
        source="A. Graves et al., Connectionist temporal classification, ICML 2006",
    ),
)
