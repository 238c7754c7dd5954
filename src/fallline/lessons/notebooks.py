"""Notebooks to go on with elsewhere: they run from top to bottom with torch and matplotlib alone, as on Colab.

They are made from the same execution as the pages, with its outputs. What needs fallline stands in them as it was
printed; questions have their answers folded away.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from fallline.lessons.course import ORDER, Code, Component, Lesson, Prose, Question, lesson
from fallline.lessons.figures import on_white


def notebook(shown: Lesson) -> dict[str, Any]:
    """A page as a notebook of format 4.5."""
    header, stamp = shown.header, shown.stamp
    title = (
        f"# {header.title}\n\n{header.course} · Module {header.module} of {header.modules} · {header.level} · "
        f"{header.minutes} min\n\n{header.summary}\n\n*The outputs below were made on {stamp.date} with torch "
        f"{stamp.torch}, seed {header.seed}. Run the cells from top to bottom to make them anew.*"
    )
    cells = [_markdown(title)]
    for block in shown.blocks:
        if isinstance(block, Prose):
            cells.append(_markdown(block.text))
        elif isinstance(block, Code):
            cells += [_markdown(_told(block))] if block.needs else [_code(block)]
            cells += [_markdown(f"*{' '.join(block.caption.split())}*")] if block.caption else []
        elif isinstance(block, Question):
            cells.append(_markdown(_asked(block)))
        elif isinstance(block, Component):
            cells.append(_markdown(f"{block.text}\n\n*This part moves in the live page: `fallline learn`.*"))
    for position, cell in enumerate(cells):
        cell["id"] = f"cell-{position}"
    return {
        "cells": cells,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def text(name: str) -> str:
    """A page's notebook, as its file."""
    return json.dumps(notebook(lesson(name)), indent=1, ensure_ascii=False) + "\n"


def write(folder: Path) -> list[Path]:
    """Writes the notebooks of all the pages."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{name}.ipynb" for name in ORDER]
    for path in written:
        path.write_text(text(path.stem), encoding="utf-8")
    return written


def _markdown(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def _code(block: Code) -> dict[str, Any]:
    outputs = [dict(output) for output in block.outputs]
    for output in outputs:
        if "image/svg+xml" in output.get("data", {}):
            output["data"] = {**output["data"], "image/svg+xml": on_white(output["data"]["image/svg+xml"])}
    source = f"# {block.title}\n{block.source}"
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "source": source, "outputs": outputs}


def _told(block: Code) -> str:
    """Code that needs more than a notebook has, with what it printed."""
    printed = "".join(output.get("text", "") for output in block.outputs)
    told = f"**{block.title}** (this needs {block.needs}; here it is as it was printed)\n\n"
    return f"{told}```python\n{block.source}\n```\n" + (f"\n```text\n{printed.rstrip()}\n```" if printed else "")


def _asked(question: Question) -> str:
    letters = "ABCDEFGH"
    options = [f"- **{letter}** {option.text}" for letter, option in zip(letters, question.options, strict=False)]
    reasons = [
        f"- **{letter}** {'Right.' if option.right else 'Not this one.'} {option.reason}"
        for letter, option in zip(letters, question.options, strict=False)
    ]
    listed = "\n".join(options)
    folded = "\n".join(["<details><summary>Answers</summary>", "", *reasons, "", "</details>"])
    return textwrap.dedent(f"**Question.** {question.prompt}") + f"\n\n{listed}\n\n{folded}"
