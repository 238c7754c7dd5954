"""How long one step of `as_torch` takes, beside the steps of torch.optim's own optimizers.

    python -m benchmarks.optimizer_step [--device cuda] [--parameters 10_000_000 --tensors 100] [--repeats 9]

Every optimizer of the catalogue makes steps on the same parameters: ours as it comes, ours with the rule alone, and,
where torch has the same optimizer, torch's foreach, fused and for-loop forms. The repeats are interleaved, so that a
slow minute of the machine hits all alike; a ratio is the median of the ratios within each repeat, to the fastest of
torch's forms. A second table has a model of six 64×64 matrices, where what counts is what surrounds the arithmetic.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fallline.optim.catalogue import CATALOGUE
from fallline.optim.info import OptimizerInfo

FORMS = {"foreach": {"foreach": True}, "fused": {"fused": True}, "for-loop": {"foreach": False}}
Step = Callable[[], Any]


def parameters(shapes: list[tuple[int, ...]], device: torch.device) -> list[nn.Parameter]:
    """Parameters with gradients."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        p = nn.Parameter(torch.randn(shape, generator=generator).to(device))
        p.grad = torch.randn(shape, generator=generator).to(device)
        made.append(p)
    return made


def contenders(info: OptimizerInfo, shapes: list[tuple[int, ...]], device: torch.device) -> dict[str, Step]:
    """What makes steps of this optimizer, by name; all of them with the same parameters, in the same memory."""
    arguments = dict(info.valid[0])
    rule = info.make(**arguments)
    params = parameters(shapes, device)

    def with_gradients(at: list[nn.Parameter]) -> Callable[[], Any]:
        # For those that look around: the gradient of a quadratic, whose graph is there to be differentiated.
        def closure() -> torch.Tensor:
            for p in at:
                p.grad = None
            loss = torch.stack([(p * p).sum() for p in at]).sum()
            grads = torch.autograd.grad(loss, at, create_graph=True)
            for p, g in zip(at, grads, strict=True):
                p.grad = g
            return loss.detach()

        return closure

    if rule.looks_around:
        optimizer = rule.as_torch(params, steps=1000)
        closure = with_gradients(params)
        return {"ours": lambda: optimizer.step(closure)}
    made: dict[str, Step] = {"ours": rule.as_torch(params, steps=1000).step}
    if rule.as_torch(params, steps=1000).computed_by != ["the rule"]:
        alone = rule.as_torch(params, steps=1000)
        alone.kernels = False
        made["the rule"] = alone.step
    kind: Any = getattr(torch.optim, info.torch_name, None) if info.torch_name else None
    if kind is None:
        return made
    taken = inspect.signature(kind).parameters
    for form, keywords in FORMS.items():
        if form != "for-loop" and not keywords.keys() <= taken.keys():
            continue
        try:
            made[form] = kind(params, **arguments, **{name: v for name, v in keywords.items() if name in taken}).step
            made[form]()
        except RuntimeError:
            made.pop(form, None)  # torch has no such form of it on this device
    return made


def measure(steps: dict[str, Step], device: torch.device, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per step of each, in interleaved repeats."""
    fastest = float("inf")
    for step in steps.values():
        step()
        _wait(device)
        began = time.perf_counter()
        step()
        _wait(device)
        fastest = min(fastest, time.perf_counter() - began)
    count = max(1, int(seconds / fastest))  # the same for all: the second of two steps finds a warm cache
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            _wait(device)
            began = time.perf_counter()
            for _ in range(count):
                step()
            _wait(device)
            times[name].append((time.perf_counter() - began) / count)
    return times


def table(names: list[str], shapes: list[tuple[int, ...]], device: torch.device, repeats: int) -> None:
    """Prints a row for each optimizer."""
    print(f"{'':22}{'ours µs':>10}{'rule µs':>10}" + "".join(f"{form + ' µs':>12}" for form in FORMS) + f"{'ratio':>8}")
    for name in names:
        with torch.random.fork_rng():
            found = measure(contenders(CATALOGUE[name], shapes, device), device, repeats, 0.01)
        medians = {each: statistics.median(times) * 1e6 for each, times in found.items()}
        row = f"{name:22}{medians['ours']:>10,.0f}{_shown(medians, 'the rule'):>10}"
        row += "".join(f"{_shown(medians, form):>12}" for form in FORMS)
        best = min((form for form in FORMS if form in found), key=lambda form: medians[form], default=None)
        if best is not None:
            ratio = statistics.median(o / t for o, t in zip(found["ours"], found[best], strict=True))
            row += f"{ratio:>8.2f}"
        print(row, flush=True)


def _shown(medians: dict[str, float], name: str) -> str:
    return f"{medians[name]:,.0f}" if name in medians else "–"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--tensors", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=9, help="interleaved repeats, of which the median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--optimizers", nargs="*", default=list(CATALOGUE), choices=list(CATALOGUE), metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    side = max(1, round((options.parameters / options.tensors) ** 0.5))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {options.threads} thread(s)"
    print(f"torch {torch.__version__}, {where}, float32, median of {options.repeats} interleaved repeats")
    for shapes in ([(side, side)] * options.tensors, [(64, 64)] * 6):
        print(f"\n{len(shapes)} tensors of {shapes[0][0]}×{shapes[0][1]}")
        table(options.optimizers, shapes, device, options.repeats)


if __name__ == "__main__":
    main()
