"""What the README shows is what the code does now."""

import re
import sys
from pathlib import Path

import pytest

from fallline.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_blocks_run(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(blocks("python")[number], names)
    if number == 0:
        assert "mse" in capsys.readouterr().out
        assert (tmp_path / "sine.html").stat().st_size > 100_000
        assert isinstance(names["optimizer"], names["torch"].optim.Optimizer)
    else:
        assert float(names["params"]["w"][0]) == pytest.approx(0.999, abs=1e-5)


def test_the_losses_of_the_line_are_those_that_the_command_prints(monkeypatch, capsys):
    (command,) = (line for block in blocks("sh") for line in block.splitlines() if line.startswith("fallline fit"))
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    (shown,) = blocks("text")
    assert capsys.readouterr().out.startswith(shown)
    assert shown.count("Epoch") == 10


def test_the_two_commands_are_there_and_ci_runs_the_second():
    first, second, *_ = (block.strip() for block in blocks("sh"))
    assert first == "python -m pip install -c constraints.txt -e . && fallline sweep digits"
    install, test = second.split(" && ")
    ci = (Path(__file__).parent.parent / ".ci" / "run").read_text()
    assert install.replace("pip install", "pip install --quiet") in ci
    assert f"\n{test}\n" in ci
