"""Three statistics of a token's logits, and their gradients, tile by tile: what `linear_cross_entropy` is made of.

With the logits z = W·h + b (softly capped, if asked for) of a token whose label is y, and weights w of the classes,

    surprise    log Σ exp(z) − z_y
    spread      Σ_c w_c·(log Σ exp(z) − z_c)        for label smoothing
    normaliser  log Σ exp(z)                        for the z-loss

Everything else of the loss is plain arithmetic on these. The forward pass goes over tiles of tokens × classes, of which
one exists at a time, and keeps a token's greatest logit and Σ exp(z − greatest). The backward pass computes each tile
again. The classes are the outer loop: a block of the classifier's gradient is finished before the next begins, so it is
rounded once, and all that is summed up over blocks is the hidden states' gradient. Second derivatives are those of the
same statistics over all classes at once, for a few tokens at a time.

All tensors may have leading dimensions, the same for all: the trials of a population. That is how vmap is done here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._python_dispatch import _get_current_dispatch_mode

Cap: TypeAlias = float | Tensor | None
ON_A_CPU, ON_A_GPU = 1 << 21, 1 << 24  # logits in a tile
OUTRIGHT = 1 << 22  # up to so many logits, tiles save little memory, and cost a matrix product
HALF = (torch.float16, torch.bfloat16)


def tile_by_tile_pays(tokens: int, classes: int) -> bool:
    """Whether there are so many logits that they should not exist at once."""
    return tokens * classes > OUTRIGHT


def working(*tensors: Tensor | None) -> torch.dtype:
    """What statistics are computed and sums are kept in: float32, or float64 where there is float64."""
    wide = any(each is not None and each.dtype == torch.float64 for each in tensors)
    return torch.float64 if wide else torch.float32


def outright(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weights: Tensor, cap: Cap, smooths: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Surprise, spread (0 unless `smooths`) and normaliser [*B, N] from all logits at once, by plain tensor operations.

    Args:
        hidden: [*B, N, D]; weight: [*B, V, D]; bias: [*B, V] or None; target: [*B, N], each in 0 … V − 1.
        class_weights: [V], which weigh the spread.
        cap: the soft cap, of shape [*B] where it is a tensor.
    """
    dtype = working(hidden, weight)
    with _as_it_is(hidden):
        logits = hidden.to(dtype) @ weight.to(dtype).mT
    if bias is not None:
        logits = logits + bias.to(dtype).unsqueeze(-2)
    if cap is not None:
        cap = _over_tiles(cap)
        logits = cap * torch.tanh(logits / cap)
    greatest = _greatest(logits.detach())
    shifted = logits - greatest.unsqueeze(-1)
    log_total = shifted.exp().sum(-1).log()
    surprise = log_total - shifted.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    spread = torch.zeros_like(surprise)
    if smooths:
        weighted = (shifted * class_weights.unsqueeze(-2)).sum(-1)
        spread = class_weights.sum(-1, keepdim=True) * log_total - weighted
    return surprise, spread, log_total + greatest


def statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weights: Tensor,
    cap: Cap,
    smooths: bool,
    limit: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `outright` gives, with never more than `limit` logits at once (None: as many as suit the device)."""
    if limit is None:
        limit = ON_A_GPU if hidden.is_cuda else ON_A_CPU
    found: tuple[Tensor, ...] = _Statistics.apply(hidden, weight, bias, target, class_weights, cap, smooths, limit)  # type: ignore[no-untyped-call]
    return found[0], found[1], found[2]


def tile_shape(tokens: int, classes: int, limit: int) -> tuple[int, int]:
    """The tokens and classes of a tile of at most `limit` logits: as near to a square as its sides allow.

    >>> tile_shape(4096, 32768, 1 << 20), tile_shape(100, 32768, 1 << 20), tile_shape(10**6, 16, 1 << 20)
    ((1024, 1024), (100, 10485), (65536, 16))
    """
    rows = max(1, min(tokens, int(limit**0.5)))
    columns = max(1, min(classes, limit // rows))
    return max(1, min(tokens, limit // columns)), columns


def _blocks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _over_tiles(cap: float | Tensor) -> float | Tensor:
    return cap[..., None, None] if isinstance(cap, Tensor) else cap


def _greatest(logits: Tensor) -> Tensor:
    # A class that a bias of −∞ rules out has no logit to subtract.
    return logits.amax(-1).clamp(min=torch.finfo(logits.dtype).min)


def _as_it_is(tensor: Tensor) -> AbstractContextManager[Any]:
    """Inside, autocast does not choose the types: they were chosen before."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _operand(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What matrices are multiplied in: a GPU multiplies half-precision numbers as they are and sums in float32."""
    return hidden.dtype if hidden.is_cuda and hidden.dtype == weight.dtype else working(hidden, weight)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    if left.dtype == dtype:
        return left @ right
    if left.ndim == right.ndim == 2:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def _tile(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    logits = _product(hidden, weight.mT, dtype)
    return logits if bias is None else logits.add_(bias.to(dtype).unsqueeze(-2))


class _Statistics(Function):
    """(surprise, spread, normaliser, greatest, total) [*B, N] of hidden states [*B, N, D] and a classifier [*B, V, D].

    The last two are there for the backward pass: the greatest logit g and Σ exp(z − g).
    """

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weights: Tensor,
        cap: Cap,
        smooths: bool,
        limit: int,
    ) -> tuple[Tensor, ...]:
        with _as_it_is(hidden):
            blocks = _statistics_of_blocks(hidden, weight, bias, target, class_weights, cap, smooths, limit)
        greatest_of, total_of, picked_of, spread_of, share_of = blocks
        # Fails for a label that is no class, as torch's gather does: there is a column for each class here.
        nothing = total_of.new_zeros(1).expand(*target.shape[:-1], weight.shape[-2]).gather(-1, target)
        greatest = greatest_of.amax(-1)
        total = (total_of * (greatest_of - greatest.unsqueeze(-1)).exp()).sum(-1)
        log_total = total.log()
        surprise = log_total - (picked_of.sum(-1) + nothing - greatest)
        spread = torch.zeros_like(surprise)
        if smooths:
            shifted = spread_of + share_of * (greatest_of - greatest.unsqueeze(-1))
            spread = share_of.sum(-1) * log_total - shifted.sum(-1)
        return surprise, spread, log_total + greatest, greatest, total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, bias, target, class_weights, cap, ctx.smooths, ctx.limit = inputs
        *_, greatest, total = output
        ctx.mark_non_differentiable(greatest, total)
        ctx.cap = None if isinstance(cap, Tensor) else cap
        movable = cap if isinstance(cap, Tensor) else None
        ctx.save_for_backward(hidden, weight, bias, target, class_weights, movable, greatest, total)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, class_weights, cap, greatest, total = ctx.saved_tensors
        needed = ctx.needs_input_grad
        wanted = (needed[0], needed[1], needed[2], needed[5])
        found = iter(
            _Gradients.apply(
                hidden,
                weight,
                bias,
                target,
                class_weights,
                ctx.cap if cap is None else cap,
                greatest,
                total,
                *slopes[:3],
                ctx.smooths,
                ctx.limit,
                wanted,
            )  # type: ignore[no-untyped-call]
        )
        grads = [next(found) if want else None for want in wanted]
        return *grads[:3], None, None, grads[3], None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        size = info.batch_size
        if all(in_dims[i] is None for i in (1, 2, 4, 5)):
            folded = _as_tokens(args[0], in_dims[0], size, 2), *args[1:3], _as_tokens(args[3], in_dims[3], size, 1)
            found = _Statistics.apply(*folded, *args[4:])  # type: ignore[no-untyped-call]
            return tuple(_as_trials(each, size, 1) for each in found), (0,) * 5
        leading = [_leading(each, dim, size) for each, dim in zip(args, in_dims, strict=True)]
        leading[4] = args[4] if in_dims[4] is None else leading[4]
        return _Statistics.apply(*leading), (0,) * 5  # type: ignore[no-untyped-call]


