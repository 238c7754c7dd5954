"""A `state_dict` of a torch optimizer made fit for another one: its parameters in another order, on another device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fallline.errors import FalllineError, nearest
from fallline.optim.transform import Slots

# What wrappers of a model put before the names of its parameters.
WRAPPERS = ("_orig_mod.", "module.")


def in_our_order(saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The saved state with each group's parameters in the order of ours, where both know their names.

    Raises:
        FalllineError: when a parameter of ours has no state of its name there, or the other way round.
    """
    theirs = saved["param_groups"]
    if len(theirs) != len(groups) or not all("param_names" in group for group in [*theirs, *groups]):
        return dict(saved)
    if any(_repeats(each) for each in (theirs, groups)):
        return dict(saved)
    plain = _names(theirs) == _names(groups)  # then what looks like a wrapper is a name
    bare = (lambda name: name) if plain else _bare
    numbers = {
        bare(name): number
        for group in theirs
        for name, number in zip(group["param_names"], group["params"], strict=True)
    }
    ours = {bare(name) for group in groups for name in group["param_names"]}
    for missing in sorted(ours - numbers.keys()):
        raise FalllineError(f"the state has no parameter {missing!r}. {nearest(missing, numbers)}")
    for missing in sorted(numbers.keys() - ours):
        raise FalllineError(f"the state is of a parameter {missing!r}, which is not here. {nearest(missing, ours)}")
    ordered = [
        {**there, "params": [numbers[bare(n)] for n in here["param_names"]], "param_names": list(here["param_names"])}
        for there, here in zip(theirs, groups, strict=True)
    ]
    return {**saved, "param_groups": ordered}


def exactly(saved: Mapping[str, Any], parameter: Tensor, first: Slots) -> Slots:
    """A parameter's state as copies on its device, each tensor with the dtype of the slot that it fills.

    Args:
        saved: by slot; an empty slot (None) is left out, a count that is a plain number becomes a tensor.
        parameter: whose state it is to be.
        first: the parameter's state before its first update.
    """
    made: Slots = {}
    for slot, value in saved.items():
        if value is None:
            continue
        tensor = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
        other = torch.float64 if slot == "step" else tensor.dtype
        dtype = first[slot].dtype if slot in first else other
        if slot in first and tensor.shape != first[slot].shape:
            raise FalllineError(
                f"the state {slot!r} has shape {tuple(tensor.shape)}, and the parameter needs "
                f"{tuple(first[slot].shape)}: it is the state of another parameter. Give names (named_parameters)."
            )
        made[slot] = torch.empty_like(tensor, dtype=dtype, device=parameter.device).copy_(tensor)
    return begun(made, first)


def begun(kept: Slots, first: Slots) -> Slots:
    """The state with a count where that is missing: a parameter with a buffer has been updated before.

    torch's SGD keeps no count, and knows by the buffer that a gradient is not the first.
    """
    if "momentum_buffer" in kept and "step" in first and "step" not in kept:
        return {**kept, "step": torch.ones_like(first["step"])}
    return kept


def _bare(name: str) -> str:
    """The name without the wrappers of the whole model before it."""
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def _names(groups: Sequence[Mapping[str, Any]]) -> set[str]:
    return {name for group in groups for name in group["param_names"]}


def _repeats(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether two parameters have one name, as those of two models may."""
    bare = [_bare(name) for group in groups for name in group["param_names"]]
    return len(set(bare)) < len(bare) and len(_names(groups)) < len(bare)
