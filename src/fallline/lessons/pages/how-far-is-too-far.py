# ---
# jupyter:
#   fallline:
#     course: Deep Learning with PyTorch
#     module: 5
#     modules: 26
#     level: Intermediate
#     title: How far is too far
#     summary: The learning rate, from too small to too large, and the curvature that draws the line between them.
#     minutes: 10
#     seed: 0
#     previous: loss-functions-and-optimization
#     next: which-loss
#     related:
#     - page: loss-functions-and-optimization
#       why: the model and the loop that this page goes on with
#     - page: a-fair-race
#       why: what else decides which optimizer wins
#     - url: https://arxiv.org/abs/2103.00065
#       title: "Cohen et al.: gradient descent on neural networks typically occurs at the edge of stability"
#       why: how large networks drive their own curvature to the bound
#     - url: https://docs.pytorch.org/docs/stable/optim.html#how-to-adjust-learning-rate
#       title: "PyTorch: how to adjust the learning rate"
#       why: torch's schedules, warm-up among them
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# A learning rate that is too small wastes your time; one that is too large destroys the model. Between the two lies a
# sharp line, and for simple models it can be computed before the first step. This page computes it, crosses it, and then
# looks at what is left of it in a real network.
#
# ## The surface
#
# The line $\hat y = w x + b$ has two parameters, so its loss is a landscape over a plane, and we can draw all of it.

# %% The loss over weight and bias
import math

import matplotlib.pyplot as plt
import torch
from torch import nn

inputs = torch.tensor([1.0, 2.0, 3.0])
targets = torch.tensor([2.0, 4.0, 6.0])


def loss_at(w, b):
    return ((w[..., None] * inputs + b[..., None] - targets) ** 2).mean(-1)


w, b = torch.meshgrid(
    torch.linspace(-1, 5, 121), torch.linspace(-4, 4, 121), indexing="ij"
)
surface = loss_at(w, b)


def draw_surface(axes):
    levels = [0.05, 0.3, 1, 3, 8, 20, 45]
    axes.contour(
        w, b, surface, levels=levels, colors="#0072b2", linewidths=0.9, alpha=0.6
    )
    axes.plot(2, 0, "+", color="#3b424c", markersize=12, markeredgewidth=2)
    axes.set(xlabel="weight", ylabel="bias")


figure, axes = plt.subplots(figsize=(6.4, 4.2))
draw_surface(axes)
plt.show()

# %% [markdown] {"caption": true}
# Lines of equal loss. The minimum, a loss of 0, is the cross at weight 2 and bias 0. The valley is long and narrow: along
# its floor a larger weight makes up for a smaller bias, so the loss hardly changes; across it, it rises steeply.

# %% [markdown]
# ## Four walkers
#
# Four optimizers start at the same point and make 60 steps each, with learning rates that suit them.


# %% Walking on the surface
def walk(make_optimizer, steps=60, start=(-0.5, 3.0)):
    """The points (weight, bias) that an optimizer visits."""
    parameters = torch.tensor(start, requires_grad=True)
    optimizer = make_optimizer([parameters])
    path = [parameters.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        loss_at(parameters[0], parameters[1]).backward()
        optimizer.step()
        path.append(parameters.detach().clone())
    return torch.stack(path)


walkers = {
    "SGD, lr 0.15": lambda p: torch.optim.SGD(p, lr=0.15),
    "momentum 0.9, lr 0.03": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9),
    "RMSprop, lr 0.05": lambda p: torch.optim.RMSprop(p, lr=0.05),
    "Adam, lr 0.3": lambda p: torch.optim.Adam(p, lr=0.3),
}
paths = {name: walk(make) for name, make in walkers.items()}

figure, grid = plt.subplots(2, 2, figsize=(6.6, 5.6), sharex=True, sharey=True)
for axes, (name, path) in zip(grid.flat, paths.items()):
    draw_surface(axes)
    axes.plot(
        path[:, 0], path[:, 1], ".-", color="#d55e00", linewidth=1.2, markersize=4
    )
    axes.set_title(name)
    axes.label_outer()
plt.show()

for name, path in paths.items():
    print(
        f"{name:23} loss after 60 steps {loss_at(path[-1, 0], path[-1, 1]).item():.6f}"
    )

# %% [markdown] {"caption": true}
# SGD jumps from wall to wall across the valley and creeps along its floor. Momentum swings, and is carried along. RMSprop
# goes at nearly the same speed in both directions. Adam overshoots and comes back.

# %% [markdown]
# ## How steep is steep? The Hessian
#
# How fast the slope itself changes is the **curvature**: the matrix of second derivatives, called the Hessian. Its largest
# eigenvalue, $\lambda_{\max}$, belongs to the direction straight across the valley.

