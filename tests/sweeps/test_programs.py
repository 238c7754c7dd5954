"""Programs compute what the functions compute that they were made of, or are not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fallline as fl
from fallline.sweeps import search
from fallline.sweeps.programs import Part, Programs, Run, agree
from fallline.sweeps.traced import trace
from fallline.sweeps.vectorised import Population

CPU = torch.device("cpu")
ATEN = torch.ops.aten


# Agreement.


def step(tensors: list[Tensor]) -> list[Tensor]:
    """Losses [row] returned, gradients written, large parameters moved by small steps, a mask changed."""
    slopes, params, alive = tensors
    slopes.copy_(params * 1e-4 + 1)
    params.sub_(1e-3 * slopes)
    alive.logical_and_(params[:, :1] < 3000)
    return [slopes.square().sum(dim=1)]


def examples(dtype: torch.dtype) -> list[Tensor]:
    params = torch.linspace(1000, 4000, 12).reshape(3, 4).to(dtype)
    return [torch.zeros(3, 4, dtype=dtype), params, torch.ones(3, 1, dtype=torch.bool)]


def spoilt(change: Callable[[list[Tensor], Tensor], Any]) -> Run:
    """The step with something changed afterwards, in what was written or in the losses."""

    def run(tensors: list[Tensor]) -> list[Tensor]:
        (losses,) = step(tensors)
        change(tensors, losses)
        return [losses]

    return run


def assign(tensor: Tensor, where: Any, value: float) -> None:
    tensor[where] = value


WRONG = {
    "the loss of a row": lambda tensors, losses: losses[1].mul_(1.0001),
    "a loss that is NaN": lambda tensors, losses: losses[2].fill_(torch.nan),
    "a loss that is infinite": lambda tensors, losses: losses[2].fill_(torch.inf),
    "losses in another order": lambda tensors, losses: losses.copy_(losses.flip(0)),
    "the gradient of a row": lambda tensors, losses: tensors[0][2].mul_(1.05),
    "the sign of a gradient": lambda tensors, losses: tensors[0][0].neg_(),
    "a gradient that is NaN": lambda tensors, losses: assign(tensors[0], (0, 3), torch.nan),
    "no update": lambda tensors, losses: tensors[1].add_(1e-3 * tensors[0]),
    "an update that is half too small": lambda tensors, losses: tensors[1].add_(5e-4 * tensors[0]),
    "the mask": lambda tensors, losses: assign(tensors[2], (0, 0), False),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_computes_something_else_does_not_agree(wrong: str):
    given_tensors = examples(torch.float64)
    before = [tensor.clone() for tensor in given_tensors]
    assert agree(spoilt(lambda tensors, losses: None), step, given_tensors)
    assert not agree(spoilt(WRONG[wrong]), step, given_tensors)
    assert not agree(step, spoilt(WRONG[wrong]), given_tensors)
    for tensor, old in zip(given_tensors, before, strict=True):
        assert torch.equal(tensor, old), "the examples were changed"


def test_a_wrong_step_does_not_hide_behind_a_large_number_in_float32():
    """0.05 beside 1000."""
    given_tensors = examples(torch.float32)
    too_far = spoilt(lambda tensors, losses: tensors[1].sub_(0.05 * tensors[0]))
    assert torch.allclose(given_tensors[1], given_tensors[1] - 0.05, rtol=1e-4)
    assert agree(step, step, given_tensors)
    assert not agree(too_far, step, given_tensors)


def test_a_wrong_row_does_not_hide_beside_a_large_one():
    def double(tensors: Any) -> list[Tensor]:
        return [2 * tensors[0]]

    def spoilt_first(tensors: Any) -> list[Tensor]:
        return [torch.cat([3 * tensors[0][:1], 2 * tensors[0][1:]])]

    assert not agree(spoilt_first, double, [torch.tensor([[1e-6, 1e-6], [1e6, 1e6]])])


def test_round_off_agrees_and_nan_agrees_with_nan():
    given_tensors = examples(torch.float32)
    rounded = spoilt(lambda tensors, losses: (losses.mul_(1 + 1e-6), tensors[1].mul_(1 + 1e-7)))
    assert agree(rounded, step, given_tensors)
    given_tensors[1][1, 2] = torch.nan
    assert agree(rounded, step, given_tensors)


def test_a_wrong_program_does_not_take_the_place_of_a_traced_one():
    part = Part("key", lambda *tensors: step(list(tensors)), "a step")
    programs = Programs()
    run = programs.of(part, examples(torch.float64))
    assert programs.all_traced
    assert not programs.use("key", spoilt(WRONG["the loss of a row"]))
    assert programs.of(part, examples(torch.float64)) is run
    assert programs.use("key", step)
    assert programs.of(part, examples(torch.float64)) is step
    assert [program.compiled for program in programs] == [True]


def test_a_program_that_fails_does_not_take_the_place_of_a_traced_one():
    programs = Programs()
    run = programs.of(Part("key", lambda *tensors: step(list(tensors)), "a step"), examples(torch.float64))

    def fail(tensors: Any) -> Any:
        raise RuntimeError("API call failed")

    with pytest.raises(RuntimeError, match="API call failed"):
        programs.use("key", fail)
    assert programs.by_key["key"].run is run


# In a population.


def task(batch_size: int = 16, model: Callable[[], nn.Module] | None = None, loss: Any = "mse") -> fl.Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    y = 3 * torch.tanh(x @ torch.randn(6, 2, generator=generator, dtype=torch.float64))
    return fl.Task("mine", model or mlp, (x, y), loss, "train", fl.metrics.mse(), batch_size).check()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def population(programs: Programs | None, own: fl.Task | None = None, **asked: Any) -> Population:
    own = own or task()
    losses = asked.get("losses", [own.loss])
    chosen = search.configurations(asked.get("optimizers", [SGD]), losses, samples=1, search_seed=0)
    plans = search.trials(chosen, asked.get("seeds", [0, 1]))
    own = own.with_loss(plans[0].configuration.loss)
    return Population(
        own, plans, steps=asked.get("steps", 12), device=CPU, programs=programs, chunk=asked.get("chunk", 2)
    )


SGD = fl.optim.sgd(lr=0.1, momentum=0.9)
COSINE = fl.optim.sgd(lr=fl.schedules.cosine(0.1))
huber = fl.losses.huber
# Two populations whose programs must be told apart.
DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rows": ({"chunk": 2}, {"chunk": 4, "seeds": [0, 1, 2, 3]}),
    "rows that share their mini-batches": (
        {"chunk": 2, "seeds": [0], "optimizers": [fl.optim.sgd(lr=fl.grid([0.1, 0.2]))]},
        {"chunk": 3, "seeds": [0], "optimizers": [fl.optim.sgd(lr=fl.grid([0.1, 0.2, 0.3]))]},
    ),
    "samples": ({"own": task(16)}, {"own": task(12)}),
    "one seed or several": ({"seeds": [0, 1]}, {"seeds": [0], "optimizers": [fl.optim.sgd(lr=fl.grid([0.1, 0.2]))]}),
    "structure": ({}, {"optimizers": [fl.optim.sgd(lr=0.1, momentum=0.9, nesterov=True)]}),
    "steps": ({"optimizers": [COSINE], "steps": 12}, {"optimizers": [COSINE], "steps": 24}),
    "a loss's own number": ({"losses": [huber(delta=0.1)]}, {"losses": [huber(delta=2.0)]}),
    "a loss's swept numbers": (
        {"losses": [huber(delta=0.1)], "seeds": [0, 1]},
        {"losses": [huber(delta=fl.grid([0.1, 2.0]))], "seeds": [0, 1]},
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_programs_of_one_population_do_not_serve_a_different_one(what: str):
    first, second = DIFFERENT[what]
    shared = Programs()
    population(shared, **first).train_steps(6)
    before = len(shared)
    found = population(shared, **second).train_steps(6)
    expected = population(None, **second).train_steps(6)
    assert len(shared) > before
    np.testing.assert_allclose(found, expected, rtol=1e-11)
    assert not np.allclose(expected[-2:], population(None, **first).train_steps(6)[-2:], rtol=1e-4), "both are alike"


def test_each_phase_and_masking_have_programs_of_their_own():
    chosen = {"optimizers": [fl.optim.accumulate(fl.optim.sgd(lr=fl.grid([0.1, 1e308])), every=3)], "seeds": [0, 1]}
    programs = Programs()
    for chunk in (None, 2):
        runs = [population(each, chunk=chunk, **chosen) for each in (programs, None)]
        found, expected = (run.train_steps(12) for run in runs)
        assert np.isfinite(expected).all(axis=1).tolist() == [True, False, True, False]
        np.testing.assert_allclose(found, expected, rtol=1e-11)
        torch.testing.assert_close(runs[0].parameters(0), runs[1].parameters(0), rtol=1e-11, atol=1e-11)
    phases = {(key[3], key[5]) for key in programs.by_key if key[0] == "update"}
    assert {masked for masked, _ in phases} == {True, False}
    assert len({phase for _, phase in phases}) > 1


def test_programs_serve_other_numbers_seeds_and_trials():
    programs = Programs()
    population(programs).train_steps(6)
    made = dict(programs.by_key)
    others = {"optimizers": [fl.optim.sgd(lr=fl.grid([0.5, 0.01, 0.02]), momentum=0.5)], "seeds": [7, 8, 9]}
    found = population(programs, **others)
    losses = found.train_steps(6)
    assert programs.by_key == made
    np.testing.assert_allclose(losses, population(None, **others).train_steps(6), rtol=1e-11)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * (2 if x.mean() > 0 else 1)


def test_a_model_that_can_be_mapped_but_not_traced_runs_as_functions():
    programs = Programs()
    asked = {"seeds": [3], "optimizers": [fl.optim.sgd(lr=fl.grid([0.05, 0.02]))]}
    mapped = population(programs, task(model=Branching), **asked)
    losses = mapped.train_steps(12)
    assert not programs.all_traced
    assert [program.graph is None for program in programs] == [True, False, True], "only the update can be traced"
    assert {program.part.name for program in programs if program.graph is not None} == {"the update of sgd"}
    result = fl.sweep(
        task(model=Branching), asked["optimizers"], seeds=[3], steps=12, engine="sequential", progress=False
    )
    np.testing.assert_allclose(losses, result.history.train_loss, rtol=1e-11)


# The passes over the graph.


@st.composite
def scatterings(draw: st.DrawFn) -> tuple[list[int], int, list[int], int]:
    """The shape of the zeros, a dimension, the index's shape, and how many columns it has."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    columns = draw(st.sampled_from([1, 1, 2]))
    index = [columns if d == dim % len(shape) else size for d, size in enumerate(shape)]
    if len(shape) > 1 and draw(st.booleans()):  # an index need not cover the other dimensions
        other = draw(st.sampled_from([d for d in range(len(shape)) if d != dim % len(shape)]))
        index[other] = draw(st.integers(1, shape[other]))
    return shape, dim, index, draw(st.integers(0, 100))


