"""The loss around a model's parameters, as `step(closure)` of a torch optimizer can look at it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fallline.errors import FalllineError
from fallline.optim.landscape import Landscape, Named


def landscape(name: str, params: Mapping[str, Tensor], closure: Callable[[], Any] | None) -> Landscape:
    """The landscape of a mini-batch that `closure` knows, and of which `p.grad` is the gradient.

    Args:
        name: of the optimizer, for the errors.
        params: all parameters that the optimizer trains, by name. They are moved and put back; `p.grad` is the same
            tensor with the same values afterwards.
        closure: zeroes the gradients, computes the loss, goes backward and returns the loss.
    """

    def gradient(at: Named) -> dict[str, Tensor]:
        if closure is None:
            raise FalllineError(
                f"{name} looks at the gradient at other parameters too: write optimizer.step(closure), with a closure "
                "that calls optimizer.zero_grad(), computes the loss, calls loss.backward() and returns the loss."
            )
        before = {key: params[key].detach().clone() for key in at}
        gradients = {key: p.grad for key, p in params.items()}
        try:
            with torch.no_grad():
                for key, tensor in at.items():
                    params[key].copy_(tensor)
            for p in params.values():
                p.grad = None
            with torch.enable_grad():
                closure()
            return {key: grad.detach() for key in at if (grad := params[key].grad) is not None}
        finally:
            with torch.no_grad():
                for key, tensor in before.items():
                    params[key].copy_(tensor)
            for key, p in params.items():
                p.grad = gradients[key]

    def curvature(vector: Named) -> dict[str, Tensor]:
        slopes = {key: grad for key in vector if (grad := params[key].grad) is not None and grad.requires_grad}
        if not slopes:
            raise FalllineError(
                f"{name} looks at the curvature at this step: call loss.backward(create_graph=True), so that the "
                "gradients can be differentiated."
            )
        with torch.enable_grad():
            along = torch.stack([(grad * vector[key]).sum() for key, grad in slopes.items()]).sum()
            own = [params[key] for key in vector]
            products = torch.autograd.grad(along, own, retain_graph=True, allow_unused=True)
        found = zip(vector, own, products, strict=True)
        return {key: torch.zeros_like(p) if product is None else product.detach() for key, p, product in found}

    return Landscape(gradient, curvature)
