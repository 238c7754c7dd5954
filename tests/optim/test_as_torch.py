"""The torch adapter: a real torch.optim.Optimizer, in everything that torch's users do with one."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import fallline as fl
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
