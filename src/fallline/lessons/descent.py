"""What "see it move" trains, and what is to be expected of it: a line through three points, its curvature, its bounds.

`Settings` are checked in the server, which knows no torch; `start` and `advance` run in a kernel.

The loss L(w, b) = 1/n · Σ (w xᵢ + b − yᵢ)² is a quadratic, so its Hessian is the same everywhere, and gradient descent
on all the points at once diverges exactly when lr > 2/λmax; with momentum β, when lr > 2(1 + β)/λmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

INPUTS = (1.0, 2.0, 3.0)
TARGETS = (2.0, 4.0, 6.0)
OPTIMIZERS = {"sgd": "SGD", "rmsprop": "RMSprop", "adam": "Adam"}
# A loss below the first is near enough to the minimum, which is 0, to count as there; one above the second is lost.
ARRIVED = 0.01
LOST = 1e12
LARGEST_EPOCHS = 2000
WIDEST = 100.0
LARGEST_NUMBER = 1e300  # JSON may bring whole numbers that are no float


@dataclass(frozen=True)
class Settings:
    """What is trained, and how.

    Attributes:
        optimizer: "sgd", "rmsprop" or "adam".
        lr: the learning rate.
        momentum: of SGD and RMSprop.
        batch: samples in a mini-batch, 1 to 3.
        epochs: passes over the three points.
        weight, bias: where training starts.
        seed: of the order of the mini-batches.
    """

    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.0
    batch: int = 3
    epochs: int = 100
    weight: float = -0.0075
    bias: float = 0.5364
    seed: int = 0

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """Settings from what a page sends.

        Raises:
            ValueError: that says which setting is wrong, and what it may be.

        >>> Settings.of({"optimizer": "adam", "lr": 0.3}).lr
        0.3
        """
        if not isinstance(given, Mapping):
            raise ValueError("settings are numbers by name")
        unknown = set(given) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"there is no setting {sorted(unknown)[0]!r}")
        made: dict[str, Any] = {
            name: _number(name, value) if name != "optimizer" else value for name, value in given.items()
        }
        for name in {"batch", "epochs", "seed"} & set(made):
            if made[name] != int(made[name]):
                raise ValueError(f"{name} = {made[name]:g} must be a whole number")
            made[name] = int(made[name])
        settings = cls(**made)
        for name, low, high in (
            ("lr", 1e-6, 1e3), ("momentum", 0, 0.999), ("batch", 1, len(INPUTS)), ("epochs", 1, LARGEST_EPOCHS),
            ("weight", -WIDEST, WIDEST), ("bias", -WIDEST, WIDEST), ("seed", 0, 2**31),
        ):  # fmt: skip
            if not low <= getattr(settings, name) <= high:
                raise ValueError(f"{name} = {getattr(settings, name):g} must lie between {low:g} and {high:g}")
        if not isinstance(settings.optimizer, str) or settings.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer = {settings.optimizer!r} must be one of {', '.join(OPTIMIZERS)}")
        return settings


def hessian() -> tuple[float, float, float]:
    """The second derivatives of the loss by ww, wb and bb.

    >>> [round(value, 4) for value in hessian()]
    [9.3333, 4.0, 2.0]
    """
    count = len(INPUTS)
    return 2 * sum(x * x for x in INPUTS) / count, 2 * sum(INPUTS) / count, 2.0


def sharpness() -> float:
    """λmax, the largest eigenvalue of the Hessian.

    >>> round(2 / sharpness(), 4)
    0.1803
    """
    ww, wb, bb = hessian()
    return (ww + bb) / 2 + math.hypot((ww - bb) / 2, wb)


def critical_rate(settings: Settings) -> float | None:
    """The learning rate beyond which training on all points at once diverges; None where there is no such law.

    SGD on the whole batch has one, 2(1 + momentum)/λmax. With smaller batches the order of the points matters, and
    RMSprop and Adam change the length of their steps.
    """
    if settings.optimizer == "sgd" and settings.batch == len(INPUTS):
        return 2 * (1 + settings.momentum) / sharpness()
    return None


def bound(settings: Settings) -> str:
    """How the critical learning rate is written, with its value."""
    value = critical_rate(settings)
    assert value is not None
    return f"{'2(1 + β)' if settings.momentum else '2'}/λmax = {value:.4f}"


def expected(settings: Settings) -> str:
    """What is known before training, in a sentence."""
    critical = critical_rate(settings)
    if critical is not None:
        side = "above" if settings.lr > critical else "below"
        follows = "it must diverge, unless it starts on the valley's floor" if side == "above" else "it cannot diverge"
        return f"lr {settings.lr:g} is {side} {bound(settings)}: {follows}."
    if settings.optimizer == "sgd":
        whole = bound(replace(settings, batch=len(INPUTS)))
        return f"With mini-batches of {settings.batch} there is no such exact bound; with all the points it is {whole}."
    name = OPTIMIZERS[settings.optimizer]
    return f"{name} has no fixed bound: lr = {settings.lr:g} sets how long its steps are, and the slope hardly does."


def outcome(settings: Settings, losses: list[float]) -> dict[str, str]:
    """How training went: one of "arrived", "on the way" and "diverged", and a sentence that says why.

    Args:
        losses: of all the points, before the first epoch and after every epoch.
    """
    first, last = losses[0], losses[-1]
    epoch = len(losses) - 1
    critical = critical_rate(settings)
    if not math.isfinite(last) or last > LOST:
        why = "steps longer than the slope allows"
        if critical is not None and settings.lr > critical:
            why = f"lr {settings.lr:g} is above {bound(settings)}: expected"
        return {"kind": "diverged", "text": f"Diverged: the loss left all bounds in epoch {epoch}; {why}."}
    if last <= ARRIVED:
        at = next(i for i, loss in enumerate(losses) if loss <= ARRIVED)
        return {"kind": "arrived", "text": f"Arrived: the loss fell below {ARRIVED:g} in epoch {at}, to {last:.3g}."}
    if last > first and critical is not None and settings.lr <= critical:
        told = f"On the way: the loss has risen from {first:.3g} to {last:.3g} in {epoch} epochs"
        return {"kind": "on the way", "text": f"{told}; below {bound(settings)} it comes down again."}
    if last > first:
        why = f"lr {settings.lr:g} is above {bound(settings)}: expected" if critical else ""
        told = f"Diverging: after {epoch} epochs the loss is {last:.3g}, above the {first:.3g} that it began with"
        return {"kind": "diverged", "text": f"{told}; {why}." if why else f"{told}."}
    told = f"On the way: the loss went from {first:.3g} to {last:.3g} in {epoch} epochs"
    return {"kind": "on the way", "text": f"{told}, and is not below {ARRIVED:g} yet."}


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_NUMBER:
        raise ValueError(f"{name} = {value!r} must be a number")
    return value


class Descent:
    """A training run that is made a few epochs at a time."""

    def __init__(self, settings: Settings) -> None:
        import torch
        from torch import nn

        self.settings = settings
        self.inputs = torch.tensor(INPUTS, dtype=torch.float64).unsqueeze(1)
        self.targets = torch.tensor(TARGETS, dtype=torch.float64).unsqueeze(1)
        self.model = nn.Linear(1, 1, dtype=torch.float64)
        with torch.no_grad():
            self.model.weight.fill_(settings.weight)
            self.model.bias.fill_(settings.bias)
        self.criterion = nn.MSELoss()
        parameters = self.model.parameters()
        if settings.optimizer == "sgd":
            self.optimizer: Any = torch.optim.SGD(parameters, lr=settings.lr, momentum=settings.momentum)
        elif settings.optimizer == "rmsprop":
            self.optimizer = torch.optim.RMSprop(parameters, lr=settings.lr, momentum=settings.momentum)
        else:
            self.optimizer = torch.optim.Adam(parameters, lr=settings.lr)
        self.order = torch.Generator().manual_seed(settings.seed)
        self.losses = [self.loss()]

    def loss(self) -> float:
        """Of all the points."""
        import torch

        with torch.no_grad():
            return float(self.criterion(self.model(self.inputs), self.targets))

    def point(self) -> list[float | None]:
        """[epoch, weight, bias, loss]; None for a number that is not finite."""
        values = [self.model.weight.item(), self.model.bias.item(), self.losses[-1]]
        return [len(self.losses) - 1, *(value if math.isfinite(value) else None for value in values)]

    def epochs(self, count: int) -> Iterator[list[float | None]]:
        """Trains, and gives the point after every epoch."""
        import torch

        for _ in range(count):
            if self.done:
                return
            order = torch.randperm(len(INPUTS), generator=self.order)
            for chosen in order.split(self.settings.batch):
                self.optimizer.zero_grad()
                self.criterion(self.model(self.inputs[chosen]), self.targets[chosen]).backward()
                self.optimizer.step()
            self.losses.append(self.loss())
            yield self.point()

    @property
    def done(self) -> bool:
        """Whether all the epochs are made, or the loss has left all bounds."""
        last = self.losses[-1]
        return len(self.losses) > self.settings.epochs or not math.isfinite(last) or last > LOST


_running: dict[str, Descent] = {}


def start(given: Mapping[str, Any]) -> dict[str, Any]:
    """Begins a run in this process, instead of the one before."""
    descent = _running["it"] = Descent(Settings.of(given))
    return {"settings": asdict(descent.settings), "points": [descent.point()], "done": False}


def advance(count: int) -> dict[str, Any]:
    """Trains the run for so many epochs more, and says where it went."""
    descent = _running["it"]
    made = {"points": list(descent.epochs(count)), "done": descent.done}
    return {**made, **({"outcome": outcome(descent.settings, descent.losses)} if descent.done else {})}
