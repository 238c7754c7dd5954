"""How long a learner waits: for the course to answer, for its first page, for a cell.

    python benchmarks/lessons.py [--repeats 5] [--write]

Drives `fallline learn` with a real browser (Chromium and Playwright must be installed). The table has medians and
extremes of:

- *server*: from starting the command, Python included, until it prints its address, which it answers at then;
- *first paint*: of the first page, from asking for it, in a browser that has seen nothing;
- *Python*: from the first paint until the page's Python is ready, torch loaded;
- *cell*: from Ctrl+Enter in a cell that prints four lines until its output is there, when Python is ready.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from speed.pages import Output, machine

PAGE = "loss-functions-and-optimization"
CELL = "#mean-squared-error"
ALLOWED = {"server": 1.0, "first paint": 1.0, "cell": 0.3}
SWITCHES = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def once(driver: object) -> dict[str, float]:
    """Seconds of every wait, once."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fallline.cli", "learn", "--no-browser", "--port", "0"]
        began = time.perf_counter()
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={"XDG_DATA_HOME": folder, "PATH": "/usr/bin:/bin"}
        )
        found = {}
        try:
            assert server.stdout is not None
            address = re.search(r"http://\S+", server.stdout.readline())
            assert address is not None
            found["server"] = time.perf_counter() - began
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=SWITCHES)  # type: ignore[attr-defined]
            page = browser.new_page()
            page.goto(address[0])
            page.goto(address[0].partition("?")[0] + PAGE, wait_until="commit")
            page.wait_for_selector("h1")
            paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
            while (painted := page.evaluate(paint)) is None:
                page.wait_for_timeout(5)
            found["first paint"] = painted / 1000
            page.wait_for_selector(".kernel[data-state=ready]", timeout=60_000)
            found["Python"] = page.evaluate("performance.now()") / 1000 - found["first paint"]
            page.locator(f"{CELL} .cm-content").focus()
            page.keyboard.press("Control+Enter")
            page.wait_for_selector(f"{CELL}[data-state=done]")
            began = time.perf_counter()
            page.keyboard.press("Control+Enter")
            page.wait_for_selector(f"{CELL}[data-state=done]")
            found["cell"] = time.perf_counter() - began
            browser.close()
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(20)
        return found


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="of which the median counts (5)")
    parser.add_argument("--write", action="store_true", help="put what is printed into docs/benchmarks.md")
    options = parser.parse_args()
    output = Output()
    for text in machine(torch.device("cpu")):
        output(text)
    with sync_playwright() as driver:
        runs = [once(driver) for _ in range(options.repeats)]
    output(f"\n{'seconds':>12}{'median':>9}{'lowest':>9}{'highest':>9}{'allowed':>9}")
    for name in runs[0]:
        values = [run[name] for run in runs]
        median = statistics.median(values)
        row = f"{name:>12}{median:>9.3f}{min(values):>9.3f}{max(values):>9.3f}"
        output(
            row + (f"{ALLOWED[name]:>9.1f}  {'PASS' if median < ALLOWED[name] else 'FAIL'}" if name in ALLOWED else "")
        )
    if options.write:
        output.write("lessons")


if __name__ == "__main__":
    main()
