"""A built-in task on text: a small transformer that predicts the next character."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fallline.losses import cross_entropy
from fallline.tasks.task import Task

CONTEXT = 64
STRIDE = 16
VALIDATION_FRACTION = 0.1


def char_lm(dtype: torch.dtype = torch.float32) -> Task:
    """The next character of English text; a causal transformer of two layers, cross-entropy, batches of 32.

    x [N, 64] character numbers (int64), y [N, 64] the same moved on by one; predictions [N, V, 64] for the V
    different characters. Training windows start at each 16th character of the text's first nine tenths;
    validation windows follow one another in the last tenth, so that no character to predict is in both.
    """
    text = _text()
    characters = sorted(set(text))
    number = {character: index for index, character in enumerate(characters)}
    codes = torch.tensor([number[character] for character in text])
    border = len(codes) - round(VALIDATION_FRACTION * len(codes))
    return Task(
        "char_lm",
        partial(_transformer, len(characters), dtype),
        _windows(codes[:border], STRIDE),
        cross_entropy(),
        validation=_windows(codes[border:], CONTEXT),
        batch_size=32,
        source=(
            "The descriptions (DESCR) of six data sets that ship with scikit-learn: iris, wine, breast "
            "cancer, digits, diabetes and linnerud; about 15,000 characters."
        ),
    )


def _text() -> str:
    from sklearn import datasets

    loaders = (
        datasets.load_iris,
        datasets.load_wine,
        datasets.load_breast_cancer,
        datasets.load_digits,
        datasets.load_diabetes,
        datasets.load_linnerud,
    )
    return "\n".join(loader().DESCR for loader in loaders)


def _windows(codes: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    windows = codes.unfold(0, CONTEXT + 1, stride)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _transformer(characters: int, dtype: torch.dtype) -> nn.Module:
    return CharacterTransformer(characters).to(dtype)


class CharacterTransformer(nn.Module):
    """Character numbers [N, T] -> logits [N, V, T], T ≤ `context`, each from the characters up to its own.

    Normalisation before each part and no dropout, as in GPT-2. Attention is spelt out, so that it runs under
    vmap.
    """

    def __init__(
        self, characters: int, width: int = 32, heads: int = 2, layers: int = 2, context: int = CONTEXT
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.ModuleList(Block(width, heads, context) for _ in range(layers))
        self.normalisation = nn.LayerNorm(width)
        self.readout = nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embedding(x) + self.position[: x.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.readout(self.normalisation(hidden))
        return logits.transpose(1, 2)


class Block(nn.Module):
    """Causal self-attention, then a network of one hidden layer, each added to its input: [N, T, D] -> [N, T,
    D]."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.before_network = nn.LayerNorm(width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        future = torch.ones(context, context, dtype=torch.bool).triu(1)
        self.register_buffer("future", future, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attended(self.before_attention(x))
        out: Tensor = x + self.network(self.before_network(x))
        return out

    def _attended(self, x: Tensor) -> Tensor:
        samples, length, width = x.shape
        split = self.queries_keys_values(x).reshape(samples, length, 3, self.heads, width // self.heads)
        queries, keys, values = split.permute(2, 0, 3, 1, 4).unbind(0)
        scores = queries @ keys.transpose(-1, -2) / (width // self.heads) ** 0.5
        future: Tensor = self.get_buffer("future")[:length, :length]
        attention = scores.masked_fill(future, float("-inf")).softmax(-1)
        mixed: Tensor = self.mix((attention @ values).transpose(1, 2).reshape(samples, length, width))
        return mixed
