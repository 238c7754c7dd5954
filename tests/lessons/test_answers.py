"""What the answers to the pages' questions claim, asserted by running it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import fallline as fl
from fallline.evidence.statistics import sign_flip_test
from fallline.lessons.course import Question, course

QUESTIONS = {question.name: question for page in course() for question in page.of_kind(Question)}
CLAIMS: dict[str, Callable[[], None]] = {}
X = torch.tensor([[1.0], [2.0], [3.0]])
Y = torch.tensor([[2.0], [4.0], [6.0]])


def of(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Marks what asserts the answers to a question."""

    def mark(claim: Callable[[], None]) -> Callable[[], None]:
        assert name not in CLAIMS
        CLAIMS[name] = claim
        return claim

    return mark


@pytest.mark.parametrize("name", QUESTIONS)
def test_what_an_answer_claims_is_so(name: str) -> None:
    CLAIMS[name]()


def test_every_question_has_answers_and_reasons_and_is_asserted_here() -> None:
    assert CLAIMS.keys() == QUESTIONS.keys()
    for page in course():
        questions = list(page.of_kind(Question))
        assert len(questions) >= 6
        for question in questions:
            assert len({option.text for option in question.options}) >= 3
            assert {option.right for option in question.options} == {True, False}
            assert all(len(option.reason) > 5 for option in question.options)
    assert len(QUESTIONS) == sum(len(list(page.of_kind(Question))) for page in course()), "names are unique"


def right(name: str) -> list[str]:
    return [option.text for option in QUESTIONS[name].options if option.right]


def line(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(1, 1)


def losses(make: Callable[[Any], torch.optim.Optimizer], epochs: int = 100, *, forget: bool = True) -> list[float]:
    """Of the page's loop."""
    model = line()
    optimizer = make(model.parameters())
    found = []
    for _ in range(epochs):
        if forget:
            optimizer.zero_grad()
        loss = nn.MSELoss()(model(X), Y)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def quadratic(curvature: float, lr: float, momentum: float = 0.0, steps: int = 500) -> list[float]:
    """Distances from the minimum of ½ · curvature · d²."""
    d = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([d], lr=lr, momentum=momentum)
    found = [1.0]
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * curvature * d**2).sum().backward()
        optimizer.step()
        found.append(abs(d.item()))
    return found


def first_steps(make: Callable[[Any], torch.optim.Optimizer], scale: float) -> list[float]:
    """How far two parameters move in the first step, the gradient of one being a hundred times the other's."""
    p = torch.zeros(2, requires_grad=True)
    optimizer = make([p])
    p.grad = scale * torch.tensor([1.0, 100.0])
    optimizer.step()
    return p.detach().abs().tolist()


@of("purpose")
def _() -> None:
    prediction = torch.tensor([1.0], requires_grad=True)
    far, near = F.mse_loss(prediction, torch.tensor([3.0])), F.mse_loss(prediction, torch.tensor([1.5]))
    assert far > near > 0
    (slope,) = torch.autograd.grad(far, prediction)
    assert slope < 0, "more is better"
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    accuracy = (logits.argmax(1) == 1).float().mean()
    assert not accuracy.requires_grad, "nothing can be learnt from it"


@of("adaptive")
def _() -> None:
    adaptive = {
        "Adam.": lambda p: torch.optim.Adam(p, lr=0.01),
        "RMSprop.": lambda p: torch.optim.RMSprop(p, lr=0.01),
    }
    assert right("adaptive") == list(adaptive)
    for make in adaptive.values():
        small, large = first_steps(make, 1.0)
        assert small == pytest.approx(large, rel=1e-3), "the large gradient moves no farther"
        assert first_steps(make, 10.0) == pytest.approx(first_steps(make, 1.0), rel=1e-3)
    for momentum in (0.0, 0.9):
        small, large = first_steps(lambda p: torch.optim.SGD(p, lr=0.01, momentum=momentum), 1.0)  # noqa: B023
        assert large == pytest.approx(100 * small)


@of("mse-of-doubled-errors")
def _() -> None:
    error = torch.tensor([0.5, -1.0, 1.5])
    zero = torch.zeros(3)
    assert nn.MSELoss()(2 * error, zero) == pytest.approx(4 * nn.MSELoss()(error, zero).item())
    assert nn.L1Loss()(2 * error, zero) == pytest.approx(2 * nn.L1Loss()(error, zero).item())


