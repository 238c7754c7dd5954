"""The pure step: a model's loss and gradients as functions of its parameters, and the update that follows.

`Program` has the two forms in which a model is run: as the module it is (any module), and as a function of parameters
and buffers that can be mapped over stacked ones (modules that torch.func accepts).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fallline.optim import Landscape

Named = Mapping[str, Tensor]
Buffers = dict[str, Tensor]


@dataclass(frozen=True)
class Program:
    """A model and a loss as functions.

    Attributes:
        module: the model; for the functional form its own parameters are not looked at.
        loss: what is minimised.
    """

    module: nn.Module
    loss: Callable[..., Tensor]

    def at(self, numbers: Named) -> Program:
        """The same program whose loss reads these numbers instead of its own."""
        return replace(self, loss=partial(self.loss, numbers=numbers)) if numbers else self

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training moves, by name; a tied parameter once."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def constants(self) -> dict[str, Tensor]:
        """What else the forward pass reads: buffers and frozen parameters."""
        frozen = {name: p.detach() for name, p in self.module.named_parameters() if not p.requires_grad}
        return {**frozen, **dict(self.module.named_buffers())}

    def predict(self, params: Named, constants: Named, x: Tensor) -> Tensor:
        """The functional form of the model: prediction for `x` with these parameters."""
        prediction: Tensor = functional_call(self.module, {**params, **constants}, (x,))
        return prediction

    def loss_at(self, params: Named, constants: Named, x: Tensor, y: Tensor) -> Tensor:
        """The functional form of the model and its loss: a scalar."""
        return self.loss(self.predict(params, constants, x), y)

    def landscape(self, params: Mapping[str, nn.Parameter], x: Tensor, y: Tensor, slopes: Named) -> Landscape:
        """The loss on a mini-batch around the parameters of the module, with the module run as it is (any module).

        Args:
            slopes: the gradients at the parameters; for the curvature, still part of their graph.
        """

        def gradient(at: Named) -> dict[str, Tensor]:
            with torch.enable_grad():
                moved = {name: tensor.detach().requires_grad_() for name, tensor in {**params, **at}.items()}
                found = gradients(self.loss(functional_call(self.module, moved, (x,)), y), moved)
            return {name: found[name] for name in at if name in found}

        def curvature(vector: Named) -> dict[str, Tensor]:
            with torch.enable_grad():
                along = torch.stack([(slopes[name] * v).sum() for name, v in vector.items() if name in slopes]).sum()
                product = gradients(along, params) if along.requires_grad else {}
            return {name: product.get(name, torch.zeros_like(v)) for name, v in vector.items()}

        return Landscape(gradient, curvature)

    def pure_landscape(self, params: Named, constants: Named, x: Tensor, y: Tensor) -> tuple[Landscape, Buffers]:
        """The same for the functional form, and the constants as the passes leave them (BatchNorm's statistics)."""
        latest = dict(constants)

        def gradient(at: Named) -> dict[str, Tensor]:
            def loss(some: Named, before: Named) -> tuple[Tensor, Buffers]:
                copies = {name: tensor.clone() for name, tensor in before.items()}
                return self.loss_at({**params, **some}, copies, x, y), copies

            slopes, changed = torch.func.grad(loss, has_aux=True)(dict(at), dict(latest))
            latest.update(changed)
            found: dict[str, Tensor] = slopes
            return found

        def loss_alone(at: Named) -> Tensor:
            return self.loss_at(at, {name: tensor.clone() for name, tensor in constants.items()}, x, y)

        return Landscape(gradient, Landscape.of(loss_alone, params).curvature), latest


def joined(predictions: Sequence[Any], dim: int = 0) -> Any:
    """The predictions for parts of the data as one, each tensor of a tuple by itself.

    A tensor that is the same for every part (a classifier's weights) is no prediction for a sample, and stays as it is.
    """
    if len(predictions) == 1:
        return predictions[0]
    if isinstance(predictions[0], Tensor):
        same = len({part.data_ptr() for part in predictions}) == 1 and predictions[0].numel()
        return predictions[0] if same else torch.cat(list(predictions), dim=dim)
    return tuple(joined(parts, dim) for parts in zip(*predictions, strict=True))


def gradients(loss: Tensor, params: Mapping[str, Tensor], *, keep: bool = False) -> dict[str, Tensor]:
    """Gradients of a scalar by parameter name; a parameter that had no part in it is left out, as in torch.optim.

    Args:
        keep: so that the gradients can be differentiated themselves.
    """
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True, create_graph=keep)
    return {name: g for name, g in zip(params, found, strict=True) if g is not None}
