"""One sweep of optimizers that share nothing but the sweep: every trial is what it is alone, and what plain PyTorch is.

Schedule-free optimizers are evaluated at other weights than those that they train, and Prodigy and D-Adaptation learn
one number over all parameters: neither may reach another trial, and every way of training must evaluate alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import prodigyopt
import pytest
import schedulefree
import torch
from torch import nn

import fallline as fl
from dadapt_adam import DAdaptAdam
from fallline.sweeps import packs, search
from fallline.sweeps.programs import Programs
from fallline.sweeps.vectorised import Population
from fallline.training import fit as fitting
from fallline.training.interrupt import Interrupt
from small_sweep import assert_same

STEPS = 40
EVERY = 20
SEEDS = [0, 3]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Entry:
    """One of our optimizers, and the optimizer of torch's kind that it must equal, where there is one."""

    ours: fl.optim.Optimizer
    theirs: Callable[..., torch.optim.Optimizer] | None

    def __str__(self) -> str:
        return repr(self.ours).removeprefix("fl.optim.")


def entry(name: str, reference: Callable[..., torch.optim.Optimizer] | None, **arguments) -> Entry:
    theirs = None if reference is None else lambda params: reference(params, **arguments)
    return Entry(getattr(fl.optim, name)(**arguments), theirs)


ENTRIES = [
    entry("adam", torch.optim.Adam, lr=0.003),
    entry("schedule_free_adamw", schedulefree.AdamWScheduleFree, lr=0.003, weight_decay=0.01),
    entry("schedule_free_adamw", schedulefree.AdamWScheduleFree, lr=0.02, betas=(0.8, 0.99), warmup_steps=10),
    entry("sgd", torch.optim.SGD, lr=0.05, momentum=0.9),
    entry("schedule_free_sgd", schedulefree.SGDScheduleFree, lr=0.2, weight_decay=0.01),
    entry("schedule_free_sgd", schedulefree.SGDScheduleFree, lr=1.0, momentum=0.8, warmup_steps=15, r=1.0),
    entry("prodigy", prodigyopt.Prodigy, d0=1e-4, weight_decay=0.01),
    entry("prodigy", prodigyopt.Prodigy, lr=0.5, d0=1e-3, use_bias_correction=True),
    entry("d_adaptation", DAdaptAdam, d0=1e-4, growth_rate=1.3),
    entry("d_adaptation", DAdaptAdam, lr=0.3, d0=1e-3, weight_decay=0.01),
    *([entry("muon_with_adamw", None, lr=0.01)] if hasattr(fl.optim, "muon_with_adamw") else []),
]
SCHEDULE_FREE = [e for e in ENTRIES if e.ours.moves_evaluation]


def sweep(dtype: torch.dtype, optimizers=None, **settings) -> fl.Result:
    asked = {"seeds": SEEDS, "steps": STEPS, "evaluate_every": EVERY, "keep_parameters": "all", "workers": 1}
    optimizers = [e.ours for e in ENTRIES] if optimizers is None else optimizers
    return fl.sweep(fl.tasks.digits(dtype=dtype), optimizers, progress=False, **{**asked, **settings})


def evaluated(optimizer, model, task) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Metric, loss and weights of a plain model in evaluation mode, the optimizer's mode included."""
    modes = hasattr(optimizer, "eval")
    if modes:
        optimizer.eval()
    with torch.no_grad():
        logits = model(task.validation.x)
        metric = float((logits.argmax(1) == task.validation.y).double().mean())
        loss = float(nn.functional.cross_entropy(logits, task.validation.y))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    if modes:
        optimizer.train()
    return metric, loss, weights


def plain(e: Entry, task, seed: int):
    """The loop as their authors have it: losses, evaluations, the weights at the end, and those trained."""
    torch.manual_seed(seed)
    model = task.model()
    optimizer = e.theirs(list(model.parameters()))
    if hasattr(optimizer, "train"):
        optimizer.train()
    order = torch.Generator().manual_seed(seed)
    losses, evaluations = [], []
    while len(losses) < STEPS:
        for index in torch.randperm(len(task.train.x), generator=order).split(task.batch_size):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(task.train.x[index]), task.train.y[index])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if len(losses) % EVERY == 0:
                evaluations.append(evaluated(optimizer, model, task))
            if len(losses) == STEPS:
                break
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    return np.array(losses), evaluations, trained


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in b)


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def mixed(request) -> tuple[torch.dtype, float, fl.Result]:
    """Of each dtype, the tolerance and the sweep."""
    tolerance = 1e-9 if request.param == torch.float64 else 5e-3
    return request.param, tolerance, sweep(request.param)


