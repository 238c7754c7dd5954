"""Notebooks: whole before anything is run, and run anew with torch and matplotlib alone they print the same."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nbformat
import pytest

from fallline.lessons import notebooks
from fallline.lessons.course import EXECUTED, ORDER, Code, Component, Prose, Question, lesson

ALLOWED = {"math", "torch", "matplotlib", "numpy"}
SECONDS = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("notebooks") / "deep" / "folder"
    assert notebooks.write(made) == [made / f"{name}.ipynb" for name in ORDER]
    return made


@cache
def notebook(name: str) -> dict[str, Any]:
    """A notebook as its file holds it."""
    return json.loads(notebooks.text(name))


def cells(name: str, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in notebook(name)["cells"] if cell["cell_type"] == kind]


def code(name: str) -> list[str]:
    return [cell["source"] for cell in cells(name, "code")]


def prose(name: str) -> str:
    """All that is no code."""
    return "\n\n".join(cell["source"] for cell in cells(name, "markdown"))


@pytest.mark.parametrize("name", ORDER)
def test_a_notebook_is_one_by_the_rules_of_its_format(folder: Path, name: str):
    found = nbformat.read(folder / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)
    nbformat.validate(found)
    assert (found.nbformat, found.nbformat_minor) == (4, 5)
    names = [cell.id for cell in found.cells]
    assert len(set(names)) == len(names)
    assert found.metadata.kernelspec.name == "python3"


def test_a_folder_holds_the_notebooks_and_nothing_else(folder: Path):
    assert {path.name for path in folder.iterdir()} == {f"{name}.ipynb" for name in ORDER}
    for name in ORDER:
        assert (folder / f"{name}.ipynb").read_text(encoding="utf-8") == notebooks.text(name)


@pytest.mark.parametrize("name", ORDER)
def test_the_outputs_are_there_before_anything_is_run(name: str):
    own = [block for block in lesson(name).of_kind(Code) if not block.needs]
    found = cells(name, "code")
    assert len(found) == len(own) > 0
    for block, cell in zip(own, found, strict=True):
        assert cell["source"] == f"# {block.title}\n{block.source}"
        assert cell["execution_count"] is None
        assert [output["output_type"] for output in cell["outputs"]] == [o["output_type"] for o in block.outputs]
        assert [output.get("text") for output in cell["outputs"]] == [o.get("text") for o in block.outputs]
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data", "execute_result")
            if "data" in output:
                svg = output["data"]["image/svg+xml"]
                assert '<svg style="background: #ffffff" ' in svg, "a notebook may be dark, and tells nobody"
                assert "prefers-color-scheme" not in svg
                ElementTree.fromstring(svg)
    assert any("data" in output for cell in found for output in cell["outputs"])


def test_the_numbers_of_the_pages_stand_in_the_notebooks():
    assert any("Loss: 14.7868\n" in o.get("text", "") for cell in cells(ORDER[0], "code") for o in cell["outputs"])
    for name in ORDER:
        assert "{{" not in prose(name)


def imported(source: str) -> set[str]:
    """The packages that a piece of code imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("name", ORDER)
