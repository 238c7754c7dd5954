"""Convolutions of a population on a CPU: torch's own kernel, once per trial.

vmap turns the convolutions of many trials into one grouped convolution, which on a CPU is slower than one convolution
after the other; matrix products over unrolled windows are several times slower. Here the loop over trials lies inside
one opaque operation, so mapping, tracing and compiling see a single node. Images are laid out with the channels last:
convolutions are a little faster then, and pools many times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ATEN = torch.ops.aten
Ints = Sequence[int]
# What `aten::convolution` takes after its tensors.
REST = "int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups"


@torch.library.custom_op(
    "fallline::convolution",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, {REST}) -> Tensor",
)
def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """Convolutions [trial, sample, channel, *place] of `x` with `weight` [trial, …] and `bias` [trial, channel].

    What has one row is shared by all trials. The rest is as in `aten::convolution`.
    """
    trials = max(len(x), len(weight))
    out: Tensor | None = None
    for trial in range(trials):
        made = _convolution(x, weight, bias, trial, rest)
        out = _empty(made, (trials, *made.shape)) if out is None else out
        out[trial].copy_(made)
    assert out is not None
    return out


@torch.library.custom_op(
    "fallline::convolution_backward",
    mutates_args=(),
    schema=f"(Tensor gradient, Tensor x, Tensor weight, bool[] wanted, {REST}) -> (Tensor, Tensor, Tensor)",
)
def convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias [trial, channel]; what is not wanted comes back empty.

    What all trials share gets the sum of their gradients.
    """
    outs = _outs(gradient, x, weight, wanted)
    for trial in range(len(gradient)):
        found = _convolution_backward(gradient, x, weight, wanted, trial, rest)
        for out, own in zip(outs, found, strict=True):
            if own is not None and trial and len(out) == 1:
                out[0].add_(own)
            elif own is not None:
                out[trial].copy_(own)
    return outs


@convolution.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    made = _convolution(x, weight, bias, 0, rest)
    return _empty(made, (max(len(x), len(weight)), *made.shape))


@convolution_backward.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outs(gradient, x, weight, wanted)


class Convolution(torch.autograd.Function):
    """`convolution` that can be differentiated and mapped."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        if len(x) == len(weight) == 1:  # one trial needs no loop, and its kernel is open to the compiler
            return _convolution(x, weight, bias, 0, rest).unsqueeze(0)
        out: Tensor = convolution(x, weight, bias, *rest)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, *ctx.rest = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        wanted = tuple(ctx.needs_input_grad[:3])
        for_x, for_weight, for_bias = gradients_of(gradient, x, weight, wanted, *ctx.rest)
        found = (g if need else None for g, need in zip((for_x, for_weight, for_bias), wanted, strict=True))
        return *found, *[None] * len(ctx.rest)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Tensor, int]:
        tensors = (_merged(t, dim, info.batch_size) for t, dim in zip(args[:3], in_dims, strict=False))
        out = convolved(*tensors, *args[3:])
        # What no trial has to itself was computed once.
        return out.expand(info.batch_size, *out.shape[1:]).unflatten(0, (info.batch_size, -1)), 0


class ConvolutionBackward(torch.autograd.Function):
    """`convolution_backward` that can be differentiated and mapped."""

    @staticmethod
    def forward(gradient: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool], *rest: Any) -> Any:
        if len(gradient) == 1:
            found = _convolution_backward(gradient, x, weight, wanted, 0, rest)
            return tuple(x.new_empty(0) if g is None else g.unsqueeze(0) for g in found)
        return convolution_backward(gradient, x, weight, wanted, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        gradient, x, weight, ctx.wanted, *ctx.rest = inputs
        ctx.save_for_backward(gradient, x, weight)

    @staticmethod
    def backward(ctx: Any, along_x: Tensor, along_weight: Tensor, along_bias: Tensor) -> tuple[Any, ...]:
        """The gradients are linear in the incoming one, and each in one other tensor: convolutions again."""
        gradient, x, weight = ctx.saved_tensors
        for_gradient = torch.zeros_like(gradient)
        for_x = for_weight = None
        if ctx.wanted[0]:
            for_gradient = for_gradient + convolved(along_x, weight, None, *ctx.rest)
            only = (False, True, False)
            for_weight = gradients_of(gradient, along_x, weight, only, *ctx.rest)[1]
        if ctx.wanted[1]:
            for_gradient = for_gradient + convolved(x, along_weight, None, *ctx.rest)
            only = (True, False, False)
            for_x = gradients_of(gradient, x, along_weight, only, *ctx.rest)[0]
        if ctx.wanted[2]:
            for_gradient = for_gradient + along_bias[(..., *[None] * (gradient.dim() - 3))].unsqueeze(1)
        return for_gradient, for_x, for_weight, None, *[None] * len(ctx.rest)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        # Here nothing is shared: each element of the mapped dimension has gradients of its own.
        mapped = (
            _merged(t.expand(info.batch_size, *t.shape) if dim is None else t, dim or 0, info.batch_size)
            for t, dim in zip(args[:3], in_dims, strict=False)
        )
        wanted = args[3]
        outs = gradients_of(*mapped, *args[3:])
        split = (o.unflatten(0, (info.batch_size, -1)) if need else o for o, need in zip(outs, wanted, strict=True))
        return tuple(split), tuple(0 if need else None for need in wanted)


# autograd's functions have no types.
convolved: Callable[..., Tensor] = Convolution.apply
gradients_of: Callable[..., tuple[Tensor, Tensor, Tensor]] = ConvolutionBackward.apply


def _merged(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The mapped dimension and the dimension of trials as one; what has neither is shared."""
    if tensor is None or (dim is None and len(tensor) == 1):
        return tensor
    mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.flatten(0, 1)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, trial: int, rest: Sequence[Any]) -> Tensor:
    own_bias = None if bias is None else _row(bias, trial)
    made: Tensor = ATEN.convolution(_own(x, trial), _row(weight, trial), own_bias, *rest)
    return made


