"""`fallline check` tells what is wrong with a task before it is trained, and ends with 1 if something is."""

from __future__ import annotations

from pathlib import Path

import pytest

TASK = """
import torch, fallline as fl
from torch import nn

x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
labels = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()

def model(*more):
    return lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3), *more)

good = fl.Task("good", model(), (x, labels), "cross_entropy")
twice = fl.Task("twice", model(nn.Softmax(1)), (x, labels), "cross_entropy")
leaking = fl.Task("leaking", model(), (x, labels), "cross_entropy", validation=(x[:50], labels[:50]))
guessed = fl.Task("guessed", model(nn.LogSoftmax(1)), (x, labels), nn.CrossEntropyLoss())

class Blind(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(torch.ones_like(x))

blind = fl.Task("blind", Blind, (x, labels), "cross_entropy")
"""
CHECKS = 8


@pytest.fixture(autouse=True)
def tasks(fallline) -> None:
    Path("mine.py").write_text(TASK)


def test_a_healthy_task_has_a_line_for_each_check(fallline) -> None:
    ended = fallline("check", "mine.py:good")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert len(lines) == CHECKS + 1
    assert all(line.split()[0] == "ok" for line in lines[:-1])
    assert "a guess (all 3 classes alike) costs 1.099" in ended.out
    assert lines[-1] == "good: nothing to complain of."


def test_a_misused_loss_is_told_with_its_fix(fallline) -> None:
    ended = fallline("check", "mine.py:twice")
    assert ended.code == 1
    assert "double-softmax" in ended.out
    assert "Fix: " in ended.out
    assert ended.out.splitlines()[-1] == "twice: 1 error."


def test_a_model_that_ignores_its_input_is_an_error(fallline) -> None:
    ended = fallline("check", "mine.py:blind")
    assert ended.code == 1
    assert "input-ignored" in ended.out


def test_warnings_and_notes_alone_end_well(fallline) -> None:
    ended = fallline("check", "mine.py:leaking")
    assert ended.code == 0
    assert "50 of 50 validation samples" in ended.out
    assert ended.out.splitlines()[-1] == "leaking: 1 warning."
    noted = fallline("check", "mine.py:guessed")
    assert noted.code == 0
    assert "log-softmax-twice" in noted.out


def test_another_loss_can_be_checked(fallline) -> None:
    assert fallline("check", "mine.py:good", "--loss", "focal:gamma=1").code == 0
    refused = fallline("check", "mine.py:good", "--loss", "mse")
    assert refused.code == 1
    assert "shape" in refused.out


def test_training_refuses_a_misused_loss_before_the_first_step(fallline) -> None:
    for command in ("fit", "sweep"):
        ended = fallline(command, "mine.py:twice")
        assert ended.code == 2
        assert ended.err.startswith("fallline: ")
        assert "softmax" in ended.err
        assert "Epoch" not in ended.out


def test_a_task_that_is_not_there_is_one_sentence(fallline) -> None:
    ended = fallline("check", "mine.py:nothing")
    assert ended.code == 2
    assert ended.err.count("\n") == 1
