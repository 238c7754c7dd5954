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
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        text = page.read_text()
        if begin not in text or end not in text.partition(begin)[2]:
            raise SystemExit(f"{page} has no lines {begin} and {end} to write between: add them.")
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        body = "\n".join(self.lines).strip("\n")
        page.write_text(f"{before}{begin}\n\n```text\n{body}\n```\n\n{end}{after}")


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
