# ---
# jupyter:
#   fallline:
#     course: Deep Learning with PyTorch
#     module: 5
#     modules: 26
#     level: Intermediate
#     title: Which loss?
#     summary: Outliers, rare classes, wrong labels, honest probabilities; and the bug that trains anyway.
#     minutes: 12
#     seed: 0
#     previous: how-far-is-too-far
#     next: a-fair-race
#     related:
#     - page: loss-functions-and-optimization
#       why: squared error and cross-entropy, from the beginning
#     - url: https://arxiv.org/abs/1708.02002
#       title: "Lin et al.: Focal loss for dense object detection"
#       why: where the focal loss comes from
#     - url: https://arxiv.org/abs/1805.07836
#       title: "Zhang and Sabuncu: Generalized cross entropy loss for training with noisy labels"
#       why: the loss that forgives wrong labels
#     - url: https://arxiv.org/abs/1706.04599
#       title: "Guo et al.: On calibration of modern neural networks"
#       why: temperature scaling
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# A loss is a statement about what matters. Mean squared error says that large errors matter most; cross-entropy says that
# confidence must be earned. When the data disagree with the statement, training succeeds and the model is still wrong.
# Five ways in which that happens, each in a few lines.
#
# ## Outliers: squared error believes every point
#
# Twenty points on the line $y = 2x + 1$, and two of them were written down wrongly.

# %% Two wrong points
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
x = torch.linspace(0, 4, 20)
y = 2 * x + 1 + 0.3 * torch.randn(20)
y[3] += 15
y[17] -= 20


def fit_line(criterion):
    line = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(line.parameters(), lr=0.05)
    for _ in range(2000):
        optimizer.zero_grad()
        criterion(line(x.unsqueeze(1)).squeeze(1), y).backward()
        optimizer.step()
    return line.weight.item(), line.bias.item()


lines = {
    "squared error": fit_line(nn.MSELoss()),
    "absolute error": fit_line(nn.L1Loss()),
    "Huber, δ = 1": fit_line(nn.HuberLoss(delta=1.0)),
}
for name, (weight, bias) in lines.items():
    print(f"{name:15} ŷ = {weight:.2f} x + {bias:.2f}")

# %% Three lines through the same points
figure, axes = plt.subplots(figsize=(6.4, 3.8))
axes.plot(x, y, "o", color="#555b66", label="points")
for (name, (weight, bias)), style in zip(lines.items(), ["--", ":", "-"]):
    axes.plot(x, weight * x + bias, style, label=name)
axes.set(xlabel="x", ylabel="y")
axes.legend()
plt.show()

# %% [markdown] {"caption": true}
# The true slope is 2. Two points of twenty bend the line of the squared error to a slope of
# {{ f"{lines['squared error'][0]:.2f}" }}. The absolute error finds {{ f"{lines['absolute error'][0]:.2f}" }}, Huber
# {{ f"{lines['Huber, δ = 1'][0]:.2f}" }}.

# %% [markdown]
# Huber's loss is squared for errors smaller than $\delta$ and grows like a straight line beyond:
#
# $$L_\delta(e) = \begin{cases} \frac{1}{2}e^2 & |e| \le \delta \\ \delta\left(|e| - \frac{1}{2}\delta\right) & \text{otherwise} \end{cases}$$
#
# What counts is the gradient: the squared error pulls in proportion to the error, so the farthest point pulls hardest.
# Huber's gradient never exceeds $\delta$, so two points cannot outvote eighteen. Choose $\delta$ as the size of an error that
# you still believe in.

# %% [markdown]
# ## Rare classes: what the focal loss moves, and what it does not
#
# One sample in twenty is positive. Three losses: plain cross-entropy; cross-entropy in which a positive sample weighs 19
# times as much; and the **focal loss**, which shrinks the loss of samples that are already well classified:
#
# $$\mathrm{FL}(p) = -(1 - p)^\gamma \log p,\qquad \gamma = 2,$$
#
# with $p$ the probability given to the right class.


# %% Three losses for one positive in twenty
def blobs(seed, negative, positive):
    generator = torch.Generator().manual_seed(seed)
    background = torch.randn(negative, 2, generator=generator)
    rare = 0.8 * torch.randn(positive, 2, generator=generator) + 1.8
    return torch.cat([background, rare]), torch.cat(
        [torch.zeros(negative), torch.ones(positive)]
    )


points, label = blobs(0, 1900, 100)
points_new, label_new = blobs(1, 19_000, 1000)


def focal(logits, target, gamma=2.0):
    right = torch.where(target == 1, logits.sigmoid(), 1 - logits.sigmoid())
    return (
        (1 - right) ** gamma
        * F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    ).mean()


