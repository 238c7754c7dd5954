"""What the README shows is what the code does now."""

import re
import sys
from pathlib import Path

import pytest

import fallline as fl
from fallline.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OPTIMIZERS = (ROOT / "docs" / "optimizers.md").read_text()
LOSSES = (ROOT / "docs" / "losses.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_blocks_run(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(blocks("python")[number], names)
    if number == 0:
        assert "mse" in capsys.readouterr().out
        assert (tmp_path / "sine.html").stat().st_size > 100_000
        assert isinstance(names["optimizer"], names["torch"].optim.Optimizer)
    elif number == 1:
        assert capsys.readouterr().out == blocks("text")[1]
    elif number == 2:
        assert float(names["params"]["w"][0]) == pytest.approx(0.999, abs=1e-5)
    else:
        told, shown = capsys.readouterr().out, blocks("text")[2]
        for text in (told, shown):  # what is shown is what it prints, but for the machine's round-off
            assert re.search(r"adam at lr 0\.03162 reaches an accuracy of 0\.9[67]", text)
            assert re.search(r"1 +adam .*\n *2 +signum", text)


@pytest.mark.parametrize("number", range(len(blocks("python", OPTIMIZERS))))
def test_python_blocks_about_optimizers_run(number):
    exec(blocks("python", OPTIMIZERS)[number], {})


def test_every_optimizer_is_in_the_document_about_them():
    for name in fl.optim.catalogue.CATALOGUE:
        assert f"`{name}`" in OPTIMIZERS, name
    assert f"There are {len(fl.optim.catalogue.CATALOGUE)} named ones" in README


@pytest.mark.parametrize("number", range(len(blocks("python", LOSSES))))
def test_python_blocks_about_losses_run(number, capsys):
    code = blocks("python", LOSSES)[number]
    exec(code, {})
    if "print(found)" in code:
        assert capsys.readouterr().out == blocks("text", LOSSES)[0]


def test_every_loss_is_in_the_document_about_them():
    for name in fl.losses.registry:
        assert f"`{name}`" in LOSSES, name
    assert f"There are {len(fl.losses.registry)} losses" in README


def test_the_losses_of_the_line_are_those_that_the_command_prints(monkeypatch, capsys):
    (command,) = (line for block in blocks("sh") for line in block.splitlines() if line.startswith("fallline fit"))
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    shown = blocks("text")[0]
    assert capsys.readouterr().out.startswith(shown)
    assert shown.count("Epoch") == 10


def test_the_two_commands_are_there_and_ci_runs_the_second():
    first, second, *_ = (block.strip() for block in blocks("sh"))
    assert first == "python -m pip install -c constraints.txt -e . && fallline sweep digits"
    install, test = second.split(" && ")
    ci = (Path(__file__).parent.parent / ".ci" / "run").read_text()
    assert install.replace("pip install", "pip install --quiet") in ci
    assert f"\n{test}\n" in ci
