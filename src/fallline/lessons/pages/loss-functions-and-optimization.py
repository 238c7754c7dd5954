# ---
# jupyter:
#   fallline:
#     course: Deep Learning with PyTorch
#     module: 5
#     modules: 26
#     level: Intermediate
#     title: Loss functions and optimization
#     summary: What a loss measures, and how gradient descent makes it small.
#     minutes: 8
#     seed: 0
#     previous: null
#     next: how-far-is-too-far
#     related:
#     - page: how-far-is-too-far
#       why: the learning rate, from too small to too large
#     - page: which-loss
#       why: outliers, rare classes and wrong labels
#     - page: a-fair-race
#       why: which optimizer is better, and how sure that is
#     - url: https://docs.pytorch.org/docs/stable/nn.html#loss-functions
#       title: "PyTorch: loss functions"
#       why: all that torch has
#     - url: https://docs.pytorch.org/docs/stable/optim.html
#       title: "PyTorch: torch.optim"
#       why: all its optimizers
#     - url: https://d2l.ai/chapter_optimization/index.html
#       title: "Dive into Deep Learning: optimization algorithms"
#       why: the theory, chapter by chapter
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# A network learns by being told how wrong it is. The **loss function** says how wrong, in one number; the **optimizer**
# changes the parameters so that the number becomes smaller. This page builds both from three points on a line, runs
# them, and lets you break them. Every number on it was printed by the code beside it.
#
# ## What a loss measures
#
# A model makes a prediction $\hat y$ for an input whose right answer, the target, is $y$. A loss $L(\hat y, y)$ is
#
# - **small when the prediction is good**, and 0 or nearly so when it is perfect;
# - **one number**, the mean over the samples of a batch, so that two models can be compared;
# - **differentiable**, so that its gradient says for every parameter which way is better, and by how much.
#
# Which loss is right follows from what the target is: a quantity or a class.

# %% [markdown]
# ## A quantity: mean squared error
#
# $$\mathrm{MSE} = \frac{1}{n}\sum_{i=1}^{n} \left(\hat y_i - y_i\right)^2$$
#
# Every error is squared: an error twice as large counts four times. That makes large errors urgent, and it makes a
# single wrong measurement loud.

# %% Mean squared error
import matplotlib.pyplot as plt
import torch
from torch import nn

prediction = torch.tensor([2.5, 3.0, 7.5])
target = torch.tensor([2.0, 4.0, 6.0])

error = prediction - target
print("errors:        ", error.tolist())
print("squared errors:", (error**2).tolist())
print("their mean:    ", (error**2).mean().item())
print("nn.MSELoss():  ", nn.MSELoss()(prediction, target).item())

# %% Every error as a square
figure, axes = plt.subplots(figsize=(6.4, 3.6))
x = torch.tensor([1.0, 2.0, 3.0])
axes.plot(x, target, "o", label="target")
axes.plot(x, prediction, "x", markeredgewidth=2, label="prediction")
for at, low, side in zip(
    x.tolist(), torch.minimum(prediction, target).tolist(), error.abs().tolist()
):
    axes.add_patch(plt.Rectangle((at, low), side, side, alpha=0.3))
    axes.text(
        at + side / 2, low + side / 2, f"{side**2:g}", ha="center", va="center"
    )
axes.set(
    xlim=(0.5, 5),
    ylim=(1, 8),
    aspect="equal",
    xlabel="input",
    ylabel="target and prediction",
)
axes.legend(loc="upper left")
plt.show()

# %% [markdown] {"caption": true}
# The errors as sides of squares. Their areas are {{ ", ".join(f"{e:g}" for e in (error**2).tolist()) }}; the loss is the
# mean, {{ f"{(error**2).mean().item():.4f}" }}. The worst prediction alone makes
# {{ f"{(error[2] ** 2 / (error**2).sum()).item():.0%}" }} of it.

