# ---
# jupyter:
#   fallline:
#     course: Deep Learning with PyTorch
#     module: 5
#     modules: 26
#     level: Intermediate
#     title: A fair race
#     summary: Which optimizer is better? How to ask so that the answer means something, and when there is none.
#     minutes: 10
#     seed: 0
#     previous: which-loss
#     next: null
#     related:
#     - page: how-far-is-too-far
#       why: why every optimizer needs its own learning rate
#     - url: https://github.com/google-research/tuning_playbook
#       title: "Deep Learning Tuning Playbook"
#       why: how to tune by experiment
#     - url: https://openreview.net/forum?id=rJg6ssC5Y7
#       title: "Schneider et al.: DeepOBS, a deep learning optimizer benchmark suite"
#       why: where the noisy quadratic comes from
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# "We tried Adam and SGD, and Adam was better." With which learning rates, how many seeds, in which order of the data? This
# page runs such a race badly, then less badly, and ends with the sentence that one has to be able to say: *there is no
# evidence.*
#
# ## One seed lies
#
# The three spirals again, and two optimizers, each at its own best learning rate. Who wins?

# %% Ten races
import math

import matplotlib.pyplot as plt
import torch
from torch import nn


def spirals(seed, points=100, arms=3):
    generator = torch.Generator().manual_seed(seed)
    radius = 3 * torch.rand(arms, points, generator=generator).sqrt()
    angle = 2 * radius + 2 * math.pi / arms * torch.arange(arms).unsqueeze(1)
    noise = 0.15 * torch.randn(arms, points, 2, generator=generator)
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], -1) + noise
    return x.reshape(-1, 2), torch.arange(arms).repeat_interleave(points)


x, y = spirals(seed=0)
x_validation, y_validation = spirals(seed=1)


