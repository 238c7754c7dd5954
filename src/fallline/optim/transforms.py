"""The stages that optimizers are made of.

Each takes gradients, or the updates of the stage before it, to updates; a chain of them is an optimizer. In the
formulas g is what comes in, u what goes out, p the parameter, t the number of the update counted from 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fallline.optim.base import Number, Numbers, Params, Slots, Transform, cast, per_tensor
from fallline.optim.checks import flag, non_negative, pair_of_betas, positive, real
from fallline.optim.description import described


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
def scale_by_adam(
    betas: tuple[Number, Number] = (0.9, 0.999), eps: Number = 1e-8, *, amsgrad: bool = False
) -> Transform:
    """Adam's direction: m̂ / (√v̂ + eps).

    m = β₁m + (1 − β₁)g, v = β₂v + (1 − β₂)g², m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ); with amsgrad, v̂ is made of the
    largest v so far. The bias corrections are computed in float64 whatever the parameters are.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015; Reddi et al., "On the Convergence of
    Adam and Beyond", 2018. Arithmetic as in `torch.optim.Adam`.
    """
    beta1, beta2 = pair_of_betas(betas)
    non_negative("eps", eps)
    flag("amsgrad", amsgrad)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        step = slots["step"]
        correction1 = 1 - n["beta1"] ** step
        root_correction2 = (1 - n["beta2"] ** step).sqrt()
        # u = (m / correction1) / (√v / root_correction2 + eps), with the corrections moved into two numbers per step.
        enter1, keep2, enter2 = cast(g, 1 - n["beta1"], n["beta2"], 1 - n["beta2"])
        stretch, floor = cast(g, correction1 / root_correction2, n["eps"] * correction1)
        exp_avg = torch.lerp(slots["exp_avg"], g, enter1)
        exp_avg_sq = mean_of_squares(slots["exp_avg_sq"], g, keep2, enter2)
        changed = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        if amsgrad:
            exp_avg_sq = changed["max_exp_avg_sq"] = torch.maximum(slots["max_exp_avg_sq"], exp_avg_sq)
        return exp_avg / (square_root(exp_avg_sq) * stretch + floor), changed

    slots = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])]
    numbers = {"beta1": beta1, "beta2": beta2, "eps": eps}
    return per_tensor("scale_by_adam", rule, numbers, slots=slots, counts=True, elementwise=True)


@described
def scale_by_rms(alpha: Number = 0.99, eps: Number = 1e-8, *, centered: bool = False) -> Transform:
    """RMSprop's direction: g / (√v + eps), with v = αv + (1 − α)g², less (the running mean of g)² if centered.

    Source: Tieleman and Hinton, lecture 6.5 of "Neural Networks for Machine Learning", 2012; centered: Graves,
    "Generating Sequences With Recurrent Neural Networks", 2013. Arithmetic as in `torch.optim.RMSprop`.
    """
    non_negative("alpha", alpha)
    non_negative("eps", eps)
    flag("centered", centered)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        keep, enter, floor = cast(g, n["alpha"], 1 - n["alpha"], n["eps"])
        square_avg = mean_of_squares(slots["square_avg"], g, keep, enter)
        changed = {"square_avg": square_avg}
        spread = square_avg
        if centered:
            changed["grad_avg"] = torch.lerp(slots["grad_avg"], g, enter)
            spread = square_avg - changed["grad_avg"] * changed["grad_avg"]
        return g / (square_root(spread) + floor), changed

    slots = ["square_avg", *(["grad_avg"] if centered else [])]
    return per_tensor("scale_by_rms", rule, {"alpha": alpha, "eps": eps}, slots=slots, elementwise=True)


@described
def scale_by_lion(betas: tuple[Number, Number] = (0.9, 0.99)) -> Transform:
    """Lion's direction: sign(β₁m + (1 − β₁)g), after which m = β₂m + (1 − β₂)g.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, algorithm 2.
    """
    beta1, beta2 = pair_of_betas(betas)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        enter1, enter2 = cast(g, 1 - n["beta1"], 1 - n["beta2"])
        exp_avg = slots["exp_avg"]
        return torch.lerp(exp_avg, g, enter1).sign(), {"exp_avg": torch.lerp(exp_avg, g, enter2)}

    return per_tensor("scale_by_lion", rule, {"beta1": beta1, "beta2": beta2}, slots=["exp_avg"], elementwise=True)


@described
def clip_by_global_norm(max_norm: Number) -> Transform:
    """Shortens the whole gradient to at most `max_norm`: u = g · min(1, max_norm / (‖g‖ + 10⁻⁶)).

    ‖·‖ is the Euclidean norm over all parameters. The same as `torch.nn.utils.clip_grad_norm_`, the 10⁻⁶ included.

    Source: Pascanu et al., "On the difficulty of training recurrent neural networks", 2013.
    """
    positive("max_norm", max_norm)

    def apply(
        updates: dict[str, Tensor], slots: dict[str, Slots], params: Params, n: Numbers
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        if not updates:
            return updates, slots
        norm = torch.stack([u.to(torch.float64).square().sum() for u in updates.values()]).sum().sqrt()
        shrink = torch.clamp(n["max_norm"] / (norm + 1e-6), max=1.0)
        return {name: u * shrink.to(u.dtype) for name, u in updates.items()}, slots

    return Transform("clip_by_global_norm", {"max_norm": max_norm}, lambda p: {}, apply)


def mean_of_squares(mean: Tensor, g: Tensor, keep: Tensor, enter: Tensor) -> Tensor:
    """keep · mean + enter · g² as torch.optim has it: with `lerp` a mean that overflowed would turn from ∞ to NaN."""
    return torch.addcmul(mean * keep, g * enter, g)


def square_root(x: Tensor) -> Tensor:
    """√x as 1/(1/√x): torch's CPU `sqrt` is slower where x holds zeros, as second moments of unused inputs do."""
    return x.rsqrt().reciprocal()