def assert_equal(result: fl.Result, trial: int, other: fl.Result, theirs: int, tolerance: float, name: str) -> None:
    for column in ("train_loss", "validation_loss", "metric"):
        mine, expected = getattr(result.history, column)[trial], getattr(other.history, column)[theirs]
        rough = 0.02 if column == "metric" and tolerance > 1e-6 else tolerance  # a handful of digits may tip over
        np.testing.assert_allclose(mine, expected, rtol=tolerance, atol=rough, err_msg=f"{name}: {column}")
    assert distance(result.parameters(trial), other.parameters(theirs)) < of_parameters(name, tolerance), name


def of_parameters(name: str, tolerance: float) -> float:
    """Muon's products are taken in bfloat16: round-off of a float32 gradient may come out as a step of 2⁻⁸."""
    return 8 * tolerance if name.startswith("muon") and tolerance > 1e-6 else tolerance


def test_the_sweep_is_one_of_several_kinds(mixed):
    _, _, result = mixed
    assert result.spec["engine"] == "vectorised"
    assert (result.trials["status"] == "completed").all()
    assert len({e.ours.structure for e in ENTRIES}) >= 6
    ends = result.history.train_loss[:, -1]
    assert len(np.unique(ends)) == len(ends)
    assert (ends < 0.95 * result.history.train_loss[:, 0]).all(), "they should all have learnt something"


def test_every_trial_equals_the_plain_loop_of_its_authors(mixed):
    dtype, tolerance, result = mixed
    task = fl.tasks.digits(dtype=dtype).check()
    for number, e in enumerate(ENTRIES):
        if e.theirs is None:
            continue
        for position, seed in enumerate(SEEDS):
            trial = number * len(SEEDS) + position
            losses, evaluations, trained = plain(e, task, seed)
            np.testing.assert_allclose(result.history.train_loss[trial], losses, tolerance, tolerance, err_msg=str(e))
            for column, (metric, loss, _) in enumerate(evaluations):
                assert result.history.validation_loss[trial, column] == pytest.approx(loss, rel=tolerance), e
                rough = 0.02 if dtype == torch.float32 else 1e-12
                assert result.history.metric[trial, column] == pytest.approx(metric, abs=rough), e
            _, _, weights = evaluations[-1]
            assert distance(result.parameters(trial), weights) < tolerance, e
            if e in SCHEDULE_FREE:
                assert distance(trained, weights) > 1e-3, "evaluation weights that are the trained ones prove nothing"


