"""A trial uses torch's own kernels where torch has the same optimizer or loss: the same trajectory, as few operations.

That a kernel and its rule are equal is also tested in tests/optim/test_kernels.py, for `as_torch`.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fallline as fl
from fallline.errors import LossMismatch
from fallline.optim import kernels
from fallline.optim.catalogue import CATALOGUE
from fallline.optim.kernels import KERNELS
from fallline.training.batches import BatchOrder
from fallline.training.trial import LARGEST_CROSS_ENTROPY, Trial, fewer_kernels
from plain_loop import plain_run

CPU = torch.device("cpu")
STEPS = 25
CASES = [
    pytest.param(info, dict(arguments), id=f"{info.name} {dict(arguments)}")
    for info in CATALOGUE.values()
    if info.make in KERNELS
    for arguments in info.valid
    if not arguments.get("dampening")
]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))


def classification(model=mlp, dtype=torch.float64, **settings) -> fl.Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator, dtype=dtype)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return fl.Task("classes", lambda: model().to(dtype), (x, y), "cross_entropy", **{"batch_size": 16, **settings})


def trial(task: fl.Task, optimizer, *, by_rule=False, asks=True, steps=STEPS) -> Trial:
    made = Trial(task.check(), optimizer, 1, steps=steps, device=CPU)
    made._asks = asks  # False as on other devices
    if by_rule:
        assert made.flat is not None
        object.__setattr__(made.flat, "kernel", None)
    return made


def close(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=tolerance, atol=tolerance / 100, err_msg=name)


@pytest.fixture
def float64_by_default():
    torch.set_default_dtype(torch.float64)  # torch keeps NAdam's and ASGD's numbers in the default dtype
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("info", "arguments"), CASES)
def test_a_trial_by_a_kernel_is_torchs_own_run(info, arguments, float64_by_default):
    if info.name == "adam" and arguments.get("decoupled_weight_decay") and torch.__version__ < "2.7":
        pytest.skip("torch's Adam has no decoupled_weight_decay before 2.7")
    task = classification()
    made = trial(task, info.make(**arguments))
    assert made.flat is not None
    assert made.flat.kernel is not None
    assert made.flat.kernel.fused == (info.name in ("sgd", "adam", "adamw", "adagrad"))
    losses = made.train_steps(STEPS)
    plain = plain_run(
        lambda: mlp().double(), task.train.x, task.train.y, nn.CrossEntropyLoss(),
        lambda params: getattr(torch.optim, info.torch_name)(params, **arguments), seed=1, steps=STEPS, batch_size=16,
    )  # fmt: skip
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-10)
    close(made.parameters(), plain.parameters)
    assert all((plain.parameters[name] != start).all() for name, start in plain.start.items())


@pytest.mark.parametrize(("info", "arguments"), CASES)
def test_kernel_and_rule_leave_the_same_state_and_go_on_from_each_others(info, arguments):
    task, optimizer = classification(), info.make(**arguments)
    by_kernel, by_rule = (trial(task, optimizer, by_rule=by_rule) for by_rule in (False, True))
    for each in (by_kernel, by_rule):
        each.train_steps(10)
    left, right = by_kernel.tensors(), by_rule.tensors()
    close(left, right)
    by_kernel.restore(right, 10)
    by_rule.restore(left, 10)
    np.testing.assert_allclose(by_kernel.train_steps(10), by_rule.train_steps(10), rtol=1e-10)
    close(by_kernel.tensors(), by_rule.tensors())
    assert left["optimizer/step"] == 10


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop", "asgd", "rprop"])
def test_a_scheduled_learning_rate_is_that_of_each_step(name, monkeypatch, float64_by_default):
    monkeypatch.setattr(kernels, "SCHEDULE_BLOCK", 8)
    task, info = classification(), CATALOGUE[name]
    made = trial(task, info.make(lr=fl.schedules.cosine(0.02, end=0.001)))
    assert made.flat is not None
    assert made.flat.kernel is not None
    losses = np.concatenate([made.train_steps(count) for count in (3, 9, STEPS - 12)])

    def rate(step: int) -> float:
        return 0.001 + 0.019 * (1 + math.cos(math.pi * step / STEPS)) / 2

    def scheduled(params):
        optimizer = getattr(torch.optim, info.torch_name)(params, lr=rate(0))
        steps = iter(range(STEPS))

        def set_rate(*_):
            optimizer.param_groups[0]["lr"] = rate(next(steps))

        optimizer.register_step_pre_hook(set_rate)
        return optimizer

    plain = plain_run(
        lambda: mlp().double(), task.train.x, task.train.y, nn.CrossEntropyLoss(), scheduled,
        seed=1, steps=STEPS, batch_size=16,
    )  # fmt: skip
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-10)
    constant = trial(task, info.make(lr=0.02)).train_steps(STEPS)
    assert name == "rprop" or abs(constant[-1] - losses[-1]) > 1e-4  # Rprop reads its learning rate only at the start


@pytest.mark.parametrize(
    "optimizer",
    [
        fl.optim.lion(),
        fl.optim.chain(fl.optim.scale_by_adam(), fl.optim.scale_by_learning_rate(0.1)),
        fl.optim.sgd(0.1, momentum=0.9, dampening=0.5),
        fl.optim.adamw(weight_decay=fl.schedules.linear(0.1)),
        fl.optim.sgd(0.1, momentum=fl.schedules.linear(0.9)),
    ],
    ids=repr,
)
def test_what_torch_does_not_have_is_left_to_the_rule(optimizer):
    made = trial(classification(), optimizer)
    assert made.flat is not None
    assert made.flat.kernel is None


def test_half_precision_is_left_to_the_rule():
    made = trial(classification(dtype=torch.float16), fl.optim.adam())
    assert made.flat is not None
    assert made.flat.kernel is None


class ChannelsLast(nn.Module):
    """The gradient of its kernel does not have the strides of the kernel."""

    def __init__(self):
        super().__init__()
        self.convolution, self.last = nn.Conv2d(2, 4, 2), nn.Linear(8, 3)

    def forward(self, x):
        pixels = x.reshape(-1, 2, 3, 1).expand(-1, -1, -1, 2).contiguous(memory_format=torch.channels_last)
        return self.last(self.convolution(pixels).flatten(1))


def test_a_gradient_with_other_strides_than_its_parameter_is_read_right():
    task = classification(ChannelsLast)
    made = trial(task, fl.optim.adam(0.01))
    weight = made.params["convolution.weight"]
    (slope,) = torch.autograd.grad(made.module(task.train.x).sum(), [weight])
    assert slope.stride() != weight.stride()
    losses = made.train_steps(STEPS)
    plain = plain_run(
        lambda: ChannelsLast().double(), task.train.x, task.train.y, nn.CrossEntropyLoss(),
        lambda params: torch.optim.Adam(params, lr=0.01, foreach=False, fused=False),
        seed=1, steps=STEPS, batch_size=16,
    )  # fmt: skip
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-10)
    close(made.parameters(), plain.parameters)


class OptimisticDescent(torch.optim.Optimizer):
    """p ← p − 0.1 · (2g − the gradient before), by hand."""

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            before = self.state[p].get("before", torch.zeros_like(p))
            p -= 0.1 * (2 * p.grad - before)
            self.state[p]["before"] = p.grad.clone()


def test_a_rule_may_keep_the_gradient_though_the_next_one_takes_its_room():
    optimistic = fl.optim.per_tensor(
        "optimistic", lambda g, slots, p, n: (-0.1 * (2 * g - slots["before"]), {"before": g}), {},
        slots=["before"], elementwise=True,
    )  # fmt: skip
    task = classification()
    made = trial(task, fl.optim.chain(optimistic))
    assert made.flat is not None
    losses = made.train_steps(STEPS)
    plain = plain_run(
        lambda: mlp().double(), task.train.x, task.train.y, nn.CrossEntropyLoss(),
        lambda params: OptimisticDescent(params, {}), seed=1, steps=STEPS, batch_size=16,
    )  # fmt: skip
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-10)
    close(made.parameters(), plain.parameters)


class Leaving(nn.Module):
    """A layer of it takes part in the first forward passes only."""

    def __init__(self):
        super().__init__()
        self.stays, self.leaves, self.passes = nn.Linear(6, 3), nn.Linear(6, 3), 0

    def forward(self, x):
        self.passes += self.training
        return self.stays(x) + (self.leaves(x) if self.passes <= 8 else 0)


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_a_parameter_that_takes_no_part_any_more_stays_where_it_is(name):
    arguments = {"lr": 0.01, "weight_decay": 0.1}
    task, info = classification(Leaving), CATALOGUE[name]
    made = trial(task, info.make(**arguments))
    assert made.flat is not None
    losses = made.train_steps(STEPS)
    assert made.flat is None
    plain = plain_run(
        lambda: Leaving().double(), task.train.x, task.train.y, nn.CrossEntropyLoss(),
        lambda params: getattr(torch.optim, info.torch_name)(params, **arguments), seed=1, steps=8, batch_size=16,
    )  # fmt: skip
    np.testing.assert_allclose(losses[:8], plain.losses, rtol=1e-10)
    end = made.parameters()
    torch.testing.assert_close(end["leaves.weight"], plain.parameters["leaves.weight"], rtol=1e-10, atol=1e-12)
    assert (end["stays.weight"] != plain.parameters["stays.weight"]).all()


class Bursting(nn.Module):
    """Its fifth prediction is not finite; those after it would be."""

    def __init__(self):
        super().__init__()
        self.layer, self.passes = nn.Linear(6, 3), 0

    def forward(self, x):
        self.passes += self.training
        return self.layer(x) * (torch.inf if self.passes == 5 else 1)


@pytest.mark.parametrize(
    "optimizer",
    [fl.optim.sgd(0.1, momentum=0.9), fl.optim.adam(0.01), fl.optim.lion(0.01), fl.optim.schedule_free_sgd(0.1)],
    ids=repr,
)
@pytest.mark.parametrize("asks", [True, False])
def test_the_first_loss_that_is_not_finite_ends_a_trial_where_it_is(optimizer, asks):
    ended, healthy = trial(classification(Bursting), optimizer, asks=asks), trial(classification(Bursting), optimizer)
    losses = ended.train_steps(STEPS)
    expected = healthy.train_steps(4)
    np.testing.assert_allclose(losses[:4], expected, rtol=1e-12)
    assert not np.isfinite(losses[4])
    assert np.isnan(losses[5:]).all()
    assert len(losses) == STEPS
    assert not ended.alive
    assert healthy.alive
    close(ended.parameters(), healthy.parameters(), 1e-12)
    assert np.isnan(ended.train_steps(3)).all()
    close(ended.parameters(), healthy.parameters(), 1e-12)


def test_checkpoints_are_copies_though_state_changes_in_place():
    made, other = (trial(classification(), fl.optim.adam(0.01)) for _ in range(2))
    made.train_steps(3)
    kept = made.tensors()
    before = {name: tensor.clone() for name, tensor in kept.items()}
    losses = made.train_steps(3)
    close(kept, before, 0)
    other.restore(kept, 3)
    np.testing.assert_array_equal(other.train_steps(3), losses)
    close(kept, before, 0)


LOSSES = [
    (fl.losses.cross_entropy(), nn.CrossEntropyLoss(), "Nll"),
    (fl.losses.cross_entropy(label_smoothing=0.2, reduction="sum"),
     nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum"), ""),
    (fl.losses.mse(), nn.MSELoss(), "MseLoss"),
    (fl.losses.huber(delta=0.4), nn.HuberLoss(delta=0.4), "HuberLoss"),
    (fl.losses.smooth_l1(beta=0.3, reduction="sum"), nn.SmoothL1Loss(beta=0.3, reduction="sum"), "SmoothL1Loss"),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "torchs", "kernel"), LOSSES, ids=lambda each: getattr(each, "name", None))
def test_a_loss_through_torchs_function_is_torchs_and_ours(ours, torchs, kernel):
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(20, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    classes = ours.kind == "classification"
    target = torch.arange(20) % 4 if classes else torch.randn(20, 4, generator=generator, dtype=torch.float64)
    compute = fewer_kernels(ours, target)
    assert compute is not ours
    found = [
        (f(prediction, target), *torch.autograd.grad(f(prediction, target), prediction))
        for f in (compute, torchs, ours)
    ]
    assert kernel in compute(prediction, target).grad_fn.name()
    for value, slope in found[1:]:
        torch.testing.assert_close(found[0][0], value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[0][1], slope, rtol=1e-10, atol=1e-12)
    assert found[0][1].abs().min() > 1e-6


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (fl.losses.cross_entropy(), torch.tensor([0, -100, 2])),  # a mean over nothing is 0 in ours, and NaN in torch's
        (fl.losses.cross_entropy(ignore_index=1), torch.tensor([0, 1, 2])),
        (fl.losses.cross_entropy(weight=[1.0, 2.0, 3.0]), torch.tensor([0, 1, 2])),
        (fl.losses.cross_entropy(), torch.tensor([0, 1, 2], dtype=torch.int32)),  # torch refuses these
        (fl.losses.cross_entropy(), torch.eye(3)),
        (fl.losses.cross_entropy() + fl.losses.multi_margin(), torch.tensor([0, 1, 2])),
        (fl.losses.binary_cross_entropy_with_logits(), torch.eye(3)),  # whose gradient is less exact in torch
        (fl.losses.as_loss(nn.CrossEntropyLoss()), torch.tensor([0, 1, 2])),
    ],
)
def test_a_loss_that_is_not_torchs_stays_as_it_is(loss, target):
    assert fewer_kernels(loss, target) is loss


def test_shapes_that_do_not_fit_are_refused_as_ever():
    with pytest.raises(LossMismatch, match="mse"):
        fewer_kernels(fl.losses.mse(), torch.zeros(4, 1))(torch.zeros(4), torch.zeros(4, 1))
    with pytest.raises(LossMismatch, match="cross_entropy"):
        fewer_kernels(fl.losses.cross_entropy(), torch.zeros(4).long())(torch.zeros(3, 2), torch.zeros(4).long())


def test_cross_entropies_of_many_samples_are_ours_which_is_the_faster_one():
    compute = fewer_kernels(fl.losses.cross_entropy(), torch.zeros(1).long())
    names = [
        compute(torch.zeros(n, 3, requires_grad=True), torch.zeros(n).long()).grad_fn.name()
        for n in (LARGEST_CROSS_ENTROPY, LARGEST_CROSS_ENTROPY + 1)
    ]
    assert names[0] == "NllLossBackward0"
    assert names[1] != names[0]


def test_predictions_in_half_precision_have_our_loss():
    compute = fewer_kernels(fl.losses.mse(), torch.zeros(4))
    for dtype, is_torchs in ((torch.float32, True), (torch.bfloat16, False)):
        value = compute(torch.zeros(4, dtype=dtype, requires_grad=True), torch.zeros(4, dtype=dtype))
        assert (value.grad_fn.name() == "MseLossBackward0") == is_torchs


class Counting(TorchDispatchMode):
    """How often each operation is run."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.__name__] += 1
        return function(*args, **(kwargs or {}))


