"""What comes of computing the loss: failures, NaN, gradients that are 0 or missing, in the prediction and the model.

Neighbours: `computing` computes it; `direction` says whether the gradient points the right way.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from fallline.errors import LossMismatch
from fallline.losses.base import Prediction, Target
from fallline.losses.misuse.computing import Computed, computed, quietly
from fallline.losses.misuse.finding import Finding, error, note, warning
from fallline.losses.misuse.given import Given, extremes, shape, tensors, thinned
from fallline.losses.misuse.origin import hides_parameters

_TENSOR = re.compile(r"\(?tensor\([\[\]\d\s.,e+-]*?(?:\)|(?=,\s+and ))")
_LOW_PRECISION = (torch.float16, torch.bfloat16)


def not_finite_findings(given: Given) -> Iterator[Finding]:
    """NaN in what was given, and infinity where it can mean nothing."""
    if given.wants == Prediction.ANYTHING:
        return
    for word, value in (("prediction", given.prediction), ("target", given.target)):
        for part in tensors(value):
            if not part.is_floating_point() or part.numel() == 0:
                continue
            low, high = extremes(part)
            # −inf masks a class, or is the logarithm of 0.
            if math.isfinite(high) and (math.isfinite(low) or low == -math.inf):
                continue
            wrong = ~torch.isfinite(part)
            count, what = int(wrong.sum()), "NaN" if math.isnan(low) else "infinite"
            unreduced = given.loss.reduction == "none" and word == "target"
            make = warning if unreduced or part.dtype in _LOW_PRECISION else error
            yield make(
                "not-finite",
                f"{given.name} was given a {word} of which {count} of {part.numel()} values are {what}.",
                "One of them makes the loss NaN or infinite, and a step of training makes every parameter so.",
                f"assert torch.isfinite({word}).all()"
                if word == "prediction"
                else "keep = torch.isfinite(target)  # loss(prediction[keep], target[keep])",
            )
            return


def computed_findings(given: Given, outcome: Computed) -> Iterator[Finding]:
    """What is wrong with the value of the loss and its gradient with respect to the prediction."""
    if outcome.failure is not None:
        yield _failed(given, outcome.failure)
        return
    if outcome.returned:
        yield error(
            "detached" if outcome.returned in ("float", "int", "float32", "float64", "ndarray") else "fails",
            f"{given.name} returned a {outcome.returned}, and is expected to return a tensor with one number.",
            "A plain number has no gradient.",
            "return value  # without .item(), float() or numpy",
        )
        return
    assert outcome.value is not None
    if not given.known and outcome.shape and math.prod(outcome.shape) != 1:
        yield note(
            "reduction",
            f"{given.name} returned a tensor of shape {list(outcome.shape)}, and training needs one number.",
            "A backward pass starts from one number.",
            "return values.mean()",
        )
    value = float(outcome.value)
    if not math.isfinite(value):
        yield from _not_finite(given, value)
        return
    gradients = [gradient for gradient in outcome.gradients if gradient is not None]
    if not gradients:
        if outcome.gradients and outcome.connected is None:
            yield error(
                "detached",
                f"{given.name} gave {value:.4g}, which does not depend on the prediction by any differentiable step.",
                "No gradient flows back: .item(), argmax, a comparison, detach() or numpy cut it, or only the target "
                "was used.",
                f"return {_differentiable(given)}  # only differentiable steps, from the prediction on",
            )
        return
    if not all(_finite(gradient) for gradient in gradients):
        yield (warning if gradients[0].dtype in _LOW_PRECISION else error)(
            "not-finite",
            f"{given.name} gave {value:.4g}, and a gradient that is NaN or infinite.",
            "One such step makes every parameter NaN; a square root or a norm at 0, or a logarithm of 0, does this.",
            "(x + eps).sqrt()  # an ε inside, before the root",
        )
        return
    if all(not bool(gradient.any()) for gradient in gradients):
        yield from _no_gradient(given, outcome, value)
    yield from _saturated(given)


def _differentiable(given: Given) -> str:
    """A loss that can be computed of such tensors."""
    pair = given.pair
    if pair is not None and not pair[1].is_floating_point() and pair[0].ndim == pair[1].ndim + 1:
        return "torch.nn.functional.cross_entropy(prediction, target)"
    return "(prediction - target).square().mean()"


def _finite(tensor: Tensor) -> bool:
    if tensor.is_complex():
        return bool(torch.isfinite(tensor).all())
    return all(map(math.isfinite, extremes(tensor)))


def _failed(given: Given, failure: Exception) -> Finding:
    words = " ".join(_TENSOR.sub("tensors", str(failure)).split()) or type(failure).__name__
    code = "fails"
    fix = "loss(prediction, target)  # run it alone, on this batch, and mend what it complains of"
    if isinstance(failure, LossMismatch):
        code = "broadcast" if "broadcast" in words else "shape" if "shape" in words else "fails"
        pieces = words.split(". ")
        if len(pieces) > 1:
            fix = _as_code(pieces[-1].rstrip("."))
        return error(code, words, "The loss cannot be computed.", fix)
    return error(
        code,
        f"{given.name} raised {type(failure).__name__}: {words[:300].rstrip('.')}.",
        "The loss cannot be computed from this prediction and this target.",
        fix,
    )


def _as_code(advice: str) -> str:
    """A line of code as it is; a sentence as a remark to one."""
    try:
        ast.parse(advice)
    except SyntaxError:
        return f"prediction = model(x)  # {advice[:1].lower()}{advice[1:]}"
    return advice


def _not_finite(given: Given, value: float) -> Iterator[Finding]:
    first = given.first
    low = first is not None and first.dtype in _LOW_PRECISION
    if given.expects == Target.SEQUENCES and value == math.inf:
        yield warning(
            "not-finite",
            f"{given.name} gave inf: a sequence of labels is longer than its frames allow.",
            "Such a sample has no alignment, and one of them makes the whole loss infinite.",
            "zero_infinity=True  # or longer inputs",
        )
        return
    yield (warning if low else error)(
        "not-finite",
        f"{given.name} gave {value:g}.",
        "Every gradient from it is NaN or meaningless: a logarithm of 0, an exponential that overflows, or a division "
        "by nothing.",
        "prediction = prediction.float()  # half precision overflows at 65504"
        if low
        else "log(x + eps)  # keep away from 0",
    )


def _no_gradient(given: Given, outcome: Computed, value: float) -> Iterator[Finding]:
    pair = given.pair
    if abs(value) < 1e-6:
        return  # nothing left to learn from this batch: margins that are kept, labels that are ignored
    if pair is not None and pair[0].shape == pair[1].shape and torch.equal(pair[0].float(), pair[1].float()):
        return
    if _at_the_bottom(given, outcome, value):
        return
    yield warning(
        "zero-gradient",
        f"{given.name} gave {value:.4g}, and a gradient that is exactly 0 for every prediction.",
        "No parameter can move: the predictions are clamped, rounded or at the flat end of a sigmoid.",
        "prediction = logits  # without clamp, round or a saturated sigmoid",
    )


def _at_the_bottom(given: Given, outcome: Computed, value: float) -> bool:
    """Whether the loss rises wherever the prediction goes: soft labels that are met exactly leave nothing to learn."""
    if not isinstance(given.prediction, Tensor) or not outcome.whole:
        return False
    generator = torch.Generator().manual_seed(0)
    try:
        for size in (0.1, 0.1, -0.1):
            noise = torch.randn(given.prediction.shape, generator=generator, dtype=torch.float32)
            moved = given.prediction + size * noise.to(given.prediction)
            if not float(outcome.again(moved)) > value:
                return False
    except Exception:
        return False
    return True


def callable_findings(given: Given, outcome: Computed) -> Iterator[Finding]:
    """What the value and the gradient of a callable tell about it, of which nothing else is known."""
    if given.known or outcome.value is None or not outcome.gradients or outcome.gradients[0] is None:
        return
    value, gradients = float(outcome.value), [outcome.gradients[0]]
    if not bool(gradients[0].any()) or not math.isfinite(value):
        return
    pair = given.pair
    first = given.first
    if pair is None or first is None or first.ndim == 0 or len(first) < 8:
        return
    prediction, target = pair
    try:
        if _only_rounding(given, gradients[0], value):
            yield warning(
                "zero-gradient",
                f"{given.name} gave {value:.4g}, and a gradient of {float(gradients[0].abs().max()):.1g} that "
                "is nothing but rounding: in another precision it is another one.",
                "It does not depend on the predictions: what is computed is a constant, such as the sum of a softmax.",
                "return torch.nn.functional.cross_entropy(prediction, target)  # a loss that depends on both",
            )
            return
        if target.ndim and not outcome.shape and len(target) == len(prediction) and prediction.numel() <= 1 << 20:
            half = len(prediction) // 2
            parts = [(prediction[:half], target[:half]), (prediction[half:], target[half:])]
            halves = [float(outcome.against(*part)) for part in parts]
            alike = min(abs(each) for each in halves) > 0.2 * abs(value)
            if value and alike and math.isclose(sum(halves), value, rel_tol=1e-4):
                yield note(
                    "reduction",
                    f"{given.name} gave {value:.4g}, the sum of {halves[0]:.4g} and {halves[1]:.4g} for the halves of "
                    "the batch.",
                    "It is a sum over the samples: a learning rate found for a mean is as many times too large.",
                    "return values.mean()",
                )
    except Exception:  # a callable that is made for one batch size
        pass
    if target.shape == prediction.shape and bool(((target == 0) | (target == 1)).all()):
        no, yes = gradients[0][target == 0], gradients[0][target == 1]
        if len(no) >= 4 and len(yes) >= 4 and not bool(no.any()) and bool(yes.any()):
            yield note(
                "target-coding",
                f"{given.name} was given targets 0 and 1, and its gradient is 0 for each of the {len(no)} zeros.",
                "A hinge expects −1 and 1; with 0 the negatives are not learnt. A mask means it so.",
                "target = 2 * target - 1",
            )


def _only_rounding(given: Given, gradient: Tensor, value: float) -> bool:
    """Whether the gradient is an error of rounding, which shrinks or grows with the precision of the numbers."""
    prediction, target = given.prediction, given.target
    if not isinstance(prediction, Tensor) or prediction.dtype not in (torch.float32, torch.float64):
        return False
    largest = float(gradient.abs().max())
    if largest * float(prediction.abs().max()) * prediction.numel() > 1e-3 * abs(value):
        return False
    other = torch.float64 if prediction.dtype == torch.float32 else torch.float32
    goal = target.to(other) if isinstance(target, Tensor) and target.is_floating_point() else target
    again = computed(replace(given, prediction=prediction.to(other), target=goal))
    if not again.gradients or again.gradients[0] is None:
        return False
    there = float(again.gradients[0].abs().max())
    return there < 1e-4 * largest if other == torch.float64 else largest < 1e-4 * there


def _saturated(given: Given) -> Iterator[Finding]:
    """Predictions at the end of [0, 1] or [−1, 1] and wrong: a sigmoid or tanh passes no gradient there."""
    pair = given.pair
    if pair is None or pair[0].shape != pair[1].shape or pair[0].numel() < 8:
        return
    if given.wants not in (Prediction.PROBABILITIES, Prediction.REAL) or not pair[0].is_floating_point():
        return
    low, high = given.prediction_range
    least, most = given.target_range
    if (least, most) not in ((0.0, 1.0), (-1.0, 1.0)) or low < least or high > most:
        return
    prediction, target = thinned(pair[0]).double(), thinned(pair[1]).double()
    span = most - least
    ends = (prediction - least < 1e-6 * span) | (most - prediction < 1e-6 * span)
    wrong = ends & ((prediction - target).abs() > 0.99 * span)
    count = int(wrong.sum())
    asleep = low == high == 0 and given.wants != Prediction.PROBABILITIES  # a layer that starts at 0, or a ReLU
    if asleep or not (high - low > 0.99 * span or float(ends.double().mean()) > 0.5):
        return
    if count and count >= 0.01 * prediction.numel():
        yield warning(
            "saturated",
            f"{given.name} was given {int(ends.sum())} of {prediction.numel()} predictions within 1e-6 of {least:g} or "
            f"{most:g}, and {count} of them are wrong.",
            "The gradient of a sigmoid is 0 there: what is wrong and sure stays so.",
            "loss = torch.nn.BCEWithLogitsLoss()  # on logits, without the sigmoid",
        )


def model_findings(given: Given, outcome: Computed) -> Iterator[Finding]:
    """Parameters of the model that get no gradient, or one that is exactly 0."""
    model = given.model
    if model is None:
        return
    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    if not trained:
        yield from _frozen(given, model)
        return
    for name, parameter in trained:
        if not bool(torch.isfinite(parameter.detach()).all()):
            yield error(
                "not-finite",
                f"The parameter {name} holds NaN or infinity.",
                "Everything computed with it does too.",
                "model = make_model()  # start again, with a smaller learning rate",
            )
            return
    outputs = [part for part in tensors(given.graph) if part.is_floating_point()]
    live = [part for part in outputs if part.requires_grad]
    if not live:
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and outputs:
            make = error if model.training else note
            yield make(
                "detached",
                f"{given.name} was given a prediction without a graph, and a model with {len(trained)} parameters to "
                "train.",
                "No gradient reaches the model: detach(), .data, numpy, no_grad or torch.tensor(…) cut it off.",
                "prediction = model(x)  # without detach() or no_grad",
            )
        return
    if outcome.value is None or any(each._backward_hooks or each._backward_pre_hooks for each in model.modules()):
        return  # hooks of modules, which cannot be kept from acting
    if outcome.connected is not None:
        yield from _moved(given, model, trained, live, outcome.connected)
        return
    if len(outcome.gradients) != len(outputs):
        return
    pairs = [
        (part, gradient)
        for part, gradient in zip(outputs, outcome.gradients, strict=True)
        if part.requires_grad and gradient is not None and part.shape == gradient.shape
    ]
    if not pairs or not any(bool(gradient.any()) for _, gradient in pairs):
        return
    if not all(_finite(gradient) for _, gradient in pairs):
        return
    with torch.inference_mode(False), torch.enable_grad():
        # As grad_outputs, the gradients would make torch import a second's worth of modules.
        products = [(part * gradient.to(part.dtype)).sum() for part, gradient in pairs]
    yield from _moved(given, model, trained, live, sum(products[1:], products[0]))


def _moved(
    given: Given, model: nn.Module, trained: list[tuple[str, nn.Parameter]], live: list[Tensor], total: Tensor
) -> Iterator[Finding]:
    parameters = [parameter for _, parameter in trained]
    try:
        with quietly(*live, *parameters), torch.inference_mode(False), torch.enable_grad():
            found = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    except RuntimeError:  # the graph was freed, or holds something that has no such gradient
        return
    yield from _judged(
        given, model, [(name, parameter, gradient) for (name, parameter), gradient in zip(trained, found, strict=True)]
    )


def _frozen(given: Given, model: nn.Module) -> Iterator[Finding]:
    """A model in training mode of which nothing can be trained, nor what it was given."""
    count = sum(1 for _ in model.parameters())
    live = any(part.requires_grad for part in tensors(given.graph))
    if count and model.training and not live and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        yield warning(
            "detached",
            f"{given.name} was given the prediction of a model whose {count} parameters are all frozen.",
            "There is nothing that the loss could train.",
            "model.head.requires_grad_(True)  # of what is to be trained",
        )


def _judged(given: Given, model: nn.Module, found: list[tuple[str, Tensor, Tensor | None]]) -> Iterator[Finding]:
    missing = [name for name, _, gradient in found if gradient is None]
    if len(missing) == len(found):
        if hides_parameters(given.graph):
            return  # a checkpoint: its parameters are found only by a backward pass
        yield error(
            "detached",
            f"The prediction of shape {shape(given.first) if given.first is not None else '?'} does not come from the "
            f"model: none of its {len(found)} parameters is in the prediction's graph.",
            "Another model was called, or its output was detached and used once more.",
            "prediction = model(x)  # of the model that is trained",
        )
        return
    if missing:
        # The first parameters are nearest to the input: without them, what lies behind is built on noise. Others may
        # belong to another head or another phase.
        yield (warning if found[0][2] is None else note)(
            "zero-gradient",
            f"{len(missing)} of {len(found)} parameters are not part of the prediction: {_named(missing)}.",
            "They never move: a layer is not called, or its output is not used or detached.",
            f"model.get_parameter({missing[0]!r})  # call its layer in forward, without detach(); or let it rest, with "
            "requires_grad_(False)",
        )
    # A parameter of zeros with a gradient explains what gets none behind it: the last layer that starts at 0, LoRA's
    # B, a residual branch's gain. Zero biases hold nothing back.
    holding = [
        name
        for name, parameter, gradient in found
        if gradient is not None and bool(gradient.any()) and not bool(parameter.any()) and not name.endswith("bias")
    ]
    still = [name for name, _, gradient in found if gradient is not None and not bool(gradient.any())]
    if not still or holding or _holds_frozen_zeros(model):
        return
    moving = {name.rpartition(".")[0] for name, _, gradient in found if gradient is not None and bool(gradient.any())}
    still = [name for name in still if name.rpartition(".")[0] not in moving]
    if not still:
        return
    if len(still) + len(missing) == len(found):
        make = error
    else:
        make = warning if _nothing_gets_through(found) or _first_layer_is_dead(found) else note
    first = given.first
    flat = (
        first is not None and bool((first == first.round()).all()) and (bool(first.any()) or _of_probabilities(given))
    )
    ends = flat and first is not None and (_of_probabilities(given) or bool((first.abs() == 1).all()))
    yield make(
        "zero-gradient",
        f"The gradient of {len(still)} of {len(found)} parameters is exactly 0: {_named(still)}.",
        "An expert that no sample of this batch was sent to, or what cancels out, is like that; dead or saturated "
        "units never move again."
        if make is note
        else "They never move: dead or saturated units, weights that all start at 0, or a step whose derivative is 0.",
        "x = (x - x.mean(0)) / x.std(0)  # inputs of this size saturate; or logits, without the sigmoid, round or sign"
        if ends
        else "prediction = model(x)  # without round, sign or a comparison"
        if flat
        else "torch.nn.init.kaiming_normal_(layer.weight)  # no zeros, no saturated sigmoids, no round or sign",
    )


def _of_probabilities(given: Given) -> bool:
    return given.wants == Prediction.PROBABILITIES


def _nothing_gets_through(found: list[tuple[str, Tensor, Tensor | None]]) -> bool:
    """Whether biases alone have a gradient: no layer passes on anything of the input."""
    matrices = [gradient for _, parameter, gradient in found if parameter.ndim >= 2 and gradient is not None]
    return bool(matrices) and not any(bool(gradient.any()) for gradient in matrices)


def _first_layer_is_dead(found: list[tuple[str, Tensor, Tensor | None]]) -> bool:
    """Whether the layer nearest to the input stands still, and is not one of several alike, of which others move."""
    _, first, gradient = found[0]
    if gradient is None or first.ndim < 2 or bool(gradient.any()):
        return False
    return not any(
        parameter.shape == first.shape and each is not None and bool(each.any()) for _, parameter, each in found[1:]
    )


def _holds_frozen_zeros(model: nn.Module) -> bool:
    return any(
        not parameter.requires_grad and not bool(parameter.any()) and not name.endswith("bias")
        for name, parameter in model.named_parameters()
    )


def _named(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
