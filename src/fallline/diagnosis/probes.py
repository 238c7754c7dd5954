"""What the sanity checks measure on a task: a model of it is built, run, disturbed and fitted to eight samples."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fallline import losses
from fallline.losses import Finding, Loss
from fallline.losses.base import Prediction, Target
from fallline.losses.misuse.finding import errors_among, not_yet_said
from fallline.optim import adam
from fallline.tasks import Task
from fallline.training.device import with_generators
from fallline.training.step import joined

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
# So many columns with so many values each at most: then two samples may be equal by chance.
FEW = 16
MEAN = "the mean of the targets"
# What compares samples with each other; of these a constant is no guess.
RELATIVE = (Prediction.EMBEDDINGS, Prediction.DISTANCES)


class Subject:
    """A task under examination: one model of it, and some of its training data."""

    def __init__(self, task: Task, seed: int, device: torch.device) -> None:
        self.task = task
        task.findings  # noqa: B018 - which gives the data the type of the model
        self.device = device
        self.seed = seed
        with torch.random.fork_rng(with_generators(device)):
            self.model = task.build_model(seed).to(device)
        count = min(SAMPLES, len(task.train))
        rows = task.train.spread(count)
        self.x, self.y = task.train.x[rows].to(device), task.train.y[rows].to(device)

    @cached_property
    def findings(self) -> list[Finding]:
        """What is wrong with the loss: found by the task's own check, and on the samples that are looked at."""
        told = list(self.task.findings)
        if errors_among(told):
            return told
        with self.quietly(), torch.enable_grad():
            prediction = copy.deepcopy(self.model).train()(self.x)
            found = losses.check(self.task.loss, prediction, self.y)
        told += not_yet_said(found, told)
        # Which parameters get no gradient is a check of its own, with other parameters and on more samples.
        return [each for each in told if each.code != "zero-gradient" or each.severity == "error"]

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Random numbers from the seed, those of the caller untouched, and no warnings of torch's."""
        with torch.random.fork_rng(with_generators(self.device)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(self.seed)
            yield

    def chunks(self, tensor: Tensor) -> list[Tensor]:
        """The tensor in mini-batches, a last one of a single sample joined to the one before: BatchNorm needs two."""
        parts = list(tensor.split(max(2, self.task.batch_size)))
        if len(parts) > 1 and len(parts[-1]) == 1:
            parts[-2:] = [torch.cat(parts[-2:])]
        return parts

    @cached_property
    def started(self) -> Any:
        """The prediction of the new model as it is trained: with the statistics of the batch, without dropout."""
        return self.predicted(without_dropout(copy.deepcopy(self.model).train()), self.x)

    @cached_property
    def initial_loss(self) -> float:
        """The loss of the new model."""
        return float(self.task.loss(self.started, self.y))

    def predicted(self, model: nn.Module, x: Tensor) -> Any:
        """The prediction in the mode that the model is in, without gradients."""
        with torch.no_grad(), self.quietly():
            found = joined([model(part) for part in self.chunks(x)])
        return tuple(part.detach() for part in found) if isinstance(found, tuple | list) else found.detach()

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

    @cached_property
    def overfitted(self) -> Fit:
        """The fit of a few samples."""
        with self.quietly():
            return learn_by_heart(self)

    @cached_property
    def evaluation_noise(self) -> float:
        """How much two passes in evaluation mode differ, as a share of the outputs' size."""
        model = self.disturbed.eval()
        x = self.chunks(self.x)[0]
        with torch.no_grad(), self.quietly():
            first, second = (_flat(model(x)) for _ in range(2))
        return float((first - second).abs().max() / first.abs().max().clamp(min=1e-30))


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


def without_dropout(model: nn.Module) -> nn.Module:
    """The model with its dropout layers switched off, in place."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    return model


def learn_by_heart(subject: Subject) -> Fit:
    """Trains a copy of the model on a few samples, dropout switched off, with the best of several learning rates."""
    trainable = sum(p.numel() for p in subject.model.parameters() if p.requires_grad)
    outputs = _flat(subject.started)[0].numel()
    different = _different(subject.x)  # equal inputs with other targets cannot be learnt by heart
    count = max(1, min(BY_HEART, len(different), trainable // max(1, outputs)))  # a line goes through two points
    pick = different[torch.linspace(0, len(different) - 1, count).long()]
    x, y = subject.x[pick], subject.y[pick]
    loss = subject.task.loss
    floor = _of_perfection(loss, _rows(subject.started, pick, len(subject.x)), y)

    def learnt(first: float, last: float) -> bool:
        return 0 <= last < 0.01 * first if floor is None else last - floor < 0.01 * (first - floor)

    best: Fit | None = None
    for lr in RATES:
        model = without_dropout(copy.deepcopy(subject.model).train())
        optimizer = adam(lr=lr).as_torch([p for p in model.parameters() if p.requires_grad])
        first = last = float("nan")
        step = 0
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            value = loss(model(x), y)
            last = float(value.detach())
            first = last if step == 1 else first
            if not value.isfinite() or not value.requires_grad or (step > 1 and learnt(first, last)):
                break
            value.backward()
            optimizer.step()
        if best is None or last < best.last:
            evaluated = float(loss(subject.predicted(model.eval(), x), y))
            best = Fit(first, last, evaluated, floor, lr, step, count)
        if learnt(best.first, best.last):
            break
    assert best is not None
    return best


def _different(x: Tensor) -> Tensor:
    """The numbers of the samples whose input no sample before has."""
    first: dict[bytes, int] = {}
    for i, key in enumerate(_digests(x)):
        first.setdefault(key, i)
    return torch.tensor(list(first.values()))


def _rows(prediction: Any, pick: Tensor, samples: int) -> Any:
    if isinstance(prediction, Tensor):
        return prediction[pick]
    return tuple(part[pick] if len(part) == samples else part for part in prediction)


def _of_perfection(loss: Loss, prediction: Any, y: Tensor) -> float | None:
    """The loss of the best prediction there is for these targets; None where it is not known what that is."""
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
    """The loss of a prediction that knows nothing of its input, and how it is made; None where there is none."""
    loss, y, prediction = subject.task.loss, subject.y, subject.started
    if loss.prediction is Prediction.HIDDEN_STATES:
        classes = len(prediction[1])
        return float(loss((torch.zeros_like(prediction[0]), *prediction[1:2]), y)), f"all {classes} classes alike"
    if isinstance(prediction, Tensor):
        zeros = torch.zeros_like(prediction)
        if loss.prediction is Prediction.LOGITS and prediction.ndim > 1:
            return float(loss(zeros, y)), f"all {prediction.shape[1]} classes alike"
        if loss.prediction is Prediction.LOG_PROBABILITIES and prediction.ndim > 1 and loss.kind == "classification":
            return float(loss(zeros.log_softmax(1), y)), f"all {prediction.shape[1]} classes alike"
        if loss.prediction in (Prediction.YES_LOGITS, Prediction.PROBABILITIES):
            return float(loss(zeros + 0.5 * (loss.prediction is Prediction.PROBABILITIES), y)), "yes and no alike"
        if loss.prediction is Prediction.REAL and loss.target is Target.REAL and prediction.shape == y.shape:
            return float(loss(y.mean(0).expand_as(y).to(prediction), y)), MEAN
    if loss.prediction in RELATIVE:
        return None
    value = _of_a_constant(loss, prediction, y)
    return None if value is None else (value, "the best constant")


def targets_are_far(subject: Subject) -> bool:
    """Whether the targets are farther from 0 than the outputs are, so that they, not the outputs, are to be scaled."""
    return float(subject.y.double().pow(2).mean()) > float(_flat(subject.started).pow(2).mean())


def _of_a_constant(loss: Loss, prediction: Any, y: Tensor) -> float | None:
    """The loss of the best output that is the same for every sample, found by going downhill from the mean output."""
    parts = prediction if isinstance(prediction, tuple) else (prediction,)
    if any(len(part) != len(parts[0]) or not part.is_floating_point() for part in parts):
        return None
    best: float | None = None
    first = y.double().mean(0).to(parts[0]) if y.shape == parts[0].shape else parts[0].mean(0)
    starts = [[first, *(part.mean(0) for part in parts[1:])]]
    for start in (*starts, [part.mean(0) for part in parts], [torch.zeros_like(part[0]) for part in parts]):
        constants = [part.detach().clone().requires_grad_() for part in start]
        optimizer = adam(lr=0.05).as_torch(constants)
        for _ in range(STEPS // 2):
            same = tuple(c.expand_as(part) for c, part in zip(constants, parts, strict=True))
            with torch.enable_grad():
                value = loss(same if isinstance(prediction, tuple) else same[0], y)
            if not value.isfinite() or not value.requires_grad:
                break
            best = min(float(value.detach()), float("inf") if best is None else best)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return best


def spread_over_samples(subject: Subject) -> float:
    """How much the outputs of different samples differ, as a share of their size; 0 if they are all the same."""
    outputs = _flat(subject.predicted(subject.disturbed.eval(), subject.x))
    if len(outputs) < 2 or bool((subject.x == subject.x[:1]).all()):
        return 1.0
    return float((outputs - outputs[:1]).abs().max() / outputs.abs().max().clamp(min=1e-30))


def gradient_sizes(subject: Subject) -> dict[str, float | None]:
    """The largest gradient of each trainable parameter over the samples; None for one that is not part of the loss."""
    model = copy.deepcopy(subject.disturbed).train()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sizes: dict[str, float | None] = dict.fromkeys(params)
    with subject.quietly(), torch.enable_grad():
        for x, y in zip(subject.chunks(subject.x), subject.chunks(subject.y), strict=True):
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

    None where there are no others; infinity where a sample by itself cannot be predicted.
    """
    half = len(subject.x) // 2
    if half < 2:
        return None
    count = min(half, 16)
    first, others = subject.x[:count], subject.x[half : half + count]
    mixed = first.clone()
    mixed[1::2] = others[1::2]
    model = subject.disturbed.eval()
    with torch.no_grad(), subject.quietly():
        together, other = _flat(model(first)), _flat(model(mixed))
        if len(together) != count or len(other) != count:
            return None
        size = together.abs().max().clamp(min=1e-30)
        change = float((together[::2] - other[::2]).abs().max() / size)
        try:
            alone = [_flat(model(first[i : i + 1])) for i in range(0, count, 2)]
        except Exception:
            return float("inf")
    apart = torch.cat(alone)
    if apart.shape == together[::2].shape:
        away = float((together[::2] - apart).abs().max() / size)
        change = max(change, away if away == away else float("inf"))
    return change


@dataclass(frozen=True)
class Duplicates:
    """Exact duplicates among inputs.

    Attributes:
        across: validation samples whose input is in the training data.
        same_target: how many of them have the same target there.
        within: training samples whose input is there more than once.
        coarse: whether inputs are so coarse (few values in each column) that duplicates come about by themselves.
        validation, train: how many samples there are.
    """

    across: int
    same_target: int
    within: int
    coarse: bool
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
    columns = task.train.x[:SAMPLES].reshape(min(SAMPLES, len(trained)), -1)
    coarse = columns.shape[1] <= FEW and all(len(column.unique()) <= FEW for column in columns.T)
    return Duplicates(len(across), same, len(trained) - len(targets), coarse, len(validated), len(trained))


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
