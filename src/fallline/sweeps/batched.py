"""Functions that vmap cannot map, or maps one row at a time, replaced by ones that it maps well.

`Batched` is active around the mapped call of a model. The convolutions are in `batched_convolution`, the recurrent
layers in `batched_recurrence`; attention and the rest are here. Pools, normalisation, embeddings and interpolation are
left to vmap, which has fast rules for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fallline.errors import Unsupported
from fallline.sweeps import batched_convolution, batched_recurrence
from fallline.sweeps.interception import Interceptor

# torch's kernels for the convolutions of a whole population are good on GPUs.
CONVOLUTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.conv1d: batched_convolution.convolve,
    torch.conv2d: batched_convolution.convolve,
    torch.conv3d: batched_convolution.convolve,
    torch.conv_transpose1d: batched_convolution.convolve_transposed,
    torch.conv_transpose2d: batched_convolution.convolve_transposed,
    torch.conv_transpose3d: batched_convolution.convolve_transposed,
}


class Batched(Interceptor):
    """Replaces, while a model is called, what vmap maps badly.

    A mode that hands out random numbers goes around it: `with Replaying(draws, values), Batched(): …`.

    >>> lstm = torch.nn.LSTM(3, 4)
    >>> params = {name: torch.stack([p.detach()] * 5) for name, p in lstm.named_parameters()}
    >>> def outputs(params, x):
    ...     with Batched():
    ...         return torch.func.functional_call(lstm, params, (x,))[0]
    >>> torch.vmap(outputs, in_dims=(0, None))(params, torch.randn(7, 2, 3)).shape
    torch.Size([5, 7, 2, 4])
    """

    whole = frozenset({functional.embedding_bag})

    def intercept(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        replacement = REPLACEMENTS.get(function)
        if function in CONVOLUTIONS:
            named = {"x" if name == "input" else name: value for name, value in kwargs.items()}
            x = named.get("x", args[0] if args else None)
            if isinstance(x, Tensor) and x.device.type == "cpu":
                return CONVOLUTIONS[function](*args, **named)
        return replacement(*args, **kwargs) if replacement else function(*args, **kwargs)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention`: softmax(query · keyᵀ · scale + mask) · value.

    A query that may see nothing gets zeros, as in torch.

    >>> attention(torch.ones(1, 2, 4), torch.ones(1, 3, 4), torch.ones(1, 3, 5)).shape
    torch.Size([1, 2, 5])
    """
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], dim=-3) for each in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    # Both factors are scaled, as in torch: their product stays small in half precision.
    scores = (query * math.sqrt(scale)) @ (key * math.sqrt(scale)).mT
    blind = None
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    elif attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if masked else scores + attn_mask
        blind = (scores == -math.inf).all(dim=-1, keepdim=True)
        scores = scores.masked_fill(blind, 0)
    weights = scores.softmax(dim=-1)
    weights = weights if blind is None else weights.masked_fill(blind, 0)
    return torch.dropout(weights, dropout_p, True) @ value


def _embedding_bag(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    if input.dim() != 2 or padding_idx is not None:
        raise Unsupported("embedding_bag() has a batched form for bags [N, L] of one length without padding_idx only.")
    vectors = functional.embedding(input, weight, None, max_norm, norm_type, scale_grad_by_freq)
    if per_sample_weights is not None:
        vectors = vectors * per_sample_weights.unsqueeze(-1)
    if mode == "max":
        return vectors.max(dim=1).values
    return vectors.sum(dim=1) if mode == "sum" else vectors.mean(dim=1)


def _bilinear(left: Tensor, right: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = torch.einsum("...i,oij,...j->...o", left, weight, right)
    return product if bias is None else product + bias


def _leaky(
    input: Tensor,  # noqa: A002
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    if training:
        raise Unsupported("rrelu() draws as many random numbers as there are negative inputs: take leaky_relu.")
    return functional.leaky_relu(input, (lower + upper) / 2)


def _renormed(*_: Any) -> Tensor:
    raise Unsupported("an embedding with max_norm changes its weights in the forward pass: leave out max_norm.")


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._C._nn.scaled_dot_product_attention: attention,
    torch.lstm: batched_recurrence.lstm,
    torch.gru: batched_recurrence.gru,
    torch.rnn_tanh: batched_recurrence.rnn_tanh,
    torch.rnn_relu: batched_recurrence.rnn_relu,
    torch.lstm_cell: batched_recurrence.lstm_cell,
    torch.gru_cell: batched_recurrence.gru_cell,
    torch.rnn_tanh_cell: batched_recurrence.rnn_tanh_cell,
    torch.rnn_relu_cell: batched_recurrence.rnn_relu_cell,
    functional.embedding_bag: _embedding_bag,
    torch.bilinear: _bilinear,
    torch.rrelu: _leaky,
    torch.embedding_renorm_: _renormed,
}
