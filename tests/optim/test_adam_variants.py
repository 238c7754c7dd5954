"""adabelief, yogi, adan and ademamix against pytorch_optimizer, and against the papers where that differs from them.

pytorch_optimizer's AdaBelief has the authors' arithmetic (eps inside the state and beside the root), its Adan that of
the authors' code, and its AdEMAMix the paper's schedulers, for both warm-ups at once. Its Yogi starts the mean of
gradients at initial_accumulator, too, where the paper starts it at zero: its state is set to zero here. Its Adan goes
uphill with a wrong first difference of gradients (the first gradient is remembered before its sign is changed), so
that is compared with the reference written from the paper.
"""

import math

import pytest
import torch
from pytorch_optimizer import AdaBelief, Adan, AdEMAMix, Yogi

import adaptive_references as references
import fallline as fl
from adaptive_references import (
    assert_equal,
    assert_trials_equal_each_alone,
    assert_zero_gradients_do_no_harm,
    by_reference,
    by_torch,
    first_update_in_float32,
    make,
    named,
    ours,
)

ADABELIEF = [
    {"lr": 0.01},
    {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.3},
    {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-8, "amsgrad": True},
    {"lr": 0.003, "weight_decay": 0.1, "maximize": True},
]
YOGI = [
    {},
    {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.3},
    {"lr": 0.01, "initial_accumulator": 0.5, "eps": 1e-8},
    {"lr": 0.003, "maximize": True},
]
ADAN = [
    {"lr": 0.01},
    {"lr": 0.02, "betas": (0.9, 0.7, 0.95), "eps": 1e-3, "weight_decay": 0.3},
    {"lr": 0.02, "weight_decay": 0.3, "no_prox": True},
]
ADEMAMIX = [
    {},
    {"lr": 0.01, "betas": (0.8, 0.95, 0.99), "alpha": 2.0, "eps": 1e-3, "weight_decay": 0.3},
    {"lr": 0.003, "beta3_warmup": 30, "alpha_warmup": 30},
    {"lr": 0.003, "betas": (0.7, 0.99, 0.999), "beta3_warmup": 77.5, "alpha_warmup": 77.5, "maximize": True},
]
EVERY = [
    make(name, **arguments)
    for name, cases in (("adabelief", ADABELIEF), ("yogi", YOGI), ("adan", ADAN), ("ademamix", ADEMAMIX))
    for arguments in cases
]

WITHOUT_FLOOR = [make("adabelief", eps=0.0), make("yogi", eps=0.0, initial_accumulator=0.0)]


@pytest.mark.parametrize("arguments", ADABELIEF, ids=str)
def test_adabelief_equals_pytorch_optimizer(arguments):
    theirs = {**arguments, "ams_bound": arguments.get("amsgrad", False)}
    theirs.pop("amsgrad", None)
    assert_equal(ours(make("adabelief", **arguments)), by_torch(lambda params: AdaBelief(params, **theirs)))


@pytest.mark.parametrize("arguments", YOGI, ids=str)
def test_yogi_equals_pytorch_optimizer_from_a_mean_of_zero(arguments):
    def prepare(optimizer, p):
        group = optimizer.param_groups[0]
        optimizer.state[p] = {
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.full_like(p, group["initial_accumulator"]),
        }

    theirs = by_torch(lambda params: Yogi(params, weight_decouple=False, **arguments), prepare=prepare)
    assert_equal(ours(make("yogi", **arguments)), theirs)


@pytest.mark.parametrize("arguments", ADAN, ids=str)
def test_adan_equals_pytorch_optimizer(arguments):
    theirs = {**arguments, "weight_decouple": arguments.get("no_prox", False)}
    theirs.pop("no_prox", None)
    assert_equal(ours(make("adan", **arguments)), by_torch(lambda params: Adan(params, **theirs)))


@pytest.mark.parametrize("arguments", ADAN, ids=str)
def test_adan_equals_the_papers_algorithm(arguments):
    assert_equal(ours(make("adan", **arguments)), by_reference(references.adan, arguments))


