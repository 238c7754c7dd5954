"""The built-in tasks are what they say: data, constants, determinism; each can be trained, alone and
vectorised."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap

from fallline.tasks import Task, describe_builtins, registry
from fallline.tasks.quadratic import hessian
from fallline.tasks.signals import generate, templates
from fallline.tasks.text import CONTEXT, CharacterTransformer

FACTS = {
    "line": ((3, 1), (3, 1), 3, 3, 2),
    "digits": ((1438, 64), (1438,), 359, 64, 4810),
    "digits_cnn": ((1438, 1, 8, 8), (1438,), 359, 64, 1898),
    "diabetes": ((354, 10), (354, 1), 88, 64, 385),
    "two_moons": ((800, 2), (800, 1), 200, 64, 129),
    "mnist1d": ((4000, 40), (4000,), 1000, 100, 15210),
    "mnist1d_cnn": ((4000, 1, 40), (4000,), 1000, 100, 5210),
    "quadratic_deep": ((1000, 101), (1000,), 1000, 128, 100),
}


@pytest.fixture(scope="module", params=sorted(registry))
def task(request: pytest.FixtureRequest) -> Task:
    return registry[request.param]().check()


def test_shapes_sizes_and_source(task: Task) -> None:
    assert task.source
    assert task.train.x.is_floating_point() or task.name == "char_lm"
    if task.name in FACTS:
        x, y, validation, batch_size, parameters = FACTS[task.name]
        assert (tuple(task.train.x.shape), tuple(task.train.y.shape)) == (x, y)
        assert (len(task.validation), task.batch_size) == (validation, batch_size)
        assert task.describe()["parameters"] == parameters


def test_a_second_making_is_the_same(task: Task) -> None:
    again = registry[task.name]().check()
    assert torch.equal(again.train.x, task.train.x)
    assert torch.equal(again.validation.y, task.validation.y)


def test_float64_asks_for_float64(task: Task) -> None:
    double = registry[task.name](dtype=torch.float64).check()  # type: ignore[call-arg]
    assert double.describe()["dtype"] == "float64"
    single, same = task.build_model(1), double.build_model(1)
    for one, other in zip(single.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(one.double(), other)


def test_a_gradient_step_lowers_the_training_loss(task: Task) -> None:
    model = task.build_model(0)
    x, y = task.train.x[:64], task.train.y[:64]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = task.loss(model(x), y)
    before.backward()
    assert all(each.grad is not None and each.grad.abs().max() > 1e-8 for each in model.parameters())
    optimizer.step()
    assert task.loss(model(x), y) < before


def test_a_population_of_models_has_each_models_gradient(task: Task) -> None:
    models = [task.build_model(seed) for seed in (0, 1)]
    parameters, buffers = stack_module_state(models)
    x, y = task.train.x[:8], task.train.y[:8]

    def loss(weights: dict[str, torch.Tensor], fixed: dict[str, torch.Tensor]) -> torch.Tensor:
        return task.loss(functional_call(models[0], (weights, fixed), (x,)), y)

    together = vmap(grad(loss))(parameters, buffers)
    for index, model in enumerate(models):
        task.loss(model(x), y).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(together[name][index], parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_task_survives_pickling(task: Task) -> None:
    again = pickle.loads(pickle.dumps(task))
    assert again.describe() == task.describe()


def test_every_builtin_has_a_line() -> None:
    lines = describe_builtins()
    assert [name for name, _ in lines] == list(registry)
    assert all(20 < len(line) <= 110 and line.endswith(".") for _, line in lines)


def test_line_is_y_2x_at_1_2_3() -> None:
    task = registry["line"]().check()
    assert task.train.x.flatten().tolist() == [1, 2, 3]
    assert task.train.y.flatten().tolist() == [2, 4, 6]
    assert task.validation is task.train
    assert (task.loss.name, task.batch_size) == ("mse", 3)


def test_digits_are_scaled_to_one_and_split_without_overlap() -> None:
    from sklearn.datasets import load_digits

    task = registry["digits"]()
    assert (float(task.train.x.min()), float(task.train.x.max())) == (0, 1)
    together = torch.cat([task.train.y, task.validation.y]).bincount()
    assert torch.equal(together, torch.tensor(load_digits().target).bincount())
    flat = registry["digits_cnn"]().train.x.flatten(1)
    assert torch.equal(flat, task.train.x)


def test_diabetes_is_standardised_by_its_training_samples() -> None:
    train = registry["diabetes"](dtype=torch.float64).train  # type: ignore[call-arg]
    for tensor in (train.x, train.y):
        torch.testing.assert_close(tensor.mean(0), torch.zeros(tensor.shape[1]).double(), atol=1e-12, rtol=0)
        torch.testing.assert_close(tensor.std(0, correction=0), torch.ones(tensor.shape[1]).double())


def test_two_moons_are_balanced_between_no_and_yes() -> None:
    task = registry["two_moons"]()
    assert set(task.train.y.flatten().tolist()) == {0.0, 1.0}
    assert float(task.train.y.sum() + task.validation.y.sum()) == 500


def test_mnist1d_is_the_published_data_set() -> None:
    signals, labels = generate()
    assert np.bincount(labels).tolist() == [500] * 10
    # The first values and labels of the file that the paper's authors publish (mnist1d_data.pkl).
    np.testing.assert_allclose(signals[0, :4], [-0.33200567, -0.47191037, -0.77869708, -1.00974083], atol=1e-8)
    assert labels[:10].tolist() == [2, 6, 4, 5, 6, 6, 6, 0, 3, 1]
    np.testing.assert_allclose([signals.mean(), signals.std()], [0, 1], atol=1e-12)
    assert (templates()[:, 0] == 0).all()


def test_mnist1d_signals_are_those_of_one_sample_at_a_time() -> None:
    """The same first sample from the paper's description, with none of the code above."""
    from scipy.ndimage import gaussian_filter

    draw = np.random.RandomState(42)
    stroke = templates()[0] + 1e-8
    padded = np.concatenate([stroke, np.zeros(36 + int(draw.rand() * 25))])
    signal = np.interp(np.linspace(0, 1, 72), np.linspace(0, 1, len(padded)), padded)
    signal *= 1 + 0.4 * (draw.rand() - 0.5)
    shift = draw.choice(48)
    signal = np.concatenate([signal[-shift:], signal[:-shift]])
    noise = gaussian_filter(0.25 * draw.randn(72), 2)
    signal = np.where(signal == 0, noise, signal) + 0.02 * draw.randn(72)
    signal -= 0.75 * (draw.rand() - 0.5) * np.linspace(-0.5, 0.5, 72)
    signal = np.interp(np.linspace(0, 1, 40), np.linspace(0, 1, 72), signal)
    finished, labels = generate()
    zeros = finished[labels == 0]
    distances = np.abs((zeros - zeros.mean(1, keepdims=True)) - (signal - signal.mean())).max(1)
    slope = (zeros * (signal - signal.mean())).sum(1) / ((signal - signal.mean()) ** 2).sum()
    residual = zeros - slope[:, None] * (signal - signal.mean())
    assert np.ptp(residual, axis=1).min() < 1e-9, distances.min()


