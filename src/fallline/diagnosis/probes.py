"""What the sanity checks measure on a task: a model of it is built, run, disturbed and fitted to eight samples."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fallline import losses
from fallline.losses import Finding, Loss
from fallline.losses.base import Prediction, Target
from fallline.optim import adam
from fallline.tasks import Task
from fallline.training.step import joined

Level: TypeAlias = Literal["warning", "note"]
# Samples that are looked at.
SAMPLES = 256
# Samples that are learnt by heart, with which learning rates, and for how many steps at most.
BY_HEART = 8
RATES = (1e-3, 1e-2, 1e-1)
STEPS = 400
# What differs by less than this share is the same but for rounding.
ROUND_OFF = 1e-4
# A new model whose last layer is zero says nothing about where gradients go: all its parameters are moved a little.
DISTURBANCE = 0.1


class Subject:
    """A task under examination: one model of it, and some of its training data."""

    def __init__(self, task: Task, seed: int, device: torch.device) -> None:
        self.task = task
        task.findings  # noqa: B018 - which gives the data the type of the model
        self.device = device
        self.seed = seed
        with torch.random.fork_rng(_devices(device)):
            self.model = task.build_model(seed).to(device)
        count = min(SAMPLES, len(task.train))
        rows = torch.linspace(0, len(task.train) - 1, count).long()  # spread over all: data are often sorted
        self.x, self.y = task.train.x[rows].to(device), task.train.y[rows].to(device)
        self._fit: Fit | None = None

    @cached_property
    def findings(self) -> list[Finding]:
        """What is wrong with the loss: found by the task's own check, and on the samples that are looked at."""
        if any(finding.severity == "error" for finding in self.task.findings):
            return list(self.task.findings)
        with torch.random.fork_rng(_devices(self.device)), torch.enable_grad():
            torch.manual_seed(self.seed)
            prediction = self.model.train()(self.x)
            found = losses.check(self.task.loss, prediction, self.y, self.model)
        return list(dict.fromkeys([*self.task.findings, *found]))

    def initial_loss(self) -> float:
        """The loss of the new model in evaluation mode."""
        return float(self.task.loss(self.predicted(self.model, self.x), self.y))

    def predicted(self, model: nn.Module, x: Tensor) -> Any:
        """The prediction in evaluation mode, without gradients; the random state of the caller is untouched."""
        was_training = model.training
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(_devices(self.device)):
            torch.manual_seed(self.seed)
            found = joined([model(part) for part in x.split(max(1, self.task.batch_size))])
        model.train(was_training)
        return found

    @cached_property
    def disturbed(self) -> nn.Module:
        """The model with every parameter moved a little, so that nothing in it is 0."""
        model = copy.deepcopy(self.model)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                size = float(parameter.double().pow(2).mean().sqrt()) if parameter.numel() else 0.0
                fan = parameter[0].numel() if parameter.ndim > 1 else 1
                parameter.add_((noise * (size or fan**-0.5) * DISTURBANCE).to(parameter))
        return model

    def overfitted(self) -> Fit:
        """The fit of a few samples, made once."""
        if self._fit is None:
            with torch.random.fork_rng(_devices(self.device)):
                torch.manual_seed(self.seed)
                self._fit = learn_by_heart(self)
        return self._fit


@dataclass(frozen=True)
class Fit:
    """How learning a few samples by heart went.

    Attributes:
        first, last: the loss in training mode before and after, the best of the learning rates.
        evaluated: the loss after it in evaluation mode.
        floor: the loss of a perfect prediction; None where that is not known.
        lr, steps, samples: how it was done.
    """

    first: float
    last: float
    evaluated: float
    floor: float | None
    lr: float
    steps: int
    samples: int


