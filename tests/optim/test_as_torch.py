"""The torch adapter: a real torch.optim.Optimizer, in everything that torch's users do with one."""

import copy
import io
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim import lr_scheduler

import fallline as fl
from fallline.optim.catalogue import CATALOGUE
from plain_loop import PAIRS

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.sin(X.sum(1, keepdim=True))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def train(model, optimizer, steps=10, scheduler=None):
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(X) - Y) ** 2).mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [p.detach().clone() for p in model.parameters()]


def close(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_model_trains_as_with_torch(pair):
    model, reference = make_model(), make_model()
    close(
        train(model, pair.ours.as_torch(model.parameters())),
        train(reference, pair.torch(list(reference.parameters()))),
    )
    assert all((p != q).any() for p, q in zip(model.parameters(), make_model().parameters(), strict=True))


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=11),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.7)], [3]
    ),
}
PAIRED = {
    "sgd": (fl.optim.sgd(0.05, 0.9), lambda p: torch.optim.SGD(p, 0.05, 0.9)),
    "adam": (fl.optim.adam(0.05), lambda p: torch.optim.Adam(p, 0.05)),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", PAIRED)
def test_torchs_schedulers_drive_it(name, scheduler):
    ours, theirs = PAIRED[name]
    model, reference = make_model(), make_model()
    mine, torchs = ours.as_torch(model.parameters()), theirs(reference.parameters())
    close(
        train(model, mine, 10, SCHEDULERS[scheduler](mine)),
        train(reference, torchs, 10, SCHEDULERS[scheduler](torchs)),
    )


@pytest.mark.parametrize("scheduler", ["StepLR", "CosineAnnealingLR"])
def test_torchs_schedulers_drive_a_chain(scheduler):
    chain = fl.optim.chain(fl.optim.scale_by_adam(), fl.optim.scale_by_learning_rate(0.05))
    model, reference = make_model(), make_model()
    mine, torchs = chain.as_torch(model.parameters()), torch.optim.Adam(reference.parameters(), 0.05)
    close(
        train(model, mine, 10, SCHEDULERS[scheduler](mine)),
        train(reference, torchs, 10, SCHEDULERS[scheduler](torchs)),
    )


def groups(model, **second):
    return [{"params": model[0].parameters()}, {"params": model[2].parameters(), **second}]


@pytest.mark.parametrize(
    "second",
    [{"lr": 0.3}, {"weight_decay": 0.2}, {"momentum": 0.5}, {"momentum": 0.0}, {"lr": torch.tensor(0.3)}],
    ids=str,
)
def test_groups_have_their_own_numbers(second):
    model, reference = make_model(), make_model()
    close(
        train(model, fl.optim.sgd(0.1, 0.9).as_torch(groups(model, **second))),
        train(reference, torch.optim.SGD(groups(reference, **second), 0.1, 0.9)),
    )


def test_groups_of_a_chain_change_its_hyperparameters():
    chain = fl.optim.chain(fl.optim.add_decayed_weights(0.1), fl.optim.trace(0.9), fl.optim.scale_by_learning_rate(0.1))
    second = {"lr": 0.02, "momentum": 0.3, "weight_decay": 0.5}
    model, reference = make_model(), make_model()
    close(
        train(model, chain.as_torch(groups(model, **second))),
        train(reference, torch.optim.SGD(groups(reference, **second), 0.1, 0.9, weight_decay=0.1)),
    )
    with pytest.raises(TypeError, match=r"no 'momentun'. Did you mean 'momentum'"):
        chain.as_torch(groups(make_model(), momentun=0.1))
    with pytest.raises(ValueError, match=r"lr = -1 is negative"):
        chain.as_torch(groups(make_model(), lr=-1))


def test_a_transform_that_nothing_made_takes_its_groups_numbers_too():
    own = fl.optim.per_tensor("own", lambda g, s, p, n: (-g * n["size"].to(g.dtype), {}), {"size": 0.1})
    model, reference = make_model(), make_model()
    close(
        train(model, fl.optim.chain(own).as_torch(groups(model, size=0.3))),
        train(reference, torch.optim.SGD([*groups(reference, lr=0.3)], 0.1)),
    )


@pytest.mark.parametrize(("key", "hint"), [("lrr", "'lr'"), ("weight_decy", "'weight_decay'"), ("zzz", "There are")])
def test_an_unknown_group_key_names_the_nearest(key, hint):
    with pytest.raises(fl.errors.UnknownArgument, match=rf"no '{key}'.*{hint}"):
        fl.optim.sgd().as_torch(groups(make_model(), **{key: 1.0}))


def test_a_group_outside_its_domain_is_refused_and_not_added():
    model = make_model()
    optimizer = fl.optim.adam().as_torch(model[0].parameters())
    with pytest.raises(ValueError, match=r"beta2 = 1\.5"):
        optimizer.add_param_group({"params": model[2].parameters(), "betas": (0.9, 1.5)})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(TypeError, match=r"not a dict"):
        optimizer.add_param_group([nn.Parameter(torch.zeros(1))])


def test_a_group_may_join_later():
    def run(make):
        model = make_model()
        optimizer = make(model[0].parameters())
        train(model, optimizer, 4)
        optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.2})
        return train(model, optimizer, 4)

    close(run(fl.optim.adam(0.05).as_torch), run(lambda p: torch.optim.Adam(p, 0.05)))


