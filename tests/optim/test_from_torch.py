"""Optimizers of torch, or of one's own, as optimizers of fallline."""

import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import fallline as fl
from fallline.optim import serial
from fallline.optim.torch_own import state_from_tensors, state_to_tensors
from fallline.training.trial import Trial

LBFGS = torch.optim.LBFGS


class Halving(torch.optim.Optimizer):
    """Somebody's own: a step that shrinks, with a state of many kinds."""

    def __init__(self, params, lr: float = 0.1, every: int = 3, *, name=None, moments=(0.5, 0.25)):
        if lr <= 0:
            raise ValueError(f"Invalid lr: {lr}")
        super().__init__(params, {"lr": lr, "every": every, "name": name, "moments": moments})

    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                state["seen"] = [*state.get("seen", []), loss.item()][-2:]
                state["mean"] = p.grad * group["moments"][0] + state.get("mean", torch.zeros_like(p)) * 0.5
                with torch.no_grad():
                    p.sub_(state["mean"] * group["lr"] * 0.5 ** (state["step"] // group["every"]))
        return loss


def regression(dtype=torch.float64, **settings) -> fl.Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    y = torch.sin(x.sum(1, keepdim=True))

    def model():
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)

    return fl.Task("regression", model, (x.to(dtype), y.to(dtype)), loss="mse", **{"batch_size": 10, **settings})


def plain_loop(task, make, *, seed, steps):
    torch.manual_seed(seed)
    model = task.check().model()
    optimizer = make(model.parameters())
    order = torch.Generator().manual_seed(seed)
    losses = []
    while len(losses) < steps:
        for index in torch.randperm(len(task.train.x), generator=order).split(task.batch_size):
            seen = []

            def closure(index=index, seen=seen):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(task.train.x[index]), task.train.y[index])
                loss.backward()
                seen.append(loss.item())
                return loss

            optimizer.step(closure)
            losses.append(seen[0])
            if len(losses) == steps:
                break
    return losses, [p.detach() for p in model.parameters()]


CASES = {
    "LBFGS": (fl.optim.from_torch(LBFGS, lr=0.5, max_iter=5), lambda p: LBFGS(p, lr=0.5, max_iter=5)),
    "LBFGS with line search": (
        fl.optim.from_torch(LBFGS, line_search_fn="strong_wolfe", history_size=4),
        lambda p: LBFGS(p, line_search_fn="strong_wolfe", history_size=4),
    ),
    "one's own": (fl.optim.from_torch(Halving, lr=0.3, every=4), lambda p: Halving(p, lr=0.3, every=4)),
    "Adam": (fl.optim.from_torch(torch.optim.Adam, lr=0.05), lambda p: torch.optim.Adam(p, lr=0.05)),
}


@pytest.mark.parametrize("name", CASES)
def test_fit_is_the_plain_loop(name):
    ours, make = CASES[name]
    run = fl.fit(regression(), ours, steps=15, seed=3)
    losses, params = plain_loop(regression(), make, seed=3, steps=15)
    torch.testing.assert_close(run.history.train_loss.tolist(), losses, rtol=1e-10, atol=1e-12)
    for p, q in zip(run.model.parameters(), params, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-10, atol=1e-12)
        assert p.grad is None
    torch.manual_seed(3)
    for p, start in zip(params, regression().model().parameters(), strict=True):
        assert (p != start).all()


