"""What a page shows is what its code gives now; and a page that shows anything else is found."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from nbclient.exceptions import CellExecutionError
from torch import nn

from fallline.lessons import course, execution
from fallline.lessons.course import EXECUTED, ORDER, SOURCES, Code, lesson
from fallline.lessons.execution import differences, execute
from fallline.tasks.quadratic import hessian

FIRST = ORDER[0]
HEADER = """\
# ---
# jupyter:
#   fallline:
#     title: A page
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

"""


def shown(name: str) -> Any:
    return nbformat.read(EXECUTED / f"{name}.ipynb", as_version=4)


def printed(name: str, title: str) -> str:
    """What a cell of a page prints."""
    (code,) = [code for code in lesson(name).of_kind(Code) if code.title == title]
    return "".join(output.get("text", "") for output in code.outputs)


@pytest.mark.parametrize("name", ORDER)
def test_every_output_shown_is_what_the_code_gives_now(name: str) -> None:
    assert list(differences(shown(name), execute(SOURCES / f"{name}.py"))) == []


def change(place: Callable[[Any], bool], old: str, new: str) -> Callable[[Any], None]:
    """Replaces words in the first cell or output of a notebook that a test picks."""

    def changed(notebook: Any) -> None:
        for cell in notebook["cells"]:
            for holder, key in [(cell, "source"), *((o, "text") for o in cell.get("outputs", []) if "text" in o)]:
                if place(cell) and old in holder[key]:
                    holder[key] = holder[key].replace(old, new, 1)
                    return
        pytest.fail(f"{old!r} is not there")

    return changed


def figure(old: str, new: str) -> Callable[[Any], None]:
    """Changes the first figure of a notebook."""

    def changed(notebook: Any) -> None:
        outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
        data = next(output["data"] for output in outputs if "image/svg+xml" in output.get("data", {}))
        made = re.sub(old, new, data["image/svg+xml"], count=1)
        assert made != data["image/svg+xml"]
        data["image/svg+xml"] = made

    return changed


def moved(by: float) -> Callable[[Any], None]:
    """Moves the first point of a figure's first path."""

    def changed(notebook: Any) -> None:
        outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
        data = next(output["data"] for output in outputs if "image/svg+xml" in output.get("data", {}))
        svg = data["image/svg+xml"]
        found = re.search(r'd="M ([\d.]+)', svg)
        assert found is not None
        data["image/svg+xml"] = f"{svg[: found.start(1)]}{float(found[1]) + by:.6f}{svg[found.end(1) :]}"

    return changed


def figures(notebook: Any) -> list[Any]:
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return [output["data"] for output in outputs if "image/svg+xml" in output.get("data", {})]


def streams(notebook: Any) -> list[Any]:
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return [output for output in outputs if output["output_type"] == "stream"]


def is_code(cell: Any) -> bool:
    return bool(cell["cell_type"] == "code")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (change(is_code, "Loss: 14.7868", "Loss: 14.7867"), "The loss before training.*14.7867"),
        (change(is_code, "Loss: 14.7868", "Loss: 0.0"), "The loss before training"),
        (change(lambda cell: not is_code(cell), "**14.7868**", "**14.7869**"), "14.7869"),
        (change(is_code, "lr=0.01", "lr=0.02"), "shows"),
        (figure(">target<", ">prey<"), "Every error as a square.*another figure"),
        (moved(1.0), "another figure"),
        (lambda notebook: figures(notebook)[0].pop("image/svg+xml"), "another figure"),
        (lambda notebook: streams(notebook)[0].update(name="stderr"), "stderr"),
        (lambda notebook: notebook["cells"].pop(), "cells"),
        (
            lambda notebook: next(cell for cell in notebook["cells"] if cell.get("outputs"))["outputs"].clear(),
            "other outputs",
        ),
        (lambda notebook: notebook["metadata"]["fallline"].update(minutes=9), "header"),
    ],
)
def test_whatever_is_shown_and_is_not_so_is_found(damage: Callable[[Any], None], told: str) -> None:
    now = shown(FIRST)
    damaged = copy.deepcopy(now)
    assert list(differences(damaged, now)) == []
    damage(damaged)
    sentences = list(differences(damaged, now))
    assert sentences
    assert re.search(told, " ".join(sentences), re.DOTALL)


def test_last_digits_of_a_figures_coordinates_and_the_date_may_differ() -> None:
    now = shown(FIRST)
    other = copy.deepcopy(now)
    moved(0.001)(other)
    other["metadata"]["fallline"]["stamp"]["date"] = "1999-01-01"
    assert list(differences(other, now)) == []


def test_ids_that_are_hashes_of_coordinates_may_differ() -> None:
    """As matplotlib's, when a coordinate differs in its last digit."""
    now = shown(FIRST)
    other = copy.deepcopy(now)
    for data in figures(other):
        data["image/svg+xml"] = re.sub(r'(id="|#)p([0-9a-f]{10})', r"\1q\2", data["image/svg+xml"])
    assert figures(other) != figures(now)
    assert list(differences(other, now)) == []


