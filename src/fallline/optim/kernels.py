"""torch's own kernels, for the rules that torch has too: the same arithmetic, in place and in fewer passes over memory.

`as_torch` and a `Trial` use one where they can: for plain dense real tensors on one device, with numbers that are
numbers by now. Everything else, and everything under torch.compile, runs the rule. State has torch's names either way.
"""

from __future__ import annotations

import functools
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
from fallline.optim.schedules import Schedule
from fallline.optim.transform import Slots

Tensors = Sequence[Tensor]
# (parameters, gradients, slots of each parameter, the kernel's numbers, whether to use torch's fused kernel)
Run = Callable[[list[Tensor], list[Tensor], list[Slots], Mapping[str, Any], bool], None]
# Devices on which torch has fused kernels of all the optimizers that are marked as fused here.
FUSED_DEVICES = ("cpu", "cuda")
# Values of a schedule that are computed together.
SCHEDULE_BLOCK = 1024
# An argument that Adam has had since torch 2.7.
DECOUPLED = "decoupled_weight_decay"


@dataclass(frozen=True)
class Kernel:
    """A step through torch's functions, which changes parameters and slots in place.

    Attributes:
        name: of torch's function.
        numbers: (the optimizer's arguments) -> those of torch's function.
        run: makes the step.
        counts: whether torch keeps a "step" in the state (the rule may do without).
        fused: whether there is a fused form.
        devices: the types of devices on which it is of use, if not on all.
        fits: (arguments) -> whether it can express them.
    """

    name: str
    numbers: Callable[[Mapping[str, Any]], dict[str, Any]]
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


@dataclass(frozen=True)
class FlatStep:
    """A rule's step on one tensor through torch's kernel, which changes the tensor and its slots in place.

    Attributes:
        kernel: what makes the step.
        numbers: those of the kernel.
        fused: whether the kernel's fused form is right.
        lr: (number of the update, from 0) -> the learning rate, where that follows a schedule.
    """

    kernel: Kernel
    numbers: Mapping[str, Any]
    fused: bool
    lr: Callable[[int], float] | None

    def __call__(self, p: Tensor, grad: Tensor, slots: Slots, done: Tensor, step: int) -> None:
        """Makes update number `step`.

        Args:
            grad: of the shape, dtype, device and strides of `p`.
            slots: of `p`, from the rule's `init`.
            done: the number of updates so far, which is counted on.
        """
        numbers = self.numbers if self.lr is None else {**self.numbers, "lr": self.lr(step)}
        counts_for_all = self.kernel.counts and "step" not in slots
        own = {**slots, "step": done} if counts_for_all else slots
        self.kernel.run([p], [grad], [own], numbers, self.fused)
        if not counts_for_all:
            done.add_(1)


def flat_step(rule: Optimizer, p: Tensor, slots: Slots, *, steps: int) -> FlatStep | None:
    """The kernel's step for a rule on one tensor, or None where only the rule itself is right.

    Args:
        p, slots: the tensor and its state.
        steps: how many updates there are in all, for a schedule of the learning rate; other schedules have no kernel.
    """
    kernel = kernel_of(rule)
    if kernel is None or rule.call is None or not suits(kernel, [p], [p]):
        return None
    if any(isinstance(value, Schedule) and name != "lr" for name, value in rule.hyperparameters.items()):
        return None
    numbers = kernel.numbers(rule.call.arguments)
    lr = numbers.get("lr")
    rate = _values(lr, steps) if isinstance(lr, Schedule) else None
    return FlatStep(kernel, numbers, kernel.fused and suits_fused([p], [p], [slots]), rate)


def _values(schedule: Schedule, steps: int) -> Callable[[int], float]:
    """A schedule's value at each step: blocks begin at fixed steps, so that round-off does not depend on where a run
    was interrupted.
    """

    @functools.lru_cache(maxsize=1)
    def block(number: int) -> list[float]:
        first = number * SCHEDULE_BLOCK
        done = torch.arange(first, first + SCHEDULE_BLOCK, dtype=torch.float64)
        values: list[float] = schedule(torch.clamp(done / steps, max=1.0)).tolist()
        return values

    def value(step: int) -> float:
        number, place = divmod(step, SCHEDULE_BLOCK)
        return block(number)[place]

    return value


def count(steps: list[Tensor]) -> None:
    """Adds one to each. A tensor is added on the CPU, because a number would be made into one for each of them."""
    if len(steps) == 1:
        steps[0].add_(1)
    elif steps and steps[0].device.type == "cpu":
        torch._foreach_add_(steps, torch.tensor(1.0, dtype=torch.float64), alpha=1.0)
    elif steps:
        torch._foreach_add_(steps, 1)