PLAIN = {
    "sgd": (fl.optim.sgd(0.01, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True)),
    "adam": (fl.optim.adam(), lambda p: torch.optim.Adam(p, fused=True)),
    "adamw": (fl.optim.adamw(), lambda p: torch.optim.AdamW(p, fused=True)),
    "rmsprop": (fl.optim.rmsprop(), lambda p: torch.optim.RMSprop(p, foreach=False)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_runs_no_more_operations_than_a_plain_loops(name):
    ours, torchs = PLAIN[name]
    task = classification(dtype=torch.float32)
    made = trial(task, ours)
    made.train_steps(2)
    model, loss_function = task.build_model(1), nn.CrossEntropyLoss()
    optimizer = torchs(model.parameters())
    index = torch.arange(16)

    def plain_step():
        optimizer.zero_grad()
        loss_function(model(task.train.x[index]), task.train.y[index]).backward()
        optimizer.step()

    plain_step()
    with Counting() as mine:
        made._one_step()
    with Counting() as plain:
        plain_step()
    assert mine.counts.total() <= plain.counts.total(), (mine.counts - plain.counts, plain.counts - mine.counts)
    assert plain.counts.total() > 10


@pytest.mark.parametrize("optimizer", [fl.optim.adam(), fl.optim.lion()], ids=repr)
def test_away_from_the_cpu_a_step_asks_for_no_number(optimizer):
    found = {}
    for asks in (True, False):
        made = trial(classification(), optimizer, asks=asks)
        made.train_steps(1)
        with Counting() as counting:
            made._one_step()
        found[asks] = counting.counts["_local_scalar_dense.default"]
    assert found == {True: 1, False: 0}


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_order_of_batches_is_on_the_device(shuffle):
    order = BatchOrder(10, 4, 0, shuffle=shuffle, device=torch.device("meta"))
    assert [order.at(step).device.type for step in range(4)] == ["meta"] * 4
    assert [len(order.at(step)) for step in range(4)] == [4, 4, 2, 4]