def test_named_parameters_keep_their_names():
    model, reference = make_model(), make_model()
    optimizer = fl.optim.adam(0.05).as_torch(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    close(train(model, optimizer), train(reference, torch.optim.Adam(reference.parameters(), 0.05)))


def test_parameters_without_gradient_are_left_alone():
    def run(make):
        used, late, never = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3))
        optimizer = make([used, late, never])
        for step in range(6):
            optimizer.zero_grad()
            loss = (used**2).sum() + ((late - 3) ** 2).sum() * (1 if step >= 3 else 0)
            loss.backward()
            if step < 3:
                late.grad = None
            optimizer.step()
        return optimizer, used, late, never

    mine, theirs = run(fl.optim.adam(0.1).as_torch), run(lambda p: torch.optim.Adam(p, 0.1))
    close([p.detach() for p in mine[1:]], [p.detach() for p in theirs[1:]])
    assert torch.equal(mine[3], torch.ones(2, dtype=torch.float64))
    assert mine[0].state[mine[1]]["step"] == 6
    assert mine[0].state[mine[2]]["step"] == 3
    assert mine[3] not in mine[0].state


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_gradients_are_never_written(pair):
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    p.grad = torch.tensor([0.5, 0.25])
    grad, kept = p.grad, p.grad.clone()
    optimizer = pair.ours.as_torch([p])
    optimizer.step()
    optimizer.step()
    assert p.grad is grad
    assert torch.equal(grad, kept)


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = fl.optim.sgd(0.1).as_torch([p])

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    torch.testing.assert_close(p.detach(), torch.tensor([2.4]))
    assert optimizer.step() is None


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse=False"):
        fl.optim.sgd().as_torch(embedding.parameters()).step()


SCHEDULED = fl.optim.adam(lr=fl.schedules.linear_warmup(fl.schedules.cosine(0.1), fraction=0.2), weight_decay=0.1)
RESUMED = {
    **{str(pair): pair.ours for pair in PAIRS},
    "schedule": SCHEDULED,
    "chain": fl.optim.chain(
        fl.optim.clip_by_global_norm(0.5), fl.optim.trace(0.9, 0.1), fl.optim.scale_by_adam(), fl.optim.adamw(0.01)
    ),
    "chain with schedule": fl.optim.chain(
        fl.optim.scale_by_adam(), fl.optim.scale_by_learning_rate(fl.schedules.cosine(0.1))
    ),
}


@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("name", RESUMED)
def test_a_state_dict_saved_to_a_file_resumes_bit_for_bit(name, grouped):
    def build(model):
        params = groups(model, lr=0.07) if grouped and "lr" in RESUMED[name].hyperparameters else model.parameters()
        return RESUMED[name].as_torch(params, steps=12)

    model = make_model()
    through = train(model, build(model), 12)
    model = make_model()
    optimizer = build(model)
    train(model, optimizer, 5)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    torch.manual_seed(9)
    resumed = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    resumed.load_state_dict(saved["model"])
    again = build(resumed)
    again.load_state_dict(saved["optimizer"])
    assert equal(train(resumed, again, 7), through)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", RESUMED)