@of("logits")
def _() -> None:
    logits = torch.tensor([[30.0, -30.0, 0.0]])
    label = torch.tensor([0])
    assert nn.CrossEntropyLoss()(logits, label) == pytest.approx(0, abs=1e-6)
    assert nn.CrossEntropyLoss()(logits.softmax(1), label) > 0.55
    assert nn.CrossEntropyLoss()(1000 * logits, torch.tensor([1])).isfinite(), "it does not overflow"
    assert not logits.requires_grad_().argmax(1).requires_grad


@of("zero-loss")
def _() -> None:
    for seed in range(5):
        model = line(seed)
        loss = nn.CrossEntropyLoss()(model(X), Y)
        loss.backward()
        assert abs(loss.item()) == 0
        assert model.weight.grad is not None
        assert model.weight.grad.item() == 0
        assert nn.MSELoss()(model(X), Y) > 1, "the random start is not perfect"


@of("zero-grad")
def _() -> None:
    model = line()
    for times in (1, 2, 3):
        nn.MSELoss()(model(X), Y).backward()
        assert model.weight.grad is not None
        if times == 1:
            once = model.weight.grad.item()
        assert model.weight.grad.item() == pytest.approx(times * once, rel=1e-5)
    settled = losses(lambda p: torch.optim.SGD(p, lr=0.01))
    swinging = losses(lambda p: torch.optim.SGD(p, lr=0.01), forget=False)
    assert all(np.diff(settled) < 0)
    assert sum(np.diff(np.sign(np.diff(swinging))) != 0) > 5, "it goes up and down"
    assert max(swinging[-20:]) > 10 * settled[-1]


@of("same-rate")
def _() -> None:
    sgd = losses(lambda p: torch.optim.SGD(p, lr=0.01))[-1]
    assert losses(lambda p: torch.optim.Adam(p, lr=0.01))[-1] > sgd > losses(lambda p: torch.optim.Adam(p, lr=0.3))[-1]
    model = line()
    before = model.weight.item()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        nn.MSELoss()(model(X), Y).backward()
        optimizer.step()
    assert 0.5 < abs(model.weight.item() - before) < 1.1, "a hundred steps of about 0.01"


@of("critical")
def _() -> None:
    assert right("critical") == ["0.04"]
    assert quadratic(50, 0.0404)[-1] > 1000
    assert quadratic(50, 0.0396)[-1] < 1e-3
    assert quadratic(50, 0.02)[1] == pytest.approx(0, abs=1e-12), "solved in one step"


@of("momentum-line")
def _() -> None:
    bound = 2 * 1.9 / 50
    assert bound / 0.04 == pytest.approx(1.9)
    assert quadratic(50, 1.01 * bound, 0.9, 3000)[-1] > 1000
    assert quadratic(50, 0.99 * bound, 0.9, 3000)[-1] < 1e-3


@of("slow-floor")
def _() -> None:
    steep, flat = 50.0, 0.5
    lr = 0.9 * 2 / steep
    assert quadratic(flat, lr, steps=50)[-1] > 0.3, "slow along the floor"
    assert quadratic(flat, 1.9 / flat, steps=50)[-1] < 0.01, "where a larger rate would be faster"
    assert quadratic(steep, 1.9 / flat, steps=50)[-1] > 1e100, "and the steep direction diverges"


@of("nan")
def _() -> None:
    d = torch.tensor([1.0], requires_grad=True)
    optimizer = torch.optim.SGD([d], lr=0.06)
    found = []
    for _ in range(600):
        optimizer.zero_grad()
        (25 * d**2).sum().backward()
        optimizer.step()
        found.append(d.item())
    finite = sum(map(math.isfinite, found))
    assert 50 < finite < 300, "it grows for many steps before it overflows"
    assert all(math.isnan(value) for value in found[finite + 2 :]), "and never comes back"
    assert quadratic(50, 0.06 / 3)[-1] < 1e-6


@of("grid")
def _() -> None:
    (chosen,) = right("grid")
    rates = [float(rate) for rate in chosen.split(", ")]
    assert len(rates) == 7
    steps = [b / a for a, b in itertools.pairwise(rates)]
    assert all(2.99 <= step <= 3.4 for step in steps)
    others = [float(r) for o in QUESTIONS["grid"].options if o.text.startswith("0.01") for r in o.text.split(", ")]
    assert max(others) / min(others) < 10


