"""Random numbers as data: what a model draws while it trains, drawn outside of it and handed in.

In a plain loop dropout continues the generator that `torch.manual_seed(seed); task.model()` left. A population cannot:
its trials run in one mapped call. So one plain call is recorded (`record`), which tells what a step draws and in which
order; `Streams` makes the same draws for every seed, bit for bit; and `Replaying` hands them to the mapped call.
Trials that share a seed share their draws, as they share their batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fallline.errors import Unsupported
from fallline.sweeps.interception import Interceptor

DROPOUT = "dropout"
PERMUTATION = "randperm_"


@dataclass(frozen=True)
class Draw:
    """One tensor of random numbers, as a model draws it.

    Attributes:
        kind: the method of a tensor that fills it (`normal_`, `bernoulli_` …), "dropout" for a mask that is already
            scaled, or "randperm_".
        arguments: what the method takes.
        stride: the order in memory, in which numbers are drawn.

    >>> noise = Draw.like(torch.empty(2, 3), "dropout", 0.5).sample(torch.Generator().manual_seed(0))
    >>> _ = torch.manual_seed(0)
    >>> torch.equal(noise, torch.dropout(torch.ones(2, 3), 0.5, train=True))
    True
    """

    kind: str
    arguments: tuple[float, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def like(cls, template: Tensor, kind: str, *arguments: float) -> Draw:
        """The draw that fills a tensor of this shape, type and order in memory."""
        shape, stride = tuple(template.shape), tuple(template.stride())
        return cls(kind, arguments, shape, stride, template.dtype, template.device)

    def empty(self, count: int | None = None) -> Tensor:
        """A tensor to draw into; with a count, so many of them in one: [count, *shape]."""
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        if count is None:
            return torch.empty_strided(self.shape, self.stride, **options)
        return torch.empty_strided((count, *self.shape), (math.prod(self.shape), *self.stride), **options)

    def sample(self, generator: torch.Generator, out: Tensor | None = None) -> Tensor:
        """What the model would have drawn from this generator, which moves on."""
        out = self.empty() if out is None else out
        if self.kind == PERMUTATION:
            return out.copy_(torch.randperm(len(out), generator=generator, dtype=self.dtype, device=self.device))
        if self.kind != DROPOUT:
            filled: Tensor = getattr(out, self.kind)(*self.arguments, generator=generator)
            return filled
        (p,) = self.arguments
        if self.device.type == "cpu":
            return out.bernoulli_(1 - p, generator=generator).div_(1 - p)
        # The fused kernel of a GPU draws in its own order, from the default generator only.
        with torch.random.fork_rng([self.device]):
            torch.cuda.set_rng_state(generator.get_state(), self.device)
            out.copy_(torch.dropout(torch.ones_like(out), p, train=True))
            generator.set_state(torch.cuda.get_rng_state(self.device))
        return out

    def fits(self, other: Draw) -> bool:
        """Whether the other asks for these numbers; a mapped call may lay its tensors out in another order."""
        return (self.kind, self.arguments, self.shape, self.dtype) == (
            other.kind,
            other.arguments,
            other.shape,
            other.dtype,
        )

    def __str__(self) -> str:
        numbers = ", ".join(map(str, self.arguments))
        return f"{self.kind}({numbers}) of shape {list(self.shape)}"


class Streams:
    """The random numbers of every seed, step by step.

    Args:
        states: by seed, the state of the generator that `torch.manual_seed(seed); task.model()` left: of the CPU's
            generator, or on a GPU of that device's.

    >>> streams = Streams({3: torch.Generator().manual_seed(3).get_state()}, torch.device("cpu"))
    >>> [value.shape for value in streams.next([Draw.like(torch.empty(2, 5), "dropout", 0.1)])]
    [torch.Size([1, 2, 5])]
    """

    def __init__(self, states: Mapping[int, Tensor], device: torch.device) -> None:
        self.device = device
        self.generators = {seed: _generator(state, device) for seed, state in states.items()}

    def next(self, draws: Sequence[Draw]) -> list[Tensor]:
        """The draws of one step, each [seed, *shape] in the order of the seeds; every generator moves on."""
        values = [draw.empty(len(self.generators)) for draw in draws]
        for row, generator in enumerate(self.generators.values() if draws else ()):
            for draw, value in zip(draws, values, strict=True):
                draw.sample(generator, value[row])
        return values

    def keep(self, seeds: Iterable[int]) -> None:
        """Only these seeds go on, in this order."""
        self.generators = {seed: self.generators[seed] for seed in seeds}

    def tensors(self) -> dict[str, Tensor]:
        """The states of the generators by seed, from which `restore` goes on."""
        return {str(seed): generator.get_state() for seed, generator in self.generators.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes back to where `tensors()` were taken."""
        self.generators = {int(seed): _generator(state, self.device) for seed, state in tensors.items()}


