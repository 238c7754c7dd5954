"""The forward pass of `vocabulary_tiles` on CUDA: one Triton kernel that never writes a logit to memory.

A program has a block of tokens and a share of the classes. It goes over the share block by block, multiplies, and keeps
for each token the greatest logit g, Σ exp(z − g), the label's logit and Σ w_c·(z_c − g); the shares are put together by
`vocabulary_tiles`, as its own blocks are. The backward pass is left to that file, whose matrix products are
cuBLAS's. This file is imported where a kernel is first needed, and not before.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor

TOKENS, CLASSES, DEPTH_IN_BYTES = 128, 128, 64  # of the block that a program multiplies at a time
PROGRAMS = 512  # shares are made until there are so many: a few for each multiprocessor


def statistics_of_blocks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weights: Tensor,
    cap: float | Tensor | None,
    smooths: bool,
) -> tuple[Tensor, ...]:
    """For each share of the classes [N, shares]: the greatest logit g, Σ exp(z − g), z_y if y is in the share, and for
    smoothing Σ w_c·(z_c − g) and [1, shares] Σ w_c. All in float32.

    Args:
        hidden: [N, D], float32, float16 or bfloat16; weight: [V, D] of the same type; bias: [V] or None.
        target: [N], each in 0 … V − 1.
        class_weights: [V], which weigh the spread.
        cap: the soft cap, 0-dimensional where it is a tensor.
    """
    tokens, depth = hidden.shape
    classes = weight.shape[0]
    rows, blocks = triton.cdiv(tokens, TOKENS), triton.cdiv(classes, CLASSES)
    each = triton.cdiv(blocks, min(blocks, triton.cdiv(PROGRAMS, rows)))
    shares = triton.cdiv(blocks, each)
    found = torch.empty(4, tokens, shares, device=hidden.device, dtype=torch.float32)
    nothing = found  # any pointer will do where nothing is read
    cap_there = nothing
    if cap is not None:
        there = cap if isinstance(cap, Tensor) else torch.tensor(cap)
        cap_there = there.to(hidden.device, torch.float32)
    exact = hidden.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    with torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext():
        _statistics[(rows, shares)](
            hidden.contiguous(),
            weight.contiguous(),
            nothing if bias is None else bias.contiguous(),
            target.contiguous(),
            class_weights.to(torch.float32).contiguous(),
            cap_there,
            found,
            tokens,
            classes,
            depth,
            shares,
            each,
            tokens * shares,
            BIASED=bias is not None,
            CAPPED=cap is not None,
            SMOOTHS=smooths,
            PRECISION="ieee" if exact else "tf32",
            TOKENS=TOKENS,
            CLASSES=CLASSES,
            DEPTH=DEPTH_IN_BYTES // hidden.element_size(),
            num_warps=8,
            num_stages=3,
        )
    padded = torch.nn.functional.pad(class_weights, (0, shares * each * CLASSES - classes))
    greatest, total, picked, spread = found.unbind()
    return greatest, total, picked, spread, padded.view(shares, -1).sum(-1).unsqueeze(0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _statistics(  # type: ignore[no-untyped-def]  # Triton reads annotations, and refuses all but its own
    hidden,
    weight,
    bias,
    target,
    class_weights,
    cap,
    found,
    tokens,
    classes,
    depth,
    shares,
    each,
    size,
    BIASED: tl.constexpr,  # noqa: N803
    CAPPED: tl.constexpr,  # noqa: N803
    SMOOTHS: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    CLASSES: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
):
    share = tl.program_id(1)
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_row = rows < tokens
    labels = tl.load(target + rows, mask=is_row, other=-1)
    greatest = tl.full((TOKENS,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    picked = tl.zeros((TOKENS,), tl.float32)
    spread = tl.zeros((TOKENS,), tl.float32)
    weighed = 0.0
    of_rows = hidden + rows.to(tl.int64)[:, None] * depth
    for block in range(each):
        columns = (share * each + block) * CLASSES + tl.arange(0, CLASSES)
        is_column = columns < classes
        of_columns = weight + columns.to(tl.int64)[None, :] * depth
        logits = tl.zeros((TOKENS, CLASSES), tl.float32)
        for start in range(0, depth, DEPTH):
            inner = start + tl.arange(0, DEPTH)
            inside = inner < depth
            left = tl.load(of_rows + inner[None, :], mask=is_row[:, None] & inside[None, :], other=0.0)
            right = tl.load(of_columns + inner[:, None], mask=is_column[None, :] & inside[:, None], other=0.0)
            logits = tl.dot(left, right, logits, input_precision=PRECISION)
        if BIASED:
            logits += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        if CAPPED:
            limit = tl.load(cap)
            ratio = logits / limit
            # tanh by exponentials loses digits near 0, where the series has converged: its next term is below 1e-8.
            decay = tl.exp(-2.0 * tl.abs(ratio))
            far = (1.0 - decay) / (1.0 + decay)
            square = ratio * ratio
            series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
            bent = tl.where(square < 0.0625, ratio * series, tl.where(ratio < 0, -far, far))
            logits = limit * bent
        logits = tl.where(is_column[None, :], logits, -float("inf"))
        above = tl.maximum(greatest, tl.max(logits, 1))
        total = total * tl.exp(greatest - above) + tl.sum(tl.exp(logits - above[:, None]), 1)
        picked += tl.sum(tl.where(columns[None, :] == labels[:, None], logits, 0.0), 1)
        if SMOOTHS:
            weights = tl.load(class_weights + columns, mask=is_column, other=0.0)
            shifted = tl.where(is_column[None, :], logits - above[:, None], 0.0)
            spread += weighed * (greatest - above) + tl.sum(weights[None, :] * shifted, 1)
            weighed += tl.sum(weights, 0)
        greatest = above
    place = found + rows.to(tl.int64) * shares + share
    tl.store(place, greatest, mask=is_row)
    tl.store(place + size, total, mask=is_row)
    tl.store(place + 2 * size, picked, mask=is_row)
    tl.store(place + 3 * size, spread, mask=is_row)
