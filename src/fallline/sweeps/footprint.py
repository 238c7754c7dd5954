"""How many trials a cache, or a GPU, holds."""

from __future__ import annotations

import contextlib
import math
import os

import torch

from fallline.tasks import Task


def rows_in_cache(task: Task, device: torch.device) -> int:
    """How many trials' parameters, state, gradients and activations stay in a core's cache, or fit into a GPU's memory.

    A power of two between 8 and 1,024 on a CPU, at most 4,096 on a GPU; 1 where a trial alone does not fit into the
    cache, and so gains nothing from neighbours.
    """
    row = bytes_of_a_trial(task)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(1, min(4096, int(0.6 * free / (2 * row))))
    fitting = 4 * _cache() / row
    return 1 if fitting < 0.5 else int(min(1024, max(8, 2 ** int(math.log2(max(1.0, fitting))))))


def bytes_of_a_trial(task: Task) -> int:
    """Parameters, their gradients and two tensors of state; what the forward pass keeps, and its gradients."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.random.fork_rng([]), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module = task.build_model(0).train()
        x, y = (data[: task.batch_size] for data in (task.train.x, task.train.y))
        held = task.loss(module(x), y)
    own = {p.data_ptr(): p.numel() * p.element_size() for p in module.parameters()}
    del held
    # Trials of one seed share their mini-batch, and all of them what is no parameter.
    known = {*own, x.data_ptr(), y.data_ptr(), *(buffer.data_ptr() for buffer in module.buffers())}
    return 4 * sum(own.values()) + 2 * sum(size for place, size in kept.items() if place not in known)


def _cache() -> int:
    """Bytes of a core's own cache."""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        size = os.sysconf("SC_LEVEL2_CACHE_SIZE")
        if size > 0:
            return size
    return 2**20
