"""The course: its pages in their order, and a page as what it is made of: prose, code with its outputs, questions.

A page is written as one percent-format file in `pages/`, executed into a notebook in `executed/`, and read from there.
What executes it is `execution`; what shows it are `site`, `notebooks` and `server`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from fallline.errors import UnknownName, nearest

ORDER = ("loss-functions-and-optimization", "how-far-is-too-far", "which-loss", "a-fair-race")
"""The names of the pages, in the order in which they are read."""

SOURCES = Path(__file__).parent / "pages"
EXECUTED = Path(__file__).parent / "executed"


@dataclass(frozen=True)
class Related:
    """Something to read besides: a page of the course, or an address."""

    title: str
    why: str
    page: str = ""
    url: str = ""


@dataclass(frozen=True)
class Header:
    """What a page says of itself.

    Attributes:
        minutes: that reading takes.
        seed: with which its examples begin.
        previous, next: names of pages, or None at the ends of the course.
    """

    course: str
    module: int
    modules: int
    level: str
    title: str
    summary: str
    minutes: int
    seed: int
    previous: str | None
    next: str | None
    related: tuple[Related, ...]


@dataclass(frozen=True)
class Stamp:
    """When a page was executed (a date as in ISO 8601), and with which torch."""

    date: str
    torch: str


@dataclass(frozen=True)
class Prose:
    """Markdown with its numbers filled in."""

    text: str


@dataclass(frozen=True)
class Code:
    """A code cell as it was executed.

    Attributes:
        name: of the cell within its page.
        title: what the cell is about, in a few words.
        outputs: as in a notebook.
        caption: Markdown that says what the figure shows; "" where there is none.
        needs: what must be installed besides torch and matplotlib: "fallline" or "".
    """

    name: str
    title: str
    source: str
    outputs: Sequence[Mapping[str, Any]]
    caption: str = ""
    needs: str = ""


@dataclass(frozen=True)
class Option:
    """An answer that may be chosen, whether it is right, and why."""

    text: str
    right: bool
    reason: str


@dataclass(frozen=True)
class Question:
    """A question with at least one right answer."""

    name: str
    prompt: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Component:
    """Something to play with, which only a live page has.

    Attributes:
        name: which one.
        settings: that it starts with, as in the query of an address.
        text: Markdown that stands where it cannot run.
    """

    name: str
    settings: str
    text: str


Block = Prose | Code | Question | Component
Kind = TypeVar("Kind", Prose, Code, Question, Component)


@dataclass(frozen=True)
class Lesson:
    """A page of the course, executed."""

    name: str
    header: Header
    stamp: Stamp
    blocks: tuple[Block, ...]

    def of_kind(self, kind: type[Kind]) -> Iterator[Kind]:
        """The blocks of a kind, in their order."""
        return (block for block in self.blocks if isinstance(block, kind))


@cache
def lesson(name: str) -> Lesson:
    """A page of the course by its name.

    Raises:
        UnknownName: for a page that there is not.

    >>> lesson("loss-functions-and-optimization").header.title
    'Loss functions and optimization'
    """
    if name not in ORDER:
        raise UnknownName(f"the course has no page {name!r}. {nearest(name, ORDER)}")
    return read(name, json.loads((EXECUTED / f"{name}.ipynb").read_text(encoding="utf-8")))


def course() -> list[Lesson]:
    """All the pages, in their order."""
    return [lesson(name) for name in ORDER]


def read(name: str, notebook: Mapping[str, Any]) -> Lesson:
    """An executed notebook as a page."""
    own = notebook["metadata"]["fallline"]
    blocks: list[Block] = []
    for cell in notebook["cells"]:
        about, text = cell["metadata"], _joined(cell["source"])
        if cell["cell_type"] == "code":
            title = about["title"]
            outputs = [_output(output) for output in cell["outputs"]]
            blocks.append(Code(slug(title), title, text, outputs, needs=about.get("needs", "")))
        elif about.get("caption"):
            last = blocks[-1]
            assert isinstance(last, Code), f"{name}: a caption must follow the cell that draws the figure"
            blocks[-1] = Code(last.name, last.title, last.source, last.outputs, text, last.needs)
        elif "question" in about:
            blocks.append(question(about["question"], text))
        elif "component" in about:
            blocks.append(Component(about["component"], about["settings"], text))
        else:
            blocks.append(Prose(text))
    return Lesson(name, header(own), Stamp(**own["stamp"]), tuple(blocks))


def header(own: Mapping[str, Any]) -> Header:
    """The header of a page, from the metadata of its notebook."""
    fields = {key: own[key] for key in Header.__dataclass_fields__ if key != "related"}
    return Header(**fields, related=tuple(Related(**{"title": "", **entry}) for entry in own["related"]))


def question(name: str, text: str) -> Question:
    """A question from its Markdown: a prompt, then a task list whose right answers are ticked, each with its reason.

    >>> question("sum", '''What is 1 + 1?
    ...
    ... - [x] 2
    ...   Count.
    ... - [ ] 3
    ...   One too many.''').options[0]
    Option(text='2', right=True, reason='Count.')
    """
    prompt, *options = re.split(r"^- \[([ x])\] ", text, flags=re.MULTILINE)
    made = []
    for tick, body in zip(options[::2], options[1::2], strict=True):
        first, _, reason = body.strip().partition("\n")
        made.append(Option(first.strip(), tick == "x", re.sub(r"\s*\n\s*", " ", reason).strip()))
    assert any(option.right for option in made), f"{name} has no right answer"
    assert all(option.reason for option in made), f"{name}: every option needs its reason"
    return Question(name, prompt.strip(), tuple(made))


def slug(title: str) -> str:
    """A title as it stands in an address.

    >>> slug("Adam, from too small to too large")
    'adam-from-too-small-to-too-large'
    """
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _output(output: Mapping[str, Any]) -> dict[str, Any]:
    """An output of a notebook's file, whose texts may lie in it as lists of lines."""
    made = {**output, **({"text": _joined(output["text"])} if "text" in output else {})}
    if "data" in output:
        made["data"] = {kind: _joined(content) for kind, content in output["data"].items()}
    return made


def _joined(source: str | Sequence[str]) -> str:
    return source if isinstance(source, str) else "".join(source)