def _convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool], trial: int, rest: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    channels = [gradient.shape[2]]
    own = gradient[trial], _own(x, trial), _row(weight, trial)
    found: tuple[Tensor | None, ...] = ATEN.convolution_backward(*own, channels, *rest, wanted)
    return found


def _row(tensor: Tensor, trial: int) -> Tensor:
    return tensor[0 if len(tensor) == 1 else trial]


def _outs(gradient: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _empty(x, x.shape) if wanted[0] else x.new_empty(0),
        weight.new_empty(weight.shape) if wanted[1] else x.new_empty(0),
        weight.new_empty((len(gradient), gradient.shape[2])) if wanted[2] else x.new_empty(0),
    )


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """[trial, sample, channel, *place], laid out as kernels like it best: with channels last but for one place."""
    trials, samples, channels, *places = shape
    if len(places) == 1:
        return like.new_empty(shape)
    return like.new_empty((trials, samples, *places, channels)).movedim(-1, 2)


def _own(x: Tensor, trial: int) -> Tensor:
    """A trial's samples. A single channel lies last as well as first: kernels are told that it lies last."""
    own = _row(x, trial)
    if own.shape[1] == 1:
        own = own.as_strided(own.shape, (own.stride(0), 1, *own.stride()[2:]))
    return own


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Ints = 1,
    padding: int | Ints | str = 0,
    dilation: int | Ints = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.conv1d`, `conv2d` or `conv3d`, by the dimensions of `weight`; inside vmap, of all trials.

    >>> x, weight = torch.randn(8, 3, 9, 9), torch.randn(5, 4, 3, 3, 3)
    >>> torch.vmap(convolve, in_dims=(None, 0))(x, weight).shape
    torch.Size([5, 8, 4, 7, 7])
    """
    places = weight.dim() - 2
    dilations = _each(dilation, places)
    if isinstance(padding, str):
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, weight.shape[2:], strict=True)]
        # What an odd total has too much lies behind, as in torch.
        x = functional.pad(x, [side for total in reversed(totals) for side in (0, total % 2)]) if any(totals) else x
        padding = [total // 2 for total in totals]
    paddings = _each(padding, places)
    return _over_trials(x, weight, bias, _each(stride, places), paddings, dilations, False, [0] * places, groups)


def convolve_transposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Ints = 1,
    padding: int | Ints = 0,
    output_padding: int | Ints = 0,
    groups: int = 1,
    dilation: int | Ints = 1,
) -> Tensor:
    """`torch.conv_transpose1d`, `2d` or `3d`, by the dimensions of `weight`; inside vmap, of all trials.

    >>> convolve_transposed(torch.randn(8, 3, 9), torch.randn(3, 2, 4), stride=2).shape
    torch.Size([8, 2, 20])
    """
    places = weight.dim() - 2
    sizes = [_each(each, places) for each in (stride, padding, dilation, output_padding)]
    return _over_trials(x, weight, bias, *sizes[:3], True, sizes[3], groups)


def _over_trials(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    batch = x.unsqueeze(0) if x.dim() < weight.dim() else x
    own_bias = None if bias is None else bias.unsqueeze(0)
    out = convolved(batch.unsqueeze(0), weight.unsqueeze(0), own_bias, *rest)
    return out.squeeze(0) if x.dim() == weight.dim() else out.squeeze(0).squeeze(0)


def _each(size: int | Ints, places: int) -> list[int]:
    """One size for every place.

    >>> _each(2, 3), _each([2], 2), _each((1, 2), 2)
    ([2, 2, 2], [2, 2], [1, 2])
    """
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes * places if len(sizes) == 1 else sizes
