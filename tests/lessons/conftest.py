"""The course as a learner has it: the command's own server, and a real browser."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SECONDS = 60


@dataclass(frozen=True)
class Served:
    """A running course.

    Attributes:
        address: that opens it, with its token.
        home: the same without the token.
        process: the command.
        data: where it keeps progress.
    """

    address: str
    home: str
    process: subprocess.Popen[str]
    data: Path


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Served]]:
    """Starts `fallline learn` with these options; all that were started end with the module's tests."""
    running: list[subprocess.Popen[str]] = []

    def started(*options: str, data: Path | None = None) -> Served:
        data = data or tmp_path_factory.mktemp("data")
        command = [sys.executable, "-m", "fallline.cli", "learn", "--no-browser", "--port", "0", *options]
        environment = {**os.environ, "XDG_DATA_HOME": str(data), "FALLLINE_REPOSITORY": ""}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        running.append(process)
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None
        return Served(found[0], found[0].partition("?")[0], process, data)

    yield started
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    for process in running:
        assert process.wait(20) == 0
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="module")
def course(serve: Callable[..., Served]) -> Served:
    return serve()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser; tests that need one are skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()