def train(make_optimizer, seed, steps=300, batch=64):
    """The validation loss after training. The seed decides the first weights and the order of the samples."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )
    optimizer = make_optimizer(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x_validation), y_validation).item()


racers = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
}
seeds = range(10)
losses = {
    name: torch.tensor([train(make, seed) for seed in seeds])
    for name, make in racers.items()
}
print("seed     ", "  ".join(f"{seed:5}" for seed in seeds))
for name, found in losses.items():
    print(f"{name:9}", "  ".join(f"{value:.3f}" for value in found.tolist()))
wins = (losses["Adam"] < losses["momentum"]).sum().item()
print(f"Adam wins {wins} of {len(seeds)}")

# %% Every seed its own story
figure, axes = plt.subplots(figsize=(6.4, 3.2))
for seed in seeds:
    pair = [losses["momentum"][seed], losses["Adam"][seed]]
    axes.plot([0, 1], pair, "-", color="#8a8f98", linewidth=1)
for place, name in enumerate(racers):
    axes.plot([place] * len(seeds), losses[name], "o")
axes.set(xticks=[0, 1], xlim=(-0.4, 1.4), ylabel="validation loss")
axes.set_xticklabels(list(racers))
plt.show()

# %% [markdown] {"caption": true}
# Ten seeds, a line for each. Adam has the lower loss in {{ wins }} of them. Whoever tries one seed reports one line, and can
# report either winner.

# %% [markdown]
# ## From ten seeds to an answer
#
# Both optimizers ran on the *same* seeds, from the same first weights through the same samples. So look at the
# **differences**, seed by seed: what is luck for both cancels. Is their mean different from 0? If the names "momentum" and
# "Adam" meant nothing, every difference could as well have had the other sign. There are
# $2^{10} = {{ 2 ** len(seeds) }}$ ways to choose the signs; how many give a mean at least as far from 0 as ours?

# %% A test that one can count
difference = (losses["momentum"] - losses["Adam"]).double()
signs = torch.tensor(
    [[1 if bits >> k & 1 else -1 for k in range(10)] for bits in range(2**10)],
    dtype=torch.float64,
)
means = (signs * difference).mean(1)
p = (means.abs() >= difference.mean().abs() - 1e-12).double().mean().item()
print(f"mean difference {difference.mean().item():+.4f}")
print(f"as extreme by chance: {int(p * 2**10)} of {2**10}, p = {p:.3f}")

# %% [markdown]
# {{ "Chance alone does as much quite often, so ten seeds do not tell who is better." if p > 0.05 else "Chance alone does as much rarely." }}
# With $n$ seeds the smallest possible p is $2/2^n$: five seeds cannot get below {{ f"{2 / 2**5:.4f}" }}, so with five seeds nothing
# is ever significant at 0.05, however large the difference. Eight can.

# %% [markdown]
# ## The order of the data changes the ranking
#
# The noisy quadratic of the benchmark suite DeepOBS has 100 parameters, a curvature like a deep network's, and a minimum
# that is known. Its published results kept the mini-batches in one fixed order; usual training shuffles them in every
# epoch. Here is the same race both ways. All 21 learning rates run at once, as rows of one tensor.


# %% The noisy quadratic, as DeepOBS makes it
import numpy as np


def curvature():
    """Q: 90 eigenvalues from U(0, 1) and 10 from U(30, 60), rotated at random, one dimension after the other."""
    draw = np.random.RandomState(42)
    eigenvalues = np.concatenate([draw.uniform(0, 1, 90), draw.uniform(30, 60, 10)])
    angle = 2 * np.pi * draw.uniform()
    turned = np.array(
        [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    )
    for size in range(3, 101):
        mirror = draw.normal(size=size)
        mirror = -mirror / np.linalg.norm(mirror)
        mirror[0] += 1
        mirror /= np.linalg.norm(mirror)
        larger = np.eye(size)
        larger[1:, 1:] = turned
        turned = larger - 2 * np.outer(mirror, mirror @ larger)
    return (turned.T * eigenvalues) @ turned


def drawn(seed):
    return torch.tensor(
        np.random.RandomState(seed).normal(0, 0.6, (1000, 100)), dtype=torch.float32
    )


Q = torch.tensor(curvature(), dtype=torch.float32)
points, points_new = drawn(42), drawn(43)
found = torch.linalg.eigvalsh(Q)
print(
    f"eigenvalues from {found.min().item():.3f} to {found.max().item():.1f}; 2/λmax = {2 / found.max().item():.4f}"
)

# %% The race, in both orders
rates = torch.logspace(-4, 1, 21).unsqueeze(1)


def excess(theta):
    """The loss on new points, above the lowest that is possible there."""
    apart = theta - points_new.mean(0)
    return 0.5 * (apart @ Q * apart).sum(1)


def race(rule, seed, reshuffled, epochs=100):
    """The final loss of every learning rate."""
    theta = torch.ones(len(rates), 100)
    state = [torch.zeros_like(theta), torch.zeros_like(theta)]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(1000, generator=generator)
    step = 0
    for epoch in range(epochs):
        if epoch and reshuffled:
            order = torch.randperm(1000, generator=generator)
        for batch in order[:896].split(128):
            step += 1
            gradient = (theta - points[batch].mean(0)) @ Q
            theta = theta - rates * rule(gradient, state, step)
    return excess(theta).nan_to_num(nan=math.inf)


def sgd(gradient, state, step):
    return gradient


def momentum(beta):
    def rule(gradient, state, step):
        state[0] = beta * state[0] + gradient
        return state[0]

    return rule


def adam(gradient, state, step):
    state[0] = 0.9 * state[0] + 0.1 * gradient
    state[1] = 0.999 * state[1] + 0.001 * gradient**2
    return (
        state[0] / (1 - 0.9**step) / ((state[1] / (1 - 0.999**step)).sqrt() + 1e-8)
    )


rules = {
    "SGD": sgd,
    "momentum 0.9": momentum(0.9),
    "momentum 0.99": momentum(0.99),
    "Adam": adam,
}
tables = {}
for reshuffled in (False, True):
    table = tables[reshuffled] = {}
    for name, rule in rules.items():
        found = torch.stack([race(rule, seed, reshuffled) for seed in range(8)])
        best = int(found.mean(0).argmin())
        table[name] = found[:, best].mean().item(), rates[best].item()
    print(
        "reshuffled in every epoch:"
        if reshuffled
        else "the same order in every epoch:"
    )
    for place, (name, (loss, lr)) in enumerate(
        sorted(table.items(), key=lambda entry: entry[1][0]), start=1
    ):
        print(f"   {place}. {name:14} {loss:.4f} above the minimum, at lr {lr:.2g}")

# %% [markdown]
# In a fixed order, **{{ min(tables[False], key=lambda name: tables[False][name][0]) }}** wins: its memory is long enough
# to average over all the batches, which come again and again in the same order, so their noise cancels. Reshuffled, it
# cancels less, and **{{ min(tables[True], key=lambda name: tables[True][name][0]) }}** wins. Same model, same data, same seeds, same budget,
# same tuning. Whoever says which optimizer is better must say in which order the data came.

# %% [markdown]
# ## The fair race
#
# What have we asked for by now? Every optimizer with **its own** learning rate, from a grid of **equal size**; several
# **seeds**, the same for all; the batch order of **real training**; and, because the best of many learning rates is partly
# lucky, the final figures on **other seeds** than those that chose it. Then a test, on paired differences, corrected for the
# number of comparisons. That is what `fallline sweep` does.

# %% The sweep, and its evidence {"needs": "fallline"}
import fallline as fl

result = fl.sweep(
    fl.tasks.two_moons(),
    [
        fl.optim.sgd(lr=fl.log_grid(1e-3, 10, 9)),
        fl.optim.sgd(lr=fl.log_grid(1e-3, 10, 9), momentum=0.9),
        fl.optim.adam(lr=fl.log_grid(1e-4, 1, 9)),
    ],
    seeds=20,
    steps=300,
    engine="vectorised",
    workers=1,
    progress=False,
)
print(result)

# %% [markdown]
# Read the first sentence. It names a winner only where the difference is larger than luck; where it is not, it says so, and
# how many seeds would be needed to tell. A best learning rate at the edge of its grid would be marked, because then the true
# best lies outside.
#
# **"No evidence" is a result.** It says that you may choose by other reasons: memory, simplicity, habit. It does not say
# that the two are equal.

# %% How many seeds would it take? {"needs": "fallline"}
few = fl.sweep(
    fl.tasks.digits(),
    [
        fl.optim.rmsprop(lr=fl.log_grid(1e-4, 1e-1, 7)),
        fl.optim.adam(lr=fl.log_grid(1e-4, 1e-1, 7)),
    ],
    seeds=6,
    steps=200,
    engine="vectorised",
    workers=1,
    progress=False,
)
print(few.ranking.sentence)

# %% [markdown] {"question": "one-seed"}
# A paper reports one run for each optimizer, and its own is 0.4 % better. What do you know?
#
# - [ ] That it is better by 0.4 %.
#   Another seed may turn it around, as it does on this page.
# - [x] Very little: how much seeds scatter is not reported.
#   A difference means something only beside the scatter of repeated runs.
# - [ ] That it is worse.
#   Nor that.

# %% [markdown] {"question": "five-seeds"}
# Five seeds each, paired, and one optimizer wins all five. Is that significant at p < 0.05, two-sided?
#
# - [ ] Yes: five of five cannot be luck.
#   It happens by luck, to one or the other, in 2 of 32 cases.
# - [x] No: the smallest possible p is 2/32 = 0.0625.
#   With eight it is 2/256 = 0.0078.
# - [ ] It depends on how large the differences are.
#   In a sign-flip test nothing is more extreme than all signs alike.

# %% [markdown] {"question": "paired"}
# Why run both optimizers on the same seeds?
#
# - [x] So that luck which both share cancels in their difference.
#   A hard start is hard for both; their difference scatters less than between runs of different seeds.
# - [ ] To save time.
#   It takes as many runs.
# - [ ] Because torch needs a seed.
#   It would choose one by itself.

# %% [markdown] {"question": "same-budget"}
# The new optimizer was tuned over 50 learning rates, Adam was run at its default. What is wrong?
#
# - [ ] Nothing, the default of Adam is good.
#   It is one guess for all models. The best of 50 guesses beats one guess, whoever makes them.
# - [x] They were not given the same budget for tuning.
#   Give each a grid of equal size around its own usual range.
# - [ ] 50 is too few.
#   It is a good grid. It is only not the same for both.

# %% [markdown] {"question": "tuning-seeds"}
# Why report the final figures on other seeds than those that chose the learning rate?
#
# - [x] Because the best of many is partly the luckiest, and its luck does not come again.
#   On fresh seeds the figure is that of the learning rate alone.
# - [ ] Because the tuning seeds are used up.
#   They could be used again, and would flatter.
# - [ ] To have more runs.
#   More runs would help also on the same seeds, but the bias would stay.

# %% [markdown] {"question": "order"}
# On the noisy quadratic the winner changed. What was changed?
#
# - [ ] The data.
#   They are the same 1,000 points.
# - [ ] The learning rates that were tried.
#   Both tables choose from the same 21.
# - [x] Whether the batches come in the same order in every epoch.
#   In a fixed order a long momentum averages the noise of the batches away.

# %% [markdown] {"question": "no-evidence"}
# A sweep answers "no evidence that Adam beats momentum". What may you conclude?
#
# - [ ] That they are equally good.
#   A small difference may hide behind the scatter; more seeds could show it.
# - [x] That these seeds do not tell, and that other reasons may decide.
#   Memory, simplicity, or what the rest of the team knows.
# - [ ] That the sweep was wasted.
#   It saved you from believing in a difference that may not be there.