@of("warm-up")
def _() -> None:
    schedule = fl.schedules.linear_warmup(0.3, fraction=0.1)
    rates = [float(schedule(step / 100)) for step in range(100)]
    assert rates[0] == 0
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert rates[10:] == pytest.approx([0.3] * 90)


@of("adam-line")
def _() -> None:
    model = line()
    optimizer = torch.optim.Adam(model.parameters(), lr=10)
    longest = 0.0
    for _ in range(300):
        before = model.weight.item()
        optimizer.zero_grad()
        nn.MSELoss()(model(X), Y).backward()
        optimizer.step()
        longest = max(longest, abs(model.weight.item() - before))
    assert 5 < longest < 15, "no step is much longer than the learning rate"
    assert math.isfinite(model.weight.item())
    assert optimizer.param_groups[0]["lr"] == 10
    assert not all(map(math.isfinite, losses(lambda p: torch.optim.SGD(p, lr=10))))


@of("huber")
def _() -> None:
    error = torch.tensor([0.5, 2.0, 20.0, 2000.0], requires_grad=True)
    for delta in (0.3, 1.0, 3.0):
        (slope,) = torch.autograd.grad(F.huber_loss(error, torch.zeros(4), delta=delta, reduction="sum"), error)
        assert slope.max() <= delta * (1 + 1e-6)
        assert slope[2] == slope[3]
    (slope,) = torch.autograd.grad(F.mse_loss(error, torch.zeros(4), reduction="sum"), error)
    assert slope[3] == pytest.approx(100 * slope[2].item())


def rare(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Probabilities of a logistic model trained on one positive in twenty, for its samples: negatives first."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(1900, 1, generator=generator), 0.8 * torch.randn(100, 1, generator=generator) + 1.8])
    t = torch.cat([torch.zeros(1900), torch.ones(100)])
    model = line()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(x).squeeze(1), t)
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        return model(x).squeeze(1).sigmoid()


def focal(logits: Tensor, target: Tensor) -> Tensor:
    p = torch.where(target == 1, logits.sigmoid(), 1 - logits.sigmoid())
    return ((1 - p) ** 2 * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).mean()


@of("threshold")
def _() -> None:
    p = rare(F.binary_cross_entropy_with_logits)
    assert abs(p.mean() - 0.05) < 1e-3, "the probabilities are right"
    at_half = (p[1900:] > 0.5).float().mean()
    assert at_half < 0.5
    assert (p[1900:] > 0.05).float().mean() > 0.8
    assert abs((rare(focal)[1900:] > 0.5).float().mean() - at_half) < 0.1


@of("weights")
def _() -> None:
    weighted = rare(lambda z, t: F.binary_cross_entropy_with_logits(z, t, pos_weight=torch.tensor(19.0)))
    assert weighted.mean() > 2.5 * 0.05
    # Without a feature the weighted minimum is one half, where the truth is one in twenty.
    z = torch.zeros(1, requires_grad=True)
    t = torch.tensor([1.0] + [0.0] * 19)
    (slope,) = torch.autograd.grad(
        F.binary_cross_entropy_with_logits(z.expand(20), t, pos_weight=torch.tensor(19.0)), z
    )
    assert slope.abs() < 1e-6
    assert z.sigmoid().item() == 0.5


@of("noise")
def _() -> None:
    rejected = torch.tensor([[-2.0, 0.0], [-20.0, 0.0]])
    values = F.cross_entropy(rejected, torch.zeros(2, dtype=torch.long), reduction="none")
    assert values[1] > 9 * values[0], "the more a label is rejected, the more urgent it is"


@of("temperature")
def _() -> None:
    logits = 4 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    cooled = logits / 2.2
    assert torch.equal(logits.argmax(1), cooled.argmax(1))
    before, after = logits.softmax(1), cooled.softmax(1)
    assert (after.max(1).values < before.max(1).values).all()
    assert (after.min(1).values > before.min(1).values).all()