def test_copies_of_model_and_optimizer_go_on_bit_for_bit(name, copied):
    model = make_model()
    optimizer = RESUMED[name].as_torch(model.parameters(), steps=12)
    train(model, optimizer, 5)
    model_copy, optimizer_copy = copied((model, optimizer))
    assert optimizer_copy.param_groups[0]["params"][0] is model_copy[0].weight
    before = [p.detach().clone() for p in model.parameters()]
    moved = train(model_copy, optimizer_copy, 7)
    assert equal(before, list(model.parameters()))
    assert equal(moved, train(model, optimizer, 7))
    with pytest.raises(TypeError, match=r"no 'differentiable'"):
        optimizer_copy.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "differentiable": True})


def test_counts_survive_in_bfloat16():
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    chain = fl.optim.chain(fl.optim.scale_by_adam(), fl.optim.scale_by_adam())
    optimizer = chain.as_torch([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["step"] += 256  # 257 is no bfloat16
    optimizer.load_state_dict(saved)
    assert optimizer.state[p]["step"] == 257


def test_a_state_dict_of_torchs_adam_can_be_loaded():
    model, reference = make_model(), make_model()
    theirs = torch.optim.Adam(reference.parameters(), 0.05, betas=(0.8, 0.9))
    train(reference, theirs, 5)
    model.load_state_dict(reference.state_dict())
    mine = fl.optim.adam().as_torch(model.parameters())
    mine.load_state_dict(theirs.state_dict())
    close(train(model, mine, 5), train(reference, theirs, 5))


def test_a_state_dict_of_another_optimizer_is_refused():
    saved = fl.optim.sgd().as_torch([nn.Parameter(torch.zeros(1))]).state_dict()
    with pytest.raises(fl.errors.FalllineError, match=r"another optimizer: adam has 'amsgrad'"):
        fl.optim.adam().as_torch([nn.Parameter(torch.zeros(1))]).load_state_dict(saved)


def test_its_own_schedule_repeats_torchs_scheduler_and_shows_in_the_group():
    model, reference = make_model(), make_model()
    mine = fl.optim.adam(lr=fl.schedules.cosine(0.1)).as_torch(model.parameters(), steps=10)
    theirs = torch.optim.Adam(reference.parameters(), 0.1)
    scheduler = lr_scheduler.CosineAnnealingLR(theirs, 10)
    for _ in range(10):
        assert mine.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"])
        close(train(model, mine, 1), train(reference, theirs, 1, scheduler))
    train(model, mine, 1)
    assert mine.param_groups[0]["lr"] == 0.0


def test_its_own_schedule_goes_on_while_a_group_is_frozen():
    frozen, used = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = fl.optim.sgd(lr=fl.schedules.cosine(1.0)).as_torch([{"params": [frozen]}, {"params": [used]}], steps=4)
    for _ in range(2):
        used.grad = torch.ones(1)
        optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.5])
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert optimizer.param_groups[2]["lr"] == pytest.approx(0.5)
    optimizer.step()
    assert len({group["lr"] for group in optimizer.param_groups}) == 1


def test_two_schedules_for_one_number_are_refused():
    model = make_model()
    optimizer = fl.optim.sgd(lr=fl.schedules.cosine(0.1)).as_torch(model.parameters(), steps=10)
    with pytest.raises(ValueError, match=r"lr follows .* use one schedule"):
        train(model, optimizer, 10, lr_scheduler.StepLR(optimizer, 2))


def test_an_option_turned_on_in_a_group_starts_its_state():
    model, reference = make_model(), make_model()
    mine, theirs = fl.optim.sgd(0.1).as_torch(model.parameters()), torch.optim.SGD(reference.parameters(), 0.1)
    for optimizer, own in ((mine, model), (theirs, reference)):
        train(own, optimizer, 3)
        optimizer.param_groups[0].update(momentum=0.9, dampening=0.5)
        train(own, optimizer, 3)
    close(list(model.parameters()), list(reference.parameters()))


def test_an_option_turned_on_later_keeps_the_state_that_there_is():
    model, reference = make_model(), make_model()
    mine = fl.optim.rmsprop(0.01).as_torch(model.parameters())
    theirs = torch.optim.RMSprop(reference.parameters(), 0.01)
    train(model, mine, 3)
    train(reference, theirs, 3)
    mine.param_groups[0]["momentum"] = 0.9  # its buffer starts empty, so that the next step is one without momentum
    close(train(model, mine, 1), train(reference, theirs, 1))
    assert (mine.state[model[0].weight]["momentum_buffer"] != 0).any()


