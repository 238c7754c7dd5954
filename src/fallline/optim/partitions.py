"""Different optimizers for different parameters, and the functions that tell parameters apart.

A labelling function takes a parameter's name and the tensor to a label. Any function at the top of a module will do;
those made here are values that can be printed, compared and written down.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fallline.description import Call, described, remembers_its_call
from fallline.errors import InvalidHyperparameter, nearest
from fallline.optim.adam_family import adam, adamw
from fallline.optim.around import around, combinator
from fallline.optim.base import Optimizer
from fallline.optim.checks import WrongType
from fallline.optim.gradient_descent import sgd
from fallline.optim.info import Invalid, OptimizerInfo
from fallline.optim.matrices import muon
from fallline.optim.transform import Grouped, Moment, Number, Numbers, Params, Seed, Slots, Stage, Transform, numbers_of

Label = Callable[[str, Tensor], str]


@remembers_its_call
@dataclass(frozen=True, eq=False, repr=False)
class Labels:
    """A labelling function that knows how it was made: `labels(name, tensor)` is the parameter's label."""

    of: Label
    call: Call | None = None

    def __call__(self, name: str, parameter: Tensor) -> str:
        return self.of(name, parameter)


@described
def by_shape(vectors: str = "vectors", matrices: str = "matrices", others: str | None = None) -> Labels:
    """Labels by the number of dimensions: biases and what normalises (0 or 1), weights of linear layers (2), others.

    Args:
        vectors: the label of scalars and vectors.
        matrices: the label of matrices.
        others: the label of tensors with three or more dimensions, as convolutions have; as matrices, if left out.

    >>> import torch
    >>> label = by_shape()
    >>> label("0.weight", torch.zeros(3, 2)), label("0.bias", torch.zeros(3))
    ('matrices', 'vectors')
    """
    rest = matrices if others is None else others
    return Labels(lambda name, p: vectors if p.dim() < 2 else matrices if p.dim() == 2 else rest)


@described
def by_name(patterns: Mapping[str, str | Sequence[str]], otherwise: str | Labels) -> Labels:
    """Labels by the parameter's name: that of the first pattern that fits, such as {"head": "*.head.*"}.

    Args:
        patterns: for each label a pattern, or several. In a pattern, * stands for any characters.
        otherwise: the label of all others, or another labelling function that gives it.

    Raises:
        InvalidHyperparameter: for a parameter without a name: `as_torch` needs `model.named_parameters()`.

    >>> import torch
    >>> label = by_name({"embeddings": ["embed*", "*.embed*"]}, otherwise=by_shape())
    >>> label("embed.weight", torch.zeros(9, 2)), label("0.weight", torch.zeros(9, 2))
    ('embeddings', 'matrices')
    """
    every = {label: _patterns(each) for label, each in patterns.items()}

    def of(name: str, parameter: Tensor) -> str:
        if any(every.values()) and (not name or name.isdigit()):
            raise InvalidHyperparameter(
                f"parameter {name!r} has no name for the patterns {every!r}: give model.named_parameters() instead of "
                "model.parameters()."
            )
        for label, own in every.items():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in own):
                return label
        return otherwise if isinstance(otherwise, str) else otherwise(name, parameter)

    return Labels(of)