def test_sparse_gradients_train():
    words = torch.randint(0, 9, (32, 2), generator=torch.Generator().manual_seed(1))

    def model():
        return nn.Sequential(nn.EmbeddingBag(9, 3, sparse=True))

    task = fl.Task("words", model, (words, words[:, 0] % 3), loss="cross_entropy", batch_size=8)
    run = fl.fit(task, fl.optim.from_torch(torch.optim.SparseAdam, lr=0.1), steps=40)
    assert run.history.train_loss[-1] < run.history.train_loss[0] / 2


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_fit_goes_on_bit_for_bit(name, tmp_path):
    ours = CASES[name][0]
    through = fl.fit(regression(), ours, steps=12)
    fl.fit(regression(), ours, steps=5, out=tmp_path / "run")
    resumed = fl.fit(regression(), ours, steps=12, out=tmp_path / "run", resume=True)
    assert resumed.history.train_loss.tolist() == through.history.train_loss.tolist()
    for p, q in zip(resumed.model.parameters(), through.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_loss_that_is_not_finite_freezes_the_parameters_as_they_were():
    ours = fl.optim.from_torch(torch.optim.SGD, lr=1e200)
    trial = Trial(regression().check(), ours, 0, steps=12, device=torch.device("cpu"))
    kept, losses = [trial.parameters()], []
    while trial.alive and trial.step < 12:
        losses.extend(trial.train_steps(1).tolist())
        kept.append(trial.parameters())
    assert not trial.alive
    assert not torch.isfinite(torch.tensor(losses[-1]))
    assert all(torch.equal(kept[-1][n], kept[-2][n]) for n in kept[-1])
    again = Trial(regression().check(), ours, 0, steps=12, device=torch.device("cpu"))
    again.train_steps(12)
    assert all(torch.equal(kept[-1][n], again.parameters()[n]) for n in kept[-1])


def test_in_a_sweep_it_trains_alone_and_the_others_together():
    own = fl.optim.from_torch(LBFGS, lr=fl.grid([0.1, 1.0]), max_iter=3)
    task = regression()
    result = fl.sweep(task, [own, fl.optim.sgd(lr=fl.grid([0.01, 0.1]))], seeds=2, steps=10)
    assert result.spec["engine"] == "vectorised"
    assert result.spec["engine_reason"].endswith("; LBFGS, torch's own, trains one trial at a time")
    assert sorted(map(len, result.spec["packs"])) == [1, 1, 1, 1, 4]
    assert result.trials["optimizer"].unique(maintain_order=True).to_list() == ["LBFGS max_iter=3", "sgd"]
    for trial, (lr, seed) in enumerate([(0.1, 0), (0.1, 1), (1.0, 0), (1.0, 1)]):
        losses, _ = plain_loop(task, lambda p, lr=lr: LBFGS(p, lr=lr, max_iter=3), seed=seed, steps=10)
        torch.testing.assert_close(result.history.train_loss[trial].tolist(), losses, rtol=1e-10, atol=1e-12)
    alone = fl.sweep(task, fl.optim.sgd(lr=fl.grid([0.01, 0.1])), seeds=2, steps=10)
    torch.testing.assert_close(
        result.trials["final_metric"].to_list()[4:], alone.trials["final_metric"].to_list(), rtol=1e-12, atol=0
    )


def test_a_sweep_of_nothing_else_is_sequential_without_a_warning():
    result = fl.sweep(regression(), fl.optim.from_torch(LBFGS), seeds=1, steps=3)
    assert result.spec["engine"] == "sequential"
    assert result.spec["engine_reason"] == "LBFGS is no rule, but torch's own, which trains one trial at a time"


def test_it_cannot_be_vectorised():
    with pytest.raises(fl.errors.InvalidSweep, match=r"LBFGS cannot be vectorised.*engine='auto'"):
        fl.sweep(regression(), [fl.optim.sgd(), fl.optim.from_torch(LBFGS)], seeds=1, steps=3, engine="vectorised")


def test_the_report_is_written_and_the_winners_program_repeats_it(tmp_path):
    result = fl.sweep(
        fl.tasks.line(), fl.optim.from_torch(LBFGS, lr=fl.grid([0.01, 0.5]), max_iter=2), seeds=2, steps=4
    )
    assert "LBFGS" in result.report(tmp_path / "report.html").read_text()
    assert repr(result.best.optimizer) == "fl.optim.from_torch(torch.optim.LBFGS, lr=0.5, max_iter=2)"
    assert "torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=2)" in result.best.code
    done = subprocess.run([sys.executable, "-c", result.best.code], capture_output=True, text=True, check=True)
    printed = float(done.stdout.removeprefix("mse: "))
    expected = result.trials.filter(result.trials["trial"] == result.best.trial)["final_metric"].item()
    assert printed == pytest.approx(expected, rel=1e-4)


def test_a_class_of_ones_own_is_imported_by_the_program():
    result = fl.sweep(fl.tasks.line(), fl.optim.from_torch(Halving, lr=0.05), seeds=1, steps=4)
    assert f"from {Halving.__module__} import Halving\n" in result.best.code
    assert "optimizer = Halving(model.parameters(), lr=0.05)" in result.best.code


@pytest.mark.parametrize(
    "optimizer",
    [
        fl.optim.from_torch(LBFGS, lr=1.0),
        fl.optim.from_torch(LBFGS, lr=1.0, line_search_fn="strong_wolfe", tolerance_grad=0.0),
        fl.optim.from_torch(Halving, moments=(0.5, 0.25)),
        fl.optim.from_torch(LBFGS, lr=fl.grid([0.1, 1.0])),
    ],
    ids=repr,
)
def test_it_is_a_value(optimizer):
    data = serial.to_data(optimizer)
    if not optimizer.dimensions:
        assert pickle.loads(pickle.dumps(optimizer)) == optimizer == serial.from_data(data)
        assert hash(optimizer) == hash(pickle.loads(pickle.dumps(optimizer)))
        made = optimizer.as_torch([nn.Parameter(torch.zeros(2))])
        assert type(made).__name__ == optimizer.name
    assert repr(serial.from_data(data)) == repr(optimizer)
    assert optimizer != fl.optim.from_torch(LBFGS, lr=2.0)
    assert optimizer != fl.optim.sgd()


def test_it_prints_as_it_is_written():
    assert repr(fl.optim.from_torch(LBFGS, lr=1.0)) == "fl.optim.from_torch(torch.optim.LBFGS, lr=1.0)"
    assert repr(fl.optim.from_torch(LBFGS)) == "fl.optim.from_torch(torch.optim.LBFGS)"
    assert fl.optim.from_torch(LBFGS, lr=1.0).arguments == {"lr": 1.0}


STATE = {"step": torch.zeros(()), "slots": {}}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fl.optim.from_torch(LBFGS, lrr=1.0), TypeError, r"LBFGS\(\) has no argument 'lrr'. Did you mean 'lr'"),
        (lambda: fl.optim.from_torch(LBFGS, params=[]), TypeError, r"no argument 'params'"),
        (lambda: fl.optim.from_torch(Halving, lr=-1.0), ValueError, r"Halving\(lr=-1.0\) is refused: Invalid lr"),
        (lambda: fl.optim.from_torch(Halving, lr=fl.grid([0.1, 0.0])), ValueError, r"lr=0.0\) is refused"),
        (lambda: fl.optim.from_torch(Halving, lr="fast"), TypeError, r"lr='fast'"),
        (lambda: fl.optim.from_torch(nn.Linear), TypeError, r"not a class of optimizers"),
        (lambda: fl.optim.from_torch("LBFGS"), TypeError, r"not a class of optimizers"),
        (lambda: fl.optim.from_torch(LBFGS).init({"w": torch.ones(2)}), RuntimeError, r"no rule"),
        (
            lambda: fl.optim.from_torch(LBFGS).update({}, {"step": torch.zeros(()), "slots": {}}, {}),
            RuntimeError,
            "no r",
        ),
        (lambda: fl.fit(regression(), fl.optim.cautious(fl.optim.from_torch(LBFGS))), RuntimeError, r"no rule"),
        (lambda: fl.optim.from_torch(LBFGS, lr=fl.grid([1.0])).as_torch([]), ValueError, r"leaves lr to be searched"),
        (lambda: fl.fit(regression(), fl.optim.from_torch(torch.optim.SGD, lr=0.0)), ValueError, r"lr = 0.0"),
    ],
)
def test_mistakes_are_named(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make()
    assert isinstance(caught.value, fl.errors.FalllineError)


def test_a_state_is_taken_apart_and_put_together():
    shared = torch.tensor([1.0, 2.0])
    state = {
        "state": {0: {"a": shared, "b": [shared, None], "n": (1, 2.5, True, "x", float("inf"))}, 1: {}},
        "param_groups": [{"lr": 0.1, "params": [0, 1], "empty": {}}],
    }
    back = state_from_tensors(state_to_tensors(state))
    assert back["state"][0]["a"] is back["state"][0]["b"][0]
    assert torch.equal(back["state"][0].pop("a"), state["state"][0].pop("a"))
    back["state"][0]["b"].pop(0), state["state"][0]["b"].pop(0)
    assert back == state
    with pytest.raises(fl.errors.Unsupported, match=r"cannot hold"):
        state_to_tensors({"f": len})