def probabilities(loss):
    """What a small network, trained with a loss, gives to 20,000 new samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        loss(model(points).squeeze(1), label).backward()
        optimizer.step()
    with torch.no_grad():
        return model(points_new).squeeze(1).sigmoid()


given = {
    "cross-entropy": probabilities(F.binary_cross_entropy_with_logits),
    "weighted 19 : 1": probabilities(
        lambda z, t: F.binary_cross_entropy_with_logits(
            z, t, pos_weight=torch.tensor(19.0)
        )
    ),
    "focal, γ = 2": probabilities(focal),
}


def measures(p, threshold):
    found = p > threshold
    hits = (found & (label_new == 1)).sum().item()
    recall, precision = hits / 1000, hits / found.sum().item()
    rank = p.argsort().argsort().double()
    ranking = (rank[label_new == 1].mean().item() - 999 / 2) / 19_000
    return recall, precision, ranking


print(
    "                  threshold  recall  precision  ranked right  mean probability"
)
for name, threshold in [(n, 0.5) for n in given] + [("cross-entropy", 0.05)]:
    recall, precision, ranking = measures(given[name], threshold)
    print(
        f"{name:17} {threshold:9.2f} {recall:7.3f} {precision:10.3f} {ranking:13.3f} {given[name].mean().item():17.3f}"
    )

# %% [markdown]
# Read the first and the last row. At a threshold of 0.5 plain cross-entropy finds
# {{ f"{measures(given['cross-entropy'], 0.5)[0]:.0%}" }} of the positives, the weighted loss
# {{ f"{measures(given['weighted 19 : 1'], 0.5)[0]:.0%}" }}. But with its threshold moved to 0.05, the *same* plain model finds
# {{ f"{measures(given['cross-entropy'], 0.05)[0]:.0%}" }} at the same precision. "Ranked right" is the share of pairs in which
# the positive sample has the higher probability, and there all three are alike. Weighting did not make a better model here;
# it moved the threshold, and paid with its probabilities: they claim {{ f"{given['weighted 19 : 1'].mean().item():.1%}" }}
# positives where there are 5 %. The focal loss claims {{ f"{given['focal, γ = 2'].mean().item():.1%}" }}.
#
# So: if you need *decisions*, keep cross-entropy and choose the threshold. The focal loss earns its place where easy
# negatives are so many, tens of thousands for each positive as in object detection, that their summed gradient drowns the
# rest:

# %% Who makes up the loss?
plain = -torch.where(
    label_new == 1, given["cross-entropy"], 1 - given["cross-entropy"]
).log()
weight = (1 - (-plain).exp()) ** 2
easy = (-plain).exp() > 0.9
print(
    f"easy samples, given more than 0.9 to the right class: {easy.float().mean().item():.1%}"
)
print(
    f"their share of the cross-entropy: {(plain[easy].sum() / plain.sum()).item():.1%}"
)
print(
    f"their share of the focal loss:    {((weight * plain)[easy].sum() / (weight * plain).sum()).item():.1%}"
)

# %% [markdown]
# ## Wrong labels: cross-entropy learns them by heart
#
# Three spirals again, but three labels in ten are wrong. Cross-entropy has no bound, so a wrong label that the model
# rejects becomes the most urgent sample of all. The **generalized cross-entropy** $(1 - p^q)/q$ lies between cross-entropy
# ($q \to 0$) and the absolute error ($q = 1$), and gives up on samples that will not fit.


# %% Three labels in ten are wrong
def spirals(seed, points, arms=3):
    generator = torch.Generator().manual_seed(seed)
    radius = 3 * torch.rand(arms, points, generator=generator).sqrt()
    angle = 2 * radius + 2 * math.pi / arms * torch.arange(arms).unsqueeze(1)
    noise = 0.15 * torch.randn(arms, points, 2, generator=generator)
    samples = torch.stack([radius * angle.cos(), radius * angle.sin()], -1) + noise
    return samples.reshape(-1, 2), torch.arange(arms).repeat_interleave(points)


samples, truth = spirals(seed=0, points=100)
samples_new, truth_new = spirals(seed=1, points=1000)
generator = torch.Generator().manual_seed(5)
wrong = torch.rand(300, generator=generator) < 0.3
noisy = torch.where(
    wrong, (truth + torch.randint(1, 3, (300,), generator=generator)) % 3, truth
)
print(f"{(noisy != truth).sum().item()} of 300 labels are wrong")


def generalized(logits, target, q=0.7):
    log_p = logits.log_softmax(1)[torch.arange(len(target)), target]
    return ((1 - (q * log_p).exp()) / q).mean()


def train(loss, labels, steps=2000):
    """Accuracy on new samples, whose labels are right, after every 20 steps; and the model."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 3),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    accuracy = []
    for step in range(steps):
        optimizer.zero_grad()
        loss(model(samples), labels).backward()
        optimizer.step()
        if step % 20 == 19:
            with torch.no_grad():
                accuracy.append(
                    (model(samples_new).argmax(1) == truth_new)
                    .float()
                    .mean()
                    .item()
                )
    return accuracy, model


