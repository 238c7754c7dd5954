"""Tasks are found by name, by file and by module, and each failure says which and why."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fallline.errors import InvalidTask, UnknownName
from fallline.tasks import Task, resolve

GOOD = """
import torch
from fallline.tasks import Task

def make():
    points = [[1.0], [2.0]], [[1.0], [2.0]]
    return Task("mine", lambda: torch.nn.Linear(1, 1), points, "mse", validation="train")

task = make()
number = 3
def wrong():
    return 3
def broken():
    return [][1]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_task_file.py"
    path.write_text(GOOD)
    return path


def test_a_builtin_name() -> None:
    assert resolve("two_moons").name == "two_moons"


@pytest.mark.parametrize("attribute", ["task", "make"])
def test_a_file(file: Path, attribute: str) -> None:
    assert resolve(f"{file}:{attribute}").name == "mine"


def test_a_file_relative_to_the_current_directory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert isinstance(resolve("my_task_file.py:task"), Task)


@pytest.mark.parametrize("attribute", ["task", "make"])
def test_a_module_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attribute: str) -> None:
    package = f"package_of_{attribute}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "inner.py").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert resolve(f"{package}.inner:{attribute}").name == "mine"
    assert sys.path == before


def test_a_file_sees_the_folder_that_it_lies_in(file: Path) -> None:
    (file.parent / "neighbour_of_task.py").write_text(GOOD)
    file.write_text("from neighbour_of_task import task")
    before = list(sys.path)
    assert resolve(f"{file}:task").name == "mine"
    assert sys.path == before


def test_a_file_called_like_a_package_is_not_taken_for_it(tmp_path: Path) -> None:
    path = tmp_path / "json.py"
    path.write_text(GOOD)
    import json

    assert resolve(f"{path}:task").name == "mine"
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("digit", "There is no task 'digit'. Did you mean 'digits'"),
        ("zzz", "file.py:attribute"),
        ("my.py", "my.py:task"),
        ("nowhere_at_all.inside:task", "no module 'nowhere_at_all.inside'"),
        ("torch.nn.nothing:task", "no module 'torch.nn.nothing'"),
        ("no/such/file.py:task", "There is no file no/such/file.py"),
    ],
)
def test_names_that_do_not_exist(reference: str, words: str) -> None:
    with pytest.raises(UnknownName) as caught:
        resolve(reference)
    assert words in str(caught.value)


def test_a_misspelt_file_names_the_nearest(file: Path) -> None:
    with pytest.raises(UnknownName, match=r"Did you mean 'my_task_file\.py'"):
        resolve(f"{file.parent / 'my_task_fiel.py'}:task")


def test_a_misspelt_attribute_names_the_nearest_task(file: Path) -> None:
    with pytest.raises(UnknownName, match=r"has no 'tsak'\. Did you mean 'task'"):
        resolve(f"{file}:tsak")
    file.write_text("")
    with pytest.raises(UnknownName, match="It defines nothing"):
        resolve(f"{file}:task")


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ("number", "is a int, and a fallline.Task is expected"),
        ("wrong", "is a int, and a fallline.Task is expected"),
        ("broken", r"fails: IndexError: list index out of range \(my_task_file.py, line 14\)"),
    ],
)
def test_attributes_that_are_no_task(file: Path, attribute: str, words: str) -> None:
    with pytest.raises(InvalidTask, match=words):
        resolve(f"{file}:{attribute}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "x = 1\nimport surely_not_there",
            r"ModuleNotFoundError: No module named 'surely_not_there' \(.*, line 2\)",
        ),
        ("def f(:\n    pass", r"SyntaxError: invalid syntax \(.*line 1\)"),
        ("x = 1\n\nx / 0", r"ZeroDivisionError: division by zero \(.*, line 3\)"),
        ("raise SystemExit(2)", r"SystemExit: 2 \(.*, line 1\)"),
    ],
)
def test_a_file_or_module_that_does_not_import_shows_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    (tmp_path / "failing_task_module.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    for reference in ("failing_task_module.py:task", "failing_task_module:task"):
        with pytest.raises(InvalidTask, match=f"does not import: {words}"):
            resolve(reference)
    assert not [name for name in sys.modules if "failing_task_module" in name]
