"""Invariants 1 and 2: every trial of a mixed sweep equals a hand-written plain PyTorch loop, whatever else is in it."""

import numpy as np
import pytest
import torch

import fallline as fl
from plain_loop import PAIRS, plain_run

TASKS = {
    "line": (fl.tasks.line, torch.nn.MSELoss()),
    "digits": (fl.tasks.digits, torch.nn.CrossEntropyLoss()),
    "diabetes": (fl.tasks.diabetes, torch.nn.MSELoss()),
    "digits_cnn": (fl.tasks.digits_cnn, torch.nn.CrossEntropyLoss()),
}
STEPS = 50
SEEDS = [0, 3]
HOPELESS = fl.optim.sgd(lr=1e308)


@pytest.mark.parametrize("engine", ["vectorised", "sequential"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", TASKS)
def test_every_trial_of_a_mixed_sweep_equals_a_plain_loop(name, dtype, engine):
    make, loss_function = TASKS[name]
    task = make(dtype=dtype).check()
    optimizers = [HOPELESS, *(pair.ours for pair in PAIRS)]
    result = fl.sweep(task, optimizers, seeds=SEEDS, steps=STEPS, engine=engine, workers=1, keep_parameters="all")
    assert result.spec["engine"] == engine
    assert (result.trials["status"][: len(SEEDS)] == "diverged").all()

    tolerance = 1e-10 if dtype == torch.float64 else 2e-3
    for number, pair in enumerate(PAIRS, start=1):
        for position, seed in enumerate(SEEDS):
            plain = plain_run(
                task.model, task.train.x, task.train.y, loss_function, pair.torch,
                seed=seed, steps=STEPS, batch_size=task.batch_size,
            )  # fmt: skip
            trial = number * len(SEEDS) + position
            losses = result.history.train_loss[trial]
            np.testing.assert_allclose(losses, plain.losses, rtol=tolerance, atol=tolerance, err_msg=str(pair))
            for parameter, value in result.parameters(trial).items():
                expected = plain.parameters[parameter]
                assert_non_trivial(plain, parameter)
                if dtype == torch.float64:
                    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10, msg=f"{pair}: {parameter}")


def assert_non_trivial(plain, parameter):
    assert (plain.parameters[parameter] - plain.start[parameter]).abs().max() > 1e-5, "the parameter did not move"
    assert plain.gradients[parameter].abs().max() > 1e-7, "the gradient vanished"


def test_the_plain_loops_of_two_optimizers_differ():
    """If they did not, the comparison above could not tell one rule from another."""
    task = fl.tasks.digits(dtype=torch.float64).check()
    ends = [
        plain_run(
            task.model, task.train.x, task.train.y, torch.nn.CrossEntropyLoss(), pair.torch,
            seed=0, steps=STEPS, batch_size=64,
        ).losses[-1]
        for pair in PAIRS
    ]  # fmt: skip
    gaps = [abs(float(a - b)) for i, a in enumerate(ends) for b in ends[:i]]
    assert min(gaps) > 1e-6


def test_a_drop_last_unshuffled_task_takes_the_batches_in_order():
    x = torch.linspace(-1, 1, 10, dtype=torch.float64).unsqueeze(1)
    task = fl.Task(
        "in order", lambda: torch.nn.Linear(1, 1).double(), (x, x**2), "mse",
        validation="train", batch_size=4, drop_last=True, shuffle=False,
    )  # fmt: skip
    result = fl.sweep(task, [fl.optim.sgd(lr=0.1)], seeds=1, steps=5, keep_parameters="all")
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1).double()
    losses = []
    for step in range(5):
        part = slice(0, 4) if step % 2 == 0 else slice(4, 8)
        loss = ((model(x[part]) - x[part] ** 2) ** 2).mean()
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= 0.1 * g
    np.testing.assert_allclose(result.history.train_loss[0], losses, rtol=1e-12)
    assert len(set(losses)) == 5


def test_validation_metrics_are_those_of_the_model_at_that_step():
    task = fl.tasks.digits(dtype=torch.float64).check()
    result = fl.sweep(task, [fl.optim.adam(lr=0.01)], seeds=2, steps=30, evaluate_every=10, keep_parameters="all")
    assert result.history.evaluation_step.tolist() == [10, 20, 30]
    for trial in (0, 1):
        for column, steps in enumerate((10, 20, 30)):
            plain = plain_run(
                task.model, task.train.x, task.train.y, torch.nn.CrossEntropyLoss(),
                lambda params: torch.optim.Adam(params, lr=0.01), seed=trial, steps=steps, batch_size=64,
            )  # fmt: skip
            model = task.model()
            model.load_state_dict(plain.parameters)
            with torch.no_grad():
                logits = model(task.validation.x)
            right = (logits.argmax(1) == task.validation.y).double().mean()
            loss = torch.nn.functional.cross_entropy(logits, task.validation.y)
            assert result.history.metric[trial, column] == pytest.approx(float(right), abs=1e-12)
            assert result.history.validation_loss[trial, column] == pytest.approx(float(loss), rel=1e-9)
