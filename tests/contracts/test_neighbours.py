"""Invariant 2: a trial does not depend on its neighbours, its pack, its engine, or on being traced."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

import fallline as fl
from fallline.sweeps import engines, packs, search
from fallline.sweeps.programs import Programs
from fallline.sweeps.search import TrialPlan
from fallline.sweeps.vectorised import Population
from plain_loop import PAIRS

CPU = torch.device("cpu")
CLIPPED = fl.optim.chain(
    fl.optim.clip_by_global_norm(0.5), fl.optim.scale_by_adam(), fl.optim.scale_by_learning_rate(0.01)
)


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 8, generator=generator, dtype=dtype)
    return x, (x.sum(1) > 0).long()


def classification(model, dtype=torch.float64, **arguments):
    return fl.Task("test", model, data(dtype), "cross_entropy", batch_size=16, **arguments).check()


def mlp():
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 2)).double()


def plans(task, optimizers, seeds):
    return search.trials(search.configurations(optimizers, [task.loss], samples=1, search_seed=0), seeds)


def last_losses(result):
    return result.history.train_loss[:, -1]


def test_a_trial_alone_equals_the_same_trial_among_many_others_and_beside_diverging_ones():
    task = classification(mlp)
    alone = fl.sweep(task, [fl.optim.adam(lr=0.01)], seeds=[5], steps=40, keep_parameters="all")
    crowd = [fl.optim.sgd(lr=fl.grid([1e308, 0.1, 1.0])), *(pair.ours for pair in PAIRS), fl.optim.adam(lr=0.01)]
    many = fl.sweep(task, crowd, seeds=[1, 5, 9], steps=40, keep_parameters="all")
    assert (many.trials["status"] == "diverged").sum() == 3
    trial = len(many.trials) - 2
    assert many.trials.row(trial, named=True)["seed"] == 5
    np.testing.assert_allclose(many.history.train_loss[trial], alone.history.train_loss[0], rtol=1e-11)
    for name, value in alone.parameters(0).items():
        torch.testing.assert_close(many.parameters(trial)[name], value, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_cut_into_packs_and_the_number_of_workers_do_not_matter(monkeypatch, workers):
    task = classification(mlp)
    optimizers = [fl.optim.sgd(lr=fl.log_grid(0.01, 1, 3)), fl.optim.adam(lr=0.01)]
    whole = fl.sweep(task, optimizers, seeds=3, steps=30, workers=1)
    monkeypatch.setitem(packs.LARGEST_PACK, "cpu", 5)
    cut = fl.sweep(task, optimizers, seeds=3, steps=30, workers=workers)
    assert len(cut.spec["packs"]) > len(whole.spec["packs"])
    assert cut.spec["workers"] == workers
    np.testing.assert_allclose(cut.history.train_loss, whole.history.train_loss, rtol=1e-11)
    np.testing.assert_allclose(cut.history.metric, whole.history.metric)


@pytest.mark.parametrize("optimizer", [CLIPPED, fl.optim.adam(lr=fl.schedules.cosine(0.05)), fl.optim.lion(lr=0.003)])
def test_engines_agree(optimizer):
    task = classification(mlp)
    results = [fl.sweep(task, [optimizer], seeds=2, steps=40, engine=e) for e in ("vectorised", "sequential")]
    np.testing.assert_allclose(*(result.history.train_loss for result in results), rtol=1e-10)
    np.testing.assert_allclose(*(result.history.metric for result in results), rtol=1e-10)


@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.Sequential(nn.Linear(8, 12), nn.Dropout(0.3), nn.ReLU(), nn.Linear(12, 2)).double(),
        lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.LSTM(4, 3, num_layers=2, dropout=0.4), Last()).double(),
    ],
    ids=["dropout", "lstm"],
)
def test_what_a_model_draws_is_what_it_draws_in_a_plain_loop(model, tmp_path):
    """And as everything else it is the trial's own: alone, beside others, traced, chunk by chunk, and resumed."""
    task = classification(model)
    optimizers = [fl.optim.sgd(lr=fl.grid([0.3, 1e308])), fl.optim.adam(lr=0.01)]
    chosen = plans(task, optimizers, [4, 7])
    expected = []
    for plan in chosen:
        torch.manual_seed(plan.seed)
        net = task.model()
        own = plan.configuration.optimizer.as_torch(net.parameters())
        order = torch.Generator().manual_seed(plan.seed)
        losses = []
        while len(losses) < 20:
            for index in torch.randperm(len(task.train.x), generator=order).split(16):
                own.zero_grad()
                loss = nn.functional.cross_entropy(net(task.train.x[index]), task.train.y[index])
                loss.backward()
                own.step()
                losses.append(loss.item())
        expected.append(losses[:20])
    expected = np.where(np.isfinite(np.maximum.accumulate(expected, axis=1)), expected, np.nan)
    for programs, chunk in ((None, None), (Programs(), None), (Programs(), 4)):
        population = Population(task, chosen, steps=20, device=CPU, programs=programs, chunk=chunk)
        losses = population.train_steps(20)
        good = np.isfinite(expected[population.rows])
        np.testing.assert_allclose(losses[good], expected[population.rows][good], rtol=1e-10)
        assert programs is None or programs.all_traced
    alone = fl.sweep(task, [fl.optim.adam(lr=0.01)], seeds=[7], steps=20, engine="vectorised")
    np.testing.assert_allclose(alone.history.train_loss[0], expected[5], rtol=1e-10)
    whole = Population(task, chosen, steps=20, device=CPU)
    whole.train_steps(8)
    whole.compact()
    kept = whole.tensors()
    rest = whole.train_steps(12)
    again = Population(task, chosen, steps=20, device=CPU)
    again.restore(kept, 8)
    np.testing.assert_array_equal(again.train_steps(12), rest)


