"""The stages that optimizers are made of.

Each takes gradients, or the updates of the stage before it, to updates; a chain of them is an optimizer. In the
formulas g is what comes in, u what goes out, p the parameter, t the number of the update counted from 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fallline.description import described
from fallline.optim.checks import flag, in_interval, non_negative, positive, real
from fallline.optim.transform import Moment, Number, Numbers, Params, Slots, Transform, cast, per_tensor


@described
def scale_by_learning_rate(lr: Number) -> Transform:
    """A step downhill: u = −lr · g.

    Args:
        lr: the learning rate, at least 0.
    """
    non_negative("lr", lr)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        (size,) = cast(g, -n["lr"])
        return g * size, {}

    return per_tensor("scale_by_learning_rate", rule, {"lr": lr}, elementwise=True)


@described
def negate() -> Transform:
    """Uphill instead of downhill: u = −g."""
    return per_tensor("negate", lambda g, slots, p, n: (-g, {}), {}, elementwise=True)


@described
def add_decayed_weights(weight_decay: Number, *, independent: bool = False) -> Transform:
    """Pulls parameters towards zero: u = g + weight_decay · p.

    Where it stands says what it is. Before a `scale_by_*` stage it is the gradient of ½ · weight_decay · |p|² (coupled,
    as in `adam`). Between that and `scale_by_learning_rate` it is decoupled (as in `adamw`), and the learning rate
    scales it. Behind the learning rate, with `independent=True`, the rate does not scale it.

    Args:
        weight_decay: at least 0.
        independent: for what comes in as a step, learning rate and sign included: u = g − weight_decay · p.

    Raises:
        InvalidHyperparameter: for a negative number.

    >>> import torch
    >>> from fallline.optim import chain
    >>> p, g = {"w": torch.tensor([2.0])}, {"w": torch.tensor([1.0])}
    >>> last = add_decayed_weights(0.1, independent=True)
    >>> rule = chain(scale_by_learning_rate(0.5), last)
    >>> rule.update(g, rule.init(p), p)[0]["w"]
    tensor([-0.7000])

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019; their decay is the independent one,
    that of `torch.optim.AdamW` is scaled by the learning rate.
    """
    non_negative("weight_decay", weight_decay)
    flag("independent", independent)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        (decay,) = cast(g, -n["weight_decay"] if independent else n["weight_decay"])
        return g + p * decay, {}

    return per_tensor("add_decayed_weights", rule, {"weight_decay": weight_decay}, elementwise=True)


@described
def trace(momentum: Number, dampening: Number = 0.0, *, nesterov: bool = False) -> Transform:
    """Momentum: b₁ = g₁, b = momentum · b + (1 − dampening) · g; u = b, or with Nesterov u = g + momentum · b.

    The first gradient enters undampened, as in `torch.optim.SGD`.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013.
    """
    non_negative("momentum", momentum)
    real("dampening", dampening)
    flag("nesterov", nesterov)
    dampened = dampening != 0

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        (momentum,) = cast(g, n["momentum"])
        entering = g
        if dampened:
            (share,) = cast(g, torch.where(slots["step"] == 1, 1.0, 1 - n["dampening"]))
            entering = g * share
        buffer = slots["momentum_buffer"] * momentum + entering
        return (g + buffer * momentum if nesterov else buffer), {"momentum_buffer": buffer}

    numbers = {"momentum": momentum, **({"dampening": dampening} if dampened else {})}
    return per_tensor("trace", rule, numbers, slots=["momentum_buffer"], counts=dampened, elementwise=True)


@described
def clip_by_value(max_value: Number) -> Transform:
    """No element larger than `max_value`: u = min(max(g, −max_value), max_value).

    The same as `torch.nn.utils.clip_grad_value_`.

    Args:
        max_value: above 0.

    Raises:
        InvalidHyperparameter: for a number that is not above 0.

    >>> import torch
    >>> from fallline.optim import chain
    >>> p, g = {"w": torch.zeros(3)}, {"w": torch.tensor([3.0, -0.1, -2.0])}
    >>> rule = chain(clip_by_value(0.5))
    >>> rule.update(g, rule.init(p), p)[0]["w"]
    tensor([ 0.5000, -0.1000, -0.5000])
    """
    positive("max_value", max_value)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        low, high = cast(g, -n["max_value"], n["max_value"])
        return torch.clamp(g, low, high), {}

    return per_tensor("clip_by_value", rule, {"max_value": max_value}, elementwise=True)


@described
def clip_by_norm(max_norm: Number) -> Transform:
    """Shortens the gradient of each parameter to at most `max_norm`: u = g · min(1, max_norm / (‖g‖ + 10⁻⁶)).

    ‖·‖ is the Euclidean norm of one parameter's gradient, so parameters are clipped apart from each other. The same as
    `torch.nn.utils.clip_grad_norm_` for one parameter at a time.

    Args:
        max_norm: above 0.

    Raises:
        InvalidHyperparameter: for a number that is not above 0.

    >>> import torch
    >>> from fallline.optim import chain
    >>> p, g = {"w": torch.zeros(2)}, {"w": torch.tensor([3.0, -4.0])}
    >>> rule = chain(clip_by_norm(1.0))
    >>> rule.update(g, rule.init(p), p)[0]["w"]
    tensor([ 0.6000, -0.8000])
    """
    positive("max_norm", max_norm)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        norm = g.to(torch.float64).square().sum().sqrt()
        (shrink,) = cast(g, torch.clamp(n["max_norm"] / (norm + 1e-6), max=1.0))
        return g * shrink, {}

    return per_tensor("clip_by_norm", rule, {"max_norm": max_norm})


@described
def clip_by_global_norm(max_norm: Number) -> Transform:
    """Shortens the whole gradient to at most `max_norm`: u = g · min(1, max_norm / (‖g‖ + 10⁻⁶)).

    ‖·‖ is the Euclidean norm over all parameters. The same as `torch.nn.utils.clip_grad_norm_`, the 10⁻⁶ included.

    Source: Pascanu et al., "On the difficulty of training recurrent neural networks", 2013.
    """
    positive("max_norm", max_norm)

    def apply(
        updates: dict[str, Tensor], slots: Mapping[str, Slots], params: Params, n: Numbers, moment: Moment
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        if not updates:
            return updates, {}
        norm = torch.stack([u.to(torch.float64).square().sum() for u in updates.values()]).sum().sqrt()
        shrink = torch.clamp(n["max_norm"] / (norm + 1e-6), max=1.0)
        return {name: u * shrink.to(u.dtype) for name, u in updates.items()}, {}

    return Transform("clip_by_global_norm", {"max_norm": max_norm}, apply, together=True)


@described
def centralize() -> Transform:
    """Gradients with mean 0 per output: u = g − mean(g) over all dimensions but the first.

    Vectors and scalars pass as they are, so that only weights of linear and convolutional layers are centralised.

    >>> import torch
    >>> from fallline.optim import chain
    >>> p, g = {"w": torch.zeros(2, 2)}, {"w": torch.tensor([[1.0, 3.0], [5.0, 5.0]])}
    >>> rule = chain(centralize())
    >>> rule.update(g, rule.init(p), p)[0]["w"]
    tensor([[-1.,  1.],
            [ 0.,  0.]])

    Source: Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural Networks", 2020.
    """

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        if g.dim() < 2 or g.numel() == 0:
            return g, {}
        return g - g.mean(dim=tuple(range(1, g.dim())), keepdim=True), {}

    return per_tensor("centralize", rule, {})


@described
def ema_of_parameters(decay: Number = 0.999) -> Transform:
    """A running mean of the parameters, with which the model is evaluated: ema = decay · ema + (1 − decay)(p + u).

    What is trained is not changed: u = g. The mean starts at the parameters after the first update, without a bias
    correction, and `fit` and `sweep` evaluate and keep the model with it. Put it last: what comes in has to be the
    whole step.

    Args:
        decay: in [0, 1).

    Raises:
        InvalidHyperparameter: for a number outside of that.

    >>> import torch
    >>> from fallline.optim import chain, sgd
    >>> rule, p, g = chain(sgd(lr=1.0), ema_of_parameters(0.5)), {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    >>> state = rule.init(p)
    >>> for _ in range(2):
    ...     updates, state = rule.update(g, state, p)
    ...     p = {"w": p["w"] + updates["w"]}
    >>> p["w"], rule.evaluation_parameters(state, p)["w"]
    (tensor([-2.]), tensor([-1.5000]))

    Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992. Equal to
    `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(decay)`, updated after every step.
    """
    in_interval("decay", decay, 0.0, 1.0, open_high=True)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        (enters,) = cast(g, torch.where(slots["step"] == 1, 1.0, 1 - n["decay"]))
        return g, {"ema": torch.lerp(slots["ema"], p + g, enters)}

    return per_tensor(
        "ema_of_parameters",
        rule,
        {"decay": decay},
        slots=["ema"],
        initial=lambda p, n: {"ema": p.clone()},
        counts=True,
        elementwise=True,
        evaluation=lambda p, slots, n: slots["ema"],
    )


def mean_of_squares(mean: Tensor, g: Tensor, keep: Tensor, enter: Tensor) -> Tensor:
    """keep · mean + enter · g² as torch.optim has it: with `lerp` a mean that overflowed would turn from ∞ to NaN."""
    return torch.addcmul(mean * keep, g * enter, g)


def square_root(x: Tensor) -> Tensor:
    """√x as 1/(1/√x): torch's CPU `sqrt` is slower where x holds zeros, as second moments of unused inputs do."""
    return x.rsqrt().reciprocal()


def incoming(weight_decay: Number, maximize: bool) -> list[Transform]:
    """What happens to a gradient before anything else: its sign, then coupled weight decay."""
    flag("maximize", maximize)
    return [*([negate()] if maximize else []), *decay(weight_decay)]


def decay(weight_decay: Number) -> list[Transform]:
    """The stage of weight decay, unless there is none."""
    non_negative("weight_decay", weight_decay)
    return [] if weight_decay == 0 else [add_decayed_weights(weight_decay)]


def above_zero(like: Tensor, number: Tensor) -> Tensor:
    """A number added to a denominator, kept from rounding to zero: 10⁻⁸ is zero in float16, and 0/0 would be NaN."""
    limits = torch.finfo(like.dtype)
    return torch.clamp(number, min=max(limits.tiny * limits.eps, 2.0**-126))


def as_torch_keeps_it(number: Tensor) -> Tensor:
    """A single number of the state in the precision that torch.optim gives it, whatever dtype the parameters have."""
    return number.to(torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32)