class _Gradients(Function):
    """The gradients that are wanted (of hidden states, classifier, bias, soft cap), given the statistics' slopes."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weights: Tensor,
        cap: Cap,
        greatest: Tensor,
        total: Tensor,
        of_surprise: Tensor,
        of_spread: Tensor,
        of_normaliser: Tensor,
        smooths: bool,
        limit: int,
        wanted: tuple[bool, bool, bool, bool],
    ) -> tuple[Tensor, ...]:
        slopes = of_surprise, of_spread if smooths else None, of_normaliser
        with _as_it_is(hidden):
            found = _gradients_of_blocks(
                hidden, weight, bias, target, class_weights, cap, greatest, total, slopes, limit, wanted
            )
        return tuple(each for each, want in zip(found, wanted, strict=True) if want and each is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cap = inputs[5]
        ctx.cap = None if isinstance(cap, Tensor) else cap
        ctx.smooths, ctx.limit, ctx.wanted = inputs[11:]
        ctx.save_for_backward(*inputs[:5], cap if isinstance(cap, Tensor) else None, *inputs[8:11])

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, class_weights, cap, *of = ctx.saved_tensors
        with _as_it_is(hidden):
            found = _second_derivatives(
                hidden, weight, bias, target, class_weights, ctx.cap if cap is None else cap, of, slopes, ctx
            )
        d_hidden, d_weight, d_bias, d_cap, *d_of = found
        return d_hidden, d_weight, d_bias, None, None, d_cap, None, None, *d_of, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        size, wanted = info.batch_size, args[-1]
        if all(in_dims[i] is None for i in (1, 2, 4, 5)) and wanted == (True, False, False, False):
            folded = list(args)
            for i in (0, 3, *range(6, 11)):
                folded[i] = _as_tokens(args[i], in_dims[i], size, 2 if i == 0 else 1)
            found = _Gradients.apply(*folded)  # type: ignore[no-untyped-call]
            return tuple(_as_trials(each, size, 2) for each in found), (0,)
        leading = [_leading(each, dim, size) for each, dim in zip(args, in_dims, strict=True)]
        leading[4] = args[4] if in_dims[4] is None else leading[4]
        return _Gradients.apply(*leading), (0,) * sum(wanted)  # type: ignore[no-untyped-call]


def _leading(value: Any, dim: int | None, size: int) -> Any:
    """A tensor with the trial as its first dimension."""
    if not isinstance(value, Tensor):
        return value
    return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)


def _as_tokens(value: Tensor, dim: int | None, size: int, last: int) -> Tensor:
    """[*B, N, …] with the trials among the tokens, where all share one classifier; `last` dimensions follow B."""
    leading: Tensor = _leading(value, dim, size)
    return leading.movedim(0, -last - 1).flatten(-last - 1, -last)


def _as_trials(value: Tensor, size: int, last: int) -> Tensor:
    split = (*value.shape[:-last], size, value.shape[-last] // size, *value.shape[value.ndim - last + 1 :])
    return value.reshape(split).movedim(-last - 1, 0)


def _statistics_of_blocks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weights: Tensor,
    cap: Cap,
    smooths: bool,
    limit: int,
) -> tuple[Tensor, ...]:
    """For each block of classes [*B, N, blocks]: the greatest logit g, Σ exp(z − g), z_y if y is in the block, and for
    smoothing Σ w_c·(z_c − g) and Σ w_c."""
    if _has_kernel(hidden, weight):
        from fallline.losses.vocabulary_triton import statistics_of_blocks

        return statistics_of_blocks(hidden, weight, bias, target, class_weights, cap, smooths)
    dtype, operand = working(hidden, weight), _operand(hidden, weight)
    height, width = _tile_shape(hidden, weight, limit)
    rows = list(_blocks(hidden.shape[-2], height))
    over = None if cap is None else _over_tiles(cap)
    of_blocks = []
    for columns in _blocks(weight.shape[-2], width):
        block = weight[..., columns, :].to(operand)
        some_bias = None if bias is None else bias[..., columns]
        share = class_weights[..., columns].unsqueeze(-1).expand(*hidden.shape[:-2], -1, 1)
        of_rows = []
        for those in rows:
            logits = _tile(hidden[..., those, :].to(operand), block, some_bias, dtype)
            if over is not None:
                logits = logits.div_(over).tanh_().mul_(over)
            here, place = _place(target[..., those], columns)
            picked = torch.where(here, logits.gather(-1, place.unsqueeze(-1)).squeeze(-1), 0.0)
            greatest = _greatest(logits)
            logits = logits.sub_(greatest.unsqueeze(-1))
            spread = (logits @ share).squeeze(-1) if smooths else picked
            of_rows.append(torch.stack((greatest, logits.exp_().sum(-1), picked, spread)))
        of_blocks.append(torch.cat(of_rows, -1))
    shares = torch.stack([class_weights[..., c].sum(-1) for c in _blocks(weight.shape[-2], width)], -1)
    greatest, total, picked, spread = torch.stack(of_blocks, -1).unbind()
    return greatest, total, picked, spread, shares.unsqueeze(-2)


def _place(target: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Whether a label is in the block of classes, and at which place (any, where it is not)."""
    place = target - columns.start
    last = columns.stop - columns.start - 1
    return (place >= 0) & (place <= last), place.clamp(0, last)