# %% [markdown]
# ## A class: cross-entropy
#
# A classifier gives a score for every class, called a **logit**. Softmax turns logits $z$ into probabilities, and
# cross-entropy asks one thing only: how probable did the model think the right class $c$ was?
#
# $$p_k = \frac{e^{z_k}}{\sum_j e^{z_j}} \qquad L = -\log p_c$$
#
# `nn.CrossEntropyLoss` takes the logits and does both steps itself.

# %% Cross-entropy
logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.0], [3.0, -2.0, 0.0]])
label = torch.tensor([0, 1, 2])

probability = logits.softmax(dim=1)
of_the_right_class = probability[torch.arange(3), label]
print(
    "probability of the right class:",
    [round(p, 4) for p in of_the_right_class.tolist()],
)
print(
    "minus its logarithm:           ",
    [round(v, 4) for v in (-of_the_right_class.log()).tolist()],
)
print("their mean:            ", f"{-of_the_right_class.log().mean().item():.4f}")
print(
    "nn.CrossEntropyLoss(): ", f"{nn.CrossEntropyLoss()(logits, label).item():.4f}"
)

# %% The price of being sure and wrong
p = torch.linspace(0.005, 1, 400)
figure, axes = plt.subplots(figsize=(6.4, 3.4))
axes.plot(p, -p.log(), label="cross-entropy, −log p")
axes.plot(p, (1 - p) ** 2, "--", label="squared error, (1 − p)²")
axes.plot(
    of_the_right_class,
    -of_the_right_class.log(),
    "o",
    label="the three samples above",
)
axes.set(
    xlabel="probability that the model gives to the right class",
    ylabel="loss",
    ylim=(-0.1, 5.4),
)
axes.legend()
plt.show()

# %% [markdown] {"caption": true}
# Cross-entropy is 0 where the right class has probability 1, {{ f"{-torch.tensor(0.5).log().item():.2f}" }} at one half,
# {{ f"{-torch.tensor(0.01).log().item():.2f}" }} at one hundredth, and grows without bound. The squared error of the
# probability stays below 1.

# %% [markdown]
# The second sample is undecided between three classes and costs
# {{ f"{-of_the_right_class[1].log().item():.2f}" }}, near $\log 3 = {{ f"{torch.tensor(3.0).log().item():.2f}" }}$. That is what
# an untrained classifier of three classes should start with. The third is sure of the wrong class and costs
# {{ f"{-of_the_right_class[2].log().item():.2f}" }}. Cross-entropy has no upper bound: being sure and wrong is what it
# punishes. The squared error of a probability cannot exceed 1.

# %% [markdown]
# ## What goes wrong when they are swapped
#
# **Squared error for a class.** Take one sample of class 1 and a model that is sure of class 0. Both losses are large.
# But learning goes by the *gradient*, and behind a sigmoid or softmax the squared error's gradient vanishes exactly
# where the model is most wrong.

# %% Squared error behind a sigmoid
z = torch.linspace(-10, 10, 401, requires_grad=True)
(slope_of_squares,) = torch.autograd.grad(((z.sigmoid() - 1) ** 2).sum(), z)
(slope_of_entropy,) = torch.autograd.grad(-nn.functional.logsigmoid(z).sum(), z)

figure, axes = plt.subplots(figsize=(6.4, 3.2))
axes.plot(z.detach(), -slope_of_entropy, label="cross-entropy")
axes.plot(
    z.detach(), -slope_of_squares, "--", label="squared error of the probability"
)
axes.set(
    xlabel="logit of the right class (left: sure and wrong)",
    ylabel="size of the gradient",
)
axes.legend()
plt.show()

wrong = 50  # where the logit is -7.5
print(
    f"at logit {z[wrong].item():.1f}: cross-entropy pulls with {-slope_of_entropy[wrong].item():.4f},"
)
print(f"the squared error with {-slope_of_squares[wrong].item():.4f}")

# %% [markdown] {"caption": true}
# The pull on the right class's logit. Far on the left, where the model is sure and wrong, cross-entropy's gradient comes
# close to 1; that of the squared error goes to 0, as it does on the right.