def test_every_trial_is_the_same_in_the_other_engine(mixed):
    dtype, tolerance, result = mixed
    one_by_one = sweep(dtype, engine="sequential")
    for trial in range(len(result.trials)):
        assert_equal(result, trial, one_by_one, trial, tolerance, str(ENTRIES[trial // len(SEEDS)]))


def test_every_trial_is_the_same_in_a_sweep_alone(mixed):
    dtype, tolerance, result = mixed
    for number, e in enumerate(ENTRIES):
        alone = sweep(dtype, [e.ours], seeds=[SEEDS[1]])
        assert_equal(result, number * len(SEEDS) + 1, alone, 0, tolerance, str(e))


def test_every_trial_is_what_fit_returns(mixed):
    dtype, tolerance, result = mixed
    task = fl.tasks.digits(dtype=dtype)
    for number, e in enumerate(ENTRIES):
        trial = number * len(SEEDS) + 1
        run = fl.fit(task, e.ours, steps=STEPS, seed=SEEDS[1], progress=False)
        np.testing.assert_allclose(run.history.train_loss, result.history.train_loss[trial], tolerance, tolerance)
        assert run.history.validation_loss[-1] == pytest.approx(result.history.validation_loss[trial, -1], tolerance)
        apart = distance(dict(run.model.state_dict()), result.parameters(trial))
        assert apart < of_parameters(e.ours.name, tolerance), e


def test_the_parameters_of_a_trial_are_those_that_were_evaluated(mixed):
    dtype, _, result = mixed
    task = fl.tasks.digits(dtype=dtype).check()
    for trial in range(len(result.trials)):
        model = task.model()
        model.load_state_dict(result.parameters(trial))
        metric, loss, _ = evaluated(None, model, task)
        assert loss == pytest.approx(result.history.validation_loss[trial, -1], rel=1e-5)
        assert metric == pytest.approx(result.history.metric[trial, -1], abs=1e-6)


@pytest.mark.parametrize("engine", ["vectorised", "sequential"])
def test_a_diverged_trial_keeps_the_evaluation_weights_of_before(engine: str):
    hopeless = [fl.optim.schedule_free_sgd(lr=1e30), fl.optim.schedule_free_adamw(lr=1e30), fl.optim.sgd(lr=1e30)]
    hopeful = [e.ours for e in ENTRIES] if engine == "vectorised" else []  # so that few enough diverge to stay
    result = sweep(torch.float32, [*hopeless, *hopeful], seeds=[0], engine=engine)
    assert result.trials["status"].to_list()[:3] == ["diverged"] * 3
    task = fl.tasks.digits().check()
    start = task.build_model(0).state_dict()
    for trial in range(3):
        assert all(p.isfinite().all() for p in result.parameters(trial).values())
        assert distance(result.parameters(trial), start) > 1e20


def plans(task):
    return search.trials(search.configurations([e.ours for e in ENTRIES], [task.loss], samples=1, search_seed=0), SEEDS)


def test_tracing_changes_nothing():
    task = fl.tasks.digits(dtype=torch.float64).check()
    runs, programs = [], Programs()
    for kept in (None, programs):
        population = Population(task, plans(task), steps=STEPS, device=CPU, programs=kept)
        losses = population.train_steps(STEPS)
        runs.append((losses, population.evaluate(), [population.parameters(row) for row in range(len(losses))]))
    assert programs.all_traced
    np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=1e-9)
    np.testing.assert_allclose(runs[0][1], runs[1][1], rtol=1e-9)
    assert max(distance(a, b) for a, b in zip(runs[0][2], runs[1][2], strict=True)) < 1e-9


@pytest.fixture
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of some trials, written and checkpointed after every block."""
    monkeypatch.setattr("fallline.sweeps.running.SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr(packs, "LARGEST_PACK", {"cpu": 8, "cuda": 8})
    monkeypatch.setattr(packs, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)


def stop_after(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """Ctrl-C after so many blocks, as the engine sees it."""
    asked = iter(range(blocks))
    requested = property(lambda self: blocks > 0 and next(asked, None) is None, lambda self, value: None)
    monkeypatch.setattr(Interrupt, "requested", requested, raising=False)


@pytest.mark.usefixtures("small_packs")
@pytest.mark.parametrize("engine", ["vectorised", "sequential"])
def test_a_mixed_sweep_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path, monkeypatch, engine: str):
    settings = {"engine": engine, "steps": 30, "evaluate_every": 10}
    whole = sweep(torch.float32, out=tmp_path / "whole", **settings)
    stop_after(monkeypatch, 5)
    part = sweep(torch.float32, out=tmp_path / "part", **settings)
    assert not part.complete
    assert list((tmp_path / "part" / "packs").iterdir())
    stop_after(monkeypatch, 0)
    resumed = sweep(torch.float32, out=tmp_path / "part", resume=True, **settings)
    assert resumed.complete
    assert_same(resumed, whole)


class Stop(Exception):
    """The process ends here."""


def noisy_task() -> fl.Task:
    """Dropout and batch normalisation: random numbers and buffers are part of what must be kept."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=g)
    model = lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))  # noqa: E731
    return fl.Task("noisy", model, (x, x.sum(1, keepdim=True)), "mse", batch_size=8)


STATEFUL = [e.ours for e in ENTRIES if e.ours.name not in ("adam", "sgd")]


@pytest.mark.parametrize("optimizer", STATEFUL, ids=repr)
def test_a_fit_that_was_killed_goes_on_bit_for_bit(tmp_path: Path, monkeypatch, optimizer):
    monkeypatch.setattr(fitting, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)

    def stop(report: fitting.EpochReport) -> None:
        if report.epoch == 4:
            raise Stop

    settings = {"epochs": 8, "seed": 3, "patience": 5, "progress": False}
    with pytest.raises(Stop):
        fl.fit(noisy_task(), optimizer, out=tmp_path / "run", on_epoch=stop, **settings)
    resumed = fl.fit(noisy_task(), optimizer, out=tmp_path / "run", resume=True, **settings)
    whole = fl.fit(noisy_task(), optimizer, **settings)
    for name in ("train_loss", "metric", "validation_loss"):
        np.testing.assert_array_equal(getattr(resumed.history, name), getattr(whole.history, name), name)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("patience", [None, 4])
@pytest.mark.parametrize("lr", [0.05, 0.5])
def test_fit_returns_the_model_that_was_evaluated(lr: float, patience: int | None):
    task = noisy_task()
    run = fl.fit(task, fl.optim.schedule_free_adamw(lr=lr), epochs=60, patience=patience, progress=False)
    expected = run.history.metric[-1] if patience is None else run.history.metric.min()
    model = run.model.eval()
    with torch.no_grad():
        assert float(task.metric(model(task.validation.x), task.validation.y)) == expected
