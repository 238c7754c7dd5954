"""Different optimizers for different parameters, against torch.optim with the parameters handed out by hand."""

import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import fallline as fl
from fallline.errors import FalllineError, InvalidHyperparameter
from fallline.optim.serial import from_data, to_data
from fallline.sweeps import search
from fallline.sweeps.programs import Programs
from fallline.sweeps.vectorised import Population

o = fl.optim
F64 = torch.float64
STEPS = 50


class Net(nn.Module):
    """An embedding, a hidden layer with a norm, and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 6, bias=False)
        self.hidden = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.hidden(torch.tanh(self.embed(x))))))


def net():
    torch.manual_seed(0)
    return Net().double()


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 8, generator=generator, dtype=F64)
    return x, (x.sum(1) > 0).long()


def task():
    return fl.Task("test", lambda: Net().double(), data(), "cross_entropy", batch_size=16)


def batch(step):
    x, y = data()
    rows = [(step * 16 + i) % len(x) for i in range(16)]
    return x[rows], y[rows]


def ours(rule, steps=STEPS):
    model = net()
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = rule.init(params, steps=steps)
    for step in range(steps):
        x, y = batch(step)
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        loss = nn.functional.cross_entropy(torch.func.functional_call(model, leaves, (x,)), y)
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        updates, state = rule.update(grads, state, params, steps=steps)
        params = {name: p + updates[name] for name, p in params.items()}
    return params, state


def loop(model, optimizers, schedulers=(), clip=None, steps=STEPS):
    """The plain loop over several of torch's optimizers."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(steps):
        x, y = batch(step)
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if clip:
            clip(model)
        for each in (*optimizers, *schedulers):
            each.step()
    after = {name: p.detach() for name, p in model.named_parameters()}
    assert all((after[name] != p).all() for name, p in before.items()), "a parameter did not move"
    return after


def assert_equal(found, expected, rtol=1e-10):
    for name, p in expected.items():
        torch.testing.assert_close(found[name], p, rtol=rtol, atol=1e-13)


def split(model, is_first):
    named = list(model.named_parameters())
    return [[p for n, p in named if is_first(n, p) == first] for first in (True, False)]


NO_DECAY = o.partition(
    o.by_shape(),
    {"matrices": o.adamw(lr=0.01, weight_decay=0.3), "vectors": o.adamw(lr=0.01, weight_decay=0.0)},
)


@pytest.mark.parametrize("rule", [NO_DECAY, o.no_decay_on_vectors(o.adamw(lr=0.01, weight_decay=0.3))], ids=repr)
def test_adamw_without_decay_on_biases_and_norms_is_torchs_with_two_groups(rule):
    model = net()
    matrices, vectors = split(model, lambda n, p: p.dim() >= 2)
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    assert len(vectors) == 4
    expected = loop(model, [torch.optim.AdamW(groups, lr=0.01)])
    assert_equal(ours(rule)[0], expected)
    everywhere = ours(o.adamw(lr=0.01, weight_decay=0.3))[0]
    assert (everywhere["norm.weight"] - expected["norm.weight"]).abs().min() > 1e-4


def test_coupled_decay_is_left_out_for_vectors_too():
    model = net()
    matrices, vectors = split(model, lambda n, p: p.dim() >= 2)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}]
    expected = loop(model, [torch.optim.SGD(groups, lr=0.05, momentum=0.9)])
    assert_equal(ours(o.no_decay_on_vectors(o.sgd(lr=0.05, momentum=0.9, weight_decay=0.1)))[0], expected)


def test_every_decay_in_a_chain_is_left_out():
    twice = o.chain(o.add_decayed_weights(0.1), o.add_decayed_weights(0.2), o.sgd(lr=0.05))
    rule, p = o.no_decay_on_vectors(twice), {"w": torch.ones(2, dtype=F64), "m": torch.ones(1, 1, dtype=F64)}
    zero = {name: torch.zeros_like(t) for name, t in p.items()}
    updates, _ = rule.update(zero, rule.init(p), p)
    assert (updates["w"] == 0).all()
    assert updates["m"].item() == pytest.approx(-0.05 * 0.3)


def by_layer(name, parameter):
    return name.split(".")[0]


THREE = {
    "embed": o.sgd(lr=0.1, momentum=0.9),
    "hidden": o.adam(lr=0.01),
    "norm": o.scale_by_learning_rate(0.2),
    "head": o.lion(lr=0.003),
}


