"""lamb against its paper, lars against pytorch_optimizer and its paper.

pytorch_optimizer's Lamb is not the paper's: without bias corrections inside the trust ratio, it divides the step by 1 −
β₁ᵗ after the ratio, caps ‖p‖ at 10, and decays weights outside of the ratio unless told otherwise. So lamb is compared
with a reference written from algorithm 2 of the paper. Its LARS is the paper's while the learning rate stands still;
with a schedule, lars is compared with a reference written from algorithm 1.
"""

import math

import pytest
import torch
from pytorch_optimizer import LARS

import adaptive_references as references
import fallline as fl
from adaptive_references import (
    SHAPES,
    assert_equal,
    assert_trials_equal_each_alone,
    assert_zero_gradients_do_no_harm,
    by_reference,
    by_torch,
    first_update_in_float32,
    make,
    named,
    ours,
    start,
)

LAMB = [
    {"lr": 0.01},
    {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3},
    {"lr": 0.02, "weight_decay": 0.5, "max_norm": 1.5},
    {"lr": 0.01, "weight_decay": 0.3, "exclude_1d": True},
]
LARS_CASES = [
    {"lr": 3.0},
    {"lr": 2.0, "momentum": 0.8, "weight_decay": 0.3, "trust_coefficient": 0.02, "nesterov": True},
    {"lr": 0.5, "momentum": 0.0, "weight_decay": 0.05, "trust_coefficient": 0.05},
    {"lr": 0.001, "weight_decay": 0.1, "trust_coefficient": 0.02, "maximize": True},
]
OF_THE_PAPER_ONLY = [
    {"lr": 1.0, "weight_decay": 0.3, "exclude_1d": False, "trust_coefficient": 0.01},
    {"lr": 1.0, "weight_decay": 0.3, "eps": 0.7, "trust_coefficient": 0.01, "momentum": 0.5},
]
EVERY = [
    *(make("lamb", **arguments) for arguments in LAMB),
    *(make("lars", **arguments) for arguments in (*LARS_CASES, *OF_THE_PAPER_ONLY)),
]
FEW_DIMENSIONS = {name for name, shape in SHAPES.items() if len(shape) < 2}


@pytest.mark.parametrize("arguments", LAMB, ids=str)
def test_lamb_equals_the_papers_algorithm(arguments):
    assert_equal(ours(make("lamb", **arguments)), by_reference(references.lamb, arguments))


@pytest.mark.parametrize("arguments", LARS_CASES, ids=str)
def test_lars_equals_pytorch_optimizer(arguments):
    assert_equal(ours(make("lars", **arguments)), by_torch(lambda params: LARS(params, **arguments)))


@pytest.mark.parametrize("arguments", [*LARS_CASES[:3], *OF_THE_PAPER_ONLY], ids=str)
def test_lars_equals_the_papers_algorithm(arguments):
    assert_equal(ours(make("lars", **arguments)), by_reference(references.lars, arguments))


def test_lars_equals_the_papers_algorithm_while_the_learning_rate_moves():
    """In the paper it enters the momentum. torch's way, to multiply afterwards, is another result."""
    cosine = fl.optim.schedules.cosine(3.0, end=0.1)
    arguments = {"weight_decay": 0.1, "trust_coefficient": 0.02}

    def change(t, arguments):
        return {**arguments, "lr": 0.1 + 2.9 * (1 + math.cos(math.pi * (t - 1) / 50)) / 2}

    theirs = by_reference(references.lars, arguments, change=change)
    assert_equal(ours(make("lars", lr=cosine, **arguments)), theirs)
    afterwards = fl.optim.chain(
        fl.optim.scale_by_lars(0.1, 0.02), fl.optim.trace(0.9), fl.optim.scale_by_learning_rate(cosine)
    )
    assert not torch.allclose(ours(afterwards)["matrix"], theirs["matrix"], rtol=1e-3)


def test_lamb_uphill_is_lamb_on_the_negated_gradient():
    p, g = {"w": torch.tensor([2.0, -1.0])}, {"w": torch.tensor([0.3, -0.4])}
    up, down = fl.optim.lamb(weight_decay=0.1, maximize=True), fl.optim.lamb(weight_decay=0.1)
    assert torch.equal(up.update(g, up.init(p), p)[0]["w"], down.update({"w": -g["w"]}, down.init(p), p)[0]["w"])