accuracies, models = {}, {}
for name, loss in {
    "cross-entropy": F.cross_entropy,
    "generalized, q = 0.7": generalized,
}.items():
    accuracies[name], models[name] = train(loss, noisy)
    with torch.no_grad():
        learnt = (
            (models[name](samples)[wrong].argmax(1) == noisy[wrong])
            .float()
            .mean()
            .item()
        )
    print(
        f"{name:21} best {max(accuracies[name]):.3f}, last {accuracies[name][-1]:.3f}; wrong labels learnt by heart {learnt:.0%}"
    )

# %% Accuracy on right labels, while training on wrong ones
figure, axes = plt.subplots(figsize=(6.4, 3.4))
for (name, accuracy), style in zip(accuracies.items(), ["-", "--"]):
    axes.plot(range(20, 2001, 20), accuracy, style, label=name)
axes.set(xlabel="step", ylabel="accuracy on new samples")
axes.legend()
plt.show()

# %% [markdown] {"caption": true}
# Both learn the spirals first, to {{ f"{max(accuracies['cross-entropy']):.0%}" }} and
# {{ f"{max(accuracies['generalized, q = 0.7']):.0%}" }}. Then cross-entropy goes on to the wrong labels, and falls to
# {{ f"{accuracies['cross-entropy'][-1]:.0%}" }}; the generalized one ends at
# {{ f"{accuracies['generalized, q = 0.7'][-1]:.0%}" }}.

# %% [markdown]
# Look at the beginning of both curves before you change your loss: plain cross-entropy, *stopped early*, is as good as
# anything here. Right samples agree with each other and are learnt first; wrong ones must be learnt one by one. A clean
# validation set and patience are the first remedy, another loss is the second.

# %% [markdown]
# ## Honest probabilities
#
# Is a model that says "90 %" right nine times in ten? The network above was trained long after it had learnt what there was
# to learn. Sort its predictions by their confidence, and compare with how often they were right.


# %% Confidence against accuracy
def calibration(logits, target, bins=10):
    """Mean confidence, accuracy, and their mean distance over bins of confidence (the expected calibration error)."""
    confidence, choice = logits.softmax(1).max(1)
    right = (choice == target).float()
    error = 0.0
    for k in range(bins):
        inside = (confidence > k / bins) & (confidence <= (k + 1) / bins)
        if inside.any():
            error += (
                inside.float().mean()
                * (confidence[inside].mean() - right[inside].mean()).abs()
            ).item()
    return confidence.mean().item(), right.mean().item(), error


with torch.no_grad():
    logits = models["cross-entropy"](samples_new)
held_out, rest = slice(0, None, 2), slice(1, None, 2)
temperatures = [1 + 0.1 * k for k in range(60)]
temperature = min(
    temperatures,
    key=lambda t: F.cross_entropy(logits[held_out] / t, truth_new[held_out]).item(),
)

for name, shown in {
    "as trained": logits[rest],
    f"divided by {temperature:.1f}": logits[rest] / temperature,
}.items():
    confidence, accuracy, error = calibration(shown, truth_new[rest])
    print(
        f"{name:15} confidence {confidence:.3f}   accuracy {accuracy:.3f}   calibration error {error:.3f}"
    )

# %% [markdown]
# It is right in {{ f"{calibration(logits[rest], truth_new[rest])[1]:.0%}" }} of cases and claims
# {{ f"{calibration(logits[rest], truth_new[rest])[0]:.0%}" }}. Dividing all its logits by one number, the **temperature**, found
# on samples held out, mends most of that and does not change a single decision: the largest logit stays the largest.

# %% [markdown]
# ## The bug that trains anyway
#
# Now the most common mistake with losses. The model ends in a softmax, because a classifier should give probabilities; and
# `nn.CrossEntropyLoss` takes another softmax of them.


# %% Softmax taken twice
def train_classifier(twice, steps=300):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        output = model(samples)
        loss = F.cross_entropy(output.softmax(1) if twice else output, truth)
        loss.backward()
        optimizer.step()
        if step + 1 in (20, 50, 100, 300):
            with torch.no_grad():
                accuracy = (
                    (model(samples_new).argmax(1) == truth_new)
                    .float()
                    .mean()
                    .item()
                )
            print(
                f"   step {step + 1:3}: loss {loss.item():.4f}, accuracy {accuracy:.3f}"
            )


