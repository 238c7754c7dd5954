"""The commands as they are typed: what they print, what they leave, how they end."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fallline as fl

HEAVY = ("torch", "polars", "altair", "sklearn", "scipy", "numpy", "jinja2")
TYPED = [sys.executable, "-m", "fallline.cli"]


def plain_line(epochs: int) -> list[str]:
    """The lines that the plain PyTorch loop prints."""
    x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [4.0], [6.0]])
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    order = torch.Generator().manual_seed(0)
    printed = []
    for epoch in range(1, epochs + 1):
        index = torch.randperm(3, generator=order)
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x[index]), y[index])
        loss.backward()
        optimizer.step()
        if epoch % 10 == 0:
            printed.append(f"Epoch [{epoch}/{epochs}], Loss: {loss.item():.4f}")
    return printed


def test_fit_prints_the_figures_of_the_plain_loop(fallline):
    words = ["fit", "line", "--optimizer", "sgd", "--lr", "0.01", "--epochs", "100", "--seed", "0"]
    ended = fallline(*words)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[:10] == plain_line(100)
    assert lines[10].startswith("mse on validation data: ")
    assert lines[11].startswith("Still improving: ")
    assert len(lines) == 12
    assert not list(Path().iterdir())


def test_fit_says_when_a_run_diverges(fallline):
    ended = fallline("fit", "line", "--optimizer", "sgd", "--lr", "10")
    assert ended.code == 0
    assert "Diverged at step" in ended.out
    assert "nan" not in ended.out


def test_fit_goes_on_from_its_checkpoint(fallline):
    words = ["fit", "line", "--lr", "0.1", "--out", "mine"]
    assert fallline(*words, "--epochs", "5").code == 0
    refused = fallline(*words, "--epochs", "5")
    assert refused.code == 2
    assert "resume" in refused.err
    ended = fallline(*words, "--epochs", "10", "--resume")
    assert ended.out.splitlines()[0].startswith("Epoch [6/10]")
    assert fallline(*words, "--epochs", "10", "--resume", "--seed", "1").code == 2


def test_sweep_ranks_reports_and_can_be_shown_again(fallline):
    words = [
        "sweep",
        "line",
        "--seeds",
        "3",
        "--steps",
        "20",
        "--lr",
        "0.01:1:3",
        "--optimizer",
        "adam",
        "--optimizer",
        "sgd:momentum=0.9",
    ]
    ended = fallline(*words)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    assert ended.out.endswith("Report: runs/line/report.html\n")
    assert (Path("runs/line/report.html")).stat().st_size > 10_000
    assert fl.load("runs/line").trials["optimizer"].unique().sort().to_list() == ["adam", "sgd momentum=0.9"]
    again = fallline("report", "runs/line", "--out", "other.html")
    assert again.out.splitlines()[:-1] == ended.out.splitlines()[:-1]
    assert again.out.endswith("Report: other.html\n")
    assert fallline(*words, "--no-report").code == 0
    assert not Path("runs/line-2/report.html").exists()
    assert fallline("report", "runs/line", "--out", "no/such/folder/report.html").code == 2


def test_a_report_that_cannot_be_written_is_one_sentence(fallline, monkeypatch: pytest.MonkeyPatch):
    import errno

    from fallline import reports

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(reports, "write_report", full)
    ended = fallline("sweep", "line", "--seeds", "1", "--steps", "3", "--lr", "0.1")
    assert ended.code == 2
    assert ended.err == (
        "fallline: the report runs/line/report.html could not be written: No space left on device. "
        "The run is whole; try again with: fallline report runs/line\n"
    )


@pytest.mark.parametrize("command", ["tasks", "optimizers", "losses"])
def test_lists_have_a_line_each(fallline, command: str):
    ended = fallline(command)
    assert ended.code == 0
    names = {"tasks": fl.tasks.registry, "optimizers": fl.optim.catalogue.CATALOGUE, "losses": fl.losses.registry}
    lines = [line for line in ended.out.splitlines() if line[0] != " "]
    if command == "optimizers":
        assert lines.pop(0).split() == ["optimizer", "state", "update", "source"]
        lines = lines[:-2]
        (adam,) = (line for line in lines if line.startswith("adam "))
        assert re.fullmatch(r"adam +2 +p − lr·m̂/\(√v̂ \+ eps\) +Kingma & Ba 2015 *", adam)
    if command == "losses":
        assert lines.pop(0).split() == ["loss", "prediction", "target", "formula"]
        assert lines.pop().startswith("Use: --loss NAME")
        (huber,) = (line for line in lines if line.startswith("huber "))
        assert re.fullmatch(r"huber +real values \[N, …\] +real values \[N, …\] +d²/2 up to d .* beyond *", huber)
    assert [line.split()[0] for line in lines] == list(names[command])


def test_a_task_of_ones_own_is_found_and_named_in_the_code(fallline):
    Path("mine.py").write_text(
        "import torch, fallline as fl\n"
        "x = torch.linspace(-1, 1, 20)[:, None]\n"
        "cubic = fl.Task('cubic', lambda: torch.nn.Linear(1, 1), (x, x**3), 'mse', batch_size=5)\n"
    )
    ended = fallline("sweep", "mine.py:cubic", "--seeds", "1", "--steps", "20", "--lr", "0.1")
    assert ended.code == 0
    assert "fl.tasks.resolve('mine.py:cubic')" in fl.load("runs/cubic").best.code


def test_help_and_import_load_nothing_heavy():
    program = (
        "import sys, fallline\n"
        "from fallline.cli import main\n"
        "sys.argv = ['fallline', '--help']\n"
        "try: main()\n"
        "except SystemExit as leaving: assert leaving.code == 0\n"
        f"assert not set({HEAVY!r}) & set(sys.modules), sorted(set({HEAVY!r}) & set(sys.modules))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "sweep" in ended.stdout


def test_a_reader_that_has_seen_enough_is_no_error():
    ended = subprocess.run(
        [f"{shlex.join([*TYPED, '--help'])} | true; {shlex.join([*TYPED, 'optimizers'])} | head -1"],
        shell=True, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.stderr == ""
    assert ended.stdout.startswith("optimizer")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_to_a_full_disk_is_one_sentence():
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([*TYPED, "tasks"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "fallline: No space left on device.\n"


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    """The command in a process group of its own, as a shell starts it."""
    return subprocess.Popen([*TYPED, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)  # fmt: skip


def wait_for(found: object, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not found() and time.monotonic() < deadline:  # type: ignore[operator]
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


SWEEP = [
    "sweep",
    "two_moons",
    "--seeds",
    "4",
    "--steps",
    "3000",
    "--lr",
    "0.01:1:3",
    "--optimizer",
    "adam",
    "--no-report",
    "--workers",
    "2",
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_says_how_to_go_on_and_does(tmp_path: Path, kind: signal.Signals):
    run = tmp_path / "runs" / "two_moons"
    process = start(SWEEP, tmp_path)
    wait_for(lambda: list((run / "history").glob("*.parquet")), process)
    os.killpg(process.pid, kind) if kind == signal.SIGINT else process.send_signal(kind)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    part = fl.load(run)
    assert not part.complete
    typed = re.search(r"Interrupted: what was done is kept in runs/two_moons\. Go on with: fallline (.*)\n", err)
    assert typed is not None, err
    process = start(shlex.split(typed[1]), tmp_path)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    resumed = fl.load(run)
    assert resumed.complete
    before, after = part.history.train_loss, resumed.history.train_loss
    np.testing.assert_array_equal(before[np.isfinite(before)], after[np.isfinite(before)])
    assert np.isfinite(after).all()


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(tmp_path: Path):
    process = start([*SWEEP, "--engine", "sequential"], tmp_path)
    run = tmp_path / "runs" / "two_moons"
    wait_for(lambda: list((run / "history").glob("*.parquet")), process)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Go on with: fallline sweep two_moons" in err
    assert "Traceback" not in err
    assert time.monotonic() - began < 5
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert not fl.load(run).complete


@pytest.mark.slow
def test_an_interrupt_before_anything_was_trained_leaves_nothing(tmp_path: Path):
    process = start(SWEEP, tmp_path)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    if process.returncode != -signal.SIGINT:  # else Python itself was still starting
        assert process.returncode == 130
        assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_an_interrupted_fit_says_how_to_go_on_and_does(tmp_path: Path):
    words = ["fit", "two_moons", "--epochs", "3000", "--lr", "0.01", "--out", "mine"]
    process = start(words, tmp_path)
    wait_for((tmp_path / "mine" / "checkpoint").exists, process)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert re.search(r"Interrupted after \d+ steps; go on with: fallline fit two_moons .* --resume\n", err)
