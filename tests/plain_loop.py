"""The ten-line PyTorch loop that fallline must repeat, and what it trains with. None of it is fallline's training."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import fallline as fl


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al. 2023, written line by line."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for theta in group["params"]:
                m = self.state[theta].setdefault("m", torch.zeros_like(theta))
                g = theta.grad
                c = beta1 * m + (1 - beta1) * g
                theta -= group["lr"] * (torch.sign(c) + group["weight_decay"] * theta)
                m.copy_(beta2 * m + (1 - beta2) * g)


@dataclass(frozen=True)
class Pair:
    """One of our optimizers and the torch optimizer that it must equal."""

    ours: fl.optim.Optimizer
    torch: Callable[[list[nn.Parameter]], torch.optim.Optimizer]

    def __str__(self) -> str:
        return repr(self.ours).removeprefix("fl.optim.")


def _pair(name, torch_class, **arguments) -> Pair:
    return Pair(getattr(fl.optim, name)(**arguments), lambda params: torch_class(params, **arguments))


PAIRS = [
    _pair("sgd", torch.optim.SGD, lr=0.03),
    _pair("sgd", torch.optim.SGD, lr=0.02, momentum=0.9),
    _pair("sgd", torch.optim.SGD, lr=0.02, momentum=0.8, dampening=0.3, weight_decay=0.05),
    _pair("sgd", torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True),
    _pair("sgd", torch.optim.SGD, lr=1e-4, weight_decay=0.1, maximize=True),
    _pair("adam", torch.optim.Adam, lr=0.003),
    _pair("adam", torch.optim.Adam, lr=0.002, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, amsgrad=True),
    _pair("adam", torch.optim.Adam, lr=1e-4, maximize=True),
    _pair("adamw", torch.optim.AdamW, lr=0.003),
    _pair("adamw", torch.optim.AdamW, lr=0.001, weight_decay=0.3, amsgrad=True),
    _pair("rmsprop", torch.optim.RMSprop, lr=0.001),
    _pair("rmsprop", torch.optim.RMSprop, lr=0.001, alpha=0.9, momentum=0.7, weight_decay=0.02),
    _pair("rmsprop", torch.optim.RMSprop, lr=0.001, centered=True, eps=1e-4),
    _pair("lion", Lion, lr=3e-4),
    _pair("lion", Lion, lr=3e-4, betas=(0.8, 0.95), weight_decay=0.1),
]


@dataclass(frozen=True)
class PlainRun:
    losses: torch.Tensor
    start: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def plain_run(model_factory, x, y, loss_function, make_optimizer, *, seed, steps, batch_size) -> PlainRun:
    torch.manual_seed(seed)
    model = model_factory()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(list(model.parameters()))
    order = torch.Generator().manual_seed(seed)
    losses = []
    while len(losses) < steps:
        for index in torch.randperm(len(x), generator=order).split(batch_size):
            optimizer.zero_grad()
            loss = loss_function(model(x[index]), y[index])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if len(losses) == steps:
                break
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return PlainRun(torch.stack(losses), start, {k: v.detach() for k, v in model.named_parameters()}, gradients)
