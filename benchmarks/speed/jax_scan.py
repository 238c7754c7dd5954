"""The contender that needs JAX: one program over all trials and steps, of vmap, scan and optax, compiled by jit.

Models are mirrored in plain jax.numpy, with torch's names of parameters and its first values. JAX starts threads, after
which a process must not fork: this module imports it only where the contender starts, in a process of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from speed.cases import CASES, batch_order
from speed.contenders import Ready, Trained, Work

Params = dict[str, Any]


def scan(work: Work) -> Ready:
    """All trials of the population (of one optimizer, Adam) in one program; trials of a seed share its batches."""
    on_gpu = work.device.startswith("cuda")
    os.environ["JAX_PLATFORMS"] = "cuda" if on_gpu else "cpu"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # or the peak of memory would be all there is
    import jax
    import jax.numpy as jnp
    import optax

    jax.config.update("jax_default_matmul_precision", "highest")  # torch's default
    torch.set_num_threads(1)
    case = CASES[work.case]
    task = case.task().check()
    points, seeds = case.grid(work.population)
    plans = case.plans(work.population)
    data = task.train.x.numpy(), task.train.y.numpy()
    models = [task.build_model(seed) for seed in range(seeds)]
    first = {
        name: np.stack([np.stack([model.state_dict()[name].numpy()] * points) for model in models])
        for name, _ in models[0].named_parameters()
    }  # [seed, learning rate, …]
    rates = np.array([plans[i * seeds].configuration.optimizer.numbers["lr"] for i in range(points)], np.float32)
    orders = [batch_order(len(data[0]), task.batch_size, seed, work.steps) for seed in range(seeds)]
    order = torch.stack(orders, dim=1).int().numpy()  # [step, seed, sample]
    assert case.model is not None
    forward = MODELS[case.model]

    def one(params: Params, state: Any, lr: Any, x: Any, y: Any) -> tuple[Params, Any, Any]:
        def loss(params: Params) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(forward(params, x), y).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optax.adam(lr).update(grads, state)
        return optax.apply_updates(params, updates), state, value

    population = jax.vmap(jax.vmap(one, (0, 0, 0, None, None)), (0, 0, None, 0, 0))

    def train(params: Params, rates: Any, data: Any, order: Any) -> Any:
        state = jax.vmap(jax.vmap(lambda params: optax.adam(0.0).init(params)))(params)

        def step(carry: Any, index: Any) -> Any:
            params, state, value = population(*carry, rates, data[0][index], data[1][index])
            return (params, state), value

        (params, _), losses = jax.lax.scan(step, (params, state), order)
        return params, losses[-1]

    inputs = jax.tree.map(jnp.asarray, (first, rates, data, order))
    began = time.perf_counter()
    program = jax.jit(train).lower(*inputs).compile()
    compile_seconds = time.perf_counter() - began

    def run() -> Trained:
        began = time.perf_counter()
        _, last = jax.block_until_ready(program(*inputs))
        seconds = time.perf_counter() - began
        numbers = np.asarray(last).T.reshape(-1)  # by learning rate, then seed, as trials are numbered
        losses = {(trial, work.steps): float(numbers[trial]) for trial in work.trials}
        peak = jax.devices()[0].memory_stats()["peak_bytes_in_use"] if on_gpu else None
        return Trained(losses, seconds, peak, told={"where": "1×all"})

    return Ready(compile_seconds, run)


def linear(params: Params, name: str, x: Any) -> Any:
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def mlp(params: Params, x: Any) -> Any:
    """Linear, ReLU, linear."""
    import jax

    return linear(params, "2", jax.nn.relu(linear(params, "0", x)))


def cnn(params: Params, x: Any) -> Any:
    """`fl.tasks.digits_cnn`: twice convolution, ReLU and pooling, then a linear layer; x [N, 1, 8, 8]."""
    import jax

    for name in ("0", "3"):
        x = jax.lax.conv_general_dilated(x, params[f"{name}.weight"], (1, 1), "SAME")
        x = jax.nn.relu(x + params[f"{name}.bias"][:, None, None])
        window = (1, 1, 2, 2)
        x = jax.lax.reduce_window(x, -np.inf, jax.lax.max, window, window, "VALID")
    return linear(params, "7", x.reshape(len(x), -1))


def transformer(params: Params, x: Any, heads: int = 2, layers: int = 2) -> Any:
    """`fl.tasks.char_lm`: a causal transformer with normalisation before each part; x [N, T] -> logits [N, T, V]."""
    import jax
    import jax.numpy as jnp

    samples, length = x.shape
    hidden = params["embedding.weight"][x] + params["position"][:length]
    width = hidden.shape[-1]
    future = jnp.triu(jnp.ones((length, length), bool), 1)

    def normalised(name: str, x: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * params[f"{name}.weight"] + params[f"{name}.bias"]

    for layer in range(layers):
        block = f"blocks.{layer}"
        split = linear(params, f"{block}.queries_keys_values", normalised(f"{block}.before_attention", hidden))
        queries, keys, values = split.reshape(samples, length, 3, heads, width // heads).transpose(2, 0, 3, 1, 4)
        scores = queries @ keys.swapaxes(-1, -2) / (width // heads) ** 0.5
        attention = jax.nn.softmax(jnp.where(future, -jnp.inf, scores), -1)
        mixed = (attention @ values).transpose(0, 2, 1, 3).reshape(samples, length, width)
        hidden = hidden + linear(params, f"{block}.mix", mixed)
        inner = linear(params, f"{block}.network.0", normalised(f"{block}.before_network", hidden))
        hidden = hidden + linear(params, f"{block}.network.2", jax.nn.gelu(inner, approximate=False))
    return linear(params, "readout", normalised("normalisation", hidden))


MODELS: dict[str, Callable[[Params, Any], Any]] = {"mlp": mlp, "cnn": cnn, "transformer": transformer}
