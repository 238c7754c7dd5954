"""Optimizers with one mistake each: every mistake must show within fifty steps in float64.

A mutant is the source of a family of optimizers with one passage changed, run as a module of its own that no file
holds. What it computes is compared with torch.optim, or where torch has no such optimizer with the unchanged rule. If a
mutant lived, the comparison that the parity tests make could not see the mistake.
"""

from __future__ import annotations

import ast
import functools
import math
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fallline as fl
from fallline.optim import Landscape
from fallline.optim.catalogue import CATALOGUE

SOURCE = Path(fl.optim.__file__).parent
STEPS = 50
SHAPES = {"matrix": (3, 4), "vector": (5,), "scalar": ()}
MATRICES = {"wide": (3, 4), "tall": (5, 2)}


@dataclass(frozen=True)
class Mutant:
    """A passage of a top-level function of a family, and what stands there instead."""

    module: str
    function: str
    before: str
    after: str
    optimizer: str
    arguments: dict = field(default_factory=dict)
    through: str = ""  # the family that uses the module, where the optimizer is in another

    def __str__(self) -> str:
        return f"{self.optimizer}: {self.before} -> {self.after}"


def mutants(module: str, optimizer: str, arguments: dict, *changes: tuple[str, str, str], through: str = ""):
    return [Mutant(module, where, before, after, optimizer, arguments, through) for where, before, after in changes]


def bias(function: str, *, second: bool = True, power1: str = 'n["beta1"] ** step', power2: str = 'n["beta2"] ** step'):
    """Of two corrections for the start of a mean: dropped, computed in float32, and a step early or late."""
    first = f"correction1 = 1 - {power1}"
    found = [
        (function, first, "correction1 = torch.ones_like(step)"),
        (function, first, f"correction1 = (1 - {in_float32(power1)}).double()"),
        (function, first, first.replace("step", "(step + 1)")),
        (function, first, first.replace("step", "(step - 1)")),
    ]
    if second:
        root = f"(1 - {power2}).sqrt()"
        found += [
            (function, root, "torch.ones_like(step)"),
            (function, root, f"(1 - {in_float32(power2)}).sqrt().double()"),
            (function, root, root.replace("step", "(step + 1)")),
            (function, root, f"(1 - {power2})"),
        ]
    return found


def in_float32(power: str) -> str:
    base, _, exponent = power.partition("**")
    return f"{base.strip()}.float() ** {exponent.strip()}.float()"


