"""One call of a rule on parameters of a torch optimizer, which it changes in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fallline.optim.groups import Plan
from fallline.optim.landscape import Landscape
from fallline.optim.transform import Numbers, Slots

# A rule makes new tensors, so it gets so many numbers at a time: they stay in the cache, and there is never a second
# copy of a whole model.
LARGEST_PIECE = 2**20


@dataclass
class Work:
    """Parameters that are updated by one call of a rule, and all that the call needs."""

    plan: Plan
    params: dict[str, Tensor]
    grads: dict[str, Tensor]
    slots: dict[str, Slots]
    numbers: Numbers
    begun: Tensor
    step: int | None
    landscape: Landscape | None


def by_rule(work: Work) -> dict[str, Slots]:
    """Adds the rule's updates to the parameters; returns the new state."""
    updates, state = work.plan.program.update(
        work.grads,
        {"step": work.begun, "slots": work.slots},
        work.params,
        work.numbers,
        step=work.step,
        landscape=work.landscape,
    )
    slots = {name: _apart(own, work.params[name], work.grads[name]) for name, own in state["slots"].items()}
    torch._foreach_add_(list(work.params.values()), [updates[name] for name in work.params])
    return slots


def _apart(own: Slots, *changing: Tensor) -> Slots:
    """Slots that are the gradient or the parameter itself (Adan keeps the gradient) as copies: both change in place."""

    def is_one(slot: Tensor) -> bool:
        return any(slot is each or (each.is_complex() and slot._base is each) for each in changing)

    return {name: slot.clone() if is_one(slot) else slot for name, slot in own.items()}


def in_pieces(params: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The parameters in parts, each of one device and not much larger than `LARGEST_PIECE`."""
    pieces: list[dict[str, Tensor]] = []
    filled: dict[torch.device, int] = {}
    places: dict[torch.device, dict[str, Tensor]] = {}
    for name, p in params.items():
        if filled.get(p.device, LARGEST_PIECE) >= LARGEST_PIECE:
            places[p.device] = {}
            pieces.append(places[p.device])
            filled[p.device] = 0
        places[p.device][name] = p
        filled[p.device] += p.numel()
    return pieces


def gradient_of(p: Tensor) -> Tensor:
    assert p.grad is not None
    if p.grad.is_sparse:
        raise RuntimeError("sparse gradients are not supported: build the embedding with sparse=False.")
    return p.grad.detach() if p.grad.requires_grad else p.grad
