"""Rows may be computed in chunks of any size, and halved when they do not fit: the numbers are the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fallline as fl
from fallline.sweeps import packs, search, stacked
from fallline.sweeps.packs import Block, Job, Pack, PackEnd, train_pack
from fallline.sweeps.programs import Programs
from fallline.sweeps.search import TrialPlan
from fallline.sweeps.stacked import Stacked
from fallline.sweeps.vectorised import Population
from fallline.sweeps.workers import TrainingFailed

CPU = torch.device("cpu")
STEPS = 20
OPTIMIZERS = [
    fl.optim.sgd(lr=fl.grid([0.1, 1e308]), momentum=0.9),
    fl.optim.adam(lr=0.01),
    fl.optim.schedule_free_adamw(lr=0.02),
]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def task(model: Callable[[], nn.Module] = mlp) -> fl.Task:
    """Five batches of 8 and a short one of 2."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(42, 6, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(6, 3, generator=generator, dtype=torch.float64)).argmax(dim=1)
    return fl.Task("mine", model, (x, y), "cross_entropy", (x[:15], y[:15]), fl.metrics.accuracy(), 8).check()


def plans(own: fl.Task, optimizers: list[fl.optim.Optimizer] = OPTIMIZERS, seeds: int = 3) -> list[TrialPlan]:
    chosen = search.configurations(optimizers, [own.loss], samples=1, search_seed=0)
    return search.trials(chosen, list(range(seeds)))


def population(
    own: fl.Task, chosen: list[TrialPlan], chunk: int | None, programs: Programs | None = None
) -> Population:
    return Population(own, chosen, steps=STEPS, device=CPU, programs=programs, chunk=chunk)


Found = dict[int, tuple[np.ndarray, float, float, dict[str, torch.Tensor]]]