def test_a_model_that_draws_trains_one_by_one_under_an_optimizer_that_looks_around():
    task = classification(lambda: nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double())
    around = [fl.optim.sam(fl.optim.sgd(lr=0.1)), fl.optim.sgd(lr=0.1)]
    with pytest.warns(fl.errors.TrainedSequentially, match="sam looks at other parameters"):
        result = fl.sweep(task, around, seeds=2, steps=5)
    assert result.spec["engine"] == "sequential"
    with pytest.raises(fl.errors.InvalidSweep, match="sam looks at other parameters"):
        fl.sweep(task, around, seeds=2, steps=5, engine="vectorised")


def test_batch_norm_keeps_its_statistics_per_trial():
    task = classification(lambda: nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 2)).double())
    results = [
        fl.sweep(task, [fl.optim.sgd(lr=0.3)], seeds=2, steps=20, engine=e, keep_parameters="all")
        for e in ("vectorised", "sequential")
    ]
    np.testing.assert_allclose(*(result.history.validation_loss for result in results), rtol=1e-9)
    for trial in (0, 1):
        ours, theirs = (result.parameters(trial) for result in results)
        assert int(ours["1.num_batches_tracked"]) == 20
        assert (ours["1.running_mean"]).abs().max() > 1e-3
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-9)


def test_parameters_that_the_loss_does_not_use_stay_as_they_are_despite_weight_decay():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 2), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    task = classification(lambda: Unused().double())
    start = task.build_model(0).state_dict()
    for engine in ("vectorised", "sequential"):
        result = fl.sweep(task, [fl.optim.sgd(lr=0.1, weight_decay=0.5)], seeds=1, steps=5, engine=engine)
        end = result.parameters(0)
        torch.testing.assert_close(end["unused.weight"], start["unused.weight"], rtol=0, atol=0)
        assert (end["used.weight"] - start["used.weight"]).abs().max() > 1e-3


def test_tracing_changes_nothing():
    task = classification(mlp)
    chosen = plans(task, [fl.optim.sgd(lr=fl.grid([0.1, 1e308])), fl.optim.adam(lr=0.01), CLIPPED], [0, 1])
    runs = []
    programs = Programs()
    for kept in (None, programs):
        population = Population(task, chosen, steps=30, device=CPU, programs=kept)
        losses = population.train_steps(30)
        runs.append((population, losses))
    kinds = Counter(program.part.name for program in programs)
    assert kinds.pop("the forward and backward pass") == 2, "one for whole batches and one for the short last one"
    assert sorted(kinds.values()) == [1, 1, 2], "the update of sgd needs one for when all are alive, and one that masks"
    assert programs.all_traced
    np.testing.assert_allclose(runs[0][1], runs[1][1], rtol=1e-11)
    assert np.isnan(runs[0][1]).any()
    torch.testing.assert_close(runs[0][0]._flat, runs[1][0]._flat, rtol=1e-11, atol=1e-11)