@pytest.mark.parametrize("arguments", ADEMAMIX, ids=str)
def test_ademamix_equals_pytorch_optimizer(arguments):
    theirs = {**arguments, "t_alpha_beta3": arguments.get("alpha_warmup")}
    for name in ("alpha_warmup", "beta3_warmup"):
        theirs.pop(name, None)
    assert_equal(
        ours(make("ademamix", **arguments)), by_torch(lambda params: AdEMAMix(params, weight_decouple=True, **theirs))
    )


@pytest.mark.parametrize(
    "warmups",
    [{"beta3_warmup": 20}, {"alpha_warmup": 20}, {"beta3_warmup": 35, "alpha_warmup": 90}],
    ids=str,
)
def test_ademamix_with_warm_ups_of_different_lengths_equals_the_papers_algorithm(warmups):
    arguments = {"lr": 0.003, "betas": (0.85, 0.99, 0.9995), "weight_decay": 0.2, **warmups}
    assert_equal(ours(make("ademamix", **arguments)), by_reference(references.ademamix, arguments))


@pytest.mark.parametrize("rule", ["adabelief", "yogi", "adan", "ademamix"])
def test_uphill_is_downhill_on_the_negated_gradient(rule):
    p, g = {"w": torch.tensor([2.0, -1.0])}, {"w": torch.tensor([0.3, -0.4])}
    up, down = make(rule, maximize=True, weight_decay=0.1), make(rule, weight_decay=0.1)
    if rule == "yogi":  # its decay is coupled, as in adam: added after the sign is changed
        up, down = make(rule, maximize=True), make(rule)
    states = [up.init(p), down.init(p)]
    for _ in range(3):
        mine, states[0] = up.update(g, states[0], p)
        theirs, states[1] = down.update({"w": -g["w"]}, states[1], p)
        assert torch.equal(mine["w"], theirs["w"])


def test_adabelief_adds_eps_to_the_state_at_every_step():
    """Of a gradient that is what was foretold (β₁ = 0: g = m), only the eps are left: s = eps (1 − β₂ᵗ)/(1 − β₂)."""
    rule = fl.optim.adabelief(betas=(0.0, 0.9), eps=0.01)
    p, g = {"w": torch.zeros(2, dtype=torch.float64)}, {"w": torch.ones(2, dtype=torch.float64)}
    state = rule.init(p)
    for t in range(1, 5):
        updates, state = rule.update(g, state, p)
        accumulated = 0.01 * (1 - 0.9**t) / 0.1
        torch.testing.assert_close(state["slots"]["w"]["exp_avg_var"], torch.full((2,), accumulated).double())
        expected = -1e-3 / (math.sqrt(accumulated / (1 - 0.9**t)) + 0.01)
        torch.testing.assert_close(updates["w"], torch.full((2,), expected).double())


def test_yogis_second_moment_shrinks_by_the_square_of_the_gradient_only():
    rule = fl.optim.yogi(betas=(0.9, 0.9), initial_accumulator=4.0)
    p = {"w": torch.zeros(3, dtype=torch.float64)}
    _, state = rule.update({"w": torch.tensor([0.0, 1.0, 3.0]).double()}, rule.init(p), p)
    after = torch.tensor([4.0, 4.0 - 0.1 * 1, 4.0 + 0.1 * 9], dtype=torch.float64)
    torch.testing.assert_close(state["slots"]["w"]["exp_avg_sq"], after)


def test_adan_sees_no_change_of_the_gradient_at_its_first_step():
    rule = fl.optim.adan(lr=1.0, eps=0.0)
    p = {"w": torch.zeros(2, dtype=torch.float64)}
    g = torch.tensor([3.0, -0.2], dtype=torch.float64)
    updates, state = rule.update({"w": g}, rule.init(p), p)
    torch.testing.assert_close(updates["w"], -g.sign())
    assert (state["slots"]["w"]["exp_avg_diff"] == 0).all()


def test_adans_proximal_decay_never_overshoots_zero():
    p, zero = {"w": torch.tensor([2.0, -3.0])}, {"w": torch.zeros(2)}
    for no_prox, share in ((False, 1 / 4), (True, -2.0)):
        rule = fl.optim.adan(lr=1.0, weight_decay=3.0, no_prox=no_prox)
        updates, _ = rule.update(zero, rule.init(p), p)
        torch.testing.assert_close(p["w"] + updates["w"], p["w"] * share)


