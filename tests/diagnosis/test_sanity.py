"""Each sanity check catches what it is for, with a figure and a fix, and has nothing to say about healthy tasks."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import fallline as fl
from fallline.diagnosis import examine

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(400, 6, generator=GENERATOR)
LABELS = (X @ torch.randn(6, 3, generator=GENERATOR)).argmax(1)
NUMBERS = (X @ torch.randn(6, 1, generator=GENERATOR)) + 0.1 * torch.randn(400, 1, generator=GENERATOR)


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))


def regressor() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))


def task(model=classifier, y=LABELS, loss="cross_entropy", x=X, **more) -> fl.Task:
    return fl.Task("mine", model, (x[:300], y[:300]), loss, **{"validation": (x[300:], y[300:]), **more})


class Wrapped(nn.Module):
    """A model whose forward pass is given as a function of its layers and the input."""

    def __init__(self, forward, make=classifier) -> None:
        super().__init__()
        self.layers = make()
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def found(made: fl.Task, code: str):
    """The finding of that code; there must be no error beside it."""
    findings = fl.check(made)
    assert code in {each.code for each in findings}, findings
    return next(each for each in findings if each.code == code)


def mixing(model, x):
    return model.layers(x) + model.layers(x).mean(0)


def blind(model, x):
    return model.layers(torch.zeros_like(x)) + 0.0 * x.sum()


def detached(model, x):
    return model.layers[2](model.layers[1](model.layers[0](x)).detach())


def always_dropping(model, x):
    return model.layers(nn.functional.dropout(x, 0.5, training=True))


def dead() -> nn.Module:
    layers = classifier()
    with torch.no_grad():
        layers[0].bias.fill_(-1000.0)
    return layers


def confident() -> nn.Module:
    layers = classifier()
    with torch.no_grad():
        layers[2].weight.mul_(100)
    return layers


def forgetful() -> nn.Module:
    layers = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32, momentum=0.0), nn.ReLU(), nn.Linear(32, 3))
    layers[1].running_var.fill_(1e6)
    return layers


def with_dead_weight() -> nn.Module:
    layers = classifier()
    layers.unused = nn.Linear(2, 2)
    return Wrapped(lambda model, x: model.layers[2](model.layers[1](model.layers[0](x))), lambda: layers)


def constant_model() -> nn.Module:
    return Wrapped(lambda model, x: model.layers(x).detach() + model.layers[2].bias)


def times(factor, make):
    def model() -> nn.Module:
        layers = make()
        return Wrapped(lambda whole, x: factor * whole.layers(x), lambda: layers)

    return model


def of_the_batch() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32, track_running_stats=False), nn.ReLU(), nn.Linear(32, 3))


def standardised(model, x):
    return model.layers((x - x.mean(0)) / (x.std(0) + 1e-6))


class Pair(nn.Module):
    """A mean and a variance, as two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = self.layers(x).chunk(2, 1)
        return mean, nn.functional.softplus(spread)


class Vocabulary(nn.Module):
    """Hidden states, and the classifier that is to be applied to them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Linear(6, 16)
        self.classifier = nn.Parameter(30 * torch.randn(50, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(x), self.classifier


TWICE = torch.arange(400) % 150
LAMBDA = {"loss": lambda p, t: nn.functional.cross_entropy(p, t) + 0.0}
BROKEN = [
    ("initial-loss", task(confident), "warning", "last_layer.weight.mul_"),
    ("initial-loss", task(regressor, NUMBERS + 50, "mse"), "note", "y.mean(0)"),
    ("initial-loss", task(regressor, 100 * NUMBERS + 50000, "mse"), "warning", "y.mean(0)"),
    ("cannot-overfit", task(constant_model), "warning", "do they belong together"),
    ("input-ignored", task(lambda: Wrapped(blind)), "error", "is x used"),
    ("no-gradient", task(lambda: Wrapped(detached)), "warning", "del model.layers.0"),
    ("no-gradient", task(dead), "warning", "LeakyReLU"),
    ("no-gradient", task(with_dead_weight), "warning", "unused"),
    ("mixes-samples", task(lambda: Wrapped(mixing)), "error", "permute"),
    ("random-evaluation", task(lambda: Wrapped(always_dropping)), "warning", "training=self.training"),
    ("train-eval", task(forgetful), "warning", "momentum"),
    ("initial-loss", task(times(100, regressor), NUMBERS / 10, "mse"), "warning", "last_layer.weight.mul_"),
    ("initial-loss", task(Pair, NUMBERS + 1000, nn.GaussianNLLLoss()), "warning", "y.mean(0)"),
    ("initial-loss", task(times(200, lambda: nn.Linear(6, 2)), LABELS, "ordinal"), "warning", "weight.mul_"),
    ("initial-loss", task(times(200, classifier), **LAMBDA), "warning", "weight.mul_"),
    ("initial-loss", task(Vocabulary, loss="linear_cross_entropy"), "warning", "weight.mul_"),
    ("mixes-samples", task(of_the_batch), "error", "track_running_stats"),
    ("mixes-samples", task(lambda: Wrapped(standardised)), "error", "permute"),
    ("leak", task(x=X[TWICE], y=LABELS[TWICE]), "warning", "keep"),
    ("leak", task(validation=(X[:50], LABELS[50:100])), "warning", "keep"),
    ("leak", task(validation=(X[200:300], LABELS[200:300])), "warning", "keep"),
]


@pytest.mark.parametrize(("code", "made", "severity", "fix"), BROKEN, ids=[f"{b[0]}-{i}" for i, b in enumerate(BROKEN)])
def test_what_is_wrong_is_found_with_a_figure_and_a_fix(code, made, severity, fix):
    finding = found(made, code)
    assert finding.severity == severity
    assert fix in finding.fix
    assert any(character.isdigit() for character in finding.seen), "with numbers"


def zero_head() -> nn.Module:
    layers = classifier()
    nn.init.zeros_(layers[2].weight)
    nn.init.zeros_(layers[2].bias)
    return layers


class Residual(nn.Module):
    """A residual block that begins as the identity: its last layer is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6))
        nn.init.zeros_(self.inside[2].weight)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.inside(x))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 3))


