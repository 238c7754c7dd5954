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

# Trial-steps per worker from which on tracing saves more than it costs (some two seconds, and 20 µs a trial-step).
WORTH_TRACING = 100_000
ATEN = torch.ops.aten
# Operations that return their input, or a view of it that is the same tensor when the shape is.
IDENTITIES = (ATEN.detach.default, ATEN.alias.default)
# A batched product with at most so many columns is computed the other way round.
NARROW = 32
IDENTITIES_OF_SHAPE = (ATEN.view.default, ATEN.expand.default, ATEN._unsafe_view.default)


def trace(function: Callable[..., Any], *examples: Any) -> Callable[..., Any]:
    """`function` as a program for arguments of these shapes and types.

    Raises:
        Exception: whatever keeps the function from being traced.
    """
    # Imported here: it brings half of torch's compiler with it, which takes more than a second.
    from torch.fx.experimental.proxy_tensor import make_fx

    traced: fx.GraphModule = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
    _leave_out_what_does_nothing(traced.graph)
    _turn_matrix_products(traced.graph)
    traced.recompile()
    return traced


def worth_tracing(trials: int, steps: int, workers: int) -> bool:
    """Whether there is work enough ahead; if so, what tracing needs is imported here, before workers are forked."""
    if trials * steps < WORTH_TRACING * workers:
        return False
    trace(torch.neg, torch.zeros(1))
    return True


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
    graph.eliminate_dead_code()


def _turn_matrix_products(graph: fx.Graph) -> None:
    """AB is computed as (BᵀAᵀ)ᵀ where only its transpose is used, and where it is narrow.

    The gradient of a linear layer's weights comes out transposed, which costs a strided copy; and a batched product
    with a short last side is three times slower than with a long one.
    """
    for node in list(graph.find_nodes(op="call_function", target=ATEN.bmm.default)):
        users = list(node.users)
        only_transposed = all(_swaps_last_two(user) for user in users)
        (_, long, _), (_, _, short) = node.args[0].meta["val"].shape, node.args[1].meta["val"].shape
        viewed = any(user.target in IDENTITIES_OF_SHAPE for user in users)
        if not only_transposed and (viewed or short > NARROW or short >= long):
            continue
        with graph.inserting_before(node):
            left, right = (graph.call_function(ATEN.transpose.int, (each, 1, 2)) for each in node.args[::-1])
            turned = graph.call_function(ATEN.bmm.default, (left, right))
            turned.meta["val"] = node.meta["val"].mT
            if only_transposed:
                for user in users:
                    user.replace_all_uses_with(turned)
            else:
                back = graph.call_function(ATEN.transpose.int, (turned, 1, 2))
                back.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(back)
    graph.eliminate_dead_code()


def _swaps_last_two(node: fx.Node) -> bool:
    return node.target is ATEN.transpose.int and {d % 3 for d in node.args[1:]} == {1, 2}  # type: ignore[operator]


def _shape(node: fx.Node) -> tuple[Any, ...] | None:
    value = node.meta.get("val")
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else None