def test_ademamix_without_slow_mean_is_adamw():
    mine = fl.optim.ademamix(lr=0.01, alpha=0.0, weight_decay=0.1)
    assert_equal(ours(mine), ours(fl.optim.adamw(lr=0.01, weight_decay=0.1)), rtol=1e-14)


def test_ademamix_after_a_warm_up_has_the_very_rates_that_it_was_given():
    """Of zero steps, or past its end; and with β₁ = 0, whose logarithm is infinite."""
    plain, warmed = make("ademamix"), make("ademamix", beta3_warmup=0, alpha_warmup=0)
    assert_equal(ours(warmed), ours(plain), rtol=0, atol=0)
    rule = make("ademamix", betas=(0.0, 0.999, 0.9), beta3_warmup=4, alpha_warmup=4)
    p, one = {"w": torch.zeros(1, dtype=torch.float64)}, {"w": torch.ones(1, dtype=torch.float64)}
    state, mean = rule.init(p), 0.0
    for t in range(1, 7):
        _, state = rule.update(one, state, p)
        beta3 = 0.9 ** (4 / min(t, 4))  # 1/ln β₃(t) goes in a straight line from 1/ln 0 = 0
        mean = beta3 * mean + (1 - beta3)
        torch.testing.assert_close(state["slots"]["w"]["exp_avg_slow"].item(), mean, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("rule", "size"),
    [
        (fl.optim.adabelief(lr=1.0, betas=(0.9, 1 - 1e-7), eps=0.0), 1 / 0.9),
        (fl.optim.yogi(lr=1.0, betas=(0.9, 1 - 1e-7), eps=0.0, initial_accumulator=0.0), 1.0),
        (fl.optim.adan(lr=1.0, betas=(0.9, 0.9, 1 - 1e-7), eps=0.0), 1.0),
        (fl.optim.ademamix(lr=1.0, betas=(0.9, 1 - 1e-7, 0.9), eps=0.0, alpha=0.0), 1.0),
        (fl.optim.adan(lr=1.0, betas=(1 - 1e-7, 0.9, 0.9), eps=0.0), 1.0),
    ],
    ids=named,
)
def test_bias_corrections_are_computed_in_float64_for_float32_parameters(rule, size):
    """At β = 1 − 10⁻⁷ the first correction is 10⁻⁷: in float32 it would be 1.19·10⁻⁷, and the step 9 % off."""
    expected = torch.tensor([-size, size, -size])
    torch.testing.assert_close(first_update_in_float32(rule), expected, rtol=1e-6, atol=0)


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
        (make("adabelief"), "eps", (1e-8, 1e-3, 0.1)),
        (make("yogi"), "initial_accumulator", (1e-6, 0.1, 2.0)),
        (make("adan", weight_decay=0.1), "weight_decay", (0.1, 0.5, 2.0)),
        (make("adan"), "beta2", (0.5, 0.9, 0.99)),
        (make("ademamix", beta3_warmup=9), "beta3_warmup", (0.0, 2.0, 30.0)),
        (make("ademamix", alpha_warmup=9), "alpha_warmup", (1.0, 2.0, 30.0)),
        (make("ademamix"), "alpha", (0.0, 2.0, 9.0)),
    ],
    ids=lambda value: named(value) if isinstance(value, fl.optim.Optimizer) else str(value),
)
def test_their_own_numbers_may_differ_between_trials(rule, name, values):
    assert_trials_equal_each_alone(rule, name, values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", [*EVERY, *WITHOUT_FLOOR], ids=named)
def test_zero_gradients_move_nothing_but_decaying_weights(rule, dtype):
    assert_zero_gradients_do_no_harm(rule, decays=rule.arguments["weight_decay"] > 0, dtype=dtype)


def test_a_schedule_of_yogis_initial_accumulator_counts_at_the_start():
    rule = fl.optim.yogi(initial_accumulator=fl.optim.schedules.cosine(0.5, end=9.0))
    p = {"w": torch.zeros(2)}
    assert (rule.init(p, steps=10)["slots"]["w"]["exp_avg_sq"] == 0.5).all()
