"""The stages that optimizers are made of.

Each takes gradients, or the updates of the stage before it, to updates; a chain of them is an optimizer. In the
formulas g is what comes in, u what goes out, p the parameter, t the number of the update counted from 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fallline.optim.checks import flag, non_negative, positive, real
from fallline.optim.description import described
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
def add_decayed_weights(weight_decay: Number) -> Transform:
    """Pulls parameters towards zero: u = g + weight_decay · p.

    Before a `scale_by_*` stage this is the gradient of ½ · weight_decay · |p|² (coupled, as in `adam`); after it, it is
    decoupled weight decay (as in `adamw`).

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    """
    non_negative("weight_decay", weight_decay)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        (decay,) = cast(g, n["weight_decay"])
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
