"""A sweep starts within a second: what is imported before its first step is counted, because time is noisy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# What reports, searches and compilers need, each a tenth of a second or more.
LATER = ("scipy", "sklearn", "altair", "jinja2", "vl_convert", "rich", "sympy", "torch._dynamo", "torch._inductor")
# Beside torch's own; there were 440 in torch 2.13, most of them of polars, typer and pydantic.
MODULES = 550
PROGRAM = f"""
import sys
import torch
torchs = set(sys.modules)
import fallline.sweeps.workers
def stop(*given, **settings):
    late = set({LATER!r}) & set(sys.modules)
    sys.exit(f"{{len(set(sys.modules) - torchs)}} {{sorted(late)}}")
fallline.sweeps.workers.train_packs = stop
sys.argv = ["fallline", "sweep", "line", "--steps", "10", "--seeds", "1"]
from fallline.cli import main
main()
"""


def test_nothing_is_imported_before_the_first_step_that_it_does_not_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    count, late = ended.stderr.split(maxsplit=1)
    assert late.strip() == "[]"
    assert 100 < int(count) < MODULES
