"""How the parts of a population's step are run: as functions, as traced programs, or compiled.

All three compute the same numbers. A part is known by its key: whatever has the same key takes tensors of the same
shapes and computes the same function of them, so that a program that was made for one pack serves the next, and what
was made before workers are forked serves them all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from fallline.sweeps.traced import trace

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Part:
    """A part of the step: a function of a list of tensors, some of which it writes to.

    Attributes:
        key: what it computes, and for which shapes.
        function: takes the tensors one by one; returns a list of tensors.
        name: what it is, for people.
        rare: whether few steps need it.
    """

    key: Hashable
    function: Callable[..., list[Tensor]]
    name: str
    rare: bool = False

    def run(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The function as it is."""
        return self.function(*tensors)


@dataclass(frozen=True)
class Program:
    """A part as it is run.

    Attributes:
        part: what it computes.
        run: takes the part's tensors as a list.
        graph: the traced program; None for a part that cannot be traced.
        compiled: whether `run` is machine code.
    """

    part: Part
    run: Run
    graph: fx.GraphModule | None = None
    compiled: bool = False


class Programs:
    """The programs that were made so far, by key; a part that cannot be traced stays a function.

    Attributes:
        by_key: the programs.
        examples: the tensors that it was made with, of each that may be compiled.
    """

    def __init__(self) -> None:
        self.by_key: dict[Hashable, Program] = {}
        self.examples: dict[Hashable, list[Tensor]] = {}

    def __iter__(self) -> Iterator[Program]:
        return iter(self.by_key.values())

    def __len__(self) -> int:
        return len(self.by_key)

    def of(self, part: Part, tensors: Sequence[Tensor]) -> Run:
        """What runs this part on tensors like these."""
        found = self.by_key.get(part.key)
        if found is None:
            found = self.by_key[part.key] = _made(part, tensors)
            self.examples[part.key] = list(tensors)
        return found.run

    @property
    def all_traced(self) -> bool:
        """Whether there are some, and each of them was traced."""
        return bool(self.by_key) and all(program.graph is not None for program in self)

    def worth_compiling(self) -> Iterator[tuple[Hashable, fx.GraphModule, list[Tensor]]]:
        """The key, the graph and example tensors of each program that most steps need."""
        for key, program in self.by_key.items():
            if program.graph is not None and not program.part.rare and key in self.examples:
                yield key, program.graph, self.examples[key]

    def use(self, key: Hashable, compiled: Run) -> bool:
        """Puts a compiled program in the place of the traced one, if the two agree on the example."""
        traced = self.by_key[key]
        if not agree(compiled, traced.run, self.examples[key]):
            return False
        self.by_key[key] = replace(traced, run=compiled, compiled=True)
        return True

    def name(self, key: Hashable) -> str:
        """What the program of that key is, for people."""
        return self.by_key[key].part.name


def _made(part: Part, tensors: Sequence[Tensor]) -> Program:
    with contextlib.suppress(Exception), torch.no_grad():  # whatever keeps a model from being traced, it can be run
        graph = trace(part.function, *tensors)
        forward = graph.forward
        program = Program(part, lambda values: forward(*values), graph)
        if agree(program.run, part.run, tensors):
            return program
    return Program(part, part.run)


def agree(program: Run, reference: Run, tensors: Sequence[Tensor]) -> bool:
    """Whether two ways of running a part return the same, and change what they are given alike; nothing is changed."""
    with torch.no_grad():
        ours, theirs = ([copy_of(tensor) for tensor in tensors] for _ in range(2))
        returned, expected = program(ours), reference(theirs)
        # Losses are recorded in float64, whatever they are computed in.
        coarsest = max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=1e-15)
        if not all(_alike(a, b, relative=coarsest**0.5) for a, b in zip(returned, expected, strict=True)):
            return False
        # Of a tensor that is written to, what was added: a small step is not to hide behind a large number.
        return all(
            _alike(mine.double() - before.double(), other.double() - before.double(), round_off=before)
            if before.is_floating_point()
            else torch.equal(mine, other)
            for before, mine, other in zip(tensors, ours, theirs, strict=True)
        )


def copy_of(tensor: Tensor) -> Tensor:
    """A copy with the same strides, which programs rely on."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor)


def _alike(a: Tensor, b: Tensor, *, relative: float = 0.02, round_off: Tensor | None = None) -> bool:
    """Row by row in the norm: where a gradient is all but zero, round-off decides the sign of an adaptive update."""
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    tolerance = relative * _norms(b) + 1e-12
    if round_off is not None:
        tolerance += 8 * torch.finfo(round_off.dtype).eps * _norms(round_off)
    return bool((_norms(a - b) <= tolerance).all())


def _norms(tensor: Tensor) -> Tensor:
    """[row], of what is finite."""
    rows = tensor.shape[0] if tensor.dim() else 1
    norms: Tensor = torch.linalg.vector_norm(tensor.double().nan_to_num(0, 0, 0).reshape(rows, -1), dim=1)
    return norms