def test_it_prints_its_rule():
    assert "fl.optim.sgd(lr=0.1)" in repr(fl.optim.sgd(0.1).as_torch([nn.Parameter(torch.zeros(1))]))


def named(model, order=slice(None)):
    return list(model.named_parameters())[order]


@pytest.mark.parametrize("name", ["adam", "chain"])
def test_a_state_dict_finds_its_parameters_by_name(name):
    rule = {"adam": fl.optim.adam(0.05), "chain": RESUMED["chain"]}[name]
    model = make_model()
    optimizer = rule.as_torch(named(model))
    train(model, optimizer, 5)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    through = train(model, optimizer, 5)
    again = make_model()
    again.load_state_dict(weights)
    turned = rule.as_torch([(f"_orig_mod.{n}", p) for n, p in named(again, slice(None, None, -1))])
    turned.load_state_dict(saved)
    assert turned.param_groups[0]["param_names"][0] == "_orig_mod.2.bias"
    assert equal(train(again, turned, 5), through)


def test_a_state_dict_of_other_names_is_refused():
    model = make_model()
    saved = fl.optim.adam().as_torch(named(model)).state_dict()
    with pytest.raises(fl.errors.FalllineError, match=r"no parameter 'head.bias'. Did you mean '2.bias'"):
        fl.optim.adam().as_torch([(n.replace("2.", "head."), p) for n, p in named(model)]).load_state_dict(saved)


def test_our_state_dict_loads_into_torchs_optimizers():
    for ours, make in (
        (fl.optim.adam(0.05), torch.optim.Adam),
        (fl.optim.rmsprop(0.01, momentum=0.5, centered=True), torch.optim.RMSprop),
        (fl.optim.sgd(0.05, 0.9), torch.optim.SGD),
        (fl.optim.adamax(0.05), torch.optim.Adamax),
        (fl.optim.adagrad(0.05), torch.optim.Adagrad),
    ):
        for kernels in (True, False):
            model, reference = make_model(), make_model()
            mine = ours.as_torch(model.parameters())
            mine.kernels = kernels
            train(model, mine, 5)
            reference.load_state_dict(model.state_dict())
            theirs = make(reference.parameters())
            theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
            close(train(model, mine, 5), train(reference, theirs, 5))


def test_a_loaded_state_is_a_copy():
    first, second = make_model(), make_model()
    mine, other = (fl.optim.adam(0.05).as_torch(model.parameters()) for model in (first, second))
    train(first, mine, 3)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(mine.state_dict())
    expected = train(first, copy.deepcopy((first, mine))[1], 0)
    train(second, other, 3)
    assert equal(expected, list(first.parameters()))
    assert mine.state[first[0].weight]["step"] == 3


def test_state_takes_the_dtype_of_its_parameter_and_counts_do_not():
    rule = fl.optim.lookahead(fl.optim.adam(0.05))
    model = make_model()
    optimizer = rule.as_torch(model.parameters())
    train(model, optimizer, 3)
    half = make_model().float()
    other = rule.as_torch(half.parameters())
    other.load_state_dict(optimizer.state_dict())
    dtypes = {name: t.dtype for name, t in other.state[half[0].weight].items()}
    assert dtypes.pop("step") == torch.float64
    assert dtypes.pop("step_2") == torch.float64
    assert set(dtypes.values()) == {torch.float32}