def test_each_parameter_is_trained_by_the_optimizer_of_its_label():
    from plain_loop import Lion

    model = net()
    parts = {name: list(getattr(model, name).parameters()) for name in THREE}
    expected = loop(
        model,
        [
            torch.optim.SGD(parts["embed"], lr=0.1, momentum=0.9),
            torch.optim.Adam(parts["hidden"], lr=0.01),
            torch.optim.SGD(parts["norm"], lr=0.2),
            Lion(parts["head"], lr=0.003),
        ],
    )
    params, state = ours(o.partition(by_layer, THREE))
    assert_equal(params, expected)
    assert [set(state["slots"][f"{name}.weight"]) - {"step"} for name in THREE] == [
        {"momentum_buffer"},
        {"step_2", "exp_avg", "exp_avg_sq"} & set(state["slots"]["hidden.weight"]) | {"exp_avg", "exp_avg_sq"},
        set(),
        {"exp_avg_2"},
    ]


def test_a_global_norm_is_that_of_the_partition():
    clipped = o.chain(o.clip_by_global_norm(0.05), o.sgd(lr=0.5))
    rule = o.partition(o.by_shape(), {"matrices": clipped, "vectors": o.sgd(lr=0.1)})
    model = net()
    matrices, vectors = split(model, lambda n, p: p.dim() >= 2)
    norms = []

    def clip(model):
        norms.append(torch.nn.utils.clip_grad_norm_(matrices, 0.05))

    expected = loop(model, [torch.optim.SGD(matrices, lr=0.5), torch.optim.SGD(vectors, lr=0.1)], clip=clip)
    assert min(norms) > 0.05
    assert_equal(ours(rule)[0], expected)
    assert rule.together


MUON = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}


in_torch = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


def muon_and_adamw(model, chosen, lr=0.02, adamw_lr=0.02):
    matrices, rest = split(model, chosen)
    assert matrices
    assert rest
    return [
        torch.optim.Muon(matrices, **{**MUON, "lr": lr}),
        torch.optim.AdamW(rest, lr=adamw_lr, weight_decay=0.1),
    ]


@in_torch
def test_muon_with_adamw_is_torchs_muon_and_adamw_side_by_side():
    model = net()
    expected = loop(model, muon_and_adamw(model, lambda n, p: p.dim() == 2))
    assert_equal(ours(o.muon_with_adamw(lr=0.02))[0], expected)


def hidden_by_muon(name, parameter):
    return "muon" if name == "hidden.weight" else "adamw"


@in_torch
@pytest.mark.parametrize("kept", [("embed*", "head.*"), hidden_by_muon], ids=["patterns", "function"])
def test_embeddings_and_heads_may_stay_with_adamw(kept):
    rule = o.muon_with_adamw(lr=0.02, adamw_lr=0.005, adamw_for=kept)
    model = net()
    optimizers = muon_and_adamw(model, lambda n, p: n == "hidden.weight", adamw_lr=0.005)
    assert_equal(ours(rule)[0], loop(model, optimizers))