def test_diverged_trials_are_frozen_and_leave_the_population():
    task = classification(mlp)
    chosen = plans(task, [fl.optim.sgd(lr=fl.grid([0.1, 1e308])), fl.optim.sgd(lr=0.2)], [0, 1])
    population = Population(task, chosen, steps=50, device=CPU)
    losses = population.train_steps(3)
    good = [trial not in (2, 3) for trial in population.rows.tolist()]
    assert population.alive.tolist() == good
    (row, _) = np.flatnonzero(~np.array(good)).tolist()
    frozen = population.parameters(row)
    bad = ~np.isfinite(losses)
    assert (bad.sum(axis=1) == 0).tolist() == good
    population.train_steps(3)
    for name, value in population.parameters(row).items():
        torch.testing.assert_close(value, frozen[name], rtol=0, atol=0, equal_nan=True)
    population.compact()
    assert sorted(population.rows.tolist()) == [0, 1, 4, 5]
    assert np.isfinite(population.train_steps(3)).all()


def test_who_stays_when_others_leave_goes_on_as_before():
    task = classification(mlp)
    every = plans(task, [fl.optim.sgd(lr=fl.grid([0.1, 1e308, 0.3]), momentum=0.9), fl.optim.adam(lr=0.01)], [0, 1])
    chosen = [plan for plan in every if plan.index != 2]  # one diverging trial, so that rows shift against seeds
    runs = []
    for compacts in (False, True):
        population = Population(task, chosen, steps=50, device=CPU)
        population.train_steps(8)
        stays = np.flatnonzero(population.alive)
        if compacts:
            population.compact()
            assert len(population.rows) == 6
        losses = population.train_steps(20)
        runs.append(losses if compacts else losses[stays])
        metric, _ = population.evaluate()
        runs.append(metric if compacts else metric[stays])
    np.testing.assert_allclose(runs[0], runs[2], rtol=1e-11)
    np.testing.assert_allclose(runs[1], runs[3])
    assert len(np.unique(runs[0][:, -1])) == 6


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, x):
        return self.layer(x) * (1 if x.mean() > 0 else -1)


class Bounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 2, max_norm=1.0)

    def forward(self, x):
        return self.table((x > 0).sum(1))


@pytest.mark.parametrize(
    ("model", "who", "why"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 4), nn.RReLU(), nn.Linear(4, 2)), "RReLU '1'", "random numbers"),
        (Branching, "Branching", "depends on the data"),
        (lambda: Bounded(), "Embedding 'table'", "max_norm"),
    ],
    ids=["rrelu", "branching", "max_norm"],
)
def test_a_model_that_cannot_be_vectorised_is_named_and_trained_sequentially(model, who, why):
    task = classification(model, torch.float32)
    with pytest.warns(fl.errors.TrainedSequentially, match=why) as warned:
        result = fl.sweep(task, [fl.optim.adam(lr=0.01)], seeds=2, steps=10)
    assert who in str(warned[0].message)
    assert result.spec["engine"] == "sequential"
    assert who in result.spec["engine_reason"]
    assert (result.trials["status"] == "completed").all()
    with pytest.raises(fl.errors.InvalidSweep, match="cannot be vectorised"):
        fl.sweep(task, [fl.optim.adam(lr=0.01)], seeds=2, steps=10, engine="vectorised")


class Last(nn.Module):
    def forward(self, outputs):
        return outputs[0][:, -1]