def record(run: Callable[[], object], device: torch.device) -> tuple[Draw, ...]:
    """What `run()` draws from the default generators, in order; they are left as they were.

    Raises:
        Unsupported: for random numbers that cannot be handed in as data; the message names who draws them.

    >>> record(lambda: torch.nn.Dropout(0.5)(torch.ones(4)), torch.device("cpu"))[0].kind
    'dropout'
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        recording = Recording(device)
        with recording:
            run()
        recording.require_nothing_else("the model")
    return tuple(recording.draws)


class Recording(Interceptor):
    """Notes every draw of a plain call, and proves each by repeating it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.draws: list[Draw] = []
        self._states = self._now()

    def intercept(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        name = getattr(function, "__name__", str(function))
        before = self._states
        self.require_nothing_else("the model")
        draws = [] if kwargs.get("generator") is not None else _draws_of(function, args, kwargs)
        result = function(*args, **kwargs)
        if draws:
            generator = _generator(before[-1], self.device)
            for draw in draws:
                if draw.device.type != self.device.type:
                    raise Unsupported(f"{name}() draws on {draw.device}, the model is on {self.device}: draw there.")
                draw.sample(generator)
            self._states = [*before[:-1], generator.get_state()]
        if kwargs.get("generator") is not None:
            raise Unsupported(f"{name}() draws from a generator of its own: leave out generator=.")
        self.require_nothing_else(f"{name}()")
        self.draws += draws
        return result

    def require_nothing_else(self, who: str) -> None:
        """Refuses what moved a generator and is not among the draws."""
        if not all(map(torch.equal, self._now(), self._states)):
            raise Unsupported(
                f"{who} draws random numbers that cannot be handed in as data; use dropout or randn_like."
            )

    def _now(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else states


class Replaying(Interceptor):
    """Hands the values of recorded draws to a call, in order, in place of drawing.

    Each value has the shape of its draw; inside vmap it is the row of one trial. After the call `finish` makes sure
    that nothing is left over.

    >>> draw = Draw.like(torch.empty(3), "normal_", 0, 1)
    >>> with Replaying([draw], [torch.arange(3.0)]) as replaying:
    ...     print(torch.randn_like(torch.ones(3)))
    tensor([0., 1., 2.])
    >>> replaying.finish()
    """

    def __init__(self, draws: Sequence[Draw], values: Sequence[Tensor]) -> None:
        super().__init__()
        self._left = list(zip(draws, values, strict=True))[::-1]

    def intercept(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        asked = _draws_of(function, args, kwargs)
        if not asked:
            return function(*args, **kwargs)
        values = [self._take(draw) for draw in asked]
        return RULES[function][1](values, *args, **kwargs)

    def finish(self) -> None:
        """Raises Unsupported if a draw was not asked for."""
        if self._left:
            raise Unsupported(f"the mapped call does not draw {self._left[-1][0]}, which the plain call drew.")

    def _take(self, asked: Draw) -> Tensor:
        if not self._left:
            raise Unsupported(f"the mapped call draws {asked}, which the plain call did not.")
        draw, value = self._left.pop()
        if not draw.fits(asked):
            raise Unsupported(f"the mapped call draws {asked} where the plain call drew {draw}.")
        return value


def _generator(state: Tensor, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(state.cpu())
    return generator


def _draws_of(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Draw]:
    rule = RULES.get(function)
    return rule[0](*args, **kwargs) if rule else []


# Dropout, in the arithmetic of ATen/native/Dropout.cpp. Without a probability, in evaluation and for p = 1 it draws
# nothing.


def _drops(x: Tensor, p: float, train: bool) -> bool:
    return bool(train and 0 < p < 1 and x.numel())


def _dropout(input: Tensor, p: float = 0.5, train: bool = True) -> list[Draw]:  # noqa: A002
    return [Draw.like(torch.empty_like(input), DROPOUT, p)] if _drops(input, p, train) else []


def _mask(input: Tensor, p: float = 0.5, train: bool = True) -> list[Draw]:  # noqa: A002
    return [Draw.like(torch.empty_like(input), "bernoulli_", 1 - p)] if _drops(input, p, train) else []


def _channel_mask(input: Tensor, p: float = 0.5, train: bool = True) -> list[Draw]:  # noqa: A002
    channels = input.new_empty((*input.shape[:2], *[1] * (input.dim() - 2)))
    return [Draw.like(channels, "bernoulli_", 1 - p)] if _drops(input, p, train) else []


def _times_noise(values: Sequence[Tensor], input: Tensor, *_: Any, **__: Any) -> Tensor:  # noqa: A002
    return input * values[0]


def _times_mask(values: Sequence[Tensor], input: Tensor, p: float = 0.5, train: bool = True) -> Tensor:  # noqa: A002
    return input * values[0].div(1 - p)


def _alpha_dropped(values: Sequence[Tensor], input: Tensor, p: float = 0.5, train: bool = True) -> Tensor:  # noqa: A002
    alpha = 1.7580993408473766  # of SELU, times its scale: what a dropped activation becomes
    a = 1 / math.sqrt((alpha**2 * p + 1) * (1 - p))
    shift = values[0].add(-1).mul(alpha * a).add(alpha * a * p)
    return (input * values[0].mul(a)).add(shift)


def _in_place(change: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def changed(values: Sequence[Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002
        return input.copy_(change(values, input, *args, **kwargs))

    return changed


# Attention and recurrence drop inside one function; the mapped call gets compositions, whose dropout is seen.


def _dropout_of_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *_: Any,
    enable_gqa: bool = False,
    **__: Any,
) -> list[Draw]:
    before = query.shape[:-2]
    leading = before if enable_gqa else torch.broadcast_shapes(before, key.shape[:-2])
    weights = query.new_empty((*leading, query.shape[-2], key.shape[-2]))
    return [Draw.like(weights, DROPOUT, dropout_p)] if _drops(weights, dropout_p, True) else []


def _dropout_between_layers(
    input: Tensor,  # noqa: A002
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    *options: Any,
) -> list[Draw]:
    biased, layers, p, train, bidirectional, batch_first = options
    if not isinstance(biased, bool):  # a packed sequence: (data, batch sizes, states, parameters, …)
        return []
    state = hx if isinstance(hx, Tensor) else hx[0]
    steps, samples = input.shape[:2] if not batch_first else (input.shape[1], input.shape[0])
    between = input.new_empty((steps, samples, state.shape[-1] * (1 + bidirectional)))
    return [Draw.like(between, DROPOUT, p)] * (layers - 1) if _drops(between, p, train) else []


def _taken_apart(values: Sequence[Tensor], *_: Any, **__: Any) -> Tensor:
    raise Unsupported("attention and recurrence with dropout need `Batched` around the call.")


# Tensors of random numbers, which torch fills by the method of the same distribution.


def _made(kind: str, *arguments: float) -> Callable[..., list[Draw]]:
    """Of a factory that takes a shape."""

    def draws(*args: Any, **kwargs: Any) -> list[Draw]:
        return [Draw.like(torch.empty(*args, **kwargs), kind, *arguments)]

    return draws


def _made_like(kind: str, *arguments: float) -> Callable[..., list[Draw]]:
    def draws(input: Tensor, **kwargs: Any) -> list[Draw]:  # noqa: A002
        return [Draw.like(torch.empty_like(input, **kwargs), kind, *arguments)]

    return draws


def _integers(*args: Any, **kwargs: Any) -> list[Draw]:
    low, high, template = _bounds(torch.empty, *args, **{"dtype": torch.int64, **kwargs})
    return [Draw.like(template, "random_", low, high)]


def _integers_like(input: Tensor, *args: Any, **kwargs: Any) -> list[Draw]:  # noqa: A002
    low, high = (0, *args)[-2:] if "high" not in kwargs else (kwargs.pop("low", 0), kwargs.pop("high"))
    return [Draw.like(torch.empty_like(input, **kwargs), "random_", low, high)]


def _bounds(make: Callable[..., Tensor], *args: Any, low: int = 0, **kwargs: Any) -> tuple[int, int, Tensor]:
    """randint(high, size), randint(low, high, size), each also by name."""
    given = list(args)
    size = kwargs.pop("size") if "size" in kwargs else given.pop()
    high = kwargs.pop("high") if "high" in kwargs else given.pop()
    return (given.pop() if given else low), high, make(size, **kwargs)


def _permutation(n: int, dtype: torch.dtype = torch.int64, **kwargs: Any) -> list[Draw]:
    return [Draw.like(torch.empty(n, dtype=dtype, **kwargs), PERMUTATION)]


def _normal(
    mean: Tensor | float, std: Tensor | float = 1.0, size: Sequence[int] | None = None, **kwargs: Any
) -> list[Draw]:
    if size is not None:
        return [Draw.like(torch.empty(size, **kwargs), "normal_", float(mean), float(std))]
    tensors = [t for t in (mean, std) if isinstance(t, Tensor)]
    template = torch.empty_like(tensors[0]) if len(tensors) == 1 else torch.empty_like(tensors[0] + tensors[1])
    return [Draw.like(template, "normal_", 0.0, 1.0 if isinstance(std, Tensor) else std)]


def _normal_of(
    values: Sequence[Tensor],
    mean: Tensor | float,
    std: Tensor | float = 1.0,
    size: Sequence[int] | None = None,
    **_: Any,
) -> Tensor:
    if size is not None:
        return values[0]
    # torch lets no gradient through to the mean and the standard deviation; randn_like does.
    mean, std = (each.detach() if isinstance(each, Tensor) else each for each in (mean, std))
    return values[0] * std + mean if isinstance(std, Tensor) else values[0] + mean


def _coins(input: Tensor, p: float | None = None, **_: Any) -> list[Draw]:  # noqa: A002
    if p is None:  # a probability for every element
        return [Draw.like(torch.empty_like(input), "uniform_", 0, 1)]
    return [Draw.like(torch.empty_like(input), "bernoulli_", p)]


def _tossed(values: Sequence[Tensor], input: Tensor, p: float | None = None, **_: Any) -> Tensor:  # noqa: A002
    return (values[0] < input).to(input.dtype) if p is None else values[0]


def _filled(kind: str, *defaults: float) -> Callable[..., list[Draw]]:
    """Of a method that fills a tensor."""
    names = {"uniform_": ("from", "to"), "normal_": ("mean", "std"), "bernoulli_": ("p",), "exponential_": ("lambd",)}

    def draws(input: Tensor, *args: Any, **kwargs: Any) -> list[Draw]:  # noqa: A002
        given = [
            *args,
            *(kwargs.get(name, value) for name, value in [*zip(names[kind], defaults, strict=True)][len(args) :]),
        ]
        return [Draw.like(input, kind, *given)] if not any(isinstance(each, Tensor) for each in given) else []

    return draws


def _as_drawn(values: Sequence[Tensor], *_: Any, **kwargs: Any) -> Tensor:
    return values[0].requires_grad_() if kwargs.get("requires_grad") else values[0]


def _into(values: Sequence[Tensor], input: Tensor, *_: Any, **__: Any) -> Tensor:  # noqa: A002
    try:
        return input.copy_(values[0])
    except RuntimeError as error:
        if not input.is_floating_point():
            raise Unsupported("an integer tensor that all trials share is filled with random numbers.") from error
        # The tensor was made without a trial dimension: torch.empty(shape).normal_(). What is returned has one; the
        # tensor itself cannot have it, and whoever reads it shall notice.
        input.fill_(math.nan)
        return values[0]


# By function: what it draws, and what it returns when the values are given.
RULES: dict[Callable[..., Any], tuple[Callable[..., list[Draw]], Callable[..., Tensor]]] = {
    torch.dropout: (_dropout, _times_noise),
    torch.dropout_: (_dropout, _in_place(_times_noise)),
    torch.feature_dropout: (_channel_mask, _times_mask),
    torch.feature_dropout_: (_channel_mask, _in_place(_times_mask)),
    torch.alpha_dropout: (_mask, _alpha_dropped),
    torch.alpha_dropout_: (_mask, _in_place(_alpha_dropped)),
    torch.feature_alpha_dropout: (_channel_mask, _alpha_dropped),
    torch.feature_alpha_dropout_: (_channel_mask, _in_place(_alpha_dropped)),
    torch._C._nn.scaled_dot_product_attention: (_dropout_of_attention, _taken_apart),
    torch.lstm: (_dropout_between_layers, _taken_apart),
    torch.gru: (_dropout_between_layers, _taken_apart),
    torch.rnn_tanh: (_dropout_between_layers, _taken_apart),
    torch.rnn_relu: (_dropout_between_layers, _taken_apart),
    torch.rand: (_made("uniform_", 0, 1), _as_drawn),
    torch.randn: (_made("normal_", 0, 1), _as_drawn),
    torch.rand_like: (_made_like("uniform_", 0, 1), _as_drawn),
    torch.randn_like: (_made_like("normal_", 0, 1), _as_drawn),
    torch.randint: (_integers, _as_drawn),
    torch.randint_like: (_integers_like, _as_drawn),
    torch.randperm: (_permutation, _as_drawn),
    torch.normal: (_normal, _normal_of),
    torch.bernoulli: (_coins, _tossed),
    Tensor.bernoulli: (_coins, _tossed),
    Tensor.bernoulli_: (_filled("bernoulli_", 0.5), _into),
    Tensor.normal_: (_filled("normal_", 0, 1), _into),
    Tensor.uniform_: (_filled("uniform_", 0, 1), _into),
    Tensor.exponential_: (_filled("exponential_", 1), _into),
}