def test_hooks_run():
    model = make_model()
    optimizer = fl.optim.adam().as_torch(model.parameters())
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state.pop("mine")))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    train(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", 1, "loaded"]


def test_a_grad_scaler_skips_steps_that_overflow():
    def run(make):
        model = make_model().float()
        optimizer = make(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(6):
            optimizer.zero_grad()
            loss = ((model(X.float()) - Y.float()) ** 2).mean() * (torch.inf if step == 2 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return [p.detach() for p in model.parameters()], scaler.get_scale()

    mine, theirs = run(fl.optim.adam(0.05).as_torch), run(lambda p: torch.optim.Adam(p, 0.05))
    assert mine[1] == theirs[1] == 512
    for a, b in zip(mine[0], theirs[0], strict=True):
        torch.testing.assert_close(a, b)


def a_matrix():
    return nn.Parameter(torch.randn(1, 1))


TWICE = a_matrix()
ERRORS = {
    "a parameter instead of a list": (lambda: a_matrix(), TypeError),
    "a parameter twice in a group": (lambda: [TWICE, TWICE], UserWarning),
    "a parameter in two groups": (lambda: [{"params": TWICE}, {"params": TWICE}], ValueError),
    "some parameters named": (lambda: [("weight", a_matrix()), a_matrix()], ValueError),
    "some groups named": (lambda: [{"params": [a_matrix()]}, {"params": [("w", a_matrix())]}], ValueError),
    "no parameter": (list, ValueError),
    "no leaf": (lambda: [a_matrix() * 2], ValueError),
    "no tensor": (lambda: [1.0], TypeError),
    "a set": (lambda: [{"params": {a_matrix()}}], TypeError),
}


@pytest.mark.parametrize("name", ["sgd", "adam", "lion", "muon", "prodigy"])
@pytest.mark.parametrize("case", ERRORS)
def test_what_torch_refuses_is_refused(name, case):
    params, error = ERRORS[case]
    with pytest.raises(error):
        torch.optim.Adam(params())
    with pytest.raises(error):
        CATALOGUE[name].make(**CATALOGUE[name].valid[0]).as_torch(params())


def test_a_learning_rate_of_two_elements_is_refused():
    with pytest.raises(ValueError, match="lr"):
        fl.optim.adam(lr=torch.tensor([0.1, 0.2]))


def test_parameters_that_the_rule_cannot_train_are_refused_at_once():
    with pytest.raises(ValueError, match="bias"):
        fl.optim.muon().as_torch([("bias", nn.Parameter(torch.zeros(3)))])
    optimizer = fl.optim.muon().as_torch([a_matrix()])
    with pytest.raises(ValueError, match=r"'1'"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == len(optimizer.schedules) == 1


def test_what_acts_on_all_parameters_together_sees_all_groups():
    rule = fl.optim.chain(fl.optim.clip_by_global_norm(0.1), fl.optim.sgd(0.5, 0.9))
    model, reference = make_model(), make_model()
    close(
        train(model, rule.as_torch(groups(model))),
        train(reference, rule.as_torch(reference.parameters())),
    )
    model, reference = make_model(), make_model()
    optimizer, torchs = rule.as_torch(groups(model, lr=0.1)), torch.optim.SGD(groups(reference, lr=0.1), 0.5, 0.9)
    for _ in range(5):
        train(model, optimizer, 1)
        torchs.zero_grad()
        ((reference(X) - Y) ** 2).mean().backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        torchs.step()
    close(list(model.parameters()), list(reference.parameters()))
    with pytest.raises(ValueError, match=r"max_norm .* same in every parameter group"):
        train(model, rule.as_torch(groups(model, max_norm=0.2)), 1)


def test_groups_that_differ_in_structure_cannot_be_taken_together():
    model = make_model()
    prodigy = fl.optim.prodigy().as_torch(groups(model, safeguard_warmup=True))
    with pytest.raises(ValueError, match="acts on all parameters together"):
        train(model, prodigy, 1)


def closure_of(model, optimizer, **backward):
    def closure():
        optimizer.zero_grad()
        loss = ((model(X) - Y) ** 2).mean()
        loss.backward(**backward)
        return loss

    return closure


@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "two groups"])
def test_sam_looks_at_the_gradient_elsewhere(grouped):
    rho, lr = 0.1, 0.2
    model, reference = make_model(), make_model()
    optimizer = fl.optim.sam(fl.optim.sgd(lr), rho=rho).as_torch(groups(model) if grouped else model.parameters())
    params = list(reference.parameters())
    for _ in range(5):
        returned = optimizer.step(closure_of(model, optimizer))
        loss = ((reference(X) - Y) ** 2).mean()
        first = torch.autograd.grad(loss, params)
        norm = torch.sqrt(sum((g**2).sum() for g in first))
        with torch.no_grad():
            for p, g in zip(params, first, strict=True):
                p.add_(rho * g / norm)
        second = torch.autograd.grad(((reference(X) - Y) ** 2).mean(), params)
        with torch.no_grad():
            for p, g, s in zip(params, first, second, strict=True):
                p.sub_(rho * g / norm).sub_(lr * s)
        torch.testing.assert_close(returned.detach(), loss.detach(), rtol=1e-10, atol=0)
        close([p.grad for p in model.parameters()], first)  # as the user's own backward left them
    torch.testing.assert_close(list(model.parameters()), params, rtol=1e-9, atol=1e-12)
    with pytest.raises(fl.errors.FalllineError, match=r"write optimizer.step\(closure\)"):
        train(model, optimizer, 1)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_sophia_looks_at_the_curvature():
    rule = fl.optim.sophia(lr=0.1)
    model, reference = make_model(), make_model()
    optimizer = rule.as_torch(named(model), seed=3)
    params = {name: p.detach() for name, p in reference.named_parameters()}
    state = rule.init(params, seed=3)

    def loss(at):
        return ((torch.func.functional_call(reference, dict(at), (X,)) - Y) ** 2).mean()

    for _ in range(4):
        optimizer.step(closure_of(model, optimizer, create_graph=True))
        around = fl.optim.Landscape.of(loss, params)
        updates, state = rule.update(around.gradient(params), state, params, landscape=around)
        params = {name: p + updates[name] for name, p in params.items()}
    close([p.detach() for p in model.parameters()], list(params.values()))
    optimizer.zero_grad()
    with pytest.raises(fl.errors.FalllineError, match=r"loss.backward\(create_graph=True\)"):
        fl.optim.sophia().as_torch(model.parameters()).step(closure_of(model, optimizer))


@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "two groups"])
def test_evaluation_parameters_are_put_in_and_taken_out(grouped):
    rule = fl.optim.schedule_free_sgd(0.2)
    model = make_model()
    optimizer = rule.as_torch(groups(model) if grouped else model.parameters())
    train(model, optimizer, 5)
    trained = [p.detach().clone() for p in model.parameters()]
    slots = {str(i): optimizer.state[p] for i, p in enumerate(model.parameters())}
    state = {"step": torch.zeros(()), "slots": slots}
    expected = rule.evaluation_parameters(state, {str(i): p for i, p in enumerate(trained)})
    with optimizer.evaluation_parameters():
        inside = [p.detach().clone() for p in model.parameters()]
        with optimizer.evaluation_parameters():  # once is enough
            assert equal(inside, list(model.parameters()))
        with pytest.raises(fl.errors.FalllineError, match=r"leave evaluation_parameters\(\) before step"):
            optimizer.step()
    close(inside, list(expected.values()))
    assert not equal(inside, trained)
    assert equal(trained, list(model.parameters()))