def _in_float32(steps: list[Tensor]) -> list[Tensor]:
    """Copies: a fused kernel counts in float32, in which 2²⁴ + 1 is 2²⁴."""
    if len(steps) == 1:
        return [steps[0].to(torch.float32)]
    return list(torch.stack(steps).to(torch.float32).unbind())


def _sgd(
    params: list[Tensor], grads: list[Tensor], slots: list[Slots], numbers: Mapping[str, Any], fused: bool
) -> None:
    moving = numbers["momentum"] != 0
    buffers: list[Tensor | None] = [own["momentum_buffer"] if moving else None for own in slots]
    torch_sgd(params, grads, buffers, fused=True if fused else None, **numbers)


def _through(
    function: Callable[..., None],
    *names: str,
    fusible: bool = False,
    captures: bool = True,
    without: tuple[str, ...] = (),
) -> tuple[Callable[[Mapping[str, Any]], dict[str, Any]], Run]:
    """Numbers and step of one of torch's functions that take a list of tensors for each slot, counts, and numbers.

    Args:
        names: of the slots in order; a list is empty where the option that needs the slot is off.
        fusible: whether it has a keyword `fused`.
        captures: whether it has a keyword `capturable`: then it leaves the counts on the device.
        without: arguments that matter only at the start.
    """

    taken = inspect.signature(function).parameters

    def numbers(arguments: Mapping[str, Any]) -> dict[str, Any]:
        found = {name: value for name, value in arguments.items() if name not in without}
        if DECOUPLED not in taken:
            found.pop(DECOUPLED, None)
        if "betas" in found:
            found["beta1"], found["beta2"] = found.pop("betas")
        if "etas" in found:
            found["etaminus"], found["etaplus"] = found.pop("etas")
            found["step_size_min"], found["step_size_max"] = found.pop("step_sizes")
        return found

    def run(
        params: list[Tensor], grads: list[Tensor], slots: list[Slots], numbers: Mapping[str, Any], fused: bool
    ) -> None:
        steps = [own["step"] for own in slots]
        options = {"fused": True} if fusible and fused else {}
        if captures:
            options["capturable"] = not fused and params[0].device.type != "cpu"
        lists = ([own[name] for own in slots] if all(name in own for own in slots) else [] for name in names)
        function(params, grads, *lists, _in_float32(steps) if fused else steps, **numbers, **options)
        if fused:
            count(steps)

    return numbers, run


_PLAIN = (Tensor, torch.nn.Parameter)
_FULL = (torch.float32, torch.float64)
# In float16 torch's smallest eps is 0, and 0 / 0 no update.
_REAL = (*_FULL, torch.bfloat16)
_ADAM = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
KERNELS: dict[Callable[..., Any], Kernel] = {
    # torch leaves a first gradient undampened only where no buffer is there yet, and ours start at zero.
    sgd: Kernel(
        "torch.optim.sgd",
        lambda arguments: {**arguments, "dampening": 0.0},
        _sgd,
        counts=False,
        fused=True,
        fits=lambda a: a["dampening"] == 0,
    ),
    adam: Kernel(
        "torch.optim.adam",
        *_through(torch_adam, *_ADAM, fusible=True),
        fused=True,
        fits=lambda a: not a[DECOUPLED] or DECOUPLED in inspect.signature(torch_adam).parameters,
    ),
    adamw: Kernel("torch.optim.adamw", *_through(torch_adamw, *_ADAM, fusible=True), fused=True),
    rmsprop: Kernel("torch.optim.rmsprop", *_through(torch_rmsprop, "square_avg", "grad_avg", "momentum_buffer")),
    adagrad: Kernel(
        "torch.optim.adagrad",
        *_through(torch_adagrad, "sum", fusible=True, captures=False, without=("initial_accumulator_value",)),
        fused=True,
        devices=("cpu",),
    ),
    adadelta: Kernel("torch.optim.adadelta", *_through(torch_adadelta, "square_avg", "acc_delta")),
    adamax: Kernel("torch.optim.adamax", *_through(torch_adamax, "exp_avg", "exp_inf")),
    nadam: Kernel("torch.optim.nadam", *_through(torch_nadam, "exp_avg", "exp_avg_sq", "mu_product")),
    radam: Kernel("torch.optim.radam", *_through(torch_radam, "exp_avg", "exp_avg_sq")),
    asgd: Kernel("torch.optim.asgd", *_through(torch_asgd, "ax", "mu", "eta")),
    rprop: Kernel("torch.optim.rprop", *_through(torch_rprop, "prev", "step_size", without=("lr",))),
}
