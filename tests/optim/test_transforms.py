"""The stages of optimizers against torch and the papers: clipping, centring, decaying, averaging."""

import copy

import numpy as np
import pytest
import torch
from pytorch_optimizer.optimizer.gradient_centralization import centralize_gradient
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fallline as fl

F64 = torch.float64
SHAPES = {"matrix": (3, 4), "vector": (5,), "scalar": (), "empty": (0, 2), "kernel": (2, 3, 2, 2)}


def gradients(scale=3.0, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: (torch.randn(s, generator=generator, dtype=F64) * scale).to(dtype) for n, s in SHAPES.items()}


def once(transform, grads):
    rule = fl.optim.chain(transform)
    zeros = {name: torch.zeros_like(g) for name, g in grads.items()}
    return rule.update(grads, rule.init(zeros), zeros)[0]


def as_parameters(grads):
    params = {name: nn.Parameter(torch.zeros_like(g)) for name, g in grads.items()}
    for name, p in params.items():
        p.grad = grads[name].clone()
    return params


def assert_gradients(found, params, rtol):
    for name, p in params.items():
        assert found[name].dtype == p.dtype
        torch.testing.assert_close(found[name], p.grad, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, F64], ids=str)
@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clip_by_value_equals_torchs(limit, dtype):
    grads = gradients(dtype=dtype)
    params = as_parameters(grads)
    torch.nn.utils.clip_grad_value_(params.values(), limit)
    assert any(not torch.equal(p.grad, grads[n]) for n, p in params.items()) == (limit == 0.5)
    assert_gradients(once(fl.optim.clip_by_value(limit), grads), params, 0)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("limit", [0.5, 6.0, 100.0])
def test_clip_by_norm_is_torchs_for_one_parameter_at_a_time(limit, dtype):
    grads = gradients(dtype=dtype)
    params = as_parameters(grads)
    for p in params.values():
        torch.nn.utils.clip_grad_norm_([p], limit)
    clipped = {n for n, p in params.items() if not torch.equal(p.grad, grads[n])}
    assert len(clipped) == {0.5: 4, 6.0: 2, 100.0: 0}[limit]
    assert_gradients(once(fl.optim.clip_by_norm(limit), grads), params, 1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clip_by_global_norm_is_torchs_for_all(limit):
    grads = gradients()
    params = as_parameters(grads)
    torch.nn.utils.clip_grad_norm_(params.values(), limit)
    assert torch.equal(params["matrix"].grad, grads["matrix"]) == (limit == 100.0)
    assert_gradients(once(fl.optim.clip_by_global_norm(limit), grads), params, 1e-12)


def test_clipping_leaves_zero_gradients_zero():
    zeros = {name: torch.zeros_like(g) for name, g in gradients().items()}
    for clip in (fl.optim.clip_by_norm(1.0), fl.optim.clip_by_value(1.0), fl.optim.clip_by_global_norm(1.0)):
        assert all((u == 0).all() for u in once(clip, zeros).values())


def test_centralize_equals_the_reference():
    grads = gradients()
    found = once(fl.optim.centralize(), grads)
    for name, g in grads.items():
        if g.numel():
            expected = g.clone()
            centralize_gradient(expected)
            torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-15)
            assert torch.equal(found[name], g) == (g.dim() < 2)


def trained(rule, steps=20):
    p = {"w": torch.tensor([1.0, -2.0, 3.0], dtype=F64)}
    state, path = rule.init(p), []
    for step in range(steps):
        g = {"w": torch.sin(0.9 * step + torch.arange(3)) + p["w"]}
        path.append((p["w"], g["w"]))
        updates, state = rule.update(g, state, p)
        p = {"w": p["w"] + updates["w"]}
    return p["w"], state, path


def by_torch(make, steps=20, independent=0.0):
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=F64))
    optimizer = make([p])
    for step in range(steps):
        p.grad = torch.sin(0.9 * step + torch.arange(3)) + p.detach()
        with torch.no_grad():
            p.mul_(1 - independent)
        optimizer.step()
    return p.detach()


def test_decayed_weights_before_the_scaling_are_coupled():
    o = fl.optim
    rule = o.chain(o.add_decayed_weights(0.3), o.scale_by_adam(), o.scale_by_learning_rate(0.05))
    expected = by_torch(lambda ps: torch.optim.Adam(ps, lr=0.05, weight_decay=0.3))
    torch.testing.assert_close(trained(rule)[0], expected, rtol=1e-10, atol=0)


