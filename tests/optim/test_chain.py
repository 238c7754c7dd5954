"""Chains: transforms after one another, names kept apart, the users' own rules."""

import pytest
import torch
from torch import nn

import fallline as fl
from fallline.optim import base

F64 = torch.float64


def run(optimizer, grads, start=(1.0, -2.0)):
    p = {"w": torch.tensor(start, dtype=F64)}
    state = optimizer.init(p)
    for g in grads:
        updates, state = optimizer.update({"w": g}, state, p)
        p = {"w": p["w"] + updates["w"]}
    return p["w"], state


def some_gradients(count=6):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, generator=generator, dtype=F64) * (i + 1) for i in range(count)]


def test_a_named_optimizer_equals_its_sentence():
    sentence = fl.optim.chain(fl.optim.scale_by_adam((0.8, 0.9), 1e-3), fl.optim.scale_by_learning_rate(0.1))
    assert torch.equal(
        run(sentence, some_gradients())[0], run(fl.optim.adam(0.1, (0.8, 0.9), 1e-3), some_gradients())[0]
    )


def test_two_eps_and_two_steps_are_kept_apart():
    """Adam of Adam, written out by hand."""
    optimizer = fl.optim.chain(fl.optim.scale_by_adam((0.5, 0.6), 0.1), fl.optim.scale_by_adam((0.7, 0.8), 0.01))
    assert optimizer.numbers == {
        "beta1": 0.5, "beta2": 0.6, "eps": 0.1, "beta1_2": 0.7, "beta2_2": 0.8, "eps_2": 0.01,
    }  # fmt: skip
    p, state = run(optimizer, some_gradients())
    expected = torch.tensor([1.0, -2.0], dtype=F64)
    moments = [[torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64)] for _ in range(2)]
    for t, g in enumerate(some_gradients(), start=1):
        u = g
        for (b1, b2, eps), m in zip([(0.5, 0.6, 0.1), (0.7, 0.8, 0.01)], moments, strict=True):
            m[0] = b1 * m[0] + (1 - b1) * u
            m[1] = b2 * m[1] + (1 - b2) * u * u
            u = (m[0] / (1 - b1**t)) / ((m[1] / (1 - b2**t)).sqrt() + eps)
        expected = expected + u
    torch.testing.assert_close(p, expected, rtol=1e-12, atol=0)
    assert set(state["slots"]["w"]) == {"step", "exp_avg", "exp_avg_sq", "exp_avg_2", "exp_avg_sq_2"}
    assert state["slots"]["w"]["step"] == 6


def test_two_momentum_buffers_are_kept_apart():
    optimizer = fl.optim.chain(fl.optim.trace(0.9, 0.5), fl.optim.trace(0.3, 0.2), fl.optim.scale_by_learning_rate(0.1))
    p, _ = run(optimizer, some_gradients())
    expected, first, second = torch.tensor([1.0, -2.0], dtype=F64), 0.0, 0.0
    for i, g in enumerate(some_gradients()):
        first = 0.9 * first + (g if i == 0 else 0.5 * g)
        second = 0.3 * second + (first if i == 0 else 0.8 * first)
        expected = expected - 0.1 * second
    torch.testing.assert_close(p, expected, rtol=1e-12, atol=0)


def test_a_chain_in_a_chain_is_the_flat_chain():
    parts = [fl.optim.trace(0.9), fl.optim.trace(0.5), fl.optim.trace(0.1)]
    nested = fl.optim.chain(parts[0], fl.optim.chain(parts[1], parts[2]))
    flat = fl.optim.chain(*parts)
    assert nested.numbers == flat.numbers == {"momentum": 0.9, "momentum_2": 0.5, "momentum_3": 0.1}
    assert torch.equal(run(nested, some_gradients())[0], run(flat, some_gradients())[0])


def test_an_empty_chain_hands_the_gradient_on():
    assert torch.equal(run(fl.optim.chain(), [torch.ones(2, dtype=F64)])[0], torch.tensor([2.0, -1.0], dtype=F64))