def test_lambs_steps_are_as_long_as_the_parameter_says():
    """‖u‖ = lr · φ(‖p‖), whatever the gradient's length; and lr · ‖r‖ where the parameter is zero."""
    p = {"w": torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)}
    for size in (1e-3, 1.0, 1e3):
        g = {"w": size * torch.tensor([[1.0, -1.0], [2.0, 1.0]], dtype=torch.float64)}
        for max_norm, length in ((None, 5.0), (2.0, 2.0), (7.0, 5.0)):
            rule = fl.optim.lamb(lr=0.1, weight_decay=0.2, max_norm=max_norm)
            updates, _ = rule.update(g, rule.init(p), p)
            assert updates["w"].norm().item() == pytest.approx(0.1 * length, rel=1e-12)
        zero = {"w": torch.zeros(2, 2, dtype=torch.float64)}
        rule = fl.optim.lamb(lr=0.1, eps=0.0)
        torch.testing.assert_close(rule.update(g, rule.init(zero), zero)[0]["w"], -0.1 * g["w"].sign())


def test_lars_steps_are_as_long_as_the_parameter_says():
    p = {"w": torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
    for size in (1e-3, 1.0, 1e3):
        g = {name: size * torch.ones_like(q) for name, q in p.items()}
        rule = fl.optim.lars(lr=2.0, trust_coefficient=0.1)
        updates, _ = rule.update(g, rule.init(p), p)
        assert updates["w"].norm().item() == pytest.approx(2.0 * 0.1 * 5, rel=1e-12)
        torch.testing.assert_close(updates["b"], -2.0 * g["b"])
        zero = {name: torch.zeros_like(q) for name, q in p.items()}
        torch.testing.assert_close(rule.update(g, rule.init(zero), zero)[0]["w"], -2.0 * g["w"])


def test_norms_do_not_overflow_in_half_precision():
    p = {"w": torch.full((30, 30), 3000.0, dtype=torch.float16)}
    g = {"w": torch.full((30, 30), 2000.0, dtype=torch.float16)}
    for rule, step in ((fl.optim.lars(lr=1.0), 3.0), (fl.optim.lamb(lr=1e-3), 3.0)):
        updates, _ = rule.update(g, rule.init(p), p)
        torch.testing.assert_close(updates["w"], torch.full((30, 30), -step, dtype=torch.float16), rtol=1e-2, atol=0)


def test_lambs_bias_corrections_are_computed_in_float64_for_float32_parameters():
    """Of a parameter at zero the ratio is 1, and at β₂ = 1 − 10⁻⁷ the first correction is 10⁻⁷."""
    rule = fl.optim.lamb(lr=1.0, betas=(0.9, 1 - 1e-7), eps=0.0)
    torch.testing.assert_close(first_update_in_float32(rule), torch.tensor([-1.0, 1.0, -1.0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", EVERY, ids=named)
def test_in_float32_only_round_off_differs(rule):
    truth = ours(rule)
    for name, p in ours(rule, dtype=torch.float32).items():
        torch.testing.assert_close(p.double(), truth[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", EVERY, ids=named)
def test_trials_updated_together_equal_each_alone(rule):
    assert_trials_equal_each_alone(rule)


@pytest.mark.parametrize(
    ("rule", "name", "values"),
    [
        (make("lamb", max_norm=1.0), "max_norm", (0.1, 1.0, 100.0)),
        (make("lamb"), "weight_decay", (0.0, 0.1, 3.0)),
        (make("lars"), "trust_coefficient", (0.0, 0.1, 1.0)),
        (make("lars"), "weight_decay", (0.0, 0.1, 3.0)),
        (make("lars"), "eps", (0.0, 0.1, 3.0)),
    ],
    ids=lambda value: named(value) if isinstance(value, fl.optim.Optimizer) else str(value),
)
def test_their_own_numbers_may_differ_between_trials(rule, name, values):
    assert_trials_equal_each_alone(rule, name, values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", EVERY, ids=named)
def test_zero_gradients_move_nothing_but_decaying_weights(rule, dtype):
    excluded = FEW_DIMENSIONS if rule.arguments["exclude_1d"] else set()
    decays = {name: rule.arguments["weight_decay"] > 0 and name not in excluded for name in start()}
    assert_zero_gradients_do_no_harm(rule, decays=decays, dtype=dtype)