def test_decayed_weights_behind_the_scaling_are_scaled_by_the_learning_rate():
    o = fl.optim
    rule = o.chain(o.scale_by_adam(), o.add_decayed_weights(0.3), o.scale_by_learning_rate(0.05))
    expected = by_torch(lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.3))
    torch.testing.assert_close(trained(rule)[0], expected, rtol=1e-10, atol=0)


def test_independently_decayed_weights_are_not_scaled_by_the_learning_rate():
    o = fl.optim
    last = o.add_decayed_weights(0.02, independent=True)
    rule = o.chain(o.scale_by_adam(), o.scale_by_learning_rate(0.05), last)
    expected = by_torch(lambda ps: torch.optim.Adam(ps, lr=0.05), independent=0.02)
    torch.testing.assert_close(trained(rule)[0], expected, rtol=1e-10, atol=0)
    assert (trained(rule)[0] - trained(o.adamw(lr=0.05, weight_decay=0.02))[0]).abs().min() > 1e-3


def mlp():
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def task():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 8, generator=generator, dtype=F64)
    return fl.Task("test", mlp, (x, (x.sum(1) > 0).long()), "cross_entropy", batch_size=16)


AVERAGED = fl.optim.chain(fl.optim.sgd(lr=0.5, momentum=0.5), fl.optim.ema_of_parameters(0.8))


def test_the_mean_of_the_parameters_equals_the_averaged_model():
    torch.manual_seed(0)
    model = mlp()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    theirs = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = AVERAGED.init(params)
    for name, start in AVERAGED.evaluation_parameters(state, params).items():
        assert torch.equal(start, params[name]), "before the first update it is the parameters"
    x, y = task().train.x[:16], task().train.y[:16]
    for _ in range(20):
        theirs.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        updates, state = AVERAGED.update(grads, state, params)
        params = {name: p + updates[name] for name, p in params.items()}
        theirs.step()
        averaged.update_parameters(model)
    expected = dict(averaged.module.named_parameters())
    for name, found in AVERAGED.evaluation_parameters(state, params).items():
        torch.testing.assert_close(found, expected[name].detach(), rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(params[name], model.state_dict()[name], rtol=1e-10, atol=1e-14)
        assert (found - params[name]).abs().min() > 1e-6


@pytest.mark.parametrize("engine", ["vectorised", "sequential"])
def test_a_sweep_evaluates_with_the_mean_and_trains_without_it(engine):
    plain = fl.sweep(task(), [fl.optim.sgd(lr=0.5, momentum=0.5)], seeds=2, steps=20)
    found = fl.sweep(task(), [AVERAGED], seeds=2, steps=20, engine=engine)
    np.testing.assert_allclose(found.history.train_loss, plain.history.train_loss, rtol=1e-10)
    assert (abs(found.history.validation_loss - plain.history.validation_loss)[:, -1] > 1e-6).all()
    run = fl.fit(task(), AVERAGED, seed=1, steps=20)
    evaluations = found.history.validation_loss[1]
    assert run.history.validation_loss[-1] == pytest.approx(evaluations[np.isfinite(evaluations)][-1], rel=1e-9)


def test_the_decay_of_the_mean_is_swept():
    decay = fl.grid([0.0, 0.5, 0.99])
    template = fl.optim.chain(fl.optim.sgd(lr=0.5), fl.optim.ema_of_parameters(decay))
    found = fl.sweep(task(), [template], seeds=1, steps=20)
    assert len(np.unique(found.history.validation_loss[:, -1])) == 3
    np.testing.assert_allclose(found.history.train_loss[0], found.history.train_loss[2], rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fl.optim.clip_by_value(0.0), r"max_value = 0\.0 is not above 0"),
        (lambda: fl.optim.clip_by_norm(-1.0), r"max_norm = -1\.0 is not above 0"),
        (lambda: fl.optim.ema_of_parameters(1.0), r"decay = 1\.0 is outside \[0, 1\)"),
        (lambda: fl.optim.add_decayed_weights(-0.1), r"weight_decay = -0\.1 is negative"),
        (lambda: fl.optim.add_decayed_weights(0.1, independent=1), "independent = 1 is neither"),
    ],
)
def test_a_mistake_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_transforms_print_and_copy():
    for value in (fl.optim.clip_by_norm(1.0), fl.optim.add_decayed_weights(0.1, independent=True), AVERAGED):
        assert eval(repr(value), {"fl": fl}) == copy.deepcopy(value) == value
