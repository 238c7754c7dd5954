"""The loss around the parameters, for the few rules that look at more than one gradient (SAM, Sophia, MARS)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Landscape:
    """The loss of one mini-batch as a function of the parameters.

    Attributes:
        gradient: parameters by name -> the gradients there. Parameters that are left out stay where they are.
        curvature: a vector by parameter name -> the Hessian at the present parameters times it.
    """

    gradient: Callable[[Named], dict[str, Tensor]]
    curvature: Callable[[Named], dict[str, Tensor]]

    @classmethod
    def of(cls, loss: Callable[[Named], Tensor], params: Named) -> Landscape:
        """The landscape of a loss that is a pure function of the parameters.

        Args:
            loss: parameters by name -> a scalar.
            params: the present parameters.

        >>> p = {"w": torch.tensor([1.0, 2.0])}
        >>> around = Landscape.of(lambda at: (at["w"] ** 3).sum(), p)
        >>> around.gradient({"w": torch.tensor([0.0, 1.0])})["w"]
        tensor([0., 3.])
        >>> around.curvature({"w": torch.ones(2)})["w"]
        tensor([ 6., 12.])
        """

        def gradient(at: Named) -> dict[str, Tensor]:
            slopes: dict[str, Tensor] = torch.func.grad(lambda some: loss({**params, **some}))(dict(at))
            return slopes

        def curvature(vector: Named) -> dict[str, Tensor]:
            def along(some: Named) -> Tensor:
                slopes = gradient(some)
                return torch.stack([(slopes[name] * v).sum() for name, v in vector.items()]).sum()

            product: dict[str, Tensor] = torch.func.grad(along)({name: params[name] for name in vector})
            return product

        return cls(gradient, curvature)