def test_quadratic_deep_has_deepobs_constants() -> None:
    """Eigenvalues, rotation and points by another way: Householder matrices written out, in one stream of
    draws."""
    draw = np.random.RandomState(42)
    eigenvalues = np.r_[draw.uniform(0, 1, 90), draw.uniform(30, 60, 10)]
    angle = 2 * np.pi * draw.uniform()
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    for dimension in range(3, 101):
        v = draw.normal(size=(dimension, 1))
        u = np.eye(dimension, 1) - v / np.linalg.norm(v)
        reflection = np.eye(dimension) - 2 * u @ u.T / (u.T @ u)
        rotation = reflection @ np.block(
            [[np.ones((1, 1)), np.zeros((1, dimension - 1))], [np.zeros((dimension - 1, 1)), rotation]]
        )
    curvature = rotation.T @ np.diag(eigenvalues) @ rotation
    np.testing.assert_allclose(hessian(), curvature, atol=1e-11)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(100), atol=1e-12)
    np.testing.assert_allclose(np.linalg.eigvalsh(hessian()), np.sort(eigenvalues), atol=1e-10)

    task = registry["quadratic_deep"](dtype=torch.float64).check()  # type: ignore[call-arg]
    points = np.random.RandomState(42).normal(0.0, 0.6, (1000, 100)).astype("float32").astype("float64")
    others = np.random.RandomState(43).normal(0.0, 0.6, (1000, 100)).astype("float32").astype("float64")
    for data, expected in ((task.train, points), (task.validation, others)):
        away = 1 - expected
        value = 0.5 * np.einsum("ni,ij,nj->n", away, curvature, away)
        model = task.build_model(0)
        np.testing.assert_allclose(task.loss.per_sample(model(data.x), data.y).detach(), value, rtol=1e-10)
        loss = task.loss(model(data.x), data.y)
        np.testing.assert_allclose(float(loss.detach()), value.mean(), rtol=1e-10)
        loss.backward()
        np.testing.assert_allclose(model.theta.grad, away.mean(0) @ curvature, rtol=1e-10)
    assert (task.batch_size, task.drop_last, task.metric.name) == (128, True, "validation loss")


def test_char_lm_predicts_the_next_character_from_the_past_only() -> None:
    task = registry["char_lm"]().check()
    assert task.train.x.shape[1:] == (CONTEXT,)
    assert torch.equal(task.train.x[:, 1:], task.train.y[:, :-1])
    model = task.build_model(0).eval()
    assert isinstance(model, CharacterTransformer)
    x = task.train.x[:2].clone()
    before = model(x)
    assert before.shape == (2, model.readout.out_features, CONTEXT)
    x[:, 40] = (x[:, 40] + 1) % model.readout.out_features
    after = model(x)
    torch.testing.assert_close(after[:, :, :40], before[:, :, :40])
    assert (after[:, :, 40:] - before[:, :, 40:]).abs().amax(1).min() > 1e-6


def test_char_lm_validates_on_text_that_it_was_not_trained_on() -> None:
    task = registry["char_lm"]()
    assert len(task.train) > 500
    assert len(task.validation) > 20
    seen = {tuple(row) for row in task.train.x.tolist()}
    assert not any(tuple(row) in seen for row in task.validation.x.tolist())
