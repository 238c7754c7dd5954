"""What a page is made of, and what every page has."""

from __future__ import annotations

import pytest

from fallline.errors import UnknownName
from fallline.lessons import course as course_module
from fallline.lessons.course import ORDER, Code, Component, Question, course, lesson


def test_a_page_that_is_not_there_is_named() -> None:
    with pytest.raises(UnknownName, match=r"no page 'which-los'.* Did you mean 'which-loss'"):
        lesson("which-los")


def test_pages_follow_each_other() -> None:
    pages = course()
    assert [page.name for page in pages] == list(ORDER)
    assert [page.header.previous for page in pages] == [None, *ORDER[:-1]]
    assert [page.header.next for page in pages] == [*ORDER[1:], None]
    for page in pages:
        assert (page.header.course, page.header.module, page.header.modules) == ("Deep Learning with PyTorch", 5, 26)
        assert all((entry.page in ORDER) != bool(entry.url) for entry in page.header.related)


@pytest.mark.parametrize("name", ORDER)
def test_every_figure_has_its_words_beside_it(name: str) -> None:
    figures = [
        code for code in lesson(name).of_kind(Code) if any("image/svg+xml" in o.get("data", {}) for o in code.outputs)
    ]
    assert figures
    for code in figures:
        assert len(code.caption) > 60, code.title


@pytest.mark.parametrize("name", ORDER)
def test_names_within_a_page_are_its_own(name: str) -> None:
    names = [block.name for kind in (Code, Question) for block in lesson(name).of_kind(kind)]
    assert len(names) == len(set(names))


def test_something_moves_on_the_pages_about_walking() -> None:
    moving = {page.name for page in course() if list(page.of_kind(Component))}
    assert moving == {"loss-functions-and-optimization", "how-far-is-too-far"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("What?\n\n- [ ] this\n  Because.", "no right answer"),
        ("What?\n\n- [x] this\n- [ ] that\n  Because.", "needs its reason"),
    ],
)
def test_a_question_without_an_answer_or_a_reason_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        course_module.question("q", text)


def test_a_caption_without_a_figure_is_refused() -> None:
    cells = [{"cell_type": "markdown", "metadata": {}, "source": "text"}]
    cells.append({"cell_type": "markdown", "metadata": {"caption": True}, "source": "a caption"})
    with pytest.raises(AssertionError, match="must follow the cell"):
        course_module.read("a-page", {"cells": cells, "metadata": {"fallline": {}}})