def test_a_chain_takes_only_transforms_and_optimizers():
    with pytest.raises(fl.errors.FalllineError, match=r"not 0\.1"):
        fl.optim.chain(0.1)


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_clip_by_global_norm_equals_clip_grad_norm(max_norm, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (), (0,)]
    params = [nn.Parameter(torch.zeros(s, dtype=dtype)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=F64).to(dtype) * 3
    grads = {str(i): p.grad.clone() for i, p in enumerate(params)}
    clip = fl.optim.chain(fl.optim.clip_by_global_norm(max_norm))
    zeros = {name: torch.zeros_like(g) for name, g in grads.items()}
    updates, _ = clip.update(grads, clip.init(zeros), zeros)
    torch.nn.utils.clip_grad_norm_(params, max_norm)
    clipped = torch.cat([updates[str(i)].flatten() for i in range(len(shapes))])
    given = torch.cat([g.flatten() for g in grads.values()])
    assert torch.equal(clipped, given) == (max_norm == 1e3)
    for i, p in enumerate(params):
        torch.testing.assert_close(updates[str(i)], p.grad, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)
    assert clip.update({}, clip.init(zeros), zeros)[0] == {}


def test_clipping_makes_the_chain_one_that_is_not_elementwise():
    assert fl.optim.adam().elementwise
    assert not fl.optim.chain(fl.optim.clip_by_global_norm(1.0), fl.optim.adam()).elementwise


def test_an_own_rule_is_not_taken_for_elementwise_unless_it_says_so():
    normalised = fl.optim.per_tensor("normalised", lambda g, slots, p, n: (g / g.norm(), {}), {})
    assert not fl.optim.chain(normalised).elementwise


def power(k: float) -> base.Transform:
    return fl.optim.per_tensor("power", lambda g, slots, p, n: (g.abs() ** k, {}), {}, elementwise=True)


@fl.optim.described
def described_power(k: float = 1.0, beta: float = 0.5) -> base.Transform:
    rule = lambda g, slots, p, n: (g.abs() ** k * n["beta"].to(g.dtype), {})  # noqa: E731
    return fl.optim.per_tensor("power", rule, {"beta": beta}, elementwise=True)


def test_rules_that_differ_in_what_they_close_over_are_not_updated_together():
    assert fl.optim.chain(power(1.0)).structure != fl.optim.chain(power(2.0)).structure
    assert fl.optim.chain(described_power(1.0)).structure != fl.optim.chain(described_power(2.0)).structure
    assert fl.optim.chain(described_power(beta=0.1)).structure == fl.optim.chain(described_power(beta=0.2)).structure


def test_structures_differ_in_options_and_agree_over_numbers():
    o = fl.optim
    assert o.adam(lr=0.1, betas=(0.1, 0.2)).structure == o.adam().structure
    assert o.adam(amsgrad=True).structure != o.adam().structure
    assert o.sgd(momentum=0.9, nesterov=True).structure != o.sgd(momentum=0.9).structure
    assert o.sgd(momentum=0.9, dampening=0.1).structure != o.sgd(momentum=0.9).structure
    assert o.rmsprop(centered=True).structure != o.rmsprop().structure
    cosine, step = fl.schedules.cosine, fl.schedules.step
    assert o.sgd(lr=cosine(0.1)).structure == o.sgd(lr=cosine(0.2, end=0.1)).structure
    assert o.sgd(lr=cosine(0.1)).structure != o.sgd(lr=step(0.1)).structure != o.sgd(lr=0.1).structure


def test_the_printed_structure_holds_no_address():
    for optimizer in (fl.optim.adam(), fl.optim.chain(power(1.0)), fl.optim.chain(described_power(1.0))):
        assert " at 0x" not in repr(optimizer.structure)


def test_an_own_rules_numbers_are_checked():
    with pytest.raises(TypeError, match="k = 'x' is not a number"):
        fl.optim.per_tensor("mine", lambda g, slots, p, n: (g, {}), {"k": "x"})


def test_an_own_transform_prints_although_nothing_made_it():
    assert repr(power(1.0)) == "<transform power>"
    assert repr(fl.optim.chain(power(1.0))) == "fl.optim.chain(<transform power>)"