print("softmax once:")
train_classifier(twice=False)
print("softmax twice:")
train_classifier(twice=True)
floor = math.log(math.e + 2) - 1
print(f"the lowest loss that two softmaxes allow for three classes: {floor:.4f}")

# %% [markdown]
# No error, no warning, and the accuracy arrives at nearly the same place. That is why the bug survives: it trains. But the
# loss is stuck at {{ f"{floor:.4f}" }}, because probabilities lie between 0 and 1, so that the second softmax can never give
# more than $e/(e+2)$ to a class. Its gradient is weaker, so learning is slower, and the more classes there are the worse it
# becomes: for a thousand the floor lies at {{ f"{math.log(math.e + 999) - 1:.2f}" }}, where knowing nothing costs
# {{ f"{math.log(1000):.2f}" }}.
#
# You will not see this in a curve. `fallline check` sees it in the numbers that the loss is given. In Python it is a
# function of the task; on the command line, `fallline check my_task.py:task` says the same of a task in a file.

# %% Found by fallline check {"needs": "fallline"}
import fallline as fl

task = fl.Task(
    name="spirals",
    model=lambda: nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 3), nn.Softmax(dim=1)
    ),
    train=(samples, truth),
    loss=nn.CrossEntropyLoss(),
)
for finding in fl.check(task):
    print(finding)

# %% [markdown] {"question": "huber"}
# Why does Huber's loss resist outliers?
#
# - [ ] It removes them from the data.
#   All points stay, and each still pulls.
# - [x] Its gradient is bounded by δ, however large the error is.
#   A point ten times farther away pulls no harder.
# - [ ] It squares the errors.
#   That is what makes squared error follow outliers; Huber squares only the small ones.

# %% [markdown] {"question": "threshold"}
# Cross-entropy finds only half of a rare class at a threshold of 0.5. What do you try first?
#
# - [x] Another threshold, chosen on validation data.
#   The probabilities were right, and 0.5 was the wrong question: it asks which class is more probable.
# - [ ] The focal loss.
#   At a threshold of 0.5 it found about as many here. It changes which samples make up the gradient.
# - [ ] A larger learning rate.
#   It does not change what the minimum of the loss is.

# %% [markdown] {"question": "weights"}
# What does weighting the positives 19 : 1 do to predicted probabilities?
#
# - [ ] Nothing, it only speeds up training.
#   The loss has another minimum, so the model has other outputs.
# - [x] They become too large: the model answers as if both classes were equally frequent.
#   One in twenty times 19 is about one in two. As probabilities for the real world they must be corrected.
# - [ ] They become better calibrated.
#   The mean probability on this page is nearly three times the true frequency.

# %% [markdown] {"question": "noise"}
# Validation accuracy rises to a peak and then falls, while training loss goes on falling. Labels are known to be noisy. What
# happened?
#
# - [x] After what samples share, the model learnt wrong labels one by one.
#   Cross-entropy makes a rejected label ever more urgent, until it is learnt by heart.
# - [ ] The learning rate is too small.
#   Then the peak would come later, but it would come.
# - [ ] The validation set is too small.
#   Noise of a small set goes up and down, and does not fall for good.

# %% [markdown] {"question": "temperature"}
# Temperature scaling divides all logits by one number. What changes?
#
# - [ ] The accuracy.
#   Division by a positive number keeps the order of the logits, so every decision stays.
# - [x] The confidence.
#   With a temperature above 1 the largest probability falls and the smallest rises: they come nearer to each other.
# - [ ] The parameters of the network.
#   They stay; one number is added behind them.

# %% [markdown] {"question": "double-softmax"}
# A classifier for three classes trains, but its loss does not fall below 0.55. What do you look for?
#
# - [ ] A learning rate that is too large.
#   The loss would swing then. This one is still.
# - [x] A softmax at the end of the model.
#   $\log(e + 2) - 1 = 0.5514$ is the floor of cross-entropy over probabilities.
# - [ ] Too few hidden units.
#   That leaves some loss too, but not exactly this number.

# %% [markdown] {"question": "delta"}
# Measurement errors are about 0.3, and now and then one is 20. Which δ suits Huber's loss?
#
# - [ ] 100
#   All errors are smaller, so this is squared error.
# - [x] 1
#   Honest errors lie in the squared part, and wild ones in the straight part.
# - [ ] 0.0001
#   Nearly everything lies in the straight part: it is absolute error, scaled down, and learns slowly.
