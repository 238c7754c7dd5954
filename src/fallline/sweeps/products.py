"""The products of stacked matrices in a traced step, arranged so that the machine computes them fast.

Most of the arithmetic of a population is here: for each trial a product of two small matrices, all of them one batched
product. What one of its sides is, where its result is used and which library computes it make a factor of three.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

ATEN = torch.ops.aten
# A batched product with at most so many columns is computed the other way round.
NARROW = 32
# Multiplications from which on a call of oneDNN, which takes some microseconds itself, is worth it. (One for each trial
# is not: what comes out has to be copied together.)
WORTH_ONEDNN = 2**20
# The only one of torch's operations that has oneDNN compute a product of any two matrices in float32; there is none in
# a torch that was built without oneDNN.
LINEAR = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None
VIEWS = (ATEN.reshape.default, ATEN.expand.default)


def arrange(graph: fx.Graph) -> None:
    """Changes how batched products are computed, and where their results lie; what they are stays.

    - A side that all trials share (the mini-batch of trials of one seed) makes the batched product a single one of the
      other sides one below the other, which libraries compute faster.
    - AB is computed as (BᵀAᵀ)ᵀ where only its transpose is used (the gradient of a linear layer's weights comes out
      transposed, which costs a strided copy), where it is narrow (a short last side is three times slower than a long
      one), and where it meets what lies in memory transposed.
    """
    if not graph.find_nodes(op="call_function", target=ATEN.bmm.default):
        return
    fake = next(n.meta["val"].fake_mode for n in graph.nodes if isinstance(n.meta.get("val"), FakeTensor))
    with fake:
        for node in graph.nodes:
            if node.target is ATEN.bmm.default:
                with graph.inserting_before(node):
                    _arrange_one(graph, node)
            elif node.op == "call_function":  # on what was arranged before it, it may give another layout
                node.meta["val"] = _value(node)


def _arrange_one(graph: fx.Graph, node: fx.Node) -> None:
    left, right = cast(tuple[fx.Node, fx.Node], node.args)
    long, short = _tensor(left).shape[1], _tensor(right).shape[2]
    only_transposed = bool(node.users) and all(_swaps_last_two(user) for user in node.users)
    viewed = any(user.target in VIEWS for user in node.users)
    narrow = NARROW >= short < long and not viewed
    left_shared, right_shared = _of_all(left), _of_all(right)
    better = only_transposed or narrow or left_shared > right_shared or _meets_transposed(node)
    if not better or right_shared > left_shared:
        _replace(node, _product(graph, left, right))
        return
    turned = _product(graph, *(_call(graph, ATEN.transpose.int, each, 1, 2) for each in (right, left)))
    if only_transposed:
        for user in list(node.users):
            _replace(user, turned)
        graph.erase_node(node)
    else:
        _replace(node, _call(graph, ATEN.transpose.int, turned, 1, 2))


def _product(graph: fx.Graph, left: fx.Node, right: fx.Node) -> fx.Node:
    """left [trial, M, K] times right [trial, K, N]."""
    trials, long, inner = _tensor(left).shape
    if not _of_all(right):
        return _call(graph, ATEN.bmm.default, left, right)
    below = _call(graph, ATEN.reshape.default, left, [trials * long, inner])
    product = _matrix_product(graph, below, _call(graph, ATEN.select.int, right, 0, 0))
    return _call(graph, ATEN.reshape.default, product, [trials, long, -1])


def _matrix_product(graph: fx.Graph, left: fx.Node, right: fx.Node) -> fx.Node:
    """left [M, K] times right [K, N]."""
    value = _tensor(left)
    large = value.numel() * _tensor(right).shape[1] >= WORTH_ONEDNN
    if not (large and value.device.type == "cpu" and value.dtype == torch.float32 and onednn_is_faster()):
        return _call(graph, ATEN.mm.default, left, right)
    return _call(graph, LINEAR, left, _call(graph, ATEN.transpose.int, right, 0, 1), None, "none", [], "")


@functools.cache
def onednn_is_faster() -> bool:
    """Whether products of matrices are: MKL leaves half of a processor's vector unit alone if Intel has not made it.

    It is known by the processor's name, not measured, so that a run that is resumed computes the same bits.
    """
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
    if not wide or not torch.backends.mkl.is_available() or sys.platform != "linux":
        return False
    with contextlib.suppress(OSError):
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    return False


def _swaps_last_two(node: fx.Node) -> bool:
    """Whether it transposes stacked matrices."""
    return node.target is ATEN.transpose.int and {d % 3 for d in node.args[1:]} == {1, 2}  # type: ignore[operator]


def _of_all(node: fx.Node) -> bool:
    """Whether all trials have the same matrix."""
    value = _tensor(node)
    return len(value) == 1 or value.stride(0) == 0


def _meets_transposed(node: fx.Node) -> bool:
    """Whether what uses a product also takes a tensor of its shape that lies in memory transposed."""
    own = _tensor(node)
    others = {other for user in node.users if torch.Tag.pointwise in _tags(user) for other in user.all_input_nodes}
    return any(
        _tensor(other).shape == own.shape and _tensor(other).stride(1) == 1 < _tensor(other).stride(2)
        for other in others - {node}
        if isinstance(other.meta.get("val"), Tensor)
    )


def _tags(node: fx.Node) -> list[torch.Tag]:
    return node.target.tags if isinstance(node.target, torch._ops.OpOverload) else []


def _replace(node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = _value(node)
    return node


def _tensor(node: fx.Node) -> Tensor:
    return cast(Tensor, node.meta["val"])


def _value(node: fx.Node) -> Any:
    """What a node gives, as tensors without data."""
    if any(each.meta.get("val") is None for each in node.all_input_nodes):
        return node.meta.get("val")
    args, kwargs = tree_map_only(fx.Node, lambda each: each.meta["val"], (node.args, node.kwargs))
    return cast(Any, node.target)(*args, **kwargs)
