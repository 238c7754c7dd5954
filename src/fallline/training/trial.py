"""A trial under way: one model, one optimizer, one seed. `fit` and the sequential engine both run this.

The model is run as the module that it is, so any module will do. Where the optimizer works element by element and every
parameter takes part, the parameters are views of one flat vector and the rule is called once per step, or torch's own
kernel where torch has the same optimizer. An optimizer made by `from_torch` is no rule: it gets a closure.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fallline.errors import FalllineError
from fallline.losses import Loss, cross_entropy, huber, mse, smooth_l1
from fallline.optim import Landscape, Optimizer, State
from fallline.optim.kernels import FlatStep, flat_step
from fallline.optim.torch_own import TorchOwn, state_from_tensors, state_to_tensors
from fallline.tasks import Task
from fallline.training.batches import BatchOrder
from fallline.training.device import with_generators
from fallline.training.layout import FLAT, Layout
from fallline.training.step import Program, gradients, joined

# Samples per forward pass when the model is evaluated.
EVALUATION_CHUNK = 1024
# torch's functions for the losses that it computes in one kernel with the same value and gradient.
TORCH_LOSSES: Mapping[Callable[..., Loss], Callable[..., Tensor]] = {
    cross_entropy: functional.cross_entropy,
    mse: functional.mse_loss,
    huber: functional.huber_loss,
    smooth_l1: functional.smooth_l1_loss,
}
# On a CPU torch's cross-entropy is the slower one for more samples than these.
LARGEST_CROSS_ENTROPY = 256


@dataclass(frozen=True)
class Flat:
    """All parameters as one vector, for an optimizer that works element by element.

    Attributes:
        layout: where each parameter lies.
        parameters: the vector that the model's parameters are views of.
        gradient: room for their gradients, and `parts`, its views.
        kernel: the step in place, where torch has the optimizer too.
    """

    layout: Layout
    parameters: Tensor
    gradient: Tensor
    parts: list[Tensor]
    kernel: FlatStep | None = None


class Trial:
    """One configuration with one seed, from `torch.manual_seed(seed); task.model()` on.

    The random numbers that the model draws while training (dropout) continue the stream that made its parameters, as
    in a plain loop, whatever else draws random numbers in between.
    """

    def __init__(self, task: Task, optimizer: Optimizer, seed: int, *, steps: int, device: torch.device) -> None:
        self.task = task
        self.optimizer = optimizer
        self.seed = seed
        self.steps = steps
        self.device = device
        self.step = 0
        self.alive = True
        with torch.random.fork_rng(with_generators(device)):
            module = task.build_model(seed).to(device)
            self._random = _random_state(device)
        module.train()
        self.program = Program(module, task.loss)
        self.loss = fewer_kernels(task.loss, task.train.y)
        self.params: dict[str, nn.Parameter] = self.program.trainable()
        self.order = BatchOrder(
            len(task.train.x), task.batch_size, seed, drop_last=task.drop_last, shuffle=task.shuffle, device=device
        )
        self.train = (task.train.x.to(device), task.train.y.to(device))
        self.validation = (task.validation.x.to(device), task.validation.y.to(device))
        self.flat: Flat | None = None
        self.own: torch.optim.Optimizer | None = None
        self.state: State = {}
        # Asking for a loss costs nothing on a CPU, and on any other device holds the program up: there the steps of a
        # diverged trial go on, and change nothing.
        self._asks = device.type == "cpu"
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._numbers = {n: torch.tensor(v, dtype=torch.float64, device=device) for n, v in optimizer.numbers.items()}
        self._lay_out()

    @property
    def module(self) -> nn.Module:
        """The model, with the parameters that it has now."""
        return self.program.module

    def train_steps(self, count: int) -> np.ndarray[Any, np.dtype[np.floating[Any]]]:
        """Makes `count` steps; returns their mini-batch losses, NaN from the step after the one that diverged."""
        losses: list[Tensor] = []
        with self._own_random_numbers():
            while self.alive and len(losses) < count:
                losses.append(self._one_step())
        recorded = torch.stack(losses).double().cpu().numpy() if losses else np.zeros(0)
        bad = np.flatnonzero(~np.isfinite(recorded))
        if bad.size:
            self.alive = False
            recorded[bad[0] + 1 :] = np.nan
        return np.concatenate([recorded, np.full(count - len(recorded), np.nan)])

    def evaluate(self) -> tuple[float, float]:
        """The metric and the loss on the validation data, in evaluation mode, with the evaluation parameters."""
        x, y = self.validation
        was_training = self.module.training
        self.module.eval()
        with torch.no_grad(), self._own_random_numbers(), self._evaluation_parameters():
            prediction = joined([self.module(part) for part in x.split(EVALUATION_CHUNK)])
            metric, loss = self.task.metric(prediction, y), self.task.loss(prediction, y)
        self.module.train(was_training)
        return float(metric), float(loss)

    def parameters(self) -> dict[str, Tensor]:
        """A copy of the model's state as it is evaluated now, parameters and buffers, on the CPU."""
        with self._evaluation_parameters():
            return self._state_of_module()

    def tensors(self) -> dict[str, Tensor]:
        """A copy of everything that going on from here needs, as tensors by name."""
        kept = {f"model/{name}": tensor for name, tensor in self._state_of_module().items()}
        if self.own is not None:
            kept.update({f"optimizer/{name}": t for name, t in state_to_tensors(self.own.state_dict()).items()})
        else:
            kept["optimizer/step"] = self.state["step"].clone()
        for name, slots in self.state.get("slots", {}).items():
            kept.update({f"optimizer/slots/{slot}/{name}": tensor.clone() for slot, tensor in slots.items()})
        kept["random/cpu"] = self._random[0]
        if len(self._random) > 1:
            kept["random/device"] = self._random[1]
        return kept

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Goes back to where `tensors()` were taken, after `step` steps."""
        model = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
        self.module.load_state_dict(model)
        self._random = [t for name, t in sorted(tensors.items()) if name.startswith("random/")]
        self.step = step
        self.alive = True
        self._finite = torch.ones_like(self._finite)
        if self.own is not None:
            kept = {n.removeprefix("optimizer/"): t for n, t in tensors.items() if n.startswith("optimizer/")}
            self.own.load_state_dict(state_from_tensors({name: tensor.clone() for name, tensor in kept.items()}))
            return
        slots: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer/slots/"):
                slot, parameter = name.removeprefix("optimizer/slots/").split("/", 1)
                slots.setdefault(parameter, {})[slot] = tensor.to(self.device, copy=True)
        if self.flat is not None and slots.keys() != {FLAT}:
            self._separate()
        self.state = {
            "step": tensors["optimizer/step"].to(self.device, copy=True),
            "slots": {**{name: {} for name in self.state["slots"]}, **slots},
        }

    def _one_step(self) -> Tensor:
        index = self.order.at(self.step)
        x, y = self.train[0].index_select(0, index), self.train[1].index_select(0, index)
        loss = self._rule_step(x, y) if self.own is None else self._own_step(self.own, x, y)
        self.step += 1
        return loss

    def _rule_step(self, x: Tensor, y: Tensor) -> Tensor:
        """The step of a rule, unless the loss is not finite; returns the loss before it."""
        surveys = self.optimizer.surveys(self.step)
        keep = surveys and self.optimizer.curves
        loss = (self.task.loss if surveys else self.loss)(self.module(x), y)
        if self._asks and not math.isfinite(loss.item()):
            self.alive = False
            return loss.detach()
        slopes = gradients(loss, self.params, keep=keep)
        landscape = self.program.landscape(self.params, x, y, slopes) if surveys else None
        grads = {name: slope.detach() for name, slope in slopes.items()} if keep else slopes
        loss = loss.detach()
        with torch.no_grad():
            if not self._asks:
                self._finite = self._finite & torch.isfinite(loss)  # once diverged, a finite loss is no new life
            self._update(grads, landscape)
        return loss

    def _own_step(self, own: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        """The step of an optimizer made by `from_torch`; returns the loss before it.

        If that is not finite the parameters stay as they are.
        """
        losses: list[Tensor] = []

        def closure() -> Any:
            own.zero_grad()
            with torch.enable_grad():
                loss = self.task.loss(self.module(x), y)
                loss.backward()
            losses.append(loss.detach())
            return loss

        before = {name: p.detach().clone() for name, p in self.params.items()}
        own.step(closure)
        own.zero_grad()
        if not losses:
            raise FalllineError(f"{self.optimizer.name}.step(closure) did not call the closure: it has to.")
        if not losses[0].isfinite():
            self.alive = False
            with torch.no_grad():
                for name, p in self.params.items():
                    p.copy_(before[name])
        return losses[0]

    def _update(self, grads: dict[str, Tensor], landscape: Landscape | None) -> None:
        """The optimizer's step; where a diverged trial goes on, its parameters stay as they are."""
        if self.flat is not None and len(grads) < len(self.params):
            self._separate()
        if self.flat is not None:
            torch._foreach_copy_(self.flat.parts, list(grads.values()))
            if self.flat.kernel is not None:
                self._update_in_place(self.flat, self.flat.kernel)
                return
            grads = {FLAT: self.flat.gradient}
        params = self._trained()
        updates, state = self.optimizer.update(
            grads, self.state, params, self._numbers, steps=self.steps, step=self.step, landscape=landscape
        )
        if not self._asks and self.optimizer.moves_evaluation:
            state = state_where(self._finite, state, self.state)
        reused = [self.flat.gradient] if self.flat is not None else []
        self.state = apart_from([*params.values(), *reused], state)
        for name, update in updates.items():
            params[name].add_(update if self._asks else torch.where(self._finite, update, 0))

    def _update_in_place(self, flat: Flat, kernel: FlatStep) -> None:
        before = None if self._asks else flat.parameters.clone()
        kernel(flat.parameters, flat.gradient, self.state["slots"][FLAT], self.state["step"], self.step)
        if before is not None:
            torch.where(self._finite, flat.parameters, before, out=flat.parameters)

    def _trained(self) -> Mapping[str, Tensor]:
        """The tensors that the optimizer sees: the parameters, or the vector that they are views of."""
        return {FLAT: self.flat.parameters} if self.flat is not None else self.params

    @contextmanager
    def _evaluation_parameters(self) -> Iterator[None]:
        """The model has the parameters that it is to be evaluated with."""
        if not self.optimizer.moves_evaluation:
            yield
            return
        with torch.no_grad():
            trained = self._trained()
            before = {name: p.clone() for name, p in trained.items()}
            chosen = self.optimizer.evaluation_parameters(self.state, before, self._numbers, steps=self.steps)
            for name, p in trained.items():
                p.copy_(chosen[name])
            try:
                yield
            finally:
                for name, p in trained.items():
                    p.copy_(before[name])

    def _state_of_module(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.module.state_dict().items()}

    def _lay_out(self) -> None:
        """Makes the parameters views of one flat vector, where the optimizer allows it."""
        if isinstance(self.optimizer, TorchOwn):
            self.own = self.optimizer.as_torch(list(self.params.values()), steps=self.steps, seed=self.seed)
            return
        dtypes = {p.dtype for p in self.params.values()}
        init = functools.partial(self.optimizer.init, numbers=self._numbers, steps=self.steps, seed=self.seed)
        if self.optimizer.elementwise and len(dtypes) == 1 and not next(iter(dtypes)).is_complex:
            layout = Layout.of(self.params)
            with torch.no_grad():
                flat = layout.flatten(self.params)
                for name, view in layout.views(flat).items():
                    self.params[name].data = view
            gradient = torch.zeros_like(flat)
            self.state = init({FLAT: flat})
            kernel = flat_step(self.optimizer, flat, self.state["slots"][FLAT], steps=self.steps)
            self.flat = Flat(layout, flat, gradient, list(layout.views(gradient).values()), kernel)
        else:
            self.state = init({name: p.detach() for name, p in self.params.items()})

    def _separate(self) -> None:
        """Goes on parameter by parameter: some parameter takes no part in the loss, and is not to be updated."""
        assert self.flat is not None
        self.state = self.flat.layout.split(self.state)
        self.flat = None

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        with torch.random.fork_rng(with_generators(self.device)):
            torch.set_rng_state(self._random[0])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(self._random[1], self.device)
            yield
            self._random = _random_state(self.device)