def test_the_check_ends_with_an_error_and_names_the_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a-page.py").write_text(HEADER + '# %% A cell\nprint("now")\n')
    monkeypatch.setattr(execution, "SOURCES", tmp_path)
    monkeypatch.setattr(execution, "EXECUTED", tmp_path)
    assert execution.main(["a-page"]) == 0
    assert execution.main(["a-page", "--check"]) == 0
    written = tmp_path / "a-page.ipynb"
    written.write_text(written.read_text().replace('"now\\n"', '"then\\n"'))
    assert execution.main(["a-page", "--check"]) == 1
    assert "a-page: “A cell” shows 'then\\n'; the code gives 'now\\n' now." in capsys.readouterr().err


def written(folder: Path, text: str) -> Path:
    path = folder / "page.py"
    path.write_text(HEADER + text)
    return path


def test_numbers_in_prose_are_those_of_the_cells_above(tmp_path: Path) -> None:
    source = written(
        tmp_path,
        '# %% One\nx = 1\n\n# %% [markdown]\n# It is {{ x + 1 }}, or {{ f"{x:.2f}"\n# }}.\n\n# %% Two\nx = 5\n\n'
        "# %% [markdown]\n# It is {{ x }}.\n",
    )
    cells = execute(source)["cells"]
    assert [cell["source"] for cell in cells if cell["cell_type"] == "markdown"] == ["It is 2, or 1.00.", "It is 5."]


def test_a_number_that_cannot_be_computed_fails_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\{\{ y \+ 1 \}\}: NameError"):
        execute(written(tmp_path, "# %% [markdown]\n# It is {{ y + 1 }}.\n\n# %% Too late\ny = 1\n"))


def test_a_cell_that_raises_fails(tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(written(tmp_path, "# %% One\n1 / 0\n"))


def test_a_page_is_stamped(tmp_path: Path) -> None:
    stamp = execute(written(tmp_path, "# %% One\n1\n"))["metadata"]["fallline"]["stamp"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", stamp["date"])
    assert stamp["torch"] == torch.__version__.partition("+")[0]


# What the pages must show, found in another way.


def test_the_module_is_the_one_that_it_replaces() -> None:
    header = lesson(FIRST).header
    assert (header.course, header.module, header.modules) == ("Deep Learning with PyTorch", 5, 26)
    assert (header.level, header.title, header.minutes) == ("Intermediate", "Loss functions and optimization", 8)


def test_the_first_page_prints_what_a_plain_loop_prints() -> None:
    torch.manual_seed(0)
    line = nn.Linear(1, 1)
    inputs, targets = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [4.0], [6.0]])
    criterion = nn.MSELoss()
    assert printed(FIRST, "The loss before training") == f"Loss: {criterion(line(inputs), targets):.4f}\n"
    optimizer = torch.optim.SGD(line.parameters(), lr=0.01)
    lines = []
    for epoch in range(1, 101):
        loss = criterion(line(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch % 10 == 0:
            lines.append(f"Epoch [{epoch}/100], Loss: {loss.item():.4f}")
    assert printed(FIRST, "The training loop").splitlines()[:10] == lines
    assert "14.7868" in printed(FIRST, "The loss before training")


def test_the_critical_learning_rate_is_that_of_the_hessian() -> None:
    x = np.array([[1.0, 1], [2, 1], [3, 1]])
    critical = 2 / np.linalg.eigvalsh(2 * x.T @ x / 3).max()
    assert f"2 / λmax = {critical:.4f}" in printed("how-far-is-too-far", "The largest eigenvalue")
    assert f"{critical:.4f}" == "0.1803"


def test_the_noisy_quadratic_of_the_page_is_the_tasks() -> None:
    (code,) = [c for c in lesson("a-fair-race").of_kind(Code) if c.name == "the-noisy-quadratic-as-deepobs-makes-it"]
    names: dict[str, Any] = {}
    exec(code.source[: code.source.index("def drawn")], names)
    np.testing.assert_allclose(names["curvature"](), hessian(), rtol=0, atol=1e-12)


def test_the_order_of_the_data_changes_the_winner() -> None:
    winners = re.findall(r"^   1\. (.*?)  ", printed("a-fair-race", "The race, in both orders"), re.MULTILINE)
    assert winners == ["momentum 0.99", "momentum 0.9"]


def test_one_seed_lies_and_no_evidence_is_an_answer() -> None:
    wins = re.search(r"Adam wins (\d+) of 10", printed("a-fair-race", "Ten races"))
    assert wins is not None
    assert 0 < int(wins[1]) < 10
    assert "No evidence that" in printed("a-fair-race", "The sweep, and its evidence")


def test_a_double_softmax_is_found_by_name() -> None:
    assert "[double-softmax]" in printed("which-loss", "Found by fallline check")


def test_a_page_is_read_as_it_was_written() -> None:
    for name in ORDER:
        assert course.read(name, shown(name)) == lesson(name)