def test_dropout_draws_what_the_plain_loop_draws_whatever_trains_beside_it():
    def model():
        return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 2)).double()

    task = classification(model)
    result = fl.sweep(
        task,
        [fl.optim.sgd(lr=0.1), fl.optim.sgd(lr=0.5)],
        seeds=[3, 4],
        steps=30,
        evaluate_every=7,
        engine="sequential",
    )
    torch.manual_seed(4)
    plain = model()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    order = torch.Generator().manual_seed(4)
    losses = []
    while len(losses) < 30:
        for index in torch.randperm(len(task.train.x), generator=order).split(16)[: 30 - len(losses)]:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(plain(task.train.x[index]), task.train.y[index])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    np.testing.assert_allclose(result.history.train_loss[3], losses, rtol=1e-10)


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    fl.sweep(classification(mlp), [fl.optim.sgd(lr=0.1)], seeds=2, steps=3)
    fl.fit(classification(mlp), fl.optim.sgd(lr=0.1), epochs=1)
    torch.testing.assert_close(torch.rand(3), expected)


def test_a_population_goes_on_from_its_tensors_bit_for_bit():
    task = classification(lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double())
    chosen = plans(
        task, [fl.optim.sgd(lr=fl.grid([0.1, 1e308]), momentum=0.9), fl.optim.adam(lr=0.01), CLIPPED], [0, 1]
    )
    whole = Population(task, chosen, steps=40, device=CPU)
    whole.train_steps(15)
    whole.compact()
    saved = {name: tensor.clone() for name, tensor in whole.tensors().items()}
    rest = whole.train_steps(25)

    again = Population(task, chosen, steps=40, device=CPU)
    again.restore(saved, 15)
    assert again.rows.tolist() == whole.rows.tolist()
    np.testing.assert_array_equal(again.train_steps(25), rest)
    for row in range(len(whole.rows)):
        for name, value in whole.parameters(row).items():
            torch.testing.assert_close(again.parameters(row)[name], value, rtol=0, atol=0)


def test_a_trial_goes_on_from_its_tensors_bit_for_bit():
    task = classification(lambda: nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.3), nn.Linear(6, 2)))
    plan = TrialPlan(0, search.configurations([fl.optim.adam(lr=0.01)], [task.loss], samples=1, search_seed=0)[0], 7)
    whole = engines.Alone(task, [plan], steps=40, device=CPU)
    whole.train_steps(15)
    saved = {name: tensor.clone() for name, tensor in whole.tensors().items()}
    rest = whole.train_steps(25)
    again = engines.Alone(task, [plan], steps=40, device=CPU)
    again.restore(saved, 15)
    np.testing.assert_array_equal(again.train_steps(25), rest)


def test_round_off_in_adaptive_updates_does_not_keep_a_step_from_being_traced():
    task = fl.tasks.digits().check()
    optimizers = [fl.optim.adam(lr=fl.log_grid(1e-5, 1e-1, 6)), fl.optim.lion(lr=1e-3), fl.optim.rmsprop(lr=1e-2)]
    programs = Programs()
    population = Population(task, plans(task, optimizers, range(4, 9)), steps=30, device=CPU, programs=programs)
    population.train_steps(24)
    assert len(programs) == 2 + 3
    assert programs.all_traced


def test_products_one_after_the_other_are_traced_too():
    task = classification(
        lambda: nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 5, bias=False), nn.Linear(5, 2))
    )
    programs = Programs()
    chosen = plans(task, [fl.optim.sgd(lr=0.1)], [0, 1])
    traced = Population(task, chosen, steps=10, device=CPU, programs=programs).train_steps(10)
    assert programs.all_traced
    np.testing.assert_allclose(traced, Population(task, chosen, steps=10, device=CPU).train_steps(10), rtol=1e-5)


def test_a_traced_step_that_computes_something_else_is_not_used(monkeypatch):
    task = classification(mlp)
    wrong = lambda function, *examples: lambda *arguments: function(arguments[0] * 1.5, *arguments[1:])  # noqa: E731
    monkeypatch.setattr("fallline.sweeps.programs.trace", wrong)
    chosen = plans(task, [fl.optim.adam(lr=0.01)], [0, 1])
    ways = (None, Programs())
    runs = [Population(task, chosen, steps=10, device=CPU, programs=each).train_steps(10) for each in ways]
    np.testing.assert_array_equal(*runs)
