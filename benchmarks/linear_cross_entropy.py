"""Time and memory of `linear_cross_entropy` beside all the logits at once, torch's own, and on a GPU other packages.

    python -m benchmarks.linear_cross_entropy [--device cuda] [--dtype bfloat16] [--shapes 2048x512x32768] [--repeats 5]

Shapes are tokens × hidden size × classes. Each contender computes the mean loss and the gradients of hidden states and
classifier. The repeats are interleaved, so that a slow minute of the machine hits all alike; a ratio is the median of
the ratios to the naive path within each repeat. The peak of memory is what one forward and backward pass adds to it:
on a CPU by the growth of the resident set of a fresh process each (on Linux), on a GPU by the allocator's count; inputs
are not in it, gradients are. The error is that of the classifier's gradient against float64, relative to its norm.

On a GPU, liger-kernel and cut-cross-entropy take part if they are installed.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions, functional

from fallline.losses.vocabulary import linear_cross_entropy

SHAPES = ("2048x512x32768", "4096x768x32768", "2048x512x1000", "4096x512x1000")
Contender = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight), target)


def chunked_by_torch(**options: Any) -> Contender:
    chosen = LinearCrossEntropyOptions(**options)
    return lambda hidden, weight, target: functional.linear_cross_entropy(hidden, weight, target, options=chosen)


def liger() -> Contender:
    kind = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    loss = kind()
    return lambda hidden, weight, target: loss(weight, hidden, target)


def cut() -> Contender:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, target: function(hidden, weight, target)


def contenders(device: torch.device) -> dict[str, Contender]:
    """What computes the loss, by name; the naive path first."""
    made: dict[str, Contender] = {"naive": naive}
    made["fallline"] = linear_cross_entropy()
    made["fallline, chunk=64"] = linear_cross_entropy(chunk=64)
    made["torch, options=None"] = functional.linear_cross_entropy
    made["torch, options"] = chunked_by_torch()
    made["torch, chunks of 256"] = chunked_by_torch(batch_chunk_size=256)
    if device.type == "cuda":
        for name, make in (("liger-kernel", liger), ("cut-cross-entropy", cut)):
            try:
                made[name] = make()
            except ImportError:
                print(f"{name} is not installed")
    return made


def inputs(shape: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, classifier weights and labels that are neither certain nor mere chance."""
    tokens, depth, classes = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, depth, generator=generator).to(device, dtype)
    weight = (torch.randn(classes, depth, generator=generator) / depth**0.5).to(device, dtype)
    target = torch.randint(0, classes, (tokens,), generator=generator).to(device)
    return hidden.requires_grad_(), weight.requires_grad_(), target


def step(loss: Contender, hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    hidden.grad = weight.grad = None
    loss(hidden, weight, target).backward()


def seconds(made: dict[str, Contender], given: tuple[Tensor, ...], repeats: int) -> dict[str, list[float]]:
    """Of a forward and a backward pass, in interleaved repeats after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in made}
    for repeat in range(repeats + 1):
        for name, loss in made.items():
            _wait(given[0].device)
            began = time.perf_counter()
            step(loss, *given)
            _wait(given[0].device)
            if repeat:
                times[name].append(time.perf_counter() - began)
    return times


def errors(made: dict[str, Contender], given: tuple[Tensor, ...]) -> dict[str, float]:
    """Of the classifier's gradient, against float64, in chunks of tokens."""
    hidden, weight, target = (each.detach() for each in given)
    exact = torch.zeros_like(weight, dtype=torch.float64)
    for some, labels in zip(hidden.double().split(256), target.split(256), strict=True):
        slope = torch.softmax(some @ weight.double().T, 1)
        slope[torch.arange(len(labels), device=labels.device), labels] -= 1
        exact += slope.T @ some / len(target)
    found = {}
    for name, loss in made.items():
        step(loss, *given)
        found[name] = float((given[1].grad.double() - exact).norm() / exact.norm())  # type: ignore[union-attr]
    return found


def peak_in_mb(name: str, shape: str, device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """What one forward and backward pass adds to the memory, in MB."""
    if device.type == "cuda":
        given = inputs(shape, device, dtype)
        loss = contenders(device)[name]
        step(loss, *given)  # compiles
        given[0].grad = given[1].grad = None
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(loss, *given)
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    command = [sys.executable, "-m", "benchmarks.linear_cross_entropy", "--one", name, "--shapes", shape]
    command += ["--dtype", str(dtype).removeprefix("torch."), "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def grown_resident_set_in_mb(name: str, shape: str, dtype: torch.dtype) -> float:
    """In this process, which has done nothing else: a small pass first, for what is loaded once."""
    made = contenders(torch.device("cpu"))[name]
    given = inputs(shape, torch.device("cpu"), dtype)
    step(made, *inputs("8x512x64", torch.device("cpu"), dtype))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _peak()
    step(made, *given)
    return (_peak() - before) / 1e3


def _peak() -> int:
    """Of the resident set, in kB. Not getrusage's, which a process inherits from the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(shape: str, device: torch.device, dtype: torch.dtype, repeats: int, threads: int) -> None:
    """Prints a row for each contender."""
    made = contenders(device)
    given = inputs(shape, device, dtype)
    times, wrong = seconds(made, given, repeats), errors(made, given)
    print(f"{'':24}{'ms':>10}{'ratio':>8}{'peak MB':>10}{'ratio':>8}{'error':>10}{'ratio':>8}")
    reference = 0.0
    for name in made:
        ratio = statistics.median(a / b for a, b in zip(times[name], times["naive"], strict=True))
        peak = peak_in_mb(name, shape, device, dtype, threads)
        reference = peak if name == "naive" else reference
        row = f"{name:24}{statistics.median(times[name]) * 1e3:>10,.1f}{ratio:>8.2f}{peak:>10,.0f}"
        print(f"{row}{peak / reference:>8.2f}{wrong[name]:>10.1e}{wrong[name] / wrong['naive']:>8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shapes", nargs="*", default=SHAPES, metavar="TOKENSxHIDDENxCLASSES")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats, of which the median counts")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--one", metavar="NAME", help="print only the growth of this process for one contender")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if options.one:
        print(grown_resident_set_in_mb(options.one, options.shapes[0], dtype))
        return
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {options.threads} thread(s)"
    print(f"torch {torch.__version__}, {where}, {options.dtype}, median of {options.repeats} interleaved repeats")
    for shape in options.shapes:
        tokens, depth, classes = map(int, shape.split("x"))
        logits = tokens * classes * dtype.itemsize / 1e6
        print(f"\n{tokens:,} tokens × {depth} → {classes:,} classes (all logits: {logits:,.0f} MB)")
        table(shape, device, dtype, options.repeats, options.threads)


if __name__ == "__main__":
    main()