def test_for_most_optimizers_evaluation_changes_nothing():
    model = make_model()
    optimizer = fl.optim.adam().as_torch(model.parameters())
    train(model, optimizer, 2)
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.evaluation_parameters():
        assert equal(before, list(model.parameters()))


def test_groups_of_an_optimizer_around_another_show_its_numbers():
    model = make_model()
    optimizer = fl.optim.cautious(fl.optim.adamw(0.1)).as_torch(model.parameters())
    assert optimizer.param_groups[0]["lr"] == 0.1
    train(model, optimizer, 4, lr_scheduler.StepLR(optimizer, 2, 0.5))
    assert optimizer.param_groups[0]["lr"] == 0.025


def test_random_numbers_go_by_the_parameters_names_and_the_seed():
    rule = fl.optim.chain(fl.optim.add_noise(0.1), fl.optim.sgd(0.1))

    def run(order, seed):
        model = make_model()
        return train(model, rule.as_torch(named(model, order), seed=seed), 3)

    through = run(slice(None), 1)
    assert equal(through, run(slice(None, None, -1), 1))
    assert not equal(through, run(slice(None), 2))


COMPILED = {
    "adam": fl.optim.adam(0.05),
    "sgd": fl.optim.sgd(0.05, 0.9),
    "lion": fl.optim.lion(0.01),
    "chain": fl.optim.chain(fl.optim.clip_by_global_norm(0.5), fl.optim.scale_by_adam(), fl.optim.sgd(0.05)),
    "every third step": fl.optim.soap(0.01, precondition_frequency=3),
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_step_is_compiled_once_whatever_the_learning_rate(name):
    torch._dynamo.reset()
    model, reference = make_model(), make_model()
    counter = CompileCounter()
    mine, plain = (COMPILED[name].as_torch(m.parameters()) for m in (model, reference))
    plain.kernels = False
    schedulers = [lr_scheduler.ExponentialLR(o, 0.9) for o in (mine, plain)]
    step = torch.compile(mine.step, backend=counter)
    frames = []
    for _ in range(8):
        mine.zero_grad()
        ((model(X) - Y) ** 2).mean().backward()
        step()
        train(reference, plain, 1)
        for scheduler in schedulers:
            scheduler.step()
        frames.append(counter.frame_count)
    close(list(model.parameters()), list(reference.parameters()))
    assert frames[0] > 0
    assert frames[-1] == (frames[3] if name == "every third step" else frames[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_a_step():
    torch._dynamo.reset()
    model, reference = make_model(), make_model()
    mine, plain = (fl.optim.adam(0.05).as_torch(m.parameters()) for m in (model, reference))
    step = torch.compile(mine.step)
    for _ in range(4):
        mine.zero_grad()
        ((model(X) - Y) ** 2).mean().backward()
        step()
        train(reference, plain, 1)
    close(list(model.parameters()), list(reference.parameters()))


def test_a_state_dict_of_adam_from_an_older_torch_can_be_loaded():
    model = nn.Linear(3, 2)
    theirs = torch.optim.Adam(model.parameters(), lr=0.3)
    model(torch.ones(1, 3)).sum().backward()
    theirs.step()
    saved = theirs.state_dict()
    saved["param_groups"][0].pop("decoupled_weight_decay", None)
    ours = fl.optim.adam(lr=0.1).as_torch(model.parameters())
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["decoupled_weight_decay"] is False
    assert ours.param_groups[0]["lr"] == 0.3
    assert "decoupled_weight_decay" not in saved["param_groups"][0]
    ours.step()


def test_the_state_of_a_parameter_that_needs_only_some_slots_is_not_made_anew():
    model = nn.Linear(3, 2)
    optimizer = fl.optim.adafactor(lr=0.1).as_torch(model.named_parameters())
    made = []
    plain_first_slots = optimizer._first_slots
    optimizer._first_slots = lambda *arguments: made.append(arguments) or plain_first_slots(*arguments)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert len(made) == 2
    assert "variance" in optimizer.state[model.bias]
    assert "row_var" in optimizer.state[model.weight]


def test_an_average_inside_a_partition_is_what_its_parameters_are_evaluated_with():
    o = fl.optim
    averaged = o.chain(o.sgd(lr=0.1), o.ema_of_parameters(0.5))
    rule = o.partition(o.by_shape(), {"matrices": averaged, "vectors": o.sgd(lr=0.1)})
    model = nn.Linear(3, 2)
    optimizer = rule.as_torch(model.named_parameters())
    average = None
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        weight = model.weight.detach().clone()
        average = weight if average is None else 0.5 * average + 0.5 * weight
    bias = model.bias.detach().clone()
    assert not torch.equal(average, weight)
    with optimizer.evaluation_parameters():
        torch.testing.assert_close(model.weight.detach(), average)
        torch.testing.assert_close(model.bias.detach(), bias, rtol=0, atol=0)
    torch.testing.assert_close(model.weight.detach(), weight, rtol=0, atol=0)


def test_a_state_of_another_shape_is_refused():
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4, 3))
    for rule in (fl.optim.adam(), fl.optim.lion(), fl.optim.sgd(momentum=0.9)):
        ours, other = rule.as_torch([p, q]), rule.as_torch([q, p])
        p.grad, q.grad = torch.ones(3), torch.ones(4, 3)
        ours.step()
        with pytest.raises(fl.errors.FalllineError, match=r"has shape \(3,\), and the parameter needs \(4, 3\)"):
            other.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("in_groups", [False, True])
@pytest.mark.parametrize(
    "rule",
    [fl.optim.lion(lr=0.1), fl.optim.chain(fl.optim.clip_by_global_norm(1.0), fl.optim.adam(lr=0.1))],
    ids=["lion", "clipped"],
)
def test_parameters_of_one_name_are_all_trained(rule, in_groups):
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    named = [list(model.named_parameters()) for model in models]
    optimizer = rule.as_torch([{"params": each} for each in named] if in_groups else [*named[0], *named[1]])
    before = [p.detach().clone() for model in models for p in model.parameters()]
    for p in (p for model in models for p in model.parameters()):
        p.grad = torch.randn(p.shape)
    optimizer.step()
    assert all((p != b).any() for p, b in zip((p for m in models for p in m.parameters()), before, strict=True))
    other = rule.as_torch([{"params": each} for each in named] if in_groups else [*named[0], *named[1]])
    other.load_state_dict(optimizer.state_dict())
    for p in (p for model in models for p in model.parameters()):
        assert torch.equal(other.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])