@in_torch
def test_a_scheduler_of_torch_moves_both_rates_of_muon_with_adamw():
    model, expected = net(), net()
    optimizers = muon_and_adamw(expected, lambda n, p: n == "hidden.weight")
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(each, T_max=STEPS) for each in optimizers]
    mine = o.muon_with_adamw(lr=0.02, adamw_for=("embed*", "head*")).as_torch(model.named_parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(mine, T_max=STEPS)
    assert_equal(loop(model, [mine], [scheduler]), loop(expected, optimizers, schedulers))


def test_muon_leaves_kernels_of_convolutions_to_adamw():
    rule = o.muon_with_adamw()
    state = rule.init({"kernel": torch.zeros(2, 2, 3, 3), "scalar": torch.zeros(()), "matrix": torch.zeros(2, 2)})
    assert [("momentum_buffer" in state["slots"][n]) for n in ("kernel", "scalar", "matrix")] == [False, False, True]


ALL = [
    NO_DECAY,
    o.no_decay_on_vectors(o.chain(o.clip_by_global_norm(0.3), o.adamw(lr=0.05, weight_decay=0.3))),
    o.partition(by_layer, THREE),
    o.partition(
        o.by_name({"edge": ["embed.*", "head.*"]}, otherwise=o.by_shape()),
        {"vectors": o.sgd(lr=0.1), "matrices": o.lookahead(o.adam(lr=0.05), k=3), "edge": o.lion(lr=0.01)},
    ),
    o.muon_with_adamw(lr=0.02, adamw_for="head.*"),
    o.lookahead(o.partition(o.by_shape(), {"matrices": o.accumulate(o.adam(lr=0.1), 2), "vectors": o.sgd(lr=0.1)})),
]


@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_engines_fit_and_traced_programs_agree(rule):
    runs = [fl.sweep(task(), [rule], seeds=2, steps=20, engine=e) for e in ("vectorised", "sequential")]
    np.testing.assert_allclose(*(run.history.train_loss for run in runs), rtol=1e-8)
    fitted = fl.fit(task(), rule, seed=1, steps=20)
    np.testing.assert_allclose(fitted.history.train_loss, runs[0].history.train_loss[1], rtol=1e-8)
    chosen = search.trials(search.configurations([rule], [task().loss], samples=1, search_seed=0), [0, 1])
    losses = []
    for programs in (None, Programs()):
        population = Population(task(), chosen, steps=20, device=torch.device("cpu"), programs=programs)
        losses.append(population.train_steps(20))
        assert programs is None or programs.all_traced
    np.testing.assert_allclose(*losses, rtol=1e-8)


@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_as_torch_with_named_parameters_is_the_same_rule(rule):
    model = net()
    optimizer = rule.as_torch(model.named_parameters())
    assert_equal(loop(model, [optimizer], steps=15), ours(rule, steps=15)[0], rtol=1e-8)


@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_values_travel_and_take_other_numbers(rule):
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert from_data(json.loads(json.dumps(to_data(rule)))) == rule
    assert eval(repr(rule), {"fl": fl, "by_layer": by_layer}) == rule
    assert " at 0x" not in repr(rule.structure)
    numbers = {name: value * 0.5 if "lr" in name else value for name, value in rule.hyperparameters.items()}
    changed = rule.with_numbers(numbers)
    assert changed.numbers == {name: float(value) for name, value in numbers.items()}
    assert changed.structure == rule.structure


def test_numbers_inside_are_swept_together_as_one_by_one():
    lr, rate, k = fl.grid([0.01, 0.1]), fl.log_uniform(0.01, 1.0), fl.grid([2, 3])
    template = o.partition(o.by_shape(), {"matrices": o.lookahead(o.adam(lr=lr), k=k), "vectors": o.sgd(lr=rate)})
    assert template.dimensions == {"lr": lr, "k": k, "lr_2": rate}
    found = search.configurations([template], [task().loss], samples=2, search_seed=0)
    assert len(found) == 8
    assert len({each.optimizer.structure for each in found}) == 1
    together = fl.sweep(task(), [template], seeds=1, steps=15, samples=2)
    for i in (0, 3, 7):
        alone = fl.sweep(task(), [found[i].optimizer], seeds=1, steps=15)
        np.testing.assert_allclose(together.history.train_loss[i], alone.history.train_loss[0], rtol=1e-9)
    assert len(np.unique(together.history.train_loss[:, -1])) == 8


def test_schedules_inside_are_followed():
    rule = o.partition(o.by_shape(), {"matrices": o.sgd(lr=fl.schedules.cosine(0.5)), "vectors": o.sgd(lr=0.1)})
    model = net()
    matrices, vectors = split(model, lambda n, p: p.dim() >= 2)
    first = torch.optim.SGD(matrices, lr=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(first, T_max=STEPS)
    expected = loop(model, [first, torch.optim.SGD(vectors, lr=0.1)], [scheduler])
    assert_equal(ours(rule)[0], expected)


def test_each_partition_is_evaluated_in_its_own_way():
    averaged = o.chain(o.sgd(lr=0.5), o.ema_of_parameters(0.9))
    rule = o.partition(o.by_shape(), {"matrices": averaged, "vectors": o.sgd(lr=0.5)})
    params, state = ours(rule)
    alone, alone_state = ours(averaged)
    found, expected = rule.evaluation_parameters(state, params), averaged.evaluation_parameters(alone_state, alone)
    assert list(found) == list(params)
    for name, p in params.items():
        if p.dim() < 2:
            assert torch.equal(found[name], p)
        else:
            torch.testing.assert_close(found[name], expected[name])
            assert (found[name] - p).abs().max() > 1e-4
    runs = [fl.sweep(task(), [rule], seeds=2, steps=20, engine=e) for e in ("vectorised", "sequential")]
    np.testing.assert_allclose(*(run.history.validation_loss for run in runs), rtol=1e-9)
    plain = fl.sweep(task(), [o.sgd(lr=0.5)], seeds=2, steps=20)
    assert abs(runs[0].history.validation_loss[0, -1] - plain.history.validation_loss[0, -1]) > 1e-6


def test_a_lambda_works_in_fit_and_cannot_be_written_down():
    rule = o.partition(lambda name, p: "all", {"all": o.sgd(lr=0.1)})
    run = fl.fit(task(), rule, steps=3)
    assert np.isfinite(run.history.train_loss).all()
    with pytest.raises(FalllineError, match=r"lambda.*cannot be written down.*top of a module"):
        to_data(rule)
    with pytest.raises(FalllineError, match="cannot be written down"):
        fl.sweep(task(), [rule], seeds=1, steps=3)


def test_empty_partitions_and_missing_gradients_do_no_harm():
    rule = o.partition(o.by_shape(), {"matrices": o.muon(lr=0.1), "vectors": o.sgd(lr=0.5), "others": o.adam()})
    p = {"v": torch.ones(2), "w": torch.ones(3)}
    state = rule.init(p)
    updates, state = rule.update({"w": torch.ones(3)}, state, p)
    assert list(updates) == ["w"]
    assert torch.equal(updates["w"], torch.full((3,), -0.5))
    updates, state = rule.update({}, state, p)
    assert updates == {}
    assert state["step"] == 2


def test_a_label_without_optimizer_names_the_parameter_and_the_label():
    rule = o.partition(o.by_shape(), {"matrices": o.adam(), "vector": o.sgd()})
    with pytest.raises(
        InvalidHyperparameter,
        match=r"parameter 'hidden.bias' of shape .5,. has the label 'vectors'.*Did you mean 'vector'",
    ):
        rule.init(dict(net().named_parameters()))
    with pytest.raises(InvalidHyperparameter, match="'vectors', for which there is no optimizer"):
        fl.fit(task(), rule, steps=1)
    with pytest.raises(InvalidHyperparameter, match=r"the label 3, for which there is no optimizer\. There are: a"):
        o.partition(lambda n, p: 3, {"a": o.sgd()}).init({"w": torch.ones(1)})


def test_an_optimizer_inside_refuses_what_it_cannot_train():
    rule = o.partition(lambda n, p: n, {"m": o.muon(), "v": o.muon()})
    rule.init({"m": torch.ones(2, 2)})
    with pytest.raises(FalllineError, match="'v'"):
        rule.init({"m": torch.ones(2, 2), "v": torch.ones(2)})


def test_patterns_need_names():
    rule = o.muon_with_adamw(adamw_for="head.*")
    with pytest.raises(InvalidHyperparameter, match=r"has no name for the patterns.*named_parameters"):
        rule.as_torch(net().parameters()).step()
    o.muon_with_adamw().as_torch(net().parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: o.partition("matrices", {"a": o.sgd()}), "label = 'matrices' is not a function"),
        (lambda: o.partition(by_layer, {}), r"optimizers = \{\} holds none"),
        (lambda: o.partition(by_layer, [o.sgd()]), "holds none: give a dict"),
        (lambda: o.partition(by_layer, {1: o.sgd()}), "the label 1 of optimizers is not a text"),
        (lambda: o.partition(by_layer, {"a": 0.1}), r"optimizers\['a'\] = 0\.1 is not an optimizer"),
        (lambda: o.partition(by_layer, {"a": o.sgd(lr=fl.grid([0.1, -1.0]))}), r"lr = -1\.0 is negative"),
        (lambda: o.no_decay_on_vectors(o.sgd()), "has no weight decay"),
        (lambda: o.no_decay_on_vectors(0.1), "takes an optimizer, not 0.1"),
        (lambda: o.muon_with_adamw(adamw_for=(1,)), "is no pattern of names"),
        (lambda: o.muon_with_adamw(adamw_lr=-1.0), r"lr = -1\.0 is negative"),
    ],
)
def test_a_mistake_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_what_looks_around_sees_its_own_parameters():
    seen = []

    def apply(updates, slots, params, numbers, moment):
        seen.append(sorted(moment.landscape.gradient(params)))
        return updates, {}

    looking = o.Transform("looks", {}, apply, surveys=lambda step: True)
    rule = o.partition(lambda n, p: n, {"a": o.sgd(), "b": o.chain(looking, o.sgd())})
    p = {"a": torch.ones(1), "b": torch.ones(1)}
    rule.update(p, rule.init(p), p, landscape=o.Landscape.of(lambda at: (at["a"] * at["b"]).sum(), p))
    assert seen == [["b"]]
