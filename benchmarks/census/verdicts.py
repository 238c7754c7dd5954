"""What torch and what fallline say about a case. `case` says what that is; `tables` shows the verdicts."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from census.case import SEVERITIES, Case, Scene
from fallline.losses import Finding, Loss

Said: TypeAlias = Literal["reason", "no reason", "nothing", "has none"]
Check: TypeAlias = Callable[..., list[Finding]]
ORDER: dict[str, Callable[[Any, Any], tuple[Any, ...]]] = {
    "gaussian": lambda prediction, target: (prediction[0], target, prediction[1]),
    "cosine": lambda prediction, target: (*prediction, target),
    "ranking": lambda prediction, target: (*prediction, target),
    "triplet": lambda prediction, target: prediction,
    "ctc": lambda prediction, target: (prediction[0], target[0], prediction[1], target[1]),
}


@dataclass(frozen=True)
class TorchVerdict:
    """What running the loss and its gradient with torch brought to light.

    Attributes:
        said: "reason" (a warning or an error that names the problem), "no reason" (a warning or an error that does
            not), "nothing", or "has none" where torch has no such loss.
        messages: of its warnings and its error.
    """

    said: Said
    messages: tuple[str, ...] = ()


@dataclass(frozen=True)
class FalllineVerdict:
    """What `fallline.losses.check` found.

    Attributes:
        findings: the most severe first.
        raised: the error that it raised instead, or "".
        disturbed: what it left behind that was not there before: gradients, other parameters, random numbers drawn,
            warnings of torch's.
        seconds: how long it took.
    """

    findings: tuple[Finding, ...] = ()
    raised: str = ""
    disturbed: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def worst(self) -> str:
        """The highest severity, "" without findings."""
        return self.findings[0].severity if self.findings else ""

    def catches(self, case: Case) -> Finding | None:
        """The finding that names this misuse rightly and severely enough."""
        least = SEVERITIES.index(case.severity)
        for finding in self.findings:
            if finding.code in case.codes and SEVERITIES.index(finding.severity) >= least:
                return finding
        return None


def torch_verdict(case: Case, seed: int = 0) -> TorchVerdict:
    """Runs the loss, and its gradient, as a training loop would."""
    messages = []
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        try:
            with case.seeded(seed), case.under():
                scene = case.drawn()
                loss = _as_torchs(scene.loss)
                if loss is None:
                    return TorchVerdict("has none")
                _run(loss, scene)
        except Exception as error:  # whatever it is, it is torch's answer
            messages.append(f"{type(error).__name__}: {error}")
    messages += [f"{each.category.__name__}: {each.message}" for each in recorded]
    if not messages:
        return TorchVerdict("nothing")
    named = case.reason is not None and any(case.reason.search(message) for message in messages)
    return TorchVerdict("reason" if named else "no reason", tuple(messages))


def _as_torchs(loss: Any) -> Any:
    """torch's loss that is equal to one of fallline's; None where there is none."""
    if not isinstance(loss, Loss):
        return loss
    if not loss.torch_name:
        return None
    kind = getattr(nn, loss.torch_name)
    known = inspect.signature(kind).parameters
    arguments = {name: value for name, value in loss.arguments_of_call.items() if name in known}
    for name in ("weight", "pos_weight"):
        if arguments.get(name) is not None:
            arguments[name] = torch.tensor(arguments[name])
    return kind(**arguments)


def _run(loss: Any, scene: Scene) -> None:
    name = str(getattr(loss, "__name__", type(loss).__name__)).lower()
    prediction, target = scene.prediction, scene.target
    if "ctc" in name and isinstance(prediction, Tensor):  # fallline's form, the sample first
        frames = torch.full((prediction.shape[0],), prediction.shape[1])
        prediction, target = (prediction.transpose(0, 1), frames), (target.clamp(min=0), (target >= 0).sum(1))
    home = getattr(type(loss) if isinstance(loss, nn.Module) else loss, "__module__", "")
    order = next((order for part, order in ORDER.items() if home.startswith("torch.") and part in name), None)
    value = loss(*order(prediction, target)) if order else loss(prediction, target)
    if torch.is_grad_enabled() and (_leads_somewhere(prediction) or scene.model is not None):
        (value.sum() if isinstance(value, Tensor) else value).backward()


def _leads_somewhere(prediction: Any) -> bool:
    if isinstance(prediction, Tensor):
        return prediction.requires_grad
    return isinstance(prediction, tuple | list | dict) and any(
        map(_leads_somewhere, prediction.values() if isinstance(prediction, dict) else prediction)
    )


def fallline_verdict(case: Case, check: Check, seed: int = 0) -> FalllineVerdict:
    """Asks `check`, and looks whether everything is as it was before."""
    with case.seeded(seed), case.under(), warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("ignore")
        try:
            scene = case.drawn()
        except Exception as error:
            return FalllineVerdict(raised=f"{type(error).__name__} while it was drawn: {error}")
        before = _state(scene)
        warnings.simplefilter("always")
        started = time.perf_counter()
        try:
            findings = check(scene.loss, scene.prediction, scene.target, scene.model)
        except Exception as error:
            return FalllineVerdict(raised=f"{type(error).__name__}: {error}")
        seconds = time.perf_counter() - started
        disturbed = [name for name, value in _state(scene).items() if not _equal(value, before[name])]
        disturbed += [f"a warning: {each.message}" for each in recorded]
        if not case.codes and not _still_runs(scene):
            disturbed.append("the graph of the prediction")
    severe = sorted(findings, key=lambda finding: -SEVERITIES.index(finding.severity))
    return FalllineVerdict(tuple(severe), disturbed=tuple(disturbed), seconds=seconds)


def _state(scene: Scene) -> dict[str, Any]:
    parts = tensors((scene.prediction, scene.target))
    parameters = list(scene.model.parameters()) if scene.model is not None else []
    return {
        "random numbers": torch.get_rng_state(),
        "parameters": [p.detach().clone() for p in parameters],
        "gradients": [None if p.grad is None else p.grad.clone() for p in parameters],
        "values": [each.detach().clone() for each in parts],
        "requires_grad": [each.requires_grad for each in (*parts, *parameters)],
        "mode": None if scene.model is None else [module.training for module in scene.model.modules()],
    }


def tensors(things: Any) -> list[Tensor]:
    """The tensors among the parts of a prediction or a target."""
    if isinstance(things, Tensor):
        return [things]
    if isinstance(things, dict):
        things = list(things.values())
    return [found for thing in things for found in tensors(thing)] if isinstance(things, tuple | list) else []


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(*(each.nan_to_num() if each.is_floating_point() else each for each in (first, second)))
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_equal, first, second))
    return bool(first == second)


def _still_runs(scene: Scene) -> bool:
    """Whether the step of training that follows can be made."""
    loss = _as_torchs(scene.loss)
    if loss is None:
        loss = scene.loss
    try:
        _run(loss, scene)
    except Exception:
        return False
    return True