@combinator
def partition(label: Label | Labels, optimizers: Mapping[str, Optimizer | Transform]) -> Transform:
    """Each parameter is trained by the optimizer of its label.

    What looks at all parameters together (a global norm) sees those of its label. Hyperparameters of one name are told
    apart by their order: the second optimizer's `lr` is `lr_2`.

    Args:
        label: (name, parameter) -> a key of `optimizers`: `by_shape()`, `by_name(…)`, or a function at the top of a
            module. It may look at the shape, not at the values. A lambda works in `fit`, but cannot be written down,
            which `sweep` needs.
        optimizers: for each label an optimizer. A label that no parameter has does no harm.

    Raises:
        InvalidHyperparameter: for a parameter whose label has no optimizer.

    >>> import torch
    >>> from fallline.optim import adamw, sgd
    >>> rule = partition(by_shape(), {"matrices": adamw(lr=0.01), "vectors": sgd(lr=0.5)})
    >>> rule.hyperparameters["lr"], rule.hyperparameters["lr_2"]
    (0.01, 0.5)
    >>> p = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
    >>> rule.update(p, rule.init(p), p)[0]["bias"]
    tensor([-0.5000])
    """
    if not callable(label):
        raise WrongType(f"label = {label!r} is not a function: give one that takes a name and a tensor to a label.")
    if not isinstance(optimizers, Mapping) or not optimizers:
        raise WrongType(f"optimizers = {optimizers!r} holds none: give a dict with an optimizer for each label.")
    for key, each in optimizers.items():
        if not isinstance(key, str):
            raise WrongType(f"the label {key!r} of optimizers is not a text: give labels such as 'matrices'.")
        if not isinstance(each, Optimizer | Transform):
            raise WrongType(f"optimizers[{key!r}] = {each!r} is not an optimizer: give one, such as fl.optim.adam().")
    keys = list(optimizers)

    def place(name: str, parameter: Tensor) -> int:
        found = label(name, parameter)
        if found not in optimizers:
            known = nearest(found, keys) if isinstance(found, str) else f"There are: {', '.join(keys)}."
            raise InvalidHyperparameter(
                f"parameter {name!r} of shape {tuple(parameter.shape)} has the label {found!r}, for which there is no "
                f"optimizer. {known}"
            )
        return keys.index(found)

    def divided(names: Iterable[str], params: Params) -> list[list[str]]:
        """The names of each optimizer's parameters."""
        made: list[list[str]] = [[] for _ in keys]
        for name in names:
            made[place(name, params[name])].append(name)
        return made

    def apply(
        parts: Sequence[Stage],
        updates: dict[str, Tensor],
        slots: Mapping[str, Slots],
        params: Params,
        n: Numbers,
        moment: Moment,
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        found: dict[str, Tensor] = {}
        after = dict(slots)
        for part, own in zip(parts, divided(updates, params), strict=True):
            if own:
                g, s, p = (_some(tree, own) for tree in (updates, slots, params))
                u, changed = part.apply(g, s, p, _at(n, own), moment)
                found.update(u)
                after.update(changed)
        return {name: found[name] for name in updates}, after

    made = around("partition", list(optimizers.values()), apply, elementwise=False)

    def starting(name: str, parameter: Tensor, numbers: Numbers, seed: Seed) -> Slots:
        return made.parts[place(name, parameter)].initial(name, parameter, numbers, seed)

    def check(name: str, parameter: Tensor) -> None:
        refuses = made.parts[place(name, parameter)].transform.check
        if refuses is not None:
            refuses(name, parameter)

    def evaluation(params: Params, slots: Mapping[str, Slots], n: Numbers) -> dict[str, Tensor]:
        chosen: dict[str, Tensor] = {}
        for part, own in zip(made.parts, divided(params, params), strict=True):
            if own:
                chosen.update(part.evaluation(_some(params, own), _some(slots, own), _at(n, own)))
        return {name: chosen[name] for name in params}

    moves = any(part.transform.evaluation is not None for part in made.parts)
    return replace(made, slots=starting, check=check, evaluation=evaluation if moves else None)


def _some(tree: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: tree[name] for name in names}


def _at(numbers: Numbers, names: Sequence[str]) -> Numbers:
    """The numbers of some of the parameters: what they do not share with the others does not matter to them."""
    if not isinstance(numbers, Grouped):
        return numbers
    used = sorted({numbers.group_of[name] for name in names})
    return Grouped([numbers.groups[i] for i in used], {name: used.index(numbers.group_of[name]) for name in names})


@combinator
def no_decay_on_vectors(optimizer: Optimizer) -> Transform:
    """Weight decay for matrices alone: biases, and the scales of what normalises, are not pulled towards zero.

    For parameters with fewer than two dimensions every `weight_decay` of the optimizer is 0. Its other numbers are the
    same for all: a scheduler that moves `lr` moves that of all parameters.

    Args:
        optimizer: one with weight decay.

    Raises:
        InvalidHyperparameter: for an optimizer without weight decay.

    >>> import torch
    >>> from fallline.optim import adamw
    >>> rule = no_decay_on_vectors(adamw(lr=0.5, weight_decay=0.5))
    >>> p = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
    >>> still = {name: torch.zeros_like(tensor) for name, tensor in p.items()}
    >>> {name: float(update) for name, update in rule.update(still, rule.init(p), p)[0].items()}
    {'weight': -0.25, 'bias': -0.0}

    Equal to `torch.optim` with two parameter groups, of which one has weight_decay=0.
    """
    if not isinstance(optimizer, Optimizer | Transform):
        raise WrongType(f"no_decay_on_vectors() takes an optimizer, not {optimizer!r}: give one, such as adamw().")

    def is_decay(name: str) -> bool:
        return "weight_decay" in name

    def apply(
        parts: Sequence[Stage],
        updates: dict[str, Tensor],
        slots: Mapping[str, Slots],
        params: Params,
        n: Numbers,
        moment: Moment,
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        groups = [numbers_of(n, name) for name in updates]
        for i, name in enumerate(updates):
            if params[name].dim() < 2:
                groups[i] = {key: value * 0 if is_decay(key) else value for key, value in groups[i].items()}
        own = Grouped(groups, {name: i for i, name in enumerate(updates)}) if updates else n
        return parts[0].apply(updates, dict(slots), params, own, moment)

    made = around("no_decay_on_vectors", [optimizer], apply, elementwise=False)
    if not any(is_decay(name) for name in made.hyperparameters):
        raise InvalidHyperparameter(f"{optimizer!r} has no weight decay: give one with weight_decay above 0.")
    return made


@described
def muon_with_adamw(
    lr: Number = 1e-3,
    weight_decay: Number = 0.1,
    momentum: Number = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
    eps: Number = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = "match_rms_adamw",
    *,
    adamw_lr: Number | None = None,
    adamw_weight_decay: Number | None = None,
    adamw_betas: tuple[Number, Number] = (0.9, 0.999),
    adamw_eps: Number = 1e-8,
    adamw_for: str | tuple[str, ...] | Label = (),
) -> Optimizer:
    """Muon for the matrices, AdamW for all other parameters.

    The learning rate is one for both: with "match_rms_adamw" Muon's steps are as long as AdamW's. A torch scheduler on
    `group["lr"]` moves both.

    Args:
        lr: learning rate, at least 0.
        weight_decay: at least 0, decoupled.
        momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as in `muon`.
        adamw_lr: the learning rate of AdamW where it is not to be the same.
        adamw_weight_decay: that of AdamW where it is not to be the same.
        adamw_betas, adamw_eps: as in `adamw`.
        adamw_for: the matrices that AdamW is to train, too. Embeddings and the output layer should be among them, and
            cannot be told by their shape. Patterns of names, such as ("embed*", "head.*"), or a function that takes a
            name and a tensor to "muon" or "adamw".

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> import torch
    >>> rule = muon_with_adamw(lr=0.01, adamw_for=("head.*",))
    >>> p = {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2), "head.weight": torch.ones(2, 2)}
    >>> state = rule.init(p)["slots"]
    >>> [sorted(state[name])[0] for name in p]
    ['momentum_buffer', 'exp_avg', 'exp_avg']

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; one learning rate for both:
    Liu et al., "Muon is Scalable for LLM Training", 2025. Equal to `torch.optim.Muon` and `torch.optim.AdamW` side by
    side, but for adjust_lr_fn, which is None in torch.
    """
    if callable(adamw_for):
        label: Label | Labels = adamw_for
    else:
        shape = by_shape(vectors="adamw", matrices="muon", others="adamw")
        label = by_name({"adamw": adamw_for}, otherwise=shape) if adamw_for else shape
    matrices = muon(
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=nesterov,
        ns_coefficients=ns_coefficients,
        eps=eps,
        ns_steps=ns_steps,
        adjust_lr_fn=adjust_lr_fn,
    )
    rest = adamw(
        lr=lr if adamw_lr is None else adamw_lr,
        betas=adamw_betas,
        eps=adamw_eps,
        weight_decay=weight_decay if adamw_weight_decay is None else adamw_weight_decay,
    )
    return partition(label, {"muon": matrices, "adamw": rest})


def _patterns(given: Any) -> tuple[str, ...]:
    """One pattern or several."""
    several = (given,) if isinstance(given, str) else given
    if not isinstance(several, list | tuple) or not all(isinstance(each, str) for each in several):
        raise WrongType(f"{given!r} is no pattern of names: give a text such as 'head.*', or several.")
    return tuple(several)


CATALOGUE = (
    OptimizerInfo(
        muon_with_adamw,
        learning_rates=(1e-4, 1e-1),
        formula="muon for matrices, adamw for the rest",
        paper="Jordan et al.; Liu et al.",
        year=2024,
        valid=({}, {"lr": 1e-2, "adamw_lr": 1e-3, "nesterov": False}, {"adjust_lr_fn": "original"}),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"adamw_lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"adamw_betas": (1.0, 0.9)}, "beta1 = 1.0 is outside"),
            Invalid({"adamw_for": (1,)}, "no pattern of names", TypeError),
        ),
        settles={"lr": 2e-2, "weight_decay": 0.0},
    ),
    OptimizerInfo(
        no_decay_on_vectors,
        learning_rates=(1e-5, 1e-1),
        formula="weight decay for matrices alone",
        paper="",
        year=2017,
        valid=({"optimizer": adamw()}, {"optimizer": sgd(lr=0.01, momentum=0.9, weight_decay=0.1)}),
        invalid=(
            Invalid({"optimizer": adam()}, "has no weight decay"),
            Invalid({"optimizer": 0.1}, "takes an optimizer, not 0.1", TypeError),
        ),
        settles={"optimizer": adam(lr=2e-2, weight_decay=1e-12)},
    ),
)