def learn_by_heart(subject: Subject) -> Fit:
    """Trains a copy of the model on a few samples, dropout switched off, with the best of several learning rates."""
    trainable = sum(p.numel() for p in subject.model.parameters() if p.requires_grad)
    outputs = _flat(subject.predicted(subject.model, subject.x[:1])).numel()
    count = max(1, min(BY_HEART, len(subject.x), trainable // max(1, outputs)))  # a line goes through two points
    pick = torch.linspace(0, len(subject.x) - 1, count).long()
    x, y = subject.x[pick], subject.y[pick]
    loss = subject.task.loss
    floor = _of_perfection(loss, subject, x, y)
    best: Fit | None = None
    bottom = 0.0 if floor is None else floor
    for lr in RATES:
        model = copy.deepcopy(subject.model).train()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        optimizer = adam(lr=lr).as_torch([p for p in model.parameters() if p.requires_grad])
        first = last = float("nan")
        step = 0
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            value = loss(model(x), y)
            last = float(value.detach())
            first = last if step == 1 else first
            if not value.isfinite() or not value.requires_grad or last - bottom < 0.01 * (first - bottom):
                break
            value.backward()
            optimizer.step()
        made = Fit(first, last, float("nan"), floor, lr, step, count)
        if best is None or made.last < best.last:
            evaluated = float(loss(subject.predicted(model, x), y))
            best = Fit(first, last, evaluated, floor, lr, step, count)
        if best.last - bottom < 0.01 * (best.first - bottom):
            break
    assert best is not None
    return best


def _of_perfection(loss: Loss, subject: Subject, x: Tensor, y: Tensor) -> float | None:
    """The loss of the best prediction there is; None where it is not known what that is."""
    prediction = subject.predicted(subject.model, x)
    if not isinstance(prediction, Tensor):
        return None
    best: Tensor | None = None
    if prediction.shape == y.shape and loss.prediction is Prediction.REAL and y.is_floating_point():
        best = y
    elif loss.prediction is Prediction.YES_LOGITS and prediction.shape == y.shape:
        best = torch.logit(y.clamp(1e-6, 1 - 1e-6))
    elif loss.prediction is Prediction.LOGITS and _are_classes(prediction, y):
        lowest = float("inf")
        for size in (1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0):  # label smoothing wants a certain confidence
            hot = torch.zeros_like(prediction).scatter(1, y.clamp(0, prediction.shape[1] - 1).unsqueeze(1), size)
            lowest = min(lowest, float(loss(hot, y)))
        return lowest
    elif loss.prediction is Prediction.LOG_PROBABILITIES and _are_classes(prediction, y):
        return 0.0
    return float(loss(best, y)) if best is not None else None


def _are_classes(prediction: Tensor, target: Tensor) -> bool:
    return not target.is_floating_point() and prediction.ndim == target.ndim + 1


def loss_of_a_guess(subject: Subject) -> tuple[float, str] | None:
    """The loss of a prediction that knows nothing of its input, and how it is made; None where that is not known."""
    loss, y = subject.task.loss, subject.y
    prediction = subject.predicted(subject.model, subject.x)
    if not isinstance(prediction, Tensor):
        return None
    zeros = torch.zeros_like(prediction)
    if loss.prediction is Prediction.LOGITS and prediction.ndim > 1:
        classes = prediction.shape[1]
        return float(loss(zeros, y)), f"all {classes} classes alike"
    if loss.prediction is Prediction.LOG_PROBABILITIES and prediction.ndim > 1:
        return float(loss(zeros.log_softmax(1), y)), f"all {prediction.shape[1]} classes alike"
    if loss.prediction is Prediction.YES_LOGITS:
        return float(loss(zeros, y)), "yes and no alike"
    if loss.prediction is Prediction.PROBABILITIES:
        return float(loss(zeros + 0.5, y)), "yes and no alike"
    if loss.prediction is Prediction.REAL and loss.target is Target.REAL and prediction.shape == y.shape:
        return float(loss(y.mean(0).expand_as(y).to(prediction), y)), "the mean of the targets"
    return None


def spread_over_samples(subject: Subject) -> float:
    """How much the outputs of different samples differ, as a share of their size; 0 if they are all the same."""
    outputs = _flat(subject.predicted(subject.disturbed, subject.x))
    if len(outputs) < 2 or bool((subject.x == subject.x[:1]).all()):
        return 1.0
    return float((outputs - outputs[:1]).abs().max() / outputs.abs().max().clamp(min=1e-30))


def gradient_sizes(subject: Subject) -> dict[str, float | None]:
    """The largest gradient of each trainable parameter over the samples; None for one that is not part of the loss."""
    model = copy.deepcopy(subject.disturbed).train()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sizes: dict[str, float | None] = dict.fromkeys(params)
    with torch.random.fork_rng(_devices(subject.device)), torch.enable_grad():
        torch.manual_seed(subject.seed)
        for x, y in zip(*(each.split(max(2, subject.task.batch_size)) for each in (subject.x, subject.y)), strict=True):
            value = subject.task.loss(model(x), y)
            if not value.requires_grad:
                continue
            found = torch.autograd.grad(value, list(params.values()), allow_unused=True)
            for name, gradient in zip(params, found, strict=True):
                if gradient is not None:
                    sizes[name] = max(sizes[name] or 0.0, float(gradient.abs().max()) if gradient.numel() else 1.0)
    return sizes


def influence_of_other_samples(subject: Subject) -> float | None:
    """How much an output changes when the other samples of its batch are other ones, as a share of the outputs' size.

    None where there are no others.
    """
    half = len(subject.x) // 2
    if half < 1:
        return None
    count = min(half, 16)
    first, others = subject.x[:count], subject.x[half : half + count]
    model = subject.disturbed
    together = _flat(_at_once(subject, model, first))
    mixed = first.clone()
    mixed[1::2] = others[1::2]
    other = _flat(_at_once(subject, model, mixed))
    kept = slice(0, None, 2)
    if len(together) != count or len(other) != count:
        return None
    alone = torch.cat([_flat(_at_once(subject, model, first[i : i + 1])) for i in range(0, count, 2)])
    size = together.abs().max().clamp(min=1e-30)
    change = (together[kept] - other[kept]).abs().max() / size
    if alone.shape == together[kept].shape:
        change = torch.maximum(change, (together[kept] - alone).abs().max() / size)
    return float(change)


def _at_once(subject: Subject, model: nn.Module, x: Tensor) -> Any:
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(_devices(subject.device)):
        torch.manual_seed(subject.seed)
        return model(x)


def noise_of_evaluation(subject: Subject) -> float:
    """How much two passes in evaluation mode differ, as a share of the outputs' size."""
    model = subject.disturbed.eval()
    with torch.no_grad(), torch.random.fork_rng(_devices(subject.device)):
        torch.manual_seed(subject.seed)
        x = subject.x[: max(1, subject.task.batch_size)]
        first, second = (_flat(model(x)) for _ in range(2))
    return float((first - second).abs().max() / first.abs().max().clamp(min=1e-30))


@dataclass(frozen=True)
class Duplicates:
    """Exact duplicates among inputs: validation samples that are in the training data, how many of them with the same
    target, training samples that are there more than once, and how many samples there are."""

    across: int
    same_target: int
    within: int
    validation: int
    train: int


def duplicates(task: Task) -> Duplicates:
    """Counts the duplicates by the bytes of their inputs."""
    trained = _digests(task.train.x)
    targets: dict[bytes, set[bytes]] = {}
    for key, target in zip(trained, _digests(task.train.y), strict=True):
        targets.setdefault(key, set()).add(target)
    validated = list(zip(_digests(task.validation.x), _digests(task.validation.y), strict=True))
    across = [(key, target) for key, target in validated if key in targets]
    same = sum(target in targets[key] for key, target in across)
    return Duplicates(len(across), same, len(trained) - len(targets), len(validated), len(trained))


def _digests(tensor: Tensor) -> list[bytes]:
    rows = tensor.detach().cpu().reshape(len(tensor), -1)
    if rows.is_floating_point():
        rows = rows + 0.0  # −0 is 0
    array = rows.contiguous().view(torch.uint8).numpy() if rows.numel() else rows.numpy()
    return [row.tobytes() for row in array]


def _flat(prediction: Any) -> Tensor:
    """The prediction as [sample, number]; of a tuple the parts side by side that have the samples of the first."""
    parts = prediction if isinstance(prediction, tuple | list) else (prediction,)
    first = len(parts[0])
    return torch.cat([part.reshape(first, -1).double() for part in parts if len(part) == first], dim=1)


def _devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