# %% The largest eigenvalue
hessian = torch.autograd.functional.hessian(
    lambda parameters: loss_at(parameters[0], parameters[1]),
    torch.tensor([0.0, 0.0], dtype=torch.float64),
)
eigenvalues = torch.linalg.eigvalsh(hessian)
critical = 2 / eigenvalues.max().item()
print("Hessian:", [[round(value, 4) for value in row] for row in hessian.tolist()])
print("eigenvalues:", [round(value, 4) for value in eigenvalues.tolist()])
print(f"2 / λmax = {critical:.4f}")

# %% [markdown]
# Why $2/\lambda_{\max}$? Along an eigenvector with eigenvalue $\lambda$, a distance $d$ from the floor has the gradient
# $\lambda d$, and a step of gradient descent leaves
#
# $$d - \eta \lambda d = (1 - \eta\lambda)\, d.$$
#
# Every step multiplies the distance by $1 - \eta\lambda$. If that number lies between −1 and 1 the distance shrinks; it is
# below −1 as soon as $\eta > 2/\lambda$: every step then lands *farther away* on the other side. The steepest direction
# decides, so the **critical learning rate** is
#
# $$\eta_{\text{critical}} = \frac{2}{\lambda_{\max}} = {{ f"{critical:.4f}" }}$$
#
# The flattest direction decides how long it takes. Here the two eigenvalues are
# {{ f"{(eigenvalues.max() / eigenvalues.min()).item():.0f}" }} to 1: even at the best learning rate, what is left along the
# floor shrinks by only a few percent in a step.

# %% [markdown]
# ## Crossing the line
#
# If that is right, 1 % below the line training must converge, and 1 % above it must blow up.

# %% Just below and just above
for factor in (0.5, 0.99, 1.01, 1.05):
    path = walk(lambda p: torch.optim.SGD(p, lr=factor * critical), steps=300)
    losses = loss_at(path[:, 0], path[:, 1])
    direction = "grows" if losses[-1] > losses[0] else "shrinks"
    per_step = (1 - factor * critical * eigenvalues.max().item()) ** 2
    print(
        f"lr {factor * critical:.4f} ({factor:.2f} of critical): loss {direction:7} "
        f"from {losses[0].item():.2f} to {losses[-1].item():10.3g}; predicted factor per step {per_step:.4f}"
    )

# %% [markdown]
# Below the line it shrinks, above it grows, and two percent of a learning rate lie between them. In practice nobody sees
# "growth": after some hundred steps the loss is `inf`, then `nan`. A loss that is `nan` is the *end* of this story, and the
# learning rate its most common beginning.
#
# Momentum moves the line: a heavy ball with momentum $\beta$ diverges beyond $2(1+\beta)/\lambda_{\max}$, nearly twice as
# far for $\beta = 0.9$. Try it: set the momentum, then cross the line that is marked.

# %% [markdown] {"component": "see-it-move", "settings": "optimizer=sgd&lr=0.19&epochs=60&weight=-0.5&bias=3"}
# **See it move.** The critical learning rate is marked on the slider. Guess first: what will this one do?

# %% Momentum's line
beta = 0.9
line = 2 * (1 + beta) / eigenvalues.max().item()
print(f"2(1 + β)/λmax = {line:.4f}")
for factor in (0.99, 1.01):
    path = walk(
        lambda p: torch.optim.SGD(p, lr=factor * line, momentum=beta), steps=2000
    )
    print(
        f"lr {factor * line:.4f}: loss after 2000 steps {loss_at(path[-1, 0], path[-1, 1]).item():.3g}"
    )

# %% [markdown]
# Adam and RMSprop have no such line: they divide the gradient by its own running size, so how long a step is hardly
# depends on how steep the wall is. They do not explode here. Too large a rate throws them far away in their first steps;
# then RMSprop, at a constant rate, keeps jumping about the minimum, while Adam's running mean of gradients cancels such
# jumps, and it settles in the end.

# %% [markdown]
# ## A real model: the learning rate swept
#
# A network is no quadratic: its curvature changes as it trains. But the shape of the story stays. Here are three spirals,
# a network of two hidden layers, and learning rates over four powers of ten, three seeds each.


# %% Three spirals
def spirals(seed, points=100, arms=3):
    generator = torch.Generator().manual_seed(seed)
    radius = 3 * torch.rand(arms, points, generator=generator).sqrt()
    angle = 2 * radius + 2 * math.pi / arms * torch.arange(arms).unsqueeze(1)
    noise = 0.15 * torch.randn(arms, points, 2, generator=generator)
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], -1) + noise
    return x.reshape(-1, 2), torch.arange(arms).repeat_interleave(points)


x, y = spirals(seed=0)
x_validation, y_validation = spirals(seed=1)


def network():
    return nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )


def train(make_optimizer, seed, steps=300, batch=64):
    """The validation loss after training."""
    torch.manual_seed(seed)
    model = network()
    optimizer = make_optimizer(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x_validation), y_validation).item()


# %% The sweep
rates = [10 ** (k / 2) for k in range(-7, 2)]
makers = {
    "SGD, momentum 0.9": lambda lr: (
        lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9)
    ),
    "Adam": lambda lr: lambda p: torch.optim.Adam(p, lr=lr),
}
swept = {
    name: torch.tensor(
        [[train(make(lr), seed) for seed in range(3)] for lr in rates]
    )
    for name, make in makers.items()
}

figure, axes = plt.subplots(figsize=(6.4, 3.8))
for (name, found), style in zip(swept.items(), ["o-", "s--"]):
    shown = found.nan_to_num(nan=math.inf).clamp(max=3)
    (line_drawn,) = axes.loglog(rates, shown.median(1).values, style, label=name)
    axes.loglog(rates, shown, ".", color=line_drawn.get_color(), alpha=0.5)
axes.axhline(math.log(3), color="#8a8f98", linewidth=1, linestyle=":")
axes.text(rates[0], math.log(3) * 1.08, "knows nothing", fontsize=9)
axes.set(
    xlabel="learning rate", ylabel="validation loss after 300 steps", ylim=(0.02, 8)
)
axes.legend(loc="upper center", ncols=2)
plt.show()

best = {
    name: rates[int(found.mean(1).nan_to_num(nan=math.inf).argmin())]
    for name, found in swept.items()
}
for name, found in swept.items():
    row = found[rates.index(best[name])]
    print(
        f"{name:18} best at lr {best[name]:.3g}: validation losses {[round(v, 3) for v in row.tolist()]}"
    )

# %% [markdown] {"caption": true}
# One dot per seed, lines through the medians. Both curves are valleys: too slow on the left, thrown about on the right.
# They lie at different learning rates: momentum is best at {{ f"{best['SGD, momentum 0.9']:.2g}" }}, Adam at
# {{ f"{best['Adam']:.2g}" }}. Ten times above its best, momentum knows nothing any more (a loss of
# {{ f"{swept['SGD, momentum 0.9'][rates.index(best['SGD, momentum 0.9']) + 2].median().item():.2f}" }}); Adam is still good there
# ({{ f"{swept['Adam'][rates.index(best['Adam']) + 2].median().item():.2f}" }}), and lost at a hundred times
# ({{ f"{swept['Adam'][rates.index(best['Adam']) + 4].median().item():.2f}" }}).

# %% [markdown]
# Three things to take away: **sweep on a logarithmic scale**; each optimizer has **its own** best learning rate; and the
# best one may be **near a cliff**, so take several seeds before you trust it. For your own model, `fallline sweep` trains all
# of these networks at once:

# %% The same, by fallline, on handwritten digits {"needs": "fallline"}
import fallline as fl

result = fl.sweep(
    fl.tasks.digits(),
    [
        fl.optim.sgd(lr=fl.log_grid(1e-3, 10, 9), momentum=0.9),
        fl.optim.adam(lr=fl.log_grid(1e-4, 1, 9)),
    ],
    seeds=10,
    steps=200,
    engine="vectorised",
    workers=1,
    progress=False,
)
print(result)

# %% [markdown]
# ## Warm-up
#
# A network's curvature is often highest where it starts. Then the learning rate that is right for most of training is too
# large for the first steps, and **warm-up** helps: begin small, and grow to the full rate over some steps. To see why, we
# start the same network badly, with weights three times too large, and measure $\lambda_{\max}$ while it trains.


# %% The largest eigenvalue of a network
def sharpness(model, iterations=40):
    """λmax of the training loss, by power iteration: multiply a vector by the Hessian until it points along the steepest."""
    parameters = list(model.parameters())
    loss = nn.functional.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator) for p in parameters]
    for _ in range(iterations):
        length = math.sqrt(sum((v * v).sum().item() for v in vector))
        vector = [v / length for v in vector]
        product = sum((g * v).sum() for g, v in zip(gradients, vector))
        image = torch.autograd.grad(product, parameters, retain_graph=True)
        value = sum((i * v).sum().item() for i, v in zip(image, vector))
        vector = list(image)
    return value


# %% With and without warm-up
def descend(lr, warm_up, steps=300):
    """Losses of gradient descent on all samples, and λmax at some steps."""
    torch.manual_seed(0)
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warm_up)
    )
    losses, curvature = [], {}
    for step in range(steps):
        if step in (0, 20, 50, 100, 200):
            curvature[step] = sharpness(model)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, curvature


runs = {
    "at once": descend(0.3, warm_up=1),
    "warmed up over 100 steps": descend(0.3, warm_up=100),
}