def test_a_name_that_looks_like_a_wrapper_is_a_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.weight, self.bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))

    model = Model()
    optimizer = fl.optim.adam().as_torch(model.named_parameters())
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    optimizer.step()
    other = fl.optim.adam().as_torch(model.named_parameters())
    other.load_state_dict(optimizer.state_dict())
    for p in model.parameters():
        assert torch.equal(other.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])


def test_dampening_begins_after_the_first_gradient_also_in_a_loaded_state():
    arguments = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    theirs = torch.optim.SGD([p], **arguments)
    for _ in range(3):
        p.grad = p.detach().clone()
        theirs.step()
    with torch.no_grad():
        q.copy_(p)
    ours = fl.optim.sgd(**arguments).as_torch([q])
    ours.load_state_dict(theirs.state_dict())
    switched = nn.Parameter(torch.ones(3))
    late = fl.optim.sgd(lr=0.1, momentum=0.9).as_torch([switched])
    twin = nn.Parameter(torch.ones(3))
    expected = torch.optim.SGD([twin], lr=0.1, momentum=0.9)
    for step in range(6):
        if step == 3:
            late.param_groups[0]["dampening"] = expected.param_groups[0]["dampening"] = 0.5
        for tensor, optimizer in ((p, theirs), (q, ours), (switched, late), (twin, expected)):
            tensor.grad = tensor.detach().clone()
            optimizer.step()
    torch.testing.assert_close(q, p)
    torch.testing.assert_close(switched, twin)


