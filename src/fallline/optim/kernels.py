"""torch's own kernels, for the rules that torch has too: the same arithmetic, in place and in fewer passes over memory.

`as_torch` uses one where it can: for plain dense real tensors on one device, with numbers that are numbers by now.
Everything else, and everything under torch.compile, runs the rule. State has torch's names either way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adadelta import adadelta as torch_adadelta
from torch.optim.adagrad import adagrad as torch_adagrad
from torch.optim.adam import adam as torch_adam
from torch.optim.adamax import adamax as torch_adamax
from torch.optim.adamw import adamw as torch_adamw
from torch.optim.asgd import asgd as torch_asgd
from torch.optim.nadam import nadam as torch_nadam
from torch.optim.radam import radam as torch_radam
from torch.optim.rmsprop import rmsprop as torch_rmsprop
from torch.optim.rprop import rprop as torch_rprop
from torch.optim.sgd import sgd as torch_sgd

from fallline.optim.adam_family import adam, adamax, adamw, nadam, radam
from fallline.optim.base import Optimizer
from fallline.optim.gradient_descent import asgd, rprop, sgd
from fallline.optim.mean_square import adadelta, adagrad, rmsprop
from fallline.optim.transform import Slots

Tensors = Sequence[Tensor]
# (parameters, gradients, slots of each parameter, the optimizer's arguments, whether to use torch's fused kernel)
Run = Callable[[list[Tensor], list[Tensor], list[Slots], Mapping[str, Any], bool], None]
# Devices on which torch has fused kernels of all the optimizers that are marked as fused here.
FUSED_DEVICES = ("cpu", "cuda")


# An argument that Adam has had since torch 2.7.
DECOUPLED = "decoupled_weight_decay"


@dataclass(frozen=True)
class Kernel:
    """A step through torch's functions, which changes parameters and slots in place.

    Attributes:
        name: of torch's function.
        run: makes the step.
        counts: whether torch keeps a "step" in the state (the rule may do without).
        fused: whether there is a fused form.
        devices: the types of devices on which it is of use, if not on all.
        fits: (arguments) -> whether it can express them.
    """

    name: str
    run: Run
    counts: bool = True
    fused: bool = False
    devices: tuple[str, ...] = ()
    fits: Callable[[Mapping[str, Any]], bool] = lambda arguments: True


def kernel_of(rule: Optimizer) -> Kernel | None:
    """The kernel that computes a rule with the arguments that it has, or None."""
    if rule.call is None or rule.call.extra:
        return None
    kernel = KERNELS.get(rule.call.function)
    return kernel if kernel is not None and kernel.fits(rule.call.arguments) else None


def suits(kernel: Kernel, params: Tensors, grads: Tensors) -> bool:
    """Whether the kernel takes these tensors: plain, real, of one device, each gradient like its parameter."""
    device = params[0].device
    if kernel.devices and device.type not in kernel.devices:
        return False
    for p, g in zip(params, grads, strict=True):
        if type(p) not in _PLAIN or type(g) not in _PLAIN or p.dtype not in _REAL or g.dtype is not p.dtype:
            return False
        if p.device != device or g.device != device or g.layout is not torch.strided or p.layout is not torch.strided:
            return False
    return True


def suits_fused(params: Tensors, grads: Tensors, slots: Sequence[Slots]) -> bool:
    """Whether a fused kernel is right.

    On the CPU it goes through memory as if all tensors had the same strides. In half precision its SGD is less exact
    than the rule.
    """
    if params[0].device.type not in FUSED_DEVICES:
        return False
    for p, g, own in zip(params, grads, slots, strict=True):
        if p.dtype not in _FULL or not p.is_contiguous() or not g.is_contiguous():
            return False
        for slot in own.values():
            if not slot.is_contiguous():
                return False
    return True


def count(steps: list[Tensor]) -> None:
    """Adds one to each. A tensor is added on the CPU, because a number would be made into one for each of them."""
    if steps and steps[0].device.type == "cpu":
        torch._foreach_add_(steps, torch.tensor(1.0, dtype=torch.float64), alpha=1.0)
    elif steps:
        torch._foreach_add_(steps, 1)


def _sgd(
    params: list[Tensor], grads: list[Tensor], slots: list[Slots], arguments: Mapping[str, Any], fused: bool
) -> None:
    moving = arguments["momentum"] != 0
    buffers: list[Tensor | None] = [own["momentum_buffer"] if moving else None for own in slots]
    torch_sgd(params, grads, buffers, fused=True if fused else None, **{**arguments, "dampening": 0.0})


def _through(function: Callable[..., None], *names: str, fusible: bool = False, captures: bool = True) -> Run:
    """A step by one of torch's functions that take a list of tensors for each slot, then the counts, then numbers.

    Args:
        names: of the slots in order; a list is empty where the option that needs the slot is off.
        fusible: whether it has a keyword `fused`.
        captures: whether it has a keyword `capturable`: then it leaves the counts on the device.
    """

    taken = inspect.signature(function).parameters

    def run(
        params: list[Tensor], grads: list[Tensor], slots: list[Slots], arguments: Mapping[str, Any], fused: bool
    ) -> None:
        steps = [own["step"] for own in slots]
        # A fused kernel counts in float32, in which 2²⁴ + 1 is 2²⁴, so it gets a copy of the counts.
        counted = list(torch.stack(steps).to(torch.float32).unbind()) if fused else steps
        numbers = {name: value for name, value in arguments.items() if name != DECOUPLED or name in taken}
        if "betas" in numbers:
            numbers["beta1"], numbers["beta2"] = numbers.pop("betas")
        if "etas" in numbers:
            numbers["etaminus"], numbers["etaplus"] = numbers.pop("etas")
            numbers["step_size_min"], numbers["step_size_max"] = numbers.pop("step_sizes")
        for name in _ONLY_AT_THE_START.get(function, ()):
            del numbers[name]
        if fusible and fused:
            numbers["fused"] = True
        if captures:
            numbers["capturable"] = not fused and params[0].device.type != "cpu"
        lists = ([own[name] for own in slots] if all(name in own for own in slots) else [] for name in names)
        function(params, grads, *lists, counted, **numbers)
        if fused:
            count(steps)

    return run


_PLAIN = (Tensor, torch.nn.Parameter)
_FULL = (torch.float32, torch.float64)
# In float16 torch's smallest eps is 0, and 0 / 0 no update.
_REAL = (*_FULL, torch.bfloat16)
_ONLY_AT_THE_START = {torch_adagrad: ("initial_accumulator_value",), torch_rprop: ("lr",)}
_ADAM = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
KERNELS: dict[Callable[..., Any], Kernel] = {
    # torch leaves a first gradient undampened only where no buffer is there yet, and ours start at zero.
    sgd: Kernel("torch.optim.sgd", _sgd, counts=False, fused=True, fits=lambda a: a["dampening"] == 0),
    adam: Kernel(
        "torch.optim.adam",
        _through(torch_adam, *_ADAM, fusible=True),
        fused=True,
        fits=lambda a: not a[DECOUPLED] or DECOUPLED in inspect.signature(torch_adam).parameters,
    ),
    adamw: Kernel("torch.optim.adamw", _through(torch_adamw, *_ADAM, fusible=True), fused=True),
    rmsprop: Kernel("torch.optim.rmsprop", _through(torch_rmsprop, "square_avg", "grad_avg", "momentum_buffer")),
    adagrad: Kernel(
        "torch.optim.adagrad",
        _through(torch_adagrad, "sum", fusible=True, captures=False),
        fused=True,
        devices=("cpu",),
    ),
    adadelta: Kernel("torch.optim.adadelta", _through(torch_adadelta, "square_avg", "acc_delta")),
    adamax: Kernel("torch.optim.adamax", _through(torch_adamax, "exp_avg", "exp_inf")),
    nadam: Kernel("torch.optim.nadam", _through(torch_nadam, "exp_avg", "exp_avg_sq", "mu_product")),
    radam: Kernel("torch.optim.radam", _through(torch_radam, "exp_avg", "exp_avg_sq")),
    asgd: Kernel("torch.optim.asgd", _through(torch_asgd, "ax", "mu", "eta")),
    rprop: Kernel("torch.optim.rprop", _through(torch_rprop, "prev", "step_size")),
}