def frozen() -> nn.Module:
    layers = classifier()
    layers[0].requires_grad_(False)
    return layers


class Words(nn.Module):
    """Classes of sequences of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(self.words(x)).mean(1))


def scaled_down(model: Vocabulary) -> Vocabulary:
    with torch.no_grad():
        model.classifier.mul_(0.003)
    return model


TOKENS = torch.randint(0, 20, (400, 5), generator=GENERATOR)
HEALTHY = {
    "classes": task(),
    "numbers": task(regressor, NUMBERS, "mse"),
    "numbers without a dimension": task(lambda: nn.Sequential(regressor(), nn.Flatten(0)), NUMBERS[:, 0], "huber"),
    "a head of zeros": task(zero_head),
    "a residual block that begins as the identity": task(Residual),
    "batch normalisation and dropout": task(normalised),
    "frozen layers": task(frozen),
    "words": task(Words, LABELS, x=TOKENS),
    "yes or no": task(regressor, (NUMBERS > 0).float(), "binary_cross_entropy_with_logits"),
    "label smoothing": task(loss=nn.CrossEntropyLoss(label_smoothing=0.1)),
    "weights of classes": task(loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]))),
    "a linear model": task(functools.partial(nn.Linear, 6, 3)),
    "log-probabilities": task(lambda: nn.Sequential(classifier(), nn.LogSoftmax(1)), loss=nn.NLLLoss()),
    "batches that leave one sample over": task(normalised, batch_size=85),
    "a last batch of one sample": task(normalised, batch_size=23, drop_last=True),
    "a loss that begins below 0": task(regressor, NUMBERS, lambda p, t: (p - t).pow(2).mean() - 100),
    "a mean and a small variance": task(Pair, 0.01 * NUMBERS, nn.GaussianNLLLoss()),
    "normalised in the model": task(lambda: nn.Sequential(nn.BatchNorm1d(6), classifier()), x=255 * X.abs()),
    "the same inputs with other labels": task(classifier, LABELS, x=(X > 0).float()),
    "hidden states": task(lambda: scaled_down(Vocabulary()), loss="linear_cross_entropy"),
    "several quantiles": task(lambda: nn.Linear(6, 3), NUMBERS[:, 0], fl.losses.quantile(quantiles=(0.1, 0.5, 0.9))),
    "a callable": task(regressor, NUMBERS, lambda p, t: (p - t).abs().pow(1.5).mean()),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_tasks_have_nothing_to_complain_of(name):
    assert [each for each in fl.check(HEALTHY[name]) if each.severity != "note"] == []
    assert len(list(examine(HEALTHY[name]))) == 8


@pytest.mark.parametrize("name", fl.tasks.registry)
def test_the_built_in_tasks_are_healthy(name):
    assert [each for each in fl.check(fl.tasks.registry[name]()) if each.severity != "note"] == []


def test_every_check_has_a_figure():
    outcomes = list(examine(task()))
    assert len({each.check for each in outcomes}) == 8
    assert all(any(character.isdigit() for character in each.figure) for each in outcomes)


def test_a_misused_loss_is_all_that_is_told():
    made = task(lambda: nn.Sequential(classifier(), nn.Softmax(1)))
    with pytest.raises(fl.errors.LossMismatch, match="softmax"):
        made.check()
    [outcome] = examine(made)
    assert [each.code for each in outcome.findings] == ["double-softmax"]


def test_nothing_is_changed_by_looking():
    made = task(normalised)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fl.check(made)
    assert torch.equal(torch.get_rng_state(), before)
    first, again = (fl.fit(made, fl.optim.sgd(lr=0.1), steps=3, progress=False).history for _ in range(2))
    fl.check(made)
    third = fl.fit(made, fl.optim.sgd(lr=0.1), steps=3, progress=False).history
    assert first.train_loss.tolist() == again.train_loss.tolist() == third.train_loss.tolist()


def test_duplicates_that_are_natural_are_a_note():
    grid = torch.randint(0, 3, (400, 2), generator=GENERATOR).float()
    made = task(lambda: nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3)), LABELS, x=grid)
    leaks = [each for each in fl.check(made) if each.code == "leak"]
    assert [each.severity for each in leaks] == ["note"]
    assert "also among the 300 training samples" in leaks[0].seen
