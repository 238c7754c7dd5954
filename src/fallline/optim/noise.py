"""Noise in the gradients."""

from __future__ import annotations

from torch import Tensor

from fallline.description import described
from fallline.optim.checks import non_negative
from fallline.optim.random import GRADIENT_NOISE, normal
from fallline.optim.transform import Number, Numbers, Slots, Transform, cast, per_tensor


@described
def add_noise(eta: Number, gamma: Number = 0.55) -> Transform:
    """Gradients with normal noise that fades as training goes on: u = g + N(0, eta / tᵞ), t counted from 1.

    The noise depends on the run's seed, the parameter's name and the step alone (see `random`). The paper counts steps
    from 0 and writes eta / (1 + t)ᵞ.

    Args:
        eta: variance of the noise at the first step, at least 0; the paper takes 0.01, 0.3 or 1.
        gamma: how fast the variance fades, at least 0.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> import fallline as fl
    >>> noisy = fl.optim.chain(add_noise(eta=0.01), fl.optim.adam(lr=0.01))
    >>> noisy.numbers["gamma"]
    0.55

    Source: Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015.
    """
    non_negative("eta", eta)
    non_negative("gamma", gamma)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        (deviation,) = cast(g, (n["eta"] / slots["step"] ** n["gamma"]).sqrt())
        return g + normal(g, slots["seed"], slots["step"], GRADIENT_NOISE) * deviation, {}

    # Not element by element: an element's noise goes by its place in the parameter that it belongs to.
    return per_tensor("add_noise", rule, {"eta": eta, "gamma": gamma}, counts=True, draws=True)