def test_amsgrad_may_end_before_a_parameter_thaws():
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = fl.optim.adam(amsgrad=True).as_torch(params)
    for p in params[:2]:
        p.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = False
    params[2].grad = torch.ones(3)
    optimizer.step()
    assert all((p != 1).all() for p in params)


@pytest.mark.parametrize("name", ["prodigy", "d_adaptation"])
def test_groups_of_what_acts_on_all_may_differ_in_whether_weights_decay(name):
    make = getattr(fl.optim, name)
    w, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = make(weight_decay=0.5, d0=1e-2).as_torch([{"params": [w]}, {"params": [b], "weight_decay": 0.0}])
    rule, params = make(weight_decay=0.0, d0=1e-2), {"w": w.detach().clone(), "b": b.detach().clone()}
    state = rule.init(params)
    for step in range(4):
        w.grad, b.grad = torch.ones(2, 2), torch.ones(2)
        optimizer.step()
        updates, state = rule.update({"w": torch.ones(2, 2), "b": torch.ones(2)}, state, params)
        params = {n: p + updates[n] for n, p in params.items()}
        if step == 0:  # later the estimate of all is another, because w is
            torch.testing.assert_close(b.detach(), params["b"])
    assert (w.detach() != params["w"]).all()


def test_a_momentum_that_must_not_move_is_guarded():
    p = nn.Parameter(torch.ones(2))
    optimizer = fl.optim.schedule_free_sgd(lr=0.1).as_torch([p])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    p.grad = torch.ones(2)
    optimizer.step()
    scheduler.step()
    with pytest.raises(fl.errors.InvalidHyperparameter, match="cycle_momentum=False"):
        optimizer.step()


def test_nothing_is_loaded_while_the_model_is_evaluated():
    p = nn.Parameter(torch.ones(2))
    optimizer = fl.optim.schedule_free_sgd(lr=0.1).as_torch([p])
    p.grad = torch.ones(2)
    optimizer.step()
    with optimizer.evaluation_parameters(), pytest.raises(fl.errors.FalllineError, match="evaluation parameters"):
        optimizer.load_state_dict(optimizer.state_dict())


def test_a_learning_rate_that_was_a_tensor_is_saved_as_a_plain_number(tmp_path):
    optimizer = fl.optim.adam(lr=torch.tensor(0.1)).as_torch([nn.Parameter(torch.ones(2))])
    torch.save(optimizer.state_dict(), tmp_path / "state")
    assert torch.load(tmp_path / "state", weights_only=True)["param_groups"][0]["lr"] == pytest.approx(0.1)
