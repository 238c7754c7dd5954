"""Random numbers as pure functions: of a seed, the step, and the place of an element in its tensor.

There is no generator whose state goes on from call to call, so numbers do not depend on what else is computed, in which
order, or in which engine; a run that is resumed at step 1000 draws what it would have drawn. Rules get the seed, made
of the run's seed and the parameter's name, in the slot "seed".

A number is the MurmurHash3 (32 bits) of what it depends on, in int64 arithmetic that never overflows: compilers may
assume that it does not, and then make loops without end of hashes that wrap around.

Source: Appleby, "MurmurHash3", 2011 (x86_32); Box and Muller, "A Note on the Generation of Random Normal Deviates",
1958.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# What numbers are for. Numbers of two streams have nothing to do with each other, whatever the seed and the step.
GRADIENT_NOISE = 0
CURVATURE = 1

WORD = (1 << 32) - 1
# MurmurHash3's factors. Those of 2^31 and more stand for what is equal to them modulo 2^32, so that a product with a
# word is below 2^63.
BLOCK_FACTORS = (0xCC9E2D51 - (1 << 32), 0x1B873593)
FINAL_FACTORS = (0x85EBCA6B - (1 << 32), 0xC2B2AE35 - (1 << 32))


def normal(like: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """Standard normal numbers in the shape and dtype of `like`.

    Args:
        like: gives shape, dtype and device; its values are not looked at.
        seed: int64, 0-dimensional.
        step: the number of the update, 0-dimensional.
        stream: one of the streams above.

    >>> like, seed = torch.zeros(2), torch.tensor(7)
    >>> first, second = (normal(like, seed, torch.tensor(float(step)), GRADIENT_NOISE) for step in (1, 2))
    >>> torch.equal(first, normal(like, seed, torch.tensor(1.0), GRADIENT_NOISE)), torch.equal(first, second)
    (True, False)
    """
    # Box-Muller; the radius is never that of 0.
    radius = (-2 * torch.log((word(like, seed, step, stream, 0).double() + 0.5) * 2.0**-32)).sqrt()
    angle = word(like, seed, step, stream, 1).double() * (2 * math.pi * 2.0**-32)
    return (radius * torch.cos(angle)).to(like.dtype)


def rademacher(like: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """−1 or 1, each as likely as the other, in the shape and dtype of `like`; the arguments are those of `normal`.

    >>> sorted(set(rademacher(torch.zeros(100), torch.tensor(7), torch.tensor(1.0), CURVATURE).tolist()))
    [-1.0, 1.0]
    """
    return (1 - 2 * (word(like, seed, step, stream, 0) >> 31)).to(like.dtype)


def word(like: Tensor, seed: Tensor, step: Tensor, stream: int, number: int) -> Tensor:
    """32 random bits for each element of `like`, as int64: the hash of six words.

    Args:
        like, seed, step, stream: as for `normal`.
        number: which of an element's words.
    """
    element = torch.arange(like.numel(), device=like.device).reshape(like.shape)
    count = step.to(torch.int64)
    words = (seed, seed >> 32, torch.full_like(seed, stream), count, torch.full_like(seed, number), element)
    state = torch.zeros_like(seed)
    for each in words:
        state = _absorbed(state, each & WORD)
    state = state ^ (4 * len(words))
    first, second = FINAL_FACTORS
    state = ((state ^ (state >> 16)) * first) & WORD
    state = ((state ^ (state >> 13)) * second) & WORD
    return state ^ (state >> 16)


def _absorbed(state: Tensor, block: Tensor) -> Tensor:
    first, second = BLOCK_FACTORS
    mixed = (_rotated((block * first) & WORD, 15) * second) & WORD
    return (_rotated(state ^ mixed, 13) * 5 + 0xE6546B64) & WORD


def _rotated(value: Tensor, places: int) -> Tensor:
    return ((value << places) & WORD) | (value >> (32 - places))
