"""Runs the pages: each source becomes one notebook with its outputs, and with the numbers in its prose filled in.

    python -m fallline.lessons.execution [--check] [PAGE…]

writes the notebooks that everything else shows; with --check it says where what they show is not what the code gives
now, and ends with exit code 1.

A number in prose is written `{{ expression }}`: it is evaluated in the kernel, after the cells above it have run.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import datetime
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

from fallline.lessons import kernels
from fallline.lessons.course import EXECUTED, ORDER, SOURCES
from fallline.lessons.figures import same_figure

NUMBER = re.compile(r"\{\{\s(.+?)\s\}\}", re.DOTALL)
SECONDS_FOR_A_CELL = 120


class _Client(NotebookClient):  # type: ignore[misc]
    """Executes code cells, and fills in the numbers of the Markdown between them."""

    async def async_execute_cell(self, cell: Any, cell_index: int, **options: Any) -> Any:
        if cell.cell_type == "markdown":
            cell.source = await self.filled(cell.source)
        return await super().async_execute_cell(cell, cell_index, **options)

    async def filled(self, text: str) -> str:
        """A text with its expressions replaced by their values.

        Raises:
            ValueError: for an expression that fails.
        """
        expressions = [" ".join(found.split()) for found in NUMBER.findall(text)]
        if not expressions:
            return text
        values = iter(await self.values(expressions))
        return NUMBER.sub(lambda _: next(values), text)

    async def values(self, expressions: Sequence[str]) -> list[str]:
        """What expressions are, as text, in the kernel as it is now."""
        named = {str(i): f"str({expression})" for i, expression in enumerate(expressions)}
        reply = await self.kc.execute("", silent=True, user_expressions=named, reply=True, timeout=SECONDS_FOR_A_CELL)
        found = []
        for i, expression in enumerate(expressions):
            value = reply["content"]["user_expressions"][str(i)]
            if value["status"] != "ok":
                raise ValueError(f"{{{{ {expression} }}}}: {value['ename']}: {value['evalue']}")
            found.append(str(ast.literal_eval(value["data"]["text/plain"])))
        return found


def execute(source: Path) -> Any:
    """A page's source as an executed notebook.

    Raises:
        nbclient.exceptions.CellExecutionError: when a cell raises what it does not say that it raises.
        ValueError: when a number in prose cannot be computed.
    """
    notebook = jupytext.read(source, fmt="py:percent")
    for position, cell in enumerate(notebook.cells):
        cell.id = f"cell-{position}"
    return asyncio.run(_executed(notebook))


async def _executed(notebook: Any) -> Any:
    with tempfile.TemporaryDirectory(prefix="fallline-") as name:
        folder = Path(name)
        kernel = kernels.manager(folder, "kernel")
        client = _Client(notebook, km=kernel, timeout=SECONDS_FOR_A_CELL, resources={})
        client.store_widget_state = False
        try:
            async with client.async_setup_kernel(cwd=str(folder)):
                for position, cell in enumerate(notebook.cells):
                    await client.async_execute_cell(cell, position)
                (version,) = await client.values(["__import__('torch').__version__"])
        finally:
            if client.kc is not None:
                client.kc.stop_channels()
            await kernel.shutdown_kernel(now=True)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    own = notebook.metadata["fallline"]
    own["stamp"] = {"date": today, "torch": version.partition("+")[0]}
    notebook.metadata = {"fallline": own, "kernelspec": notebook.metadata["kernelspec"]}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _merged(cell.outputs)
    return notebook


def _merged(outputs: Sequence[Any]) -> list[Any]:
    """Outputs with pieces of one stream joined: where they were cut is chance."""
    made: list[Any] = []
    for output in outputs:
        if made and output["output_type"] == "stream" == made[-1]["output_type"] and made[-1]["name"] == output["name"]:
            made[-1]["text"] += output["text"]
        else:
            made.append(output)
    return made


def differences(shown: Any, now: Any) -> Iterator[str]:
    """Where a notebook does not show what another execution gave, in a sentence each.

    Text must be the same, character for character; figures the same up to the last digits of their coordinates.
    """
    if len(shown["cells"]) != len(now["cells"]):
        yield f"the page has {len(now['cells'])} cells, and {len(shown['cells'])} are shown."
        return
    for old, new in zip(shown["cells"], now["cells"], strict=True):
        name = new["metadata"].get("title") or _shortened(new["source"])
        if old["source"] != new["source"] or old["metadata"] != new["metadata"]:
            yield f"“{name}” shows {_shortened(old['source'])!r}; it is {_shortened(new['source'])!r} now."
        if new["cell_type"] == "code":
            yield from _different_outputs(name, old["outputs"], new["outputs"])
    if shown["metadata"]["fallline"] | {"stamp": 0} != now["metadata"]["fallline"] | {"stamp": 0}:
        yield "the header has changed."


def _different_outputs(name: str, shown: Sequence[Any], now: Sequence[Any]) -> Iterator[str]:
    if [o["output_type"] for o in shown] != [o["output_type"] for o in now]:
        yield f"“{name}” has other outputs now."
        return
    for old, new in zip(shown, now, strict=True):
        figures = [output.get("data", {}).get("image/svg+xml") for output in (old, new)]
        if any(figures):
            if not all(figures) or not same_figure(*figures):
                yield f"“{name}” draws another figure now."
        elif _said(old) != _said(new):
            yield f"“{name}” shows {_said(old)!r}; the code gives {_said(new)!r} now."


def _said(output: Any) -> Any:
    if output["output_type"] == "error":
        return output["ename"], output["evalue"]
    if output["output_type"] == "stream":
        return output["text"] if output["name"] == "stdout" else (output["name"], output["text"])
    return output.get("data", {}).get("text/plain")


def _shortened(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}…"


def main(arguments: Sequence[str] | None = None) -> int:
    """Executes pages, and writes or checks their notebooks."""
    parser = argparse.ArgumentParser(
        prog="python -m fallline.lessons.execution", description="Execute the pages of the course."
    )
    parser.add_argument("pages", nargs="*", default=ORDER, metavar="PAGE", help=f"{', '.join(ORDER)}; by default all")
    parser.add_argument("--check", action="store_true", help="write nothing; say where what is shown is not what is")
    options = parser.parse_args(arguments)
    wrong = 0
    for name in options.pages:
        made = execute(SOURCES / f"{name}.py")
        target = EXECUTED / f"{name}.ipynb"
        if not options.check:
            nbformat.write(made, target)
            continue
        for sentence in differences(nbformat.read(target, as_version=4), made):
            sys.stderr.write(f"{name}: {sentence}\n")
            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
