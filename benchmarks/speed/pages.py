"""What a benchmark prints, kept for the page in docs/benchmarks.md that holds the last measured tables."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"


class Output:
    """Prints lines and keeps them."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, text: str = "") -> None:
        print(text, flush=True)
        self.lines += text.split("\n")

    def write(self, name: str, page: Path = PAGE) -> None:
        """Puts what was printed between the markers of that name in the page, in place of what is there.

        Raises:
            SystemExit: if the page has no such markers.
        """
        _, before, after = _parts(name, page)
        page.write_text(before + _fenced("\n".join(self.lines).strip("\n")) + after)

    def replace(self, name: str, page: Path = PAGE) -> None:
        """Puts each paragraph that was printed in place of the one in the page that begins with the same line.

        The first paragraph, which says when and where this was, stays as it is; its first line follows the new ones.

        Raises:
            SystemExit: if the page has no such markers, or no such paragraph.
        """
        there, before, after = _parts(name, page)
        kept = {_first_line(paragraph): paragraph for paragraph in there.split("\n\n")}
        where, *made = "\n".join(self.lines).strip("\n").split("\n\n")
        for paragraph in made:
            if _first_line(paragraph) not in kept:
                raise SystemExit(
                    f"{page} has no lines that begin with {_first_line(paragraph)!r}: write all of it once."
                )
            kept[_first_line(paragraph)] = f"{paragraph}\nmeasured again by itself: {_first_line(where)}"
        page.write_text(before + _fenced("\n\n".join(kept.values())) + after)


def _parts(name: str, page: Path) -> tuple[str, str, str]:
    """What is written between the markers of a name, what stands before, and what after."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = page.read_text()
    if begin not in text or end not in text.partition(begin)[2]:
        raise SystemExit(f"{page} has no lines {begin} and {end} to write between: add them.")
    before, _, rest = text.partition(begin)
    there, _, after = rest.partition(end)
    return there.strip("\n").removeprefix("```text\n").removesuffix("\n```"), before + begin, end + after


def _fenced(text: str) -> str:
    return f"\n\n```text\n{text}\n```\n\n"


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def machine(device: torch.device) -> list[str]:
    """Date, device, cores and versions, a line each."""
    packages = ["torch", "fallline", "numpy", "jax", "optax"]
    found = [f"Python {platform.python_version()}"]
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    load = f", load {os.getloadavg()[0]:.1f} when it began" if hasattr(os, "getloadavg") else ""
    return [f"{datetime.date.today()}, {where}, {cores()} core(s) of the CPU{load}", ", ".join(found)]


def processor() -> str:
    """The name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
