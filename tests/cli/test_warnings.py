"""What the command line says beside its answer."""

import sys

import pytest

from fallline.cli import main

LEAKY = """
import torch
import fallline as fl

task = fl.Task(
    "leaky", lambda: torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.RReLU(), torch.nn.Linear(4, 1)),
    (torch.arange(20.0).reshape(10, 2) / 20, torch.arange(10.0).unsqueeze(1) / 10), "mse",
)
"""


def test_a_model_that_cannot_be_vectorised_is_named_before_it_is_trained(tmp_path, monkeypatch, capsys):
    (tmp_path / "own.py").write_text(LEAKY)
    monkeypatch.chdir(tmp_path)
    arguments = "sweep own.py:task --optimizer sgd --lr 0.1 --seeds 1 --steps 2 --no-report"
    monkeypatch.setattr(sys, "argv", ["fallline", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    error = capsys.readouterr().err
    assert error.startswith("fallline: training one trial at a time: the model cannot be vectorised: RReLU '1'")
    assert error.count("\n") == 1
