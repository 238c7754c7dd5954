"""Where torch's kernels do the arithmetic of `as_torch`, they do the same as the rule."""

import pytest
import torch
from torch import nn

import fallline as fl
from fallline.optim.catalogue import CATALOGUE
from fallline.optim.kernels import KERNELS

CASES = [
    pytest.param(info, dict(arguments), id=f"{info.name} {dict(arguments)}")
    for info in CATALOGUE.values()
    if info.make in KERNELS
    for arguments in info.valid
]
SHAPES = [(), (5,), (3, 4), (2, 3, 2, 2), (0,)]


def parameters(dtype=torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def trained(rule, *, kernels, steps=50, dtype=torch.float64, transposed=False, params=None, optimizer=None):
    params = params or parameters(dtype)
    if transposed:
        params[2] = nn.Parameter(params[2].detach().t().contiguous().t())
    optimizer = optimizer or rule.as_torch(params)
    optimizer.kernels = kernels
    generator = torch.Generator().manual_seed(4)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            if transposed:
                p.grad = p.grad.clone() if p.dim() != 2 else p.grad.reshape(p.shape[::-1]).t()
        optimizer.step()
    return params, optimizer


def close(mine, theirs, rtol=1e-10, atol=1e-12):
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=rtol, atol=atol)


def takes_kernel(rule) -> bool:
    return rule.as_torch(parameters()).computed_by != ["the rule"]


@pytest.mark.parametrize(("info", "arguments"), CASES)
def test_kernel_and_rule_are_the_same(info, arguments):
    rule = info.make(**arguments)
    by_kernel, optimizer = trained(rule, kernels=True)
    by_rule, other = trained(rule, kernels=False)
    too_new = info.name == "adam" and arguments.get("decoupled_weight_decay") and torch.__version__ < "2.7"
    by = "the rule" if arguments.get("dampening") or too_new else f"torch.optim.{info.name}"
    assert optimizer.computed_by == [by]
    assert other.computed_by == ["the rule"]
    close(by_kernel, by_rule)
    for p, q in zip(by_kernel, by_rule, strict=True):
        mine, its = optimizer.state[p], other.state[q]
        assert mine.keys() == its.keys()
        close(mine.values(), its.values())
        assert {name: t.dtype for name, t in mine.items()} == {name: t.dtype for name, t in its.items()}
    assert all((p != start).all() for p, start in zip(by_kernel, parameters(), strict=True))


@pytest.mark.parametrize(("info", "arguments"), CASES)
def test_they_may_take_turns(info, arguments):
    rule = info.make(**arguments)
    params, reference, optimizer, other = parameters(), parameters(), None, None
    for turn in range(4):
        _, optimizer = trained(rule, kernels=turn % 2 == 0, steps=5, params=params, optimizer=optimizer)
        _, other = trained(rule, kernels=False, steps=5, params=reference, optimizer=other)
    close(params, reference)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_gradients_with_other_strides_than_their_parameters_are_read_right(name):
    rule = CATALOGUE[name].make(lr=0.1)
    close(trained(rule, kernels=True, transposed=True)[0], trained(rule, kernels=False, transposed=True)[0])

    def grads(p):
        return torch.arange(12.0).reshape(4, 3).t()

    ours, torchs = (nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    optimizer = rule.as_torch([ours])
    reference = getattr(torch.optim, CATALOGUE[name].torch_name)([torchs], lr=0.1, foreach=False, fused=False)
    for _ in range(3):
        ours.grad, torchs.grad = grads(ours), grads(torchs)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours.detach(), torchs.detach())


def test_counts_are_kept_beyond_what_float32_can_count():
    p = nn.Parameter(torch.ones(1))
    optimizer = fl.optim.adam().as_torch([p])
    for _ in range(2):
        p.grad = torch.ones(1)
        optimizer.step()
        if optimizer.state[p]["step"] == 1:
            optimizer.state[p]["step"].fill_(2**24)
    assert optimizer.state[p]["step"] == 2**24 + 1
    assert optimizer.state[p]["step"].dtype == torch.float64


@pytest.mark.parametrize(
    "rule",
    [
        fl.optim.sgd(0.1, momentum=0.9, dampening=0.5),
        fl.optim.chain(fl.optim.scale_by_adam(), fl.optim.scale_by_learning_rate(0.1)),
        fl.optim.cautious(fl.optim.adam()),
        fl.optim.lion(),
    ],
    ids=repr,
)
def test_what_torch_does_not_have_runs_the_rule(rule):
    assert rule.as_torch(parameters()).computed_by == ["the rule"]


def test_complex_parameters_and_those_of_a_tensor_class_run_the_rule():
    class Own(torch.Tensor):
        pass

    for p in (nn.Parameter(torch.ones(2, dtype=torch.complex128)), torch.ones(2).as_subclass(Own).requires_grad_()):
        optimizer = fl.optim.adam(0.1).as_torch([p])
        p.grad = torch.ones_like(p)
        before = p.detach().clone()
        optimizer.step()
        torch.testing.assert_close(p.detach(), before - 0.1)
        assert len(optimizer._works(None, kernels=True)) == 1  # left to the rule


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_lower_precision_is_no_worse_than_the_rule(name, dtype):
    rule = CATALOGUE[name].make(lr=0.01)
    truth = trained(rule, kernels=False, steps=20)[0]
    by_kernel, by_rule = (trained(rule, kernels=k, steps=20, dtype=dtype)[0] for k in (True, False))

    def error(found):
        return sum(float((p.detach().double() - q.detach()).abs().sum()) for p, q in zip(found, truth, strict=True))

    assert error(by_kernel) <= 1.5 * error(by_rule) + 1e-6