ADAM = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
SMALL_STEPS = {"lr": 0.01, "weight_decay": 0.1}
WARMUPS = {"alpha_warmup": 40, "beta3_warmup": 40}
MUTANTS = [
    # Adam's family.
    *mutants(
        "adam_family", "adam", {**ADAM, "amsgrad": True},
        *bias("scale_by_adam"),
        ("scale_by_adam", 'n["eps"] * correction1', 'n["eps"]'),
        ("scale_by_adam", "torch.maximum(", "torch.minimum("),
        ("scale_by_adam", "mean_of_squares(slots", "mean_of_squares(0.5 * slots"),
        ("adam", "decoupled_weight_decay, maximize)", "not decoupled_weight_decay, maximize)"),
    ),
    *mutants("adam_family", "adamw", ADAM, ("adamw", "weight_decay, True, maximize", "weight_decay, False, maximize")),
    *mutants(
        "adam_family", "adamax", ADAM,
        ("scale_by_adamax", 'correction = 1 - n["beta1"] ** slots["step"]',
         'correction = torch.ones_like(n["beta1"])'),
        ("scale_by_adamax", '** slots["step"]', '** (slots["step"] + 1)'),
        ("scale_by_adamax", '1 - n["beta1"] ** slots["step"]',
         '(1 - n["beta1"].float() ** slots["step"].float()).double()'),
        ("scale_by_adamax", "g.abs() + floor", "g.abs()"),
        ("adamax", "*incoming(weight_decay, maximize), scale_by_adamax(betas, eps)",
         "*incoming(0.0, maximize), scale_by_adamax(betas, eps), *decay(weight_decay)"),
    ),
    *mutants(
        "adam_family", "nadam", ADAM,
        ("scale_by_nadam", "(step + 1) *", "step *"),
        ("scale_by_nadam", "0.96 ** (step * ", "0.96 ** ((step - 1) * "),
        ("scale_by_nadam", "/ (1 - product)", ""),
        ("scale_by_nadam", "1 - product * mu_next", "1 - product"),
        ("scale_by_nadam", '(1 - n["beta2"] ** step).rsqrt()', "torch.ones_like(step)"),
        ("scale_by_nadam", '(1 - n["beta2"] ** step).rsqrt()', '(1 - n["beta2"].float() ** step).rsqrt()'),
        ("scale_by_nadam", 'product = mu_product.double()', 'product = slots["mu_product"].double()'),
        ("nadam", "decoupled_weight_decay, maximize)", "not decoupled_weight_decay, maximize)"),
    ),
    *mutants(
        "adam_family", "radam", ADAM,
        ("scale_by_radam", "length > 5", "length > 4"),
        ("scale_by_radam", "2 * step * decayed", "2 * (step - 1) * decayed"),
        ("scale_by_radam", '1 / (1 - n["beta1"] ** step)', "torch.ones_like(step)"),
        ("scale_by_radam", "rectified * (1 - decayed)", "rectified"),
        ("scale_by_radam", '1 - n["beta1"] ** step', '1 - n["beta1"].float() ** step.float()'),
        ("radam", "decoupled_weight_decay, maximize)", "not decoupled_weight_decay, maximize)"),
    ),
    # Means of squares.
    *mutants(
        "mean_square", "rmsprop", {"lr": 0.01, "alpha": 0.9, "weight_decay": 0.1, "centered": True},
        ("scale_by_rms", "square_root(spread) + floor", "square_root(spread + floor)"),
        ("scale_by_rms", 'changed["grad_avg"] * changed["grad_avg"]', 'changed["grad_avg"]'),
        ("scale_by_rms", 'n["alpha"], 1 - n["alpha"]', 'n["alpha"].float(), 1 - n["alpha"].float()'),
    ),
    *mutants(
        "mean_square", "adagrad", {"lr": 0.1, "lr_decay": 0.05, "weight_decay": 0.1},
        ("scale_by_inverse_time", '(slots["step"] - 1)', 'slots["step"]'),
        ("scale_by_inverse_time", '1 / (1 + (slots["step"] - 1) * n["lr_decay"])',
         '1 / (1 + (slots["step"] - 1).float() * n["lr_decay"].float())'),
        ("scale_by_root_of_sum", "square_root(total) + floor", "square_root(total)"),
        ("adagrad", "*incoming(weight_decay, maximize)", "*incoming(0.0, maximize)"),
    ),
    *mutants(
        "mean_square", "adadelta", {"weight_decay": 0.1},
        ("scale_by_adadelta", 'mean_of_squares(slots["acc_delta"], u,', 'mean_of_squares(slots["acc_delta"], g,'),
        ("scale_by_adadelta", "square_root(square_avg + floor)", "(square_root(square_avg) + floor)"),
        ("adadelta", "*incoming(weight_decay, maximize)", "*incoming(0.0, maximize)"),
    ),
    # Gradient descent.
    *mutants(
        "transforms", "sgd", {"lr": 0.01, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
        ("trace", 'slots["step"] == 1', 'slots["step"] == 2'),
        ("trace", '1 - n["dampening"]', '1.0'),
        ("trace", '* momentum + entering', '+ entering * momentum'),
        ("scale_by_learning_rate", '-n["lr"]', 'n["lr"]'),
        ("scale_by_learning_rate", 'cast(g, -n["lr"])', 'cast(g, -n["lr"].float())'),
        ("incoming", "decay(weight_decay)", "decay(0.0 * weight_decay)"),
        through="gradient_descent",
    ),
    *mutants(
        "transforms", "sgd", {"lr": 0.01, "momentum": 0.9, "nesterov": True},
        ("trace", "g + buffer * momentum if nesterov", "g + buffer if nesterov"),
        through="gradient_descent",
    ),
    *mutants(
        "gradient_descent", "asgd", {"lambd": 0.1, "alpha": 0.5, "weight_decay": 0.1},
        ("scale_by_asgd", 'n["lr"] * step)', 'n["lr"] * (step - 1))'),
        ("scale_by_asgd", '(1 + n["lambd"] * n["lr"] * step)', '(1 + n["lambd"] * n["lr"] * step).float()'),
        ("scale_by_asgd", "p * shrink", "p * size"),
        ("asgd", "incoming(weight_decay, maximize)", "incoming(0.0, maximize)"),
    ),
    *mutants(
        "gradient_descent", "rprop", {},
        ("scale_by_rprop", "torch.where(sign < 0, 0.0, g)", "g"),
        ("scale_by_rprop", "sign > 0, grow", "sign >= 0, grow"),
    ),
    # Signs.
    *mutants(
        "signs", "lion", {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1},
        ("scale_by_lion", 'torch.lerp(exp_avg, g, enter2)', 'torch.lerp(exp_avg, g, enter1)'),
        ("scale_by_lion", 'cast(g, 1 - n["beta1"], 1 - n["beta2"])', 'cast(g, n["beta1"], 1 - n["beta2"])'),
        ("lion", "*incoming(0.0, maximize), scale_by_lion(betas), *decay(weight_decay)",
         "*incoming(weight_decay, maximize), scale_by_lion(betas)"),
    ),
    # Adam's variants.
    *mutants(
        "adam_variants", "adabelief", {**ADAM, "amsgrad": True},
        *bias("scale_by_adabelief"),
        ("scale_by_adabelief", "g - exp_avg,", "g,"),
        ("adabelief", "*incoming(0.0, maximize)", "*incoming(weight_decay, maximize)"),
    ),
    *mutants(
        "adam_variants", "yogi", ADAM,
        *bias("scale_by_yogi"),
        ("scale_by_yogi", "torch.sign(", "-torch.sign("),
        ("yogi", "*incoming(weight_decay, maximize)", "*incoming(0.0, maximize)"),
    ),
    *mutants(
        "adam_variants", "adan", {**SMALL_STEPS, "betas": (0.9, 0.85, 0.95)},
        *bias("scale_by_adan", second=False),
        ("scale_by_adan", "step == 1", "step == 2"),
        ("scale_by_adan", 'correction2 = 1 - n["beta2"] ** step', "correction2 = torch.ones_like(step)"),
        ("scale_by_adan", '1 - n["beta3"] ** step', '(1 - n["beta3"].float() ** step.float()).double()'),
        ("scale_by_adan", "difference * beta2,", "difference,"),
        ("scale_by_proximal_learning_rate", '/ (1 + n["lr"] * n["weight_decay"])', ""),
    ),
    *mutants(
        "adam_variants", "ademamix", {**SMALL_STEPS, "betas": (0.9, 0.99, 0.999), **WARMUPS},
        *bias("scale_by_ademamix"),
        ("scale_by_ademamix", "alpha * correction1", "alpha"),
        ("scale_by_ademamix", 'step / n["alpha_warmup"]', '(step - 1) / n["alpha_warmup"]'),
        ("scale_by_ademamix", 'step / n["beta3_warmup"]', '(step - 1) / n["beta3_warmup"]'),
        ("ademamix", "*incoming(0.0, maximize)", "*incoming(weight_decay, maximize)"),
    ),
    # Layer by layer.
    *mutants(
        "layerwise", "lamb", ADAM,
        ("scale_by_lamb", "wanted / own", "own / wanted"),
        ("scale_by_lamb", "norm(direction)", "norm(g)"),
        ("lamb", "*incoming(0.0, maximize)", "*incoming(weight_decay, maximize)"),
    ),
    *mutants(
        "layerwise", "lars", {"lr": 1.0, "weight_decay": 0.1, "trust_coefficient": 0.02},
        ("scale_by_lars", '+ n["weight_decay"] * length', ""),
        ("scale_by_lars", "(g + p * decay) * ratio", "g * ratio + p * decay"),
        ("scale_by_lars", "p.dim() <= 1", "p.dim() < 1"),
    ),
    # Without a learning rate.
    *mutants(
        "learning_rate_free", "prodigy", {"d0": 1e-2, "weight_decay": 0.1, "use_bias_correction": True},
        ("_bias_correction", '(1 - n["beta2"] ** count).sqrt()', "torch.ones_like(count)"),
        ("_bias_correction", '(1 - n["beta1"] ** count)', '(1 - n["beta1"].float() ** count.float())'),
        ("_bias_correction", 'n["beta1"] ** count', 'n["beta1"] ** (count + 1)'),
        ("scale_by_prodigy", 'slots[key]["p0"] - params[key]', 'params[key] - slots[key]["p0"]'),
        ("scale_by_prodigy", 'shared["d_before"] / d', "torch.ones_like(d)"),
        ("scale_by_prodigy", '* (new_d / d)', ""),
    ),
    *mutants(
        "learning_rate_free", "d_adaptation", {"d0": 1e-2, "weight_decay": 0.1, "use_bias_correction": True},
        ("_bias_correction", '(1 - n["beta2"] ** count).sqrt()', "torch.ones_like(count)"),
        ("_bias_correction", '(1 - n["beta1"] ** count)', '(1 - n["beta1"].float() ** count.float())'),
        ("scale_by_d_adaptation", "(1 - root) * denominator", "denominator"),
    ),
    # Averages instead of schedules.
    *mutants(
        "schedule_free", "schedule_free_sgd", {"lr": 0.05, "weight_decay": 0.1, "warmup_steps": 10, "r": 0.5},
        ("schedule_free_step", 'step / n["warmup_steps"]', '(step - 1) / n["warmup_steps"]'),
        ("schedule_free_step", 'step ** n["r"]', '(step + 1) ** n["r"]'),
        ("schedule_free_step", 'n["momentum"] * (1 - share)', 'n["momentum"]'),
        ("schedule_free_step", "weight / torch.where", "weight.float() / torch.where"),
        ("schedule_free_sgd", "incoming(weight_decay, False)", "incoming(0.0, False)"),
    ),
    *mutants(
        "schedule_free", "schedule_free_adamw", {"lr": 0.05, "weight_decay": 0.1},
        ("scale_by_second_moment", '(1 - n["beta2"] ** slots["step"]).sqrt()', 'torch.ones_like(n["beta2"])'),
        ("scale_by_second_moment", '** slots["step"]', '** (slots["step"] + 1)'),
        ("scale_by_second_moment", '1 - n["beta2"] ** slots["step"]',
         '(1 - n["beta2"].float() ** slots["step"].float()).double()'),
        ("schedule_free_adamw", "*decay(weight_decay)", "*decay(0.0 * weight_decay)"),
    ),
    # Less variance.
    *mutants(
        "variance_reduced", "mars", ADAM,
        *bias("scale_by_mars", power1="beta1**step", power2="beta2**step"),
        ("scale_by_mars", "(g - h) * strength", "(h - g) * strength"),
        ("scale_by_mars", "beta1 / (1 - beta1)", "beta1"),
    ),
    *mutants(
        "variance_reduced", "mars", {"approximate": False, "lr": 0.01},
        ("scale_by_mars", '["step"] == 1', '["step"] == 2'),
    ),
    # With the loss around the parameters.
    *mutants(
        "curvature", "sophia", {**SMALL_STEPS, "betas": (0.9, 0.5), "gamma": 1.0},
        ("scale_by_sophia", "torch.clamp(exp_avg / bent, -1, 1)", "exp_avg / bent"),
        ("scale_by_sophia", "step % update_period == 0", "(step + 1) % update_period == 0"),
        ("sophia", "*decay(weight_decay)", "*decay(0.0 * weight_decay)"),
    ),
    *mutants(
        "curvature", "sam", {"optimizer": fl.optim.sgd(lr=0.01, momentum=0.9), "rho": 0.5},
        ("sam", "params[name] + g * distance", "params[name] - g * distance"),
        ("sam", 'n["rho"] / (norm', 'n["rho"] / (1 + 0 * norm'),
    ),
    # Matrices.
    *mutants(
        "matrices", "adafactor", {"lr": 0.3, "weight_decay": 0.1},
        ("scale_by_capped_learning_rate", 'slots["step"].rsqrt()', '(slots["step"] + 1).rsqrt()'),
        ("scale_by_capped_learning_rate", '-n["lr"] * n["weight_decay"]', '-n["weight_decay"]'),
        ("scale_by_factored_rms", '_mean_square(g, -2)', '_mean_square(g, -1).mean(-2, keepdim=True)'),
        ("clip_by_rms", "torch.clamp(", "1.0 + 0 * torch.clamp("),
    ),
    *mutants(
        "matrices", "muon", {"lr": 0.01},
        ("scale_by_muon", "torch.lerp(g, mean, ahead)", "mean"),
        ("muon", "*decay(weight_decay)", "*decay(0.0 * weight_decay)"),
        ("_stretch", "rows / max(columns, 1)", "columns / max(rows, 1)"),
    ),
    # Preconditioners.
    *mutants(
        "preconditioners", "shampoo", {**SMALL_STEPS, "momentum": 0.9},
        ("scale_by_shampoo", "2 * len(shape)", "len(shape)"),
        ("shampoo", "*incoming(weight_decay, maximize)", "*incoming(0.0, maximize)"),
    ),
    *mutants(
        "preconditioners", "soap", SMALL_STEPS,
        ("scale_by_soap", 'torch.clamp(slots["step"] - 1, min=1)', 'slots["step"]'),
        ("scale_by_soap", '(1 - n["beta1"] ** step)', '(1 - n["beta1"].float() ** step.float())'),
        ("scale_by_soap", '(1 - n["beta2"] ** step).sqrt()', "torch.ones_like(step)"),
        ("scale_by_soap", "_reordered(exp_avg_sq, order, i)", "exp_avg_sq"),
        ("soap", "*decay(weight_decay)", "*decay(0.0 * weight_decay)"),
    ),
    # Around other optimizers.
    *mutants(
        "combinators", "lookahead", {"optimizer": fl.optim.sgd(lr=0.05, momentum=0.9)},
        ("lookahead", '"step"], own["k"]', '"step"] + 1, own["k"]'),
        ("lookahead", "torch.lerp(slow, params[name] + u, follows)", "torch.lerp(slow, params[name], follows)"),
    ),
    *mutants(
        "combinators", "cautious", {"optimizer": fl.optim.adamw(lr=0.01, weight_decay=0.1)},
        ("_agreeing", "mask / torch.clamp(mask.mean(), min=1e-3)", "mask"),
    ),
    # Different optimizers for different parameters.
    *mutants(
        "partitions", "no_decay_on_vectors", {"optimizer": fl.optim.adamw(lr=0.01, weight_decay=0.5)},
        ("no_decay_on_vectors", "params[name].dim() < 2", "params[name].dim() < 1"),
    ),
    *mutants(
        "partitions", "muon_with_adamw", {"lr": 0.01},
        ("muon_with_adamw", 'label, {"muon": matrices, "adamw": rest}', 'label, {"muon": rest, "adamw": rest}'),
    ),
    # What all have in common.
    *mutants(
        "base", "adam", ADAM,
        ("Optimizer", '"step": own["step"] + 1', '"step": own["step"] + 2'),
        through="adam_family",
    ),
]  # fmt: skip


def source_of(module: str) -> str:
    return (SOURCE / f"{module}.py").read_text()


def segment(source: str, function: str) -> tuple[int, int]:
    """Where a top-level function or class stands in the source."""
    lines = source.splitlines(keepends=True)
    node = next(n for n in ast.parse(source).body if getattr(n, "name", "") == function)
    return sum(map(len, lines[: node.lineno - 1])), sum(map(len, lines[: node.end_lineno]))


def changed(mutant: Mutant) -> str:
    source = source_of(mutant.module)
    begin, end = segment(source, mutant.function)
    passage = source[begin:end]
    assert mutant.before in passage, f"{mutant.function} has no {mutant.before!r} any more"
    return source[:begin] + passage.replace(mutant.before, mutant.after) + source[end:]


def module_of(name: str, source: str, monkeypatch) -> types.ModuleType:
    """A module with that source, known to no other."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, f"<{name}>", "exec"), module.__dict__)
    return module


def make(mutant: Mutant, monkeypatch):
    """The optimizer of a mutant."""
    # Operators are registered once in a process; the mutant uses those of the real module.
    own = module_of(f"mutant_{mutant.module}", without_operators(mutant.module, changed(mutant)), monkeypatch)
    if mutant.through:
        family = source_of(mutant.through).replace(f"fallline.optim.{mutant.module} import", f"{own.__name__} import")
        assert own.__name__ in family, f"{mutant.through} does not use {mutant.module}"
        own = module_of(f"mutant_{mutant.through}", family, monkeypatch)
    return getattr(own, mutant.optimizer)(**mutant.arguments)


def without_operators(module: str, source: str) -> str:
    """The source without the top-level functions that it registers with torch as operators."""
    tree = ast.parse(source)
    lines = source.splitlines()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and any("library" in d or "register" in d for d in decorators(node)):
            first = min(d.lineno for d in node.decorator_list)
            lines[first - 1 : node.end_lineno] = [""] * (node.end_lineno - first + 1)
    return "\n".join(lines)


def decorators(node: ast.FunctionDef) -> list[str]:
    return [ast.unparse(decorator) for decorator in node.decorator_list]


def start(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = MATRICES if CATALOGUE[name].matrices_only else SHAPES
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) + 1 for n, s in shapes.items()}


@functools.cache
def bowl(name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    phase = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape) + len(name)
    return phase, 1 + 0.5 * torch.cos(phase)


def loss_at(step: int, params) -> Tensor:
    """Bowls whose centres wander, a little bent so that curvatures change from place to place."""
    total = []
    for name, p in params.items():
        phase, curvature = bowl(name, tuple(p.shape))
        away = p - 2 * torch.sin(0.7 * step + phase)
        total.append((curvature * away**2 / 2 + 0.02 * away**4).sum())
    return torch.stack(total).sum()


def slopes(step: int, params) -> dict[str, Tensor]:
    found = {}
    for name, p in params.items():
        phase, curvature = bowl(name, tuple(p.shape))
        away = p - 2 * torch.sin(0.7 * step + phase)
        found[name] = away * (curvature + 0.08 * away * away)
    return found


def trajectory(rule, params) -> Iterator[dict[str, Tensor]]:
    """After each update the parameters, and those to evaluate with."""
    state = rule.init(params, steps=STEPS)
    for step in range(STEPS):
        landscape = Landscape.of(functools.partial(loss_at, step), params) if rule.surveys(step) else None
        updates, state = rule.update(slopes(step, params), state, params, steps=STEPS, step=step, landscape=landscape)
        params = {name: p + updates[name] for name, p in params.items()}
        yield {**params, **{f"{n} (evaluated)": p for n, p in rule.evaluation_parameters(state, params).items()}}


def of_torch(name: str, arguments: dict) -> Iterator[dict[str, Tensor]]:
    """The same with torch's optimizer of that name."""
    leaves = {n: nn.Parameter(p) for n, p in start(name).items()}
    optimizer = getattr(torch.optim, CATALOGUE[name].torch_name)(list(leaves.values()), **arguments)
    for step in range(STEPS):
        for n, g in slopes(step, {n: p.detach() for n, p in leaves.items()}).items():
            leaves[n].grad = g
        optimizer.step()
        yield {n: p.detach().clone() for n, p in leaves.items()}


EXPECTED: dict[str, list[dict[str, Tensor]]] = {}


def expected_of(mutant: Mutant) -> list[dict[str, Tensor]]:
    name, arguments = mutant.optimizer, mutant.arguments
    key = f"{name} {arguments!r}"
    if key not in EXPECTED:
        found = list(trajectory(CATALOGUE[name].make(**arguments), start(name)))
        if hasattr(torch.optim, CATALOGUE[name].torch_name or "-"):
            theirs = list(of_torch(name, arguments))
            assert all(map(agree, found, theirs)), f"{name} does not compute what torch does"
            found = theirs
        for n, p in start(name).items():
            assert (found[-1][n] != p).all(), f"{name}: {n} did not move"
        EXPECTED[key] = found
    return EXPECTED[key]


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.allclose(found[name], p, rtol=1e-10, atol=1e-12) for name, p in expected.items())


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_every_mutant_is_caught(mutant, monkeypatch):
    expected = expected_of(mutant)
    steps = zip(trajectory(make(mutant, monkeypatch), start(mutant.optimizer)), expected, strict=True)
    assert not all(agree(found, right) for found, right in steps), "the mutant lives"  # up to the first difference


@pytest.mark.parametrize("module", sorted({m.module for m in MUTANTS if not m.through}))
def test_an_unchanged_module_run_like_a_mutant_agrees(module, monkeypatch):
    """So that a mutant is caught for its mistake, not for being a copy."""
    for mutant in {m.optimizer: m for m in MUTANTS if m.module == module}.values():
        same = Mutant(module, mutant.function, mutant.before, mutant.before, mutant.optimizer, mutant.arguments)
        found = trajectory(make(same, monkeypatch), start(mutant.optimizer))
        assert all(map(agree, found, expected_of(mutant)))


def test_every_family_has_mutants():
    families = {info.make.__module__.rpartition(".")[2] for info in CATALOGUE.values()}
    assert families - {m.module for m in MUTANTS} - {m.through for m in MUTANTS} == set()
    assert {m.optimizer for m in MUTANTS} <= CATALOGUE.keys()
