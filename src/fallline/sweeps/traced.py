"""The population step as a plain list of tensor operations.

Mapping, differentiating and running a rule cost Python and dispatcher time at every step, as much as the arithmetic of
a small population. Traced once, the step is a straight program of tensor operations that computes the same numbers
without going through any of it. Tracing takes fake tensors (no data), so a model whose course depends on data cannot be
traced, and is run as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fallline.sweeps import products

ATEN = torch.ops.aten
# Operations that return their input, or a view of it that is the same tensor when the shape is.
IDENTITIES = (ATEN.detach.default, ATEN.alias.default)
ZEROS = (ATEN.new_zeros.default, ATEN.zeros.default, ATEN.zeros_like.default)
IDENTITIES_OF_SHAPE = (ATEN.view.default, ATEN.expand.default, ATEN._unsafe_view.default)


def trace(function: Callable[..., Any], *examples: Any) -> fx.GraphModule:
    """`function` as a program for arguments of these shapes and types.

    Raises:
        Exception: whatever keeps the function from being traced.
    """
    # Imported here: it brings half of torch's compiler with it, which takes more than a second.
    from torch.fx.experimental.proxy_tensor import make_fx

    traced: fx.GraphModule = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
    _leave_out_what_does_nothing(traced.graph)
    _select_instead_of_scattering(traced.graph)
    _let_views_be_copies(traced.graph)
    products.arrange(traced.graph)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _leave_out_what_does_nothing(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source is None:
            continue
        same_shape = _shape(node) == _shape(source)
        unchanged = (
            node.target in IDENTITIES
            or (node.target in IDENTITIES_OF_SHAPE and same_shape)
            or (node.target is ATEN.mul.Scalar and node.args[1] == 1 and same_shape)
        )
        if unchanged:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _select_instead_of_scattering(graph: fx.Graph) -> None:
    """One value per row that is added to zeros at an index is a selection, which is computed side by side.

    That is what the gradient of picking one class is; scattered, every value is a memory access of its own.
    """
    for node in list(graph.find_nodes(op="call_function", target=ATEN.scatter_add.default)):
        zeros, dim, index, source = node.args
        like, to, values = (each.meta["val"] for each in (zeros, index, source))
        if zeros.target not in ZEROS or to.shape[dim] != 1 or to.shape != values.shape or not like.is_floating_point():
            continue
        if any(to.shape[d] != size for d, size in enumerate(like.shape) if d != dim % like.dim()):
            continue
        with graph.inserting_before(node):
            number = graph.call_function(
                ATEN.arange.default, (like.shape[dim],), {"dtype": torch.int64, "device": like.device}
            )
            shape = [like.shape[dim] if d == dim % like.dim() else 1 for d in range(like.dim())]
            column = graph.call_function(ATEN.reshape.default, (number, shape))
            chosen = graph.call_function(ATEN.eq.Tensor, (column, index))
            selected = graph.call_function(ATEN.where.ScalarOther, (chosen, source, 0.0))
        selected.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(selected)
        graph.erase_node(node)


def _let_views_be_copies(graph: fx.Graph) -> None:
    """A view of what is laid out otherwise than while tracing is a copy."""
    for target in (ATEN.view.default, ATEN._unsafe_view.default):
        for node in graph.find_nodes(op="call_function", target=target):
            node.target = ATEN.reshape.default


def _shape(node: fx.Node) -> tuple[Any, ...] | None:
    value = node.meta.get("val")
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else None