def fewer_kernels(loss: Loss, targets: Tensor) -> Callable[[Any, Tensor], Tensor]:
    """The loss, through torch's function for the batches for which that is the same and takes less time.

    Args:
        targets: all that there are. Where some are to be ignored a mean may be over nothing, which torch makes NaN.
    """
    function = TORCH_LOSSES.get(loss.call.function) if loss.call is not None else None
    if loss.call is None or function is None or any(isinstance(number, Tensor) for number in loss.numbers.values()):
        return loss
    classes = function is functional.cross_entropy
    if classes:
        given = loss.call.arguments
        ignored = targets == given["ignore_index"]
        if given["weight"] is not None or targets.dtype != torch.int64 or bool(ignored.any()):
            return loss
    compute = functools.partial(function, reduction=loss.reduction, **loss.numbers)

    def computed(prediction: Any, target: Tensor) -> Tensor:
        if not isinstance(prediction, Tensor) or prediction.dtype not in (torch.float32, torch.float64):
            return loss(prediction, target)
        if classes:
            few = prediction.device.type != "cpu" or target.numel() <= LARGEST_CROSS_ENTROPY
            same = few and target.dim() == 1 and prediction.dim() == 2 and prediction.shape[:1] == target.shape
        else:
            same = prediction.shape == target.shape and prediction.dtype == target.dtype
        return compute(prediction, target) if same else loss(prediction, target)

    return computed


def state_where(condition: Tensor, new: Any, old: Any) -> Any:
    """The new state of an optimizer where the condition holds, a number or [row, 1], and the old one elsewhere.

    Models that are evaluated with their optimizer's state need one of before they diverged.
    """
    if isinstance(new, dict):
        return {name: state_where(condition, tensor, old[name]) for name, tensor in new.items()}
    return torch.where(condition.reshape(-1, *[1] * (new.dim() - 1)) if condition.dim() else condition, new, old)


def apart_from(params: Iterable[Tensor], state: Any) -> Any:
    """The state, with copies of what shares memory with tensors that change in place: parameters, a gradient's room."""
    taken = {p.untyped_storage().data_ptr() for p in params}

    def own(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {name: own(item) for name, item in tree.items()}
        return tree.clone() if tree.untyped_storage().data_ptr() in taken else tree

    return own(state)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states
