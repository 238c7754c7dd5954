"""Bad input is answered by one sentence and exit code 2, before anything is trained, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

TASK_FILE = """
import torch
import fallline as fl

x = torch.linspace(0, 1, 12).reshape(6, 2)
classes = torch.tensor([0, 1, 2, 0, 1, 2])
model = lambda: torch.nn.Linear(2, 3)

def with_x(at, value):
    other = x.clone()
    other[at] = value
    return other

good = fl.Task("good", model, (x, classes), "cross_entropy", batch_size=2)
not_a_task = 3
def fails(): raise OSError("the file of samples is gone")
def wrong_shape(): return fl.Task("t", model, (x, torch.zeros(6, 3)), "mse", validation=(x, torch.zeros(6, 2)))
def wrong_type(): return fl.Task("t", model, (x, classes.float()), "cross_entropy")
def label_out_of_range(): return fl.Task("t", model, (x, torch.tensor([0, 1, 2, 0, 1, 3])), "cross_entropy")
def nan(): return fl.Task("t", model, (with_x((4, 1), float("nan")), classes), "cross_entropy")
def infinity(): return fl.Task("t", model, (x, with_x((2, 0), float("inf"))[:, :1]), "mse")
def empty(): return fl.Task("t", model, (x[:0], classes[:0]), "cross_entropy")
def one_sample(): return fl.Task("t", model, (x[:1], classes[:1]), "cross_entropy")
def batch_of_0(): return fl.Task("t", model, (x, classes), "cross_entropy", batch_size=0)
def keyword(): return fl.Task("t", model, (x, classes), "cross_entropy", bach_size=2)
def model_is_a_module(): return fl.Task("t", torch.nn.Linear(2, 3), (x, classes), "cross_entropy")
def input_size(): return fl.Task("t", lambda: torch.nn.Linear(5, 3), (x, classes), "cross_entropy")
"""

# What is typed after `fit TASK` or `sweep TASK`, and what the answer must name.
BOTH = [
    ("lin", [], ["'lin'", "'line'"]),
    ("mine.py", [], ["mine.py:task"]),
    ("mine.py:goood", [], ["'goood'", "'good'"]),
    ("mien.py:good", [], ["mien.py", "'mine.py'"]),
    ("no_such.module:task", [], ["no_such.module"]),
    ("broken.py:task", [], ["broken.py", "NameError", "'undefined_name'", "line 2"]),
    ("syntax.py:task", [], ["syntax.py", "SyntaxError"]),
    ("mine.py:not_a_task", [], ["not_a_task", "int"]),
    ("mine.py:fails", [], ["fails", "OSError", "the file of samples is gone"]),
    ("mine.py:wrong_shape", [], ["[6, 2]", "3"]),
    ("mine.py:wrong_type", [], ["float32"]),
    ("mine.py:label_out_of_range", [], ["3"]),
    ("mine.py:nan", [], ["NaN", "sample 4", "position [1]"]),
    ("mine.py:infinity", [], ["infinite", "sample 2"]),
    ("mine.py:empty", [], ["no samples"]),
    ("mine.py:one_sample", [], ["1 sample"]),
    ("mine.py:batch_of_0", [], ["batch_size=0"]),
    ("mine.py:keyword", [], ["'bach_size'", "'batch_size'"]),
    ("mine.py:model_is_a_module", [], ["Linear", "function"]),
    ("mine.py:input_size", [], ["inputs of shape [5, 2]"]),
    ("line", ["--optimizer", "adamm"], ["'adamm'", "'adam'"]),
    ("line", ["--optimizer", "adam:beta=0.9"], ["'beta'", "'betas'"]),
    ("line", ["--optimizer", "sgd:momentum"], ["'momentum'", "argument=value"]),
    ("line", ["--optimizer", "sgd:momentum=-1"], ["momentum", "-1"]),
    ("line", ["--optimizer", "sgd:momentum=much"], ["momentum", "'much'"]),
    ("line", ["--optimizer", ""], ["''", "adam"]),
    ("line", ["--loss", "msee"], ["'msee'", "'mse'"]),
    ("line", ["--loss", "cross_entropy"], ["cross"]),
    ("line", ["--lr", "0"], ["0"]),
    ("line", ["--lr", "-0.1"], ["-0.1"]),
    ("line", ["--lr", "nan"], ["nan"]),
    ("line", ["--lr", "inf"], ["inf"]),
    ("line", ["--lr", "fast"], ["'fast'", "number"]),
    ("line", ["--steps", "0"], ["steps = 0"]),
    ("line", ["--epochs", "-1"], ["epochs = -1"]),
    ("line", ["--steps", "5", "--epochs", "5"], ["epochs", "steps", "both"]),
    ("line", ["--device", "banana"], ["'banana'", "cpu"]),
    ("line", ["--device", "cuda:7"], ["cuda:7"]),
    ("line", ["--device", "meta"], ["'meta'"]),
    ("line", ["--resume"], ["--out"]),
    ("line", ["--resume", "--out", "nothing"], ["nothing to resume", "nothing"]),
    ("line", ["--out", "a_file"], ["a_file is a file"]),
    ("line", ["--out", "a_file/inside"], ["a_file"]),
    ("line", ["--out", "other"], ["other holds other files"]),
]
FIT = [
    ("line", ["--lr", "0.1:1:3"], ["'0.1:1:3'"]),
    ("line", ["--seed", "-1"], ["seed = -1"]),
    ("line", ["--patience", "0"], ["patience = 0"]),
]
SWEEP = [
    ("line", ["--lr", "1:0.1:3"], ["1", "0.1", "inverted"]),
    ("line", ["--lr", "0:1:3"], ["'0:1:3'", "above 0"]),
    ("line", ["--lr", "0.1:1:0"], ["0"]),
    ("line", ["--lr", "0.1:1:x"], ["'x'"]),
    ("line", ["--lr", "0.1:1:2:3"], ["LOW:HIGH:N"]),
    ("line", ["--lr", "0.1,0.1"], ["twice"]),
    ("line", ["--lr", "0.1,,1"], ["''"]),
    ("line", ["--seeds", "0"], ["seeds = 0"]),
    ("line", ["--seeds", "-3"], ["seeds = -3"]),
    ("line", ["--engine", "banana"], ["'banana'", "vectorised"]),
    ("line", ["--engine", "sequental"], ["'sequental'", "'sequential'"]),
    ("line", ["--workers", "0"], ["workers = 0"]),
    ("line", ["--workers", "-2"], ["'-2'"]),
    ("line", ["--workers", "many"], ["'many'"]),
]
CASES = [("fit", *case) for case in BOTH + FIT] + [("sweep", *case) for case in BOTH + SWEEP]


@pytest.mark.parametrize(("command", "task", "words", "named"), CASES)
def test_bad_input_is_one_sentence(fallline, tmp_path: Path, command, task, words, named):
    (tmp_path / "mine.py").write_text(TASK_FILE)
    (tmp_path / "broken.py").write_text("import math\ntask = undefined_name\n")
    (tmp_path / "syntax.py").write_text("task = (\n")
    (tmp_path / "a_file").write_text("text")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("text")
    before = sorted(tmp_path.rglob("*"))
    words = words if "--out" in words else [*words, "--out", "made"] if words != ["--resume"] else words

    ended = fallline(command, task, *words)

    assert ended.code == 2, ended
    assert ended.out == ""
    assert ended.err.startswith("fallline: ")
    assert ended.err.count("\n") == 1, ended.err
    assert "Traceback" not in ended.err
    assert len(ended.err) < 400
    for part in named:
        assert part in ended.err, ended.err
    left = [each for each in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(each)]
    assert left == before


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["fit", "line", "--lrr", "0.1"], "--lr"),
        (["sweeep", "line"], "'sweep'"),
        (["fit", "line", "--epochs", "many"], "--epochs"),
        (["fit"], "task"),
    ],
)
def test_misspelt_options_are_refused_with_the_nearest_one(fallline, words, named):
    ended = fallline(*words)
    assert ended.code == 2
    assert named in ended.err
    assert "Traceback" not in ended.err


def test_a_report_of_what_is_no_run_is_refused(fallline, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "spec.json").write_text('{"task": ')
    for name, said in (("nowhere", "does not exist"), ("empty", "holds no sweep"), ("file", "is no directory"),
                       ("cut", "cannot be read")):  # fmt: skip
        ended = fallline("report", name)
        assert ended.code == 2
        assert name in ended.err
        assert said in ended.err
        assert ended.err.count("\n") == 1


def test_an_optimizer_that_cannot_train_the_model_is_refused_before_anything_is_written(fallline, tmp_path: Path):
    ended = fallline("sweep", "digits", "--optimizer", "muon", "--out", "runs/muon")
    assert ended.code == 2
    assert ended.err == (
        "fallline: parameter '0.bias' has shape (64,), but Muon trains matrices only: train the others with another "
        "optimizer, as muon_with_adamw does.\n"
    )
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "words", [["sweep", "line", "--optimizer", "sgd:lr=0.1", "--lr", "0.1:1:3"],
              ["fit", "line", "--optimizer", "lookahead(adam:eps=1e-6,lr=0.1)", "--lr", "0.01"]],
)  # fmt: skip
def test_two_learning_rates_are_one_too_many(fallline, words):
    ended = fallline(*words)
    assert ended.code == 2
    assert "both give the learning rate: leave one out." in ended.err
    assert not Path("runs").exists()
