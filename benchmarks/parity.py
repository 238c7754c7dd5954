"""How many of torch's own optimizer configurations and error cases each library repeats, side by side in one run.

    python -m benchmarks.parity [--steps 50] [--out docs/parity.md]

The configurations and error cases are those of `torch.testing._internal.common_optimizers.optim_db`, from which torch
makes its own tests. Every configuration trains tensors of several shapes in float64, with torch's class and with each
library's optimizer of that name, given the same arguments. What torch refuses must be refused.

torch's internal test modules need the package `expecttest`. Libraries that are not installed are reported as such.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.metadata
import inspect
import io
import math
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fallline.optim.catalogue import CATALOGUE

SHAPES = {"scalar": (), "vector": (5,), "matrix": (3, 4), "tensor": (2, 3, 2, 2)}
MATRICES = {"wide": (3, 4), "tall": (6, 2)}
RTOL, ATOL = 1e-10, 1e-13
# Elements nearer to 0 than this are compared by their difference, not by its share.
SMALL = 1e-3
Params = dict[str, Tensor]
Runner = Callable[[dict[str, Any], Params, int], Params]
FALLLINE = {info.torch_name.lower(): info for info in CATALOGUE.values() if info.torch_name}


@dataclass(frozen=True)
class Candidate:
    """A library's optimizer: how to train with it, and how to make one for torch's error cases."""

    run: Runner
    make: Callable[[Any, dict[str, Any]], Any]
    is_torchs: bool = False


@dataclass
class Row:
    """What became of one torch optimizer in one library."""

    valid: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0
    notes: list[str] = field(default_factory=list)


def start(name: str) -> Params:
    """Parameters of several shapes, away from 0; matrices only for Muon, one matrix for SparseAdam."""
    generator = torch.Generator().manual_seed(0)
    shapes: Mapping[str, tuple[int, ...]] = MATRICES if name in ("Muon", "SparseAdam") else SHAPES
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) + 1 for n, s in shapes.items()}


def away(name: str, p: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """How far a parameter is from the bottom of its bowl, which wanders, and the curvature of its elements."""
    phase = torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape) + len(name)
    return p - 2 * torch.sin(0.7 * step + phase), 1 + 0.5 * torch.cos(phase)


def slopes(params: Mapping[str, Tensor], step: int) -> Params:
    found = {}
    for name, p in params.items():
        gap, curvature = away(name, p.detach(), step)
        found[name] = gap * curvature
    return found


def with_class(make: Callable[[Any, dict[str, Any]], Any], sparse: bool = False) -> Runner:
    """Trains with a class that has torch's interface."""

    def run(arguments: dict[str, Any], params: Params, steps: int) -> Params:
        leaves = {name: nn.Parameter(p.clone()) for name, p in params.items()}
        optimizer = make(list(leaves.values()), arguments)
        for step in range(steps):

            def closure(step: int = step) -> Tensor:
                loss = torch.zeros((), dtype=torch.float64)
                for name, p in leaves.items():
                    gap, curvature = away(name, p.detach(), step)
                    p.grad = (gap * curvature).to_sparse() if sparse else gap * curvature
                    loss = loss + (gap * gap * curvature).sum() / 2
                return loss

            # Only LBFGS evaluates the loss at several places; the others find their gradients ready.
            if type(optimizer).__name__ == "LBFGS":
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        return {name: p.detach() for name, p in leaves.items()}

    return run


def torchs(kind: type) -> Candidate:
    """torch's own class, the reference."""

    def make(params: Any, arguments: dict[str, Any]) -> Any:
        return kind(params, **arguments)

    return Candidate(with_class(make, kind.__name__ == "SparseAdam"), make)


def fallline_rule(kind: type) -> Candidate | None:
    """The pure rule, as the engines run it."""
    info = FALLLINE.get(kind.__name__.lower())
    if info is None:
        return None

    def run(arguments: dict[str, Any], params: Params, steps: int) -> Params:
        rule = info.make(**arguments)
        state = rule.init(params)
        for step in range(steps):
            updates, state = rule.update(slopes(params, step), state, params, step=step)
            params = {name: p + updates[name] for name, p in params.items()}
        return params

    def make(params: Any, arguments: dict[str, Any]) -> Any:
        return info.make(**arguments).as_torch(params)

    return Candidate(run, make)


def fallline_as_torch(kind: type) -> Candidate | None:
    """The rule as a torch optimizer, which uses torch's kernels where it can."""
    candidate = fallline_rule(kind)
    return candidate and Candidate(with_class(candidate.make), candidate.make)


def pytorch_optimizer(kind: type) -> Candidate | None:
    library = importlib.import_module("pytorch_optimizer")
    name = kind.__name__.lower()
    if name not in library.get_supported_optimizers():
        return None
    found = library.load_optimizer(name)

    def make(params: Any, arguments: dict[str, Any]) -> Any:
        if name == "muon" and isinstance(params, list) and all(isinstance(p, Tensor) for p in params):
            params = [{"params": params, "use_muon": True}]  # it wants to be told what torch takes for granted
        return found(params, **arguments)

    return Candidate(with_class(make), make, is_torchs=found is kind)