@settings(max_examples=40, deadline=None)
@given(scatterings(), st.sampled_from([torch.float32, torch.float64, torch.int64]), st.booleans())
def test_a_scattering_gives_the_same_as_a_selection(case, dtype: torch.dtype, larger: bool):
    shape, dim, size, seed = case
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, shape[dim], size, generator=generator)
    values = [n + (larger and d != dim % len(shape)) for d, n in enumerate(size)]  # more than the index asks for
    source = torch.randint(2**40, 2**41, values, generator=generator).to(dtype)

    def scatter(index: Tensor, source: Tensor) -> Tensor:
        return torch.zeros(shape, dtype=dtype).scatter_add(dim, index, source)

    traced = trace(scatter, index, source)
    found, expected = traced(index, source), scatter(index, source)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert expected.count_nonzero() > 0


def scatterings_left(shape: list[int], size: list[int], start: Callable[..., Tensor] = torch.zeros) -> int:
    index, source = torch.zeros(size, dtype=torch.int64), torch.ones(size)
    traced = trace(lambda i, s: start(shape).scatter_add(1, i, s), index, source)
    torch.testing.assert_close(traced(index, source), start(shape).scatter_add(1, index, source))
    return len(traced.graph.find_nodes(op="call_function", target=ATEN.scatter_add.default))


def test_only_one_value_per_row_that_is_added_to_zeros_is_selected():
    assert scatterings_left([3, 5], [3, 1]) == 0
    assert scatterings_left([3, 5], [2, 1]) == 1, "an index of another size is left alone"
    assert scatterings_left([3, 5], [3, 2]) == 1, "several columns may meet at one place"
    assert scatterings_left([3, 5], [3, 1], torch.ones) == 1, "it is not zeros that is added to"


def test_a_view_of_what_is_laid_out_otherwise_is_a_copy():
    traced = trace(lambda x: x.view(12) * 2, torch.randn(3, 4))
    turned = torch.randn(4, 3).mT
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        turned.view(12)
    torch.testing.assert_close(traced(turned), 2 * turned.reshape(12))


def test_writing_to_a_view_reaches_what_it_is_a_view_of():
    def write(x: Tensor) -> Tensor:
        x.view(12).add_(1)
        return x * 2

    ours, theirs = torch.ones(3, 4), torch.ones(3, 4)
    traced = trace(write, torch.ones(3, 4))
    torch.testing.assert_close(traced(ours), write(theirs))
    torch.testing.assert_close(ours, theirs)