# %% [markdown]
# At a logit of ${ {{ f"{z[wrong].item():g}" }} }$ cross-entropy pulls
# {{ f"{(slope_of_entropy[wrong] / slope_of_squares[wrong]).item():,.0f}" }} times as hard. The model that most needs to
# learn is the one that the squared error leaves alone.
#
# **Cross-entropy for a quantity.** This one is worse, because nothing seems wrong:

# %% Cross-entropy on one output
torch.manual_seed(0)
inputs = torch.tensor([[1.0], [2.0], [3.0]])
targets = torch.tensor([[2.0], [4.0], [6.0]])
swapped = nn.Linear(1, 1)
loss = nn.CrossEntropyLoss()(swapped(inputs), targets)
loss.backward()
print("Loss:    ", abs(loss.item()))
print("gradient:", swapped.weight.grad.abs().item())

# %% [markdown]
# A loss of 0, at once, without training! Softmax over a *single* output is always 1, whatever the model says; so its
# logarithm is 0, and so is every gradient. The model can never learn. A loss that is perfect before the first step is
# a reason to be suspicious, not to be glad.

# %% [markdown]
# ## A model, a loss
#
# Now the real thing. Three points lie on the line $y = 2x$; the model is a line with a weight $w$ and a bias $b$, both
# random at first.


# %% The model
class LinearRegression(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x):
        return self.linear(x)


# %% The loss before training
inputs = torch.tensor([[1.0], [2.0], [3.0]])
targets = torch.tensor([[2.0], [4.0], [6.0]])

torch.manual_seed(0)
model = LinearRegression()
criterion = nn.MSELoss()

loss = criterion(model(inputs), targets)
print(f"Loss: {loss.item():.4f}")

# %% [markdown]
# The loss is **{{ f"{loss.item():.4f}" }}**: torch's random start for seed 0 is the line
# $\hat y = { {{ f"{model.linear.weight.item():.4f}" }} }\,x + {{ f"{model.linear.bias.item():.4f}" }}$, which misses the
# three targets by {{ ", ".join(f"{e:.2f}" for e in (targets - model(inputs)).flatten().tolist()) }}.
# Change the seed, run both cells again (Ctrl+Enter), and you have another line and another loss.

# %% [markdown]
# ## Gradient descent
#
# Which way must $w$ and $b$ move? The gradient says how the loss changes with each; a step goes against it, scaled by
# the **learning rate** $\eta$:
#
# $$w \leftarrow w - \eta\,\frac{\partial L}{\partial w} \qquad b \leftarrow b - \eta\,\frac{\partial L}{\partial b}$$
#
# For the mean squared error of a line the gradient can be written down; `loss.backward()` finds the same by itself.

# %% The gradient, by hand and by torch
loss.backward()
miss = model(inputs).detach() - targets
print(
    f"by hand:  dL/dw = {(2 * miss * inputs).mean().item():.4f}   dL/db = {(2 * miss).mean().item():.4f}"
)
print(
    f"by torch: dL/dw = {model.linear.weight.grad.item():.4f}   dL/db = {model.linear.bias.grad.item():.4f}"
)

# %% [markdown]
# Both are negative: more weight and more bias would lower the loss. `torch.optim.SGD` makes that step for every
# parameter, and a training loop repeats it: **forget the old gradients, compute the loss, find the gradients, step.**

# %% The training loop
torch.manual_seed(0)
model = LinearRegression()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

for epoch in range(100):
    optimizer.zero_grad()
    loss = criterion(model(inputs), targets)
    loss.backward()
    optimizer.step()
    if (epoch + 1) % 10 == 0:
        print(f"Epoch [{epoch + 1}/100], Loss: {loss.item():.4f}")

print(f"w = {model.linear.weight.item():.4f}, b = {model.linear.bias.item():.4f}")

# %% [markdown]
# Most of the way is made in the first ten epochs; then progress becomes slow. The loss is a long valley: steep across,
# almost flat along its floor. After 100 epochs the weight is {{ f"{model.linear.weight.item():.2f}" }} and the bias
# {{ f"{model.linear.bias.item():.2f}" }}, where 2 and 0 would be perfect. See the valley, and walk in it:

# %% [markdown] {"component": "see-it-move", "settings": "optimizer=sgd&lr=0.01&epochs=100"}
# **See it move.** Choose an optimizer and a learning rate, say what you expect, and watch it train on the three points.

# %% [markdown]
# ## Adam and RMSprop in the same loop
#
# The valley is the problem: one learning rate for a steep and a flat direction. **RMSprop** divides every parameter's
# step by the root of a running mean of its squared gradients; **Adam** does so too, and steps along a running mean of
# the gradients. In the loop, one line changes.


# %% Three optimizers, one loop
def train(make_optimizer, epochs=100):
    torch.manual_seed(0)
    model = LinearRegression()
    optimizer = make_optimizer(model.parameters())
    losses = []
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = criterion(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


curves = {
    "SGD, lr 0.01": train(lambda p: torch.optim.SGD(p, lr=0.01)),
    "RMSprop, lr 0.01": train(lambda p: torch.optim.RMSprop(p, lr=0.01)),
    "Adam, lr 0.01": train(lambda p: torch.optim.Adam(p, lr=0.01)),
    "Adam, lr 0.3": train(lambda p: torch.optim.Adam(p, lr=0.3)),
}
for name, losses in curves.items():
    print(
        f"{name:17} after 10 epochs {losses[9]:8.4f}   after 100 epochs {losses[-1]:8.4f}"
    )

# %% Their curves
figure, axes = plt.subplots(figsize=(6.4, 3.6))
for (name, losses), style in zip(curves.items(), ["-", "--", "-.", ":"]):
    axes.semilogy(range(1, 101), losses, style, label=name)
axes.set(xlabel="epoch", ylabel="loss")
axes.legend()
plt.show()

# %% [markdown] {"caption": true}
# All four start at {{ f"{curves['Adam, lr 0.01'][0]:.2f}" }}. SGD ends at {{ f"{curves['SGD, lr 0.01'][-1]:.2g}" }}, RMSprop
# at {{ f"{curves['RMSprop, lr 0.01'][-1]:.2g}" }} and Adam at {{ f"{curves['Adam, lr 0.01'][-1]:.2g}" }}, all with lr 0.01;
# Adam with lr 0.3 ends at {{ f"{curves['Adam, lr 0.3'][-1]:.2g}" }}.

# %% [markdown]
# At a learning rate of 0.01 the two adaptive methods are far *behind* plain SGD:
# {{ f"{curves['Adam, lr 0.01'][-1]:.2f}" }} for Adam against {{ f"{curves['SGD, lr 0.01'][-1]:.2f}" }}. They normalise
# the gradient away, so that a step is about as long as the learning rate itself (RMSprop's first ones are longer), and 100 steps of 0.01 do not reach the
# goal. With lr 0.3 Adam reaches {{ f"{curves['Adam, lr 0.3'][-1]:.4f}" }}. The same number means different things to
# different optimizers: **comparing optimizers at one learning rate compares nothing.**

# %% [markdown]
# ## A tip on learning rates
#
# "Use Adam, it finds the learning rate by itself" is half true. It adapts how far every parameter moves *relative* to
# the others; how far all of them move is still yours to say. Adaptive methods crawl when the learning rate is too
# small and are thrown about when it is too large, like any other:

# %% Adam from too small to too large
rates = [0.0001, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0]
ends = {}
for lr in rates:
    losses = train(lambda p: torch.optim.Adam(p, lr=lr))
    ends[lr] = losses[-1]
    print(
        f"lr {lr:<8g} loss after 100 epochs {losses[-1]:12.4f}   highest on the way {max(losses):14.2f}"
    )

best = min(ends, key=ends.get)
print(f"best: lr {best:g}")

# %% [markdown]
# Between the best rate, {{ f"{best:g}" }}, and the worst lie
# {{ f"{torch.tensor(max(ends.values()) / min(ends.values())).log10().item():.0f}" }} powers of ten in the loss. At
# {{ f"{rates[0]:g}" }} Adam has hardly moved: it ends at {{ f"{ends[rates[0]]:.2f}" }}. At
# {{ f"{rates[-1]:g}" }} its first steps throw it so far away that 100 epochs do not bring it back.
#
# The tip, then: **try learning rates by factors of ten, then of three, and look at the curve.** That is what
# `fallline sweep` does, for all of them at once; how far is too far is the subject of the next page.

# %% [markdown] {"question": "purpose"}
# What is the primary purpose of a loss function in deep learning?
#
# - [ ] To make the model train faster.
#   How fast it trains is up to the optimizer, its learning rate and the machine. The loss says where to go.
# - [x] To measure how far predictions are from the targets, as one number that can be minimised.
#   Its value says how wrong the model is, and its gradient which way is better.
# - [ ] To choose the learning rate.
#   The learning rate is a number of the optimizer, and the loss does not know it.
# - [ ] To report the accuracy to people.
#   Accuracy is a metric. It jumps in steps, so its gradient is 0 almost everywhere: nothing could be learnt from it.

# %% [markdown] {"question": "adaptive"}
# Which optimization technique adapts the learning rate during training?
#
# - [ ] Plain SGD, `torch.optim.SGD(model.parameters(), lr=0.01)`.
#   Its learning rate is 0.01 for every parameter and in every step, until you or a schedule change it.
# - [x] Adam.
#   It divides every parameter's step by the root of a running mean of its squared gradients.
# - [x] RMSprop.
#   It divides by the same kind of root as Adam. It adapts too, though it is often left out of this question.
# - [ ] SGD with momentum.
#   Momentum adds up past gradients, but the rate that they are multiplied with stays the same for all parameters.

# %% [markdown] {"question": "mse-of-doubled-errors"}
# All errors of a model become twice as large. What happens to its mean squared error?
#
# - [ ] It doubles.
#   That is the mean *absolute* error, `nn.L1Loss`.
# - [x] It becomes four times as large.
#   Every error is squared before the mean is taken.
# - [ ] It stays the same, because it is a mean.
#   A mean does not shrink its terms: if every term grows, so does the mean.

# %% [markdown] {"question": "logits"}
# What do you hand to `nn.CrossEntropyLoss`?
#
# - [x] The logits, as the last linear layer gives them.
#   It takes the softmax itself, in a form that does not overflow.
# - [ ] The probabilities, after a softmax.
#   Then softmax is taken twice. It trains, badly: the loss can no longer come near 0.
# - [ ] The class with the largest logit.
#   Taking the largest has no gradient, so nothing could be learnt.

# %% [markdown] {"question": "zero-loss"}
# A regression model prints `Loss: 0.0` before it was trained. What is the most likely reason?
#
# - [ ] The random start happened to be perfect.
#   With two random real numbers that has probability zero.
# - [x] The loss does not fit the model's output, for example cross-entropy over a single output.
#   Softmax over one output is 1 whatever the model says, so the loss and its gradient are 0.
# - [ ] The learning rate is too small.
#   Before the first step the learning rate has not been used yet.

# %% [markdown] {"question": "zero-grad"}
# What happens in the loop above without `optimizer.zero_grad()`?
#
# - [ ] Nothing: `backward` overwrites the old gradients.
#   It adds to them, so that gradients can be accumulated on purpose.
# - [ ] An error.
#   torch cannot know that you did not mean to accumulate.
# - [x] Gradients of all past epochs add up, and every step follows their sum.
#   The steps grow like those of momentum without friction, and the loss swings up and down instead of settling.

# %% [markdown] {"question": "same-rate"}
# At a learning rate of 0.01, SGD ends lower than Adam on this page. What follows?
#
# - [ ] SGD is the better optimizer for lines.
#   At 0.3 Adam ends lower than SGD did at 0.01. One rate each says nothing about the optimizers.
# - [x] Nothing yet: each has to be tried at its own best learning rate.
#   SGD's step is the learning rate times the gradient; Adam's is about the learning rate itself.
# - [ ] Adam has a bug.
#   It does what it says: a hundred steps of about 0.01 move a parameter by about 1.