def torchopt(kind: type) -> Candidate | None:
    library = importlib.import_module("torchopt")
    classes = {name.lower(): name for name in dir(library) if name[0].isupper() and not name.startswith("Meta")}
    if kind.__name__.lower() not in classes:
        return None
    found = getattr(library, classes[kind.__name__.lower()])
    # Where the learning rate has no default, torch's.
    missing = inspect.signature(found).parameters["lr"].default is inspect.Parameter.empty
    usual = {"lr": inspect.signature(kind).parameters["lr"].default} if missing else {}

    def make(params: Any, arguments: dict[str, Any]) -> Any:
        return found(params, **{**usual, **arguments})

    return Candidate(with_class(make), make)


INTRODUCTION = """
# Parity with torch.optim

Made by `python -m benchmarks.parity --out docs/parity.md`; run it yourself.

Every configuration and every error case of torch's own test data base (`optim_db`), {steps} steps in float64 on tensors
of several shapes, on the CPU. Each library's optimizer of the same name gets the same arguments. A configuration
*matches* when all parameters agree with torch's class to {rtol:g} (relative) or {atol:g} (absolute); otherwise the
largest relative difference is given. It is *unsupported* when making the optimizer, or a step with it, raises. An error
case is *same* when an error of torch's type is raised (or its warning given), *other* when another error is raised,
*accepted* when none is.

"The rule" is fallline's pure update, which the engines run; "as_torch" is the optimizer to take away, which uses
torch's kernels where it can.

Python {python}, {versions}.

## In all

| library | optimizers | match | mismatch | unsupported | errors: same | other | accepted |
| --- | --: | --: | --: | --: | --: | --: | --: |
"""

READING = """
torch's own classes under another name are left out of the counts.

## Reading

- torch keeps NAdam's product of momenta and ASGD's rate in float32, however exact the parameters are, and computes with
  the learning rate of Muon in float32 when that is given as such a tensor. fallline follows it in this.
- fallline has no rules for LBFGS and SparseAdam; `fl.optim.from_torch` trains with torch's own.
- pytorch_optimizer hands out torch's own classes for six names. What it has of its own under torch's names are mostly
  other variants: Adafactor, Adamax, ASGD, Muon and RAdam go another way by percents and more, with torch's arguments.
- TorchOpt computes Adam's bias corrections in float32, which shows in the fifth to seventh digit after fifty steps of
  float64, and checks little: most of what torch refuses is accepted. It lacks `amsgrad`, `decoupled_weight_decay` and,
  here and there, `maximize`; `lr` of its SGD has no default, so torch's was given.
"""


LIBRARIES: dict[str, tuple[str, Callable[[type], Candidate | None]]] = {
    "fallline, the rule": ("fallline", fallline_rule),
    "fallline, as_torch": ("fallline", fallline_as_torch),
    "pytorch_optimizer": ("pytorch_optimizer", pytorch_optimizer),
    "TorchOpt": ("torchopt", torchopt),
}


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def difference(found: Params, expected: Params) -> float:
    """The largest relative difference of an element; infinity where one is not finite."""
    worst = 0.0
    for name, theirs in expected.items():
        mine = found[name]
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype or not mine.isfinite().all():
            return math.inf
        worst = max(worst, float(((mine - theirs).abs() / theirs.abs().clamp(min=SMALL)).max()))
    return worst


def close(found: Params, expected: Params) -> bool:
    return all(torch.allclose(found[name], theirs, rtol=RTOL, atol=ATOL) for name, theirs in expected.items())


def check_not_degenerate(name: str, arguments: Mapping[str, Any], end: Params, steps: int) -> None:
    """Every element moved and the gradients are far from zero, or the comparison would prove nothing."""
    begin = start(name)
    assert all((end[n] != begin[n]).all() for n in end), f"{name} {arguments}: a parameter did not move"
    if name == "LBFGS":
        return  # it goes to the bottom of each bowl
    sizes = torch.cat([g.abs().flatten() for step in range(steps) for g in slopes(begin, step).values()])
    assert (sizes > 1e-3).double().mean() > 0.98, f"{name}: the gradients vanish"


def told(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in arguments.items()) or "defaults"


def compare_valid(
    name: str, inputs: Iterable[Any], reference: Candidate, candidate: Candidate, steps: int, row: Row
) -> None:
    for each in inputs:
        with contextlib.redirect_stdout(io.StringIO()):
            expected = reference.run(copy.deepcopy(each.kwargs), start(name), steps)
        check_not_degenerate(name, each.kwargs, expected, steps)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found = candidate.run(copy.deepcopy(each.kwargs), start(name), steps)
        except Exception as error:
            row.valid["unsupported"] += 1
            row.notes.append(f"{told(each.kwargs)}: unsupported ({type(error).__name__}: {first_line(error)})")
            continue
        if close(found, expected):
            row.valid["match"] += 1
        else:
            row.valid["mismatch"] += 1
            row.worst = max(row.worst, difference(found, expected))
            row.notes.append(f"{told(each.kwargs)}: differs by {difference(found, expected):.1e}")