def trained(made: Population) -> Found:
    """By trial: its losses, metric, validation loss and final parameters; of those that did not diverge."""
    first = dict(zip(made.rows.tolist(), made.train_steps(STEPS // 2), strict=True))
    made.compact()
    second = dict(zip(made.rows.tolist(), made.train_steps(STEPS - STEPS // 2), strict=True))
    metric, loss = made.evaluate()
    found: Found = {}
    for row in np.flatnonzero(made.alive).tolist():
        trial = int(made.rows[row])
        losses = np.concatenate([first[trial], second[trial]])
        found[trial] = losses, float(metric[row]), float(loss[row]), made.parameters(row)
    return found


def assert_equal(found: Found, expected: Found) -> None:
    assert found.keys() == expected.keys()
    for trial, (losses, metric, loss, parameters) in expected.items():
        np.testing.assert_allclose(found[trial][0], losses, rtol=1e-11)
        assert found[trial][1:3] == (metric, pytest.approx(loss, rel=1e-11))
        torch.testing.assert_close(found[trial][3], parameters, rtol=1e-11, atol=1e-11)
        assert losses[-5:].mean() < losses[:5].mean(), "nothing is learnt"


@pytest.fixture(scope="module")
def expected() -> Found:
    """All twelve rows together; of them three diverge."""
    found = trained(population(task(), plans(task()), None))
    assert sorted(found) == [0, 1, 2, *range(6, 12)]
    return found


@pytest.mark.parametrize("chunk", [1, 2, 3, 8, 40])
def test_chunks_of_any_size_give_the_same(expected: Found, chunk: int):
    assert_equal(trained(population(task(), plans(task()), chunk)), expected)


@pytest.mark.parametrize("chunk", [None, 2, 8])
def test_traced_chunks_give_the_same(expected: Found, chunk: int | None):
    programs = Programs()
    assert_equal(trained(population(task(), plans(task()), chunk, programs)), expected)
    assert programs.all_traced


def test_one_trial_by_itself_gives_the_same(expected: Found):
    result = fl.sweep(task(), OPTIMIZERS, seeds=3, steps=STEPS, engine="sequential", progress=False)
    for trial, (losses, *_) in expected.items():
        np.testing.assert_allclose(result.history.train_loss[trial], losses, rtol=1e-11)


# Rows that fill up a chunk.


def test_copies_that_fill_up_a_chunk_are_not_seen():
    own = task()
    chosen = plans(own, [fl.optim.sgd(lr=fl.grid([0.1, 0.2, 0.3, 0.4, 0.5]))], seeds=1)
    made = population(own, chosen, 4)
    assert made.rows.tolist() == [0, 1, 2, 3, 4]
    losses = made.train_steps(STEPS)
    assert losses.shape == (5, STEPS)
    assert np.isfinite(losses).all()
    assert made.alive.tolist() == [True] * 5
    assert [len(each) for each in made.evaluate()] == [5, 5]
    kept = made.tensors()
    assert kept["rows"].tolist() == [0, 1, 2, 3, 4]
    assert kept["alive"].flatten().tolist() == [True] * 5 + [False] * 3
    again = population(own, chosen, 4)
    again.restore(kept, STEPS)
    assert again.rows.tolist() == [0, 1, 2, 3, 4]
    made.compact()
    assert made.rows.tolist() == [0, 1, 2, 3, 4]
    for row in range(5):
        torch.testing.assert_close(again.parameters(row), made.parameters(row), rtol=0, atol=0)


def test_copies_that_fill_up_a_chunk_after_trials_have_left_are_not_alive():
    own = task()
    made = population(own, plans(own, [fl.optim.sgd(lr=fl.grid([0.1, 0.2, 0.3, 1e308, 1.1e308, 1.2e308]))], seeds=1), 2)
    made.train_steps(5)
    made.compact()
    assert made.rows.tolist() == [0, 1, 2]
    assert made.tensors()["alive"].flatten().tolist() == [True, True, True, False]


def test_a_pack_records_only_its_own_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packs, "SECONDS_PER_PIECE", 0.0)
    own = task()
    chosen = plans(own, [fl.optim.sgd(lr=fl.grid([0.1, 0.2, 1e308, 0.4, 0.5]), momentum=0.9)], seeds=1)
    found = {}
    for chunk in (4, None):
        folder = tmp_path / str(chunk)
        (folder / "parameters").mkdir(parents=True)
        job = Job(own, chosen, "vectorised", CPU, STEPS, STEPS // 2, folder, "all", None, chunk)
        blocks: list[Block] = []
        for _ in range(20):
            asked = iter([False] * 3)  # stops in the middle of a block, again and again
            messages = list(train_pack(job, Pack(0, (0, 1, 2, 3, 4)), lambda asked=asked: next(asked, True)))
            blocks += [each for each in messages if isinstance(each, Block)]
            assert isinstance(messages[-1], PackEnd)
            if messages[-1].complete:
                break
        assert [block.trials.tolist() for block in blocks] == [[0, 1, 2, 3, 4], [0, 1, 3, 4]]
        assert sorted(file.stem for file in (folder / "parameters").iterdir()) == [f"{i:06d}" for i in range(5)]
        found[chunk] = blocks
    for ours, theirs in zip(found[4], found[None], strict=True):
        for name in ("train_loss", "metric", "validation_loss"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-11, err_msg=name)


# Rows that do not fit.


def does_not_fit(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, rows_of: Callable[..., int], most: int, *, after: int = 0
) -> list[int]:
    """Lets more than so many rows run out of memory, after so many calls; returns the rows that were tried."""
    original = getattr(where, name)
    tried: list[int] = []

    def limited(*given: Any) -> Any:
        tried.append(rows_of(*given))
        if tried[-1] > most and len(tried) > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(*given)

    monkeypatch.setattr(where, name, limited)
    return tried


WAYS: dict[str, tuple[Any, str, Callable[..., int]]] = {
    "in the forward pass": (Stacked, "differentiate", lambda self, params, slopes, alive, batch: len(alive)),
    "in the backward pass": (stacked, "gradients", lambda loss, params: len(next(iter(params.values())))),
    "while it is evaluated": (Population, "_evaluate", lambda self, chunk, flat: len(flat)),
}


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("way", WAYS)
def test_what_does_not_fit_is_halved_and_nothing_is_lost(
    expected: Found, monkeypatch: pytest.MonkeyPatch, way: str, most: int, chunk: int | None
):
    made = population(task(), plans(task()), chunk)
    tried = does_not_fit(monkeypatch, *WAYS[way], most)
    assert_equal(trained(made), expected)
    assert (max(tried) > most) is (chunk is None or chunk > most)
    # A size that did not fit is not tried again, until trials have left.
    assert sum(rows > most for rows in tried) <= 2 * 12


@pytest.mark.parametrize("chunk", [None, 6])
def test_what_does_not_fit_later_goes_on_from_there(
    expected: Found, monkeypatch: pytest.MonkeyPatch, chunk: int | None
):
    """As where something else takes the memory in the meantime."""
    made = population(task(), plans(task()), chunk)
    tried = does_not_fit(monkeypatch, *WAYS["in the forward pass"], 4, after=7)
    assert_equal(trained(made), expected)
    assert min(tried[:7]) > 4
    assert max(tried[-7:]) <= 4


def test_evaluation_alone_that_does_not_fit_leaves_training_as_it_was(expected: Found, monkeypatch):
    made = population(task(), plans(task()), None)
    made.train_steps(3)
    whole = made.evaluate()
    does_not_fit(monkeypatch, *WAYS["while it is evaluated"], 2)
    np.testing.assert_allclose(made.evaluate(), whole, rtol=1e-11)
    losses = made.train_steps(STEPS - 3)
    np.testing.assert_allclose(losses[made.rows == 7][0], expected[7][0][3:], rtol=1e-11)


@pytest.mark.parametrize("way", WAYS)
def test_a_single_row_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch, way: str):
    made = population(task(), plans(task()), None)
    does_not_fit(monkeypatch, *WAYS[way], 0)
    said = "a single trial with its mini-batch of 8 does not fit into the memory of cpu: give a smaller batch_size"
    with pytest.raises(torch.OutOfMemoryError, match=said):
        trained(made)


def test_a_sweep_whose_single_trials_do_not_fit_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    does_not_fit(monkeypatch, *WAYS["in the forward pass"], 0)
    with pytest.raises(TrainingFailed, match=re.escape("OutOfMemoryError: a single trial with its mini-batch of 8")):
        fl.sweep(task(), OPTIMIZERS, seeds=2, steps=4, engine="vectorised", workers=1, progress=False,
                 out=tmp_path / "run")  # fmt: skip
    assert not (tmp_path / "run").exists()


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_statistics_are_counted_once_where_the_backward_pass_does_not_fit(monkeypatch: pytest.MonkeyPatch):
    own = task(batch_norm)
    chosen = plans(own, [fl.optim.sgd(lr=0.1)])
    whole, cut = (population(own, chosen, None) for _ in range(2))
    whole.train_steps(STEPS)
    does_not_fit(monkeypatch, *WAYS["in the backward pass"], 1)
    cut.train_steps(STEPS)
    assert int(whole.parameters(0)["1.num_batches_tracked"]) == STEPS
    for row in range(3):
        torch.testing.assert_close(cut.parameters(row), whole.parameters(row), rtol=1e-11, atol=1e-11)


def test_no_update_is_made_twice_where_a_later_one_does_not_fit(expected: Found, monkeypatch: pytest.MonkeyPatch):
    """The rows of one chunk have several optimizers, and the second needs more memory than the first."""
    original = Stacked.update
    tried = []

    def limited(self: Stacked, optimizer: fl.optim.Optimizer, *given: Any) -> None:
        alive = given[4]
        if optimizer.name == "sgd":
            tried.append(len(alive))
            if len(alive) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        original(self, optimizer, *given)

    monkeypatch.setattr(Stacked, "update", limited)
    made = population(task(), plans(task()), None)
    assert_equal(trained(made), expected)
    assert max(tried) > 2


def test_rows_of_one_seed_lie_together_and_share_their_mini_batch(monkeypatch: pytest.MonkeyPatch):
    own = task()
    chosen = plans(own, [fl.optim.sgd(lr=fl.grid([0.01, 0.1]), momentum=0.9)])
    seen: list[tuple[int | None, torch.Size]] = []
    original = Stacked.differentiate

    def noted(self: Stacked, params: Any, slopes: Any, alive: Any, batch: stacked.Batch) -> torch.Tensor:
        seen.append((batch.dim, batch.x.shape))
        return original(self, params, slopes, alive, batch)

    monkeypatch.setattr(Stacked, "differentiate", noted)
    by_chunk = {chunk: trained(population(own, chosen, chunk)) for chunk in (2, 4)}
    assert {shape[0] for dim, shape in seen if dim is None} == {8, 2}, "one mini-batch for both trials of a seed"
    assert {dim for dim, _ in seen} == {None, 0}, "four rows are of two seeds"
    assert_equal(by_chunk[2], by_chunk[4])


def test_chunks_of_one_seed_each_leave_as_a_whole():
    """Their programs are for one mini-batch; rows of two seeds would need others."""
    own = task()
    of_two = plans(own, [fl.optim.sgd(lr=fl.grid([0.1, 1e308]))])
    chosen = [plan for plan in of_two if (plan.seed == 1) <= (plan.configuration.settings["lr"] == 1e308)]
    chosen += [TrialPlan(9, chosen[-1].configuration, 1)]
    programs = Programs()
    made = population(own, chosen, 2, programs)
    assert made.seeds == [0, 0, 1, 1, 2, 2]
    made.train_steps(6)
    keys = set(programs.by_key)
    made.compact()
    assert made.seeds == [0, 0, 2, 2], "of seed 1 nothing was left, of the others one trial each"
    assert made.alive.tolist() == [True, False, True, False]
    assert np.isfinite(made.train_steps(6)).any(axis=1).tolist() == [True, False, True, False]
    assert set(programs.by_key) == keys