def test_code_needs_torch_and_matplotlib_alone(name: str):
    found = imported("\n".join(code(name)))
    assert found <= ALLOWED
    assert "torch" in found
    for source in code(name):
        calls = {getattr(node.func, "id", "") for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
        assert not calls & {"__import__", "exec", "eval", "open", "input"}
        assert "fallline" not in source
        assert "get_ipython" not in source


@pytest.mark.parametrize("name", ORDER)
def test_run_from_top_to_bottom_it_prints_what_it_shows(name: str, tmp_path: Path):
    """In an empty directory and a Python of its own, which has no fallline."""
    program = 'import sys\nsys.modules["fallline"] = None\n\n' + "\n\n\n".join(code(name)) + "\n"
    settings = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(tmp_path / "settings")}
    (tmp_path / "empty").mkdir()
    ended = subprocess.run(
        [sys.executable, "-W", "ignore:FigureCanvasAgg is non-interactive:UserWarning", "-"],
        input=program,
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=tmp_path / "empty",
        env={**os.environ, **settings, "PYTHONIOENCODING": "utf-8"},
        timeout=SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stderr == ""
    streams = [
        output for cell in cells(name, "code") for output in cell["outputs"] if output["output_type"] == "stream"
    ]
    assert {output["name"] for output in streams} == {"stdout"}
    assert ended.stdout == "".join(output["text"] for output in streams)
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize("name", ORDER)
def test_questions_have_their_answers_folded_away(name: str):
    questions = list(lesson(name).of_kind(Question))
    asked = [cell["source"] for cell in cells(name, "markdown") if cell["source"].startswith("**Question.**")]
    assert len(asked) == len(questions) > 0
    for question, source in zip(questions, asked, strict=True):
        match = re.fullmatch(r"(.*?)\n\n<details><summary>Answers</summary>\n\n(.*)\n\n</details>", source, re.DOTALL)
        assert match is not None, source
        open_, folded = match.groups()
        assert question.prompt in open_
        assert "Right." not in open_
        for letter, option in zip("ABCDEFGH", question.options, strict=False):
            assert f"- **{letter}** {option.text}" in open_.splitlines()
            assert option.reason not in open_
            told = f"- **{letter}** {'Right.' if option.right else 'Not this one.'} {option.reason}"
            assert told in folded.splitlines()
        assert len(question.options) == len(folded.splitlines())


def test_what_needs_fallline_is_told_as_it_was_printed():
    told = [(name, block) for name in ORDER for block in lesson(name).of_kind(Code) if block.needs]
    assert told
    for name, block in told:
        (cell,) = [
            c for c in cells(name, "markdown") if c["source"].startswith(f"**{block.title}** (this needs fallline")
        ]
        assert f"\n```python\n{block.source}\n```\n" in cell["source"]
        printed = "".join(output["text"] for output in block.outputs)
        assert printed.strip()
        assert f"\n```text\n{printed.rstrip()}\n```" in cell["source"]
        assert block.source not in "\n".join(code(name))
        assert all("text" in output for output in block.outputs), "a figure could not be told"


@pytest.mark.parametrize("name", ORDER)
def test_fences_are_longer_than_what_they_hold(name: str):
    for cell in cells(name, "markdown"):
        assert len(re.findall(r"^```", cell["source"], re.MULTILINE)) % 2 == 0, cell["source"]


@pytest.mark.parametrize("name", ORDER)
def test_everything_stands_in_the_order_of_the_page(name: str):
    shown = lesson(name)
    whole = "\n".join(cell["source"] for cell in notebook(name)["cells"])
    assert whole.startswith(f"# {shown.header.title}\n")
    assert shown.header.summary in whole
    assert shown.stamp.date in whole
    assert f"torch {shown.stamp.torch}" in whole
    at = 0
    for block in shown.blocks:
        parts = []
        if isinstance(block, Prose | Component):
            parts = [block.text]
        elif isinstance(block, Code):
            parts = [block.source, " ".join(block.caption.split())]
        elif isinstance(block, Question):
            parts = [block.prompt]
        for part in parts:
            assert part in whole[at:], part
            at = whole.index(part, at)


@pytest.mark.parametrize("name", ORDER)
def test_what_moves_says_where_it_moves(name: str):
    moving = list(lesson(name).of_kind(Component))
    assert prose(name).count("*This part moves in the live page: `fallline learn`.*") == len(moving)


def test_making_a_notebook_leaves_the_page_as_it_is():
    for name in ORDER:
        before = json.dumps(lesson(name).blocks, default=vars)
        notebooks.notebook(lesson(name))
        assert json.dumps(lesson(name).blocks, default=vars) == before
        assert "color-scheme" not in (EXECUTED / f"{name}.ipynb").read_text(encoding="utf-8")