@of("double-softmax")
def _() -> None:
    floor = math.log(math.e + 2) - 1
    assert f"{floor:.4f}" == "0.5514"
    logits = 50 * torch.randn(5000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = F.cross_entropy(logits.softmax(1), logits.argmax(1), reduction="none")
    assert floor - 1e-12 <= found.min() < floor + 1e-6
    for classes in (10, 1000):
        sure = torch.zeros(1, classes, dtype=torch.float64)
        sure[0, 0] = 1
        lowest = F.cross_entropy(sure, torch.tensor([0])).item()
        assert lowest == pytest.approx(math.log(math.e + classes - 1) - 1)
    findings = fl.losses.check(nn.CrossEntropyLoss(), logits[:64].softmax(1), logits[:64].argmax(1))
    assert [finding.code for finding in findings] == ["double-softmax"]


@of("delta")
def _() -> None:
    errors = torch.cat([0.3 * torch.randn(200, generator=torch.Generator().manual_seed(0)), torch.tensor([20.0])])
    zero = torch.zeros_like(errors)

    def values(delta: float) -> Tensor:
        return F.huber_loss(errors, zero, delta=delta, reduction="none")

    assert torch.allclose(values(100), 0.5 * errors**2), "this is squared error"
    assert torch.allclose(values(1)[:-1][errors[:-1].abs() < 1], 0.5 * errors[:-1][errors[:-1].abs() < 1] ** 2)
    assert values(1)[-1] == pytest.approx(19.5)
    assert torch.allclose(values(1e-4), 1e-4 * errors.abs(), atol=1e-7), "this is absolute error, scaled down"


def finals(make: Callable[[Any], torch.optim.Optimizer], seeds: range) -> np.ndarray:
    """Final losses of a small network over seeds."""
    x = torch.linspace(-2, 2, 40).unsqueeze(1)
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = make(model.parameters())
        for _ in range(60):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), (3 * x).sin())
            loss.backward()
            optimizer.step()
        found.append(loss.item())
    return np.array(found)


@of("one-seed")
def _() -> None:
    apart = finals(lambda p: torch.optim.Adam(p, lr=0.03), range(10)) - finals(
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), range(10)
    )
    assert 0 < (apart > 0).sum() < 10, "another seed turns it around"


@of("five-seeds")
def _() -> None:
    sums = Counter(abs(sum(signs)) for signs in itertools.product((-1, 1), repeat=5))
    assert sums[5] / 2**5 == 2 / 32 == 0.0625
    assert max(sums) == 5, "nothing is more extreme than all signs alike"
    assert f"{2 / 2**8:.4f}" == "0.0078"
    assert sign_flip_test(np.arange(1.0, 6), np.zeros(5)) == pytest.approx(0.0625)
    assert sign_flip_test(np.arange(1.0, 9), np.zeros(8)) == pytest.approx(2 / 256)


@of("paired")
def _() -> None:
    one = finals(lambda p: torch.optim.Adam(p, lr=0.03), range(12))
    other = finals(lambda p: torch.optim.Adam(p, lr=0.04), range(12))
    assert (one - other).std() < 0.8 * math.hypot(one.std(), other.std()), "less than between different seeds"


@of("same-budget")
def _() -> None:
    draws = np.random.default_rng(0).normal(size=(2000, 50))
    assert (draws.min(axis=1) < draws[:, 0]).mean() > 0.95, "the best of 50 equal guesses beats one"


@of("tuning-seeds")
def _() -> None:
    generator = np.random.default_rng(0)
    tuning, reporting = generator.normal(size=(2, 2000, 13))
    chosen = tuning.argmin(axis=1)
    rows = np.arange(2000)
    assert tuning[rows, chosen].mean() < -1.4, "among equal learning rates the best looks good"
    assert abs(reporting[rows, chosen].mean()) < 0.1, "and its luck does not come again"


@of("order")
def _() -> None:
    gradients = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(1000, generator=generator)
    fixed = torch.stack([gradients[batch].mean() for _ in range(20) for batch in order[:896].split(128)])
    shuffled = torch.stack(
        [
            gradients[batch].mean()
            for _ in range(20)
            for batch in torch.randperm(1000, generator=generator)[:896].split(128)
        ]
    )

    def spread(means: Tensor) -> float:
        """How much an average over the last seven batches, an epoch's, varies from step to step."""
        return means.unfold(0, 7, 1).mean(1).std().item()

    assert fixed.std() > 0.02, "the batches are noisy"
    assert spread(fixed) < 1e-6 < 1e-3 < spread(shuffled)


@of("no-evidence")
def _() -> None:
    # A true difference, small beside the scatter: a few seeds do not show it, many do.
    draws = np.random.default_rng(0).normal(0.1, 1.0, size=4000)
    few, many = draws[:10], draws
    assert abs(few.mean()) < 2 * few.std() / math.sqrt(len(few))
    assert many.mean() > 4 * many.std() / math.sqrt(len(many))