def compare_errors(errors: Iterable[Any], candidate: Candidate, row: Row) -> None:
    for case in errors:
        given = case.optimizer_error_input
        outcome = refusal(candidate, given, case)
        row.errors[outcome.split(":")[0]] += 1
        if not outcome.startswith("same"):
            row.notes.append(f"error case “{given.desc}” ({case.error_type.__name__}): {outcome}")


def refusal(candidate: Candidate, given: Any, case: Any) -> str:
    """What a library does where torch raises or warns."""
    params = given.params if given.params is not None else [nn.Parameter(torch.randn(2, 3))]
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        try:
            optimizer = candidate.make(params, copy.deepcopy(given.kwargs))
            if case.error_on.name == "STEP_ERROR":
                optimizer.step()
        except case.error_type:
            return "same type"
        except Exception as error:
            return f"other type: {type(error).__name__}: {first_line(error)}"
    if issubclass(case.error_type, Warning) and any(issubclass(w.category, case.error_type) for w in caught):
        return "same type"
    return "accepted"


def first_line(error: BaseException) -> str:
    text = (str(error).splitlines() or [""])[0]
    return text if len(text) <= 100 else text[:97] + "…"


def compare(steps: int) -> dict[str, dict[str, Row | None]]:
    """By torch's class and library; None where the library has no optimizer of that name."""
    from torch.testing._internal.common_optimizers import optim_db

    table: dict[str, dict[str, Row | None]] = {}
    for info in optim_db:
        kind = info.optim_cls
        name = kind.__name__
        reference = torchs(kind)
        table[name] = {}
        for library, (package, find) in LIBRARIES.items():
            if installed(package) is None:
                continue
            candidate = find(kind)
            if candidate is None:
                table[name][library] = None
                continue
            row = table[name][library] = Row()
            if candidate.is_torchs:
                row.notes.append("is torch's own class")
            inputs = info.optim_inputs_func(device="cpu")
            compare_valid(name, inputs, reference, candidate, steps, row)
            torch.manual_seed(0)
            compare_errors(info.optim_error_inputs_func(device="cpu", dtype=torch.float64), candidate, row)
            print(name, library, dict(row.valid), dict(row.errors), file=sys.stderr)
    return table


def markdown(table: dict[str, dict[str, Row | None]], steps: int) -> str:
    packages = dict.fromkeys(["torch", *(package for package, _ in LIBRARIES.values())])
    versions = ", ".join(f"{package} {installed(package) or 'not installed'}" for package in packages)
    lines = INTRODUCTION.format(steps=steps, rtol=RTOL, atol=ATOL, python=platform.python_version(), versions=versions)
    lines = lines.strip("\n").splitlines()
    libraries = [name for name, (package, _) in LIBRARIES.items() if installed(package) is not None]
    for library in libraries:
        rows = [row for by in table.values() if (row := by.get(library)) is not None]
        own = [row for row in rows if "is torch's own class" not in row.notes]
        valid, errors = sum((r.valid for r in own), Counter()), sum((r.errors for r in own), Counter())
        label = f"{len(own)}"
        if len(own) < len(rows):
            label += f", and {len(rows) - len(own)} of torch's own classes"
        lines.append(
            f"| {library} | {label} | {valid['match']} | {valid['mismatch']} | {valid['unsupported']} "
            f"| {errors['same type']} | {errors['other type']} | {errors['accepted']} |"
        )
    lines += ["", *READING.strip("\n").splitlines(), "", "## By optimizer", ""]
    lines += ["| torch.optim | " + " | ".join(libraries) + " |", "| --- |" + " --- |" * len(libraries)]
    for name, by in table.items():
        lines.append(f"| {name} | " + " | ".join(cell(by[library]) for library in libraries) + " |")
    lines += ["", "Configurations: match / mismatch / unsupported; then error cases: same / other / accepted.", ""]
    lines += ["## Every difference", ""]
    for library in libraries:
        lines += [f"### {library}", ""]
        notes = [
            f"- {name}, {note}".replace("|", "\\|")
            for name, by in table.items()
            if (row := by[library]) is not None
            for note in row.notes
            if note != "is torch's own class"
        ]
        lines += [*(notes or ["None."]), ""]
    return "\n".join(lines)


def cell(row: Row | None) -> str:
    if row is None:
        return "has none"
    if "is torch's own class" in row.notes:
        return "torch's class"
    valid = f"{row.valid['match']} / {row.valid['mismatch']} / {row.valid['unsupported']}"
    worst = f" (up to {row.worst:.0e})" if row.worst else ""
    errors = f"{row.errors['same type']} / {row.errors['other type']} / {row.errors['accepted']}"
    return f"{valid}{worst}; {errors}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="updates of every configuration")
    parser.add_argument("--out", type=Path, help="the markdown file to write; printed if left out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    text = markdown(compare(options.steps), options.steps)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text)
        print(f"written to {options.out}")


if __name__ == "__main__":
    main()
