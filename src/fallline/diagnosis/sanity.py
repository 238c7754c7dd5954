"""The checks that experts make by hand before they train: each measures something, and says how to mend what is wrong.

`probes` holds the measurements; here they are judged. The misuse of the loss itself is `losses.misuse`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from fallline.diagnosis import probes
from fallline.diagnosis.probes import Subject
from fallline.losses import Finding
from fallline.losses.misuse.finding import Severity, by_severity, errors_among
from fallline.tasks import Task
from fallline.training.device import resolve_device

# An initial loss so many times the loss of a guess is suspicious.
TOO_HIGH = {"a chance": 2.0, "a constant": 10.0}
# Targets so far from 0 that the loss is so many times that of a guess are more than a matter of taste.
FAR = 1000.0
# A model that knows more than this share less than a guess before training has seen the answers.
TOO_LOW = 0.5
# Of the loss that a fit of eight samples can lose, so much may be left; where it is not known how much it can lose, it
# must lose some.
LEFT_OVER = 0.1
LOST = 0.05
SHOWN = 3


@dataclass(frozen=True)
class Outcome:
    """What one check measured, and what is wrong with it, if something is.

    Attributes:
        check: what was checked, in a few words.
        figure: what was measured.
        findings: what is wrong; none if all is well.
    """

    check: str
    figure: str
    findings: tuple[Finding, ...] = ()


def check(task: Task, *, seed: int = 0, device: str | torch.device = "auto") -> list[Finding]:
    """Everything that is wrong with a task, the worst first: its loss, its model, its data.

    Args:
        task: what is to be trained.
        seed: of the model that is looked at.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Returns:
        The findings of `losses.check`, and of the checks of `examine`.

    >>> import fallline as fl
    >>> fl.check(fl.tasks.line())
    []
    """
    outcomes = examine(task, seed=seed, device=device)
    return by_severity(finding for outcome in outcomes for finding in outcome.findings)


def examine(task: Task, *, seed: int = 0, device: str | torch.device = "auto") -> Iterator[Outcome]:
    """One check after the other, each as soon as it is done; nothing is changed, and no random state is touched.

    The loss and what it is given; the initial loss against a guess; whether a few samples can be learnt by heart;
    whether outputs depend on inputs; whether gradients reach every parameter; whether samples keep apart; whether
    training and evaluation mode agree; whether validation samples are among the training data.
    """
    subject = Subject(task, seed, resolve_device(device))
    yield _loss(subject)
    if errors_among(subject.findings):
        return  # what follows would be measured with a loss that means nothing
    yield _initial_loss(subject)
    yield _overfitting(subject)
    yield _inputs(subject)
    yield _gradients(subject)
    yield _separation(subject)
    yield _modes(subject)
    yield _duplicates(subject)


def _loss(subject: Subject) -> Outcome:
    found = tuple(subject.findings)
    name, count = subject.task.loss.name, len(subject.y)
    if errors_among(found):
        return Outcome("the loss", f"{name} does not measure what is meant", found)
    return Outcome("the loss", f"{name} on {count} samples: {subject.initial_loss:.4g}", found)


def _initial_loss(subject: Subject) -> Outcome:
    title = "initial loss against a guess"
    guess = probes.loss_of_a_guess(subject)
    loss = subject.initial_loss
    if guess is None:
        return Outcome(title, f"{loss:.4g}; what a guess would cost is not known for {subject.task.loss.name}")
    value, how = guess
    figure = f"{loss:.4g}, a guess ({how}) costs {value:.4g}"
    chance = not how.startswith(("the mean", "the best"))
    if loss > TOO_HIGH["a chance" if chance else "a constant"] * value > 0:
        seen = f"The initial loss {loss:.4g} is {loss / value:.1f} times that of a guess ({how}), {value:.4g}."
        why = "The new model is confidently wrong: the first steps only undo that."
        fix = "with torch.no_grad(): last_layer.weight.mul_(0.1); last_layer.bias.zero_()"
        severity: Severity = "warning"
        if not chance and probes.targets_are_far(subject):
            severity = "warning" if loss > FAR * value else "note"
            why = "The first steps only move the outputs to where the targets are, and a learning rate that does so is "
            why += "too high afterwards."
            fix = "train on (y - y.mean(0)) / y.std(0), and undo it after predicting"
        return Outcome(title, figure, (Finding(severity, "initial-loss", seen, why, fix),))
    if 0 <= loss < TOO_LOW * value:
        seen = f"Before any training the loss is {loss:.4g}, and a guess ({how}) would cost {value:.4g}."
        why = "Unless the model is trained already, it sees the answers among its inputs."
        fix = "look for the target among the columns of x"
        return Outcome(title, figure, (Finding("note", "initial-loss", seen, why, fix),))
    return Outcome(title, figure)


def _overfitting(subject: Subject) -> Outcome:
    title = "learning a few samples by heart"
    fit = subject.overfitted
    what = f"{fit.samples} sample{'' if fit.samples == 1 else 's'}"
    figure = f"{what}, loss {fit.first:.4g} → {fit.last:.4g} in {fit.steps} steps of adam at lr {fit.lr:g}"
    if fit.floor is None and fit.first - fit.last > LOST * abs(fit.first):
        return Outcome(title, figure)
    if fit.floor is not None and fit.last - fit.floor <= LEFT_OVER * (fit.first - fit.floor) + 1e-6:
        return Outcome(title, figure)
    if fit.floor is not None and fit.last - fit.floor <= 0.5 * (fit.first - fit.floor):
        seen = f"On {what} the loss went from {fit.first:.4g} to {fit.last:.4g}, not to {fit.floor:.4g}."
        why = "It learns, and cannot learn all: the model is small, or the same input has several targets."
        fix = "torch.nn.Linear(inputs, 4 * hidden)  # a wider layer, if it is to learn more"
        return Outcome(title, figure, (Finding("note", "cannot-overfit", seen, why, fix),))
    seen = f"On {what} the loss went from {fit.first:.4g} to {fit.last:.4g} in {fit.steps} steps"
    seen += f" (adam, the best of lr {', '.join(f'{lr:g}' for lr in probes.RATES)})."
    why = "What cannot learn a few samples by heart will learn nothing from more: the targets may belong to other "
    why += "samples, the gradient may be cut, or the model may be too small."
    fix = "for x, y in zip(task.train.x[:3], task.train.y[:3]): print(x, y, model(x[None]))  # do they belong together?"
    return Outcome(title, figure, (Finding("warning", "cannot-overfit", seen, why, fix),))


def _inputs(subject: Subject) -> Outcome:
    title = "outputs depend on inputs"
    spread = probes.spread_over_samples(subject)
    figure = f"outputs of different samples differ by {spread:.2g} of their size"
    if spread > 0:
        return Outcome(title, figure)
    seen = f"{len(subject.x)} different inputs have the same output, also with other parameters."
    why = "The model does not look at its input: it can only learn a constant."
    fix = "return self.layers(x)  # in forward: is x used, and not overwritten?"
    return Outcome(title, figure, (Finding("error", "input-ignored", seen, why, fix),))


def _gradients(subject: Subject) -> Outcome:
    title = "gradients reach every parameter"
    sizes = probes.gradient_sizes(subject)
    without = [name for name, size in sizes.items() if size is None]
    zero = [name for name, size in sizes.items() if size == 0]
    figure = f"{len(sizes) - len(without) - len(zero)} of {len(sizes)} parameters"
    found = []
    if without:
        count = f"{len(without)} of {len(sizes)} parameters"
        seen = (
            f"{count} ({_names(without)}) {_are(without)} not part of the loss: no gradient reaches {_them(without)}."
        )
        why = "What training does not move is dead weight, or was meant to be used."
        fix = f"del model.{without[0].rpartition('.')[0] or without[0]}  # or use it in forward"
        found.append(Finding("warning", "no-gradient", seen, why, fix))
    if zero:
        count = f"{len(zero)} of {len(sizes)} parameters"
        seen = f"The gradient of {count} ({_names(zero)}) is exactly 0 on {len(subject.x)} samples, also with others."
        why = "Something on the way is saturated, dead (a ReLU that is always off) or rounded."
        fix = "torch.nn.LeakyReLU() instead of torch.nn.ReLU(), or no .detach(), round() or argmax() in forward"
        found.append(Finding("warning", "no-gradient", seen, why, fix))
    return Outcome(title, figure, tuple(found))


def _separation(subject: Subject) -> Outcome:
    title = "samples keep apart"
    if subject.evaluation_noise > probes.ROUND_OFF:
        return Outcome(title, "cannot be told: evaluation is random")
    moved = probes.influence_of_other_samples(subject)
    if moved is None:
        return Outcome(title, "too few samples to tell")
    figure = f"other samples change an output by {moved:.2g} of its size"
    if moved < probes.ROUND_OFF:
        return Outcome(title, figure)
    seen = f"In evaluation mode an output changes by {moved:.2g} of its size with the other samples of the batch."
    if moved == float("inf"):
        seen = "In evaluation mode a batch of 1 sample cannot be predicted: the model fails or gives NaN."
        figure = "a sample by itself cannot be predicted"
    why = "Predictions depend on who is predicted together: axes are confused, or statistics of the batch are used."
    fix = "x.permute(0, 2, 1) instead of x.view(...), dim=1 instead of dim=0; BatchNorm with track_running_stats=True"
    return Outcome(title, figure, (Finding("error", "mixes-samples", seen, why, fix),))


def _modes(subject: Subject) -> Outcome:
    title = "training and evaluation mode agree"
    noise = subject.evaluation_noise
    if noise > probes.ROUND_OFF:
        seen = f"Two passes in evaluation mode over the same samples differ by {noise:.2g} of the outputs' size."
        why = "Something random is not switched off by model.eval(): metrics are noise, in part."
        fix = "torch.nn.functional.dropout(x, p, training=self.training)"
        return Outcome(title, seen, (Finding("warning", "random-evaluation", seen, why, fix),))
    fit = subject.overfitted
    figure = f"loss on what was learnt {fit.last:.4g} in training mode, {fit.evaluated:.4g} in evaluation mode"
    if not fit.evaluated - fit.last > 0.5 * abs(fit.first - fit.last):
        return Outcome(title, figure)
    seen = f"After {fit.steps} steps the loss on what was learnt is {fit.last:.4g} in training mode and "
    seen += f"{fit.evaluated:.4g} in evaluation mode."
    why = "What is evaluated is another function than what was trained: running statistics do not follow the data."
    fix = "torch.nn.BatchNorm1d(features, momentum=0.1)  # or GroupNorm, LayerNorm: the same in both modes"
    return Outcome(title, figure, (Finding("warning", "train-eval", seen, why, fix),))


def _duplicates(subject: Subject) -> Outcome:
    title = "validation samples among the training data"
    task = subject.task
    if task.validation is task.train:
        return Outcome(title, "the task validates on its training data, as it was told")
    both = probes.duplicates(task)
    figure = f"{both.across} of {both.validation} validation samples"
    share = both.across / both.validation
    if not both.across:
        return Outcome(title, figure)
    are = "is" if both.across == 1 else "are"
    seen = f"{both.across} of {both.validation} validation samples ({share:.1%}) {are} also among the {both.train} "
    seen += f"training samples, {both.same_target} with the same target."
    fix = "known = set(map(tuple, x.flatten(1).tolist())); "
    fix += "keep = [tuple(row) not in known for row in x_validation.flatten(1).tolist()]"
    if both.coarse:
        why = f"Inputs have few values, so that this may be chance: {both.within} training samples are there twice too."
        return Outcome(title, figure, (Finding("note", "leak", seen, why, fix),))
    if not both.same_target:
        why = "The same input has another target there: no model can predict both."
        return Outcome(title, figure, (Finding("warning", "leak", seen, why, fix),))
    why = "The metric on the validation data rewards learning by heart."
    if both.within:
        why += f" {both.within} training samples are there twice too: split first, copy or oversample afterwards."
    return Outcome(title, figure, (Finding("warning", "leak", seen, why, fix),))


def _names(names: Iterable[str]) -> str:
    listed = [repr(name) for name in names]
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _them(names: list[str]) -> str:
    return "it" if len(names) == 1 else "them"
