"""Pages as HTML: for the server, where they live, and as files that are read without it, without a script, offline."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from fallline import __version__
from fallline.lessons import markup
from fallline.lessons.course import Code, Component, Lesson, Prose, Question, course, lesson, slug
from fallline.lessons.outputs import Output, of_message

ASSETS = Path(__file__).parent / "assets"
# What a page needs that does not run.
STILL = ("lessons.css", "mark.svg", "vendor/*.woff2", "vendor/*.LICENSE.txt")
HEADING = re.compile(r"<h2>(.*?)</h2>", re.DOTALL)


@dataclass(frozen=True)
class Shown:
    """A block of a page, ready for its template."""

    kind: str
    it: Any
    html: str = ""
    number: int = 0


def page(name: str, *, live: bool = False, nonce: str = "", repository: str = "") -> str:
    """A page of the course as HTML.

    Args:
        live: whether a server is behind it.
        nonce: by which the editor's styles are let through, on a live page.
        repository: where its notebook lies, for a link to Colab; "" for a download instead.
    """
    shown = lesson(name)
    blocks, headings = _blocks(name)
    names = [each.name for each in course()]
    return _environment().get_template("page.html.jinja").render(
        **_place(live, nonce),
        lesson=shown,
        blocks=blocks,
        headings=headings,
        position=names.index(name) + 1,
        titles={each.name: each.header.title for each in course()},
        colab=colab(repository, name),
        notebook=f"notebooks/{name}.ipynb",
    )  # fmt: skip


def index(*, live: bool = False, nonce: str = "", done: Mapping[str, str] | None = None) -> str:
    """The course's table of contents as HTML.

    Args:
        done: what the learner has done, a sentence for each page by its name.
    """
    return _environment().get_template("index.html.jinja").render(**_place(live, nonce), done=done or {})


def write(folder: Path, *, repository: str = "") -> list[Path]:
    """Writes the whole course as files that need no server, with the notebooks beside them.

    Returns:
        The pages, the table of contents first.
    """
    from fallline.lessons import notebooks

    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "index.html"]
    written[0].write_text(index(), encoding="utf-8")
    for each in course():
        written.append(folder / f"{each.name}.html")
        written[-1].write_text(page(each.name, repository=repository), encoding="utf-8")
    for pattern in STILL:
        for asset in ASSETS.glob(pattern):
            target = folder / "assets" / asset.relative_to(ASSETS)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(asset, target)
    notebooks.write(folder / "notebooks")
    return written


def colab(repository: str, name: str) -> str:
    """Where Colab opens a page's notebook; "" without a repository.

    Args:
        repository: OWNER/NAME/blob/BRANCH/FOLDER, as it stands in the address of the folder with the notebooks.

    >>> colab("someone/course/blob/main/notebooks", "which-loss")
    'https://colab.research.google.com/github/someone/course/blob/main/notebooks/which-loss.ipynb'
    """
    return f"https://colab.research.google.com/github/{repository.strip('/')}/{name}.ipynb" if repository else ""


def _place(live: bool, nonce: str) -> dict[str, Any]:
    return {
        "live": live,
        "nonce": nonce,
        "version": __version__,
        "assets": "/assets/" if live else "assets/",
        "home": "/" if live else "index.html",
        "address": (lambda name: f"/{name}") if live else (lambda name: f"{name}.html"),
        "pages": course(),
    }


@cache
def _blocks(name: str) -> tuple[list[Shown], list[tuple[str, str]]]:
    """The blocks of a page, and its headings with their names."""
    headings: list[tuple[str, str]] = []

    def named(found: re.Match[str]) -> str:
        title = re.sub(r"<[^>]*>", "", found[1])
        headings.append((slug(title), title))
        return f'<h2 id="{headings[-1][0]}">{found[1]}</h2>'

    blocks, questions, components = [], 0, 0
    for block in lesson(name).blocks:
        if isinstance(block, Prose):
            blocks.append(Shown("prose", block, Markup(HEADING.sub(named, markup.markdown(block.text)))))
        elif isinstance(block, Code):
            blocks.append(Shown("code", block))
        elif isinstance(block, Question):
            questions += 1
            blocks.append(Shown("question", block, number=questions))
        elif isinstance(block, Component):
            components += 1
            blocks.append(Shown("component", block, number=components))
    if questions:
        headings.append(("check-yourself", "Check yourself"))
    return blocks, headings


def _outputs(code: Code) -> list[Output]:
    return [shown for output in code.outputs for shown in of_message(output["output_type"], output)]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fallline.lessons", "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        markdown=lambda text: Markup(markup.markdown(text)),
        inline=lambda text: Markup(markup.inline(text)),
        highlighted=lambda source: Markup(markup.code(source)),
        outputs=_outputs,
    )
    return environment


__all__ = ["Lesson", "colab", "index", "page", "write"]
