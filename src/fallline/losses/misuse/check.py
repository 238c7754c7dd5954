"""Everything that can be said against a loss and what it is given, in one list.

`finding` says what a finding is; `given` gathers what the rules look at, and the rules lie in `shapes`, `types`,
`predictions`, `targets`, `settings`, `embeddings`, `gradients` and `direction`. `checked` puts the check into a
training loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from fallline.errors import LossMismatch, UnknownName
from fallline.losses.misuse.broadcasting import broadcasting_findings
from fallline.losses.misuse.computing import Computed, computed, sampled
from fallline.losses.misuse.direction import direction_findings
from fallline.losses.misuse.embeddings import embedding_findings
from fallline.losses.misuse.finding import Finding, by_severity, error, errors_among
from fallline.losses.misuse.given import Given, given, tensors
from fallline.losses.misuse.gradients import callable_findings, computed_findings, model_findings, not_finite_findings
from fallline.losses.misuse.predictions import prediction_findings
from fallline.losses.misuse.recognised import recognised
from fallline.losses.misuse.settings import setting_findings
from fallline.losses.misuse.shapes import shape_findings
from fallline.losses.misuse.targets import target_findings
from fallline.losses.misuse.types import not_a_tensor, type_findings


def check(loss: object, prediction: Any, target: Any = None, model: nn.Module | None = None) -> list[Finding]:
    """What is wrong, or worth knowing, about a loss and what it is given: errors first, then warnings, then notes.

    It looks at shapes, types, domains and values, and computes the loss and its gradient aside, on copies: nothing that
    it is given is changed, no gradient is left behind, no hook of the prediction or of a parameter is called, no
    generator of random numbers is advanced, nothing is printed. A batch of 64 takes a few milliseconds.

    A callable of which nothing is known is called some ten times; what it counts or keeps outside the buffers of a
    module, it counts that often. Hooks and `retain_grad` of hidden activations act when `model` is given, and when the
    loss is one that differentiates with respect to inputs, which only the prediction's own graph can show. The
    gradients of a model with backward hooks of modules are not looked at, nor are nested tensors.

    A finding of severity "error" says that what is computed cannot be what is meant. How much is said depends on how
    much there is to see: 64 numbers between 0 and 1 are probabilities, three of them are not.

    Args:
        loss: one of fallline's, a name, a torch loss module or function (with `functools.partial` too), or any
            callable(prediction, target); of any reduction.
        prediction: what the model gave: a tensor, or a tuple of them for the losses with parts (mean and variance;
            anchor, positive and negative; two embeddings).
        target: what it should have given; a tensor, a tuple, or None for the losses without one.
        model: that made the prediction; then its parameters' gradients are looked at too.

    Raises:
        UnknownName: for the name of a loss that does not exist.

    >>> import torch
    >>> probabilities = torch.rand(64, 5, generator=torch.Generator().manual_seed(0)).softmax(1)
    >>> [found] = check(torch.nn.CrossEntropyLoss(), probabilities, torch.arange(64) % 5)
    >>> found.severity, found.code, found.fix
    ('error', 'double-softmax', 'prediction = logits  # as the last linear layer gives them, without the softmax')
    """
    if any(part.is_nested for part in [*tensors(prediction), *tensors(target)]):
        return []  # few steps work on them, and the values of none can be read here
    try:
        case = recognised(given(loss, prediction, target, model))
    except UnknownName as reason:
        if isinstance(loss, str):
            raise
        return [error("fails", str(reason), "It cannot be computed.", "loss = torch.nn.MSELoss()  # an instance")]
    return by_severity(_findings(case))


def _findings(case: Given) -> Iterator[Finding]:
    if any(part.is_meta for part in [*tensors(case.prediction), *tensors(case.target)]):
        return  # shapes without values
    structural = [*not_a_tensor(case), *shape_findings(case), *type_findings(case)]
    yield from structural
    settings = list(setting_findings(case))
    yield from settings
    if errors_among(structural):
        return
    values = [*not_finite_findings(case), *prediction_findings(case), *target_findings(case)]
    values += embedding_findings(case)
    yield from values
    if errors_among([*values, *settings]) or _is_empty(case):
        # What cannot be computed, or ends a process on a GPU, is not computed; the gradients that reach the model are
        # those of a loss that is refused anyway.
        return
    outcome = computed(case)
    results = list(computed_findings(case, outcome))
    said = {found.code for found in values}
    said |= {"zero-gradient"} if "collapsed" in said else set()
    yield from (found for found in results if found.code not in said)
    if errors_among(results):
        return
    yield from model_findings(case, outcome)
    if outcome.connected is not None:
        return  # of other predictions there is no such graph
    if not case.known or "losses" in case.settings:  # those with a meaning of their own point the right way
        yield from _of_callables(case, outcome)


def _of_callables(case: Given, outcome: Computed) -> Iterator[Finding]:
    """What only trying tells."""
    few = sampled(case)
    if few is None:
        return
    if few is not case:
        outcome = computed(few)
        if outcome.failure is not None:  # made for one batch size
            return
    yield from callable_findings(few, outcome)
    yield from broadcasting_findings(few, outcome)
    yield from direction_findings(few, outcome)


def _is_empty(case: Given) -> bool:
    return any(part is not None and part.numel() == 0 for part in (case.first, case.labels))


def require(loss: object, prediction: Any, target: Any = None, model: nn.Module | None = None) -> list[Finding]:
    """`check`, with every error raised in one exception; returns the warnings and notes.

    Raises:
        LossMismatch: with what was seen, why it matters and the fix, for each finding of severity "error".

    >>> import torch
    >>> require("mse", torch.zeros(3, 1), torch.zeros(3))
    Traceback (most recent call last):
    ...
    fallline.errors.LossMismatch: mse was given a prediction of shape [3, 1] and a target of shape [3], and expects
    equal shapes. These would be broadcast to [3, 3]: 9 pairs of every prediction with every target, so that the
    predictions learn the mean of the targets. Mend it with: target = target.unsqueeze(1)  # or prediction.squeeze(-1)
    """
    found = check(loss, prediction, target, model)
    refuse(found)
    return found


def refuse(findings: Iterable[Finding]) -> None:
    """Raises the errors among the findings, in one exception.

    Raises:
        LossMismatch: if there are any.
    """
    sentences = [f"{each.message} Mend it with: {each.fix}" for each in errors_among(findings)]
    if len(sentences) == 1:
        raise LossMismatch(sentences[0])
    if sentences:
        listed = "\n".join(f"{i}. {sentence}" for i, sentence in enumerate(sentences, 1))
        raise LossMismatch(f"The loss is misused in {len(sentences)} ways.\n{listed}")
