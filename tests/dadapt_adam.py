"""D-Adaptation for Adam, slowly: one Python number per number of the algorithm, one line per line of it."""

import math

import torch


class DAdaptAdam(torch.optim.Optimizer):
    """Algorithm "D-Adapt Adam" of Defazio and Mishchenko 2023, with s and v of the step before in the numerator.

    All numbers that belong to the whole optimizer are Python floats, and a step is two passes over the parameters.
    """

    def __init__(
        self, params, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decouple=False,
        use_bias_correction=False, d0=1e-6, growth_rate=math.inf,
    ):  # fmt: skip
        super().__init__(params, {"lr": lr})
        self.beta1, self.beta2 = betas
        self.eps, self.weight_decay, self.decouple = eps, weight_decay, decouple
        self.use_bias_correction, self.growth_rate = use_bias_correction, growth_rate
        self.d, self.r, self.k = d0, 0.0, 0

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        lr, root = group["lr"], math.sqrt(self.beta2)
        step_size = self.d * lr
        if self.use_bias_correction:
            step_size *= math.sqrt(1 - self.beta2 ** (self.k + 1)) / (1 - self.beta1 ** (self.k + 1))
        inner, s_l1 = 0.0, 0.0
        for p in group["params"]:
            g = p.grad if self.decouple else p.grad + self.weight_decay * p
            state = self.state[p]
            if not state:
                state.update(m=torch.zeros_like(p), v=torch.zeros_like(p), s=torch.zeros_like(p))
            inner += float((g * state["s"] / (state["v"].sqrt() + self.eps)).sum())
            state["m"] = self.beta1 * state["m"] + (1 - self.beta1) * step_size * g
            state["v"] = self.beta2 * state["v"] + (1 - self.beta2) * g**2
            state["s"] = root * state["s"] + (1 - root) * step_size * g
            s_l1 += float(state["s"].abs().sum())
        if s_l1 == 0:
            return
        self.r = root * self.r + (1 - root) * step_size * inner
        d_hat = self.r / ((1 - root) * s_l1)
        self.d = max(self.d, min(d_hat, self.d * self.growth_rate))
        for p in group["params"]:
            state = self.state[p]
            if self.decouple:
                p -= self.weight_decay * step_size * p
            p -= state["m"] / (state["v"].sqrt() + self.eps)
        self.k += 1