figure, axes = plt.subplots(figsize=(6.4, 3.4))
for (name, (losses, _)), style in zip(runs.items(), ["-", "--"]):
    axes.semilogy(losses, style, label=f"lr 0.3, {name}")
axes.set(xlabel="step", ylabel="training loss")
axes.legend()
plt.show()

for name, (losses, curvature) in runs.items():
    print(f"{name}: highest loss {max(losses):.2f}, last {losses[-1]:.3f}")
    print(
        "   2/λmax at step",
        ", ".join(f"{step}: {2 / value:.3f}" for step, value in curvature.items()),
    )

# %% [markdown] {"caption": true}
# At the start 2/λmax is {{ f"{2 / runs['at once'][1][0]:.3f}" }}, a tenth of the learning rate of 0.3. At once, the loss leaps
# from {{ f"{runs['at once'][0][0]:.2f}" }} to {{ f"{max(runs['at once'][0]):.2f}" }} before it falls. With warm-up it never
# rises above {{ f"{max(runs['warmed up over 100 steps'][0]):.2f}" }}.

# %% [markdown]
# During warm-up the curvature falls, until 2/λmax has grown to about the learning rate itself:
# {{ f"{2 / runs['warmed up over 100 steps'][1][100]:.2f}" }} at step 100. That is no accident: gradient descent avoids regions
# that are too sharp for its learning rate, because it cannot stay there. Here the network survives the leap too, since its
# surface is no quadratic; both end at about {{ f"{runs['at once'][0][-1]:.2f}" }}. In larger networks, in half precision or
# with Adam's young statistics, a leap like that is often the end of the run.

# %% [markdown] {"question": "critical"}
# The largest eigenvalue of a quadratic loss is 50. Beyond which learning rate does gradient descent diverge?
#
# - [ ] 0.02
#   That is $1/\lambda_{\max}$: there the steepest direction is solved in a single step.
# - [x] 0.04
#   It is $2/\lambda_{\max} = 2/50$: beyond it every step lands farther away on the other side.
# - [ ] 50
#   The larger the curvature, the *smaller* the steps must be.
# - [ ] It depends on where it starts.
#   The start decides how large the loss is, but not whether the distance shrinks or grows from step to step.

# %% [markdown] {"question": "momentum-line"}
# What does momentum 0.9 do to the critical learning rate of a quadratic?
#
# - [x] It makes it nearly twice as large.
#   It becomes $2(1+\beta)/\lambda_{\max}$, and $1 + 0.9$ is nearly 2.
# - [ ] It makes it ten times smaller.
#   Steps become up to ten times longer in the long run along the floor; across the valley they alternate, and cancel.
# - [ ] Nothing.
#   The heavy ball remembers the last step, which points the other way across the valley, and that damps the swing.

# %% [markdown] {"question": "slow-floor"}
# SGD at 0.9 of the critical learning rate converges slowly. Why not simply take a larger one?
#
# - [ ] Because torch does not allow it.
#   It allows any positive number.
# - [x] Because the steepest direction would diverge, however slow the flat one is.
#   One rate serves all directions. The steepest sets the limit, the flattest the time.
# - [ ] Because the loss would become too small.
#   There is no such thing.

# %% [markdown] {"question": "nan"}
# Training prints `nan` from step 212 on. What is the first thing to try?
#
# - [x] A learning rate three to ten times smaller.
#   Divergence grows for many steps before it overflows; `nan` is its last stage.
# - [ ] More training steps.
#   A parameter that is `nan` stays `nan`.
# - [ ] Another seed.
#   Beyond the critical rate every start diverges. Near it another seed may last longer, which is luck.

# %% [markdown] {"question": "grid"}
# You have seven trainings to find a learning rate. Which do you try first?
#
# - [ ] 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07
#   They all lie within one power of ten, and the best may be a hundred times smaller.
# - [x] 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1
#   Learning rates act by their ratio, so equal ratios spread the trials evenly.
# - [ ] Seven times torch's default.
#   A default knows nothing of your model.

# %% [markdown] {"question": "warm-up"}
# What does warm-up do?
#
# - [ ] It heats the GPU so that its clocks are stable.
#   That is a warm-up of benchmarks.
# - [x] It starts with a small learning rate, and grows it over the first steps.
#   Where the curvature is highest at the start, the full rate would be above the critical one there.
# - [ ] It trains on easy samples first.
#   That is a curriculum.

# %% [markdown] {"question": "adam-line"}
# Adam at a learning rate of 10 on the three points does not overflow. Why?
#
# - [ ] Because 10 is below its critical rate.
#   Adam has no fixed critical rate on a quadratic like this one.
# - [x] Because it divides the gradient by its own size: no step is much longer than the learning rate.
#   It is thrown far away, but by bounded steps. It still arrives late or not at all.
# - [ ] Because Adam lowers its learning rate over time.
#   Its `lr` stays 10 until you or a schedule change it.