def _tile_shape(hidden: Tensor, weight: Tensor, limit: int) -> tuple[int, int]:
    trials = hidden.shape[:-2].numel()
    return tile_shape(hidden.shape[-2], weight.shape[-2], max(1, limit // max(1, trials)))


def _has_kernel(hidden: Tensor, weight: Tensor) -> bool:
    """Whether Triton can take these: CUDA tensors of one type, without trials, with data (outside of any tracing)."""
    return (
        hidden.is_cuda
        and weight.device == hidden.device
        and hidden.dtype == weight.dtype
        and hidden.dtype in (torch.float32, *HALF)
        and hidden.ndim == weight.ndim == 2
        and 0 not in (*hidden.shape, *weight.shape)
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and importlib.util.find_spec("triton") is not None
    )


def _gradients_of_blocks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weights: Tensor,
    cap: Cap,
    greatest: Tensor,
    total: Tensor,
    slopes: tuple[Tensor, Tensor | None, Tensor],
    limit: int,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    dtype, operand = working(hidden, weight), _operand(hidden, weight)
    height, width = _tile_shape(hidden, weight, limit)
    of_surprise, of_spread, of_normaliser = slopes
    of_exponential = of_surprise + of_normaliser
    if of_spread is not None:
        of_exponential = of_exponential + class_weights.sum(-1, keepdim=True) * of_spread
    of_exponential = (of_exponential / total).unsqueeze(-1)
    over = None if cap is None else _over_tiles(cap)
    rows = list(_blocks(hidden.shape[-2], height))
    d_hidden = torch.zeros_like(hidden, dtype=dtype) if wanted[0] else None
    d_weight = torch.empty_like(weight) if wanted[1] else None
    d_bias = torch.empty_like(bias) if wanted[2] and bias is not None else None
    d_cap = hidden.new_zeros(hidden.shape[:-2], dtype=dtype) if wanted[3] else None
    for columns in _blocks(weight.shape[-2], width):
        block = weight[..., columns, :].to(operand)
        some_bias = None if bias is None else bias[..., columns]
        of_block = of_bias = None
        for those in rows:
            states = hidden[..., those, :].to(operand)
            logits = _tile(states, block, some_bias, dtype)
            bend = None
            if over is not None:
                bend = logits.div_(over)
                straight = bend.clone() if d_cap is not None else None
                bend = bend.tanh_()
                logits = bend * over
            slope = logits.sub_(greatest[..., those].unsqueeze(-1)).exp_().mul_(of_exponential[..., those, :])
            if of_spread is not None:
                slope = slope.sub_(of_spread[..., those].unsqueeze(-1) * class_weights[..., None, columns])
            here, place = _place(target[..., those], columns)
            of_label = torch.where(here, -of_surprise[..., those], 0.0).unsqueeze(-1)
            slope = slope.scatter_add_(-1, place.unsqueeze(-1), of_label)
            if bend is not None:
                flat = bend.square().neg_().add_(1.0)
                if d_cap is not None and straight is not None:
                    d_cap = d_cap + (slope * (bend - straight * flat)).sum((-2, -1))
                slope = slope.mul_(flat)
            if d_bias is not None:
                of_bias = slope.sum(-2) if of_bias is None else of_bias + slope.sum(-2)
            if d_hidden is not None or d_weight is not None:
                slope = slope.to(operand)
            if d_hidden is not None:
                d_hidden[..., those, :].add_(_product(slope, block, dtype))
            if d_weight is not None:
                added = _product(slope.mT, states, dtype)
                of_block = added if of_block is None else of_block.add_(added)
        if d_weight is not None and of_block is not None:
            d_weight[..., columns, :].copy_(of_block)
        if d_bias is not None and of_bias is not None:
            d_bias[..., columns].copy_(of_bias)
    if d_hidden is not None:
        d_hidden = d_hidden.to(hidden.dtype)
    if d_cap is not None and isinstance(cap, Tensor):
        d_cap = d_cap.to(cap.dtype)
    return d_hidden, d_weight, d_bias, d_cap


def _second_derivatives(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weights: Tensor,
    cap: Cap,
    of: list[Tensor],
    slopes: tuple[Tensor, ...],
    ctx: Any,
) -> list[Tensor | None]:
    """What `slopes` of the wanted gradients mean for hidden states, classifier, bias, cap and the statistics' slopes.

    Over all classes at once, and so many tokens as keep the tile small.
    """
    wanted, smooths = ctx.wanted, ctx.smooths
    moving = [hidden, weight, bias, cap if isinstance(cap, Tensor) else None]
    present = [i for i, each in enumerate(moving) if each is not None]
    trials = max(1, hidden.shape[:-2].numel())
    size = max(1, ctx.limit // (trials * weight.shape[-2]))
    found: list[Any] = [[] if each is not None else None for each in moving]
    found_of: list[Any] = [[], [], []]
    slope_of = dict(zip([i for i in range(4) if wanted[i]], slopes, strict=True))
    for those in _blocks(hidden.shape[-2], size):
        labels = target[..., those]

        def gradients(inputs: tuple[Tensor, ...], of: tuple[Tensor, ...], labels: Tensor = labels) -> tuple[Any, ...]:
            def three(*inputs: Tensor) -> tuple[Tensor, ...]:
                whole = dict(zip(present, inputs, strict=True))
                at = whole.get(3, cap)
                return outright(whole[0], whole[1], whole.get(2), labels, class_weights, at, smooths)

            back = torch.func.vjp(three, *inputs)[1](of)
            return tuple(back[place] for place, i in enumerate(present) if wanted[i])

        inputs = tuple(hidden[..., those, :] if i == 0 else moving[i] for i in present)
        some = tuple(each[..., those] for each in of)
        given = tuple(slope[..., those, :] if i == 0 else slope for i, slope in slope_of.items())
        of_inputs, of_slopes = torch.func.vjp(gradients, inputs, some)[1](given)
        for i, each in zip(present, of_inputs, strict=True):
            found[i].append(each)
        for gathered, each in zip(found_of, of_slopes, strict=True):
            gathered.append(each)
    summed = [None if each is None else sum(each[1:], each[0]) for each in found[1:]]
    return [torch.cat(found[0], -2), *summed, *(torch.cat(each, -1) for each in found_of)]
